"""Statements of the paper held against its own tables (Sec. 1, 4.1-4.4, Tab. 1-4).

No number is written here: each comes from the paper's entries.
"""

from softvq_lib.audit_numbers import Check, Finding, Numbers, listed, range_of_ratio, register, signed

CHECKS: list[Check] = []
SIZES = ("B", "BL", "L")
DIT, SIT, REPA, MAR = "DiT-XL/2, KL", "SiT-XL/2, KL", "SiT-XL/2 + REPA, KL", "MAR-H, KL"


# -- Sec. 4.2: generation --------------------------------------------------------------------------------------------


@register(CHECKS, "DiT's improvement", "Sec. 4.2, Tab. 1", "does not follow")
def _dit_improvement(n: Numbers) -> Finding:
    said = n("Sec. 4.2", "DiT-XL, SoftVQ-L, 32 tokens, to DiT-XL/2, KL", "gfid_improvement")
    base, ours = n("Tab. 1", DIT, "gfid"), n("Tab. 1", "DiT-XL, SoftVQ-L, 32 tokens", "gfid")
    return Finding(
        f"with 32 tokens of SoftVQ-L, DiT-XL's gFID improves by {said:.2f}",
        f"{base:.2f} − {ours:.2f} = {base - ours:.2f}",
        "The gain is smaller than the text says; use the table.",
        round(base - ours, 2) != said,
    )


@register(CHECKS, "SiT's improvement", "Sec. 4.2, Tab. 1", "follows")
def _sit_improvement(n: Numbers) -> Finding:
    said = n("Sec. 4.2", "SiT-XL, SoftVQ-L, 32 tokens, to SiT-XL/2, KL", "gfid_improvement")
    base, ours = n("Tab. 1", SIT, "gfid"), n("Tab. 1", "SiT-XL, SoftVQ-L, 32 tokens", "gfid")
    return Finding(
        f"with 32 tokens of SoftVQ-L, SiT-XL's gFID improves by {said:.2f}",
        f"{base:.2f} − {ours:.2f} = {base - ours:.2f}",
        "The same sentence is right about SiT.",
        round(base - ours, 2) == said,
    )


@register(CHECKS, "all variants", "Sec. 4.2, Tab. 1", "does not follow")
def _all_variants(n: Numbers) -> Finding:
    dit, sit = ({m: [n("Tab. 1", f"{g}-XL, SoftVQ-{s}, 32 tokens", m) for s in SIZES] for m in ("gfid", "is")}
                for g in ("DiT", "SiT"))  # fmt: skip
    gfid, scores = n("Tab. 1", DIT, "gfid"), n("Tab. 1", DIT, "is")
    return Finding(
        "with 32 tokens, DiT-XL and SiT-XL trained on all variants of SoftVQ significantly outperform those on KL, "
        "without guidance",
        f"DiT on B: gFID {dit['gfid'][0]:.2f} against {gfid:.2f}; DiT's IS on B, BL, L: {listed(dit['is'], 1)} against "
        f"{scores:.1f}; SiT's IS on B: {sit['is'][0]:.1f} against {n('Tab. 1', SIT, 'is'):.1f}",
        "True of SiT by gFID. DiT on the smallest tokenizer is worse by gFID, and by IS every DiT on 32 tokens is.",
        dit["gfid"][0] > gfid
        and max(dit["is"]) < scores
        and max(sit["gfid"]) < n("Tab. 1", SIT, "gfid")
        and sit["is"][0] < n("Tab. 1", SIT, "is"),
    )


@register(CHECKS, "better than REPA", "Sec. 4.2, Tab. 1", "undetermined")
def _repa(n: Numbers) -> Finding:
    ours = {metric: n("Tab. 1", "SiT-XL, SoftVQ-L, 64 tokens", metric) for metric in ("gfid", "is")}
    theirs = {metric: n("Tab. 1", REPA, metric) for metric in ("gfid", "is")}
    return Finding(
        "SiT-XL on 64 tokens of SoftVQ-L outperforms SiT-XL/2 with REPA, without guidance",
        f"gFID {ours['gfid']:.2f} against {theirs['gfid']:.2f}, but IS {ours['is']:.1f} against {theirs['is']:.1f}",
        "Better by one of the two columns and worse by the other.",
        ours["gfid"] < theirs["gfid"] and ours["is"] < theirs["is"],
    )


