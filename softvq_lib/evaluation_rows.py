"""Results rows of an evaluation, and the tables in Markdown that are made of them."""

import numpy as np

from softvq_lib import config as strictly
from softvq_lib import results as rows_of
from softvq_lib.data import DataSplits
from softvq_lib.evaluation.degradations import STRENGTHS, UNITS, Degraded
from softvq_lib.evaluation.fidelity import FOR_FEW, INCEPTION, PROJECTION, Fidelity, fidelity
from softvq_lib.evaluation.frechet import PROJECTIONS, Moments, bias_curve, grouped_distance, projection
from softvq_lib.evaluation.reference import Statistics
from softvq_lib.evaluation.statistics import Estimate, mean_interval

KINDS = {"reconstructions": "r", "samples": "g"}  # what is judged, and the letter before FID or FD


class EvaluationRows:
    """Results rows of one evaluation, measured as they are added.

    Args:
        asked: What all of them depend on, for their `config`; `extractor` is the extractor's label.
        data: The real images.
        device: Name of the hardware.
        seed: Of samples and noise.

    Attributes:
        rows: So far, each checked.
    """

    def __init__(self, asked: dict[str, object], data: DataSplits, device: str, seed: int):
        self.asked, self.rows = asked, []
        self.common = {
            "experiment": "evaluate",
            "seed": seed,
            "source": "measured",
            "data": data.name,
            "data_fingerprint": data.fingerprint,
            "device": device,
            "precision": "float32",
            **rows_of.origin(),
        }

    def _add(self, run: str, about: dict, **entries: object) -> None:
        config = {**self.asked, **about}
        row = {**self.common, "run": run, "config": config, "config_hash": strictly.fingerprint(config), **entries}
        self.rows.append(rows_of.check(row))

    def by_image(self, run: str, about: dict, found: dict[str, np.ndarray]) -> None:
        """Add a row a metric of single images, each (n,)."""
        for metric, values in found.items():
            self._add(run, about, metric=metric, **_over_images(values))

    def of_all(self, run: str, about: dict, made: Statistics, real: Statistics, bias: bool) -> tuple[str, ...]:
        """Add a row a measure of all images together, and return the notes that belong beside them.

        Args:
            run: Name of what is judged, in the rows.
            about: For the rows' `config`; `judged` says what, a key of `KINDS`.
            made: Of the images that are judged.
            real: Of the reference.
            bias: Add the curves of the Fréchet distance against the number of images.
        """
        kind = KINDS[about["judged"]]
        chosen = measures(made, real)
        if kind == "g" and "frechet" in chosen and made.scores is not None:
            chosen += ("score",)
        found = fidelity(made, real, measures=chosen, kind=kind)
        about = about | {"decides": found.decides, "facts": found.facts}
        for entry in _entries(found):
            if bias and entry["metric"].endswith("-inf"):
                entry["curve"] = _curve(made.groups, real.groups)
                entry["terms"] |= {"dimensions": made.width}
            self._add(run, about, **entry)
        if bias:
            self.limits(run, about, kind, made.groups, real.groups, whole=False)
        return tuple(f"{run}: {note}" for note in found.notes)

    def agreement(self, run: str, about: dict, found: Estimate, real: Estimate) -> None:
        """Add a row of the share of samples whose class a judge names; that of real images is its ceiling."""
        terms = {"real": real.value, "real_n": real.n}
        self._add(run, about, metric="class_agreement", **found.row(), terms=terms)

    def limits(
        self, run: str, about: dict, kind: str, ours: list[Moments], theirs: list[Moments], whole: bool = True
    ) -> None:
        """Add a row FD∞ with the curve that leads to it, of each space that has fewer dimensions than there are images.

        Args:
            run: Name of what is judged, in the rows.
            about: For the rows' `config`.
            kind: As in `fidelity`.
            ours: Moments of groups of the judged images, in their order.
            theirs: Of the reference, likewise.
            whole: Not only on 64 projections, but also on all features.
        """
        label, width = self.asked["extractor"], len(ours[0].mean)
        count = min(sum(group.count for group in groups) for groups in (ours, theirs))
        name = f"{kind}FID" if label == INCEPTION else f"{kind}FD-{label}"
        spaces = [(f"{name}-{PROJECTION}", projection(width))] if count > PROJECTIONS[PROJECTION] else []
        if whole and count > width:
            spaces.append((name, None))
        for space, matrix in spaces:
            pair = [[g if matrix is None else g.project(matrix) for g in groups] for groups in (ours, theirs)]
            limit = grouped_distance(*pair)
            self._add(
                run,
                about,
                metric=f"{space}-inf",
                value=limit.extrapolated,
                low=limit.extrapolated_low,
                high=limit.extrapolated_high,
                interval=f"95 % jackknife, {len(ours)} groups",
                n=sum(group.count for group in ours),
                curve=_curve(*pair),
                terms={"dimensions": len(pair[0][0].mean)},
            )

    def series(self, name: str, series: list[Degraded]) -> None:
        """Add a row a kind of degradation and metric: all strengths in its curve, the strongest as its value."""
        for kind in STRENGTHS:
            steps = [each for each in series if each.kind == kind]
            measured = []
            for each in steps:
                entries = {metric: _over_images(values) for metric, values in each.by_image.items()}
                measured.append(entries | {entry["metric"]: entry for entry in _entries(each.fidelity)})
            about = {"kind": kind, "unit": UNITS[kind], "convention": "mar"}
            about["limit"] = len(next(iter(steps[0].by_image.values())))
            for metric, last in measured[-1].items():
                curve = [[each.strength, found[metric]["value"]] for each, found in zip(steps, measured, strict=True)]
                self._add(f"{name}, {kind}", about, **{**last, "metric": metric}, curve=curve)


