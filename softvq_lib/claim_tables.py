"""Tables of registered claims and of the verdicts on them, in Markdown."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from softvq_lib.claim_forms import (
    Correlation,
    Exact,
    Finite,
    Interaction,
    Nothing,
    Ordered,
    Recorded,
    SlopeDifference,
    TimeToTarget,
    Within,
)
from softvq_lib.claims import Claim, Registry, Verdict

TITLES = {
    "C1": "Reconstruction at high compression",
    "C2": "Latents to generate from",
    "C3": "Alignment, its start and its teachers",
    "C4": "What predicts generation",
    "C5": "The main results",
    "C6": "Operations",
    "C7": "Parameters",
    "C8": "Throughput",
    "C9": "Training steps of a generator",
    "C10": "Training time of a generator",
    "C11": "Differentiability",
    "C12": "Limits and K-means",
    "C13": "The KL term",
    "C14": "Temperature, posterior, codes, channels",
    "C15": "Product, residual and GMMVQ",
    "C16": "The latent space",
    "C17": "Linear probing",
    "C18": "MAR beside SiT and DiT",
    "T1": "Sizes",
    "T2": "Resolution",
}
METRICS = {
    "reconstruction.rFD-EffLite0-proj64-v1": "rFD",
    "reconstruction.psnr": "PSNR",
    "reconstruction.KID-EffLite0": "KID of reconstructions",
    "samples.KID-EffLite0": "KID of samples",
    "samples.gFD-EffLite0-proj64-v1": "gFD",
    "samples.class_agreement": "class agreement",
    "guided.KID-EffLite0": "KID with guidance",
    "probe.z.flatten": "probe accuracy",
    "probe.block4.noise0.1": "probe accuracy in block 4 at noise 0.1",
    "latents.cosine": "cosine of ẑ and z",
    "latents.purity_z_flat": "purity of z",
    "latents.purity_change_flat": "purity of z less that of ẑ",
    "generator.val_loss": "held-out loss",
    "linear_probe": "L.P.",
    "rfid": "rFID",
    "gfid": "gFID",
    "time_ratio": "ratio of times",
}


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]], right: int = 0) -> str:
    rule = "|" + "---|" * (len(heads) - right) + "--:|" * right
    return "\n".join(["| " + " | ".join(heads) + " |", rule, *("| " + " | ".join(line) + " |" for line in lines)])


def metric_name(metric: str) -> str:
    """A metric in words; its own name where it has none."""
    return METRICS.get(metric, metric)


def _levels(levels: Mapping[str, object], besides: Mapping[str, object] | None = None) -> str:
    """Levels in words, but those that `besides` has too."""
    shown = {factor: level for factor, level in levels.items() if (besides or {}).get(factor) != level}
    words = [f"{f} {' or '.join(level) if isinstance(level, list) else level}" for f, level in shown.items()]
    return ", ".join(words) or "all"


def compared(claim: Claim) -> str:
    """What is compared, over which pairs."""
    test, metric = claim.test, metric_name(claim.metric)
    over = f"; pairs: {' × '.join(test.over)}" if getattr(test, "over", ()) else ""
    where = f"; {_levels(test.where)}" if getattr(test, "where", {}) else ""
    sweep = f"; sweep {claim.sweep}" if claim.sweep else ""
    end = where + over + sweep
    if isinstance(test, Nothing):
        return "none"
    if isinstance(test, Exact):
        return "computed anew; also in " + ", ".join(f"`{name.partition('::')[2]}`" for name in test.tests)
    if isinstance(test, Recorded):
        return f"{metric} of the recorded `{test.run}`"
    if isinstance(test, Finite):
        return f"every run has its {metric}{end}"
    if isinstance(test, Correlation):
        x1, x2, y = map(metric_name, (test.x1, test.x2, test.y))
        points = f"; points: {' × '.join(test.group)}" if test.group else f"; rows of {test.place}"
        return f"rank correlation of {x1} (turned) with {y} less that of {x2}{points}{end}"
    if isinstance(test, Ordered):
        return f"change of {metric} a step of {', '.join(test.levels)}{end}"
    if isinstance(test, TimeToTarget):
        return f"ratio of {test.along} to a target {metric}, {_levels(test.a)} to {_levels(test.b)}{end}"
    if isinstance(test, Interaction):
        effects = [f"({_levels(one)} less {_levels(none, one)})" for one, none in _interaction(test)]
        return f"{metric}: {' less '.join(effects)}{end}"
    same = {factor: level for factor, level in test.a.items() if (test.b or {}).get(factor) == level}
    both = _levels(test.a, same) + (f" less {_levels(test.b, same)}" if test.b is not None else "")
    slope = f"slope per doubling of {test.along}, " if isinstance(test, SlopeDifference) else ""
    return f"{metric}, {slope}{both}{f'; {_levels(same)}' if same else ''}{end}"


def _interaction(test: Interaction) -> list[tuple[Mapping, Mapping]]:
    return [(test.a1, test.a0), (test.b1, test.b0)]


def effect_in_words(claim: Claim) -> str:
    """The least that matters, with its direction."""
    if claim.effect is None:
        return "–"
    if isinstance(claim.test, Within):
        return f"within ±{claim.effect:g}"
    if isinstance(claim.test, TimeToTarget | Recorded):
        return f"{1 - claim.effect:g} or less"
    return f"{'lower' if claim.direction == 'less' else 'higher'} by {claim.effect:g}"


def _who(claim: Claim) -> str:
    return f"**{claim.id}** {claim.claim} *{claim.place}.*"


def registered(claims: Iterable[Claim]) -> str:
    """One line a claim: what and where, its test, the least that matters, and pairs (of the first pass)."""
    lines = []
    for claim in claims:
        pairs = "–" if claim.pairs is None else f"{claim.pairs} ({claim.first_pairs})"
        lines.append([_who(claim), compared(claim), effect_in_words(claim), pairs])
    return _table(("claim", "test", "least that matters", "pairs"), lines, 1)


def rules_of(claims: Iterable[Claim]) -> str:
    """One line a claim with a deciding p: what it can reach, what matters and why, what else must be known."""
    lines = []
    for claim in claims:
        least = f"{claim.smallest_p:.2g} ({claim.first_smallest_p:.2g})"
        matters = f"{effect_in_words(claim)}: {claim.effect_reason.partition(': ')[2] or claim.effect_reason}"
        lines.append([_who(claim), f"{compared(claim)}. {claim.note}", matters, least])
    return _table(("claim", "test", "least that matters", "smallest p (first pass)"), lines, 1)


def notes(claims: Iterable[Claim]) -> str:
    """A list of what else must be known of claims, those with one note together."""
    by_note: dict[str, list[str]] = {}
    for claim in claims:
        if claim.note:
            by_note.setdefault(claim.note, []).append(claim.id)
    return "\n".join(f"- {', '.join(ids)}: {note}" for note, ids in by_note.items())


def effects(claims: Iterable[Claim]) -> str:
    """A list of the effects that matter and why, by metric."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for claim in claims:
        if claim.effect is not None and not isinstance(claim.test, Nothing):
            reasons.setdefault((metric_name(claim.metric), claim.effect_reason), []).append(claim.id)
    return "\n".join(f"- {metric} ({_few(ids)}): {reason}" for (metric, reason), ids in reasons.items())


