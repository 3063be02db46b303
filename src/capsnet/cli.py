"""The command line: parse, call a library function, print. Results go to stdout, progress and errors to stderr.

Exit codes: 0 success, 1 a training that diverged, 2 wrong input (one line), 130 Ctrl-C, 143 SIGTERM. Nothing heavy is
imported before it is needed, so that --help is instant.
"""

import argparse
import contextlib
import difflib
import io
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from capsnet import __version__, config
from capsnet.config import Config
from capsnet.errors import InputError

if TYPE_CHECKING:
    from capsnet.evaluation import Evaluation

__all__ = ["main"]

HELP = f"""capsnet {__version__}: capsule networks, "Dynamic Routing Between Capsules" (Sabour, Frosst, Hinton 2017)

usage: capsnet VERB [OPTIONS]     (capsnet VERB --help tells more)

  train       train a network on a data set or on your own images, and test it
  evaluate    error, interval, per-class table and confusion matrix of a trained network
  list        what there is: models, data, presets
  bench       speed, memory and exactness of a network on this machine, and comparisons

examples:
  capsnet train
  capsnet train --data mnist --epochs 50 --out runs/mnist
"""

TRAIN_HELP = """usage: capsnet train [OPTIONS]

Train a network, test it once at the end, and keep everything in one run directory.

  --data NAME|FOLDER         data set (capsnet list data) or a folder of images, a sub-folder a class   [strokes]
  --data-dir DIR             where downloaded files are; else CAPSNET_DATA, the cache, then mirrors
  --image-size N             resize images to N x N pixels; --channels 1|3 makes them grey or colour
  --validation N             training images held out; 0 trains on all   [the set's own, else a tenth, at most 5,000]
  --shift N                  move training images by up to N pixels   [2]; also --flip --rotation --scale --shear
  --model NAME               capsnet or baseline   [capsnet]
  --preset NAME              paper or authors: the recipe all other options start from   [paper]
  --routing-iterations N     r   [3]
  --no-reconstruction        train without the decoder; --reconstruction-weight, --mask label|prediction
  --epochs N                 [3]; --batch-size N over all devices together [128]; --lr X [0.001]; --seed N [0]
  --device auto|cpu|cuda     --devices N processes   [1]; --precision auto|32|bf16 of the convolutions   [auto]
  --out DIR                  run directory   [runs/DATA-MODEL-seedN]; --overwrite replaces the run in it
  --config FILE              start from a config.yaml; options given beside it win
  --resume DIR               go on with a run that was stopped or killed, or with more --epochs
  --dry-run                  print configuration, layers, parameters and memory, and train nothing
  --tensorboard              write TensorBoard files too; --json prints the result as JSON
  --help-all                 every option: sizes of all layers, margins, learning-rate decay, checkpoints ...

examples:
  capsnet train --data mnist --epochs 20 --out runs/mnist
  capsnet train --data path/to/images --image-size 32 --shift 3 --flip
"""


