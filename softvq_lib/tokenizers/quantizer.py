"""What stands between encoder and decoder: the interface that all quantizers share (Sec. 2.1 and 3.2)."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from softvq_lib.config import at_least
from softvq_lib.distributed import mean_across
from softvq_lib.draws import Draws


class NotFiniteError(ValueError):
    """An encoder's output that holds NaN or infinity.

    Attributes:
        rows: Numbers of the images in the batch that it comes from.
    """

    def __init__(self, message: str, rows: list[int]):
        super().__init__(message)
        self.rows = rows


def in_fp32(x: Tensor) -> torch.autocast:
    """Return a context in which autocast leaves `x`, of any shape, alone; meta tensors have no autocast."""
    return torch.autocast("cpu" if x.device.type == "meta" else x.device.type, enabled=False)


def fp32(x: Tensor) -> Tensor:
    """Return x, of any shape, in fp32, or in float64 where it comes so."""
    return x if x.dtype == torch.float64 else x.float()


def refuse_bad_input(z_hat: Tensor, channels: int) -> None:
    """Raise ValueError for anything but finite tokens (b, l, channels); the message names the batch rows."""
    if z_hat.ndim != 3 or z_hat.shape[-1] != channels:
        raise ValueError(f"z_hat of shape {tuple(z_hat.shape)} does not fit: give (batch, tokens, {channels}).")
    # One sum costs next to nothing; rows are looked for only when it is off, since large values may overflow it.
    # A graph that is being compiled or exported cannot depend on what is found.
    if z_hat.device.type == "meta" or torch.compiler.is_compiling() or z_hat.detach().sum().isfinite():
        return
    rows = (~z_hat.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
    if rows:
        shown = ", ".join(map(str, rows[:8])) + (", …" if len(rows) > 8 else "")
        raise NotFiniteError(
            f"z_hat holds NaN or infinity in batch rows {shown} ({len(rows)} of {len(z_hat)}): look at these images "
            "and at the encoder's weights; in training, try a smaller lr or precision='fp32'.",
            rows,
        )


class Quantizer(nn.Module):
    """Map encoder outputs z_hat to latents z.

    A call raises ValueError for a z_hat of another shape than (b, l, hat_dim), or with NaN or infinity in it.

    Attributes:
        dim: Latent channels d of z.
        hat_dim: Channels of z_hat that the encoder has to give; d, but 2 d for KL.
        codes: Codes k of each codebook, 0 where there is none.
        groups: Codes that describe one token together: 1, more for product and residual quantization.
        straight_through: Whether z is a choice whose gradient is passed straight to z_hat.
    """

    codes = 0
    groups = 1
    straight_through = False

    def __init__(self, dim: int, hat_dim: int | None = None):
        super().__init__()
        at_least("dim", dim, 1)
        self.dim, self.hat_dim = dim, hat_dim or dim

    def __call__(self, z_hat: Tensor, draws: Draws = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Check encoder outputs (b, l, hat_dim), then quantize them as `forward` does.

        Raises:
            ValueError: for another shape.
            NotFiniteError: for numbers that are not finite, with the rows that hold them.
        """
        refuse_bad_input(z_hat, self.hat_dim)
        return super().__call__(z_hat, draws)

    def forward(self, z_hat: Tensor, draws: Draws = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Quantize encoder outputs (b, l, hat_dim).

        Args:
            z_hat: (b, l, hat_dim), the encoder's output; `hat_dim` is d, for KL 2 d.
            draws: For quantizers that draw at random in training.

        Returns:
            z: (b, l, d), fp32 also inside autocast.
            losses: Unweighted scalars by name, in training; {} in evaluation.
        """
        raise AssertionError("each quantizer has its own forward")

    def sample(self, z_hat: Tensor, draws: Draws = None) -> Tensor:
        """Draw z from the posterior, (b, l, d).

        Raises:
            ValueError: for a quantizer whose z is a function of z_hat.
        """
        raise ValueError(f"{type(self).__name__} draws nothing at random: its latents are z itself.")

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


class CodebookQuantizer(Quantizer):
    """A quantizer with `codebooks` codebooks, each for one of as many segments of consecutive tokens.

    Codewords start on the unit sphere.

    Args:
        tokens: Latent tokens l, divisible by `codebooks`.
        dim: Latent channels d.
        codebook_size: Codes k of each codebook.
        codebooks: Number of segments n.

    Raises:
        ValueError: for a value out of range, naming it.
    """

    def __init__(self, tokens: int, dim: int, codebook_size: int, codebooks: int = 1):
        super().__init__(dim)
        for name, value in (("tokens", tokens), ("codebook_size", codebook_size), ("codebooks", codebooks)):
            at_least(name, value, 1)
        if tokens % codebooks:
            raise ValueError(f"tokens={tokens} is not divisible by codebooks={codebooks}.")
        self.codes = codebook_size
        self.codebook = nn.Parameter(F.normalize(torch.randn(codebooks, codebook_size, dim), dim=-1))

    def segments(self, x: Tensor) -> Tensor:
        """Sort tokens (b, l, ...) by codebook: (n, b l/n, ...). Consecutive tokens share one.

        Raises:
            ValueError: for a number of tokens that the codebooks do not divide.
        """
        if x.shape[1] % len(self.codebook):
            raise ValueError(f"{x.shape[1]} tokens are not divisible by codebooks={len(self.codebook)}.")
        return rearrange(x, "b (n m) ... -> n (b m) ...", n=len(self.codebook))

    def unsegment(self, x: Tensor, batch: int) -> Tensor:
        """Undo `segments`: (n, b l/n, ...) to (b, l, ...). Give the batch as `shape[0]`: exports fix `len`."""
        return rearrange(x, "n (b m) ... -> b (n m) ...", b=batch)

    def by_codebook(self, x: Tensor) -> Tensor:
        return self.segments(x)


def kl_term(log_q: Tensor, *, pooled: bool, floor: float = 1e-6) -> Tensor:
    """L_kl of Eq. 4, E_x H(q(.|x)) - H(E_x q(.|x)) = -I(x; k), in nats, as a scalar.

    Where several processes hold a part of the batch each, the second average is over all of it and the first over this
    part: the mean of the processes' values, and of their gradients, is that of the whole batch.

    Args:
        log_q: Log posterior (n, t, k) of t tokens in each of n codebooks.
        pooled: Average q over all codebooks together, as the release does, instead of per codebook.
        floor: Added inside the logarithm of the average, finite so where a code is never used.
    """
    q = log_q.exp()
    token_entropy = -(q * log_q).sum(-1).mean()
    mean_q = q.mean(dim=(0, 1)) if pooled else q.mean(dim=1)  # (k,) or (n, k)
    mean_q = mean_across(mean_q)
    return token_entropy + (mean_q * (mean_q + floor).log()).sum(-1).mean()
