"""What a study shows, in sentences that are made of its rows: no measured number is typed by hand.

They describe, and decide nothing: intervals are of single comparisons, and no p is given. Which claims hold is decided
by tests that were fixed before the runs.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from softvq_lib.arms import Measured, pairs, select
from softvq_lib.evaluation.statistics import t_interval
from softvq_lib.study_cells import METRICS, SAMPLES, Drawn, number, rows_shown, span
from softvq_lib.study_tables import CHANGES, FD, KID, PROBE, PSNR, RECALL, RFD, RKID, TOPICS, of_topic


@dataclass(frozen=True)
class Versus:
    """A comparison of arms with the levels `a` to those with `b`, in pairs that share the levels of `over`.

    Attributes:
        metric: A name in `METRICS`.
        names: Of a and of b, for people.
        a: Levels of the arms on one side.
        b: Levels of those on the other.
        over: Factors whose levels a pair shares.
        note: Words behind the names, such as the condition under which they are compared.
        where: Levels of all arms that count.
    """

    metric: str
    names: tuple[str, str]
    a: Mapping[str, str]
    b: Mapping[str, str]
    over: tuple[str, ...] = ("seed",)
    note: str = ""
    where: Mapping[str, object] = field(default_factory=dict)


def sentence(arms: Sequence[Measured], versus: Versus) -> str:
    """In how many pairs a has the better value, the mean difference with its interval, and whether it is decided."""
    arms = [arm for arm in arms if arm.has(versus.where)]
    a, b, _, planned = pairs(arms, versus.metric, versus.a, versus.b, versus.over)
    metric, (ours, theirs) = METRICS[versus.metric], versus.names
    name = metric.head.strip(" ↓↑")
    note = f" ({versus.note})" if versus.note else ""
    if not len(a):
        return f"{ours} against {theirs}{note}, {name}: not run yet, {planned} {_pairs(planned)} planned."
    better = int(((a < b) if metric.better == "less" else (a > b)).sum())
    word = {"less": "a lower", "greater": "a higher", "": "a higher"}[metric.better]
    of = f"{better} of {len(a)} {_pairs(len(a))}"
    so_far = f" ({planned} planned)" if planned > len(a) else ""
    begin = f"{ours} has {word} {name} than {theirs}{note} in {of}{so_far}"
    if (a == b).all():
        return f"{begin}: there is no difference."
    if len(a) == 1:
        return f"{begin}; difference {number(a[0] - b[0], versus.metric)}. Undecided: one pair has no spread."
    found = t_interval(a - b, over="pairs")
    begin += "; mean difference {} [{}, {}], t over pairs".format(*(number(end, versus.metric) for end in found.triple))
    if found.low <= 0 <= found.high:
        return f"{begin}: undecided at this power, the interval includes 0."
    if not metric.better:
        return f"{begin}: the interval leaves out 0."
    return f"{begin}: points for {ours if (found.value < 0) == (metric.better == 'less') else theirs}."


def _pairs(number: int) -> str:
    return "pair" if number == 1 else "pairs"


def shown(arms: Sequence[Measured], sweep: str, comparisons: Iterable[Versus]) -> Drawn:
    """A list of sentences on one sweep."""
    mine, comparisons = select(arms, sweep), list(comparisons)
    used, sampled = [], []
    for versus in comparisons:
        sides = [arm for arm in mine if arm.has(versus.where) and (arm.has(versus.a) or arm.has(versus.b))]
        used += rows_shown(sides, [versus.metric])
        if versus.metric in SAMPLES:
            sampled += [arm for arm in sides if KID in arm.rows]
    bound, bounding = _within_reach(sampled)
    lines = [*bound, *(sentence(mine, versus) for versus in comparisons)]
    used += bounding
    rows = {(row["experiment"], row["run"], row["metric"]): row for row in used}
    return Drawn("\n".join(f"- {line}" for line in lines), list(rows.values()))


_BOUND = {KID: "reconstruction.KID-EffLite0", RECALL: "reconstruction.recall-EffLite0"}


def _within_reach(sampled: Sequence[Measured]) -> tuple[list[str], list[dict]]:
    """What the reconstructions of tokenizers have whose latents were sampled, in a sentence or none, with the rows."""
    rows = {of_samples: rows_shown(sampled, [metric]) for of_samples, metric in _BOUND.items()}
    if not all(rows.values()):
        return [], []
    kid, recall = (span([row["value"] for row in found], metric) for metric, found in rows.items())
    text = "Reconstructions of held-out images by these tokenizers, which samples of their latents can hardly surpass, "
    return [f"{text}have a KID of {kid} and a recall of {recall}."], [row for found in rows.values() for row in found]


def _quantizers(metric: str, a: str, b: str, alignment: str) -> Versus:
    names = {"softvq": "SoftVQ", "vq": "VQ", "ae": "AE", "kl": "KL"}
    note = "both aligned" if alignment == "on" else "neither aligned"
    levels = ({"quantizer": one, "alignment": alignment} for one in (a, b))
    return Versus(metric, (names[a], names[b]), *levels, ("seed", "tokens"), note)


def _aligned(metric: str, quantizer: str, name: str) -> Versus:
    levels = ({"quantizer": quantizer, "alignment": one} for one in ("on", "off"))
    return Versus(metric, (f"Aligned {name}", f"{name} without alignment"), *levels, ("seed", "tokens"))


def factorial(arms: Sequence[Measured]) -> Drawn:
    """Sweep tokenizers: quantizers among themselves, and what alignment does to each."""
    comparisons = [
        *(_quantizers(RFD, "softvq", b, how) for how in ("off", "on") for b in ("vq", "ae", "kl")),
        *(_quantizers(KID, "softvq", b, how) for how in ("off", "on") for b in ("vq", "ae", "kl")),
        *(
            _aligned(KID, quantizer, name)
            for quantizer, name in (("softvq", "SoftVQ"), ("vq", "VQ"), ("ae", "AE"), ("kl", "KL"))
        ),
        _aligned(PROBE, "softvq", "SoftVQ"),
    ]
    return shown(arms, "tokenizers", comparisons)


def fixed_dim(arms: Sequence[Measured]) -> Drawn:
    """Sweep fixed_dim: SoftVQ beside VQ where fewer tokens have no more channels."""
    levels = {"quantizer": "softvq"}, {"quantizer": "vq"}
    few = [Versus(m, ("SoftVQ", "VQ"), *levels, ("seed", "tokens"), "16 channels a token") for m in (PSNR, RFD)]
    return shown(arms, "fixed_dim", few)


def rate(arms: Sequence[Measured]) -> Drawn:
    """Sweep rate: SoftVQ beside VQ at the study's learning rate and at twice that, and each beside itself."""
    return _confound(arms, "rate", "lr", {"2e-3": "rate 2e-3", "4e-3": "rate 4e-3"}, ("at 4e-3", "at 2e-3"))