@register(CHECKS, "state of the art", "Sec. 1, Tab. 1, 2", "does not follow")
def _state_of_the_art(n: Numbers) -> Finding:
    lower, best = {}, {}
    for place in ("Tab. 1", "Tab. 2"):
        guided = {what: row["gfid_guided"] for what, row in n.rows(place).items() if "gfid_guided" in row}
        best[place] = min(value for what, value in guided.items() if "SoftVQ" in what)
        lower[place] = {what: value for what, value in guided.items() if value < best[place]}
    names = {place: ", ".join(f"{what} {value:.2f}" for what, value in rows.items()) for place, rows in lower.items()}
    return Finding(
        f"state-of-the-art results with only 64 and 32 tokens, an FID of {best['Tab. 1']:.2f} at 256 px and "
        f"{best['Tab. 2']:.2f} at 512 px",
        f"lower in the same tables: {names['Tab. 1']}; at 512 px {names['Tab. 2']}",
        "Competitive, which the abstract says of the same two numbers, is what the tables support.",
        all(lower.values()),
    )


@register(CHECKS, "the best with guidance", "Sec. 1, Tab. 1", "undetermined")
def _guided(n: Numbers) -> Finding:
    guided, plain = ([n("Tab. 1", f"SiT-XL, SoftVQ-{size}, 64 tokens", m) for size in SIZES]
                     for m in ("gfid_guided", "gfid"))  # fmt: skip
    dit = [n("Tab. 1", f"DiT-XL, SoftVQ-{size}, 64 tokens", "gfid_guided") for size in SIZES]
    return Finding(
        f"the headline FID of {min(guided):.2f}, of SiT-XL on 64 tokens",
        f"gFID on B, BL, L: {listed(guided, 2)} with guidance, {listed(plain, 2)} without; DiT's with guidance "
        f"{listed(dit, 2)}",
        "The smallest tokenizer has the best number with guidance and the worst without, and of DiT the worst in both. "
        "The main text does not say how guidance was chosen for each row.",
        guided[0] == min(guided) and plain[0] == max(plain) and dit[0] == max(dit),
    )


@register(CHECKS, "DiT at 512 px", "Tab. 1, 2", "undetermined")
def _dit_512(n: Numbers) -> Finding:
    small, large = ({m: n(place, DIT, m) for m in ("gfid", "is", "gfid_guided")} for place in ("Tab. 1", "Tab. 2"))
    return Finding(
        f"DiT-XL/2 on KL at 512 px without guidance: gFID {large['gfid']:.2f}, IS {large['is']:.1f}",
        f"at 256 px: gFID {small['gfid']:.2f}, IS {small['is']:.1f}, the same two; with guidance they differ, "
        f"{small['gfid_guided']:.2f} and {large['gfid_guided']:.2f}",
        "Two models on two sizes of image with the same pair of numbers: most likely copied from Tab. 1. Compare "
        "nothing at 512 px with it.",
        (small["gfid"], small["is"]) == (large["gfid"], large["is"]) and small["gfid_guided"] != large["gfid_guided"],
    )


# -- Sec. 4.2: reconstruction ----------------------------------------------------------------------------------------


@register(CHECKS, "rFID of SoftVQ-L-32", "Tab. 1", "two values")
def _rfid_mar(n: Numbers) -> Finding:
    what = "{}, SoftVQ-{}, {} tokens".format
    mar = n("Tab. 1", what("MAR-H", "L", 32), "rfid")
    dit, sit = (n("Tab. 1", what(model, "L", 32), "rfid") for model in ("DiT-XL", "SiT-XL"))
    more, less = n("Tab. 1", what("SiT-XL", "L", 64), "rfid"), n("Tab. 1", what("SiT-XL", "BL", 32), "rfid")
    return Finding(
        f"rFID {mar:.2f} of SoftVQ-L with 32 tokens, in MAR-H's row",
        f"{dit:.2f} in the rows of DiT and SiT; {mar:.2f} is there the number of 64 tokens",
        f"Take {dit:.2f}. Then the largest tokenizer reconstructs worse than BL, which has {less:.2f}.",
        mar != dit == sit > less and mar == more,
    )


