"""A tokenizer as a model of diffusers: `encode(x).latent_dist`, `decode(z).sample`, latents (b, d, h, w) with h w = l.

Pipelines and denoisers of diffusers know latents as maps of channels, so the l tokens are laid out in `grid` = (h, w),
row by row: token i stands at row i // w, column i % w. By default that is the most nearly square one (64 tokens: 8 x 8,
32 tokens: 4 x 8); (1, l) is one row. Which tokens are neighbours means nothing: positions tell tokens apart, not places
in the image.

Latents are normalised inside, as diffusers' AutoencoderRAE does: `encode` gives (z - latent_mean) / latent_std and
`decode` takes it, so that `scaling_factor` is 1 and `shift_factor` 0. A pipeline is then right whether it applies both,
one or none of them. Tokenizers whose statistics are not known have mean 0 and std 1, and their latents are z itself.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from softvq_lib import cards
from softvq_lib.config import strict
from softvq_lib.conversion.convert import Statistics, relative
from softvq_lib.data.latents import tokenizer_hash
from softvq_lib.tokenizers import Tokenizer, TokenizerConfig
from softvq_lib.tokenizers.card import card

try:
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution, IdentityDistribution
    from diffusers.models.modeling_outputs import AutoencoderKLOutput
    from diffusers.models.modeling_utils import ModelMixin
except ImportError as error:
    raise ImportError(f"AutoencoderSoftVQ needs diffusers ({error}): pip install 'softvq-book[export]'.") from error

_STUB = "autoencoder_softvq"
_STUB_TEXT = '''"""The class of this model, for `diffusers.AutoModel`; it comes with `pip install softvq-book`."""

from softvq_lib.conversion.autoencoder import AutoencoderSoftVQ

__all__ = ["AutoencoderSoftVQ"]
'''
_USE = """\
```python
import torch
from softvq_lib.conversion.autoencoder import AutoencoderSoftVQ

vae = AutoencoderSoftVQ.from_pretrained(".")  # this folder, or its name on the hub
images = torch.zeros(1, 3, {image_size}, {image_size})  # values in [-1, 1]
with torch.no_grad():
    latents = vae.encode(images).latent_dist.sample()  # (1, {dim}, {rows}, {columns}), normalised
    restored = vae.decode(latents).sample  # (1, 3, {image_size}, {image_size})
```

