"""Claims of the paper as registered before a study, and verdicts on them from its rows; none is given by hand.

Primary claims are corrected for their number (Holm), exploratory ones say where an interval lies and decide nothing.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import numpy as np

from softvq_lib.arms import STAGES, Measured, key, measures, select
from softvq_lib.claim_forms import (
    Correlation,
    Finite,
    Nothing,
    Recorded,
    SlopeDifference,
    Test,
    TimeToTarget,
    Within,
    reachable,
    read_test,
    sides,
)
from softvq_lib.claim_rules import Evidence, Found, Question, find
from softvq_lib.config import nearest, one_of
from softvq_lib.evaluation.comparisons import holm
from softvq_lib.evaluation.power import paired_power, pairs_needed
from softvq_lib.evaluation.statistics import Estimate

KINDS = ("primary", "exploratory", "exact", "not testable here")
DIRECTIONS = ("less", "greater", "within", "equal")
HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided at this power"
FOR, AGAINST, OPEN = "points for", "points against", "undecided"
EXACT, NOT_EXACT, UNTESTED = "exact: holds", "exact: does not hold", "not testable here"


@dataclass(frozen=True)
class Claim:
    """One claim and its test.

    Attributes:
        id: Such as "C1"; more tests of it are "C1-…".
        place: In the paper.
        claim: In a sentence.
        kind: "primary", "exploratory", "exact" or "not testable here".
        sweep: Of the arms; "" where none are compared.
        metric: As `softvq_lib.arms` names it, or of what is compared in its place.
        direction: Of the contrast, if the claim is true: "less" or "greater" than 0 (of a ratio: 1), or "within".
        test: What is compared, by a rule of `claim_rules`.
        decision: When the claim holds, in words.
        effect: The least contrast that matters, in the unit of the metric; the margin of "within".
        effect_reason: Why so much.
        pairs: Planned ones; points of a correlation, runs of times.
        first_pairs: Those of the first pass.
        smallest_p: The smallest two-sided p that all pairs can reach; 0 for a test by a formula.
        first_smallest_p: So of the first pass.
        note: What else must be known; for "not testable here", why.
    """

    id: str
    place: str
    claim: str
    kind: str
    sweep: str
    metric: str
    direction: str
    test: Test | Nothing
    decision: str
    effect: float | None = None
    effect_reason: str = ""
    pairs: int | None = None
    first_pairs: int | None = None
    smallest_p: float | None = None
    first_smallest_p: float | None = None
    note: str = ""

    @property
    def number(self) -> str:
        """The claim of which this is a test: "C1" of "C1-ae"."""
        return self.id.partition("-")[0]


@dataclass(frozen=True)
class Registry:
    """All claims.

    Attributes:
        about: What this is.
        scale: Of the study.
        known_before: What was known when it was written.
        alpha: Level of tests; intervals are those of 1 - alpha.
        claims: In order.
    """

    about: str
    scale: str
    known_before: str
    alpha: float
    claims: tuple[Claim, ...]

    def of_kind(self, *kinds: str) -> list[Claim]:
        """Claims of these kinds."""
        return [claim for claim in self.claims if claim.kind in kinds]


def read_registry(path: Path) -> Registry:
    """Read a registry from JSON.

    Raises:
        ValueError: for a key that is unknown (the nearest is offered) or missing, a kind, direction or rule that there
            is none of, an id that stands there twice, or a test without the effect that it needs.
    """
    values = json.loads(Path(path).read_text())
    _keys(str(path), values, Registry)
    claims = tuple(_claim(f"{path}: {entry.get('id', '?')}", entry) for entry in values["claims"])
    ids = [claim.id for claim in claims]
    if twice := sorted({one for one in ids if ids.count(one) > 1}):
        raise ValueError(f"{path}: {', '.join(twice)} stands there twice.")
    return Registry(**{**values, "claims": claims})


def _keys(at: str, values: Mapping[str, object], cls: type) -> None:
    known = {entry.name: entry for entry in fields(cls)}
    for name in values:
        if name not in known:
            raise ValueError(f"{at}: unknown key {name!r}{nearest(name, known)} Known: {', '.join(known)}.")
    if missing := [name for name, entry in known.items() if entry.default is MISSING and name not in values]:
        raise ValueError(f"{at}: {', '.join(missing)} is missing.")


def _claim(at: str, values: Mapping[str, object]) -> Claim:
    _keys(at, values, Claim)
    one_of(f"{at}: kind", values["kind"], KINDS)
    one_of(f"{at}: direction", values["direction"], DIRECTIONS)
    claim = Claim(**{**values, "test": read_test(values["test"], at)})
    effect = claim.effect
    if claim.kind in ("primary", "exploratory") and not isinstance(claim.test, Finite) and not (effect and effect > 0):
        raise ValueError(f"{at}: effect={effect!r}; state the least that matters, above 0.")
    if (claim.direction == "within") != isinstance(claim.test, Within):
        raise ValueError(f"{at}: direction 'within' and rule 'equivalence' belong together.")
    if claim.kind == "not testable here" and not claim.note:
        raise ValueError(f"{at}: note is missing: say why it cannot be tested here.")
    return claim


def check_plan(registry: Registry, plan: Sequence[Measured]) -> None:
    """Hold a registry against the plan of the study.

    Raises:
        ValueError: for a sweep, factor or level that is not planned, a metric that its arms do not measure, levels that
            do not tell arms apart, or another number of pairs than planned.
    """
    for claim in registry.claims:
        if claim.sweep and not isinstance(claim.test, Nothing):
            _check_arms(claim, plan)
            _check_counts(claim, plan, registry.alpha)


def _check_arms(claim: Claim, plan: Sequence[Measured]) -> None:
    test = claim.test
    asked = [(claim.sweep, levels) for levels in sides(test)]
    if isinstance(test, TimeToTarget):
        asked.append((test.target["sweep"], test.target["levels"]))
    for sweep, levels in asked:
        arms = select(plan, sweep, levels)
        for metric in (test.x1, test.x2, test.y) if isinstance(test, Correlation) else (claim.metric,):
            one_of(f"{claim.id}: {metric}, measured by", metric.partition(".")[0], STAGES)
            if lacking := [arm.arm.name for arm in arms if not measures(arm.arm, metric)]:
                raise ValueError(f"{claim.id}: {metric} is not measured in {', '.join(lacking[:4])}.")
        if sweep == claim.sweep:
            factors = list(getattr(test, "over", getattr(test, "group", ())))
            factors += [test.along] if isinstance(test, SlopeDifference | TimeToTarget) else []
            for factor in factors:
                one_of(f"{claim.id}: factor", factor, arms[0].factors)
            apart = len({key(arm, factors) for arm in arms}) == len(arms)
            if not apart and not isinstance(test, Correlation | Finite):
                raise ValueError(f"{claim.id}: {dict(levels)} and {', '.join(factors)} do not tell arms apart.")


def _check_counts(claim: Claim, plan: Sequence[Measured], alpha: float) -> None:
    question = Question(claim.sweep, claim.metric, claim.effect, alpha)
    for name, some in (("pairs", plan), ("first_pairs", [arm for arm in plan if arm.arm.first])):
        planned = find(claim.test, question, Evidence(some)).planned
        p_name = name.replace("pairs", "smallest_p")
        for entry, there in ((name, planned), (p_name, reachable(claim.test, planned))):
            if (said := getattr(claim, entry)) != there:
                raise ValueError(f"{claim.id}: {entry}={said}, but by the plan it is {there}.")


# -- verdicts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What the rows say of a claim.

    Attributes:
        claim: The claim.
        verdict: One of the words of this file, "undecided" perhaps with the number of pairs.
        found: What its rule found.
        holm: p corrected for the number of primary claims; None for one that is none or has not all of its pairs.
        power: Of the planned pairs to find the effect that matters, with the spread of those that there are.
        needed: Pairs for a power of 0.8.
        words: What else belongs beside it.
    """

    claim: Claim
    verdict: str
    found: Found
    holm: float | None = None
    power: float | None = None
    needed: int | None = None
    words: str = ""

    @property
    def estimate(self) -> Estimate | None:
        """The contrast with its interval."""
        return self.found.estimate

    @property
    def rows(self) -> tuple[dict, ...]:
        """The measured rows behind it."""
        return self.found.rows


