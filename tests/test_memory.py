"""Estimates of memory against measured peaks; what is free by limit; and refusals before anything is begun."""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from capsnet import devices, memory, models
from capsnet.checkpoints import pretrained
from capsnet.cli import main
from capsnet.config import Config
from capsnet.data import Dataset, Split, outline
from capsnet.devices import Free
from capsnet.errors import InputError
from tiny import files, tiny

CPU = torch.device("cpu")
EIGHT, MANY = (
    Dataset("images", ("a", "b"), split, split)
    for split in (
        Split(torch.empty(count, 1, 28, 28, dtype=torch.uint8, device="meta"), torch.arange(count) % 2)
        for count in (8, 1000)
    )
)
TOLERANCE = 0.25  # of the peak above an idle `import capsnet`
SMALL = ("--conv-channels", "16", "--capsule-types", "2", "--decoder-sizes", "32")

MEASURED = """
import json, sys

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

import capsnet
idle = peak()
from capsnet import devices, memory
estimates = []
check = memory.check

def recorded(needed, device, **about):
    estimates.append(needed + devices.resident())
    check(needed, device, **about)

memory.check, memory._most = recorded, lambda *arguments: float("inf")  # counts, however small
if "demo" in sys.argv:
    import starlette, uvicorn, capsnet.demo
    capsnet.demo.serve = lambda viewer, **about: (
        viewer.look(open("image.png", "rb").read(), invert="auto", index=None),
        viewer.evidence(__import__("torch").zeros(viewer.image_shape, dtype=__import__("torch").uint8), 0),
    )
from capsnet.cli import main
code = main(sys.argv[1:])
json.dump({"code": code, "idle": idle, "peak": peak(), "estimate": max(estimates)}, open("measured.json", "w"))
"""


def measured(*arguments: str) -> dict[str, int]:
    """What a command is estimated to take and takes, in a fresh process; in bytes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(Path("measured.json").read_text(encoding="utf-8"))
    assert found["code"] == 0, done.stderr
    return found


def check_estimate(*arguments: str) -> None:
    found = measured(*arguments)
    ratio = (found["estimate"] - found["idle"]) / (found["peak"] - found["idle"])
    assert 1 - TOLERANCE <= ratio <= 1 + TOLERANCE, f"{ratio:.2f} of {found['peak'] / 2**20:,.0f} MiB"


def images(root: Path, shape: tuple[int, ...], count: int, classes: int = 10) -> str:
    """A folder of noise."""
    draw = np.random.default_rng(0)
    for number in range(count):
        place = root / str(number % classes) / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8)).save(place)
    return str(root)


only_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system tells no peak")


TRAININGS: list[tuple[tuple[int, ...], int, tuple[str, ...]]] = [
    ((28, 28), 300, ("--batch-size", "128", "--precision", "32", "--primary-scale", "1")),  # the paper's on MNIST
    (
        (28, 28),
        120,
        ("--batch-size", "48", "--routing-kernel", "plain", "--convolution", "direct", "--precision", "32"),
    ),
    (
        (28, 28),
        240,
        ("--batch-size", "64", "--no-reconstruction", "--routing-kernel", "plain", "--convolution", "winograd"),
    ),
    ((28, 28), 120, ("--batch-size", "32", "--model", "baseline", "--precision", "32")),
    ((64, 64, 3), 60, ("--batch-size", "16", "--image-size", "64", "--precision", "32")),
    ((64, 64, 3), 200, (*SMALL, "--batch-size", "32", "--image-size", "64", "--precision", "32")),
    ((28, 28), 240, ("--batch-size", "64", "--convolution", "direct", "--precision", "bf16")),
    ((64, 64, 3), 60, ("--batch-size", "32", "--micro-batch", "4", "--image-size", "64", "--precision", "32")),
]


@only_linux
@pytest.mark.parametrize(
    ("shape", "count", "options"),
    [
        pytest.param(*each, marks=[pytest.mark.slow] if k else [], id=" ".join(each[2]))
        for k, each in enumerate(TRAININGS)
    ],
)
def test_training_takes_what_is_estimated(
    workplace: Path, shape: tuple[int, ...], count: int, options: tuple[str, ...]
) -> None:
    data = images(workplace / "data", shape, count)
    check_estimate("train", "--data", data, "--epochs", "1", "--threads", "1", "--out", "run", *options)


@pytest.fixture
def colour(workplace: Path) -> Path:
    """Weights of the paper's network for 64 x 64 colours, and images of these in the current directory."""
    torch.manual_seed(0)
    network = models.create("capsnet", image_shape=(3, 64, 64))
    pretrained.save_pretrained(network, workplace / "weights")
    images(workplace / "data", (64, 64, 3), 120)
    Image.open(workplace / "data" / "0" / "0.png").save(workplace / "image.png")
    return workplace


