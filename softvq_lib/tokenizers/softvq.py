"""SoftVQ: each latent token is the posterior's average of the codewords (Eq. 4, Sec. 3.2).

Forms of the posterior q(k|x), by name:
    paper     softmax(-|z_hat - c|_2 / tau), as Eq. 4 prints it; codewords and z_hat as they are.
    released  softmax(cos(z_hat, c) / tau), as the authors' code computes it: both on the unit sphere, no gradient
              to the codewords through the posterior, the KL term at a temperature of its own and averaged over all
              codebooks. On the sphere |z_hat - c|^2 = 2 - 2 cos, so this is a *squared* distance at 2 tau.

Codewords start on the unit sphere in both forms. From the usual U(-1/k, 1/k) Eq. 4 cannot train: all distances are
equal, the posterior is uniform and the encoder's gradient vanishes.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from softvq_lib.config import at_least, one_of

POSTERIORS = ("released", "paper")


def kl_term(log_q: Tensor, *, pooled: bool) -> Tensor:
    """L_kl of Eq. 4, E_x H(q(.|x)) - H(E_x q(.|x)) = -I(x; k), in nats, as a scalar.

    Args:
        log_q: Log posterior (n, t, k) of t tokens in each of n codebooks.
        pooled: Average q over all codebooks together, as the release does, instead of per codebook.
    """
    q = log_q.exp()
    token_entropy = -(q * log_q).sum(-1).mean()
    mean_q = q.mean(dim=(0, 1)) if pooled else q.mean(dim=1)  # (k,) or (n, k)
    # 1e-6 keeps the logarithm finite where a code is never used; the release has the same.
    return token_entropy + (mean_q * (mean_q + 1e-6).log()).sum(-1).mean()


def in_fp32(x: Tensor) -> torch.autocast:
    """Return a context in which autocast leaves the operations on `x` alone. (Meta tensors have no autocast.)"""
    return torch.autocast("cpu" if x.device.type == "meta" else x.device.type, enabled=False)


class SoftVQ(nn.Module):
    """Soft vector quantizer with `codebooks` codebooks over consecutive segments of the tokens.

    Args:
        tokens: Latent tokens l, divisible by `codebooks`.
        dim: Latent channels d.
        codebook_size: Codes k of each codebook.
        codebooks: Number of segments n.
        posterior: One of `POSTERIORS`.
        temperature: tau, above 0.
        entropy_temperature: Temperature of the posterior inside the KL term.

    Raises:
        ValueError: for a value out of range, naming it.
    """

    def __init__(
        self,
        tokens: int,
        dim: int,
        codebook_size: int,
        codebooks: int = 1,
        posterior: str = "released",
        temperature: float = 0.07,
        entropy_temperature: float = 0.01,
    ):
        super().__init__()
        one_of("posterior", posterior, POSTERIORS)
        for name, value in (("codebook_size", codebook_size), ("codebooks", codebooks), ("dim", dim)):
            at_least(name, value, 1)
        at_least("temperature", temperature, 0, above=True)
        at_least("entropy_temperature", entropy_temperature, 0, above=True)
        if tokens % codebooks:
            raise ValueError(f"tokens={tokens} is not divisible by codebooks={codebooks}.")
        self.posterior, self.temperature, self.entropy_temperature = posterior, temperature, entropy_temperature
        self.codebook = nn.Parameter(F.normalize(torch.randn(codebooks, codebook_size, dim), dim=-1))

    def segments(self, x: Tensor) -> Tensor:
        """Sort tokens (b, l, ...) by codebook: (n, b l/n, ...). Consecutive tokens share one."""
        return rearrange(x, "b (n m) ... -> n (b m) ...", n=len(self.codebook))

    def unsegment(self, x: Tensor, batch: int) -> Tensor:
        """Undo `segments`: (n, b l/n, ...) to (b, l, ...)."""
        return rearrange(x, "n (b m) ... -> b (n m) ...", b=batch)

    def _points(self, z_hat: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens (n, t, d) and codewords (n, k, d) in fp32, on the sphere where the form wants it."""
        z, c = self.segments(z_hat.float()), self.codebook.float()
        if self.posterior == "released":
            return F.normalize(z, dim=-1), F.normalize(c, dim=-1)
        return z, c

    def _log_q(self, z: Tensor, c: Tensor, temperature: float) -> Tensor:
        scores = z @ c.detach().mT if self.posterior == "released" else -torch.cdist(z, c)
        return F.log_softmax(scores / temperature, dim=-1)  # (n, t, k)

    def log_posterior(self, z_hat: Tensor) -> Tensor:
        """Return log q(k|x), (b, l, k), each token over its own codebook."""
        with in_fp32(z_hat):
            return self.unsegment(self._log_q(*self._points(z_hat), self.temperature), len(z_hat))

    def forward(self, z_hat: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Quantize encoder outputs (b, l, d).

        Returns:
            z: (b, l, d), always fp32.
            losses: {"kl": scalar} in training, {} in evaluation.
        """
        with in_fp32(z_hat):
            z, c = self._points(z_hat)
            if self.posterior == "released":
                # softmax(z c^T / tau) c is attention with the codebook as keys and values.
                out = F.scaled_dot_product_attention(z, c.detach(), c, scale=1 / self.temperature)
            else:
                out = self._log_q(z, c, self.temperature).exp() @ c
            losses = {}
            if self.training:
                log_q = self._log_q(z, c, self.entropy_temperature)
                losses["kl"] = kl_term(log_q, pooled=self.posterior == "released")
            return self.unsegment(out, len(z_hat)), losses
