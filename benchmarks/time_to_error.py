"""Seconds of training until a run's held-out error is low enough, and the test error of its final weights.

    python -m benchmarks.time_to_error RUN [RUN ...] --errors 1.0 0.7

Each RUN is a finished run directory with validation images, which are evaluated after each epoch, outside the clock.
The test error is that of the weights after the last epoch: no choice is made on it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from capsnet.checkpoints.run_directory import Row, Run
from capsnet.errors import InputError

__all__ = ["main", "seconds_to", "table"]


def main(arguments: list[str]) -> int:
    """Print a table of the runs; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.time_to_error", description=str(__doc__).split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a finished run directory")
    parser.add_argument("--errors", nargs="+", type=float, default=[1.0, 0.7], help="percent of the validation images")
    given = parser.parse_args(arguments)
    try:
        print(table(given.runs, given.errors))
    except InputError as error:
        print(f"benchmarks.time_to_error: error: {error}", file=sys.stderr)
        return 2
    return 0


def table(runs: Sequence[Path], errors: Sequence[float]) -> str:
    """A row for each run, in Markdown."""
    headings = ["run", *(f"s to {error:g} % held out (epochs)" for error in errors), "epochs", "test error %", "on"]
    lines = [headings, ["---"] * len(headings)]
    for path in runs:
        run = Run(path)
        rows, result = run.metrics(), run.result()
        about: dict[str, Any] = {"device": "?", "threads": "?", **result}
        reached = [seconds_to(error, rows, result["train_images"], source=str(path)) for error in errors]
        cells = [f"{seconds:,.0f} ({epochs})" if epochs else "not reached" for seconds, epochs in reached]
        test = f"{result['test']['error_percent']:.2f} ({result['test']['wrong']:,} of {result['test']['total']:,})"
        lines.append([path.name, *cells, str(len(rows)), test, f"{about['device']}, {about['threads']} threads"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def seconds_to(percent: float, rows: Sequence[Row], images: int, *, source: str) -> tuple[float, int]:
    """Seconds of training, and epochs, until the validation error is at most `percent`; (inf, 0) where it never is.

    Raises:
        InputError: no rows, or no validation in them.
    """
    if not rows or any("validation_error_percent" not in row for row in rows):
        raise InputError(f"run {source} must have validation images and finished epochs; it has not")
    seconds = 0.0
    for row in rows:
        seconds += images / row["images_per_second"]
        if row["validation_error_percent"] <= percent:
            return seconds, row["epoch"]
    return float("inf"), 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
