"""The run directory and the weights: what is written, how it is read again, and what is refused.

Nothing here unpickles what came from outside: weights are safetensors, and checkpoints are read with
`torch.load(weights_only=True)`, which builds tensors and plain containers only.
"""

import contextlib
import csv
import difflib
import io
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast, get_type_hints
from zipfile import ZipFile

import torch
from torch import Tensor

from capsnet import card, memory, models
from capsnet import config as config_file
from capsnet.card import Card, Tested
from capsnet.config import Config
from capsnet.data import manifest
from capsnet.data.manifest import Manifest
from capsnet.errors import InputError
from capsnet.files import read_bytes, read_json, read_text
from capsnet.kernels import native
from capsnet.models import Network
from capsnet.schema import brief, checked, joined, shown

if sys.platform != "win32":
    import fcntl

__all__ = [
    "Run",
    "environment",
    "folder_of",
    "from_pretrained",
    "load",
    "load_card",
    "save_card",
    "save_pretrained",
    "shipped",
    "write_atomically",
]

WEIGHTS = Path(__file__).parent / "weights"
PRETRAINED = ["config.json", card.FILE, "model.safetensors"]
CHECKPOINT_VERSION = 1
STORED = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
"""Types that weights may be stored in; they are computed in float32."""
DRAWN = (
    "class-errors",
    "confusion",
    "couplings",
    "curves",
    "factors",
    "gallery",
    "lengths",
    "perturbations",
    "reconstructions",
    "reliability",
)
RESULTS = ("result.json", *PRETRAINED, "report.html", *(f"figures/{name}.*" for name in DRAWN))
"""What is made from the weights of the last epoch."""
WRITTEN = ("last.ckpt", "metrics.csv", manifest.FILE, "tensorboard/events.out.tfevents.*", *RESULTS)
"""What a run writes beside its config.yaml; `--overwrite` removes these and nothing else."""


class Row(TypedDict):
    """A line of `metrics.csv`, which is an epoch; all lines have the columns of validation, or none has."""

    epoch: int
    learning_rate: float
    train_loss: float
    train_classification_loss: float
    train_reconstruction_loss: float
    train_error_percent: float
    images_per_second: float
    validation_loss: NotRequired[float]
    validation_classification_loss: NotRequired[float]
    validation_reconstruction_loss: NotRequired[float]
    validation_error_percent: NotRequired[float]
    seconds: float


class RunResult(TypedDict):
    """What is read again of `result.json`; it holds more."""

    epochs: int
    seconds: float
    test: Tested
    train_images: int
    validation: NotRequired[Tested | None]


class AdamState(TypedDict):
    """The moments of each parameter, by its number; the options of Adam are those of the configuration."""

    state: dict[int, dict[str, Tensor]]


class Checkpoint(TypedDict):
    """What `last.ckpt` holds beside its version."""

    config: dict[str, Any]
    train_images: int
    network: dict[str, Tensor]
    optimizer: AdamState
    state: dict[str, Any]
    rows: list[Row]
    sums: Tensor
    kernels: NotRequired[str]


