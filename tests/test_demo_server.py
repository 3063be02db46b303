"""The demo's server against clients that hold its connections, and its application against whatever they send."""

import contextlib
import select
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn

from capsnet.demo import guard, serving
from capsnet.demo.serving import CONNECTIONS, bind, server
from test_demo import viewer

HALF = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n"
GOOD = HALF + b"Connection: close\r\n\r\n"
Address = tuple[str, int]


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[uvicorn.Server, Address]]:
    """A real server of the demo, and where it listens."""
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.5)
    with bind("127.0.0.1", 0) as listening:
        running = server(viewer(), "127.0.0.1")
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        yield running, listening.getsockname()
        running.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server waits for half a second and not for ten."""
    monkeypatch.setattr(serving, "HEADER_SECONDS", 0.5)
    monkeypatch.setattr(serving, "ANSWER_SECONDS", 1.0)


def connected(address: Address, sent: bytes) -> socket.socket:
    connection = socket.create_connection(address, timeout=10)
    connection.sendall(sent)
    return connection


def answer(connection: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    found = b""
    with connection, contextlib.suppress(ConnectionError):
        while part := connection.recv(1 << 16):
            found += part
    return found


def test_connections_without_a_request_make_room_for_one(running: tuple[uvicorn.Server, Address]) -> None:
    with contextlib.ExitStack() as held:
        for _ in range(CONNECTIONS + 2):
            held.enter_context(connected(running[1], HALF))
        assert answer(connected(running[1], GOOD)).startswith(b"HTTP/1.1 200 OK")
        assert len(running[0].server_state.connections) <= CONNECTIONS


@pytest.mark.usefixtures("impatient")
def test_connections_without_a_request_are_closed(running: tuple[uvicorn.Server, Address]) -> None:
    begun = [connected(running[1], HALF) for _ in range(CONNECTIONS + 2)]
    assert [answer(connection) for connection in begun] == [b""] * len(begun)
    assert not running[0].server_state.connections
    assert answer(connected(running[1], GOOD)).startswith(b"HTTP/1.1 200 OK")


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", b""),
        (HALF, b""),
        (HALF + b"\r\n" + HALF, b"200"),  # a second request on the connection of the first
        (b"PUT" + HALF[3:] + b"Content-Length: 9999\r\n\r\n", b"405"),  # a body that nobody reads
        (b"POST /api/look HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\nContent-Length: 9\r\n\r\n", b"408"),
    ],
)
def test_what_comes_byte_by_byte_is_not_waited_for(
    running: tuple[uvicorn.Server, Address], sent: bytes, status: bytes
) -> None:
    start, told, closed = time.monotonic(), b"", False
    with connected(running[1], sent) as connection, contextlib.suppress(ConnectionError):
        while not closed and time.monotonic() - start < 4:
            connection.sendall(b"x")
            if select.select([connection], [], [], 0.1)[0]:
                part = connection.recv(1 << 16)
                told, closed = told + part, not part
    assert status in told[:20]
    assert time.monotonic() - start < 4


@pytest.mark.usefixtures("impatient")
def test_answers_that_are_not_taken_are_dropped(running: tuple[uvicorn.Server, Address]) -> None:
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(running[1])
        with contextlib.suppress(ConnectionError):
            connection.sendall((b"GET /main.js HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n") * 1000)
        held = running[0].server_state.connections
        for there in (True, False):
            until = time.monotonic() + 4
            while bool(held) is not there and time.monotonic() < until:
                time.sleep(0.02)
            assert bool(held) is there
