"""A served network: the folder needs numpy, Pillow and onnxruntime only, and answers what `predict` does."""

import ast
import base64
import http.client
import io
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import tiny
from capsnet import cli
from capsnet.checkpoints import exported as exported_files
from capsnet.checkpoints import pretrained, serving
from capsnet.checkpoints.model_card import Card
from capsnet.checkpoints.serving import serve, write_folder
from capsnet.checkpoints.serving.predictor import Answer
from capsnet.data.preprocessing import Preprocessing
from capsnet.errors import InputError
from capsnet.evaluation.ood import Threshold
from capsnet.models import Network, create
from capsnet.prediction import Prediction, predict

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning")
ALLOWED = {"numpy", "PIL", "onnxruntime", "pillow_heif", "capsnet_serve", *sys.stdlib_module_names}
ALONE = """
import runpy, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"capsnet", "jaxtyping", "scipy", "torch"}:
            raise ImportError(f"{name} is not there")

sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[1:]
sys.path[0] = sys.argv[0].rpartition("/")[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
READINGS: dict[str, tuple[str, Preprocessing, dict[str, Any]]] = {
    "colour, padded": ("capsnet", Preprocessing(12, 13, 3, resize="pad"), tiny.SIZES),
    "grey, cropped": ("baseline", Preprocessing(12, 13, 1, resize="crop", bits=12), {"width": 0.1}),
    "colour, squashed and cut": ("baseline", Preprocessing(20, 16, 3, crop=12, resize="squash"), {"width": 0.1}),
}
KINDS = ("digits", *READINGS)


def network(kind: str) -> tuple[Network, Card]:
    if kind == "digits":
        return pretrained.load("capsnet-mnist"), pretrained.load_card("capsnet-mnist")
    model, reading, sizes = READINGS[kind]
    torch.manual_seed(0)
    one = create(model, image_shape=reading.image_shape, num_classes=3, classes=("a", "b", "ü"), **sizes).eval()
    one.preprocessing = reading
    return one, Card(config={"data": "x"}, threshold=Threshold(60.0, 0.05, 100, "train"))


Served = Callable[[str], Path]


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """The folder that serves a kind of network; each is made once for all tests."""

    @cache
    def make(kind: str) -> Path:
        folder = tmp_path_factory.mktemp("served") / kind
        one, card = network(kind)
        draw = torch.Generator().manual_seed(1)
        write_folder(one, folder, images=torch.rand(4, *one.image_shape, generator=draw), card=card)
        return folder

    return make


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Image files of the kinds that people have, and in the middle one that is none."""
    folder = tmp_path_factory.mktemp("photographs")
    draw = np.random.default_rng(0)
    paper = (215 + draw.normal(0, 8, (240, 320, 3))).clip(0, 255).astype(np.uint8)
    photo = Image.fromarray(paper)
    ImageDraw.Draw(photo).line([(120, 60), (200, 60), (150, 190)], fill=(40, 30, 90), width=14)
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(folder / "dark on light.jpg", quality=80)
    photo.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.jpg", exif=exif)
    photo.point(lambda level: 255 - level).save(folder / "light on dark.webp", lossless=True)
    drawing = Image.new("RGBA", (90, 120), (0, 0, 0, 0))
    drawing.paste((250, 250, 250, 255), (40, 20, 52, 100))
    drawing.save(folder / "transparent.png")
    grey = np.asarray(photo.convert("L")).astype(np.uint16)
    Image.fromarray(grey * 257).save(folder / "16 bits.png")
    Image.fromarray(grey * 16).save(folder / "12 bits.tiff")
    (folder / "none.png").write_bytes(b"no image")
    photo.quantize(16).save(folder / "palette.png")
    photo.resize((900, 60)).save(folder / "wide.bmp")
    photo.resize((28, 28)).convert("L").save(folder / "28.png")
    Image.new("L", (100, 80), 255).save(folder / "blank.png")
    Image.fromarray(draw.integers(0, 256, (60, 50, 3), dtype=np.uint8)).save(folder / "noise.png")
    return sorted(map(str, folder.iterdir()))


