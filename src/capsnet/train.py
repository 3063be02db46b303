"""Training: `fit(config)` is one visible loop on Lightning Fabric.

Every random number of step t is a function of the seed and t alone (order of the epoch, augmentation, dropout), and a
step's images are those of the global batch whatever the number of processes: a run that was killed and resumed ends
with the same weights, bit for bit on a CPU, and two processes train what one would (but for dropout, which each
process draws for itself).
"""

import hashlib
import importlib.util
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor

from capsnet import models, plots, runs
from capsnet.board import board
from capsnet.config import Config, preset
from capsnet.data import Dataset, Split, load
from capsnet.data.augment import Augmentation, augment
from capsnet.errors import InputError
from capsnet.evaluation import Evaluation, from_sums, measure, to_float
from capsnet.machine import first_process, make_fabric, resolve_device, resolve_precision, shutdown, signals
from capsnet.models import Network
from capsnet.objective import Objective
from capsnet.progress import Progress

__all__ = [
    "Diverged",
    "Interrupted",
    "Result",
    "build",
    "fit",
    "learning_rate",
    "prepare_data",
    "resume",
]

EVALUATION_BATCH = 256
RESUMABLE = ("epochs", "devices", "log_every", "checkpoint_steps", "tensorboard", "threads", "data_dir")
"""Options that may change when a run goes on; all others would make it another run."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: the run was saved and can go on."""

    def __init__(self, directory: Path, signal_number: int, where: str) -> None:
        super().__init__(f"stopped {where}; go on with: capsnet train --resume {directory}")
        self.signal_number = signal_number


class Diverged(Exception):
    """The loss became NaN or infinite; the last good checkpoint is kept."""


@dataclass(frozen=True)
class Result:
    """What a finished run measured.

    Attributes:
        directory: the run directory.
        test: on the test split, read once, after the last epoch.
        validation: on the validation split after the last epoch, or None.
        epochs: passes over the training images.
        seconds: of training, over all sessions of the run, validation included.
        figure: inputs beside their reconstructions, or None without a decoder.
        network: the trained network, on the CPU and in evaluation mode.
    """

    directory: Path
    test: Evaluation
    validation: Evaluation | None
    epochs: int
    seconds: float
    figure: Path | None
    network: Network


@dataclass
class _State:
    """Where a run stands: all of it goes into the checkpoint."""

    epoch: int = 0  # finished epochs
    step: int = 0  # finished steps of the running epoch
    seconds: float = 0.0
    epoch_seconds: float = 0.0


def fit(config: Config) -> Result:
    """Train as `config` says, in a new run directory, and evaluate on the test split once, at the end.

    Raises:
        InputError: the configuration, data or directory do not fit; nothing was written.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was written.
        Diverged: the loss is not finite; the last good checkpoint is kept.
    """
    return _launch(config, resumed=None)


def resume(directory: str | Path, **changes: Any) -> Result:
    """Go on with the run in `directory` from its last checkpoint.

    Args:
        directory: of the run.
        changes: options to change, of those that leave it the same run: more `epochs`, `devices`, `log_every`,
            `checkpoint_steps`, `tensorboard`, `threads`, `data_dir`.

    Raises:
        InputError: no run or checkpoint there, or another option is to change; otherwise as `fit`.
    """
    run = runs.Run(directory)
    saved = run.config()
    faults = [
        f"{name} of a resumed run must stay {getattr(saved, name, None)!r}; got {value!r}"
        for name, value in changes.items()
        if name not in RESUMABLE and value != getattr(saved, name, None)
    ]
    if faults:
        raise InputError(f"{'; and '.join(faults)} (only {', '.join(RESUMABLE)} may change)")
    config = replace(saved, **{name: value for name, value in changes.items() if name in RESUMABLE})
    return _launch(config, resumed=run)


