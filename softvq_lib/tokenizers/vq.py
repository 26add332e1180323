"""VQ: each latent token becomes its nearest codeword, with a straight-through gradient (VQ-VAE, Eq. 2, Sec. 2.1)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from softvq_lib.config import at_least
from softvq_lib.distributed import gather_across, mean_across
from softvq_lib.draws import Draws, generator_of
from softvq_lib.tokenizers.quantizer import CodebookQuantizer, fp32, in_fp32, kl_term

_USE_DECAY = 0.99  # of the moving average of codes' use, where the codebook itself is not a moving average


class VQ(CodebookQuantizer):
    """Hard vector quantizer.

    Losses in training: "codebook", the mean of (c - sg z_hat)^2, which moves codewords to tokens; "commit", the mean
    of (sg c - z_hat)^2; and "kl", the entropy term of Eq. 4 on softmax(-|z_hat - c|^2 / T), as the release has it.
    z = z_hat + sg(c - z_hat), where z_hat is on the sphere if `l2`: there the reconstruction's gradient reaches the
    encoder and never the codewords.

    Plain VQ collapses: few codes win all tokens, and the others get no gradient. Three remedies, all off by default,
    all kept in the state dict, drawing from the generator of the batch alone:
        kmeans  codewords start as centres of the first training batch,
        ema     codewords are the moving average of their tokens instead of following "codebook", which is left out,
        revive  a code that is used too little starts again at a random token of the batch.
    Several processes must have generators in the same state; then all take the tokens of the whole batch, and their
    codebooks stay equal. Each call counts as a batch: with micro-batches the averages move once for each of them, and
    codewords start from the first.

    Args:
        tokens, dim, codebook_size, codebooks: As in `CodebookQuantizer`.
        l2: Put z_hat and codewords on the unit sphere, as the release does.
        entropy_temperature: T of "kl", above 0. None leaves the term out.
        ema: Decay of the codewords' moving average, 0 to 1. None: the codebook follows its gradient.
        revive: Least use of a code, as a share of an even use of all; below, on a moving average, it is restarted.
        kmeans: Lloyd iterations on the first training batch. 0: codewords start at random on the sphere. With fewer
            tokens than codes, as many codes as tokens take part.

    Raises:
        ValueError: for a value out of range, naming it.
    """

    straight_through = True

    def __init__(
        self,
        tokens: int,
        dim: int,
        codebook_size: int,
        codebooks: int = 1,
        *,
        l2: bool = True,
        entropy_temperature: float | None = 0.01,
        ema: float | None = None,
        revive: float | None = None,
        kmeans: int = 0,
    ):
        super().__init__(tokens, dim, codebook_size, codebooks)
        at_least("entropy_temperature", entropy_temperature, 0, above=True)
        at_least("ema", ema, 0)
        if ema is not None and ema >= 1:
            raise ValueError(f"ema={ema!r} is not allowed: give a decay from 0 to below 1, such as 0.99.")
        at_least("revive", revive, 0)
        at_least("kmeans", kmeans, 0)
        self.l2, self.entropy_temperature = l2, entropy_temperature
        self.ema, self.revive, self.kmeans = ema, revive, kmeans
        if ema is not None or revive is not None:
            self.register_buffer("use", torch.ones(codebooks, codebook_size))  # 1: an even share of the tokens
        if ema is not None:
            self.codebook.requires_grad_(False)
            self.register_buffer("total", self.codebook.detach().clone())  # use-weighted sums of tokens
        if kmeans:
            self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    def _points(self, z_hat: Tensor) -> Tensor:
        z = self.segments(fp32(z_hat))  # (n, t, d)
        return F.normalize(z, dim=-1) if self.l2 else z

    def codewords(self) -> Tensor:
        """Return what tokens become, (n, k, d): the codebook, on the sphere if `l2`."""
        c = fp32(self.codebook)
        if self.l2:
            return F.normalize(c, dim=-1)
        # A moving average is written in place after this; autograd needs what was there before.
        return c if self.ema is None else c.clone()

    def forward(self, z_hat: Tensor, draws: Draws = None) -> tuple[Tensor, dict[str, Tensor]]:
        with in_fp32(z_hat):
            z = self._points(z_hat)
            if self.training:
                self._prepare(z.detach(), draws)
            c = self.codewords()
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.training and bool(self.entropy_temperature)):
                distances = _squared_distances(z, c)  # (n, t, k)
            best = distances.argmin(-1)  # (n, t)
            chosen = _pick(c, best)  # (n, t, d)
            if not self.training:
                return self.unsegment(chosen, z_hat.shape[0]), {}
            losses = {"commit": F.mse_loss(z, chosen.detach())}
            if self.ema is None:
                losses["codebook"] = F.mse_loss(chosen, z.detach())
            if self.entropy_temperature:
                log_q = F.log_softmax(-distances / self.entropy_temperature, dim=-1)
                losses["kl"] = kl_term(log_q, pooled=False, floor=1e-5)
            self._count(z.detach(), best)
            return self.unsegment(z + (chosen - z).detach(), z_hat.shape[0]), losses

    def indices(self, z_hat: Tensor) -> Tensor:
        with in_fp32(z_hat), torch.no_grad():
            return self.unsegment(_squared_distances(self._points(z_hat), self.codewords()).argmin(-1), z_hat.shape[0])

    def log_posterior(self, z_hat: Tensor) -> Tensor:
        """Return log q(k|x), (b, l, k): 0 at the nearest codeword and -inf elsewhere."""
        best = self.indices(z_hat)[..., None]  # (b, l, 1)
        nowhere = torch.full((*best.shape[:2], self.codes), -torch.inf, dtype=fp32(z_hat).dtype, device=best.device)
        return nowhere.scatter_(-1, best, 0)

    # -- remedies against collapse -------------------------------------------------------------------------------

    @torch.no_grad()
    def _prepare(self, z: Tensor, draws: Draws) -> None:
        """Start the codewords on the first batch (n, t, d), later restart those that have died."""
        if self.kmeans and not self.started:
            self._place(*_kmeans(z, self.codewords(), self.kmeans, self.l2, generator_of(draws)))
            self.started.fill_(True)
        elif self.revive is not None:
            z = _of_all(z)
            drawn = torch.randint(z.shape[1], self.use.shape, generator=generator_of(draws), device=z.device)  # (n, k)
            self._place(_pick(z, drawn), self.use < self.revive)

    def _place(self, points: Tensor, where: Tensor) -> None:
        """Put codewords (n, k, d) where asked, (n, k), as if they had had an even use so far."""
        self.codebook.copy_(torch.where(where[..., None], points, self.codebook))
        if self.ema is not None or self.revive is not None:
            self.use.masked_fill_(where, 1)
        if self.ema is not None:
            self.total.copy_(torch.where(where[..., None], points, self.total))

    @torch.no_grad()
    def _count(self, z: Tensor, best: Tensor) -> None:
        """Add a batch's tokens (n, t, d) and their codes (n, t) to the moving averages."""
        if self.ema is None and self.revive is None:
            return
        decay = _USE_DECAY if self.ema is None else self.ema
        count, sums = _sums(z, best, self.codes)
        even = z.shape[1] / self.codes
        self.use.lerp_((count / even).to(self.use.dtype), 1 - decay)
        if self.ema is not None:
            self.total.lerp_((sums / even).to(self.total.dtype), 1 - decay)
            # A code without any use left stays where it is: 0 / 0 is no place.
            mean = self.total / self.use.clamp_min(1e-12)[..., None]
            self.codebook.copy_(torch.where(self.use[..., None] > 1e-12, mean, self.codebook))


