"""Writing files so that a crash never leaves half of one, and that two processes never write the same."""

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

LOCK = ".lock"


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk, and rename it into place."""
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, value: object) -> None:
    """Write a JSON file whole."""
    write_whole(path, lambda part: part.write_text(json.dumps(value, indent=2) + "\n"))


def read_lines(path: Path) -> list[dict]:
    """Read JSON lines; a last line that a crash has torn is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def check_writable(folder: Path, needed: int) -> None:
    """Raise unless `folder` can be made, written to, and has room for `needed` bytes.

    Raises:
        ValueError: naming the folder, what is wrong and what to do.
    """
    made = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(made).free
    if free < needed:
        raise ValueError(
            f"{folder} has {free / 1e6:.0f} MB of free space, but this run needs about {needed / 1e6:.0f} MB for its "
            "checkpoints: free some, or choose another folder with runs."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_bytes(b"1")
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be written to ({error.strerror}): choose another folder with runs, or mend its rights."
        ) from error


@contextmanager
def locked(folder: Path, doing: str, *, otherwise: str | None = None) -> Iterator[None]:
    """Hold a folder, so that no other process works in it at the same time.

    Args:
        folder: An existing folder; the lock is a file in it.
        doing: What is done with it, a participle for messages: "filled".
        otherwise: What to do when another process holds the folder, in words for the error's message. None: wait.

    Raises:
        ValueError: when another process holds it, unless this one waits.
    """
    with open(folder / LOCK, "w") as file:
        # Let go by the system when the process dies, and not inherited by loader processes that outlive it.
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            busy = f"{folder} is being {doing} by another process"
            if otherwise is not None:
                raise ValueError(f"{busy}: wait for it, or {otherwise}.") from None
            log.info("%s: waiting for it.", busy)
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield
