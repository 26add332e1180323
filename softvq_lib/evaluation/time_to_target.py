"""Steps to a target that not every run reaches (Sec. 4.2, "fewer iterations"): medians and ratios of censored times.

A run that ended before the target says only that it would have taken longer. Intervals are exact for any distribution
and number of runs: they cover at least as often as stated, and have an end at infinity where runs are too few (a median
needs 6 runs for 95 %, a ratio 4 of each kind) or too many ended early. The target is chosen before the runs.
"""

import numpy as np
from scipy import stats

from softvq_lib.config import one_of
from softvq_lib.evaluation.comparisons import Comparison, permutation_p
from softvq_lib.evaluation.statistics import Estimate, Seed, percent, same_length, sample


def steps_to_target(steps: np.ndarray, values: np.ndarray, target: float, *, better: str) -> tuple[float, bool]:
    """Return the first step (n,) at which the curve (n,) reaches the target and True, or its last step and False.

    Args:
        steps: (n,), growing.
        values: (n,), what was measured at these steps.
        target: In the unit of the values; reaching it exactly counts.
        better: "lower" or "higher" values.

    Raises:
        ValueError: for steps that do not grow, or values that are not finite or not as many.
    """
    one_of("better", better, ("lower", "higher"))
    steps, values = sample("steps", steps, least=1), sample("values", values, least=1)
    same_length(("steps", "values"), steps, values)
    if (np.diff(steps) <= 0).any():
        raise ValueError(f"steps do not grow: {steps.tolist()[:8]}; give the curve of one run in its order.")
    there = values <= target if better == "lower" else values >= target
    return (float(steps[there.argmax()]), True) if there.any() else (float(steps[-1]), False)


def median_time(times: np.ndarray, reached: np.ndarray, *, level: float = 0.95, over: str = "seeds") -> Estimate:
    """Median time to the target of runs (n,) by Kaplan and Meier, inf if too few reached it, with the sign interval.

    Args:
        times: Steps to the target, or those done where `reached` is False.
        reached: (n,), whether the run reached the target.
        level: Of the interval, in (0, 1).
        over: What the runs differ in, for the interval's name.

    Raises:
        ValueError: for fewer than two runs, times that are not finite or below 0, or another number of `reached`.
    """
    early, late = _ends("times", times, reached)
    words, n = percent(level), len(early)
    curve = stats.ecdf(stats.CensoredData.right_censored(early, np.isinf(late))).sf
    there = curve.probabilities <= 0.5 + 1e-12
    value = float(curve.quantiles[there.argmax()]) if there.any() else np.inf
    below = np.cumsum(stats.binom.pmf(np.arange(n // 2), n, 0.5))  # of k or fewer runs on one side of the median
    low, high = _between(early, late, int((below <= (1 - level) / 2).sum()))
    return Estimate(value, low, high, n, f"{words} exact sign interval over {over}")


def compare_times(
    a: np.ndarray,
    a_reached: np.ndarray,
    b: np.ndarray,
    b_reached: np.ndarray,
    *,
    alternative: str = "two-sided",
    level: float = 0.95,
    over: str = "seeds",
    permutations: int = 50_000,
    seed: Seed = 0,
) -> Comparison:
    """How many times as long runs a (n,) take as b (m,): ratio of median times, Hodges-Lehmann interval, Gehan's test.

    The interval takes the times of one kind as a multiple of the other's. Gehan's test (1965) is that of Wilcoxon for
    censored values, here as a permutation test, exact for up to 9 and 9 runs.

    Args:
        a: Times (n,) of one kind of run: steps to the target, or those done where it was not reached.
        a_reached: (n,), whether the run reached the target.
        b: Times (m,) of the other kind.
        b_reached: (m,), likewise.
        alternative: "two-sided", or "greater", "less": a takes longer, less long.
        level: Of the interval, in (0, 1).
        over: What the runs of a kind differ in, for the interval's name.
        permutations: At most so many; all are counted where there are no more than that.
        seed: A number or a numpy generator, of random permutations.

    Raises:
        ValueError: as `median_time`; for times of 0, or where neither kind has reached the target in half of its runs.
    """
    medians = [median_time(times, reached).value for times, reached in ((a, a_reached), (b, b_reached))]
    if np.isinf(medians).all():
        raise ValueError("neither a nor b reached the target in half of its runs: choose one that can be reached.")
    (early_a, late_a), (early_b, late_b) = _ends("a", a, a_reached), _ends("b", b, b_reached)
    if min(early_a.min(), early_b.min()) == 0:
        raise ValueError("a time of 0 has no ratio: measure from a step before the target is reached.")
    n, m, words = len(early_a), len(early_b), percent(level)
    below = np.cumsum(_wilcoxon(n, m))
    rank = int((below[: n * m // 2] <= (1 - level) / 2).sum())
    low, high = _between((early_a[:, None] / late_b).ravel(), (late_a[:, None] / early_b).ravel(), rank)

    early, late = np.concatenate([early_a, early_b]), np.concatenate([late_a, late_b])
    # A run surely took longer than those that arrived before it had, or ended; it scores one for each.
    longer = (late[None, :] < early[:, None]) | ((late[None, :] == early[:, None]) & np.isinf(late)[:, None])
    scores = longer.sum(1) - longer.sum(0)
    if not scores.any():
        raise ValueError("no run surely took longer than another: nothing can be compared.")

    def total(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
        return x.sum(axis)

    halves = (scores[:n].astype(float), scores[n:].astype(float))
    p, smallest, how = permutation_p(halves, total, "independent", alternative, permutations, seed)
    interval = f"{words} exact Hodges-Lehmann over {over}"
    return Comparison(medians[0] / medians[1], low, high, n + m, interval, p, smallest, f"Gehan, {how}, {alternative}")


def _ends(name: str, times: np.ndarray, reached: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the earliest and latest times at which the runs can have reached the target."""
    times, reached = sample(name, times), np.asarray(reached, dtype=bool)
    same_length((name, "reached"), times, reached)
    if times.min() < 0:
        raise ValueError(f"{name} has a time of {times.min():g}: give steps of at least 0.")
    return times, np.where(reached, times, np.inf)


def _between(early: np.ndarray, late: np.ndarray, rank: int) -> tuple[float, float]:
    """Return the rank-th smallest early and the rank-th largest late end; the whole half-line for rank 0."""
    return (float(np.sort(early)[rank - 1]), float(np.sort(late)[-rank])) if rank else (0.0, float("inf"))


def _wilcoxon(n: int, m: int) -> np.ndarray:
    """Probabilities (n m + 1,) of the number of pairs in which a is the smaller, for n and m of one distribution."""
    ways = np.zeros((n + 1, n * m + 1))  # of i numbers from 1 to n + m with such a sum, less the smallest sum
    ways[0, 0] = 1
    for rank in range(1, n + m + 1):
        for i in range(min(rank, n), 0, -1):
            step = rank - i  # the i-th smallest rank without a smaller one of b is i
            if step <= n * m:
                ways[i, step:] += ways[i - 1, : n * m + 1 - step]
    return ways[n] / ways[n].sum()
