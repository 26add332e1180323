"""AE: no quantization at all, z = z_hat (Sec. 2.1), the bound that every bottleneck is compared with."""

from torch import Tensor

from softvq_lib.draws import Draws
from softvq_lib.tokenizers.quantizer import Quantizer, fp32


class AE(Quantizer):
    """The identity, without codebook and without losses.

    Args:
        dim: Latent channels d.
    """

    def forward(self, z_hat: Tensor, draws: Draws = None) -> tuple[Tensor, dict[str, Tensor]]:
        return fp32(z_hat), {}
