"""The kernel distance between two sets of features, KID (Bińkowski et al. 2018), with an interval."""

import torch
from torch import Tensor

_ROWS = 1024  # of a kernel matrix that are computed at once
LEAST = 10


def kernel_distance(a: Tensor, b: Tensor) -> tuple[float, float, float]:
    """Return the squared maximum mean discrepancy with the kernel (x·y / c + 1)³, and its 95 % interval.

    All pairs of images enter. It is unbiased at any number of them, and so may fall below 0 where both sides are of one
    kind. It has the expectation of what torch-fidelity averages over random subsets, with less noise. The interval is
    that of the delete-one jackknife over the images of both sides; where both are of one kind it is too wide.

    Args:
        a: Features (n, c).
        b: Features (m, c).

    Raises:
        ValueError: for fewer than 10 of either, or other widths.
    """
    from scipy.stats import t

    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features of {a.shape[1]} and of {b.shape[1]} dimensions: use one extractor for both.")
    n, m = len(a), len(b)
    if min(n, m) < LEAST:
        raise ValueError(f"KID needs {LEAST} images or more of each; {n} and {m} are here.")
    a, b = a.double(), b.double()
    across_a, across_b = _sums(a, b)
    within_a, within_b = (_sums(x, x)[0] - (x.square().mean(1) + 1) ** 3 for x in (a, b))
    sum_a, sum_b, across = within_a.sum(), within_b.sum(), across_a.sum()
    value = sum_a / (n * (n - 1)) + sum_b / (m * (m - 1)) - 2 * across / (n * m)

    def variance(k: int, within: Tensor, other: Tensor, across_each: Tensor, others: int) -> Tensor:
        """Of the values with one of k images left out; `other` is the other side's part, which stays."""
        left = (within.sum() - 2 * within) / ((k - 1) * (k - 2)) + other
        left = left - 2 * (across - across_each) / ((k - 1) * others)
        return (k - 1) / k * (left - left.mean()).square().sum()

    spread = variance(n, within_a, sum_b / (m * (m - 1)), across_a, m)
    spread = spread + variance(m, within_b, sum_a / (n * (n - 1)), across_b, n)
    reach = float(t.ppf(0.975, min(n, m) - 1) * spread.sqrt())
    return float(value), float(value) - reach, float(value) + reach


def _sums(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each of x (n, c) the sum of its kernels with all of y (m, c), and for each of y that with all of x."""
    rows, columns = [], torch.zeros(len(y), dtype=y.dtype)
    for part in x.split(_ROWS):
        kernel = (part @ y.T / x.shape[1] + 1) ** 3
        rows.append(kernel.sum(1))
        columns += kernel.sum(0)
    return torch.cat(rows), columns