def _few(ids: Sequence[str]) -> str:
    return ", ".join(ids[:6]) + (f" and {len(ids) - 6} more" if len(ids) > 6 else "")


# -- verdicts ----------------------------------------------------------------------------------------------------------


def number(value: float | None) -> str:
    """A number with three digits that count, "–" for none."""
    return "–" if value is None else f"{value:.3g}".replace("inf", "∞")


def estimate_in_words(verdict: Verdict) -> str:
    """The contrast with its interval, or bare where there is none."""
    if isinstance(verdict.claim.test, Finite | Exact | Nothing):
        return "–"
    found = verdict.estimate
    if found is None:
        return number(verdict.found.value)
    return f"{number(found.value)} [{number(found.low)}, {number(found.high)}]"


def pairs_in_words(verdict: Verdict) -> str:
    """Pairs that there are, of those planned."""
    planned = verdict.found.planned
    if not planned or isinstance(verdict.claim.test, Recorded):
        return "–"
    return f"{verdict.found.n} of {planned}"


def primary(verdicts: Iterable[Verdict]) -> str:
    """One line a primary claim: verdict, contrast, pairs, p, p by Holm, power and the pairs that 0.8 needs."""
    heads = ("claim", "verdict", "difference [95 %]", "pairs", "p (least)", "p, Holm", "power; pairs for 0.8")
    lines = []
    for verdict in (one for one in verdicts if one.claim.kind == "primary"):
        found = verdict.found
        p = "–" if found.p is None else f"{number(found.p)} ({number(found.smallest_p)})"
        power = "–" if verdict.power is None else f"{verdict.power:.2f}; {verdict.needed or 'over 10,000'}"
        who = f"**{verdict.claim.id}** {verdict.claim.claim}"
        said = f"**{verdict.verdict}**" + (f" ({verdict.words})" if verdict.words else "")
        lines.append([who, said, estimate_in_words(verdict), pairs_in_words(verdict), p, number(verdict.holm), power])
    return _table(heads, lines, 5)


