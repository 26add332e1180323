"""One `dataset` parameter for embedded data, a folder, shards and the hub, and the split for validation."""

import os
from dataclasses import dataclass
from pathlib import Path

from softvq_lib.config import at_least, fingerprint, nearest
from softvq_lib.data import digits, files, mixed, photographs, shapes
from softvq_lib.data.shards import SUFFIXES, label_values, open_shards
from softvq_lib.data.source import Source, UnreadableImage, fixed_order
from softvq_lib.data.streams import RULE, StreamedSource
from softvq_lib.data.tables import TableSource, choose_columns, find_columns, name_classes

EMBEDDED = ["digits", "shapes", "photographs", "mixed"]
HOLD_OUT = 0.05
HOLD_OUT_MOST = 5000


@dataclass(frozen=True)
class DataConfig:
    """The flat parameters that concern data.

    Attributes:
        dataset: ``digits``, ``shapes``, ``photographs``, ``mixed``, a folder, a parquet file or WebDataset shard
            (.tar) or a pattern of them, or a hub name ``owner/name``.
        image_column: column of the pictures; None: found.
        label_column: column of the labels; None: found, and none is fine.
        flip: mirror training pictures left-right at random.
        crop: training pictures are enlarged by a factor uniform in [1, crop] and cropped at random. The paper
            uses 1.25; validation pictures are cropped in the centre.
        limit: train on at most so many pictures, the first of the fixed order, or of the files if they are
            streamed; None: all.
        workers: loader processes; None: none for embedded data, else one less than the processors, at most 4.
            Changes the speed, never the batches.
        streaming: read parquet files or WebDataset shards, on disk or on the hub, piece by piece as they are
            needed, for data that are too large for a copy in the cache. They need a split for validation. The order
            is another one, as exact: shards are shuffled, and pictures within windows of 2,048.
    """

    dataset: str = "digits"
    image_column: str | None = None
    label_column: str | None = None
    flip: bool = False
    crop: float = 1.0
    limit: int | None = None
    workers: int | None = None
    streaming: bool = False

    def __post_init__(self):
        if not self.dataset.strip():
            raise ValueError(
                "dataset is empty: give digits, shapes, photographs, mixed, a folder, parquet or tar files, or a hub "
                "name."
            )
        at_least("crop", self.crop, 1)
        at_least("limit", self.limit, 1)
        at_least("workers", self.workers, 0)


@dataclass(frozen=True)
class DataSplits:
    """A data set ready for use.

    Attributes:
        train: training pictures in a fixed shuffled order.
        validation: held-out pictures in a fixed shuffled order.
        name: a short name for people; never a path.
        fingerprint: sha256 (hex) of what the pictures are and how they are split; the same on every machine and
            wherever the files lie.
        classes: names of the labels, None without labels.
    """

    train: Source
    validation: Source
    name: str
    fingerprint: str
    classes: list[str] | None

    @property
    def all(self) -> Source:
        """All pictures: those of one table in its order, as files are sorted; else the training pictures first."""
        return _All(self.train, self.validation)

    def describe(self) -> str:
        """One line: name, sizes and classes."""
        labels = "no labels"
        if self.classes is not None:
            names = ", ".join(self.classes)
            labels = f"{len(self.classes)} classes" + (f" ({names})" if len(names) <= 80 else "")
        return f"{self.name}: {len(self.train):,} training and {len(self.validation):,} validation images, {labels}"


class _All(Source):
    """The pictures of two sources; where both are of one table, in its order."""

    def __init__(self, *parts: Source):
        self.parts, self.embedded = parts, all(part.embedded for part in parts)
        self.root = getattr(parts[0], "root", "")
        of_one = len({getattr(part, "split", number) for number, part in enumerate(parts)}) == 1
        places = []
        for number, part in enumerate(parts):
            rows = getattr(part, "rows", range(len(part)))
            places += [((0 if of_one else number, int(row)), (number, i)) for i, row in enumerate(rows)]
        self.places = [place for _, place in sorted(places)]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple:
        part, place = self.places[self._check(index)]
        try:
            return self.parts[part][place]
        except UnreadableImage as error:
            raise UnreadableImage(index, error.name, error.reason) from None

    def name(self, index: int) -> str:
        part, place = self.places[self._check(index)]
        return self.parts[part].name(place)


def open_dataset(config: DataConfig, image_size: int) -> DataSplits:
    """Open a data set and split it.

    Splits that the data set brings are used (train, and validation or else test). Otherwise 5 % of the pictures,
    at least 1 and at most 5,000, are held out by an order that is fixed for ever; a streamed data set must bring a
    split for validation.

    Args:
        config: which data set, and how.
        image_size: side in pixels at which `shapes` and `photographs` are drawn; the others keep their stored size
            until a batch is made.

    Raises:
        ValueError: the data set is not known, missing, empty or damaged; the message names the remedy.
    """
    at_least("image_size", image_size, 1)
    if config.dataset in EMBEDDED:
        return _embedded(config, image_size)
    tables = _locate(config.dataset, config.streaming)
    if isinstance(tables, files.Streams):
        return _streamed(config, tables)
    used = _choose_splits(list(tables.splits), config.dataset)
    columns = find_columns(
        {name: tables.splits[name] for name in used}, config.image_column, config.label_column, config.dataset
    )
    train = tables.splits[used[0]]
    order = fixed_order(len(train), salt=2)
    if len(used) == 2:
        rule = " and ".join(used)
        validation = tables.splits[used[1]]
        held_out = fixed_order(len(validation), salt=3)
    else:
        count = min(HOLD_OUT_MOST, max(1, round(HOLD_OUT * len(train))))
        if len(train) < 2:
            raise ValueError(
                f"dataset='{config.dataset}' holds one image only. At least two are needed: one to train on and "
                "one for validation. Add images, or a validation split."
            )
        rule, validation = f"{count} of {used[0]} held out, order 2", train
        order, held_out = order[:-count], order[-count:]
    order = order[: config.limit]
    identity = {
        **tables.identity,
        "split": rule,
        "train": len(order),
        "validation": len(held_out),
        "columns": [columns.image, columns.label],
    }
    return DataSplits(
        TableSource(train, columns, order, used[0], tables.root),
        TableSource(validation, columns, held_out, used[-1], tables.root),
        tables.name,
        fingerprint(identity),
        columns.classes,
    )


