"""Fréchet distances: streamed moments, other people's formulas, singular covariances, floors, and what n does."""

import hashlib

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

from softvq_lib.evaluation.fidelity_cost import trace_rows
from softvq_lib.evaluation.frechet import (
    GROUPS,
    Moments,
    bias_curve,
    frechet_distance,
    grouped_distance,
    groups_of,
    merged,
    projection,
    root_trace,
    split_half,
)


def features(n, c, seed=0, shift=0.0):
    """Correlated features (n, c) with a spectrum that falls."""
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.randn(c, c, generator=torch.Generator().manual_seed(c), dtype=torch.float64)
    scale = torch.arange(1, c + 1, dtype=torch.float64) ** -0.5
    return (torch.randn(n, c, generator=rng, dtype=torch.float64) * scale + shift) @ mixing


def dealt(x, groups=GROUPS):
    numbers = torch.from_numpy(groups_of(0, len(x), groups))
    return [Moments.of(x[numbers == number]) for number in range(groups)]


def same(a, b, tolerance=1e-12):
    assert a.count == b.count
    for x, y in ((a.mean, b.mean), (a.scatter, b.scatter)):
        assert (x - y).abs().max() <= tolerance * y.abs().max()


def test_streamed_moments_are_those_of_one_pass():
    x = features(500, 12) + 100
    streamed = Moments(12)
    for part in x.split([1, 0, 63, 200, 236]):
        streamed.update(part)
    same(streamed, Moments.of(x))
    torch.testing.assert_close(streamed.mean, x.mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(streamed.covariance, torch.cov(x.T), rtol=1e-10, atol=1e-12)


def test_the_order_does_not_matter():
    x = features(300, 8) + 30
    backwards = Moments(8)
    for part in x.flip(0).split(7):
        backwards.update(part)
    same(backwards, Moments.of(x))


def test_moments_are_merged_and_taken_away_exactly():
    x = features(400, 9) + 10
    a, b, c = (Moments.of(part) for part in x.split([5, 150, 245]))
    same(a + b + c, Moments.of(x))
    same((a + b + c) - b, a + c)
    same(merged([c, a, b]), Moments.of(x))
    same(Moments(9) + a, a)


def test_memory_depends_on_the_width_alone():
    moments = Moments(8)
    for _ in range(50):
        moments.update(torch.randn(1000, 8))
    assert moments.count == 50_000 and moments.mean.numel() + moments.scatter.numel() == 8 + 64


def test_float32_features_are_summed_in_float64():
    x = (features(2000, 4) * 1e-3 + 1000).float()
    torch.testing.assert_close(Moments.of(x).covariance, torch.cov(x.double().T), rtol=1e-8, atol=0)


def test_the_closed_form_of_independent_features():
    mean, sd, other = torch.tensor([0.0, 1, 2]), torch.tensor([1.0, 2, 3]), torch.tensor([2.0, 2, 0.5])
    a, b = Moments.given(mean, sd.square().diag()), Moments.given(mean + 1, other.square().diag())
    assert frechet_distance(a, b) == pytest.approx(3 + 1 + 0 + 2.5**2, abs=1e-9)


@pytest.mark.parametrize("c", [2, 40])
def test_equal_to_scipy_and_to_torch_fidelity(c):
    x, y = features(300, c), features(250, c, seed=1, shift=0.3) * 1.2
    value = frechet_distance(Moments.of(x), Moments.of(y))
    theirs = fid_statistics_to_metric(*(fid_features_to_statistics(side) for side in (x, y)), False)[KEY_METRIC_FID]
    first, second = (np.cov(side.numpy(), rowvar=False).reshape(c, c) for side in (x, y))
    root = np.trace(sqrtm(first @ second).real)
    scipys = (x.mean(0) - y.mean(0)).square().sum() + np.trace(first) + np.trace(second) - 2 * root
    assert value == pytest.approx(float(scipys), rel=1e-6) and value == pytest.approx(theirs, rel=1e-6)


def test_singular_covariances():
    few = Moments.of(features(10, 40)), Moments.of(features(12, 40, seed=1))
    assert 0 < frechet_distance(*few) < float("inf")
    assert frechet_distance(*few) == pytest.approx(frechet_distance(*few[::-1]), rel=1e-5)
    assert 0 <= frechet_distance(few[0], few[0]) < 1e-4
    # In a plane of a wider space the distance is that in the plane.
    x, y = features(50, 2), features(60, 2, seed=1, shift=1.0)
    frame = torch.linalg.qr(torch.randn(30, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))).Q
    wide = frechet_distance(Moments.of(x @ frame.T), Moments.of(y @ frame.T))
    assert wide == pytest.approx(frechet_distance(Moments.of(x), Moments.of(y)), rel=1e-5)
    still = Moments.of(torch.ones(5, 3))  # no variance at all
    assert frechet_distance(still, Moments.of(torch.zeros(5, 3))) == 3
    assert root_trace(torch.zeros(3, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)) == 0


