"""GMMVQ: SoftVQ whose temperature depends on the token, softmax(-omega(z_hat) |z_hat - c|_2) (Sec. 3.2)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softvq_lib.config import at_least
from softvq_lib.draws import Draws
from softvq_lib.tokenizers.attention import distance_operands, scores
from softvq_lib.tokenizers.quantizer import CodebookQuantizer, fp32, in_fp32, kl_term

SHARPER = 7  # tau / T of the release: 0.07 / 0.01


class GMMVQ(CodebookQuantizer):
    """Soft vector quantizer with a learnt, data-dependent sharpness omega(z_hat) > 0.

    The paper gives the formula but neither the form of omega nor code. Here omega is one number a token,
    softplus(w . z_hat + a): positive by construction, without the runaway growth that exp would allow, and nearly
    linear where it is large, so that its gradient neither vanishes nor explodes. With w = 0 and softplus(a) = 1 / tau
    it starts as SoftVQ's `paper` form, so that the two differ only by what is learnt. One number for all codes is
    what "weights for the prototypes" can be while codes keep no parameters beside their means; were omega one a
    code, the posterior would no longer be a function of distances alone.

    Distances are Euclidean, unsquared and off the sphere, as Eq. 4 prints them; codewords start on the unit sphere.
    The loss "kl" is the KL term of Eq. 4 on a posterior 7 times as sharp, as in SoftVQ's forms: on the posterior that
    makes z it would freeze tokens at the codes of their positions.

    Args:
        tokens, dim, codebook_size, codebooks: As in `CodebookQuantizer`.
        temperature: tau of the start, above 0.

    Raises:
        ValueError: for a value out of range, naming it.
    """

    def __init__(self, tokens: int, dim: int, codebook_size: int, codebooks: int = 1, temperature: float = 0.07):
        super().__init__(tokens, dim, codebook_size, codebooks)
        at_least("temperature", temperature, 0, above=True)
        self.to_omega = nn.Linear(dim, 1)
        nn.init.zeros_(self.to_omega.weight)
        start = 1 / temperature
        nn.init.constant_(self.to_omega.bias, start + math.log(-math.expm1(-start)))  # the inverse of softplus

    def omega(self, z_hat: Tensor) -> Tensor:
        """Return the sharpness of each token's posterior, (b, l, 1), above 0."""
        with in_fp32(z_hat):
            return F.softplus(self.to_omega(fp32(z_hat)))

    def _log_q(self, z_hat: Tensor, omega: Tensor) -> Tensor:
        z, c = self.segments(fp32(z_hat)), fp32(self.codebook)
        # cdist's way of computing follows from the batch's size; a graph has but one.
        fixed = torch.compiler.is_compiling()
        distances = -scores(*distance_operands(z, c), root=True) if fixed else torch.cdist(z, c)  # (n, t, k)
        return F.log_softmax(-self.segments(omega) * distances, dim=-1)

    def log_posterior(self, z_hat: Tensor, omega: Tensor | None = None) -> Tensor:
        """Return log q(k|x), (b, l, k), each token over its own codebook; at omega (b, l, 1) if given."""
        with in_fp32(z_hat):
            log_q = self._log_q(z_hat, self.omega(z_hat) if omega is None else omega)
            return self.unsegment(log_q, z_hat.shape[0])

    def forward(self, z_hat: Tensor, draws: Draws = None) -> tuple[Tensor, dict[str, Tensor]]:
        with in_fp32(z_hat):
            omega = self.omega(z_hat)
            z = self.unsegment(self._log_q(z_hat, omega).exp() @ fp32(self.codebook), z_hat.shape[0])
            if not self.training:
                return z, {}
            return z, {"kl": kl_term(self._log_q(z_hat, SHARPER * omega), pooled=False)}
