"""What every data set offers: numbered RGB pictures with labels, in a fixed order, and names for error messages."""

from abc import ABC, abstractmethod

import numpy as np
from PIL import Image

UNLABELLED = -1


class UnreadableImage(ValueError):
    """A picture of a source that cannot be decoded.

    Attributes:
        index: its number in the source.
        name: where it lies, for people: a file's path inside its folder, or a row of a split.
        reason: what is wrong with it.
    """

    def __init__(self, index: int, name: str, reason: str):
        super().__init__(index, name, reason)
        self.index, self.name, self.reason = index, name, reason

    def __str__(self) -> str:
        return f"image {self.index} ({self.name}) is unreadable: {self.reason}"


class Source(ABC):
    """Numbered pictures with labels.

    Attributes:
        embedded: the pictures need no decoding, so loader processes would not pay.
    """

    embedded: bool = False

    @abstractmethod
    def __len__(self) -> int:
        """Number of pictures."""

    @abstractmethod
    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Picture of mode ``RGB`` in the size it is stored, and its label, -1 where there is none.

        Raises:
            UnreadableImage: the picture cannot be decoded.
            IndexError: there is no such number.
        """

    def name(self, index: int) -> str:
        """Where the picture lies, for messages."""
        return f"image {index}"

    def _check(self, index: int) -> int:
        """The index as an int within range; negative numbers are refused, since the order is meaningful."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of a source that holds {len(self)}")
        return int(index)


class ComputedSource(Source):
    """Pictures of any size that are pure functions of (split, number), so every process makes the same ones.

    Attributes:
        counts: number of pictures by split.

    Args:
        split: ``train`` or ``validation``.
        image_size: side in pixels.
        limit: keep only the first so many.
    """

    embedded = True
    counts: dict[str, int]

    def __init__(self, split: str, image_size: int, limit: int | None = None):
        self.split, self.image_size = split, image_size
        self.count = min(self.counts[split], limit or self.counts[split])

    def __len__(self) -> int:
        return self.count


def fixed_order(count: int, salt: int = 0) -> np.ndarray:
    """A shuffled order of `count` items that is the same for ever: on every machine and with every version of NumPy.

    Sorts by a 64-bit mixing function (splitmix64) of the item's number instead of drawing from a library's
    generator, whose streams may change between versions.

    Args:
        count: number of items.
        salt: another number gives another order.

    Returns:
        int64 array (count,), a permutation.
    """
    with np.errstate(over="ignore"):
        x = (np.arange(count, dtype=np.uint64) + np.uint64(salt) * np.uint64(0xD1B54A32D192ED03)) + np.uint64(1)
        x *= np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return np.argsort(x, kind="stable").astype(np.int64)
