"""Intervals of measured numbers."""

import numpy as np


def bootstrap_mean(values: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Return mean, low and high of a 95 % percentile bootstrap interval over independent values (n,).

    Raises:
        ValueError: for fewer than two values, or values that are not finite.
    """
    from scipy.stats import bootstrap

    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2 or not np.isfinite(values).all():
        raise ValueError(f"an interval needs two finite values or more; {np.isfinite(values).sum()} are here.")
    interval = bootstrap(
        (values,), np.mean, n_resamples=2000, batch=100, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval
    return float(values.mean()), float(interval.low), float(interval.high)
