"""Figures of a study: functions of its arms with their rows. A panel whose arms have not been run says so."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from softvq_lib.arms import Measured, select
from softvq_lib.evaluation.statistics import t_interval
from softvq_lib.study_cells import (
    METRICS,
    NOT_PLANNED,
    NOT_YET,
    Drawn,
    missing,
    of_which,
    over_seeds,
    point,
    rows_shown,
)
from softvq_lib.study_tables import BASE, CHANGES, KID, PROBE, PSNR, RFD, RKID, TOPICS, of_topic
from softvq_lib.style import COLOUR_CYCLE, OKABE_ITO, QUANTIZER_NAMES, WIDTH, colour_of, new_figure

CURVE = "training.psnr"
AGREEMENT = "samples.class_agreement"
_MARKERS = {"softvq": "o", "vq": "s", "ae": "^", "kl": "D"}
_ALIGNED = {"off": "not aligned", "on": "aligned"}


def _axis_label(metric: str) -> str:
    return METRICS[metric].head


def _say(axis, text: str = NOT_YET) -> None:
    """Write into a panel why it is empty."""
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", color=OKABE_ITO["grey"])


def _legend(figure, axes, columns: int = 4) -> None:
    """One legend for all panels, below them."""
    found = {}
    for axis in np.ravel(axes):
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    if found:
        figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns)


def _line(axis, arms: Sequence[Measured], along: str, metric: str, shift: float = 0.0, **style) -> list:
    """Draw a metric with its intervals along a factor of numbers, spaced as logarithms; return the points drawn."""
    groups = [(float(level), point(group, metric)) for (level,), group in over_seeds(arms, (along,))]
    groups = [(level, each) for level, each in groups if each]
    if not groups:
        return []
    scale = METRICS[metric].scale
    x = np.array([level for level, _ in groups]) * 2.0**shift
    y = scale * np.array([each.value for _, each in groups])
    reach = scale * np.array(
        [
            [each.value - (each.value if each.low is None else each.low) for _, each in groups],
            [(each.value if each.high is None else each.high) - each.value for _, each in groups],
        ]
    )
    axis.errorbar(x, y, reach.clip(min=0), capsize=2, elinewidth=1, markersize=4, linewidth=1.4, **style)
    return [each for _, each in groups]


def _limit(axis, points: Sequence, metric: str) -> None:
    """Let the intervals of two seeds, which are many times as wide as those of three, run out of the panel."""
    ends = [end for each in points for end in (each.low, each.high) if len(each.values) != 2]
    ends = [end for end in [*ends, *(each.value for each in points)] if end is not None]
    if ends:
        low, high = (METRICS[metric].scale * end for end in (min(ends), max(ends)))
        margin = 0.08 * (high - low or 1)
        axis.set_ylim(low - margin, high + margin)


def _log_ticks(axis, levels: Sequence[str]) -> None:
    from matplotlib.ticker import NullLocator

    ticks = sorted({float(level) for level in levels})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlim(ticks[0] / 1.35, ticks[-1] * 1.35)


def _by_quantizer(axis, arms: Sequence[Measured], along: str, metric: str) -> list:
    """One line a quantizer, a little apart so that no interval hides another."""
    names = [name for name in QUANTIZER_NAMES if any(arm.factors["quantizer"] == name for arm in arms)]
    drawn = []
    for place, name in enumerate(names):
        mine = [arm for arm in arms if arm.factors["quantizer"] == name]
        style = {"color": colour_of(name), "marker": _MARKERS.get(name, "o"), "label": QUANTIZER_NAMES[name]}
        drawn += _line(axis, mine, along, metric, 0.08 * (place - (len(names) - 1) / 2), **style)
    _log_ticks(axis, [arm.factors[along] for arm in arms])
    if not drawn:
        _say(axis)
    return drawn


def learning_curves(arms: Sequence[Measured]) -> Drawn:
    """Held-out PSNR against the step: a panel a number of tokens and alignment, a line a seed, a colour a quantizer."""
    mine = select(arms, "tokenizers")
    counts = sorted({arm.factors["tokens"] for arm in mine}, key=int)
    figure, axes = new_figure(2, len(counts), 4.8, sharex=True, sharey=True, squeeze=False)
    for line, (aligned, words) in zip(axes, _ALIGNED.items(), strict=True):
        for axis, tokens in zip(line, counts, strict=True):
            _curves(axis, [arm for arm in mine if arm.has({"alignment": aligned, "tokens": tokens})])
            axis.set_title(f"{tokens} tokens,\n{words}", fontsize=11)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    for axis in axes[:, 0]:
        axis.set_ylabel("PSNR, dB")
    _legend(figure, axes)
    return Drawn(figure, rows_shown(mine, [CURVE]))


def _curves(axis, arms: Sequence[Measured]) -> None:
    drawn = False
    for arm in sorted(arms, key=lambda arm: list(QUANTIZER_NAMES).index(arm.factors["quantizer"])):
        row = arm.rows.get(CURVE, {})
        if row.get("curve"):
            name = arm.factors["quantizer"]
            style = {"color": colour_of(name), "marker": _MARKERS[name], "label": QUANTIZER_NAMES[name]}
            axis.plot(*zip(*row["curve"], strict=True), markersize=3, linewidth=1.1, alpha=0.85, **style)
            drawn = True
    if not drawn:
        _say(axis)


def _panels(arms: Sequence[Measured], metrics: Sequence[str], height: float) -> tuple[Drawn, list]:
    """Metrics against the number of tokens, a line of panels a metric, a column an alignment."""
    mine = select(arms, "tokenizers")
    figure, axes = new_figure(len(metrics), 2, height, sharex=True, sharey="row", squeeze=False)
    drawn = []
    for line, metric in zip(axes, metrics, strict=True):
        before = len(drawn)
        for axis, (aligned, words) in zip(line, _ALIGNED.items(), strict=True):
            drawn += _by_quantizer(axis, [a for a in mine if a.has({"alignment": aligned})], "tokens", metric)
            if metric == metrics[0]:
                axis.set_title(words)
        _limit(line[0], drawn[before:], metric)
        line[0].set_ylabel(_axis_label(metric).replace(", proj64", ",\nproj64").replace(", %", ",\n%"))
    for axis in axes[-1]:
        axis.set_xlabel("tokens")
    _legend(figure, axes)
    return Drawn(figure, rows_shown(mine, metrics)), drawn


def _said(drawn: Drawn, points: list) -> Drawn:
    """Say under a figure what its intervals are over."""
    cut = " *Those of two seeds may leave a panel.*" if any(len(each.values) == 2 for each in points if each) else ""
    return replace(drawn, note=of_which(points, "of what has one seed") + cut)


def distortion(arms: Sequence[Measured]) -> Drawn:
    """PSNR and rFD against the number of tokens, with and without alignment."""
    return _said(*_panels(arms, (PSNR, RFD), 4.6))


def generation(arms: Sequence[Measured]) -> Drawn:
    """KID and class agreement of SiT's samples against the number of tokens, with and without alignment."""
    return _said(*_panels(arms, (KID, AGREEMENT), 4.6))


