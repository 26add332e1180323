"""The model card that goes with a saved tokenizer: what it is, how to load it, licence and citation."""

from dataclasses import asdict

from huggingface_hub import ModelCard, ModelCardData
from torch import nn

_TEXT = """\
# Image tokenizer with {tokens} latent tokens of {dim} channels

A tokenizer after *SoftVQ-VAE: Efficient 1-Dimensional Continuous Tokenizer* (arXiv:2412.10958). It maps an image of
{image_size} x {image_size} pixels to {tokens} continuous latent tokens of {dim} channels, and back. It has
{parameters:.2f} million parameters. It was saved by `softvq_lib`, the library of the Python package softvq-book.

## Use

```python
import torch
from softvq_lib import Tokenizer

tokenizer = Tokenizer.from_pretrained("the folder or hub name of this model")
images = torch.zeros(1, 3, {image_size}, {image_size})  # values in [-1, 1]
with torch.no_grad():
    z = tokenizer.encode(images).z  # (1, {tokens}, {dim})
    restored = tokenizer.decode(z)  # (1, 3, {image_size}, {image_size})
```

{statistics}

## Configuration

| setting | value |
|---|---|
{rows}

## Licence

{licence}

## Citation

```bibtex
@article{{chen2024softvqvae,
  title={{SoftVQ-VAE: Efficient 1-Dimensional Continuous Tokenizer}},
  author={{Chen, Hao and Wang, Ze and Li, Xiang and Sun, Ximeng and Chen, Fangyi and Liu, Jiang and Wang, Jindong and
          Raj, Bhiksha and Liu, Zicheng and Barsoum, Emad}},
  journal={{arXiv preprint arXiv:2412.10958}},
  year={{2024}}
}}
```
"""


def card(model: nn.Module, data: ModelCardData) -> ModelCard:
    """Write the card of a tokenizer.

    Args:
        model: The tokenizer.
        data: The card's head: library, tags and licence. The licence is left out for weights that come from the
            authors, who name none.
    """
    config = asdict(model.config)
    head = ModelCardData(**data.to_dict())
    licence = "Apache-2.0. The data that it was trained on may set terms of its own."
    if model.origin:
        head.license = None
        licence = (
            f"The weights come from `{model.origin}`, published by the paper's authors without a licence: ask them "
            "before you pass the weights on."
        )
    statistics = "Mean and standard deviation of its latents are not recorded."
    if model.latent_std is not None:
        statistics = (
            f"Generators see latents as (z - mean) / std, with mean {model.latent_mean} and std {model.latent_std}: "
            "`tokenizer.latent_mean` and `tokenizer.latent_std`."
        )
    text = _TEXT.format(
        tokens=config["tokens"],
        dim=config["dim"],
        image_size=config["image_size"],
        parameters=sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        statistics=statistics,
        rows="\n".join(f"| {name} | {value} |" for name, value in config.items() if value is not None),
        licence=licence,
    )
    return ModelCard(f"---\n{head.to_yaml()}\n---\n\n{text}")
