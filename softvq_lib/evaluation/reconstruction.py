"""How near reconstructions are to their originals, image by image: PSNR, SSIM and a perceptual distance (Sec. 4.1)."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from softvq_lib.data.images import to_tensor
from softvq_lib.evaluation.export import to_uint8
from softvq_lib.evaluation.extractors import Extractor
from softvq_lib.evaluation.pixels import Pixels, to_bytes
from softvq_lib.evaluation.reference import Statistics, image_statistics
from softvq_lib.losses import psnr
from softvq_lib.losses.perceptual import Perceptual

DATA_RANGE = 2.0  # of pixels in [-1, 1]
# SSIM's window in pixels, and its two constants as shares of the data range (Wang et al. 2004).
WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03
_AT_ONCE = 8  # images


def eight_bit(images: Tensor, convention: str = "mar") -> Tensor:
    """Bring images (b, 3, height, width) to the values in [-1, 1] that 8-bit pixels have, as they are stored and shown.

    Args:
        images: (b, 3, height, width), float; what is beyond [-1, 1] is clamped.
        convention: How numbers are rounded, see `softvq_lib.evaluation.export.CONVENTIONS`. `mar` rounds to the
            nearest; with `repa` an image that is 8-bit already may lose a level, so originals are rounded by `mar`.

    Raises:
        ValueError: for an unknown convention, or numbers that are not finite, which no pixel has.
    """
    check_finite(images, "images")
    return to_tensor(to_uint8(images, convention))


def check_finite(images: Tensor, name: str) -> None:
    """Raise ValueError, saying how many and which, for images (b, ...) of any range with NaN or infinite numbers."""
    bad = (~images.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if bad:
        first = ", ".join(map(str, bad[:5]))
        raise ValueError(
            f"{len(bad)} of {len(images)} {name} hold NaN or infinite pixels (numbers {first} of the batch): no "
            "metric is taken of them. Find what made them."
        )


def ssim(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Structural similarity of each image (Wang et al. 2004, Eq. 13), (b,).

    Means, variances and covariance are weighted by a Gaussian of 11 x 11 pixels and sigma 1.5, at the places where it
    lies within the image; K1 = 0.01, K2 = 0.03, and the data range is 2. The mean is over places and over the three
    channels, each taken by itself. Reconstructions are clamped to [-1, 1]. Identical images give 1.

    Args:
        images: (b, 3, height, width) in [-1, 1].
        reconstructions: Same shape.

    Raises:
        ValueError: for sides below 11 pixels.
    """
    if min(images.shape[2:]) < WINDOW:
        raise ValueError(f"images of {images.shape[2]} x {images.shape[3]} pixels: SSIM's window needs {WINDOW}.")
    place = torch.arange(WINDOW, dtype=torch.float64, device=images.device) - WINDOW // 2
    weights = torch.softmax(-place.square() / (2 * SIGMA**2), 0)
    # A few images at a time: their moments are large.
    parts = zip(images.split(_AT_ONCE), reconstructions.clamp(-1, 1).split(_AT_ONCE), strict=True)
    return torch.cat([_ssim(x.double(), y.double(), weights) for x, y in parts])


def _ssim(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    maps = torch.stack([x, y, x * x, y * y, x * y]).flatten(0, 2)[:, None]  # (5 b 3, 1, height, width)
    maps = F.conv2d(F.conv2d(maps, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
    mean_x, mean_y, xx, yy, xy = maps.view(5, len(x), -1)  # each (b, 3 places)
    c1, c2 = (K1 * DATA_RANGE) ** 2, (K2 * DATA_RANGE) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * (xy - mean_x * mean_y) + c2) / ((xx - mean_x**2) + (yy - mean_y**2) + c2)
    return (luminance * structure).mean(1)


@torch.no_grad()
def compare(images: Tensor, reconstructions: Tensor, perceptual: Perceptual | None = None) -> dict[str, Tensor]:
    """Measure each pair of images.

    Args:
        images: (b, 3, height, width) in [-1, 1], the originals.
        reconstructions: Same shape.
        perceptual: A distance of `build_perceptual`, on the device of the images. None: none.

    Returns:
        By name, float64 (b,) on the CPU: `psnr` in dB (data range 2), infinite where both are identical; `ssim`, at
        most 1; and under its label (`LPIPS-VGG`, `perceptual-EffLite1`, ...) the perceptual distance, from 0.

    Raises:
        ValueError: for sizes that differ or are too small, and images that are NaN or infinite.
    """
    if images.shape != reconstructions.shape:
        raise ValueError(
            f"originals are {tuple(images.shape)}, reconstructions {tuple(reconstructions.shape)}: both need the same "
            "number, crop and size."
        )
    check_finite(images, "originals")
    check_finite(reconstructions, "reconstructions")
    found = {"psnr": psnr(images, reconstructions), "ssim": ssim(images, reconstructions)}
    if perceptual is not None:
        found[perceptual.label] = perceptual(images, reconstructions.clamp(-1, 1))
    return {name: values.double().cpu() for name, values in found.items()}


@torch.no_grad()
def paired_statistics(
    originals: Pixels,
    change: Callable[[Tensor, int], Tensor],
    extractor: Extractor,
    perceptual: Perceptual | None = None,
    *,
    what: str = "changed images",
    convention: str = "dit",
    device: torch.device | str = "cpu",
    **options,
) -> tuple[dict[str, np.ndarray], Statistics]:
    """Change images, measure each against its original, and take the features of what comes out, all in one pass.

    Args:
        originals: Images as bytes, see `softvq_lib.evaluation.pixels.open_pixels`.
        change: Maps images (b, 3, height, width) in [-1, 1] and the number of the first of them to others of that
            shape, such as a tokenizer's reconstructions.
        extractor: Of the features.
        perceptual: As in `compare`, on the device.
        what: Name of the changed images for messages.
        convention: How they become bytes, before anything is measured.
        device: Where it all runs.
        options: As in `softvq_lib.evaluation.reference.image_statistics`.

    Returns:
        What `compare` gives, (n,) each; and the statistics of the features.

    Raises:
        ValueError: for images of another size or number than the originals, or that are not finite.
    """
    found: dict[str, list[Tensor]] = {}

    def batches(size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        first = 0
        for pixels, labels in originals.batches(size):
            images = (pixels / 127.5 - 1).to(device)
            changed = to_bytes(change(images, first), convention, first, what)
            for name, values in compare(images, (changed / 127.5 - 1).to(device), perceptual).items():
                found.setdefault(name, []).append(values)
            first += len(images)
            yield changed, labels

    pixels = Pixels(what, batches, originals.count, originals.size, convention, originals.crop)
    statistics = image_statistics(pixels, extractor, device=device, **options)
    return {name: torch.cat(values).numpy() for name, values in found.items()}, statistics