def probing_by_tokens(arms: Sequence[Measured]) -> Drawn:
    """Linear probe of z against the number of tokens (Fig. 3)."""
    return _said(*_panels(arms, (PROBE,), 2.9))


def probing_by_size(arms: Sequence[Measured]) -> Drawn:
    """Linear probe of z in four trunks, a bar a trunk (Fig. 3)."""
    mine = select(arms, "size")
    counts = sorted({arm.factors["tokens"] for arm in mine}, key=int)
    figure, axes = new_figure(1, len(counts), 2.6, sharey=True, squeeze=False)
    points = []
    for axis, tokens in zip(axes[0], counts, strict=True):
        groups = over_seeds([arm for arm in mine if arm.factors["tokens"] == tokens], ("size",))
        for place, (_, group) in enumerate(groups):
            points.append(each := point(group, PROBE))
            if each is None:
                axis.text(place, 0, NOT_YET, rotation=90, ha="center", va="bottom", color=OKABE_ITO["grey"])
                continue
            reach = [[0], [0]] if each.low is None else [[each.value - each.low], [each.high - each.value]]
            style = {"color": colour_of("softvq"), "width": 0.65, "error_kw": {"elinewidth": 1, "capsize": 3}}
            axis.bar(place, 100 * each.value, yerr=100 * np.array(reach).clip(min=0), **style)
        axis.set_xticks(range(len(groups)), [size for (size,), _ in groups])
        axis.set_xlim(-0.6, len(groups) - 0.4)
        axis.grid(False, axis="x")
        axis.set(title=f"{tokens} tokens", xlabel="trunk, mini-")
    axes[0, 0].set_ylabel("linear probe of z, %")
    return _said(Drawn(figure, rows_shown(mine, [PROBE])), points)


