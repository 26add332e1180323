"""The direction of imports inside the library, and that the library never names the book.

Each rule is a function that returns a list of complaints, so that it is asked twice: of the repository, where
the list must be empty, and of a bad example, where it must not be.
"""

import ast
import re

import pytest

from repository import ROOT, cases, named, pyproject

LAYERS = [
    {"cards", "config", "features", "distributed", "draws", "weights"},
    {"tokenizers", "losses", "generators", "data"},
    {"training"},
    {"evaluation"},
    {
        "conversion",
        "results",
        "tables",
        "figures",
        "generator_figures",
        "generator_tables",
        "style",
        "method_maths",
        "method_figures",
        "costs",
        "experiments",
        "explorables",
        "explorable_figures",
        "distilling",
        "generation",
        "sampling",
        "evaluate",
        "evaluation_figures",
        "evaluation_rows",
        "linear_probing",
        "probing_figures",
        "latent_space",
        "latent_figures",
        "sweeps",
        "arms",
        "again",
        "claims",
        "claim_checks",
        "claim_figures",
        "claim_forms",
        "claim_rules",
        "claim_tables",
        "paper_tables",
        "audit",
        "audit_formulas",
        "audit_numbers",
        "audit_tables",
        "reproduced",
        "token_figures",
        "status",
        "headline",
        "study",
        "study_budget",
        "study_cells",
        "study_figures",
        "study_pictures",
        "study_tables",
        "study_reruns",
        "study_words",
        "train",
        "cli",
        "coding",
        "describing",
        "own_images",
        "pictures",
        "terminal",
    },
]
PACKAGE = "softvq_lib"


def layer(module: str) -> int | None:
    """The height of a top-level module of the library, None if it has no place in LAYERS."""
    return next((height for height, names in enumerate(LAYERS) if module in names), None)


def imported(source: str, package: list[str]) -> set[str]:
    """Dotted names that a module of `package` imports from the library, wherever in the file it does so."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            stem = ".".join([*base, *filter(None, [node.module])])
            found |= {f"{stem}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
            found |= {str(arg.value) for arg in node.args if isinstance(arg, ast.Constant)}
    return {name for name in found if name.split(".")[0] == PACKAGE}


def import_problems(source: str, file: str) -> list[str]:
    """Imports that go up, from a file given by its path inside the library (`data/source.py`)."""
    parts = file.removesuffix(".py").split("/")
    if parts == ["__init__"]:
        return []  # the public face is above everything
    here = layer(parts[0])
    if here is None:
        return [f"{file}: {parts[0]!r} has no layer; give it one in LAYERS"]
    found = []
    for name in imported(source, [PACKAGE, *parts[:-1]]):
        target = name.split(".")[1] if "." in name else ""
        if target.isupper() or target.startswith("__"):
            continue  # a constant of the package, such as ROOT
        height = layer(target)
        if height is None:
            found.append(f"{file}: imports {name} through the public face, or a module without a layer")
        elif height > here:
            found.append(f"{file}: imports {name}, which is above it")
    return found


@cases(named(".py", PACKAGE))
def test_imports_go_one_way(path):
    assert not import_problems(path.read_text(), path.relative_to(ROOT / PACKAGE).as_posix())


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("config.py", "from softvq_lib.tokenizers import vit"),
        ("data/source.py", "from ..training.engine import Engine"),
        ("data/source.py", "def later():\n    import softvq_lib.evaluation"),
        ("losses/objective.py", "from .. import training"),
        ("losses/objective.py", "importlib.import_module('softvq_lib.training')"),
        ("training/engine.py", "from softvq_lib import evaluation"),
        ("training/engine.py", "from softvq_lib import Tokenizer"),
        ("elsewhere.py", ""),
    ],
)
def test_an_import_that_goes_up_is_rejected(file, source):
    assert import_problems(source, file)


def test_imports_down_and_sideways_are_allowed():
    source = "from softvq_lib import ROOT\nfrom ..config import strict\nfrom .vit import Encoder\nimport torch"
    assert not import_problems(source, "tokenizers/tokenizer.py")


def book_mentions(text: str) -> list[str]:
    """Lines that name the book or a notebook; codebooks and the distribution's name are something else."""
    text = text.replace(pyproject()["project"]["name"], "")
    return [line for line in text.splitlines() if re.search(r"(?<![a-z])books?(?![a-z])|\.ipynb\b", line, re.I)]


@cases(named(".py", PACKAGE))
def test_the_library_never_names_the_book(path):
    assert not book_mentions(path.read_text())


@pytest.mark.parametrize(
    "line", ["rows = ROOT / 'book' / 'results'", "import jupyter_book", "# see book/a.md", "x.ipynb"]
)
def test_a_mention_of_the_book_is_noticed(line):
    assert book_mentions(line) == [line]


def test_codebooks_are_no_books():
    assert not book_mentions("codebook codebooks CodeBook n_codebooks bookkeeping notebook softvq-book")
