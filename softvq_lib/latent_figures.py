"""Figures of the latent space (Fig. 4): functions of results rows and of the arrays that go with them, nothing else."""

import json
import re
from pathlib import Path

import numpy as np

from softvq_lib import results as rows_of
from softvq_lib.style import COLOUR_CYCLE, OKABE_ITO, QUANTIZER_NAMES, WIDTH, colour_of, new_figure

_CLASSES = 10  # in colours at most
_SAID = ("purity", "silhouette")
_TOKENS = 32  # whose attention is shown at most


def recorded(rows: list[dict], folder: Path) -> dict[str, tuple[list[dict], dict[str, np.ndarray]]]:
    """Sort recorded rows by run, each with its arrays: what the figures take, which say the arrays' shapes.

    Args:
        rows: As `softvq_lib.results.read` gives them.
        folder: Where the arrays lie.

    Raises:
        ValueError: when no row of a run names arrays, or their file is missing or not the one that was recorded.
    """
    runs: dict[str, list[dict]] = {}
    for row in rows:
        runs.setdefault(row["run"], []).append(row)
    found = {}
    for run, its in runs.items():
        files = [(row, name) for row in its for name in row.get("arrays", {})]
        if not files:
            raise ValueError(f"no row of {run!r} names its arrays: record it anew.")
        row, name = files[0]
        found[run] = its, rows_of.read_arrays(row, name, folder)
    return found


def _values(rows: list[dict]) -> dict[str, dict]:
    return {row["metric"]: row for row in rows}


def _said(rows: list[dict], metric: str, digits: int) -> str:
    row = _values(rows).get(metric)
    return "–" if row is None else f"{row['value']:.{digits}f} [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"


def _absent(text: str):
    """A figure that says why it is empty."""
    figure, axis = new_figure(1, 1, 0.6)
    axis.set_axis_off()
    axis.set_title(text)
    return figure


def _bare(axis) -> None:
    axis.grid(False)
    axis.spines[:].set_visible(False)
    axis.set(xticks=[], yticks=[])


def _class_style(number: int) -> dict:
    """Colour and marker of a class: seven colours as dots, then again as crosses."""
    colour = {"color": COLOUR_CYCLE[number % len(COLOUR_CYCLE)]}
    if number < len(COLOUR_CYCLE):
        return {**colour, "marker": "o", "s": 8, "linewidths": 0}
    return {**colour, "marker": "x", "s": 12, "linewidths": 0.9}


def _names(arrays: dict[str, np.ndarray]) -> list[str]:
    """Names of the classes as short as they can be: without WordNet's number and further synonyms."""
    names = json.loads(arrays["classes"].tobytes())
    return [re.sub(r"^n\d{8}\s+", "", name).split(",")[0].replace("_", " ") for name in names]


def umap_panel(rows: list[dict], arrays: dict[str, np.ndarray]):
    """Draw the UMAPs of ẑ over those of z, a column a seed, points coloured by class.

    Arrays: `umap_z` and `umap_z_hat` (seeds, points, 2), `umap_labels` (points,).

    Above each row stand purity and silhouette with their intervals, of the latents and not of the picture. Of more
    than ten classes the first ten have a colour, the rest is grey.
    """
    if "umap_z" not in arrays:
        return _absent("no UMAP was made")
    seeds = rows[0]["config"]["umap_seeds"].split(",")
    names, labels = _names(arrays), arrays["umap_labels"]
    longest = max(map(len, names[:_CLASSES]), default=0)
    figure, axes = new_figure(2, len(seeds), 0.4 + 2 * (min(WIDTH / len(seeds), 3) + 0.5), squeeze=False)
    for line, which, letter in zip(axes, ("z_hat", "z"), ("ẑ", "z"), strict=True):
        for axis, seed, points in zip(line, seeds, arrays[f"umap_{which}"].astype(np.float32), strict=True):
            rest = labels >= _CLASSES if names else labels < 0
            axis.scatter(*points[rest].T, s=2, color="#CCCCCC", linewidths=0)
            for number in range(min(_CLASSES, len(names))):
                of_class = points[labels == number]
                axis.scatter(*of_class.T, label=names[number], **_class_style(number))
            _bare(axis)
            axis.set_xlabel(f"seed {seed.strip()}")
        line[0].set_ylabel(letter, rotation=0, ha="right", va="center", fontsize=16)
        if names:
            purity, silhouette = (f"{what} {_said(rows, f'{what}_{which}_flat', 3)}" for what in _SAID)
            # Each over a panel of its own: a title wider than its panel would push the panels apart.
            for axis, text in ((line[0], purity), (line[-1], silhouette)):
                so_far = axis.get_title()
                axis.set_title(so_far + "\n" * bool(so_far) + text.replace(" ", "\n", 1), fontsize=11)
    if names:
        handles = axes[0, 0].get_legend_handles_labels()
        columns = 5 if longest < 8 else 3
        figure.legend(*handles, loc="outside lower center", ncols=columns, markerscale=1.8, handletextpad=0.1)
    return figure


