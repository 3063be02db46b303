import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy import stats

from capsnet.errors import InputError
from capsnet.evaluation.statistics import (
    McNemar,
    holm,
    mcnemar,
    one_sample,
    paired_images,
    paired_t,
    summarise,
    welch_t,
)

# Student 1908, Biometrika 6, 1-25: hours of sleep gained by ten patients with either drug; t, df, p and intervals
# below are those that t.test of R prints for its copy of these data (`sleep`)
SLEEP = (
    [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0],
    [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4],
)


@pytest.mark.parametrize(("df", "t"), [(1, 12.706), (2, 4.303), (4, 2.776), (10, 2.228), (30, 2.042), (120, 1.980)])
def test_an_interval_is_that_of_the_published_table_of_t(df: int, t: float) -> None:
    """Fisher and Yates 1963, table III, two-sided 5 %."""
    found = one_sample([float(k % 2) for k in range(df + 1)], 0.2)
    assert found.df == df
    assert found.interval is not None
    assert found.standard_error is not None
    low, high = found.interval
    assert (high - low) / 2 / found.standard_error == pytest.approx(t, abs=6e-4)
    assert (low + high) / 2 == pytest.approx(found.difference)


@pytest.mark.parametrize("t", [0.0, 1e-9, 0.1, 0.7, 1.5, 4.0, 33.0, 1e4, 1e10])
@pytest.mark.parametrize("sign", [1, -1])
def test_p_is_the_closed_form_where_there_is_one(t: float, sign: int) -> None:
    cosine = 1 / math.hypot(1, t / 2)
    closed = {
        1: 2 / math.pi * math.atan2(1, t),
        2: 1 - t / math.hypot(math.sqrt(2), t),
        4: 1 - math.sqrt(1 - cosine**2) * (1 + cosine**2 / 2),
    }
    for df, p in closed.items():
        varied = [-1.0, 1.0, *([0.0] * (df - 1))]  # of mean 0
        error = math.sqrt(2 / df / (df + 1))
        found = one_sample(varied, -sign * t * error)
        assert found.t == pytest.approx(sign * t)
        assert found.p == pytest.approx(p, rel=1e-9, abs=1e-12)


def test_tests_are_those_of_scipy() -> None:
    ours, theirs = [0.41, 0.38, 0.45, 0.40], [0.44, 0.47, 0.43, 0.52]
    for found, expected in (
        (paired_t(ours, theirs), stats.ttest_rel(ours, theirs)),
        (welch_t(ours, theirs[:3]), stats.ttest_ind(ours, theirs[:3], equal_var=False)),
        (one_sample(ours, 0.35), stats.ttest_1samp(ours, 0.35)),
    ):
        assert (found.t, found.p, found.df) == pytest.approx((expected.statistic, expected.pvalue, expected.df))
        assert found.interval is not None
    assert paired_t(ours, theirs).interval == pytest.approx(tuple(stats.ttest_rel(ours, theirs).confidence_interval()))


def test_paired_t_of_the_sleep_data() -> None:
    found = paired_t(*SLEEP)
    assert found.t == pytest.approx(-4.0621, abs=5e-5)
    assert found.df == 9
    assert found.p == pytest.approx(0.002833, abs=5e-7)
    assert found.interval == pytest.approx((-2.4598858, -0.7001142), abs=5e-8)
    assert found.difference == pytest.approx(-1.58)
    assert found.standard_error == pytest.approx(-1.58 / -4.0621, rel=2e-5)
    assert found.summary() == (
        "paired t test over 10 seeds: -1.580 +- 0.389 points, 95 % interval -2.460 to -0.700, p = 0.0028"
    )
    swapped = paired_t(*reversed(SLEEP))
    assert swapped.difference == pytest.approx(1.58)
    assert swapped.p == pytest.approx(found.p)


def test_paired_images_is_a_t_test_of_the_share_of_trainings_that_are_wrong() -> None:
    ours, theirs = [{0, 1, 2, 5}, {0, 2, 7}], [{0, 3}, {3, 4, 7}]
    shares = [[100 * sum(k in wrong for wrong in side) / 2 for k in range(40)] for side in (ours, theirs)]
    found, truth = paired_images(ours, theirs, 40), stats.ttest_rel(*shares)
    assert (found.t, found.p) == pytest.approx((truth.statistic, truth.pvalue))
    assert found.interval == pytest.approx(tuple(truth.confidence_interval()))
    assert found.difference == pytest.approx(100 * (7 - 5) / 2 / 40)
    assert found.test == "paired t test over 40 images, errors averaged over 2 seeds"
    assert "over 2 and 1 seeds" in paired_images(ours, theirs[:1], 40).test
    assert paired_images(ours, ours, 40).p == 1


