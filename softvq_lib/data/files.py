"""Data sets from files or the hub, through Hugging Face `datasets`: a folder, shards, a name `owner/name`."""

import glob
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softvq_lib.config import nearest
from softvq_lib.data.fingerprints import WHOLE, content_hash
from softvq_lib.data.shards import SUFFIXES, open_shards

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder, Features

SPLITS = {
    "train": ["train", "training"],
    "validation": ["validation", "valid", "val"],
    "test": ["test", "testing"],
}
BUILDERS = {"parquet": "parquet", "tar": "webdataset"}  # of `datasets`, for each kind of shard
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


@dataclass(frozen=True)
class Tables:
    """Loaded splits (by ``train``, ``validation``, ``test`` or a name of their own), and what identifies them."""

    splits: dict[str, "Dataset"]
    name: str
    identity: dict[str, Any]
    root: str = ""


@dataclass(frozen=True)
class Streams:
    """Splits that are not loaded but read from their shards: paths or addresses by split, and what identifies them."""

    splits: dict[str, list[str]]
    kind: str
    features: "Features"
    name: str
    identity: dict[str, Any]


def canonical(name: str) -> str | None:
    """``train``, ``validation`` or ``test`` for one of their usual names, None for any other name."""
    return next((split for split, names in SPLITS.items() if name.lower() in names), None)


def load_folder(folder: Path, dataset: str) -> Tables:
    """Load a folder of pictures, or of parquet files or WebDataset shards where it holds no pictures.

    Where every picture lies below a folder named train, val, validation, valid or test, these are the splits.
    Pictures at one common depth, in at least two differently named folders, are labelled by their folder's name.
    Hidden files and folders are left out. A folder with ``metadata.csv`` (``.jsonl``, ``.parquet``) or zip files is
    read as an ``imagefolder`` of `datasets`, whose columns the metadata describe.

    Args:
        folder: an existing folder.
        dataset: the user's `dataset` parameter, for messages.

    Raises:
        ValueError: there are no pictures, or the folder cannot be read.
    """
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    files = sorted(_visible_files(folder))
    pictures = [p for p in files if p.suffix.lower() in ImageFolder.EXTENSIONS]
    annotated = [p for p in files if p.name in METADATA or p.suffix.lower() == ".zip"]
    if not pictures and not annotated:
        shards = _shards(files)
        if shards:
            return load_shards(shards, dataset)
        kinds = sorted({p.suffix.lower() or "no extension" for p in files})
        held = f"holds {len(files)} files ({', '.join(kinds[:6])}) but no images" if files else "is empty"
        raise ValueError(
            f"dataset='{dataset}': this folder {held}. Give a folder of images (one folder a class, or "
            "train/ and val/ folders), of parquet files or of WebDataset shards (.tar)."
        )
    below = [p.relative_to(folder).parts for p in pictures + annotated]
    tops = {parts[0] if len(parts) > 1 else "" for parts in below}
    roots: dict[str, list[Path]] = {"train": [folder]}
    if all(canonical(top) for top in tops):
        roots = {split: [folder / t for t in sorted(tops) if canonical(t) == split] for split in SPLITS}
    roots = {split: places for split, places in roots.items() if places}
    if annotated:
        patterns = {split: [f"{glob.escape(str(root))}/**" for root in places] for split, places in roots.items()}
        splits = _load(dataset, pictures + annotated, "imagefolder", data_files=patterns)
    else:
        splits = _plain_folder(pictures, roots)
    identity = {"kind": "folder", "content": content_hash(folder, pictures + annotated)}
    return Tables(_by_split(splits), folder.name, identity, str(folder))


def _plain_folder(pictures: list[Path], roots: dict[str, list[Path]]) -> dict[str, "Dataset"]:
    """A table of paths and labels for each split.

    `datasets` would pass over linked folders, and over files whose siblings have a split's name in theirs; a
    table made from our own list loses none, keeps the list's order and needs no cache on disk.
    """
    import datasets

    found = {
        path: (split, path.parent.relative_to(root).parts)
        for split, places in roots.items()
        for root in places
        for path in pictures
        if root in path.parents
    }
    names = sorted({parts[-1] for _, parts in found.values() if parts})
    # Folders at different depths, or a single one, are a way of storing and no classes.
    labelled = len({len(parts) for _, parts in found.values()}) == 1 and len(names) > 1
    features = {"image": datasets.Image()} | ({"label": datasets.ClassLabel(names=names)} if labelled else {})
    numbers = {name: number for number, name in enumerate(names)}
    tables = {}
    for split in roots:
        columns = {"image": [str(path) for path, (its, _) in found.items() if its == split]}
        if labelled:
            columns["label"] = [numbers[parts[-1]] for its, parts in found.values() if its == split]
        tables[split] = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return tables


