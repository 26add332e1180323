"""The method page: its formulas on cases worked by hand, and every picture drawn."""

import numpy as np
import pytest

from softvq_lib import method_figures as draw
from softvq_lib import method_maths as maths

LINE = np.array([[0.0], [1.0]])


def test_posterior_by_hand():
    token = np.array([[0.0]])
    odds = np.exp(-1 / 0.5)  # distance 1 against distance 0 at τ = 0.5
    np.testing.assert_allclose(maths.posterior(token, LINE, 0.5), [[1 / (1 + odds), odds / (1 + odds)]])
    odds = np.exp(-1 / (2 * 0.5))
    squared = maths.posterior(token, LINE, 0.5, "squared")
    np.testing.assert_allclose(squared, [[1 / (1 + odds), odds / (1 + odds)]])


def test_released_by_hand():
    codes = np.array([[3.0, 0.0], [0.0, 0.1]])
    q = maths.posterior(np.array([[2.0, 0.0]]), codes, 0.5, "released")  # cosines 1 and 0
    np.testing.assert_allclose(q, [[np.exp(2) / (np.exp(2) + 1), 1 / (np.exp(2) + 1)]])


def test_released_is_squared_on_the_sphere():
    rng = np.random.default_rng(0)
    z_hat, codes = maths.unit(rng.normal(size=(6, 5))), maths.unit(rng.normal(size=(9, 5)))
    released = maths.posterior(z_hat, codes, 0.07, "released")
    np.testing.assert_allclose(released, maths.posterior(z_hat, codes, 0.07, "squared"), atol=1e-14)
    assert np.abs(released - maths.posterior(z_hat, codes, 0.07, "paper")).max() > 0.01


@pytest.mark.parametrize("form", maths.FORMS)
def test_limits(form):
    rng = np.random.default_rng(1)
    z_hat, codes = maths.unit(rng.normal(size=(6, 3))), maths.unit(rng.normal(size=(5, 3)))
    nearest = np.argmin(np.linalg.norm(z_hat[:, None] - codes, axis=-1), axis=1)
    np.testing.assert_allclose(maths.posterior(z_hat, codes, 1e-4, form), np.eye(5)[nearest], atol=1e-9)
    np.testing.assert_allclose(maths.posterior(z_hat, codes, 1e6, form), 1 / 5, atol=1e-5)


def test_bad_arguments():
    with pytest.raises(ValueError, match="above 0, got 0"):
        maths.posterior(LINE, LINE, 0)
    with pytest.raises(ValueError, match="'cosine' is unknown.*paper, squared, released"):
        maths.posterior(LINE, LINE, 0.07, "cosine")


def test_entropies_by_hand():
    one_hot, halves = np.array([1.0, 0.0]), np.array([0.5, 0.5])
    assert maths.entropy(one_hot) == 0
    assert maths.entropy(halves) == pytest.approx(np.log(2))
    assert maths.perplexity(halves) == pytest.approx(2)
    assert maths.kl_divergence(one_hot, halves) == pytest.approx(np.log(2))
    assert maths.kl_divergence(halves, halves) == 0
    assert maths.kl_divergence(np.array([0.25, 0.75]), halves) == pytest.approx(np.log(2) - 0.562335, abs=1e-6)


def test_mutual_information_by_hand():
    assert maths.mutual_information(np.eye(4)) == pytest.approx(np.log(4))  # each token names its own code
    assert maths.mutual_information(np.tile([0.3, 0.7], (5, 1))) == pytest.approx(0)  # tokens look the same
    assert maths.mutual_information(np.array([[1.0, 0.0], [0.5, 0.5]])) == pytest.approx(0.562335 - np.log(2) / 2)


@pytest.mark.parametrize("form", maths.FORMS)
def test_jacobian_is_the_derivative(form):
    rng = np.random.default_rng(2)
    z_hat, codes, step = rng.normal(size=(3, 4)), rng.normal(size=(7, 4)), 1e-6
    values = maths.unit(codes) if form == "released" else codes
    expected = np.empty((3, 4, 4))
    for i, e in enumerate(step * np.eye(4)):
        up, down = (maths.posterior(z_hat + s * e, codes, 0.5, form) @ values for s in (1, -1))
        expected[:, :, i] = (up - down) / (2 * step)
    np.testing.assert_allclose(maths.jacobian(z_hat, codes, 0.5, form), expected, atol=1e-8)


def test_jacobian_is_finite_on_a_codeword():
    assert np.isfinite(maths.jacobian(np.zeros((1, 2)), np.eye(3, 2), 0.07)).all()
    assert np.isfinite(maths.jacobian(np.ones((1, 2)), np.ones((1, 2)), 0.07)).all()


def test_soft_kmeans_by_hand():
    x = np.array([[0.0], [0.2], [1.0], [1.2]])
    hard = maths.soft_kmeans(x, np.array([[-0.5], [2.0]]), 0.0, 3)
    assert hard.shape == (4, 2, 1)
    np.testing.assert_allclose(hard[-1], [[0.1], [1.1]])
    wide = maths.soft_kmeans(x, np.array([[-0.5], [2.0]]), 1e9, 1)
    np.testing.assert_allclose(wide[-1], [[0.6], [0.6]], atol=1e-6)
    idle = maths.soft_kmeans(x, np.array([[0.5], [99.0]]), 0.0, 1)
    np.testing.assert_allclose(idle[-1], [[0.6], [99.0]])


def test_the_raw_initialisation_is_dead_and_the_sphere_is_not():
    sweep = maths.temperature_sweep(np.array([0.07]), k=512, d=8)
    (raw_used, raw_slope), (used, slope) = (
        sweep["paper, codebook U(−1/K, 1/K)"],
        sweep["released (cosine)"],
    )
    assert raw_used[0] == pytest.approx(512, rel=1e-3) and raw_slope[0] < 1e-4
    assert 5 < used[0] < 256 and slope[0] > 0.01


def test_the_toy_hull_is_convex_and_holds_every_codeword():
    edges = np.diff(draw.TOY_HULL, axis=0)
    for corner, edge in zip(draw.TOY_HULL[:-1], edges, strict=True):
        to_codes = draw.TOY_CODEBOOK - corner
        side = edge[0] * to_codes[:, 1] - edge[1] * to_codes[:, 0]
        assert (side < 1e-12).all()  # clockwise: every codeword on the right of every edge


@pytest.mark.parametrize("name", [n for n in dir(draw) if n.startswith("draw_")])
def test_pictures_are_drawn_and_repeat(name):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    first, second = (FigureCanvasAgg(getattr(draw, name)()) for _ in range(2))
    for canvas in (first, second):
        canvas.draw()
    pixels = np.asarray(first.buffer_rgba())
    assert pixels[..., :3].std() > 5  # not an empty sheet
    np.testing.assert_array_equal(pixels, np.asarray(second.buffer_rgba()))
