"""Comparisons of measured numbers: differences with interval and exact p, equivalence, many claims at once (Holm).

A p is never without the smallest that its test could have reached: with three pairs no sign-flip test goes below 0.25,
whatever is measured. Intervals are two-sided even where the alternative is not.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from softvq_lib.config import at_least, one_of
from softvq_lib.evaluation.statistics import (
    METHODS,
    Estimate,
    Seed,
    mean_interval,
    percent,
    same_length,
    sample,
    t_interval,
)

ALTERNATIVES = ("two-sided", "greater", "less")
_EXACT_FLIPS = 20  # pairs whose 2^20 patterns of signs are all counted


@dataclass(frozen=True)
class Comparison(Estimate):
    """A difference, a correlation or a ratio with its interval and test.

    Attributes:
        p: Probability of what was measured or more, where nothing differs.
        smallest_p: The smallest p that the test can reach with as many values; 0 for one by a formula.
        test: Its name and alternative.
    """

    p: float
    smallest_p: float
    test: str


@dataclass(frozen=True)
class Equivalence(Comparison):
    """A difference that is to lie within a margin.

    Attributes:
        margin: Differences below it, of either sign, count as none.
        verdict: "equivalent", or "not shown", which does not say that they differ.
    """

    margin: float
    verdict: Literal["equivalent", "not shown"]


def sign_flip_p(
    differences: np.ndarray,
    alternative: str = "two-sided",
    *,
    flips: int = 9999,
    seed: Seed = 0,
    exact: int = _EXACT_FLIPS,
) -> tuple[np.ndarray, np.ndarray]:
    """Return p and smallest p, (...) each, of the sign-flip test that the differences (..., n) are symmetric about 0.

    All 2^n patterns of signs are counted for n up to `exact`; beyond, `flips` random ones and the observed one.

    Args:
        differences: (..., n), each row a test of its own.
        alternative: "two-sided", or "greater", "less": the mean is above, below 0.
        flips: Random patterns where n is above `exact`.
        seed: A number or a numpy generator, of the random patterns.
        exact: Largest n for which all patterns are counted.
    """
    one_of("alternative", alternative, ALTERNATIVES)
    at_least("flips", flips, 1)
    n = differences.shape[-1]
    sides = 2 if alternative == "two-sided" else 1
    observed = differences.sum(-1, keepdims=True) * (-1 if alternative == "less" else 1)
    # Patterns that tie with the observed one shall count, however their sums are rounded.
    limit = (np.abs(observed) if sides == 2 else observed) - 1e-12 * np.abs(differences).sum(-1, keepdims=True)

    def count(sums: np.ndarray) -> np.ndarray:
        return ((np.abs(sums) if sides == 2 else sums) >= limit).sum(-1)

    least = np.minimum(sides * 0.5 ** np.count_nonzero(differences, axis=-1), 1.0)
    if n <= exact:
        sums = np.zeros((*differences.shape[:-1], 1))
        for j in range(n):
            sums = np.concatenate([sums + differences[..., j, None], sums - differences[..., j, None]], -1)
        return count(sums) / 2**n, least
    rng = np.random.default_rng(seed)
    found = 1
    for start in range(0, flips, at_once := max(1, 2**22 // n)):
        signs = rng.integers(2, size=(min(at_once, flips - start), n)) * 2.0 - 1
        found = found + count(differences @ signs.T)
    return found / (flips + 1), np.maximum(least, 1 / (flips + 1))


def permutation_p(
    data: tuple[np.ndarray, ...], statistic: Callable, kind: str, alternative: str, permutations: int, seed: Seed
) -> tuple[float, float, str]:
    """Run scipy's permutation test, exact where there are no more permutations than told.

    Returns:
        p, the smallest p that it can reach, and "exact permutation" or the number of random permutations.

    Args:
        data: One or two samples, (n,) or (n,) and (m,), as `kind` has it.
        statistic: Of the samples and an axis, as scipy calls it.
        kind: "pairings" (of one sample with what the statistic holds) or "independent" (two samples).
        alternative: "two-sided", "greater" or "less".
        permutations: At most so many, 100 or more; all are counted where there are no more than that.
        seed: A number or a numpy generator, of random permutations.
    """
    one_of("alternative", alternative, ALTERNATIVES)
    at_least("permutations", permutations, 100)
    options = {"n_resamples": permutations, "batch": 10_000, "vectorized": True, "alternative": alternative}
    rng = np.random.default_rng(seed)
    done = stats.permutation_test(data, statistic, permutation_type=kind, rng=rng, **options)
    sides = 2 if alternative == "two-sided" else 1
    sizes = [len(x) for x in data]
    ways = math.factorial(sizes[0]) if kind == "pairings" else math.comb(sum(sizes), sizes[0])
    if ways > permutations:
        return float(done.pvalue), sides / (permutations + 1), f"{permutations} random permutations"
    null = done.null_distribution
    near = 1e-9 * np.ptp(null)
    top, bottom = (null >= null.max() - near).mean(), (null <= null.min() + near).mean()
    smallest = {"greater": top, "less": bottom, "two-sided": min(1.0, 2 * min(top, bottom))}[alternative]
    return float(done.pvalue), float(smallest), "exact permutation"


def paired_comparison(
    a: np.ndarray,
    b: np.ndarray,
    *,
    alternative: str = "two-sided",
    method: str = "t",
    level: float = 0.95,
    over: str = "seeds",
    resamples: int = 4000,
    flips: int = 9999,
    seed: Seed = 0,
) -> Comparison:
    """Mean of a - b over pairs (n,), such as the same seed with two quantizers, with the sign-flip test.

    Args:
        a: Values (n,), two or more.
        b: Values (n,), each the partner of a's at its place.
        alternative: "two-sided", or "greater", "less" for a above, below b, fixed before the measurement.
        method: Of the interval: "t" (default, for few pairs), or a bootstrap of `mean_interval` (30 pairs or more).
        level: Of the interval, in (0, 1).
        over: What the pairs are, for the interval's name.
        resamples: Of a bootstrap.
        flips: Random patterns of signs for more than 20 pairs.
        seed: A number or a numpy generator, of resamples and patterns.

    Raises:
        ValueError: for values that are too few, not finite or not in pairs, or differences that are all 0.
    """
    one_of("method", method, ("t", *METHODS))
    differences = _differences(a, b)
    if method == "t":
        interval = t_interval(differences, level=level, over=over)
    else:
        interval = mean_interval(differences, method=method, level=level, over=over, resamples=resamples, seed=seed)
    p, smallest = sign_flip_p(differences, alternative, flips=flips, seed=seed)
    how = "exact sign-flip" if len(differences) <= _EXACT_FLIPS else f"sign-flip, {flips} random patterns"
    return Comparison(
        *interval.triple, interval.n, interval.interval, float(p), float(smallest), f"{how}, {alternative}"
    )


def interaction_contrast(
    a1: np.ndarray, a0: np.ndarray, b1: np.ndarray, b0: np.ndarray, **options: object
) -> Comparison:
    """Difference of differences (a1 - a0) - (b1 - b0) over seeds (n,): does 1 against 0 change more in a than in b.

    Args:
        a1: Values (n,) of kind a with what is asked about.
        a0: Of kind a without it, the same seeds.
        b1: Of kind b with it.
        b0: Of kind b without it.
        options: Of `paired_comparison`.
    """
    a1, a0, b1, b0 = (sample(name, x) for name, x in zip(("a1", "a0", "b1", "b0"), (a1, a0, b1, b0), strict=True))
    same_length(("a1", "a0"), a1, a0)
    same_length(("b1", "b0"), b1, b0)
    return paired_comparison(a1 - a0, b1 - b0, **options)


def two_sample_comparison(
    a: np.ndarray,
    b: np.ndarray,
    *,
    alternative: str = "two-sided",
    level: float = 0.95,
    over: str = "seeds",
    permutations: int = 50_000,
    seed: Seed = 0,
) -> Comparison:
    """Difference of means of a (n,) and b (m,) that are not paired: Welch's interval and the permutation test.

    The test is exact up to `permutations` divisions of the values (9 and 9); it asks whether a and b are of one
    distribution.

    Raises:
        ValueError: for fewer than two values, values that are not finite, or all equal.
    """
    a, b, words = sample("a", a), sample("b", b), percent(level)
    if np.ptp(np.concatenate([a, b])) == 0:
        raise ValueError(f"all {len(a) + len(b)} values are {a[0]:g}: nothing can be compared.")

    def difference(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
        return x.mean(axis) - y.mean(axis)

    p, smallest, how = permutation_p((a, b), difference, "independent", alternative, permutations, seed)
    if np.ptp(a) == 0 and np.ptp(b) == 0:
        low = high = a[0] - b[0]
    else:
        low, high = stats.ttest_ind(a, b, equal_var=False).confidence_interval(level)
    value, n = float(a.mean() - b.mean()), len(a) + len(b)
    return Comparison(
        value, float(low), float(high), n, f"{words} Welch t over {over}", p, smallest, f"{how}, {alternative}"
    )


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Correct the p of several claims for their number (Holm 1979): compare what is returned with the level itself.

    Raises:
        ValueError: for no claim, or a p outside 0 to 1, by its name.
    """
    wrong = [name for name, value in p.items() if not 0 <= value <= 1]
    if wrong or not p:
        raise ValueError(f"p of {', '.join(map(repr, wrong)) or 'no claim'}: give a number from 0 to 1 for each claim.")
    names = sorted(p, key=p.__getitem__)
    corrected = np.maximum.accumulate([(len(names) - i) * p[name] for i, name in enumerate(names)])
    by_name = dict(zip(names, np.minimum(corrected, 1.0).tolist(), strict=True))
    return {name: by_name[name] for name in p}


