"""Images of any kind as batches of bytes, which is what the measures of fidelity look at.

What cannot be seen in the bytes is stated beside them: how they became bytes, and how they were cropped.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from softvq_lib.config import at_least, one_of
from softvq_lib.data.images import decode
from softvq_lib.data.loading import validation_batches
from softvq_lib.data.source import UNLABELLED, Source, UnreadableImage
from softvq_lib.evaluation.export import CONVENTIONS, HEADER, LABELS, _read_header, _whole, to_uint8

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
STORED = "stored"  # of images that were bytes already
AS_GIVEN, CENTRE = "as given", "centre"
_BEYOND = 4.0  # a decoder overshoots [-1, 1] a little; what is as far off as this is another range

Images = Tensor | np.ndarray | Source | str | Path | Iterable[Tensor]


@dataclass(frozen=True)
class Pixels:
    """Images as bytes, read in batches as often as the images themselves can be read.

    Attributes:
        what: Name for messages.
        batches: Function of a batch size that begins anew and yields images, uint8 (b, 3, height, width), and their
            labels, int64 (b,), or None.
        count: Number of images; None where only the end of a stream will tell.
        size: (height, width).
        uint8: How they became bytes: `stored`, or one of `CONVENTIONS`.
        crop: `centre` for the centre crop of `softvq_lib.data.images.fit`; `as given` where nobody has said; or a name
            that the caller gave.
    """

    what: str
    batches: Callable[[int], Iterator[tuple[Tensor, Tensor | None]]]
    count: int | None
    size: tuple[int, int]
    uint8: str
    crop: str


def open_pixels(
    images: "Images | Pixels",
    *,
    image_size: int | None = None,
    convention: str | None = None,
    crop: str | None = None,
    labels: Tensor | None = None,
    what: str | None = None,
    workers: int | None = 0,
) -> Pixels:
    """Take images of any of these kinds.

    - a tensor (n, 3, height, width): uint8, or float in [-1, 1];
    - an iterable of such tensors, for images that are made as they are measured (a generator is read once);
    - a `Source`, such as `open_dataset(...).validation`;
    - the path of a folder of images, at any depth;
    - the path of a folder that `export_samples` wrote; its convention and labels are read from it;
    - the path of an `.npz` of ADM's evaluator, or an array: `arr_0`, uint8 (n, height, width, 3).

    Args:
        images: One of these; what is open already is handed back.
        image_size: Side in pixels to which a `Source` or a folder of images is resized and cropped in the centre.
            None: they keep their size, which has to be one.
        convention: One of `CONVENTIONS`, how floats become bytes. None: `dit`.
        crop: How the images were cropped before they came here, for the record: `centre`, or another name. Where both
            sides of a comparison say it, they have to agree.
        labels: Of a tensor, (n,).
        what: Name for messages.
        workers: Loader processes of a `Source` or folder that is resized.

    Raises:
        ValueError: for images that are none of these, folders without images, sizes, ranges or labels that do not fit,
            a convention that is not the folder's; and, while they are read, images that are not finite, not of one
            size, or damaged.
    """
    if isinstance(images, Pixels):
        return images
    if convention is not None:
        one_of("convention", convention, CONVENTIONS)
    at_least("image_size", image_size, 1)
    path = Path(images).expanduser() if isinstance(images, str | Path) else None
    if labels is not None and not isinstance(images, Tensor | np.ndarray):
        raise ValueError("labels go with a tensor of images; sources and exports bring their own.")
    rule, stated = convention or "dit", crop or AS_GIVEN
    if path is not None and path.suffix == ".npz":
        return _of_npz(path, stated)
    if path is not None and (path / HEADER).exists():
        return _of_export(path, convention, stated)
    if path is not None:
        images = FolderSource(path)
        what = what or path.name
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(images).permute(0, 3, 1, 2)
    if isinstance(images, Tensor):
        return _of_tensor(images, rule, stated, labels, what or "images")
    if isinstance(images, Source):
        return _of_source(images, image_size, stated, what or "the data set", workers)
    if isinstance(images, Iterable):
        return _of_stream(images, rule, stated, what or "images")
    raise ValueError(
        f"images of type {type(images).__name__}: give a tensor (n, 3, height, width), an iterable of them, a Source, "
        "the path of a folder or of an .npz."
    )


class FolderSource(Source):
    """The images of a folder at any depth, sorted by path; hidden files are left out. There are no labels.

    Raises:
        ValueError: the folder is missing or holds no images.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"{folder} is no folder: give the path of one with images, or of an .npz.")
        inside = ((path, path.relative_to(self.folder)) for path in self.folder.rglob("*"))
        self.files = sorted(
            path
            for path, name in inside
            if path.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in name.parts)
        )
        if not self.files:
            raise ValueError(
                f"{folder} holds no images ({', '.join(SUFFIXES)}): give the folder that they were put in."
            )

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return str(self.files[index].relative_to(self.folder))

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        try:
            return decode(self.files[self._check(index)]), UNLABELLED
        except (ValueError, OSError, SyntaxError) as error:
            raise UnreadableImage(index, self.name(index), str(error)) from None


