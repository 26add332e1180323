"""How one measured quantity goes with another: rank correlations and their differences, and slopes against tokens.

For normal values the Fisher interval of a rank correlation covers 93 to 99 % of the time from 5 values on, up to a
correlation of 0.95. The test of a difference of rank correlations is wrong in 4 to 7 % from 12 values on; with fewer,
or correlations above 0.9, more often. The tests hold cases of 12 and 15 values.
"""

import numpy as np
from scipy import stats

from softvq_lib.config import one_of
from softvq_lib.evaluation.comparisons import Comparison, permutation_p
from softvq_lib.evaluation.statistics import Estimate, Seed, percent, same_length, sample, t_interval


def spearman(
    x: np.ndarray,
    y: np.ndarray,
    *,
    alternative: str = "two-sided",
    method: str = "fisher",
    level: float = 0.95,
    over: str = "tokenizers",
    resamples: int = 4000,
    permutations: int = 50_000,
    seed: Seed = 0,
) -> Comparison:
    """Spearman's correlation of x and y (n,) with interval and permutation test, exact up to 8 values.

    Args:
        x: Values (n,), 5 or more.
        y: Values (n,) of the same n things, in their order.
        alternative: "two-sided", or "greater", "less": the correlation is above, below 0.
        method: Of the interval: "fisher" (default: Fisher's z with the variance of Bonett & Wright 2000), or
            "bootstrap" (percentiles).
        level: Of the interval, in (0, 1).
        over: What the values are of, for the interval's name.
        resamples: Of method "bootstrap".
        permutations: At most so many; all are counted where there are no more than that.
        seed: A number or a numpy generator, of the resamples and random permutations.

    Raises:
        ValueError: for fewer than 5 values, values that are not finite, not in pairs or all equal.
    """
    one_of("method", method, ("fisher", "bootstrap"))
    x, y = _pairs(("x", "y"), x, y, rank=True)
    n, words = len(x), percent(level)
    rho = float(_correlation(x, y))
    if method == "fisher":
        low, high = _fisher(rho, n, level, rank=True)
        name = f"{words} Fisher z over {over}"
    else:
        picks = np.random.default_rng(seed).integers(n, size=(resamples, n))
        with np.errstate(invalid="ignore"):  # resamples of one value, which have no correlation
            drawn = _correlation(stats.rankdata(x[picks], axis=-1), stats.rankdata(y[picks], axis=-1))
        low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
        name = f"{words} percentile bootstrap over {over}"

    def statistic(x: np.ndarray, axis: int) -> np.ndarray:
        return _correlation(np.moveaxis(x, axis, -1), y)

    p, smallest, how = permutation_p((x,), statistic, "pairings", alternative, permutations, seed)
    return Comparison(rho, float(low), float(high), n, name, p, smallest, f"{how}, {alternative}")


def compare_correlations(
    x1: np.ndarray,
    x2: np.ndarray,
    y: np.ndarray,
    *,
    kind: str = "spearman",
    alternative: str = "two-sided",
    level: float = 0.95,
    over: str = "tokenizers",
) -> Comparison:
    """Correlation of x1 with y less that of x2 with y, all (n,): does x1 predict y better.

    Turn the signs of x1 and x2 so that both shall go up with y; else the signs are compared and not the strengths.
    Test: Steiger's Z (1980) with pooled correlation; interval: Zou (2007). For ranks both take the variance of Bonett &
    Wright (2000), without which they reject too often.

    Args:
        x1: Values (n,), 5 or more.
        x2: Values (n,) that compete with x1.
        y: Values (n,) that both shall go with.
        kind: "spearman" (default) or "pearson".
        alternative: "two-sided", or "greater", "less": x1 goes with y more, less strongly than x2.
        level: Of the interval, in (0, 1).
        over: What the values are of, for the interval's name.

    Raises:
        ValueError: for fewer than 5 values, values that are not finite, not in pairs or all equal, or x1 and x2 in
            one order.
    """
    one_of("kind", kind, ("spearman", "pearson"))
    one_of("alternative", alternative, ("two-sided", "greater", "less"))
    rank = kind == "spearman"
    a, c = _pairs(("x1", "y"), x1, y, rank)
    b, c = _pairs(("x2", "y"), x2, y, rank)
    n, words = len(a), percent(level)
    r1, r2, between = (float(_correlation(*both)) for both in ((a, c), (b, c), (a, b)))
    if between > 1 - 1e-12:
        raise ValueError("x1 and x2 put all in one order: their correlations cannot be told apart.")
    (low1, high1), (low2, high2) = (_fisher(r, n, level, rank) for r in (r1, r2))
    r1_in, r2_in = _inside(r1, n, rank), _inside(r2, n, rank)
    pooled = (r1_in + r2_in) / 2
    together = _covariance(pooled, pooled, between)
    z = (np.arctanh(r1_in) - np.arctanh(r2_in)) / np.sqrt(2 * (1 - together) * _variance(pooled, n, rank))
    p = {"two-sided": 2 * stats.norm.sf(abs(z)), "greater": stats.norm.sf(z), "less": stats.norm.cdf(z)}[alternative]
    shared = 2 * _covariance(r1_in, r2_in, between)
    down = (r1 - low1) ** 2 + (high2 - r2) ** 2 - shared * (r1 - low1) * (high2 - r2)
    up = (high1 - r1) ** 2 + (r2 - low2) ** 2 - shared * (high1 - r1) * (r2 - low2)
    value = r1 - r2
    ends = value - max(down, 0.0) ** 0.5, value + max(up, 0.0) ** 0.5
    return Comparison(value, *ends, n, f"{words} Zou over {over}", float(p), 0.0, f"Steiger Z, {kind}, {alternative}")