def attention_maps(rows: list[dict], arrays: dict[str, np.ndarray], block: int | None = None):
    """Draw over which image patches each latent token's attention lies, on the mean image; means over images.

    Arrays: `attention` (blocks, l, n), `attention_share` (blocks, l).

    Colours are multiples of an even spread, the same in all panels; 1 would be no preference.

    Args:
        rows: Of the measurement, the first of which names the block.
        arrays: Kept with the rows.
        block: Of the encoder, from 1. None: the one that the rows name, or the mean over all.
    """
    if "attention" not in arrays:
        return _absent("this encoder's attention cannot be watched")
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    block = block or rows[0]["config"]["block"]
    maps, share = arrays["attention"].astype(np.float32), arrays["attention_share"]
    maps, share = (x.mean(0) if block is None else x[block - 1] for x in (maps, share))  # (l, n), (l,)
    side = round(maps.shape[1] ** 0.5)
    maps = maps[:_TOKENS].reshape(-1, side, side) * side**2
    columns = 8
    lines = -(-len(maps) // columns)
    figure, axes = new_figure(lines, columns, 1.1 + lines * (WIDTH / columns + 0.1), squeeze=False)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)
    # From clear to nearly opaque, so that the mean image shines through where little attention lies.
    colour = to_rgb(OKABE_ITO["vermilion"])
    overlay = LinearSegmentedColormap.from_list("attention", [(*colour, 0), (*colour, 0.95)])
    extent = (0, side, side, 0)
    for axis in axes.flat:
        _bare(axis)
    for number, (axis, each) in enumerate(zip(axes.flat, maps, strict=False)):
        if "mean_image" in arrays:
            # Pale grey, or it would compete with the colour.
            axis.imshow(arrays["mean_image"].mean(0), vmin=-255, vmax=255, extent=extent, cmap="gray")
        shown = axis.imshow(each, vmin=0, vmax=maps.max(), extent=extent, cmap=overlay)
        axis.set_title(str(number), fontsize=9, pad=2)
    where = "mean over blocks" if block is None else f"block {block} of {len(arrays['attention'])}"
    figure.suptitle(f"{100 * share.mean():.0f} % of the tokens' attention goes to patches, {where}", fontsize=12)
    figure.colorbar(shown, ax=axes, location="bottom", shrink=0.5, aspect=30, label="× an even spread over patches")
    return figure


def code_usage(rows: list[dict], arrays: dict[str, np.ndarray]):
    """Draw the average posterior over the codes, most used first, a line a codebook, against an even use of all.

    Array: `code_probability` (codebooks, k).
    """
    if "code_probability" not in arrays:
        return _absent(f"{QUANTIZER_NAMES[rows[0]['config']['quantizer']]} has no codebook")
    codebooks, codes = arrays["code_probability"].shape
    figure, axis = new_figure(1, 1, 2.8, WIDTH * 0.7)
    for probability in arrays["code_probability"]:
        axis.plot(np.arange(codes), codes * probability, color=colour_of(rows[0]["config"]["quantizer"]), alpha=0.8)
    axis.axhline(1, color=OKABE_ITO["grey"], linestyle="--", linewidth=1)
    axis.set(xlabel="code, most used first", ylabel="use, × an even one")
    if arrays["code_probability"].max() > 10 / codes:
        axis.set_yscale("log")
        axis.set_ylim(bottom=1e-2)  # what lies below is as good as unused
    else:
        axis.set_ylim(bottom=0)
    used = 100 * _values(rows)["usage"]["value"]
    axis.set_title(
        f"effective size {_said(rows, 'effective_codebook_size', 0)}\nof {codebooks * codes:,}, usage {used:.0f} %"
    )
    return figure


def by_position(rows: list[dict], arrays: dict[str, np.ndarray]):
    """Draw by latent token, with 95 % intervals: what its code says of the image, its entropy, cosine of ẑ and z.

    Arrays: `mutual_information`, `posterior_entropy`, `cosine`, each value, low and high (3, l); those that are there.
    """
    panels = {
        "mutual_information": "I(image; code), nats",
        "posterior_entropy": "H(posterior), nats",
        "cosine": "cosine of ẑ and z",
    }
    panels = {name: label for name, label in panels.items() if name in arrays}
    figure, axes = new_figure(len(panels), 1, 0.5 + 1.7 * len(panels), sharex=True, squeeze=False)
    for axis, (name, label) in zip(axes.flat, panels.items(), strict=True):
        value, low, high = arrays[name]
        axis.bar(np.arange(len(value)), value, color=colour_of(rows[0]["config"]["quantizer"]), width=0.7)
        axis.errorbar(
            np.arange(len(value)), value, [value - low, high - value], fmt="none", color="black", linewidth=1, capsize=2
        )
        axis.grid(False, axis="x")
        axis.set_title(label)
    axes[-1, 0].set_xlabel("latent token")
    return figure


def component_use(rows: list[dict], arrays: dict[str, np.ndarray], codebook: int = 0):
    """Draw the mean posterior of each class over the most used codes, relative to that over all classes.

    Array: `components` (classes, codebooks, codes).
    """
    if "components" not in arrays:
        return _absent("no use of codes by class was measured")
    names = _names(arrays)
    use = arrays["components"][:, codebook].astype(np.float32)  # (classes, codes)
    relative = np.log2(np.maximum(use, 1e-6) / np.maximum(use.mean(0), 1e-6))
    figure, axis = new_figure(1, 1, 1.2 + 0.22 * min(len(names), 20))
    shown = axis.imshow(relative, vmin=-2, vmax=2, cmap="PuOr_r", aspect="auto")
    axis.grid(False)
    axis.set(xlabel="code, most used first", ylabel="class")
    if len(names) <= 20:
        axis.set_yticks(range(len(names)), names)
    bar = figure.colorbar(shown, ax=axis, ticks=[-2, -1, 0, 1, 2])
    bar.ax.set_yticklabels(["¼ ×", "½ ×", "1 ×", "2 ×", "4 ×"])
    axis.set_title(f"NMI of code and class {_said(rows, 'class_information', 3)}")
    return figure