class Run:
    """Paths of one run directory, and its files.

    Attributes:
        directory: where everything of the run is.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.config_path = self.directory / "config.yaml"
        self.checkpoint_path = self.directory / "last.ckpt"
        self.metrics_path = self.directory / "metrics.csv"
        self.manifest_path = self.directory / manifest.FILE
        self.result_path = self.directory / "result.json"
        self.figures = self.directory / "figures"

    def exists(self) -> bool:
        """Whether a run was begun here."""
        return self.config_path.exists() or self.checkpoint_path.exists()

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep the directory, which is made if it is not there, to this process.

        The lock is on the directory itself: there is no file to be left behind, and it goes with the process, however
        that ends. Windows and some network drives have no such lock; there nobody is kept out.

        Raises:
            InputError: another process is training here.
        """
        handle = self._lock()
        try:
            yield
        finally:
            if handle is not None:
                os.close(handle)

    def _lock(self) -> int | None:
        """The open and locked directory; None where there is none to lock, of which `begin` tells more, or no lock."""
        if sys.platform == "win32":
            return None
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.directory, os.O_RDONLY)
        except OSError:
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise InputError(f"run directory {self.directory} must be free; another process trains in it") from None
        except OSError:
            pass
        return handle

    def begin(self, config: Config, images: Manifest, *, overwrite: bool) -> None:
        """Make the directory and write which images the run uses, then the configuration, with which it has begun.

        The configuration is written without the place: the file also repeats the run elsewhere.

        Raises:
            InputError: there is a run already (and not `overwrite`), other files, or the directory cannot be made.
        """
        self._check_free(overwrite=overwrite)
        self._remove(*WRITTEN)
        write_atomically(self.manifest_path, lambda path: path.write_bytes(images.to_bytes()))
        self.go_on(config)

    def go_on(self, config: Config) -> None:
        """Write the configuration of a run that begins or goes on, and remove what a kill left half-written.

        Results of fewer epochs than the run is now to have are removed: they would pass for its own.

        Raises:
            InputError: the directory is not writable.
        """
        self._remove(".*.partial", "figures/.*.partial")
        if self.config_path.exists() and self.config().epochs != config.epochs:
            self._remove(*RESULTS)
        anywhere = replace(config, out=None, overwrite=False)
        write_atomically(self.config_path, lambda path: config_file.write(anywhere, path))

    def _check_free(self, *, overwrite: bool) -> None:
        """Raise InputError unless a new run may begin here."""
        if self.directory.exists() and not self.directory.is_dir():
            raise InputError(f"out must be a directory; got the file {self.directory}")
        if self.exists() and not overwrite:
            raise InputError(
                f"out directory {self.directory} must be free; it holds a run "
                f"(go on with --resume {self.directory}, replace it with --overwrite, or give another --out)"
            )
        if self.exists():
            self.config()  # a config.yaml of something else is not ours to replace
        elif self.directory.exists() and set(self.directory.iterdir()) - {
            self.manifest_path,
            *self.directory.glob(".*.partial"),
        }:
            raise InputError(f"out directory {self.directory} must be empty or new; it holds other files")

    def _remove(self, *patterns: str) -> None:
        try:
            for pattern in patterns:
                for path in self.directory.glob(pattern):
                    path.unlink()
        except OSError as error:
            raise InputError(f"out directory {self.directory} must be writable; got: {error.strerror}") from None

    def manifest(self) -> Manifest | None:
        """Which images the run uses; None of a run from before there were manifests.

        Raises:
            InputError: the file is no manifest.
        """
        return Manifest.read(self.manifest_path)

    def config(self) -> Config:
        """The configuration of the run.

        Raises:
            InputError: there is no run here.
        """
        if not self.config_path.exists():
            raise InputError(f"run directory {self.directory} must hold a config.yaml; there is none")
        return config_file.read(self.config_path)

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint by `state`, whole or not at all.

        Raises:
            InputError: the disk is full or the directory not writable; the old checkpoint is untouched.
        """
        content = io.BytesIO()  # first in memory: writing to a full disk then fails with the system's own words
        torch.save({"version": CHECKPOINT_VERSION, **state}, content)
        write_atomically(self.checkpoint_path, lambda path: path.write_bytes(content.getbuffer()))

    def load_checkpoint(self, *, most: int | None = None) -> Checkpoint:
        """The last checkpoint, on the CPU: of the right form, but not yet known to fit a network.

        Args:
            most: bytes that the file can rightly hold; default: any number.

        Raises:
            InputError: there is none, or it is damaged, of another version or of another form.
        """
        path = self.checkpoint_path
        if not path.exists():
            raise InputError(f"run directory {self.directory} must hold a last.ckpt to go on from; there is none")
        what = f"checkpoint {path} must be one that capsnet wrote"
        try:
            if most is not None and path.stat().st_size > most:
                raise InputError(f"checkpoint {path} must hold at most {most:,} bytes for this network; got more")
            with ZipFile(path) as archive:  # PyTorch ignores checksums, and unpacks what it itself never packs
                if any(part.compress_type for part in archive.infolist()) or archive.testzip():
                    raise InputError(f"{what}; it is damaged")
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
        except InputError:
            raise
        except Exception as error:  # a damaged file raises anything from EOFError to UnpicklingError
            reason = "it is damaged" if "weights_only" not in str(error) else "it holds more than tensors and numbers"
            raise InputError(f"{what}; {reason}") from None
        version = content.get("version") if isinstance(content, dict) else None
        if type(version) is not int:
            raise InputError(f"{what}; it lacks a version")
        if version != CHECKPOINT_VERSION:
            raise InputError(f"checkpoint {path} must be of version {CHECKPOINT_VERSION}; got {shown(version)}")
        return cast(Checkpoint, checked(content, Checkpoint, source=f"checkpoint {path}"))

    def result(self) -> RunResult:
        """The content of `result.json`.

        Raises:
            InputError: there is none, or it is not that of a finished run.
        """
        source = f"file {self.result_path}"
        return cast(RunResult, checked(read_json(self.result_path), RunResult, source=source))

    def metrics(self) -> list[Row]:
        """The rows of `metrics.csv`; none where there is no file.

        Raises:
            InputError: it is not the table that a run writes.
        """
        if not self.metrics_path.is_file():
            return []
        source = f"file {self.metrics_path}"
        try:
            reader = csv.DictReader(read_text(self.metrics_path).splitlines(), strict=True)
            columns, lines = reader.fieldnames or [], list(reader)
        except csv.Error as error:
            raise InputError(f"{source} must be a table; got: {error}") from None
        if lacking := Row.__required_keys__ - set(columns):
            raise InputError(f"{source} must have the columns of a run; it lacks {', '.join(sorted(lacking))}")
        rows = []
        for number, line in enumerate(lines, 1):
            cells = {name: _number(cell) for name, cell in line.items()}
            for kind in (dict[str, int | float], Row):
                cells = checked(cells, kind, source=f"{source}, epoch {number}")
            rows.append(cast(Row, cells))
        return rows

    def write_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Write `metrics.csv`, one row an epoch."""

        def write(path: Path) -> None:
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)

        if rows:
            write_atomically(self.metrics_path, write)

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write `result.json`."""
        text = json.dumps(result, indent=2) + "\n"
        write_atomically(self.result_path, lambda path: path.write_text(text, encoding="utf-8"))


def _number(cell: Any) -> Any:
    """The number in a cell of a table; what is none stays as it is."""
    for kind in (int, float):
        with contextlib.suppress(ValueError, TypeError):
            return kind(cell)
    return cell


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a file beside `path`, flush it to the disk, and put it in place in one step.

    Raises:
        InputError: it could not be written; what was at `path` is untouched and nothing half-made is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = error.strerror or str(error)
        kept = "; what it held before is kept" if path.is_file() else ""
        raise InputError(f"file {path} must be writable; got: {reason}{kept}") from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_pretrained(network: Network, directory: str | Path) -> None:
    """Write `model.safetensors` and `config.json`: all that `load` and `from_pretrained` need.

    Args:
        network: a network made by `create`.
        directory: made if it is not there; only these two files are replaced.

    Raises:
        InputError: the files cannot be written.
    """
    from safetensors.torch import save

    directory = Path(directory)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    content = save(weights, metadata={"format": "pt"})
    write_atomically(directory / "model.safetensors", lambda path: path.write_bytes(content))
    text = json.dumps(network.config, indent=2) + "\n"
    write_atomically(directory / "config.json", lambda path: path.write_text(text, encoding="utf-8"))


def save_card(card_: Card, directory: str | Path) -> None:
    """Write `card.json`.

    Raises:
        InputError: the file cannot be written.
    """
    write_atomically(Path(directory) / card.FILE, lambda path: path.write_text(card_.to_json(), encoding="utf-8"))


def shipped() -> list[str]:
    """Names of the weights that come with the package, sorted."""
    return sorted(folder.name for folder in WEIGHTS.iterdir() if (folder / "config.json").is_file())


def folder_of(path: str | Path) -> Path:
    """Where weights are: the folder itself, or that of weights which come with the package by their name."""
    folder = Path(path)
    if not folder.exists() and folder.name == str(path) and (WEIGHTS / folder).is_dir():
        return WEIGHTS / folder
    return folder


def load_card(path: str | Path) -> Card:
    """What is told of the weights in a folder, or of those of this name; an empty card where nothing is.

    Raises:
        InputError: `card.json` is damaged.
    """
    return Card.read(folder_of(path) / card.FILE)


def load(path: str | Path) -> Network:
    """Load a trained network: from a run directory, a folder written by `save_pretrained`, or by its name.

    Args:
        path: a folder with `config.json` and `model.safetensors`, or the name of weights that come with the package
            (`capsnet-mnist`; a model card lies beside them).

    Returns:
        The network on the CPU, in evaluation mode.

    Raises:
        InputError: a file is missing or damaged, or the weights do not fit: the first wrong key and both shapes are
            named.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as tensors_in

    folder = folder_of(path)
    near = [] if folder.exists() else difflib.get_close_matches(str(path), shipped(), n=1)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            hint = f" (did you mean {near[0]}?)" if near else ""
            hint = " (the run is not finished; see --resume)" if Run(folder).exists() else hint
            raise InputError(f"model folder {folder} must hold {name}; there is none{hint}")
    network, file = _described(folder / "config.json"), folder / "model.safetensors"
    content = read_bytes(file, most=16 * network.parameter_count() + 2**26)  # room for other weights, to name them
    try:
        weights = tensors_in(content)  # of bytes: load_file refuses a path that is not UTF-8
    except (SafetensorError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"file {file} must be safetensors; got: {brief(str(error))}") from None
    network.load_state_dict(fitted(network, weights, source=str(file), stored=STORED), assign=True)
    return network.eval()


