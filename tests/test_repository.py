"""The rules of the repository itself: its dependencies, its tracked text, its source files.

Each rule is a function that returns a list of complaints, so that it is asked twice: of the repository, where
the list must be empty, and of a bad example, where it must not be.
"""

import ast
import os
import re
import sys
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from repository import ROOT, cases, name_of, named, pyproject, repository_files

CARD = {"torch", "jupyter-book", "papermill", "matplotlib", "umap-learn", "scikit-learn"} | {
    "timm",
    "lpips",
    "torch-fidelity",
    "nbval",
}


def ranges(requirements: list[str]) -> dict[str, str]:
    """Canonical name -> version range."""
    parsed = map(Requirement, requirements)
    return {canonicalize_name(r.name): str(r.specifier) for r in parsed}


def declared() -> dict[str, str]:
    project = pyproject()["project"]
    return ranges([*project["dependencies"], *project["optional-dependencies"]["dev"]])


def conda() -> tuple[list[str], list[str]]:
    """The conda part and the pip part of environment.yml."""
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (pip,) = (entry["pip"] for entry in listed if isinstance(entry, dict))
    return [entry for entry in listed if isinstance(entry, str)], pip


def tried_pythons() -> set[str]:
    """The Python versions that pyproject.toml claims."""
    return set(re.findall(r"Python :: (3\.\d+)", " ".join(pyproject()["project"]["classifiers"])))


def unjustified(text: str, needed: set[str]) -> list[str]:
    """Needed names without a line "- `name`: reason" in the text, and lines about other names."""
    lines = {canonicalize_name(name) for name in re.findall(r"^- `([\w.-]+)`: \w.+", text, re.M)}
    return sorted(lines ^ needed)


def test_every_package_of_the_card_is_declared():
    assert not CARD - set(declared())


def test_conda_users_get_the_same_dependencies():
    from_conda, from_pip = conda()
    assert "-e ." in from_pip, "environment.yml installs the project itself too"
    assert ranges([entry for entry in from_pip if entry != "-e ."]) == declared()
    python, pip = from_conda
    assert pip == "pip"
    assert python.removeprefix("python=") in tried_pythons()


def test_exactly_the_python_versions_that_ci_runs_are_claimed():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert set(job["strategy"]["matrix"]["python"]) == tried_pythons()
    assert any(step.get("run") == ".ci/run" for step in job["steps"])
    assert os.access(ROOT / ".ci/run", os.X_OK)


def imports(source: str) -> set[str]:
    """Dotted names of the modules that a source file imports, anywhere in it."""
    nodes = list(ast.walk(ast.parse(source)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}


@cache
def installed() -> dict[str, set[str]]:
    """Top-level module -> canonical names of the packages that carry it; to read them takes a quarter of a second."""
    return {top: set(map(canonicalize_name, found)) for top, found in packages_distributions().items()}


def undeclared(names: set[str]) -> list[str]:
    """Which of these modules belong to installed packages that the project does not declare."""
    own = {"softvq-book", *declared()}
    tops = {name.split(".")[0] for name in names} - sys.stdlib_module_names
    return sorted(top for top in tops if top in installed() and not installed()[top] & own)


@cases(named(".py"))
def test_every_imported_package_is_declared(path):
    assert not undeclared(imports(path.read_text()))


def test_an_import_that_is_not_declared_is_noticed():
    source = "def later():\n    from jinja2 import Template\nimport torch, json"
    assert undeclared(imports(source)) == ["jinja2"]


def test_every_extension_of_the_site_is_declared():
    extensions = yaml.safe_load((ROOT / "_config.yml").read_text())["sphinx"].get("extra_extensions", [])
    assert not undeclared({name for name in extensions if not name.startswith("sphinx.")})  # part of Sphinx itself


def test_every_further_dependency_is_justified():
    assert not unjustified((ROOT / "CONTRIBUTING.md").read_text(), set(declared()) - CARD)


def test_a_missing_and_a_stale_justification_are_noticed():
    assert unjustified("- `tqdm`: progress bars\n- `gone`: no longer used\n", {"tqdm", "numpy"}) == [
        "gone",
        "numpy",
    ]


MACHINE_PATH = re.compile(
    r"(?<![\w.])/(?:work|farm|root|home/\w+|Users/\w+|tmp/[a-z_]*jobs|opt/(?:wheels|pypi))(?:/|\b)"
)
PACKAGE_INDEX = re.compile(r"--(?:extra-)?index-url|https?://[^\s\"']*/simple\b|\"resolved\":\s*\"https?:")


def text_of(path: Path) -> str:
    """A file's text, empty for a binary file."""
    raw = path.read_bytes()
    return "" if b"\0" in raw[:4096] else raw.decode("utf-8", "replace")


def text_problems(text: str) -> list[str]:
    """Paths of the machine it was written on, and addresses of package indexes."""
    kinds = {"machine path": MACHINE_PATH, "package index": PACKAGE_INDEX}
    return [f"{kind}: {match[0]}" for kind, pattern in kinds.items() for match in pattern.finditer(text)]


def test_no_machine_path_and_no_package_index_is_tracked():
    found = {name_of(path): text_problems(text_of(path)) for path in repository_files()}
    assert not {name: problems for name, problems in found.items() if problems}


def test_a_machine_path_and_an_index_are_noticed():
    assert text_problems("open('" + "/" + "root/data')") and text_problems("pip --index" + "-url x")
    assert not text_problems("a/work/b and ../root and https://pypi.org/project/torch")


def test_the_repository_address_stands_in_one_setting_only():
    address = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"]
    owner_and_name = "/".join(address.rstrip("/").split("/")[-2:])
    assert [name_of(path) for path in repository_files() if owner_and_name in text_of(path)] == ["_config.yml"]


def test_the_readme_is_filled_in_and_names_only_commands_that_exist():
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    assert not re.findall(r"@[A-Z_]+@", readme), "a placeholder waits for its measured value"
    commands = set(re.findall(r"\bmake ([a-z]+)", readme))
    assert {"train", "test", "book", "serve"} <= commands <= set(re.findall(r"^([a-z]+):", makefile, re.M))


def code_problems(text: str) -> list[str]:
    """A source file opens with a docstring, and is short enough to be read at once."""
    found = [] if (ast.get_docstring(ast.parse(text)) or "").strip() else ["does not open with a docstring"]
    return found + (["has more than 450 lines"] if len(text.splitlines()) > 450 else [])


@cases(named(".py"))
def test_source_files_are_short_and_say_what_they_are(path):
    assert not code_problems(path.read_text())


def test_a_long_file_without_docstring_is_noticed():
    assert len(code_problems("x = 1\n" * 451)) == 2
