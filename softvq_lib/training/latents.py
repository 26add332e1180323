"""Encode a data set once: latents of both mirror images into a cache that every generator on them shares.

`z` is what the tokenizer gives in evaluation; for KL that is the posterior's mean. It is stored as float32, exactly, or
rounded to float16 (by at most 2^-11 of each number), half as large.
"""

import hashlib
import logging
import math
import shutil
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from softvq_lib.config import at_least, one_of
from softvq_lib.data import DataSplits, Source, UnreadableLog
from softvq_lib.data.images import to_tensor
from softvq_lib.data.latents import (
    HEADER,
    IDENTITY,
    LatentCache,
    centre_batches,
    check_shard,
    map_shard,
    read_header,
    tokenizer_hash,
)
from softvq_lib.tokenizers import NotFiniteError, Tokenizer
from softvq_lib.training import engine
from softvq_lib.training.files import LOCK, locked, write_json, write_whole
from softvq_lib.training.run import provenance

log = logging.getLogger(__name__)

DTYPES = ("float32", "float16")
PARTIAL, FINISHED = "partial", "finished"  # `status` of a header; a partial cache goes on when it is encoded again


def encode_dataset(
    tokenizer: Tokenizer,
    data: DataSplits,
    folder: str | Path,
    *,
    split: str = "train",
    flips: bool = True,
    dtype: str = "float32",
    batch_size: int = 64,
    shard_size: int = 4096,
    device: str | None = None,
    precision: str = "fp32",
    workers: int | None = None,
    progress: bool = True,
    unreadable: float = 0.01,
) -> LatentCache:
    """Encode the images of a data set, cropped in the centre, or open the cache when they are encoded already.

    Killed at any moment and started again it goes on, and the files come out the same to the byte. Shards that are
    there are checked by their checksums; those that are missing or damaged are made anew. Images that cannot be read
    are left out, named in the log, and listed in the header (`left_out`, numbers in the source).

    Args:
        tokenizer: In evaluation meanwhile.
        data: Whose `split` is encoded.
        folder: Of this cache alone.
        split: `train`, `validation` or `all`.
        flips: Encode the mirror image of each image too.
        dtype: How latents are stored, `float32` or `float16`.
        batch_size: Images encoded at once.
        shard_size: Images of the source to a file.
        device: As in `TrainConfig`; None: where the tokenizer's weights are.
        precision: As in `TrainConfig`.
        workers: Loader processes; None as in `DataConfig`.
        progress: Show a progress bar.
        unreadable: Largest share of the images that may be left out because they cannot be read, from 0 to 1.

    Raises:
        ValueError: for an argument out of range; a folder that holds something else, or latents of another tokenizer,
            other data or another form; too many images that cannot be read; a full disk; latents that are not finite.
    """
    one_of("split", split, ("train", "validation", "all"))
    one_of("dtype", dtype, DTYPES)
    one_of("precision", precision, ("auto", "bf16", "fp32"))
    at_least("batch_size", batch_size, 1)
    at_least("shard_size", shard_size, 1)
    if not 0 <= unreadable <= 1:
        raise ValueError(f"unreadable={unreadable!r} is a share of the images: give a number from 0 to 1.")
    home = next(tokenizer.parameters()).device
    place = home if device is None else engine.choose_device(device)
    autocast = engine.choose_precision(precision, place)
    source = getattr(data, split)
    header = {
        "format": 1,
        "tokenizer": tokenizer_hash(tokenizer),
        "data": data.fingerprint,
        "split": split,
        "images": len(source),
        "image_size": tokenizer.config.image_size,
        "crop": "centre",
        "flips": flips,
        "tokens": tokenizer.config.tokens,
        "dim": tokenizer.config.dim,
        "dtype": dtype,
        "precision": str(autocast).removeprefix("torch."),
        "shard_size": shard_size,
        "name": data.name,
        "classes": data.classes,
        "status": PARTIAL,
        "shards": [],
    }
    assert set(IDENTITY) <= set(header)
    folder = Path(folder).expanduser()
    spans = [range(first, min(first + shard_size, len(source))) for first in range(0, len(source), shard_size)]
    kept = _kept(folder, header)
    if len(kept) == len(spans) and "mean" in read_header(folder):
        return LatentCache.open(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, "filled", otherwise="choose another folder"):
        kept = _kept(folder, header)  # another process may have gone on in the meantime
        was_training = tokenizer.training
        try:
            tokenizer.to(place).eval()
            account = UnreadableLog(len(source), unreadable)
            _encode(tokenizer, source, folder, header, kept, spans, batch_size, autocast, workers, progress, account)
        finally:
            tokenizer.to(home).train(was_training)
        header["shards"] = [kept[name] for name in sorted(kept)]
        write_json(folder / HEADER, header | _summary(folder, header))
    return LatentCache.open(folder)


