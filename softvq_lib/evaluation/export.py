"""Export of generated images as 8-bit pixels in shards, for the evaluators of this field (Sec. 4.1, Evaluation).

A folder holds `samples.json`, the header; `labels.npy`, int64 (n,); and shards `samples-00000.npy`, uint8
(n, height, width, 3). Each image has a seed of its own, so it does not depend on the shards or batches that the others
came in, up to the rounding of other batch sizes.
"""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from zipfile import ZipFile, ZipInfo

import numpy as np
import torch
from torch import Tensor

from softvq_lib.config import at_least, one_of
from softvq_lib.data.latents import tokenizer_hash
from softvq_lib.generators.loading import Loaded
from softvq_lib.generators.sampling import SampleConfig, generate
from softvq_lib.tokenizers import Tokenizer
from softvq_lib.training.files import write_json, write_whole
from softvq_lib.weights import sha256

log = logging.getLogger(__name__)

HEADER, LABELS = "samples.json", "labels.npy"
LABELLINGS = ("balanced", "random")
# How pixels in [-1, 1] become numbers from 0 to 255: of DiT and SiT (truncated), of REPA and the paper's code
# (truncated), of MAR (rounded). They differ by up to one level, which shows in a Fréchet distance.
CONVENTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "dit": lambda x: 127.5 * x + 128,
    "repa": lambda x: 255 * ((x + 1) / 2),
    "mar": lambda x: (255 * ((x + 1) / 2)).round(),
}


def to_uint8(images: Tensor, convention: str = "dit") -> Tensor:
    """Map images (b, 3, height, width) to bytes, uint8 (b, height, width, 3); what is beyond [-1, 1] is clamped.

    Args:
        images: (b, 3, height, width), float, about [-1, 1].
        convention: One of `CONVENTIONS`.

    Raises:
        ValueError: for an unknown convention.
    """
    one_of("convention", convention, CONVENTIONS)
    values = CONVENTIONS[convention](images.float()).clamp(0, 255)
    return values.to(torch.uint8).permute(0, 2, 3, 1)  # (b, height, width, 3)


def sample_labels(count: int, classes: int, labels: str, seed: int) -> Tensor:
    """Return a class for each image, int64 (n,).

    Args:
        count: Images n.
        classes: Labels are 0 to `classes` - 1.
        labels: `random`, each drawn evenly; or `balanced`, one class after the other over and over, so that any run
            of images is balanced too (the Inception score is taken of runs of 5,000). Where the classes do not divide
            the count, the first ones have an image more.
        seed: Of what is drawn.

    Raises:
        ValueError: for another name, or fewer images than a balance needs.
    """
    one_of("labels", labels, LABELLINGS)
    at_least("count", count, 1)
    if labels == "random":
        return torch.from_numpy(np.random.default_rng((seed, 1)).integers(classes, size=count))
    if count < classes:
        raise ValueError(
            f"count={count} images cannot be balanced over {classes} classes: ask for {classes} or more, or for "
            "labels='random'."
        )
    return torch.arange(count) % classes


def sample_seeds(seed: int, count: int) -> list[int]:
    """Return a seed for each image: different for all of one export, the same for image i whatever the count.

    A generator on the CPU looks at 32 bits of its seed; of as many random seeds some would be equal.
    """
    first = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return [(first + i * 0x9E3779B1) % 2**32 for i in range(count)]  # an odd factor: no two are equal


