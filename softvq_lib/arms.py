"""What was measured of the arms of a plan: results rows by arm and metric, and the pairs that comparisons are made of.

Metrics carry the experiment that measured them: `reconstruction.psnr`, `samples.KID-EffLite0` and `guided.…` (with
classifier-free guidance), `probe.z.flatten`, `latents.cosine`, `training.psnr`, `generator.val_loss`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from softvq_lib import results as rows_of
from softvq_lib.config import nearest
from softvq_lib.sweeps import Arm


@dataclass(frozen=True)
class Measured:
    """An arm with its results rows.

    Attributes:
        arm: As planned.
        rows: By metric; {} for an arm that has not been executed.
    """

    arm: Arm
    rows: dict[str, dict] = field(default_factory=dict)

    @property
    def factors(self) -> dict[str, str]:
        """The arm's level by factor."""
        return self.arm.factors

    def value(self, metric: str) -> float | None:
        """The value of a metric; None where it was not measured."""
        return self.rows[metric]["value"] if metric in self.rows else None

    def has(self, levels: Mapping[str, object]) -> bool:
        """Whether the arm has these levels (by factor; text or numbers, or several of them)."""
        for factor, level in levels.items():
            wanted = level if isinstance(level, (list, tuple, set)) else [level]
            if self.factors.get(factor) not in map(str, wanted):
                return False
        return True


def measured(plan: Iterable[Arm], results: Path) -> list[Measured]:
    """Join the arms of a plan with the results rows of a folder.

    Raises:
        ValueError: for a damaged row, see `results.read`.
    """
    rows = by_run(Path(results))
    found = []
    for arm in plan:
        mine: dict[str, dict] = {}
        for cell in arm.cells:
            mine |= rows.get((cell.experiment, cell.run), {})
            if cell.experiment in ("evaluate", "linear_probing"):
                for need in cell.needs:
                    mine |= rows.get((cell.experiment, need.run), {})
        found.append(Measured(arm, mine))
    return found


GUIDED = ", guided"  # between the run and the guidance scale, in the name of what was sampled with guidance


# What measures a metric, by its first word: stages that an arm must have for it.
STAGES = {
    "training": ("train_tokenizer",),
    "generator": ("train_generator",),
    "reconstruction": ("evaluate",),
    "samples": ("train_generator", "evaluate"),
    "guided": ("train_generator", "evaluate"),
    "probe": ("linear_probing",),
    "latents": ("latent_space",),
    "distillation": ("distil_encoder",),
}


def measures(arm: Arm, metric: str) -> bool:
    """Whether an arm has all stages that measure a metric."""
    return all(arm.cell(stage) for stage in STAGES[metric.partition(".")[0]])


def by_run(results: Path) -> dict[tuple[str, str], dict[str, dict]]:
    """Rows of a folder by experiment and run that they are of, and by metric with its experiment."""
    found: dict[tuple[str, str], dict[str, dict]] = {}
    for path in sorted(results.glob("*.jsonl")):
        if path.stem not in _METRIC:
            continue
        for row in rows_of.read(path):
            run, metric = _METRIC[path.stem](row)
            if run:
                found.setdefault((path.stem, run), {})[metric] = row
    return found


def _evaluated(row: dict) -> tuple[str, str]:
    judged = row["config"].get("judged")
    if judged == "reconstructions":
        return row["run"], f"reconstruction.{row['metric']}"
    run, guided, _ = row["run"].partition(GUIDED)
    return (run if judged else ""), f"{'guided' if guided else 'samples'}.{row['metric']}"


def _probed(row: dict) -> tuple[str, str]:
    config = row["config"]
    where = [config["features"], config["pooling"]]
    if config.get("block") is not None:
        where = [f"block{config['block']}", f"noise{config['noise_level']:g}"]
    kind = "" if row["metric"] == "accuracy" else f".{row['metric'].removesuffix('_accuracy')}"
    return config["source"], f"probe.{'.'.join(filter(None, where))}{kind}"


_METRIC = {
    "distil_encoder": lambda row: (row["run"], f"distillation.{row['metric']}"),
    "train_tokenizer": lambda row: (row["run"], f"training.{row['metric']}"),
    "train_generator": lambda row: (row["run"], f"generator.{row['metric']}"),
    "evaluate": _evaluated,
    "linear_probing": _probed,
    "latent_space": lambda row: (row["run"], f"latents.{row['metric']}"),
}


def select(arms: Iterable[Measured], sweep: str, levels: Mapping[str, object] | None = None) -> list[Measured]:
    """The arms of a sweep that have these levels.

    Raises:
        ValueError: for a sweep, factor or level that no arm has, with the nearest that there is.
    """
    arms = list(arms)
    mine = [arm for arm in arms if arm.arm.sweep == sweep]
    if not mine:
        raise ValueError(f"sweep {sweep!r} is not planned{nearest(sweep, {arm.arm.sweep for arm in arms})}")
    for factor, level in (levels or {}).items():
        known = {arm.factors.get(factor) for arm in mine} - {None}
        for one in map(str, level if isinstance(level, (list, tuple, set)) else [level]):
            if one not in known:
                raise ValueError(
                    f"{factor}={one!r} is no level in sweep {sweep!r}{nearest(one, known)} {sorted(known)}"
                )
    return [arm for arm in mine if arm.has(levels or {})]


def pairs(
    arms: Sequence[Measured], metric: str, a: Mapping[str, object], b: Mapping[str, object], over: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, list[tuple[str, ...]], int]:
    """Values of a metric in arms that have the levels `a` and in those that have `b`, paired by the factors `over`.

    Returns:
        Values of a (n,) and of b (n,), the levels of `over` of each pair, and how many pairs are planned.
    """
    sides = [{key(arm, over): arm for arm in arms if arm.has(levels)} for levels in (a, b)]
    planned = [at for at in sides[0] if at in sides[1]]
    there = [at for at in planned if None not in (sides[0][at].value(metric), sides[1][at].value(metric))]
    values = [np.array([side[at].value(metric) for at in there], dtype=np.float64) for side in sides]
    return values[0], values[1], there, len(planned)


def key(arm: Measured, over: Sequence[str]) -> tuple[str, ...]:
    """The arm's levels of these factors."""
    return tuple(arm.factors[factor] for factor in over)


def grouped(arms: Iterable[Measured], by: Sequence[str]) -> Iterator[tuple[tuple[str, ...], list[Measured]]]:
    """Arms that share the levels of the factors `by`, in the order of the plan: over seeds, mostly."""
    groups: dict[tuple[str, ...], list[Measured]] = {}
    for arm in arms:
        groups.setdefault(key(arm, by), []).append(arm)
    yield from groups.items()
