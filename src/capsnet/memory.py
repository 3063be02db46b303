"""Memory that training and inference need at most, what is free, and the refusal of what does not fit.

What is needed is counted, not measured: training steps, passes without gradients and a checkpoint are gone through on
PyTorch's `meta` device, where tensors have sizes but no content, and each tensor counts from its making to its end.
Gradients, kept buffers (`kernels.buffers`) and temporary arrays are then those of a run. It takes a third of a second,
whatever the sizes. `CAPSNET_MEMORY=off` refuses nothing.
"""

import os
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from capsnet.config import Config
from capsnet.data import Dataset, outline
from capsnet.devices import Launch, free
from capsnet.errors import InputError
from capsnet.kernels.buffers import pool
from capsnet.kernels.stem import constant_weights
from capsnet.models import Network, alike, evaluation_mode, inference_batch
from capsnet.objective import Objective

__all__ = [
    "amount",
    "check",
    "check_demo",
    "check_export",
    "check_inference",
    "check_training",
    "inference",
    "of_sizes",
    "training",
]

LIBRARIES = 120 * 2**20
"""Bytes of PyTorch's code and working memory that are first touched by computing."""
GROWTH = 9 / 8
"""Size of the buffer of a checkpoint, which grows by eighths, in what it holds."""
CPU = torch.device("cpu")
PLAIN = {"routing_kernel": "plain", "convolution": "direct"}
"""How other programs compute an exported network."""
PRODUCTS = (torch.einsum, torch.matmul, torch.Tensor.matmul, torch.bmm, torch.Tensor.bmm)
EXPORTS = {"safetensors": (0.0, 2, 0), "pt2": (1.0, 1, 600 * 2**20), "onnx": (2.6, 7, 1100 * 2**20)}
"""Of each format: arrays of a pass in those of a plain one, copies of the weights, and bytes that making it takes."""
ELSEWHERE = "it must run where there is more"
DEMO_IMAGES = 4
"""Images whose plain pass takes what the demo does of one: its votes, and maps of them by iteration."""
MADE = 2
"""Times that the images of a data set are in memory while they are read and divided."""


def training(
    network: Network,
    config: Config,
    device: torch.device,
    dataset: Dataset,
    *,
    precision: str,
    batch_size: int,
    micro_batch: int | None = None,
) -> int:
    """Most bytes that a training takes on `device` beyond what its process holds before, without the images.

    Only sizes are looked at, and of `dataset` the numbers of images. `batch_size` is that of one process, and
    `micro_batch` how many of these are computed at once.

    Raises:
        InputError: sizes that PyTorch cannot count.
    """
    evaluated = max(len(dataset.test), len(dataset.validation or dataset.train))
    batch_size = min(batch_size, len(dataset.train))
    at_once = min(batch_size, micro_batch or batch_size)
    with _counted(network, config, precision, network.kernels(device, precision)) as (objective, watch):
        weights, moments, losses = watch.now, list[Tensor](), None
        for _ in range(2):  # the second meets moments, kept buffers, and the losses of the first
            for parameter in objective.parameters():
                parameter.grad = parameter.grad if at_once < batch_size else None  # of the parts before
            losses = objective(*_batch(network, at_once))
            losses.total.mean().backward()
            losses = losses.detached()
            trained = [each for each in objective.parameters() if each.requires_grad]
            moments = moments or [torch.empty_like(each) for each in trained for _ in config.moments]
        copies = weights * (bool(config.ema) + (config.keep == "best"))  # their average, and the best ones
        kept = sum(each.nbytes for each in moments)
        saving = watch.now + int(GROWTH * (weights + kept + copies))  # these, their moments and copies
        _infer(objective, network, min(evaluated, inference_batch(network, at_most=micro_batch)))
        whole, _, single_images = _batch(network, batch_size)
        augmented = 4 * whole.nbytes  # and its temporary arrays
        if single_images is not None and at_once < batch_size:  # of which those of a part are views
            augmented += single_images.nbytes
        del losses
        return max(watch.peak, saving) + copies + augmented + LIBRARIES


def inference(network: Network, batch_size: int, device: torch.device, *, precision: str = "32", **options: str) -> int:
    """Most bytes that passes without gradients take on `device` beyond the network's own weights.

    Only sizes are looked at. `options` are `routing_kernel` and `convolution`, where they are not the network's.

    Raises:
        InputError: sizes that PyTorch cannot count.
    """
    with _counted(network, Config(), precision, network.kernels(device, precision) | options) as (objective, watch):
        weights = watch.now
        _infer(objective, network, batch_size)
        return watch.peak - weights + LIBRARIES


