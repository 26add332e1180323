"""Parameters of every tokenizer of Tab. 3 and Sec. 4.1, counted without training: ours beside the paper's."""

from collections.abc import Callable

import torch
from torch import nn

from softvq_lib.config import nearest
from softvq_lib.tokenizers import Tokenizer

METRICS = ("parameters", "tokenizer_parameters")  # of Sec. 4.1, and of Tab. 3
NOT_BUILT = "not built: install softvq-book[bench]"


def parameter_table(paper_rows: list[dict]) -> list[dict]:
    """Count the tokenizers that rows of the paper name; nothing is allocated, so this takes seconds.

    Args:
        paper_rows: Rows as `results.read_paper` returns them; those of other metrics than `METRICS` are left out. A
            row names a `preset` (with `quantizer`, `tokens`, `dim`; 64 tokens of SoftVQ by default) or, for a
            tokenizer that is not ours, a `model` of `MODELS` (with `tokens` and `dim`).

    Returns:
        One entry a row with `what`, `tokens`, `dim`, `ours` (None where the package that builds it is missing),
        `ours_with_unused` (with the patch embedding that the released decoder carries and never uses; None where
        there is no such part), `paper` in millions, `place` in the paper, and a `note` on what is counted. After
        each TiTok row another one: the same latents on our trunk, for which the paper has no number. Rows of a
        preset in Tab. 3 have `in_tab_3` too: the count that gives the printed number.

    Raises:
        ValueError: for a row that names neither a preset nor a known model.
    """
    table = []
    for row in paper_rows:
        if row["metric"] not in METRICS:
            continue
        known = {"place": row["place"], "paper": row["value"]}
        if "preset" in row:
            counted = _ours(row["preset"], row.get("quantizer", "softvq"), row.get("tokens", 64), row.get("dim"))
            tab_3, single = counted.pop("tab_3"), counted.pop("in_tab_3")
            if row["metric"] == "tokenizer_parameters":
                counted |= {"note": f"{counted['note']}; {tab_3}", "in_tab_3": single}
            table.append({"what": row["what"], **counted, **known})
            continue
        if row.get("model") not in MODELS:
            raise ValueError(
                f"{row['what']!r} names no preset, and model={row.get('model')!r}"
                f"{nearest(str(row.get('model')), MODELS)}; allowed: {', '.join(MODELS)}."
            )
        shape = {"tokens": row["tokens"], "dim": row["dim"]}
        try:
            ours, note = MODELS[row["model"]](**shape)
        except ImportError:
            ours, note = None, NOT_BUILT
        table.append({"what": row["what"], **shape, "ours": ours, "ours_with_unused": None, **known, "note": note})
        if row["model"].startswith("titok-bl-"):
            counted = _ours("bl", row["model"].removeprefix("titok-bl-"), **shape)
            del counted["tab_3"], counted["in_tab_3"]
            table.append({"what": f"{row['what']}, our trunk", **counted, "place": row["place"], "paper": None})
    return table


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _ours(preset: str, quantizer: str, tokens: int, dim: int | None) -> dict:
    with torch.device("meta"):
        tokenizer = Tokenizer.from_preset(preset, quantizer=quantizer, tokens=tokens, dim=dim)
    config = tokenizer.config
    count = _count(tokenizer)
    with_unused = count + tokenizer.decoder.width * (3 * config.patch_size**2 + 1)
    # Tab. 3 says 46 M for all twelve S rows, which this sum gives; the paper does not say that it counts so. The head
    # of Eq. 5 is the release's: two hidden layers of 1024, and the 768 features of DINOv2-B.
    head = _linear(config.dim, 1024) + _linear(1024, 1024) + _linear(1024, 768)
    single = with_unused + head
    note, parts = "no codebook", "the alignment head"
    if config.has_codebook:
        note, parts = f"{config.codebooks} codebooks of {config.codebook_size} codes", "one codebook, " + parts
        single -= (config.codebooks - 1) * config.codebook_size * config.dim
    return {
        "tokens": config.tokens,
        "dim": config.dim,
        "ours": count,
        "ours_with_unused": with_unused,
        "note": note,
        "in_tab_3": single,
        "tab_3": f"with {parts} and unused parts {single / 1e6:.2f} M",
    }