def equivalence(
    a: np.ndarray, b: np.ndarray, margin: float, *, paired: bool, alpha: float = 0.05, over: str = "seeds"
) -> Equivalence:
    """Are a and b "comparable": two one-sided t tests (Schuirmann 1987) that the mean of a - b lies within +-margin.

    Args:
        a: Values (n,), two or more.
        b: Values (n,), or (m,) where they are not paired.
        margin: In the unit of the values, above 0, fixed before the measurement.
        paired: Whether a[i] and b[i] belong together; if not, Welch's test.
        alpha: Level of the verdict. The interval is that of 1 - 2 alpha, which lies within the margin if and only if
            the verdict is "equivalent".
        over: What the values are of, for the interval's name.

    Raises:
        ValueError: for a margin of 0 or less, an alpha outside (0, 0.5), values that are too few or not finite, or
            differences (unpaired: values of both) that are all equal.
    """
    at_least("margin", margin, 0, above=True)
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha={alpha!r} is not allowed: give a number between 0 and 0.5.")
    if paired:
        differences = _differences(a, b)
        if np.ptp(differences) == 0:
            raise ValueError(f"all differences are {differences[0]:g}: without spread there is no t test.")
        n, middle, name = len(differences), differences.mean(), "paired t"
        degrees, error = n - 1, differences.std(ddof=1) / n**0.5
    else:
        a, b = sample("a", a), sample("b", b)
        if np.ptp(a) == 0 and np.ptp(b) == 0:
            raise ValueError(f"all of a are {a[0]:g} and all of b {b[0]:g}: without spread there is no t test.")
        n, middle, name = len(a) + len(b), a.mean() - b.mean(), "Welch t"
        welch = stats.ttest_ind(a, b, equal_var=False)
        degrees, error = welch.df, np.hypot(stats.sem(a), stats.sem(b))
    p = float(stats.t.sf((margin - abs(middle)) / error, degrees))
    half = stats.t.ppf(1 - alpha, degrees) * error
    words = f"{percent(1 - 2 * alpha)} {name} over {over}"
    verdict = "equivalent" if p <= alpha else "not shown"
    test = f"TOST within +-{margin:g}, {name}"
    ends = (float(middle), float(middle - half), float(middle + half))
    return Equivalence(*ends, n, words, p, 0.0, test, float(margin), verdict)


def _differences(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = sample("a", a), sample("b", b)
    same_length(("a", "b"), a, b)
    if not (a - b).any():
        raise ValueError(f"all {len(a)} differences are 0: are these two runs, or one run twice?")
    return a - b
