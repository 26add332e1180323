"""Pictures as the models see them: any file to 8-bit RGB, the paper's resize and crop, and the range [-1, 1]."""

import io
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

WHITE = (255, 255, 255, 255)


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn a picture of any Pillow mode into 8-bit RGB, upright.

    The EXIF orientation is applied. Transparent pixels are laid over white. Deeper grey values are scaled, not
    clipped: 16-bit modes by 65535 to 255; mode ``I`` likewise when its values fit 16 bits and by its full
    31-bit range otherwise; mode ``F`` by the first of 1, 255 and 65535 that holds its values, else by its own
    largest value (not-a-number and negative values become black).

    Args:
        image: an opened picture; of an animation the current frame is used.

    Returns:
        A picture of mode ``RGB`` that is fully loaded.

    Raises:
        OSError: the pixels are damaged or end early (Pillow may raise others of its own for broken files).
    """
    image.load()
    # Where only the description is broken the pixels are good, and the picture is used as it lies.
    with suppress(ValueError, SyntaxError, LookupError, TypeError, ArithmeticError):
        image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_eight_bits(np.asarray(image), image.mode)).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """Grey values (h, w) of a deep mode, scaled to uint8 (see `to_rgb`)."""
    values = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    largest = float(values.max(initial=0.0))
    if mode == "F":
        white = next((top for top in (1.0, 255.0, 65535.0) if largest <= top), largest)
    else:
        white = 65535.0 if largest <= 65535 else 2.0**31 - 1
    return np.rint(np.clip(values, 0, white) * (255.0 / white)).astype(np.uint8)


def decode(data: bytes | str | Path) -> Image.Image:
    """Decode an encoded picture to 8-bit RGB.

    Args:
        data: the file's bytes, or its path.

    Raises:
        ValueError: the data are empty or no picture; the message is a short reason.
        OSError: the file is missing or damaged (Pillow may raise others of its own for broken files).
    """
    if isinstance(data, str | Path):
        data = Path(data).read_bytes()
    if not data:
        raise ValueError("the file is empty")
    try:
        with Image.open(io.BytesIO(data)) as image:
            return to_rgb(image)
    except UnidentifiedImageError:
        raise ValueError("not a picture that Pillow can read") from None


def fit(
    image: Image.Image,
    size: int,
    generator: np.random.Generator | None = None,
    *,
    crop: float = 1.0,
    flip: bool = False,
) -> np.ndarray:
    """Resize the shorter side, crop a square and, in training, mirror at random.

    Without a generator (validation) the shorter side becomes `size` and the centre is cropped. With one the
    shorter side becomes uniform in [1, crop] x `size` and the square is taken at random; the paper trains with
    crop 1.25. Resizing is bicubic with antialiasing; a picture that has the right size already keeps its pixels.

    Args:
        image: a picture of mode ``RGB``.
        size: side of the square in pixels.
        generator: source of the random draws, None for the centre.
        crop: largest enlargement, at least 1.
        flip: mirror left-right with probability 1/2.

    Returns:
        uint8 array (size, size, 3).
    """
    width, height = image.size
    # Four numbers are drawn whatever is switched on, so that one option never changes the draws of another.
    u = generator.random(4) if generator is not None else np.array([0.0, 0.5, 0.5, 1.0])
    short = size * (1 + (crop - 1) * u[0]) if generator is not None else size
    scale = short / min(width, height)
    wide, high = max(size, round(width * scale)), max(size, round(height * scale))
    left, top = int(u[1] * (wide - size + 1)), int(u[2] * (high - size + 1))
    if generator is None:
        left, top = (wide - size) // 2, (high - size) // 2
    # One resampling of the box alone gives the same pixels as resizing all and cropping, for less work.
    box = (left * width / wide, top * height / high, (left + size) * width / wide, (top + size) * height / high)
    if (wide, high) == (width, height):
        image = image.crop((left, top, left + size, top + size))
    else:
        box = (box[0], box[1], min(box[2], width), min(box[3], height))
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    pixels = np.asarray(image)
    return pixels[:, ::-1] if flip and u[3] < 0.5 else pixels


def to_tensor(pixels: torch.Tensor) -> torch.Tensor:
    """Scale uint8 pixels (b, h, w, 3) to float32 images (b, 3, h, w) in [-1, 1], x / 127.5 - 1."""
    images = pixels.permute(0, 3, 1, 2)  # (b, 3, h, w)
    return images.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)
