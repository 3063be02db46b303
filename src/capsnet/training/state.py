"""Training state: position, agreement between processes, checkpoints, stopping."""

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor

from capsnet import functional as F
from capsnet.checkpoints.pretrained import fitted, fitting
from capsnet.checkpoints.run_directory import Checkpoint, Row, Run
from capsnet.config import Config
from capsnet.errors import Diverged, InputError, Interrupted
from capsnet.kernels import native
from capsnet.models import Network
from capsnet.objective import Batch, Losses
from capsnet.options.schema import brief, checked, shown
from capsnet.training.averaging import averaged
from capsnet.training.diagnosis import first_not_finite
from capsnet.training.schedule import learning_rate, steps_of

__all__ = ["Position", "TrainingState", "best_epoch", "fitting_checkpoint"]


@dataclass
class Position:
    """Where a training stands."""

    epoch: int = 0  # finished epochs
    step: int = 0  # finished steps of the running epoch
    seconds: float = 0.0  # of the finished epochs, validation included
    epoch_seconds: float = 0.0  # of the running epoch's training


def best_epoch(rows: Sequence[Mapping[str, Any]]) -> int:
    """The epoch with the lowest validation error, of equal ones the lowest loss, and of those the first.

    `rows` are those of `metrics.csv`, one for each epoch, from 1; 0 without any.
    """
    judged = [(row["validation_error_percent"], row["validation_loss"]) for row in rows]
    return 1 + judged.index(min(judged)) if judged else 0


def fitting_checkpoint(
    checkpoint: Checkpoint, network: Network, *, config: Config, steps: int, validated: bool, source: str
) -> Checkpoint:
    """A checkpoint, of the right form already, whose every part fits a training by `config` of `steps` an epoch.

    Where images are held out (`validated`), each row tells of them; where weights are averaged, there is their average;
    where the best ones are kept, there are those. `source` names the file in errors.

    Raises:
        InputError: weights, moments, position, rows or sums that no such training can have.
    """

    def need(holds: bool, what: str, rule: str, got: object) -> None:
        if not holds:
            raise InputError(f"{source}: {what} must be {rule}; got {shown(got)}")

    names = [field.name for field in fields(Position)]
    need(checkpoint["state"].keys() == set(names), "state", f"of {', '.join(names)}", list(checkpoint["state"]))
    at = checked(checkpoint["state"], Position, name="state", source=source)
    need(at.epoch >= 0, "epoch", "at least 0", at.epoch)
    need(0 <= at.step <= steps, "step", f"0 to the {steps} of an epoch", at.step)
    need(min(at.seconds, at.epoch_seconds) >= 0, "seconds", "at least 0", min(at.seconds, at.epoch_seconds))
    need((at.epoch_seconds > 0) == (at.step > 0), "epoch_seconds", "above 0 after a step only", at.epoch_seconds)
    rows = checkpoint["rows"]
    need(len(rows) == at.epoch, "rows", f"one for each of {at.epoch} finished epochs", len(rows))
    columns = Row.__required_keys__ | (Row.__optional_keys__ if validated else frozenset())
    for number, row in enumerate(rows, 1):
        need(row.keys() == columns, f"row {number}", f"of the columns {', '.join(sorted(columns))}", sorted(row))
        need(row["epoch"] == number, f"epoch of row {number}", str(number), row["epoch"])
    sums = fitting(checkpoint["sums"], torch.zeros(4, dtype=torch.float64), name=f"{source}: sums")
    holds = not sums.any() if at.step == 0 else bool((sums >= 0).all())
    need(holds, "sums", "at least 0, and 0 before the first step of an epoch", sums.tolist())
    weights = fitted(network, checkpoint["network"], source=source)
    done = at.epoch * steps + at.step
    moments = _fitting_moments(checkpoint["optimizer"]["state"], network, config.moments, done=done, source=source)
    fine: Checkpoint = {**checkpoint, "sums": sums, "network": weights, "optimizer": {"state": moments}}
    if config.ema:
        average = dict(checkpoint.get("average", {}))
        count = fitting(average.pop("n_averaged", torch.zeros(())), torch.tensor(0), name=f"{source}: n_averaged")
        need(int(count) == done, "n_averaged", "the steps done", int(count))
        inside = {name.removeprefix("module."): tensor for name, tensor in average.items()}
        kept = fitted(network, inside, source=f"{source}: average")
        fine["average"] = {"n_averaged": count, **{f"module.{name}": tensor for name, tensor in kept.items()}}
    if config.keep == "best":
        fine["best"] = fitted(network, checkpoint.get("best", {}), source=f"{source}: best")
    return fine