def _kept(folder: Path, header: dict) -> dict[str, dict]:
    """Entries of the shards that are there and whole, by name.

    Raises:
        ValueError: when the folder holds anything but latents of this identity.
    """
    held = read_header(folder)
    if held is None:
        if folder.exists() and any(path.name not in (LOCK, f".{HEADER}.part") for path in folder.iterdir()):
            raise ValueError(f"{folder} is not empty and holds no latents: choose another folder.")
        return {}
    different = [f"{k}: {held[k]!r} there, {header[k]!r} asked for" for k in IDENTITY if held[k] != header[k]]
    if different:
        raise ValueError(
            f"{folder} holds other latents ({'; '.join(different)}): choose another folder, or delete that one."
        )
    whole = {}
    for entry in held["shards"]:
        try:
            check_shard(folder, entry, whole=True)
            whole[entry["name"]] = entry
        except ValueError as error:
            log.warning("%s", error)
    return whole


@torch.no_grad()
def _encode(
    tokenizer: Tokenizer,
    source: Source,
    folder: Path,
    header: dict,
    kept: dict[str, dict],
    spans: list[range],
    batch_size: int,
    autocast: torch.dtype,
    workers: int | None,
    progress: bool,
    account: UnreadableLog,
) -> None:
    """Make the shards that are missing from `kept`, and add their entries to it and to the header on the disk."""
    from tqdm import tqdm

    missing = {}
    for number, span in enumerate(spans):
        name = f"shard-{number:05d}.safetensors"
        if name in kept:
            absent = np.setdiff1d(span, map_shard(folder / name)["indices"]).tolist()
            account.add([(index, source.name(index), "left out before") for index in absent])
        else:
            missing[name] = span
    todo = sum(map(len, missing.values()))
    item = (1 + header["flips"]) * header["tokens"] * header["dim"] * np.dtype(header["dtype"]).itemsize
    if (free := shutil.disk_usage(folder).free) < todo * item:
        raise ValueError(
            f"{folder} has {free / 1e6:.1f} MB of free space, but {todo:,} more latents need {todo * item / 1e6:.1f} "
            "MB: free some, choose another folder, or dtype='float16'."
        )
    write_json(folder / HEADER, header | {"shards": [kept[name] for name in sorted(kept)]})
    cut = (span[first : first + batch_size] for span in missing.values() for first in range(0, len(span), batch_size))
    batches = centre_batches(source, cut, image_size=header["image_size"], workers=workers)
    device = next(tokenizer.parameters()).device
    with tqdm(total=len(source), initial=len(source) - todo, unit="image", desc="latents", disable=not progress) as bar:
        for name, span in missing.items():
            made = []
            for _ in range(0, len(span), batch_size):
                pixels, labels, indices, unreadable = next(batches)
                account.add(unreadable)
                if len(labels):
                    with torch.autocast(device.type, autocast, enabled=autocast != torch.float32):
                        z = _views(tokenizer, to_tensor(pixels).to(device), indices, header["flips"])
                    made.append((_stored(z, header["dtype"], indices), labels.numpy(), indices.numpy()))
                bar.update(len(labels) + len(unreadable))
            kept[name] = _write(folder / name, made, header)
            write_json(folder / HEADER, header | {"shards": [kept[name] for name in sorted(kept)]})