def measures(made: Statistics, real: Statistics) -> tuple[str, ...]:
    """Return what so many images allow: no Fréchet distance of no more images than dimensions."""
    least = min(made.count, real.count)
    if least > made.width:
        return ("frechet", "kid", "precision", "recall")
    return FOR_FEW if least > PROJECTIONS[PROJECTION] else FOR_FEW[1:]


def _entries(found: Fidelity) -> list[dict]:
    """Return the entries of rows, the level of their intervals said."""
    return [entry | {"interval": entry["interval"] and f"95 % {entry['interval']}"} for entry in found.entries()]


def _curve(ours: list[Moments], theirs: list[Moments]) -> list[list[float]]:
    return [[n, value] for n, value in bias_curve(ours, theirs)]


def _over_images(values: np.ndarray) -> dict[str, object]:
    """Mean, interval and n of a metric of images. Identical ones, whose PSNR is infinite, are left out of its mean."""
    finite = values[np.isfinite(values)]
    if len(finite) < 2:
        raise ValueError(f"{len(values) - len(finite)} of {len(values)} images came out identical: PSNR has no mean.")
    return mean_interval(finite).row()


# -- tables ----------------------------------------------------------------------------------------------------------


def plain(metric: str) -> str:
    """Name a metric without the letter that says whether reconstructions or samples are judged, for people."""
    names = {"psnr": "PSNR, dB", "ssim": "SSIM"}
    return names.get(metric, metric[1:] if metric[:3] in ("rFD", "gFD", "rFI", "gFI") else metric)


def _cell(row: dict | None) -> str:
    if row is None:
        return "–"
    floor = row.get("terms", {}).get("floor")
    interval = "" if row["low"] is None else f" [{row['low']:.3g}, {row['high']:.3g}]"
    return f"{row['value']:.4g}{interval}" + ("" if floor is None else f" ({floor:.3g})")


def table(rows: list[dict]) -> str:
    """One column a tokenizer or generator, one line a metric, in Markdown: value [95 % interval] (floor)."""
    judged = [rows_of.check(row) for row in rows if "judged" in row["config"]]
    if not judged:
        return "*No rows have been recorded.*"
    runs: dict[str, dict[str, dict]] = {}
    for row in judged:
        runs.setdefault(row["run"], {})[plain(row["metric"])] = row
    firsts = [next(iter(found.values())) for found in runs.values()]
    lines = ["| | " + " | ".join(runs) + " |", "|---|" + "---|" * len(runs)]
    lines.append("| judged | " + " | ".join(row["config"]["judged"] for row in firsts) + " |")
    images = (f"{row['data']} {row['config']['split']}, {row['config']['image_size']} px" for row in firsts)
    lines.append("| against | " + " | ".join(images) + " |")
    lines.append(
        "| images | " + " | ".join(f"{max(r['n'] for r in found.values()):,}" for found in runs.values()) + " |"
    )
    for metric in dict.fromkeys(metric for found in runs.values() for metric in found):
        lines.append(f"| {metric} | " + " | ".join(_cell(found.get(metric)) for found in runs.values()) + " |")
    return "\n".join(lines)


def series_table(rows: list[dict]) -> str:
    """One line a degradation and strength, one column a metric, in Markdown, of the rows of one set of images."""
    series = [rows_of.check(row) for row in rows if "kind" in row["config"]]
    if not series:
        return "*No rows have been recorded.*"
    metrics = [m for m in dict.fromkeys(row["metric"] for row in series) if not m.endswith("-inf")]
    by_kind: dict[str, dict[str, dict]] = {}
    for row in series:
        by_kind.setdefault(row["run"], {})[row["metric"]] = row
    lines = ["| images | " + " | ".join(map(plain, metrics)) + " |", "|---|" + "--:|" * len(metrics)]
    for run, found in by_kind.items():
        for number, (strength, _) in enumerate(next(iter(found.values()))["curve"]):
            values = (f"{found[m]['curve'][number][1]:.3g}" if m in found else "–" for m in metrics)
            lines.append(f"| {run} {strength:g} | " + " | ".join(values) + " |")
    return "\n".join(lines)