def verdicts(
    registry: Registry, arms: Sequence[Measured], paper: Sequence[dict] = (), recorded: Iterable[dict] = ()
) -> list[Verdict]:
    """Decide on every claim of a registry.

    Args:
        registry: The claims, with the level alpha.
        arms: The plan joined with its rows, as `softvq_lib.arms.measured` returns it.
        paper: The paper's own numbers, for what is derived from them.
        recorded: Rows that were recorded apart from the study.

    Raises:
        ValueError: for a claim on what is not planned.
    """
    evidence = Evidence(arms, paper, list(recorded))
    found = {}
    for claim in registry.claims:
        question = Question(claim.sweep, claim.metric, claim.effect, registry.alpha)
        found[claim.id] = find(claim.test, question, evidence)
    corrected = _corrected(registry.of_kind("primary"), found)
    return [_verdict(claim, found[claim.id], registry, corrected) for claim in registry.claims]


def _corrected(primary: Iterable[Claim], found: Mapping[str, Found]) -> dict[str, float]:
    """Holm over all primary claims: one that cannot be tested yet counts as if its p were 1, and has none itself."""
    p = {claim.id: found[claim.id].p if _complete(found[claim.id]) else None for claim in primary}
    corrected = holm({name: 1.0 if value is None else value for name, value in p.items()}) if p else {}
    return {name: value for name, value in corrected.items() if p[name] is not None}