def check(needed: int | float, device: torch.device, *, task: str, remedy: str) -> None:
    """Raise InputError unless `needed` bytes are free for a task; `remedy` says what needs less."""
    there = free(device)
    if needed > there.size and os.environ.get("CAPSNET_MEMORY") != "off":
        raise InputError(
            f"{task} needs about {amount(needed)} of memory, and {amount(there.size)} are {there.where}; {remedy}"
        )


def of_sizes(error: Exception) -> bool:
    """Whether PyTorch raised `error` because sizes do not fit into its integers, or tensors of them into memory."""
    return isinstance(error, OverflowError) or bool(re.search("overflow|allocate memory", str(error), re.IGNORECASE))


def check_training(
    network: Network, config: Config, device: torch.device, dataset: Dataset, *, precision: str, processes: Launch
) -> tuple[int | None, str | None]:
    """How a training fits into the memory of this machine and its devices: in how many images at once.

    Of the images those that are not read yet (see `data.outline`) are counted. Each of the `processes` on this machine
    has a GPU of its own, or all share a CPU.

    Returns:
        The `micro_batch` to train with: that of `config`, or, where it does not fit, the largest half, quarter, ... of
        a batch that does; and one line on it where batches are cut.

    Raises:
        InputError: the images do not fit, or not even one at a time.
    """
    images = outline.nbytes(dataset)
    remedy = "choose a smaller --image-size"
    check(processes.here * MADE * images, CPU, task="the images", remedy=remedy)
    sharing = 1 if device.type == "cuda" else processes.here
    images = dataset.train.images.nbytes if device.type == "cuda" else images

    batch, shares = min(config.batch_size, len(dataset.train)), processes.world_size

    def needed(micro_batch: int | None) -> int:
        each, at_once = -(-batch // shares), micro_batch and -(-micro_batch // shares)
        count = training(network, config, device, dataset, precision=precision, batch_size=each, micro_batch=at_once)
        return sharing * (images + count)

    micro_batch, there = config.micro_batch, free(device)
    total, most = needed(micro_batch), min(batch, micro_batch or batch)
    if total > there.size and os.environ.get("CAPSNET_MEMORY") != "off":
        smaller = [most] if micro_batch is None else []  # the whole batch, with no more images in evaluation
        while most > shares:
            smaller.append(most := -(-most // 2))
        remedy = f"{remedy}, or {network.narrower}"
        check(needed(most), device, task="training one image at a time", remedy=remedy)
        for micro_batch in smaller:
            total = needed(micro_batch)
            if total <= there.size:
                break
    known = "" if there.size == float("inf") else f"; {amount(there.size)} are {there.where}"
    takes = f"(about {amount(total)}{known})"
    if micro_batch is not None and micro_batch < batch:
        return micro_batch, f"memory: {_in_parts(network, batch, micro_batch, takes)}"
    changed = micro_batch != config.micro_batch
    return micro_batch, f"memory: evaluation of {micro_batch} images at a time {takes}" if changed else None


def _in_parts(network: Network, batch: int, micro_batch: int, takes: str) -> str:
    """How batches are cut, and what changes in the gradient."""
    count = -(-batch // micro_batch)
    size = f"{batch // count}" if batch % count == 0 else f"at most {-(-batch // count)}"
    trained = [module for module in network.modules() if module.training]
    differs = [
        text
        for kind, text in (
            (nn.modules.batchnorm._BatchNorm, "batch statistics, which are those of each part"),
            (nn.Dropout, "dropout, which is drawn for each part"),
        )
        if any(isinstance(module, kind) for module in trained)
    ]
    but = f" but for {' and '.join(differs)}" if differs else ""
    return f"batches of {batch} in {count} parts of {size} {takes}; the gradient is the same{but}"


def check_inference(
    network: Network, batch_size: int, device: torch.device, *, task: str, precision: str = "32", copies: int = 0
) -> None:
    """Raise InputError unless a loaded network, and `copies` of it, can go through images `batch_size` at a time.

    `device` is where they are to compute, and `task` what the error calls it.
    """
    copies += device.type != next(network.parameters()).device.type

    def needed(batch_size: int) -> int:
        return _weights(network) * copies + inference(network, batch_size, device, precision=precision)

    if _most(network, batch_size) + _weights(network) * copies > free(device).size:  # else not worth counting
        _check_batch(needed, batch_size, device, task=task, otherwise=ELSEWHERE)


def check_demo(network: Network) -> None:
    """Raise InputError unless a loaded network can be shown: an image at a time, with all its votes."""
    count = inference(network, DEMO_IMAGES, CPU, **PLAIN) if _most(network, DEMO_IMAGES) > free(CPU).size else 0
    check(count, CPU, task="the demo", remedy=ELSEWHERE)


def check_export(network: Network, batch_size: int, format: str) -> None:
    """Raise InputError unless a loaded network can be exported and compared, `batch_size` images at a time."""
    share, copies, floor = EXPORTS[format]

    def needed(batch_size: int) -> int:
        exported = share * (inference(network, batch_size, CPU, **PLAIN) - LIBRARIES)
        return max(floor, int(inference(network, batch_size, CPU) + exported + copies * _weights(network)))

    if _most(network, 4 * batch_size) + floor + copies * _weights(network) > free(CPU).size:
        _check_batch(needed, batch_size, CPU, task=f"export to {format}", otherwise=ELSEWHERE)


def _check_batch(
    needed: Callable[[int], int], batch_size: int, device: torch.device, *, task: str, otherwise: str
) -> None:
    """Raise InputError unless `needed(batch_size)` bytes are free; tell of the largest half, quarter, ... that fits."""
    there, total, smaller = free(device).size, needed(batch_size), batch_size // 2
    while total > there and smaller:
        if (less := needed(smaller)) <= there:
            otherwise = f"--batch-size {smaller} takes about {amount(less)}"
            break
        smaller //= 2
    check(total, device, task=task, remedy=otherwise)


def amount(size: int | float) -> str:
    """A number of bytes to be read: `850 MiB`, `12.3 GiB`."""
    return f"{size / 2**20:,.0f} MiB" if size < 2**30 else f"{size / 2**30:,.1f} GiB"


# what is needed


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the memory of all tensors that are made inside: bytes that are held `now`, and the `peak` of them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        storages = [leaf.untyped_storage() for leaf in tree_leaves(results) if isinstance(leaf, Tensor)]
        for storage in storages:
            key, size = storage._cdata, storage.nbytes()
            if key not in self._sizes:
                self._sizes[key] = size
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._remove, key).atexit = False
        return results

    def _remove(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


class _Autocast(TorchFunctionMode):
    """What `torch.autocast` to bfloat16, which knows no `meta`, does with convolutions and products of matrices.

    Those of float32 alone are left as they are: what must be computed in it cannot be told from what need not.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kinds = {x.dtype for x in args if isinstance(x, Tensor)}
        mixed = kinds == {torch.float32, torch.bfloat16} and func in PRODUCTS
        if mixed or func in (torch.conv2d, nn.functional.linear):
            args = [x.bfloat16() if isinstance(x, Tensor) and x.dtype == torch.float32 else x for x in args]
        return func(*args, **(kwargs or {}))


@contextmanager
def _counted(
    network: Network, config: Config, precision: str, options: dict[str, str]
) -> Iterator[tuple[Objective, _Watch]]:
    """The same network with its loss and `options`, without memory, and the count of what it takes."""
    changed = {name: value for name, value in options.items() if name in network.config}
    try:
        with pool.set_aside(), _Watch() as watch, torch.device("meta"):
            copy = alike(network, **changed)
            copy.freeze(*network.frozen)
            objective = Objective(copy, config)
            with _Autocast() if precision == "bf16" else nullcontext():
                yield objective, watch
    except (RuntimeError, OverflowError) as error:
        if not of_sizes(error):
            raise
        raise InputError(f"sizes must be ones that PyTorch can count; got: {str(error).splitlines()[0]}") from None


def _batch(network: Network, batch_size: int) -> tuple[Tensor, Tensor, Tensor | None]:
    each = (batch_size,) if network.objects_per_image == 1 else (batch_size, network.objects_per_image)
    single_images = None if network.objects_per_image == 1 else torch.empty(*each, *network.image_shape)
    return torch.empty(batch_size, *network.image_shape), torch.zeros(each, dtype=torch.int64), single_images


def _infer(objective: Objective, network: Network, batch_size: int) -> None:
    with evaluation_mode(objective), torch.inference_mode(), constant_weights():
        objective(*_batch(network, batch_size))


def _weights(network: Network) -> int:
    return 4 * network.parameter_count()


def _most(network: Network, batch_size: int) -> float:
    """More bytes than `inference` ever counts, in no time: activations have as many places as the image, or fewer."""
    _, height, width = network.image_shape
    channels = places = 0
    for name, weight in network.named_parameters():
        if weight.ndim == 4 and not name.startswith("class_capsules"):
            channels += max(weight.shape[0], weight.shape[3])  # of either order of axes
        elif weight.ndim == 4:
            places += getattr(network, "in_capsules", len(weight)) * weight[0, 0].numel()  # votes
        elif weight.ndim == 2:
            places += len(weight)
    images = batch_size * (12 * height * width * channels + 6 * places)
    return 4.0 * (images + 6 * network.parameter_count()) + LIBRARIES
