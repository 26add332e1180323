"""One pass over held-out images: PSNR by image, codebook usage, and some reconstructions to look at."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from softvq_lib.data import Source, UnreadableLog, validation_batches
from softvq_lib.losses import psnr
from softvq_lib.tokenizers import CodebookUsage, Tokenizer


@dataclass
class Reconstruction:
    """What `reconstruct` measured.

    Attributes:
        psnr: Of each image in dB, (n,).
        usage: Codebook usage and perplexity, see `CodebookUsage.summary`; {} for a quantizer without codebook.
        code_probability: Average posterior of each codebook, (codebooks, k); None for a quantizer without.
        images: The first few held-out images, (m, 3, height, width) in [-1, 1].
        reconstructions: Theirs, clamped to [-1, 1].
    """

    psnr: np.ndarray
    usage: dict[str, float]
    code_probability: np.ndarray | None
    images: Tensor
    reconstructions: Tensor


@torch.no_grad()
def reconstruct(
    tokenizer: Tokenizer,
    source: Source,
    *,
    limit: int | None = None,
    batch_size: int = 64,
    shown: int = 8,
    dtype: torch.dtype = torch.float32,
) -> Reconstruction:
    """Measure a tokenizer, where its weights are, on the first `limit` images of a source; autocast to `dtype`."""
    device = next(tokenizer.parameters()).device
    was_training = tokenizer.training
    tokenizer.eval()
    usage, unreadable = CodebookUsage(), UnreadableLog(len(source))
    values, images_shown, reconstructions_shown = [], [], []
    size = tokenizer.config.image_size
    for batch in validation_batches(source, image_size=size, batch_size=batch_size, limit=limit):
        unreadable.add(batch.unreadable)
        images = batch.images.to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            reconstructions, code = tokenizer(images)
        values.append(psnr(images, reconstructions.float()).cpu())
        if tokenizer.quantizer.codes:
            usage.update(tokenizer.quantizer.by_codebook(code.posterior()))
        if sum(map(len, images_shown)) < shown:
            images_shown.append(images.cpu())
            reconstructions_shown.append(reconstructions.float().clamp(-1, 1).cpu())
    tokenizer.train(was_training)
    return Reconstruction(
        psnr=torch.cat(values).numpy(),
        usage=usage.summary() if usage.tokens else {},
        code_probability=(usage.total / usage.tokens).numpy() if usage.tokens else None,
        images=torch.cat(images_shown)[:shown],
        reconstructions=torch.cat(reconstructions_shown)[:shown],
    )
