import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from capsnet.cli import CAPSNET, main
from capsnet.cli.parsing import Group
from capsnet.config import Config
from capsnet.data.augment import augment
from capsnet.models import available
from capsnet.training import batches
from tiny import KEPT, REAL, files, metrics, options, photos, same_weights, tiny

pytestmark = pytest.mark.usefixtures("workplace")

FIELDS = {f"--{name.replace('_', '-')}" for name in Config().flat()}


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    capsys.readouterr()
    return main(list(words)), *capsys.readouterr()


@pytest.fixture(scope="module")
def trained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, with its figure."""
    directory = tmp_path_factory.mktemp("trained") / "run"
    assert main(["train", *options(tiny(photos)), "--lr", "0.01", "--out", str(directory)]) == 0
    return directory


def test_help_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'lightning_fabric', 'matplotlib', 'PIL', 'numpy'}"
    code = f"import sys; from capsnet.cli import main; main(['--help']); print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "--help")
    assert (code, err) == (0, "")
    assert len(CAPSNET.verbs) == 10
    assert all(f"• {verb} " in out for verb in CAPSNET.verbs)
    assert run(capsys) == (2, out, "")
    assert run(capsys, "--version")[1].startswith("capsnet ")
    for verb, kind in CAPSNET.verbs.items():
        for words in ([verb], *([verb, name] for name in (kind.verbs if isinstance(kind, Group) else ()))):
            code, out, err = run(capsys, *words, "--help")
            assert (code, err) == (0, "")
            assert out.startswith(f"usage: capsnet {' '.join(words)} ")
    assert {name for name in FIELDS if not re.search(rf"{name}\b", run(capsys, "train", "--help")[1])} == set()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--epochs -1", "--epochs must be at least 0; got -1"),
        ("--image-size x", "--image-size must be pixels, 1 to 10,000, or HEIGHTxWIDTH, as 48x64; got 'x'"),
        ("--lr 0 --seed -1", "--lr must be above 0; got 0.0; and --seed must be at least 0; got -1"),
        ("--batch-size 0", "--batch-size must be at least 1; got 0"),
        ("--routing-iterations 0", "--routing-iterations must be at least 1; got 0"),
        ("--decoder-sizes 3 0", "--decoder-sizes must be numbers of 1 to 2,147,483,647; got (3, 0)"),
        ("--devices 999 --device cpu", "--devices must be at most the "),
        ("--image-size 4", "first convolution"),
        ("--data nope", "--data must be one of affnist, affnist-generated, "),
        ("--data misnt", "got misnt (did you mean mnist?)"),
        ("--data FILE", "--data must be one of affnist"),
        ("--data EMPTY", "must hold a folder for each of at least 2 classes"),
        (
            "--model capsnt",
            "; got 'capsnt' (did you mean capsnet?)",
        ),
        ("--preset paper2", "--preset must be one of paper, authors, fast; got 'paper2' (did you mean paper?)"),
        ("--channels 2", "--channels must be 1 or 3; got 2"),
        ("--validation 1000", "--validation must be 0 to 72, which leaves an image of each of 3 classes to train on"),
        ("--config nowhere.yaml", "config file nowhere.yaml must be readable; got: No such file"),
        ("--config EMPTY", "config file EMPTY must be readable; got: Is a directory"),
        ("--config FILE", "config file FILE must hold option: value lines; got str"),
        ("--config UNKNOWN", "config file UNKNOWN: epoch is no option (did you mean epochs?)"),
        ("--resume nowhere", "--resume must be a run directory with a config.yaml; got nowhere"),
        ("--resume FILE", "--resume must be a run directory with a config.yaml; got FILE"),
        ("--resume x --preset paper", "only one of --preset, --config and --resume can be given"),
        ("--out FILE", "--out must be a directory; got the file FILE"),
        ("--out FILE/run", "file FILE/run/manifest.csv must be writable; got: Not a directory"),
        ("--out /proc/no/run", "file /proc/no/run/manifest.csv must be writable; got: No such file"),
    ],
)
def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str], photos: Path, workplace: Path, words: str, message: str
) -> None:
    Path("FILE").write_text("text", encoding="utf-8")
    Path("UNKNOWN").write_text("epoch: 3\n", encoding="utf-8")
    Path("EMPTY").mkdir()
    code, out, err = run(capsys, "train", *options(tiny(photos)), *words.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("capsnet train: error: ")
    assert message in err
    assert files(workplace) == {"FILE", "UNKNOWN"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--epochs x", "Error parsing --epochs"),
        ("--epochs", "--epochs"),
        ("--lr x", "Error parsing --lr"),
        ("--stop-at x", "Error parsing --stop-at"),
        ("--decoder-sizes x", "Error parsing --decoder-sizes"),
        ("--precision 16", "invalid choice '16' for argument '--precision'"),
        ("--framing on", "invalid choice 'on' for argument '--framing'"),
        ("--resume", "--resume"),
        ("--epoch 3", "Unrecognized options: --epoch"),
        ("--bogus", "Unrecognized options: --bogus"),
        ("extra", "Unrecognized options: extra"),
    ],
)
def test_a_usage_error_is_that_of_tyro(
    capsys: pytest.CaptureFixture[str], photos: Path, workplace: Path, words: str, message: str
) -> None:
    code, out, err = run(capsys, "train", *options(tiny(photos)), *words.split())
    assert (code, out) == (2, "")
    assert message in err
    assert "capsnet train --help" in err
    assert files(workplace) == set()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("evaluate", "MODEL must be given; got none"),
        ("evaluate nowhere", "model folder nowhere must hold config.json; there is none"),
        ("evaluate RUN --batch-size 0", "--batch-size must be at least 1; got 0"),
        ("evaluate RUN --data nowhere", "data must be one of"),
        ("evaluate BARE", "--data must be given for BARE, which does not say what it was trained on"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_of_the_other_verbs(
    capsys: pytest.CaptureFixture[str], trained: Path, words: str, message: str
) -> None:
    if "BARE" in words:
        Path("BARE").mkdir()
        for name in ("config.json", "model.safetensors"):
            Path("BARE", name).write_bytes((trained / name).read_bytes())
    code, out, err = run(capsys, *(word.replace("RUN", str(trained)) for word in words.split()))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("capsnet")
    assert message in err


def test_train_prints_its_result(capsys: pytest.CaptureFixture[str], photos: Path) -> None:
    code, out, err = run(capsys, "train", *options(tiny(photos)), "--out", "run")
    assert code == 0
    assert re.fullmatch(
        r"test error [\d.]+ % \(\d+ of 15 wrong; 95 % interval [\d.]+ to [\d.]+ %\)\n"
        r"weights after epoch \d of 2, which had the lowest validation error; no choice was made on the test images\n"
        r"run directory: run\nreconstructions: run/figures/reconstructions.png\nreport: run/report.html\n",
        out,
    )
    assert [line.split(":")[0] for line in err.splitlines()] == [KEPT, "epoch 1/2", "epoch 2/2"]
    assert Path("run/figures/reconstructions.png").read_bytes().startswith(b"\x89PNG")
    code, out, err = run(capsys, "train", "--resume", "run", "--json")
    told = json.loads(out)
    assert (code, told["total"], told["directory"]) == (0, 15, "run")


@pytest.mark.slow
@pytest.mark.usefixtures("blank_figure")
def test_config_repeats_a_run(capsys: pytest.CaptureFixture[str], photos: Path) -> None:
    words = ("--seed", "5", "--rotation", "10", "--preset", "authors", "--out", "one")
    assert run(capsys, "train", *options(tiny(photos)), *words)[0] == 0
    assert run(capsys, "train", "--config", "one/config.yaml")[0] == 0
    assert same_weights("one", "runs/photos-capsnet-seed5")
    assert metrics("one") == metrics("runs/photos-capsnet-seed5")
    assert run(capsys, "train", "--config", "one/config.yaml", "--seed", "6", "--out", "other")[0] == 0
    assert not same_weights("one", "other")


def test_dry_run_writes_nothing(capsys: pytest.CaptureFixture[str], photos: Path, workplace: Path) -> None:
    code, out, err = run(capsys, "train", *options(tiny(photos)), "--dry-run", "--lr", "0.25")
    assert (code, err) == (0, "")
    assert "lr: 0.25" in out
    assert "memory: about" in out
    assert files(workplace) == set()


@pytest.mark.slow
@pytest.mark.usefixtures("blank_figure")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_have_their_exit_codes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, photos: Path, number: int, code: int
) -> None:
    def killed(*arguments: Any) -> Any:
        os.kill(os.getpid(), number)
        return augment(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(batches, "augment", killed)
        got, out, err = run(capsys, "train", *options(tiny(photos)), "--out", "run")
    assert (got, out) == (code, "")
    stopped = "capsnet train: stopped in epoch 1 after step 1 of 5; go on with: capsnet train --resume run"
    assert err == f"{KEPT}\n{stopped}\n"
    assert run(capsys, "train", "--resume", "run")[0] == 0
    assert run(capsys, "train", *options(tiny(photos)), "--out", "whole")[0] == 0
    assert same_weights("run", "whole")


def test_divergence_has_exit_code_1(capsys: pytest.CaptureFixture[str], photos: Path) -> None:
    code, out, err = run(capsys, "train", *options(tiny(photos)), "--lr", "1e30", "--out", "run")
    assert (code, out, err.count("\n")) == (1, "", 2)
    told = (
        r"error: loss became NaN or infinite in epoch 1 at step \d of 5; not finite first: .*; there is no checkpoint"
    )
    assert re.search(told, err)


@pytest.mark.slow
@pytest.mark.usefixtures("blank_figure")
def test_overwrite_and_resume_options(capsys: pytest.CaptureFixture[str], photos: Path) -> None:
    words = ("train", *options(tiny(photos)), "--out", "run")
    assert run(capsys, *words)[0] == 0
    code, _, err = run(capsys, *words)
    assert code == 2
    assert "out directory run must be free; it holds a run" in err
    assert run(capsys, *words, "--overwrite")[0] == 0
    code, _, err = run(capsys, "train", "--resume", "run", "--lr", "3", "--seed", "4")
    assert code == 2
    assert "lr of a resumed run must stay 0.001; got 3.0; and seed of a resumed run must stay 0; got 4" in err
    assert run(capsys, "train", "--resume", "run", "--epochs", "3")[0] == 0
    assert len(metrics("run")) == 3


def test_evaluate_says_what_the_run_said(capsys: pytest.CaptureFixture[str], trained: Path) -> None:
    code, out, err = run(capsys, "evaluate", str(trained), "--json")
    assert (code, err) == (0, "")
    told, result = json.loads(out), json.loads((trained / "result.json").read_text(encoding="utf-8"))["test"]
    for name in ("error_percent", "wrong", "total", "interval", "confusion", "per_class"):
        assert told[name] == result[name]
    assert told["loss"] == pytest.approx(result["loss"], rel=1e-5)
    assert (told["split"], told["precision"], told["total"]) == ("test", "32", 15)
    totals = {"train": 68, "validation": 7}
    for split, total in totals.items():
        told = json.loads(run(capsys, "evaluate", str(trained), "--split", split, "--json")[1])
        assert told["total"] == total
    validation = json.loads((trained / "result.json").read_text(encoding="utf-8"))["validation"]
    assert told["confusion"] == validation["confusion"]


def test_evaluate_prints_tables(capsys: pytest.CaptureFixture[str], trained: Path) -> None:
    code, out, err = run(capsys, "evaluate", str(trained))
    assert (code, err) == (0, "")
    assert re.search(r"photos.* test error [\d.]+ % \(\d+ of 15 wrong; 95 % interval", out)
    assert "classification" in out
    assert "others taken for it" in out
    assert "confusion matrix, true class in rows" in out


def test_evaluate_on_other_images(capsys: pytest.CaptureFixture[str], trained: Path) -> None:
    photos(Path("others"), count=12)
    code, out, _ = run(capsys, "evaluate", str(trained), "--data", "others", "--json")
    told = json.loads(out)
    assert (code, told["total"], told["run"]) == (0, 36, str(trained))
    Path("bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        Path("bare", name).write_bytes((trained / name).read_bytes())
    again = json.loads(run(capsys, "evaluate", "bare", "--data", "others", "--json")[1])
    assert again["confusion"] == told["confusion"]


@pytest.mark.parametrize("what", ["models", "data", "presets", "experiments"])
def test_list(capsys: pytest.CaptureFixture[str], what: str) -> None:
    code, out, err = run(capsys, "list", what)
    assert (code, err) == (0, "")
    rows: list[dict[str, Any]] = json.loads(run(capsys, "list", what, "--json")[1])
    names = [row["name"] for row in rows]
    expected = {
        "models": sorted(available()),
        "data": [
            *("affnist", "affnist-generated", "cifar10", "expanded-mnist", "fashion-mnist", "kmnist", "mnist"),
            *("multimnist", "smallnorb", "strokes", "svhn"),
        ],
        "presets": ["paper", "authors", "fast"],
        "experiments": [
            *("table1", "efficient-capsnet", "cost", "what-matters", "what-matters-capsnet", "recipes"),
            *("multimnist", "affnist", "cifar10"),
            *("fashion-mnist", "svhn", "smallnorb", "successors", "successors-fashion-mnist", "successors-cifar10"),
            "capsule-head",
        ],
    }
    assert names == expected[what]
    assert all(name in out for name in names)
    if what == "models":
        assert rows[2]["parameters on MNIST"] == "8,215,568"


def test_the_flag_of_a_running_module() -> None:
    done = subprocess.run([sys.executable, "-m", "capsnet", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("capsnet ")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not (REAL / "cifar10").is_dir(), reason=f"no CIFAR-10 in {REAL}; set CAPSNET_DATA")
def test_three_classes_of_cifar10_as_png_files(capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    from capsnet import data

    cifar = data.load("cifar10", data_dir=REAL)
    for k, name in enumerate(cifar.classes[:3]):
        Path("images", name).mkdir(parents=True)
        for number, index in enumerate((cifar.train.labels == k).nonzero()[:400, 0].tolist()):
            pixels = cifar.train.images[index].permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(f"images/{name}/{number}.png")
    sizes = "--conv-channels 32 --capsule-types 4 --decoder-sizes 32"
    words = f"train --data images {sizes} --batch-size 32 --epochs 8 --flip --out run"
    assert run(capsys, *words.split())[0] == 0
    told = json.loads(run(capsys, "evaluate", "run", "--json")[1])
    assert told["total"] == 201  # a sixth of each class
    assert [row["class"] for row in told["per_class"]] == ["airplane", "automobile", "bird"]
    assert told["error_percent"] < 55  # chance is 67
