import asyncio
import base64
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import AsyncIterator, Iterator, MutableMapping
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient
from torch import Tensor

import capsnet
from capsnet import functional as F
from capsnet.analysis.routing_trace import evidence
from capsnet.checkpoints.serving.hosts import is_ours
from capsnet.cli import CAPSNET, main
from capsnet.cli.demo import Demo
from capsnet.cli.parsing import parse
from capsnet.data.photo import Frame
from capsnet.demo import guard, messages
from capsnet.demo.app import IMAGE_LIMIT, PLACES, application
from capsnet.demo.serving import bind
from capsnet.demo.viewer import Viewer
from capsnet.errors import InputError
from capsnet.evaluation.ood import Threshold
from capsnet.models import create
from capsnet.models.capsnet import CapsNet
from tiny import SIZES, reading

HOME = "http://127.0.0.1:8000"
SHAPES = [(1, 12, 13), (3, 14, 12)]


def network(shape: tuple[int, int, int] = (1, 12, 13), classes: int = 3, **options: Any) -> CapsNet:
    torch.manual_seed(0)
    made = (
        create("capsnet", image_shape=shape, num_classes=classes, **{**SIZES, **options}).eval().requires_grad_(False)
    )
    assert isinstance(made, CapsNet)
    return made


def viewer(shape: tuple[int, int, int] = (1, 12, 13), frame: Frame | None = None) -> Viewer:
    return Viewer(
        network(shape), "tiny", reading=reading(shape, frame), threshold=Threshold(7.5, 0.05, 100, "validation")
    )


def client_of(one: Viewer, served: str = "127.0.0.1") -> TestClient:
    return TestClient(application(one, served), base_url=HOME, raise_server_exceptions=False)


@pytest.fixture
def client() -> TestClient:
    return client_of(viewer())


def image_file(pixels: Tensor, kind: str = "png") -> bytes:
    """`uint8 [C, H, W]` as the content of a file."""
    content = BytesIO()
    array = pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy()
    Image.fromarray(array).save(content, kind)
    return content.getvalue()


def random_image(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def decoded(text: str, shape: tuple[int, int, int]) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8).view(shape)


def look(client: TestClient, body: bytes, query: str = "", kind: str = "image/png") -> Any:
    return client.post(f"/api/look{query}", content=body, headers={"content-type": kind})


# the answers are those of the network


@pytest.mark.parametrize("shape", SHAPES)
def test_the_model_is_described(shape: tuple[int, int, int]) -> None:
    described = client_of(viewer(shape, Frame(0.0, 0.7))).get("/api/model").json()
    assert described == {
        "name": "tiny",
        "classes": ["0", "1", "2"],
        "channels": shape[0],
        "height": shape[1],
        "width": shape[2],
        "dim": 4,
        "steps": ["1", "2", "3"],
        "frame": {"ground": 0.0, "box": 0.7},
        "threshold": 7.5,
    }
    assert client_of(viewer(shape)).get("/api/model").json()["frame"] is None


def test_names_are_told_as_visible_text() -> None:
    hostile = ("\udcff", "\x1b[31m\n", "<img src=x onerror=alert(1)>")
    named = create(**{**network().config, "classes": hostile}).eval()
    one = Viewer(named, "\udcff\u202e", reading=reading((1, 12, 13)), threshold=None)
    described = client_of(one).get("/api/model").json()
    assert described["classes"] == [r"\udcff", r"\x1b[31m\n", hostile[2]]
    assert described["name"] == r"\udcff\u202e"


