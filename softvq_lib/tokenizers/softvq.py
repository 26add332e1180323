"""SoftVQ: each latent token is the posterior's average of the codewords (Eq. 4, Sec. 3.2), in three forms.

| form     | posterior q(k|x)               | tau  | T of the KL term | KL term averages q over |
|----------|--------------------------------|------|------------------|-------------------------|
| released | softmax(cos(z_hat, c) / tau)   | 0.07 | 0.01             | all codebooks together  |
| paper    | softmax(-|z_hat - c|_2 / tau)  | 0.07 | tau / 7          | each codebook           |
| squared  | softmax(-|z_hat - c|^2 / 2tau) | 0.5  | tau / 7          | each codebook           |

`released` is what the authors' code computes: no gradient reaches the codewords through the posterior, only through
the average. On the unit sphere |z_hat - c|^2 = 2 - 2 cos, so there it equals `squared` at the same tau. `paper` is
Eq. 4 as printed, with z_hat and codewords as they are; so is `squared`.

When the forms train. Codewords start on the unit sphere: from the usual U(-1/k, 1/k) all distances of Eq. 4 are
equal, the posterior is uniform and the encoder's gradient vanishes. The KL term, -I(x; k), sharpens the posterior that
it is computed from. At T = tau that is the posterior that makes z: it becomes one-hot within tens of steps, each token
keeps the code that its position gave it, and no gradient of the images is left to move it. At a T well below tau, as
the release has it, the term is content while the posterior at tau is still soft. The unsquared distance has a cusp at
each codeword, which draws z_hat further in: `paper` stays longer with one code a position than the others do, and
with few channels leaves it sooner at tau = 0.14, T = 0.01. The logits of `squared` grow with |z_hat|, about 2 to 5 off
the sphere, hence its larger tau.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from softvq_lib.config import at_least, one_of
from softvq_lib.draws import Draws
from softvq_lib.tokenizers.attention import assign, attend, distance_operands, scores, squared_operands
from softvq_lib.tokenizers.quantizer import CodebookQuantizer, fp32, in_fp32


@dataclass(frozen=True)
class Form:
    """A form of the posterior.

    Attributes:
        operands: From tokens (n, t, d) and codewords (n, k, d) to q and k of `softvq_lib.tokenizers.attention`.
        temperature: Default tau.
        sphere: Tokens and codewords are put on the unit sphere.
        keys_learn: Gradients reach the codewords through the posterior.
        root: Scores are -sqrt(q k^T).
        pooled: The KL term averages q over all codebooks together.
    """

    operands: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    temperature: float = 0.07
    sphere: bool = False
    keys_learn: bool = True
    root: bool = False
    pooled: bool = False


FORMS = {
    "released": Form(lambda z, c: (z, c), sphere=True, keys_learn=False, pooled=True),
    "paper": Form(distance_operands, root=True),
    "squared": Form(squared_operands, temperature=0.5),
}
POSTERIORS = tuple(FORMS)


def temperatures(
    posterior: str, temperature: float | None = None, entropy_temperature: float | None = None
) -> tuple[float, float]:
    """Return tau and T of a form, its defaults where they are None.

    Raises:
        ValueError: for an unknown form, or a temperature that is not above 0.
    """
    one_of("posterior", posterior, POSTERIORS)
    at_least("temperature", temperature, 0, above=True)
    at_least("entropy_temperature", entropy_temperature, 0, above=True)
    tau = temperature or FORMS[posterior].temperature
    return tau, entropy_temperature or (0.01 if posterior == "released" else tau / 7)


class SoftVQ(CodebookQuantizer):
    """Soft vector quantizer with `codebooks` codebooks over consecutive segments of the tokens.

    z is computed by attention and the KL term in chunks; no tensor of tokens x codes is kept, but by `log_posterior`.

    Args:
        tokens: Latent tokens l, divisible by `codebooks`.
        dim: Latent channels d.
        codebook_size: Codes k of each codebook.
        codebooks: Number of segments n.
        posterior: One of `POSTERIORS`.
        temperature: tau, above 0. None: the form's.
        entropy_temperature: Temperature T of the posterior inside the KL term. None: the form's.

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
        temperature: float | None = None,
        entropy_temperature: float | None = None,
    ):
        temperature, entropy_temperature = temperatures(posterior, temperature, entropy_temperature)
        super().__init__(tokens, dim, codebook_size, codebooks)
        self.posterior, self.form = posterior, FORMS[posterior]
        self.temperature, self.entropy_temperature = temperature, entropy_temperature

    def _operands(self, z_hat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q (n, t, e), k (n, k, e) and codewords (n, k, d), in z_hat's precision but at least fp32."""
        z = self.segments(fp32(z_hat))
        c = self.codebook.to(z.dtype)
        if self.form.sphere:
            z, c = F.normalize(z, dim=-1), F.normalize(c, dim=-1)
        return *self.form.operands(z, c if self.form.keys_learn else c.detach()), c

    def log_posterior(self, z_hat: Tensor) -> Tensor:
        """Return log q(k|x), (b, l, k), each token over its own codebook."""
        with in_fp32(z_hat):
            q, k, _ = self._operands(z_hat)
            log_q = F.log_softmax(scores(q, k, root=self.form.root) / self.temperature, dim=-1)  # (n, t, k)
            return self.unsegment(log_q, z_hat.shape[0])

    def forward(self, z_hat: Tensor, draws: Draws = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Quantize encoder outputs (b, l, d).

        Returns:
            z: (b, l, d), fp32, or float64 where z_hat is.
            losses: {"kl": scalar} in training, {} in evaluation.
        """
        with in_fp32(z_hat):
            q, k, c = self._operands(z_hat)
            losses = {}
            if not self.training and not self.form.root:
                z = attend(q, k, c, self.temperature)
            elif not self.training and torch.compiler.is_compiling():  # no graph can hold a loop over chunks
                z = F.softmax(scores(q, k, root=True) / self.temperature, dim=-1) @ c
            else:
                entropy_temperature = self.entropy_temperature if self.training else None
                z, kl = assign(
                    q, k, c, self.temperature, entropy_temperature, root=self.form.root, pooled=self.form.pooled
                )
                if self.training:
                    losses["kl"] = kl
            return self.unsegment(z, z_hat.shape[0]), losses
