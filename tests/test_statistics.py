"""Intervals against counting by hand, scipy and simulations of how often they cover."""

from itertools import product

import numpy as np
import pytest
from scipy import stats
from simulations import coverage, estimates

from softvq_lib.evaluation import bootstrap_mean
from softvq_lib.evaluation.statistics import (
    mean_bounds,
    mean_interval,
    prediction_interval,
    ratio_of_medians,
    share_interval,
    t_interval,
    two_level_bounds,
    two_level_interval,
)

# Draws of a shape, and their true mean.
VALUES = {
    "normal": (lambda rng, shape: rng.normal(size=shape), 0.0),
    "exponential": (lambda rng, shape: rng.exponential(size=shape), 1.0),
    "log-normal": (lambda rng, shape: rng.lognormal(0, 1, size=shape), np.exp(0.5)),
    "uniform": (lambda rng, shape: rng.uniform(size=shape), 0.5),
    "beta": (lambda rng, shape: rng.beta(9, 1, size=shape), 0.9),
}
FEW = np.array([0.3, -0.1, 0.8, 0.4, 1.1])
SIX = np.arange(6.0)


def mean_coverage(name: str, n: int, method: str, samples: int = 2000, resamples: int = 1500) -> float:
    draw, truth = VALUES[name]
    values = draw(np.random.default_rng(1), (samples, n))
    return coverage(*mean_bounds(values, 0.95, method, resamples), truth)


@pytest.mark.parametrize("n", [30, 100])
@pytest.mark.parametrize("name", VALUES)
def test_the_default_interval_covers_the_mean_over_images(name, n):
    assert 0.92 <= mean_coverage(name, n, "studentised") <= 0.98


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_why_the_others_are_not_the_default(method):
    assert 0.92 <= mean_coverage("normal", 30, method, 1000, 600) <= 0.98
    assert 0.80 <= mean_coverage("log-normal", 30, method, 1000, 600) <= 0.91


def test_the_studentised_bootstrap_is_that_over_all_resamples():
    values = np.array([1.0, 2.0, 4.0, 7.0, 7.5])
    resamples = values[np.array(list(product(range(5), repeat=5)))]
    spread = resamples.std(1)
    apart = resamples.mean(1) - values.mean()
    t = np.divide(apart, spread, out=np.copysign(np.inf, apart), where=spread > 1e-9)
    low, high = np.quantile(t, [0.1, 0.9], method="inverted_cdf")
    found = mean_interval(values, level=0.8, resamples=40_000)
    # The quantiles themselves are steps: beside the exact ones lie their neighbours.
    assert found.low == pytest.approx(values.mean() - high * values.std(), abs=0.06)
    assert found.high == pytest.approx(values.mean() - low * values.std(), abs=0.06)
    assert found.interval == "80 % studentised bootstrap over images" and found.n == 5 and found.value == 4.3


def test_the_interval_of_the_mean_is_repeatable_and_cut_into_parts_alike():
    values = np.random.default_rng(0).normal(size=3000)  # resampled in several parts
    assert mean_interval(values) == mean_interval(list(values), seed=np.random.default_rng(0))
    assert mean_interval(values) != mean_interval(values, seed=1)
    direct = stats.bootstrap(
        (values,), np.mean, n_resamples=2000, batch=7, method="percentile", rng=np.random.default_rng(3)
    )
    low, high = direct.confidence_interval
    assert bootstrap_mean(values, seed=3) == pytest.approx((values.mean(), low, high), rel=1e-12)


def test_values_that_hardly_differ():
    assert mean_interval([2.0, 2.0, 2.0]).triple == (2, 2, 2)
    found = mean_interval([1.0] * 29 + [0.0])
    assert found.interval == "95 % BCa bootstrap over images" and 0.8 < found.low < found.value < found.high <= 1


@pytest.mark.parametrize("seeds", [3, 5, 8])
def test_intervals_over_seeds_cover(seeds):
    samples = np.random.default_rng(seeds).normal(20, 0.3, size=(2000, seeds + 1))
    assert 0.935 <= coverage(*estimates(t_interval, samples[:, :-1]), 20) <= 0.965
    low, high = estimates(prediction_interval, samples[:, :-1])
    assert 0.935 <= coverage(low, high, samples[:, -1]) <= 0.965


def test_intervals_over_seeds_by_hand():
    half = stats.t.ppf(0.975, 2) * 1.0 / 3**0.5
    assert t_interval([1.0, 2.0, 3.0]).triple == pytest.approx((2, 2 - half, 2 + half))
    assert prediction_interval([1.0, 2.0, 3.0]).triple == pytest.approx((2, 2 - 2 * half, 2 + 2 * half))
    assert t_interval(FEW, level=0.9).triple[1:] == pytest.approx(stats.ttest_1samp(FEW, 0).confidence_interval(0.9))


