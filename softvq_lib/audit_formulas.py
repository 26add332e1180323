"""Checks of what the paper counts and of its formulas: sizes and Gflops (Tab. 1-3), Eq. 4-7, and the released code.

Counting builds networks on tensors without storage. Equations are checked on a few random tokens.
"""

from functools import cache

import numpy as np

from softvq_lib import method_maths as maths
from softvq_lib.audit_numbers import Check, Finding, Numbers, register, signed
from softvq_lib.audit_tables import DIT, MAR, SIT, throughputs

CHECKS: list[Check] = []
CODES, DIM = 8192, 32  # of the demonstrations: the size of the released codebooks, 64 tokens' channels


def costs(n: Numbers) -> dict:
    """Place and name of each row with Gflops -> its `GeneratorCost`."""
    from softvq_lib.evaluation.generator_cost import generator_table

    return {(cost.place, cost.what): cost for cost in generator_table(n.paper)}


def _sizes(n: Numbers, *whats: tuple[str, str]) -> list[dict]:
    from softvq_lib.evaluation.parameters import METRICS, parameter_table

    rows = parameter_table([r for r in n.paper if r["metric"] in METRICS and (r["place"], r["what"]) in whats])
    return [next(row for row in rows if (row["place"], row["what"]) == what) for what in whats]


# -- counted ---------------------------------------------------------------------------------------------------------


@register(CHECKS, "the size of SoftVQ-S", "Sec. 4.1, 4.3, Tab. 3", "two values")
def _size_s(n: Numbers) -> Finding:
    setup, table = _sizes(n, ("Sec. 4.1", "SoftVQ-S"), ("Tab. 3", "SoftVQ-S, 64 tokens"))
    fits = round(setup["ours"] / 1e6) == setup["paper"] and round(table["in_tab_3"] / 1e6) == table["paper"]
    return Finding(
        f"{setup['paper']} million parameters (Sec. 4.1), {table['paper']} million (Sec. 4.3, Tab. 3)",
        f"counted: {setup['ours'] / 1e6:.2f} million; with one codebook, the alignment head and parts that nothing "
        f"reads {table['in_tab_3'] / 1e6:.2f}",
        "Tab. 3 can be had by counting what only training uses. It gives one number for twelve tokenizers of which "
        "four have no codebook.",
        setup["paper"] != table["paper"] and fits,
    )


@register(CHECKS, "the size of KL", "Tab. 3", "does not follow")
def _size_kl(n: Numbers) -> Finding:
    (kl,) = _sizes(n, ("Tab. 3", "KL (SD-VAE)"))
    if kl["ours"] is None:
        raise ValueError(f"SD-VAE cannot be counted: {kl['note']}.")
    other = n("Tab. 3", "DC-AE-f64", "tokenizer_parameters")
    return Finding(
        f"the KL tokenizer has {kl['paper']} million parameters",
        f"counted: {kl['ours'] / 1e6:.1f} million; DC-AE-f64, four rows below, has {other:.0f}",
        "The KL tokenizer is an eighth of what is printed, and SoftVQ-S about half of it, not a fifteenth. The digits "
        "are not certain in the copy that was read here; no reading of them comes near.",
        round(kl["ours"] / 1e6) != kl["paper"],
    )


@register(CHECKS, "Gflops", "Sec. 4.2, Tab. 1, 2", "not counted alike")
def _gflops(n: Numbers) -> Finding:
    found = costs(n)
    pairs = (
        (("Tab. 1", "SiT-XL, SoftVQ, 64 tokens"), ("Tab. 1", SIT)),
        (("Tab. 1", "SiT-XL, SoftVQ, 32 tokens"), ("Tab. 1", SIT)),
        (("Tab. 2", "SiT-XL, SoftVQ-BL, 64 tokens"), ("Tab. 2", SIT)),
    )
    alike = [found[many].macs / found[few].macs for few, many in pairs]
    printed = [found[many].paper / found[few].paper for few, many in pairs]
    exact = [c for c in found.values() if c.macs and round(c.as_printed / 1e9, 2) == c.paper]
    few, many = (found[what] for what in pairs[0])
    return Finding(
        f"{few.paper:.2f} Gflops of SiT-XL on 64 tokens, {many.paper:.2f} on KL",
        f"rows on SoftVQ leave out attention's products, rows on KL attention's projections; with that, {len(exact)} "
        f"rows are found to the printed digit. Counted alike, KL takes {alike[0]:.1f}, {alike[1]:.1f} and "
        f"{alike[2]:.1f} times the operations of 64 and 32 tokens at 256 px and 64 at 512 px; by the column "
        f"{printed[0]:.1f}, {printed[1]:.1f}, {printed[2]:.1f}",
        "The saving is larger than the paper's own column says. Never divide two numbers of that column.",
        all(a > p + 0.5 for a, p in zip(alike, printed, strict=True)) and len(exact) >= 8,
    )


