"""Figure of verdicts: contrasts with their intervals, in units of the least that matters."""

from collections.abc import Sequence

from softvq_lib.claim_forms import Exact, Finite, Nothing, Recorded, TimeToTarget, Within
from softvq_lib.claims import AGAINST, FAILS, FOR, HOLDS, Verdict, null_of
from softvq_lib.style import OKABE_ITO, WIDTH, new_figure

_COLOURS = {HOLDS: "blue", FOR: "blue", FAILS: "vermilion", AGAINST: "vermilion"}
_NO_CONTRAST = (Exact, Finite, Nothing, Recorded, TimeToTarget)


def forest(verdicts: Sequence[Verdict], limit: float = 6.0, width: float = WIDTH):
    """One row a verdict that has a number: to the right is what the claim says, 1 is the least that matters.

    An equivalence is drawn with its own sign, beside the margins -1 and 1. Open marks are single pairs.

    Args:
        verdicts: Drawn in their order; those without a number are left out.
        limit: Where intervals are cut, with an arrow.
        width: Inches.
    """
    shown = [v for v in verdicts if not isinstance(v.claim.test, _NO_CONTRAST) and v.found.value is not None]
    figure, axes = new_figure(1, 1, 1.0 + 0.24 * max(len(shown), 1), width)
    for row, verdict in enumerate(shown):
        claim, scale = verdict.claim, (-1 if verdict.claim.direction == "less" else 1) / verdict.claim.effect
        ends = [verdict.found.value] * 3 if verdict.estimate is None else verdict.estimate.triple
        value, low, high = ((end - null_of(claim)) * scale for end in ends)
        low, high = sorted((low, high))
        colour = OKABE_ITO[_COLOURS.get(verdict.verdict, "grey")]
        if isinstance(claim.test, Within):
            axes.plot([-1, 1], [row, row], "|", color=OKABE_ITO["black"], markersize=8)
        axes.plot([max(low, -limit), min(high, limit)], [row, row], color=colour)
        for end, mark in ((low, "<"), (high, ">")):
            if abs(end) > limit:
                axes.plot(limit if end > 0 else -limit, row, mark, color=colour)
        filled = colour if verdict.estimate is not None else "white"
        if abs(value) <= limit:
            axes.plot(value, row, "o" if claim.kind != "primary" else "D", color=colour, markerfacecolor=filled)
    axes.axvline(0, color=OKABE_ITO["black"], linewidth=1)
    axes.axvline(1, color=OKABE_ITO["black"], linewidth=1, linestyle=":")
    axes.set_xlim(-1.05 * limit, 1.05 * limit)
    axes.set_ylim(max(len(shown), 1) - 0.4, -0.6)
    axes.set_yticks(range(len(shown)), [v.claim.id for v in shown], fontsize=9)
    axes.set_xlabel("against the claim   ←   least that matters = 1   →   for the claim")
    axes.grid(visible=False, axis="y")
    if not shown:
        axes.text(0, 0, "no pairs yet", ha="center", va="center", backgroundcolor="white")
    return figure