def test_the_page_takes_names_as_text() -> None:
    scripts = (Path(capsnet.__file__).parent / "demo" / "static").glob("*.js")
    text = "".join(path.read_text(encoding="utf-8") for path in scripts)
    assert "textContent: name" in text
    assert not re.search(
        r"\b(innerHTML|outerHTML|insertAdjacentHTML|document\.write|setHTML|srcdoc|eval|Function)\b", text
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["png", "ppm"])
def test_looking_gives_the_numbers_of_the_network(shape: tuple[int, int, int], kind: str) -> None:
    one = viewer(shape)
    image = random_image(*shape)
    answer = look(client_of(one), image_file(image, kind))
    assert answer.status_code == 200, answer.text
    found = answer.json()
    output = one.network(image[None].float() / 255)
    assert torch.equal(decoded(found["image"], shape), image)
    assert found["lengths"] == pytest.approx(output.scores[0].tolist(), abs=1e-6)
    torch.testing.assert_close(torch.tensor(found["poses"]), output.pose[0], rtol=0, atol=1e-6)
    assert found["winner"] == int(output.scores.argmax())
    assert abs(decoded(found["reconstruction"], shape).int() - output.reconstruction[0] * 255).max() <= 0.5 + 1e-3
    error = F.reconstruction_loss(output.reconstruction, image[None].float() / 255)
    assert found["error"] == pytest.approx(float(error), rel=1e-5)
    assert (found["inverted"], found["framed"]) == (False, False)


def test_another_capsule_can_be_drawn() -> None:
    one, shape = viewer(), (1, 12, 13)
    image = random_image(*shape)
    pixels = image[None].float() / 255
    plain = look(client_of(one), image_file(image)).json()
    for index in range(3):
        found = look(client_of(one), image_file(image), f"?class={index}").json()
        wanted = one.network(pixels, torch.tensor([index])).reconstruction
        assert abs(decoded(found["reconstruction"], shape).int() - wanted[0] * 255).max() <= 0.5 + 1e-3
        assert found["winner"] == plain["winner"]
        assert found["error"] == pytest.approx(plain["error"], rel=1e-6)  # of the winner whatever is drawn


def test_a_file_is_prepared_as_the_training_images_are() -> None:
    one = viewer(frame=Frame(0.0, 0.7))
    sheet = torch.full((1, 90, 70), 255, dtype=torch.uint8)
    sheet[:, 20:60, 30:38] = 0
    answer = look(client_of(one), image_file(sheet))
    assert answer.status_code == 200, answer.text
    found = answer.json()
    wanted = one.reading(image_file(sheet))
    assert torch.equal(decoded(found["image"], (1, 12, 13)), wanted.image)
    assert (found["inverted"], found["framed"]) == (wanted.inverted, wanted.framed) == (True, True)
    kept = look(client_of(one), image_file(sheet), "?invert=no").json()
    assert not kept["inverted"]


@pytest.mark.parametrize("shape", SHAPES)
def test_imagining_draws_each_vector_from_its_capsule(shape: tuple[int, int, int]) -> None:
    one = viewer(shape)
    poses = torch.rand(5, 4, generator=torch.Generator().manual_seed(2)) - 0.5
    answer = client_of(one).post("/api/imagine", json={"class": 1, "poses": poses.tolist()})
    assert answer.status_code == 200, answer.text
    whole = torch.zeros(5, 3, 4)
    whole[:, 1] = poses
    wanted = one.decoder(whole, torch.ones(5, dtype=torch.int64)) * 255
    images = torch.stack([decoded(text, shape) for text in answer.json()["images"]])
    assert abs(images.int() - wanted).max() <= 0.5 + 1e-3
    assert len(set(answer.json()["images"])) == 5


@pytest.mark.parametrize("shape", SHAPES)
def test_evidence_is_that_of_the_analysis(shape: tuple[int, int, int]) -> None:
    one = viewer(shape)
    for name, weight in one.network.named_parameters():
        if name in ("primary.conv.weight", "class_capsules.weight"):
            weight.mul_(30)  # the couplings of new weights differ by no more than rounding
    image = random_image(*shape)
    text = base64.b64encode(image.numpy().tobytes()).decode()
    answer = client_of(one).post("/api/evidence", json={"class": 2, "image": text})
    assert answer.status_code == 200, answer.text
    found, wanted = answer.json(), evidence(one.network, image[None].float() / 255)
    maps = torch.frombuffer(bytearray(base64.b64decode(found["maps"])), dtype=torch.float32)
    torch.testing.assert_close(maps.view(3, *shape[1:]), wanted.support[:, 0, 2].clone())
    assert (wanted.support[1:, 0, 2] - wanted.support[1:, 0, 0]).abs().max() > 1e-3
    assert found["lengths"] == pytest.approx(F.lengths(wanted.pose)[:, 0, 2].tolist())
    assert found["entropy"] == pytest.approx(wanted.entropy[:, 0].tolist())


