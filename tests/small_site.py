"""A small site of one or a few pages of the book, built for the tests that look at pages in a browser."""

import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from repository import ROOT

BOOK = ROOT / "book"
EXTENSIONS = ("explorables",)  # of the book's own; the others are about the library's reference


def build_site(folder: Path, pages: list[str]) -> Path:
    """Build these pages alone, with the book's own configuration and nothing executed; return the site's folder."""
    source = folder / "book"
    source.mkdir()
    for name in ("_static", "_ext"):
        shutil.copytree(BOOK / name, source / name)
    for name in ["references.bib", *pages]:
        shutil.copy(BOOK / name, source / name)
    (source / "index.md").write_text("# Some pages\n")
    toc = {"format": "jb-book", "root": "index", "chapters": [{"file": Path(page).stem} for page in pages]}
    (source / "_toc.yml").write_text(yaml.safe_dump(toc))
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    config["execute"] = {"execute_notebooks": "off"}
    config["html"]["use_edit_page_button"] = False
    config["sphinx"] = {
        "extra_extensions": ["sphinx-mathjax-offline"],
        "local_extensions": {name: str(source / "_ext") for name in EXTENSIONS},
        "config": {"suppress_warnings": ["myst.xref_missing", "ref.doc"]},
    }
    (folder / "_config.yml").write_text(yaml.safe_dump(config))
    command = [
        str(Path(sys.executable).with_name("jupyter-book")),
        "build",
        str(source),
        "--config",
        str(folder / "_config.yml"),
    ]
    done = subprocess.run(
        [*command, "--path-output", str(folder)], capture_output=True, text=True, cwd=folder, check=False
    )
    site = folder / "_build" / "html"
    assert done.returncode == 0 and (site / f"{Path(pages[0]).stem}.html").exists(), done.stdout + done.stderr
    return site