def _fitting_moments(
    state: dict[int, dict[str, Tensor]], network: Network, moments: tuple[str, ...], *, done: int, source: str
) -> dict[int, dict[str, Tensor]]:
    """The state of the optimiser, laid out in memory as its parameters: a fused one walks through both at once."""
    trained = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
    parameters = dict(enumerate(trained)) if done and moments else {}
    if state.keys() != parameters.keys():
        raise InputError(f"{source}: optimizer must hold the state of {len(parameters)} parameters; got {len(state)}")
    fine = dict[int, dict[str, Tensor]]()
    for k, (name, parameter) in parameters.items():
        wanted: dict[str, Tensor] = dict.fromkeys(moments, parameter)
        if "exp_avg" in moments:  # of Adam, which counts its steps
            wanted = {"step": torch.zeros(()), **wanted}
        if state[k].keys() != wanted.keys():
            got = shown(list(state[k]))
            raise InputError(f"{source}: optimizer must hold {', '.join(wanted)} of {name}; got {got}")
        fine[k] = {}
        for key, like in wanted.items():
            found = fitting(state[k][key], like, name=f"{source}: {key} of {name}")
            if key == "exp_avg_sq" and (found < 0).any():
                raise InputError(f"{source}: {key} of {name} must be at least 0; got {float(found.min()):g}")
            if key == "step" and float(found) != done:
                raise InputError(f"{source}: {key} of {name} must be the {done} steps done; got {float(found):g}")
            fine[k][key] = torch.empty_like(like, requires_grad=False).copy_(found)
    return fine


SHARE = 0.05
"""Of a training's time that may go into checkpoints at the ends of epochs, of which few images make many."""
CHEAP = 0.1
"""Seconds of a checkpoint that is always written."""


