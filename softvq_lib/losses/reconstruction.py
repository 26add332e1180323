"""Reconstruction loss (the first term of Eq. 7) and PSNR, its decibel form."""

from torch import Tensor

RECONSTRUCTION = {
    "l2": lambda images, reconstructions: (images - reconstructions).square().flatten(1).mean(1),
    "l1": lambda images, reconstructions: (images - reconstructions).abs().flatten(1).mean(1),
}
"""Mean error of each image, (b,), by name; both inputs are (b, 3, height, width) in [-1, 1]."""


def psnr(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, (b,).

    Both inputs are (b, 3, height, width) in [-1, 1]: a data range of 2. Reconstructions are clamped to it, as they
    are when shown. Identical images give infinity.
    """
    error = (images - reconstructions.clamp(-1, 1)).double().square().flatten(1).mean(1)  # (b,)
    return 10 * (4 / error).log10()