# -- tokenizers that are not ours, by the shapes of their layers -----------------------------------------------------


def _linear(inputs: int, outputs: int) -> int:
    return (inputs + 1) * outputs


def block(width: int) -> int:
    """Parameters of a pre-norm transformer block with biases, an MLP of 4 widths, no LayerScale."""
    norms = 2 * 2 * width
    attention = _linear(width, 3 * width) + _linear(width, width)
    return norms + attention + _linear(width, 4 * width) + _linear(4 * width, width)


def _titok_vit(width: int, depth: int, patches: int, tokens: int) -> int:
    """Blocks, a norm before and after them, class token, positions of class token and patches and of latents."""
    return depth * block(width) + 2 * 2 * width + width + (1 + patches) * width + tokens * width


def _titok(dim: int, tokens: int, *, outputs: int, codes: int) -> int:
    """TiTok-BL at 256 px and patch 16: encoder 768 wide with 12 blocks, decoder 1024 wide with 24."""
    wide, wider, patches, pixels = 768, 1024, 16**2, 3 * 16**2
    encoder = _linear(pixels, wide) + _titok_vit(wide, 12, patches, tokens) + tokens * wide + _linear(wide, outputs)
    mask_token, convolution = wider, 3 * (3 * 3 * 3 + 1)
    decoder = _linear(dim, wider) + mask_token + _titok_vit(wider, 24, patches, tokens) + _linear(wider, pixels)
    return encoder + decoder + convolution + codes * dim


def _titok_kl(tokens: int, dim: int) -> tuple[int, str]:
    return _titok(dim, tokens, outputs=2 * dim, codes=0), "sum over TiTok's layers; mean and log variance"


def _titok_vq(tokens: int, dim: int) -> tuple[int, str]:
    return _titok(dim, tokens, outputs=dim, codes=8192), "sum over TiTok's layers; 1 codebook of 8192 codes"


# -- tokenizers that are not ours, from diffusers' classes -----------------------------------------------------------


def _sd_vae(tokens: int, dim: int) -> tuple[int, str]:
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        model = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=dim,
        )
    return _count(model), "diffusers' AutoencoderKL as SD has it; the paper's number is not its size"


def _dc_ae(tokens: int, dim: int, *, widths: tuple[int, ...]) -> tuple[int, str]:
    from diffusers import AutoencoderDC

    late = len(widths) - 3  # stages with linear attention, after three of convolutions
    blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * late
    with torch.device("meta"):
        model = AutoencoderDC(
            latent_channels=dim,
            encoder_block_types=blocks,
            decoder_block_types=blocks,
            encoder_block_out_channels=widths,
            decoder_block_out_channels=widths,
            encoder_layers_per_block=(0, 4, 8) + (2,) * late,
            decoder_layers_per_block=(0, 5, 10) + (2,) * late,
            encoder_qkv_multiscales=((),) * len(widths),
            decoder_qkv_multiscales=((),) * len(widths),
            decoder_norm_types=("batch_norm",) * 3 + ("rms_norm",) * late,
            decoder_act_fns=("relu",) * 3 + ("silu",) * late,
        )
    return _count(model), "diffusers' AutoencoderDC as released for ImageNet"


def _dc_ae_f32(tokens: int, dim: int) -> tuple[int, str]:
    return _dc_ae(tokens, dim, widths=(128, 256, 512, 512, 1024, 1024))


def _dc_ae_f64(tokens: int, dim: int) -> tuple[int, str]:
    return _dc_ae(tokens, dim, widths=(128, 256, 512, 512, 1024, 1024, 2048))


# Name -> parameters, and a note, of a tokenizer with `tokens` latents of `dim` channels.
MODELS: dict[str, Callable[[int, int], tuple[int, str]]] = {
    "titok-bl-kl": _titok_kl,
    "titok-bl-vq": _titok_vq,
    "sd-vae": _sd_vae,
    "dc-ae-f32": _dc_ae_f32,
    "dc-ae-f64": _dc_ae_f64,
}
