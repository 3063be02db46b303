"""Trained weights: `model.safetensors` and `config.json` in a folder, with the model card beside them.

`config.json` tells how the network is built and how image files become what it sees.

Nothing is unpickled and no code is run: weights are safetensors.
"""

import copy
import json
import tempfile
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_type_hints

import torch
from torch import Tensor, nn

from capsnet import memory, models
from capsnet.checkpoints import model_card
from capsnet.checkpoints.model_card import Card
from capsnet.config import renamed
from capsnet.data.preprocessing import Preprocessing
from capsnet.errors import InputError
from capsnet.files import read_bytes, read_json, write_atomically
from capsnet.models import Network
from capsnet.options.schema import brief, checked, did_you_mean, shown

__all__ = [
    "check_described",
    "fitted",
    "fitting",
    "folder_of",
    "from_pretrained",
    "load",
    "load_card",
    "options_of",
    "outline",
    "save_card",
    "save_pretrained",
    "shipped",
]

WEIGHTS = Path(__file__).parents[1] / "weights"
PRETRAINED = ["config.json", model_card.FILE, "model.safetensors"]
"""What is needed of the weights in a folder."""
STORED = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
"""Types that weights may be stored in; they are computed in float32."""


def save_pretrained(network: Network, directory: str | Path, card: Card | None = None) -> None:
    """Write `model.safetensors` and `config.json`: all that `load` and `from_pretrained` need of a network of `create`.

    With a `card`, also `card.json` and, unless there is another one, `README.md`. The directory is made if it is not
    there. Both files are first written to a temporary directory, loaded and compared with the network.

    Raises:
        InputError: the network is not one of `create`, or `load` would not give the same one: nothing is replaced; or
            the files cannot be written.

    Examples:
        >>> network = create("capsnet", conv_channels=8, capsule_types=2)
        >>> save_pretrained(network, "folder")
        >>> load("folder").config == network.config
        True
    """
    from safetensors.torch import save

    check_described(network, name="network")
    directory = Path(directory)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    reading = {} if network.preprocessing is None else {"preprocessing": asdict(network.preprocessing)}
    try:
        content = save(weights, metadata={"format": "pt"})
        text = json.dumps({**network.config, **reading}, indent=2) + "\n"
    except (RuntimeError, TypeError, ValueError) as error:
        reason = brief(str(error).splitlines()[0])
        raise InputError(f"network must be one that can be loaded again; it cannot: {reason}") from None

    def write(folder: Path) -> None:
        write_atomically(folder / "model.safetensors", lambda path: path.write_bytes(content))
        write_atomically(folder / "config.json", lambda path: path.write_text(text, encoding="utf-8"))

    with tempfile.TemporaryDirectory() as folder:
        try:
            write(Path(folder))
        except InputError as error:
            raise InputError(str(error).replace(folder, str(directory))) from None
        _check_same(network, weights, Path(folder))
    write(directory)
    if card is not None:
        save_card(card, directory)
        readme = directory / model_card.README
        if model_card.is_ours(readme):
            told = card.readme(network).encode("utf-8", "surrogateescape")
            write_atomically(readme, lambda path: path.write_bytes(told))


def check_described(network: Network, *, name: str) -> None:
    """Raise InputError unless `network`, which the error calls `name`, says how it was built."""
    if not isinstance(getattr(network, "config", None), dict):
        raise InputError(f"{name} must be one that capsnet.create made; got {type(network).__name__} without a config")