def load_shards(files: list[Path], dataset: str) -> Tables:
    """Load parquet files, or WebDataset shards, of which `datasets` keeps a copy in its cache.

    Those named train*, validation*, val* or test* (or in folders so named) are splits; of a WebDataset shard any
    word of the name counts, as in ``imagenet-train-0001.tar``.

    Args:
        files: existing files of one kind.
        dataset: the user's `dataset` parameter, for messages.

    Raises:
        ValueError: a file is damaged or of another kind, or the files do not fit each other.
    """
    kind, splits, name, identity = _local_shards(files, dataset)
    if kind == "tar":  # at a damaged header `datasets` stops as if the tar ended there
        full = {shard.url for shard in open_shards([str(path) for path in files], kind, None, None) if shard.count}
        if not full:
            raise ValueError(f"dataset='{dataset}' holds no images: its tar files have no samples.")
        splits = {split: [path for path in its if str(path) in full] for split, its in splits.items()}
    patterns = {split: [glob.escape(str(path)) for path in its] for split, its in splits.items() if its}
    loaded = _load(dataset, files, BUILDERS[kind], data_files=patterns)
    return Tables(_by_split(loaded), name, identity)


def stream_shards(files: list[Path], dataset: str) -> Streams:
    """Find the splits and columns of parquet files or WebDataset shards without loading them; see `load_shards`."""
    import datasets

    kind, splits, name, identity = _local_shards(files, dataset)
    with _loading(dataset):
        patterns = {split: [glob.escape(str(path)) for path in its] for split, its in splits.items()}
        features = _features(datasets.load_dataset_builder(BUILDERS[kind], data_files=patterns))
    return Streams(
        {split: [str(path) for path in its] for split, its in splits.items()}, kind, features, name, identity
    )


def stream_folder(folder: Path, dataset: str) -> Streams:
    """Find the shards of a folder, those of `load_folder`, for streaming.

    Raises:
        ValueError: it holds no shards.
    """
    shards = _shards(sorted(_visible_files(folder)))
    if not shards:
        raise ValueError(
            f"dataset='{dataset}': this folder holds neither parquet files nor WebDataset shards (.tar), and nothing "
            "else is streamed. A folder of images is read where it lies: leave streaming out."
        )
    return stream_shards(shards, dataset)


def _local_shards(files: list[Path], dataset: str) -> tuple[str, dict[str, list[Path]], str, dict[str, str]]:
    """Kind, files by split, name and identity of shards on the disk."""
    files = sorted(files)
    kind = SUFFIXES[files[0].suffix.lower()]
    splits: dict[str, list[Path]] = {}
    for path in files:
        words = re.match("[a-z]*", path.name.lower()).group(), path.parent.name
        if kind == "parquet":
            with path.open("rb") as file:
                if file.read(4) != b"PAR1":
                    raise ValueError(
                        f"dataset='{dataset}': {path} is not a parquet file. Fetch it again or leave it out."
                    )
        else:
            words = *re.findall("[a-z]+", path.stem.lower()), path.parent.name
        split = next(filter(None, map(canonical, words)), "train")
        splits.setdefault(split, []).append(path)
    root = Path(os.path.commonpath([path.parent for path in files]))
    name = files[0].stem if len(files) == 1 else root.name
    return kind, splits, name, {"kind": kind, "content": content_hash(root, files)}


def load_hub(name: str) -> Tables:
    """Load a data set of the Hugging Face hub, or its copy in the local cache.

    Args:
        name: ``owner/name``.

    Raises:
        ValueError: there is no such data set, it cannot be reached, or it needs more than a name.
    """
    import datasets

    with _from_hub(name):
        splits = datasets.load_dataset(name)
    first = next(iter(splits.values()))
    # The cache is filed by the revision of the repository, so it is known without a network too.
    cached = " ".join(entry["filename"] for entry in first.cache_files)
    revision = re.search(r"[/\\]([0-9a-f]{40})[/\\]", cached)
    content = revision.group(1) if revision else first._fingerprint
    return Tables(_by_split(splits), name, {"kind": "hub", "name": name, "content": content})


def stream_hub(name: str) -> Streams:
    """Find the shards of a data set of the Hugging Face hub, at its present commit; nothing is downloaded.

    Args:
        name: ``owner/name``.

    Raises:
        ValueError: as `load_hub`, or its files are neither parquet nor tar.
    """
    import datasets

    with _from_hub(name):
        builder = datasets.load_dataset_builder(name)
    splits = {str(split): sorted(map(str, urls)) for split, urls in (builder.config.data_files or {}).items()}
    urls = [url for its in splits.values() for url in its]
    kinds = {SUFFIXES.get(os.path.splitext(url)[1].lower()) for url in urls}
    if len(kinds) != 1 or None in kinds:
        raise ValueError(
            f"dataset='{name}' is not kept as parquet files or WebDataset shards (.tar), which alone can be streamed: "
            "leave streaming out."
        )
    with _from_hub(name):
        features = _features(builder)
    # Addresses name the commit, and so stand for the contents.
    content = hashlib.sha256("\n".join(urls).encode()).hexdigest()
    return Streams(_usual(splits), kinds.pop(), features, name, {"kind": "hub", "name": name, "content": content})


