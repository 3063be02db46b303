"""The table of addresses: the page's files, from memory, and the three questions that it asks the network."""

import asyncio
import math
import re
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import PurePath
from typing import Any, Literal, cast

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from capsnet.demo.guard import Guard, Places, read_body, refusal
from capsnet.demo.messages import Refusal, one_of, picture, read_json, vectors, whole
from capsnet.demo.viewer import Viewer
from capsnet.errors import InputError

__all__ = ["IMAGE_LIMIT", "PLACES", "application"]

PLACES = 16  # times IMAGE_LIMIT, 128 MiB, is the most that all bodies together can hold
IMAGE_LIMIT = 8 << 20  # bytes of an image file: a telephone's photographs have 2 to 6 MB
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

Handler = Callable[[Request], Awaitable[Response]]


def application(viewer: Viewer, served: str = "127.0.0.1") -> Guard:
    """The page for one network.

    All requests to the network are computed one after the other in one thread, so that the server stays responsive and
    PyTorch is entered once at a time. Requests that ask for another address than that `served` are refused.
    """
    places = Places(PLACES)
    thread = ThreadPoolExecutor(1, thread_name_prefix="network")
    json_limit = (64 << 10) + 2 * math.prod(viewer.image_shape)

    def question(kind: str, limit: int, answer: Callable[[Request, bytes], dict[str, Any]]) -> Handler:
        """What answers POSTs of media type `kind` with a body of up to `limit` bytes."""

        async def endpoint(request: Request) -> Response:
            media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if not media.startswith(kind):
                raise Refusal(415, f"Content-Type must be {kind}; got {media[:80] or 'none'}", {"Connection": "close"})
            with places:
                body = await read_body(request, limit)
                found = await asyncio.get_running_loop().run_in_executor(thread, answer, request, body)
            return JSONResponse(found, headers={"cache-control": "no-store"})

        return endpoint

    def look(request: Request, body: bytes) -> dict[str, Any]:
        query = request.query_params
        if not query.keys() <= {"invert", "class"}:
            raise Refusal(422, f"query must have invert and class only; got {', '.join(query)[:80]}")
        invert = one_of(query.get("invert", "auto"), "invert", ("auto", "yes", "no"))
        chosen = query.get("class")
        number = int(chosen) if chosen and re.fullmatch("[0-9]{1,9}", chosen) else chosen
        index = None if chosen is None else whole(number, "class", len(viewer.classes))
        return viewer.look(body, invert=cast(Literal["auto", "yes", "no"], invert), index=index)

    def imagine(_: Request, body: bytes) -> dict[str, Any]:
        message = read_json(body, ("class", "poses"))
        index = whole(message["class"], "class", len(viewer.classes))
        return viewer.imagine(vectors(message["poses"], "poses", viewer.dim), index)

    def evidence(_: Request, body: bytes) -> dict[str, Any]:
        message = read_json(body, ("class", "image"))
        index = whole(message["class"], "class", len(viewer.classes))
        return viewer.evidence(picture(message["image"], "image", viewer.image_shape), index)

    async def model(_: Request) -> Response:
        return JSONResponse(viewer.describe(), headers={"cache-control": "no-store"})

    async def refused(_: Request, error: Exception) -> Response:
        if isinstance(error, Refusal):
            return refusal(error.status, error.message, error.headers)
        if isinstance(error, HTTPException):
            return refusal(error.status_code, error.detail, error.headers)
        return refusal(422, str(error))

    async def failed(_: Request, __: Exception) -> Response:
        return refusal(500, "the server failed at this; its terminal says how")

    routes = [
        *_page(),
        Route("/api/model", model),
        Route("/api/look", question("image/", IMAGE_LIMIT, look), methods=["POST"]),
        Route("/api/imagine", question("application/json", json_limit, imagine), methods=["POST"]),
        Route("/api/evidence", question("application/json", json_limit, evidence), methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {Refusal: refused, InputError: refused, HTTPException: refused, Exception: failed}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.state.places = places
    app.router.redirect_slashes = False
    return Guard(app, served)


def _page() -> Iterator[Route]:
    """The files of the page; read once, so that no request reaches the disk."""
    for file in files("capsnet.demo").joinpath("static").iterdir():
        headers = {"content-type": TYPES[PurePath(file.name).suffix], "cache-control": "no-cache"}
        address = "/" if file.name == "index.html" else f"/{file.name}"
        yield Route(address, Response(file.read_bytes(), headers=headers), methods=["GET"])
