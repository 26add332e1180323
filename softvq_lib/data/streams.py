"""Streamed data sets: an order of shards and pictures that is exact, can begin at any step, and is shared by lanes.

Lanes. In each epoch the shards are shuffled and laid end to end, and the row of pictures is cut into lanes of equal
length. Lane j fills rows j b / s to (j + 1) b / s of every batch of b, for s lanes, and is read from its beginning to
its end. The number of lanes follows from the batch size alone; whoever reads them, be it a process of many or a worker,
changes nothing, and each reads only its own lanes, that is, its share of the shards.

Windows. Within a lane consecutive windows of pictures are shuffled, 2,048 pictures over all lanes. So a batch is drawn
from up to 64 places of the data, which is enough also where a shard holds one class after another.

`datasets` has both for its streams, and neither is exact: there `split_dataset_by_node` gives another order for
another number of processes, workers hand out whole shards, the buffer that shuffles depends on where reading began,
and `state_dict` would have to be kept by every process and worker.
"""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from softvq_lib.data.shards import Shard
from softvq_lib.data.source import Source
from softvq_lib.data.tables import Columns, read_row

LANES = 64  # at most; so many processes can share the work
WINDOW = 2048  # pictures of all lanes together; encoded, they are held in memory
# Second words of seeds; 0 and 1 are those of data sets that are not streamed and of all augmentation.
SHARDS, TURNS = 2, 3
RULE = f"1: at most {LANES} lanes, windows of {WINDOW}"  # part of the fingerprint


class StreamedSource(Source):
    """Pictures of shards, numbered in the order in which the files hold them.

    Single pictures are for going through them in that order, which costs one pass over the files; training reads
    lanes (see `StreamOrder`).

    Args:
        shards: in their order.
        columns: where their pictures and labels are.
        limit: keep only so many pictures, the first; None: all.
    """

    def __init__(self, shards: list[Shard], columns: Columns, limit: int | None = None):
        self.shards, self.columns = shards, columns
        ends = np.cumsum([shard.count for shard in shards])
        if limit is not None:
            ends = np.minimum(ends, limit)
        self.ends = ends.astype(np.int64)  # of each shard, in numbers of pictures
        self.counts = np.diff(self.ends, prepend=0)
        self._forget()

    def _forget(self) -> None:
        self._next, self._rows, self._owner = -1, None, os.getpid()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_next": -1, "_rows": None}

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        index = self._check(index)
        # An open file that came with a fork would share its place in the file with the parent's.
        if self._next != index or self._owner != os.getpid():
            self._forget()
            shard = int(np.searchsorted(self.ends, index, "right"))
            first = index - int(self.ends[shard] - self.counts[shard])
            pieces = [(shard, first, int(self.counts[shard]))]
            pieces += [(later, 0, int(self.counts[later])) for later in range(shard + 1, len(self.shards))]
            self._rows = self.rows(pieces)
        number, row = next(self._rows)
        assert number == index
        self._next = index + 1
        return self.read(index, row)

    def rows(self, pieces: list[tuple[int, int, int]]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Number and undecoded row of each picture of pieces (shard, first row, row after the last)."""
        for shard, first, after in pieces:
            start = int(self.ends[shard] - self.counts[shard])
            for row, held in zip(range(first, after), self.shards[shard].rows(first), strict=False):
                yield start + row, held

    def read(self, index: int, row: dict[str, Any]) -> tuple[Image.Image, int]:
        """Decode one of `rows`: the picture and its label.

        Raises:
            UnreadableImage: the picture cannot be decoded.
        """
        return read_row(row, self.columns, index, self.name)

    def name(self, index: int) -> str:
        shard = int(np.searchsorted(self.ends, self._check(index), "right"))
        return f"image {index - int(self.ends[shard] - self.counts[shard])} of {self.shards[shard].name}"


class StreamOrder:
    """Which picture stands where, by arithmetic on the sizes of the shards.

    An epoch has floor(n / batch_size) batches; what is left over rests, as the last of the shuffled shards' end.

    Args:
        counts: pictures of each shard, (shards,).
        batch_size: pictures in a step, of all processes together.
        seed: of the order.

    Attributes:
        lanes: the largest divisor of the batch size that is at most 64.
        share: pictures of a lane in a batch.
        window: pictures of a lane that are shuffled with one another.
        steps: batches in an epoch.
        length: pictures of a lane in an epoch.

    Raises:
        ValueError: there are fewer pictures than a batch holds.
    """

    def __init__(self, counts: np.ndarray, batch_size: int, seed: int):
        self.counts, self.batch_size, self.seed = counts, batch_size, seed
        self.lanes = max(lanes for lanes in range(1, LANES + 1) if batch_size % lanes == 0)
        self.share, self.window = batch_size // self.lanes, WINDOW // self.lanes
        self.steps = int(counts.sum()) // batch_size
        self.length = self.steps * self.share
        if not self.steps:
            raise ValueError(
                f"batch_size={batch_size} is more than the {counts.sum()} images of a streamed data set: take a "
                "smaller batch, or leave streaming out, since so few need none."
            )

    def of(self, part: tuple[int, int]) -> range:
        """The lanes of process i of m, for part (i, m).

        Raises:
            ValueError: the processes cannot share the lanes equally.
        """
        number, parts = part
        if self.lanes % parts:
            able = ", ".join(str(n) for n in range(1, self.lanes + 1) if self.lanes % n == 0)
            raise ValueError(
                f"{parts} processes cannot share the {self.lanes} lanes that a streamed data set has with "
                f"batch_size={self.batch_size}: take one of {able} processes, or another batch_size."
            )
        each = self.lanes // parts
        return range(number * each, (number + 1) * each)

    def pieces(self, epoch: int, lane: int, start: int) -> list[tuple[int, int, int]]:
        """What a lane consists of from its place `start` on: (shard, first row, row after the last) of each piece."""
        shards = np.random.default_rng((self.seed, SHARDS, epoch)).permutation(len(self.counts))
        ends = np.cumsum(self.counts[shards])
        begins = ends - self.counts[shards]
        first = np.maximum(begins, lane * self.length + start)
        after = np.minimum(ends, (lane + 1) * self.length)
        found = np.stack([shards, first - begins, after - begins], axis=1)
        return [tuple(piece) for piece in found[first < after].tolist()]

    def turns(self, epoch: int, lane: int, number: int) -> list[int]:
        """The shuffled places inside a lane's window, `number` = 0, 1, ...; the last of an epoch may be shorter."""
        size = min(self.window, self.length - number * self.window)
        return np.random.default_rng((self.seed, TURNS, epoch, lane, number)).permutation(size).tolist()

    def lane(
        self, source: StreamedSource, lane: int, start_step: int
    ) -> Iterator[tuple[int, int, tuple[int, dict[str, Any]]]]:
        """Read a lane from a step on, without end.

        Yields:
            Epoch, position in the epoch, and number and undecoded row of the picture.
        """
        epoch, step = divmod(start_step, self.steps)
        place = step * self.share
        while True:
            number = place // self.window
            rows = source.rows(self.pieces(epoch, lane, number * self.window))
            while place < self.length:
                turns = self.turns(epoch, lane, number)
                window = [next(rows) for _ in turns]
                for turn in turns[place - number * self.window :]:
                    step, row = divmod(place, self.share)
                    yield epoch, step * self.batch_size + lane * self.share + row, window[turn]
                    place += 1
                number += 1
            epoch, place = epoch + 1, 0
