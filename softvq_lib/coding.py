"""Images to latents on the disk, and latents back to pictures: the commands `encode` and `decode` (Sec. 3.1)."""

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from softvq_lib.config import at_least, fingerprint, one_of
from softvq_lib.data import DataConfig, open_dataset
from softvq_lib.data.latents import HEADER, IDENTITY, LatentCache, map_shard, read_header, tokenizer_hash
from softvq_lib.evaluation.export import CONVENTIONS
from softvq_lib.pictures import Pictures, png_names, remove_own, writable, write_pictures
from softvq_lib.tokenizers import Tokenizer
from softvq_lib.training.engine import choose_device
from softvq_lib.training.files import locked, write_json
from softvq_lib.training.generator import find_tokenizer
from softvq_lib.training.latents import encode_dataset
from softvq_lib.weights import sha256

log = logging.getLogger(__name__)

NAMES = "names.json"  # beside the latents of a folder of images: their paths inside it, by number in the source


def encode_images(
    tokenizer: str | Tokenizer,
    dataset: str,
    out: str | Path,
    *,
    split: str = "all",
    image_column: str | None = None,
    label_column: str | None = None,
    flips: bool = False,
    dtype: str = "float32",
    batch_size: int = 64,
    shard_size: int = 4096,
    unreadable: float = 0.01,
    precision: str = "fp32",
    device: str = "auto",
    workers: int | None = None,
    runs: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> LatentCache:
    """Encode images, cropped in the centre, into a folder of latents, or go on with one that was interrupted.

    The folder holds `latents.json`, the header, whose `status` is `partial` until all is there; shards in safetensors,
    with `latents` (n, f, l, d), `labels` (n,) and `indices` (n,), see `softvq_lib.data.latents`; and for a folder of
    images `names.json`, their paths by index. Started again it goes on, and ends with the same bytes.

    Args:
        tokenizer: Its folder, run or hub name, or itself.
        dataset: As in `DataConfig`: a folder of images, parquet or tar files, `digits`, `shapes`, a hub name.
        out: Folder of the latents alone.
        split: `all`, in the order of the files; `train` or `validation`, in the fixed order that training has.
        image_column: As in `DataConfig`.
        label_column: As in `DataConfig`.
        flips: Encode the mirror image of each image too; f is then 2 and else 1.
        dtype: How latents are stored, `float32` (exact) or `float16`.
        batch_size: Images at once.
        shard_size: Images to a file.
        unreadable: Largest share of the images that may be left out because they cannot be read.
        precision: `fp32`, `bf16` or `auto`.
        device: `auto`, `cpu` or a torch device.
        workers: Loader processes; None as in `DataConfig`.
        runs: Folder of all runs.
        overwrite: Remove first the latents that an earlier call wrote into the folder.
        progress: Show a progress bar.

    Raises:
        ValueError: for an argument, a tokenizer or data that cannot be used; too many images that cannot be read; a
            folder that holds something else or, unless `overwrite`, other latents; too little room.
        OSError: when the disk is full on the way, or the hub cannot be reached.
    """
    place = choose_device(device)
    model = find_tokenizer(tokenizer, runs) if isinstance(tokenizer, str) else tokenizer
    config = DataConfig(dataset=dataset, image_column=image_column, label_column=label_column, workers=workers)
    data = open_dataset(config, model.config.image_size)
    folder = Path(out).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a folder for the latents.")
    if overwrite and read_header(folder):
        with locked(folder, "filled", otherwise="choose another folder"):
            remove_own(folder, re.compile(rf"{HEADER}|{NAMES}|shard-\d+\.safetensors").fullmatch)
    options = {"flips": flips, "dtype": dtype, "batch_size": batch_size, "shard_size": shard_size}
    options |= {"unreadable": unreadable, "precision": precision, "workers": workers, "progress": progress}
    with writable(folder):
        cache = encode_dataset(model, data, folder, split=split, device=str(place), **options)
        source = getattr(data, split)
        if getattr(source, "root", "") and not (folder / NAMES).exists():
            write_json(folder / NAMES, [source.name(index) for index in range(len(source))])
    return cache


def decode_latents(
    tokenizer: str | Tokenizer,
    latents: str | Path,
    out: str | Path,
    *,
    convention: str = "dit",
    batch_size: int = 64,
    device: str = "auto",
    runs: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Pictures:
    """Decode latents into a folder of PNG files, or go on with one that was interrupted.

    Pictures have the names of the images that they were encoded from, where these lay in a folder, else numbers.

    Args:
        tokenizer: Its folder, run or hub name, or itself: the one that encoded the latents.
        latents: A folder that `encode_images` wrote, or one safetensors file with a tensor `latents`, (n, l, d) or
            (n, f, l, d), of which the first of f is decoded, as the tokenizer gives them, not normalised.
        out: Folder of the pictures alone.
        convention: How pixels become bytes, as `evaluate` has it: a name in
            `softvq_lib.evaluation.export.CONVENTIONS`.
        batch_size: Pictures at once.
        device: `auto`, `cpu` or a torch device.
        runs: Folder of all runs.
        overwrite: Remove first the pictures that an earlier call wrote into the folder.
        progress: Show a progress bar.

    Raises:
        ValueError: for latents of another shape or of another tokenizer, unfinished, damaged or not finite; a
            tokenizer that is not there; a folder that holds something else or, unless `overwrite`, other pictures.
        OSError: when the disk is full on the way.
    """
    one_of("convention", convention, CONVENTIONS)
    at_least("batch_size", batch_size, 1)
    place = choose_device(device)
    model = find_tokenizer(tokenizer, runs) if isinstance(tokenizer, str) else tokenizer
    read, names, what = _open_latents(Path(latents).expanduser(), model)
    model = model.to(place).eval()

    @torch.no_grad()
    def make(rows: range) -> Tensor:
        z = read(rows)
        broken = (~z.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
        if broken:
            raise ValueError(f"{latents}: the latents of {names[rows[broken[0]]]} are not finite: encode it again.")
        return model.decode(z.to(place)).float().clamp(-1, 1)

    identity = {"what": "decoded", "tokenizer": tokenizer_hash(model), "latents": what}
    identity |= {"image_size": model.config.image_size}
    options = {"convention": convention, "batch_size": batch_size, "overwrite": overwrite, "progress": progress}
    return write_pictures(out, names, make, identity=identity, **options)


def _open_latents(path: Path, tokenizer: Tokenizer):
    """Return a function from rows to latents float32 (b, l, d), names of the pictures, and the sha256 of it all."""
    if path.is_dir():
        header = read_header(path)
        if header is not None:
            _check_shape((header["tokens"], header["dim"]), tokenizer, path)
        cache = LatentCache.open(path, tokenizer)
        cache.verify()
        indices = np.concatenate([map_shard(path / entry["name"])["indices"] for entry in header["shards"]])
        names = _names(path, indices.tolist(), header["images"])
        what = fingerprint([*(header[name] for name in IDENTITY), *(entry["sha256"] for entry in header["shards"])])
        return lambda rows: torch.stack([cache[row][0][0] for row in rows]), names, what
    if not path.is_file():
        raise ValueError(f"there is no {path}: give a folder that `softvq encode` wrote, or a safetensors file.")
    z = _read_file(path)
    _check_shape(tuple(z.shape[-2:]), tokenizer, path)
    return lambda rows: z[rows.start : rows.stop].float(), _numbers(range(len(z)), len(z)), sha256(path)


def _read_file(path: Path) -> Tensor:
    """Return `latents` (n, l, d) of a safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no whole safetensors file ({' '.join(str(error).split())}).") from None
    z = tensors.get("latents")
    if z is None or z.ndim not in (3, 4) or not len(z) or not z.is_floating_point():
        there = ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items()) or "nothing"
        raise ValueError(f"{path} holds {there}: a tensor `latents` (n, l, d) or (n, f, l, d) of floats is wanted.")
    return z[:, 0] if z.ndim == 4 else z


def _check_shape(found: tuple[int, int], tokenizer: Tokenizer, path: Path) -> None:
    wanted = (tokenizer.config.tokens, tokenizer.config.dim)
    if found != wanted:
        raise ValueError(
            f"{path} holds latents of {found[0]} tokens x {found[1]} channels, but this tokenizer decodes "
            f"{wanted[0]} x {wanted[1]}: give the tokenizer that encoded them."
        )


def _names(folder: Path, indices: Sequence[int], count: int) -> list[str]:
    """Return the names of the pictures of a cache, from the paths of the images or else numbers."""
    path = folder / NAMES
    if not path.exists():
        return _numbers(indices, count)
    try:
        names = json.loads(path.read_text())
        if not isinstance(names, list) or len(names) != count:
            raise ValueError(f"{count} names are wanted")
        made = png_names([names[index] for index in indices])
        return made if len(set(made)) == len(made) else _numbers(indices, count)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): delete it, and numbers are taken for names.") from None


def _numbers(indices: Sequence[int], count: int) -> list[str]:
    digits = max(5, len(str(count - 1)))
    return [f"{index:0{digits}d}.png" for index in indices]
