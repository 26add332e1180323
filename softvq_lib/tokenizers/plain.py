"""The forms of SoftVQ written out as matrices (Eq. 4): what the lean ones are tested and measured against.

Every line stores a (tokens x codes) tensor. Nothing here is used in training.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from softvq_lib.config import one_of
from softvq_lib.tokenizers.quantizer import kl_term
from softvq_lib.tokenizers.softvq import POSTERIORS


def plain(
    posterior: str, z_hat: Tensor, codebook: Tensor, temperature: float, entropy_temperature: float | None
) -> tuple[Tensor, Tensor | None]:
    """Return z (n, t, d) and the KL term of tokens (n, t, d) over codebooks (n, k, d).

    Args:
        posterior: One of `POSTERIORS`.
        z_hat: Tokens (n, t, d) of n codebooks.
        codebook: Codewords (n, k, d).
        temperature: tau, above 0.
        entropy_temperature: None leaves the KL term out.
    """
    one_of("posterior", posterior, POSTERIORS)
    if posterior == "released":
        z_hat, codebook = F.normalize(z_hat, dim=-1), F.normalize(codebook, dim=-1)
        scores = z_hat @ codebook.detach().mT  # (n, t, k)
    elif posterior == "squared":
        # |z_hat|^2 is the same for all codes, so the softmax is blind to it.
        scores = z_hat @ codebook.mT - codebook.square().sum(-1)[:, None] / 2
    else:
        scores = -torch.cdist(z_hat, codebook)
    if entropy_temperature == temperature:
        log_q = F.log_softmax(scores / temperature, dim=-1)
        return log_q.exp() @ codebook, kl_term(log_q, pooled=posterior == "released")
    z = F.softmax(scores / temperature, dim=-1) @ codebook
    if entropy_temperature is None:
        return z, None
    log_q = F.log_softmax(scores / entropy_temperature, dim=-1)
    return z, kl_term(log_q, pooled=posterior == "released")
