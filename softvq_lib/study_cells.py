"""Numbers of a study as tables and figures show them: over the seeds of a design point, with interval, or why not."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from softvq_lib.arms import Measured, grouped, measures
from softvq_lib.evaluation.statistics import t_interval
from softvq_lib.style import QUANTIZER_NAMES
from softvq_lib.tables import provenance
from softvq_lib.weights import sha256

NOT_YET = "not run yet"
NOT_PLANNED = "–"


class Metric(NamedTuple):
    """How a metric is written, and in which direction it is better: "less" or "greater", "" for neither."""

    head: str
    digits: int
    better: str
    scale: float = 1.0


_OF_SAMPLES = {
    "KID-EffLite0": Metric("KID-EffLite0 ↓", 3, "less"),
    "gFD-EffLite0-proj64-v1": Metric("FD-EffLite0, proj64 ↓", 2, "less"),
    "precision-EffLite0": Metric("precision ↑", 3, "greater"),
    "recall-EffLite0": Metric("recall ↑", 3, "greater"),
    "class_agreement": Metric("class agreement, % ↑", 1, "greater", 100),
}
METRICS = {
    "reconstruction.psnr": Metric("PSNR, dB ↑", 2, "greater"),
    "reconstruction.ssim": Metric("SSIM ↑", 3, "greater"),
    "reconstruction.rFD-EffLite0-proj64-v1": Metric("rFD-EffLite0, proj64 ↓", 2, "less"),
    "reconstruction.KID-EffLite0": Metric("rKID-EffLite0 ↓", 3, "less"),
    "probe.z.flatten": Metric("linear probe of z, % ↑", 1, "greater", 100),
    "probe.z_hat.flatten": Metric("linear probe of ẑ, % ↑", 1, "greater", 100),
    **{f"samples.{name}": metric for name, metric in _OF_SAMPLES.items()},
    **{f"guided.{name}": metric for name, metric in _OF_SAMPLES.items()},
    "training.psnr": Metric("held-out PSNR in training, dB ↑", 2, "greater"),
    "training.perplexity": Metric("perplexity of the codes", 0, ""),
    "latents.cosine": Metric("cosine of ẑ and z", 3, ""),
    "latents.purity_z_hat_flat": Metric("purity of ẑ", 3, "greater"),
    "latents.purity_z_flat": Metric("purity of z", 3, "greater"),
    "latents.purity_change_flat": Metric("purity of z less that of ẑ", 4, ""),
    "latents.silhouette_z_flat": Metric("silhouette of z", 3, "greater"),
    "latents.effective_codebook_size": Metric("effective codebook size", 0, ""),
}
RECONSTRUCTION = tuple(name for name in METRICS if name.startswith("reconstruction."))
SAMPLES, GUIDED = (tuple(n for n in METRICS if n.startswith(kind)) for kind in ("samples.", "guided."))


@dataclass(frozen=True)
class Drawn:
    """A table or a figure, and where its numbers come from.

    Attributes:
        content: Markdown, or a figure of matplotlib.
        rows: Measured results rows that it shows.
        files: Files of numbers that were not measured here.
        ledger: Entries of the ledger of executions that it shows.
        note: A line in Markdown under a figure.
    """

    content: object
    rows: list[dict] = field(default_factory=list)
    files: tuple[Path, ...] = ()
    ledger: list[dict] = field(default_factory=list)
    note: str = ""

    @property
    def provenance(self) -> str:
        """One line in Markdown; there always is one."""
        lines = []
        if self.files:
            named = ", ".join(f"{path.name} (sha256 {sha256(path)[:12]})" for path in map(Path, self.files))
            lines.append(f"*Provenance: the paper's own numbers, from {named}; nothing was measured.*")
        if self.ledger:
            days = sorted({entry["ended"][:10] for entry in self.ledger})
            said = {name: sorted({str(entry[name]) for entry in self.ledger}) for name in ("machine", "threads")}
            commits = sorted({str(e["commit"])[:9] + ("+" if e["dirty"] else "") for e in self.ledger})
            lines.append(
                f"*Provenance: {len(self.ledger)} executions in the ledger; commit {', '.join(commits)}; "
                f"{', '.join(said['machine'])}; threads of each: {', '.join(said['threads'])}; "
                f"{' to '.join(dict.fromkeys((days[0], days[-1])))}.*"
            )
        if self.rows or not lines:
            lines.append(provenance(self.rows) if self.rows else "*Provenance: no row has been recorded yet.*")
        return "\n\n".join(lines)


class Point(NamedTuple):
    """A design point's number: mean over the seeds done, with interval where there is one.

    Attributes:
        over: What the interval is over: "seeds" (Student's t, two or more), "images" (of the only run), or "".
        values: One a seed.
        how: The interval's name.
    """

    value: float
    low: float | None
    high: float | None
    over: str
    values: tuple[float, ...]
    how: str


def point(arms: Sequence[Measured], metric: str) -> Point | None:
    """The number of arms that differ in the seed alone; None where none of them has been measured."""
    rows = [arm.rows[metric] for arm in arms if metric in arm.rows]
    if not rows:
        return None
    values = tuple(float(row["value"]) for row in rows)
    if len(rows) == 1:
        row = rows[0]
        return Point(values[0], row["low"], row["high"], "images" if row["interval"] else "", values, row["interval"])
    found = t_interval(np.array(values))
    return Point(*found.triple, "seeds", values, found.interval)


def planned(arms: Iterable[Measured], metric: str) -> bool:
    """Whether some of the arms have all stages that measure this."""
    return any(measures(arm.arm, metric) for arm in arms)


def missing(arms: Sequence[Measured], metric: str) -> str:
    """Why a number is not there."""
    reasons = list(dict.fromkeys(arm.arm.unavailable for arm in arms))
    if all(reasons):
        return "not run: " + "; ".join(dict.fromkeys("; ".join(reasons).split("; ")))
    return NOT_YET if planned(arms, metric) else NOT_PLANNED


def number(value: float, metric: str) -> str:
    """A value of a metric with its digits, and a minus sign."""
    shown = METRICS[metric]
    text = f"{value * shown.scale:,.{shown.digits}f}"
    return ("0" + text[2:] if float(text.replace(",", "")) == 0 and text[0] == "-" else text).replace("-", "−")


def span(values: Sequence[float], metric: str) -> str:
    """The least and the greatest of some values of a metric, once where they are written alike."""
    return " to ".join(dict.fromkeys(number(end, metric) for end in (min(values), max(values))))


def cell(arms: Sequence[Measured], metric: str, mark: bool = False) -> str:
    """A cell of a table in Markdown: value, its interval below it, or the reason why there is none.

    Args:
        arms: The seeds of one design point.
        metric: A name in `METRICS`.
        mark: Put a ° behind an interval over images.
    """
    found = point(arms, metric)
    if found is None:
        return missing(arms, metric)
    text = number(found.value, metric)
    if found.low is None:
        return text
    return f"{text}<br>[{number(found.low, metric)}, {number(found.high, metric)}]" + (
        "°" if mark and found.over == "images" else ""
    )


def rows_shown(arms: Iterable[Measured], metrics: Iterable[str]) -> list[dict]:
    """The results rows of some metrics of arms, each once."""
    metrics = tuple(metrics)
    found = {}
    for arm in arms:
        for metric in metrics:
            if metric in arm.rows:
                row = arm.rows[metric]
                found[row["experiment"], row["run"], row["metric"]] = row
    return list(found.values())


def over_seeds(arms: Iterable[Measured], by: Sequence[str]) -> list[tuple[tuple[str, ...], list[Measured]]]:
    """Arms by design point; levels that are numbers in their order, others in that of the plan."""
    groups = list(grouped(arms, by))
    places = []
    for position in range(len(by)):
        levels = list(dict.fromkeys(key[position] for key, _ in groups))
        numeric = all(level.replace(".", "", 1).isdigit() for level in levels)
        places.append({level: (float(level) if numeric else place) for place, level in enumerate(levels)})
    return sorted(groups, key=lambda group: tuple(place[level] for place, level in zip(places, group[0], strict=True)))


_NAMES = {
    "quantizer": QUANTIZER_NAMES,
    "alignment": {"on": "EffLite2", "off": "none"},
    "generator": {"sit": "SiT", "dit": "DiT", "mar": "MAR"},
    "init": {"random": "random", "distilled": "distilled from EffLite2"},
    "target": {
        "none": "none",
        "efflite2": "EffLite2",
        "efflite1": "EffLite1",
        "permuted": "EffLite2, patches permuted",
        "random": "EffLite2, random weights",
    },
    "latents": {"aligned": "aligned with EffLite2", "unaligned": "not aligned"},
}
_NAMES["init"] |= (names := {"dinov2-b": "DINOv2-B", "clip-b": "CLIP-B", "eva02-b": "EVA-02-B"})
_NAMES["target"] |= names


def label(factor: str, level: str) -> str:
    """A level for people."""
    return _NAMES.get(factor, {}).get(level, level)


def of_which(points: Iterable[Point | None], sign: str = "those with °") -> str:
    """The line that says what the intervals of a table or figure are over; "" where there are none.

    Args:
        points: All that the table or figure shows; None where there is no number.
        sign: How intervals over images are told from those over seeds, where both are shown.
    """
    found = [each for each in points if each is not None and each.low is not None]
    kinds = {each.over for each in found}
    if not kinds:
        return ""
    seeds = sorted({len(each.values) for each in found if each.over == "seeds"})
    t = f"Student's t over {' or '.join(map(str, seeds))} seeds"
    images = "over the images of a single run, which leave out what another seed would change"
    if kinds == {"seeds", "images"}:
        return f"*Intervals are at 95 %: {t}; {sign} {images}.*"
    return f"*Intervals are at 95 %: {t if kinds == {'seeds'} else images}.*"


def table(
    arms: Sequence[Measured],
    factors: Mapping[str, str],
    metrics: Sequence[str],
    *,
    floors: bool = False,
    names: Mapping[str, Mapping[str, str]] | None = None,
) -> Drawn:
    """One line a design point: its levels, how many seeds are done, and its numbers with intervals.

    Args:
        arms: All that have a line, or part of one.
        factors: Factor to the head of its column, all but the seed.
        metrics: Names in `METRICS`, a column each.
        floors: Add what real images have: KID, distances, precision and recall of their halves, and their agreement.
        names: Factor to its levels' names, where they differ from the usual ones.
    """
    groups = over_seeds(arms, tuple(factors))
    points = [point(group, metric) for _, group in groups for metric in metrics]
    mark = len({each.over for each in points if each and each.low is not None}) > 1
    lines = []
    for levels, group in groups:
        cells = [
            (names or {}).get(factor, {}).get(level) or label(factor, level)
            for factor, level in zip(factors, levels, strict=True)
        ]
        done = sum(any(metric in arm.rows for metric in metrics) for arm in group)
        cells.append(f"{done} of {len(group)}")
        cells += [cell(group, metric, mark) for metric in metrics]
        if len(metrics) > 1 and not done and len(set(cells[-len(metrics) :])) == 1:
            cells[-len(metrics) + 1 :] = ["–"] * (len(metrics) - 1)  # why stands in the first
        lines.append(cells)
    if floors and (real := _floors(arms, metrics)):
        lines.append(["*real images*"] + [""] * len(factors) + real)
    heads = [*factors.values(), "seeds", *(METRICS[metric].head for metric in metrics)]
    rule = "|" + "---|" * len(factors) + "--:|" * (1 + len(metrics))
    written = ["| " + " | ".join(line) + " |" for line in [heads, *lines]]
    parts = [of_which(points), "\n".join([written[0], rule, *written[1:]])]
    return Drawn("\n\n".join(filter(None, parts)), rows_shown(arms, metrics))


def _floors(arms: Sequence[Measured], metrics: Sequence[str]) -> list[str]:
    """What the rows say of real images by the same measure, one cell a metric; [] where they say nothing."""
    cells = []
    for metric in metrics:
        terms = [row.get("terms", {}) for row in rows_shown(arms, [metric])]
        values = [value for each in terms if (value := each.get("real", each.get("floor"))) is not None]
        cells.append(span(values, metric) if values else "–")
    return cells if set(cells) != {"–"} else []
