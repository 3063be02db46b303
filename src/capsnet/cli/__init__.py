"""The command line: parse, call a library function, print. Results go to stdout, progress and errors to stderr.

Exit codes: 0 success, 1 a training that diverged, 2 wrong input, 129 SIGHUP, 130 Ctrl-C, 143 SIGTERM.
Nothing heavy is imported before it is needed, so that --help is instant.
"""

import os
import shlex
import sys
from collections.abc import Sequence

from capsnet import __version__
from capsnet.cli.analyse import ANALYSE
from capsnet.cli.demo import Demo
from capsnet.cli.evaluate import Evaluate
from capsnet.cli.export import Export
from capsnet.cli.listing import List
from capsnet.cli.parsing import Group, flagged, parse
from capsnet.cli.plot import PLOT
from capsnet.cli.predict import Predict
from capsnet.cli.printing import begin, end, say, show
from capsnet.cli.report import Report
from capsnet.cli.reproduce import Reproduce
from capsnet.cli.train import Train
from capsnet.errors import Diverged, InputError, Interrupted

__all__ = ["CAPSNET", "main"]

CAPSNET = Group(
    f"""capsnet {__version__}: capsule networks, "Dynamic Routing Between Capsules" (Sabour, Frosst, Hinton 2017).

    Examples:
      capsnet train
      capsnet train --data mnist --epochs 50 --out runs/mnist
      capsnet predict capsnet-mnist photo-of-a-digit.jpg
      capsnet plot reconstructions runs/mnist
    """,
    {
        "train": Train,
        "evaluate": Evaluate,
        "predict": Predict,
        "plot": PLOT,
        "analyse": ANALYSE,
        "report": Report,
        "export": Export,
        "demo": Demo,
        "reproduce": Reproduce,
        "list": List,
    },
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; `arguments` are those of the process if not given. Returns the exit code."""
    begin()
    try:
        return _run(list(sys.argv[1:] if arguments is None else arguments))
    finally:
        end()


def _run(arguments: list[str]) -> int:
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large arrays on huge pages: fewer page faults
    name = " ".join(["capsnet", *CAPSNET.named(arguments)])
    try:
        if arguments == ["--version"]:
            show(f"capsnet {__version__}")
            return 0
        return parse(CAPSNET, arguments, prog="capsnet").run(shlex.join(["capsnet", *arguments]))
    except SystemExit as stop:  # tyro printed help or a usage error
        return int(stop.code or 0)
    except InputError as error:
        say(f"{name}: error: {flagged(str(error)) if name == 'capsnet train' else error}")
        return 2
    except Diverged as error:
        say(f"{name}: error: {error}")
        return 1
    except Interrupted as stop:
        say(f"{name}: {stop}")
        return 128 + stop.signal_number
    except KeyboardInterrupt:
        say(f"{name}: interrupted")
        return 130
    except BrokenPipeError:  # `capsnet list data | head`
        return 0
    except OSError as error:
        if error.filename is None:
            raise
        say(f"{name}: error: {error.filename} must be a file or folder that can be used; got: {error.strerror}")
        return 2
