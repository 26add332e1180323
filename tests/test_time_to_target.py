"""Censored times to a target by hand, against all divisions, and simulations of how often intervals cover."""

from itertools import combinations

import numpy as np
import pytest
from scipy import stats
from simulations import coverage

from softvq_lib.evaluation.time_to_target import compare_times, median_time, steps_to_target


def test_steps_to_a_target():
    assert steps_to_target([10, 20, 30], [5.0, 3.0, 4.0], 3.5, better="lower") == (20, True)
    assert steps_to_target([10, 20, 30], [5.0, 3.0, 4.0], 2.0, better="lower") == (30, False)
    assert steps_to_target([10, 20], [18.0, 19.0], 19, better="higher") == (20, True)
    with pytest.raises(ValueError, match="do not grow"):
        steps_to_target([10, 10], [1.0, 2.0], 1, better="lower")


def test_the_median_time_of_censored_runs():
    plain = median_time([3.0, 1, 2, 5, 4, 9, 7, 8, 6], [True] * 9)
    assert plain.triple == (5, 2, 8)  # 2 <= median <= 8: P(1 or fewer of 9 below) = 10/512
    # By Kaplan and Meier: 5/6 after 1, 5/6 * 3/4 after 3, half of that after 5.
    assert median_time([1.0, 2, 3, 4, 5, 6], [1, 0, 1, 0, 1, 1]).value == 5
    never = median_time([100.0, 100, 80], [False, False, True])
    assert (never.value, never.low, never.high) == (np.inf, 0, np.inf) and never.row()["high"] is None
    times = np.random.default_rng(0).exponential(size=(400, 15))
    found = [median_time(np.minimum(x, 1.2), x <= 1.2) for x in times]
    assert coverage([x.low for x in found], [x.high for x in found], np.log(2)) >= 0.95


def test_ratios_of_censored_times():
    a, b = np.array([210.0, 260, 300, 300, 280, 220]), np.array([100.0, 90, 130, 120, 105])
    found = compare_times(a, a < 300, b, b < 300)
    ratios = np.sort((a[:, None] / b).ravel())
    # Of 462 divisions 10 have 3 or fewer pairs the wrong way round (1 + 1 + 2 + 3), 2.5 % are 11.55: the fourth.
    assert found.value == 260 / 105
    assert found.low == ratios[3] and found.high == np.inf  # censored: the largest ratios are not known
    assert found.p == found.smallest_p == pytest.approx(2 / 462)
    assert compare_times(a, a < 300, b, b < 300, alternative="greater").p == pytest.approx(1 / 462)
    reached = compare_times(a, a > 0, b, b > 0)
    assert reached.high == ratios[-4]
    rank = stats.mannwhitneyu(a[:5] + np.arange(5), b)  # no ties: the exact test of Wilcoxon
    assert compare_times(a[:5] + np.arange(5), a[:5] > 0, b, b > 0).p == pytest.approx(rank.pvalue)


def test_ratios_of_censored_times_cover_and_are_seldom_wrong():
    rng = np.random.default_rng(0)
    pairs = zip(rng.lognormal(0, 0.3, size=(200, 6)), rng.lognormal(np.log(2), 0.3, size=(200, 6)), strict=True)
    found = [compare_times(a, a < 1.5, b, b < 3, permutations=1000) for a, b in pairs]
    assert coverage([x.low for x in found], [x.high for x in found], 0.5) >= 0.94
    pool = np.array([1.0, 2, 3, 4, 5, 5, 5, 5])
    divisions = [(pool[list(i)], np.delete(pool, i)) for i in combinations(range(8), 4)]
    p = [compare_times(a, a < 5, b, b < 5).p for a, b in divisions if min(a[1], b[1]) < 5]
    assert np.mean(np.array(p) <= 0.05) <= 0.05


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: median_time([1.0, 2], [True]), r"reached of \(1,\)"),
        (lambda: median_time([1.0, -2], [True, True]), "time of -2"),
        (lambda: compare_times([1.0, 2], [0, 0], [1.0, 2], [0, 0]), "neither a nor b"),
        (lambda: compare_times([1.0, 0], [1, 1], [1.0, 2], [1, 1]), "time of 0"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
