"""The verb `train`."""

from dataclasses import dataclass, fields

from tyro.conf import OmitArgPrefixes

from capsnet.cli.parsing import parse, start
from capsnet.cli.printing import say, show, show_json
from capsnet.config import Config

__all__ = ["run"]


TRAIN_HELP = """usage: capsnet train [OPTIONS]

Train a network, test it once at the end, and keep everything in one run directory.

  --data NAME|FOLDER         data set (capsnet list data) or a folder of images, a sub-folder a class   [strokes]
  --data-dir DIR             the only place to look for its files; else CAPSNET_DATA, the cache, then mirrors
  --image-size N             resize images to N x N pixels; --channels 1|3 makes them grey or colour
  --validation N             training images held out; 0 trains on all   [the set's own, else a tenth, at most 5,000]
  --shift N                  move training images by up to N pixels   [2]; also --flip --rotation --scale --shear
  --model NAME               capsnet or baseline   [capsnet]
  --preset NAME              paper or authors: the recipe all other options start from   [paper]
  --routing-iterations N     r   [3]
  --no-reconstruction        train without the decoder; --reconstruction-weight, --mask label|prediction
  --epochs N                 [3; more for few images of your own]; --batch-size N over all devices together [128]
  --lr X                     learning rate at the start [0.001]; --seed N [0]
  --device auto|cpu|cuda|mps --devices N processes [1]; --precision auto|32|bf16 of the convolutions [auto]; mps is
                             untested
  --out DIR                  run directory   [runs/DATA-MODEL-seedN]; --overwrite replaces the run in it
  --config FILE              start from a config.yaml; options given beside it win
  --resume DIR               go on with a run that was stopped or killed, or with more --epochs
  --dry-run                  print configuration, layers, parameters and memory, and train nothing
  --tensorboard              write TensorBoard files too; --no-report: no report.html; --json prints the result as JSON
  --help-all                 every option: sizes of all layers, margins, learning-rate decay, checkpoints ...

examples:
  capsnet train --data mnist --epochs 20 --out runs/mnist
  capsnet train --data path/to/images --image-size 32 --shift 3 --flip
"""


@dataclass(frozen=True)
class _Train:
    run: OmitArgPrefixes[Config]
    config: str | None = None
    """Start from this config.yaml; options given beside it win."""
    resume: str | None = None
    """Go on with the run in this directory."""
    dry_run: bool = False
    """Print configuration, layers, parameters and memory, and train nothing."""
    json: bool = False
    """Print the result as JSON."""


def run(arguments: list[str]) -> int:
    """Train, print the test error; see TRAIN_HELP."""
    if {"-h", "--help"} & set(arguments):
        show(*TRAIN_HELP.splitlines())
        return 0
    base, resumed = start(arguments, "--preset", "--config", "--resume")
    arguments = ["--help" if argument == "--help-all" else argument for argument in arguments]
    command = parse(_Train, arguments, prog="capsnet train", default=_Train(base))
    options = command.run
    if command.dry_run:
        from capsnet.training.dry_run import dry_run

        show(*dry_run(options).split("\n"))
        return 0

    from capsnet import machine, train

    try:
        if resumed:
            changed = {
                field.name: getattr(options, field.name)
                for field in fields(Config)
                if getattr(options, field.name) != getattr(base, field.name)
            }
            result = train.resume(resumed, **changed)
        else:
            result = train.fit(options)
    except train.Interrupted as stop:
        say(f"capsnet train: {stop}")
        return 128 + stop.signal_number
    except train.Diverged as error:
        say(f"capsnet train: error: {error}")
        return 1
    if not machine.first_process():
        return 0
    if command.json:
        files = {
            "directory": str(result.directory),
            "figure": str(result.figure) if result.figure else None,
            "report": str(result.report) if result.report else None,
        }
        show_json({"tested": result.tested, **result.test.to_dict(), **files})
        return 0
    show(f"{result.tested} {result.test.summary()}")
    show(f"run directory: {result.directory}")
    if result.figure:
        show(f"reconstructions: {result.figure}")
    if result.report:
        show(f"report: {result.report}")
    return 0
