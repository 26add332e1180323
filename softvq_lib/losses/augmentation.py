"""DiffAugment: random colour, shift and cutout through which gradients flow (Sec. 4.1; arXiv:2006.10738)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from softvq_lib.config import one_of
from softvq_lib.draws import Draws, generator_of, uniform

# Probability with which a batch gets each operation, and side of the hole of cutout as a share of the image's.
STRENGTHS = {"weak": (0.5, 0.2), "strong": (1.0, 0.5)}


@dataclass(frozen=True)
class Augmentation:
    """One random augmentation of b images, drawn once and applied as often as wanted.

    Applied to images and to their reconstructions it does the same to both, so that a discriminator cannot tell them
    apart by it.

    Attributes:
        keep: Whether the whole batch gets colour, translation, cutout: (3,) bool.
        amounts: What each image gets, in [0, 1): (b, 7).
        cutout: Side of the hole as a share of the image's.
    """

    keep: Tensor
    amounts: Tensor
    cutout: float

    @classmethod
    def draw(
        cls, images: Tensor, draws: Draws, *, strength: str = "weak", probability: float | None = None
    ) -> "Augmentation":
        """Draw the augmentation of a batch shaped like `images`, (b, 3, height, width).

        Takes the same number of random numbers whatever they decide.

        Args:
            images: In [-1, 1]; their number, device and precision count, not their values.
            draws: Decisions for the batch come from its generator, amounts from its rows.
            strength: `weak` (each operation kept half of the time, hole of a fifth of the side) or `strong` (all
                kept, hole of half the side).
            probability: Of each operation, in place of the strength's.
        """
        one_of("strength", strength, STRENGTHS)
        usual, cutout = STRENGTHS[strength]
        chances = torch.rand(3, generator=generator_of(draws), device=images.device)
        amounts = uniform((len(images), 7), draws, images.float())
        return cls(chances < (usual if probability is None else probability), amounts, cutout)

    def __call__(self, images: Tensor) -> Tensor:
        """Augment images (b, 3, height, width) in [-1, 1]; the result is float32 and may leave that range."""
        x = images.float()
        # The choice stays on the device: an `if` would make the processor wait for an accelerator.
        x = torch.where(self.keep[0], self._colour(x), x)
        x = torch.where(self.keep[1], self._translate(x), x)
        return torch.where(self.keep[2], self._cut(x), x)

    def _colour(self, x: Tensor) -> Tensor:
        """Add up to ±0.5, then scale by 0 to 2 about each pixel's grey, then by 0.5 to 1.5 about the image's mean."""
        brightness, saturation, contrast = (amount[:, None, None, None] for amount in self.amounts[:, :3].unbind(1))
        x = x + (brightness - 0.5)
        grey = x.mean(1, keepdim=True)
        x = grey + 2 * saturation * (x - grey)
        mean = x.mean((1, 2, 3), keepdim=True)
        return mean + (contrast + 0.5) * (x - mean)

    def _translate(self, x: Tensor) -> Tensor:
        """Shift by whole pixels, up to an eighth of each side; what comes in is 0."""
        for axis, amount in ((2, self.amounts[:, 3]), (3, self.amounts[:, 4])):
            side = x.shape[axis]
            limit = round(side / 8)
            shift = (amount * (2 * limit + 1)).floor().long() - limit  # (b,)
            source = torch.arange(side, device=x.device) - shift[:, None]  # (b, side)
            inside = (source >= 0) & (source < side)
            along = [len(x), 1, 1, 1]
            along[axis] = side
            source, inside = source.clamp(0, side - 1).view(along), inside.view(along)
            x = x.gather(axis, source.expand_as(x)) * inside
        return x

    def _cut(self, x: Tensor) -> Tensor:
        """Set a rectangle to 0, of `cutout` times each side, centred anywhere in the image."""
        inside = []
        for axis, amount in ((2, self.amounts[:, 5]), (3, self.amounts[:, 6])):
            side = x.shape[axis]
            size = round(side * self.cutout)
            centre = (amount * (side + 1 - size % 2)).floor()  # between two pixels for an even size, so one more
            offset = torch.arange(side, device=x.device) - (centre - size // 2)[:, None]  # (b, side)
            inside.append((offset >= 0) & (offset < size))
        rows, columns = inside
        return x * ~(rows[:, None, :, None] & columns[:, None, None, :])


def diff_augment(images: Tensor, draws: Draws, *, strength: str = "weak", probability: float | None = None) -> Tensor:
    """Augment images (b, 3, height, width) in [-1, 1] once; to treat others alike, keep an `Augmentation`."""
    return Augmentation.draw(images, draws, strength=strength, probability=probability)(images)