@register(CHECKS, "MAR's saving", "Sec. 4.2, Tab. 1", "not counted alike")
def _mar_saving(n: Numbers) -> Finding:
    said = n("Sec. 4.2", "MAR-H, SoftVQ-BL, 64 tokens, to KL", "gflops_saving")
    found = costs(n)
    few, many = found["Tab. 1", "MAR-H, SoftVQ-BL, 64 tokens"], found["Tab. 1", MAR]
    printed, alike = 100 * (1 - few.paper / many.paper), 100 * (1 - few.macs / many.macs)
    return Finding(
        f"64 tokens reduce MAR-H's Gflops by {said:.0f} %",
        f"1 − {few.paper:.2f} / {many.paper:.2f} = {printed:.1f} %; counted alike {alike:.1f} %",
        "Right by the column, too small by the operations. Both are of a training pass, not of sampling.",
        round(printed) == said and alike > printed + 5,
    )


@register(CHECKS, "SiT-XL/2 at 256 px", "Sec. 4.2, Tab. 1", "two values")
def _sit_gflops(n: Numbers) -> Finding:
    sit, dit = (costs(n)["Tab. 1", what] for what in (SIT, DIT))
    return Finding(
        f"{dit.paper:.2f} Gflops for DiT-XL/2 and SiT-XL/2 on KL (Sec. 4.2), {sit.paper:.2f} for SiT-XL/2 (Tab. 1)",
        f"counted as its neighbours are: {sit.as_printed / 1e9:.2f}",
        "The text is right. The digits of the table are not certain in the copy that was read here.",
        round(sit.as_printed / 1e9, 2) == dit.paper != sit.paper,
    )


@register(CHECKS, "32 times fewer tokens", "Sec. 4.2, Tab. 1", "not counted alike")
def _tokens(n: Numbers) -> Finding:
    said, kl = n("Sec. 4.2", "SoftVQ, 32 tokens, to KL", "token_ratio"), n("Tab. 1", SIT, "tokens")
    ours, seen = n("Tab. 1", "SiT-XL, SoftVQ-L, 32 tokens", "tokens"), costs(n)["Tab. 1", SIT].tokens
    return Finding(
        f"{said:.0f} times fewer tokens than KL's {kl:.0f}",
        f"{kl:.0f} / {ours:.0f} = {kl / ours:.0f}; but DiT-XL/2 and SiT-XL/2 join 2×2 positions and see {seen}, "
        f"{seen / ours:.0f} times as many",
        f"The {kl:.0f} are positions of the latent, not tokens of the transformer.",
        kl / ours == said and seen < kl,
    )


@register(CHECKS, "speed and operations", "Sec. 1, Tab. 1, 2", "undetermined")
def _speed_and_operations(n: Numbers) -> Finding:
    found = costs(n)
    rows = {
        "64 tokens, 256 px": (("Tab. 1", "SiT-XL, SoftVQ, 64 tokens"), ("Tab. 1", SIT)),
        "32 tokens, 256 px": (("Tab. 1", "SiT-XL, SoftVQ, 32 tokens"), ("Tab. 1", SIT)),
        "64 tokens, 512 px": (("Tab. 2", "SiT-XL, SoftVQ-BL, 64 tokens"), ("Tab. 2", SIT)),
    }
    macs = {name: found[many].macs / found[few].macs for name, (few, many) in rows.items()}
    fast = {name: ours / base for name, (_, ours, base) in throughputs(n).items()}
    return Finding(
        "throughput grows " + ", ".join(f"{fast[name]:.1f} times ({name})" for name in rows),
        "operations fall " + ", ".join(f"{macs[name]:.1f} times" for name in rows),
        "Two to three times more than the transformer's work explains. The rest is decoding, the device or the "
        "setting, and the paper does not say which.",
        all(fast[name] > 2 * macs[name] for name in rows),
    )


