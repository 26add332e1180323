"""Data sets from files or the hub, through Hugging Face `datasets`: a folder, parquet files, a name `owner/name`."""

import glob
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softvq_lib.config import nearest
from softvq_lib.data.fingerprints import WHOLE, content_hash

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = {
    "train": ["train", "training"],
    "validation": ["validation", "valid", "val"],
    "test": ["test", "testing"],
}
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


@dataclass(frozen=True)
class Tables:
    """Loaded splits (by ``train``, ``validation``, ``test`` or a name of their own), and what identifies them."""

    splits: dict[str, "Dataset"]
    name: str
    identity: dict[str, Any]
    root: str = ""


def canonical(name: str) -> str | None:
    """``train``, ``validation`` or ``test`` for one of their usual names, None for any other name."""
    return next((split for split, names in SPLITS.items() if name.lower() in names), None)


def load_folder(folder: Path, dataset: str) -> Tables:
    """Load a folder of pictures, or of parquet files where it holds no pictures.

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
        parquet = [p for p in files if p.suffix.lower() == ".parquet"]
        if parquet:
            return load_parquet(parquet, dataset)
        kinds = sorted({p.suffix.lower() or "no extension" for p in files})
        held = f"holds {len(files)} files ({', '.join(kinds[:6])}) but no images" if files else "is empty"
        raise ValueError(
            f"dataset='{dataset}': this folder {held}. Give a folder of images (one folder a class, or "
            "train/ and val/ folders), or of parquet files."
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


def load_parquet(files: list[Path], dataset: str) -> Tables:
    """Load parquet files; those named train*, validation*, val* or test* (or in folders so named) are splits.

    Args:
        files: existing files.
        dataset: the user's `dataset` parameter, for messages.

    Raises:
        ValueError: a file is not parquet, or the files do not fit each other.
    """
    files = sorted(files)
    splits: dict[str, list[str]] = {}
    for path in files:
        with path.open("rb") as file:
            if file.read(4) != b"PAR1":
                raise ValueError(f"dataset='{dataset}': {path} is not a parquet file. Fetch it again or leave it out.")
        stem = re.match("[a-z]*", path.name.lower()).group()
        split = canonical(stem) or canonical(path.parent.name) or "train"
        splits.setdefault(split, []).append(glob.escape(str(path)))
    root = Path(os.path.commonpath([path.parent for path in files]))
    name = files[0].stem if len(files) == 1 else root.name
    loaded = _load(dataset, files, "parquet", data_files=splits)
    return Tables(_by_split(loaded), name, {"kind": "parquet", "content": content_hash(root, files)})


def load_hub(name: str) -> Tables:
    """Load a data set of the Hugging Face hub, or its copy in the local cache.

    Args:
        name: ``owner/name``.

    Raises:
        ValueError: there is no such data set, it cannot be reached, or it needs more than a name.
    """
    import datasets

    try:
        splits = datasets.load_dataset(name)
    except Exception as error:  # the hub, the network, the cache and the builders each raise their own kinds
        raise ValueError(
            f"dataset='{name}' is no local folder and could not be had from the Hugging Face hub: "
            f"{_first_line(error)} Check the name, the network and, for a gated data set, `hf auth login`; "
            "without a network use digits, shapes, a folder or parquet files."
        ) from error
    first = next(iter(splits.values()))
    # The cache is filed by the revision of the repository, so it is known without a network too.
    cached = " ".join(entry["filename"] for entry in first.cache_files)
    revision = re.search(r"[/\\]([0-9a-f]{40})[/\\]", cached)
    content = revision.group(1) if revision else first._fingerprint
    return Tables(_by_split(splits), name, {"kind": "hub", "name": name, "content": content})


def find_parquet(pattern: str) -> list[Path]:
    """The parquet files that a pattern names.

    Raises:
        ValueError: nothing matches, or something that is not parquet.
    """
    found = [Path(p) for p in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(p)]
    other = [p for p in found if p.suffix.lower() != ".parquet"]
    if other:
        raise ValueError(
            f"dataset='{pattern}' matches {other[0].name}, which is not parquet. A pattern names parquet files "
            "only, such as 'data/train-*.parquet'; for images give their folder."
        )
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
        "Give an existing folder of images, parquet files, or digits or shapes."
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

    try:
        with _progress(sum(path.stat().st_size for path in files) > WHOLE):
            return datasets.load_dataset(builder, **options)
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
    named: dict[str, Dataset] = {}
    for name, table in splits.items():
        usual = canonical(str(name)) or str(name)
        if len(table):
            named[str(name) if usual in named else usual] = table
    return named


def _first_line(error: BaseException) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if text.endswith(".") else text + "."
