"""The training objective, a weighted sum of named terms (Eq. 7)."""

import math
from dataclasses import dataclass, replace

from torch import Tensor

from softvq_lib.config import at_least, one_of
from softvq_lib.losses.reconstruction import RECONSTRUCTION

_KL_WEIGHT = {"kl": 1e-6}
_OTHER_KL_WEIGHT = 0.01


@dataclass(frozen=True)
class LossConfig:
    """Weights of the terms. A term that the quantizer does not have counts nothing.

    The term "kl" is two different things under one name, as in the paper: a Gaussian's divergence from N(0, 1),
    summed over a token's channels and all tokens (KL), and the entropy difference of Eq. 4, an average over tokens (the
    codebook quantizers). Their weights differ by four orders, so the default depends on the quantizer; `resolved`
    fills it in, in one place, and a run's identity holds the number.

    Attributes:
        reconstruction: `l2` (mean squared error, the release's) or `l1`.
        kl_weight: lambda_4 of Eq. 7, of the quantizer's KL term. May be negative, to test its sign. None: 1e-6 for
            `kl`, 0.01 for the others, as in the release.
        codebook_weight: Of VQ's "codebook" loss, which moves codewords to tokens.
        commit_weight: beta of Sec. 2.1, of VQ's "commit" loss, which keeps tokens at their codewords.
    """

    reconstruction: str = "l2"
    kl_weight: float | None = None
    codebook_weight: float = 1.0
    commit_weight: float = 0.25

    def __post_init__(self):
        one_of("reconstruction", self.reconstruction, RECONSTRUCTION)
        if self.kl_weight is not None and not math.isfinite(self.kl_weight):
            raise ValueError(f"kl_weight={self.kl_weight!r} is not allowed: give a finite number, or None.")
        at_least("codebook_weight", self.codebook_weight, 0)
        at_least("commit_weight", self.commit_weight, 0)

    def resolved(self, quantizer: str) -> "LossConfig":
        """Return the configuration with the default weight of a quantizer's KL term filled in, by its name."""
        if self.kl_weight is not None:
            return self
        return replace(self, kl_weight=_KL_WEIGHT.get(quantizer, _OTHER_KL_WEIGHT))


def objective(
    config: LossConfig, images: Tensor, reconstructions: Tensor, quantizer_losses: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss to minimise and its unweighted terms by name.

    Args:
        config: With kl_weight a number where there is a KL term, see `LossConfig.resolved`.
        images: (b, 3, height, width) in [-1, 1].
        reconstructions: Same shape, any float type.
        quantizer_losses: Scalars from `Code.losses`.

    Raises:
        ValueError: when there is a KL term but no weight for it.
    """
    if "kl" in quantizer_losses and config.kl_weight is None:
        raise ValueError("kl_weight=None depends on the quantizer: call config.resolved(quantizer) first.")
    terms = {"reconstruction": RECONSTRUCTION[config.reconstruction](reconstructions.float(), images)}
    terms |= quantizer_losses
    weights = {
        "reconstruction": 1.0,
        "kl": config.kl_weight,
        "codebook": config.codebook_weight,
        "commit": config.commit_weight,
    }
    total = sum(weights[name] * term for name, term in terms.items())
    return total, terms
