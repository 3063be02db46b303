"""What a training says while it runs, on stderr: a live bar on a terminal, plain lines elsewhere."""

import sys
import time
from typing import Any

from capsnet.files import Unbroken, visible

__all__ = ["Progress"]

PLAIN_INTERVAL = 30.0  # seconds between lines where there is no terminal


def _say(line: str) -> None:
    print(line, file=Unbroken(), flush=True)


class Progress:
    """Progress of a training of `epochs` with `steps` each; `quiet` in every process but the first."""

    def __init__(self, *, epochs: int, steps: int, quiet: bool) -> None:
        self.epochs, self.steps, self.quiet = epochs, steps, quiet
        self.live = sys.stderr.isatty() and not quiet
        self.last = time.monotonic()

    def __enter__(self) -> "Progress":
        if self.live:
            from rich import progress
            from rich.console import Console

            self.bar = progress.Progress(
                progress.TextColumn("epoch {task.fields[epoch]}"),
                progress.BarColumn(),
                progress.TextColumn("{task.completed}/{task.total} steps, ETA"),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[text]}"),
                console=Console(file=Unbroken()),  # type: ignore[arg-type]
                transient=True,
            )
            self.bar.start()
            self.task = self.bar.add_task("", total=self.epochs * self.steps, epoch="1", text="")
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live:
            self.bar.stop()

    def update(self, epoch: int, step: int, mean: list[float], images_per_second: float) -> None:
        """Tell of a running epoch: finished epochs, its finished steps, and what it has so far.

        `mean` is that of loss, classification loss, reconstruction loss and share of wrong images.
        """
        if self.quiet:
            return
        loss, classification, reconstruction, wrong = mean
        text = (
            f"loss {loss:.4f} (classification {classification:.4f}, reconstruction {reconstruction:.1f}), "
            f"error {100 * wrong:.2f} %, {images_per_second:,.0f} images/s"
        )
        if self.live:
            done = epoch * self.steps + step
            self.bar.update(self.task, completed=done, epoch=f"{epoch + 1}/{self.epochs}", text=text)
        elif time.monotonic() - self.last > PLAIN_INTERVAL and step < self.steps:
            self.last = time.monotonic()
            _say(f"epoch {epoch + 1}/{self.epochs} step {step}/{self.steps}: {text}")

    def note(self, text: str) -> None:
        """Say something of the whole training."""
        if not self.quiet:
            _say(visible(text))

    def epoch(self, row: dict[str, Any], *, best: bool = False) -> None:
        """Tell of a finished epoch; `row` is its row of `metrics.csv`, and `best` whether it is the best so far."""
        if self.quiet:
            return
        error = row.get("validation_error_percent")
        held_out = "" if error is None else f", validation error {error:.2f} %{' (best so far)' * best}"
        line = (
            f"epoch {row['epoch']}/{self.epochs}: loss {row['train_loss']:.4f}, "
            f"train error {row['train_error_percent']:.2f} %{held_out}, "
            f"{row['images_per_second']:,.0f} images/s, {row['seconds']:.0f} s"
        )
        if self.live:
            self.bar.console.print(line, highlight=False)
        else:
            _say(line)
        self.last = time.monotonic()
