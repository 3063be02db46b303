"""The command line: parse, call a library function, print. Results go to stdout, progress and errors to stderr.

Exit codes: 0 success, 1 a training that diverged, 2 wrong input (one line), 129 SIGHUP, 130 Ctrl-C, 143 SIGTERM.
Nothing heavy is imported before it is needed, so that --help is instant.
"""

import difflib
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from capsnet import __version__
from capsnet.cli.parsing import as_options
from capsnet.cli.printing import begin, end, say, show
from capsnet.errors import InputError

__all__ = ["main"]

VERBS = {
    "train": "train",
    "evaluate": "evaluate",
    "compare": "compare",
    "predict": "predict",
    "demo": "demo",
    "export": "export",
    "reconstruct": "reconstruct",
    "perturb": "perturb",
    "couplings": "couplings",
    "factors": "factors",
    "figures": "figures",
    "report": "report",
    "strangers": "strangers",
    "attack": "attack",
    "reproduce": "reproduce",
    "list": "listing",
}
"""Verb and the module of this package whose `run(arguments)` it is."""

HELP = f"""capsnet {__version__}: capsule networks, "Dynamic Routing Between Capsules" (Sabour, Frosst, Hinton 2017)

usage: capsnet VERB [OPTIONS]     (capsnet VERB --help tells more)

  train        train a network on a data set or on your own images, and test it
  evaluate     error, interval, per-class table and confusion matrix of a network; several as an ensemble
  compare      errors of some runs against those of others: the test, its p value and interval

  predict      what image files show: class, presence, reconstruction error
  demo         a page in the browser: draw, and see what the capsules see
  export       ONNX, PyTorch's export, or safetensors, checked against the original

  reconstruct  images beside what the decoder makes of them, right and wrong ones apart
  perturb      what each dimension of a class capsule means
  couplings    where the winning capsule's evidence comes from, by routing iteration
  factors      how much of the true pose the capsules hold, beside a network without
  figures      curves, errors by class, confusion, wrong images, lengths, calibration
  report       all of it in one HTML file

  strangers    how well images of no known class are told by their bad reconstruction
  attack       white-box attacks (FGSM, PGD): how many succeed, how many are told

  reproduce    an experiment of the papers by its name: what is missing is trained, and a table printed

  list         what there is: models, weights, data, presets, experiments

examples:
  capsnet train
  capsnet train --data mnist --epochs 50 --out runs/mnist
  capsnet predict capsnet-mnist photo-of-a-digit.jpg
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; `arguments` are those of the process if not given. Returns the exit code."""
    begin()
    try:
        return _run(list(sys.argv[1:] if arguments is None else arguments))
    finally:
        end()


def _run(arguments: list[str]) -> int:
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large arrays on huge pages: fewer page faults
    verb = arguments[0] if arguments else ""
    try:
        if verb in ("", "-h", "--help"):
            show(*HELP.splitlines())
            return 0 if verb else 2
        if verb == "--version":
            show(f"capsnet {__version__}")
            return 0
        if verb not in VERBS:
            near = difflib.get_close_matches(verb, VERBS, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise InputError(f"verb must be one of {', '.join(VERBS)}; got {verb!r}{hint}")
        return int(import_module(f"capsnet.cli.{VERBS[verb]}").run(arguments[1:]))
    except InputError as error:
        say(f"capsnet {verb}: error: {as_options(str(error))}" if verb in VERBS else f"capsnet: error: {error}")
        return 2
    except KeyboardInterrupt:
        say(f"capsnet {verb}: interrupted")
        return 130
    except BrokenPipeError:  # `capsnet list data | head`
        return 0
    except OSError as error:
        if error.filename is None:
            raise
        say(f"capsnet {verb}: error: {error.filename} must be a file or folder that can be used; got: {error.strerror}")
        return 2
