"""Capacity plan: the arithmetic of a training step by its parts, and the GPU-hours of a recipe that follow (Sec. 4.1).

Counted on meta tensors, which have shapes and no storage, with random weights: nothing is downloaded or computed. A
multiply-add is two operations; convolutions and matrix products count, attention's among them, and nothing else does.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from softvq_lib.config import at_least, split
from softvq_lib.features import build_features
from softvq_lib.losses import LossConfig
from softvq_lib.losses.adversarial import LeCam, discriminator_objective, generator_loss
from softvq_lib.losses.alignment import Alignment
from softvq_lib.losses.discriminator import build_discriminator
from softvq_lib.losses.perceptual import build_perceptual
from softvq_lib.tokenizers import Tokenizer, TokenizerConfig
from softvq_lib.training.tokenizer import CONFIGS

PARTS = ("tokenizer", "perceptual", "adversarial", "discriminator", "alignment")
PEAK_TFLOPS = 989.0  # of an H100 SXM in bf16, without sparsity, by its data sheet
UTILISATION = 0.4
STATE_BYTES = 20  # of a trained parameter: weight, gradient, two moments of the optimiser, moving average; fp32 each


def capacity_plan(
    recipes: Mapping[str, Mapping[str, object]], *, peak_tflops: float = PEAK_TFLOPS, utilisation: float = UTILISATION
) -> list[dict]:
    """Count what each recipe costs.

    Args:
        recipes: Flat parameters of `train_tokenizer` by a name of your choice.
        peak_tflops: What one device can do at best, in 10^12 operations a second.
        utilisation: Share of it that training reaches, above 0 to 1. An assumption, not a measurement.

    Returns:
        One row a recipe: `name`, `preset`, `quantizer`, `tokens`, `dim`, `image_size`; `parameters` of the tokenizer;
        10^9 operations an image of each of `PARTS` while it is on, and of their sum, `step`; `images` in all;
        `exaflop`, 10^18 operations, in all; `gpu_hours`; `images_per_second` of one device once all terms are on;
        `state_gb`, what weights, gradients, optimiser and average take in memory (10^9 bytes), without activations.

    Raises:
        ValueError: for a parameter that is unknown or out of range.
    """
    at_least("peak_tflops", peak_tflops, 0, above=True)
    at_least("utilisation", utilisation, 0, above=True)
    if utilisation > 1:
        raise ValueError(f"utilisation={utilisation!r} is a share: give a number up to 1.")
    rows = []
    for name, values in recipes.items():
        tokenizer, _, loss, train, _ = split(values, *CONFIGS)
        tokenizer = replace(tokenizer, pretrained=False).resolved()
        flops = step_flops(tokenizer, loss)
        # Until the discriminator starts, its two parts cost nothing.
        judged = max(0, train.steps - loss.adversarial_start) / train.steps
        shares = {part: judged if part in ("adversarial", "discriminator") else 1.0 for part in PARTS}
        images = train.steps * train.batch_size
        total = images * sum(shares[part] * flops[part] for part in PARTS)
        parameters = _parameters(tokenizer)
        rows.append(
            {
                "name": name,
                "preset": tokenizer.preset,
                "quantizer": tokenizer.quantizer,
                "tokens": tokenizer.tokens,
                "dim": tokenizer.dim,
                "image_size": tokenizer.image_size,
                "parameters": parameters,
                **{part: flops[part] / 1e9 for part in PARTS},
                "step": sum(flops.values()) / 1e9,
                "images": images,
                "exaflop": total / 1e18,
                "gpu_hours": total / (peak_tflops * 1e12 * utilisation) / 3600,
                "images_per_second": peak_tflops * 1e12 * utilisation / sum(flops.values()),
                "state_gb": STATE_BYTES * parameters / 1e9,
            }
        )
    return rows


def step_flops(tokenizer: TokenizerConfig, loss: LossConfig) -> dict[str, int]:
    """Return the operations that one image costs in a training step once all terms are on, by `PARTS`.

    `tokenizer` is encoder, quantizer and decoder, forward and backward; `perceptual` the net on the image, and on its
    reconstruction forward and backward; `adversarial` the discriminator's judgement of the reconstruction and the way
    back to its pixels; `discriminator` its own training, on two or, with consistency, four views; `alignment` the
    teacher's forward pass and the projector.

    Args:
        tokenizer: Resolved, without pretrained weights.
        loss: Which terms are on, and their nets.
    """
    size = tokenizer.image_size
    off = {"adversarial": 0, "discriminator": 0}
    return {
        "tokenizer": _tokenizer(tokenizer),
        "perceptual": 0 if loss.perceptual == "none" else _perceptual(loss.perceptual, size),
        **(off if loss.adversarial == "none" else _discriminator(loss.adversarial, size, loss.consistency_weight > 0)),
        "alignment": 0 if loss.alignment == "none" else _alignment(loss, tokenizer),
    }


def table(rows: list[dict]) -> str:
    """Show a plan in Markdown: 10^9 operations an image by part, then what one device makes of them."""
    lines = [
        f"| recipe | image | {' | '.join(PARTS)} | sum | images/s | GPU-hours | state, GB |",
        "|---|" + "--:|" * (len(PARTS) + 5),
    ]
    for row in rows:
        cells = [
            row["name"],
            f"{row['image_size']} px",
            *(_short(row[part]) for part in (*PARTS, "step", "images_per_second", "gpu_hours", "state_gb")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 or number == 0 else f"{number:.2g}"


def _counted(call: Callable[[], object]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def _image(size: int, learnt: bool = False) -> Tensor:
    return torch.empty(1, 3, size, size, device="meta", requires_grad=learnt)


@cache
def _built(config: TokenizerConfig) -> Tokenizer:
    with torch.device("meta"):
        return Tokenizer(config).train()


def _parameters(config: TokenizerConfig) -> int:
    return sum(parameter.numel() for parameter in _built(config).parameters())


@cache
def _tokenizer(config: TokenizerConfig) -> int:
    tokenizer = _built(config)
    halves = (tokenizer.encoder.vit, tokenizer.decoder.vit)
    blocks = [vit.blocks for vit in halves]

    def step() -> None:
        reconstructions, code = tokenizer(_image(config.image_size))
        torch.autograd.backward([reconstructions.sum(), *code.losses.values()])

    def with_blocks(*numbers: int) -> int:
        for vit, some, number in zip(halves, blocks, numbers, strict=True):
            vit.blocks = some[:number]
        return _counted(step)

    # The blocks of a transformer are alike: counted with one and with two of them, the rest follows.
    least, encoder, decoder = with_blocks(1, 1), with_blocks(2, 1), with_blocks(1, 2)
    for vit, all_of_them in zip(halves, blocks, strict=True):
        vit.blocks = all_of_them
    return least + (len(blocks[0]) - 1) * (encoder - least) + (len(blocks[1]) - 1) * (decoder - least)


@cache
def _perceptual(name: str, size: int) -> int:
    with torch.device("meta"):
        net = build_perceptual(name, size, pretrained=False).to("meta")
    return _counted(lambda: net(_image(size), _image(size, learnt=True)).sum().backward())


@cache
def _discriminator(name: str, size: int, consistency: bool) -> dict[str, int]:
    with torch.device("meta"):
        discriminator, lecam = build_discriminator(name, size, pretrained=False), LeCam()

    def judge() -> None:
        generator_loss(discriminator(_image(size, learnt=True))).backward()

    def learn() -> None:
        weight = float(consistency)
        discriminator_objective(discriminator, lecam, _image(size), _image(size), None, consistency_weight=weight)[
            0
        ].backward()

    trained = [parameter for parameter in discriminator.parameters() if parameter.requires_grad]
    learned = _counted(learn)
    for parameter in trained:  # in the tokenizer's loss they get no gradient
        parameter.requires_grad_(False)
    return {"adversarial": _counted(judge), "discriminator": learned}


@cache
def _teacher(name: str, size: int, patch_size: int) -> tuple[int, int]:
    """Return what a teacher's forward pass costs, and its width."""
    with torch.device("meta"):
        teacher = build_features(name, random=True, image_size=size, patch_size=patch_size)
    return _counted(lambda: teacher.tokens(_image(size), size // patch_size)), teacher.width


def _alignment(loss: LossConfig, config: TokenizerConfig) -> int:
    teacher, width = _teacher(loss.alignment, config.image_size, config.patch_size)
    with torch.device("meta"):
        aligned = Alignment(config.dim, config.tokens, config.patches, width, width_hidden=loss.alignment_width)
        z, features = torch.empty(1, config.tokens, config.dim), torch.empty(1, config.patches, width)
    return teacher + _counted(lambda: aligned(z.requires_grad_(), features).sum().backward())
