"""Folders of PNG files that are made batch by batch: nothing is overwritten unasked, and what was interrupted goes on.

A folder holds the pictures and `pictures.json`, its header: what they were made of, their names, and `status`, which is
`partial` until the last one is there.
"""

import errno
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from torch import Tensor

from softvq_lib.config import at_least, some
from softvq_lib.evaluation.export import to_uint8
from softvq_lib.training.files import LOCK, locked, write_json
from softvq_lib.training.latents import FINISHED, PARTIAL

log = logging.getLogger(__name__)

HEADER = "pictures.json"
_OURS = (LOCK, f".{HEADER}.part")  # may be left of a start that was killed
_END = b"IEND\xaeB`\x82"  # the last bytes of every whole PNG
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Pictures:
    """A finished folder of pictures.

    Attributes:
        folder: Where they lie.
        files: Their names inside it, in order.
        made: How many of them this call made; 0 when all were there.
    """

    folder: Path
    files: list[str]
    made: int

    def __len__(self) -> int:
        return len(self.files)

    def __str__(self) -> str:
        found = f"{len(self):,} pictures in {self.folder}"
        return found if self.made == len(self) else f"{found}, of which {len(self) - self.made:,} were there already"


def write_pictures(
    folder: str | Path,
    names: Sequence[str],
    make: Callable[[range], Tensor],
    *,
    identity: dict[str, object],
    convention: str = "dit",
    batch_size: int = 64,
    overwrite: bool = False,
    progress: bool = True,
) -> Pictures:
    """Make the pictures that are missing of a folder and write each whole.

    Killed at any moment and started again it goes on, and ends with the same bytes: a batch of which a picture is
    missing is made again as it was. More names may be asked for later, if all else is as it was.

    Args:
        folder: Of these pictures alone.
        names: Of the files, relative to the folder, each once and ending in `.png`.
        make: Makes the pictures of a range of names, (b, 3, height, width) in [-1, 1]; the same ones every time.
        identity: What the pictures depend on, as JSON can hold it.
        convention: How pixels become bytes, a name in `softvq_lib.evaluation.export.CONVENTIONS`.
        batch_size: Pictures made at once.
        overwrite: Remove first what an earlier call wrote into the folder; one that holds other files too is refused.
        progress: Show a progress bar.

    Raises:
        ValueError: for names that lead out of the folder or come twice, a folder that holds something else or, unless
            `overwrite`, other pictures, or one that another process fills.
        OSError: when a file cannot be written, saying which; those written before are kept.
    """
    from tqdm import tqdm

    at_least("batch_size", batch_size, 1)
    folder, names = Path(folder).expanduser(), list(names)
    _check_names(names)
    header = {"format": 1, "status": PARTIAL, **identity, "convention": convention, "files": names}
    if not (overwrite and read_header(folder)):
        check(folder, header)
    with writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, "filled", otherwise="choose another folder"):
            if overwrite:
                clear(folder)
            check(folder, header)  # another process may have been here in the meantime
            held = read_header(folder)
            header["files"] = list(dict.fromkeys([*(held or {}).get("files", []), *names]))
            spans = [range(first, min(first + batch_size, len(names))) for first in range(0, len(names), batch_size)]
            absent = [[i for i in span if not _whole(folder / names[i])] for span in spans]
            missing = sum(map(len, absent))
            if missing or held is None or held["status"] != FINISHED:
                write_json(folder / HEADER, header)
            bar = {"total": len(names), "initial": len(names) - missing, "unit": "image", "desc": folder.name}
            with tqdm(**bar, disable=not progress) as shown:
                for span, lacking in zip(spans, absent, strict=True):
                    if not lacking:
                        continue
                    pixels = to_uint8(make(span), convention).cpu().numpy()  # (b, height, width, 3)
                    for i in lacking:
                        _save(folder / names[i], pixels[i - span.start])
                        shown.update()
            if missing or held is None or held["status"] != FINISHED:
                write_json(folder / HEADER, header | {"status": FINISHED})
    return Pictures(folder, names, missing)


