"""Images made worse step by step, to see how a metric answers: noise, blur, JPEG, down- and up-sampling."""

import io
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from softvq_lib.config import at_least, one_of
from softvq_lib.data.images import to_tensor
from softvq_lib.draws import Draws, Seeds, normal
from softvq_lib.evaluation.export import sample_seeds, to_uint8
from softvq_lib.evaluation.extractors import Extractor
from softvq_lib.evaluation.fidelity import Fidelity, fidelity
from softvq_lib.evaluation.pixels import Pixels
from softvq_lib.evaluation.reconstruction import check_finite, eight_bit, paired_statistics
from softvq_lib.evaluation.reference import Statistics
from softvq_lib.losses.perceptual import Perceptual

# Five strengths of each kind, from weak to strong, in its unit.
STRENGTHS: dict[str, tuple[float, ...]] = {
    "noise": (5, 10, 20, 40, 80),
    "blur": (0.5, 0.75, 1, 1.5, 2.5),
    "jpeg": (90, 70, 40, 20, 5),
    "resize": (1.5, 2, 3, 4, 8),
}
UNITS = {
    "noise": "standard deviation in 8-bit levels",
    "blur": "standard deviation in pixels",
    "jpeg": "quality of 100",
    "resize": "factor down and up again",
}


def degrade(images: Tensor, kind: str, strength: float, draws: Draws = None) -> Tensor:
    """Make images (b, 3, height, width) in [-1, 1] worse; the result has 8-bit values, as any image file.

    `noise` is white and Gaussian, clipped with the pixels; `blur` is Gaussian, mirrored at the border; `jpeg` is
    written and read again with halved colour resolution; `resize` is bicubic with an antialiasing filter on the way
    down.

    Args:
        images: (b, 3, height, width) in [-1, 1].
        kind: One of `STRENGTHS`.
        strength: In the unit of its kind, see `UNITS`. Noise of 0, and resizing by 1, change nothing.
        draws: Of the noise. `Seeds` make it each image's own, whatever the batch.

    Raises:
        ValueError: for another kind, a strength that it cannot have, or images that are NaN or infinite.
    """
    one_of("kind", kind, STRENGTHS)
    at_least("strength", strength, {"resize": 1, "jpeg": 1}.get(kind, 0), above=kind == "blur")
    check_finite(images, "images")
    return eight_bit(_KINDS[kind](images.float(), strength, draws))


def _noise(images: Tensor, strength: float, draws: Draws) -> Tensor:
    return images + normal(tuple(images.shape), draws, images) * (strength / 127.5)


def _blur(images: Tensor, strength: float, draws: Draws) -> Tensor:
    from torchvision.transforms.v2.functional import gaussian_blur

    # Mirroring needs more pixels than are mirrored.
    reach = min(math.ceil(4 * strength), min(images.shape[2:]) - 1)
    return gaussian_blur(images, [2 * reach + 1] * 2, [strength] * 2)


def _jpeg(images: Tensor, strength: float, draws: Draws) -> Tensor:
    if strength > 100 or strength != int(strength):
        raise ValueError(f"strength={strength!r}: a JPEG quality is a whole number from 1 to 100.")
    read = []
    for pixels in to_uint8(images, "mar").cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "jpeg", quality=int(strength), subsampling="4:2:0")
        read.append(np.asarray(Image.open(file)))
    return to_tensor(torch.from_numpy(np.stack(read))).to(images.device)


def _resize(images: Tensor, strength: float, draws: Draws) -> Tensor:
    size = images.shape[2:]
    small = [max(1, round(side / strength)) for side in size]
    down = F.interpolate(images, small, mode="bicubic", antialias=True)
    return F.interpolate(down, size, mode="bicubic")


_KINDS = {"noise": _noise, "blur": _blur, "jpeg": _jpeg, "resize": _resize}


@dataclass(frozen=True)
class Degraded:
    """What one degradation did.

    Attributes:
        kind: As in `STRENGTHS`, like the next.
        strength: In the unit of its kind.
        by_image: Each metric of `softvq_lib.evaluation.reconstruction.compare`, (n,).
        fidelity: The degraded images against the same images untouched.
    """

    kind: str
    strength: float
    by_image: dict[str, np.ndarray]
    fidelity: Fidelity


def degradation_series(
    originals: Pixels,
    reference: Statistics,
    extractor: Extractor,
    perceptual: Perceptual | None = None,
    *,
    measures: tuple[str, ...] | None = None,
    seed: int = 0,
    **options,
) -> list[Degraded]:
    """Degrade the same images in every way of `STRENGTHS` and measure each, in that order.

    Args:
        originals: Images as bytes, see `softvq_lib.evaluation.pixels.open_pixels`.
        reference: Statistics of these very images.
        extractor: Of the features.
        perceptual: See `compare`.
        measures: See `fidelity`.
        seed: Of the noise, the same at all strengths.
        options: As in `softvq_lib.evaluation.reference.image_statistics`.
    """
    seeds = sample_seeds(seed, originals.count)
    series = []
    for kind, strengths in STRENGTHS.items():
        for strength in strengths:

            def change(images: Tensor, first: int, kind: str = kind, strength: float = strength) -> Tensor:
                return degrade(images.cpu(), kind, strength, Seeds(seeds[first : first + len(images)]))

            name = f"{kind} {strength:g}"
            by_image, statistics = paired_statistics(
                originals, change, extractor, perceptual, what=name, convention="mar", **options
            )
            series.append(Degraded(kind, strength, by_image, fidelity(statistics, reference, measures=measures)))
    return series