def probing_by_block(arms: Sequence[Measured]) -> Drawn:
    """Linear probe of SiT's hidden states after each block, at each noise level (Fig. 3)."""
    mine = select(arms, "representations")
    states = sorted(
        {name for arm in mine for name in arm.rows if name.startswith("probe.block") and name.count(".") > 1}
    )
    states = [name for name in states if not name.endswith(("macro", "logistic"))]
    places = {name: name.removeprefix("probe.block").split(".noise") for name in states}
    levels = sorted({level for _, level in places.values()}, key=float)
    counts = sorted({arm.factors["tokens"] for arm in mine}, key=int)
    figure, axes = new_figure(2, len(counts), 4.8, sharex=True, sharey=True, squeeze=False)
    dashes = dict(zip(levels, ("-", "--", ":", "-."), strict=False))
    points = []
    for line, (aligned, words) in zip(axes, _ALIGNED.items(), strict=True):
        for axis, tokens in zip(line, counts, strict=True):
            here = [arm for arm in mine if arm.has({"alignment": aligned, "tokens": tokens})]
            found = _blocks(axis, here, places, dashes)
            points += found
            if not found:
                _say(axis)
            axis.set_title(f"{tokens} tokens, {words}", fontsize=11)
    for axis in axes[-1]:
        axis.set_xlabel("block of SiT")
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes[:, 0]:
        axis.set_ylabel("linear probe, %")
    _legend(figure, axes, 2)
    return _said(Drawn(figure, rows_shown(mine, states)), points)


def _blocks(axis, arms: Sequence[Measured], places: Mapping[str, list[str]], dashes: Mapping[str, str]) -> list:
    points = []
    for (name,), group in over_seeds(arms, ("quantizer",)):
        for level, dash in dashes.items():
            found = [
                (float(block), each)
                for state, (block, noise) in places.items()
                if noise == level and (each := point(group, state))
            ]
            if found:
                found.sort(key=lambda pair: pair[0])
                blocks = [block for block, _ in found]
                values = 100 * np.array([each.value for _, each in found])
                style = {"color": colour_of(name), "linestyle": dash, "marker": _MARKERS[name], "markersize": 4}
                axis.plot(blocks, values, label=f"{QUANTIZER_NAMES[name]}, noise {level}", linewidth=1.4, **style)
                ends = [(each.value if e is None else e) for _, each in found for e in (each.low, each.high)]
                low, high = 100 * np.array(ends).reshape(-1, 2).T
                axis.fill_between(blocks, low, high, color=colour_of(name), alpha=0.12, linewidth=0)
                points += [each for _, each in found]
    return points


def steps(arms: Sequence[Measured]) -> Drawn:
    """KID of samples against the generator's training steps, on SoftVQ and on KL latents, and the target.

    The target is what the same generator reaches after all its steps on un-aligned VQ latents of as many tokens.
    """
    mine = select(arms, "steps")
    figure, axis = new_figure(1, 1, 3.2, 0.8 * WIDTH)
    points = _by_quantizer(axis, mine, "steps", KID)
    _limit(axis, points, KID)
    axis.set(xlabel="training steps of SiT", ylabel=_axis_label(KID))
    goal = select(arms, "tokenizers", {"quantizer": "vq", "alignment": "off", "tokens": "16"})
    if target := point(goal, KID):
        words = "VQ after all steps: the target"
        axis.axhline(target.value, color=colour_of("vq"), linestyle="--", linewidth=1.2, label=words)
    _legend(figure, [axis], 3)
    return _said(Drawn(figure, rows_shown([*mine, *goal], [KID])), points)


# -- the pilot ---------------------------------------------------------------------------------------------------------


