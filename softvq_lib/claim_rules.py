"""Decision rules by name: what a registered test finds in the rows of a study; `claims` makes verdicts of it.

Contrasts are paired over factors of the sweep, such as seed and tokens: a pair counts where all of its rows are there.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from softvq_lib.arms import Measured, grouped, key, select
from softvq_lib.claim_checks import CHECKS
from softvq_lib.claim_forms import (
    Correlation,
    Exact,
    Finite,
    Interaction,
    Levels,
    Nothing,
    Ordered,
    Paired,
    Recorded,
    SlopeDifference,
    Test,
    TimeToTarget,
    Within,
    reachable,
    sides,
)
from softvq_lib.evaluation.associations import compare_correlations, slopes_per_doubling, spearman
from softvq_lib.evaluation.comparisons import equivalence, paired_comparison
from softvq_lib.evaluation.statistics import Estimate
from softvq_lib.evaluation.time_to_target import compare_times, steps_to_target

_TABLES = ("Tab. 3", "Tab. 4")  # of the paper, with rFID and gFID of its own tokenizers


@dataclass(frozen=True)
class Evidence:
    """All that rules look at.

    Attributes:
        arms: Of the plan, with their rows.
        paper: The paper's own numbers.
        recorded: Rows that were recorded apart from the study.
    """

    arms: Sequence[Measured]
    paper: Sequence[dict] = ()
    recorded: Sequence[dict] = ()


@dataclass(frozen=True)
class Question:
    """What a rule is asked: where it looks, and what of that.

    Attributes:
        sweep: Name of the sweep; "" where none is needed.
        metric: As `softvq_lib.arms` names it.
        effect: The least that matters, which is the margin of an equivalence; None where there is none.
        alpha: Level of the tests; intervals are those of 1 - alpha.
    """

    sweep: str
    metric: str
    effect: float | None
    alpha: float


@dataclass(frozen=True)
class Found:
    """What a rule finds.

    Attributes:
        value: The contrast; None where there is nothing.
        estimate: The same with its interval; None for fewer than two pairs.
        differences: One a pair, for the power.
        n: Pairs (of a correlation, points; of times, runs) that there are.
        planned: The same, as planned.
        p: Two-sided; None where there is no test.
        smallest_p: The smallest that these pairs can reach.
        holds: Of a check, and of an equivalence or a count where it is shown.
        words: What else belongs beside the number.
        rows: The measured rows that it was computed from.
    """

    value: float | None = None
    estimate: Estimate | None = None
    differences: tuple[float, ...] = ()
    n: int = 0
    planned: int = 0
    p: float | None = None
    smallest_p: float | None = None
    holds: bool | None = None
    words: str = ""
    rows: tuple[dict, ...] = field(default=(), repr=False)


# -- the rules ---------------------------------------------------------------------------------------------------------


def _contrast(
    differences: np.ndarray, planned: int, rows: Iterable[dict], question: Question, words: str = ""
) -> Found:
    """The mean of one difference a pair, with interval and sign-flip test as far as so many pairs carry them."""
    n = len(differences)
    found = Found(differences=tuple(differences.tolist()), n=n, planned=planned, rows=tuple(rows), words=words)
    if not n:
        return found
    found = replace(found, value=float(differences.mean()))
    if n < 2:
        return replace(found, smallest_p=1.0)
    try:
        made = paired_comparison(differences, np.zeros(n), level=1 - question.alpha, over="pairs")
    except ValueError as error:
        return replace(found, words="; ".join(filter(None, [words, str(error)])))
    return replace(found, estimate=made, p=made.p, smallest_p=made.smallest_p)


def _pairs(question: Question, test: Test, sweep: list[Measured]) -> tuple[np.ndarray, int, list[dict]]:
    """Values (sides, n) of all sides of a contrast, how many such pairs are planned, and the rows."""
    arms = [{key(arm, test.over): arm for arm in sweep if arm.has(levels)} for levels in sides(test)]
    planned = [at for at in arms[0] if all(at in side for side in arms)]
    there = [at for at in planned if all(question.metric in side[at].rows for side in arms)]
    values = np.array([[side[at].value(question.metric) for at in there] for side in arms], dtype=np.float64)
    rows = [side[at].rows[question.metric] for side in arms for at in there]
    return values.reshape(len(arms), len(there)), len(planned), rows


def paired(test: Paired, question: Question, evidence: Evidence) -> Found:
    """The mean of a - b over pairs."""
    values, planned, rows = _pairs(question, test, select(evidence.arms, question.sweep))
    return _contrast(values[0] - (values[1] if len(values) > 1 else 0), planned, rows, question)


def interaction(test: Interaction, question: Question, evidence: Evidence) -> Found:
    """The mean difference of differences."""
    values, planned, rows = _pairs(question, test, select(evidence.arms, question.sweep))
    a1, a0, b1, b0 = values
    words = f"the first is {(a1 - a0).mean():.3g}, the second {(b1 - b0).mean():.3g}" if values.size else ""
    return _contrast((a1 - a0) - (b1 - b0), planned, rows, question, words)


def within(test: Within, question: Question, evidence: Evidence) -> Found:
    """Two one-sided t tests that the mean of a - b lies within the margin."""
    values, planned, rows = _pairs(question, test, select(evidence.arms, question.sweep))
    differences = values[0] - (values[1] if len(values) > 1 else 0)
    found = replace(_contrast(differences, planned, rows, question), estimate=None, p=None, smallest_p=0.0)
    if found.n < 2:
        return found
    try:
        made = equivalence(
            differences, np.zeros(found.n), question.effect, paired=True, alpha=question.alpha, over="pairs"
        )
    except ValueError as error:
        return replace(found, words=str(error))
    return replace(found, estimate=made, p=made.p, holds=made.verdict == "equivalent")


def slope_difference(test: SlopeDifference, question: Question, evidence: Evidence) -> Found:
    """The mean difference of slopes, one a unit such as a seed.

    Units count that have all levels of `along`; before there is any, those that have two or more of one set.
    """
    sweep = select(evidence.arms, question.sweep)
    levels = sorted({arm.factors[test.along] for arm in sweep}, key=float)
    apart = [
        {unit: {arm.factors[test.along]: arm for arm in arms} for unit, arms in _units(sweep, side, test.over)}
        for side in sides(test)
    ]
    units = [unit for unit in apart[0] if all(unit in side for side in apart)]
    could = {unit: [at for at in levels if all(at in side[unit] for side in apart)] for unit in units}
    has = {
        unit: [at for at in could[unit] if all(question.metric in side[unit][at].rows for side in apart)]
        for unit in units
    }
    planned = sum(len(found) > 1 for found in could.values())
    used = max(has.values(), key=len, default=[])
    there = [unit for unit in units if len(used) > 1 and set(used) <= set(has[unit])]
    values = [[[side[unit][at].value(question.metric) for at in used] for unit in there] for side in apart]
    slopes = [slopes_per_doubling(np.array(used, float), np.array(side)) if there else np.zeros(0) for side in values]
    words = ""
    if there:
        each = " and ".join(f"{side.mean():.3g}" for side in slopes)
        words = f"{'slopes' if len(slopes) > 1 else 'slope'} {each}, through {test.along} {', '.join(used)}"
    rows = [side[unit][at].rows[question.metric] for side in apart for unit in there for at in used]
    return _contrast(slopes[0] - (slopes[1] if len(slopes) > 1 else 0), planned, rows, question, words)


def _units(sweep: Iterable[Measured], levels: Levels, over: Sequence[str]) -> Iterable[tuple[tuple, list[Measured]]]:
    return grouped([arm for arm in sweep if arm.has(levels)], over)


def ordered(test: Ordered, question: Question, evidence: Evidence) -> Found:
    """The mean slope of a straight line through the levels in their order."""
    values, planned, rows = _pairs(question, test, select(evidence.arms, question.sweep))
    steps = slopes_per_doubling(2.0 ** np.arange(len(values)), values.T) if values.size else np.zeros(0)
    means = (
        ", ".join(f"{level} {mean:.4g}" for level, mean in zip(test.levels, values.mean(1), strict=True))
        if (values.size)
        else ""
    )
    return _contrast(steps, planned, rows, question, means)


def correlation(test: Correlation, question: Question, evidence: Evidence) -> Found:
    """The difference of two rank correlations by Steiger."""
    metrics = (test.x1, test.x2, test.y)
    if test.source == "paper":
        points = _printed(evidence.paper, test.place, metrics)
        planned, rows = len(points), []
    else:
        groups = list(grouped(select(evidence.arms, question.sweep, test.where), test.group))
        planned = len(groups)
        groups = [[arm for arm in arms if all(metric in arm.rows for metric in metrics)] for _, arms in groups]
        points = [[np.mean([arm.value(metric) for arm in arms]) for metric in metrics] for arms in groups if arms]
        rows = [arm.rows[metric] for arms in groups for arm in arms for metric in metrics]
    found = Found(n=len(points), planned=planned, smallest_p=0.0, rows=tuple(rows))
    if len(points) < 5:
        return replace(found, words=f"a correlation needs 5 points, {len(points)} are there")
    x1, x2, y = np.array(points).T * np.array([[test.x1_sign], [test.x2_sign], [test.y_sign]])
    try:
        made = compare_correlations(x1, x2, y, level=1 - question.alpha, over="points")
        each = [spearman(x, y, over="points") for x in (x1, x2)]
    except ValueError as error:
        return replace(found, words=str(error))
    words = " and ".join(f"{one.value:.2f} [{one.low:.2f}, {one.high:.2f}]" for one in each)
    words = f"rank correlations {words}"
    if test.source == "paper":
        wider = np.array([row for place in _TABLES for row in _printed(evidence.paper, place, metrics[1:])]).T
        also = spearman(test.x2_sign * wider[0], test.y_sign * wider[1], over="rows")
        words += f"; of {test.x2} over {also.n} rows of {' and '.join(_TABLES)} {also.value:.2f}"
        words += f" [{also.low:.2f}, {also.high:.2f}]"
    return replace(found, value=made.value, estimate=made, p=made.p, words=words)


def time_to_target(test: TimeToTarget, question: Question, evidence: Evidence) -> Found:
    """The ratio of median budgets until the target."""
    sweep = select(evidence.arms, question.sweep)
    aim = [
        arm for arm in select(evidence.arms, test.target["sweep"], test.target["levels"]) if question.metric in arm.rows
    ]
    runs = [[arms for _, arms in _units(sweep, side, test.over)] for side in sides(test)]
    whole = [[arms for arms in side if all(question.metric in arm.rows for arm in arms)] for side in runs]
    rows = [arm.rows[question.metric] for arms in (aim, *whole[0], *whole[1]) for arm in arms]
    n, planned = (sum(map(len, some)) for some in (whole, runs))
    found = Found(n=n, planned=planned, smallest_p=reachable(test, n), rows=tuple(rows))
    if not aim:
        return replace(found, words="the arms of the target have not been run")
    target = float(np.mean([arm.value(question.metric) for arm in aim]))
    if not all(whole):
        return replace(found, words=f"target {target:.4g}")
    times = []
    for side in whole:
        curves = [sorted(arms, key=lambda arm: float(arm.factors[test.along])) for arms in side]
        times.append(
            [
                steps_to_target(
                    [float(arm.factors[test.along]) for arm in curve],
                    [arm.value(question.metric) for arm in curve],
                    target,
                    better=test.better,
                )
                for curve in curves
            ]
        )
    said = " and ".join(", ".join(f"{'' if there else '> '}{time:g}" for time, there in side) for side in times)
    found = replace(found, words=f"target {target:.4g}; {test.along} to it: {said}")
    (a, a_there), (b, b_there) = (tuple(zip(*side, strict=True)) for side in times)
    if min(map(len, times)) < 2:
        return replace(found, value=a[0] / b[0] if len(a) == len(b) == 1 and all(a_there + b_there) else None)
    try:
        made = compare_times(a, a_there, b, b_there, level=1 - question.alpha, over="runs")
    except ValueError as error:
        return replace(found, words=f"{found.words}; {error}")
    return replace(found, value=made.value, estimate=made, p=made.p, smallest_p=made.smallest_p)


def finite(test: Finite, question: Question, evidence: Evidence) -> Found:
    """How many of the planned arms have the metric."""
    arms = select(evidence.arms, question.sweep, test.where)
    rows = tuple(arm.rows[question.metric] for arm in arms if question.metric in arm.rows)
    whole = len(rows) == len(arms) > 0
    return Found(float(len(rows)), n=len(rows), planned=len(arms), smallest_p=1.0, holds=whole, rows=rows)


def recorded(test: Recorded, question: Question, evidence: Evidence) -> Found:
    """A recorded ratio with its interval."""
    for row in evidence.recorded:
        if (row["experiment"], row["run"], row["metric"]) == (test.file, test.run, test.metric):
            low, high = (-np.inf if row["low"] is None else row["low"], np.inf if row["high"] is None else row["high"])
            made = Estimate(row["value"], low, high, row["n"], row["interval"])
            return Found(row["value"], made, n=1, planned=1, rows=(row,), words=f"of {row['n']} rounds")
    return Found(planned=1, words=f"{test.run} has no row {test.metric}")


def exact(test: Exact, question: Question, evidence: Evidence) -> Found:
    """Make the check."""
    holds, words = CHECKS[test.check](evidence.paper)
    return Found(holds=holds, words=words)


def nothing(test: Nothing, question: Question, evidence: Evidence) -> Found:
    """Find nothing."""
    return Found()


RULES: dict[type, Callable[..., Found]] = {
    Paired: paired,
    Interaction: interaction,
    SlopeDifference: slope_difference,
    Within: within,
    Correlation: correlation,
    Ordered: ordered,
    TimeToTarget: time_to_target,
    Finite: finite,
    Recorded: recorded,
    Exact: exact,
    Nothing: nothing,
}


def find(test: Test | Nothing, question: Question, evidence: Evidence) -> Found:
    """Apply the rule of a test.

    Raises:
        ValueError: for a sweep, factor or level that is not planned.
    """
    return RULES[type(test)](test, question, evidence)


def _printed(paper: Iterable[dict], place: str, metrics: Sequence[str]) -> list[list[float]]:
    """Numbers of the rows of a table that have all of these metrics, one list a row."""
    rows: dict[object, dict[str, float]] = {}
    for number in paper:
        if number["place"] == place:
            rows.setdefault(number.get("row"), {})[number["metric"]] = number["value"]
    return [[row[metric] for metric in metrics] for row in rows.values() if all(metric in row for metric in metrics)]
