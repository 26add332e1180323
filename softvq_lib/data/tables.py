"""Pictures in a Hugging Face `datasets` table: finding the image and label columns, and reading single rows."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from softvq_lib.config import nearest
from softvq_lib.data.images import decode
from softvq_lib.data.source import UNLABELLED, Source, UnreadableImage

if TYPE_CHECKING:
    from datasets import Dataset, Features

IMAGE_NAMES = ["image", "img", "images", "picture", "photo", "jpg", "png", "pixels", "bytes", "jpeg", "webp"]
LABEL_NAMES = ["label", "labels", "class", "class_label", "category", "target", "fine_label", "cls", "y"]
JSON = "json"  # column of a WebDataset whose keys may hold labels


@dataclass(frozen=True)
class Columns:
    """Which columns of a table hold the pictures and, if any, the labels; `classes` names the label numbers.

    The label may be one key of a WebDataset's JSON, ``json.key``.
    """

    image: str
    label: str | None
    classes: list[str] | None
    numbers: dict[Any, int] | None  # label value to class number; None: values are the numbers

    def number(self, row: dict[str, Any]) -> int:
        """The class number of a row, -1 where it has none."""
        value = None
        if self.label is not None:
            value = row[self.label] if self.label in row else (row[JSON] or {}).get(self.label.removeprefix(f"{JSON}."))
        if value is None:
            return UNLABELLED
        number = value if self.numbers is None else self.numbers.get(value, UNLABELLED)
        return max(int(number), UNLABELLED)


class TableSource(Source):
    """Rows of a table, decoded one at a time.

    Args:
        table: a split of a data set.
        columns: where its pictures and labels are.
        rows: row numbers in the fixed order of this source.
        split: name of the split, for messages.
        root: folder that file names are shown relative to.
    """

    def __init__(self, table: "Dataset", columns: Columns, rows: np.ndarray, split: str, root: str = ""):
        import datasets

        keep = [columns.image] if columns.label is None else [columns.image, columns.label]
        table = table.select_columns([name if name in table.features else JSON for name in keep])
        if isinstance(table.features[columns.image], datasets.Image):
            # Decoding is ours, so that a damaged picture can be named and passed over.
            table = table.cast_column(columns.image, datasets.Image(decode=False))
        self.table, self.columns, self.rows, self.split, self.root = table, columns, rows, split, root

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return read_row(self.table[int(self.rows[self._check(index)])], self.columns, int(index), self.name)

    def name(self, index: int) -> str:
        row = int(self.rows[self._check(index)])
        value = self.table[row][self.columns.image]
        path = value.get("path") if isinstance(value, dict) else value if isinstance(value, str) else None
        if path and self.root:
            return path.removeprefix(self.root).lstrip("/\\")
        return f"row {row} of {self.split}" + (f", {path}" if path else "")


def read_row(row: dict[str, Any], columns: Columns, index: int, name: Callable[[int], str]) -> tuple[Image.Image, int]:
    """Decode the picture of a row and look up its label.

    Args:
        row: cells by column.
        columns: which of them to use.
        index: number of the picture in its source, for messages.
        name: tells where a picture lies.

    Raises:
        UnreadableImage: the picture cannot be decoded.
    """
    try:
        image = decode(_payload(row[columns.image]))
    except Exception as error:  # Pillow and its codecs raise nearly anything on damaged data
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UnreadableImage(index, name(index), reason or type(error).__name__) from None
    return image, columns.number(row)


def _payload(value: Any) -> bytes | str:
    """The encoded picture, or its path, of one cell."""
    if isinstance(value, dict):
        content = value.get("bytes")
        value = content if content is not None else value.get("path")
    if value is None:
        raise ValueError("the cell is empty")
    return value


def find_columns(tables: dict[str, "Dataset"], image: str | None, label: str | None, dataset: str) -> Columns:
    """Find the image and the label column of the tables that will be used, see `choose_columns`, and the classes.

    Args:
        tables: the splits; they share their columns.
        image: column named by the user, None to find it.
        label: likewise for the labels.
        dataset: the user's `dataset` parameter, for messages.

    Raises:
        ValueError: no column holds pictures, or a named column is missing or holds something else.
    """
    features = next(iter(tables.values())).features
    image, label = choose_columns(features, image, label, dataset)

    def values(table: "Dataset") -> list:
        if label in features:
            return table.unique(label)
        return table.select_columns([JSON]).flatten().unique(label)

    return name_classes(features, image, label, lambda: {value for table in tables.values() for value in values(table)})


def choose_columns(features: "Features", image: str | None, label: str | None, dataset: str) -> tuple[str, str | None]:
    """Choose the image and the label column among the columns of a data set.

    A column named by the user is taken if it can hold pictures or labels. Otherwise an ``Image`` column, then a
    column of ``{bytes, path}`` records, then one of raw bytes, is taken, each preferring the common names; for
    labels a ``ClassLabel`` column, then whole numbers or text under a common name, then the like in a column
    ``json``. Labels may be missing.

    Args:
        features: of the columns.
        image: column named by the user, None to find it.
        label: likewise for the labels; ``json.key`` for a key of a column ``json``.
        dataset: the user's `dataset` parameter, for messages.

    Raises:
        ValueError: no column holds pictures, or a named column is missing or holds something else.
    """
    kinds = {name: _kind(feature) for name, feature in features.items()}
    inside = features[JSON] if isinstance(features.get(JSON), dict) else {}
    keys = {f"{JSON}.{key}": _kind(feature) for key, feature in inside.items()}
    for parameter, wanted, known, able in (
        ("image_column", image, kinds, ("image", "record", "bytes", "text")),
        ("label_column", label, keys | kinds, ("class", "integer", "text")),
    ):
        if wanted is not None and wanted not in known:
            raise ValueError(
                f"{parameter}='{wanted}' is no column of '{dataset}'{nearest(wanted, known)} "
                f"Its columns: {_listed(features)}."
            )
        if wanted is not None and known[wanted] not in able:
            raise ValueError(
                f"{parameter}='{wanted}' of '{dataset}' does not hold {parameter.removesuffix('_column')}s. "
                f"Its columns: {_listed(features)}."
            )
    image = image or _choose(kinds, ("image", "record", "bytes"), IMAGE_NAMES)
    if image is None:
        raise ValueError(
            f"no image column found in '{dataset}': name it by image_column. Its columns: {_listed(features)}."
        )
    if label is None:
        common = {name: kind for name, kind in kinds.items() if name.lower() in LABEL_NAMES and name != image}
        classes = {name: kind for name, kind in kinds.items() if kind == "class"}
        label = _choose(classes, ("class",), LABEL_NAMES) or _choose(common, ("integer", "text"), LABEL_NAMES)
        common = {name: kind for name, kind in keys.items() if name.removeprefix(f"{JSON}.").lower() in LABEL_NAMES}
        label = label or _choose(common, ("integer", "text"), LABEL_NAMES)
    return image, label


def name_classes(features: "Features", image: str, label: str | None, values: Callable[[], Iterable[Any]]) -> Columns:
    """The chosen columns with their classes, numbered in order where the label column does not name them.

    Args:
        features: of the columns.
        image: the image column.
        label: the label column, None without.
        values: finds all labels that occur; asked only if they are needed.
    """
    if label is None:
        return Columns(image, None, None, None)
    if label in features and _kind(features[label]) == "class":
        return Columns(image, label, list(features[label].names), None)
    found = {value for value in values() if value is not None}
    names = sorted(value for value in found if isinstance(value, str) or value >= 0)
    return Columns(image, label, [str(v) for v in names], {v: number for number, v in enumerate(names)})


def _choose(kinds: dict[str, str], wanted: tuple[str, ...], names: list[str]) -> str | None:
    """The column of the first wanted kind, preferring common names in their order, then the table's order."""
    for kind in wanted:
        able = [name for name, found in kinds.items() if found == kind]
        if able:
            return min(able, key=lambda n: names.index(n.lower()) if n.lower() in names else len(names))
    return None


def _kind(feature: Any) -> str:
    import datasets

    if isinstance(feature, datasets.Image):
        return "image"
    if isinstance(feature, datasets.ClassLabel):
        return "class"
    if isinstance(feature, dict) and "bytes" in feature:
        return "record"
    dtype = getattr(feature, "dtype", "") if isinstance(feature, datasets.Value) else ""
    if dtype in ("binary", "large_binary"):
        return "bytes"
    if dtype in ("string", "large_string"):
        return "text"
    return "integer" if dtype.startswith(("int", "uint", "bool")) else "other"


def _listed(features: "Features") -> str:
    def shown(feature: Any) -> str:
        return getattr(feature, "dtype", None) if _kind(feature) != "class" else "ClassLabel"

    return ", ".join(f"{name} ({shown(f) or type(f).__name__})" for name, f in features.items())
