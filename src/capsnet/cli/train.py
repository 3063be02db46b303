"""The verb `train`."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import OmitArgPrefixes

from capsnet import config
from capsnet.cli.printing import show, show_json
from capsnet.config import Config, Options
from capsnet.errors import InputError

__all__ = ["Train"]


@dataclass(frozen=True)
class Train:
    """Train a network on a data set or on your own images, test it once, and write a run directory.

    Examples:
      capsnet train --data mnist --epochs 20 --out runs/mnist
      capsnet train --data path/to/images --image-size 32 --shift 3 --flip
    """

    options: OmitArgPrefixes[Options]
    config: str | None = None
    """Start from this config.yaml; other options on the command line override it."""
    resume: str | None = None
    """Continue the run in this directory, which was interrupted, or with more --epochs."""
    dry_run: bool = False
    """Print configuration, layers, parameters and memory without training."""
    json: bool = False
    """Print the result as JSON."""

    @classmethod
    def starting_from(cls, arguments: Sequence[str]) -> "Train":
        """The defaults of the other options: those of --resume, --config or --preset.

        Raises:
            InputError: more than one of them is given, or the file cannot be read.
        """
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        for name in ("preset", "config", "resume"):
            parser.add_argument(f"--{name}", nargs="?")
        start, _ = parser.parse_known_args(list(arguments))
        given = [f"--{name}" for name, value in vars(start).items() if value is not None]
        if len(given) > 1:
            raise InputError(f"only one of --preset, --config and --resume can be given; got {' and '.join(given)}")
        if start.resume is not None:
            base = _of_run(start.resume)
        elif start.config is not None:
            base = config.read(start.config)
        else:
            base = config.preset(start.preset or "paper")
        return cls(Options(**vars(base)))

    def run(self, line: str) -> int:
        """Train, print the test error."""
        options = Config(**vars(self.options))
        if self.dry_run:
            from capsnet.training.dry_run import dry_run

            show(*dry_run(options).split("\n"))
            return 0

        from capsnet import devices, train

        if self.resume:
            saved = _of_run(self.resume)
            changed = {name: value for name, value in vars(options).items() if value != getattr(saved, name)}
            result = train.resume(self.resume, **changed)
        else:
            result = train.fit(options)
        if not devices.first_process():
            return 0
        paths = {"directory": result.directory, "figure": result.figure, "report": result.report}
        if self.json:
            show_json(
                {"tested": result.tested, **result.test.to_dict()}
                | {name: None if path is None else str(path) for name, path in paths.items()}
            )
            return 0
        show(f"{result.tested} {result.test.summary()}")
        labels = {"directory": "run directory", "figure": "reconstructions", "report": "report"}
        show(*(f"{labels[name]}: {path}" for name, path in paths.items() if path is not None))
        return 0


def _of_run(directory: str) -> Config:
    path = Path(directory) / "config.yaml"
    if not path.exists():
        raise InputError(f"--resume must be a run directory with a config.yaml; got {directory}")
    return config.read(path)
