"""Tests of differences against all permutations and scipy, and simulations of how often they are wrong; their power."""

from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from softvq_lib.evaluation.comparisons import (
    equivalence,
    holm,
    interaction_contrast,
    paired_comparison,
    sign_flip_p,
    two_sample_comparison,
)
from softvq_lib.evaluation.power import paired_power, pairs_needed, sign_flip_power
from softvq_lib.evaluation.statistics import mean_interval

FEW = np.array([0.3, -0.1, 0.8, 0.4, 1.1])
SIX = np.arange(6.0)


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_sign_flips_against_scipy(alternative):
    for differences in (FEW, FEW[:3], np.array([1.0, -1.0, 1.0, 2.0, 0.0])):
        theirs = stats.permutation_test(
            (differences,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative=alternative
        )
        assert sign_flip_p(differences, alternative)[0] == pytest.approx(theirs.pvalue)
    # 0.1 + 0.2 - 0.3 ties with its reverse, whatever rounding says; 5 of 8 sums are 0 or more.
    assert sign_flip_p(np.array([0.1, 0.2, -0.3]), alternative)[0] == (1 if alternative == "two-sided" else 0.625)
    exact, _ = sign_flip_p(FEW, alternative)
    assert sign_flip_p(FEW, alternative, exact=0, flips=40_000)[0] == pytest.approx(exact, abs=0.01)


def test_the_smallest_p_of_sign_flips():
    for n in (2, 3, 5, 12, 20):
        assert sign_flip_p(np.arange(1.0, n + 1))[0] == sign_flip_p(np.arange(1.0, n + 1))[1] == 2 ** (1 - n)
        assert sign_flip_p(np.arange(1.0, n + 1), "greater") == (2.0**-n, 2.0**-n)
    assert sign_flip_p(np.array([0.0, 1, 1])) == (0.5, 0.5)  # a pair without difference says nothing
    assert sign_flip_p(np.ones(21), flips=999) == (1 / 1000, 1 / 1000)


@pytest.mark.parametrize("alternative", ["two-sided", "greater"])
@pytest.mark.parametrize("n", [8, 25])
def test_sign_flips_are_seldom_wrong(alternative, n):
    for draw in (lambda rng: rng.normal(size=(1500, n)), lambda rng: rng.laplace(size=(1500, n)).round(1)):
        p, _ = sign_flip_p(draw(np.random.default_rng(n)), alternative, flips=499)
        assert 0.02 <= (p <= 0.05).mean() <= 0.065  # three standard errors


def test_paired_comparison_by_hand():
    a = 20 + FEW
    found = paired_comparison(a, np.full(5, 20.0), method="t", level=0.9)
    assert found.value == pytest.approx(0.5) and (found.n, found.test) == (5, "exact sign-flip, two-sided")
    assert (found.low, found.high) == pytest.approx(tuple(stats.ttest_rel(a, [20] * 5).confidence_interval(0.9)))
    assert (found.p, found.smallest_p) == (4 / 32, 2 / 32)  # only the sign of -0.1 can be turned for a larger sum
    images = np.random.default_rng(0).exponential(size=(2, 50))
    boot = paired_comparison(*images, method="studentised", over="images")
    assert boot.triple == mean_interval(images[0] - images[1]).triple
    assert boot.interval == "95 % studentised bootstrap over images" and "9999 random" in boot.test
    row = {"value": boot.value, "low": boot.low, "high": boot.high, "n": 50, "interval": boot.interval}
    assert boot.row() == row


def test_interaction_is_a_difference_of_differences():
    a1, a0, b1, b0 = np.random.default_rng(0).normal(size=(4, 6))
    assert interaction_contrast(a1, a0, b1, b0) == paired_comparison(a1 - a0, b1 - b0)
    with pytest.raises(ValueError, match=r"b1 of shape \(6,\) and b0 of \(5,\)"):
        interaction_contrast(a1, a0, b1, b0[:5])


def test_two_samples_against_all_divisions():
    a, b = np.array([1.0, 2.5, 2.0]), np.array([2.0, 4.0, 5.0, 3.5])
    pool = np.concatenate([a, b])
    divisions = [pool[list(i)].mean() - np.delete(pool, i).mean() for i in combinations(range(7), 3)]
    below = np.mean(np.array(divisions) <= a.mean() - b.mean() + 1e-9)
    found = two_sample_comparison(a, b, alternative="less")
    assert found.p == pytest.approx(below) and found.smallest_p == pytest.approx(1 / 35)
    assert two_sample_comparison(a, b).p == pytest.approx(2 * below)
    assert (found.low, found.high) == pytest.approx(tuple(stats.ttest_ind(a, b, equal_var=False).confidence_interval()))
    random = two_sample_comparison(np.tile(a, 4), np.tile(b, 4), permutations=999)
    assert random.test == "999 random permutations, two-sided" and random.smallest_p == 2 / 1000 <= random.p < 0.05


def test_two_samples_are_seldom_wrong():
    pool = np.random.default_rng(0).exponential(size=8)
    p = [two_sample_comparison(pool[list(i)], np.delete(pool, i)).p for i in combinations(range(8), 4)]
    assert len(p) == 70 and np.mean(np.array(p) <= 0.05) <= 0.05 and min(p) == pytest.approx(2 / 70)


def test_holm_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    )
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0} and holm({"one": 0.04}) == {"one": 0.04}


