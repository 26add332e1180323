"""Tokenizer sizes (Sec. 4.1: SoftVQ-S, -B, -BL, -L) as rows of a table, and the configuration that they fill in."""

import dataclasses
from dataclasses import dataclass

from softvq_lib.config import at_least, one_of
from softvq_lib.tokenizers.softvq import temperatures

_DINOV2 = "vit_{}_patch14_dinov2.lvd142m"


def _small(width: int, depth: int, heads: int, init_values: float | None = None) -> dict:
    # timm reads None as "what the architecture has": DINOv2's LayerScale, which starts at 1e-5 and needs thousands of
    # steps to open. The study's trunks have it; `nano` and `mini-plain` are those without.
    return {"embed_dim": width, "depth": depth, "num_heads": heads, "init_values": init_values}


# encoder, decoder: timm names; *_overrides: what differs from the named architecture.
# The paper's sizes carry 4 codebooks of 8192 (the release's setting); tokens x dim = 2048 (Tab. 3).
# patch: (largest side in pixels, least patches across), from which the default patch size follows.
_FULL = {"image_size": 256, "patch": (16, 8), "dim": None, "codebook_size": 8192, "codebooks": 4, "overrides": {}}


# What the small ones share.
_SMALL = {
    "encoder": _DINOV2.format("small"),
    "decoder": _DINOV2.format("small"),
    "image_size": 32,
    "patch": (8, 4),
    "dim": 16,
    "codebooks": 1,
}


def _mini(encoder: tuple[int, int, int], decoder: tuple[int, int, int], init_values: float | None = None) -> dict:
    nets = {"overrides": _small(*encoder, init_values), "decoder_overrides": _small(*decoder, init_values)}
    return {**_SMALL, **nets, "codebook_size": 1024}


# Width, depth and heads of encoder and decoder: four sizes that differ as S, B, BL and L do; `mini` stands for B.
_MINI = {
    "": ((160, 4, 5), (160, 4, 5)),
    "-s": ((96, 3, 3), (96, 3, 3)),
    "-bl": ((160, 4, 5), (224, 6, 7)),
    "-l": ((224, 6, 7), (224, 6, 7)),
}
PRESETS: dict[str, dict] = {
    "tiny": {**_SMALL, "overrides": _small(64, 2, 2), "codebook_size": 256},
    # `tiny` without LayerScale. It learns faster in the first two thousand steps.
    "nano": {**_SMALL, "overrides": _small(64, 2, 2, init_values=0.0), "codebook_size": 256},
    **{f"mini{size}": _mini(*nets) for size, nets in _MINI.items()},
    "mini-plain": _mini(*_MINI[""], init_values=0.0),  # `mini` without LayerScale
    "s": {"encoder": _DINOV2.format("small"), "decoder": _DINOV2.format("small"), **_FULL},
    "b": {"encoder": _DINOV2.format("base"), "decoder": _DINOV2.format("base"), **_FULL},
    "bl": {"encoder": _DINOV2.format("base"), "decoder": _DINOV2.format("large"), **_FULL},
    "l": {"encoder": _DINOV2.format("large"), "decoder": _DINOV2.format("large"), **_FULL},
}

# Short names of encoders that `TokenizerConfig.encoder` may name, beside any timm name (Tab. 4).
ENCODERS = {
    "dinov2-s": _DINOV2.format("small"),
    "dinov2-b": _DINOV2.format("base"),
    "dinov2-l": _DINOV2.format("large"),
    "clip-b": "vit_base_patch16_clip_224.openai",
    "eva02-b": "eva02_base_patch16_clip_224.merged2b",
}

QUANTIZERS = ("ae", "kl", "vq", "softvq", "gmmvq")
_WITH_CODEBOOK = ("vq", "softvq", "gmmvq")

MAX_TOKENS = 1024
MAX_PATCHES = 4096


