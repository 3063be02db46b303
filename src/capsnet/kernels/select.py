"""Choice of kernels for routing, convolutions and votes."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from capsnet import functional as F
from capsnet.errors import InputError
from capsnet.kernels import fused, native, sweeps_cpu, sweeps_native, sweeps_triton

__all__ = [
    "CONVOLUTIONS",
    "ROUTING_KERNELS",
    "SMALL_BATCH",
    "SMALL_VOTES",
    "is_bare",
    "is_small",
    "resolve_convolution",
    "resolve_routing_kernel",
    "routing_kernel_for",
    "sweeps_for",
]

ROUTING_KERNELS = ("auto", "plain", "fused")
CONVOLUTIONS = ("auto", "direct", "winograd")
SMALL_VOTES = 4 << 20  # bytes: 5 images at the paper's size
SMALL_BATCH = 8  # images: below, a direct convolution as one matrix product is faster than Winograd's minimal filtering


def is_small(images: Tensor) -> bool:
    """Whether a convolution of `images` is one matrix product: up to 8 on a CPU, ordinary, without gradients."""
    if not F.is_ordinary(images):  # first: in an export, asking for the length would fix the batch size for good
        return False
    small = 0 < len(images) <= SMALL_BATCH and images.device.type == "cpu"
    return small and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def resolve_routing_kernel(
    routing_kernel: str, device: torch.device, *, ordinary: bool = True, small: bool = False
) -> str:
    """The routing kernel that `routing_kernel` means on `device`: `plain` or `fused` (see `kernels.fused`).

    `auto` is `fused` on a CPU and `plain` elsewhere. It is `plain` too where the votes are `small` (without gradients
    and at most 4 MiB, which a cache holds) and for tensors that are not `ordinary` (see `functional.is_ordinary`).

    Raises:
        InputError: an unknown name, or `fused` on a device that it does not know, without Triton on a GPU, or inside
            a transform of torch.func or `torch.jit.trace`.
    """
    if routing_kernel not in ROUTING_KERNELS:
        raise InputError(f"routing_kernel must be one of {', '.join(ROUTING_KERNELS)}; got {routing_kernel!r}")
    if routing_kernel == "auto":
        return "fused" if device.type == "cpu" and ordinary and not small else "plain"
    if routing_kernel == "fused" and device.type not in ("cpu", "cuda", "meta"):
        raise InputError(f"routing_kernel fused must run on a CPU or a CUDA GPU; got a tensor on {device}")
    if routing_kernel == "fused" and F.is_transformed():
        raise InputError(
            "routing_kernel fused must run outside torch.func and torch.jit.trace; use plain or auto there"
        )
    if routing_kernel == "fused" and device.type == "cuda" and not sweeps_triton.available():
        raise InputError(
            "routing_kernel fused must have Triton on a GPU; it is not installed (pip install 'capsnet[triton]')"
        )
    return routing_kernel


def routing_kernel_for(routing_kernel: str, u: Tensor, weight: Tensor) -> str:
    """The routing kernel that `routing_kernel` means for the votes of `u` and `weight`, see `resolve_routing_kernel`.

    Raises:
        InputError: see there.
    """
    votes_bytes = u[..., 0].numel() * weight[0, 0].numel() * weight.element_size()
    ordinary = F.is_ordinary(u)  # in an export, comparing sizes would limit the batch
    small = ordinary and votes_bytes <= SMALL_VOTES and not torch.is_grad_enabled()
    return resolve_routing_kernel(routing_kernel, u.device, ordinary=ordinary, small=small)


def sweeps_for(u: Tensor, weight: Tensor) -> type[fused.Sweeps]:
    """How the fused kernel reads the votes of `u` and `weight`: in Triton on a GPU, in C on a CPU where that can be."""
    if u.device.type == "cuda":
        return sweeps_triton.Sweeps
    return sweeps_native.Sweeps if native.usable(u, weight) else sweeps_cpu.Sweeps


def is_bare(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether to call `module` is to run `kind.forward` and nothing else, so that a kernel may do so in its place.

    It is not where the module is of another class (as a parametrized one is), has hooks, its own or those of all
    modules (features, Grad-CAM, FLOP counters, pruning, weight and spectral norm), or a forward put in its place.
    """
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    hooked = any(hooks) or nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]
    return type(module) is kind and not hooked and "forward" not in vars(module)


def resolve_convolution(convolution: str, images: Tensor, *, saved: Callable[[], float], bare: bool) -> str:
    """How both convolutions of `images` are computed now, `direct` or `winograd` (see `kernels.stem`).

    `auto` is `winograd` on a CPU in float32 or float64, for ordinary images that need no gradient, where it saves half
    of the products or more, and `direct` for up to 8 images without gradients. As `winograd` calls none of the modules,
    it is `direct` too where one of them is not bare, see `is_bare`.

    Args:
        convolution: `auto`, `direct` or `winograd`.
        images: only their device, type and need of a gradient are looked at.
        saved: says how many times fewer products `winograd` needs, see `winograd.saving`; not asked in vain.
        bare: whether all modules are, see `is_bare`.

    Raises:
        InputError: an unknown name, or `winograd` where it cannot run: the condition that fails is named.
    """
    if convolution not in CONVOLUTIONS:
        raise InputError(f"convolution must be one of {', '.join(CONVOLUTIONS)}; got {convolution!r}")
    if convolution == "direct":
        return convolution
    if images.device.type not in ("cpu", "meta"):
        obstacle = f"images on {images.device}, and it must run on a CPU"
    elif images.dtype not in (torch.float32, torch.float64):
        obstacle = f"images of {images.dtype}, and it must run in float32 or float64"
    elif images.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        obstacle = "bf16 convolutions, and it must run in precision 32"
    elif not F.is_ordinary(images):
        obstacle = f"images of type {type(images).__name__}, and it cannot be traced or exported"
    elif images.requires_grad:
        obstacle = "images that need a gradient, and it gives them none"
    elif not bare:
        obstacle = "a convolution with hooks, a parametrization or another forward, and it calls no module"
    else:
        return "direct" if convolution == "auto" and (saved() < 2 or is_small(images)) else "winograd"
    if convolution == "winograd":
        raise InputError(f"convolution winograd got {obstacle}; use convolution direct")
    return "direct"