def test_a_network_without_capsules_or_decoder_is_refused() -> None:
    for made, message in (
        (create("baseline", image_shape=(1, 12, 13)), "model must have capsules; got baseline"),
        (network(reconstruction=False), "model must have a decoder"),
        (network((2, 12, 13)), "model must take images of 1 or 3 channels; got 2"),
    ):
        with pytest.raises(InputError, match=message):
            Viewer(made, "x", reading=reading(made.image_shape), threshold=None)


# the page


def test_the_page_and_all_that_it_names_are_served(client: TestClient) -> None:
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    kinds = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    folder = Path(capsnet.__file__).parent / "demo" / "static"
    for path in folder.iterdir():
        if path.name != "index.html":
            answer = client.get(f"/{path.name}")
            assert answer.content == path.read_bytes()
            assert answer.headers["content-type"].startswith(kinds[path.suffix])
    text = "".join(path.read_text(encoding="utf-8") for path in folder.iterdir())
    assert "https://" not in text
    assert text.count("http://") == 1  # the name space of SVG, which is not fetched
    assert client.head("/").status_code == 200


def test_no_path_reaches_the_disk(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a file was opened")

    monkeypatch.setattr("builtins.open", never)
    monkeypatch.setattr(Path, "open", never)
    monkeypatch.setattr(Path, "read_bytes", never)
    assert client.get("/style.css").status_code == 200
    for path in (
        "/../app.py",
        "/%2e%2e/app.py",
        "/static/main.js",
        "//etc/passwd",
        "/..%2f..%2fetc/passwd",
        "/main.js/",
    ):
        answer = client.get(path)
        assert answer.status_code == 404, path
        assert answer.json() == {"error": "Not Found"}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 200),
        ("GET", "/nothing", 404),
        ("PUT", "/", 405),
        ("GET", "/api/look", 405),
        ("GET", "/api/model", 200),
    ],
)
def test_every_answer_carries_the_headers(client: TestClient, method: str, path: str, status: int) -> None:
    for host in ("127.0.0.1:8000", "evil.example"):
        answer = client.request(method, path, headers={"host": host})
        assert answer.status_code == (status if host.startswith("127") else 403)
        assert {name: answer.headers[name] for name in guard.HEADERS} == guard.HEADERS
    policy = guard.HEADERS["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "*" not in policy


def test_what_fails_here_is_answered_and_the_server_goes_on(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Viewer, "look", lambda *_, **__: 1 / 0)
        answer = look(client, image_file(random_image(1, 12, 13)))
    assert answer.status_code == 500
    assert set(answer.json()) == {"error"}
    assert "ZeroDivision" not in answer.text
    assert look(client, image_file(random_image(1, 12, 13))).status_code == 200


# whose requests are answered


@pytest.mark.parametrize(
    ("host", "served", "ours"),
    [
        ("127.0.0.1:8000", "127.0.0.1", True),
        ("localhost", "127.0.0.1", True),
        ("LOCALHOST:1", "127.0.0.1", True),
        ("[::1]:8000", "127.0.0.1", True),
        ("evil.example:8000", "127.0.0.1", False),
        ("127.0.0.1.evil.example", "127.0.0.1", False),
        ("localhost.evil.example", "127.0.0.1", False),
        ("evil.example@127.0.0.1", "127.0.0.1", False),
        ("127.0.0.1:8000:1", "127.0.0.1", False),
        ("192.168.1.5", "127.0.0.1", False),
        ("", "127.0.0.1", False),
        ("box.local:80", "box.local", True),
        ("other.local", "box.local", False),
        ("[fe80::2]:80", "fe80::2", True),
        ("192.168.1.5:80", "0.0.0.0", True),
        ("[fe80::2]", "::", True),
        (socket.gethostname(), "0.0.0.0", True),
        ("evil.example", "0.0.0.0", False),
    ],
)
def test_only_names_of_this_server_are_answered(host: str, served: str, ours: bool) -> None:
    assert is_ours(host, served) is ours


def test_the_host_is_asked_for_on_every_request(client: TestClient) -> None:
    assert client.get("/", headers={"host": "evil.example"}).json() == {
        "error": "Host must be the address of this server; got evil.example"
    }
    two = client.get("/", headers=[("host", "127.0.0.1"), ("host", "evil.example")])
    assert two.status_code == 403
    assert client_of(viewer(), "box.local").get("/", headers={"host": "box.local"}).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),  # no browser
        ({"origin": HOME, "sec-fetch-site": "same-origin"}, 200),
        ({"origin": HOME}, 200),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "http://127.0.0.1:9000"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"origin": HOME, "sec-fetch-site": "cross-site"}, 403),
    ],
)
def test_posts_of_other_sites_are_refused(client: TestClient, headers: dict[str, str], status: int) -> None:
    body = {"class": 0, "poses": [[0.0] * 4]}
    assert client.post("/api/imagine", json=body, headers=headers).status_code == status


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""]
)
def test_forms_of_other_sites_are_refused_by_their_type(client: TestClient, kind: str) -> None:
    for path in ("look", "imagine", "evidence"):
        answer = client.post(f"/api/{path}", content=b"{}", headers={"content-type": kind} if kind else {})
        assert answer.status_code == 415
        assert "Content-Type must be" in answer.json()["error"]