def _squared_distances(z: Tensor, c: Tensor) -> Tensor:
    """|z - c|^2 of tokens (n, t, d) and codewords (n, k, d): (n, t, k)."""
    norms = z.square().sum(-1, keepdim=True) + c.square().sum(-1)[:, None]  # (n, t, k)
    return torch.baddbmm(norms, z, c.mT, alpha=-2)


def _pick(points: Tensor, which: Tensor) -> Tensor:
    """Take points (n, t, d) by index (n, m): (n, m, d)."""
    return points.gather(1, which[..., None].expand(-1, -1, points.shape[-1]))


def _of_all(z: Tensor) -> Tensor:
    """Put the tokens (n, t, d) of all processes together, (n, processes x t, d), in the order of the whole batch."""
    return gather_across(z.transpose(0, 1)).transpose(0, 1)


def _sums(z: Tensor, best: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """Number (n, k) and sum (n, k, d) of the tokens (n, t, d) of each code (n, t), averaged over processes."""
    # A matrix product, since adding at indices is not deterministic on accelerators.
    chosen = z.new_zeros(*best.shape, codes).scatter_(2, best[..., None], 1)  # (n, t, k)
    return mean_across(chosen.sum(1)), mean_across(chosen.mT @ z)


def _kmeans(
    z: Tensor, c: Tensor, iterations: int, l2: bool, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from random tokens: centres (n, k, d), and which codes took part (n, k)."""
    everyone, codes = _of_all(z), c.shape[1]
    tokens = everyone.shape[1]
    part = min(tokens, codes)
    drawn = torch.stack([torch.randperm(tokens, generator=generator, device=z.device)[:part] for _ in z])  # (n, part)
    centres = _pick(everyone, drawn)
    for _ in range(iterations):
        count, sums = _sums(z, _squared_distances(z, centres).argmin(-1), part)
        centres = torch.where(count[..., None] > 0, sums / count[..., None], centres)
        if l2:
            centres = F.normalize(centres, dim=-1)
    points = c.clone()
    points[:, :part] = centres
    return points, (torch.arange(codes, device=z.device) < part).expand(len(z), -1)
