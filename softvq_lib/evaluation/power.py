"""Power of a paired design, before anything is run: how often a true effect of a stated size would be found.

`sd` is the standard deviation of the differences within pairs, from a pilot; effects that matter are stated by hand.
With Holm's correction over k claims, alpha / k is the level at which each is sure of its power.
"""

from bisect import bisect_left

import numpy as np
from scipy import stats

from softvq_lib.config import at_least, one_of
from softvq_lib.evaluation.comparisons import ALTERNATIVES, sign_flip_p
from softvq_lib.evaluation.statistics import Estimate, Seed, share_interval

_MOST_PAIRS = 10_000


def paired_power(effect: float, sd: float, pairs: int, *, alpha: float = 0.05, alternative: str = "two-sided") -> float:
    """Return the power of the paired t test, by the noncentral t distribution.

    Args:
        effect: Smallest mean difference that matters, above 0; with a one-sided alternative, in its direction.
        sd: Standard deviation of the differences within pairs, above 0.
        pairs: Number of pairs, two or more.
        alpha: Level of the test, in (0, 1).
        alternative: "two-sided", or "greater", "less".

    Raises:
        ValueError: for fewer than two pairs, an effect or sd of 0 or less, or an alpha outside (0, 1).
    """
    _check(effect, sd, alpha, alternative)
    at_least("pairs", pairs, 2)
    return _power(effect / sd, pairs, alpha, alternative)


def pairs_needed(
    effect: float, sd: float, *, power: float = 0.8, alpha: float = 0.05, alternative: str = "two-sided"
) -> int:
    """Return the fewest pairs that give the paired t test so much power.

    Raises:
        ValueError: as `paired_power`, or where 10,000 pairs are not enough.
    """
    _check(effect, sd, alpha, alternative)
    counts = range(2, _MOST_PAIRS + 1)
    found = bisect_left(counts, power, key=lambda pairs: _power(effect / sd, pairs, alpha, alternative))
    if not 0 < power < 1 or found == len(counts):
        raise ValueError(
            f"power={power!r} is not reached by {_MOST_PAIRS} pairs for an effect of {effect:g} with sd {sd:g}: give a "
            "power below 1, or a larger effect."
        )
    return counts[found]


def sign_flip_power(
    effect: float,
    sd: float,
    pairs: int,
    *,
    alpha: float = 0.05,
    alternative: str = "two-sided",
    experiments: int = 2000,
    seed: Seed = 0,
) -> Estimate:
    """Power of the sign-flip test: the share of simulated experiments with p <= alpha, with Wilson's interval.

    Differences are normal. It is 0 where the smallest p is above alpha, as for 5 pairs two-sided at 0.05. Up to 12
    pairs p is exact, beyond from 999 random patterns.
    """
    _check(effect, sd, alpha, alternative)
    at_least("pairs", pairs, 2)
    at_least("experiments", experiments, 1)
    rng = np.random.default_rng(seed)
    sign = -1 if alternative == "less" else 1
    differences = rng.normal(sign * effect, sd, size=(experiments, pairs))
    parts = np.array_split(differences, max(1, experiments * 2 ** min(pairs, 12) // 2**20))
    found = [sign_flip_p(part, alternative, flips=999, seed=rng, exact=12)[0] <= alpha for part in parts]
    return share_interval(int(np.concatenate(found).sum()), experiments, over="simulated experiments")


def _power(effect: float, pairs: int, alpha: float, alternative: str) -> float:
    two = alternative == "two-sided"
    degrees, shift = pairs - 1, effect * pairs**0.5
    bar = stats.t.isf(alpha / 2 if two else alpha, degrees)
    # The far side is too small for scipy where the shift is large: there it is nan instead of 0.
    other_side = float(np.nan_to_num(stats.nct.cdf(-bar, degrees, shift))) if two else 0.0
    return float(stats.nct.sf(bar, degrees, shift)) + other_side


def _check(effect: float, sd: float, alpha: float, alternative: str) -> None:
    at_least("effect", effect, 0, above=True)
    at_least("sd", sd, 0, above=True)
    one_of("alternative", alternative, ALTERNATIVES)
    if not 0 < alpha < 1:
        raise ValueError(f"alpha={alpha!r} is not allowed: give a number between 0 and 1, such as 0.05.")
