"""Output that cannot be written, terminals that close, encodings that lack characters, equal commands at once."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from capsnet import devices
from capsnet.checkpoints import run_directory
from capsnet.cli import main
from capsnet.training import fit as training
from capsnet.training import prepare
from capsnet.training.console import Progress
from tiny import files, options, photos, tiny

pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
COMMAND = (sys.executable, "-m", "capsnet")
NARROW = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
NAMES = ("é", "日本", os.fsdecode(b"\xff\xfe"))


def shell(line: str, **environment: str) -> "subprocess.CompletedProcess[bytes]":
    """Run a line of sh in which $CAPSNET is the command."""
    known = {**os.environ, "OMP_NUM_THREADS": "1", "CAPSNET": " ".join(COMMAND), **environment}
    return subprocess.run(["sh", "-c", line], env=known, capture_output=True, timeout=200, check=False)


@pytest.fixture
def run(workplace: Path) -> Path:
    data = photos(workplace / "data", count=6)
    assert main(["train", *options(tiny(data, epochs=1)), "--no-report", "--out", "run"]) == 0
    return Path("run")


@pytest.mark.slow
@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize("words", ["list data", "--help", "--version", "train --help", "plot"])
def test_a_full_output_is_one_line_and_2(words: str) -> None:
    done = shell(f"$CAPSNET {words} > /dev/full")
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1
    assert b"error: standard output must be writable; got: No space left on device" in done.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize("words", ["list data", "--help", "train --help"])
@pytest.mark.parametrize("where", [">&-", "2>&-", ">&- 2>&-", "2> /dev/full", "| true"])
def test_closed_streams_and_a_full_stderr_change_nothing(words: str, where: str) -> None:
    done = shell(f"$CAPSNET {words} {where}")
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.slow
@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize("words", ["list data", "--help", "train --help"])
def test_a_pipe_that_nobody_reads_is_no_error(words: str) -> None:
    theirs, ours = os.pipe()
    os.close(theirs)
    done = subprocess.run([*COMMAND, *words.split()], stdout=ours, stderr=subprocess.PIPE, timeout=100, check=False)
    os.close(ours)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize("where", ["2> /dev/full", "2>&-"])
def test_an_error_that_cannot_be_told_is_still_2(where: str) -> None:
    assert shell(f"$CAPSNET list nothing {where}").returncode == 2


@pytest.mark.slow
def test_json_and_tables_tell_a_full_output_too(run: Path) -> None:
    for words in (f"evaluate {run} --json", f"evaluate {run}"):
        done = shell(f"$CAPSNET {words} > /dev/full")
        assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
        assert b"standard output must be writable" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("where", "code"), [("> /dev/full", 2), ("2> /dev/full", 0), ("> /dev/full 2>&1", 2)])
def test_a_training_that_cannot_print_keeps_its_results(workplace: Path, where: str, code: int) -> None:
    words = " ".join(options(tiny(photos(workplace / "data", count=6), epochs=1)))
    assert shell(f"$CAPSNET train {words} --no-report --out run {where}").returncode == code
    assert {"result.json", "model.safetensors", "card.json"} <= files("run")


@pytest.mark.parametrize("live", [False, True])
def test_progress_goes_on_where_stderr_fails(live: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        encoding = "utf-8"

        def isatty(self) -> bool:
            return live

        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

        def flush(self) -> None:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setenv("TERM", "xterm")
    with monkeypatch.context() as patch:
        patch.setattr("sys.stderr", Broken())
        with Progress(epochs=1, steps=1, quiet=False) as shown:
            shown.note("a")
            shown.update(0, 1, [0.5, 0.4, 1.0, 0.2], 3.0)
            shown.epoch(
                {"epoch": 1, "train_loss": 1.0, "train_error_percent": 1.0, "images_per_second": 1.0, "seconds": 1.0}
            )


@pytest.fixture
def hang_up() -> Iterator[None]:
    """SIGHUP as it is without nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hang_up")
def test_a_hang_up_is_collected_and_a_second_one_changes_nothing() -> None:
    before = signal.getsignal(signal.SIGHUP)
    with devices.signals() as received:
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.01)
        assert received == [signal.SIGHUP]
    assert signal.getsignal(signal.SIGHUP) == before


