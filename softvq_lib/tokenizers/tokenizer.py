"""The tokenizer: encoder, quantizer, decoder (Sec. 3.1, Fig. 2)."""

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import ModelCard, PyTorchModelHubMixin
from torch import Tensor, nn

from softvq_lib.config import strict
from softvq_lib.draws import Draws
from softvq_lib.tokenizers import loading
from softvq_lib.tokenizers.assemble import build_quantizer
from softvq_lib.tokenizers.card import card
from softvq_lib.tokenizers.presets import TokenizerConfig
from softvq_lib.tokenizers.quantizer import Quantizer
from softvq_lib.tokenizers.vit import Decoder, Encoder

log = logging.getLogger(__name__)


@dataclass
class Code:
    """What `Tokenizer.encode` returns.

    Attributes:
        z: Latent tokens for the decoder and the generators, (b, l, d). For KL a sample in training, else the mean.
        z_hat: The encoder's output before quantization, (b, l, d); (b, l, 2 d) for KL, means and log variances.
        quantizer: That made it, for what is computed when asked for.
        losses: The quantizer's losses by name, unweighted scalars; empty in evaluation.
    """

    z: Tensor
    z_hat: Tensor
    quantizer: Quantizer = field(repr=False)
    losses: dict[str, Tensor] = field(default_factory=dict)

    def posterior(self) -> Tensor:
        """Return q(k|x), (b, l, k): computed when asked for, since it is the largest tensor of all.

        With product or residual quantization (b, l, groups, k).

        Raises:
            ValueError: for AE and KL, which have no codebook.
        """
        return self.quantizer.log_posterior(self.z_hat).exp()

    def indices(self) -> Tensor:
        """Return each token's most likely code, local to its codebook: (b, l), or (b, l, groups).

        Raises:
            ValueError: for AE and KL, which have no codebook.
        """
        return self.quantizer.indices(self.z_hat)

    def sample(self, draws: Draws = None) -> Tensor:
        """Draw latents from KL's posterior, (b, l, d).

        Raises:
            ValueError: for the other quantizers, whose z is no random draw.
        """
        return self.quantizer.sample(self.z_hat, draws)


class Tokenizer(nn.Module, PyTorchModelHubMixin):
    """Image tokenizer with l latent tokens of d channels.

    Args:
        config: A `TokenizerConfig`; what is None in it is taken from its preset.
    """

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        config = config.resolved()
        self.config = config
        # What save_pretrained writes: nothing left to defaults, and no download when it is loaded again.
        self._hub_mixin_config = replace(config, pretrained=False)
        shape = (config.image_size, config.patch_size, config.tokens)
        network, overrides = config.encoder_network
        self.encoder = Encoder(network, *shape, overrides, pretrained=config.pretrained)
        network, overrides = config.decoder_network
        self.decoder = Decoder(network, *shape, overrides)
        self.from_latent = nn.Linear(config.dim, self.decoder.width)
        self.to_latent = nn.Linear(self.encoder.width, config.hat_dim)
        # Last, so that one seed gives all quantizers the same trunk to start from.
        self.quantizer = build_quantizer(config)

    @classmethod
    def from_preset(cls, preset: str, **overrides) -> "Tokenizer":
        """Build a tokenizer from a row of `PRESETS`, e.g. `from_preset("s", tokens=64)`.

        Raises:
            ValueError: for an unknown preset or setting, with the nearest valid name.
        """
        return cls(strict(TokenizerConfig, {"preset": preset, **overrides}))

    def encode(self, images: Tensor, draws: Draws = None) -> Code:
        """Map images (b, 3, height, width) in [-1, 1] to a `Code`.

        Args:
            images: (b, 3, `image_size`, `image_size`), float, in [-1, 1].
            draws: For what quantizers draw in training: KL's noise, VQ's new codewords. None: torch's own.

        Raises:
            ValueError: for images of another shape than the configuration's, or an encoder output that is not finite.
        """
        size = self.config.image_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size):
            raise ValueError(
                f"images of shape {tuple(images.shape)} do not fit this tokenizer: give (batch, 3, {size}, {size})."
            )
        z_hat = self.to_latent(self.encoder(images))  # (b, l, d)
        z, losses = self.quantizer(z_hat, draws)
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

    def forward(self, images: Tensor, draws: Draws = None) -> tuple[Tensor, Code]:
        """Return the reconstruction (b, 3, height, width) of images in [-1, 1], and their `Code`.

        See `encode` and `decode`.
        """
        code = self.encode(images, draws)
        return self.decode(code.z), code

    def set_gradient_checkpointing(self, enable: bool = True) -> None:
        """Choose whether a backward pass finds each transformer block's input alone, and computes the rest again.

        Results are the same; training needs less memory, and runs the blocks twice.
        """
        for half in (self.encoder, self.decoder):
            half.vit.set_grad_checkpointing(enable)

    # What config.json says beside the configuration: mean and standard deviation of the latents over the data, the name
    # of the published tokenizer that the weights come from, and what it was trained on, a `softvq_lib.cards.Trained` as
    # dictionary, which is to be set to None by who trains it further. None where unknown.
    latent_mean: float | None = None
    latent_std: float | None = None
    origin: str | None = None
    trained: dict | None = None

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> "Tokenizer":
        """Load a saved tokenizer, this library's or one that the paper's authors published.

        Args:
            source: Folder with config.json and model.safetensors, or hub name, e.g. "SoftVQVAE/softvq-l-64". The
                authors' are told from ours by the settings in their config.json; `latent_mean` and `latent_std` come
                from there too, or from the published table by the repository's or folder's name.
            revision: Branch, tag or commit of a hub name.
            cache_dir: Folder for downloads; None: the hub's own.
            token: Access token for a private repository.
            force_download: Download again what the cache holds.
            local_files_only: Take a hub name from the cache alone.

        Returns:
            A tokenizer in evaluation mode on the CPU, in fp32.

        Raises:
            ValueError: for a missing folder or file, a pickle, a damaged file, an unsupported or unknown setting, or
                tensors that contradict the configuration.
            OSError: when the hub cannot be reached, or does not know the name.
        """
        hub = {"revision": revision, "cache_dir": cache_dir, "token": token}
        return loading.load(cls, source, **hub, force_download=force_download, local_files_only=local_files_only)

    def _save_pretrained(self, save_directory: Path) -> None:
        # Called by save_pretrained and push_to_hub, which come from the hub's class.
        loading.save(self, save_directory)

    def generate_model_card(self, *args: object, **kwargs: object) -> ModelCard:
        """Return the card that `save_pretrained` and `push_to_hub` write as README.md, or keep somebody's own."""
        return card(self)
