"""The networks by name: each file of this package but this one and `network` is one, named as the network is.

Such a file holds `Options`, a frozen dataclass whose fields say their default, range and help, and
`build(image_shape, num_classes, options)`; and `PRESETS`, the options of presets that it has other than all networks;
`epochs` there is how many it trains for where none are given.
An option for which a `torch.nn.Module` may be given, in Python only, is also an argument of `build`, None by default.
"""

import fnmatch
import pkgutil
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import fields
from importlib import import_module
from inspect import signature
from typing import Any

import torch
from torch import nn

from capsnet.errors import InputError
from capsnet.models.network import Network
from capsnet.options.schema import brief, check_known, did_you_mean, joined, out_of_range

__all__ = [
    "alike",
    "available",
    "check_modules",
    "class_name",
    "classes_of_modules",
    "create",
    "module_options",
    "options_of",
    "presets",
    "summary",
]


def available(pattern: str = "*") -> list[str]:
    """Names of the networks that match a shell pattern, sorted: `available("caps*")`.

    Examples:
        >>> "capsnet" in available(), available("efficient*")
        (True, ['efficient-capsnet', 'efficient-cnn'])
    """
    folders = import_module("capsnet.models").__path__
    names = (module.name.replace("_", "-") for module in pkgutil.iter_modules(folders))
    return sorted(fnmatch.filter((name for name in names if name not in ("network", "registry")), pattern))


def _file(name: str) -> Any:
    """The module of the network `name`."""
    check_known(name, available(), "model must be one of")
    return import_module(f"capsnet.models.{name.replace('-', '_')}")


def options_of(name: str) -> Any:
    """The class of the options of the network `name`.

    Raises:
        InputError: an unknown name.

    Examples:
        >>> options_of("capsnet")().routing_iterations
        3
    """
    return _file(name).Options


def presets(name: str) -> dict[str, dict[str, Any]]:
    """The options of each preset that the network `name` has other than all networks.

    Raises:
        InputError: an unknown name.
    """
    return getattr(_file(name), "PRESETS", {})


def summary(name: str) -> str:
    """The network `name` in one line.

    Raises:
        InputError: an unknown name.

    Examples:
        >>> summary("resnet")
        'ResNet-20 of He, Zhang, Ren, Sun (CVPR 2016, arXiv 1512.03385, Section 4.2), the control of capsule heads.'
    """
    return str(_file(name).__doc__).splitlines()[0]


def create(
    name: str,
    *,
    image_shape: tuple[int, int, int] = (1, 28, 28),
    num_classes: int = 10,
    classes: tuple[str, ...] | None = None,
    objects_per_image: int = 1,
    **options: Any,
) -> Network:
    """Build the network `name` with new weights.

    Args:
        name: one of `available()`.
        image_shape: channels, height and width of the images.
        num_classes: number of classes.
        classes: their names; "0", "1", ... if not given.
        objects_per_image: number of objects, of different classes, that an image shows.
        options: of the network: the fields of `options_of(name)`, which `capsnet train --help --model NAME` explains. A
            module that is given for one is used as it is, and the `config` has the name of its class.

    Returns:
        A network in training mode, on the current default device.

    Raises:
        InputError: an unknown name or option, or an option out of its range.

    Examples:
        >>> create("capsnet", image_shape=(3, 32, 32))(torch.rand(2, 3, 32, 32)).scores.shape
        torch.Size([2, 10])
    """
    kind = options_of(name)
    known = [each.name for each in fields(kind)]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise InputError(
            f"options of model {name} must be among {', '.join(known)}; got {', '.join(unknown)}"
            f"{did_you_mean(unknown[0], known)}"
        )
    modules = {option: options[option] for option in module_options(name) if isinstance(options.get(option), nn.Module)}
    options = {option: value for option, value in options.items() if option not in modules}
    if faults := out_of_range(options, kind):
        raise InputError(joined(faults))
    chosen = kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in options.items()})
    if num_classes < 1 or (classes is not None and len(classes) != num_classes):
        raise InputError(f"num_classes must be at least 1 and the number of names in classes; got {num_classes}")
    if not 1 <= objects_per_image <= num_classes:
        raise InputError(f"objects_per_image must be 1 to the {num_classes} classes; got {objects_per_image}")
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise InputError(f"image_shape must be channels, height and width, each at least 1; got {image_shape}")
    shape = (image_shape[0], image_shape[1], image_shape[2])
    network: Network = _file(name).build(shape, num_classes, chosen, **modules)
    network.given = modules
    network.classes = classes if classes is not None else tuple(str(k) for k in range(num_classes))
    network.objects_per_image = objects_per_image
    network.config = {
        "name": name,
        "image_shape": shape,
        "num_classes": num_classes,
        "classes": network.classes,
        "objects_per_image": objects_per_image,
        **vars(chosen),
        **{option: class_name(module) for option, module in modules.items()},
    }
    return network


def module_options(name: str) -> list[str]:
    """The options of the network `name` for which a module may be given.

    Raises:
        InputError: an unknown name.

    Examples:
        >>> module_options("capsule-head")
        ['backbone']
    """
    taken = signature(_file(name).build).parameters
    return [each.name for each in fields(options_of(name)) if each.name in taken]


def class_name(module: nn.Module) -> str:
    """The full name of a module's class, which has a dot; no value of an option has one.

    Examples:
        >>> class_name(nn.ReLU())
        'torch.nn.modules.activation.ReLU'
    """
    return f"{type(module).__module__}.{type(module).__qualname__}"


def classes_of_modules(name: str, options: Mapping[str, Any]) -> dict[str, str]:
    """Of the `options` of the network `name` those that hold the name of a module's class, see `class_name`.

    Raises:
        InputError: an unknown name.

    Examples:
        >>> classes_of_modules("capsule-head", {"backbone": "mine.Net", "routing": "uniform"})
        {'backbone': 'mine.Net'}
    """
    dotted = {option: value for option, value in options.items() if isinstance(value, str) and "." in value}
    taken = module_options(name) if dotted else ()
    return {option: value for option, value in dotted.items() if option in taken}


def check_modules(modules: Mapping[str, nn.Module], classes: Mapping[str, str], *, call: str, source: str = "") -> None:
    """Raise InputError unless `modules` are given for just those options that hold the name of a class, `classes`.

    `call` is where they must be given, such as `capsnet.load(path`, and `source` a file that asks for them.

    Examples:
        >>> check_modules({}, {"backbone": "mine.Net"}, call="capsnet.load(path")
        Traceback (most recent call last):
            ...
        capsnet.errors.InputError: backbone must be given in Python, as in capsnet.load(path, backbone=module); ...
    """
    where = f"{source}: " if source else ""
    for option, kind in classes.items():
        if option not in modules:
            raise InputError(
                f"{where}{option} must be given in Python, as in {call}, {option}=module); the network was made with a "
                f"module of class {brief(kind)}"
            )
    for option in modules:
        if option not in classes:
            raise InputError(f"{where}{option} must be left out; the network was made without a module for it")


def alike(network: Network, **options: Any) -> Network:
    """A new network like one of `create`, but for some options, with copies of the modules that it was given.

    Returns:
        A network in training mode, on the current default device.

    Raises:
        InputError: see `create`.

    Examples:
        >>> network = create("capsnet", conv_channels=8, capsule_types=2)
        >>> alike(network, routing_iterations=1).routing_iterations
        1
    """
    here = torch.empty(0).device
    given = {option: deepcopy(module).to(here) for option, module in network.given.items()}
    return create(**{**network.config, **given, **options})
