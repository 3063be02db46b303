"""Running the page: a port of this machine, the browser, and a clean end."""

import errno
import socket
import threading
import webbrowser
from collections.abc import Callable
from typing import TYPE_CHECKING

from capsnet.demo.viewer import Viewer
from capsnet.errors import InputError

if TYPE_CHECKING:
    import uvicorn

__all__ = ["CONNECTIONS", "bind", "serve", "server"]

CONNECTIONS = 128  # a browser opens six; beyond, 503 without a look at the request


def bind(host: str, port: int) -> socket.socket:
    """A socket at `host` and `port`, which others cannot take from now on.

    Args:
        host: a name or number of this machine.
        port: 0 to 65535; 0 takes any that is free.

    Raises:
        InputError: the port is taken or not allowed, or the host is not this machine's.
    """
    if not 0 <= port <= 65535:
        raise InputError(f"--port must be 0 to 65535; got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no name"
        raise InputError(f"--host must be an address of this machine; got {host!r}: {reason}") from None
    found = socket.socket(family, kind, protocol)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # or a restart would wait for a minute
        found.bind(address)
        found.listen()
    except OSError as error:
        found.close()
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"--port must be free; got {port}, which is taken (--port 0 finds a free one)") from None
        if error.errno == errno.EACCES:
            raise InputError(f"--port must be one that you may use; got {port}: {error.strerror}") from None
        raise InputError(f"--host must be an address of this machine; got {host!r}: {error.strerror}") from None
    return found


def serve(viewer: Viewer, *, host: str, port: int, browser: bool, told: Callable[[str], None]) -> None:
    """Serve the page until Ctrl-C.

    Args:
        viewer: the network.
        host: the address to serve at.
        port: see `bind`.
        browser: open the page there.
        told: is called with the page's address as soon as it can be opened.

    Raises:
        InputError: see `bind`.
    """
    with bind(host, port) as listening:
        name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        address = f"http://{f'[{name}]' if ':' in name else name}:{listening.getsockname()[1]}/"
        told(address)
        if browser:  # connections wait until the server takes them; a browser in a terminal does not return
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        server(viewer, host).run(sockets=[listening])


def server(viewer: Viewer, host: str) -> "uvicorn.Server":
    """What serves the page of `viewer` at the address `host`, given to `bind` before."""
    import uvicorn

    from capsnet.demo.app import application
    from capsnet.demo.connections import TimedProtocol

    config = uvicorn.Config(
        application(viewer, host),
        access_log=False,
        http=TimedProtocol,
        lifespan="off",
        limit_concurrency=CONNECTIONS,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=3,
        ws="none",
    )
    return uvicorn.Server(config)