def _described(path: Path) -> Network:
    """The network that a `config.json` describes, without memory for its weights.

    Raises:
        InputError: it is not one that capsnet writes, or there can be no such network.
    """
    source = f"file {path}"
    options = checked(read_json(path), dict[str, Any], source=source)
    if "objects" in options:  # before version 0.2
        options["objects_per_image"] = options.pop("objects")
    name = checked(options.get("name"), Literal[tuple(models.available())], name="name", source=source)
    kinds = get_type_hints(models.create) | get_type_hints(models.builder(name))
    for key, value in options.items():
        if key not in kinds:
            raise InputError(f"{source} must hold options of model {name}; got {shown(key)}")
        options[key] = checked(value, kinds[key], name=key, source=source)
    try:
        if faults := config_file.out_of_range(options):
            raise InputError(joined(faults))
        network = outline(**options)
        size = 4 * network.parameter_count()
        task = f"model {name}, of {network.parameter_count():,} parameters,"
        memory.check(2 * size, torch.device("cpu"), task=task, remedy="it must be loaded where there is more")
        return network
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


def outline(name: str, **options: Any) -> Network:
    """The network that `models.create` makes, without memory for its weights.

    Args:
        name: of the model.
        options: of `models.create`.

    Raises:
        InputError: see `models.create`; or sizes that PyTorch cannot count.
    """
    try:
        with torch.device("meta"):
            return models.create(name, **options)
    except (RuntimeError, OverflowError, TypeError):
        raise InputError(f"sizes of model {name} must be ones that PyTorch can count; they are too large") from None


