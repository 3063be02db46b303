"""The training loop, on Lightning Fabric, and nothing else.

Every random number of step t is a function of the seed and t alone (order of the epoch, augmentation, dropout), and a
step's images are those of the global batch whatever the number of processes: a run that was killed and resumed ends
with the same weights, bit for bit on a CPU, and two processes train what one would (but for dropout, which each
process draws for itself, and batch statistics, which are those of each process's share). The same holds of a batch in
micro-batches, for each of these.
"""

import math
import time
from contextlib import ExitStack

import torch
from lightning_fabric import Fabric

from capsnet.checkpoints.run_directory import Checkpoint, Run
from capsnet.config import Config
from capsnet.data import Dataset
from capsnet.evaluation import Evaluation, Predictions, predict_split
from capsnet.models import Network, inference_batch
from capsnet.objective import Batch, Losses, Objective, class_weights
from capsnet.training.batches import BatchLoader
from capsnet.training.console import Progress
from capsnet.training.cuda_graph import GraphedStep
from capsnet.training.diagnosis import Chance
from capsnet.training.micro_batches import accumulated
from capsnet.training.schedule import generator, learning_rate, optimizer_of, seed_of
from capsnet.training.state import TrainingState
from capsnet.training.tensorboard import tensorboard

__all__ = ["predict_checked", "train_epochs"]

VALIDATION_COLUMNS = ("loss", "classification_loss", "reconstruction_loss", "error_percent")


