"""Exponential moving average of a model's weights, whole or sharded over processes (Sec. 4.1: EMA)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Average:
    """Averages of a model's parameters, in its own memory layout.

    The decay grows with the first updates, min(decay, (1 + n) / (10 + n)) after n of them, and the first one copies: so
    the random start is soon forgotten. Plain copies, not a second module: a sharded model's shards are averaged where
    they lie.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.parameters = list(model.parameters())
        self.decay = decay
        self.values = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Average in the parameters as they are now, after `updates` earlier calls."""
        decay = min(self.decay, (1 + updates) / (10 + updates)) if updates else 0.0
        torch._foreach_lerp_(self.values, [parameter.detach() for parameter in self.parameters], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averages into the model for a while: to read them out, or to write them."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, value in zip(self.parameters, self.values, strict=True):
            held = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(held)