class TrainingState:
    """A training under way, seen by one of its processes.

    The network is the one that Fabric has not wrapped; `received` are the signals that come in, see `devices.signals`.

    Attributes:
        at: where it stands.
        kernels: which compute, see `native.status`.
        rows: of `metrics.csv`, one for each finished epoch.
        steps: of each epoch.
        average: of the network's weights over all steps, or None.
        best: a copy of `result` as it was after the best epoch so far, or None where the last weights are kept.
    """

    def __init__(
        self,
        fabric: Fabric,
        config: Config,
        run: Run,
        network: Network,
        optimizer: torch.optim.Optimizer,
        *,
        train_images: int,
        received: list[int],
    ) -> None:
        self.fabric, self.config, self.run, self.network, self.optimizer = fabric, config, run, network, optimizer
        self.train_images, self.received = train_images, received
        self.steps = steps_of(config, train_images)
        self.at, self.rows = Position(), list[dict[str, Any]]()
        place = torch.device("cpu") if fabric.device.type == "mps" else fabric.device  # which has no float64
        self._sums = torch.zeros(4, dtype=torch.float64, device=place)  # of this epoch and process
        self._pending: list[Tensor] = []  # losses not yet known to be finite
        self._saved, self._saving = -math.inf, 0.0  # when, and how long it took
        self._images: Tensor | None = None  # of the last step
        self.average = averaged(network, config.ema) if config.ema else None
        self.best = copy.deepcopy(self.result) if config.keep == "best" else None
        self.kernels = native.status() if fabric.device.type == "cpu" else "PyTorch"

    @property
    def result(self) -> Network:
        """The network that is judged after an epoch: the one that is trained, or the average of its weights."""
        return self.network if self.average is None else cast(Network, self.average.module)

    @property
    def kept(self) -> Network:
        """The network that a run ends with: `result`, or as it was after the best epoch."""
        return self.result if self.best is None else self.best

    @property
    def kept_epoch(self) -> int:
        """After how many epochs the weights of `kept` were reached."""
        return self.at.epoch if self.best is None else best_epoch(self.rows)

    @property
    def improved(self) -> bool:
        """Whether validation judges, and the last epoch is the best so far."""
        judges = self.best is not None or self.config.patience is not None
        return judges and best_epoch(self.rows) == self.at.epoch > 0

    def restore(self, checkpoint: Checkpoint) -> str | None:
        """Go back to where `checkpoint`, which `fitting_checkpoint` has checked, was saved.

        Returns:
            What is to be said: that other kernels than those of the run so far round otherwise, or that the learning
            rate goes on elsewhere, as it depends on the number of epochs.
        """
        self.network.load_state_dict(checkpoint["network"])
        if self.average is not None:
            self.average.load_state_dict(checkpoint["average"])
        if self.best is not None:
            self.best.load_state_dict(checkpoint["best"])
        groups = self.optimizer.state_dict()["param_groups"]  # its options are those of the configuration
        self.optimizer.load_state_dict({**checkpoint["optimizer"], "param_groups": groups})
        self.at, self.rows = Position(**checkpoint["state"]), [dict(row) for row in checkpoint["rows"]]
        self._sums = checkpoint["sums"].to(self._sums.device) / self.fabric.world_size  # each process bears its share
        before = checkpoint.get("kernels", self.kernels)
        told = []
        if before != self.kernels:
            told.append(
                f"computed by {self.kernels} from here on, before by {brief(before)}: results differ in rounding"
            )
        old = self.config.changed(epochs=checkpoint["config"].get("epochs"))
        step = self.at.epoch * self.steps + self.at.step
        rates = [learning_rate(config, step, self.steps) for config in (old, self.config)]
        if rates[0] != rates[1]:
            told.append(
                f"the {self.config.schedule} schedule now ends after {self.config.epochs} epochs, not {old.epochs}: "
                f"the learning rate goes on at {rates[1]:.3g}, not {rates[0]:.3g}"
            )
        return "; ".join(told) or None

    @torch.no_grad()
    def record(self, losses: Losses, targets: Tensor, *, counted: bool) -> None:
        """Add one step's losses and errors to those of the epoch, unless its images are not `counted`."""
        wrong = F.misclassified(losses.output.scores, targets)
        of_batch = torch.stack(
            [losses.total.sum(), losses.classification.sum(), losses.reconstruction.sum(), wrong.sum()]
        )
        self._sums += of_batch.to(self._sums.device).double() * counted
        self._pending.append(of_batch[0])
        self.at.step += 1
        if self.average is not None:
            self.average.update_parameters(self.network)

    def reached(self) -> str | None:
        """Why validation ends the training here, by `stop_at` or `patience`; None where it does not."""
        limit, patience = self.config.stop_at, self.config.patience
        if limit is not None and self.rows and self.rows[-1]["validation_error_percent"] <= limit:
            return f"the validation error is at most {limit:g} %"
        if patience is not None and len(self.rows) - best_epoch(self.rows) >= patience:
            return f"none of the last {patience} was a new best one on the validation images"
        return None

    def mean_here(self) -> list[float]:
        """Loss, classification loss, reconstruction loss and share of wrong images of the epoch so far.

        The other processes' images are taken to be like this one's.
        """
        done = min(self.at.step * self.config.batch_size, self.train_images)
        return cast(list[float], (self._sums * self.fabric.world_size / done).tolist())

    def row(self, rate: float, seconds: float, held_out: dict[str, float]) -> dict[str, Any]:
        """The finished epoch as a row of `metrics.csv`: with the last step's `rate`, and what validation adds."""
        loss, classification, reconstruction, wrong = (self.reduced(self._sums) / self.train_images).tolist()
        return {
            "epoch": self.at.epoch + 1,
            "learning_rate": rate,
            "train_loss": loss,
            "train_classification_loss": classification,
            "train_reconstruction_loss": reconstruction,
            "train_error_percent": 100 * wrong,
            "images_per_second": round(self.train_images / self.at.epoch_seconds, 1),
            **held_out,
            "seconds": round(seconds, 3),
        }

    def finish_epoch(self, row: dict[str, Any]) -> None:
        """Keep the epoch's row, stand at the start of the next one, and save both unless saving took long just now."""
        self.rows.append(row)
        self.at = Position(epoch=self.at.epoch + 1, seconds=self.at.seconds + row["seconds"])
        self._sums.zero_()
        if self.best is not None and self.improved:
            self.best.load_state_dict(self.result.state_dict())
        over = self.at.epoch == self.config.epochs or self.reached() is not None
        due = self._saving < CHEAP or time.perf_counter() - self._saved >= self._saving / SHARE
        if self.fabric.broadcast(over or due):
            self.save()
        self.by_first(lambda: self.run.write_metrics(self.rows))

    def reduced(self, tensor: Tensor, reduce_op: str = "sum") -> Tensor:
        """The sum (or `max`) of a tensor over all processes."""
        return cast(Tensor, self.fabric.all_reduce(tensor.clone(), reduce_op=reduce_op))

    def by_first(self, write: Callable[[], object]) -> None:
        """Let the first process write; where it cannot, all raise the InputError."""
        fault = ""
        if self.fabric.is_global_zero:
            try:
                write()
            except InputError as error:
                fault = str(error)
        fault = self.fabric.broadcast(fault)
        if fault:
            raise InputError(fault)

    def agree(self) -> None:
        """Give all processes the batch statistics of the first, which are those that are kept."""
        if self.fabric.world_size > 1:
            for buffer in (*self.network.buffers(), *self.result.buffers()):
                torch.distributed.broadcast(buffer, 0)

    def save(self) -> None:
        """Write the checkpoint.

        Raises:
            InputError: it cannot be written; the one before is kept.
            Diverged: a weight is not finite; the one before is kept.
        """
        begun, total = time.perf_counter(), self.reduced(self._sums)
        kept = (*self.network.state_dict().values(), *self.result.state_dict().values())
        if not all(tensor.isfinite().all() for tensor in kept):
            raise self.diverged(
                f"weights became NaN or infinite in epoch {self.at.epoch + 1} at step {self.at.step} of {self.steps}"
            )
        content = {
            "config": self.config.flat(),
            "train_images": self.train_images,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "state": vars(self.at),
            "rows": self.rows,
            "sums": total.cpu(),
            "kernels": self.kernels,
            **({} if self.average is None else {"average": self.average.state_dict()}),
            **({} if self.best is None else {"best": self.best.state_dict()}),
        }
        self.by_first(lambda: self.run.save_checkpoint(content))
        self._saved = time.perf_counter()
        self._saving = self._saved - begun

    def check(self) -> None:
        """Agree over all processes on whether to stop.

        Raises:
            Diverged: a loss since the last check is not finite.
            Interrupted: a signal came in; a checkpoint was written.
        """
        finite = torch.stack(self._pending).isfinite().tolist() if self._pending else []
        first_bad = self.at.step - len(finite) + finite.index(False) + 1 if False in finite else self.steps + 1
        flags = torch.tensor([-first_bad, max(self.received, default=0)], device=self.fabric.device)
        first_bad, stop = (int(flag) for flag in self.reduced(flags, "max").abs())
        if first_bad <= self.steps:
            raise self.diverged(self._at_step(first_bad))
        self._pending.clear()
        if stop:
            self.save()
            where = f"in epoch {self.at.epoch + 1} after step {self.at.step} of {self.steps}"
            place = "after the last epoch" if self.at.epoch == self.config.epochs else where
            raise Interrupted(f"stopped {place}; go on with: capsnet train --resume {self.run.directory}", stop)

    def refuse(self, losses: Losses, batch: Batch) -> None:
        """Stop before a loss that is not finite moves the weights, where looking at it costs nothing: on a CPU.

        Raises:
            Diverged: a loss of this step is not finite.
        """
        self._images = batch.images
        here = self.fabric.device.type == "cpu" and self.fabric.world_size == 1
        if here and not losses.total.isfinite().all():
            raise self.diverged(self._at_step(self.at.step + 1))

    def diverged(self, what: str) -> Diverged:
        """The exception that says what is not finite and where first, what is kept, and what to try."""
        kept = "the last good checkpoint is kept" if self.run.checkpoint_path.exists() else "there is no checkpoint yet"
        first = first_not_finite(self.network, self._images)
        other = ", or --precision 32" if self.config.precision == "bf16" else ""
        return Diverged(
            f"{what}; not finite first: {first}; {kept} in {self.run.directory} "
            f"(try a smaller --lr, now {self.config.lr:g}{other})"
        )

    def _at_step(self, step: int) -> str:
        return f"loss became NaN or infinite in epoch {self.at.epoch + 1} at step {step} of {self.steps}"
