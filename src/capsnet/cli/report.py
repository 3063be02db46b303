"""The verb `report`."""

from dataclasses import dataclass

from capsnet.cli.parsing import parse
from capsnet.cli.printing import show
from capsnet.cli.subject import Model, Subject

__all__ = ["run"]


@dataclass(frozen=True)
class _Report:
    """Write everything that can be seen of a trained network to one HTML file, which loads nothing from elsewhere.

    A training writes it too, at its end (unless --no-report).

    Examples:
      capsnet report runs/mnist
      capsnet report capsnet-mnist --out mnist.html
    """

    model: Model
    """Run directory, folder with weights, or the name of weights that come with the package."""
    data: str | None = None
    """Another data set or folder, read as the network's own was."""
    data_dir: str | None = None
    """Where downloaded files are."""
    out: str | None = None
    """Where it goes; default: report.html in the run directory, else MODEL-report.html here."""
    overwrite: bool = False
    """Replace the file --out."""


def run(arguments: list[str]) -> int:
    """Write the report, print where."""
    command = parse(_Report, arguments, prog="capsnet report")
    from capsnet import runs
    from capsnet.report import render

    subject = Subject(command.model, several=True)
    path = subject.place("report", command.out, suffix="html", overwrite=command.overwrite)
    if command.out is None and subject.is_run:
        path = subject.folder / "report.html"
    dataset = subject.dataset(command.data, command.data_dir)
    files = runs.Run(subject.folder)
    content = render(
        subject.network,
        dataset,
        config=subject.trained(command.data),
        card=subject.card,
        title=subject.folder.resolve().name,
        rows=files.metrics(),
        result=files.result() if files.result_path.is_file() else None,
    )
    runs.write_atomically(path, lambda place: place.write_text(content, encoding="utf-8"))
    show(f"report: {path}")
    return 0