def trunk(arms: Sequence[Measured]) -> Drawn:
    """Sweep trunk: SoftVQ beside VQ with LayerScale and without, and each beside itself."""
    names = {"layerscale": "with LayerScale", "plain": "without LayerScale"}
    return _confound(arms, "trunk", "trunk", names, ("without LayerScale", "with it"))


def _confound(
    arms: Sequence[Measured], sweep: str, factor: str, notes: dict[str, str], sides: tuple[str, str]
) -> Drawn:
    """SoftVQ beside VQ at either level of a factor that is no part of the claim, and each beside itself.

    `notes` has words for the study's own level, then for the other; `sides` for the other beside the study's.
    """
    own, other = notes
    few = []
    for level, note in notes.items():
        levels = {"quantizer": "softvq", factor: level}, {"quantizer": "vq", factor: level}
        few += [Versus(m, ("SoftVQ", "VQ"), *levels, ("seed", "tokens"), note) for m in (PSNR, RFD)]
    for name, quantizer in (("SoftVQ", "softvq"), ("VQ", "vq")):
        levels = {"quantizer": quantizer, factor: other}, {"quantizer": quantizer, factor: own}
        few.append(Versus(PSNR, (f"{name} {sides[0]}", sides[1]), *levels, ("seed", "tokens")))
    return shown(arms, sweep, few)


def alignment(arms: Sequence[Measured]) -> Drawn:
    """Sweep alignment: the 2 x 2 of initial weights and target, and the controls of the target."""

    def at(init: str, target: str) -> dict[str, str]:
        return {"init": init, "target": target}

    none, taught = at("random", "none"), at("random", "efflite2")
    comparisons = [
        Versus(KID, ("The target EffLite2", "no target"), taught, none, note="random initial weights"),
        Versus(PROBE, ("The target EffLite2", "no target"), taught, none, note="random initial weights"),
        Versus(KID, ("A distilled start", "a random one"), at("distilled", "none"), none, note="no target"),
        Versus(RFD, ("A distilled start", "a random one"), at("distilled", "none"), none, note="no target"),
        Versus(KID, ("A distilled start with the target", "the target alone"), at("distilled", "efflite2"), taught),
        Versus(KID, ("The target in order", "permuted patches"), taught, at("random", "permuted")),
        Versus(KID, ("The trained teacher", "a teacher with random weights"), taught, at("random", "random")),
        Versus(KID, ("The teacher EffLite2", "the teacher EffLite1"), taught, at("random", "efflite1")),
    ]
    return shown(arms, "alignment", comparisons)


