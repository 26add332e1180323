"""Fingerprints of files by content: the same after moving a folder, another as soon as a picture changes."""

import hashlib
from pathlib import Path

import numpy as np

WHOLE = 2**30
SAMPLED_FILES = 1000
SAMPLED_BYTES = 2**20


def content_hash(root: Path, files: list[Path]) -> str:
    """Hash files by their paths inside `root`, sizes and contents; neither `root` itself nor times count.

    Up to 1 GiB in all every byte is read. Above that every path and size counts, and the first MiB of at most
    1,000 files spread evenly over the sorted list: a change of one file that keeps its size may then go unseen.

    Args:
        root: folder that the paths are taken relative to.
        files: files below it, in any order.

    Returns:
        64 hexadecimal digits.
    """
    entries = sorted((path.relative_to(root).as_posix(), path) for path in files)
    sizes = [path.stat().st_size for _, path in entries]
    if sum(sizes) <= WHOLE:
        read, amount = set(range(len(entries))), None
    else:
        read = set(np.linspace(0, len(entries) - 1, min(SAMPLED_FILES, len(entries))).astype(int).tolist())
        amount = SAMPLED_BYTES
    digest = hashlib.sha256()
    for number, ((name, path), size) in enumerate(zip(entries, sizes, strict=True)):
        content = _file_hash(path, amount) if number in read else ""
        digest.update(f"{name}\0{size}\0{content}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _file_hash(path: Path, amount: int | None) -> str:
    with path.open("rb") as file:
        if amount is not None:
            return hashlib.sha256(file.read(amount)).hexdigest()
        return hashlib.file_digest(file, "sha256").hexdigest()
