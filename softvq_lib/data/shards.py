"""Shards of a streamed data set: parquet and tar files, on disk or on the hub, that are read on from any row.

The streams of `datasets` begin in the middle of a file only by reading, and throwing away, all that stands before.
These begin at a parquet file's row group or at a byte of a tar, so that any step of training is reached at once.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

SUFFIXES = {".parquet": "parquet", ".tar": "tar"}
BLOCK = 512  # bytes, of a tar
THREADS = 16  # shards whose sizes are looked up at a time: over a network most of it is waiting


class ParquetShard:
    """Rows of a parquet file.

    Args:
        url: path, or address such as ``hf://datasets/...``.
        name: for messages.
        image: column of the pictures.
        label: column of the labels, None without.

    Attributes:
        count: number of rows.

    Raises:
        ValueError: the file is missing or damaged.
    """

    def __init__(self, url: str, name: str, image: str, label: str | None):
        self.url, self.name, self.image, self.label = url, name, image, label
        with self._opened() as table:
            sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
        self.ends = np.cumsum(sizes)  # of each row group
        self.count = sum(sizes)

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        import pyarrow.parquet as pq

        with _opened(self.url) as file:
            yield pq.ParquetFile(file, pre_buffer=False)  # which holds everything twice

    def rows(self, start: int) -> Iterator[dict[str, Any]]:
        """The rows `start`, `start` + 1, ...: columns by name. What is left of one row group is held in memory."""
        columns = [_top(column) for column in (self.image, self.label) if column is not None]
        with self._opened() as table:
            if table.metadata.num_rows != self.count:
                raise EOFError("it has changed since work began")
            # One at a time: a reader of all of them would fetch, and keep, far more than is asked for.
            for group in range(int(np.searchsorted(self.ends, start, "right")), len(self.ends)):
                held = table.read_row_group(group, columns=columns, use_threads=False)
                first = int(self.ends[group]) - held.num_rows
                held = held.slice(max(0, start - first)).to_pylist()[::-1]
                while held:
                    yield held.pop()

    def values(self) -> set:
        """The different labels."""
        import pyarrow.compute as pc

        top = _top(self.label)
        with self._opened() as table:
            column = table.read(columns=[top]).column(0)
        if top != self.label:
            column = pc.struct_field(column, self.label.removeprefix(f"{top}."))
        return set(column.unique().to_pylist())


class TarShard:
    """Samples of a WebDataset shard: a tar in which consecutive files of one name and several endings belong together.

    Args:
        url: path, or address such as ``hf://datasets/...``.
        name: for messages.
        image: ending of the pictures; None: samples are counted only.
        label: ending of the labels, such as ``cls``, or ``json.`` and a key; None without.

    Attributes:
        count: number of samples.

    Raises:
        ValueError: the file is missing, damaged or has no end.
    """

    def __init__(self, url: str, name: str, image: str | None = None, label: str | None = None):
        self.url, self.name, self.image, self.label = url, name, image, label
        offsets, sizes, self.labels = _index(url, image, label)
        self.offsets, self.sizes = np.array(offsets, dtype=np.int64), np.array(sizes, dtype=np.int64)
        self.count = len(offsets)

    def rows(self, start: int) -> Iterator[dict[str, Any]]:
        """The samples `start`, `start` + 1, ...: picture and label by their endings."""
        with _opened(self.url) as file:
            for offset, size, label in zip(
                self.offsets[start:].tolist(), self.sizes[start:].tolist(), self.labels[start:], strict=True
            ):
                content = None
                if size >= 0:
                    file.seek(offset)
                    content = file.read(size)
                    if len(content) < size:
                        raise EOFError("it has become shorter")
                yield {self.image: content, self.label: label}

    def values(self) -> set:
        """The different labels."""
        return set(self.labels)


Shard = ParquetShard | TarShard


def open_shards(urls: list[str], kind: str, image: str | None, label: str | None) -> list[Shard]:
    """Open shards and learn their sizes: of parquet from the end of each file, of a tar from all its headers.

    What was learnt of a tar is kept in the cache of `datasets`. A tar on the hub is read through once for it.

    Args:
        urls: paths, or addresses such as ``hf://datasets/...``.
        kind: ``parquet`` or ``tar``.
        image: column or ending of the pictures; None: samples of a tar are counted only.
        label: likewise of the labels, None without.

    Raises:
        ValueError: a shard is missing or damaged.
    """
    from tqdm import tqdm

    cls = {"parquet": ParquetShard, "tar": TarShard}[kind]
    folder = os.path.commonprefix(urls).rpartition("/")[0] + "/"
    with ThreadPoolExecutor(THREADS) as threads:
        opened = threads.map(lambda url: cls(url, url.removeprefix(folder), image, label), urls)
        return list(tqdm(opened, "opening shards", len(urls), delay=5, unit="shard"))


def label_values(shards: list[Shard]) -> set:
    """The different labels of shards."""
    with ThreadPoolExecutor(THREADS) as threads:
        return set().union(*threads.map(lambda shard: shard.values(), shards))


@contextmanager
def _opened(url: str) -> Iterator[BinaryIO]:
    """The file, open; whatever goes wrong with it is a ValueError that names it."""
    from datasets.utils.file_utils import xopen  # tries again when a connection breaks

    try:
        with closing(xopen(url, "rb") if "://" in url else open(url, "rb")) as file:
            yield file
    except Exception as error:  # the file system, the network, pyarrow and tarfile each raise their own kinds
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ValueError(
            f"shard {url} cannot be read: {(reason.strip() or type(error).__name__).splitlines()[0].rstrip('.')}. "
            "Fetch or write it again and start the same command: work up to the last checkpoint is kept."
        ) from error


def _top(column: str) -> str:
    """The column of a table that holds a column or a key of its JSON."""
    return "json" if column.startswith("json.") else column


def _index(url: str, image: str | None, label: str | None) -> list[list]:
    """Offset and size of each sample's picture (-1 where it has none) and its label, from the cache or the tar."""
    from datasets.config import HF_DATASETS_CACHE

    key = [url, image, label]
    if "://" not in url:  # an address on the hub names a commit, whose files never change
        with suppress(OSError):
            state = os.stat(url)
            key += [state.st_size, state.st_mtime_ns]
    kept = Path(HF_DATASETS_CACHE) / "tar-index" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()}.json"
    with suppress(OSError, ValueError):
        return json.loads(kept.read_text())
    made = _read_index(url, image, label)
    with suppress(OSError):  # no space for a cache is no reason to stop
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(made))
        part.replace(kept)
    return made