@pytest.mark.slow
@only_linux
@pytest.mark.usefixtures("colour")
@pytest.mark.parametrize(
    "arguments",
    [
        ("evaluate", "weights", "--data", "data", "--split", "train", "--batch-size", "64"),
        ("predict", "weights", "data", "--batch-size", "32"),
        ("demo", "weights"),
        ("export", "weights", "--to", "safetensors", "--images", "60", "--batch-size", "32"),
        ("export", "weights", "--to", "pt2", "--images", "60", "--batch-size", "32"),
        ("export", "weights", "--to", "onnx", "--images", "60", "--batch-size", "32"),
    ],
    ids=" ".join,
)
def test_other_commands_take_what_is_estimated(arguments: tuple[str, ...]) -> None:
    check_estimate(*arguments)


# refusals


def limited(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    """Let so many bytes be free on the CPU."""
    for module in (devices, memory):
        monkeypatch.setattr(module, "free", lambda device: Free(size, "free in a test"))


def test_a_training_that_does_not_fit_is_one_line_and_nothing_is_written(
    photos: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limited(monkeypatch, 10 * 2**20)
    monkeypatch.setattr("capsnet.data.image_folder.decoded", None)  # no image is, before
    code = main(["train", "--data", str(photos), "--image-size", "48", "--batch-size", "1024", *SMALL])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    rule = r"capsnet train: error: training one image at a time needs about [\d,.]+ MiB of memory, and 10 MiB are free"
    assert re.fullmatch(rf"{rule} in a test; choose a smaller --image-size, or fewer --conv-ch.*\n", err), err
    assert files(workplace) == set()


def estimate(batch_size: int = 128, micro_batch: int | None = None, **options: Any) -> int:
    with torch.device("meta"):
        network = models.create("capsnet")
    config = Config.of(primary_scale=1.0, **options)
    return memory.training(network, config, CPU, MANY, precision="32", batch_size=batch_size, micro_batch=micro_batch)


def test_a_smaller_part_takes_less() -> None:
    """Of 128 images at once; in parts, gradients wait meanwhile, and the images of the batch are there as a whole."""
    parts = [estimate(micro_batch=size) for size in (128, 64, 16, 4, 1)]
    assert parts == sorted(parts, reverse=True)
    assert parts[-1] < 0.8 * parts[0], "the rest are weights, moments, and a checkpoint of them"
    assert estimate(micro_batch=128) <= estimate() == estimate(micro_batch=1000)
    assert estimate(128, micro_batch=4) > estimate(4, micro_batch=4), "the images of the whole batch"


def fitted(free: int, monkeypatch: pytest.MonkeyPatch, world_size: int = 1, **options: Any) -> tuple[int | None, str]:
    """How a training with the paper's network fits into so many bytes beside the images, and what is said."""
    limited(monkeypatch, free + outline.nbytes(MANY))
    with torch.device("meta"):
        network = models.create(options.get("model", "capsnet"))
    processes = devices.Launch("", 0, world_size, 1)
    config = Config.of(**{**({} if "model" in options else {"primary_scale": 1.0}), **options})
    size, text = memory.check_training(network, config, CPU, MANY, precision="32", processes=processes)
    return size, text or ""


@pytest.mark.slow
def test_the_fewest_parts_that_fit_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    half = estimate(micro_batch=64)
    assert fitted(estimate(), monkeypatch) == (None, "")
    size, text = fitted(estimate() - 1, monkeypatch)
    assert size == 64
    takes = r"\(about (\d+) MiB; \d+ MiB are free in a test\)"
    said = re.fullmatch(rf"memory: batches of 128 in 2 parts of 64 {takes}; the gradient is the same", text)
    assert said
    assert abs(int(said[1]) * 2**20 - half - outline.nbytes(MANY)) < 2**20
    assert fitted(half, monkeypatch)[0] == 64
    assert fitted(half - 1, monkeypatch)[0] == 32


def test_a_batch_that_fits_is_not_cut_for_the_sake_of_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 256 images at a time, where a step has 4."""
    assert estimate(4, micro_batch=4) < estimate(4)
    size, text = fitted(estimate(4) - 1, monkeypatch, batch_size=4)
    assert size == 4
    assert text.startswith("memory: evaluation of 4 images at a time (about ")


@pytest.mark.parametrize(
    ("batch_size", "micro_batch", "world_size", "cut"),
    [
        (128, 32, 1, "batches of 128 in 4 parts of 32 "),
        (100, 32, 1, "batches of 100 in 4 parts of 25 "),
        (17, 5, 1, "batches of 17 in 4 parts of at most 5 "),
        (5000, 300, 1, "batches of 1000 in 4 parts of 250 "),
        (128, 32, 2, "batches of 128 in 4 parts of 32 "),
        (128, 128, 1, ""),
        (128, 500, 1, ""),
    ],
)
def test_parts_that_are_asked_for_are_told(
    monkeypatch: pytest.MonkeyPatch, batch_size: int, micro_batch: int, world_size: int, cut: str
) -> None:
    size, text = fitted(10**12, monkeypatch, world_size, batch_size=batch_size, micro_batch=micro_batch)
    assert size == micro_batch
    assert text.startswith(cut and f"memory: {cut}(about ")
    assert text.endswith(cut and "; the gradient is the same")


def test_parts_that_are_asked_for_are_cut_further_where_they_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = estimate(micro_batch=32)
    assert fitted(asked, monkeypatch, micro_batch=32)[0] == 32
    assert fitted(asked - 1, monkeypatch, micro_batch=32)[0] == 16


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "differs"),
    [
        ("capsnet", ""),
        ("efficient-capsnet", " but for batch statistics, which are those of each part"),
        ("em-capsnet", ""),
        ("vb-capsnet", " but for batch statistics, which are those of each part"),
        ("baseline", " but for dropout, which is drawn for each part"),
    ],
)
def test_what_differs_in_parts_is_told(monkeypatch: pytest.MonkeyPatch, model: str, differs: str) -> None:
    _, text = fitted(10**12, monkeypatch, model=model, micro_batch=50)
    assert text.endswith(f"the gradient is the same{differs}")


def test_too_little_memory_cuts_the_batch_and_says_so(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], workplace: Path
) -> None:
    words = ["train", "--data", str(photos), "--image-size", "48", "--epochs", "1", "--out", "run", "--no-report"]
    words += ["--batch-size", "1024", *SMALL]
    limited(monkeypatch, 240 * 2**20)
    assert main([*words, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert files(workplace) == set()
    assert main(words) == 0
    line = r"memory: batches of 68 in \d+ parts of (at most )?\d+ \(about [\d,]+ MiB; 240 MiB are free in a test\); "
    line += "the gradient is the same"
    found = re.findall(rf"^{line}$", capsys.readouterr().err, re.MULTILINE)
    assert len(found) == 1
    assert len(re.findall(rf"^{line}$", told, re.MULTILINE)) == 1
    assert re.search(r"^  micro_batch: \d+$", Path("run/config.yaml").read_text(encoding="utf-8"), re.MULTILINE)


def main_fit(config: Config) -> None:
    from capsnet.training.fit import fit

    fit(config)


def test_the_check_can_be_switched_off(photos: Path, monkeypatch: pytest.MonkeyPatch, workplace: Path) -> None:
    limited(monkeypatch, 0)
    monkeypatch.setenv("CAPSNET_MEMORY", "off")
    main_fit(tiny(photos, epochs=1, out="run", report=False))


@pytest.mark.parametrize(
    ("arguments", "task"),
    [
        (["evaluate", "capsnet-mnist", "--data", "strokes"], "evaluation"),
        (["evaluate", "capsnet-mnist", "--data", "strokes", "--shifts", "1"], "evaluation"),
        (["predict", "capsnet-mnist", "image.png"], "prediction"),
        (["demo", "capsnet-mnist"], "the demo"),
        (["export", "capsnet-mnist", "--to", "pt2"], "export to pt2"),
    ],
    ids=str,
)
def test_other_commands_are_refused_before_they_compute_or_write(
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    task: str,
) -> None:
    Image.new("L", (28, 28)).save("image.png")
    limited(monkeypatch, 100 * 2**20)
    code = main(arguments)
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    start = f"capsnet {arguments[0]}: error: {task} needs about "
    assert err.startswith(start), err
    assert "of memory, and 100 MiB are free in a test; " in err
    assert err.count("\n") == 1
    assert files(workplace) == {"image.png"}


def test_weights_that_do_not_fit_are_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, 10 * 2**20)
    with pytest.raises(InputError, match=r"config.json: model capsnet, of 8,215,568 parameters, needs about 63 MiB"):
        pretrained.load("capsnet-mnist")


@pytest.mark.slow
def test_a_limited_process_ends_with_one_line_where_it_was_killed(photos: Path, workplace: Path) -> None:
    """Of its own address space: 3 GiB, in which 128 images of 300 x 224 never trained."""
    command = [sys.executable, "-m", "capsnet", "train", "--data", str(photos), "--image-size", "300x224"]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))

    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, check=False)
    assert done.returncode == 2
    assert "left of the process's limit (ulimit -v); choose a smaller --image-size" in done.stderr.splitlines()[-1]
    assert files(workplace) == set()


# what is counted


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "options", [{}, {"routing_kernel": "plain"}, {"convolution": "direct"}, {"reconstruction": False}], ids=str
)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 64, 64)], ids=str)
def test_what_is_not_worth_counting_is_more_than_the_count(shape: tuple[int, int, int], options: Any) -> None:
    for name in models.available():
        given = options if name == "capsnet" else {}
        with torch.device("meta"):
            network = models.create(name, image_shape=shape, **given)
        for batch_size in (1, 16, 256):
            assert memory.inference(network, batch_size, CPU) <= memory._most(network, batch_size)
            plain = memory.inference(network, batch_size, CPU, **memory.PLAIN)
            assert plain <= memory._most(network, batch_size)


def test_counting_leaves_kept_buffers_and_randomness_alone() -> None:
    from capsnet.kernels.buffers import pool

    kept = torch.zeros(3)
    pool.release("stem v", kept)
    state = torch.get_rng_state()
    with torch.device("meta"):
        network = models.create("capsnet")
    memory.training(network, Config.of(primary_scale=1.0), CPU, EIGHT, precision="32", batch_size=4)
    assert pool.acquire("stem v", (3,), kept).data_ptr() == kept.data_ptr()
    assert torch.equal(torch.get_rng_state(), state)
    pool.clear()


def test_bfloat16_takes_less_than_float32() -> None:
    with torch.device("meta"):
        network = models.create("capsnet", convolution="direct")
    one, other = (
        memory.training(network, Config.of(primary_scale=1.0), CPU, MANY, precision=precision, batch_size=128)
        for precision in ("bf16", "32")
    )
    assert one < 0.9 * other


@pytest.mark.parametrize("options", [{"ema": 0.9}, {"keep": "best"}], ids=str)
def test_averaged_and_best_weights_take_memory_twice(options: dict[str, Any]) -> None:
    with torch.device("meta"):
        network = models.create("capsnet")
    one, other = (
        memory.training(network, Config.of(primary_scale=1.0, **more), CPU, MANY, precision="32", batch_size=1)
        for more in (options, {})
    )
    assert 4 * network.parameter_count() <= one - other < 9 * network.parameter_count()  # and once in a checkpoint


def test_larger_images_go_through_in_smaller_batches() -> None:
    sizes = [(28, 28), (40, 40), (64, 64), (300, 224), (5000, 5000)]
    with torch.device("meta"):
        networks = [
            models.create("capsnet", image_shape=(1, *size), conv_channels=2, capsule_types=1) for size in sizes
        ]
    assert [models.inference_batch(network) for network in networks] == [256, 256, 100, 6, 1]


# what is free


def system(root: Path, monkeypatch: pytest.MonkeyPatch, **content: str) -> None:
    """Files of `proc` and `sys` below `root`; `__` is a slash."""
    monkeypatch.setattr(devices, "ROOT", root)
    for name, text in {
        "proc__meminfo": "MemTotal: 99 kB\nMemAvailable: 4096 kB\nSwapFree: 1024 kB\n",
        **content,
    }.items():
        path = root / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def test_memory_and_swap_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system(tmp_path, monkeypatch)
    assert devices.free(CPU) == (5 * 2**20, "free on this machine")


@pytest.mark.parametrize("group", ["", "/outer", "/outer/inner", "/not/seen/here"])
def test_the_limit_of_a_container_of_version_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: str) -> None:
    files_ = {"max": "3000000\n", "current": "2500000\n", "stat": "anon 1\ninactive_file 400000\n"}
    place = "" if "not" in group else group.replace("/", "__")
    limits = {f"sys__fs__cgroup{place}__memory_DOT_{name}": text for name, text in files_.items()}
    system(tmp_path, monkeypatch, proc__self__cgroup=f"0::{group or '/'}\n", **limits)
    assert devices.free(CPU) == (900_000, "free in this container (its memory limit)")


def test_an_outer_group_may_be_the_tighter_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {
        "sys__fs__cgroup__outer__memory_DOT_max": "1000000",
        "sys__fs__cgroup__outer__memory_DOT_current": "900000",
        "sys__fs__cgroup__outer__inner__memory_DOT_max": "max",
        "sys__fs__cgroup__outer__inner__memory_DOT_current": "5",
    }
    system(tmp_path, monkeypatch, proc__self__cgroup="0::/outer/inner\n", **limits)
    assert devices.free(CPU).size == 100_000


def test_the_limit_of_a_container_of_version_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {
        "sys__fs__cgroup__memory__job__memory_DOT_limit_in_bytes": "3000000",
        "sys__fs__cgroup__memory__job__memory_DOT_usage_in_bytes": "2500000",
        "sys__fs__cgroup__memory__job__memory_DOT_stat": "inactive_file 7\ntotal_inactive_file 100000\n",
        "sys__fs__cgroup__memory__memory_DOT_limit_in_bytes": str(2**63 - 4096),
        "sys__fs__cgroup__memory__memory_DOT_usage_in_bytes": "1",
    }
    system(tmp_path, monkeypatch, proc__self__cgroup="9:name=systemd:/\n4:cpu,memory:/job\n0::/\n", **limits)
    assert devices.free(CPU).size == 600_000


def test_a_used_up_limit_is_nothing_and_not_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"sys__fs__cgroup__memory_DOT_max": "10", "sys__fs__cgroup__memory_DOT_current": "20"}
    system(tmp_path, monkeypatch, proc__self__cgroup="0::/\n", **limits)
    assert devices.free(CPU).size == 0


@pytest.mark.parametrize(("name", "held", "option"), [("RLIMIT_AS", "VmSize", "-v"), ("RLIMIT_DATA", "VmData", "-d")])
def test_the_limits_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, held: str, option: str
) -> None:
    system(tmp_path, monkeypatch, proc__self__status=f"Name: x\n{held}: 100 kB\n")
    asked = getattr(resource, name)
    none = resource.RLIM_INFINITY
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (300 * 1024, none) if kind == asked else (none, none))
    assert devices.free(CPU) == (200 * 1024, f"left of the process's limit (ulimit {option})")


def test_without_proc_the_machine_s_size_is_all_that_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "ROOT", tmp_path)
    assert devices.free(CPU).where == "in this machine"
    assert devices.resident() == 0
    monkeypatch.delattr(os, "sysconf")
    assert devices.free(CPU).size == float("inf")


@pytest.mark.parametrize(("size", "shown"), [(0, "0 MiB"), (850 * 2**20, "850 MiB"), (1.5 * 2**40, "1,536.0 GiB")])
def test_amounts_are_to_be_read(size: float, shown: str) -> None:
    assert memory.amount(size) == shown
