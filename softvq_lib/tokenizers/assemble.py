"""From a configuration to its quantizer, product and residual quantization included."""

from collections.abc import Callable

from softvq_lib.tokenizers.ae import AE
from softvq_lib.tokenizers.gmmvq import GMMVQ
from softvq_lib.tokenizers.kl import KL
from softvq_lib.tokenizers.presets import TokenizerConfig
from softvq_lib.tokenizers.product import Product
from softvq_lib.tokenizers.quantizer import Quantizer
from softvq_lib.tokenizers.residual import Residual
from softvq_lib.tokenizers.softvq import FORMS, SoftVQ
from softvq_lib.tokenizers.vq import VQ


def _codebooks(config: TokenizerConfig, dim: int) -> dict[str, int]:
    return {
        "tokens": config.tokens,
        "dim": dim,
        "codebook_size": config.codebook_size,
        "codebooks": config.codebooks,
    }


def _vq(config: TokenizerConfig, dim: int) -> VQ:
    return VQ(
        **_codebooks(config, dim),
        entropy_temperature=config.entropy_temperature,
        ema=config.vq_ema,
        revive=config.vq_revive,
        kmeans=config.vq_kmeans,
    )


def _softvq(config: TokenizerConfig, dim: int) -> SoftVQ:
    return SoftVQ(
        **_codebooks(config, dim),
        posterior=config.posterior,
        temperature=config.temperature,
        entropy_temperature=config.entropy_temperature,
    )


# Name -> quantizer of `dim` channels.
BUILDERS: dict[str, Callable[[TokenizerConfig, int], Quantizer]] = {
    "ae": lambda config, dim: AE(dim),
    "kl": lambda config, dim: KL(dim),
    "vq": _vq,
    "softvq": _softvq,
    "gmmvq": lambda config, dim: GMMVQ(**_codebooks(config, dim), temperature=config.temperature),
}


def build_quantizer(config: TokenizerConfig) -> Quantizer:
    """Build what a resolved configuration names: one quantizer, or groups of channels, levels, or levels in groups."""
    dim = config.dim // config.product
    build = BUILDERS[config.quantizer]
    on_sphere = config.quantizer == "vq" or (config.quantizer == "softvq" and FORMS[config.posterior].sphere)

    def group() -> Quantizer:
        if config.residual == 1:
            return build(config, dim)
        return Residual(dim, [build(config, dim) for _ in range(config.residual)], sphere=on_sphere)

    if config.product == 1:
        return group()
    return Product(config.dim, [group() for _ in range(config.product)])