def test_paired_images_of_whole_test_sets_differ() -> None:
    assert paired_images([set(range(40))], [set()], 40).difference == 100


def test_holm_of_a_worked_example() -> None:
    # Holm's step-down at four hypotheses: 0.005 x 4, 0.01 x 3, 0.03 x 2, and 0.04 no less than that
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.7, 0.6]) == [1.0, 1.0]
    assert holm([0.3]) == [0.3]
    assert holm([]) == []


def test_welch_t_of_the_sleep_data() -> None:
    found = welch_t(*SLEEP)
    assert found.t == pytest.approx(-1.8608, abs=5e-5)
    assert found.df == pytest.approx(17.776, abs=5e-4)
    assert found.p == pytest.approx(0.07939, abs=5e-6)
    assert found.interval == pytest.approx((-3.3654832, 0.2054832), abs=5e-8)
    assert found.summary().startswith("Welch's t test over 10 and 10 runs: -1.580 +- 0.849 points, 95 % interval ")


def test_one_sample_t_of_the_sleep_data() -> None:
    found = one_sample(SLEEP[1], 0.0)
    assert found.t == pytest.approx(3.6799, abs=5e-5)
    assert found.df == 9
    assert found.p == pytest.approx(0.005076, abs=5e-7)
    assert found.interval == pytest.approx((0.8976775, 3.7623225), abs=5e-8)
    shifted = one_sample(SLEEP[1], 0.25)
    assert shifted.difference == pytest.approx(found.difference - 0.25)
    assert shifted.standard_error == found.standard_error
    assert "one-sample t test over 10 runs against 0.25 %, taken as exact: +2.080 +- 0.633 points" in shifted.summary()


def test_one_run_has_a_difference_from_a_published_number_but_no_p() -> None:
    found = one_sample([0.41], 0.25)
    assert found.difference == pytest.approx(0.16)
    assert (found.standard_error, found.t, found.p, found.interval) == (None, None, None, None)
    assert found.summary() == (
        "one-sample t test over 1 run against 0.25 %, taken as exact: +0.160 points; "
        "no p value: one run has no standard deviation"
    )


def test_unequal_numbers_of_runs_have_their_own_degrees_of_freedom() -> None:
    # variances 1 and 4; s1^2 / n1 = 1 / 3, s2^2 / n2 = 4 / 2; df = (7 / 3)^2 / ((1 / 3)^2 / 2 + 2^2 / 1)
    found = welch_t([1.0, 2.0, 3.0], [5.0 - math.sqrt(2), 5.0 + math.sqrt(2)])
    assert found.df == pytest.approx((7 / 3) ** 2 / (1 / 18 + 4))
    assert found.standard_error == pytest.approx(math.sqrt(7 / 3))
    assert found.difference == pytest.approx(-3)


def test_what_does_not_vary_and_does_not_differ_has_p_1() -> None:
    same = [0.25, 0.25, 0.25]
    for found in (paired_t(same, same), welch_t(same, same[:2]), one_sample(same, 0.25)):
        assert (found.difference, found.standard_error, found.t, found.p, found.interval) == (0, 0, 0, 1, (0, 0))
        assert found.summary().endswith(": +0.000 +- 0.000 points, 95 % interval +0.000 to +0.000, p = 1")
    varied = [0.3, 0.1, 0.2]
    assert paired_t(varied, varied).p == 1
    rounded = [0.1 + 0.2, 0.1, 0.2]
    assert rounded != varied
    assert paired_t(varied, rounded).p == 1


def test_what_differs_without_varying_has_no_p() -> None:
    ours, theirs = [0.3, 0.2, 0.1], [0.4, 0.3, 0.2]  # differences of -0.1 but for rounding
    assert len({one - other for one, other in zip(ours, theirs, strict=True)}) > 1
    found = paired_t(ours, theirs)
    assert found.difference == pytest.approx(-0.1)
    assert (found.standard_error, found.t, found.p, found.interval) == (0, None, None, None)
    assert found.summary() == "paired t test over 3 seeds: -0.100 +- 0.000 points; no p value: the standard error is 0"
    assert welch_t([0.1, 0.1], [0.2, 0.2]).p is None
    assert one_sample([0.1, 0.1], 0.2).p is None
    assert welch_t([0.1, 0.1], [0.2, 0.3]).df == pytest.approx(1)


