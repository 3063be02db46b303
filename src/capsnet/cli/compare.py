"""The verb `compare`."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from capsnet.cli.evaluate import Member, members, same_split
from capsnet.cli.parsing import BatchSize, parse
from capsnet.cli.printing import show, show_json
from capsnet.config import Device
from capsnet.errors import InputError

if TYPE_CHECKING:
    from capsnet.ensemble import Ensemble
    from capsnet.evaluation.statistics import McNemar, TTest

__all__ = ["run"]


@dataclass(frozen=True)
class _Compare:
    """Whether the errors of some runs differ from those of others by more than chance would have it.

    One run against one: the exact McNemar test, over the images that only one of them gets wrong; another training of
    the same two may turn out otherwise. Several against several: a t test over the trainings, paired by seed where both
    sides have the same seeds, else Welch's. A difference is RUN less --against, in points, +- its standard error.

    Examples:
      capsnet compare runs/mnist --against capsnet-mnist
      capsnet compare runs/r3-seed0 runs/r3-seed1 --against runs/r1-seed0 runs/r1-seed1 --json
    """

    runs: Positional[Annotated[tuple[str, ...], arg(metavar="RUN [RUN ...]")]]
    """Run directories, folders with weights, or names of weights that come with the package."""
    against: Annotated[tuple[str, ...], arg(metavar="RUN [RUN ...]")] = ()
    """The others, of the same classes and image shape. Always needed."""
    data: str | None = None
    """Another data set or folder; default: that of the first run."""
    data_dir: str | None = None
    """Where downloaded files are."""
    split: Literal["test", "validation", "train"] = "test"
    """Which part of the data set."""
    batch_size: BatchSize = 256
    """Images at a time; only memory and speed depend on it."""
    device: Device = "auto"
    """auto: a CUDA GPU if there is one; mps (untested) on a Mac."""
    json: bool = False
    """Print everything as JSON."""


def run(arguments: list[str]) -> int:
    """Compare runs, print the errors and a test or JSON."""
    command = parse(_Compare, arguments, prog="capsnet compare")
    _check(command)
    from capsnet.ensemble import Ensemble
    from capsnet.evaluation.statistics import McNemar, summarise

    found = members([*command.runs, *command.against])
    dataset, split = same_split(
        found,
        command.split,
        data=command.data,
        data_dir=command.data_dir,
        device=command.device,
        batch_size=command.batch_size,
    )
    results = [Ensemble.of(member.scores(split, batch_size=command.batch_size), split.labels) for member in found]
    count = len(command.runs)
    ours, theirs = (_Side(found[part], results[part]) for part in (slice(count), slice(count, None)))
    test, reason = _test(ours, theirs)
    if command.json:
        record = {
            "data": dataset.name,
            "split": command.split,
            "precision": "32",
            "runs": ours.to_dict(),
            "against": theirs.to_dict(),
            "reason": reason,
            "test": test.to_dict(),
        }
        show_json(record)
        return 0
    show(f"{dataset.name} {command.split}, {len(split):,} images")
    for name, side in (("runs", ours), ("against", theirs)):
        show(f"{name}:")
        for member, result in zip(side.found, side.results, strict=True):
            show(f"  {member.name}: {result.summary()}")
        if len(side.found) > 1:
            show(f"  {summarise(side.errors).summary()}")
    show(reason)
    show(test.summary(*(f"by {member.run}" for member in found)) if isinstance(test, McNemar) else test.summary())
    return 0


@dataclass(frozen=True)
class _Side:
    """Some networks and what they get wrong."""

    found: list[Member]
    results: list["Ensemble"]

    @property
    def errors(self) -> list[float]:
        return [result.error_percent for result in self.results]

    @property
    def seeds(self) -> list[int | None]:
        return [member.seed for member in self.found]

    def by_seed(self) -> list[float]:
        """Errors in the order of the seeds, which are known."""
        order = sorted(zip(self.seeds, self.errors, strict=True), key=lambda pair: pair[0] or 0)
        return [error for _, error in order]

    def to_dict(self) -> dict[str, object]:
        from capsnet.evaluation.statistics import summarise

        return {
            "members": [member.to_dict(result) for member, result in zip(self.found, self.results, strict=True)],
            "summary": summarise(self.errors).to_dict(),
        }


def _check(command: _Compare) -> None:
    if not command.runs:
        raise InputError("RUN must be given; got none")
    if not command.against:
        raise InputError("--against must be at least one run; got none")
    if (len(command.runs) == 1) != (len(command.against) == 1):
        raise InputError(
            "--against must be one run for one RUN, and at least two for several, for one alone does not tell its "
            f"spread; got {len(command.against)} for {len(command.runs)}"
        )


def _test(ours: _Side, theirs: _Side) -> tuple["TTest | McNemar", str]:
    """The test that these runs allow, and why it is this one."""
    from capsnet.evaluation.statistics import mcnemar, paired_t, welch_t

    if len(ours.found) == 1:
        return mcnemar(ours.results[0].wrong, theirs.results[0].wrong), "over the images, for there is one run a side"
    hindrance = _hindrance(ours, theirs)
    if hindrance is None:
        seeds = _listed(ours.seeds)
        return paired_t(ours.by_seed(), theirs.by_seed()), f"paired by seed, for both sides have the seeds {seeds}"
    return welch_t(ours.errors, theirs.errors), f"not paired, for {hindrance}"


def _hindrance(ours: _Side, theirs: _Side) -> str | None:
    """Why runs cannot be paired by seed; None if they can."""
    for member in (*ours.found, *theirs.found):
        if member.seed is None:
            return f"the seed of {member.run} is not known"
    for side in (ours, theirs):
        seed, times = Counter(side.seeds).most_common(1)[0]
        if times > 1:
            return f"seed {seed} occurs {times} times on one side"
    if set(ours.seeds) != set(theirs.seeds):
        return f"the seeds differ: {_listed(ours.seeds)} against {_listed(theirs.seeds)}"
    return None


def _listed(seeds: Sequence[int | None]) -> str:
    return ", ".join(map(str, sorted(seed for seed in seeds if seed is not None)))
