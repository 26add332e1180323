"""Pictures of the method page: from K-means to SoftVQ (Eq. 2, Eq. 4 and Fig. 2 of arXiv:2412.10958).

The numbers come from `softvq_lib.method_maths`. Every drawing function returns a matplotlib `Figure` and
draws the same picture each time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from softvq_lib.method_maths import jacobian, perplexity, posterior, soft_kmeans, temperature_sweep
from softvq_lib.style import OKABE_ITO, SEQUENTIAL, WIDTH, colour_of, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Hand-placed so that no codeword hides another and every Voronoi cell is visible in [-1, 1]^2.
TOY_CODEBOOK = np.array(
    [[-0.62, 0.58], [0.05, 0.72], [0.68, 0.45], [-0.72, -0.15], [0.02, -0.02], [-0.35, -0.7], [0.52, -0.55]]
)
TOY_HULL = TOY_CODEBOOK[[0, 1, 2, 6, 5, 3, 0]]  # all but the middle one
CODE_COLOURS = ("blue", "orange", "green", "purple", "yellow", "vermilion", "sky")


def _plane(axes, limit: float = 1.05) -> None:
    axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])
    axes.grid(False)
    axes.set_anchor("N")
    axes.spines[:].set_visible(False)


def _rgb() -> np.ndarray:
    from matplotlib.colors import to_rgb

    return np.array([to_rgb(OKABE_ITO[name]) for name in CODE_COLOURS])


def draw_assignment(temperatures: tuple[float, ...] = (0.0, 0.07, 0.3, 3.0)) -> Figure:
    """Maps of the plane, each ẑ in the codewords' colours mixed by q(k|ẑ); τ = 0 means hard assignment."""
    side = np.linspace(-1.05, 1.05, 220)
    grid = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)  # (l, d)
    nearest = np.argmin(np.linalg.norm(grid[:, None] - TOY_CODEBOOK, axis=-1), axis=1)
    figure, panels = new_figure(2, 2, WIDTH * 1.05)
    for axes, t in zip(panels.flat, temperatures, strict=True):
        q = posterior(grid, TOY_CODEBOOK, t) if t > 0 else np.eye(len(TOY_CODEBOOK))[nearest]
        image = (1 - 0.75 * (1 - q @ _rgb())).reshape(len(side), len(side), 3)
        axes.imshow(image, origin="lower", extent=(-1.05, 1.05, -1.05, 1.05), interpolation="bilinear")
        for k in range(len(TOY_CODEBOOK)):
            mask = (nearest == k).reshape(len(side), len(side)).astype(float)
            axes.contour(side, side, mask, levels=[0.5], colors="white", linewidths=0.7)
        axes.scatter(*TOY_CODEBOOK.T, c="black", s=22)
        used = perplexity(q).mean()
        axes.set_title(f"{'τ → 0 (VQ)' if t == 0 else f'τ = {t:g}'}: perplexity {used:.1f}")
        _plane(axes)
    return figure


def draw_latents() -> Figure:
    """Left: where z lands for tokens spread over the square, at three τ. Right: the path of z as τ grows."""
    tokens = np.random.default_rng(0).uniform(-1, 1, (350, 2))
    figure, (left, right) = new_figure(1, 2, WIDTH * 0.62)
    for t, name, size in ((0.03, "sky", 26), (0.2, "vermilion", 9), (1.0, "black", 5)):
        z = posterior(tokens, TOY_CODEBOOK, t) @ TOY_CODEBOOK  # (l, d)
        left.scatter(*z.T, s=size, color=OKABE_ITO[name], linewidths=0, alpha=0.8, label=f"τ = {t:g}")
    taus = np.geomspace(0.02, 8, 240)
    starts = [[-0.95, 0.9], [0.95, 0.8], [0.9, -0.95], [-0.9, -0.85], [-0.98, 0.15], [0.35, 0.98]]
    for start in np.array(starts):
        z = np.concatenate([posterior(start[None], TOY_CODEBOOK, t) @ TOY_CODEBOOK for t in taus])
        right.plot(*start, marker="x", color="black", ms=7, mew=1.8, ls="")
        right.plot(*np.stack([start, z[0]]).T, color=OKABE_ITO["grey"], lw=0.9, ls=":")
        shown = right.scatter(*z.T, c=np.log10(taus), s=9, cmap=SEQUENTIAL, linewidths=0)
    mean = TOY_CODEBOOK.mean(axis=0)
    right.plot(*mean, marker="*", color=OKABE_ITO["vermilion"], ms=14, mec="white", ls="")
    for axes, title in ((left, "where z lands"), (right, "path of z as τ grows")):
        axes.plot(*TOY_HULL.T, color=OKABE_ITO["grey"], lw=1, ls="--", zorder=0)
        axes.scatter(*TOY_CODEBOOK.T, facecolors="none", edgecolors="black", s=60)
        axes.set_title(title)
        _plane(axes, 1.1)
    left.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=3, handletextpad=0, columnspacing=0.5)
    bar = figure.colorbar(shown, cax=right.inset_axes([0.05, -0.06, 0.9, 0.03]), orientation="horizontal")
    bar.set_ticks([-1, 0], labels=["τ = 0.1", "τ = 1"])
    return figure