def test_summary_by_hand() -> None:
    found = summarise([0.40, 0.44, 0.36, 0.40])
    assert found.mean == pytest.approx(0.40)
    assert found.n == 4
    assert found.sd == pytest.approx(math.sqrt(2 * 0.04**2 / 3))
    assert found.standard_error == pytest.approx(math.sqrt(2 * 0.04**2 / 3) / 2)
    assert found.summary() == "mean 0.400 %, standard deviation 0.033 over 4 runs"
    assert found.to_dict() == {"mean": found.mean, "sd": found.sd, "n": 4, "standard_error": found.standard_error}
    alone = summarise([0.4])
    assert (alone.mean, alone.sd, alone.standard_error) == (0.4, None, None)
    assert alone.summary() == "0.400 %, one run"


@pytest.mark.parametrize(
    ("b", "c", "p"),
    [
        (0, 0, 1.0),
        (0, 1, 1.0),
        (0, 5, 2 / 32),
        (1, 8, 2 * (1 + 9) / 2**9),
        (8, 1, 2 * (1 + 9) / 2**9),
        (2, 4, 2 * (1 + 6 + 15) / 2**6),
        (3, 3, 1.0),
    ],
)
def test_mcnemar_by_hand(b: int, c: int, p: float) -> None:
    both, n = 4, 20
    wrong_a = torch.zeros(n, dtype=torch.bool)
    wrong_a[: both + b] = True
    wrong_b = torch.zeros(n, dtype=torch.bool)
    wrong_b[:both] = True
    wrong_b[both + b : both + b + c] = True
    assert mcnemar(wrong_a, wrong_b) == McNemar(b, c, p)
    assert mcnemar(set(wrong_a.nonzero()[:, 0].tolist()), wrong_b) == McNemar(b, c, p)


def test_mcnemar_of_many_images_is_close_to_the_chi_square_test() -> None:
    # 5,000 and 5,200: McNemar's statistic with continuity correction, (|b - c| - 1)^2 / (b + c)
    found = mcnemar(set(range(5000)), set(range(5000, 10_200)))
    assert found.p == pytest.approx(math.erfc(math.sqrt(199**2 / 10_200 / 2)), rel=1e-3)


def test_mcnemar_names_the_test_and_whose_errors_are_whose() -> None:
    found = mcnemar({0, 1}, {1, 2, 3})
    assert found.summary() == "exact McNemar test: 1 image mistaken only by the first, 2 only by the second, p = 1"
    assert found.summary("with", "without").startswith("exact McNemar test: 1 image mistaken only with, 2 only without")
    assert found.to_dict() == {"test": "exact McNemar test", "b": 1, "c": 2, "p": 1.0}


def test_every_result_is_json() -> None:
    tests = paired_t(*SLEEP), welch_t(*SLEEP), one_sample([0.4], 0.2), paired_t([0.1, 0.1], [0.2, 0.2])
    for found in (*tests, summarise([0.4]), mcnemar({1}, {2})):
        told = json.dumps(found.to_dict(), allow_nan=False)
        assert json.loads(told) == found.to_dict()


@pytest.mark.parametrize(
    ("test", "given", "message"),
    [
        (paired_t, ([0.1], [0.2]), "ours must be the errors of at least 2 runs; got 1"),
        (welch_t, ([0.1, 0.2], [0.2]), "theirs must be the errors of at least 2 runs; got 1"),
        (paired_images, ([{1}], [], 10), "theirs must be the wrong images of at least one training; got none"),
        (paired_images, ([{1}], [{2}], 1), "images must be at least 2; got 1"),
        (paired_t, ([0.1, 0.2], [0.2, 0.3, 0.4]), "theirs must be as many as the 2 of ours, to be paired; got 3"),
        (summarise, ([],), "errors must be the errors of at least 1 run; got 0"),
        (one_sample, ([0.1, math.nan], 0.2), "ours must be finite; got 0.1, nan"),
    ],
)
def test_what_cannot_be_tested_is_refused(test: Callable[..., object], given: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}$"):
        test(*given)


@pytest.mark.usefixtures("unchecked")
def test_masks_of_other_images_are_refused() -> None:
    with pytest.raises(InputError, match=r"^wrong_b must be of the same 3 images as wrong_a; got 4$"):
        mcnemar(torch.ones(3).bool(), torch.ones(4).bool())
