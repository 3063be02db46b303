"""The verb `report`."""

from dataclasses import dataclass

from capsnet.cli.parsing import DataDir, Model
from capsnet.cli.printing import show
from capsnet.cli.trained_model import TrainedModel

__all__ = ["Report"]


@dataclass(frozen=True)
class Report:
    """Write one self-contained HTML file with all figures and numbers of a trained network.

    A training writes it too, at its end (unless --no-report).

    Examples:
      capsnet report runs/mnist
      capsnet report capsnet-mnist --out mnist.html
    """

    model: Model
    data: str | None = None
    """Data set or folder; default: the network's own. It is read as the network's own was."""
    data_dir: DataDir = None
    out: str | None = None
    """File to write; default: report.html in the run directory, otherwise MODEL-report.html here."""
    overwrite: bool = False
    """Replace an existing file."""

    def run(self, line: str) -> int:
        """Write the report, print where."""
        from capsnet.files import write_atomically
        from capsnet.report import render

        trained = TrainedModel(self.model, several=True)
        path = trained.place("report", self.out, suffix="html", overwrite=self.overwrite)
        if self.out is None and trained.is_run:
            path = trained.folder / "report.html"
        dataset = trained.dataset(self.data, self.data_dir)
        content = render(
            trained.network,
            dataset,
            trained.predictions(dataset.test),
            config=trained.trained(self.data),
            card=trained.card,
            title=trained.folder.resolve().name,
            rows=trained.run.metrics(),
            result=trained.run.result() if trained.run.result_path.is_file() else None,
        )
        write_atomically(path, lambda place: place.write_text(content, encoding="utf-8"))
        show(f"report: {path}")
        return 0
