"""The verb `reproduce`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from capsnet.cli.parsing import DataDir, Device, Range
from capsnet.cli.printing import say, show

__all__ = ["Reproduce"]


@dataclass(frozen=True)
class Reproduce:
    """Train and evaluate an experiment of the papers: the rows and seeds that the records do not have yet.

    Experiments: see `capsnet list experiments`.

    The same command continues an interrupted one. Records go to results/experiments/NAME-BUDGET.jsonl, run directories
    to runs/experiments.

    Examples:
      capsnet reproduce multimnist --budget quick
      capsnet reproduce table1 --budget cpu --seeds 2 --rows capsnet-3-reconstruction
    """

    name: Positional[Annotated[str, arg(metavar="NAME")]]
    """Name of the experiment."""
    seeds: Annotated[int | None, Range(1, 1_000)] = None
    """Trainings of each row, with seeds 0, 1, ...; default: as many as the paper's, or 3; 1 with --budget quick."""
    budget: Literal["quick", "cpu", "full"] | None = None
    """full, the default: the published sizes, for a GPU. cpu: fewer epochs, and smaller layers where the table says so.
    quick: tiny, in a minute or two, to see that it works; its numbers mean nothing."""
    rows: tuple[str, ...] = ()
    """Only these rows of the experiment; default: all."""
    list: bool = False
    """Print the table of the existing records without training."""
    results: str = "results/experiments"
    """Folder of the records."""
    runs: str = "runs/experiments"
    """Folder of the run directories."""
    data_dir: DataDir = None
    device: Device = "auto"
    threads: Annotated[int | None, Range(1, 1_024)] = None
    """Number of CPU threads; default: PyTorch's."""

    def run(self, line: str) -> int:
        """Reproduce an experiment, print its table."""
        from capsnet.experiments import plan
        from capsnet.experiments.reproduce import reproduce
        from capsnet.experiments.tables import SHOWN, render

        experiment = plan.experiment(self.name)
        folder, budget = Path(self.results), self.budget or "full"
        if self.list:
            budgets = SHOWN if self.budget is None else [budget]
            show(experiment.title, "", *render(experiment, folder, budgets=budgets).splitlines())
            return 0
        seeds = self.seeds if self.seeds is not None else 1 if budget == "quick" else experiment.seeds
        reproduce(
            experiment,
            budget=budget,
            seeds=seeds,
            rows=self.rows,
            folder=folder,
            runs_folder=Path(self.runs),
            say=say,
            device=self.device,
            threads=self.threads,
            data_dir=self.data_dir,
        )
        show(experiment.title, "", *render(experiment, folder, budgets=[budget]).splitlines())
        return 0
