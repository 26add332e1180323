"""What the model card of a generator says: what it is, how to sample it, its training and measurements."""

from collections.abc import Mapping
from dataclasses import asdict

from huggingface_hub import ModelCard

from softvq_lib import cards, weights
from softvq_lib.generators.presets import GeneratorConfig

TASK = "unconditional-image-generation"  # the hub has no task for generation by class
_NAMES = {"sit": "SiT", "dit": "DiT", "mar": "MAR"}
_ABOUT = """\
A class-conditional generator ({name}, size {size}) of {tokens} latent tokens of {dim} channels, for {classes} classes.
It belongs to the tokenizer {tokenizer}, which decodes its latents, after
*SoftVQ-VAE: Efficient 1-Dimensional Continuous Tokenizer* (arXiv:2412.10958).

{network} of depth {depth}, width {width} and {heads} heads; {parameters:.2f} million parameters. It was saved by
`softvq_lib`, the library of the Python package softvq-book."""
_USE = """\
```python
from softvq_lib import sample_generator

# This folder, or its name on the hub. The tokenizer is found by its name, or give tokenizer="its folder".
samples = sample_generator(generator=".", classes="0", columns=4)
images = samples.grid  # (4, 3, height, width) in [-1, 1], of class 0
```

It was trained on (z - mean) / std, with mean {mean} and std {std}, which `load_generator(".").normalise` does."""


def card(
    config: GeneratorConfig,
    parameters: int,
    *,
    mean: float | list,
    std: float | list,
    tokenizer: str | None,
    tokenizer_hash: str | None,
    origin: str | None,
    trained: Mapping | None,
) -> ModelCard:
    """Make the card of a generator; arguments as in `softvq_lib.generators.loading.save_generator`.

    Args:
        config: What it is.
        parameters: Their number.
        mean: Mean of its latents.
        std: Their standard deviation.
        tokenizer: Name of the tokenizer.
        tokenizer_hash: Its fingerprint.
        origin: Name of the published generator that the weights come from.
        trained: As in `softvq_lib.cards.Trained`.
    """
    named = "that is not recorded" if tokenizer is None else f"`{weights.origin(tokenizer)}`"
    named += f" (sha256 `{tokenizer_hash}`)" if tokenizer_hash else ""
    known = asdict(config)
    licence = None
    if origin:
        licence = (
            f"The weights come from `{origin}`, published by the paper's authors without a licence: ask them before "
            "you pass the weights on."
        )
    name = _NAMES[config.generator]
    return cards.make(
        title=f"{name} on {config.tokens} latent tokens of {config.dim} channels",
        model_name=f"{config.generator}-{config.size}-{config.tokens}x{config.dim}",
        about=_ABOUT.format(
            **known | {k: config.row[k] for k in ("depth", "width", "heads")},
            name=name,
            network="Encoder and decoder, each" if config.generator == "mar" else "A transformer",
            tokenizer=named,
            parameters=parameters / 1e6,
        ),
        use=_USE.format(mean=mean, std=std),
        purpose=(
            "For research: to sample latents by class, which its tokenizer decodes to images. Samples may be wrong in "
            "any way, may repeat training images, and are not photographs of anything."
        ),
        config=known,
        trained=trained,
        task=TASK,
        tags=[config.generator],
        licence=licence,
    )