def train_epochs(
    fabric: Fabric,
    config: Config,
    dataset: Dataset,
    network: Network,
    run: Run,
    *,
    received: list[int],
    checkpoint: Checkpoint | None,
    note: str,
) -> tuple[TrainingState, Evaluation | None]:
    """Train a network until its last epoch, or until it is good enough.

    Args:
        fabric: launched.
        config: of the run, with nothing left open.
        dataset: with its validation split.
        network: untrained.
        run: its directory.
        received: signals so far; a new one stops the training after the current step.
        checkpoint: to go on from.
        note: shown first.

    Returns:
        The state at the end, and the evaluation of the validation split with the weights that are kept: None without
        one, or where no epoch of this session reached them.

    Raises:
        Interrupted: a signal; a checkpoint was written.
        Diverged: the loss is not finite.
    """
    assert config.epochs is not None
    network.to(fabric.device)
    objective, optimizer = fabric.setup(Objective(network, config), optimizer_of(network, config))

    weights = class_weights(dataset.train.labels, len(dataset.classes)).to(fabric.device) if config.balance else None

    def backward(part: Batch, share: float, last: bool) -> Losses:
        with fabric.no_backward_sync(objective, enabled=not last):
            losses: Losses = objective(*part)
            state.refuse(losses, part)
            total = losses.total if weights is None else losses.total * weights[part.labels]
            fabric.backward(total.mean() * share)
        return losses

    def step(batch: Batch, share: float = 1.0) -> Losses:
        optimizer.zero_grad(set_to_none=not config.cuda_graph)
        losses = accumulated(batch, at_once, lambda part, of_batch, last: backward(part, share * of_batch, last))
        optimizer.step()
        return losses

    at_once = _share(config.micro_batch, fabric)
    count = len(dataset.train)
    graphed = GraphedStep(step, batch_size=min(config.batch_size, count)) if config.cuda_graph else None
    rate_here = torch.tensor(config.lr, device=fabric.device)
    batches = BatchLoader(dataset, config, fabric.device)
    state = TrainingState(fabric, config, run, network, optimizer, train_images=count, received=received)
    notes = [note, state.restore(checkpoint) if checkpoint else None]
    steps, kept, losses = state.steps, None, None
    chance = Chance(
        dataset.train.labels,
        classes=len(dataset.classes),
        objects_per_image=dataset.objects_per_image,
        config=config,
        steps=steps,
    )

    with ExitStack() as stack:
        progress = stack.enter_context(Progress(epochs=config.epochs, steps=steps, quiet=not fabric.is_global_zero))
        for said in filter(None, notes):
            progress.note(said)
        write_row = None
        if config.tensorboard and fabric.is_global_zero:
            write_row = stack.enter_context(tensorboard(run.directory / "tensorboard", first_epoch=state.at.epoch + 1))
        state.by_first(lambda: run.write_metrics(state.rows))
        while state.at.epoch < config.epochs and state.reached() is None:
            at = state.at
            order = torch.randperm(count, generator=generator(config.seed, at.epoch, -1))
            clock = time.perf_counter() - at.epoch_seconds
            objective.train()
            while at.step < steps:
                batch = order[at.step * config.batch_size : (at.step + 1) * config.batch_size]
                mine = torch.arange(fabric.global_rank, len(batch), fabric.world_size)
                share = len(mine) * fabric.world_size / len(batch)  # DDP takes the mean over the processes
                if len(mine) == 0:  # this process has no image of a small last batch: any image, with no weight
                    mine = torch.zeros(1, dtype=torch.int64)
                images = batches(batch, mine, generator=generator(config.seed, at.epoch, at.step))
                rate = learning_rate(config, at.epoch * steps + at.step, steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate_here.fill_(rate) if graphed else rate
                    if "capturable" in group:  # of Adam, which counts its steps on the device then
                        group["capturable"] = bool(graphed)
                network.begin_step(at.epoch * steps + at.step, config.epochs * steps)
                torch.manual_seed(seed_of(config.seed, at.epoch, at.step, fabric.global_rank))  # of dropout

                losses = graphed(images) if graphed else step(images, share)
                state.record(losses, images.labels, counted=share > 0)
                at.epoch_seconds = time.perf_counter() - clock
                told = at.step % config.log_every == 0 or at.step == steps
                saved = bool(config.checkpoint_steps) and at.step % config.checkpoint_steps == 0
                if told or saved or (received and fabric.world_size == 1):
                    state.check()
                if told:
                    done = min(at.step * config.batch_size, count)
                    progress.update(at.epoch, at.step, state.mean_here(), done / at.epoch_seconds)
                if saved and at.step < steps:
                    state.save()

            held_out, validation = dict[str, float](), None
            if dataset.validation is not None:
                found = predict_checked(state, state.result, dataset, "validation")
                validation = Evaluation.of(found, dataset.classes)
                held_out = {f"validation_{name}": getattr(validation, name) for name in VALIDATION_COLUMNS}
            rate = learning_rate(config, (at.epoch + 1) * steps - 1, steps)
            row = state.row(rate, time.perf_counter() - clock, held_out)
            if write_row:
                write_row(row, state.result, dataset)
            state.finish_epoch(row)
            if state.kept_epoch == state.at.epoch:
                kept = validation
            progress.epoch(row, best=state.improved)
            if line := chance.line(row, losses):
                progress.note(line)
        if state.at.epoch < config.epochs:
            progress.note(f"stopped after epoch {state.at.epoch} of {config.epochs}: {state.reached()}")
    return state, kept


def _share(images: int | None, fabric: Fabric) -> int | None:
    """Most images of one process, of so many over all; None of None."""
    return None if images is None else -(-images // fabric.world_size)


def predict_checked(state: TrainingState, network: Network, dataset: Dataset, name: str) -> Predictions:
    """Predictions for the split `name`, divided over all processes; stops where the training would.

    `network` is one of the training: `state.result`, or `state.kept`.
    """
    fabric = state.fabric
    state.agree()
    with fabric.autocast():
        found = predict_split(
            network,
            getattr(dataset, name),
            config=state.config,
            batch_size=inference_batch(network, at_most=_share(state.config.micro_batch, fabric)),
            rank=fabric.global_rank,
            world_size=fabric.world_size,
            reduced=state.reduced,
            each_batch=state.check,
        )
    if not math.isfinite(found.losses[:, 0].double().mean()):
        epoch = state.at.epoch + (state.at.step > 0)
        raise state.diverged(f"{name} loss became NaN or infinite after epoch {epoch}")
    return found
