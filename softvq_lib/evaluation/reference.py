"""Statistics of the features of many images: streamed, kept in a file for the next time, and read from others' files.

Memory does not grow with the number of images: moments of eight random groups, a random sample of features, and sums of
class scores are all that is kept.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import ZipFile, ZipInfo

import numpy as np
import torch
from torch import Tensor

from softvq_lib.config import at_least
from softvq_lib.evaluation.export import HEADER, merge_npz
from softvq_lib.evaluation.frechet import GROUPS, Moments, groups_of, merged
from softvq_lib.evaluation.pixels import AS_GIVEN, STORED, Images, Pixels, npz_names, open_pixels
from softvq_lib.training.files import write_whole

if TYPE_CHECKING:
    from softvq_lib.evaluation.extractors import Extractor

KEPT = 5000  # features of a sample; KID, precision and recall are taken of it
SPLITS = 10  # of the Inception score
_FORMAT = "softvq reference 1"
_FLUSH = 1024  # features that are gathered before the moments take them in


class Statistics:
    """What is known of the features of a set of images.

    Attributes:
        facts: `what` (a name for messages), `count`, `image_size` ([height, width]), `crop`, `uint8`, `fingerprint`
            (sha256 of the bytes of all images in order), `classes` (sorted labels, or None) and `extractor` (its
            identity). JSON-able.
        groups: Moments of eight random groups of the images; a single one from a file of mean and covariance.
        sample: Features of at most `kept` random images, float32 (m, c); None from a file of mean and covariance.
        scores: Inception score of each of ten random parts, (10,); None where the extractor has no classes.
    """

    def __init__(self, facts: dict, groups: list[Moments], sample: Tensor | None, scores: Tensor | None):
        self.facts, self.groups, self.sample, self.scores = facts, groups, sample, scores

    @property
    def count(self) -> int | None:
        """Number of images; None where a file does not tell."""
        return self.facts["count"]

    @property
    def moments(self) -> Moments:
        """Moments of all images."""
        return merged(self.groups)

    @property
    def width(self) -> int:
        """Dimensions of the features."""
        return len(self.groups[0].mean)


class Sample:
    """A random sample of rows that pass by, all equally likely to be in it (reservoir sampling).

    It depends on the order of the rows and the seed, and not on their batches.
    """

    def __init__(self, most: int, seed: int = 0):
        self.most, self.seen, self._draws, self._rows = most, 0, np.random.default_rng(seed), None

    def update(self, rows: Tensor) -> None:
        """See more rows (b, c)."""
        if self._rows is None:
            self._rows = torch.empty(self.most, rows.shape[1])
        numbers = np.arange(self.seen, self.seen + len(rows))
        # Row number i stays with probability most / (i + 1), and takes the place of any.
        places = np.where(numbers < self.most, numbers, 0)
        late = numbers >= self.most
        places[late] = self._draws.integers(0, numbers[late] + 1)
        for row in np.flatnonzero(places < self.most):
            self._rows[places[row]] = rows[row]
        self.seen += len(rows)

    @property
    def rows(self) -> Tensor:
        """The sample, (min(most, seen), c)."""
        return self._rows[: self.seen]


class Scores:
    """The Inception score (Salimans et al. 2016), exp of the mutual information of image and class, in ten parts."""

    def __init__(self, classes: int):
        self.count = torch.zeros(SPLITS, dtype=torch.float64)
        self.mean = torch.zeros(SPLITS, classes, dtype=torch.float64)
        self.negative_entropy = torch.zeros(SPLITS, dtype=torch.float64)

    def update(self, logits: Tensor, parts: Tensor) -> None:
        """Take in logits (b, classes) of images that belong to `parts` (b,), 0 to 9."""
        log_p = logits.double().log_softmax(1)
        p = log_p.exp()
        self.count.index_add_(0, parts, torch.ones(len(parts), dtype=torch.float64))
        self.mean.index_add_(0, parts, p)
        self.negative_entropy.index_add_(0, parts, (p * log_p).sum(1))

    def values(self) -> Tensor:
        """Return the score of each part that has images, (10,)."""
        seen = self.count > 0
        count = self.count[seen]
        q = self.mean[seen] / count[:, None]
        return (self.negative_entropy[seen] / count - torch.special.xlogy(q, q).sum(1)).exp()


def image_statistics(
    images: Images | Pixels,
    extractor: "str | Extractor" = "efflite0",
    *,
    image_size: int | None = None,
    convention: str | None = None,
    crop: str | None = None,
    kept: int = KEPT,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    progress: bool = True,
    seen_by: Callable[[Tensor, Tensor], None] | None = None,
) -> Statistics:
    """Extract features of images, batch by batch, and return their statistics.

    Args:
        images: As in `open_pixels`.
        image_size: As in `open_pixels`.
        convention: As in `open_pixels`.
        crop: As in `open_pixels`.
        extractor: A name of `extractors.EXTRACTORS`, or an `Extractor`.
        kept: Most features of the sample.
        batch_size: Images that the extractor sees at once.
        device: Where it runs.
        progress: Show a progress bar.
        seen_by: Is shown the features (b, c) and labels (b,) of each batch that has labels.

    Raises:
        ValueError: for what `open_pixels` and `build_extractor` refuse; for images of different sizes, no images, or
            features that are not finite.
    """
    from tqdm import tqdm

    at_least("batch_size", batch_size, 1)
    at_least("kept", kept, 10)
    pixels = open_pixels(images, image_size=image_size, convention=convention, crop=crop)
    extract = extractor_of(extractor).to(device)
    digest, classes, size, seen = hashlib.sha256(), set(), tuple(pixels.size), 0
    groups, sample, scores, waiting = None, Sample(kept), None, []
    labelled = True
    with tqdm(total=pixels.count, unit="image", desc=f"features of {pixels.what}", disable=not progress) as bar:
        for batch, labels in pixels.batches(batch_size):
            if tuple(batch.shape[2:]) != size:
                raise ValueError(
                    f"{pixels.what}: image {seen} is {batch.shape[2]} x {batch.shape[3]} pixels and the first one "
                    f"{size[0]} x {size[1]}: give all in one size."
                )
            digest.update(batch.permute(0, 2, 3, 1).numpy().tobytes())
            labelled = labelled and labels is not None
            classes.update(labels.tolist() if labelled else ())
            features, logits = extract(batch)
            if not features.isfinite().all():
                broken = seen + int((~features.isfinite().all(1)).nonzero()[0])
                raise ValueError(f"{pixels.what}: features of image {broken} are not finite: look at that image.")
            if groups is None:
                groups = [Moments(features.shape[1]) for _ in range(GROUPS)]
                scores = None if logits is None else Scores(logits.shape[1])
            sample.update(features)
            if seen_by is not None and labels is not None:
                seen_by(features, labels)
            if scores is not None:
                scores.update(logits, torch.from_numpy(groups_of(seen, len(batch), SPLITS)))
            waiting.append(features)
            seen += len(batch)
            if sum(map(len, waiting)) >= _FLUSH:
                waiting = _deal(groups, waiting, seen)
            bar.update(len(batch))
    if not seen:
        raise ValueError(f"{pixels.what}: there are no images.")
    _deal(groups, waiting, seen)
    facts = {
        "what": pixels.what,
        "count": seen,
        "image_size": list(size),
        "crop": pixels.crop,
        "uint8": pixels.uint8,
        "fingerprint": digest.hexdigest(),
        "classes": sorted(classes) if labelled else None,
        "extractor": extract.identity,
    }
    return Statistics(facts, groups, sample.rows, None if scores is None else scores.values())


def _deal(groups: Sequence[Moments], waiting: list[Tensor], seen: int) -> list[Tensor]:
    """Give the waiting features to their groups; return that none wait."""
    features = torch.cat(waiting) if waiting else torch.empty(0, len(groups[0].mean))
    numbers = torch.from_numpy(groups_of(seen - len(features), len(features), len(groups)))
    for number, group in enumerate(groups):
        group.update(features[numbers == number])
    return []


def extractor_of(extractor: "str | Extractor") -> "Extractor":
    """Return an `Extractor`, built if it is given by name."""
    from softvq_lib.evaluation.extractors import Extractor, build_extractor

    return extractor if isinstance(extractor, Extractor) else build_extractor(extractor)


def image_fingerprint(pixels: Pixels, batch_size: int = 256) -> str:
    """Return the sha256 (hex) of all images' bytes in order, (n, height, width, 3), as `Statistics` hold it."""
    digest = hashlib.sha256()
    for batch, _ in pixels.batches(batch_size):
        digest.update(batch.permute(0, 2, 3, 1).numpy().tobytes())
    return digest.hexdigest()


