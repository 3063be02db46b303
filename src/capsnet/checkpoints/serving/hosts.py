"""Whose requests a server of this machine answers: names that others let point here are none of its own."""

import ipaddress
import re
import socket

__all__ = ["is_ours"]


def is_ours(host: str, served: str) -> bool:
    """Whether the name in a `Host` header is one that the server at address `served` goes by.

    Args:
        host: the whole header, with a port or without; which port does not matter (it may be forwarded).
        served: the address given to `--host`. Where that means all of this machine's addresses (0.0.0.0, ::), any
            number may be asked for, as only names can be made to point here by others.
    """
    found = re.fullmatch(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?", host.lower())
    if not found:
        return False
    name = found[1].strip("[]")
    if name in {"localhost", "127.0.0.1", "::1", served.lower()}:
        return True
    if served not in ("0.0.0.0", "::"):
        return False
    if name == socket.gethostname().lower():
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
