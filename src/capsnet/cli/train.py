"""The verb `train`."""

import argparse
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from capsnet import config
from capsnet.cli.parsing import config_of, with_options
from capsnet.cli.printing import say, show, show_json
from capsnet.config import Config
from capsnet.errors import InputError

__all__ = ["Train"]


@dataclass(frozen=True)
class Train:
    """Train a network on a data set or on your own images, test it once, and write a run directory.

    Examples:
      capsnet train --data mnist --epochs 20 --out runs/mnist
      capsnet train --data path/to/images --image-size 32 --shift 3 --flip
    """

    preset: str = "paper"
    """Recipe that the other options start from: paper (its text), authors (its first author's published code), or fast
    (ours: a low error in little time)."""
    model: str = "capsnet"
    """Name of the network (see `capsnet list models`), which decides the options of the model below."""
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
        """The command with the options of a run, and their defaults.

        With --init-from those of the network are the weights' own, unless --model names another one or a file gives
        them.

        Raises:
            InputError: more than one of --preset, --config and --resume is given, or a file cannot be read.
        """
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        for name in ("preset", "config", "resume", "model"):
            parser.add_argument(f"--{name}", nargs="?")
        parser.add_argument("--init-from", "--init_from", nargs="?")
        start, _ = parser.parse_known_args(list(arguments))
        given = [f"--{name}" for name in ("preset", "config", "resume") if getattr(start, name) is not None]
        if len(given) > 1:
            raise InputError(f"only one of --preset, --config and --resume can be given; got {' and '.join(given)}")
        if start.resume is not None:
            base = _of_run(start.resume)
        elif start.config is not None:
            base = config.read(start.config)
        else:
            base = config.preset(start.preset or "paper", model=start.model or "capsnet")
            if start.init_from is not None:
                from capsnet.checkpoints.pretrained import options_of

                theirs = options_of(start.init_from)
                if start.model in (None, theirs["model"]):
                    base = base.changed(**theirs)
        if start.model is not None and start.model != base.model:
            base = base.changed(model=start.model)
        if base.modules:
            from capsnet.models import check_modules

            call, source = ("resume(directory", "resume") if start.resume is not None else ("fit(config", "config")
            check_modules({}, base.modules, call=f"capsnet.{call}", source=f"--{source} {getattr(start, source)}")
        return with_options(cls, base, preset=base.preset, model=base.model)

    def run(self, line: str) -> int:
        """Train, print the test error."""
        options = config_of(self)
        if self.dry_run:
            from capsnet.training.dry_run import dry_run

            show(*dry_run(options).split("\n"))
            return 0

        from capsnet import devices
        from capsnet.checkpoints import run_directory
        from capsnet.training import fit as training

        if self.resume:
            before = _of_run(self.resume).flat()
            changed = {name: value for name, value in options.flat().items() if value != before.get(name)}
            with suppress(InputError):  # of a run that is not finished
                if run_directory.Run(self.resume).result()["epochs"] >= (options.epochs or 0):
                    say(f"capsnet train: no epoch of {self.resume} is left; --epochs N trains it for more")
            result = training.resume(self.resume, **changed)
        else:
            result = training.fit(options)
        if not devices.first_process():
            return 0
        paths = {"directory": result.directory, "figure": result.figure, "report": result.report}
        if self.json:
            show_json(
                {"tested": result.tested, "kept_epoch": result.kept_epoch, "selection": result.selection}
                | result.test.to_dict()
                | {name: None if path is None else str(path) for name, path in paths.items()}
            )
            return 0
        show(f"{result.tested} {result.test.summary()}")
        if not result.selection.startswith("none"):
            show(result.selection)
        labels = {"directory": "run directory", "figure": "reconstructions", "report": "report"}
        show(*(f"{labels[name]}: {path}" for name, path in paths.items() if path is not None))
        return 0


def _of_run(directory: str) -> Config:
    path = Path(directory) / "config.yaml"
    if not path.exists():
        raise InputError(f"--resume must be a run directory with a config.yaml; got {directory}")
    return config.read(path)
