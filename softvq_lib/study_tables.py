"""Tables of a study beside those of the paper: functions of its arms with their rows, in Markdown.

No column holds the paper's numbers and measured ones: they are of different images, networks and metrics.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from softvq_lib.arms import Measured, select
from softvq_lib.evaluation.associations import slopes_per_doubling
from softvq_lib.evaluation.statistics import t_interval
from softvq_lib.study_cells import (
    GUIDED,
    METRICS,
    NOT_YET,
    RECONSTRUCTION,
    SAMPLES,
    Drawn,
    label,
    number,
    over_seeds,
    rows_shown,
    table,
)

PROBE = "probe.z.flatten"
PSNR, _, RFD, RKID = RECONSTRUCTION
KID, FD, PRECISION, RECALL, AGREEMENT = SAMPLES
TOKENIZER = (PSNR, RFD, RKID, PROBE)  # columns of a tokenizer; SSIM, which is in the rows, would not fit a page


def _guidance(arms: Sequence[Measured]) -> str:
    """The scale of guided samples, as planned."""
    scales = {cell.parameters.get("guided") for arm in arms if (cell := arm.arm.cell("evaluate"))} - {None}
    return " or ".join(f"{scale:g}" for scale in sorted(scales)) or "–"


def generators(arms: Sequence[Measured]) -> Drawn:
    """DiT, SiT and MAR on SoftVQ and VQ: samples without guidance, then with it."""
    mine = select(arms, "generators")
    factors = {"generator": "generator", "quantizer": "tokenizer"}
    plain, guided = table(mine, factors, SAMPLES, floors=True), table(mine, factors, GUIDED, floors=True)
    text = f"**Without guidance**\n\n{plain.content}\n\n**Guidance {_guidance(mine)}**\n\n{guided.content}"
    return Drawn(text, plain.rows + guided.rows)


_SIZES = {"S": "mini-S", "B": "mini-B", "BL": "mini-BL", "L": "mini-L"}


def sizes(arms: Sequence[Measured]) -> Drawn:
    """Four trunks at 2 and 16 tokens."""
    factors = {"tokens": "tokens", "size": "trunk"}
    return table(select(arms, "size"), factors, TOKENIZER, floors=True, names={"size": _SIZES})


def resolution(arms: Sequence[Measured]) -> Drawn:
    """The same tokens for four times the pixels."""
    factors = {"tokens": "tokens", "pixels": "image, px"}
    return table(select(arms, "resolution"), factors, TOKENIZER, floors=True)


_FACTORIAL = {"quantizer": "quantizer", "tokens": "tokens", "alignment": "aligned with"}


def factorial_reconstruction(arms: Sequence[Measured]) -> Drawn:
    """Quantizer x tokens x alignment: reconstruction and linear probe."""
    return table(select(arms, "tokenizers"), _FACTORIAL, TOKENIZER, floors=True)


def factorial_generation(arms: Sequence[Measured]) -> Drawn:
    """Quantizer x tokens x alignment: samples of SiT without guidance."""
    return table(select(arms, "tokenizers"), _FACTORIAL, SAMPLES, floors=True)


def fixed_dim(arms: Sequence[Measured]) -> Drawn:
    """Fewer tokens without more channels."""
    factors = {"quantizer": "quantizer", "tokens": "tokens of 16 channels"}
    return table(select(arms, "fixed_dim"), factors, TOKENIZER, floors=True)


def rate(arms: Sequence[Measured]) -> Drawn:
    """Twice the learning rate."""
    factors = {"tokens": "tokens", "lr": "learning rate", "quantizer": "quantizer"}
    return table(select(arms, "rate"), factors, TOKENIZER, floors=True)


_TRUNKS = {"layerscale": "with LayerScale", "plain": "without"}


def trunk(arms: Sequence[Measured]) -> Drawn:
    """The study's trunk and one without LayerScale."""
    factors = {"tokens": "tokens", "trunk": "trunk", "quantizer": "quantizer"}
    return table(select(arms, "trunk"), factors, TOKENIZER, floors=True, names={"trunk": _TRUNKS})


def slopes(arms: Sequence[Measured], metrics: Sequence[str] = (PSNR, RFD, PROBE, KID)) -> Drawn:
    """Change of each metric per doubling of the tokens, for each quantizer and alignment, over seeds done."""
    heads = ["quantizer", "aligned with", *(METRICS[metric].head.strip(" ↓↑") for metric in metrics)]
    lines, seen = [], []
    for (quantizer, aligned), group in over_seeds(select(arms, "tokenizers"), ("quantizer", "alignment")):
        cells = [label("quantizer", quantizer), label("alignment", aligned)]
        for metric in metrics:
            curves = [_curve(mine, metric) for _, mine in over_seeds(group, ("seed",))]
            curves = [curve for curve in curves if len(curve) > 1]
            seen += [arm for arm in group if arm.value(metric) is not None]
            cells.append(_slope(curves, metric))
        lines.append(cells)
    head = "*Change per doubling of the tokens, by the least-squares line through the token counts that are done. With "
    head += "two seeds or more, a 95 % interval by Student's t over their slopes.*"
    text = "\n".join("| " + " | ".join(line) + " |" for line in [heads, ["---"] * 2 + ["--:"] * len(metrics), *lines])
    return Drawn(f"{head}\n\n{text}", rows_shown(seen, metrics))