def prepare_data(config: Config) -> Dataset:
    """The data set of `config`, with its validation split.

    Raises:
        InputError: see `data.load` and `Dataset.with_validation`.
    """
    dataset = load(
        config.data,
        data_dir=config.data_dir,
        image_size=config.image_size,
        channels=config.channels,
        seed=config.seed,
    )
    if config.validation is not None:
        return dataset.with_validation(config.validation, seed=config.seed)
    if dataset.validation is not None:
        return dataset
    return dataset.with_validation(min(5000, len(dataset.train) // 10), seed=config.seed)


def build(config: Config, dataset: Dataset) -> Network:
    """The untrained network of `config` for the images and classes of `dataset`; weights follow the seed.

    Raises:
        InputError: see `models.create`, or an option was given that this network does not have.
    """
    options = models.builder_options(config.model)
    base = preset(config.preset)
    for other in models.available():
        for name in models.builder_options(other):
            value = getattr(config, name)
            if name not in options and value not in (getattr(base, name), getattr(Config(), name)):
                raise InputError(f"option {name} is of model {other} and must not be given for {config.model}")
    torch.manual_seed(config.seed)
    return models.create(
        config.model,
        image_shape=dataset.image_shape,
        num_classes=len(dataset.classes),
        classes=dataset.classes,
        **{name: getattr(config, name) for name in options},
    )


def learning_rate(config: Config, step: int, steps_per_epoch: int) -> float:
    """Learning rate of step `step` (from 0): `max(floor, lr * decay ** (step / decay_steps))`."""
    decay_steps = config.lr_decay_steps or steps_per_epoch
    return max(config.lr_floor, config.lr * math.pow(config.lr_decay, step / decay_steps))


def _launch(config: Config, resumed: runs.Run | None) -> Result:
    """Check everything that can be checked, start the processes, train, and leave no process group behind."""
    run = resumed or runs.Run(config.out or _free_directory(config))
    device = resolve_device(config)
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise InputError(
            "tensorboard must be installed for --tensorboard; it is not (pip install 'capsnet[tensorboard]')"
        )
    dataset = prepare_data(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    network = build(config, dataset)
    checkpoint = _checkpoint(run, config, network, dataset) if resumed else None
    if int(os.environ.get("RANK", "0")) == 0 and first_process():
        run.go_on(config) if resumed else run.begin(config, overwrite=config.overwrite)

    precision = resolve_precision(config, device, network)
    fabric = make_fabric(config, device, precision)
    fabric.launch()
    try:
        run = runs.Run(fabric.broadcast(str(run.directory)))
        with signals() as received:
            return _train(fabric, config, dataset, network, run, received, checkpoint, precision)
    except (Interrupted, Diverged, InputError):
        if fabric.is_global_zero:
            raise
        raise SystemExit(0) from None  # all processes stop for the same reason, and the first one tells it
    finally:
        shutdown(fabric)


def _checkpoint(run: runs.Run, config: Config, network: Network, dataset: Dataset) -> dict[str, Any] | None:
    """The checkpoint to go on from; None where a run was stopped before its first one.

    Raises:
        InputError: it is damaged, or of another run, or of other data.
    """
    if not run.checkpoint_path.exists() and not run.result_path.exists():
        return None
    checkpoint, path = run.load_checkpoint(), run.checkpoint_path
    ours, theirs = asdict(config), checkpoint["config"]
    for name in ours.keys() & theirs.keys() - {*RESUMABLE, "out", "overwrite"}:
        if ours[name] != theirs[name]:
            raise InputError(
                f"checkpoint {path} must be of the run that config.yaml beside it tells; "
                f"its {name} is {theirs[name]!r}, not {ours[name]!r}"
            )
    if checkpoint["train_images"] != len(dataset.train):
        raise InputError(
            f"data {config.data} must be the {checkpoint['train_images']:,} training images that the run began with; "
            f"got {len(dataset.train):,}"
        )
    runs.check_fit(network, checkpoint["network"], source=str(path))
    begun = checkpoint["state"]["epoch"] + (checkpoint["state"]["step"] > 0)
    if config.epochs < begun:
        raise InputError(f"epochs must be at least the {begun} that the run has begun; got {config.epochs}")
    return checkpoint


def _train(
    fabric: Fabric,
    config: Config,
    dataset: Dataset,
    network: Network,
    run: runs.Run,
    received: list[int],
    checkpoint: dict[str, Any] | None,
    precision: str,
) -> Result:
    environment = runs.environment(fabric.device)  # of the code that runs, not of what is on disk at the end
    network.to(fabric.device)
    plain = Objective(network, config)
    objective, optimizer = fabric.setup(plain, torch.optim.Adam(network.parameters(), lr=config.lr, fused=True))
    augmentation = Augmentation(
        shift=config.shift,
        flip=config.flip,
        rotation=config.rotation,
        scale=config.scale,
        shear=config.shear,
    )
    images, labels = dataset.train.images.to(fabric.device), dataset.train.labels.to(fabric.device)
    steps = math.ceil(len(images) / config.batch_size)

    state, rows, sums = _State(), list[dict[str, Any]](), torch.zeros(4, dtype=torch.float64)
    if checkpoint:
        network.load_state_dict(checkpoint["network"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        state, rows = _State(**checkpoint["state"]), checkpoint["rows"]
        sums = checkpoint["sums"] / fabric.world_size  # of this epoch so far; each process bears its share
    sums = sums.to(fabric.device)
    pending: list[Tensor] = []  # losses not yet known to be finite
    validation: Evaluation | None = None
    progress = Progress(epochs=config.epochs, steps=steps, quiet=not fabric.is_global_zero)

    def reduced(tensor: Tensor, reduce_op: str = "sum") -> Tensor:
        return cast(Tensor, fabric.all_reduce(tensor.clone(), reduce_op=reduce_op))

    def by_first(write: Callable[[], object]) -> None:
        """Let the first process write; where it cannot, all raise the InputError."""
        fault = ""
        if fabric.is_global_zero:
            try:
                write()
            except InputError as error:
                fault = str(error)
        fault = fabric.broadcast(fault)
        if fault:
            raise InputError(fault)

    def diverged(what: str) -> Diverged:
        kept = "the last good checkpoint is kept" if run.checkpoint_path.exists() else "there is no checkpoint yet"
        return Diverged(f"{what}; {kept} in {run.directory} (try a smaller --lr, now {config.lr:g})")

    def save() -> None:
        total = reduced(sums)
        if not all(parameter.isfinite().all() for parameter in network.parameters()):
            raise diverged(f"weights became NaN or infinite in epoch {state.epoch + 1} at step {state.step} of {steps}")
        content = {
            "config": asdict(config),
            "train_images": len(images),
            "network": network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "state": vars(state),
            "rows": rows,
            "sums": total.cpu(),
        }
        by_first(lambda: run.save_checkpoint(content))

    def check() -> None:
        """Agree over all processes on whether to stop: a loss that is not finite, or a signal."""
        finite = torch.stack(pending).isfinite().tolist() if pending else []
        first_bad = state.step - len(finite) + finite.index(False) + 1 if False in finite else steps + 1
        flags = reduced(torch.tensor([-first_bad, max(received, default=0)], device=fabric.device), "max")
        first_bad, stop = -int(flags[0]), int(flags[1])
        if first_bad <= steps:
            raise diverged(f"loss became NaN or infinite in epoch {state.epoch + 1} at step {first_bad} of {steps}")
        pending.clear()
        if stop:
            save()
            where = f"in epoch {state.epoch + 1} after step {state.step} of {steps}"
            raise Interrupted(run.directory, stop, where if state.epoch < config.epochs else "after the last epoch")

    def evaluate(name: str) -> Evaluation:
        split: Split = getattr(dataset, name)
        parts = EVALUATION_BATCH * fabric.world_size
        confusion, losses = torch.tensor(0), torch.tensor(0.0)
        for start in range(0, len(split), parts):
            check()
            with fabric.autocast():
                one = measure(
                    plain,
                    Split(split.images[start : start + parts], split.labels[start : start + parts]),
                    classes=len(dataset.classes),
                    device=fabric.device,
                    batch_size=EVALUATION_BATCH,
                    rank=fabric.global_rank,
                    world_size=fabric.world_size,
                )
            confusion, losses = confusion.to(fabric.device) + one[0], losses.to(fabric.device) + one[1]
        result = from_sums(reduced(confusion), reduced(losses), classes=dataset.classes)
        if not math.isfinite(result.loss):
            raise diverged(f"{name} loss became NaN or infinite after epoch {state.epoch + (state.step > 0)}")
        return result

    with ExitStack() as stack:
        stack.enter_context(progress)
        write_board = None
        if config.tensorboard and fabric.is_global_zero:
            write_board = stack.enter_context(board(run.directory / "tensorboard", first_epoch=state.epoch + 1))
        by_first(lambda: run.write_metrics(rows))
        while state.epoch < config.epochs:
            order = torch.randperm(len(images), generator=_generator(config.seed, state.epoch, -1))
            clock = time.perf_counter() - state.epoch_seconds
            objective.train()
            while state.step < steps:
                batch = order[state.step * config.batch_size : (state.step + 1) * config.batch_size]
                mine = torch.arange(fabric.global_rank, len(batch), fabric.world_size)
                share = len(mine) * fabric.world_size / len(batch)  # DDP takes the mean over the processes
                if len(mine) == 0:  # this process has no image of a small last batch: any image, with no weight
                    mine = torch.zeros(1, dtype=torch.int64)
                drawn = augmentation.draw(len(batch), generator=_generator(config.seed, state.epoch, state.step))
                index = batch[mine].to(fabric.device)
                inputs = augment(to_float(images[index]), drawn[mine])
                targets = labels[index]
                rate = learning_rate(config, state.epoch * steps + state.step, steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                torch.manual_seed(_mixed(config.seed, state.epoch, state.step, fabric.global_rank))

                optimizer.zero_grad()
                losses = objective(inputs, targets)
                fabric.backward(losses.total.mean() * share)
                optimizer.step()

                with torch.no_grad():
                    wrong = losses.output.scores.argmax(-1) != targets
                    of_batch = torch.stack(
                        [
                            losses.total.sum(),
                            losses.classification.sum(),
                            losses.reconstruction.sum(),
                            wrong.sum(),
                        ]
                    )
                    sums += of_batch.double() * (share > 0)
                    pending.append(of_batch[0])
                state.step += 1
                state.epoch_seconds = time.perf_counter() - clock
                told = state.step % config.log_every == 0 or state.step == steps
                saved = bool(config.checkpoint_steps) and state.step % config.checkpoint_steps == 0
                if told or saved or (received and fabric.world_size == 1):
                    check()
                if told:
                    done = min(state.step * config.batch_size, len(images))
                    mean = (sums * fabric.world_size / done).tolist()
                    progress.update(state.epoch, state.step, mean, done / state.epoch_seconds)
                if saved and state.step < steps:
                    save()

            rate = learning_rate(config, (state.epoch + 1) * steps - 1, steps)
            row = _row(state.epoch + 1, rate, reduced(sums), len(images), state.epoch_seconds)
            if dataset.validation is not None:
                validation = evaluate("validation")
                row |= _prefixed("validation", validation)
            seconds = time.perf_counter() - clock
            rows.append({**row, "seconds": round(seconds, 3)})
            if write_board:
                write_board(rows[-1], network, dataset)
            state = _State(epoch=state.epoch + 1, seconds=state.seconds + seconds)
            sums.zero_()
            save()
            by_first(lambda: run.write_metrics(rows))
            if fabric.is_global_zero:
                progress.epoch(rows[-1])

        test = evaluate("test")
        if dataset.validation is not None and validation is None:  # resumed after the last epoch
            validation = evaluate("validation")
    network = network.to("cpu", memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    figure = run.figures / "reconstructions.png" if getattr(network, "decoder", None) is not None else None
    result = {
        "test": test.to_dict(),
        "validation": validation.to_dict() if validation else None,
        "selection": "none: weights after the last epoch; test images read once, at the end",
        "data": dataset.name,
        "train_images": len(dataset.train),
        "model": config.model,
        "preset": config.preset,
        "parameters": network.parameter_count(),
        "seed": config.seed,
        "epochs": state.epoch,
        "seconds": round(state.seconds, 1),
        "processes": fabric.world_size,
        "precision": precision,
        **environment,
    }

    def finish() -> None:
        runs.save_pretrained(network, run.directory)
        if figure:
            runs.write_atomically(figure, lambda path: plots.reconstructions(network, dataset.test, path))
        run.write_result(result)

    by_first(finish)
    return Result(run.directory, test, validation, state.epoch, state.seconds, figure, network)


def _row(epoch: int, rate: float, sums: Tensor, count: int, seconds: float) -> dict[str, Any]:
    loss, classification, reconstruction, wrong = sums.tolist()
    return {
        "epoch": epoch,
        "learning_rate": rate,
        "train_loss": loss / count,
        "train_classification_loss": classification / count,
        "train_reconstruction_loss": reconstruction / count,
        "train_error_percent": 100 * wrong / count,
        "images_per_second": round(count / seconds, 1),
    }


def _prefixed(prefix: str, evaluation: Evaluation) -> dict[str, Any]:
    names = ("loss", "classification_loss", "reconstruction_loss", "error_percent")
    return {f"{prefix}_{name}": getattr(evaluation, name) for name in names}


def _mixed(*numbers: int) -> int:
    """One 63-bit seed from several whole numbers, different for every different list of them."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(_mixed(*numbers))


def _free_directory(config: Config) -> Path:
    name = config.data if not Path(config.data).is_dir() else Path(config.data).resolve().name
    stem = Path("runs") / f"{name}-{config.model}-seed{config.seed}"
    candidates: Iterator[Path] = (stem.with_name(f"{stem.name}-{k}") for k in range(2, 10_000))
    return stem if not stem.exists() or config.overwrite else next(p for p in candidates if not p.exists())
