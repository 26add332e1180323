"""Codebook usage and perplexity of the average posterior, over a whole evaluation pass (Sec. 3.2)."""

import torch
from torch import Tensor


class CodebookUsage:
    """Accumulate posteriors of many batches; a single batch would understate both numbers.

    Attributes:
        total: Sum of posteriors, (n, k) float64.
        chosen: How often each code is a token's most likely one, (n, k).
    """

    def __init__(self):
        self.total = self.chosen = None
        self.tokens = 0

    def update(self, posterior: Tensor) -> None:
        """Add posteriors (n, t, k): t tokens of each of n codebooks."""
        total = posterior.sum(1, dtype=torch.float64).cpu()  # (n, k)
        k = posterior.shape[-1]
        chosen = torch.stack([torch.bincount(best, minlength=k) for best in posterior.argmax(-1)]).cpu()  # (n, k)
        if self.total is None:
            self.total, self.chosen = torch.zeros_like(total), torch.zeros_like(chosen)
        self.total += total
        self.chosen += chosen
        self.tokens += posterior.shape[1]

    def summary(self) -> dict[str, float]:
        """Return two numbers, averaged over codebooks.

        usage: share of codes that are the most likely one of at least one token, 0 to 1.
        perplexity: exp H(average posterior), 1 to k.

        Raises:
            ValueError: when no posterior was added.
        """
        if not self.tokens:
            raise ValueError("no posterior was added: codebook usage needs at least one batch.")
        mean = self.total / self.tokens  # (n, k)
        entropy = -torch.special.xlogy(mean, mean).sum(-1)
        used = (self.chosen > 0).double().mean(-1)
        return {"usage": used.mean().item(), "perplexity": entropy.exp().mean().item()}