def run_alone(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", ALONE, str(folder / "serve.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def agree(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """The same but for the rounding of another batch."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        wanted = theirs[name]
        if isinstance(value, dict):
            assert list(value) == list(wanted)
            assert list(value.values()) == pytest.approx(list(wanted.values()), abs=1e-6)
        elif isinstance(value, float):
            assert value == pytest.approx(wanted, rel=1e-5, abs=1e-6), name
        else:
            assert value == wanted, name


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_files_get_the_answers_of_predict_without_torch(kind: str, served: Served, photographs: list[str]) -> None:
    for invert in ("auto", "yes"):
        done = run_alone(served(kind), *photographs, "--invert", invert)
        assert done.returncode == 2, "one file is no image"
        assert done.stderr.count("\n") == 1, done.stderr
        assert "serve.py: error: " in done.stderr
        assert "none.png must be a readable image; got: cannot identify image file" in done.stderr
        one, card = exported_files.load(served(kind) / "model.onnx")
        found = predict(one, [(name, name) for name in photographs], card=card, invert=invert)
        wanted = [answer for answer in found if isinstance(answer, Prediction)]
        answers = json.loads(done.stdout)
        assert len(answers) == len(wanted) == len(photographs) - 1
        for ours, theirs in zip(answers, wanted, strict=True):
            agree(ours, {**theirs.to_dict(), "scores": dict(theirs.scores)})
    assert {ours["framed"] for ours in answers} == ({True, False} if kind == "digits" else {False})
    if kind == "colour, padded":
        assert {type(ours["ood"]) for ours in answers} == {bool}
    if kind == "grey, cropped":
        assert sum(answers[0]["scores"].values()) == pytest.approx(1), "softmax"


def test_the_fields_are_those_of_the_command(
    served: Served, photographs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = served("colour, padded")
    assert cli.main(["predict", str(folder / "model.onnx"), photographs[0], "--json", "--scores"]) == 0
    (wanted,) = json.loads(capsys.readouterr().out)
    done = run_alone(folder, photographs[0])
    assert (done.returncode, done.stderr) == (0, "")
    agree(json.loads(done.stdout)[0], wanted)


def test_nothing_else_is_imported_and_little_is_written(served: Served) -> None:
    folder = served("colour, padded")
    names = {"README.md", "model.onnx", "page.html", "requirements.txt", "serve.py"}
    files = {name for name in tiny.files(folder) if not name.endswith(".pyc")}
    assert files == names | {f"capsnet_serve/{Path(name).name}" for name in ("__init__.py", *serving.COPIED)}
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0
                assert str(node.module).partition(".")[0] in ALLOWED, path
            elif isinstance(node, ast.Import):
                assert {alias.name.partition(".")[0] for alias in node.names} <= ALLOWED, path
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    for line in (folder / "requirements.txt").read_text(encoding="utf-8").split():
        assert f'"{line}"' in project
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert "Classes: a, b, ü. Images: resized to 12 x 13 pixels in proportion" in readme


def test_the_copies_are_the_packages_own_code(served: Served) -> None:
    package = Path(serving.__file__).parents[2]
    for name in serving.COPIED:
        ours = [line for line in (package / name).read_text(encoding="utf-8").splitlines() if "import" not in line]
        copy = (served("colour, padded") / "capsnet_serve" / Path(name).name).read_text(encoding="utf-8")
        assert ours == [line for line in copy.splitlines() if "import" not in line]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "x"], "argument --port: invalid int value: 'x'"),
        (["--port", "70000"], "--port must be 0 to 65535; got 70000"),
        (["--host", "no.such.host.invalid"], "--host and --port must be free on this machine; got 'no.such.host"),
        (["--host", "192.0.2.1"], "--host and --port must be free on this machine; got '192.0.2.1' and 8000: "),
        (["--what"], "unrecognized arguments: --what"),
        (["nothing\x1b.png"], r"nothing\x1b.png must be a readable image; got: "),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments: list[str], words: str, served: Served) -> None:
    done = run_alone(served("grey, cropped"), *arguments)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("serve.py: error: ")
    assert words in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_answers_that_cannot_be_written_are_an_error(served: Served, photographs: list[str]) -> None:
    command = [sys.executable, "-c", ALONE, str(served("grey, cropped") / "serve.py"), photographs[0]]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert done.stderr == "serve.py: error: standard output must be writable; got: No space left on device\n"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == "", "who read them is gone"
        assert process.wait() == 0


def test_a_file_that_is_none_of_ours_is_refused(served: Served, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in served("grey, cropped").rglob("*"):
        if path.is_file():
            (folder / path.relative_to(served("grey, cropped"))).parent.mkdir(exist_ok=True)
            (folder / path.relative_to(served("grey, cropped"))).write_bytes(path.read_bytes())
    model = onnx.load(folder / "model.onnx")
    del model.metadata_props[:]
    onnx.save(model, folder / "model.onnx")
    for words in ("must be one that `capsnet export` wrote", "must be a readable ONNX file", "must be a readable"):
        done = run_alone(folder)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert words in done.stderr
        (folder / "model.onnx").write_bytes(b"junk")
        if words.endswith("ONNX file"):
            (folder / "model.onnx").unlink()


# the server


@pytest.fixture(scope="session")
def address(served: Served) -> Iterator[tuple[str, int]]:
    """A server of digits in a process without torch."""
    command = [sys.executable, "-c", ALONE, str(served("digits") / "serve.py"), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith("serve.py: http://127.0.0.1:"), line
        yield "127.0.0.1", int(line.split(":")[3].partition("/")[0])
        process.terminate()


def ask(address: tuple[str, int], method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, Any, Any]:
    """Status, headers and body of an answer, JSON decoded."""
    connection = http.client.HTTPConnection(*address, timeout=30)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, names)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    is_json = answer.headers["content-type"] == "application/json"
    return answer.status, answer.headers, json.loads(content) if is_json and content else content.decode()


def test_the_page_loads_nothing_from_elsewhere(address: tuple[str, int]) -> None:
    status, headers, page = ask(address, "GET", "/")
    assert status == 200
    assert "http" not in page.replace("http-equiv", ""), "no other address"
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    for tag in ("script", "style"):
        assert page.count(f"<{tag}>") == 1
        assert serve._hash(page, tag) in policy
    assert " style=" not in page
    assert headers["x-frame-options"] == "DENY"
    assert ask(address, "HEAD", "/")[2] == ""


def test_a_posted_image_gets_the_answer_of_predict(
    address: tuple[str, int], served: Served, photographs: list[str]
) -> None:
    one, card = exported_files.load(served("digits") / "model.onnx")
    for name in photographs:
        content = Path(name).read_bytes()
        (wanted,) = predict(one, [("image", content)], card=card)
        status, _, found = ask(address, "POST", "/predict", content)
        if isinstance(wanted, InputError):
            assert (status, found) == (422, {"error": str(wanted)})
            continue
        assert status == 200
        agree(found, {**wanted.to_dict(), "scores": dict(wanted.scores)})
    found = ask(address, "POST", "/predict?images=yes&invert=no", Path(photographs[0]).read_bytes())[2]
    assert found["inverted"] is False
    for name in ("image", "reconstruction"):
        kind, _, data = found[name].partition(",")
        assert kind == "data:image/png;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (28, 28)


def test_requests_of_others_are_refused(address: tuple[str, int], photographs: list[str]) -> None:
    content = Path(photographs[0]).read_bytes()
    own = f"{address[0]}:{address[1]}"
    assert ask(address, "GET", "/", Host="evil.example")[0] == 403
    assert ask(address, "POST", "/predict", content, Host=f"evil.example:{address[1]}")[0] == 403
    for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec_Fetch_Site": "cross-site"}):
        status, _, told = ask(address, "POST", "/predict", content, **headers)
        assert status == 403
        assert told["error"].startswith("request must come from the page of this server; got ")
    assert ask(address, "POST", "/predict", content, Origin=f"http://{own}", Sec_Fetch_Site="same-origin")[0] == 200
    assert ask(address, "GET", "/", Host=f"localhost:{address[1]}")[0] == 200


def bomb() -> bytes:
    file = io.BytesIO()
    Image.new("1", (8000, 5000)).save(file, "PNG")
    return file.getvalue()


def test_what_is_no_image_of_a_sensible_size_is_refused(address: tuple[str, int]) -> None:
    status, _, told = ask(address, "POST", "/predict", b"x" * (serve.BODY_LIMIT + 1))
    assert (status, told) == (413, {"error": "image file must have at most 16,777,216 bytes; got 16,777,217"})
    status, _, told = ask(address, "POST", "/predict", bomb())
    assert (status, told) == (422, {"error": "image must have at most 32,000,000 pixels; got 8000x5000"})
    status, _, told = ask(address, "POST", "/predict", b"")
    assert (status, told) == (422, {"error": "image must be a readable image; got: an empty file"})
    for number in ("-1", "1e3", "9" * 30):
        status, _, told = ask(address, "POST", "/predict", b"", Content_Length=number)
        assert status == 411
    assert ask(address, "POST", "/predict", b"5\r\nhello\r\n", Transfer_Encoding="chunked")[0] == 411
    for path, status in (("/predict?invert=x", 422), ("/predict?x=1", 422), ("/../serve.py", 404), ("/", 404)):
        assert ask(address, "POST", path, b"")[0] == status
    for method, path, status in (("GET", "/model.onnx", 404), ("PUT", "/predict", 501), ("DELETE", "/", 501)):
        found = ask(address, method, path)
        assert (found[0], list(found[2])) == (status, ["error"])
        assert found[1]["content-security-policy"]
    assert ask(address, "GET", "/")[0] == 200, "it goes on"


@contextmanager
def running(predictor: Any) -> Iterator[tuple[str, int]]:
    with serve.Server("127.0.0.1", 0, predictor, "") as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield "127.0.0.1", server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def answered(*_: Any, **__: Any) -> Answer:
    return Answer({"class": "a"}, np.zeros((1, 2, 2), np.float32), None)


def sent(address: tuple[str, int], *parts: bytes, pause: float = 0.0) -> bytes:
    """All that comes back for what is sent bit by bit."""
    with socket.create_connection(address, timeout=20) as connection:
        try:
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
            return b"".join(iter(lambda: connection.recv(1 << 16), b""))
        except ConnectionError:
            return b""


HEAD = b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 50\r\n\r\n"


def test_slow_and_broken_requests_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve.Handler, "timeout", 0.3)
    with running(answered) as address:
        assert b" 408 " in sent(address, HEAD, b"half")
        assert sent(address, b"GET / HTT") == b""
        assert b"Bad request syntax" in sent(address, b"nonsense\r\n\r\n")
        assert b" 200 " in sent(address, HEAD + b"x" * 50)
    monkeypatch.setattr(serve, "REQUEST_SECONDS", 0.5)
    with running(answered) as address:
        start = time.monotonic()
        assert b" 200 " not in sent(address, HEAD, *[b"x"] * 45, pause=0.1)
        assert time.monotonic() - start < 3, "a byte now and then does not keep it open"


def eventually(holds: Callable[[], bool]) -> None:
    """Wait until it is so: the server learns of a connection, and of its end, in a thread of its own."""
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_one_connection_too_many_is_closed_and_places_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "CONNECTIONS", 2)
    with running(answered) as address:
        for _ in range(3):
            with socket.create_connection(address), socket.create_connection(address):
                eventually(lambda: sent(address, HEAD + b"x" * 50) == b"")
            eventually(lambda: b" 200 " in sent(address, HEAD + b"x" * 50))


@pytest.mark.filterwarnings("error")
def test_a_fault_of_ours_is_told_in_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: Any, **__: Any) -> Answer:
        raise RuntimeError("ours")

    with running(broken) as address:
        assert b"the server failed at this image" in sent(address, HEAD + b"x" * 50)
    assert "RuntimeError: ours" in capsys.readouterr().err


# the verb


@pytest.fixture
def model(workplace: Path) -> str:
    one, card = network("grey, cropped")
    pretrained.save_pretrained(one, "tiny")
    pretrained.save_card(card, "tiny")
    return "tiny"


def test_the_verb_writes_the_folder_and_says_how_to_run_it(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    (Path("new") / "folder").mkdir(parents=True)
    assert cli.main(["export", model, "--serve", "new/folder"]) == 0
    assert "python new/folder/serve.py photo.jpg" in capsys.readouterr().out
    Path("new/folder/serve.py").write_text("old")
    Path("new/folder/mine.txt").write_text("mine")
    assert cli.main(["export", model, "--serve", "new/folder"]) == 2
    error = capsys.readouterr().err
    assert error.endswith("serve must be a new or empty folder, or be replaced with --overwrite; got new/folder\n")
    assert Path("new/folder/serve.py").read_text() == "old"
    assert cli.main(["export", model, "--serve", "new/folder", "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == "new/folder/model.onnx"
    assert Path("new/folder/serve.py").read_text().startswith('"""Predict images')
    assert Path("new/folder/mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--serve", "x", "--to", "pt2"], "--serve must go with --to onnx and without --out; got --to pt2"),
        (["--serve", "x", "--to", "safetensors"], "--serve must go with --to onnx and without --out; got --to safet"),
        (["--serve", "x", "--out", "y.onnx"], "--serve must go with --to onnx and without --out; got --out"),
        (["--serve", "file", "--overwrite"], "serve must be a folder; got the file file"),
    ],
)
def test_what_does_not_go_together_is_told(
    options: list[str], words: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").write_text("mine")
    assert cli.main(["export", model, *options]) == 2
    error = capsys.readouterr().err
    assert (words in error, error.count("\n")) == (True, 1)
    assert Path("file").read_text() == "mine"
    assert not Path("x").exists()


@pytest.mark.usefixtures("unchecked")
def test_a_network_that_reads_no_files_is_refused(tmp_path: Path) -> None:
    one, _ = network("grey, cropped")
    images = torch.zeros(1, 1, 12, 13)
    one.preprocessing = None
    with pytest.raises(InputError, match=r"^model to serve must know how its images are read; got one without "):
        write_folder(one, tmp_path / "x", images=images)
    two = create("baseline", image_shape=(2, 12, 13), num_classes=3, width=0.1)
    two.preprocessing = Preprocessing(12, 13, 2)
    with pytest.raises(InputError, match=r"^model to serve must take images of 1 or 3 channels; got 2$"):
        write_folder(two, tmp_path / "x", images=images)
    one.objects_per_image = 2
    with pytest.raises(InputError, match=r"^model to serve must be of one object per image; got one of 2$"):
        write_folder(one, tmp_path / "x", images=images)
    assert not (tmp_path / "x").exists()
