"""The Fréchet distance between two Gaussians (Heusel et al. 2017): streamed moments, its floor, its bias against n.

With moments of n images each, the distance is too large by about a/n, and a can exceed the distance itself. The same
images tell how much: without one group of them the distance is larger yet, and the straight line against 1/n through
both goes to n = infinity (FD∞, Chong and Forsyth 2020). Drawn through the groups left out in turn, that line is the
jackknife's correction of bias, and comes with the jackknife's interval.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from softvq_lib.config import one_of
from softvq_lib.data.source import fixed_order

GROUPS = 8  # that images are dealt into
PROJECTIONS = {"proj64-v1": 64}  # name -> dimensions


class Moments:
    """Number, mean and covariance of features, in float64, without the features.

    Memory depends on the width alone. The sum of two is as if all their features had been seen at once, to rounding;
    so batches and their order do not matter.

    Attributes:
        count: Features seen; 0 where a file does not tell.
        mean: (c,).
        scatter: Sum of (x - mean) (x - mean)^T over the features, (c, c).
    """

    def __init__(self, width: int):
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self.scatter = torch.zeros(width, width, dtype=torch.float64)

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        """Return the moments of features (n, c)."""
        moments = cls(features.shape[1])
        moments.update(features)
        return moments

    @classmethod
    def given(cls, mean: Tensor, covariance: Tensor) -> "Moments":
        """Return moments of unknown number: mean (c,) and covariance (c, c)."""
        moments = cls(len(mean))
        moments.mean, moments.scatter = mean.double(), covariance.double()
        return moments

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance, (c, c).

        Raises:
            ValueError: of a single feature.
        """
        if self.count == 1:
            raise ValueError("the covariance of one feature is not defined: give two or more.")
        return self.scatter / (self.count - 1) if self.count else self.scatter

    def update(self, features: Tensor) -> None:
        """Take in more features (b, c)."""
        x = features.detach().to("cpu", torch.float64)
        if len(x):
            mean = x.mean(0)
            x = x - mean
            self._add(len(x), mean, x.T @ x)

    def _add(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        shift = mean - self.mean
        self.scatter += scatter
        self.scatter += torch.outer(shift, shift) * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total

    def __add__(self, other: "Moments") -> "Moments":
        """Moments of the features of both."""
        both = Moments(len(self.mean))
        for part in (self, other):
            if part.count:
                both._add(part.count, part.mean, part.scatter)
        return both

    def __sub__(self, other: "Moments") -> "Moments":
        """Moments of the features that are left without those of `other`, which must be among them."""
        rest = Moments(len(self.mean))
        rest.count = self.count - other.count
        shift = (self.mean - other.mean) * (other.count / rest.count)
        rest.mean = self.mean + shift
        rest.scatter = (
            self.scatter - other.scatter - torch.outer(shift, shift) * (self.count * rest.count / other.count)
        )
        return rest

    def project(self, matrix: Tensor) -> "Moments":
        """Return the moments of features @ matrix, where the matrix is (c, k)."""
        projected = Moments(matrix.shape[1])
        projected.count = self.count
        projected.mean, projected.scatter = self.mean @ matrix, matrix.T @ self.scatter @ matrix
        return projected


def merged(groups: Sequence[Moments]) -> Moments:
    """Return the moments of all groups' features."""
    return sum(groups[1:], groups[0])


def groups_of(first: int, count: int, groups: int = GROUPS) -> np.ndarray:
    """Return the groups (count,), 0 to groups - 1, of images number first, ..., first + count - 1.

    Each run of `groups` images is dealt out in an order of its own, fixed for ever: the groups are equally large
    wherever the images end, and classes that alternate do not fall into one group.
    """
    runs = range(first // groups, (first + count + groups - 1) // groups)
    dealt = np.concatenate([np.empty(0, np.int64), *(fixed_order(groups, salt=run) for run in runs)])
    return dealt[first % groups :][:count]


def root_trace(a: Tensor, b: Tensor) -> float:
    """Return the trace of (a b)^½, where a and b are covariances (c, c), in float64.

    It is the sum of the roots of the eigenvalues of a^½ b a^½. These are also those of r^T b r for any r with
    r r^T = a; Cholesky's r is cheapest, and where a is singular the symmetric root is taken. No general matrix root is
    formed: scipy's takes several times as long and gives wrong or complex results for singular matrices.
    """
    root, failed = torch.linalg.cholesky_ex(a)
    if failed:
        values, vectors = torch.linalg.eigh(a)
        root = vectors * values.clamp(min=0).sqrt()
    inner = root.T @ b @ root
    return float(torch.linalg.eigvalsh((inner + inner.T) / 2).clamp(min=0).sqrt().sum())


def frechet_distance(a: Moments, b: Moments) -> float:
    """Return |mean_a - mean_b|² + tr(cov_a + cov_b - 2 (cov_a cov_b)^½), never below 0.

    Raises:
        ValueError: for moments of different widths, or that are not finite.
    """
    if len(a.mean) != len(b.mean):
        raise ValueError(f"features of {len(a.mean)} and of {len(b.mean)} dimensions: use one extractor for both.")
    first, second = a.covariance, b.covariance
    if not all(x.isfinite().all() for x in (a.mean, b.mean, first, second)):
        raise ValueError("the moments are not finite: look for images or features that are not finite.")
    shift = (a.mean - b.mean).square().sum()
    return max(0.0, float(shift + first.trace() + second.trace()) - 2 * root_trace(first, second))


@dataclass(frozen=True)
class Distance:
    """A Fréchet distance between groups of features.

    Attributes:
        value: Of all features, too large by what few images add.
        low, high: 95 % interval of `value` at this number of images: where it would fall with other images. It does
            not say how far the value is from that of all images there are. None without groups.
        extrapolated: FD∞, the value at 1/n = 0. None without groups.
        extrapolated_low, extrapolated_high: 95 % interval of FD∞; covers the true distance.
    """

    value: float
    low: float | None = None
    high: float | None = None
    extrapolated: float | None = None
    extrapolated_low: float | None = None
    extrapolated_high: float | None = None


def grouped_distance(a: Sequence[Moments], b: Sequence[Moments]) -> Distance:
    """Return the distance between all features of a and all of b, with intervals, and FD∞.

    The groups are left out one after the other, of both sides at once (delete-a-group jackknife). Where one side is a
    single group it stays as it is: its share of bias stays too, and the intervals know nothing of its sampling.

    Args:
        a: Moments of equally large random groups, of one kind of image (see `groups_of`).
        b: As many groups of the other kind, or a single one.

    Raises:
        ValueError: for numbers of groups that do not fit.
    """
    from scipy.stats import t

    k = max(len(a), len(b))
    if {len(a), len(b)} - {1, k}:
        raise ValueError(f"{len(a)} and {len(b)} groups: give as many of both, or a single one.")
    all_a, all_b = merged(a), merged(b)
    value = frechet_distance(all_a, all_b)
    if k == 1:
        return Distance(value)

    def left(whole: Moments, groups: Sequence[Moments], j: int) -> Moments:
        return whole - groups[j] if len(groups) > 1 else whole

    without = np.array([frechet_distance(left(all_a, a, j), left(all_b, b, j)) for j in range(k)])
    limit = k * value - (k - 1) * without.mean()
    reach = float(t.ppf(0.975, k - 1) * np.sqrt((k - 1) ** 2 / k * without.var(ddof=1)))
    return Distance(value, max(0.0, value - reach), value + reach, float(limit), limit - reach, limit + reach)


def split_half(groups: Sequence[Moments]) -> Distance | None:
    """Return the distance between two halves of the features, its floor: what images of one kind have among themselves.

    It is that of n/2 images against n/2; extrapolated it should be near 0. None for a single group.
    """
    half = len(groups) // 2
    return grouped_distance(groups[:half], groups[half : 2 * half]) if half else None


def bias_curve(a: Sequence[Moments], b: Sequence[Moments]) -> list[tuple[int, float]]:
    """Return (n, distance) of ever fewer features for a figure against 1/n: all groups, halves, quarters and so on.

    Args:
        a: Groups whose number is a power of two.
        b: As many, halved along; or a single one, which stays.

    Returns:
        Number of features of a, and the mean distance of all such parts; the largest first.
    """
    points, parts = [], 1
    while parts <= len(a):
        size = len(a) // parts
        pairs = [(a[i : i + size], b[i : i + size] if len(b) > 1 else b) for i in range(0, len(a), size)]
        distances = [frechet_distance(merged(x), merged(y)) for x, y in pairs]
        points.append((sum(group.count for group in a) // parts, float(np.mean(distances))))
        parts *= 2
    return points


def projection(width: int, name: str = "proj64-v1") -> Tensor:
    """Return a fixed projection of features to fewer dimensions, (width, k), with orthonormal columns.

    The features are dealt out to k columns in a random order that is fixed for ever; a column is their sum with random
    signs, divided by its length. So the same bytes come out on every machine.

    Args:
        width: Dimensions of the features.
        name: A key of `PROJECTIONS`.

    Raises:
        ValueError: for an unknown name, or features of fewer dimensions.
    """
    one_of("projection", name, PROJECTIONS)
    k = PROJECTIONS[name]
    if width < k:
        raise ValueError(f"{name} takes features of {k} dimensions or more, not {width}: use them as they are.")
    matrix = np.zeros((width, k))
    column = np.arange(width) % k
    signs = 1 - 2 * (fixed_order(width, salt=1) % 2)
    matrix[fixed_order(width), column] = signs / np.sqrt(np.bincount(column))[column]
    return torch.from_numpy(matrix)