@dataclass(frozen=True)
class TokenizerConfig:
    """What a tokenizer is. None means "as the preset says"; `resolved` fills it in.

    Attributes:
        preset: Row of `PRESETS`.
        quantizer: What stands between encoder and decoder: `ae`, `kl`, `vq`, `softvq` or `gmmvq`.
        tokens: Latent tokens l, 1 to 1024, divisible by `codebooks`.
        dim: Latent channels d. None: the preset's, or 2048 / tokens at 256 px and above.
        codebook_size: Codes k of one codebook.
        codebooks: Segments of consecutive tokens with a codebook each.
        posterior: Form of the soft assignment, see `softvq_lib.tokenizers.softvq`.
        temperature: tau of Eq. 4, above 0. None: 0.07, but 0.5 for the posterior `squared`.
        entropy_temperature: Temperature of the KL term's posterior. None: 0.01 for `released` and for VQ, tau / 7
            for the other posteriors. GMMVQ has none of its own.
        product: Groups that the channels are cut into, a quantizer each; 1 is none. Divides `dim`.
        residual: Levels, each quantizing what the one before left over; 1 is none. With `product`, in each group.
        vq_ema: VQ's codewords are moving averages of their tokens with this decay. None: they follow their gradient.
        vq_revive: VQ's codes are restarted below this share of an even use. None: never.
        vq_kmeans: Iterations of k-means on the first batch, where VQ's codewords then start. 0: none.
        image_size: Height and width in pixels.
        patch_size: Side of a patch in pixels. None: the preset's (16 for the paper's), smaller for small images.
        encoder: Network of the encoder, a short name of `ENCODERS` or a timm name, whole: its own width and depth,
            also where the preset makes its networks smaller. The decoder stays the preset's. None: the preset's.
        pretrained: Start the encoder from the published weights of its timm name, where the network allows.
    """

    preset: str = "tiny"
    quantizer: str = "softvq"
    tokens: int = 32
    dim: int | None = None
    codebook_size: int | None = None
    codebooks: int | None = None
    posterior: str = "released"
    temperature: float | None = None
    entropy_temperature: float | None = None
    product: int = 1
    residual: int = 1
    vq_ema: float | None = None
    vq_revive: float | None = None
    vq_kmeans: int = 0
    image_size: int | None = None
    patch_size: int | None = None
    encoder: str | None = None
    pretrained: bool = False

    def __post_init__(self):
        one_of("preset", self.preset, PRESETS)
        one_of("quantizer", self.quantizer, QUANTIZERS)
        at_least("tokens", self.tokens, 1)
        if self.tokens > MAX_TOKENS:
            raise ValueError(f"tokens={self.tokens} is more than {MAX_TOKENS}, the most that is supported.")
        for name in ("dim", "codebook_size", "codebooks", "image_size", "patch_size", "product", "residual"):
            at_least(name, getattr(self, name), 1)
        at_least("temperature", self.temperature, 0, above=True)
        at_least("entropy_temperature", self.entropy_temperature, 0, above=True)
        for name in ("vq_ema", "vq_revive", "vq_kmeans"):
            at_least(name, getattr(self, name), 0)
        if self.vq_ema is not None and self.vq_ema >= 1:
            raise ValueError(f"vq_ema={self.vq_ema!r} is not allowed: give a decay from 0 to below 1, such as 0.99.")
        for name in ("product", "residual"):
            if getattr(self, name) > 1 and not self.has_codebook:
                raise ValueError(
                    f"{name}={getattr(self, name)} needs a codebook, which quantizer={self.quantizer!r} has not: "
                    f"choose the quantizer among {', '.join(_WITH_CODEBOOK)}, or {name}=1."
                )
        for name in ("vq_ema", "vq_revive", "vq_kmeans"):
            if getattr(self, name) and self.quantizer != "vq":
                raise ValueError(
                    f"{name}={getattr(self, name)} is for quantizer='vq' alone, not {self.quantizer!r}: leave it out."
                )

    @property
    def has_codebook(self) -> bool:
        """Whether the quantizer has one."""
        return self.quantizer in _WITH_CODEBOOK

    @property
    def hat_dim(self) -> int:
        """Channels of the encoder's output: d, but for KL a mean and a variance of each."""
        return 2 * self.dim if self.quantizer == "kl" else self.dim

    @property
    def patches(self) -> int:
        """Number of image patches n."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def encoder_network(self) -> tuple[str, dict]:
        """Timm name of the encoder's network, and what differs from the named architecture."""
        row = PRESETS[self.preset]
        if self.encoder is None:
            return row["encoder"], row["overrides"]
        return ENCODERS.get(self.encoder, self.encoder), {}

    @property
    def decoder_network(self) -> tuple[str, dict]:
        """Timm name of the decoder's network, and what differs from the named architecture."""
        row = PRESETS[self.preset]
        return row["decoder"], row.get("decoder_overrides", row["overrides"])

    def resolved(self) -> "TokenizerConfig":
        """Return the configuration with every None filled in, but for `encoder`.

        There None stays, and stands also for the preset's own network by its name: two spellings of one tokenizer.

        Raises:
            ValueError: when image_size is not divisible by patch_size, tokens not by codebooks, dim not by product, or
                dim cannot be told.
        """
        row = PRESETS[self.preset]
        image_size = self.image_size or row["image_size"]
        patch_size = self.patch_size or _patch_size(image_size, *row["patch"])
        if image_size % patch_size:
            divisors = [p for p in range(1, 65) if image_size % p == 0]
            raise ValueError(
                f"image_size={image_size} is not divisible by patch_size={patch_size}: "
                f"choose patch_size among {', '.join(map(str, divisors))}, or another image_size."
            )
        network, overrides = self.encoder_network
        if self.pretrained and overrides:
            full = ", ".join(name for name, other in PRESETS.items() if not other["overrides"])
            raise ValueError(
                f"preset={self.preset!r} has no pretrained weights of its size: choose among {full}, or name a whole "
                "encoder, encoder='dinov2-s' for example."
            )
        codebooks = self.codebooks or (row["codebooks"] if self.has_codebook else 1)
        if self.tokens % codebooks:
            divisors = [n for n in range(1, self.tokens + 1) if self.tokens % n == 0]
            raise ValueError(
                f"tokens={self.tokens} is not divisible by codebooks={codebooks}, which share the tokens in equal "
                f"segments: choose codebooks among {', '.join(map(str, divisors))}, or another number of tokens."
            )
        dim = self.dim or _dim(self.tokens, image_size, row["dim"])
        if dim % self.product:
            divisors = [n for n in range(1, dim + 1) if dim % n == 0]
            raise ValueError(
                f"dim={dim} is not divisible by product={self.product}, the groups that share the channels: choose "
                f"product among {', '.join(map(str, divisors))}, or another dim."
            )
        # VQ's entropy term has the release's temperature; there and in GMMVQ the form of the posterior plays no part.
        posterior = self.posterior if self.quantizer == "softvq" else "released"
        temperature, entropy_temperature = temperatures(posterior, self.temperature, self.entropy_temperature)
        config = dataclasses.replace(
            self,
            image_size=image_size,
            patch_size=patch_size,
            codebooks=codebooks,
            codebook_size=self.codebook_size or row["codebook_size"],
            dim=dim,
            temperature=temperature,
            entropy_temperature=entropy_temperature,
            encoder=None if (network, overrides) == (row["encoder"], row["overrides"]) else network,
        )
        if config.patches > MAX_PATCHES:
            raise ValueError(
                f"image_size={image_size} with patch_size={patch_size} makes {config.patches} patches, more than "
                f"{MAX_PATCHES}: choose a larger patch_size."
            )
        return config


def _patch_size(image_size: int, largest: int, across: int) -> int:
    limit = max(1, min(largest, image_size // across))
    return max(p for p in range(1, limit + 1) if image_size % p == 0)


def _dim(tokens: int, image_size: int, row: int | None) -> int:
    if image_size >= 256 and 2048 % tokens == 0:
        return 2048 // tokens
    if image_size < 256 and row:
        return row
    raise ValueError(
        f"dim has no default for tokens={tokens} at image_size={image_size} (the paper's rule, dim = 2048 / tokens, "
        "is for 256 px and above and token counts that divide 2048): give dim, for example dim=32."
    )
