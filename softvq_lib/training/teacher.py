"""Features of a frozen teacher (Eq. 5-6) of all training images, computed once for all runs on the same images.

They are rounded to float16 (by at most 2^-11 of each number, which no cosine notices) and lie in a file that is mapped
into memory. It is filled in the order of the images; the header is written last, and says that all are there.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from softvq_lib import config as strictly
from softvq_lib.data import DataConfig, DataSplits, Source, UnreadableLog
from softvq_lib.data.images import to_tensor
from softvq_lib.data.loading import _loader, _Maker, worker_count
from softvq_lib.features import Features
from softvq_lib.training import engine
from softvq_lib.training.files import locked, write_json
from softvq_lib.training.run import provenance, runs_folder, slug

HEADER, TOKENS = "teacher.json", "tokens.f16"
BATCH = 64  # images at once
_CROPPED = "it is not square, so training crops it at random"


class TeacherTokens:
    """A teacher's features of the training images, (images, n, c) float16 on the disk.

    Attributes:
        folder: Where they lie.
        header: What they were made of, and how.
    """

    def __init__(self, folder: Path, header: dict):
        self.folder, self.header = folder, header
        shape = (header["images"], header["side"] ** 2, header["width"])
        self._tokens = np.memmap(folder / TOKENS, np.float16, "r", shape=shape)

    def __len__(self) -> int:
        return len(self._tokens)

    def __call__(self, indices: Tensor) -> Tensor:
        """Read the features of images by their numbers (b,) in the source: float32 (b, n, c), on the CPU.

        Those of an image that could not be read are not-a-number.
        """
        return torch.from_numpy(self._tokens[indices.numpy()].astype(np.float32))  # (b, n, c)


def check_unchanging(parameter: str, data: DataConfig) -> None:
    """Raise ValueError unless each training image is the same every time, so that one set of features is enough.

    Args:
        parameter: What asks for kept features, to be named in the message.
        data: How training images are shown.
    """
    shown = {"flip": (data.flip, False), "crop": (data.crop, 1), "streaming": (data.streaming, False)}
    for name, (value, needed) in shown.items():
        if value != needed:
            raise ValueError(
                f"{parameter}=True keeps one set of features of each image, which {name}={value} does not allow: say "
                f"{name}={needed}, or {parameter}=False."
            )


def teacher_tokens(
    teacher: Features,
    data: DataSplits,
    data_config: DataConfig,
    *,
    image_size: int,
    side: int,
    runs: str | None = None,
    parameter: str = "cached",
) -> TeacherTokens:
    """Open the teacher's features of the training images, computing those that are missing.

    They lie in the folder of runs, under the hash of the teacher, the data and the sizes. Of several processes that ask
    at once the first computes, and the others wait for it; one that was killed is gone on from. Computed in bf16 where
    the device has it.

    Args:
        teacher: On the device that computes. A random one's seed shows in the fingerprint of its weights.
        data: The training images; how many there are is a part of their fingerprint.
        data_config: How they are shown, and the number of loader processes.
        image_size: Side of the images in pixels.
        side: Features along one side, n = side^2.
        runs: As in `TrainConfig`.
        parameter: What asked for it, to be named in messages.

    Raises:
        ValueError: for images that change (see `check_unchanging`) or are not square, features too large for float16,
            a disk without room, or a folder that holds anything else or is damaged.
    """
    check_unchanging(parameter, data_config)
    identity = {
        "format": 1,
        "teacher": teacher.label,
        "weights": teacher.fingerprint,
        "least": teacher.least,  # what the net sees of small images
        "size": teacher.size,
        "data": data.fingerprint,
        "images": len(data.train),
        "image_size": image_size,
        "side": side,
        "width": teacher.width,
    }
    name = f"{slug(teacher.label)}-{strictly.fingerprint(identity)[:8]}"
    folder = runs_folder(runs) / "teachers" / name
    if header := _whole(folder, identity):
        return TeacherTokens(folder, header)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, "filled"):
        header = _whole(folder, identity)  # another process may have done it in the meantime
        if header is None:
            header = identity | _fill(folder, identity, teacher, data.train, data_config.workers, parameter)
            write_json(folder / HEADER, header)
    return TeacherTokens(folder, header)


def _whole(folder: Path, identity: dict) -> dict | None:
    """Return the header of a folder whose features are all there, None before they are.

    Raises:
        ValueError: when header or features are damaged, or another teacher's or other data's.
    """
    path = folder / HEADER
    if not path.exists():
        return None
    remedy = f"delete {folder}, and they are computed again"
    try:
        header = json.loads(path.read_text())
        if not isinstance(header, dict) or "bytes" not in header:
            raise ValueError("it is no header of features")
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}): {remedy}.") from None
    different = [f"{k}: {header.get(k)!r} there, {v!r} asked for" for k, v in identity.items() if header.get(k) != v]
    if different:
        raise ValueError(f"{folder} holds other features ({'; '.join(different)}): {remedy}.")
    found = (folder / TOKENS).stat().st_size if (folder / TOKENS).exists() else 0
    if found != header["bytes"]:
        raise ValueError(f"{folder / TOKENS} is torn: {header['bytes']} bytes expected, {found} found: {remedy}.")
    return header


class _Shown(_Maker):
    """Reads images that are shown whole, and reports those that are not."""

    def _read(self, index: int, unreadable: list) -> tuple[Image.Image, int, int] | None:
        found = super()._read(index, unreadable)
        if found is None:
            return None
        long, short = max(found[0].size), min(found[0].size)
        if round(long * (self.size / short)) == self.size:
            return found
        unreadable.append((index, self.source.name(index), _CROPPED))
        return None


@torch.no_grad()
def _fill(
    folder: Path, identity: dict, teacher: Features, source: Source, workers: int | None, parameter: str
) -> dict[str, object]:
    """Compute the features that are missing; return what the header says of how they were made."""
    from tqdm import tqdm

    images, size, n = identity["images"], identity["image_size"], identity["side"] ** 2
    item = n * teacher.width * np.dtype(np.float16).itemsize
    path = folder / TOKENS
    held = path.stat().st_size if path.exists() else 0
    done = min(held // item, images) // BATCH * BATCH  # a killed process may have torn its last batch
    if (free := shutil.disk_usage(folder).free) < (images - done) * item:
        raise ValueError(
            f"{folder} has {free / 1e6:.0f} MB of free space, but the features of {images - done:,} more images need "
            f"{(images - done) * item / 1e6:.0f} MB: free some, choose another folder of runs, or {parameter}=False."
        )
    device = next(teacher.parameters()).device
    dtype = engine.choose_precision("auto", device)
    account = UnreadableLog(images)
    spans = [range(first, min(first + BATCH, images)) for first in range(done, images, BATCH)]
    keys = [[(0, index, index) for index in span] for span in spans]
    batches = _loader(_Shown(source, size, seed=None), keys, worker_count(source, workers))
    with open(path, "ab") as file, tqdm(total=images, initial=done, unit="image", desc=folder.name) as bar:
        file.truncate(done * item)
        for span, (pixels, _, indices, unreadable) in zip(spans, batches, strict=True):
            for index, name, reason in unreadable:
                if reason == _CROPPED:
                    raise ValueError(
                        f"{parameter}=True: image {index} ({name}) cannot have one set of features, because {reason}: "
                        f"make the images square, or say {parameter}=False."
                    )
            account.add(unreadable)
            made = np.full((len(span), n, teacher.width), np.nan, np.float16)
            if len(indices):
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    tokens = teacher.tokens(to_tensor(pixels).to(device), identity["side"])  # (b, n, c)
                made[indices.numpy() - span.start] = _stored(tokens, indices, parameter)
            file.write(made.tobytes())
            bar.update(len(span))
        file.flush()
        os.fsync(file.fileno())
    versions = provenance()
    return {
        "bytes": images * item,
        "precision": str(dtype).removeprefix("torch."),
        "versions": {"python": versions["python"], **versions["packages"]},
    }


def _stored(tokens: Tensor, indices: Tensor, parameter: str) -> np.ndarray:
    """Features as they are stored.

    Raises:
        ValueError: naming an image whose features are not finite, or too large.
    """
    stored = tokens.cpu().half()
    finite = stored.flatten(1).isfinite().all(dim=1)
    if not finite.all():
        raise ValueError(
            f"features of image {indices[~finite][0]} cannot be stored in float16 (largest "
            f"{tokens.abs().max():.3g}): say {parameter}=False, or choose another teacher."
        )
    return stored.numpy()
