"""Residual quantization: each level quantizes what the levels before it have left over (Sec. 4.5)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softvq_lib.draws import Draws
from softvq_lib.tokenizers.product import Several, average, joint_posterior
from softvq_lib.tokenizers.quantizer import Quantizer, fp32, in_fp32


class Residual(Several):
    """Residual quantization: r_1 = z_hat, z_i = s_i Q_i(r_i / s_i), r_(i+1) = r_i - z_i, and z = sum of z_i.

    Codewords start on the unit sphere, and some quantizers keep them there, while residuals shrink. The scales s_i
    take care of that: s_1 = 1, the others are learnt and start at 2^-(i-1). Dividing by s_i also scales a level's
    temperature with its residuals. For quantizers on the sphere r_1 is z_hat on the sphere; the direction of a later
    residual picks its code, which is the nearest of the scaled codewords.

    Soft levels are differentiated as written. Hard ones pass the gradient of z straight to z_hat, once and not once
    a level, and take residuals from the values, so that each level's "commit" reaches the encoder. Losses are
    averages over levels, in the units of a level's codewords.

    Args:
        dim: Latent channels d.
        parts: The levels, quantizers of d channels.
        sphere: Whether the levels put their input on the unit sphere.

    Raises:
        ValueError: when there is no level or one of other channels than d.
    """

    def __init__(self, dim: int, parts: list[Quantizer], *, sphere: bool):
        if not parts:
            raise ValueError("residual quantization needs at least one level.")
        super().__init__(dim, parts, dim)
        self.sphere = sphere
        self.log_scale = nn.Parameter(-torch.arange(1.0, len(parts)) * torch.tensor(2.0).log())  # (levels - 1,)

    def scales(self) -> Tensor:
        """Return s of each level, (levels,)."""
        return torch.cat([self.log_scale.new_ones(1), self.log_scale.exp()])

    def _levels(self, z_hat: Tensor, draws: Draws = None):
        """Yield level by level: its input (b, l, d), its part of z, its losses."""
        rest = F.normalize(fp32(z_hat), dim=-1) if self.sphere else fp32(z_hat)
        for part, scale in zip(self.parts, self.scales(), strict=True):
            point = rest / scale.detach()
            latent, losses = part(point, draws)
            share = scale * (latent.detach() if part.straight_through else latent)
            yield point, share, losses
            rest = rest - (share.detach() if part.straight_through else share)

    def forward(self, z_hat: Tensor, draws: Draws = None) -> tuple[Tensor, dict[str, Tensor]]:
        with in_fp32(z_hat):
            points, shares, losses = zip(*self._levels(z_hat, draws), strict=True)
            z = sum(shares)
            if self.straight_through:
                z = z + (points[0] - points[0].detach())  # s_1 = 1: the first point is z_hat itself
            return z, average(list(losses))

    def log_posterior(self, z_hat: Tensor) -> Tensor:
        was_training = self.training
        self.eval()  # no level may take this look for a training step
        try:
            with in_fp32(z_hat):
                points = [point for point, _, _ in self._levels(z_hat)]
                return joint_posterior(
                    [part.log_posterior(x) for part, x in zip(self.parts, points, strict=True)]
                )  # (b, l, levels, k)
        finally:
            self.train(was_training)
