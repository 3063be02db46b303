"""The verb `reproduce`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from capsnet.cli.parsing import Range, parse
from capsnet.cli.printing import say, show
from capsnet.config import Device

__all__ = ["run"]


@dataclass(frozen=True)
class _Reproduce:
    """Train and measure an experiment of the papers: what is not in the records yet, row by row, seed by seed.

    Experiments: table1 (MNIST with and without reconstruction, by routing iterations), recipes (the paper's text, its
    authors' code, and every difference alone), multimnist, affnist, cifar10, fashion-mnist, svhn, smallnorb.

    Stopped or killed, the same command goes on. Records go to results/experiments/NAME-BUDGET.jsonl, run directories to
    runs/experiments.

    Examples:
      capsnet reproduce multimnist --budget quick
      capsnet reproduce table1 --budget cpu --seeds 2 --rows capsnet-3-reconstruction
    """

    name: Positional[Annotated[str, arg(metavar="NAME")]]
    """Of the experiment."""
    seeds: Annotated[int | None, Range(1, 1_000)] = None
    """Trainings of each row, with seeds 0, 1, ...; default: as many as the paper's, or 3; 1 with --budget quick."""
    budget: Literal["quick", "cpu", "full"] = "full"
    """full: the published sizes, for a GPU. cpu: fewer epochs, and smaller layers where the table says so.
    quick: tiny, in a minute or two, to see that it works; its numbers mean nothing."""
    rows: tuple[str, ...] = ()
    """These rows only."""
    list: bool = False
    """Print the table of what there is, and train nothing."""
    results: str = "results/experiments"
    """Folder of the records."""
    runs: str = "runs/experiments"
    """Folder of the run directories."""
    data_dir: str | None = None
    """Where downloaded files are."""
    device: Device = "auto"
    """auto: a CUDA GPU if there is one; mps (untested) on a Mac."""
    threads: Annotated[int | None, Range(1, 1_024)] = None
    """CPU threads."""


def run(arguments: list[str]) -> int:
    """Reproduce an experiment, print its table."""
    command = parse(_Reproduce, arguments, prog="capsnet reproduce")
    from capsnet import train
    from capsnet.experiments import plan
    from capsnet.experiments.reproduce import reproduce
    from capsnet.experiments.tables import SHOWN, render

    experiment = plan.experiment(command.name)
    folder, budget = Path(command.results), command.budget
    if command.list:
        budgets = [budget] if any(word.startswith("--budget") for word in arguments) else SHOWN
        show(experiment.title, "", *render(experiment, folder, budgets=budgets).splitlines())
        return 0
    seeds = command.seeds if command.seeds is not None else 1 if budget == "quick" else experiment.seeds
    try:
        reproduce(
            experiment,
            budget=budget,
            seeds=seeds,
            rows=command.rows,
            folder=folder,
            runs_folder=Path(command.runs),
            say=say,
            device=command.device,
            threads=command.threads,
            data_dir=command.data_dir,
        )
    except train.Interrupted as stop:
        say(f"capsnet reproduce: {str(stop).partition(';')[0]}; the same command goes on")
        return 128 + stop.signal_number
    except train.Diverged as error:
        say(f"capsnet reproduce: error: {error}")
        return 1
    show(experiment.title, "", *render(experiment, folder, budgets=[budget]).splitlines())
    return 0
