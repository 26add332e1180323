"""Static figures that stand for explorable pictures where these cannot run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from softvq_lib.evaluation.export import to_uint8
from softvq_lib.explorables import unpack
from softvq_lib.style import QUANTIZER_COLOURS, QUANTIZER_NAMES, WIDTH, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from softvq_lib.experiments import TokenizerExperiment


def _bare(axes, label: str = "") -> None:
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_ylabel(label, rotation=0, ha="right", va="center")


@torch.no_grad()
def draw_reconstructions(
    experiments: Mapping[tuple[str, int], TokenizerExperiment], images: Tensor, shown: Sequence[int] = (2, 16)
) -> Figure:
    """Images (m, 3, height, width) in [-1, 1], and below them what each quantizer makes of them with `shown` tokens."""
    rows = [("original", images)]
    for (quantizer, tokens), experiment in sorted(experiments.items(), key=lambda item: item[0][1]):
        if tokens in shown:
            name = f"{QUANTIZER_NAMES[quantizer]}, {tokens}"
            rows.append((name, experiment.run.tokenizer.eval()(images)[0]))
    figure, panels = new_figure(len(rows), 1, WIDTH * 0.85)
    for axes, (name, pictures) in zip(np.atleast_1d(panels), rows, strict=True):
        axes.imshow(np.concatenate(list(to_uint8(pictures)), axis=1))
        _bare(axes, name)
    return figure


@torch.no_grad()
def draw_tokens(experiment: TokenizerExperiment, data: Mapping[str, object]) -> Figure:
    """An image with each token taken away, taken over from another image, and kept alone with the other's.

    Args:
        experiment: The tokenizer.
        data: What `explorables.token_data` made of it; its `pair` is shown.
    """
    decode = experiment.run.tokenizer.eval().decode
    latents = unpack(data["latents"])
    a, b = latents["z"][data["pair"]]  # (l, d) each
    mean = latents["mean"]
    one = torch.eye(len(a))[..., None]  # (l, l, 1)
    rows = [
        ("A and B", torch.stack([a, b])),
        ("taken away", a + one * (mean - a)),
        ("from B", a + one * (b - a)),
        ("kept, rest from B", b + one * (a - b)),
    ]
    figure, panels = new_figure(len(rows), 1, WIDTH * 0.62)
    for axes, (name, z) in zip(panels, rows, strict=True):
        pictures = list(to_uint8(decode(z)).numpy())
        pictures += [np.full_like(pictures[0], 255)] * (len(a) - len(pictures))
        axes.imshow(np.concatenate(pictures, axis=1))
        _bare(axes, name)
    return figure


def draw_costs(data: Mapping[str, object], generator: str = "sit", size: str = "xl", steps: int = 250) -> Figure:
    """Bars of 10^12 MACs an image at 256 pixels: sampling without guidance, and decoding by SoftVQ-BL or SD-VAE."""
    sampling, decoding = data["sampling"][generator][size], data["decoding"]["256"]
    bars = [(f"{n} tokens", sampling[str(n)], decoding["bl"][str(n)], "softvq") for n in data["tokens"]]
    bars.append(("256 patches of KL latents", sampling["kl256"], decoding["kl"], "kl"))
    figure, axes = new_figure(1, 1, WIDTH * 0.5)
    for name, sampled, decoded, quantizer in reversed(bars):
        colour, macs = QUANTIZER_COLOURS[quantizer], sampled["none"][str(steps)] / 1e12
        axes.barh(name, macs, color=colour)
        axes.barh(name, decoded / 1e12, left=macs, color=colour, alpha=0.5)
        axes.text(macs + decoded / 1e12, name, f" {macs + decoded / 1e12:.1f}", va="center")
    axes.set(
        xlabel="10¹² multiply-accumulates an image", xlim=(0, 1.12 * max(b[1]["none"][str(steps)] for b in bars) / 1e12)
    )
    axes.set_title(f"{data['names'][generator]}-{size.upper()}, {steps} steps, 256 pixels; pale: decoding")
    axes.grid(axis="y", visible=False)
    return figure