def tables(seeds: int, of_seed: float, of_both: float, count: int = 1000, images: int = 40) -> np.ndarray:
    """Tables (count, seeds, images) of mean 0, images skewed."""
    rng = np.random.default_rng(seeds)
    rows, cells = rng.normal(0, of_seed, size=(count, seeds, 1)), rng.normal(0, of_both, size=(count, seeds, images))
    return rows + cells + rng.exponential(size=(count, 1, images)) - 1


@pytest.mark.parametrize("seeds", [3, 5, 8])
@pytest.mark.parametrize(("of_seed", "of_both"), [(0, 0.01), (0, 1), (0.2, 0.5), (2, 1)])
def test_intervals_over_seeds_and_images_cover(seeds, of_seed, of_both):
    assert 0.92 <= coverage(*two_level_bounds(tables(seeds, of_seed, of_both), 0.95, 1000), 0) <= 0.98


def test_resampling_a_few_seeds_covers_too_seldom():
    rng, values = np.random.default_rng(0), tables(3, 2, 1, count=500)
    picked = rng.multinomial(3, [1 / 3] * 3, 500) / 3, rng.multinomial(40, [1 / 40] * 40, 500) / 40
    means = np.einsum("rs,tsi,ri->tr", picked[0], values, picked[1], optimize=True)
    assert coverage(*np.quantile(means, [0.025, 0.975], axis=1), 0) < 0.85
    assert coverage(*two_level_bounds(values), 0) >= 0.92


def test_two_levels_are_each_of_them_where_the_other_is_nothing():
    one = np.array([[1.0], [2.0], [4.0]]) + np.linspace(-1e-6, 1e-6, 40)
    assert two_level_interval(one, resamples=40_000).triple == pytest.approx(t_interval(one.mean(1)).triple, rel=0.03)
    images = np.random.default_rng(0).exponential(size=60)
    found = two_level_interval(np.stack([images] * 3))
    assert found.triple == pytest.approx(mean_interval(images).triple, rel=0.03)
    assert found.interval == "95 % t over 3 seeds and studentised bootstrap over 60 images" and found.n == 180


def test_wilson_covers_and_solves_its_equation():
    found = share_interval(7, 40)
    for p in (found.low, found.high):
        assert abs(7 / 40 - p) == pytest.approx(stats.norm.ppf(0.975) * (p * (1 - p) / 40) ** 0.5)
    for n in (30, 100, 500):
        low, high = estimates(lambda cases, n=n: share_interval(cases, n), range(n + 1))
        truth = np.linspace(0.05, 0.95, 91)
        inside = (np.array(low)[:, None] <= truth) & (truth <= np.array(high)[:, None])
        exact = (stats.binom.pmf(np.arange(n + 1)[:, None], n, truth) * inside).sum(0)
        assert 0.94 <= exact.mean() <= 0.96 and exact.min() >= 0.90
    assert share_interval(0, 10).low == 0 and share_interval(10, 10).high == 1


def test_the_ratio_of_medians_covers():
    rng = np.random.default_rng(0)
    ours, theirs = rng.lognormal(0, 0.1, size=(400, 15)), 2 * rng.lognormal(0, 0.1, size=(400, 15))
    low, high = estimates(lambda both: ratio_of_medians(*both), zip(ours, theirs, strict=True))
    assert 0.92 <= coverage(low, high, 0.5) <= 0.98
    assert ratio_of_medians([1.0, 2, 3], [2.0, 4, 6]).triple == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: mean_interval([1.0]), r"shape \(1,\): give 2 values"),
        (lambda: mean_interval([1.0, np.nan, 2, np.inf]), "2 of 4 values are not finite, at 1, 3"),
        (lambda: mean_interval(np.ones((3, 3))), r"shape \(3, 3\)"),
        (lambda: mean_interval(SIX, level=1.0), "level=1.0"),
        (lambda: mean_interval(SIX, level=95), "level=95"),
        (lambda: mean_interval(SIX, method="BCa"), "did you mean 'bca'"),
        (lambda: mean_interval(SIX, resamples=10), "resamples=10"),
        (lambda: t_interval([]), r"shape \(0,\)"),
        (lambda: two_level_interval(np.ones((1, 9))), r"shape \(1, 9\): give 2"),
        (lambda: two_level_interval([[1, 2], [3, np.nan]]), r"at \(1, 1\)"),
        (lambda: share_interval(5, 4), "5 cases of 4"),
        (lambda: share_interval(0, 0), "0 cases of 0"),
        (lambda: ratio_of_medians([1.0, 2], [1.0, 2]), "three rounds"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
