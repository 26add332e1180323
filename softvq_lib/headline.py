"""Reported and reproduced, at a glance: what became of the paper's numbers and of its claims, in a few counts."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from softvq_lib.claims import Verdict
from softvq_lib.reproduced import Line


def _card(number: str, of: str, words: str, page: str) -> str:
    """One card of MyST, which leads to a page."""
    return f":::{{grid-item-card}} {number}{f' of {of}' * bool(of)}\n:link: {page}\n:link-type: doc\n{words}\n:::"


def cards(lines: Sequence[Line], verdicts: Sequence[Verdict], pages: Mapping[str, str]) -> str:
    """Four cards in MyST: numbers derived here, numbers out of reach, exact claims, and the primary claims.

    Args:
        lines: Of `softvq_lib.reproduced.trace`.
        verdicts: On the registered claims.
        pages: Where "numbers" and "claims" are told in full.
    """
    counts = Counter(line.status for line in lines)
    derived = counts["equal"] + counts["differs"]
    exact = [one for one in verdicts if one.claim.kind == "exact"]
    holding = sum(bool(one.found.holds) for one in exact)
    primary = [one for one in verdicts if one.claim.kind == "primary"]
    decided = sum(not one.verdict.startswith("undecided") for one in primary)
    done, planned = sum(one.found.n for one in primary), sum(one.found.planned for one in primary)
    found = [
        _card(
            str(counts["equal"]),
            str(derived),
            f"numbers that can be derived (sizes, operations, ratios) come out as printed; {counts['differs']} differ.",
            pages["numbers"],
        ),
        _card(
            str(holding),
            str(len(exact)),
            "claims that are mathematics or counting hold when computed again.",
            pages["claims"],
        ),
        _card(
            str(decided),
            str(len(primary)),
            f"primary claims decided on small images so far: {done} of {planned} pairs of runs are done.",
            pages["claims"],
        ),
        _card(
            str(counts["not here"] + counts["mini"]),
            "",
            "numbers need ImageNet training and are not reproduced here; "
            f"what {counts['mini']} of them compare is asked of small images.",
            pages["numbers"],
        ),
    ]
    return "\n".join(["::::{grid} 2 2 4 4", ":gutter: 2", ":class-container: headline", "", *found, "::::"])


def primary_claims(verdicts: Iterable[Verdict]) -> str:
    """A list in Markdown of the primary claims, each with its verdict and how many of its pairs are done."""
    lines = []
    for one in (one for one in verdicts if one.claim.kind == "primary"):
        pairs = f"{one.found.n} of {one.found.planned} pairs"
        lines.append(f"- {one.claim.claim} ({one.claim.place}) → **{one.verdict}**, {pairs}.")
    return "\n".join(lines)


def speed_ups(lines: Iterable[Line]) -> str:
    """A sentence: the paper's speed-ups, and what its own tables give."""
    found = [line for line in lines if line.number["metric"] == "speed-up"]
    said = [f"{line.number['value']:g} times with {line.number['what']} (by its tables {line.here})" for line in found]
    return f"The paper's speed-ups of SiT-XL: {'; '.join(said)}."