def verdicts_of(verdicts: Iterable[Verdict]) -> str:
    """One line a claim: verdict, contrast with interval, pairs, power and remarks; no p."""
    lines = []
    for verdict in verdicts:
        power = "" if verdict.power is None else f"power {verdict.power:.2f}"
        remarks = "; ".join(filter(None, [power, verdict.words]))
        who = f"**{verdict.claim.id}** {verdict.claim.claim}"
        kind = "primary: " if verdict.claim.kind == "primary" else ""
        lines.append([who, kind + verdict.verdict, estimate_in_words(verdict), pairs_in_words(verdict), remarks or "–"])
    return _table(("claim", "verdict", "difference [interval]", "pairs", "remarks"), lines)


def summary(verdicts: Iterable[Verdict]) -> str:
    """One line a claim of the paper: what its first test says, and how many of its other tests say what."""
    lines = []
    for name, (first, *others) in by_number(verdicts).items():
        counts = Counter(verdict.verdict.partition(" (")[0] for verdict in others)
        rest = ", ".join(f"{count} {word}" for word, count in counts.items()) or "–"
        kind = "**primary**" if first.claim.kind == "primary" else first.claim.kind
        lines.append([name, TITLES.get(name, first.claim.place), kind, first.verdict, estimate_in_words(first), rest])
    return _table(("", "claim", "kind", "first test", "difference [interval]", "other tests"), lines)


def undecidable(registry: Registry) -> str:
    """A list of what no number of these runs can decide, and why."""
    lines = [f"- **{claim.id}** {claim.claim} {claim.note}" for claim in registry.of_kind("not testable here")]
    few = [claim for claim in registry.claims if (claim.smallest_p or 0) > registry.alpha]
    few = [claim for claim in few if not isinstance(claim.test, Finite)]
    if few:
        least = ", ".join(f"{p:g} with {n}" for n, p in sorted({(claim.pairs, claim.smallest_p) for claim in few}))
        lines.append(
            f"- {len(few)} exploratory tests have so few pairs that no test by signs reaches {registry.alpha:g} "
            f"whatever is measured (smallest p: {least} pairs). Their intervals take differences to be normally "
            f"distributed. They are: {', '.join(claim.id for claim in few)}."
        )
    return "\n".join(lines)


def by_number(items: Iterable[Claim | Verdict]) -> dict[str, list]:
    """Claims or verdicts by the claim that they test, in the order of `TITLES`; what bears its bare number is first."""
    found: dict[str, list] = {name: [] for name in TITLES}
    for item in items:
        found.setdefault(_claim(item).number, []).append(item)
    return {name: sorted(some, key=lambda item: _claim(item).id != name) for name, some in found.items() if some}


def main_ones(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """The primary claims, and the first test of every other."""
    verdicts = list(verdicts)
    primary = [verdict for verdict in verdicts if verdict.claim.kind == "primary"]
    return primary + [some[0] for some in by_number(verdicts).values() if some[0] not in primary]


def _claim(item: Claim | Verdict) -> Claim:
    return item if isinstance(item, Claim) else item.claim
