"""Figures of linear probing (Fig. 3) from results rows: accuracy of each source, and by block and noise level."""

from softvq_lib.style import OKABE_ITO, SEQUENTIAL, WIDTH, new_figure

_KINDS = {
    "tokenizer": ("tokenizer", OKABE_ITO["blue"]),
    "generator": ("generator, its best", OKABE_ITO["green"]),
    "network": ("frozen network", OKABE_ITO["orange"]),
    "random": ("random weights", OKABE_ITO["sky"]),
    "pixels": ("pixels", OKABE_ITO["grey"]),
}


def _accuracies(rows: list[dict]) -> dict[str, list[dict]]:
    """Group the measured rows of accuracy by data set."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        if row["metric"] == "accuracy" and row["source"] == "measured":
            found.setdefault(row["data"], []).append(row)
    return found


def _empty(text: str):
    figure, axis = new_figure(1, 1, 1.0, WIDTH * 0.6)
    axis.set_axis_off()
    axis.set_title(text)
    return figure


def _percent(row: dict) -> tuple[float, float, float]:
    return 100 * row["value"], 100 * row["low"], 100 * row["high"]


def sources(rows: list[dict]):
    """Draw the accuracy of each source as a bar with its interval, the best on top, a panel a data set.

    Of a generator's blocks and noise levels only the best is shown: chosen on the images that it is measured on, so a
    little too good. Hatched bars are of features that class labels helped to form. The dotted line is chance.
    """
    panels = _accuracies(rows)
    if not panels:
        return _empty("nothing has been probed")
    shown = {data: _best(found) for data, found in panels.items()}
    heights = [len(found) + 1.5 for found in shown.values()]
    figure, axes = new_figure(
        len(shown), 1, 0.24 * sum(heights) + 0.7, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for axis, (data, found) in zip(axes[:, 0], shown.items(), strict=True):
        for place, row in enumerate(found):
            value, low, high = _percent(row)
            axis.barh(
                place,
                value,
                xerr=[[max(0, value - low)], [max(0, high - value)]],
                color=_KINDS[row["config"]["kind"]][1],
                hatch="//" if _hatched(row) else None,
                edgecolor="white",
                linewidth=0,
                error_kw={"elinewidth": 1, "capsize": 2},
            )
        axis.axvline(100 / found[0]["config"]["classes"], color=OKABE_ITO["black"], linestyle=":", linewidth=1)
        axis.set_yticks(range(len(found)), [row["config"]["label"] for row in found])
        axis.grid(axis="y", visible=False)
        axis.set(xlim=(0, None), title=f"{data}, {found[0]['config']['image_size']} px")
    axes[-1, 0].set_xlabel("accuracy of the linear probe, %")
    _legend(figure, [row for found in shown.values() for row in found])
    return figure


def _best(found: list[dict]) -> list[dict]:
    """Keep one row of each generator; sort by accuracy."""
    kept: dict[str, dict] = {}
    for row in found:
        config = row["config"]
        key = config["source"] if config["kind"] == "generator" else row["run"]
        if key not in kept or row["value"] > kept[key]["value"]:
            kept[key] = row
    return sorted(kept.values(), key=lambda row: row["value"])


def _hatched(row: dict) -> bool:
    return row["config"]["labels"] not in ("", "unknown")


def _legend(figure, found: list[dict]) -> None:
    from matplotlib.patches import Patch

    kinds = {row["config"]["kind"] for row in found}
    handles = [Patch(color=colour, label=label) for kind, (label, colour) in _KINDS.items() if kind in kinds]
    if any(_hatched(row) for row in found):
        grey = OKABE_ITO["grey"]
        handles.append(Patch(facecolor="white", edgecolor=grey, hatch="//", label="formed with class labels"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3)


def by_block(rows: list[dict]):
    """Draw the accuracy after each block of SiT and DiT with its interval, a line a noise level, a panel a generator.

    The dashed line is the generator's input, z of its tokenizer averaged over the tokens in the same way, where it was
    probed on the same images; the dotted one is chance.
    """
    panels = [
        (source, found)
        for found in _accuracies(rows).values()
        for source in dict.fromkeys(row["config"]["source"] for row in found if row["config"]["kind"] == "generator")
    ]
    if not panels:
        return _empty("no generator has been probed")
    from matplotlib import colormaps

    lines = -(-len(panels) // 2)
    figure, axes = new_figure(lines, min(2, len(panels)), 2.6 * lines + 0.5, squeeze=False)
    levels = sorted({row["config"]["noise_level"] for _, found in panels for row in found} - {None})
    colours = {level: colormaps[SEQUENTIAL](0.85 * i / max(1, len(levels) - 1)) for i, level in enumerate(levels)}
    for axis, (source, found) in zip(axes.flat, panels, strict=False):
        mine = [row for row in found if row["config"]["source"] == source]
        for level in levels:
            at_level = [row for row in mine if row["config"]["noise_level"] == level]
            points = sorted((row["config"]["block"], *_percent(row)) for row in at_level)
            if not points:
                continue
            blocks, values, low, high = zip(*points, strict=True)
            axis.plot(blocks, values, "o-", markersize=3, color=colours[level], label=f"noise {level:g}")
            axis.fill_between(blocks, low, high, color=colours[level], alpha=0.15, linewidth=0)
        config = mine[0]["config"]
        for row in found:
            if row["config"]["label"] == f"{config['tokenizer']}, z, mean":
                axis.axhline(100 * row["value"], color=OKABE_ITO["black"], linestyle="--", linewidth=1, label="z, mean")
        axis.axhline(100 / config["classes"], color=OKABE_ITO["black"], linestyle=":", linewidth=1, label="chance")
        axis.set(xlabel="block", ylim=(0, None), title=source)
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis in axes[:, 0]:
        axis.set_ylabel("accuracy, %")
    named = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=3)
    return figure
