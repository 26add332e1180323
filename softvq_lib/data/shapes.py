"""The embedded data set `shapes`: coloured, textured shapes drawn from their number alone, with known factors."""

import hashlib
import json
import math
from functools import cache, lru_cache

import numpy as np
from PIL import Image

from softvq_lib.data.source import ComputedSource

VERSION = "shapes 1"
SEED = 20241210
COUNTS = {"train": 50_000, "validation": 2_000}
CLASSES = ["circle", "square", "triangle", "star", "ring", "cross", "heart", "crescent"]
TEXTURES = ["plain", "stripes", "checker", "dots", "rings", "gradient"]
PALETTE = {
    "red": (214, 56, 62),
    "orange": (240, 136, 48),
    "yellow": (248, 206, 70),
    "green": (74, 160, 84),
    "teal": (42, 157, 154),
    "sky": (108, 182, 228),
    "blue": (52, 96, 186),
    "violet": (124, 84, 178),
    "pink": (234, 132, 172),
    "brown": (134, 88, 60),
    "white": (244, 240, 230),
    "black": (38, 40, 50),
}
COLOURS = list(PALETTE)


class ShapesSource(ComputedSource):
    """Shapes at any size; picture i is a pure function of (split, i), so every process draws the same one.

    Args:
        split: ``train`` (50,000 pictures) or ``validation`` (2,000).
        image_size: side in pixels.
        limit: keep only the first so many.
    """

    counts = COUNTS

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        factors = self.factors(index)
        return Image.fromarray(draw(factors, self.image_size)), CLASSES.index(factors["shape"])

    def name(self, index: int) -> str:
        return f"shape {index}"

    def factors(self, index: int) -> dict[str, str | float]:
        """The generating factors of a picture.

        Returns:
            ``shape`` (one of `CLASSES`), ``colour``, ``accent``, ``background``, ``background_accent`` (four
            different names of `PALETTE`), ``texture``, ``background_texture`` (of `TEXTURES`), ``shade`` and
            ``background_shade`` (brightness factors), ``x`` and ``y`` (centre; the picture spans [-1, 1], y down),
            ``size`` (radius in the same unit), ``rotation`` and ``background_rotation`` (radians),
            ``frequency`` and ``background_frequency`` (texture periods per unit).
        """
        return draw_factors(self.split, self._check(index))


def draw_factors(split: str, index: int) -> dict[str, str | float]:
    """Draw the factors of picture `index` of a split (see `ShapesSource.factors`)."""
    generator = np.random.default_rng((SEED, list(COUNTS).index(split), index))
    u = generator.random(16).tolist()
    colour = _pick(COLOURS, u[0])
    # Only colours well apart from the shape's own lie behind it, so that every shape can be seen.
    background = _pick([name for name in COLOURS if _apart(name, colour) > 110], u[1])
    accent = _pick([name for name in COLOURS if name not in (colour, background)], u[2])
    background_accent = _pick([name for name in COLOURS if name not in (colour, background, accent)], u[3])
    size = 0.4 + 0.34 * u[8]
    return {
        "shape": CLASSES[int(u[4] * len(CLASSES))],
        "colour": colour,
        "accent": accent,
        "texture": TEXTURES[int(u[5] * len(TEXTURES))],
        "background": background,
        "background_accent": background_accent,
        "background_texture": TEXTURES[int(u[6] * len(TEXTURES))],
        "size": size,
        "rotation": 2 * math.pi * u[7],
        "x": (2 * u[9] - 1) * (0.96 - size),
        "y": (2 * u[10] - 1) * (0.96 - size),
        "frequency": 2.0 + 2.5 * u[11],
        "shade": 0.85 + 0.2 * u[12],
        "background_rotation": 2 * math.pi * u[13],
        "background_frequency": 1.0 + 2.0 * u[14],
        "background_shade": 0.85 + 0.2 * u[15],
    }


def _pick(names: list[str], u: float) -> str:
    return names[int(u * len(names))]


@cache
def _apart(first: str, second: str) -> float:
    """Euclidean distance of two colours in 8-bit RGB."""
    return math.dist(PALETTE[first], PALETTE[second])


def draw(factors: dict[str, str | float], size: int) -> np.ndarray:
    """Draw a picture from its factors with antialiased edges.

    Args:
        factors: as `ShapesSource.factors` gives them.
        size: side in pixels.

    Returns:
        uint8 array (size, size, 3).
    """
    x, y = _grid(size)
    pixel = 2.0 / size
    angle = factors["background_rotation"]
    u, v = _rotate(x, y, angle)
    mix = _texture(factors["background_texture"], u, v, factors["background_frequency"], 1.4, pixel)
    ground = _colour(factors["background"], factors["background_shade"])
    # A background of half contrast leaves the shape in front.
    second = 0.65 * ground + 0.35 * _colour(factors["background_accent"], factors["background_shade"])
    picture = ground + mix[..., None] * (second - ground)  # (h, w, 3)

    radius = factors["size"]
    u, v = _rotate(x - np.float32(factors["x"]), y - np.float32(factors["y"]), factors["rotation"])
    front = _colour(factors["colour"], factors["shade"])
    second = 0.35 * front + 0.65 * _colour(factors["accent"], factors["shade"])
    mix = _texture(factors["texture"], u, v, factors["frequency"] / radius * 0.6, radius, pixel)
    inside = _cover(_distance(factors["shape"], u / radius, v / radius) * radius, pixel)
    picture += inside[..., None] * (front + mix[..., None] * (second - front) - picture)
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8)