def read_header(folder: Path) -> dict | None:
    """Return the header of a folder of pictures, None where there is none.

    Raises:
        ValueError: when it cannot be read.
    """
    path = Path(folder) / HEADER
    if not path.exists():
        return None
    try:
        header = json.loads(path.read_text())
        if not isinstance(header, dict) or not isinstance(header.get("files"), list) or "status" not in header:
            raise ValueError("it is no header of pictures")
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}): choose another folder, or delete that one.") from None
    return header


def check(folder: Path, header: dict) -> None:
    """Raise ValueError when a folder holds anything but the pictures of this header, whatever their number."""
    held = read_header(folder)
    if held is None:
        if folder.is_file() or (folder.is_dir() and any(path.name not in _OURS for path in folder.iterdir())):
            raise ValueError(f"{folder} exists and holds no pictures of this command: choose another folder.")
        return
    told, theirs = ({k: v for k, v in each.items() if k not in ("status", "files")} for each in (header, held))
    spelt = [
        f"{name}: {_short(theirs.get(name))} there, {_short(told.get(name))} asked for"
        for name in {**told, **theirs}
        if told.get(name) != theirs.get(name)
    ]
    if spelt:
        raise ValueError(f"{folder} holds other pictures ({'; '.join(spelt)}): choose another folder, or overwrite.")


def clear(folder: Path) -> None:
    """Remove the pictures that a folder's header names, and the header.

    Raises:
        ValueError: when other files lie there; nothing is removed then.
    """
    held = read_header(folder)
    if held is not None:
        _check_names(held["files"])
        remove_own(folder, {HEADER, *held["files"]}.__contains__)


def remove_own(folder: Path, own: Callable[[str], object]) -> None:
    """Remove all files of a folder of ours, and those that a killed process left half written; its lock stays.

    Args:
        folder: The folder.
        own: Tells from a path inside it, with slashes, whether it is ours.

    Raises:
        ValueError: when there is a file that is not ours; nothing is removed then.
    """
    files = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    files = {path.relative_to(folder).as_posix(): path for path in files if path != folder / LOCK}

    def whole(name: str) -> str:
        return re.sub(r"(^|/)\.([^/]+)\.part$", r"\1\2", name)

    if others := sorted(name for name in files if not own(whole(name))):
        raise ValueError(
            f"{folder} holds files that this command did not write ({some(others, 3)}), so it is not overwritten: move "
            "them, or choose another folder."
        )
    for path in files.values():
        path.unlink()
    for place in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        place.rmdir()


@contextmanager
def writable(folder: Path):
    """Say of an error that is the disk's where it happened, that nothing is lost, and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise OSError(
            error.errno,
            f"{error.strerror} while writing to {folder}. What is there is kept and marked as partial: free some "
            "space and run the same command again, which goes on",
        ) from error


def class_folders(classes: Iterable[str]) -> list[str]:
    """Return a name fit for a folder for each class, no two alike."""
    made: list[str] = []
    for number, name in enumerate(classes):
        plain = re.sub(r"[^\w.-]+", "_", name.split(",")[0]).strip("._") or str(number)
        made.append(plain if plain not in made else f"{plain}_{number}")
    return made


def png_names(names: Sequence[str]) -> list[str]:
    """Return a name that ends in `.png` for each file; where two would be equal, their own endings stay."""
    stems = [str(PurePosixPath(name).with_suffix("")) for name in names]
    times = Counter(stems)
    return [f"{name if times[stem] > 1 else stem}.png" for name, stem in zip(names, stems, strict=True)]


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        parts = PurePosixPath(name).parts if isinstance(name, str) else ()
        if not parts or ".." in parts or parts[0] == "/" or not name.endswith(".png"):
            raise ValueError(f"{name!r} is no name of a picture: give relative paths that end in .png.")
    if len(set(names)) < len(names):
        raise ValueError(f"of {len(names)} names of pictures only {len(set(names))} are different: give each once.")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _whole(path: Path) -> bool:
    """Whether a file is there and ends as a PNG does."""
    try:
        with open(path, "rb") as file:
            file.seek(-len(_END), os.SEEK_END)
            return file.read() == _END
    except OSError:
        return False


def _save(path: Path, pixels: np.ndarray) -> None:
    """Write a picture whole, under another name first; it is not flushed to the disk, which takes long for many."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        Image.fromarray(pixels).save(part, format="png")
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
