"""What a registered test says: its rule by name, and the arms that it compares; `claim_rules` looks at the rows.

Levels are given by factor of the sweep, as text or several of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import comb

from softvq_lib.claim_checks import CHECKS
from softvq_lib.config import nearest, one_of

Levels = Mapping[str, object]


@dataclass(frozen=True)
class Paired:
    """`a` less `b` (less 0, where there is no `b`) over pairs of arms that share the levels of `over`."""

    a: Levels
    over: Sequence[str]
    b: Levels | None = None
    where: Levels = field(default_factory=dict)


@dataclass(frozen=True)
class Within(Paired):
    """As `Paired`, with the effect as a margin of either sign."""


@dataclass(frozen=True)
class Interaction:
    """(a1 - a0) - (b1 - b0)."""

    a1: Levels
    a0: Levels
    b1: Levels
    b0: Levels
    over: Sequence[str]
    where: Levels = field(default_factory=dict)


@dataclass(frozen=True)
class SlopeDifference:
    """Change per doubling of `along` in `a` less that in `b` (less 0, where there is no `b`)."""

    a: Levels
    along: str
    over: Sequence[str]
    b: Levels | None = None
    where: Levels = field(default_factory=dict)


@dataclass(frozen=True)
class Ordered:
    """Mean change from one level of `along` to the next."""

    along: str
    levels: Sequence[str]
    over: Sequence[str]
    where: Levels = field(default_factory=dict)


@dataclass(frozen=True)
class Correlation:
    """Rank correlation of `x1` with `y` less that of `x2`, over means of arms that share the levels of `group`.

    Attributes:
        x1: Metric that is to go with `y`.
        x2: Metric that it is compared with.
        y: Metric that both shall predict.
        x1_sign: -1 for a metric that shall fall where the others rise.
        x2_sign: As `x1_sign`, of x2.
        y_sign: As `x1_sign`, of y.
        group: Factors whose levels a point's arms share.
        where: Levels of the arms that count.
        source: "paper" for the rows of its table `place` in the place of arms.
        place: Table of the paper, for its rows.
    """

    x1: str
    x2: str
    y: str
    x1_sign: int = 1
    x2_sign: int = 1
    y_sign: int = 1
    group: Sequence[str] = ()
    where: Levels = field(default_factory=dict)
    source: str = "arms"
    place: str = ""

    def __post_init__(self) -> None:
        one_of("source", self.source, ("arms", "paper"))
        for name in ("x1_sign", "x2_sign", "y_sign"):
            one_of(name, getattr(self, name), (-1, 1))


@dataclass(frozen=True)
class TimeToTarget:
    """Budgets `along` until the metric is as good as the mean of arms that are not compared (`target`)."""

    a: Levels
    b: Levels
    along: str
    over: Sequence[str]
    better: str
    target: Mapping[str, object]

    def __post_init__(self) -> None:
        one_of("better", self.better, ("lower", "higher"))
        if set(self.target) != {"sweep", "levels"}:
            raise ValueError(f"target={dict(self.target)!r}: it says sweep and levels, and nothing else.")


@dataclass(frozen=True)
class Finite:
    """Whether all arms of these levels have the metric: rows hold finite numbers alone."""

    where: Levels


@dataclass(frozen=True)
class Recorded:
    """A ratio with its interval from a row recorded apart from the study, against `reference`."""

    file: str
    run: str
    metric: str
    reference: float = 1.0


@dataclass(frozen=True)
class Exact:
    """A check that is computed anew; `tests` and `pages` say where it is also made and explained."""

    check: str
    tests: Sequence[str] = ()
    pages: Sequence[str] = ()

    def __post_init__(self) -> None:
        one_of("check", self.check, CHECKS)


@dataclass(frozen=True)
class Nothing:
    """No test."""


Test = (
    Paired | Within | Interaction | SlopeDifference | Ordered | Correlation | TimeToTarget | Finite | Recorded | Exact
)


FORMS: dict[str, type] = {
    "paired": Paired,
    "interaction": Interaction,
    "slope_difference": SlopeDifference,
    "equivalence": Within,
    "correlation": Correlation,
    "ordered": Ordered,
    "time_to_target": TimeToTarget,
    "finite": Finite,
    "recorded": Recorded,
    "exact": Exact,
    "none": Nothing,
}


def read_test(values: Mapping[str, object], at: str) -> Test | Nothing:
    """Build a test from what a registry says of it.

    Raises:
        ValueError: naming `at` and the rule or key that is unknown, with the nearest, or missing.
    """
    values = dict(values)
    rule = values.pop("rule", None)
    one_of(f"{at}: rule", rule, FORMS)
    cls = FORMS[rule]
    known = {entry.name for entry in fields(cls)}
    for name in values:
        if name not in known:
            raise ValueError(f"{at}: {name!r} is no part of rule {rule!r}{nearest(name, known)}")
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{at}: rule {rule!r}: {error}") from error


def rule_of(test: Test | Nothing) -> str:
    """The name of a test's rule."""
    return next(name for name, cls in FORMS.items() if cls is type(test))


def sides(test: Test | Nothing) -> list[Levels]:
    """The levels of the arms that a contrast compares, those of `where` among them."""
    if isinstance(test, Ordered):
        found: list[Levels] = [{test.along: level} for level in test.levels]
    else:
        found = [getattr(test, name, None) for name in ("a", "b", "a1", "a0", "b1", "b0")]
        found = [levels for levels in found if levels is not None]
    where = getattr(test, "where", {})
    return [{**where, **levels} for levels in found] or [dict(where)]


def reachable(test: Test | Nothing, n: int) -> float | None:
    """The smallest two-sided p that so many pairs (points, runs) can reach; 0 for a test by a formula."""
    if isinstance(test, Exact | Nothing | Recorded):
        return None
    if isinstance(test, Within | Correlation):
        return 0.0
    if isinstance(test, Finite) or not n:
        return 1.0
    return min(1.0, 2 / comb(n, n // 2) if isinstance(test, TimeToTarget) else 2 * 0.5**n)
