"""How far a difference between errors can be chance: over training seeds, and over test images.

Errors are in percent, differences in percentage points, p values two-sided, intervals 95 %. Over seeds: Student's t
tests. Over the images of one test: McNemar's. Neither sees what the other does, for one test set is drawn once and a
single training has one seed.
"""

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from capsnet.errors import InputError

__all__ = [
    "McNemar",
    "Summary",
    "TTest",
    "holm",
    "in_words",
    "mcnemar",
    "one_sample",
    "paired_images",
    "paired_t",
    "summarise",
    "welch_t",
    "wilson_interval",
]

ROUNDING = 1e-12
"""A spread below this share of the numbers it is of is that of their rounding."""


@dataclass(frozen=True)
class Summary:
    """Errors of several runs in two numbers.

    Attributes:
        mean: in percent.
        sd: sample standard deviation (n - 1), in points; None for one run.
        n: number of runs.
    """

    mean: float
    sd: float | None
    n: int

    @property
    def standard_error(self) -> float | None:
        """Of the mean, in points: sd / sqrt(n); None for one run."""
        return None if self.sd is None else self.sd / math.sqrt(self.n)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it."""
        return {**asdict(self), "standard_error": self.standard_error}

    def summary(self) -> str:
        """One line: `mean 0.410 %, standard deviation 0.030 over 3 runs`."""
        if self.sd is None:
            return f"{self.mean:.3f} %, one run"
        return f"mean {self.mean:.3f} %, standard deviation {self.sd:.3f} over {self.n} runs"


@dataclass(frozen=True)
class TTest:
    """Student's t test of a difference.

    Attributes:
        test: which test, and over what.
        difference: of the means, ours less theirs, in points: negative where ours are better.
        standard_error: of the difference, in points; 0 where nothing varies, None where it cannot be known.
        t: difference / standard error; 0 for no difference; None without a spread to compare a difference with.
        df: degrees of freedom.
        p: chance of a difference at least as large, to either side, where there truly is none; None as t.
        interval: 95 % confidence interval of the difference, in points; None as t.
    """

    test: str
    difference: float
    standard_error: float | None
    t: float | None
    df: float
    p: float | None
    interval: tuple[float, float] | None

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it."""
        return {**asdict(self), "interval": None if self.interval is None else list(self.interval)}

    def summary(self) -> str:
        """One line: `paired t test over 3 seeds: -0.050 +- 0.020 points, 95 % interval -0.136 to 0.036, p = 0.13`.

        The number after +- is the standard error of the difference.
        """
        if self.standard_error is None:
            return f"{self.test}: {self.difference:+.3f} points; no p value: one run has no standard deviation"
        told = f"{self.test}: {self.difference:+.3f} +- {self.standard_error:.3f} points"
        if self.p is None or self.interval is None:
            return f"{told}; no p value: the standard error is 0"
        low, high = self.interval
        return f"{told}, 95 % interval {low:+.3f} to {high:+.3f}, p {in_words(self.p)}"


