"""Runs in processes of their own: what a kill, a signal, a full disk or a second process does to them."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from capsnet.checkpoints import pretrained
from capsnet.checkpoints.run_directory import Run
from capsnet.evaluation import predict_split
from capsnet.training import prepare
from capsnet.training.fit import fit
from tiny import KEPT, files, metrics, options, photos, same_weights, tiny, weights

pytestmark = [pytest.mark.usefixtures("workplace", "blank_figure"), pytest.mark.timeout(600)]

COMMAND = """
import os, resource, signal, sys, threading, time
from capsnet import cli, report
from capsnet.training import fit as training
from capsnet.training import batches

rank = os.environ.get("LOCAL_RANK", "0")
augment, steps = batches.augment, [0]

def wait(*arguments):
    steps[0] += 1
    time.sleep(float(os.environ.get("TEST_SECONDS", "0")))
    if (os.environ.get("TEST_FAIL"), steps[0]) == (rank, 3):
        raise RuntimeError("this process fails")
    return augment(*arguments)

batches.augment = wait
def blank(path):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"")

report.draw_reconstructions = lambda network, split, path: blank(path)
report.write = lambda path, *arguments, **about: blank(path)
if os.environ.get("TEST_FAIL_EARLY") == rank:
    raise RuntimeError("this process fails early")
if "TEST_BYTES" in os.environ:  # a full disk: no file may grow beyond this
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["TEST_BYTES"]),) * 2)
if "TEST_LIFE" in os.environ:
    create = training.Run.create

    def create_and_die(*arguments, **named):
        create(*arguments, **named)
        threading.Timer(float(os.environ["TEST_LIFE"]), lambda: os.kill(os.getpid(), signal.SIGKILL)).start()

    training.Run.create = create_and_die
