"""How long a connection is held for a client: uvicorn itself waits for ever, for a header and for an answer to be read.

It times a connection only from an answer to the next byte. A client that sends half a header, and then nothing or a
byte a second, keeps its connection, and 128 of them keep the server.
"""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["ANSWER_SECONDS", "HEADER_SECONDS", "TimedProtocol"]

HEADER_SECONDS = 10.0  # from the connection or the last answer to the end of the next header; idle ones go after 5
ANSWER_SECONDS = 60.0  # from the end of the header to the last byte of the answer that the system takes


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
