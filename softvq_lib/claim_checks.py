"""Claims that need no run: the paper's counts, and identities of the quantizer, each checked anew in a second.

The tests of the repository check the same in more cases, and without this file.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from softvq_lib.evaluation.generator_cost import generator_table
from softvq_lib.evaluation.parameters import parameter_table
from softvq_lib.generator_tables import SAVINGS
from softvq_lib.tokenizers import SoftVQ
from softvq_lib.tokenizers.quantizer import kl_term

_UNCERTAIN = "not certain"  # in the note of a printed number that cannot be read with certainty


class Check(NamedTuple):
    """Whether a claim holds, and what was found."""

    holds: bool
    words: str


def gflops(paper: Iterable[dict]) -> Check:
    """Every printed "Gflops" of a generator that is built here, by the convention of its row (MAR to four digits)."""
    counted = [row for row in generator_table(paper) if row.as_printed is not None]
    clear = [row for row in counted if _UNCERTAIN not in row.note]

    def same(row) -> bool:
        giga = row.as_printed / 1e9
        return (
            math.isclose(giga, row.paper, rel_tol=4e-4) if row.what.startswith("MAR") else round(giga, 2) == row.paper
        )

    found = sum(map(same, clear))
    words = f"{found} of {len(clear)} printed numbers, {len(counted) - len(clear)} not legible"
    return Check(found == len(clear) > 0, words)


def saving(paper: Iterable[dict]) -> Check:
    """Operations on KL latents over those on SoftVQ latents, counted alike, against the printed columns' ratio."""
    table = {(row.place, row.what): row for row in generator_table(paper)}
    both = [(table[place, theirs], table[place, ours]) for place, ours, theirs in SAVINGS if (place, ours) in table]
    alike = [theirs.macs / ours.macs for theirs, ours in both]
    printed = [theirs.paper / ours.paper for theirs, ours in both]
    if not both:
        return Check(False, "the paper's rows are not there")
    words = f"{min(alike):.1f} to {max(alike):.1f} times fewer, counted alike; {min(printed):.1f} to {max(printed):.1f}"
    return Check(all(a >= b for a, b in zip(alike, printed, strict=True)), f"{words} as printed")


def parameters(paper: Iterable[dict]) -> Check:
    """Parameters of the four sizes, with the unused layer, to within a million of the printed numbers."""
    sizes = [row for row in paper if row["place"] == "Sec. 4.1" and row["metric"] == "parameters"]
    rows = parameter_table(sizes)
    near = [abs(row["ours_with_unused"] / 1e6 - row["paper"]) < 1 for row in rows]
    words = ", ".join(f"{row['ours_with_unused'] / 1e6:.2f} M (printed {row['paper']:g})" for row in rows)
    return Check(len(near) > 0 and all(near), words)


def _drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _quantizer(tokens: int, dim: int, codes: int, posterior: str, temperature: float) -> SoftVQ:
    quantizer = SoftVQ(tokens, dim, codes, 1, posterior, temperature, temperature).double()
    quantizer.codebook.data = _drawn(1, codes, dim)
    return quantizer


def gradients(paper: Iterable[dict] = ()) -> Check:
    """Eq. 4: automatic against finite differences, for the encoder's output and the codebook; what is reached."""
    quantizer, z_hat = _quantizer(4, 3, 6, "paper", 0.3), _drawn(2, 4, 3).requires_grad_()

    def z(z_hat: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(quantizer, {"codebook": codebook}, (z_hat,))[0]

    agree = torch.autograd.gradcheck(z, (z_hat, quantizer.codebook), raise_exception=False)
    made = torch.autograd.grad((z(z_hat, quantizer.codebook) * _drawn(2, 4, 3)).sum(), (z_hat, quantizer.codebook))
    tokens, codes = (int((gradient.abs().sum(-1) > 0).sum()) for gradient in made)
    words = (
        f"{'' if agree else 'not '}equal to finite differences; reached: {tokens} of 8 tokens, {codes} of 6 codewords"
    )
    return Check(agree and tokens == 8 and codes == 6, words)


def cold_limit(paper: Iterable[dict] = ()) -> Check:
    """Largest distance of the latent from the nearest codeword as the temperature of Eq. 4 falls."""
    z_hat, apart = _drawn(3, 4, 5), []
    for temperature in (0.1, 0.01, 1e-4):
        quantizer = _quantizer(4, 5, 16, "paper", temperature).eval()
        codes = quantizer.codebook[0]
        nearest = codes[torch.cdist(z_hat, codes[None].expand(3, -1, -1)).argmin(-1)]
        apart.append(float((quantizer(z_hat)[0] - nearest).abs().max().detach()))
    words = "largest error " + ", ".join(f"{error:.0e}" for error in apart) + " at temperatures 0.1, 0.01, 0.0001"
    return Check(apart == sorted(apart, reverse=True) and apart[-1] < 1e-9, words)


def em_step(paper: Iterable[dict] = ()) -> Check:
    """Means of a Gaussian mixture after a step of EM against averages under the posterior of squared distances."""
    tau, points = 0.3, _drawn(1, 40, 3)
    quantizer = _quantizer(40, 3, 7, "squared", tau).eval()
    means = quantizer.codebook.detach()[0].clone().requires_grad_()
    mixture = MixtureSameFamily(
        Categorical(torch.ones(7, dtype=torch.float64)), Independent(Normal(means, math.sqrt(tau)), 1)
    )
    likelihood = mixture.log_prob(points[0])
    likelihood.sum().backward()
    shares = mixture.component_distribution.log_prob(points[0][:, None]) - math.log(7) - likelihood[:, None]
    step = means.detach() + tau * means.grad / shares.detach().exp().sum(0)[:, None]
    q = quantizer.log_posterior(points)[0].exp().detach()  # (t, k)
    error = float(((q.T @ points[0]) / q.sum(0)[:, None] - step).abs().max())
    return Check(error < 1e-9, f"largest error {error:.0e}")


def kl_identity(paper: Iterable[dict] = ()) -> Check:
    """The KL term against minus the divergence of the joint distribution from the product of its margins."""
    q = _drawn(1, 50, 9).mul(2).softmax(-1)
    joint = q[0] / 50
    information = (joint * (joint / (joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True))).log()).sum()
    error = float((kl_term(q.log(), pooled=False, floor=0) + information).abs())
    return Check(error < 1e-9, f"error {error:.0e} at an information of {float(information):.3f} nats")


CHECKS: dict[str, Callable[[Iterable[dict]], Check]] = {
    check.__name__: check for check in (gflops, saving, parameters, gradients, cold_limit, em_step, kl_identity)
}