@register(CHECKS, "range of rFID, 256 px", "Sec. 4.2, Tab. 1", "follows")
def _rfid_256(n: Numbers) -> Finding:
    said = [n("Sec. 4.2", f"SoftVQ, 256 px, {end}", "rfid") for end in ("lowest", "highest")]
    found = [row["rfid"] for what, row in n.rows("Tab. 1").items() if "SoftVQ" in what]
    return Finding(
        f"rFID of {said[0]:.2f} to {said[1]:.2f} at 256 px",
        f"{min(found):.2f} to {max(found):.2f} in Tab. 1",
        "The range is that of the table.",
        said == [min(found), max(found)],
    )


@register(CHECKS, "range of rFID, 512 px", "Sec. 4.2, Tab. 2", "undetermined")
def _rfid_512(n: Numbers) -> Finding:
    low, high = (n("Sec. 4.2", f"SoftVQ, 512 px, {end}", "rfid") for end in ("lowest", "highest"))
    found = {row["rfid"] for what, row in n.rows("Tab. 2").items() if "SoftVQ" in what}
    return Finding(
        f"rFID of {low:.2f} to {high:.2f} at 512 px",
        f"Tab. 2 has {listed(sorted(found), 2)} alone",
        "The lower end belongs to a tokenizer that the main text does not show.",
        low not in found and high in found,
    )


@register(CHECKS, "TiTok's tokens", "Sec. 4.2, Tab. 1", "two values")
def _titok(n: Numbers) -> Finding:
    said = n("Sec. 4.2", "MaskGIT and TiTok, VQ, 256 px", "tokens")
    maskgit, titok = (n("Tab. 1", what, "tokens") for what in ("MaskGIT, VQ", "TiTok-S-128, VQ"))
    return Finding(
        f"better reconstruction than VQ tokenizers with {said:.0f} tokens such as MaskGIT's and TiTok's",
        f"MaskGIT {maskgit:.0f}, TiTok {titok:.0f} tokens in Tab. 1",
        "TiTok's tokenizer works at half of the tokens that the sentence gives it.",
        said == maskgit != titok,
    )


# -- Sec. 1, 4.2: speed ----------------------------------------------------------------------------------------------


def throughputs(n: Numbers) -> dict[str, tuple[float, float, float]]:
    """Name of each speed-up of Sec. 1 -> what is said, and the two throughputs that it is made of, ours first.

    Of the tokenizers with as many tokens it is the one that Tab. 1 names last, SoftVQ-L; in Tab. 2 there is one.
    """
    rows = {
        "32 tokens, 256 px": ("Tab. 1", "SiT-XL, SoftVQ-L, 32 tokens"),
        "64 tokens, 256 px": ("Tab. 1", "SiT-XL, SoftVQ-L, 64 tokens"),
        "64 tokens, 512 px": ("Tab. 2", "SiT-XL, SoftVQ-BL, 64 tokens"),
    }
    return {
        name: (n("Sec. 1", name, "speed-up"), n(place, what, "throughput"), n(place, SIT, "throughput"))
        for name, (place, what) in rows.items()
    }


