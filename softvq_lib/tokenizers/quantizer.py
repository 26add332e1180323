"""What stands between encoder and decoder: the interface that all quantizers share (Sec. 2.1 and 3.2)."""

import torch
from torch import Tensor, nn


def in_fp32(x: Tensor) -> torch.autocast:
    """Return a context in which autocast leaves the operations on `x` alone. (Meta tensors have no autocast.)"""
    return torch.autocast("cpu" if x.device.type == "meta" else x.device.type, enabled=False)


class Quantizer(nn.Module):
    """Map encoder outputs z_hat to latents z.

    Attributes:
        dim: Latent channels d of z.
        hat_dim: Channels of z_hat that the encoder has to give; d, but 2 d for KL.
        codes: Codes k of each codebook, 0 where there is none.
    """

    codes = 0

    def __init__(self, dim: int, hat_dim: int | None = None):
        super().__init__()
        self.dim, self.hat_dim = dim, hat_dim or dim

    def forward(self, z_hat: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Quantize encoder outputs (b, l, hat_dim).

        Args:
            generator: For quantizers that draw at random in training.

        Returns:
            z: (b, l, d), fp32 also inside autocast.
            losses: Unweighted scalars by name, in training; {} in evaluation.
        """
        raise AssertionError("each quantizer has its own forward")

    def log_posterior(self, z_hat: Tensor) -> Tensor:
        """Return log q(k|x), (b, l, k) or, with several codebooks a token, (b, l, groups, k).

        Raises:
            ValueError: for a quantizer without codebook.
        """
        raise ValueError(f"{type(self).__name__} has no codebook, so no posterior over codes.")

    def indices(self, z_hat: Tensor) -> Tensor:
        """Return each token's most likely code, local to its codebook: (b, l) or (b, l, groups).

        Raises:
            ValueError: for a quantizer without codebook.
        """
        return self.log_posterior(z_hat).argmax(-1)

    def by_codebook(self, x: Tensor) -> Tensor:
        """Sort posteriors (b, l, k) or (b, l, groups, k) by codebook: (codebooks, t, k), for `CodebookUsage`."""
        return x.flatten(0, 1)[None] if x.ndim == 3 else x.flatten(0, 1).transpose(0, 1)
