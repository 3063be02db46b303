"""Running the page: a port of this machine, the browser, connections with a time limit, and a clean end.

uvicorn times a connection only from an answer to the next byte. A client that sends half a header, and then nothing or
a byte a second, would keep its connection, and 128 of them the server.
"""

import asyncio
import errno
import socket
import threading
import webbrowser
from collections.abc import Callable

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from capsnet.demo.app import application
from capsnet.demo.viewer import Viewer
from capsnet.errors import InputError

__all__ = ["CONNECTIONS", "TimedProtocol", "bind", "serve", "server"]

CONNECTIONS = 128  # a browser opens six; beyond, 503 without a look at the request
HEADER_SECONDS = 10.0  # from the connection or the last answer to the end of the next header; idle ones go after 5
ANSWER_SECONDS = 60.0  # from the end of the header to the last byte of the answer that the system takes


def bind(host: str, port: int) -> socket.socket:
    """A socket at `host`, of this machine, and `port`, which others cannot take from now on; 0 is any that is free.

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
    """Serve the page until Ctrl-C, and open it in a `browser`.

    `told` is called with the page's address as soon as it can be opened.

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


def server(viewer: Viewer, host: str) -> uvicorn.Server:
    """What serves the page of `viewer` at the address `host`, given to `bind` before."""
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


class TimedProtocol(H11Protocol):
    """HTTP/1.1 whose connections are dropped after `HEADER_SECONDS` without a request, `ANSWER_SECONDS` after one.

    Where as many are open as may be, the one that has waited longest for a request makes room for a new one.
    """

    deadline: asyncio.TimerHandle

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        super().connection_made(transport)
        self.deadline = self.loop.call_later(HEADER_SECONDS, transport.abort)
        waiting = [one for one in self.connections if isinstance(one, TimedProtocol) and one.waiting]
        if self.limit_concurrency and len(self.connections) >= self.limit_concurrency and len(waiting) > 1:
            longest = min(waiting, key=lambda one: one.deadline.when())
            longest.transport.abort()
            self.connections.discard(longest)  # at once: others may be made before it is lost

    @property
    def waiting(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def handle_events(self) -> None:
        """Wait for the answer to be given and taken, if a header is complete."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._wait(ANSWER_SECONDS)

    def on_response_complete(self) -> None:
        """Wait for the next request, which may have come already."""
        self._wait(HEADER_SECONDS)
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self.deadline.cancel()
        super().connection_lost(exc)

    def _wait(self, seconds: float) -> None:
        self.deadline.cancel()
        self.deadline = self.loop.call_later(seconds, self.transport.abort)
