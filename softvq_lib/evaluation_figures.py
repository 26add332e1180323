"""Figures of an evaluation, of results rows and their pictures alone: reconstructions, degradations, bias against n."""

from pathlib import Path

import numpy as np

from softvq_lib import results as rows_of
from softvq_lib.evaluation.degradations import STRENGTHS
from softvq_lib.evaluation_rows import plain
from softvq_lib.figures import _recorded_pictures, _rows_of_tiles, _strip
from softvq_lib.style import COLOUR_CYCLE, OKABE_ITO, WIDTH, new_figure

# How degradations are called in a legend, and what their strengths are.
_LEGEND = {"noise": "noise, {} to {} levels", "blur": "blur, {} to {} px", "jpeg": "JPEG, quality {} to {}"}
_LEGEND |= {"resize": "down and up, {} to {} times"}
_MARKERS = dict(zip(STRENGTHS, "osD^", strict=True))
_SEEN = 3  # differences are shown so many times as large
_RISING = ("psnr", "ssim", "precision", "recall")  # metrics that are better when they are higher


def recorded_reconstructions(row: dict, folder: Path, width: float = 0.8 * WIDTH):
    """Show the reconstructions that a results row names; of data that may be shown, originals and differences too.

    Args:
        row: With pictures of `softvq_lib.evaluate.evaluate`, as the first of a tokenizer has them.
        folder: That they lie in.
        width: Inches.

    Raises:
        ValueError: when a picture is missing or is not the one that was recorded.
    """
    found = _recorded_pictures(rows_of.check(row), folder)
    sheets = {path.stem.rsplit("-", 1)[1]: _strip(path) for path in found.values()}
    lines = [(name, sheets[key]) for name, key in (("original", "originals"), ("decoded", "decoded")) if key in sheets]
    if len(lines) == 2:
        pairs = zip(sheets["originals"], sheets["decoded"], strict=True)
        lines.append((f"difference × {_SEEN}", [(_SEEN * np.abs(a - b).mean(-1)).clip(max=1) for a, b in pairs]))
    return _rows_of_tiles(lines, width=width)


def samples(images, columns: int = 10, width: float = WIDTH):
    """Show generated images (b, 3, height, width) in [-1, 1], `columns` a row."""
    from softvq_lib.generator_figures import _show

    lines = -(-len(images) // columns)
    figure, axis = new_figure(1, 1, width * lines / columns * images.shape[2] / images.shape[3], width)
    _show(axis, images, columns)
    return figure


def degradations(rows: list[dict]):
    """Draw what each metric says of images that are made worse in four ways, a panel a metric.

    Each panel goes from the best of all its values, 0, to the worst, 1; both stand over it.

    Args:
        rows: Of one set of images; rows of other things are passed over.

    Raises:
        ValueError: for no such rows, those of several sets, or a row without its origin.
    """
    series = [rows_of.check(row) for row in rows if "kind" in row["config"]]
    images = {row["run"].rpartition(", ")[0] for row in series}
    if len(images) != 1:
        listed = ", ".join(sorted(images)) or "none"
        raise ValueError(f"series of degraded images: {listed}. Give the rows of one set of images.")
    metrics = [m for m in dict.fromkeys(row["metric"] for row in series) if not m.endswith("-inf")]
    columns = min(3, len(metrics))
    lines = -(-len(metrics) // columns)
    figure, axes = new_figure(lines, columns, 1.75 * lines + 0.6, sharex=True, sharey=True, squeeze=False)
    for axis, metric in zip(axes.flat, metrics, strict=False):
        mine = {row["config"]["kind"]: row["curve"] for row in series if row["metric"] == metric}
        values = [value for curve in mine.values() for _, value in curve]
        best, worst = min(values), max(values)
        if metric.startswith(_RISING):
            best, worst = worst, best
        for colour, kind in zip(COLOUR_CYCLE, STRENGTHS, strict=False):
            heights = [(value - best) / ((worst - best) or 1) for _, value in mine[kind]]
            places = range(1, len(heights) + 1)
            axis.plot(places, heights, marker=_MARKERS[kind], markersize=4, color=colour, linewidth=1.4)
        axis.set_title(f"{plain(metric)}\n{best:.3g} … {worst:.3g}", fontsize=10)
        axis.set_xticks(places)
    for axis in axes.flat[len(metrics) :]:
        axis.set_axis_off()
    for axis in axes.flat[max(0, len(metrics) - columns) : len(metrics)]:  # the lowest of each column
        axis.set_xlabel("strength")
        axis.tick_params(labelbottom=True)
    for axis in axes[:, 0]:
        axis.set(yticks=[0, 1], yticklabels=["best", "worst"])
    said = {row["config"]["kind"]: row["curve"] for row in series}
    names = [_LEGEND[kind].format(*(f"{curve[i][0]:g}" for i in (0, -1))) for kind, curve in said.items()]
    figure.legend(axes.flat[0].lines, names, loc="outside lower center", ncols=2)
    return figure


def bias(rows: list[dict], width: float = WIDTH):
    """Draw the Fréchet distance against the number of images n, over 1/n, with its limit and that limit's interval.

    A panel for each number of dimensions, a line for each two sets of images: what was judged against the real images,
    and two halves of the real ones, whose distance is 0. Hollow points have fewer images than dimensions.

    Args:
        rows: Rows of other things are passed over.
        width: Inches.

    Raises:
        ValueError: for no such rows, or a row without its origin.
    """
    from matplotlib.lines import Line2D

    curves = [rows_of.check(row) for row in rows if row["metric"].endswith("-inf") and "dimensions" in row["terms"]]
    if not curves:
        raise ValueError(
            "none of the rows has a Fréchet distance against n: ask for bias=True, of more than 64 images."
        )
    panels = sorted({row["terms"]["dimensions"] for row in curves})
    runs = list(dict.fromkeys(row["run"] for row in curves))
    figure, axes = new_figure(1, len(panels), 3.4, width, squeeze=False)
    for axis, dimensions in zip(axes[0], panels, strict=True):
        mine = [row for row in curves if row["terms"]["dimensions"] == dimensions]
        for row in mine:
            colour = OKABE_ITO["grey"] if "halves" in row["config"] else COLOUR_CYCLE[runs.index(row["run"])]
            n, distance = np.array(row["curve"]).T
            axis.plot(1 / n, distance, color=colour, label=row["run"])
            for some, face in ((n > dimensions, colour), (n <= dimensions, "white")):
                axis.plot(1 / n[some], distance[some], "o", color=colour, markerfacecolor=face)
            axis.plot([0, 1 / n.max()], [row["value"], distance[n.argmax()]], "--", color=colour, linewidth=1)
            reach = [[row["value"] - row["low"]], [row["high"] - row["value"]]]
            axis.errorbar(0, row["value"], reach, fmt="_", color=colour, capsize=3, linewidth=1, clip_on=False)
        numbers = sorted({n for row in mine for n, _ in row["curve"]}, reverse=True)
        axis.set_xticks([0, *(1 / n for n in numbers)], ["∞", *(f"{n:,}" for n in numbers)], rotation=90)
        axis.set(xlabel="images n, spaced as 1/n", title=f"{dimensions:,} dimensions")
        axis.axhline(0, color=OKABE_ITO["black"], linewidth=0.8)
    axes[0, 0].set_ylabel("Fréchet distance")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    handles.append(Line2D([], [], linestyle="", marker="o", color=OKABE_ITO["black"], markerfacecolor="white"))
    figure.legend(handles, [*labels, "n not above the dimensions"], loc="outside lower center", ncols=2)
    return figure