def _complete(found: Found) -> bool:
    return found.n == found.planned > 0 and found.p is not None


def _verdict(claim: Claim, found: Found, registry: Registry, corrected: Mapping[str, float]) -> Verdict:
    if claim.kind == "not testable here":
        return Verdict(claim, UNTESTED, found, words=claim.note)
    if claim.kind == "exact":
        return Verdict(claim, EXACT if found.holds else NOT_EXACT, found, words=found.words)
    primary = claim.kind == "primary"
    power, needed, said = _power(claim, found, registry.alpha / (len(registry.of_kind("primary")) if primary else 1))
    words = [said, found.words]
    if primary:
        verdict, more = _decided(claim, found, registry.alpha, corrected.get(claim.id))
        words.insert(0, more)
    else:
        verdict = _pointed(claim, found)
    return Verdict(claim, verdict, found, corrected.get(claim.id), power, needed, "; ".join(filter(None, words)))


def _decided(claim: Claim, found: Found, alpha: float, corrected: float | None) -> tuple[str, str]:
    """The verdict on a primary claim, and a remark."""
    if corrected is None:
        return UNDECIDED, f"{found.n} of {found.planned} pairs"
    value, low, high = _towards(claim, found.estimate)
    small = "" if high >= claim.effect else "; even the interval's end is below the effect that matters"
    if corrected <= alpha:
        return (HOLDS, small.removeprefix("; ")) if value > 0 else (FAILS, "the other way")
    return (FAILS, "the effect that matters is excluded") if high < claim.effect else (UNDECIDED, "")


def _pointed(claim: Claim, found: Found) -> str:
    """The verdict on an exploratory claim."""
    if isinstance(claim.test, Finite):
        return FOR if found.holds else f"{OPEN} ({found.n} of {found.planned})"
    if found.estimate is None:
        unit = {Correlation: "point", TimeToTarget: "run"}.get(type(claim.test), "pair")
        return f"{OPEN} ({found.n or 'no'} {unit}{'' if found.n == 1 else 's'})"
    if isinstance(claim.test, Within):
        apart = found.estimate.low > claim.effect or found.estimate.high < -claim.effect
        return FOR if found.holds else AGAINST if apart else OPEN
    _, low, high = _towards(claim, found.estimate)
    return FOR if low > 0 else AGAINST if high < 0 else OPEN


def _towards(claim: Claim, estimate: Estimate) -> tuple[float, float, float]:
    """Value, low and high as so much in the claimed direction."""
    null = null_of(claim)
    value, low, high = (end - null for end in estimate.triple)
    return (-value, -high, -low) if claim.direction == "less" else (value, low, high)


def null_of(claim: Claim) -> float:
    """The contrast where nothing differs."""
    return claim.test.reference if isinstance(claim.test, Recorded) else float(isinstance(claim.test, TimeToTarget))


def _power(claim: Claim, found: Found, alpha: float) -> tuple[float | None, int | None, str]:
    """Power of the planned pairs and pairs needed, or why there is none."""
    without = Correlation | TimeToTarget | Recorded | Finite | Within
    if not isinstance(found.differences, tuple) or isinstance(claim.test, without):
        return None, None, ""
    if found.n < 3:
        return None, None, f"power not estimable from {found.n} pair{'' if found.n == 1 else 's'}"
    sd = float(np.std(found.differences, ddof=1))
    if not sd > 0:
        return None, None, "power not estimable: all pairs are equal"
    power = paired_power(claim.effect, sd, found.planned, alpha=alpha)
    try:
        return power, pairs_needed(claim.effect, sd, power=0.8, alpha=alpha), ""
    except ValueError:
        return power, None, "more than 10,000 pairs would be needed"


def rows_behind(found: Iterable[Verdict], study: bool = True) -> list[dict]:
    """The measured rows of verdicts, each once: those of the study, or those recorded apart from it."""
    rows = {}
    for verdict in found:
        if isinstance(verdict.claim.test, Recorded) != study:
            rows |= {(row["experiment"], row["run"], row["metric"]): row for row in verdict.rows}
    return list(rows.values())