@contextmanager
def _from_hub(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the hub, the network, the cache and the builders each raise their own kinds
        raise ValueError(
            f"dataset='{name}' is no local folder and could not be had from the Hugging Face hub: "
            f"{_first_line(error)} Check the name, the network and, for a gated data set, `hf auth login`; "
            "without a network use digits, shapes, photographs, mixed, a folder or parquet files."
        ) from error


def _features(builder: "DatasetBuilder") -> "Features":
    """The columns, as the hub or the first shard describes them."""
    if builder.info.features:
        return builder.info.features
    return next(iter(builder.as_streaming_dataset().values())).features


def find_shards(pattern: str) -> list[Path]:
    """The parquet files or WebDataset shards that a pattern names.

    Raises:
        ValueError: nothing matches, or something else, or both kinds.
    """
    found = [Path(p) for p in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(p)]
    other = [p for p in found if p.suffix.lower() not in SUFFIXES]
    if other:
        raise ValueError(
            f"dataset='{pattern}' matches {other[0].name}, which is not parquet or tar. A pattern names such files "
            "only, as 'data/train-*.parquet' does; for images give their folder."
        )
    if len({p.suffix.lower() for p in found}) > 1:
        raise ValueError(f"dataset='{pattern}' matches both parquet and tar files. End it with .parquet or .tar.")
    if not found:
        raise ValueError(
            f"dataset='{pattern}' matches no file. Check the pattern; it is taken relative to {Path.cwd()}."
        )
    return found


def missing(path: Path, dataset: str) -> ValueError:
    """The error for a path that does not exist: it says from where on it fails and offers the nearest name."""
    known = path.absolute()
    while not known.is_dir():
        known = known.parent
    part = path.absolute().relative_to(known).parts[0]
    hint = nearest(part, sorted(entry.name for entry in known.iterdir())) if os.access(known, os.R_OK) else ""
    return ValueError(
        f"dataset='{dataset}': there is no such folder or file; '{known}' holds no '{part}'{hint} "
        "Give an existing folder of images, parquet files, WebDataset shards, or digits, shapes, photographs or mixed."
    )


def _visible_files(folder: Path) -> Iterator[Path]:
    for place, names, files in os.walk(folder, followlinks=True):
        here = Path(os.path.realpath(place))
        above = {str(folder) for folder in (here, *here.parents)}
        names[:] = [
            name
            for name in names
            # A link to a folder above would be walked for ever.
            if not name.startswith((".", "__")) and os.path.realpath(os.path.join(place, name)) not in above
        ]
        yield from (Path(place, file) for file in files if not file.startswith((".", "__")))


def _load(dataset: str, files: list[Path], builder: str, **options: Any) -> dict[str, "Dataset"]:
    import datasets

    with _loading(dataset), _progress(sum(path.stat().st_size for path in files) > WHOLE):
        return datasets.load_dataset(builder, **options)


@contextmanager
def _loading(dataset: str) -> Iterator[None]:
    import datasets

    try:
        yield
    except Exception as error:  # wraps what reading, converting and caching raise, each of its own kind
        cause = error.__cause__ or error
        if "corresponds to no data" in str(error):
            raise ValueError(f"dataset='{dataset}' holds no images: its tables have no rows.") from error
        raise ValueError(
            f"dataset='{dataset}' could not be loaded: {_first_line(cause)} The files may be damaged, differ in "
            f"their columns, or the cache may have no space ({datasets.config.HF_DATASETS_CACHE})."
        ) from error


@contextmanager
def _progress(shown: bool) -> Iterator[None]:
    """Keep the progress bars of `datasets` for long work only."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hide = not shown and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            enable_progress_bars()


def _by_split(splits: dict[str, "Dataset"]) -> dict[str, "Dataset"]:
    return _usual({str(name): table for name, table in splits.items() if len(table)})


def _usual(splits: dict[str, Any]) -> dict[str, Any]:
    """Splits by their usual names."""
    named: dict[str, Any] = {}
    for name, split in splits.items():
        usual = canonical(name) or name
        named[name if usual in named else usual] = split
    return named


def _shards(files: list[Path]) -> list[Path]:
    """The parquet files among files, or else the tar files."""
    of = {suffix: [path for path in files if path.suffix.lower() == suffix] for suffix in SUFFIXES}
    return next(filter(None, of.values()), [])


def _first_line(error: BaseException) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if text.endswith(".") else text + "."