def draw_soft_kmeans(temperature: float = 0.12, steps: int = 12) -> Figure:
    """K-means and its soft form from one start: points coloured by assignment, centres with their path."""
    rng = np.random.default_rng(3)
    means = np.array([[-0.6, 0.45], [0.6, 0.5], [0.0, -0.5]])
    points = np.concatenate([m + 0.3 * rng.normal(size=(110, 2)) for m in means])
    start = np.array([[-0.9, -0.6], [-0.2, -0.9], [0.9, -0.5]])
    figure, panels = new_figure(1, 2, WIDTH * 0.58)
    for axes, t in zip(panels, (0.0, temperature), strict=True):
        path = soft_kmeans(points, start, t, steps)  # (steps + 1, k, d)
        q = posterior(points, path[-1], t or 1e-6, "squared")
        axes.scatter(*points.T, c=q @ _rgb()[:3], s=12, linewidths=0)
        for k in range(len(start)):
            axes.plot(*path[:, k].T, color="black", lw=1.2, marker=".", ms=4)
            axes.plot(*path[-1, k], color="white", mec="black", marker="o", ms=9)
        axes.set_title("K-means" if t == 0 else f"soft K-means (EM), τ = {t:g}")
        _plane(axes, 1.35)
    return figure


def draw_gradients(temperature: float = 0.07) -> Figure:
    """z and ∂z/∂ẑ on a line: VQ's staircase with the straight-through slope, SoftVQ's curve with its own."""
    codes = np.array([[-0.8], [-0.3], [0.1], [0.75]])
    z_hat = np.linspace(-1, 1, 801)[:, None]
    figure, (top, bottom) = new_figure(2, 1, WIDTH * 0.85, sharex=True)
    hard = codes[np.argmin(np.abs(z_hat - codes.T), axis=1), 0]
    breaks = np.where(np.diff(hard, prepend=hard[0]) != 0, np.nan, hard)
    soft = (posterior(z_hat, codes, temperature, "squared") @ codes)[:, 0]
    top.plot(z_hat[:, 0], breaks, color=colour_of("vq"), label="VQ")
    top.plot(z_hat[:, 0], soft, color=colour_of("softvq"), label=f"SoftVQ, τ = {temperature:g}")
    top.set(ylabel="z", yticks=codes[:, 0])
    slope = jacobian(z_hat, codes, temperature, "squared")[:, 0, 0]
    bottom.plot(z_hat[:, 0], 0 * slope, color=colour_of("vq"), label="VQ: 0")
    bottom.plot(z_hat[:, 0], 0 * slope + 1, color=colour_of("vq"), ls="--", label="VQ, straight-through: 1")
    bottom.plot(z_hat[:, 0], slope, color=colour_of("softvq"), label="SoftVQ")
    bottom.set(xlabel="ẑ", ylabel="∂z/∂ẑ", ylim=(-0.1, 2.5))
    top.legend(loc="upper left")
    bottom.legend(loc="upper left")
    return figure


