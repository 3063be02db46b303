"""Random and mutated requests to the demo's application: a right answer, or one line about what is wrong."""

import asyncio
import base64
import json
from collections.abc import Iterator, MutableMapping
from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capsnet.demo.app import application
from capsnet.files import visible
from test_demo import image_file, random_image, viewer

SHAPE = (1, 12, 13)
PICTURE = base64.b64encode(bytes(156)).decode()
IMAGES = [
    *(image_file(random_image(3, 20, 16), kind) for kind in ("png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm")),
    image_file(random_image(*SHAPE), "ppm"),
    image_file(random_image(*SHAPE), "png"),
]
NUMBERS = st.one_of(
    st.integers(),
    st.sampled_from([0, 1, 2, -1, 10**400, -(10**30), 2**63, 1e308, -0.0]),
    st.floats(),  # NaN and infinities too, which json.dumps writes as no JSON
)
TEXT = st.text(st.characters(exclude_categories=()), max_size=60)  # surrogates and control characters too
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT | st.sampled_from([PICTURE, PICTURE[:-4], PICTURE + "AAAA"]),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
POSES = st.lists(st.lists(st.floats(-10, 10), min_size=4, max_size=4) | VALUES, max_size=70)


@st.composite
def damaged(draw: st.DrawFn, contents: st.SearchStrategy[bytes]) -> bytes:
    """A content as it is, cut short, or with some bytes changed."""
    content = bytearray(draw(contents))
    for _ in range(draw(st.integers(0, 4)) if content else 0):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.sampled_from([len(content), len(content), draw(st.integers(0, len(content)))]))])


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """JSON like that of the page, with wrong kinds, other fields, or a depth that no reader follows."""
    message: Any = {
        "class": draw(st.integers(0, 2) | VALUES),
        draw(st.sampled_from(["poses", "image"])): draw(POSES | st.just(PICTURE) | VALUES),
    }
    if draw(st.booleans()):
        message = draw(st.sampled_from([[message], {**message, draw(TEXT): draw(VALUES)}, draw(VALUES)]))
    text = json.dumps(message, ensure_ascii=draw(st.booleans()))
    depth = draw(st.sampled_from([0, 0, 0, 1, 500, 30_000]))
    return ('{"class":' * depth + text + "}" * depth).encode("utf-8", "surrogatepass")


PATHS = st.one_of(
    st.sampled_from(["/api/look", "/api/imagine", "/api/evidence"]),
    st.sampled_from(["/", "/api/model", "/main.js", "/api/look/", "//", "/..%2f", "/api/%00", "/%ff", "*", ""]),
    st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=30).map(lambda text: "/" + text),
)
QUERIES = st.one_of(
    st.sampled_from(["", "invert=auto", "invert=yes&class=1", "class=2", "class=-1", "class=%ED%A0%80", "invert=\x1b"]),
    st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=40),
)
HEADERS = st.lists(
    st.tuples(
        st.sampled_from([b"content-type", b"content-length", b"origin", b"sec-fetch-site", b"host", b"cookie"]),
        st.sampled_from([b"image/png", b"application/json", b"9" * 400, b"-1", b"http://127.0.0.1:8000", b"cross-site"])
        | st.binary(max_size=40),
    ),
    max_size=3,
)


@st.composite
def requests(draw: st.DrawFn) -> tuple[MutableMapping[str, Any], list[bytes]]:
    """What a server says of a request, and its body in parts; most requests are nearly those of the page."""
    path, query = draw(PATHS), draw(QUERIES)
    kind = b"image/png" if path == "/api/look" else b"application/json"
    headers = [(b"host", b"127.0.0.1:8000"), (b"content-type", kind)]
    if draw(st.integers(0, 2)) == 0:
        headers = draw(st.permutations([*headers, *draw(HEADERS)]))[: draw(st.integers(1, 5))]
    body = draw(damaged(st.sampled_from(IMAGES)) if path == "/api/look" else messages() | st.binary(max_size=200))
    cut = draw(st.integers(0, len(body)))
    method = draw(st.sampled_from(["POST", "POST", "POST", "GET", "HEAD", "PUT", "OPTIONS", "TRACE", "X"]))
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "path": unquote(path),
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": headers,
        "scheme": "http",
        "server": ("127.0.0.1", 8000),
        "client": ("127.0.0.1", 1),
    }
    return scope, [body[:cut], body[cut:]]


@pytest.fixture(scope="module")
def asked() -> Iterator[Any]:
    """Asks the application, and checks the answer."""
    app = application(viewer())
    sent: list[MutableMapping[str, Any]] = []

    async def ask(scope: MutableMapping[str, Any], parts: list[bytes]) -> None:
        waiting = list(parts)

        async def receive() -> MutableMapping[str, Any]:
            if not waiting:
                return {"type": "http.disconnect"}
            part = waiting.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(waiting)}

        async def send(message: MutableMapping[str, Any]) -> None:
            sent.append(message)

        await app(scope, receive, send)

    def checked(scope: MutableMapping[str, Any], parts: list[bytes]) -> int:
        sent.clear()
        runner.run(ask(scope, parts))
        status, body = sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])
        assert status == 200 or 400 <= status < 500 or status == 503
        if status != 200:
            error = json.loads(body)["error"]
            assert error == visible(error)
            assert 0 < len(error) < 500
        elif scope["path"].startswith("/api/"):
            assert isinstance(json.loads(body), dict)
        return int(status)

    with asyncio.Runner() as runner:
        yield checked


def statuses(asked: Any, count: int, *, derandomize: bool = False) -> set[int]:
    """How `count` requests are answered."""
    found = set()

    @settings(max_examples=count, deadline=None, derandomize=derandomize, database=None)
    @given(request=requests())
    def ask(request: tuple[MutableMapping[str, Any], list[bytes]]) -> None:
        found.add(asked(*request))

    ask()
    return found


def test_every_request_is_answered_rightly_or_with_one_line(asked: Any) -> None:
    assert {200, 400, 403, 404, 405, 415, 422} <= statuses(asked, 500, derandomize=True)


@pytest.mark.slow
def test_ten_thousand_other_requests(asked: Any) -> None:
    statuses(asked, 10_000)