@dataclass(frozen=True)
class McNemar:
    """Exact McNemar test of two models on the same images.

    Attributes:
        b: number of images that only the first model gets wrong.
        c: number of those that only the second gets wrong.
        p: chance of counts at least as unequal where each of these images is as likely to be either's.
    """

    b: int
    c: int
    p: float

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it."""
        return {"test": "exact McNemar test", **asdict(self)}

    def summary(self, first: str = "by the first", second: str = "by the second") -> str:
        """One line: `exact McNemar test: 12 images mistaken only by the first, 8 only by the second, p = 0.5`."""
        ours = f"{self.b:,} image{'s' * (self.b != 1)} mistaken only {first}"
        return f"exact McNemar test: {ours}, {self.c:,} only {second}, p {in_words(self.p)}"


def summarise(errors: Sequence[float]) -> Summary:
    """Mean and standard deviation of errors in percent.

    Raises:
        InputError: no errors, or one that is not finite.
    """
    _check("errors", errors, at_least=1)
    return Summary(statistics.fmean(errors), _sd(errors) if len(errors) > 1 else None, len(errors))


def paired_t(ours: Sequence[float], theirs: Sequence[float]) -> TTest:
    """Paired t test (Student 1908) of runs that have their seeds in common; both sides in the same order of seeds.

    Raises:
        InputError: fewer than 2 pairs, lists of different lengths, or an error that is not finite.
    """
    _check("ours", ours, at_least=2)
    _check("theirs", theirs, at_least=2)
    if len(ours) != len(theirs):
        raise InputError(f"theirs must be as many as the {len(ours)} of ours, to be paired; got {len(theirs)}")
    pairs, scale = len(ours), _scale([*ours, *theirs])
    differences = [one - other for one, other in zip(ours, theirs, strict=True)]
    error = _sd(differences, scale=scale) / math.sqrt(pairs)
    return _t_test(f"paired t test over {pairs} seeds", statistics.fmean(differences), error, pairs - 1.0, scale=scale)


def paired_images(ours: Sequence[AbstractSet[int]], theirs: Sequence[AbstractSet[int]], images: int) -> TTest:
    """Paired t test over test images, of the share of trainings that get each image wrong.

    It is of these trainings, and not of what other seeds would give: for few seeds, whose spread says little.

    Args:
        ours: indices of the wrong images, in [0, images), of each training.
        theirs: the same of the other side, at least one as well.
        images: number of test images, at least 2.

    Raises:
        InputError: no trainings on a side, or fewer than 2 images.
    """
    if images < 2:
        raise InputError(f"images must be at least 2; got {images}")
    shares = []
    for name, side in (("ours", ours), ("theirs", theirs)):
        if not side:
            raise InputError(f"{name} must be the wrong images of at least one training; got none")
        counts = Counter(image for wrong in side for image in wrong)
        shares.append({image: 100 * count / len(side) for image, count in counts.items()})
    concerned = shares[0].keys() | shares[1].keys()
    differences = [shares[0].get(image, 0.0) - shares[1].get(image, 0.0) for image in sorted(concerned)]
    differences += [0.0] * (images - len(concerned))
    seeds = f"{len(ours)}" if len(ours) == len(theirs) else f"{len(ours)} and {len(theirs)}"
    test = f"paired t test over {images:,} images, errors averaged over {seeds} seeds"
    error = _sd(differences, scale=100.0) / math.sqrt(images)
    return _t_test(test, statistics.fmean(differences), error, images - 1.0, scale=100.0)


def holm(p_values: Sequence[float]) -> list[float]:
    """P values corrected for their number, in the same order (Holm 1979, Scand. J. Statist. 6, 65-70).

    With the smallest times their number, the next times one less and so on, none below one before it and none above 1,
    the chance of any false "below 0.05" is at most 0.05.
    """
    corrected, least = [0.0] * len(p_values), 0.0
    for rank, k in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, p_values[k] * (len(p_values) - rank)))
        corrected[k] = least
    return corrected


def welch_t(ours: Sequence[float], theirs: Sequence[float]) -> TTest:
    """Welch's t test (Welch 1947, Biometrika 34, 28-35) of runs that cannot be paired; their spreads may differ.

    Raises:
        InputError: fewer than 2 runs on a side, or an error that is not finite.
    """
    _check("ours", ours, at_least=2)
    _check("theirs", theirs, at_least=2)
    difference = statistics.fmean(ours) - statistics.fmean(theirs)
    one, other = (_sd(errors) ** 2 / len(errors) for errors in (ours, theirs))
    spread = one + other
    df = (  # Welch-Satterthwaite; shares of the spread, so that no square is too small for a float
        1 / ((one / spread) ** 2 / (len(ours) - 1) + (other / spread) ** 2 / (len(theirs) - 1))
        if spread
        else len(ours) + len(theirs) - 2.0
    )
    test, scale = f"Welch's t test over {len(ours)} and {len(theirs)} runs", _scale([*ours, *theirs])
    return _t_test(test, difference, math.sqrt(spread), df, scale=scale)


def one_sample(ours: Sequence[float], reference: float) -> TTest:
    """One-sample t test against a published number, taken as exact because its variance is not published.

    One run alone has a difference, but no standard error.

    Raises:
        InputError: no errors, or one that is not finite.
    """
    _check("ours", ours, at_least=1)
    _check("reference", [reference], at_least=1)
    n = len(ours)
    test = f"one-sample t test over {n} run{'s' * (n > 1)} against {reference:g} %, taken as exact"
    difference = statistics.fmean(ours) - reference
    if n == 1:
        return TTest(test, difference, None, None, 0.0, None, None)
    return _t_test(test, difference, _sd(ours) / math.sqrt(n), n - 1.0, scale=_scale([*ours, reference]))


def mcnemar(wrong_a: AbstractSet[int] | Bool[Tensor, "n"], wrong_b: AbstractSet[int] | Bool[Tensor, "n"]) -> McNemar:
    """Exact two-sided McNemar test (McNemar 1947, Psychometrika 12, 153-157): b ~ binomial(b + c, 1/2).

    Images that either model gets wrong are given by their indices, or as a mask of all images.

    Raises:
        InputError: masks of different lengths.
    """
    from scipy.stats import binomtest

    if isinstance(wrong_a, Tensor) and isinstance(wrong_b, Tensor) and wrong_a.shape != wrong_b.shape:
        raise InputError(f"wrong_b must be of the same {len(wrong_a)} images as wrong_a; got {len(wrong_b)}")
    one, other = _indices(wrong_a), _indices(wrong_b)
    b, c = len(one - other), len(other - one)
    return McNemar(b, c, float(binomtest(b, b + c).pvalue) if b + c else 1.0)


def wilson_interval(wrong: int, total: int) -> tuple[float, float]:
    """95 % score interval of a proportion of at least one trial (Wilson 1927, JASA 22, 209-212), in [0, 1].

    Examples:
        >>> low, high = wilson_interval(25, 10_000)
        >>> f"{100 * low:.2f} to {100 * high:.2f} %"
        '0.17 to 0.37 %'
    """
    from scipy.stats import binomtest

    low, high = binomtest(wrong, total).proportion_ci(method="wilson")
    return float(low), float(high)


def in_words(p: float) -> str:
    """A p value in words: `= 0.012`; below what a float holds, `< 1e-300`."""
    return "< 1e-300" if p < 1e-300 else f"= {p:.2g}"


def _t_test(test: str, difference: float, standard_error: float, df: float, *, scale: float) -> TTest:
    if standard_error == 0:
        if abs(difference) <= ROUNDING * scale:
            return TTest(test, 0.0, 0.0, 0.0, df, 1.0, (0.0, 0.0))
        return TTest(test, difference, 0.0, None, df, None, None)
    from scipy.stats import t as student

    t, half = difference / standard_error, float(student.ppf(0.975, df)) * standard_error
    p = 2 * float(student.sf(abs(t), df))
    return TTest(test, difference, standard_error, t, df, p, (difference - half, difference + half))


def _sd(values: Sequence[float], *, scale: float | None = None) -> float:
    """Sample standard deviation; 0 where only rounding differs, of `values` or of what they are differences of."""
    sd = statistics.stdev(values)
    return sd if sd > ROUNDING * (_scale(values) if scale is None else scale) else 0.0


def _scale(values: Sequence[float]) -> float:
    return max(map(abs, values))


def _indices(wrong: AbstractSet[int] | Tensor) -> set[int]:
    return set(wrong.nonzero()[:, 0].tolist()) if isinstance(wrong, Tensor) else set(wrong)


def _check(name: str, errors: Sequence[float], *, at_least: int) -> None:
    if len(errors) < at_least:
        runs = f"{at_least} run{'s' * (at_least > 1)}"
        raise InputError(f"{name} must be the errors of at least {runs}; got {len(errors)}")
    if not all(map(math.isfinite, errors)):
        raise InputError(f"{name} must be finite; got {', '.join(f'{error:g}' for error in errors)}")