@register(CHECKS, "hours of training", "Sec. 4.2", "follows")
def _hours(n: Numbers) -> Finding:
    slow, fast = (n("Sec. 4.2", f"SiT-XL, {latents}, 400K steps", "training") for latents in ("KL", "SoftVQ"))
    found = costs(n)
    macs = found["Tab. 1", SIT].macs / found["Tab. 1", "SiT-XL, SoftVQ, 64 tokens"].macs
    return Finding(
        f"400K steps of SiT-XL take {fast:.0f} hours in place of {slow:.0f}",
        f"{slow:.0f} / {fast:.0f} = {slow / fast:.1f}; on 64 tokens {macs:.1f} times fewer operations, counted alike",
        "What fewer operations lead one to expect, if it is of 64 tokens, which the text does not say.",
        0.7 * macs < slow / fast < macs,
    )


# -- equations -------------------------------------------------------------------------------------------------------


@cache
def _posteriors() -> tuple[np.ndarray, np.ndarray]:
    """Random posteriors of 64 tokens over 16 codes, and the same ones sharpened."""
    logits = 2 * np.random.default_rng(0).normal(size=(64, 16))
    q = [np.exp(power * logits) for power in (1, 2)]
    return tuple(weights / weights.sum(axis=1, keepdims=True) for weights in q)


def kl_terms(q: np.ndarray) -> dict[str, float]:
    """Eq. 4's term, minus the mutual information, and the divergence from the uniform prior, of posteriors (l, k)."""
    entropy = maths.entropy(q).mean()
    return {
        "E H(q)": float(entropy),
        "Eq. 4": float(entropy - maths.entropy(q.mean(axis=0))),
        "−I(x; c)": -maths.mutual_information(q),
        "KL(q ‖ uniform)": float(maths.kl_divergence(q, np.full(q.shape[1], 1 / q.shape[1])).mean()),
        "log K − E H(q)": float(np.log(q.shape[1]) - entropy),
    }


@register(CHECKS, "the sign of the KL term", "Eq. 4, Sec. 3.4", "does not follow")
def _kl(n: Numbers) -> Finding:
    soft, sharp = map(kl_terms, _posteriors())
    weight = n("Sec. 4.1", "λ4", "loss_weight")
    same = all(
        np.isclose(t["Eq. 4"], t["−I(x; c)"]) and np.isclose(t["KL(q ‖ uniform)"], t["log K − E H(q)"])
        for t in (soft, sharp)
    )
    return Finding(
        f"the KL divergence of the ELBO is H(q) − H(E q), and its weight is {weight:g}",
        f"on random posteriors Eq. 4 is {signed(soft['Eq. 4'])}, which is −I(x; c), where log K − H(q) is "
        f"{signed(soft['KL(q ‖ uniform)'])}; with sharper ones {signed(sharp['Eq. 4'])} and "
        f"{signed(sharp['KL(q ‖ uniform)'])}",
        "A divergence is never negative, and this one has the opposite sign. Minimising it sharpens posteriors and "
        "spreads their use, which is useful, but it is no bound on the likelihood.",
        same and soft["Eq. 4"] < 0 < soft["KL(q ‖ uniform)"] and sharp["Eq. 4"] < soft["Eq. 4"] and weight > 0
        and sharp["KL(q ‖ uniform)"] > soft["KL(q ‖ uniform)"],
    )  # fmt: skip


@register(CHECKS, "the sign of Eq. 6", "Eq. 6, 7", "does not follow")
def _eq_6(n: Numbers) -> Finding:
    y = maths.unit(np.random.default_rng(0).normal(size=(16, 8)))
    aligned, opposed = (float(np.mean(np.sum(y * other, axis=1))) for other in (y, -y))
    weight = n("Sec. 4.1", "λ3", "loss_weight")
    return Finding(
        f"the loss adds {weight:g} times the mean similarity of Eq. 6, to encourage it",
        f"Eq. 6 is {signed(aligned, 0)} for equal and {signed(opposed, 0)} for opposite features: minimised as "
        "printed, it drives them apart",
        "A minus sign is missing. This library has it.",
        aligned > opposed and weight > 0,
    )