def _streamed(config: DataConfig, streams: files.Streams) -> DataSplits:
    used = _choose_splits(list(streams.splits), config.dataset)
    if len(used) < 2:
        raise ValueError(
            f"dataset='{config.dataset}' has no split for validation, which a streamed data set must bring: name some "
            "shards validation* or test* and let the pattern match them too, or leave streaming out."
        )
    image, label = choose_columns(streams.features, config.image_column, config.label_column, config.dataset)
    shards = {split: open_shards(streams.splits[split], streams.kind, image, label) for split in used}
    for split, its in shards.items():
        if not sum(shard.count for shard in its):
            raise ValueError(f"dataset='{config.dataset}' holds no images in its split {split}.")
    columns = name_classes(streams.features, image, label, lambda: label_values(sum(shards.values(), [])))
    train = StreamedSource(shards[used[0]], columns, config.limit)
    validation = StreamedSource(shards[used[1]], columns)
    identity = {
        **streams.identity,
        "split": " and ".join(used),
        "train": len(train),
        "validation": len(validation),
        "columns": [columns.image, columns.label],
        "streaming": RULE,
    }
    return DataSplits(train, validation, streams.name, fingerprint(identity), columns.classes)


_DRAWN = {
    "shapes": (shapes.ShapesSource, shapes.shapes_identity, shapes.CLASSES),
    "photographs": (photographs.PhotographsSource, photographs.photographs_identity, photographs.CLASSES),
    "mixed": (mixed.MixedSource, mixed.mixed_identity, mixed.CLASSES),
}


def _embedded(config: DataConfig, image_size: int) -> DataSplits:
    if config.streaming:
        raise ValueError(f"streaming has no meaning for dataset='{config.dataset}', which is in memory: leave it out.")
    for parameter in ("image_column", "label_column"):
        if getattr(config, parameter) is not None:
            raise ValueError(
                f"{parameter}='{getattr(config, parameter)}' has no meaning for dataset='{config.dataset}', "
                "which has no columns: leave it out."
            )
    if config.dataset == "digits":
        train, validation = digits.DigitsSource("train", config.limit), digits.DigitsSource("validation")
        identity, classes = digits.digits_identity(), digits.CLASSES
    else:
        drawn, identity, classes = _DRAWN[config.dataset]
        train, validation = drawn("train", image_size, config.limit), drawn("validation", image_size)
        identity = identity()
    identity = identity | {"train": len(train), "validation": len(validation)}
    return DataSplits(train, validation, config.dataset, fingerprint(identity), list(classes))


def _locate(dataset: str, streaming: bool) -> files.Tables | files.Streams:
    """Decide what a `dataset` that is not embedded means, and load it or find what is to be streamed."""
    path = Path(dataset).expanduser()
    if path.is_dir():
        return (files.stream_folder if streaming else files.load_folder)(path.resolve(), dataset)
    of_shards = files.stream_shards if streaming else files.load_shards
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise ValueError(
                f"dataset='{dataset}' is a file of kind '{path.suffix}'. Give a folder of images, parquet files or "
                "WebDataset shards (.tar)."
            )
        return of_shards([_placed(path)], dataset)
    if any(sign in dataset for sign in "*?["):
        return of_shards([_placed(found) for found in files.find_shards(dataset)], dataset)
    owner, *rest = dataset.split("/")
    if "/" not in dataset and os.sep not in dataset and path.suffix.lower() not in SUFFIXES:
        local = sorted(entry.name for entry in Path().iterdir() if entry.is_dir())
        raise ValueError(
            f"dataset='{dataset}' is not known{nearest(dataset, EMBEDDED) or nearest(dataset, local)} It is "
            f"neither embedded ({', '.join(EMBEDDED)}) nor a folder of {Path.cwd()}; a hub name has the form "
            "owner/name."
        )
    is_path = len(rest) != 1 or not rest[0] or owner in ("", ".", "..", "~") or os.path.isdir(owner)
    if is_path or path.suffix.lower() in SUFFIXES:
        raise files.missing(path, dataset)
    return (files.stream_hub if streaming else files.load_hub)(dataset)


def _placed(path: Path) -> Path:
    """The whole path; the name of a linked file stays, since it may tell the split."""
    return path.parent.resolve() / path.name


def _choose_splits(names: list[str], dataset: str) -> list[str]:
    """The split to train on and, where there is one, the split for validation."""
    if not names:
        raise ValueError(f"dataset='{dataset}' holds no images: every split of it is empty.")
    if "train" in names:
        return ["train", *[name for name in ("validation", "test") if name in names][:1]]
    if len(names) == 1:
        return names
    raise ValueError(
        f"dataset='{dataset}' has the splits {', '.join(names)} and none named train. Rename one, or give a "
        "single one of them."
    )