def from_pretrained(name: str | Path, *, revision: str | None = None) -> Network:
    """Load a network from a folder, or from the Hugging Face Hub by its repository's name (`owner/name`).

    Only `config.json`, `card.json` and `model.safetensors` are fetched; nothing is unpickled and no code is run.

    Raises:
        InputError: neither a folder nor a repository that can be reached, or see `load`.
    """
    if Path(name).is_dir():
        return load(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(str(name), revision=revision, allow_patterns=PRETRAINED)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"model must be a folder or a repository of the Hugging Face Hub; got {str(name)!r}: {reason}"
        ) from None
    return load(folder)


def fitted(
    network: Network,
    weights: Mapping[str, Tensor],
    *,
    source: str,
    stored: AbstractSet[torch.dtype] = frozenset(),
) -> dict[str, Tensor]:
    """The weights of `network`, in its types.

    Args:
        network: whose they are to be.
        weights: by name.
        source: the file they are from, for errors.
        stored: further types that a weight may have there.

    Raises:
        InputError: they do not fit exactly, or are not finite; the first wrong one is named, with both shapes.
    """
    wanted, fine = network.state_dict(), dict[str, Tensor]()
    for key, tensor in wanted.items():
        if key not in weights:
            raise InputError(f"{source}: weights must hold {key} of shape {list(tensor.shape)}; it is missing")
        fine[key] = fitting(weights[key], tensor, name=f"{source}: weight {key}", stored=stored)
    for key in weights:
        if key not in wanted:
            raise InputError(
                f"{source}: weights must fit model {network.config['name']}, which has no {brief(key)}; "
                f"got one of shape {list(weights[key].shape)}"
            )
    return fine


def fitting(tensor: Tensor, like: Tensor, *, name: str, stored: AbstractSet[torch.dtype] = frozenset()) -> Tensor:
    """A tensor from a file in the type of `like`.

    Raises:
        InputError: it is of another shape or type, or not finite; `name` says which.
    """
    if tensor.shape != like.shape:
        raise InputError(f"{name} must be of shape {list(like.shape)}; got {list(tensor.shape)}")
    allowed = {like.dtype, *stored}
    if tensor.dtype not in allowed or (tensor.layout, tensor.device.type) != (torch.strided, "cpu"):
        types = ", ".join(sorted(map(_word, allowed)))
        raise InputError(f"{name} must be a dense tensor of {types}; got {_word(tensor.layout)} {_word(tensor.dtype)}")
    found = tensor.to(like.dtype)
    if not found.isfinite().all():
        raise InputError(f"{name} must be finite in {_word(like.dtype)}; it holds NaN or infinity")
    return found


def _word(kind: torch.dtype | torch.layout) -> str:
    return str(kind).removeprefix("torch.")


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, source commit, hardware and, on a CPU, which kernels compute (see `native.status`)."""
    from importlib.metadata import version

    return {
        "capsnet": version("capsnet"),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        **({"kernels": native.status()} if device.type == "cpu" else {}),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def _commit() -> str | None:
    """Commit of the checkout this package runs from, `+` when files differ from it; None when installed."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        if not git("ls-files", Path(__file__).name):
            return None
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_name() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
