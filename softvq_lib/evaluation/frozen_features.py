"""Features to probe (Fig. 3, Sec. 4.4): latents of tokenizers, hidden states of SiT and DiT, and what they compare to.

The hidden states follow REPA's protocol: no label is injected, and a block's output is averaged over the tokens.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from softvq_lib.config import at_least, one_of
from softvq_lib.data import Source, UnreadableLog, validation_batches
from softvq_lib.draws import Seeds, normal
from softvq_lib.features import Features
from softvq_lib.generators.dit import DiT
from softvq_lib.generators.loading import Loaded
from softvq_lib.generators.sit import SiT
from softvq_lib.tokenizers import Tokenizer

LATENTS = ("z", "z_hat")
POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda tokens: tokens.mean(1),  # (b, d)
    "flatten": lambda tokens: tokens.flatten(1),  # (b, l d)
}
_SPLITS = ("train", "validation")


@dataclass(frozen=True)
class FeatureName:
    """Which features.

    Attributes:
        source: The model, or `pixels`.
        features: `z`, `z_hat` (the encoder's output), `hidden` (after a generator's block), `pixels`, or `pooled` (what
            a network's own classifier would see).
        pooling: How they become one vector an image: `mean` over tokens, `flatten`, or "" for one that is there.
        block: Of a generator, from 1.
        noise_level: What the generator saw, from 0, data, to 1, noise.
    """

    source: str
    features: str
    pooling: str = ""
    block: int | None = None
    noise_level: float | None = None

    def __str__(self) -> str:
        if self.block is not None:
            return f"{self.source}, block {self.block}, noise {self.noise_level:g}"
        kind = "" if self.features in (self.source, "pooled") else f", {self.features.replace('z_hat', 'ẑ')}"
        return f"{self.source}{kind}" + (f", {self.pooling}" if self.features in LATENTS else "")


# Maps images (b, 3, height, width) in [-1, 1], and a seed for each, to features (b, f) by name.
Reader = Callable[[Tensor, Sequence[int]], dict[FeatureName, Tensor]]


def of_tokenizer(
    tokenizer: Tokenizer, source: str, features: Iterable[str] = LATENTS, pooling: Iterable[str] = tuple(POOLINGS)
) -> Reader:
    """Read latents of a tokenizer, (b, d) pooled by `mean`, (b, l d) by `flatten` (KL's z_hat twice as many).

    Raises:
        ValueError: for features that are not `z` or `z_hat`, or a pooling that is not `mean` or `flatten`.
    """
    features, pooling = list(features), list(pooling)
    for name in features:
        one_of("features", name, LATENTS)
    for name in pooling:
        one_of("pooling", name, POOLINGS)

    def read(images: Tensor, seeds: Sequence[int]) -> dict[FeatureName, Tensor]:
        code = tokenizer.encode(images)
        return {FeatureName(source, x, how): POOLINGS[how](getattr(code, x)) for x in features for how in pooling}

    return read


def of_generator(
    loaded: Loaded, tokenizer: Tokenizer, source: str, blocks: Iterable[int] | None, noise_levels: Iterable[float]
) -> Reader:
    """Read hidden states of SiT or DiT, averaged over the tokens, (b, c).

    Every block and noise level sees the same noise of an image.

    Args:
        loaded: The generator and the statistics of its latents.
        tokenizer: Whose z it was trained on.
        source: Its name.
        blocks: Numbers from 1. None: all.
        noise_levels: From 0, data, to 1, noise; DiT's timestep is the nearest of its 1000.

    Raises:
        ValueError: for MAR, a block that is not there, or a noise level outside [0, 1].
    """
    if not isinstance(loaded.model, SiT | DiT):
        raise ValueError(f"{source} is a {type(loaded.model).__name__}: only SiT and DiT have features by noise level.")
    depth = len(loaded.model.backbone.blocks)
    blocks, noise_levels = list(range(1, depth + 1) if blocks is None else blocks), list(noise_levels)
    for block in blocks:
        if not 1 <= block <= depth:
            raise ValueError(f"block {block} is none of {source}, which has {depth}: choose 1 to {depth}.")
    for level in noise_levels:
        if not 0 <= level <= 1:
            raise ValueError(f"noise_levels: {level} is not allowed; choose from 0, data, to 1, noise.")

    def read(images: Tensor, seeds: Sequence[int]) -> dict[FeatureName, Tensor]:
        x = loaded.normalise(tokenizer.encode(images).z.float())  # (b, l, d)
        # On the CPU, so that the noise is the same on every device.
        noise = normal(tuple(x.shape), Seeds(seeds), torch.empty(())).to(x)
        return {
            FeatureName(source, "hidden", "mean", block, level): h.float().mean(1)  # (b, c)
            for level in noise_levels
            for block, h in hidden_states(loaded.model, x, noise, level, blocks).items()
        }

    return read


def hidden_states(
    model: SiT | DiT, x: Tensor, noise: Tensor, noise_level: float, blocks: Iterable[int]
) -> dict[int, Tensor]:
    """Return the outputs (b, l, c) of blocks, numbered from 1, for the class "no class".

    Args:
        model: SiT or DiT.
        x: Normalised latents (b, l, d).
        noise: Standard normal, of that shape.
        noise_level: From 0, data, to 1, noise.
        blocks: Whose outputs.
    """
    if isinstance(model, SiT):
        t = torch.full((1,), noise_level, device=x.device)
        noisy, _ = model.interpolant.noisy(x, noise, t)
    else:
        t = torch.full((1,), round(noise_level * (model.diffusion.steps - 1)), device=x.device)
        noisy = model.diffusion.add_noise(x, noise, t)
    null = torch.full((1,), model.config.classes, device=x.device)
    kept: dict[int, Tensor] = {}
    hooks = [
        model.backbone.blocks[block - 1].register_forward_hook(
            lambda _, __, out, block=block: kept.update({block: out})
        )
        for block in blocks
    ]
    try:
        model.backbone(noisy, t, null)
    finally:
        for hook in hooks:
            hook.remove()
    return kept


def of_pixels(images: Tensor, seeds: Sequence[int]) -> dict[FeatureName, Tensor]:
    """Read the pixels themselves, (b, 3 height width) of images (b, 3, height, width) in [-1, 1]."""
    return {FeatureName("pixels", "pixels", "flatten"): images.flatten(1)}


def of_network(network: Features) -> Reader:
    """Read what the classifier of a frozen network would see, (b, pooled_width).

    Small images are enlarged as it does for all its uses.
    """
    name = FeatureName(network.label, "pooled")
    return lambda images, seeds: {name: network.pooled(images)}


@torch.no_grad()
def read_features(
    source: Source,
    readers: Sequence[Reader],
    *,
    image_size: int,
    split: str = "train",
    seed: int = 0,
    limit: int | None = None,
    batch_size: int = 64,
    workers: int | None = 0,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> tuple[dict[FeatureName, Tensor], Tensor]:
    """Read the features of images in one pass; all stay in memory, 4 bytes a number.

    Args:
        source: The images, cropped in the centre; those that cannot be read are left out.
        readers: Of the features.
        image_size: Side of the images in pixels.
        split: `train` or `validation`; their images get different noise.
        seed: Of the noise, which an image gets by its number, whatever its neighbours.
        limit: Only the first so many. None: all.
        batch_size: Images at once.
        workers: Loader processes, as in `DataConfig`.
        device: Where the models are.
        progress: Show a bar.

    Returns:
        Features, float32 (n, f) on the CPU, and labels (n,), -1 where there is none.

    Raises:
        ValueError: for an argument out of range, or when no image can be read.
    """
    from tqdm import tqdm

    at_least("seed", seed, 0)
    one_of("split", split, _SPLITS)
    stream = _SPLITS.index(split)
    unreadable, labels, parts = UnreadableLog(len(source)), [], {}
    options = {"image_size": image_size, "batch_size": batch_size, "limit": limit, "workers": workers}
    total = min(len(source), limit or len(source))
    with tqdm(total=total, unit="image", desc=f"features, {split}", disable=not progress) as bar:
        for batch in validation_batches(source, **options):
            unreadable.add(batch.unreadable)
            # Words of 32 bits: torch's generator on the CPU looks at no more.
            seeds = [
                int(np.random.SeedSequence((seed, stream, i)).generate_state(1)[0]) for i in batch.indices.tolist()
            ]
            images = batch.images.to(device)
            for reader in readers:
                for name, x in reader(images, seeds).items():
                    parts.setdefault(name, []).append(x.float().cpu())
            labels.append(batch.labels)
            bar.update(len(batch) + len(batch.unreadable))
    return {name: torch.cat(x) for name, x in parts.items()}, torch.cat(labels)
