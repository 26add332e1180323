"""The embedded data set `mixed`: digits, shapes and photographs in turns, the label being which of them."""

from PIL import Image

from softvq_lib.data.digits import DigitsSource, digits_identity
from softvq_lib.data.photographs import PhotographsSource, photographs_identity
from softvq_lib.data.shapes import ShapesSource, shapes_identity
from softvq_lib.data.source import Source

CLASSES = ["digit", "shape", "photograph"]


class MixedSource(Source):
    """Picture i is number i // 3 of the digits, the shapes or the photographs, by i % 3: as many of each.

    Args:
        split: ``train`` (12,000 pictures) or ``validation`` (3,000).
        image_size: side in pixels, of shapes and photographs.
        limit: keep only the first so many.
    """

    embedded = True

    def __init__(self, split: str, image_size: int, limit: int | None = None):
        self.parts = [DigitsSource(split), ShapesSource(split, image_size), PhotographsSource(split, image_size)]
        count = len(CLASSES) * min(map(len, self.parts))
        self.count = min(count, limit or count)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        number, kind = divmod(self._check(index), len(CLASSES))
        return self.parts[kind][number][0], kind

    def name(self, index: int) -> str:
        number, kind = divmod(index, len(CLASSES))
        return self.parts[kind].name(number)


def mixed_identity() -> dict:
    """What the fingerprint of this data set is made of: those of its parts."""
    return {"kind": "mixed", "parts": [digits_identity(), shapes_identity(), photographs_identity()]}