BENCH_HELP = """usage: capsnet bench [WHAT ...] [OPTIONS]

Measure a network on this machine. Its results are first compared with float64; a wrong one gets no number. Every
number is a median with the smallest, the largest and n; variants are measured in turn, A B A B, in one process.

  WHAT                       of these   [ceilings step inference parts]
    ceilings                 the machine's best matrix products (float32, bf16) and memory copy
    step                     training steps, and their peak memory
    inference                batches of 1, 128 and 512
    parts                    a step's parts: data, convolutions, votes + routing, decoder, loss, optimiser
    routing                  votes + routing alone, with every kernel, detached too, and their memory
    scaling                  in batch, image size, primary and output capsules, iterations (some minutes)
  --compare FIELD=A,B[,C]    measure variants of one option, and their ratios to the first: kernel=plain,auto
  --repeats N                measurements of each number   [7]
  --quick                    small sizes and 2 repeats: to try it out
  --preset NAME              or --config FILE, such as a run's: what all other options start from   [paper]
  --model NAME               capsnet or baseline   [capsnet]; --routing-iterations N   [3], and all other sizes
  --image-size N             [28]; --channels 1|3   [1]; --classes N   [10]; --batch-size N of a step   [128]
  --kernel --stem            how routing and convolutions are computed; --detach-routing
  --device auto|cpu|cuda     --precision auto|32|bf16; --threads N
  --out FILE.json            keep the record; --overwrite replaces it; --json prints it in place of the tables
  --help-all                 every option

examples:
  capsnet bench
  capsnet bench step parts --compare stem=direct,minimal --threads 1 --out results/bench/stem.json
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


@dataclass(frozen=True)
class _Bench:
    run: OmitArgPrefixes[Config]
    what: Positional[tuple[Literal["ceilings", "step", "inference", "parts", "routing", "scaling"], ...]] = (
        "ceilings",
        "step",
        "inference",
        "parts",
    )
    """What to measure."""
    config: str | None = None
    """Start from this config.yaml; options given beside it win."""
    classes: int = 10
    """Number of classes."""
    repeats: int | None = None
    """Measurements of each number; default 7, with --quick 2."""
    compare: str | None = None
    """FIELD=A,B[,C]: measure these variants in turn."""
    quick: bool = False
    """Small sizes and 2 repeats."""
    json: bool = False
    """Print the record as JSON."""


@dataclass(frozen=True)
class _Evaluate:
    """Error with its 95 % interval, per-class table, confusion matrix and losses of a trained network.

    Examples:
      capsnet evaluate runs/mnist
      capsnet evaluate runs/mnist --split train --json
    """

    run: Positional[str]
    """Run directory, or a folder with config.json and model.safetensors."""
    data: str | None = None
    """Another data set or folder with as many classes, read as the run's own was; images must be of the same shape."""
    data_dir: str | None = None
    """Where downloaded files are."""
    split: Literal["test", "validation", "train"] = "test"
    """Which part of the data set."""
    batch_size: int = 256
    """Images at a time; only memory and speed depend on it."""
    precision: Literal["auto", "32", "bf16"] | None = None
    """Of convolutions and decoder; default: that of the run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    json: bool = False
    """Print everything as JSON."""


@dataclass(frozen=True)
class _List:
    """Show what there is.

    Examples:
      capsnet list data
      capsnet list models --json
    """

    what: Positional[Literal["models", "data", "presets"]]
    """Of what."""
    data_dir: str | None = None
    """Look for data files here first."""
    json: bool = False
    """Print as JSON."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; `arguments` are those of the process if not given. Returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large arrays on huge pages: fewer page faults
    verbs: dict[str, Callable[[list[str]], int]] = {
        "train": _train,
        "evaluate": _evaluate,
        "list": _list,
        "bench": _bench,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"capsnet {__version__}")
        return 0
    verb = arguments[0]
    try:
        if verb not in verbs:
            near = difflib.get_close_matches(verb, verbs, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise InputError(f"verb must be one of {', '.join(verbs)}; got {verb!r}{hint}")
        return verbs[verb](arguments[1:])
    except InputError as error:
        _say(f"capsnet {verb}: error: {_as_options(str(error))}" if verb in verbs else f"capsnet: error: {error}")
        return 2
    except KeyboardInterrupt:
        _say(f"capsnet {verb}: interrupted")
        return 130
    except BrokenPipeError:  # `capsnet list data | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _train(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(TRAIN_HELP, end="")
        return 0
    base, resumed = _start(arguments, "--preset", "--config", "--resume")
    arguments = ["--help" if argument == "--help-all" else argument for argument in arguments]
    command = _parse(_Train, arguments, prog="capsnet train", default=_Train(base))
    options = command.run
    if command.dry_run:
        from capsnet.summary import dry_run

        print(dry_run(options))
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
        _say(f"capsnet train: {stop}")
        return 128 + stop.signal_number
    except train.Diverged as error:
        _say(f"capsnet train: error: {error}")
        return 1
    if not machine.first_process():
        return 0
    if command.json:
        files = {"directory": str(result.directory), "figure": str(result.figure) if result.figure else None}
        print(json.dumps({**result.test.to_dict(), **files}, indent=2))
        return 0
    print(f"test {result.test.summary()}")
    print(f"run directory: {result.directory}")
    if result.figure:
        print(f"reconstructions: {result.figure}")
    return 0


def _start(arguments: list[str], *starts: str) -> tuple[Config, str | None]:
    """The configuration that the other options change, and the run directory to go on with, if any."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for option in ("--preset", "--config", "--resume"):
        if option in starts:
            parser.add_argument(option, default=None)
    parser.set_defaults(preset=None, config=None, resume=None)
    try:
        known, _ = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise InputError(str(error)) from None
    given = [f"--{name}" for name, value in vars(known).items() if value is not None]
    if len(given) > 1:
        raise InputError(f"only one of --preset, --config and --resume can be the start; got {' and '.join(given)}")
    if known.resume is not None:
        path = Path(known.resume) / "config.yaml"
        if not path.exists():
            raise InputError(f"--resume must be a run directory with a config.yaml; got {known.resume}")
        return config.read(path), known.resume
    if known.config is not None:
        return config.read(known.config), None
    return config.preset(known.preset or "paper"), None


def _evaluate(arguments: list[str]) -> int:
    command = _parse(_Evaluate, arguments, prog="capsnet evaluate")
    if command.batch_size < 1:
        raise InputError(f"batch_size must be at least 1; got {command.batch_size}")
    from capsnet import machine, runs, train
    from capsnet.evaluation import evaluate

    network = runs.load(command.run)
    run = runs.Run(command.run)
    if run.config_path.exists():
        trained = run.config()
    elif command.data is None:
        raise InputError(f"--data must be given for {command.run}, which does not say what it was trained on")
    else:
        channels, height, width = network.image_shape
        trained = Config(image_size=height if height == width else None, channels=channels)
    options = replace(
        trained,
        data=command.data or trained.data,
        data_dir=command.data_dir or trained.data_dir,
        validation=trained.validation if command.data is None or command.split == "validation" else 0,
        device=command.device,
        precision=command.precision or trained.precision,
        devices=1,
    )
    dataset = train.prepare_data(options)
    unnamed = network.classes == tuple(str(k) for k in range(len(dataset.classes)))
    if dataset.classes != network.classes and not unnamed:
        raise InputError(
            f"data set {dataset.name} must have the {len(network.classes)} classes of the network, "
            f"{_some(network.classes)}; got {len(dataset.classes)}, {_some(dataset.classes)}"
        )
    split = getattr(dataset, command.split)
    if split is None:
        raise InputError(f"data set {dataset.name} must have a validation split; the run trained on all images")
    device = machine.resolve_device(options)
    precision = machine.resolve_precision(options, device, network)
    result = evaluate(network.to(device), split, config=trained, batch_size=command.batch_size, precision=precision)
    if command.json:
        where = {"run": command.run, "data": dataset.name, "split": command.split, "precision": precision}
        print(json.dumps({**where, **result.to_dict()}, indent=2))
    else:
        print(f"{dataset.name} {command.split} {result.summary()}")
        print(_losses(result))
        _print_tables(result)
    return 0


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def _losses(result: "Evaluation") -> str:
    return (
        f"loss {result.loss:.5f}: classification {result.classification_loss:.5f}, "
        f"reconstruction {result.reconstruction_loss:.2f} (summed squared error an image, unweighted)"
    )


def _print_tables(result: "Evaluation") -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    table = Table()
    for heading in ("class", "images", "wrong", "error %", "others taken for it"):
        table.add_column(heading, justify="left" if heading == "class" else "right")
    for row in result.per_class():
        error = "-" if row["error_percent"] is None else f"{row['error_percent']:.2f}"
        table.add_row(row["class"], f"{row['images']:,}", str(row["wrong"]), error, str(row["taken_for_it"]))
    print("per class:")
    console.print(table)
    if len(result.classes) > 30:
        print(f"confusion matrix: {len(result.classes)} classes are too many to print; see --json")
        return
    print("confusion matrix, true class in rows and predicted class in columns:")
    matrix = Table()
    for heading in ("", *result.classes):
        matrix.add_column(heading, justify="right")
    for name, counts in zip(result.classes, result.confusion, strict=True):
        matrix.add_row(name, *(str(count) if count else "." for count in counts))
    console.print(matrix)


def _list(arguments: list[str]) -> int:
    command = _parse(_List, arguments, prog="capsnet list")
    rows = {"models": _models, "data": lambda: _data(command.data_dir), "presets": _presets}[command.what]()
    if command.json:
        print(json.dumps(rows, indent=2))
        return 0
    for row in rows:
        name, *rest = row.items()
        print(name[1])
        for key, value in rest:
            print(f"  {key}: {value}")
    return 0


def _bench(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(BENCH_HELP, end="")
        return 0
    base, _ = _start(arguments, "--preset", "--config")
    arguments = ["--help" if argument == "--help-all" else argument for argument in arguments]
    command = _parse(_Bench, arguments, prog="capsnet bench", default=_Bench(base))
    config = command.run

    from capsnet import bench

    for name in bench.UNUSED:
        if name not in ("preset", "out", "overwrite") and getattr(config, name) != getattr(base, name):
            raise InputError(f"{name} must not be given to capsnet bench, which it does not concern")
    if config.out is not None:
        bench.check_free(Path(config.out), overwrite=config.overwrite)
    plan = bench.QUICK if command.quick else bench.FULL
    if command.repeats is not None:
        plan = replace(plan, repeats=command.repeats)
    if command.quick:
        config = replace(config, batch_size=min(8, config.batch_size))
    try:
        record = bench.run(
            config,
            command.what,
            classes=command.classes,
            variants=bench.parse_compare(command.compare, config) if command.compare else (),
            plan=plan,
            command=shlex.join(["capsnet", "bench", *arguments]),
            tell=_say,
        )
    except bench.Incorrect as error:
        _say(f"capsnet bench: error: {error}")
        return 1
    if command.json:
        print(json.dumps(record, indent=2))
    else:
        bench.show(record, width=None if sys.stdout.isatty() else 160)
    if config.out is not None:
        bench.write(record, Path(config.out), overwrite=config.overwrite)
        _say(f"record: {config.out}")
    return 0


def _models() -> list[dict[str, Any]]:
    import torch

    from capsnet import models

    rows: list[dict[str, Any]] = []
    for name in models.available():
        with torch.device("meta"):
            count = models.create(name).parameter_count()
        summary = (models.BUILDERS[name].__doc__ or "").splitlines()[0]
        rows.append({"name": name, "what": summary, "parameters on MNIST": f"{count:,}"})
    return rows


def _data(data_dir: str | None) -> list[dict[str, Any]]:
    from capsnet import data

    rows: list[dict[str, Any]] = []
    for name in data.available():
        about = data.describe(name, data_dir=data_dir)
        channels, height, width = about.image_shape
        if name == "strokes":
            here = "yes (drawn when needed)"
        elif about.missing:
            here = "no (missing: " + ", ".join(about.missing) + ")"
        else:
            here = "yes: " + ", ".join(sorted({str(path.parent) for path in about.where}))
        rows.append(
            {
                "name": name,
                "images": f"{about.train:,} train, {about.test:,} test; {channels} x {height} x {width}",
                "classes": f"{len(about.classes)}: {', '.join(about.classes)}",
                "licence": about.licence,
                "source": about.source,
                "on this machine": here,
            }
        )
    return rows


def _presets() -> list[dict[str, Any]]:
    about = {
        "paper": "the text of Sabour, Frosst, Hinton 2017; all defaults",
        "authors": "the first author's published code, https://github.com/Sarasra/models",
    }
    return [
        {"name": name, "what": about[name], **{f"--{key.replace('_', '-')}": v for key, v in changes.items()}}
        for name, changes in config.PRESETS.items()
    ]


T = TypeVar("T")


def _parse(kind: type[T], arguments: list[str], *, prog: str, default: T | None = None) -> T:
    """Parse with tyro; a fault is raised as an InputError of one line in place of its box."""
    faults = io.StringIO()
    try:
        with contextlib.redirect_stderr(faults):
            return tyro.cli(
                kind, args=arguments, prog=prog, default=tyro.MISSING_NONPROP if default is None else default
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise InputError(_one_line(faults.getvalue(), kind, prog)) from None


def _one_line(box: str, kind: type, prog: str) -> str:
    """What tyro says in a box of several lines, in our own grammar; what is not known here is passed on as it is."""
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    parts = "\n".join("" if re.fullmatch("[-─╰╯]+", line) else line for line in lines).strip().split("\n\n")
    told = " ".join(parts[0].splitlines())
    if found := re.fullmatch(r"Unrecognized options: (.*)", told):
        options = [f"--{field.name.replace('_', '-')}" for part in (kind, Config) for field in fields(part)]
        given = found[1].replace(",", "")
        near = difflib.get_close_matches(given.split()[0].split("=")[0], options, n=1, cutoff=0.7)
        hint = f" (did you mean {near[0]}?)" if near else ""
        return f"{given} must be among the options of {prog}{hint}"
    if told.startswith("Missing from"):
        return f"{fields(kind)[0].name.upper()} must be given; got none"
    if found := re.fullmatch(r"Missing value for argument '(\S+)'.*", told):
        return f"{found[1]} must be followed by a value; got none"
    if found := re.fullmatch(r"invalid choice (.*) for argument '(\S+)'\. Expected one of \((.*)\)\.", told):
        return f"{found[2]} must be one of {found[3].replace(chr(39), '')}; got {found[1]}"
    if found := re.fullmatch(r"Error parsing (--\S+): (?:invalid literal for int|could not convert).*: (.*)", told):
        return f"{found[1]} must be a {'whole ' if 'literal for int' in told else ''}number; got {found[2]}"
    if found := re.fullmatch(r"Error parsing (--\S+): Could not find valid parse for arguments: \[(.*)\]", told):
        return f"{found[1]} must be whole numbers; got {found[2]}"
    return told.removeprefix("Error parsing run: ")


def _as_options(text: str) -> str:
    """Fields of the configuration as they are typed: `batch_size must ...` is told as `--batch-size must ...`."""
    names = "|".join([*(field.name for field in fields(Config)), "classes", "repeats", "compare"])
    pattern = rf"(^|; and )({names})(?= must | of (?!model))"
    return re.sub(pattern, lambda found: f"{found[1]}--{found[2].replace('_', '-')}", text)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
