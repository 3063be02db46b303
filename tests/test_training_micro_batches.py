"""A training step in parts: the gradient, the losses and the whole run are those of the batch at once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from capsnet.cli import main
from capsnet.config import Config
from capsnet.models import create
from capsnet.objective import Batch, Losses, Objective, class_weights
from capsnet.training.fit import fit, resume
from capsnet.training.micro_batches import accumulated, parts
from tiny import SIZES, metrics, pairs, same_weights, tiny, weights

pytestmark = pytest.mark.usefixtures("workplace", "blank_figure")


def batch(objects: int = 1, count: int = 7) -> Batch:
    draw = torch.Generator().manual_seed(4)
    labels = torch.stack([torch.randperm(3, generator=draw)[:objects] for _ in range(count)])
    if objects == 1:
        images = torch.rand(count, 2, 12, 11, generator=draw, dtype=torch.float64)
        return Batch(images, labels.squeeze(1))
    single_images = torch.rand(count, objects, 2, 12, 11, generator=draw, dtype=torch.float64)
    return Batch(single_images.sum(1).clamp(max=1), labels, single_images)


@pytest.mark.parametrize(
    ("count", "size", "sizes"),
    [
        (8, 2, [2, 2, 2, 2]),
        (7, 3, [3, 2, 2]),
        (7, 4, [4, 3]),
        (5, 1, [1] * 5),
        (5, 5, [5]),
        (5, 9, [5]),
        (5, None, [5]),
    ],
)
@pytest.mark.parametrize("objects", [1, 2])
def test_a_batch_is_cut_evenly_and_in_order(count: int, size: int | None, sizes: list[int], objects: int) -> None:
    whole = batch(objects, count)
    found = parts(whole, size)
    assert [len(part.images) for part in found] == sizes
    for k, column in enumerate(whole):
        cut = [part[k] for part in found]
        assert column is None if cut[0] is None else torch.equal(torch.cat(cut), column)  # type: ignore[arg-type]
    if len(sizes) == 1:
        assert found[0] is whole, "the ordinary case makes nothing new"


def gradients(whole: Batch, size: int | None, *, balance: bool, objects: int) -> tuple[list[Tensor], Losses]:
    torch.manual_seed(0)
    network = create("capsnet", image_shape=(2, 12, 11), num_classes=3, objects_per_image=objects, **SIZES)
    objective = Objective(network, Config.of(reconstruction_weight=0.5)).double()
    scale = class_weights(whole.labels, 3).double() if balance else None

    def backward(part: Batch, share: float, last: bool) -> Losses:
        losses: Losses = objective(*part)
        total = losses.total if scale is None else losses.total * scale[part.labels]
        torch.autograd.backward(total.mean() * share)
        return losses

    found = accumulated(whole, size, backward)
    return [parameter.grad for parameter in objective.parameters() if parameter.grad is not None], found


@pytest.mark.parametrize(("balance", "objects"), [(False, 1), (True, 1), (False, 2)])
@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_the_gradient_is_that_of_the_whole_batch(size: int, balance: bool, objects: int) -> None:
    whole = batch(objects)
    one, losses = gradients(whole, None, balance=balance, objects=objects)
    other, found = gradients(whole, size, balance=balance, objects=objects)
    assert len(one) == len(other) > 5
    for a, b in zip(one, other, strict=True):
        assert float(a.norm()) > 0
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    for k in range(3):
        torch.testing.assert_close(found[k], losses[k], rtol=0, atol=1e-10)
    torch.testing.assert_close(found.output.scores, losses.output.scores, rtol=0, atol=1e-10)
    assert losses.output.pose is not None
    torch.testing.assert_close(found.output.pose, losses.output.pose, rtol=0, atol=1e-10)
    assert not found.total.requires_grad


def relative(one: Path | str, other: Path | str) -> float:
    ours, theirs = weights(one), weights(other)
    return max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in ours)


RUNS: list[dict[str, Any]] = [{}, {"balance": True}, {"ema": 0.9}, {"freeze": ("conv",)}]


@pytest.mark.parametrize("options", RUNS, ids=str)
def test_a_run_in_parts_ends_as_one_without(photos: Path, options: dict[str, Any]) -> None:
    """Its images and their augmentation are the same; measured: weights that differ by 2e-7; allowed is 2e-6."""
    fit(tiny(photos, out="whole", **options))
    fit(tiny(photos, out="parts", micro_batch=5, **options))
    assert not same_weights("whole", "parts"), "of other sums"
    assert relative("parts", "whole") < 2e-6
    for ours, theirs in zip(metrics("parts"), metrics("whole"), strict=True):
        assert [float(x) for x in ours.values()] == pytest.approx([float(x) for x in theirs.values()], rel=1e-5)


def test_a_run_on_pairs_in_parts_ends_as_one_without() -> None:
    config = tiny(Path("pairs"), epochs=1)
    fit(config.changed(out="whole"), pairs())
    fit(config.changed(out="parts", micro_batch=6), pairs())
    assert relative("parts", "whole") < 2e-6


def test_the_gradients_of_a_training_are_those_of_the_whole_batch(photos: Path) -> None:
    """Of the first step, where the weights are the same, in float32."""
    seen: list[list[Tensor]] = []

    def note(optimizer: torch.optim.Optimizer, *_: object) -> None:
        seen.append([each.grad.clone() for group in optimizer.param_groups for each in group["params"]])

    hook = register_optimizer_step_pre_hook(note)
    try:
        for size in (None, 7, 1):
            fit(tiny(photos, out=f"run{size}", epochs=1, micro_batch=size))
    finally:
        hook.remove()
    assert len(seen) == 3 * 5, "one step of the optimiser for each batch, however many parts"
    for part in (seen[5], seen[10]):
        for one, other in zip(seen[0], part, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_the_same_parts_resume_bit_for_bit_and_others_go_on(photos: Path) -> None:
    fit(tiny(photos, out="whole", epochs=3, micro_batch=5))
    for out in ("same", "other"):
        fit(tiny(photos, out=out, epochs=2, micro_batch=5))
    resume("same", epochs=3)
    assert same_weights("whole", "same")
    resume("other", epochs=3, micro_batch=16)
    assert relative("other", "whole") < 2e-6
    assert main(["train", "--resume", "same", "--epochs", "3", "--micro-batch", "0"]) == 2


def test_batch_statistics_are_of_the_parts_and_that_is_said(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(
        f"train --data {photos} --model efficient-capsnet --image-size 28 --batch-size 16 --micro-batch 4 --epochs 1 "
        "--out run --no-report".split()
    )
    err = capsys.readouterr().err
    assert code == 0, err
    said = r"memory: batches of 16 in 4 parts of 4 ("
    assert said in err
    assert "the gradient is the same but for batch statistics, which are those of each part\n" in err