def slopes_per_doubling(tokens: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the slope of values (..., t) against log2 of the token counts (t,): change per doubling, (...).

    Raises:
        ValueError: for token counts that are not two different ones or more above 0, or values of another number.
    """
    tokens, values = sample("tokens", tokens), np.asarray(values, dtype=np.float64)
    if tokens.min() <= 0 or np.ptp(tokens) == 0:
        raise ValueError(f"tokens={tokens.tolist()}: give two different counts or more, all above 0.")
    if values.shape[-1] != len(tokens):
        raise ValueError(f"values of shape {values.shape} for {len(tokens)} token counts: give one each.")
    x = np.log2(tokens) - np.log2(tokens).mean()
    return values @ x / (x @ x)


def slope_per_doubling(tokens: np.ndarray, values: np.ndarray, *, level: float = 0.95) -> Estimate:
    """Change of a metric per doubling of the tokens (t,), with Student's t interval.

    Values (seeds, t) give one slope a seed and the interval over seeds, however the metric bends between token counts.
    Values (t,) give the interval of a straight line's residuals (t - 2 degrees of freedom). To compare arms, hand
    `slopes_per_doubling` of both to `paired_comparison`.

    Raises:
        ValueError: as `slopes_per_doubling`; for values (t,) of fewer than 3 token counts.
    """
    axes = np.ndim(values)
    values = sample("values", values, axes=2 if axes > 1 else 1)
    slopes = slopes_per_doubling(tokens, values)
    if axes > 1:
        return t_interval(slopes, level=level, over="slopes of seeds")
    words = percent(level)
    if len(values) < 3:
        raise ValueError(f"a line through {len(values)} values has no residuals: give 3 token counts, or more seeds.")
    error = stats.linregress(np.log2(tokens), values).stderr
    half = stats.t.ppf((1 + level) / 2, len(values) - 2) * error
    ends = (float(slopes), float(slopes - half), float(slopes + half))
    return Estimate(*ends, len(values), f"{words} t over residuals of a line")


def _pairs(names: tuple[str, str], x: np.ndarray, y: np.ndarray, rank: bool) -> tuple[np.ndarray, np.ndarray]:
    both = []
    for name, values in zip(names, (x, y), strict=True):
        values = sample(name, values, least=5)
        if np.ptp(values) == 0:
            raise ValueError(f"all values of {name} are {values[0]:g}: nothing goes with it.")
        both.append(stats.rankdata(values) if rank else values)
    same_length(names, *both)
    return both[0], both[1]


def _correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    return (x * y).sum(-1) / np.sqrt(np.square(x).sum(-1) * np.square(y).sum(-1))


def _inside(r: float, n: int, rank: bool) -> float:
    """Fisher's z of +-1 is infinite: take half a step of Spearman's correlation less."""
    most = 1 - (6 / (n * (n**2 - 1)) if rank else 1e-12)
    return min(max(r, -most), most)


def _variance(r: float, n: int, rank: bool) -> float:
    """Variance of Fisher's z; Bonett & Wright (2000) of ranks."""
    return (1 + r**2 / 2 if rank else 1.0) / (n - 3)


def _fisher(r: float, n: int, level: float, rank: bool) -> tuple[float, float]:
    inside = _inside(r, n, rank)
    half = stats.norm.ppf((1 + level) / 2) * _variance(inside, n, rank) ** 0.5
    low, high = np.tanh(np.arctanh(inside) - half), np.tanh(np.arctanh(inside) + half)
    return float(min(low, r)), float(max(high, r))


def _covariance(r1: float, r2: float, between: float) -> float:
    """Correlation of the estimates r1 and r2 of two correlations with the same y (Steiger 1980, Eq. 3)."""
    psi = between * (1 - r1**2 - r2**2) - r1 * r2 * (1 - r1**2 - r2**2 - between**2) / 2
    return psi / ((1 - r1**2) * (1 - r2**2))