def _curve(arms: Sequence[Measured], metric: str) -> dict[int, float]:
    """Values of one seed by number of tokens."""
    found = {int(arm.factors["tokens"]): arm.value(metric) for arm in arms}
    return {tokens: found[tokens] for tokens in sorted(found) if found[tokens] is not None}


def _slope(curves: Sequence[dict[int, float]], metric: str) -> str:
    if not curves:
        return NOT_YET
    values = np.array([slopes_per_doubling(np.array(list(c)), np.array(list(c.values()))) for c in curves])
    if len(values) == 1:
        return f"{number(values[0], metric)}<br>one seed"
    found = t_interval(values)
    return f"{number(found.value, metric)}<br>[{number(found.low, metric)}, {number(found.high, metric)}]"


# Enc. init. and align. target of Tab. 4 -> the settings of the paper's size.
PAPER_SETTINGS = {
    ("random", "none"): "softvq_b_64_scratch",
    ("random", "dinov2-b"): "softvq_b_64_scratch_dinov2",
    ("dinov2-b", "none"): "softvq_b_64_dinov2_unaligned",
    ("dinov2-b", "dinov2-b"): "softvq_b_64",
    ("clip-b", "clip-b"): "softvq_b_64_clip",
    ("eva02-b", "eva02-b"): "softvq_b_64_eva02",
}


def alignment(arms: Sequence[Measured]) -> Drawn:
    """Initial weights x target, with the controls of the target; cells of the paper that cannot be run say why."""
    factors = {"init": "enc. init.", "target": "align. target"}
    drawn = table(select(arms, "alignment"), factors, (PSNR, RFD, PROBE, KID, AGREEMENT), floors=True)
    files = [
        f"{label('init', init)} / {label('target', target)}: `{name}.yaml`"
        for (init, target), name in PAPER_SETTINGS.items()
    ]
    own = "Settings of the paper's size are in `params/paper/train_tokenizer`, by initialisation / target: "
    return replace(drawn, content=f"{drawn.content}\n\n{own}{', '.join(files)}.")


def repa(arms: Sequence[Measured]) -> Drawn:
    """Alignment in the tokenizer, in the generator (REPA), in both and in neither."""
    factors = {"latents": "latents", "repa": "REPA in the generator"}
    return table(select(arms, "repa"), factors, SAMPLES, floors=True)


def steps(arms: Sequence[Measured]) -> Drawn:
    """Samples after each budget of training steps of the generator, on SoftVQ and on KL latents."""
    factors = {"quantizer": "latents", "steps": "generator's steps"}
    return table(select(arms, "steps"), factors, SAMPLES, floors=True)


def latents(arms: Sequence[Measured]) -> Drawn:
    """Numbers of the latent space that the pictures can only suggest."""
    factors = {"tokens": "tokens", "quantizer": "quantizer", "alignment": "aligned with"}
    names = tuple(name for name in METRICS if name.startswith("latents."))
    return table(select(arms, "representations"), factors, names)


# -- Sec. 4.5 ----------------------------------------------------------------------------------------------------------

BASE = "none"
CHANGES = {
    "none": "SoftVQ, nothing changed",
    "tau-0.01": "τ 0.01",
    "tau-0.3": "τ 0.3",
    "tau-1": "τ 1",
    "posterior-paper": "Eq. 4 as printed, τ 0.07",
    "posterior-paper-tau-1": "Eq. 4 as printed, τ 1",
    "posterior-squared": "squared distance, τ 0.5",
    "posterior-squared-tau-0.07": "squared distance, τ 0.07",
    "codes-64": "64 codes",
    "codes-8192": "8,192 codes",
    "dim-4": "4 channels",
    "dim-64": "64 channels",
    "product-4": "product, 4 groups",
    "residual-2": "residual, 2 levels",
    "gmmvq": "GMMVQ",
    "vq-plain": "VQ without remedies",
    "kl-0.1": "KL weight 0.1",
    "kl-0": "KL weight 0",
    "kl--0.01": "KL weight −0.01",
    "klvae-1e-4": "KL-VAE, weight 0.0001",
    "klvae-1e-2": "KL-VAE, weight 0.01",
}
TOPICS = {
    "temperature": ("Temperature and form of the posterior", ("tau-", "posterior-")),
    "codebook": ("Codebook size", ("codes-",)),
    "dim": ("Channels of a token", ("dim-",)),
    "variants": ("Product and residual quantization, GMMVQ, VQ", ("product-", "residual-", "gmmvq", "vq-plain")),
    "kl": ("KL term of Eq. 4, both signs", ("kl-",)),
    "klvae": ("Weight of KL-VAE's term", ("klvae-",)),
}


def of_topic(topic: str) -> list[str]:
    """The changes that belong to a topic."""
    return [change for change in CHANGES if change.startswith(TOPICS[topic][1])]


def ablations(arms: Sequence[Measured], topic: str) -> Drawn:
    """One topic of Sec. 4.5: the unchanged SoftVQ and each change."""
    mine = select(arms, "ablations", {"change": [BASE, *of_topic(topic)]})
    order = {change: place for place, change in enumerate(CHANGES)}
    mine = sorted(mine, key=lambda arm: order[arm.factors["change"]])
    metrics = (PSNR, RFD, RKID, PROBE, "training.perplexity", KID)
    found = table(mine, {"change": "change"}, metrics, names={"change": CHANGES})
    return Drawn(f"**{TOPICS[topic][0]}**\n\n{found.content}", found.rows)
