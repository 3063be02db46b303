"""The networks by name: each file of this package but this one and `network` is one, and holds its builder."""

import difflib
import fnmatch
import inspect
import pkgutil
from collections.abc import Callable
from importlib import import_module
from typing import Any

from capsnet.errors import InputError
from capsnet.models.network import Network

__all__ = ["available", "builder", "builder_options", "create"]


def available(pattern: str = "*") -> list[str]:
    """Names of the networks that match a shell pattern, sorted: `available("caps*")`."""
    folders = import_module("capsnet.models").__path__
    names = (module.name.replace("_", "-") for module in pkgutil.iter_modules(folders))
    return sorted(fnmatch.filter((name for name in names if name not in ("network", "registry")), pattern))


def builder(name: str) -> Callable[..., Network]:
    """The function that builds the network `name`: that of the same name in its file.

    Raises:
        InputError: an unknown name.
    """
    if name not in available():
        near = difflib.get_close_matches(name, available(), n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise InputError(f"model must be one of {', '.join(available())}; got {name!r}{hint}")
    word = name.replace("-", "_")
    found: Callable[..., Network] = getattr(import_module(f"capsnet.models.{word}"), word)
    return found


def builder_options(name: str) -> dict[str, Any]:
    """Options of the network `name` with their defaults, without image shape and classes.

    Raises:
        InputError: an unknown name.
    """
    parameters = inspect.signature(builder(name)).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


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
        options: of the builder, see `capsnet` and `baseline`.

    Returns:
        A network in training mode, on the current default device.

    Raises:
        InputError: an unknown name or option, or an option out of its range.

    Example:
        >>> create("capsnet", image_shape=(3, 32, 32))(torch.rand(2, 3, 32, 32)).scores.shape
        torch.Size([2, 10])
    """
    known = builder_options(name)
    unknown = [option for option in options if option not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise InputError(f"options of model {name} must be among {', '.join(known)}; got {', '.join(unknown)}{hint}")
    if num_classes < 1 or (classes is not None and len(classes) != num_classes):
        raise InputError(f"num_classes must be at least 1 and the number of names in classes; got {num_classes}")
    if not 1 <= objects_per_image <= num_classes:
        raise InputError(f"objects_per_image must be 1 to the {num_classes} classes; got {objects_per_image}")
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise InputError(f"image_shape must be channels, height and width, each at least 1; got {image_shape}")
    shape = (image_shape[0], image_shape[1], image_shape[2])
    network = builder(name)(shape, num_classes, **options)
    network.classes = classes if classes is not None else tuple(str(k) for k in range(num_classes))
    network.objects_per_image = objects_per_image
    network.config = {
        "name": name,
        "image_shape": shape,
        "num_classes": num_classes,
        "classes": network.classes,
        "objects_per_image": objects_per_image,
        **known,
        **options,
    }
    return network
