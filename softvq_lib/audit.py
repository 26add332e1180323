"""The paper held against itself: checks that run on its own numbers, and the tables that show them."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from softvq_lib import audit_formulas, audit_tables
from softvq_lib.audit_numbers import VERDICTS, Check, Finding, Numbers, range_of_ratio, signed
from softvq_lib.audit_tables import ALIGNED, throughputs

CHECKS: tuple[Check, ...] = (*audit_tables.CHECKS, *audit_formulas.CHECKS)


class Audited(NamedTuple):
    """A check and what it found."""

    check: Check
    finding: Finding


def audit(paper: Iterable[dict], checks: Sequence[Check] = CHECKS) -> list[Audited]:
    """Run checks, sorted by verdict in the order of `VERDICTS`.

    Args:
        paper: As `results.read_paper` returns it.
        checks: What is checked; by default all checks.

    Raises:
        ValueError: a number that a check needs is missing, or what it counts cannot be built.
    """
    numbers = Numbers(paper)
    ordered = sorted(checks, key=lambda check: list(VERDICTS).index(check.verdict))
    return [Audited(check, check.compute(numbers)) for check in ordered]


def fallen(audited: Iterable[Audited]) -> list[str]:
    """Names of checks whose verdict no longer holds."""
    return [check.name for check, finding in audited if not finding.stands]


def summary(audited: Sequence[Audited]) -> str:
    """Plain text: how many checks have each verdict, and whether all of them still hold."""
    counts = Counter(check.verdict for check, _ in audited)
    lines = [f"{verdict:18s}{counts[verdict]:4d}   {meaning}" for verdict, meaning in VERDICTS.items()]
    names = fallen(audited)
    last = "all hold" if not names else "no longer hold: " + ", ".join(names)
    return "\n".join([*lines, f"{'checks':18s}{len(audited):4d}   {last}"])


def _table(heads: str, lines: Iterable[Sequence[object]], right: int = 0) -> str:
    """Write Markdown; so many of the last columns hold numbers."""
    columns = heads.count("|") + 1
    rule = "|" + "---|" * (columns - right) + "--:|" * right
    return "\n".join([f"| {heads} |", rule, *("| " + " | ".join(map(str, line)) + " |" for line in lines)])


def table(audited: Sequence[Audited]) -> str:
    """One line a check, under its verdict."""
    lines, verdict = [], None
    for check, finding in audited:
        if check.verdict != verdict:
            verdict = check.verdict
            lines.append([f"***{verdict}***", "", "", ""])
        means = finding.means if finding.stands else f"**No longer so.** {finding.means}"
        lines.append([f"**{check.name}**<br>{check.places}", finding.says, finding.follows, means])
    return _table("what, where | the paper says | what follows | for a reader", lines)


# -- computations that are shown at length ---------------------------------------------------------------------------


def operations(paper: Iterable[dict]) -> str:
    """One line a row of Tab. 1 and 2 whose generator is built here: what was counted, and all of it."""
    lines = [
        [cost.what, cost.note, f"{cost.paper:.2f}", f"{cost.as_printed / 1e9:.2f}", f"{cost.macs / 1e9:.2f}"]
        for cost in audit_formulas.costs(Numbers(paper)).values()
        if cost.macs is not None
    ]
    return _table("generator, latents | what the paper counts | printed | counted so | all products", lines, 3)


def speeds(paper: Iterable[dict]) -> str:
    """One line a speed-up of Sec. 1: as said, by the tables, and in what range rounding leaves it."""
    lines = []
    for name, (said, ours, base) in throughputs(Numbers(paper)).items():
        low, high = range_of_ratio(ours, base)
        by_table = f"{ours:.2f} / {base:.2f} = {ours / base:.1f}"
        lines.append([name, f"{said:g}", by_table, f"{low:.1f} to {high:.1f}"])
    return _table("SiT-XL, SoftVQ to KL | said | by the tables | with what rounding hides", lines, 3)


def confound(paper: Iterable[dict]) -> str:
    """Rows of Tab. 3 and 4 with 64 tokens: whether they are aligned, and what SiT-L makes of them."""
    numbers = Numbers(paper)
    lines = [
        [what, place, said, *(f"{numbers(place, what, metric):g}" for metric in ("rfid", "gfid", "is"))]
        for place, what, said in ALIGNED
    ]
    return _table("tokenizer | place | aligned? | rFID | gFID | IS", lines, 3)


def kl_signs() -> str:
    """Eq. 4's term and the divergence that it is called, on random posteriors and on sharper ones."""
    found = [audit_formulas.kl_terms(q) for q in audit_formulas._posteriors()]
    lines = [[name, *(signed(terms[name], 4) for terms in found)] for name in found[0]]
    return _table("nats | random posteriors | the same, sharpened", lines, 2)


def strips(paper: Iterable[dict]) -> str:
    """What Eq. 5 ties to each token at 256 px."""
    rows = audit_formulas.strips(Numbers(paper))
    lines = [[row["tokens"], f"{row['each']} of {row['across']} in a row", row["rows"], row["printed"]] for row in rows]
    return _table("tokens L | patches of a token | rows it touches | entries of Eq. 5 as printed", lines, 3)


def posterior_forms(paper: Iterable[dict]) -> str:
    """Distances between the forms of the posterior, on random tokens."""
    tau, entropy_temperature, found = audit_formulas._released(Numbers(paper))
    share = "codewords that share a token, released form"
    names = {
        "released, squared": "total variation, released and squared form, on the sphere",
        "released, paper": "total variation, released form and Eq. 4, both on the sphere",
        "released, paper off the sphere": "total variation, released form and Eq. 4 without normalisation",
        "perplexity at τ": f"{share}, τ = {tau:g}: the latent",
        "perplexity at T": f"{share}, T = {entropy_temperature:g}: the KL term",
    }
    values = {name: "0, but for rounding" if value < 1e-9 else f"{value:.3g}" for name, value in found.items()}
    return _table("what | value", [[text, values[name]] for name, text in names.items()], 1)
