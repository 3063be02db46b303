import contextlib
import gzip
import hashlib
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from capsnet.data import download
from capsnet.errors import InputError
from capsnet.files import cache_dir

GOOD = {"images": b"good images" * 1000, "labels": b"good labels"}
SHA256 = {name: hashlib.sha256(content).hexdigest() for name, content in GOOD.items()}
DEAD = "http://127.0.0.1:9/"  # the discard port, where nothing listens


@pytest.fixture(autouse=True)
def own_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CAPSNET_DATA", "CAPSNET_OFFLINE", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CAPSNET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "_WAIT_S", 0.0)


@contextlib.contextmanager
def serve(files: dict[str, bytes], *, cut: bool = False) -> Iterator[tuple[str, list[str]]]:
    """A server of `files`, which breaks off half-way if `cut`; its address, and the requests it got."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            content = files.get(self.path[1:])
            if content is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if cut else content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/", requests
        finally:
            server.shutdown()
            thread.join()


def source(*mirrors: str) -> download.Source:
    return download.Source("toy", SHA256, mirrors)


def packed(name: str) -> bytes:
    return gzip.compress(GOOD[name])


def files_below(path: Path) -> list[str]:
    return sorted(str(one.relative_to(path)) for one in path.rglob("*")) if path.exists() else []


ALL = {f"{name}.gz": packed(name) for name in GOOD}


def test_download_then_cache(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with serve(ALL) as (url, requests):
        found = download.contents(source(url), list(GOOD), None)
        assert {name: content for name, (_, content) in found.items()} == GOOD
        assert found["images"][0] == tmp_path / "cache" / "toy" / "images.gz"
        assert download.contents(source(url), list(GOOD), None) == found
    assert requests == ["/images.gz", "/labels.gz"]
    assert files_below(tmp_path / "cache") == ["toy", "toy/images.gz", "toy/labels.gz"]
    assert capfd.readouterr() == ("", "")  # no terminal, no bar


def test_only_what_is_missing_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPSNET_DATA", str(tmp_path))
    (tmp_path / "labels").write_bytes(GOOD["labels"])
    with serve(ALL) as (url, requests):
        found = download.contents(source(url), list(GOOD), None)
    assert requests == ["/images.gz"]
    assert found["labels"][0] == tmp_path / "labels"


@pytest.mark.parametrize(
    "bad",
    [
        {"images.gz": gzip.compress(b"other")},
        {"images.gz": packed("images")[:-3]},
        {"images.gz": b"<html>"},
        {},
    ],
    ids=["other content", "cut short", "a page of a captive portal", "not there"],
)
def test_a_bad_mirror_is_followed_by_the_next(tmp_path: Path, bad: dict[str, bytes]) -> None:
    with serve(bad) as (first, tried), serve(ALL) as (second, _):
        found = download.contents(source(first, second), ["images"], None)
    assert found["images"][1] == GOOD["images"]
    assert tried == ["/images.gz"]  # neither a wrong file nor a 404 is asked for again
    assert files_below(tmp_path / "cache") == ["toy", "toy/images.gz"]


def test_a_connection_that_breaks_leaves_nothing(tmp_path: Path) -> None:
    with (
        serve(ALL, cut=True) as (url, requests),
        pytest.raises(InputError, match=f"{url}: ChunkedEncodingError"),
    ):
        download.contents(source(url), ["images"], None)
    assert requests == ["/images.gz"] * 2
    assert files_below(tmp_path / "cache") == ["toy"]


def test_ctrl_c_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tqdm.tqdm.update", interrupt)
    with serve(ALL) as (url, _), pytest.raises(KeyboardInterrupt):
        download.contents(source(url), ["images"], None)
    assert files_below(tmp_path / "cache") == ["toy"]


def test_when_all_mirrors_fail_one_message_tells_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPSNET_DATA", str(tmp_path / "env"))
    other = {"images.gz": gzip.compress(b"other")}
    with serve({}) as (empty, _), serve(other) as (wrong, _), pytest.raises(InputError) as caught:
        download.contents(source(DEAD, empty, wrong), list(GOOD), None)
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "data set toy must be on this machine or downloadable; missing: images.gz, labels.gz; looked in: ",
        f"{tmp_path}/env/toy, {tmp_path}/env/toy-test, {tmp_path}/env, {tmp_path}/cache/toy, ",
        f"{DEAD}: ConnectionError; ",
        f"{empty}: HTTP status 404; ",
        f"{wrong}: ",
        f"must have the SHA-256 {SHA256['images']} unpacked, as images of toy; got d9298a10d1b0",
        "--data-dir or CAPSNET_DATA, or use --data strokes, which needs no download",
    ):
        assert part in message


def test_offline_does_not_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPSNET_OFFLINE", "1")
    with serve(ALL) as (url, requests):
        with pytest.raises(InputError, match=r"missing: labels.gz, images.gz; .*downloads are off \(CAPSNET_OFFLINE\)"):
            download.contents(source(url), ["labels"], None)
        assert requests == []
        monkeypatch.setenv("CAPSNET_OFFLINE", "0")
        assert download.contents(source(url), ["labels"], None)["labels"][1] == GOOD["labels"]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"a file")
    with pytest.raises(InputError, match=r"cache directory .*cache/toy must be writable, or another named with CAPS"):
        download.contents(source(DEAD), ["labels"], None)


@pytest.mark.parametrize("name", ["labels.gz", "labels"])
def test_a_corrupt_file_here_is_named_and_not_replaced_silently(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"corrupt")
    wrong = hashlib.sha256(b"corrupt").hexdigest()
    with (
        serve(ALL) as (url, requests),
        pytest.raises(InputError, match=f"{name} must have the SHA-256 {SHA256['labels']} .*; got {wrong}"),
    ):
        download.contents(source(url), ["labels"], tmp_path)
    assert requests == []


def place(root: Path, content: bytes = GOOD["labels"]) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "labels").write_bytes(content)
    return root / "labels"


def labels(*, data_dir: Path | None = None) -> Path:
    """Where the labels were found that are read; a download is a fault."""
    with serve(ALL) as (url, requests):
        path, content = download.contents(source(url), ["labels"], data_dir, known=KNOWN)["labels"]
        assert requests == []
    assert content == GOOD["labels"]
    return path


FOREIGN = b"the labels of another set"
KNOWN = {hashlib.sha256(FOREIGN).hexdigest(): "other", SHA256["labels"]: "toy"}


def test_without_data_dir_the_environment_comes_before_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPSNET_DATA", str(tmp_path / "env"))
    for folder in ("cache", "cache/toy", "env", "env/toy-test", "env/toy"):
        path = place(tmp_path / folder)
        assert labels() == path


def test_in_data_dir_nothing_else_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPSNET_DATA", str(tmp_path / "env"))
    place(tmp_path / "env")
    place(tmp_path / "cache")
    (tmp_path / "arg").mkdir()
    with pytest.raises(
        InputError, match=r"missing: labels.gz, images.gz; looked in: [^;]*/arg; with --data-dir nothing"
    ):
        labels(data_dir=tmp_path / "arg")
    for folder in ("arg", "arg/toy-test", "arg/toy"):
        path = place(tmp_path / folder)
        assert labels(data_dir=tmp_path / "arg") == path


@pytest.mark.parametrize(
    "content",
    [GOOD["labels"][:-1], b"", b"other", gzip.compress(GOOD["labels"])[:-9]],
    ids=["cut short", "empty", "other", "packed and cut short"],
)
@pytest.mark.parametrize("root", ["arg", "env", "cache"])
def test_a_damaged_file_is_told_and_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str, content: bytes
) -> None:
    monkeypatch.setenv("CAPSNET_DATA", str(tmp_path / "env"))
    damaged = place(tmp_path / root / "toy", content)
    for later in {"arg": ("env", "cache"), "env": ("cache",), "cache": ()}[root]:
        place(tmp_path / later)
    with pytest.raises(InputError, match=rf"^{damaged} must (have the SHA-256|be a whole gzip file)"):
        labels(data_dir=tmp_path / "arg" if root == "arg" else None)
    sound = place(tmp_path / root)  # in the same directory a sound copy will do
    assert labels(data_dir=tmp_path / "arg" if root == "arg" else None) == sound


def test_a_file_of_another_known_set_counts_as_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPSNET_DATA", str(tmp_path / "env"))
    place(tmp_path / "env", FOREIGN)
    cached = place(tmp_path / "cache")
    assert labels() == cached
    with pytest.raises(InputError, match=rf"^{tmp_path}/env/labels must have .*; got \w+, that of other: move it$"):
        labels(data_dir=tmp_path / "env")
    assert labels(data_dir=place(tmp_path / "env" / "toy").parents[1]) == tmp_path / "env" / "toy" / "labels"


def test_a_file_of_unknown_checksum_is_not_taken_from_another_known_set(tmp_path: Path) -> None:
    place(tmp_path, FOREIGN)
    unknown = download.Source("toy", {"labels": None}, (), {"labels": "0" * 64})
    with pytest.raises(InputError, match=r"must have the SHA-256 of its own .*, that of other: move it$"):
        download.contents(unknown, ["labels"], tmp_path, known=KNOWN)
    assert download.contents(unknown, ["labels"], tmp_path)["labels"][1] == FOREIGN


@pytest.mark.parametrize("content", [gzip.compress(bytes(10**7)), bytes(10**7)], ids=["packed", "plain"])
def test_no_more_is_unpacked_than_the_largest_file_of_the_set_holds(tmp_path: Path, content: bytes) -> None:
    place(tmp_path, content)
    toy = download.Source("toy", SHA256, (), most=1000)
    with pytest.raises(InputError, match=rf"^file {tmp_path}/labels must hold at most 1,000 bytes; got more$"):
        download.contents(toy, ["labels"], tmp_path)


def test_data_dir_must_exist(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data_dir must be an existing directory; got .*nowhere"):
        download.places(source(), tmp_path / "nowhere")


def test_the_system_cache_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CAPSNET_CACHE")
    assert cache_dir().name == "capsnet"


def test_a_published_packed_file_of_unknown_content(tmp_path: Path) -> None:
    published = packed("labels")
    toy = download.Source("toy", {"labels": None}, (), {"labels": hashlib.sha256(published).hexdigest()})
    (tmp_path / "labels").write_bytes(b"cannot be verified here")
    assert download.contents(toy, ["labels"], tmp_path)["labels"][1] == b"cannot be verified here"
    (tmp_path / "labels").unlink()
    (tmp_path / "labels.gz").write_bytes(published)
    assert download.contents(toy, ["labels"], tmp_path)["labels"][1] == GOOD["labels"]
    (tmp_path / "labels.gz").write_bytes(gzip.compress(b"other"))
    with pytest.raises(InputError, match=r"must have the SHA-256 \w+ as the published labels.gz of toy; got"):
        download.contents(toy, ["labels"], tmp_path)


def test_the_bar_draws_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with serve(ALL) as (url, _):
        download.contents(source(url), ["images"], None)
    out, err = capfd.readouterr()
    assert out == ""
    assert "images.gz" in err
