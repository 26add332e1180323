"""The embedded data set `photographs`: square windows of three photographs that scikit-learn and matplotlib ship."""

import hashlib
from functools import cache
from importlib.resources import files

import numpy as np
from PIL import Image

from softvq_lib.data.source import ComputedSource

VERSION = "photographs 1"
SEED = 20241211
COUNTS = {"train": 12_000, "validation": 1_000}
# Package, place inside it. china and flower: CC BY 2.0, see the package's README; hopper: US Navy, public domain.
FILES = {
    "china": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "hopper": ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
}
CLASSES = list(FILES)
# Training sees the left of each photograph up to this share of its width, validation the rest, so that no pixel is in
# both. The lines go through the pagoda, the dahlia and the face.
TRAINED_SHARE = {"china": 0.36, "flower": 0.5, "hopper": 0.5}
SMALLEST = 48  # side of a window in pixels


class PhotographsSource(ComputedSource):
    """Windows of 48 pixels and more, resized; window i is a pure function of (split, i).

    Args:
        split: ``train`` (12,000 windows) or ``validation`` (1,000, of parts that training does not see).
        image_size: side in pixels.
        limit: keep only the first so many.
    """

    counts = COUNTS

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        name, box = window(self.split, self._check(index))
        size = (self.image_size, self.image_size)
        return load_photograph(name).resize(size, Image.Resampling.BICUBIC, box=box), CLASSES.index(name)

    def name(self, index: int) -> str:
        return f"window {index}"


@cache
def load_photograph(name: str) -> Image.Image:
    """One of `FILES`, RGB, as its package ships it."""
    with Image.open(_path(name)) as image:
        return image.convert("RGB")


def window(split: str, index: int) -> tuple[str, tuple[int, int, int, int]]:
    """Name of the photograph, and left, top, right and bottom of a window of a split, in its pixels."""
    u = np.random.default_rng((SEED, list(COUNTS).index(split), index)).random(4)
    name = CLASSES[int(u[0] * len(CLASSES))]
    width, height = load_photograph(name).size
    edge = round(TRAINED_SHARE[name] * width)
    left, right = (0, edge) if split == "train" else (edge, width)
    largest = min(right - left, height)
    side = round(SMALLEST * (largest / SMALLEST) ** u[1])  # as many octaves below as above
    x, y = left + int(u[2] * (right - left - side + 1)), int(u[3] * (height - side + 1))
    return name, (x, y, x + side, y + side)


def _path(name: str):
    package, place = FILES[name]
    return files(package).joinpath(place)


@cache
def photographs_identity() -> dict:
    """What the fingerprint of this data set is made of: its version, the photographs' bytes and a few windows."""
    content = hashlib.sha256(b"".join(_path(name).read_bytes() for name in FILES)).hexdigest()
    windows = [window(split, index) for split in COUNTS for index in range(8)]
    return {"kind": "photographs", "version": VERSION, "content": content, "windows": windows}