@lru_cache(maxsize=4)
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres, x (1, w) and y (h, 1), in [-1, 1]."""
    centres = ((np.arange(size) + 0.5) * (2.0 / size) - 1).astype(np.float32)
    return centres[None, :], centres[:, None]


def _rotate(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    return x * cos + y * sin, y * cos - x * sin


def _colour(name: str, shade: float) -> np.ndarray:
    return np.minimum(np.array(PALETTE[name], dtype=np.float32) * np.float32(shade), 255)


def _cover(distance: np.ndarray, pixel: float) -> np.ndarray:
    """Share of a pixel that lies inside an edge, from the signed distance (negative inside) to it."""
    return np.clip(0.5 - distance / np.float32(pixel), 0, 1)


def _texture(kind: str, u: np.ndarray, v: np.ndarray, frequency: float, extent: float, pixel: float) -> np.ndarray:
    """Share of the second colour (h, w), in [0, 1], at points u, v; `extent` is the reach of a gradient."""
    f = np.float32(frequency)

    def bands(t: np.ndarray) -> np.ndarray:
        t = t * f
        return _cover((np.abs(t - np.floor(t) - np.float32(0.5)) - np.float32(0.25)) / f, pixel)

    if kind == "stripes":
        return bands(u)
    if kind == "rings":
        return bands(np.sqrt(u * u + v * v))
    if kind == "checker":
        a, b = bands(u), bands(v)
        return a + b - 2 * a * b
    if kind == "dots":
        a, b = u * f, v * f
        a, b = a - np.floor(a) - np.float32(0.5), b - np.floor(b) - np.float32(0.5)
        return _cover((np.sqrt(a * a + b * b) - np.float32(0.3)) / f, pixel)
    if kind == "gradient":
        return np.clip(0.5 + 0.5 * v / np.float32(extent), 0, 1)
    return np.zeros_like(u)


def _distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance (h, w) to a shape of radius 1 about the origin, negative inside, exact along its edge."""
    if shape == "circle":
        return _disc(x, y, 0, 0, 0.88)
    if shape == "square":
        return _box(x, y, 0.74, 0.74)
    if shape == "triangle":
        slope = np.float32(math.sqrt(3) / 2)
        return np.maximum(slope * np.abs(x) - np.float32(0.5) * y, y) - np.float32(0.5)
    if shape == "star":
        return _star(x, y)
    if shape == "ring":
        return np.abs(_disc(x, y, 0, 0, 0.72)) - np.float32(0.2)
    if shape == "cross":
        return np.minimum(_box(x, y, 0.92, 0.3), _box(x, y, 0.3, 0.92))
    if shape == "heart":
        # A diamond whose two upper sides each carry a disc of the side's length.
        u, v = _rotate(x, y - np.float32(0.12), math.pi / 4)
        half = 0.52
        lobes = np.minimum(_disc(u, v, -half, 0, half), _disc(u, v, 0, -half, half))
        return np.minimum(_box(u, v, half, half), lobes)
    assert shape == "crescent", shape
    return np.maximum(_disc(x, y, 0, 0, 0.92), -_disc(x, y, 0.46, 0, 0.74))


def _disc(x: np.ndarray, y: np.ndarray, centre_x: float, centre_y: float, radius: float) -> np.ndarray:
    x, y = x - np.float32(centre_x), y - np.float32(centre_y)
    return np.sqrt(x * x + y * y) - np.float32(radius)


def _box(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    return np.maximum(np.abs(x) - np.float32(half_width), np.abs(y) - np.float32(half_height))


def _star(x: np.ndarray, y: np.ndarray, points: int = 5, inner: float = 0.45) -> np.ndarray:
    """A star: all points fold onto one half of one, whose edge is a straight line from tip to notch."""
    sector = math.pi / points
    angle = np.arctan2(x, -y)
    folded = np.abs(angle - np.float32(2 * sector) * np.rint(angle / np.float32(2 * sector)))
    radius = np.sqrt(x * x + y * y)
    along, across = radius * np.cos(folded), radius * np.sin(folded)
    dx, dy = inner * math.cos(sector) - 1, inner * math.sin(sector)
    length = math.hypot(dx, dy)
    return (along - 1) * np.float32(dy / length) - across * np.float32(dx / length)


def shapes_identity() -> dict:
    """What the fingerprint of this data set is made of: its version and the factors of a few pictures."""
    factors = [draw_factors(split, index) for split in COUNTS for index in range(4)]
    rounded = [{k: v if isinstance(v, str) else round(v, 6) for k, v in f.items()} for f in factors]
    content = hashlib.sha256(json.dumps(rounded, sort_keys=True).encode()).hexdigest()
    return {"kind": "shapes", "version": VERSION, "content": content}