def test_a_hang_up_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with devices.signals() as received:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert received == []
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
@pytest.mark.parametrize("nohup", [False, True])
def test_a_closed_terminal_saves_a_checkpoint_unless_under_nohup(workplace: Path, nohup: bool) -> None:
    import fcntl
    import pty
    import termios

    def begin() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)

    config = tiny(photos(workplace / "data", count=6), epochs=1_000_000)
    words = [*COMMAND, "train", *options(config), "--no-report", "--out", "run"]
    ours, theirs = pty.openpty()
    known = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"}
    process = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, env=known, preexec_fn=begin)
    try:
        os.close(theirs)
        said, until = b"", time.monotonic() + 60
        while b"epoch 2/" not in said and time.monotonic() < until:
            said += os.read(ours, 4096)
        assert b"epoch 2/" in said
        os.close(ours)
        if nohup:
            done = Path("run/metrics.csv").stat().st_size
            until = time.monotonic() + 30
            while Path("run/metrics.csv").stat().st_size == done and time.monotonic() < until:
                time.sleep(0.1)
            assert Path("run/metrics.csv").stat().st_size > done
            assert process.poll() is None
        else:
            assert process.wait(60) == 128 + signal.SIGHUP
            assert "last.ckpt" in files("run")
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_names_that_the_encoding_lacks_lose_no_result(workplace: Path) -> None:
    data = photos(workplace / "data", count=6, classes="abc")
    for letter, name in zip("abc", NAMES, strict=True):
        (data / letter).rename(data / name)
    (data / NAMES[0] / "0.png").rename(data / NAMES[0] / f"{NAMES[2]} ü.png")
    words = " ".join(options(tiny(Path("data"), epochs=1)))
    image = 'data/*/*"\xfc"*'.replace("\xfc", "ü")
    for line in (
        f"train {words} --out run",
        "evaluate run",
        "evaluate run --json",
        f"predict run {image}",
        f"predict run {image} --json",
        f"predict run {image} --csv",
        "plot all run --format svg",
        "report run",
        "plot reconstructions run",
        "export run --to safetensors --out exported",
    ):
        done = shell(f"$CAPSNET {line}", **NARROW)
        assert done.returncode == 0, (line, done.stderr)
        assert b"Traceback" not in done.stderr
        assert done.stdout.isascii()
    told = json.loads(shell("$CAPSNET evaluate run --json", **NARROW).stdout)
    assert len({row["class"] for row in told["per_class"]}) == 3
    assert (Path("run") / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_three_equal_trainings_at_once_get_a_directory_each(workplace: Path) -> None:
    words = " ".join(options(tiny(photos(workplace / "data", count=6), epochs=1)))
    done = shell(f"for k in 1 2 3; do ($CAPSNET train {words} --no-report 2> err$k; echo $? > code$k) & done; wait")
    assert done.returncode == 0
    assert [Path(f"code{k}").read_text() for k in (1, 2, 3)] == ["0\n"] * 3
    stem = "runs/data-capsnet-seed0"
    for run in (stem, f"{stem}-2", f"{stem}-3"):
        assert {"result.json", "model.safetensors"} <= files(run)


@pytest.mark.parametrize("finished", [False, True])
def test_a_directory_that_another_process_takes_meanwhile_is_chosen_anew(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    config = tiny(photos(workplace / "data", count=6), epochs=1, report=False)
    first = run_directory.Run(training._free_directory(config))
    real = prepare.prepare_data

    def prepared(*arguments: Any, **more: Any) -> Any:
        if finished:
            first.directory.mkdir(parents=True)
            first.config_path.write_text("preset: paper\n")
        else:
            held.enter_context(first.locked())
        return real(*arguments, **more)

    with ExitStack() as held:
        monkeypatch.setattr(training, "prepare_data", prepared)
        result = training.fit(config)
    assert result.directory == first.directory.with_name(f"{first.directory.name}-2")
    assert files(first.directory) == ({"config.yaml"} if finished else set())


@pytest.mark.slow
def test_three_first_compilations_at_once_give_one_library(workplace: Path) -> None:
    from capsnet.kernels import native

    if native.library() is None:
        pytest.skip(native.status())
    photos(workplace / "data", count=2, size=(28, 28))
    line = (
        "for k in 1 2 3; do ($CAPSNET predict capsnet-mnist data/*/*.png --json > out$k; echo $? > code$k) & done; wait"
    )
    done = shell(line, CAPSNET_NATIVE="require", CAPSNET_CACHE=str(workplace / "fresh"))
    assert done.stderr == b""
    assert [Path(f"code{k}").read_text() for k in (1, 2, 3)] == ["0\n"] * 3
    assert Path("out1").read_bytes() == Path("out2").read_bytes() == Path("out3").read_bytes()
    assert len(list((workplace / "fresh" / "native").iterdir())) == 1