def _check_same(network: Network, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Raise InputError unless what `load` reads in `folder` is `network`, of these weights."""
    try:
        back = load(folder, **copy.deepcopy(network.given))
    except InputError as error:
        reason = str(error).replace(str(folder), "the saved one")
        raise InputError(f"network must be one that can be loaded again; it cannot: {reason}") from None
    found = back.state_dict()
    wrong = [name for name, tensor in weights.items() if not torch.equal(found[name], tensor.to(found[name].dtype))]
    ours, read = (json.loads(json.dumps(config)) for config in (network.config, back.config))  # lists are tuples
    wrong += [name for name in read if ours.get(name) != read[name]]
    if network.preprocessing not in (None, back.preprocessing):
        wrong.append("preprocessing")
    if wrong:
        raise InputError(f"network must be the same when it is loaded again; {wrong[0]} is another")


def save_card(card: Card, directory: str | Path) -> None:
    """Write `card.json`.

    Raises:
        InputError: the file cannot be written.
    """
    write_atomically(Path(directory) / model_card.FILE, lambda path: path.write_text(card.to_json(), encoding="utf-8"))


def shipped() -> list[str]:
    """Names of the weights that ship with the package, sorted."""
    return sorted(folder.name for folder in WEIGHTS.iterdir() if (folder / "config.json").is_file())


def folder_of(path: str | Path) -> Path:
    """Where weights are: the folder itself, or that of weights which ship with the package by their name."""
    folder = Path(path)
    if not folder.exists() and folder.name == str(path) and (WEIGHTS / folder).is_dir():
        return WEIGHTS / folder
    return folder


def load_card(path: str | Path) -> Card:
    """What is told of the weights in a folder, or of those of this name; an empty card where nothing is.

    Raises:
        InputError: `card.json` is damaged.

    Examples:
        >>> load_card("capsnet-mnist").train_images
        55000
    """
    return Card.read(folder_of(path) / model_card.FILE)


def load(path: str | Path, **modules: nn.Module) -> Network:
    """Load a trained network: from a run directory, a folder written by `save_pretrained`, or by its name.

    Args:
        path: a folder with `config.json` and `model.safetensors`, or the name of weights that ship with the package
            (`capsnet-mnist`; a model card lies beside them).
        modules: of a network that was made with a module of one's own, such a module again, by option:
            `load("head", backbone=Net())`. It becomes part of the network, with the weights of the file.

    Returns:
        The network on the CPU, in evaluation mode, with its `preprocessing`.

    Raises:
        InputError: a file is missing or damaged, or the weights do not fit: the first wrong key and both shapes are
            named; or a module that the network was not made with, or was and is missing.

    Examples:
        >>> load("capsnet-mnist")(torch.rand(2, 1, 28, 28)).scores.shape
        torch.Size([2, 10])
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as tensors_in

    folder = folder_of(path)
    for name in ("config.json", "model.safetensors"):
        _check_there(folder, name, path)
    network, file = _described(folder / "config.json", modules), folder / "model.safetensors"
    content = read_bytes(file, most=16 * network.parameter_count() + 2**26)  # room for other weights, to name them
    try:
        weights = tensors_in(content)  # of bytes: load_file refuses a path that is not UTF-8
    except (SafetensorError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"file {file} must be safetensors; got: {brief(str(error))}") from None
    network.load_state_dict(fitted(network, weights, source=str(file), stored=STORED), assign=True)
    if network.preprocessing is None:  # of an earlier version
        network.preprocessing = load_card(folder).reading(network.image_shape)
    return network.eval()


def _check_there(folder: Path, name: str, path: str | Path) -> None:
    """Raise InputError unless the file `name` is in `folder`, which the user called `path`."""
    if not (folder / name).is_file():
        hint = "" if folder.exists() else did_you_mean(str(path), shipped())
        begun = (folder / "config.yaml").exists() or (folder / "last.ckpt").exists()
        hint = " (the run is not finished; see --resume)" if begun else hint
        raise InputError(f"model folder {folder} must hold {name}; there is none{hint}")


def _described(path: Path, modules: Mapping[str, nn.Module] = MappingProxyType({})) -> Network:
    """The network that a `config.json` describes, without memory for its weights but for those of `modules`."""
    source = f"file {path}"
    options = renamed(checked(read_json(path), dict[str, Any], source=source))
    if "objects" in options:  # as it was called in earlier files
        options["objects_per_image"] = options.pop("objects")
    reading = checked(options.pop("preprocessing", None), Preprocessing | None, name="preprocessing", source=source)
    name = checked(options.get("name"), Literal[tuple(models.available())], name="name", source=source)
    classes = models.classes_of_modules(name, options)
    models.check_modules(modules, classes, call="capsnet.load(path", source=source)
    kinds = get_type_hints(models.create) | get_type_hints(models.options_of(name))
    for key, value in options.items():
        if key not in kinds:
            raise InputError(f"{source} must hold options of model {name}; got {shown(key)}")
        if key in modules:
            continue
        options[key] = checked(value, kinds[key], name=key, source=source)
    try:
        network, remedy = outline(**{**options, **modules}), "it must be loaded where there is more"
        count = network.parameter_count()
        memory.check(8 * count, memory.CPU, task=f"model {name}, of {count:,} parameters,", remedy=remedy)
        if reading is not None and reading.image_shape != network.image_shape:
            raise InputError(f"preprocessing must make images of {network.image_shape}; it makes {reading.image_shape}")
        network.preprocessing = reading
        return network
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


def options_of(model: Network | str | Path, **modules: nn.Module) -> dict[str, Any]:
    """The `model` and its options, without those that follow from the data, of a network or of weights as `load` takes.

    In place of a module there is the name of its class; for `modules` of weights see `load`.

    Raises:
        InputError: no `config.json` there, or it is damaged; a network without a config; or see `load`.
    """
    if isinstance(model, Network):
        check_described(model, name="network")
        config = model.config
    else:
        folder = folder_of(model)
        _check_there(folder, "config.json", model)
        config = _described(folder / "config.json", modules).config
    options = {name: config[name] for name in vars(models.options_of(config["name"])())}
    return {"model": config["name"], **options}


def outline(name: str, **options: Any) -> Network:
    """The network that `models.create` makes, without memory for its weights.

    Raises:
        InputError: see `models.create`; or sizes that PyTorch cannot count.
    """
    try:
        with torch.device("meta"):
            return models.create(name, **options)
    except (RuntimeError, OverflowError, TypeError) as error:
        if not memory.of_sizes(error):
            raise
        raise InputError(f"sizes of model {name} must be ones that PyTorch can count; they are too large") from None


def from_pretrained(name: str | Path, *, revision: str | None = None, **modules: nn.Module) -> Network:
    """Load a network from a folder, or from the Hugging Face Hub by its repository's name (`owner/name`).

    Only `config.json`, `card.json` and `model.safetensors` are fetched; nothing is unpickled and no code is run. For
    `modules` see `load`.

    Raises:
        InputError: neither a folder nor a repository that can be reached, or see `load`.
    """
    if Path(name).is_dir():
        return load(name, **modules)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(str(name), revision=revision, allow_patterns=PRETRAINED)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"model must be a folder or a repository of the Hugging Face Hub; got {str(name)!r}: {reason}"
        ) from None
    return load(folder, **modules)


def fitted(
    network: Network, weights: Mapping[str, Tensor], *, source: str, stored: AbstractSet[torch.dtype] = frozenset()
) -> dict[str, Tensor]:
    """The weights of `network`, in its types; in the file `source` they may also have those `stored`.

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
