"""Fine-tuning: a network for new images and classes that starts from trained weights.

Layers are matched by name. A layer is kept if all its tensors have the shapes of the trained ones. What depends on the
classes is found by building the trained network with one class more.
"""

from pathlib import Path

import torch
from torch import Tensor

from capsnet.checkpoints import pretrained
from capsnet.errors import InputError
from capsnet.models import Network, alike
from capsnet.options.schema import brief

__all__ = ["IN_MEMORY", "frozen_line", "name_of", "start_from"]

IN_MEMORY = "a network in memory"
"""What `init_from` is where a network was given in Python."""


@torch.no_grad()
def start_from(network: Network, source: Network, *, name: str) -> str:
    """Give `network` the weights and batch statistics of `source` that fit it.

    Parts that depend on the classes are kept only where both have the same class names; in another order, their
    weights are reordered by name.

    Args:
        network: new; on `meta` nothing is copied.
        source: trained, of the same model; it is not changed.
        name: what `init_from` is called in the line and in errors.

    Returns:
        One line: what was kept, and what starts anew.

    Raises:
        InputError: another model, no weights that fit, or a frozen part that would start anew.
    """
    pretrained.check_described(source, name=f"init_from {name}")
    ours, theirs = network.config["name"], source.config["name"]
    if ours != theirs:
        raise InputError(f"init_from must be weights of model {ours}; {name} is of model {theirs}")
    by_class, trained = _class_axes(source), source.state_dict()
    order = _order(source.classes, network.classes)
    replaced = [part for part in network.parts() if any(_inside(key, part) for key in by_class)]
    replaced = [] if order else [*replaced, *map(_layer, by_class)]  # batch statistics are in no part
    reordered = order != sorted(order)
    if reordered:
        trained |= {key: _reordered(trained[key], axis, order) for key, axis in by_class.items() if key in trained}

    tensors = network.state_dict()
    wrong = [key for key, tensor in tensors.items() if key not in trained or trained[key].shape != tensor.shape]
    kept = dict.fromkeys(map(_layer, tensors), True)
    kept |= {_layer(key): False for key in tensors if key in wrong or any(_inside(key, part) for part in replaced)}
    if not any(kept.values()):
        first = next(key for key in tensors if key in wrong or key in by_class)
        got = list(trained[first].shape) if first in trained else "none"
        raise InputError(
            f"init_from must be weights of which a layer fits; of {name} none does: "
            f"{first} must be of shape {list(tensors[first].shape)}; got {got}"
        )
    for part in network.frozen:
        if not all(fits for layer, fits in kept.items() if _inside(layer, part)):
            raise InputError(f"freeze must name parts that are kept of {name}; {part} starts anew")
    for key, tensor in tensors.items():
        if kept[_layer(key)]:
            tensor.copy_(trained[key])
    count = sum(parameter.numel() for key, parameter in network.named_parameters() if kept[_layer(key)])
    anew = _named(network, kept, fits=False)
    shapes = [" x ".join(map(str, each.image_shape)) for each in (network, source)]
    return (
        f"init_from {name}: kept {_named(network, kept, fits=True)} "
        f"({count:,} of {network.parameter_count():,} weights)"
        + (", classes reordered by name" if reordered else "")
        + (f"; anew: {anew}" if anew else "")
        + ("" if shapes[0] == shapes[1] else f" (images of {shapes[0]}, its own {shapes[1]})")
    )


def frozen_line(network: Network) -> str:
    """One line: how many parameters are trained, and which parts are not."""
    count = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    return f"{count:,} of {network.parameter_count():,} parameters; frozen: {', '.join(network.frozen) or 'none'}"


def name_of(init_from: str) -> str:
    """The last part of a path, which says nothing of other folders; a name stays."""
    return Path(init_from).resolve().name


def _class_axes(network: Network) -> dict[str, int]:
    """The axis along which the classes lie, of each tensor that has one, by its name."""
    more = {"num_classes": len(network.classes) + 1, "classes": None}
    with torch.device("meta"):
        same, grown = (alike(network, **options).state_dict() for options in ({}, more))
    axes = dict[str, int]()
    for key, tensor in same.items():
        sizes = zip(tensor.shape, grown[key].shape, strict=True)
        for axis, (size, larger) in enumerate(sizes):
            if size != larger:
                axes[key] = axis
    return axes


def _order(theirs: tuple[str, ...], ours: tuple[str, ...]) -> list[int]:
    """Where each of our classes is among theirs; empty unless both have the same ones."""
    if theirs == ours:
        return list(range(len(ours)))
    same = len(set(ours)) == len(ours) and sorted(theirs) == sorted(ours)
    return [theirs.index(name) for name in ours] if same else []


def _reordered(tensor: Tensor, axis: int, order: list[int]) -> Tensor:
    """`tensor` with the classes along `axis`, each of one number or several, in another order."""
    places = torch.arange(tensor.shape[axis], device=tensor.device).view(len(order), -1)
    return tensor.index_select(axis, places[order].flatten())


def _layer(key: str) -> str:
    """The layer of a tensor by its name."""
    return key.rpartition(".")[0]


def _inside(name: str, part: str) -> bool:
    """Whether a layer or tensor is `part` or lies in it."""
    return f"{name}.".startswith(f"{part}.")


def _named(network: Network, kept: dict[str, bool], *, fits: bool) -> str:
    """The parts whose layers are all kept, or all not; of the others, the layers."""
    names = []
    for part in network.parts():
        layers = [layer for layer in kept if _inside(layer, part)]
        mine = [layer for layer in layers if kept[layer] == fits]
        names += [part] if mine == layers else mine
    return ", ".join(map(brief, names))
