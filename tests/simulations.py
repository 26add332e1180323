"""How often intervals hold the true value, for the tests of statistics."""

from collections.abc import Callable, Iterable

import numpy as np


def coverage(low: np.ndarray, high: np.ndarray, truth: float) -> float:
    """Share of intervals in which the true value lies."""
    return float(np.mean((np.asarray(low) <= truth) & (truth <= np.asarray(high))))


def estimates(function: Callable, samples: Iterable) -> tuple[list[float], list[float]]:
    """Lows and highs of a function over samples."""
    found = [function(values) for values in samples]
    return [x.low for x in found], [x.high for x in found]
