"""Rank correlations and slopes against all orders, scipy and simulations of how often intervals cover."""

from itertools import permutations

import numpy as np
import pytest
from scipy import stats
from simulations import coverage, estimates

from softvq_lib.evaluation.associations import compare_correlations, slope_per_doubling, slopes_per_doubling, spearman
from softvq_lib.evaluation.statistics import t_interval

FEW = np.array([0.3, -0.1, 0.8, 0.4, 1.1])
SIX = np.arange(6.0)


def test_spearman_against_all_orders():
    x, y = np.array([1.0, 2, 3, 4, 5]), np.array([2.0, 1, 4, 3, 30])
    orders = np.array([stats.spearmanr(x, order).statistic for order in permutations(y)])
    found = spearman(x, y, alternative="greater")
    assert found.value == pytest.approx(0.8) and found.p == pytest.approx(np.mean(orders >= 0.8 - 1e-9))
    assert found.smallest_p == pytest.approx(1 / 120) and spearman(x, y).smallest_p == pytest.approx(2 / 120)
    z = 1.959964 * ((1 + 0.32) / 2) ** 0.5
    assert found.triple[1:] == pytest.approx(np.tanh([np.arctanh(0.8) - z, np.arctanh(0.8) + z]), abs=1e-6)
    p = [spearman(x, np.array(order)).p for order in permutations(y)]
    assert np.mean(np.array(p) <= 0.05) <= 0.05
    whole = spearman(x, 2 * x)
    assert whole.value == whole.high == pytest.approx(1) and 0 < whole.low < 0.9
    assert spearman(np.arange(12), np.arange(12)[::-1]).p == pytest.approx(2 / 50_001)


def normal_triples(r1: float, r2: float, between: float, n: int, count: int) -> np.ndarray:
    """Normal x1, x2, y (3, count, n) with such correlations of x1 and y, x2 and y, and x1 and x2."""
    root = np.linalg.cholesky([[1, between, r1], [between, 1, r2], [r1, r2, 1]])
    return np.einsum("ij,jtn->itn", root, np.random.default_rng(n).normal(size=(3, count, n)))


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_intervals_of_rank_correlations_cover(rho):
    x, _, y = normal_triples(rho, 0, 0, 12, 600)
    truth = 6 / np.pi * np.arcsin(rho / 2)
    both = [list(zip(x[:count], y[:count], strict=True)) for count in (600, 150)]
    fisher = estimates(lambda pair: spearman(*pair, permutations=100), both[0])
    bootstrap = estimates(lambda pair: spearman(*pair, method="bootstrap", permutations=100, resamples=500), both[1])
    assert 0.92 <= coverage(*fisher, truth) <= 0.98 and coverage(*bootstrap, truth) >= 0.91


@pytest.mark.parametrize(("r1", "r2", "between"), [(0.5, 0.5, 0.3), (0.9, 0.9, 0.8), (0.8, 0.2, 0.2)])
@pytest.mark.parametrize("kind", ["spearman", "pearson"])
def test_differences_of_correlations_cover_and_are_seldom_wrong(kind, r1, r2, between):
    samples = normal_triples(r1, r2, between, 15, 800).transpose(1, 0, 2)
    found = [compare_correlations(*both, kind=kind) for both in samples]
    t1, t2 = (6 / np.pi * np.arcsin(r / 2) if kind == "spearman" else r for r in (r1, r2))
    assert 0.92 <= coverage([x.low for x in found], [x.high for x in found], t1 - t2) <= 0.98
    rejected = np.mean([x.p <= 0.05 for x in found])
    assert rejected <= 0.075 if r1 == r2 else rejected > 0.5


def test_differences_of_correlations_by_hand():
    """Correlations of 0.4, 0.5 and 0.1 between 103 cases (Steiger 1980, case A)."""
    wanted = np.linalg.cholesky([[1, 0.1, 0.4], [0.1, 1, 0.5], [0.4, 0.5, 1]])
    noise = np.random.default_rng(0).normal(size=(3, 103))
    noise -= noise.mean(1, keepdims=True)
    x1, x2, y = wanted @ np.linalg.inv(np.linalg.cholesky(noise @ noise.T / 103)) @ noise
    found = compare_correlations(x1, x2, y, kind="pearson")
    assert found.value == pytest.approx(-0.1)
    s = (0.1 * (1 - 2 * 0.45**2) - 0.5 * 0.45**2 * (1 - 2 * 0.45**2 - 0.01)) / (1 - 0.45**2) ** 2
    z = 10 * (np.arctanh(0.4) - np.arctanh(0.5)) / (2 - 2 * s) ** 0.5
    assert found.p == pytest.approx(2 * stats.norm.cdf(z)) and z == pytest.approx(-0.89, abs=0.01)
    assert compare_correlations(x2, x1, y, kind="pearson").triple == pytest.approx((0.1, -found.high, -found.low))
    assert compare_correlations(x1, x2, y, kind="pearson", alternative="less").p == pytest.approx(found.p / 2)


def test_slopes():
    tokens, rng = [16, 8, 4, 2], np.random.default_rng(0)
    line = 3 - 0.5 * np.log2(tokens)
    assert slopes_per_doubling(tokens, [line, 2 * line]) == pytest.approx([-0.5, -1])
    seeds = line + rng.normal(0, 0.1, size=(5, 4))
    slopes = [np.polyfit(np.log2(tokens), row, 1)[0] for row in seeds]
    assert slope_per_doubling(tokens, seeds).triple == pytest.approx(t_interval(slopes).triple)
    one = slope_per_doubling(tokens, seeds[0])
    fit = stats.linregress(np.log2(tokens), seeds[0])
    assert one.triple == pytest.approx((fit.slope, *(fit.slope + fit.stderr * stats.t.ppf([0.025, 0.975], 2))))
    runs = line + rng.normal(0, 0.1, size=(1000, 4))
    assert 0.93 <= coverage(*estimates(lambda values: slope_per_doubling(tokens, values), runs), -0.5) <= 0.97


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: spearman(SIX[:4], SIX[:4]), "give 5 values"),
        (lambda: spearman(SIX, np.ones(6)), "all values of y are 1"),
        (lambda: spearman(SIX, SIX[:5]), r"y of \(5,\)"),
        (lambda: compare_correlations(SIX, SIX**3, FEW[[0, 1, 2, 3, 4, 4]]), "cannot be told apart"),
        (lambda: slope_per_doubling([4, 4], [1.0, 2.0]), "two different counts"),
        (lambda: slope_per_doubling([4, 8], [1.0, 2.0]), "no residuals"),
        (lambda: slope_per_doubling([4, 8], np.ones((2, 3))), "2 token counts"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