def _read_index(url: str, image: str | None, label: str | None) -> list[list]:
    from datasets.packaged_modules.webdataset.webdataset import base_plus_ext

    offsets, sizes, labels, current = [], [], [], None
    with _opened(url) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # it would keep a record of every file
            sample, ending = base_plus_ext(member.name)
            if sample is None or not member.isreg() or os.path.basename(member.name).startswith((".", "__")):
                continue
            if sample != current:
                current = sample
                offsets.append(-1), sizes.append(-1), labels.append(None)
            if ending == image:
                offsets[-1], sizes[-1] = member.offset_data, member.size
            elif label is not None and ending == _top(label):
                labels[-1] = _value(tar.extractfile(member).read(), label)
        # At a damaged header tarfile stops as if the archive ended there: a real end is a block of zeros.
        file.seek(tar.offset)
        if file.read(BLOCK) != bytes(BLOCK):
            raise EOFError(f"it is torn or damaged after {len(offsets)} samples, at byte {tar.offset}")
    return [offsets, sizes, labels]


def _value(content: bytes, label: str) -> int | str | None:
    """A label out of a sample's file, as the webdataset reader of `datasets` understands its ending."""
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    top = _top(label)
    value = WebDataset.DECODERS.get(top.rpartition(".")[2].lower(), bytes.decode)(content)
    if top != label:
        value = value.get(label.removeprefix(f"{top}."))
    return value if isinstance(value, int | str) else None
