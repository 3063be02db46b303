"""How fast, how large and how right a network is here: what `capsnet bench` measures.

No number without a check: before a variant is timed, its results are compared with float64 (`gate`).
"""

from capsnet.bench.clock import Spread, interleaved
from capsnet.bench.gate import Check, Incorrect
from capsnet.bench.record import UNUSED, check_free, parse_compare, run, write
from capsnet.bench.sections import FULL, QUICK, SECTIONS, Plan
from capsnet.bench.table import show
from capsnet.bench.work import backward_flop, forward_flop, multiply_adds

__all__ = [
    "FULL",
    "QUICK",
    "SECTIONS",
    "UNUSED",
    "Check",
    "Incorrect",
    "Plan",
    "Spread",
    "backward_flop",
    "check_free",
    "forward_flop",
    "interleaved",
    "multiply_adds",
    "parse_compare",
    "run",
    "show",
    "write",
]
