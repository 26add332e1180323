"""KL: a Gaussian posterior on each latent token, held to N(0, 1) (KL-VAE, Eq. 1, Sec. 2.1)."""

from torch import Tensor

from softvq_lib.draws import Draws, normal
from softvq_lib.tokenizers.quantizer import Quantizer, fp32, in_fp32

LOG_VARIANCE = (-30.0, 20.0)


class KL(Quantizer):
    """Gaussian bottleneck: z is a sample in training and the mean in evaluation.

    Its loss "kl" is KL(q(z|x) || N(0, 1)) in nats, summed over tokens and channels and averaged over images, as in
    the release and in KL-VAE; hence the small weight that it usually has.

    Args:
        dim: Latent channels d. The encoder gives 2 d: d means, then d logarithms of variances, clamped to
            `LOG_VARIANCE`.
    """

    def __init__(self, dim: int):
        super().__init__(dim, hat_dim=2 * dim)

    def moments(self, z_hat: Tensor) -> tuple[Tensor, Tensor]:
        """Split z_hat (b, l, 2 d) into mean and log variance, (b, l, d) each."""
        mean, log_variance = fp32(z_hat).chunk(2, dim=-1)
        return mean, log_variance.clamp(*LOG_VARIANCE)

    def sample(self, z_hat: Tensor, draws: Draws = None) -> Tensor:
        with in_fp32(z_hat):
            mean, log_variance = self.moments(z_hat)
            return mean + (0.5 * log_variance).exp() * normal(mean.shape, draws, mean)

    def forward(self, z_hat: Tensor, draws: Draws = None) -> tuple[Tensor, dict[str, Tensor]]:
        with in_fp32(z_hat):
            mean, log_variance = self.moments(z_hat)
            if not self.training:
                return mean, {}
            kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum() / len(z_hat)
            return self.sample(z_hat, draws), {"kl": kl}