@register(CHECKS, "18 times as fast", "Abstract, Sec. 1, Tab. 1", "undetermined")
def _speed_32(n: Numbers) -> Finding:
    said, _, base = throughputs(n)["32 tokens, 256 px"]
    ours = [n("Tab. 1", f"SiT-XL, SoftVQ-{size}, 32 tokens", "throughput") for size in SIZES]
    dit = [n("Tab. 1", f"DiT-XL, SoftVQ-{size}, 32 tokens", "throughput") for size in SIZES]
    ratios, others = [x / base for x in ours], [x / n("Tab. 1", DIT, "throughput") for x in dit]
    return Finding(
        f"up to {said:.0f} times the throughput with 32 tokens at 256 px",
        f"SiT on B, BL, L: {listed(ratios, 1)} times; DiT: {listed(others, 1)}",
        "SiT's numbers rounded down, or the best of DiT's rounded up: the text does not say which. The claim is not "
        "larger than the table.",
        all(round(ratio) > said for ratio in ratios) and max(others) < said,
    )


@register(CHECKS, "10 times as fast", "Sec. 1, Tab. 1", "follows")
def _speed_64(n: Numbers) -> Finding:
    said, ours, base = throughputs(n)["64 tokens, 256 px"]
    return Finding(
        f"{said:.0f} times the throughput with 64 tokens at 256 px",
        f"{ours:.2f} / {base:.2f} = {ours / base:.1f}",
        "As the table has it.",
        round(ours / base) == said,
    )


@register(CHECKS, "55 times as fast", "Abstract, Sec. 1, 4.2, 6, Tab. 2", "undetermined")
def _speed_512(n: Numbers) -> Finding:
    said, ours, base = throughputs(n)["64 tokens, 512 px"]
    low, high = range_of_ratio(ours, base)
    small = n("Tab. 1", "SiT-XL, SoftVQ-BL, 64 tokens", "throughput") / n("Tab. 1", SIT, "throughput")
    return Finding(
        f"{said:.0f} times the throughput with 64 tokens at 512 px; Sec. 4.2 has the number without the size",
        f"{ours:.2f} / {base:.2f} = {ours / base:.1f}; with what rounding hides, {low:.0f} to {high:.0f}; the same "
        f"pair at 256 px: {small:.1f}",
        "The divisor has one digit, so the ratio is not known better than to a tenth. It is true of 512 px only.",
        round(ours / base) != said and low < said < high and round(small) != said,
    )


@register(CHECKS, "steps of samplers", "Tab. 2", "not counted alike")
def _steps(n: Numbers) -> Finding:
    fast = {m: n("Tab. 2", "U-ViT-H, DC-AE, 64 tokens", m) for m in ("throughput", "gflops")}
    ours = {m: n("Tab. 2", "SiT-XL, SoftVQ-BL, 64 tokens", m) for m in ("throughput", "gflops")}
    return Finding(
        f"SiT-XL on 64 tokens: {ours['throughput']:.2f} images a second at {ours['gflops']:.2f} Gflops",
        f"U-ViT-H on 64 tokens of DC-AE: {fast['throughput']:.2f} at {fast['gflops']:.2f} Gflops, by DPM-Solver with "
        "50 steps; of the rows without † no number of steps is given",
        "More images a second for more operations each: the column mixes numbers of steps, so only rows of one "
        "sampler can be compared.",
        fast["throughput"] > ours["throughput"] and fast["gflops"] > ours["gflops"],
    )


@register(CHECKS, "MAR-H's throughput", "Tab. 1, 2", "two values")
def _mar_throughput(n: Numbers) -> Finding:
    what = "MAR-H, SoftVQ-BL, 64 tokens"
    small, large = ({m: n(place, what, m) for m in ("throughput", "gflops")} for place in ("Tab. 1", "Tab. 2"))
    sit = [n(place, "SiT-XL, SoftVQ-BL, 64 tokens", "throughput") for place in ("Tab. 1", "Tab. 2")]
    return Finding(
        f"MAR-H on 64 tokens: {small['throughput']:.2f} images a second at 256 px, {large['throughput']:.2f} at 512 px",
        f"both at {small['gflops']:.2f} Gflops, and the larger image takes more decoding: in one setting it cannot be "
        f"{large['throughput'] / small['throughput']:.1f} times as fast; SiT-XL has {sit[0]:.2f} and {sit[1]:.2f}",
        "At least one of the two was measured in another setting. MAR's speed-ups are not known from these tables.",
        small["gflops"] == large["gflops"] and large["throughput"] > small["throughput"] and sit[1] <= sit[0],
    )