def strips(n: Numbers) -> list[dict]:
    """For each number of tokens of Tab. 3 at 256 px, what Eq. 5 ties together.

    Returns:
        `tokens`, `patches` of the image, `across` of them, `each`: patches of a token; `rows`: rows of patches that
        one token touches at most; `printed`: entries of Eq. 5 with its index from 0 to L.
    """
    from softvq_lib.losses.alignment import assignment
    from softvq_lib.tokenizers import PRESETS

    across = PRESETS["s"]["image_size"] // PRESETS["s"]["patch"][0]
    found = []
    for tokens in sorted({int(n("Tab. 3", f"SoftVQ-S, {k} tokens", "tokens")) for k in (256, 128, 64, 32)}):
        owner = assignment(tokens, across**2, "repeat").argmax(1).reshape(across, across)
        rows = max(int((owner == token).any(1).sum()) for token in range(tokens))
        each = across**2 // tokens
        found.append(
            {"tokens": tokens, "patches": across**2, "across": across, "each": each, "rows": rows}
            | {"printed": (tokens + 1) * each}
        )
    return found


@register(CHECKS, "the index of Eq. 5", "Eq. 5, Sec. 2.1", "does not follow")
def _eq_5(n: Numbers) -> Finding:
    few = next(row for row in strips(n) if row["tokens"] == n("Tab. 1", "SiT-XL, SoftVQ-L, 64 tokens", "tokens"))
    return Finding(
        "L tokens are z[0] to z[L], each repeated N/L times",
        f"with L = {few['tokens']} that makes {few['printed']} entries for N = {few['patches']} patches",
        "A slip: the index ends at L − 1. Sec. 2.1 has it for tokens and for codewords.",
        few["printed"] != few["patches"] == few["tokens"] * few["each"],
    )


@register(CHECKS, "weights of Eq. 7", "Eq. 7, Sec. 4.1", "two values")
def _eq_7(n: Numbers) -> Finding:
    first, second = (n("Sec. 4.1", f"λ1, {which}", "loss_weight") for which in ("first", "second"))
    return Finding(
        f"λ1 = {first:g} and λ1 = {second:g}; Eq. 7 has λ1 to λ4",
        "λ1 twice, λ2 never",
        f"Read the second as λ2, the weight of the adversarial term: {second:g}.",
        first != second,
    )


@register(CHECKS, "rows of patches", "Eq. 5, Sec. 3.1", "undetermined")
def _strips(n: Numbers) -> Finding:
    found = {row["tokens"]: row for row in strips(n)}
    few = [found[int(n("Tab. 1", f"SiT-XL, SoftVQ-L, {k} tokens", "tokens"))] for k in (64, 32)]
    return Finding(
        "latent tokens are one-dimensional, of any number, each adaptively associated with image tokens",
        f"Eq. 5 ties each of {few[0]['tokens']} tokens to {few[0]['each']} neighbouring patches of one row, each of "
        f"{few[1]['tokens']} to {few[1]['each']}, of {few[0]['across']} in a row",
        "Alignment imposes a place on every token. The main text shows no other assignment, such as a permuted one, "
        "beside it, so what of its gain comes from the place is open.",
        all(row["rows"] == 1 and row["each"] > 1 for row in few),
    )


# -- the released code -----------------------------------------------------------------------------------------------