sys.exit(cli.main())
"""


def start(
    *words: str, launcher: Sequence[str] = (), variables: Mapping[str, str] = {}, **environment: Any
) -> subprocess.Popen[str]:
    Path("command.py").write_text(COMMAND, encoding="utf-8")
    told = {f"TEST_{name.upper()}": str(value) for name, value in environment.items()}
    return subprocess.Popen(
        [sys.executable, *launcher, "command.py", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables, **told},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*words: str, **options: Any) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    process = start(*words, **options)
    out, err = process.communicate(timeout=180)
    return process.returncode, out, err


def await_file(path: str) -> None:
    for _ in range(600):
        if Path(path).exists():
            return
        time.sleep(0.1)
    pytest.fail(f"{path} was not written")


def difference(one: str, other: str) -> float:
    """Difference between the weights of two runs relative to the weights, by their norms, of the worst tensor.

    Not of single weights: where a first gradient is as small as Adam's epsilon, 1e-8, its rounding decides the step.
    Seen once: one weight of 1,600 off by 8.5e-6 of the largest, all others below 1e-6.
    """
    ours, theirs = weights(one), weights(other)
    return max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in ours)


@pytest.mark.slow
def test_two_processes_train_what_one_does(photos: Path) -> None:
    """Measured: the weights differ by 3.9e-8; allowed is 2e-6. Every test image is counted once."""
    config = tiny(photos, batch_size=17)  # 68 images: four whole batches of 9 + 8
    fit(replace(config, out="one"))
    code, out, err = run("train", *options(config), "--devices", "2", "--out", "two")
    assert code == 0, err
    assert out.count("test error") == 1
    assert [line.split(":")[0] for line in err.splitlines()] == [KEPT, "epoch 1/2", "epoch 2/2"]
    assert difference("two", "one") < 2e-6
    one, two = (json.loads(Path(name, "result.json").read_text(encoding="utf-8")) for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["test"]["total"] == 15
    assert two["validation"]["total"] == 7
    assert two["test"]["confusion"] == one["test"]["confusion"]
    for ours, theirs in zip(metrics("two"), metrics("one"), strict=True):
        assert [float(x) for x in ours.values()] == pytest.approx([float(x) for x in theirs.values()], rel=1e-5)
    assert files("two") == files("one")


@pytest.mark.slow
def test_two_processes_keep_the_same_best_weights(photos: Path) -> None:
    """The second epoch of three is the best by far. Both measure its weights, and it is chosen again after a stop."""
    config = tiny(photos, epochs=3, batch_size=17, lr=0.03, validation=24)
    one = fit(replace(config, out="one"))
    words = ("--lr", "0.03", "--validation", "24", "--devices", "2", "--out", "two")
    code, _, err = run("train", *options(replace(config, epochs=2)), *words)
    assert code == 0, err
    code, out, err = run("train", "--resume", "two", "--epochs", "3")
    assert code == 0, err
    assert (one.epochs, one.kept_epoch) == (3, 2)
    assert out.splitlines()[1] == one.selection
    assert difference("two", "one") < 2e-6
    told, expected = (json.loads(Path(name, "result.json").read_text(encoding="utf-8")) for name in ("two", "one"))
    assert (told["processes"], told["epochs"], told["kept_epoch"]) == (2, 3, 2)
    for split in ("validation", "test"):
        assert told[split]["confusion"] == expected[split]["confusion"]
        assert told[split]["loss"] == pytest.approx(expected[split]["loss"], rel=1e-5)


@pytest.mark.slow
def test_terminated_it_saves_and_resumed_it_ends_the_same(photos: Path) -> None:
    config = tiny(photos)
    fit(replace(config, out="whole"))
    process = start("train", *options(config), "--checkpoint-steps", "1", "--out", "run", seconds=0.5)
    await_file("run/last.ckpt")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (143, "")
    told = (
        r"stopping after this step .*\ncapsnet train: stopped in epoch 1 after step \d of 5; go on with: capsnet train "
    )
    assert re.fullmatch(re.escape(KEPT) + "\n" + told + r"--resume run\n", err)
    assert run("train", "--resume", "run")[0] == 0
    assert same_weights("whole", "run")
    assert metrics("whole") == metrics("run")


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_it_ends_the_same(photos: Path) -> None:
    config, rng = tiny(photos, epochs=3), random.Random(1710)
    words = (*options(config), "--checkpoint-steps", "2")
    begun = time.perf_counter()
    assert run("train", *words, "--out", "whole", seconds=0.1)[0] == 0
    assert time.perf_counter() - begun > 1.5
    for k in range(5):
        life = rng.uniform(0, 1.6)  # seconds from the first file on; 15 steps take at least 1.5
        assert run("train", *words, "--out", f"run{k}", seconds=0.1, life=life)[0] == -signal.SIGKILL
        assert "result.json" not in files(f"run{k}")
        code, _, err = run("train", "--resume", f"run{k}")
        assert code == 0, err
        assert same_weights("whole", f"run{k}"), life
        assert metrics("whole") == metrics(f"run{k}"), life
        assert files(f"run{k}") == files("whole")


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [16, 67, 5])
def test_odd_last_batches_with_two_processes(photos: Path, batch_size: int) -> None:
    """Last batches of 4, 1 and 3 images: of 67, one process has none. Measured: at most 4e-7; allowed is 2e-6."""
    config = tiny(photos, batch_size=batch_size)
    fit(replace(config, out="one"))
    code, _, err = run("train", *options(config), "--devices", "2", "--out", "two")
    assert code == 0, err
    assert difference("two", "one") < 2e-6
    for ours, theirs in zip(metrics("two"), metrics("one"), strict=True):
        assert [float(x) for x in ours.values()] == pytest.approx([float(x) for x in theirs.values()], rel=1e-5)


@pytest.mark.slow
def test_torchrun(photos: Path) -> None:
    config = tiny(photos)
    fit(replace(config, out="one"))
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29631")
    code, out, err = run("train", *options(config), "--out", "two", launcher=launcher)
    assert code == 0, err
    assert out.count("test error") == 1
    assert difference("two", "one") < 2e-6
    told = json.loads(Path("two/result.json").read_text(encoding="utf-8"))
    assert (told["processes"], told["test"]["total"]) == (2, 15)


@pytest.mark.slow
def test_two_processes_measure_the_network_that_is_kept(photos: Path) -> None:
    """Batch statistics are those of each process's images; those of the first are kept, and so must be measured."""
    sizes = ["--conv-channels", "4", "4", "--conv-kernel-sizes", "3", "3", "--primary-dim", "2", "--no-reconstruction"]
    words = ["--data", str(photos), "--model", "efficient-capsnet", "--batch-size", "16", "--precision", "32", *sizes]
    for averaged in ("0", "0.9"):
        out = f"run-{averaged}"
        code, _, err = run("train", *words, "--epochs", "2", "--ema", averaged, "--devices", "2", "--out", out)
        assert code == 0, err
        kept = predict_split(pretrained.load(out), prepare.prepare_data(Run(out).config()).test)
        result = json.loads(Path(out, "result.json").read_text(encoding="utf-8"))["test"]
        assert result["loss"] == pytest.approx(float(kept.losses[:, 0].mean()), rel=1e-6)