def pilot(arms: Sequence[Measured]) -> Drawn:
    """Held-out PSNR against the step over a long run of each quantizer, and at learning rates of short ones.

    The rates are those of 16 tokens, then those of 2.
    """
    mine, two = select(arms, "pilot"), select(arms, "pilot_few")
    longest = max((arm.factors["steps"] for arm in mine), key=int)
    shortest = min((arm.factors["steps"] for arm in mine), key=int)
    figure, (left, *rates) = new_figure(1, 3, 2.9, width_ratios=(1.3, 1, 0.8))
    _curves(left, [arm for arm in mine if arm.factors["steps"] == longest])
    left.set(xlabel="step", ylabel="held-out PSNR, dB", title=f"{longest} steps, rate 2e-3")
    points = []
    few = [arm for arm in mine if arm.factors["steps"] == shortest]
    for axis, these, tokens in zip(rates, (few, two), ("16", "2"), strict=True):
        points += _by_quantizer(axis, these, "lr", CURVE)
        axis.set(xlabel="learning rate", title=f"{shortest} steps,\n{tokens} tokens")
        ticks = sorted({float(arm.factors["lr"]) for arm in these})
        axis.set_xticks(ticks, [f"{tick:.0e}".replace("e-0", "e-") for tick in ticks])
    _legend(figure, (left, *rates))
    return _said(Drawn(figure, rows_shown([*mine, *two], [CURVE])), points)


# -- Sec. 4.5 ----------------------------------------------------------------------------------------------------------


def ablations(arms: Sequence[Measured]) -> Drawn:
    """Difference of each change from the unchanged SoftVQ of the same seed, in PSNR, rKID and KID of samples.

    With two seeds or more, a bar is the 95 % interval by Student's t over seeds; a hollow point is a single seed's.
    """
    mine, metrics = select(arms, "ablations"), (PSNR, RKID, KID)
    changes = [change for topic in TOPICS for change in of_topic(topic)]
    figure, axes = new_figure(1, len(metrics), 0.27 * len(changes) + 1.3, sharey=True, squeeze=False)
    by_change = {change: [arm for arm in mine if arm.factors["change"] == change] for change in CHANGES}
    colours = {topic: COLOUR_CYCLE[place % len(COLOUR_CYCLE)] for place, topic in enumerate(TOPICS)}
    for axis, metric in zip(axes[0], metrics, strict=True):
        base = {arm.factors["seed"]: arm.value(metric) for arm in by_change[BASE]}
        for place, change in enumerate(changes):
            topic = next(topic for topic in TOPICS if change in of_topic(topic))
            pairs = [(arm.value(metric), base.get(arm.factors["seed"])) for arm in by_change[change]]
            apart = np.array([a - b for a, b in pairs if None not in (a, b)])
            _difference(axis, place, apart, missing(by_change[change], metric), colours[topic])
        axis.axvline(0, color=OKABE_ITO["black"], linewidth=0.8)
        axis.set_title(_axis_label(metric).replace("-EffLite0", ""), fontsize=11)
        axis.tick_params(axis="x", labelsize=10)
        axis.margins(x=0.12)
        axis.locator_params(axis="x", nbins=3)
    axes[0, 1].set_title("rKID ↓", fontsize=11)
    axes[0, 2].set_title("KID of samples ↓", fontsize=11)
    axes[0, 0].set_yticks(range(len(changes)), [CHANGES[change] for change in changes], fontsize=10)
    axes[0, 0].set_ylim(len(changes) - 0.4, -0.6)
    axes[0, 1].set_xlabel("difference from the unchanged SoftVQ of the same seed")
    note = "*A bar is the 95 % interval by Student's t over seeds; a hollow point is of one seed, without interval.*"
    return Drawn(figure, rows_shown(mine, metrics), note=note)


def _difference(axis, place: int, apart: np.ndarray, why: str, colour: str) -> None:
    if not len(apart):
        said = {"transform": axis.get_yaxis_transform(), "ha": "center", "va": "center", "fontsize": 8}
        said["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axis.text(0.5, place, "no samples planned" if why == NOT_PLANNED else why, color=OKABE_ITO["grey"], **said)
    elif len(apart) == 1:
        axis.plot(apart, [place], "o", color=colour, markerfacecolor="white", markersize=5)
    else:
        found = t_interval(apart)
        axis.plot([found.low, found.high], [place, place], color=colour, linewidth=1.4)
        axis.plot([found.value], [place], "o", color=colour, markersize=5)
