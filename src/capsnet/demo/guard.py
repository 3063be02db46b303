"""Request filtering: whose requests are answered, how much of them is read, and the headers of every answer.

The server is for the page that it serves, on the machine that it runs on. Another site open in the same browser can
send requests to 127.0.0.1 too, under its own name (then `Origin` tells) or under a name of its own that it lets point
here (then `Host` tells); both are turned away.
"""

import asyncio
from collections.abc import Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from capsnet.checkpoints.serving.hosts import is_ours
from capsnet.demo.messages import Refusal
from capsnet.files import visible

__all__ = ["HEADERS", "Guard", "Places", "read_body", "refusal"]

BODY_SECONDS = 15.0
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
"""On every answer: nothing is loaded from elsewhere, no other page frames or reads this one."""


class Guard:
    """ASGI middleware that lets `app` answer only requests of the page, served at this address, and adds `HEADERS`."""

    def __init__(self, app: ASGIApp, served: str) -> None:
        self.app, self.served = app, served

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check one request and pass it on, or refuse it."""
        if scope["type"] != "http":
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        obstacle = self._obstacle(scope)
        if obstacle is None:
            await self.app(scope, receive, send_with_headers)
        else:
            await refusal(403, obstacle)(scope, receive, send_with_headers)

    def _obstacle(self, scope: Scope) -> str | None:
        """What is wrong with where a request comes from; None if nothing is."""
        headers = Headers(scope=scope)
        host = headers.getlist("host")  # starlette's TrustedHostMiddleware looks at the first of several only
        if len(host) != 1 or not is_ours(host[0], self.served):
            return f"Host must be the address of this server; got {', '.join(host)[:80] or 'none'}"
        if scope["method"] in ("GET", "HEAD"):
            return None
        site, origin = headers.getlist("sec-fetch-site"), headers.getlist("origin")
        if site not in ([], ["same-origin"]):
            return f"requests must come from the page of this server; got Sec-Fetch-Site {', '.join(site)[:80]}"
        if origin and [one.lower() for one in origin] not in ([f"{s}://{host[0].lower()}"] for s in ("http", "https")):
            return f"requests must come from the page of this server; got Origin {', '.join(origin)[:80]}"
        return None


def refusal(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The answer to a request that is refused: JSON with one line, of which no character is hidden."""
    return JSONResponse({"error": visible(message)}, status, headers)


class Places:
    """How many requests may be under way, bodies and all; one more is refused at once. For one event loop."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.taken = 0

    def __enter__(self) -> None:
        if self.taken >= self.count:
            message = f"at most {self.count} requests can wait; try again in a second"
            raise Refusal(503, message, {"Retry-After": "1", "Connection": "close"})
        self.taken += 1

    def __exit__(self, *_: object) -> None:
        self.taken -= 1


async def read_body(request: Request, limit: int) -> bytes:
    """The body of a request, of which no more than `limit` bytes are ever held.

    Raises:
        Refusal: 413 for a longer one, at once where the length is declared; 408 where it takes more than 15 seconds.
    """
    # What was not read cannot be told from a next request: the connection ends with the refusal.
    close = {"Connection": "close"}
    too_long = Refusal(413, f"body must be at most {limit} bytes; got more", close)
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limit:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                if len(body) + len(chunk) > limit:
                    raise too_long
                body += chunk
    except TimeoutError:
        raise Refusal(408, f"body must arrive within {BODY_SECONDS:g} seconds", close) from None
    except ClientDisconnect:
        raise Refusal(400, "body must be whole; the connection was closed before its end", close) from None
    return bytes(body)
