"""Cached latents: sharded files mapped into memory, in both mirror images, normalised when they are read.

A cache is a folder with `latents.json`, the header, and shards in safetensors. Shard s holds those of the images s m to
(s + 1) m - 1 of a source that can be read: `latents` (n, f, l, d), where f counts the image and, if asked for, its
mirror image; `labels` (n,), -1 where there is none; `indices` (n,), numbers in the source.
"""

import hashlib
import json
import mmap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from softvq_lib.config import at_least, fingerprint, one_of
from softvq_lib.data.images import fit, to_tensor
from softvq_lib.data.loading import AUGMENTATION, ORDER, TrainingOrder, _loader, _Maker, worker_count
from softvq_lib.data.source import Source

HEADER = "latents.json"
# What the stored latents depend on; all of it is in the header.
IDENTITY = (
    "format",
    "tokenizer",
    "data",
    "split",
    "images",
    "image_size",
    "crop",
    "flips",
    "tokens",
    "dim",
    "dtype",
    "precision",
    "shard_size",
)
NORMALISE = ("channel", "scalar")
_STORED = {"F32": np.float32, "F16": np.float16, "I64": np.int64}


def tokenizer_hash(tokenizer: nn.Module) -> str:
    """Return the sha256 (hex) of a tokenizer's configuration and of all its weights; equal on every device."""
    settings = {name: value for name, value in asdict(tokenizer.config).items() if name != "pretrained"}
    digest = hashlib.sha256(fingerprint(settings).encode())
    for name, tensor in sorted(tokenizer.state_dict().items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def check_shard(folder: Path, entry: dict, *, whole: bool) -> None:
    """Compare a shard with its entry in the header: its size and, where `whole`, its checksum.

    Raises:
        ValueError: when it is missing, truncated or damaged.
    """
    path = folder / entry["name"]
    found = path.stat().st_size if path.exists() else None
    remedy = "Encode the data again into this folder: shards that are whole are kept."
    if found is None:
        raise ValueError(f"{folder} lacks the shard {path.name}. {remedy}")
    if found != entry["bytes"]:
        raise ValueError(f"shard {path} is truncated or torn: {entry['bytes']} bytes expected, {found} found. {remedy}")
    if not whole:
        return
    with open(path, "rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    if checksum != entry["sha256"]:
        raise ValueError(f"shard {path} is damaged: sha256 {entry['sha256']} expected, {checksum} found. {remedy}")


def map_shard(path: Path) -> dict[str, np.ndarray]:
    """Map the arrays of a shard into memory, read-only; nothing is read before it is used.

    By name, with the shapes that the head of this file says.
    """
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_RANDOM)  # an item is some KB: reading ahead would fetch its neighbours for nothing
    content = np.frombuffer(mapped, np.uint8)
    start = 8 + int.from_bytes(content[:8].tobytes(), "little")
    arrays = {}
    for name, entry in json.loads(content[8:start].tobytes()).items():
        first, end = entry["data_offsets"]
        arrays[name] = content[start + first : start + end].view(_STORED[entry["dtype"]]).reshape(entry["shape"])
    return arrays


class LatentCache:
    """Latents on the disk, read at random.

    Args:
        folder: Where they are; see `open`.
        header: The content of its `latents.json`.

    Attributes:
        tokens: Latent tokens l.
        dim: Latent channels d.
        flips: Whether it holds mirror images too.
        classes: Names of the labels, None without labels.
    """

    def __init__(self, folder: Path, header: dict):
        self.folder, self.header = Path(folder), header
        self.tokens, self.dim, self.flips = header["tokens"], header["dim"], header["flips"]
        self.classes: list[str] | None = header["classes"]
        counts = np.array([entry["count"] for entry in header["shards"]])
        self._ends = np.cumsum(counts)
        self._starts = self._ends - counts
        self._statistics = {how: self._numbers(how) for how in NORMALISE}
        self._shards = [map_shard(self.folder / entry["name"]) for entry in header["shards"]]

    @classmethod
    def open(cls, folder: str | Path, tokenizer: nn.Module | None = None) -> "LatentCache":
        """Open a finished cache. Sizes of the shards are checked here; `verify` checks every byte.

        Args:
            folder: That `encode_dataset` filled.
            tokenizer: Whose latents these must be; None: not checked.

        Raises:
            ValueError: for a folder without a finished cache, a shard that is missing or truncated, or a cache of
                another tokenizer.
        """
        folder = Path(folder).expanduser()
        header = read_header(folder)
        if header is None:
            raise ValueError(f"{folder} holds no latents (no {HEADER}): encode a data set into it.")
        if "mean" not in header:
            raise ValueError(
                f"{folder} is unfinished ({len(header['shards'])} shards are there): encode the data into it again, "
                "which goes on where it was."
            )
        if tokenizer is not None and (ours := tokenizer_hash(tokenizer)) != header["tokenizer"]:
            raise ValueError(
                f"{folder} holds latents of another tokenizer: sha256 {header['tokenizer']} there, {ours} asked for. "
                "Give that tokenizer, or encode the data into another folder."
            )
        for entry in header["shards"]:
            check_shard(folder, entry, whole=False)
        return cls(folder, header)

    def verify(self) -> None:
        """Compare every shard with its checksum.

        Raises:
            ValueError: naming the first shard that is damaged.
        """
        for entry in self.header["shards"]:
            check_shard(self.folder, entry, whole=True)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        """Latents as they are stored, float32 (f, l, d), the image's and then its mirror image's, and the label."""
        ((shard, place),) = self._places([item])
        stored = shard["latents"][place].astype(np.float32)  # (f, l, d)
        return torch.from_numpy(stored), int(shard["labels"][place])

    def labels(self, items: Sequence[int]) -> Tensor:
        """Return the labels of some items, int64 (b,)."""
        return torch.tensor([int(shard["labels"][place]) for shard, place in self._places(items)])

    def batch(self, items: Sequence[int], flips: Sequence[bool] | None = None, *, normalise: str = "channel") -> Tensor:
        """Read normalised latents, float32 (b, l, d).

        Args:
            items: Numbers of items, (b,).
            flips: Which of them are to be of the mirror image, (b,); None: none.
            normalise: By the statistics of each `channel`, or of all numbers (`scalar`).

        Raises:
            IndexError: there is no such item.
            ValueError: mirror images are asked for that the cache has not.
        """
        return self._read(items, flips, normalise)[0]

    def statistics(self, how: str = "channel") -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation over all latents, mirror images included, float32 (d,) each.

        Of each `channel`, or (`scalar`) of all numbers, then the same for every channel. A deviation of 0 is given
        as 1, so that a channel that is constant stays finite.
        """
        one_of("normalise", how, NORMALISE)
        return self._statistics[how]

    def _numbers(self, how: str) -> tuple[Tensor, Tensor]:
        mean, std = (np.broadcast_to(self.header[name][how], self.dim) for name in ("mean", "std"))
        return torch.tensor(mean, dtype=torch.float32), torch.tensor(np.where(std > 0, std, 1.0), dtype=torch.float32)

    def normalise(self, z: Tensor, how: str = "channel") -> Tensor:
        """Map a tokenizer's latents (..., d) to those that a generator sees: (z - mean) / std."""
        mean, std = self.statistics(how)
        return (z - mean.to(z)) / std.to(z)

    def denormalise(self, x: Tensor, how: str = "channel") -> Tensor:
        """Undo `normalise`: map a generator's latents (..., d) to those that the tokenizer decodes."""
        mean, std = self.statistics(how)
        return x * std.to(x) + mean.to(x)

    def _places(self, items: Sequence[int]) -> list[tuple[dict[str, np.ndarray], int]]:
        """The shard of each item, and its place there."""
        items = np.asarray(items)
        outside = items[(items < 0) | (items >= len(self))]
        if outside.size:
            raise IndexError(f"item {outside[0]} of a cache that holds {len(self)}")
        shards = np.searchsorted(self._ends, items, side="right")
        places = items - self._starts[shards]
        return [(self._shards[shard], place) for shard, place in zip(shards.tolist(), places.tolist(), strict=True)]

    def _read(self, items: Sequence[int], flips: Sequence[bool] | None, how: str) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised latents (b, l, d), labels (b,) and numbers in the source (b,)."""
        mean, std = self.statistics(how)
        places = self._places(items)
        mirrored = np.zeros(len(places), int) if flips is None else np.asarray(flips, int)
        if mirrored.any() and not self.flips:
            raise ValueError(f"{self.folder} holds no mirror images: encode the data with flips, or leave flip off.")
        latents = np.empty((len(places), self.tokens, self.dim), np.float32)
        labels, indices = np.empty((2, len(places)), np.int64)
        for row, ((shard, place), flip) in enumerate(zip(places, mirrored.tolist(), strict=True)):
            latents[row] = shard["latents"][place, flip]
            labels[row] = shard["labels"][place]
            indices[row] = shard["indices"][place]
        normalised = torch.from_numpy(latents).sub_(mean).div_(std)
        return normalised, torch.from_numpy(labels), torch.from_numpy(indices)


def read_header(folder: Path) -> dict | None:
    """Return the header of a cache, None where there is none.

    Raises:
        ValueError: when it cannot be read.
    """
    path = folder / HEADER
    if not path.exists():
        return None
    try:
        header = json.loads(path.read_text())
        if not isinstance(header, dict) or any(name not in header for name in (*IDENTITY, "shards")):
            raise ValueError("it is no header of latents")
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}): delete {folder} and encode the data again.") from None
    return header


@dataclass
class LatentBatch:
    """Latents for one step.

    Attributes:
        latents: Normalised, float32 (b, l, d).
        labels: int64 (b,), -1 where there is none.
        indices: int64 (b,), numbers of the images in the source.
        flips: bool (b,), which are latents of the mirror image.
        unreadable: Always empty, since what cannot be read is not in a cache.
    """

    latents: Tensor
    labels: Tensor
    indices: Tensor
    flips: Tensor
    unreadable: list[tuple[int, str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice) -> "LatentBatch":
        """Some of the latents."""
        return LatentBatch(self.latents[rows], self.labels[rows], self.indices[rows], self.flips[rows])

    def to(self, device: torch.device) -> "LatentBatch":
        """The latents and labels on a device; numbers and flips stay where they are."""
        latents = self.latents.to(device, non_blocking=True)
        return LatentBatch(latents, self.labels.to(device, non_blocking=True), self.indices, self.flips)

    def images(self, source: Source, image_size: int) -> Tensor:
        """Read the images of these latents, mirrored as they are: (b, 3, height, width) in [-1, 1]."""
        pixels = [fit(source[index][0], image_size) for index in self.indices.tolist()]
        images = to_tensor(torch.from_numpy(np.stack(pixels)))  # (b, 3, height, width)
        return torch.where(self.flips[:, None, None, None], images.flip(-1), images)


def latent_batches(
    cache: LatentCache,
    *,
    batch_size: int,
    seed: int,
    steps: int,
    start_step: int = 0,
    flip: bool = False,
    normalise: str = "channel",
    part: tuple[int, int] = (0, 1),
) -> Iterator[LatentBatch]:
    """Batches of the steps start_step, ..., steps - 1, the same for any start, in the order of `training_batches`.

    Args:
        cache: Where the latents are; all of them are an epoch.
        batch_size: Latents in a step.
        seed: Of order and mirroring, at least 0.
        steps: Number of the step before which to stop, counted from the beginning of training.
        start_step: First step to make; earlier ones are not replayed.
        flip: Take the mirror image with probability 1/2, as seed, epoch and position say.
        normalise: `channel` or `scalar`.
        part: (i, m) gives rows i b / m to (i + 1) b / m of each batch of b, the share of process i of m.

    Raises:
        ValueError: an argument is out of range, or the cache has no mirror images.
    """
    at_least("batch_size", batch_size, 1)
    at_least("seed", seed, 0)
    at_least("start_step", start_step, 0)
    one_of("normalise", normalise, NORMALISE)
    if flip and not cache.flips:
        raise ValueError(f"flip=True, but {cache.folder} holds no mirror images: encode the data with flips.")
    return _batches(cache, _Order(len(cache), batch_size, seed, start_step, steps, part), flip, normalise)


def _batches(cache: LatentCache, order: "_Order", flip: bool, normalise: str) -> Iterator[LatentBatch]:
    for items, mirrored in order:
        flips = mirrored & flip
        yield LatentBatch(*cache._read(items, flips, normalise), torch.from_numpy(flips))


class _Order(TrainingOrder):
    """The items of `TrainingOrder` and whether to mirror them, as arrays: Python's numbers take 40 MB a million."""

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        length = self.count // self.batch_size * self.batch_size or self.count
        number, parts = self.part
        first, end = (share * self.batch_size // parts for share in (number, number + 1))
        known, order, mirrored = -1, None, None
        for step in range(self.start_step, self.steps):
            numbers = np.arange(step * self.batch_size + first, step * self.batch_size + end)
            epochs, positions = np.divmod(numbers, length)
            items, flips = np.empty(len(numbers), np.int64), np.empty(len(numbers), bool)
            for epoch in np.unique(epochs).tolist():
                if epoch != known:
                    order = mirrored = None  # let go of before the next are made
                    order = np.random.default_rng((self.seed, ORDER, epoch)).permutation(self.count)
                    draws = np.random.default_rng((self.seed, AUGMENTATION, epoch))
                    known, mirrored = epoch, draws.integers(2, size=self.count, dtype=bool)
                here = epochs == epoch
                items[here], flips[here] = order[positions[here]], mirrored[positions[here]]
            yield items, flips


def centre_batches(
    source: Source, spans: Iterable[range], *, image_size: int, workers: int | None
) -> Iterator[tuple[Tensor, Tensor, Tensor, list[tuple[int, str, str]]]]:
    """Read the images of each span, cropped in the centre; those that cannot be read are left out.

    Returns:
        For each span, also where nothing is readable, pixels uint8 (b, h, w, 3), labels and indices int64 (b,), and
        reports (index, name, reason) of what was left out.
    """
    keys = ([(0, index, index) for index in span] for span in spans)
    return iter(_loader(_Maker(source, image_size, seed=None), keys, worker_count(source, workers)))
