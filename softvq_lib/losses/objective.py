"""The training objective, a weighted sum of named terms (Eq. 7)."""

from dataclasses import dataclass

from torch import Tensor

from softvq_lib.config import at_least, one_of
from softvq_lib.losses.reconstruction import RECONSTRUCTION


@dataclass(frozen=True)
class LossConfig:
    """Weights of the terms.

    Attributes:
        reconstruction: `l2` (mean squared error, the release's) or `l1`.
        kl_weight: lambda_4 of Eq. 7, of the quantizer's KL term. May be negative, to test its sign.
    """

    reconstruction: str = "l2"
    kl_weight: float = 0.01

    def __post_init__(self):
        one_of("reconstruction", self.reconstruction, RECONSTRUCTION)
        at_least("kl_weight", abs(self.kl_weight), 0)


def objective(
    config: LossConfig, images: Tensor, reconstructions: Tensor, quantizer_losses: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss to minimise and its unweighted terms by name.

    Args:
        images: (b, 3, height, width) in [-1, 1].
        reconstructions: Same shape, any float type.
        quantizer_losses: Scalars from `Code.losses`.
    """
    terms = {"reconstruction": RECONSTRUCTION[config.reconstruction](reconstructions.float(), images)}
    terms |= quantizer_losses
    weights = {"reconstruction": 1.0, "kl": config.kl_weight}
    total = sum(weights[name] * term for name, term in terms.items())
    return total, terms