def repa(arms: Sequence[Measured]) -> Drawn:
    """Sweep repa: alignment of the latents beside REPA in the generator."""

    def at(latents: str, repa: str) -> dict[str, str]:
        return {"latents": latents, "repa": repa}

    comparisons = [
        Versus(KID, ("REPA", "no REPA"), at("unaligned", "on"), at("unaligned", "off"), note="un-aligned latents"),
        Versus(KID, ("REPA", "no REPA"), at("aligned", "on"), at("aligned", "off"), note="aligned latents"),
        Versus(KID, ("Alignment alone", "REPA alone"), at("aligned", "off"), at("unaligned", "on")),
    ]
    return shown(arms, "repa", comparisons)


def generators(arms: Sequence[Measured]) -> Drawn:
    """Sweep generators: generators among themselves, SoftVQ beside VQ, and what guidance does."""
    over, tokenizers = ("seed", "quantizer"), ({"quantizer": "softvq"}, {"quantizer": "vq"})
    kinds = {"sit": "SiT", "dit": "DiT", "mar": "MAR"}
    comparisons = [
        *(
            Versus(metric, (kinds[a], kinds[b]), {"generator": a}, {"generator": b}, over)
            for metric in (KID, FD)
            for a, b in (("sit", "dit"), ("mar", "sit"))
        ),
        Versus(KID, ("SoftVQ", "VQ"), *tokenizers, ("seed", "generator")),
        Versus(KID.replace("samples", "guided"), ("SoftVQ", "VQ"), *tokenizers, ("seed", "generator"), "guided"),
    ]
    return shown(arms, "generators", comparisons)


def sizes(arms: Sequence[Measured]) -> Drawn:
    """Sweep size: neighbouring trunks."""
    comparisons = [
        Versus(metric, (f"The trunk mini-{a}", f"mini-{b}"), {"size": a}, {"size": b}, ("seed", "tokens"))
        for metric in (RFD, PROBE)
        for a, b in (("B", "S"), ("BL", "B"), ("L", "BL"))
    ]
    return shown(arms, "size", comparisons)


def resolution(arms: Sequence[Measured]) -> Drawn:
    """Sweep resolution: four times the pixels for the same tokens."""
    levels = {"pixels": "64"}, {"pixels": "32"}
    comparisons = [Versus(m, ("64 px", "32 px"), *levels, ("seed", "tokens")) for m in (PSNR, RFD)]
    return shown(arms, "resolution", comparisons)


def steps(arms: Sequence[Measured]) -> Drawn:
    """Sweep steps: SoftVQ latents beside KL latents at each budget, and over all of them."""
    levels = {"quantizer": "softvq"}, {"quantizer": "kl"}
    budgets = sorted({arm.factors["steps"] for arm in select(arms, "steps")}, key=int)
    names = ("SoftVQ", "KL")
    comparisons = [Versus(KID, names, *levels, ("seed", "steps"), "all budgets; those of a seed share both tokenizers")]
    comparisons += [Versus(KID, names, *levels, note=f"{budget} steps", where={"steps": budget}) for budget in budgets]
    return shown(arms, "steps", comparisons)


def representations(arms: Sequence[Measured]) -> Drawn:
    """Sweep representations: what SoftVQ's latents are beside VQ's."""
    levels, over = ({"quantizer": "softvq"}, {"quantizer": "vq"}), ("seed", "tokens", "alignment")
    wanted = (PROBE, "latents.cosine", "latents.purity_z_flat", "latents.silhouette_z_flat")
    return shown(arms, "representations", [Versus(m, ("SoftVQ", "VQ"), *levels, over) for m in wanted])


def ablations(arms: Sequence[Measured], topic: str | None = None) -> Drawn:
    """Sweep ablations: each change of a topic, or of all, beside the unchanged SoftVQ."""
    mine = select(arms, "ablations")
    comparisons = []
    for change in (change for name in ([topic] if topic else TOPICS) for change in of_topic(name)):
        sampled = any(arm.arm.cell("train_generator") for arm in mine if arm.factors["change"] == change)
        for metric in (PSNR, RKID, *([KID] if sampled else [])):
            levels = {"change": change}, {"change": "none"}
            comparisons.append(Versus(metric, (f"*{CHANGES[change]}*", "the unchanged SoftVQ"), *levels))
    return shown(arms, "ablations", comparisons)