def _views(tokenizer: Tokenizer, images: Tensor, indices: Tensor, flips: bool) -> Tensor:
    """Latents of images and, if asked for, of their mirror images, float32 (b, f, l, d)."""
    views = [images, images.flip(-1)] if flips else [images]
    try:
        return torch.stack([tokenizer.encode(view).z.float() for view in views], dim=1)  # (b, f, l, d)
    except NotFiniteError as error:
        named = ", ".join(str(indices[row].item()) for row in error.rows[:8])
        raise ValueError(f"{error} (images {named})") from None


def _stored(z: Tensor, dtype: str, indices: Tensor) -> np.ndarray:
    """Latents as they are stored.

    Raises:
        ValueError: naming an image whose latents are not finite, or too large for the dtype.
    """
    stored = z.cpu().to(getattr(torch, dtype))
    finite = stored.flatten(1).isfinite().all(dim=1)
    if not finite.all():
        raise ValueError(
            f"latents of image {indices[~finite][0]} cannot be stored as {dtype} (largest {z.abs().max():.3g}): use "
            "dtype='float32', precision='fp32', or another tokenizer."
        )
    return stored.numpy()


def _write(path: Path, made: list[tuple[np.ndarray, np.ndarray, np.ndarray]], header: dict) -> dict:
    """Write a shard whole; return its entry for the header."""
    from safetensors.numpy import save

    shape = (0, 1 + header["flips"], header["tokens"], header["dim"])
    nothing = np.empty(shape, header["dtype"]), np.empty(0, np.int64), np.empty(0, np.int64)
    columns = zip(nothing, *made, strict=True)
    arrays = dict(zip(("latents", "labels", "indices"), map(np.concatenate, columns), strict=True))
    content = save(arrays)
    write_whole(path, lambda part: part.write_bytes(content))
    checksum = hashlib.sha256(content).hexdigest()
    return {"name": path.name, "count": len(arrays["labels"]), "bytes": len(content), "sha256": checksum}


def _summary(folder: Path, header: dict) -> dict:
    """What the header says once all shards are there."""
    shards = [map_shard(folder / entry["name"]) for entry in header["shards"]]
    present = np.concatenate([shard["indices"] for shard in shards])
    mean, std = exact_statistics(shard["latents"] for shard in shards)
    versions = provenance()
    return {
        "status": FINISHED,
        "count": len(present),
        "left_out": np.setdiff1d(np.arange(header["images"]), present).tolist(),
        "mean": mean,
        "std": std,
        "versions": {"python": versions["python"], **versions["packages"]},
    }


ROWS = 2**13  # added up at once
BITS = 40  # of each part of a number; a sum of so many rows then has 53 bits, which float64 holds


def exact_statistics(arrays: Iterable[np.ndarray]) -> tuple[dict, dict]:
    """Mean and standard deviation (of the whole, not of a sample) along the last axis of arrays (..., d), and of all.

    Sums are exact, so neither the order of the numbers nor how they are cut into arrays can change the result.

    Returns:
        Mean and deviation, each as `channel`, a list of d numbers, and `scalar`.
    """
    count, sums, squares = 0, 0, 0
    for array in arrays:
        array = array.reshape(-1, array.shape[-1])
        for first in range(0, len(array), ROWS):
            x = array[first : first + ROWS].astype(np.float64)
            count += len(x)
            sums, squares = sums + column_sums(x), squares + column_sums(x * x)
    mean, square = sums / count, squares / count
    deviation = [math.sqrt(q - m * m) for q, m in zip(square, mean, strict=True)]
    whole, of_squares = mean.mean(), square.mean()
    return (
        {"channel": [float(m) for m in mean], "scalar": float(whole)},
        {"channel": deviation, "scalar": math.sqrt(of_squares - whole * whole)},
    )


def column_sums(x: np.ndarray) -> np.ndarray:
    """Sum at most `ROWS` float64 rows (n, d) without any rounding; a (d,) array of fractions."""
    total = np.full(x.shape[1], Fraction(0))
    while largest := float(np.abs(x).max(initial=0.0)):
        unit = 2.0 ** (math.frexp(largest)[1] - BITS)
        whole = np.trunc(x / unit)
        total += np.array([Fraction(number) * Fraction(unit) for number in whole.sum(axis=0).tolist()])
        x = x - whole * unit
    return total
