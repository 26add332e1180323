"""Representation alignment of the latent space with a frozen teacher's patch features (Sec. 3.3, Eq. 5-6)."""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from softvq_lib.config import one_of

RULES = ("auto", "repeat", "area", "permuted")


class Projector(nn.Sequential):
    """The MLP of Eq. 6, from latent tokens (..., dim) to the teacher's space (..., teacher_width).

    Args:
        dim: Latent channels d.
        width_hidden: Width of its two hidden layers, 1024 in the release.
        teacher_width: Channels of the teacher's features.
    """

    def __init__(self, dim: int, width_hidden: int, teacher_width: int):
        super().__init__(
            nn.Linear(dim, width_hidden),
            nn.SiLU(),
            nn.Linear(width_hidden, width_hidden),
            nn.SiLU(),
            nn.Linear(width_hidden, teacher_width),
        )


def assignment(tokens: int, patches: int, rule: str = "auto", seed: int = 0) -> Tensor:
    """Return each patch's shares of the latent tokens, (n, l) with rows that sum to 1.

    Both tokens and patches, in raster order, cut the interval [0, n) into equal parts, and a patch takes each token
    by the part of the patch that it covers.

    Args:
        tokens: Latent tokens l.
        patches: Image patches n.
        rule: `repeat`: each token goes to n / l consecutive patches (Eq. 5). `area`: the same for any l and n; a
            patch across a border is a mix. `auto`: `repeat` where l divides n, otherwise `area`. `permuted`: a
            control, `auto` with its rows in a random order that is the same for all images.
        seed: Of that order.

    Raises:
        ValueError: for an unknown rule, or `repeat` where l does not divide n.
    """
    one_of("rule", rule, RULES)
    if rule == "repeat" and patches % tokens:
        raise ValueError(
            f"rule='repeat' cannot spread l={tokens} latent tokens evenly over n={patches} image patches, since "
            f"{tokens} does not divide {patches}: choose rule='area', or another number of tokens."
        )
    # In units of 1/l patch all borders are whole numbers, so shares are exact where l divides n.
    token, patch = patches * torch.arange(tokens), tokens * torch.arange(patches)[:, None]
    overlap = torch.minimum(token + patches, patch + tokens) - torch.maximum(token, patch)  # (n, l)
    shares = overlap.clamp(min=0) / tokens
    if rule == "permuted":
        order = torch.randperm(patches, generator=Generator().manual_seed(seed), device="cpu")
        shares = shares[order.to(shares.device)]
    return shares


def to_patches(tokens: Tensor, n: int, rule: str = "auto", seed: int = 0) -> Tensor:
    """Spread latent tokens (b, l, c) over n image patches, (b, n, c), see `assignment`."""
    return assignment(tokens.shape[1], n, rule, seed).to(tokens) @ tokens


def alignment_loss(projected: Tensor, teacher: Tensor) -> Tensor:
    """Return each image's negative mean cosine similarity of its patches (Eq. 6), (b,) in [-1, 1].

    Eq. 6 as printed lacks the sign: similarity is to grow, so the loss is its negative.

    Args:
        projected: Projected latent tokens, spread over the patches, (b, n, c).
        teacher: The teacher's features, same shape; no gradient goes there.

    Raises:
        ValueError: for two shapes.
    """
    if projected.shape != teacher.shape:
        raise ValueError(
            f"projected latents of shape {tuple(projected.shape)} and teacher features of shape "
            f"{tuple(teacher.shape)} do not fit: give both as (batch, image patches, teacher channels)."
        )
    return -F.cosine_similarity(projected.float(), teacher.detach().float(), dim=-1).mean(-1)


class Alignment(nn.Module):
    """The alignment term of Eq. 7: a trainable projector and a fixed assignment of latent tokens to patches.

    Tokens are projected first and spread then, which for `repeat` equals Eq. 5-6 and costs l / n of it.

    Args:
        dim: Latent channels d.
        tokens: Latent tokens l.
        patches: Image patches n that the teacher has features of.
        teacher_width: Channels of the teacher's features.
        width_hidden: Of the projector.
        rule: See `assignment`.
        seed: Of the rule `permuted`.

    Raises:
        ValueError: see `assignment`.
    """

    def __init__(
        self,
        dim: int,
        tokens: int,
        patches: int,
        teacher_width: int,
        *,
        width_hidden: int = 1024,
        rule: str = "auto",
        seed: int = 0,
    ):
        super().__init__()
        self.projector = Projector(dim, width_hidden, teacher_width)
        # Follows from the arguments, so no checkpoint holds it.
        self.register_buffer("shares", assignment(tokens, patches, rule, seed), persistent=False)

    def forward(self, z: Tensor, teacher_tokens: Tensor) -> Tensor:
        """Return each image's loss, (b,), of latent tokens z (b, l, d), as the decoder sees them.

        Args:
            z: (b, l, d).
            teacher_tokens: (b, n, teacher_width).
        """
        projected = self.projector(z)  # (b, l, c)
        return alignment_loss(self.shares.to(projected) @ projected, teacher_tokens)