`diffusers.AutoModel.from_pretrained(".", trust_remote_code=True)` gives the same, and a pipeline takes it as its `vae`.
The {tokens} tokens are laid out row by row. {statistics}"""


def nearest_square(tokens: int) -> tuple[int, int]:
    """Return rows and columns of the most nearly square layout of so many tokens; no more rows than columns."""
    rows = max(n for n in range(1, math.isqrt(tokens) + 1) if tokens % n == 0)
    return rows, tokens // rows


class AutoencoderSoftVQ(ModelMixin, ConfigMixin):
    """A tokenizer that pipelines of diffusers take as their VAE.

    Args:
        tokenizer_config: Fields of `TokenizerConfig`.
        latent_mean: Mean of the latents over the data, a number or one a channel.
        latent_std: Their standard deviation, alike, above 0.
        grid: Rows and columns that the tokens are laid out in, (h, w) with h w = l. None: the most nearly square.
        scaling_factor: For pipelines, which multiply latents with it; 1, see above.
        shift_factor: For pipelines; 0.
        latent_channels: For pipelines; d.
        sample_size: For pipelines; height and width of images in pixels.
        tokenizer_hash: Fingerprint of the tokenizer.
        origin: Name of the published tokenizer that the weights come from.
        trained: As in `softvq_lib.cards.Trained`.
        auto_map: Where `diffusers.AutoModel` finds this class.

    Raises:
        ValueError: for settings that are no tokenizer's, a grid that does not fit, or statistics that are none.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        tokenizer_config: dict,
        latent_mean: float | list[float] = 0.0,
        latent_std: float | list[float] = 1.0,
        grid: Sequence[int] | None = None,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        latent_channels: int | None = None,
        sample_size: int | None = None,
        tokenizer_hash: str | None = None,
        origin: str | None = None,
        trained: dict | None = None,
        auto_map: dict | None = None,
    ):
        super().__init__()
        config = strict(TokenizerConfig, tokenizer_config).resolved()
        grid = nearest_square(config.tokens) if grid is None else tuple(grid)
        if len(grid) != 2 or min(grid) < 1 or grid[0] * grid[1] != config.tokens:
            fitting = [(n, config.tokens // n) for n in range(1, config.tokens + 1) if config.tokens % n == 0]
            raise ValueError(
                f"grid={grid} does not hold {config.tokens} tokens: choose among {', '.join(map(str, fitting))}."
            )
        for name, value in (("latent_mean", latent_mean), ("latent_std", latent_std)):
            values = value if isinstance(value, list | tuple) else [value]
            fits = len(values) == (config.dim if isinstance(value, list | tuple) else 1)
            if not fits or not all(math.isfinite(x) for x in values) or (name == "latent_std" and min(values) <= 0):
                above = " above 0" if name == "latent_std" else ""
                raise ValueError(f"{name}={value!r} is neither a finite number{above} nor {config.dim} of them.")
        self.register_to_config(
            grid=list(grid),
            latent_channels=config.dim,
            sample_size=config.image_size,
            auto_map={"AutoModel": f"{_STUB}.{type(self).__name__}"},
        )
        self.tokenizer = Tokenizer(config)
        self.tokenizer.origin, self.tokenizer.trained = origin, trained

    @classmethod
    def from_tokenizer(
        cls, tokenizer: Tokenizer, statistics: Statistics | None = None, grid: Sequence[int] | None = None
    ) -> "AutoencoderSoftVQ":
        """Copy a tokenizer; in evaluation mode, on its device.

        Args:
            tokenizer: It stays as it is.
            statistics: Mean and standard deviation of its latents. None: those that it came with, or 0 and 1.
            grid: As above.
        """
        if statistics is None:
            known = tokenizer.latent_std is not None
            statistics = Statistics(tokenizer.latent_mean or 0.0, tokenizer.latent_std, True) if known else Statistics()
        with torch.random.fork_rng(devices=[]):
            model = cls(
                asdict(replace(tokenizer.config, pretrained=False)),
                statistics.mean,
                statistics.std,
                grid,
                tokenizer_hash=tokenizer_hash(tokenizer),
                origin=tokenizer.origin,
                trained=tokenizer.trained,
            )
        model.tokenizer.load_state_dict(tokenizer.state_dict())
        return model.to(next(tokenizer.parameters()).device).eval()

    def _statistics(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the kind of tokens (b, l, d), () or (d,) each."""
        return tuple(torch.tensor(x).to(z) for x in (self.config.latent_mean, self.config.latent_std))

    def to_grid(self, z: Tensor) -> Tensor:
        """Lay out tokens (b, l, c) as maps (b, c, h, w)."""
        return rearrange(z, "b (h w) c -> b c h w", h=self.config.grid[0])

    def to_tokens(self, maps: Tensor) -> Tensor:
        """Undo `to_grid`: (b, c, h, w) to (b, l, c).

        Raises:
            ValueError: for maps of another shape than the grid's.
        """
        shape = (self.config.latent_channels, *self.config.grid)
        if maps.ndim != 4 or tuple(maps.shape[1:]) != shape:
            wanted = ", ".join(map(str, shape))
            raise ValueError(f"latents of shape {tuple(maps.shape)} do not fit: give (batch, {wanted}).")
        return rearrange(maps, "b c h w -> b (h w) c")

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple:
        """Map images (b, 3, height, width) in [-1, 1] to the distribution of their normalised latents, (b, d, h, w).

        It is the Gaussian posterior for KL; for all others latents are a function of the image, and `sample()` gives
        the same as `mode()`.
        """
        code = self.tokenizer.encode(x)
        if self.tokenizer.config.quantizer == "kl":
            mean, log_variance = self.tokenizer.quantizer.moments(code.z_hat)
            shift, scale = self._statistics(mean)
            moments = torch.cat([(mean - shift) / scale, log_variance - 2 * scale.log()], dim=-1)  # (b, l, 2 d)
            found = DiagonalGaussianDistribution(self.to_grid(moments).to(x.dtype))
        else:
            shift, scale = self._statistics(code.z)
            found = IdentityDistribution(self.to_grid((code.z - shift) / scale).to(x.dtype))
        return AutoencoderKLOutput(latent_dist=found) if return_dict else (found,)

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple:
        """Map normalised latents (b, d, h, w) to images (b, 3, height, width), about [-1, 1], not clamped.

        Args:
            z: The latents.
            return_dict: Else a tuple.
            generator: Not used; some pipelines give one.
        """
        tokens = self.to_tokens(z)
        shift, scale = self._statistics(tokens)
        images = self.tokenizer.decode(tokens * scale + shift)
        return DecoderOutput(sample=images) if return_dict else (images,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple:
        """Return the reconstruction of images (b, 3, height, width), through the mode or a sample of their latents."""
        found = self.encode(sample).latent_dist
        return self.decode(found.sample(generator) if sample_posterior else found.mode(), return_dict)

    def save_pretrained(self, save_directory: str | Path, *args: object, **kwargs: object) -> None:
        """Write weights and settings as every model of diffusers, the class for `AutoModel`, and the model card."""
        super().save_pretrained(save_directory, *args, **kwargs)
        folder = Path(save_directory)
        (folder / f"{_STUB}.py").write_text(_STUB_TEXT)
        config, known = self.tokenizer.config, self.config
        said = "Mean and standard deviation of its latents are not known, so they are not normalised."
        if (known.latent_mean, known.latent_std) != (0.0, 1.0):
            said = (
                f"They are (z - mean) / std of its tokens z, with mean {known.latent_mean} and std {known.latent_std}."
            )
        use = _USE.format(**asdict(config), rows=known.grid[0], columns=known.grid[1], statistics=said)
        cards.write(card(self.tokenizer, use=use, library="diffusers"), folder)


def write(tokenizer: Tokenizer, folder: Path, statistics: Statistics, *, grid: Sequence[int] | None) -> None:
    """Write a tokenizer as a folder of diffusers."""
    AutoencoderSoftVQ.from_tokenizer(tokenizer, statistics, grid).save_pretrained(folder)


def differences(tokenizer: Tokenizer, folder: Path, statistics: Statistics, seed: int = 0) -> dict[str, float]:
    """Load the folder and return by how much its output differs from the tokenizer's, by the name of the output.

    Args:
        tokenizer: On the CPU, in evaluation mode.
        folder: Where the model lies.
        statistics: Of the latents.
        seed: Of the images, uniform noise.
    """
    model = AutoencoderSoftVQ.from_pretrained(folder).eval()
    size = tokenizer.config.image_size
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    with torch.no_grad():
        z = tokenizer.encode(images).z
        found = model.encode(images).latent_dist.mode()
        normalised = (z - torch.tensor(statistics.mean)) / torch.tensor(statistics.std)
        return {
            "latents": relative(model.to_tokens(found), normalised),
            "images": relative(model.decode(found).sample, tokenizer.decode(z)),
        }