def export_samples(
    bundle: Loaded,
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    count: int = 50_000,
    labels: str = "balanced",
    seed: int = 0,
    batch_size: int = 64,
    shard_size: int = 1000,
    settings: SampleConfig | None = None,
    convention: str = "dit",
    progress: bool = True,
) -> dict:
    """Generate and decode images where the weights are, or go on with an export that was interrupted.

    Killed at any moment and started again it goes on after the last shard, and the files come out the same to the
    byte. Shards that are there are checked by their checksums; damaged ones are made anew.

    Args:
        bundle: The generator, with the statistics of its latents.
        tokenizer: Whose latents it was trained on.
        folder: Of this export alone.
        count: Number of images; 50,000 is what published FIDs are computed from.
        labels: `balanced` or `random`, see `sample_labels`.
        seed: Of labels and images.
        batch_size: Images made at once.
        shard_size: Images to a file.
        settings: How to sample. None: as the bundle says.
        convention: One of `CONVENTIONS`.
        progress: Show a progress bar.

    Returns:
        The header.

    Raises:
        ValueError: for an argument out of range, a tokenizer that is not the generator's, a folder with another
            export, too little room on the disk, or images that are not finite.
    """
    at_least("seed", seed, 0)
    at_least("batch_size", batch_size, 1)
    at_least("shard_size", shard_size, 1)
    one_of("convention", convention, CONVENTIONS)
    config, settings = bundle.model.config, settings or bundle.sampling
    settings.arguments(config.generator)
    tokens_hash = check_tokenizer(bundle, tokenizer)
    classes = sample_labels(count, config.classes, labels, seed)
    header = {
        "format": 1,
        "count": count,
        "classes": config.classes,
        "labels": labels,
        "seed": seed,
        "shard_size": shard_size,
        "image_size": tokenizer.config.image_size,
        "uint8": convention,
        "settings": asdict(settings),
        "generator": tokenizer_hash(bundle.model),
        "tokenizer": tokens_hash,
        "mean": bundle.mean.tolist(),
        "std": bundle.std.tolist(),
    }
    folder = Path(folder).expanduser()
    kept = _kept(folder, header)
    spans = {
        _name(n): range(first, min(first + shard_size, count)) for n, first in enumerate(range(0, count, shard_size))
    }
    missing = {name: span for name, span in spans.items() if name not in kept}
    _check_room(folder, sum(map(len, missing.values())) * 3 * header["image_size"] ** 2)
    folder.mkdir(parents=True, exist_ok=True)
    for torn in folder.glob(".*.part"):  # of a process that was killed while it wrote
        torn.unlink()

    def written() -> dict:
        return {**header, "shards": [kept[name] for name in sorted(kept)]}

    write_json(folder / HEADER, written())
    _save(folder / LABELS, classes.numpy())
    seeds = sample_seeds(seed, count)
    for name, images in _shards(bundle, tokenizer, missing, classes, seeds, settings, batch_size, convention, progress):
        kept[name] = {"name": name, "count": len(images), "sha256": _save(folder / name, images)}
        write_json(folder / HEADER, written())
    return written()


def merge_npz(folder: str | Path, path: str | Path | None = None) -> Path:
    """Write a finished export as one file that ADM's evaluator reads, with a single array `arr_0`.

    Shards are copied one at a time. The same export gives the same bytes.

    Args:
        folder: What `export_samples` wrote.
        path: The file. None: `samples.npz` in the folder.

    Returns:
        Its path.

    Raises:
        ValueError: when the export is not finished or a shard is damaged.
    """
    folder = Path(folder).expanduser()
    header = _read_header(folder)
    if header is None or sum(shard["count"] for shard in header["shards"]) != header["count"]:
        made = "no" if header is None else str(sum(shard["count"] for shard in header["shards"]))
        raise ValueError(f"{folder} holds no finished export ({made} images are there): run the export again.")
    path = folder / "samples.npz" if path is None else Path(path).expanduser()
    size = header["image_size"]
    shape = {"shape": (header["count"], size, size, 3), "fortran_order": False, "descr": "|u1"}

    def write(part: Path) -> None:
        # Without a date of its own the entry has a fixed one.
        with ZipFile(part, "w") as archive, archive.open(ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, shape)
            for shard in header["shards"]:
                if not _whole(folder, shard):
                    raise ValueError(f"{folder / shard['name']} is missing or damaged: run the export again.")
                file.write(np.load(folder / shard["name"]).tobytes())

    write_whole(path, write)
    return path