# what is sent


def head_of_png(width: int, height: int) -> bytes:
    """The beginning of a PNG file that says it has so many pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "image must be a readable image; got: an empty file"),
        (b"no image", "image must be a readable image"),
        (image_file(random_image(1, 40, 40))[:200], "image must be a readable image"),
        (b"P5\n28 28\n255\n" + bytes(100), "image must be a readable image"),
        (b"P5\n99999999 99999999\n255\n", "image must"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image must be a readable image"),
    ],
)
def test_what_is_no_image_is_told(client: TestClient, body: bytes, message: str) -> None:
    answer = look(client, body)
    assert answer.status_code == 422
    assert answer.json()["error"].startswith(message)
    assert "\n" not in answer.json()["error"]


@pytest.mark.parametrize(("width", "height"), [(8000, 4001), (12_000, 12_000), (30_000, 30_000)])
def test_a_small_file_of_a_giant_image_is_refused_undecoded(
    client: TestClient, width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("the image was decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", never)
    pixels = chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
    answer = look(client, head_of_png(width, height) + pixels + chunk(b"IEND", b""))
    assert answer.status_code == 422
    told = answer.json()["error"]
    assert re.search(rf"^image must have at most [\d,]+ pixels; got {width}x{height}$", told)
    assert "\n" not in told


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("?invert=maybe", "invert must be one of auto, yes, no; got maybe"),
        ("?class=3", "class must be a whole number from 0 to 2; got 3"),
        ("?class=-1", "class must be a whole number from 0 to 2; got -1"),
        ("?class=1.0", "class must be a whole number from 0 to 2; got 1.0"),
        ("?class=", "class must be a whole number from 0 to 2; got "),
        ("?class=%C2%B2", "class must be a whole number from 0 to 2; got ²"),
        ("?class=" + "9" * 5000, "class must be a whole number from 0 to 2"),
        ("?path=/etc/passwd", "query must have invert and class only; got path"),
    ],
)
def test_wrong_queries_are_told(client: TestClient, query: str, message: str) -> None:
    answer = look(client, image_file(random_image(1, 12, 13)), query)
    assert answer.status_code == 422
    assert answer.json()["error"].startswith(message)


GOOD = [0.1, -0.2, 0.3, 0]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ("", 400, "body must be JSON"),
        ("{", 400, "body must be JSON"),
        (b"\xff\xfe", 400, "body must be JSON"),
        ("[" * 20_000, 400, "body must be JSON"),
        ("9" * 5000, 400, "body must be JSON"),
        ('{"class": 0, "poses": [[NaN, 0, 0, 0]]}', 400, "body must be JSON; got: NaN, which is not a number of JSON"),
        ('{"class": 0, "poses": [[-Infinity, 0, 0, 0]]}', 400, "body must be JSON; got: -Infinity"),
        ('{"class": 0, "poses": [[1e999, 0, 0, 0]]}', 422, "poses[0][0] must be a number from -10 to 10; got inf"),
        ("[]", 400, "body must be a JSON object; got a list"),
        ("null", 400, "body must be a JSON object; got null"),
        ({"class": 0}, 422, "body must have the fields class, poses; got class"),
        (
            {"class": 0, "poses": [GOOD], "path": 1},
            422,
            "body must have the fields class, poses; got class, poses, path",
        ),
        ({"class": 3, "poses": [GOOD]}, 422, "class must be a whole number from 0 to 2; got 3"),
        ({"class": -1, "poses": [GOOD]}, 422, "class must be a whole number from 0 to 2; got -1"),
        ({"class": True, "poses": [GOOD]}, 422, "class must be a whole number from 0 to 2; got True"),
        ({"class": 1.0, "poses": [GOOD]}, 422, "class must be a whole number from 0 to 2; got 1.0"),
        ('{"class": "\\ud800\\n", "poses": []}', 422, "class must be a whole number from 0 to 2; got \\ud800\\n"),
        ('{"\\ud800\\u0007": 0}', 422, "body must have the fields class, poses; got \\ud800\\x07"),
        (
            {"class": 10**30, "poses": [GOOD]},
            422,
            "class must be a whole number from 0 to 2; got a number of many digits",
        ),
        ({"class": 0, "poses": []}, 422, "poses must be a list of 1 to 64 vectors; got 0"),
        ({"class": 0, "poses": [GOOD] * 65}, 422, "poses must be a list of 1 to 64 vectors; got 65"),
        ({"class": 0, "poses": {"0": GOOD}}, 422, "poses must be a list of 1 to 64 vectors; got an object"),
        ({"class": 0, "poses": [GOOD, GOOD[:3]]}, 422, "poses[1] must be a list of 4 numbers; got 3"),
        ({"class": 0, "poses": [GOOD, 5]}, 422, "poses[1] must be a list of 4 numbers; got a number"),
        ({"class": 0, "poses": [[0, 0, "1", 0]]}, 422, "poses[0][2] must be a number from -10 to 10; got 1"),
        ({"class": 0, "poses": [[0, 0, True, 0]]}, 422, "poses[0][2] must be a number from -10 to 10; got True"),
        ({"class": 0, "poses": [[0, 0, 0, 10.5]]}, 422, "poses[0][3] must be a number from -10 to 10; got 10.5"),
        ({"class": 0, "poses": [[0, 0, 0, 10**400]]}, 422, "poses[0][3] must be a number from -10 to 10"),
    ],
)
def test_wrong_vectors_are_told(client: TestClient, body: Any, status: int, message: str) -> None:
    content = json.dumps(body) if isinstance(body, dict) else body
    answer = client.post("/api/imagine", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status
    assert answer.json()["error"].startswith(message)
    assert client.post("/api/imagine", json={"class": 0, "poses": [GOOD]}).status_code == 200


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (5, "image must be a string in base64; got a number"),
        ("a b", "image must be a string in base64; got a b"),
        ("é", "image must be a string in base64; got é"),
        ("AAAA", "image must be 1 x 12 x 13 bytes; got 3"),
        (base64.b64encode(bytes(157)).decode(), "image must be 1 x 12 x 13 bytes; got 157"),
    ],
)
def test_wrong_pictures_are_told(client: TestClient, image: Any, message: str) -> None:
    answer = client.post("/api/evidence", json={"class": 0, "image": image})
    assert answer.status_code == 422
    assert answer.json() == {"error": message}


# how much is read, and how much at a time


def scope(path: str, *headers: tuple[str, str], kind: str = "image/png") -> MutableMapping[str, Any]:
    """What a server says of a POST."""
    sent = [("host", "127.0.0.1:8000"), ("content-type", kind), *headers]
    return {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in sent],
        "scheme": "http",
        "server": ("127.0.0.1", 8000),
        "client": ("127.0.0.1", 1),
    }


async def answered(
    app: Any, asked: MutableMapping[str, Any], parts: AsyncIterator[bytes]
) -> tuple[int, Any, dict[str, str]]:
    """Status, JSON and headers of the answer to a request whose body arrives in `parts`."""
    got: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        async for part in parts:
            return {"type": "http.request", "body": part, "more_body": True}
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: MutableMapping[str, Any]) -> None:
        got.append(message)

    await app(asked, receive, send)
    content = b"".join(message.get("body", b"") for message in got[1:])
    return got[0]["status"], json.loads(content), {k.decode(): v.decode() for k, v in got[0]["headers"]}


def test_a_body_that_is_too_long_is_refused_while_it_arrives() -> None:
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += 1 << 20
            yield bytes(1 << 20)

    status, told, headers = asyncio.run(answered(application(viewer()), scope("/api/look"), endless()))
    assert status == 413
    assert told == {"error": f"body must be at most {IMAGE_LIMIT} bytes; got more"}
    assert headers["connection"] == "close"
    assert taken == IMAGE_LIMIT + (1 << 20)  # one part more than is held


@pytest.mark.parametrize("declared", [str(IMAGE_LIMIT + 1), "9" * 400])
def test_a_body_that_says_it_is_too_long_is_not_read(declared: str) -> None:
    async def never() -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""

    asked = scope("/api/look", ("content-length", declared))
    assert asyncio.run(answered(application(viewer()), asked, never()))[0] == 413


def test_json_has_a_smaller_limit(client: TestClient) -> None:
    for path in ("imagine", "evidence"):
        answer = client.post(f"/api/{path}", content=b" " * (1 << 20), headers={"content-type": "application/json"})
        assert answer.status_code == 413


def test_a_body_that_does_not_arrive_gives_its_place_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.05)

    async def slow() -> AsyncIterator[bytes]:
        yield b"P5"
        await asyncio.sleep(60)

    app = application(viewer())
    status, told, _ = asyncio.run(answered(app, scope("/api/look"), slow()))
    assert (status, told) == (408, {"error": "body must arrive within 0.05 seconds"})
    assert app.app.state.places.taken == 0  # type: ignore[attr-defined]


def test_200_requests_at_once_are_answered_or_put_off(monkeypatch: pytest.MonkeyPatch) -> None:
    one = viewer()
    app = application(one)
    inside, most_inside, most_taken = 0, 0, 0
    plain = Viewer.look

    def watched(self: Viewer, *arguments: Any, **options: Any) -> dict[str, Any]:
        nonlocal inside, most_inside, most_taken
        inside += 1
        most_inside = max(most_inside, inside)
        time.sleep(0.05 if most_taken == 0 else 0.002)  # while the first is computed, all others come
        most_taken = max(most_taken, app.app.state.places.taken)  # type: ignore[attr-defined]
        found = plain(self, *arguments, **options)
        inside -= 1
        return found

    monkeypatch.setattr(Viewer, "look", watched)
    body = image_file(random_image(1, 12, 13))

    async def whole() -> AsyncIterator[bytes]:
        yield body

    async def all_at_once() -> list[tuple[int, Any, dict[str, str]]]:
        done = list(await asyncio.gather(*(answered(app, scope("/api/look"), whole()) for _ in range(200))))
        done.append(await answered(app, scope("/api/look"), whole()))
        return done

    *crowd, last = asyncio.run(all_at_once())
    statuses = [status for status, _, _ in crowd]
    assert set(statuses) == {200, 503}
    assert statuses.count(200) == PLACES  # all come before the first is answered
    assert most_inside == 1  # PyTorch is entered once at a time
    assert most_taken == PLACES
    assert {headers["retry-after"] for status, _, headers in crowd if status == 503} == {"1"}
    assert len({json.dumps(found, sort_keys=True) for status, found, _ in crowd if status == 200}) == 1
    assert last[0] == 200
    assert app.app.state.places.taken == 0  # type: ignore[attr-defined]


# the command


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    capsnet.save_pretrained(network(), tmp_path / "net")
    return tmp_path / "net"


@pytest.fixture
def server(saved: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`capsnet demo` in a process of its own, and the page's address."""
    command = [sys.executable, "-W", "error", "-m", "capsnet", "demo", str(saved), "--port", "0", "--no-browser"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    try:
        yield process, line.split(" at ")[1].split()[0]
    finally:
        process.kill()
        process.communicate()


def raw(address: str, request: bytes) -> bytes:
    """What the server answers to these bytes until it closes the connection."""
    host, port = address.removeprefix("http://").rstrip("/").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        answer = b""
        try:
            connection.sendall(request)
            while part := connection.recv(1 << 16):
                answer += part
        except ConnectionError:  # closed while we were still sending
            pass
        return answer


def test_the_command_serves_and_ctrl_c_ends_it_cleanly(server: tuple[subprocess.Popen[str], str]) -> None:
    process, address = server
    head = b"Host: 127.0.0.1\r\nConnection: close\r\n"
    page = raw(address, b"GET / HTTP/1.1\r\n" + head + b"\r\n")
    assert page.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"\r\nserver:" not in page.lower()
    for request in (
        b"GET /../../etc/passwd HTTP/1.1\r\n" + head + b"\r\n",
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
    ):
        assert raw(address, request).split()[1].startswith(b"4"), request
    declared = b"Content-Type: image/png\r\nContent-Length: 99999999\r\n\r\n"
    assert b" 413 " in raw(address, b"POST /api/look HTTP/1.1\r\n" + head + declared)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in errors


def test_a_taken_port_is_told(saved: Path) -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"^--port must be free; got {port}, which is taken"):
            Demo(str(saved), port=port, browser=False).run("")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "65536"], "--port must be at most 65,535; got 65536"),
        (["--port", "-1"], "--port must be at least 0; got -1"),
        (["--host", "192.0.2.1"], "--host must be an address of this machine; got '192.0.2.1'"),
        (["--host", ""], "--host must be an address of this machine; got ''"),
        (["--host", "a" * 300], "--host must be an address of this machine"),
    ],
)
def test_wrong_places_are_told(saved: Path, options: list[str], message: str) -> None:
    with pytest.raises(InputError) as raised:
        parse(CAPSNET, ["demo", str(saved), "--no-browser", *options], prog="capsnet").run("")
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_what_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("starlette", "uvicorn"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(InputError, match=r"they are not installed \(pip install 'capsnet\[demo\]'\)$"):
                Demo(browser=False).run("")


@pytest.mark.parametrize("browser", [True, False])
def test_the_browser_is_opened_if_wanted(saved: Path, monkeypatch: pytest.MonkeyPatch, browser: bool) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: time.sleep(0.2))
    assert main(["demo", str(saved), "--port", "0", *([] if browser else ["--no-browser"])]) == 0
    assert [address.rsplit(":", 1)[0] for address in opened] == (["http://127.0.0.1"] if browser else [])


def test_the_card_tells_frame_and_threshold(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Viewer] = []
    card = replace(
        capsnet.checkpoints.pretrained.load_card(saved),
        preprocessing=reading((1, 12, 13), Frame(0.0, 0.6)),
        threshold=Threshold(3.0, 0.05, 10, "train"),
    )
    monkeypatch.setattr("capsnet.checkpoints.pretrained.load_card", lambda _: card)
    monkeypatch.setattr("capsnet.demo.serve", lambda viewer, **_: made.append(viewer))
    assert Demo(str(saved)).run("") == 0
    assert (made[0].reading, made[0].threshold) == (card.preprocessing, card.threshold)


def test_refusals_are_the_clients_faults() -> None:
    with pytest.raises(messages.Refusal) as raised:
        messages.whole("x" * 100, "class", 3)
    assert raised.value.status == 422
    assert len(raised.value.message) < 120
