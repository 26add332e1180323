"""Linear baseline of reconstruction: projection on principal components."""

import numpy as np
import torch

from softvq_lib.data import Source, validation_batches
from softvq_lib.losses import psnr


def pca_psnr(
    train: Source,
    validation: Source,
    *,
    image_size: int,
    components: tuple[int, ...] = (16, 64),
    fit_on: int = 4000,
    limit: int | None = None,
) -> dict[int, np.ndarray]:
    """PSNR in dB of each held-out image, (n,), after projection on so many principal components of training images.

    PCA is the best linear code of so many numbers. Counts that the training images are too few for are left out.

    Args:
        train: Images that the components are computed from.
        validation: Images that are measured.
        image_size: Side of the images in pixels.
        components: Numbers of components, each measured.
        fit_on: Training images that the components are computed from, the first of their fixed order.
        limit: Held-out images measured.
    """
    from sklearn.decomposition import PCA

    def pixels(source: Source, most: int | None) -> np.ndarray:
        batches = validation_batches(source, image_size=image_size, batch_size=256, limit=most)
        return torch.cat([batch.images for batch in batches]).flatten(1).numpy()  # (n, 3 height width)

    fitted, held_out = pixels(train, fit_on), pixels(validation, limit)
    components = tuple(count for count in components if count <= min(fitted.shape))
    if not components:
        return {}
    pca = PCA(n_components=max(components), svd_solver="randomized", random_state=0).fit(fitted)
    codes = pca.transform(held_out)
    result = {}
    for count in components:
        back = codes[:, :count] @ pca.components_[:count] + pca.mean_
        as_images = [torch.from_numpy(x.astype(np.float32))[:, :, None, None] for x in (held_out, back)]
        result[count] = psnr(*as_images).numpy()
    return result