def reference_statistics(
    images: Images | Pixels, path: str | Path, extractor: "str | Extractor" = "efflite0", *, kept: int = KEPT, **options
) -> Statistics:
    """Return the statistics of a data set from a file; where there is none yet, extract and save them.

    The images are read in either case, which is quick beside their features, to see that the file is theirs.

    Args:
        images: As in `open_pixels`, such as a tensor (n, 3, height, width).
        path: The file, .safetensors; about 80 MB with 1,280 features.
        extractor: As in `image_statistics`.
        kept: As in `image_statistics`.
        options: The others of `image_statistics`.

    Raises:
        ValueError: when the file is of other images, another size, crop, conversion to bytes or extractor, naming
            both; and as `image_statistics`.
    """
    path = Path(path).expanduser()
    extract = extractor_of(extractor)
    chosen = {name: options.pop(name, None) for name in ("image_size", "convention", "crop")}
    pixels = open_pixels(images, **chosen)
    if not path.exists():
        statistics = image_statistics(pixels, extract, kept=kept, **options)
        save_statistics(statistics, path)
        return statistics
    statistics = load_statistics(path)
    wanted = {"image_size": list(pixels.size), "crop": pixels.crop, "uint8": pixels.uint8}
    wanted |= {"extractor": extract.identity}
    different = [
        f"{k}: {statistics.facts[k]!r} there, {v!r} here" for k, v in wanted.items() if statistics.facts[k] != v
    ]
    if not different:
        found = image_fingerprint(pixels)
        if found != statistics.facts["fingerprint"]:
            theirs = f"{statistics.facts['what']} ({statistics.facts['fingerprint'][:12]}...)"
            different = [f"images: {theirs} there, {pixels.what} ({found[:12]}...) here"]
    if different:
        raise ValueError(f"{path} holds other statistics ({'; '.join(different)}): choose another file, or delete it.")
    return statistics


