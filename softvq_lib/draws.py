"""Random numbers for some rows of a batch that are the same however the batch is cut into parts."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor


@dataclass(frozen=True)
class Rows:
    """Rows `start`, `start + 1`, ... of a batch of `total` images, with the generator of the whole batch.

    Numbers are drawn for all rows and those of this part are kept. So a part draws what it would have drawn inside the
    whole, whether micro-batches or processes made the cut.

    Attributes:
        generator: In the same state for every part of one batch.
        total: Rows of the whole batch.
        start: First row of this part.
    """

    generator: Generator
    total: int
    start: int = 0

    def _cut(self, numbers: Tensor, rows: int) -> Tensor:
        if self.start + rows > self.total:
            raise ValueError(f"rows {self.start} to {self.start + rows} of a batch of {self.total}")
        return numbers[self.start : self.start + rows]


class Seeds:
    """A random stream of its own for each row, so that a row does not depend on its neighbours or their number.

    Args:
        seeds: One for each row of the batch.
        device: Where the numbers are drawn.
    """

    def __init__(self, seeds: Iterable[int], device: torch.device | str = "cpu"):
        self.generators = [Generator(device).manual_seed(int(seed)) for seed in seeds]


Draws = Generator | Rows | Seeds | None


def normal(shape: tuple[int, ...], draws: Draws, like: Tensor) -> Tensor:
    """Draw from N(0, 1): `shape` (b, ...) with the dtype and device of `like`."""
    return _draw(torch.randn, shape, draws, like)


def uniform(shape: tuple[int, ...], draws: Draws, like: Tensor) -> Tensor:
    """Draw from [0, 1): `shape` (b, ...) with the dtype and device of `like`."""
    return _draw(torch.rand, shape, draws, like)


def generator_of(draws: Draws) -> Generator | None:
    """Return the generator itself, for numbers that belong to the batch and not to its rows.

    Raises:
        ValueError: for `Seeds`, which has numbers for rows alone.
    """
    if isinstance(draws, Seeds):
        raise ValueError("a stream for each row has no numbers for the whole batch: give a generator or Rows.")
    return draws.generator if isinstance(draws, Rows) else draws


def _draw(function, shape: tuple[int, ...], draws: Draws, like: Tensor) -> Tensor:
    kind = {"dtype": like.dtype, "device": like.device}
    if isinstance(draws, Seeds):
        if shape[0] != len(draws.generators):
            raise ValueError(f"{len(draws.generators)} seeds for {shape[0]} rows: give one seed a row.")
        return torch.stack([function(shape[1:], generator=generator, **kind) for generator in draws.generators])
    if isinstance(draws, Rows):
        return draws._cut(function((draws.total, *shape[1:]), generator=draws.generator, **kind), shape[0])
    return function(shape, generator=draws, **kind)
