"""Product quantization: the channels of a token are cut into groups with a quantizer each (Sec. 4.5)."""

import torch
from torch import Tensor, nn

from softvq_lib.draws import Draws
from softvq_lib.tokenizers.quantizer import Quantizer


def average(losses: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Average losses, scalars by name, so that a weight means the same for any number of parts."""
    return {name: sum(each[name] for each in losses) / len(losses) for name in losses[0]}


def joint_posterior(posteriors: list[Tensor]) -> Tensor:
    """Put posteriors (b, l, k) or (b, l, groups, k) of several parts together: (b, l, all groups, k)."""
    return torch.cat([each if each.ndim == 4 else each[:, :, None] for each in posteriors], dim=2)


class Several(Quantizer):
    """What product and residual quantization share: parts, each with codebooks of its own.

    Args:
        dim: Latent channels d.
        parts: Quantizers with codebooks of one size.
        part_dim: Channels that each part has to have.
    """

    def __init__(self, dim: int, parts: list[Quantizer], part_dim: int):
        super().__init__(dim)
        name = type(self).__name__
        for i, part in enumerate(parts):
            if part.dim != part_dim:
                raise ValueError(
                    f"part {i} of {name} quantizes {part.dim} channels, but {part_dim} are wanted (dim={dim}, "
                    f"{len(parts)} parts): build it with dim={part_dim}."
                )
            if not part.codes or part.hat_dim != part.dim:
                raise ValueError(f"part {i} of {name} is a {type(part).__name__}, which has no codebook.")
            if part.codes != parts[0].codes:
                raise ValueError(
                    f"part {i} of {name} has {part.codes} codes, part 0 {parts[0].codes}: make it the same."
                )
        self.parts = nn.ModuleList(parts)
        self.codes = parts[0].codes
        self.groups = sum(part.groups for part in parts)
        self.straight_through = parts[0].straight_through

    def by_codebook(self, x: Tensor) -> Tensor:
        sizes = [part.groups for part in self.parts]
        each = [
            part.by_codebook(posterior if part.groups > 1 else posterior[:, :, 0])
            for part, posterior in zip(self.parts, x.split(sizes, dim=2), strict=True)
        ]
        return torch.cat(each)  # (codebooks, t, k)


class Product(Several):
    """Product quantization: group i of the channels goes through part i; z puts the groups' latents side by side.

    Losses are averages over groups. Parts on the sphere put each group on a sphere of its own.

    Args:
        dim: Latent channels d, divisible by the number of parts.
        parts: Quantizers of dim / groups channels.

    Raises:
        ValueError: when the groups don't divide the channels, or a part does not fit its group.
    """

    def __init__(self, dim: int, parts: list[Quantizer]):
        if not parts or dim % len(parts):
            divisors = ", ".join(str(n) for n in range(1, dim + 1) if dim % n == 0)
            raise ValueError(f"{len(parts)} product groups do not divide dim={dim}: choose among {divisors}.")
        super().__init__(dim, parts, dim // len(parts))

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Cut (b, l, d) into the groups, (b, l, d / groups) each; `torch.cat` over the last axis undoes it."""
        return x.chunk(len(self.parts), dim=-1)

    def forward(self, z_hat: Tensor, draws: Draws = None) -> tuple[Tensor, dict[str, Tensor]]:
        latents, losses = zip(
            *(part(x, draws) for part, x in zip(self.parts, self.split(z_hat), strict=True)), strict=True
        )
        return torch.cat(latents, dim=-1), average(list(losses))

    def log_posterior(self, z_hat: Tensor) -> Tensor:
        return joint_posterior(
            [part.log_posterior(x) for part, x in zip(self.parts, self.split(z_hat), strict=True)]
        )  # (b, l, groups, k)
