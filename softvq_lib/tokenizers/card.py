"""What the model card of a tokenizer says: what it is, how to load it, what it was trained on and what was measured."""

from dataclasses import asdict

from huggingface_hub import ModelCard
from torch import nn

from softvq_lib import cards

TASK = "image-feature-extraction"
_ABOUT = """\
A tokenizer after *SoftVQ-VAE: Efficient 1-Dimensional Continuous Tokenizer* (arXiv:2412.10958). It maps an image of
{image_size} x {image_size} pixels to {tokens} latent tokens of {dim} channels, and back.

The encoder is a vision transformer ({encoder}) on patches of {patch_size} x {patch_size} pixels with {tokens} learnt
latent tokens appended; its outputs at these go through the quantizer, {quantizer}; the decoder is a vision transformer
({decoder}) that sees the latent tokens and one mask token a patch. Together {parameters:.2f} million parameters. It was
saved by `softvq_lib`, the library of the Python package softvq-book."""
_USE = """\
```python
import torch
from softvq_lib import Tokenizer

tokenizer = Tokenizer.from_pretrained(".")  # this folder, or its name on the hub
images = torch.zeros(1, 3, {image_size}, {image_size})  # values in [-1, 1]
with torch.no_grad():
    z = tokenizer.encode(images).z  # (1, {tokens}, {dim})
    restored = tokenizer.decode(z)  # (1, 3, {image_size}, {image_size})
```

{statistics}"""
_QUANTIZERS = {
    "ae": "which is none at all (AE)",
    "kl": "a Gaussian posterior on each token (KL); z is its mean",
    "vq": "the nearest of {codebook_size} codewords (VQ)",
    "softvq": "a soft average of {codebook_size} codewords (SoftVQ, posterior `{posterior}`)",
    "gmmvq": "a soft average of {codebook_size} codewords whose sharpness is learnt (GMMVQ)",
}


def card(model: nn.Module, *, use: str | None = None, library: str = "softvq_lib") -> ModelCard:
    """Make the card of a tokenizer.

    The head names no licence for weights that come from the authors, who name none.

    Args:
        model: The tokenizer.
        use: How it is loaded, where that is not `Tokenizer.from_pretrained`.
        library: As in `softvq_lib.cards.make`.
    """
    config = asdict(model.config)
    statistics = "Mean and standard deviation of its latents are not recorded."
    if model.latent_std is not None:
        statistics = (
            f"Generators see latents as (z - mean) / std, with mean {model.latent_mean} and std {model.latent_std}: "
            "`tokenizer.latent_mean` and `tokenizer.latent_std`."
        )
    licence = None
    if model.origin:
        licence = (
            f"The weights come from `{model.origin}`, published by the paper's authors without a licence: ask them "
            "before you pass the weights on."
        )
    return cards.make(
        title=f"Image tokenizer with {config['tokens']} latent tokens of {config['dim']} channels",
        model_name=f"{config['preset']}-{config['quantizer']}-{config['tokens']}x{config['dim']}",
        about=_ABOUT.format(
            **config | {"quantizer": _quantizer(config), "encoder": _network(model.encoder.vit)},
            decoder=_network(model.decoder.vit),
            parameters=sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        ),
        use=use or _USE.format(**config, statistics=statistics),
        purpose=(
            f"For research: to encode images, cropped and resized to {config['image_size']} x {config['image_size']} "
            "pixels, into latents on which generators are trained, and to decode latents. The way there and back loses "
            "detail."
        ),
        config=config,
        trained=model.trained,
        task=TASK,
        tags=["image-tokenizer"],
        licence=licence,
        library=library,
    )


def _network(vit: nn.Module) -> str:
    heads = vit.blocks[0].attn.num_heads
    return f"{len(vit.blocks)} blocks, width {vit.embed_dim}, {heads} heads"


def _quantizer(config: dict) -> str:
    said = _QUANTIZERS[config["quantizer"]].format(**config)
    if config["codebooks"] > 1:
        said += f", with a codebook for each of {config['codebooks']} segments of the tokens"
    if config["product"] > 1:
        said += f", in each of {config['product']} groups of channels"
    if config["residual"] > 1:
        said += f", in {config['residual']} levels, each on what the one before left over"
    return said