def test_holm_is_seldom_wrong_in_any_claim():
    claims = np.random.default_rng(0).uniform(size=(4000, 4))
    wrong = np.mean([min(holm(dict(zip("abcd", p, strict=True))).values()) <= 0.05 for p in claims])
    assert 0.035 <= wrong <= 0.06


@pytest.mark.parametrize("paired", [True, False])
def test_equivalence_against_two_one_sided_tests(paired):
    a, b = np.random.default_rng(0).normal(size=(2, 8)) + [[0.3], [0.0]]
    b = b if paired else b[:5]
    test = (
        stats.ttest_rel
        if paired
        else lambda x, y, alternative: stats.ttest_ind(x, y, equal_var=False, alternative=alternative)
    )
    for margin in (0.2, 1.0, 1.5, 3.0):
        found = equivalence(a, b, margin, paired=paired)
        sides = test(a + margin, b, alternative="greater").pvalue, test(a - margin, b, alternative="less").pvalue
        assert found.p == pytest.approx(max(sides)) and found.margin == margin and f"+-{margin:g}" in found.test
        within = -margin < found.low and found.high < margin
        assert found.verdict == ("equivalent" if within else "not shown") and "90 %" in found.interval


@pytest.mark.parametrize("paired", [True, False])
def test_equivalence_is_seldom_wrong(paired):
    """A true difference on the margin is called equivalent 5 % of the time at most, one of 0 most of the time."""
    a, b = np.random.default_rng(0).normal(0, 0.3, size=(2, 1000, 8))
    verdicts = [equivalence(x + 1, y, 1, paired=paired).verdict for x, y in zip(a, b, strict=True)]
    assert 0.03 <= verdicts.count("equivalent") / 1000 <= 0.07
    verdicts = [equivalence(x, y, 1, paired=paired).verdict for x, y in zip(a[:200], b[:200], strict=True)]
    assert verdicts.count("equivalent") > 190


def test_power_against_simulation_and_tables():
    assert pairs_needed(0.5, 1) == 34 and pairs_needed(0.5, 1, alternative="greater") == 27  # tables of d = 0.5
    assert paired_power(0.5, 1, 33) < 0.8 <= paired_power(0.5, 1, 34)
    # An effect so large that scipy gives nan for the far side.
    assert paired_power(2.5, 1, 12, alpha=0.0125) == pytest.approx(1, abs=1e-5) and pairs_needed(6, 1) == 3
    for alternative, sign in (("two-sided", 1), ("greater", 1), ("less", -1)):
        runs = np.random.default_rng(0).normal(sign * 0.8, 1, size=(4000, 8))
        rejected = np.mean(stats.ttest_1samp(runs, 0, axis=1, alternative=alternative).pvalue <= 0.05)
        assert paired_power(0.8, 1, 8, alternative=alternative) == pytest.approx(rejected, abs=0.025)


def test_power_of_sign_flips():
    assert sign_flip_power(9, 1, 5).value == 0 and sign_flip_power(9, 1, 6).value == 1  # p of 1/16 and of 1/32
    assert sign_flip_power(9, 1, 5, alternative="less").value == 1
    for pairs in (8, 12, 20):
        found = sign_flip_power(0.9, 1, pairs)
        assert (
            found.value == pytest.approx(paired_power(0.9, 1, pairs), abs=0.06) and found.low < found.value < found.high
        )


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: paired_comparison(SIX, SIX[:5]), r"a of shape \(6,\) and b of \(5,\)"),
        (lambda: paired_comparison(SIX, SIX), "all 6 differences are 0"),
        (lambda: paired_comparison(SIX, SIX + 1, alternative="more"), "alternative='more'"),
        (lambda: two_sample_comparison(np.ones(3), np.ones(4)), "all 7 values are 1"),
        (lambda: holm({"a": 0.1, "b": np.nan}), "'b'"),
        (lambda: holm({}), "no claim"),
        (lambda: equivalence(SIX, FEW, 0, paired=False), "margin=0"),
        (lambda: equivalence(SIX, FEW, -1, paired=False), "margin=-1"),
        (lambda: equivalence(SIX, FEW, 1, paired=True), r"b of \(5,\)"),
        (lambda: equivalence(SIX, SIX + 1, 1, paired=True), "all differences are -1"),
        (lambda: equivalence(SIX, SIX, 1, paired=True), "all 6 differences are 0"),
        (lambda: equivalence(SIX, FEW, 1, paired=False, alpha=0.5), "alpha=0.5"),
        (lambda: paired_power(0, 1, 8), "effect=0"),
        (lambda: paired_power(1, 1, 1), "pairs=1"),
        (lambda: pairs_needed(1e-4, 1), "10000 pairs"),
        (lambda: pairs_needed(1, 1, power=1), "power=1"),
        (lambda: sign_flip_power(1, 1, 8, alpha=0), "alpha=0"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