@pytest.mark.slow
def test_slurm(photos: Path) -> None:
    """Two tasks of one machine, as srun starts them: by its variables alone."""
    config = tiny(photos)
    fit(replace(config, out="one"))
    job = {"JOB_NAME": "train", "JOB_ID": "14632", "NODELIST": "localhost", "NNODES": "1", "NODEID": "0"}
    job |= {"NTASKS": "2", "NTASKS_PER_NODE": "2"}
    words = ("train", *options(config), "--out", "two")
    tasks = [
        start(*words, variables={f"SLURM_{k}": x for k, x in {**job, "PROCID": rank, "LOCALID": rank}.items()})
        for rank in ("0", "1")
    ]
    (out, err), (other_out, other_err) = (task.communicate(timeout=180) for task in tasks)
    assert [task.returncode for task in tasks] == [0, 0], err + other_err
    assert (out.count("test error"), other_out) == (1, "")
    assert difference("two", "one") < 2e-6
    told = json.loads(Path("two/result.json").read_text(encoding="utf-8"))
    assert (told["processes"], told["test"]["total"]) == (2, 15)


@pytest.mark.slow
def test_two_processes_stop_and_go_on(photos: Path) -> None:
    words = (*options(tiny(photos)), "--devices", "2")
    assert run("train", *words, "--out", "whole")[0] == 0
    process = start("train", *words, "--log-every", "1", "--checkpoint-steps", "1", "--out", "run", seconds=0.5)
    await_file("run/last.ckpt")
    process.send_signal(signal.SIGTERM)  # to the first process only
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (143, "")
    assert err.count("\n") == 3
    assert "capsnet train: stopped in epoch 1 after step" in err
    assert run("train", "--resume", "run")[0] == 0
    assert same_weights("whole", "run")
    one, other = metrics("whole"), metrics("run")
    for ours, theirs in zip(other, one, strict=True):
        assert [float(x) for x in ours.values()] == pytest.approx([float(x) for x in theirs.values()], rel=1e-9)


@pytest.mark.slow
def test_a_failing_process_takes_the_others_down(photos: Path) -> None:
    words = ("train", *options(tiny(photos)), "--devices", "2", "--out")
    for k, environment in enumerate(({"fail": 1}, {"fail": 0}, {"fail_early": 1})):
        begun = time.perf_counter()
        code, out, err = run(*words, f"run{k}", **environment)
        assert code != 0
        assert out == ""
        assert "this process fails" in err
        assert time.perf_counter() - begun < 60
        assert "result.json" not in files(f"run{k}")


@pytest.mark.slow
def test_two_processes_tell_a_fault_once(photos: Path) -> None:
    words = ("train", *options(tiny(photos)), "--devices", "2")
    cases: list[tuple[tuple[str, ...], dict[str, Any], int, str]] = [
        (("--data", "nope"), {}, 2, "data must be one of"),
        (("--lr", "1e30", "--out", "run"), {}, 1, "became NaN or infinite in epoch 1"),
        (("--out", "full"), {"bytes": 10_000}, 2, "file full/last.ckpt must be writable; got: File too large"),
    ]
    for extra, environment, expected, message in cases:
        code, out, err = run(*words, *extra, **environment)
        lines = err.removeprefix(f"{KEPT}\n").splitlines()
        assert (code, out, len(lines)) == (expected, "", 1), err
        assert message in err


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_checkpoint(photos: Path) -> None:
    words = options(tiny(photos))
    assert run("train", *words, "--epochs", "1", "--out", "run")[0] == 0
    before = Path("run/last.ckpt").read_bytes()
    code, out, err = run("train", "--resume", "run", "--epochs", "3", bytes=len(before) // 2)
    assert (code, out) == (2, "")
    assert err == (
        "capsnet train: error: file run/last.ckpt must be writable; got: File too large; what it held before is kept\n"
    )
    assert Path("run/last.ckpt").read_bytes() == before
    assert not [path for path in files("run") if "partial" in path]


@pytest.mark.slow
def test_photos_of_one_kind_train_end_to_end_from_the_command_line() -> None:
    """Nothing is replaced here: the real command, the real figure."""
    photos(Path("pictures"), count=40, size=(20, 17))
    capsnet = [sys.executable, "-m", "capsnet"]
    words = options(tiny(Path("pictures"), epochs=8))
    done = subprocess.run([*capsnet, "train", *words, "--out", "run"], capture_output=True, text=True, check=True)
    assert "Using bfloat16" not in done.stderr
    assert Path("run/figures/reconstructions.png").read_bytes().startswith(b"\x89PNG")
    told = subprocess.run([*capsnet, "evaluate", "run", "--json"], capture_output=True, text=True, check=True)
    assert json.loads(told.stdout)["error_percent"] < 67


@pytest.mark.slow
def test_two_processes_in_parts_train_what_one_does_at_once(photos: Path) -> None:
    """Of batches of 17, one process has 9 and the other 8 images, in 3 parts each. Allowed is what it is without."""
    config = tiny(photos, batch_size=17)
    fit(replace(config, out="one"))
    code, _, err = run("train", *options(config), "--devices", "2", "--micro-batch", "6", "--out", "two")
    assert code == 0, err
    assert err.count("memory: batches of 17 in 3 parts of at most 6 (about ") == 1
    assert difference("two", "one") < 2e-6
