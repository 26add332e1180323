"""Batches in an exact order: a picture's turn and its crop depend on seed, epoch and position alone."""

import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from softvq_lib.config import at_least
from softvq_lib.data.images import fit, to_tensor
from softvq_lib.data.source import Source, UnreadableImage
from softvq_lib.data.streams import StreamedSource, StreamOrder

# How many neighbours are tried in place of one unreadable picture; far more than the permitted 1 % ever needs.
REPLACEMENTS = 100
# Second word of every seed, so that no crop repeats the numbers that shuffled an epoch.
ORDER, AUGMENTATION = 0, 1


@dataclass
class Batch:
    """Pictures for one step.

    Attributes:
        images: float32 (b, 3, height, width) in [-1, 1].
        labels: int64 (b,), -1 where there is none.
        indices: int64 (b,), numbers in the source.
        unreadable: (index, name, reason) of each picture left out while this batch was made.
    """

    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    unreadable: list[tuple[int, str, str]]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice) -> "Batch":
        """Some of the pictures."""
        return Batch(self.images[rows], self.labels[rows], self.indices[rows], self.unreadable)

    def to(self, device: torch.device) -> "Batch":
        """The pictures and labels on a device; their numbers stay where they are."""
        images = self.images.to(device, non_blocking=True)
        return Batch(images, self.labels.to(device, non_blocking=True), self.indices, self.unreadable)