def save_statistics(statistics: Statistics, path: str | Path) -> None:
    """Write statistics as a safetensors file, whole or not at all. The same statistics give the same bytes."""
    from safetensors.torch import save_file

    path = Path(path).expanduser()
    rows, columns = torch.tril_indices(statistics.width, statistics.width)
    groups = statistics.groups
    tensors = {
        "count": torch.tensor([group.count for group in groups]),
        "mean": torch.stack([group.mean for group in groups]),
        "scatter": torch.stack([group.scatter[rows, columns] for group in groups]),
    }
    tensors |= {} if statistics.sample is None else {"sample": statistics.sample.contiguous()}
    tensors |= {} if statistics.scores is None else {"scores": statistics.scores}
    # A single entry: safetensors writes several in an order that changes.
    metadata = {_FORMAT: json.dumps(statistics.facts, sort_keys=True)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda part: save_file(tensors, part, metadata=metadata))


def load_statistics(path: str | Path) -> Statistics:
    """Read what `save_statistics` wrote.

    Raises:
        ValueError: for a file that is missing, damaged or another.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path).expanduser()
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as statistics of images: {error}.") from None
    if _FORMAT not in metadata:
        raise ValueError(f"{path} holds no statistics of images: give a file that save_statistics wrote.")
    facts, width = json.loads(metadata[_FORMAT]), tensors["mean"].shape[1]
    rows, columns = torch.tril_indices(width, width)
    groups = []
    for count, mean, triangle in zip(tensors["count"], tensors["mean"], tensors["scatter"], strict=True):
        group = Moments(width)
        group.count, group.mean = int(count), mean
        group.scatter[rows, columns] = triangle
        group.scatter[columns, rows] = triangle
        groups.append(group)
    return Statistics(facts, groups, tensors.get("sample"), tensors.get("scores"))


def read_moments(path: str | Path) -> Statistics:
    """Read mean and covariance of Inception features from an .npz, `mu` (2048,) and `sigma` (2048, 2048).

    pytorch-fid and ADM's evaluator keep them so. How many images of which size they are of, the file does not say; a
    Fréchet distance is all that they give.

    Raises:
        ValueError: when they are missing or have other shapes.
    """
    path = Path(path).expanduser()
    names = npz_names(path)
    if not {"mu", "sigma"} <= set(names):
        raise ValueError(f"{path} holds {', '.join(names) or 'nothing'}, but moments are arrays mu and sigma.")
    with np.load(path) as archive:
        mean, covariance = (torch.from_numpy(np.asarray(archive[name], np.float64)) for name in ("mu", "sigma"))
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"{path}: mu is {tuple(mean.shape)} and sigma {tuple(covariance.shape)}: give (c,) and (c, c)."
        )
    facts = {"what": path.name, "count": None, "image_size": None, "crop": AS_GIVEN, "uint8": STORED}
    facts |= {"fingerprint": hashlib.sha256(path.read_bytes()).hexdigest(), "classes": None, "extractor": None}
    return Statistics(facts, [Moments.given(mean, covariance)], None, None)


def write_batch(images: Images | Pixels, path: str | Path, **options) -> Path:
    """Write images as a batch for ADM's evaluator: an .npz with one array `arr_0`, uint8 (n, height, width, 3).

    Args:
        images: As in `open_pixels`; a finished export is merged. The number of images has to be known.
        path: The file.
        options: As in `open_pixels`.

    Returns:
        Its path. The same images give the same bytes.

    Raises:
        ValueError: as `open_pixels`, and for streams that do not tell their number or size.
    """
    path = Path(path).expanduser()
    if isinstance(images, str | Path) and (Path(images).expanduser() / HEADER).exists():
        return merge_npz(images, path)
    pixels = open_pixels(images, **options)
    if pixels.count is None:
        raise ValueError("a stream of images does not tell their number, which stands first in an .npz: give a tensor.")
    shape = {"shape": (pixels.count, *pixels.size, 3), "fortran_order": False, "descr": "|u1"}

    def write(part: Path) -> None:
        with ZipFile(part, "w") as archive, archive.open(ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, shape)
            for batch, _ in pixels.batches(256):
                file.write(batch.permute(0, 2, 3, 1).numpy().tobytes())

    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, write)
    return path