def check_tokenizer(bundle: Loaded, tokenizer: Tokenizer) -> str:
    """Return the tokenizer's fingerprint.

    Raises:
        ValueError: when its latents are not those of the generator.
    """
    for name in ("tokens", "dim"):
        generated, decoded = getattr(bundle.model.config, name), getattr(tokenizer.config, name)
        if generated != decoded:
            raise ValueError(
                f"the generator makes latents of {name}={generated}, but the tokenizer decodes {name}={decoded}: give "
                f"the tokenizer that it was trained on{f', {bundle.tokenizer}' if bundle.tokenizer else ''}."
            )
    found = tokenizer_hash(tokenizer)
    if bundle.tokenizer_hash not in (None, found):
        raise ValueError(
            f"the generator was trained on latents of another tokenizer ({bundle.tokenizer}, sha256 "
            f"{bundle.tokenizer_hash}); this one has sha256 {found}: give that one."
        )
    if bundle.origin and bundle.tokenizer and tokenizer.origin:
        wanted, given = (Path(name).name for name in (bundle.tokenizer, tokenizer.origin))
        if wanted != given:
            raise ValueError(
                f"{bundle.origin} was trained on latents of {wanted}, but the tokenizer is {given}: give {wanted}."
            )
    return found


@torch.no_grad()
def _shards(bundle, tokenizer, missing, classes, seeds, settings, batch_size, convention, progress):
    """Yield the name and the images, uint8 (n, height, width, 3), of each shard that is missing."""
    from tqdm import tqdm

    total, size = len(classes), tokenizer.config.image_size
    device = next(tokenizer.parameters()).device
    was_training = tokenizer.training
    tokenizer.eval()
    done = total - sum(map(len, missing.values()))
    try:
        with tqdm(total=total, initial=done, unit="image", desc="samples", disable=not progress) as bar:
            for name, span in missing.items():
                images = np.empty((len(span), size, size, 3), np.uint8)
                for first in range(0, len(span), batch_size):
                    rows = span[first : first + batch_size]
                    part = slice(rows.start, rows.stop)
                    x = generate(bundle.model, classes[part], seeds[part], settings, batch_size=batch_size)
                    decoded = tokenizer.decode(bundle.denormalise(x).to(device)).cpu()
                    if not decoded.isfinite().all():
                        broken = rows[int((~decoded.flatten(1).isfinite().all(1)).nonzero()[0])]
                        raise ValueError(
                            f"image {broken} (class {int(classes[broken])}, seed {seeds[broken]}) is not finite: use "
                            "more steps, less guidance, or a generator that is trained further."
                        )
                    images[first : first + len(rows)] = to_uint8(decoded, convention).numpy()
                    bar.update(len(rows))
                yield name, images
    finally:
        tokenizer.train(was_training)


def _name(number: int) -> str:
    return f"samples-{number:05d}.npy"


def _save(path: Path, array: np.ndarray) -> str:
    """Write an array whole; return the file's sha256."""

    def write(part: Path) -> None:
        with open(part, "wb") as file:
            np.save(file, array)

    write_whole(path, write)
    return sha256(path)


def _whole(folder: Path, shard: dict) -> bool:
    path = folder / shard["name"]
    return path.is_file() and sha256(path) == shard["sha256"]


def _read_header(folder: Path) -> dict | None:
    path = folder / HEADER
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}): choose another folder, or delete that one.") from None


def _kept(folder: Path, header: dict) -> dict[str, dict]:
    """Return the entries of the shards that are there and whole, by name.

    Raises:
        ValueError: when the folder holds anything but this export.
    """
    held = _read_header(folder)
    if held is None:
        if folder.exists() and any(not path.name.endswith(".part") for path in folder.iterdir()):
            raise ValueError(f"{folder} is not empty and holds no samples: choose another folder.")
        return {}
    different = [f"{k}: {held.get(k)!r} there, {v!r} asked for" for k, v in header.items() if held.get(k) != v]
    if different:
        raise ValueError(f"{folder} holds other samples ({'; '.join(different)}): choose another folder.")
    kept = {shard["name"]: shard for shard in held["shards"] if _whole(folder, shard)}
    for shard in held["shards"]:
        if shard["name"] not in kept:
            log.warning("%s is missing or damaged: it is made anew.", folder / shard["name"])
    return kept


def _check_room(folder: Path, needed: int) -> None:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if (free := shutil.disk_usage(there).free) < needed:
        raise ValueError(
            f"{folder} has {free / 1e6:.0f} MB of free space, but the images need {needed / 1e6:.0f} MB: free some, or "
            "choose another folder."
        )
