"""What a check of the paper against itself is, and the paper's numbers by name, which checks compute with.

A check takes the paper's numbers and returns what the paper says, what follows from its numbers, what that means for
a reader, and whether the finding still stands. No number is written here: each comes from the paper's entries.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from softvq_lib.config import nearest
from softvq_lib.paper_tables import TABLES, paper_rows

# Verdicts, and what each says.
VERDICTS = {
    "does not follow": "the paper's own numbers or formulas give something else",
    "two values": "one quantity is printed with two values",
    "not counted alike": "numbers that are compared were counted in different ways",
    "another formula": "the released code computes something else than the paper prints",
    "undetermined": "the printed numbers do not decide it",
    "follows": "computed again, and found as printed",
}


class Finding(NamedTuple):
    """What a check found.

    Attributes:
        says: What the paper says, with its numbers.
        follows: What was computed from them.
        means: What that means for a reader, in a sentence.
        stands: Whether the verdict of the check holds for these numbers.
    """

    says: str
    follows: str
    means: str
    stands: bool


class Numbers:
    """The paper's numbers by place, name and metric; a number that is printed once for several rows is in each.

    Args:
        paper: As `results.read_paper` returns it.
    """

    def __init__(self, paper: Iterable[dict]):
        self.paper = list(paper)
        self._text = {(n["place"], n["what"], n["metric"]): n["value"] for n in self.paper if n["place"] not in TABLES}
        self._rows = {
            place: {
                row.what: {metric: number["value"] for metric, number in row.numbers.items()}
                for row in paper_rows(self.paper, place)
            }
            for place in TABLES
        }

    def rows(self, place: str) -> dict[str, dict[str, float]]:
        """Name of each printed row of a table -> its numbers by metric."""
        return self._rows[place]

    def __call__(self, place: str, what: str, metric: str) -> float:
        """Return a number.

        Raises:
            ValueError: there is none of that name; says which comes nearest.
        """
        known = self._text | {
            (place, name, metric): value
            for place, rows in self._rows.items()
            for name, row in rows.items()
            for metric, value in row.items()
        }
        if (place, what, metric) not in known:
            names = [name for where, name, of in known if where == place and of == metric]
            raise ValueError(f"the paper's numbers have no {metric} of {what!r} in {place}{nearest(what, names)}")
        return known[place, what, metric]


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: Short and unique.
        places: Where in the paper.
        verdict: One of `VERDICTS`.
        compute: From the paper's numbers to what was found.
    """

    name: str
    places: str
    verdict: str
    compute: Callable[[Numbers], Finding]


def register(checks: list[Check], name: str, places: str, verdict: str) -> Callable:
    """Decorate a function of `Numbers` so that it becomes a check at the end of the list."""

    def add(compute: Callable[[Numbers], Finding]) -> Callable[[Numbers], Finding]:
        checks.append(Check(name, places, verdict, compute))
        return compute

    return add


def listed(values: Iterable[float], digits: int) -> str:
    """Join numbers by commas."""
    return ", ".join(f"{value:.{digits}f}" for value in values)


def signed(value: float, digits: int = 2) -> str:
    """Write a number with its sign."""
    return f"{value:+.{digits}f}".replace("-", "−")


def range_of_ratio(above: float, below: float, digits: int = 2) -> tuple[float, float]:
    """Return the least and largest ratio of two numbers that were rounded to so many decimals."""
    half = 0.5 * 10**-digits
    return (above - half) / (below + half), (above + half) / (below - half)
