"""The tokenizer: encoder, quantizer, decoder (Sec. 3.1, Fig. 2)."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from softvq_lib.config import one_of, strict
from softvq_lib.tokenizers.presets import PRESETS, TokenizerConfig
from softvq_lib.tokenizers.softvq import SoftVQ
from softvq_lib.tokenizers.vit import Decoder, Encoder

log = logging.getLogger(__name__)


def _softvq(config: TokenizerConfig) -> SoftVQ:
    return SoftVQ(
        tokens=config.tokens,
        dim=config.dim,
        codebook_size=config.codebook_size,
        codebooks=config.codebooks,
        posterior=config.posterior,
        temperature=config.temperature,
        entropy_temperature=config.entropy_temperature,
    )


QUANTIZERS: dict[str, Callable[[TokenizerConfig], nn.Module]] = {"softvq": _softvq}


@dataclass
class Code:
    """What `Tokenizer.encode` returns.

    Attributes:
        z: Latent tokens for the decoder and the generators, (b, l, d).
        z_hat: The encoder's output before quantization, (b, l, d).
        losses: The quantizer's losses by name, unweighted scalars; empty in evaluation.
    """

    z: Tensor
    z_hat: Tensor
    quantizer: nn.Module = field(repr=False)
    losses: dict[str, Tensor] = field(default_factory=dict)

    def posterior(self) -> Tensor:
        """Return q(k|x), (b, l, k): computed when asked for, since it is the largest tensor of all."""
        return self.quantizer.log_posterior(self.z_hat).exp()


class Tokenizer(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="softvq_lib",
    license="apache-2.0",
    tags=["arxiv:2412.10958", "image-tokenizer"],
):
    """Image tokenizer with l latent tokens of d channels.

    Args:
        config: A `TokenizerConfig`; what is None in it is taken from its preset.
    """

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        config = config.resolved()
        one_of("quantizer", config.quantizer, QUANTIZERS)
        row = PRESETS[config.preset]
        self.config = config
        # What save_pretrained writes: nothing left to defaults, and no download when it is loaded again.
        self._hub_mixin_config = replace(config, pretrained=False)
        shape = (config.image_size, config.patch_size, config.tokens, row["overrides"])
        self.encoder = Encoder(row["encoder"], *shape, pretrained=config.pretrained)
        self.to_latent = nn.Linear(self.encoder.width, config.dim)
        self.quantizer = QUANTIZERS[config.quantizer](config)
        self.decoder = Decoder(row["decoder"], *shape)
        self.from_latent = nn.Linear(config.dim, self.decoder.width)

    @classmethod
    def from_preset(cls, preset: str, **overrides) -> "Tokenizer":
        """Build a tokenizer from a row of `PRESETS`, e.g. `from_preset("s", tokens=64)`.

        Raises:
            ValueError: for an unknown preset or setting, with the nearest valid name.
        """
        return cls(strict(TokenizerConfig, {"preset": preset, **overrides}))

    def encode(self, images: Tensor) -> Code:
        """Map images (b, 3, height, width) in [-1, 1] to a `Code`.

        Raises:
            ValueError: for images of another shape than the configuration's.
        """
        size = self.config.image_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size):
            raise ValueError(
                f"images of shape {tuple(images.shape)} do not fit this tokenizer: give (batch, 3, {size}, {size})."
            )
        z_hat = self.to_latent(self.encoder(images))  # (b, l, d)
        z, losses = self.quantizer(z_hat)
        return Code(z=z, z_hat=z_hat, quantizer=self.quantizer, losses=losses)

    def decode(self, z: Tensor) -> Tensor:
        """Map latent tokens (b, l, d) to images (b, 3, height, width), about [-1, 1], not clamped.

        Raises:
            ValueError: for latents of another shape than the configuration's.
        """
        shape = (self.config.tokens, self.config.dim)
        if z.ndim != 3 or tuple(z.shape[1:]) != shape:
            raise ValueError(f"latents of shape {tuple(z.shape)} do not fit: give (batch, {shape[0]}, {shape[1]}).")
        return self.decoder(self.from_latent(z))

    def forward(self, images: Tensor) -> tuple[Tensor, Code]:
        """Return the reconstruction of images and their `Code`."""
        code = self.encode(images)
        return self.decode(code.z), code
