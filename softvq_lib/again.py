"""A rerun of one arm held against what was recorded: does each number lie where one more seed is to be expected."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy import stats

from softvq_lib.arms import Measured, grouped

LEVEL = 0.95
SEED = "seed"  # factor whose levels repeat an arm


@dataclass(frozen=True)
class Again:
    """One metric of a rerun.

    Attributes:
        metric: As in `softvq_lib.arms`.
        recorded: Its recorded value.
        value: The rerun's.
        low: Of the interval in which one more seed lies with 95 %; None where no arm has two seeds.
        high: Its other end.
        degrees: Degrees of freedom of the deviation between seeds.
    """

    metric: str
    recorded: float
    value: float
    low: float | None
    high: float | None
    degrees: int

    @property
    def inside(self) -> bool | None:
        """Whether the rerun lies in the interval; None without one."""
        return None if self.low is None else self.low <= self.value <= self.high


def between_seeds(arms: Iterable[Measured], metric: str) -> tuple[float, int]:
    """Standard deviation of a metric between seeds, pooled over the arms of a sweep, and its degrees of freedom.

    Returns:
        The deviation, nan with 0 degrees of freedom where no two seeds of an arm were measured.
    """
    arms, squares, degrees = list(arms), 0.0, 0
    factors = [name for name in arms[0].factors if name != SEED] if arms else []
    for _, group in grouped(arms, factors):
        values = [value for arm in group if (value := arm.value(metric)) is not None]
        if len(values) > 1:
            squares += float(np.var(values, ddof=1)) * (len(values) - 1)
            degrees += len(values) - 1
    return (squares / degrees) ** 0.5 if degrees else float("nan"), degrees


def compare(recorded: Iterable[Measured], rerun: Measured) -> list[Again]:
    """Hold a rerun against all recorded arms of its sweep.

    The interval is around the mean of the recorded seeds of this arm, with the deviation between seeds of all arms.

    Raises:
        ValueError: where nothing was recorded of the arm.
    """
    sweep = [arm for arm in recorded if arm.arm.sweep == rerun.arm.sweep]
    levels = {name: level for name, level in rerun.factors.items() if name != SEED}
    same = [arm for arm in sweep if arm.has(levels) and arm.rows]
    mine = next((arm for arm in same if arm.arm.name == rerun.arm.name), None)
    if mine is None:
        raise ValueError(f"nothing is recorded of {rerun.arm.name!r}: run it first, without --again.")
    found = []
    for metric, row in rerun.rows.items():
        if metric not in mine.rows:
            continue
        values = np.array([value for arm in same if (value := arm.value(metric)) is not None])
        deviation, degrees = between_seeds(sweep, metric)
        low = high = None
        if degrees:
            half = stats.t.ppf((1 + LEVEL) / 2, degrees) * deviation * (1 + 1 / len(values)) ** 0.5
            low, high = float(values.mean() - half), float(values.mean() + half)
        found.append(Again(metric, mine.value(metric), row["value"], low, high, degrees))
    return found


def table(found: Iterable[Again]) -> str:
    """A line a metric, in Markdown."""
    lines = ["| metric | recorded | rerun | 95 % prediction interval | inside |", "|---|--:|--:|---|---|"]
    for one in found:
        interval = "no two seeds" if one.low is None else f"[{one.low:.4g}, {one.high:.4g}]"
        answer = {None: "–", True: "yes", False: "no"}[one.inside]
        lines.append(f"| {one.metric} | {one.recorded:.4g} | {one.value:.4g} | {interval} | {answer} |")
    return "\n".join(lines)
