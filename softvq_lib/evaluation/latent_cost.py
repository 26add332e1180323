"""Time of reading random batches from a latent cache, beside one safetensors file opened for each item."""

import tempfile
from pathlib import Path

import numpy as np
import torch

from softvq_lib.config import at_least
from softvq_lib.data import DataConfig, open_dataset
from softvq_lib.data.latents import LatentCache
from softvq_lib.evaluation.efficiency import interleaved, ratio_of_medians
from softvq_lib.tokenizers import Tokenizer
from softvq_lib.training.latents import encode_dataset


def latent_reading_ratio(
    items: int = 2048,
    *,
    tokens: int = 64,
    dim: int = 32,
    batch_size: int = 256,
    batches: int = 8,
    rounds: int = 9,
    shard_size: int = 64,
    threads: int = 1,
    folder: str | Path | None = None,
) -> dict[str, object]:
    """Read random batches, normalised and with random flips, in both ways and in turns; both give the same numbers.

    The latents are those of a random tokenizer on shapes. Their files are in the system's memory by then, so that
    what counts is the reader's work and not the disk.

    Args:
        items: Images.
        tokens: Latent tokens l.
        dim: Latent channels d.
        batch_size: Latents in a batch.
        batches: Read in a round.
        rounds: In which each way takes its turn, three or more.
        shard_size: Images to a shard of the cache; few, so that a batch meets nearly all shards, as in a large cache.
        threads: Of torch, for both sides.
        folder: Where the files are written for the time being; None: the system's place for temporary files.

    Returns:
        `ratio` of processor time, files / cache, with its 95 % interval `low`, `high`; `seconds` an item of the cache
        and `against_seconds` of the files (medians); and what was measured.

    Raises:
        ValueError: for an argument out of range.
    """
    for name, value in (("items", items), ("batch_size", batch_size), ("batches", batches)):
        at_least(name, value, 1)
    at_least("rounds", rounds, 3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = Tokenizer.from_preset("tiny", quantizer="ae", tokens=tokens, dim=dim).eval()
    data = open_dataset(DataConfig("shapes", limit=items), tokenizer.config.image_size)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        cache = encode_dataset(tokenizer, data, Path(place, "cache"), shard_size=shard_size, progress=False)
        single = _single_files(cache, Path(place, "files"))
        mean, std = cache.statistics()

        def from_files(picks: np.ndarray, flips: np.ndarray) -> torch.Tensor:
            return (torch.stack([single(*which) for which in zip(picks, flips, strict=True)]) - mean) / std

        def all_batches(read) -> list[torch.Tensor]:
            rng = np.random.default_rng(0)
            drawn = [(rng.integers(len(cache), size=batch_size), rng.random(batch_size) < 0.5) for _ in range(batches)]
            return [read(*which) for which in drawn]

        assert all(map(torch.equal, all_batches(cache.batch), all_batches(from_files))), "not the same latents"
        subjects = {"cache": lambda: all_batches(cache.batch), "files": lambda: all_batches(from_files)}
        seconds = interleaved(subjects, rounds, threads)
        shards = len(cache.header["shards"])
    ratio, low, high = ratio_of_medians(seconds["files"], seconds["cache"])
    mine, theirs = (float(np.median(seconds[name])) / (batches * batch_size) for name in ("cache", "files"))
    row = {"subject": "latent cache", "against": "one safetensors file opened per item", "ratio": ratio, "low": low}
    row |= {"high": high, "seconds": mine, "against_seconds": theirs, "items": items, "shards": shards}
    return row | {"tokens": tokens, "dim": dim, "batch_size": batch_size, "rounds": rounds, "threads": threads}


def _single_files(cache: LatentCache, folder: Path):
    """Write each item into a file of its own; return a function that reads one by its number and flip, (l, d)."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    folder.mkdir()
    for item, (latents, label) in enumerate(cache):
        image, mirrored = (view.contiguous() for view in latents)
        tensors = {"latents": image, "latents_flip": mirrored, "label": torch.tensor(label)}
        save_file(tensors, folder / f"{item}.safetensors")

    def read(item: int, flip: bool) -> torch.Tensor:
        with safe_open(folder / f"{item}.safetensors", framework="pt") as file:
            return file.get_tensor("latents_flip" if flip else "latents")

    return read