def training_batches(
    source: Source,
    *,
    image_size: int,
    batch_size: int,
    seed: int,
    steps: int,
    start_step: int = 0,
    flip: bool = False,
    crop: float = 1.0,
    workers: int | None = None,
    part: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """Batches of the steps start_step, ..., steps - 1, the same for any number of workers and any start.

    An epoch is a permutation of the source cut into floor(n / batch_size) whole batches; what is left over rests
    until the next epoch. With fewer pictures than a batch holds, permutation follows permutation without a gap.
    An unreadable picture is replaced by the next readable one of the source, and reported. The order of a streamed
    source is that of `StreamOrder`.

    Args:
        source: training pictures.
        image_size: side of the pictures in pixels.
        batch_size: pictures in a step.
        seed: of order and augmentation, at least 0.
        steps: number of the step before which to stop, counted from the beginning of training.
        start_step: first step to make; earlier ones are not replayed.
        flip: mirror left-right with probability 1/2.
        crop: largest enlargement before the random crop, at least 1.
        workers: loader processes; None as in `DataConfig`.
        part: (i, m) gives rows i b / m to (i + 1) b / m of each batch of b, the share of process i of m.

    Raises:
        ValueError: an argument is out of range, the source is empty, or no readable picture was found; of a streamed
            source also if it holds less than one batch, the processes cannot share its lanes, or a shard is damaged.
    """
    _check_sizes(source, image_size, batch_size)
    at_least("seed", seed, 0)
    at_least("crop", crop, 1)
    at_least("start_step", start_step, 0)
    if isinstance(source, StreamedSource):
        order = StreamOrder(source.counts, batch_size, seed)
        lanes = _Lanes(_StreamMaker(source, image_size, seed, crop=crop, flip=flip), order, part, start_step, steps)
        made = _joined(lanes, min(worker_count(source, workers), len(lanes.lanes)))
        return _whole(made, batch_size // part[1])
    keys = TrainingOrder(len(source), batch_size, seed, start_step, steps, part)
    maker = _Maker(source, image_size, seed, crop=crop, flip=flip)
    return _whole(_loader(maker, keys, worker_count(source, workers)), batch_size // part[1])


def validation_batches(
    source: Source, *, image_size: int, batch_size: int, limit: int | None = None, workers: int | None = 0
) -> Iterator[Batch]:
    """All pictures once, in the order of the source, cropped in the centre.

    The last batch may be smaller. Unreadable pictures are left out and reported, so a batch may be smaller too.

    Args:
        source: pictures to measure on.
        image_size: side of the pictures in pixels.
        batch_size: pictures in a batch.
        limit: only the first so many; None: all.
        workers: loader processes; None as in `DataConfig`.

    Raises:
        ValueError: an argument is out of range, the source is empty, or none of its pictures can be read.
    """
    _check_sizes(source, image_size, batch_size)
    at_least("limit", limit, 1)
    count = min(len(source), limit or len(source))
    starts = range(0, count, batch_size)
    keys = [[(0, i, i) for i in range(start, min(start + batch_size, count))] for start in starts]
    maker = _Maker(source, image_size, seed=None)
    return _readable(_loader(maker, keys, worker_count(source, workers)))


def worker_count(source: Source, workers: int | None) -> int:
    """Number of loader processes: as asked, or none for embedded data and otherwise processors - 1, at most 4."""
    at_least("workers", workers, 0)
    if workers is not None:
        return workers
    # A container or a job scheduler often grants fewer processors than the machine has.
    available = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    return 0 if source.embedded else min(4, len(available) - 1)


def _check_sizes(source: Source, image_size: int, batch_size: int) -> None:
    at_least("image_size", image_size, 1)
    at_least("batch_size", batch_size, 1)
    if not len(source):
        raise ValueError("the data set holds no images")


class TrainingOrder:
    """The keys (epoch, position in the epoch, picture) of each batch from a step on; see `training_batches`."""

    def __init__(
        self, count: int, batch_size: int, seed: int, start_step: int, steps: int, part: tuple[int, int] = (0, 1)
    ):
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.start_step, self.steps, self.part = start_step, steps, part

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        whole = self.count // self.batch_size * self.batch_size
        # Pictures in an epoch: whole batches, or all of them where one batch spans several epochs.
        length = whole or self.count
        known, order = -1, None
        for step in range(self.start_step, self.steps):
            batch = []
            for number in range(step * self.batch_size, (step + 1) * self.batch_size):
                epoch, position = divmod(number, length)
                if epoch != known:
                    order = np.random.default_rng((self.seed, ORDER, epoch)).permutation(self.count).tolist()
                    known = epoch
                batch.append((epoch, position, order[position]))
            number, parts = self.part
            yield batch[number * self.batch_size // parts : (number + 1) * self.batch_size // parts]


class _Maker(Dataset):
    """Makes whole batches from keys, in the main process or a worker.

    Pixels travel between processes as uint8 (b, h, w, 3), a quarter of the size of floats.
    """

    def __init__(self, source: Source, size: int, seed: int | None, crop: float = 1.0, flip: bool = False):
        self.source, self.size, self.seed, self.crop, self.flip = source, size, seed, crop, flip

    def __getitems__(self, keys: list[tuple[int, int, int]]) -> tuple:
        pixels = np.empty((len(keys), self.size, self.size, 3), dtype=np.uint8)
        labels, indices, unreadable = [], [], []
        for epoch, position, index in keys:
            found = self._read(index, unreadable)
            if found is None:
                continue
            image, label, index = found
            generator = None
            if self.seed is not None:
                generator = np.random.default_rng((self.seed, AUGMENTATION, epoch, position))
            pixels[len(labels)] = fit(image, self.size, generator, crop=self.crop, flip=self.flip)
            labels.append(label)
            indices.append(index)
        made = torch.from_numpy(pixels[: len(labels)])
        return made, torch.tensor(labels, dtype=torch.int64), torch.tensor(indices, dtype=torch.int64), unreadable

    def _read(self, index: int, unreadable: list) -> tuple | None:
        """Picture, label and index; in training of the next readable picture, else None if it is damaged."""
        count = len(self.source)
        for offset in range(1 if self.seed is None else min(count, 1 + REPLACEMENTS)):
            here = (index + offset) % count
            try:
                return *self.source[here], here
            except UnreadableImage as error:
                unreadable.append((error.index, error.name, error.reason))
        return None


class _StreamMaker(_Maker):
    """Makes parts of batches from streamed pictures; a key holds number and undecoded row of each."""

    def _read(self, held: tuple[int, dict], unreadable: list) -> tuple | None:
        index, row = held
        try:
            return *self.source.read(index, row), index
        except UnreadableImage as error:
            unreadable.append((error.index, error.name, error.reason))
        return super()._read((index + 1) % len(self.source), unreadable)


class _Lanes(IterableDataset):
    """What a process, or one of its workers, contributes to each batch: the rows of the lanes that it reads.

    Workers share a batch instead of taking turns with whole ones: so none reads what another has read.
    """

    def __init__(self, maker: _StreamMaker, order: StreamOrder, part: tuple[int, int], start_step: int, steps: int):
        self.maker, self.order, self.start_step, self.steps = maker, order, start_step, steps
        self.lanes = order.of(part)

    def __iter__(self) -> Iterator[tuple | ValueError]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        mine = self.lanes[number * len(self.lanes) // workers : (number + 1) * len(self.lanes) // workers]
        images = [self.order.lane(self.maker.source, lane, self.start_step) for lane in mine]
        try:
            for _ in range(self.start_step, self.steps):
                yield self.maker.__getitems__([next(lane) for lane in images for _ in range(self.order.share)])
        except ValueError as error:  # raised in the main process instead, without the story of the worker
            yield error


def _joined(lanes: _Lanes, workers: int) -> Iterator[tuple]:
    """The parts that the workers made of each batch, put together: the loader takes from them in turn."""
    parts = []
    # As many pictures are made ahead as workers with whole batches would make.
    for made in _loader(lanes, None, workers, ahead=2 * workers):
        if isinstance(made, ValueError):
            raise made
        parts.append(made)
        if len(parts) == max(1, workers):
            pixels, labels, indices, unreadable = zip(*parts, strict=True)
            yield torch.cat(pixels), torch.cat(labels), torch.cat(indices), sum(unreadable, [])
            parts = []


def _as_is(made: tuple) -> tuple:
    return made


def _outlive_sigterm(worker: int) -> None:
    """Leave it to the main process to stop: schedulers send the signal to the whole group."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _loader(maker: Dataset, keys, workers: int, ahead: int = 2) -> DataLoader:
    return DataLoader(
        maker,
        batch_sampler=keys,
        # Batches come whole from `maker` in any case; None with no sampler tells the loader to leave them so.
        batch_size=None if keys is None else 1,
        num_workers=workers,
        prefetch_factor=ahead if workers else None,
        collate_fn=_as_is,
        worker_init_fn=_outlive_sigterm,
        # A generator of its own: the loader would otherwise draw from, and so advance, the global one.
        generator=torch.Generator(),
    )


def _whole(made: Iterable[tuple], batch_size: int) -> Iterator[Batch]:
    for pixels, labels, indices, unreadable in made:
        if len(labels) < batch_size:
            raise ValueError(_none_readable(f"{REPLACEMENTS} images in a row are unreadable", unreadable))
        yield Batch(to_tensor(pixels), labels, indices, unreadable)


def _readable(loader: DataLoader) -> Iterator[Batch]:
    # One batch is held back, so that the reports of a batch that came out empty go out with the one before it.
    held, reports = None, []
    for pixels, labels, indices, unreadable in loader:
        if held is None or len(labels):
            if held is not None:
                yield held
            reports += unreadable
            if len(labels):
                held, reports = Batch(to_tensor(pixels), labels, indices, reports), []
        else:
            held.unreadable += unreadable
    if held is None:
        raise ValueError(_none_readable("none of the validation images can be read", reports))
    yield held


def _none_readable(what: str, unreadable: list[tuple[int, str, str]]) -> str:
    first = "; ".join(f"{name} ({reason})" for _, name, reason in unreadable[:5])
    return f"{what}. First of them: {first}. Repair or remove these files."