@register(CHECKS, "steps of training", "Abstract, Sec. 1, 4.1, 4.2", "two values")
def _training_steps(n: Numbers) -> Finding:
    ours = "DiT-XL and SiT-XL, SoftVQ"
    setup, main = (n(place, ours, "training_steps") for place in ("Sec. 4.1", "Sec. 4.2"))
    vanilla = n("Sec. 4.1", "DiT-XL/2 and SiT-XL/2, KL", "training_steps")
    said = n("Sec. 1", "SoftVQ, training iterations", "iteration_ratio")
    return Finding(
        f"DiT-XL and SiT-XL are trained for {setup:g}M steps (Sec. 4.1), {main:g}M (Sec. 4.2); {said:g} times fewer "
        "(Abstract)",
        f"{vanilla:g} / {setup:g} = {vanilla / setup:.2f}, {vanilla:g} / {main:g} = {vanilla / main:.2f}",
        f"The factor belongs to {setup:g}M steps. It compares lengths of two trainings that end at different gFIDs, "
        "not steps to one and the same.",
        setup != main and round(vanilla / setup, 1) == said != round(vanilla / main, 1),
    )


# -- Sec. 4.3, 4.4 ---------------------------------------------------------------------------------------------------


@register(CHECKS, "32 tokens against KL", "Sec. 4.3, Tab. 3", "follows")
def _sec_4_3(n: Numbers) -> Finding:
    said = n("Sec. 4.3", "SiT-L, SoftVQ-S, 32 tokens, to KL", "gfid_improvement")
    base, ours = n("Tab. 3", "KL (SD-VAE)", "gfid"), n("Tab. 3", "SoftVQ-S, 32 tokens", "gfid")
    return Finding(
        f"SiT-L on 32 tokens of SoftVQ-S is better than on KL by {said:.1f} in gFID",
        f"{base:.2f} − {ours:.2f} = {base - ours:.2f}",
        "As the table has it.",
        round(base - ours, 1) == said,
    )


@register(CHECKS, "a superior rFID", "Sec. 4.4, Tab. 4", "does not follow")
def _superior(n: Numbers) -> Finding:
    row = "SoftVQ-B, init DINOv2-B, target DINOv2-B"
    both, scores = n("Tab. 4", row, "rfid"), n("Tab. 4", row, "is")
    init = "SoftVQ-B, init DINOv2-B, no target"
    alone = {m: n("Tab. 4", init, m) for m in ("rfid", "is")}
    target = n("Tab. 4", "SoftVQ-B, no init, target DINOv2-B", "is")
    return Finding(
        f"initialisation and alignment with DINOv2-B together give a superior rFID of {both:.2f} and IS of "
        f"{scores:.1f}, compared to either alone",
        f"initialisation alone: rFID {alone['rfid']:.2f}, the lowest of Tab. 4; IS {alone['is']:.1f}, and "
        f"{target:.1f} with alignment alone",
        "True of IS. For reconstruction, alignment takes back a part of what initialisation gains.",
        alone["rfid"] < both
        and scores > max(alone["is"], target)
        and alone["rfid"] == min(row["rfid"] for row in n.rows("Tab. 4").values()),
    )