def test_what_cannot_be_compared():
    with pytest.raises(ValueError, match="features of 3 and of 4 dimensions"):
        frechet_distance(Moments.of(torch.randn(9, 3)), Moments.of(torch.randn(9, 4)))
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(Moments.of(torch.full((9, 3), torch.nan)), Moments.of(torch.randn(9, 3)))
    with pytest.raises(ValueError, match="covariance of one feature"):
        frechet_distance(Moments.of(torch.randn(1, 3)), Moments.of(torch.randn(9, 3)))
    with pytest.raises(ValueError, match="8 and 4 groups"):
        grouped_distance(dealt(features(64, 3)), dealt(features(64, 3), 4))


def test_groups_are_equal_and_do_not_depend_on_batches():
    whole = groups_of(0, 1003)
    parts = np.concatenate([groups_of(first, min(77, 1003 - first)) for first in range(0, 1003, 77)])
    assert np.array_equal(whole, parts) and set(np.bincount(whole)) <= {125, 126}
    assert len(groups_of(5, 0)) == 0
    # Classes that alternate with the period of the groups are in all of them.
    classes = np.arange(800) % GROUPS
    assert len({(g, c) for g, c in zip(groups_of(0, 800), classes, strict=True)}) == GROUPS**2


def test_extrapolation_finds_the_true_distance():
    """Independent features of two kinds: plain distances are far too large, FD∞ is unbiased and its intervals cover."""
    c, n, runs = 24, 60, 100
    sd = torch.arange(1, c + 1, dtype=torch.float64) ** -0.5
    for shift in (0.0, 0.3):
        other = sd * (1 + shift * torch.linspace(-1, 1, c, dtype=torch.float64))
        true = float((shift * sd).square().sum() + (sd - other).square().sum())
        found = []
        for seed in range(runs):
            rng = torch.Generator().manual_seed(seed)
            x, y = torch.randn(2, n, c, generator=rng, dtype=torch.float64)
            found.append(grouped_distance(dealt(x * sd), dealt(y * other + shift * sd)))
        plain, limit = (np.array([getattr(each, name) for each in found]) for name in ("value", "extrapolated"))
        covered = np.mean([each.extrapolated_low <= true <= each.extrapolated_high for each in found])
        assert plain.mean() - true > 0.5 and abs(limit.mean() - true) < 0.05
        assert 3 * np.square(limit - true).mean() ** 0.5 < np.square(plain - true).mean() ** 0.5 and covered >= 0.92
        # The interval of the plain value is of its scatter from sample to sample.
        reach = np.mean([each.high - each.value for each in found])
        assert 1.2 < reach / plain.std() < 4 and all(each.low <= each.value <= each.high for each in found)


def test_against_a_single_group():
    x, y = features(400, 6), features(400, 6, seed=1)
    alone = grouped_distance(dealt(x), [Moments.of(y)])
    assert alone.value == pytest.approx(frechet_distance(Moments.of(x), Moments.of(y)), rel=1e-9)
    # Half of the bias is taken away.
    both = grouped_distance(dealt(x), dealt(y))
    assert both.extrapolated < alone.extrapolated < alone.value
    given = grouped_distance([Moments.of(x)], [Moments.of(y)])
    assert given.low is None and given.extrapolated is None and split_half([Moments.of(x)]) is None


def test_the_floor_and_the_curve():
    x, y = features(640, 10), features(640, 10, seed=1)
    groups, others = dealt(x), dealt(y)
    halves = frechet_distance(merged(groups[:4]), merged(groups[4:]))
    assert split_half(groups).value == pytest.approx(halves)
    curve = bias_curve(groups, others)
    assert [n for n, _ in curve] == [640, 320, 160, 80]
    assert curve[0][1] == pytest.approx(grouped_distance(groups, others).value)
    for (_, large), (_, small) in zip(curve, curve[1:], strict=False):
        assert 1.5 < small / large < 3  # as 1/n
    against_all = bias_curve(groups, [Moments.of(y)])
    assert len(against_all) == 4 and against_all[-1][1] < curve[-1][1]


def test_the_projection_is_the_same_everywhere():
    matrix = projection(1280)
    torch.testing.assert_close(matrix.T @ matrix, torch.eye(64, dtype=torch.float64), atol=1e-12, rtol=0)
    assert matrix.any(1).all()  # every feature counts
    pinned = hashlib.sha256(matrix.numpy().astype("<f8").tobytes()).hexdigest()
    assert pinned == "608c8965ee182f63123c85cefd774085484a2be08baba76594314a3f8ddb1679"
    with pytest.raises(ValueError, match="64 dimensions or more, not 63"):
        projection(63)
    with pytest.raises(ValueError, match="projection='proj64-v2' is not known"):
        projection(128, "proj64-v2")


def test_projected_moments_are_those_of_projected_features():
    x, matrix = features(200, 70), projection(70)
    same(Moments.of(x).project(matrix), Moments.of(x @ matrix))


def test_the_benchmark_compares_the_same_number():
    rows = trace_rows(12, features=40, rounds=3)
    assert [row["against"] for row in rows] == ["scipy.linalg.sqrtm", "torch-fidelity"]
    assert all(row["difference"] < 1e-8 and row["low"] <= row["ratio"] <= row["high"] for row in rows)
    with pytest.raises(ValueError, match="rounds=2"):
        trace_rows(4, features=9, rounds=2)
