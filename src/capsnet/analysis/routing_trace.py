"""Where each class capsule's evidence comes from, iteration by iteration of the routing."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from capsnet import functional as F
from capsnet.errors import InputError
from capsnet.models import CapsuleNetwork, Network, evaluation_mode

__all__ = ["Evidence", "evidence", "fold", "with_capsules"]


class Evidence(NamedTuple):
    """What routing decided for each image, at each of its iterations (the first axis of all tensors).

    Attributes:
        maps: coupling times activation of the primary capsules, folded back onto the image,
            `[iterations, batch, classes, height, width]`. A map sums to the class capsule's whole evidence; where
            couplings are shares, all maps of an image together sum to the same at every iteration (with a leaky slot,
            to no more than that).
        support: what the primary capsules' weighted votes add along the class capsule's direction, `c_ij u_hat_ij . v_j
            / |v_j|`, folded back likewise, of the same shape. A map sums to `|s_j|`, the length before the squash
            (without biases); below 0 are votes against. 0 where a class capsule is of length 0.
        couplings: `c` `[iterations, batch, in, classes]`; uniform at the first iteration.
        entropy: of the couplings of a primary capsule, in bits, mean over the capsules weighted by their activation,
            `[iterations, batch]`; from 0 (each sends its vote to one class) to log2(classes), or log2(classes + 1)
            with a leaky slot. Of couplings that are no shares, and can be negative: of the shares of their sizes.
        agreement: `sum_i c_ij u_hat_ij . v_j / |v_j|` as a share of `sum_i |c_ij| |u_hat_ij|`: the cosine between votes
            and outcome, weighted by couplings and lengths, `[iterations, batch, classes]` in [-1, 1]; 0 where a class
            capsule is of length 0.
        pose: the class capsules' vectors after the iteration `[iterations, batch, classes, dim]`.
    """

    maps: Tensor
    support: Tensor
    couplings: Tensor
    entropy: Tensor
    agreement: Tensor
    pose: Tensor


def with_capsules(network: Network) -> CapsuleNetwork:
    """The same network, known to have capsules.

    Raises:
        InputError: it has none.
    """
    if not isinstance(network, CapsuleNetwork):
        raise InputError(f"model must have capsules; got {network.config['name']}, which has none")
    return network


@torch.inference_mode()
def evidence(network: Network, images: Float[Tensor, "batch channels height width"]) -> Evidence:
    """Follow the routing of `images`, intensities in [0, 1] on the network's device, through its iterations.

    Raises:
        InputError: no capsules, or images of another shape.
    """
    network = with_capsules(network)
    with evaluation_mode(network):
        activation, u_hat, couplings, poses = network.trace_routing(images)
    vote_lengths = F.lengths(u_hat)
    parts: list[Evidence] = []
    for c, pose in zip(couplings, poses, strict=True):
        direction = torch.nn.functional.normalize(pose, dim=-1)
        support = c * torch.einsum("bijd,bjd->bij", u_hat, direction)  # [batch, in, classes]
        at_most = (c.abs() * vote_lengths).sum(1)
        shares = c if network.couplings_sum_to_one else torch.nn.functional.normalize(c, p=1, dim=-1).abs()
        parts.append(
            Evidence(
                maps=fold(network, c * activation[..., None]),
                support=fold(network, support),
                couplings=c,
                entropy=_entropy_bits(shares, leaky=network.leaky).mul(activation).sum(-1) / activation.sum(-1),
                agreement=support.sum(1) / at_most.clamp(min=torch.finfo(at_most.dtype).tiny),
                pose=pose,
            )
        )
    return Evidence(*(torch.stack(each) for each in zip(*parts, strict=True)))


def fold(
    network: CapsuleNetwork, values: Float[Tensor, "batch in classes"]
) -> Float[Tensor, "batch classes height width"]:
    """Spread values of each primary capsule over the pixels that it sees, see `CapsuleNetwork.receptive_fields`.

    A map on the image for each of the last axis of `values`, summing to the sum over the capsules.
    """
    rows, columns = (shares.to(values) for shares in network.receptive_fields())
    places = values.reshape(len(values), len(rows), len(columns), -1, values.shape[-1])  # [..., capsules, classes]
    grid = places.sum(3)  # [batch, rows, columns, classes]
    return torch.einsum("brcj,rh,cw->bjhw", grid, rows, columns)


def _entropy_bits(c: Float[Tensor, "*batch classes"], *, leaky: bool) -> Float[Tensor, "*batch"]:
    """Entropy of each input capsule's couplings; what a leaky slot takes is one more place."""
    bits: Tensor = -torch.special.xlogy(c, c).sum(-1)
    if leaky:
        rest = (1 - c.sum(-1)).clamp(min=0)
        bits = bits - torch.special.xlogy(rest, rest)
    return bits / math.log(2)