@register(CHECKS, "IS 89.4 twice", "Tab. 3, 4", "undetermined")
def _same_is(n: Numbers) -> Finding:
    first = {m: n("Tab. 3", "SoftVQ-S, 64 tokens", m) for m in ("is", "gfid")}
    second = {m: n("Tab. 4", "SoftVQ-B, no init, no target", m) for m in ("is", "gfid")}
    third = {m: n("Tab. 4", "SoftVQ-B, init DINOv2-B, no target", m) for m in ("is", "gfid")}
    near = [row["is"] for row in n.rows("Tab. 3").values() if abs(row["gfid"] - second["gfid"]) < 2]
    around = [row["is"] for row in n.rows("Tab. 3").values() if abs(row["gfid"] - third["gfid"]) < 2]
    return Finding(
        f"IS {first['is']:.1f} at gFID {first['gfid']:.2f} (Tab. 3, SoftVQ-S-64), and IS {second['is']:.1f} at gFID "
        f"{second['gfid']:.2f} (Tab. 4, first row)",
        f"rows of Tab. 3 with a gFID within 2 of {second['gfid']:.2f} have an IS of {min(near):.1f} to "
        f"{max(near):.1f}; Tab. 4's other row without alignment has {third['is']:.1f} at {third['gfid']:.2f}, rows of "
        f"Tab. 3 near it at most {max(around):.1f}",
        "The IS of Tab. 4's rows without alignment do not fit their gFID as Tab. 3 has it. A number may be copied or "
        "mistyped, and these gFIDs are what the effect of alignment is computed from.",
        first["is"] == second["is"] > max(near) and third["is"] > max(around),
    )


def spearman(x: list[float], y: list[float]) -> float:
    """Rank correlation; there must be no ties."""
    ranks = [[sorted(values).index(value) for value in values] for values in (x, y)]
    squares = sum((a - b) ** 2 for a, b in zip(*ranks, strict=True))
    return 1 - 6 * squares / (len(x) * (len(x) ** 2 - 1))


@register(CHECKS, "what goes with gFID", "Sec. 4.4, Tab. 4", "follows")
def _probe(n: Numbers) -> Finding:
    rows = n.rows("Tab. 4").values()
    gfid = [row["gfid"] for row in rows]
    probe, rfid = (spearman([row[metric] for row in rows], gfid) for metric in ("linear_probe", "rfid"))
    return Finding(
        "linear probing is more closely related to gFID than rFID is",
        f"rank correlation with gFID over {len(gfid)} rows: linear probing {signed(probe)}, rFID {signed(rfid)}",
        "So it is in this table. Its rows are few, of one tokenizer, and differ in nothing but teachers.",
        abs(probe) > abs(rfid) and probe < 0,
    )


# What Tab. 3 and 4 say of alignment, at 64 tokens: place, name, and what the text says about its alignment.
ALIGNED = (
    ("Tab. 3", "VQ-S, 64 tokens", "not said: the same training recipe"),
    ("Tab. 3", "AE-S, 64 tokens", "not said: the same training recipe"),
    ("Tab. 3", "TiTok-BL-VQ", "no: published without"),
    ("Tab. 3", "SoftVQ-S, 64 tokens", "yes"),
    ("Tab. 4", "SoftVQ-B, no init, no target", "no"),
    ("Tab. 4", "SoftVQ-B, no init, target DINOv2-B", "yes, random start"),
    ("Tab. 4", "SoftVQ-B, init DINOv2-B, target DINOv2-B", "yes"),
)


@register(CHECKS, "quantizer or alignment", "Sec. 4.3, Tab. 3, 4", "undetermined")
def _confound(n: Numbers) -> Finding:
    gfid = {what: n(place, what, "gfid") for place, what, _ in ALIGNED}
    vq, soft, plain, target = (
        gfid[what]
        for what in (
            "VQ-S, 64 tokens",
            "SoftVQ-S, 64 tokens",
            "SoftVQ-B, no init, no target",
            "SoftVQ-B, no init, target DINOv2-B",
        )
    )
    return Finding(
        f"at 64 tokens SoftVQ-S has a gFID of {soft:.2f}, VQ-S {vq:.2f}, trained by the same recipe",
        f"difference {vq - soft:.2f}; alignment alone moves SoftVQ-B by {plain - target:.2f}, from {plain:.2f} to "
        f"{target:.2f}, and without it SoftVQ-B is no better than VQ-S",
        "Whether VQ-S and AE-S were aligned is not said. If not, alignment may explain all of Tab. 3's gain in gFID "
        "and the quantizer none of it, as far as S and B can be compared. Only quantizer × alignment, each with and "
        "without, can tell.",
        plain >= vq and plain - target >= vq - soft > 0,
    )