def to_bytes(images: Tensor, convention: str, first: int = 0, what: str = "images") -> Tensor:
    """Return a batch as uint8 (b, 3, height, width).

    Args:
        images: (b, 3, height, width), uint8 or float in [-1, 1].
        convention: How floats become bytes.
        first: Number of the first of them, for messages.
        what: Name of the images for messages.

    Raises:
        ValueError: for another shape, or values that are not finite or of another range.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"{what} of shape {tuple(images.shape)}: give them as (b, 3, height, width).")
    if images.dtype == torch.uint8:
        return images.cpu()
    if not images.is_floating_point():
        raise ValueError(f"{what} are of type {images.dtype}: give uint8, or floats in [-1, 1].")
    broken = (~images.flatten(1).isfinite().all(1)).nonzero()[:, 0]
    if len(broken):
        raise ValueError(
            f"{what}: image {first + int(broken[0])} is not finite ({len(broken)} of the {len(images)} in its batch): "
            "generate them anew, or leave them out and say so."
        )
    if images.numel() and images.abs().max() > _BEYOND:
        raise ValueError(f"{what} have values up to {images.abs().max():.4g}: give floats in [-1, 1], or uint8.")
    return to_uint8(images.cpu(), convention).permute(0, 3, 1, 2)  # (b, 3, height, width)


def _of_tensor(images: Tensor, rule: str, crop: str, labels: Tensor | None, what: str) -> Pixels:
    if images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(f"{what} of shape {tuple(images.shape)}: give at least one, as (n, 3, height, width).")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{len(labels)} labels for {len(images)} images: give one an image.")

    def batches(size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        for first in range(0, len(images), size):
            part = slice(first, first + size)
            yield to_bytes(images[part], rule, first, what), None if labels is None else torch.as_tensor(labels)[part]

    return Pixels(what, batches, len(images), tuple(images.shape[2:]), _rule_of(images, rule), crop)


def _of_stream(images: Iterable[Tensor], rule: str, crop: str, what: str) -> Pixels:
    passing = iter(images)
    begin = next(passing, None)
    if begin is None:
        raise ValueError(f"{what}: there are no images.")
    if not isinstance(begin, Tensor):
        raise ValueError(f"{what} yields {type(begin).__name__}: batches are tensors (b, 3, height, width).")
    if passing is images:  # it can be read once
        images = chain([begin], passing)

    def batches(size: int) -> Iterator[tuple[Tensor, None]]:
        first = 0
        for batch in images:
            for part in to_bytes(batch, rule, first, what).split(size):
                yield part, None
            first += len(batch)

    return Pixels(what, batches, None, tuple(begin.shape[2:]), _rule_of(begin, rule), crop)


def _rule_of(images: Tensor, rule: str) -> str:
    return STORED if images.dtype == torch.uint8 else rule


def _of_source(source: Source, image_size: int | None, crop: str, what: str, workers: int | None) -> Pixels:
    if not len(source):
        raise ValueError(f"{what}: there are no images.")
    if image_size is not None:

        def batches(size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
            for batch in validation_batches(source, image_size=image_size, batch_size=size, workers=workers):
                for _, name, reason in batch.unreadable:
                    raise ValueError(f"{what}: {name} cannot be read ({reason}): mend it or leave it out.")
                # From bytes to floats and back is exact.
                yield batch.images.add(1).mul(127.5).round().to(torch.uint8), _known(batch.labels)

        return Pixels(what, batches, len(source), (image_size, image_size), STORED, CENTRE)
    width, height = source[0][0].size

    def as_stored(size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        for first in range(0, len(source), size):
            rows = [(index, *source[index]) for index in range(first, min(first + size, len(source)))]
            for index, image, _ in rows:
                if image.size != (width, height):
                    raise ValueError(
                        f"{what}: {source.name(index)} is {image.size[0]} x {image.size[1]} pixels and the first one "
                        f"{width} x {height}: give image_size, to which all are resized and cropped."
                    )
            pixels = torch.from_numpy(np.stack([np.asarray(image) for _, image, _ in rows]))
            yield pixels.permute(0, 3, 1, 2), _known(torch.tensor([label for *_, label in rows]))

    return Pixels(what, as_stored, len(source), (height, width), STORED, crop)


def _known(labels: Tensor) -> Tensor | None:
    return None if (labels == UNLABELLED).any() else labels


def _of_export(folder: Path, convention: str | None, crop: str) -> Pixels:
    header = _read_header(folder)
    made = sum(shard["count"] for shard in header["shards"])
    if made != header["count"]:
        raise ValueError(f"{folder} holds {made} of {header['count']} images: let the export finish first.")
    if convention not in (None, header["uint8"]):
        raise ValueError(
            f"convention={convention!r}, but {folder} was written with {header['uint8']!r}: leave it out, or export "
            "again."
        )
    labels = torch.from_numpy(np.load(folder / LABELS))

    def batches(size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        start = 0
        for shard in header["shards"]:
            if not _whole(folder, shard):
                raise ValueError(f"{folder / shard['name']} is missing or damaged: run the export again.")
            pixels = torch.from_numpy(np.load(folder / shard["name"])).permute(0, 3, 1, 2)
            for first in range(0, len(pixels), size):
                part = pixels[first : first + size]
                yield part, labels[start + first :][: len(part)]
            start += len(pixels)

    side = header["image_size"]
    return Pixels(folder.name, batches, header["count"], (side, side), header["uint8"], crop)


def npz_names(path: Path) -> list[str]:
    """Return the names of the arrays in an .npz.

    Raises:
        ValueError: when it is missing or none.
    """
    try:
        with ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except (OSError, BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as an .npz: {error}.") from None


def _of_npz(path: Path, crop: str) -> Pixels:
    """The array `arr_0`, read a batch at a time: 50,000 images of 256 pixels are 10 GB."""
    names = npz_names(path)
    if "arr_0" not in names:
        raise ValueError(f"{path} holds {', '.join(names) or 'nothing'}, but images are an array arr_0.")
    with ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        shape, column_major, kind = _array_header(file)
    if kind != np.uint8 or len(shape) != 4 or shape[-1] != 3 or column_major or not shape[0]:
        raise ValueError(f"{path}: arr_0 is {kind} {shape}, but images are uint8 (n, height, width, 3).")
    count, *rest = shape

    def batches(size: int) -> Iterator[tuple[Tensor, None]]:
        with ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            _array_header(file)
            for first in range(0, count, size):
                part = (min(size, count - first), *rest)
                pixels = torch.frombuffer(bytearray(file.read(int(np.prod(part)))), dtype=torch.uint8)
                yield pixels.view(part).permute(0, 3, 1, 2), None

    return Pixels(path.name, batches, count, (rest[0], rest[1]), STORED, crop)


def _array_header(file) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)