def draw_temperature() -> Figure:
    """Codewords that share a token, and the gradient to the encoder, against τ at K = 8192, D = 32."""
    tau = np.geomspace(0.01, 10, 15)
    figure, (top, bottom) = new_figure(2, 1, WIDTH * 1.1, sharex=True)
    looks = (
        {"color": OKABE_ITO["vermilion"], "marker": "o"},
        {"color": OKABE_ITO["green"], "marker": "s", "lw": 4, "ms": 9},
        {"color": OKABE_ITO["blue"], "marker": "D"},
        {"color": OKABE_ITO["purple"], "marker": "^", "ls": "--"},
    )
    for (name, (used, slope)), look in zip(temperature_sweep(tau).items(), looks, strict=True):
        top.plot(tau, used, label=name, **look)
        bottom.plot(tau, slope, **look)
    for axes in (top, bottom):
        axes.set(xscale="log", yscale="log")
        axes.axvline(0.07, color=OKABE_ITO["grey"], lw=1, ls=":")
    top.set(ylabel="perplexity of q(k|ẑ)", ylim=(0.8, 20000))
    bottom.set(ylabel="‖∂z/∂ẑ‖", xlabel="temperature τ", ylim=(1e-12, 100))
    bottom.annotate("τ = 0.07", (0.07, 2e-12), xytext=(4, 0), textcoords="offset points", color="#555555")
    figure.legend(*top.get_legend_handles_labels(), loc="outside upper left", ncols=1)
    return figure


def draw_architecture() -> Figure:
    """Fig. 2 (left) in our own drawing: patches and latent tokens in, mask tokens and z out."""
    from matplotlib.patches import FancyBboxPatch, Rectangle

    figure, axes = new_figure(1, 1, WIDTH * 0.95)
    axes.set(xlim=(0, 10), ylim=(-0.7, 8.8))
    axes.axis("off")
    patch, latent, mask = OKABE_ITO["sky"], OKABE_ITO["orange"], "#D9D9D9"

    def tokens(x, y, colour, n, label, above=False):
        for i in range(n):
            axes.add_patch(Rectangle((x + 0.5 * i, y), 0.4, 0.4, facecolor=colour, edgecolor="black", lw=0.8))
        middle, height = x + 0.25 * n - 0.05, y + (0.5 if above else -0.1)
        axes.text(middle, height, label, ha="center", va="bottom" if above else "top", linespacing=0.95)

    def box(x, y, width, height, text):
        look = {"boxstyle": "round,pad=0,rounding_size=0.15", "facecolor": "#EEF3F8", "edgecolor": "black"}
        axes.add_patch(FancyBboxPatch((x, y), width, height, **look))
        axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", linespacing=1.3)

    def arrow(x, y0, y1):
        head = {"arrowstyle": "-|>", "lw": 1.2, "color": "black", "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", (x, y1), (x, y0), arrowprops=head)

    ramp = np.add.outer(np.arange(4), np.arange(4))
    for x, name in ((0.55, "image x"), (7.45, "image x̂")):
        axes.imshow(ramp, extent=(x, x + 1.3, 0, 1.3), cmap="Blues", vmin=-3, vmax=8, aspect="auto")
        axes.text(x + 0.65, -0.1, name, ha="center", va="top")
    tokens(0.25, 2.4, patch, 4, "N patches")
    tokens(2.6, 2.4, latent, 3, "L learnt latents")
    box(0.2, 3.5, 3.9, 0.9, "encoder (ViT)")
    tokens(2.6, 5.2, latent, 3, "ẑ (L, D)", above=True)
    box(2.6, 6.9, 4.8, 1.5, "SoftVQ\nz = softmax(−‖ẑ − C‖/τ) C")
    tokens(5.95, 5.2, OKABE_ITO["green"], 3, "z (L, D)", above=True)
    tokens(7.8, 5.2, mask, 4, "N mask tokens", above=True)
    box(5.9, 3.5, 3.9, 0.9, "decoder (ViT)")
    tokens(7.1, 2.4, patch, 4, "N patches")
    for x, y0, y1 in (
        *((1.2, 1.35, 1.85), (1.2, 2.85, 3.45), (3.3, 2.85, 3.45), (3.3, 4.45, 5.15), (3.3, 6.1, 6.85)),
        *((6.65, 6.85, 6.1), (6.65, 5.15, 4.45), (8.75, 5.15, 4.45), (8.1, 3.45, 2.85), (8.1, 1.85, 1.35)),
    ):
        arrow(x, y0, y1)
    return figure
