"""What the tests of the repository itself share: its files, and how a complaint names one."""

import json
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
IGNORED = {".git", ".venv", "venv", "runs", "_build", "__pycache__", ".ipynb_checkpoints"}


def repository_files(root: Path = ROOT) -> list[Path]:
    """Every file of the repository: git's list with new files, or a walk where there is no git."""
    if (root / ".git").exists():
        listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listing, cwd=root, capture_output=True, text=True, check=True).stdout.split("\0")
        return sorted(root / name for name in names if name and (root / name).is_file())
    walk = (path for path in root.rglob("*") if path.is_file())
    return sorted(path for path in walk if not IGNORED & set(path.relative_to(root).parts))


def named(suffix: str, *folders: str) -> list[Path]:
    """The repository's files with this suffix, below one of the folders if any are given."""
    files = [path for path in repository_files() if path.suffix == suffix]
    return [p for p in files if not folders or p.relative_to(ROOT).parts[0] in folders]


def name_of(path: Path) -> str:
    """A file's name as complaints show it, relative to the repository where it lies inside."""
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def cases(paths: list[Path]):
    """One test for every path."""
    return pytest.mark.parametrize("path", [pytest.param(path, id=name_of(path)) for path in paths])


def pyproject() -> dict:
    """The project's own declaration."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def write_notebook(path: Path, cells: list[dict], **metadata) -> Path:
    """Writes an executed notebook of code cells, for tests that need one to judge or to run."""
    blank = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": 1}
    cells = [blank | {"id": f"cell-{number}"} | cell for number, cell in enumerate(cells)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}} | metadata
    path.write_text(json.dumps({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}))
    return path
