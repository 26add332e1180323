"""Run notebooks with their default parameters and store the outputs in them, cleaned: `make notebooks`."""

import os
import sys
import tempfile
from pathlib import Path

import papermill
from clean_notebooks import clean


def store_outputs(path: Path) -> None:
    """Execute a notebook in its own folder, with an empty runs folder, and write it back."""
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["SOFTVQ_RUNS"] = str(Path(scratch) / "runs")
        copy = Path(scratch) / path.name
        notebook = papermill.execute_notebook(path, copy, cwd=path.parent, progress_bar=False)
    path.write_text(clean(notebook), encoding="utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(name, flush=True)
        store_outputs(Path(name).resolve())