@cache
def forms(temperature: float, entropy_temperature: float) -> dict[str, float]:
    """Three forms of the posterior on random tokens and codewords of length 1, and off the sphere.

    Returns:
        Total variations between forms, averaged over tokens, and perplexities of the released form, by name.
    """
    rng = np.random.default_rng(0)
    z, c = rng.normal(size=(16, DIM)), rng.normal(size=(CODES, DIM))
    unit_z, unit_c = maths.unit(z), maths.unit(c)
    paper, squared, released = (maths.posterior(unit_z, unit_c, temperature, form) for form in maths.FORMS)
    off = maths.posterior(z, c, temperature, "paper")
    sharp = maths.posterior(unit_z, unit_c, entropy_temperature, "released")

    def distance(p: np.ndarray, q: np.ndarray) -> float:
        return float(np.abs(p - q).sum(axis=1).mean() / 2)

    return {
        "released, squared": distance(released, squared),
        "released, paper": distance(released, paper),
        "released, paper off the sphere": distance(released, off),
        "perplexity at τ": float(maths.perplexity(released).mean()),
        "perplexity at T": float(maths.perplexity(sharp).mean()),
    }


def _released(n: Numbers) -> tuple[float, float, dict[str, float]]:
    from softvq_lib.tokenizers.softvq import temperatures

    tau = n("Sec. 3.2", "τ of Eq. 4", "temperature")
    entropy_temperature = temperatures("released")[1]
    return tau, entropy_temperature, forms(tau, entropy_temperature)


@register(CHECKS, "the posterior", "Eq. 4", "another formula")
def _posterior(n: Numbers) -> Finding:
    tau, _, found = _released(n)
    return Finding(
        f"q = softmax(−‖ẑ − c‖ / τ), τ = {tau:g}",
        f"the release: dot product of normalised vectors, softmax(cos / τ). On the sphere that is "
        f"softmax(−‖ẑ − c‖² / 2τ), the *squared* distance: no difference but rounding. From "
        f"Eq. 4 it is {found['released, paper']:.2f} away in total variation on the sphere, and "
        f"{found['released, paper off the sphere']:.2f} if nothing is normalised",
        "Weights that were published follow the release, and a reader who implements Eq. 4 has another quantizer.",
        found["released, squared"] < 1e-9 and found["released, paper"] > 0.05,
    )


@register(CHECKS, "fully differentiable", "Sec. 1, 3.2", "another formula")
def _keys(n: Numbers) -> Finding:
    import torch

    from softvq_lib.tokenizers.softvq import SoftVQ

    norms = {}
    for form in ("released", "paper"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            quantizer = SoftVQ(8, 4, 16, posterior=form).train()
            z_hat = torch.randn(4, 8, 4, requires_grad=True)
        quantizer(z_hat)[1]["kl"].backward()
        gradient = quantizer.codebook.grad
        norms[form] = 0.0 if gradient is None else float(gradient.norm())
    return Finding(
        "encoder and codebook are optimised directly; fully differentiable",
        f"the release detaches the codebook inside the posterior: the gradient of the KL term to it is "
        f"{norms['released']:.0f}, by Eq. 4 it is {'not 0' if norms['paper'] else '0'}",
        "The codewords learn as the values that are averaged, not as what tokens are compared with.",
        norms["released"] == 0 < norms["paper"],
    )


@register(CHECKS, "the temperature of the KL term", "Eq. 4", "another formula")
def _entropy_temperature(n: Numbers) -> Finding:
    tau, entropy_temperature, found = _released(n)
    return Finding(
        f"one posterior, at τ = {tau:g}, for the latent and for the KL term",
        f"the release takes the KL term at a temperature of {entropy_temperature:g}: on random tokens "
        f"{found['perplexity at T']:.1f} codes share a token there, {found['perplexity at τ']:.0f} at τ",
        "The regularised posterior is not the one that makes the latent.",
        entropy_temperature < tau and found["perplexity at T"] < found["perplexity at τ"],
    )


@register(CHECKS, "one codebook", "Eq. 4, Sec. 3.2", "another formula")
def _codebooks(n: Numbers) -> Finding:
    from softvq_lib.tokenizers import PRESETS

    codebooks, size = PRESETS["l"]["codebooks"], PRESETS["l"]["codebook_size"]
    tokens = int(n("Tab. 1", "SiT-XL, SoftVQ-L, 64 tokens", "tokens"))
    return Finding(
        "a codebook C of K codewords",
        f"the released configurations have {codebooks} of {size}: {tokens} tokens are {codebooks} segments of "
        f"{tokens // codebooks}, each with its own",
        "A token's place decides which codewords it can use. The main text does not mention it.",
        codebooks > 1,
    )
