"""The notebooks and their parameter files: what is declared, what is given, and what may be committed.

Each rule is a function that returns a list of complaints, so that it is asked twice: of the repository, where
the list must be empty, and of a bad example, where it must not be.
"""

import ast
import json
import re
from pathlib import Path

import papermill
import pytest
from papermill.iorw import read_yaml_file

from repository import ROOT, cases, name_of, named, write_notebook

SCALES = ("smoke", "mini", "paper")
TYPES = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,), "None": (type(None),)}


def declared_parameters(notebook: Path) -> dict[str, str]:
    """Parameter name -> annotation, from the notebook's cell tagged `parameters`."""
    cells = [c for c in json.loads(notebook.read_text())["cells"] if "parameters" in c["metadata"].get("tags", [])]
    body = ast.parse("".join(cells[0]["source"])).body if cells else []
    return {node.target.id: ast.unparse(node.annotation) for node in body if isinstance(node, ast.AnnAssign)}


def fits(value: object, annotation: str) -> bool:
    """Whether a value read from YAML has the annotated type: a bool is no number, the text "1e-4" neither."""
    names = re.findall(r"\w+", annotation.replace("Optional", "None"))
    allowed = tuple(kind for name in names for kind in TYPES.get(name, ()))
    return isinstance(value, allowed) and (bool in allowed or not isinstance(value, bool))


def params_problems(file: Path, notebook: Path) -> list[str]:
    """What is wrong with a parameter file: unknown or repeated keys, nesting, types, an incomplete header."""
    known = declared_parameters(notebook)
    values = read_yaml_file(str(file)) or {}  # papermill's own reader
    if not isinstance(values, dict):
        return ["is not a mapping"]
    found = [f"unknown key {key!r}" for key in values if key not in known]
    found += [f"{key}: nested" for key, value in values.items() if isinstance(value, dict | list)]
    found += [
        f"{key}: {value!r} is not {known[key]}"
        for key, value in values.items()
        if key in known and not fits(value, known[key])
    ]
    text = file.read_text()
    written = re.findall(r"^(\w+)\s*:", text, re.M)
    found += [f"{key}: given {written.count(key)} times" for key in sorted(set(written)) if written.count(key) > 1]

    header = re.match(r"(?:#.*\n)*", text)[0]
    found += [f"header without '{w}:'" for w in ("row", "cost", "command") if not re.search(rf"\b{w}: *\S", header)]
    command = header.partition("command:")[2]
    found += [f"command does not name {path}" for path in map(name_of, (file, notebook)) if path not in command]
    return found


def test_parameter_files_lie_where_scale_and_notebook_say():
    for file in named(".yaml", "params"):
        scale, folder, _ = file.relative_to(ROOT / "params").parts
        assert scale in SCALES, f"{name_of(file)}: scale {scale!r} is none of {SCALES}"
        assert (ROOT / "book" / f"{folder}.ipynb").is_file(), f"{name_of(file)}: no book/{folder}.ipynb"
    assert any("smoke" in file.parts for file in named(".yaml", "params"))


@cases(named(".yaml", "params"))
def test_a_parameter_file_fits_its_notebook(path):
    assert not params_problems(path, ROOT / "book" / f"{path.parent.name}.ipynb")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("tokens: 32\nlr: 1.0e-4\nflip: true\ndim: null\ndataset: digits", None),
        ("tokkens: 32", "unknown key 'tokkens'"),
        ("lr: 1e-4", "lr: '1e-4' is not float"),
        ("tokens: 32.5", "tokens: 32.5 is not int"),
        ("tokens: true", "tokens: True is not int"),
        ("dataset: null", "dataset: None is not str"),
        ("tokens:\n  number: 32", "tokens: nested"),
        ("tokens: 32\ntokens: 64", "tokens: given 2 times"),
    ],
)
def test_a_bad_parameter_file_is_rejected(tmp_path, line, complaint):
    source = "from typing import Optional\n\ntokens: int = 64\nlr: float = 1e-4\nflip: bool = False\n"
    source += "dim: Optional[int] = None\ndataset: str = 'digits'"
    notebook = write_notebook(tmp_path / "n.ipynb", [{"source": source, "metadata": {"tags": ["parameters"]}}])
    file = tmp_path / "p.yaml"
    file.write_text(f"# row: Table 2\n# cost: a minute\n# command: papermill n.ipynb out.ipynb -f p.yaml\n{line}\n")
    problems = params_problems(file, notebook)
    assert complaint in problems if complaint else not problems
    file.write_text("# row: Table 2\ntokens: 32\n")
    assert "header without 'cost:'" in params_problems(file, notebook)
    assert "command does not name p.yaml" in params_problems(file, notebook)


def is_compared(cell: dict) -> bool:
    """Whether nbval compares this cell's output, and there is some text to compare."""
    asked = "nbval-check-output" in cell["metadata"].get("tags", []) or "NBVAL_CHECK_OUTPUT" in "".join(cell["source"])
    data = [output.get("text") or output.get("data", {}).get("text/plain") for output in cell.get("outputs", [])]
    return asked and cell.get("execution_count") is not None and any("".join(text or "").strip() for text in data)


def notebook_problems(path: Path, parameterised: bool) -> list[str]:
    """What keeps a notebook from being committed."""
    notebook = json.loads(path.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    found = []
    if path.stat().st_size > 1_000_000:
        found.append("larger than 1 MB")
    if any(output["output_type"] == "error" for cell in code for output in cell["outputs"]):
        found.append("an error among its outputs")
    if not any(map(is_compared, code)):
        found.append("no executed cell that nbval compares")
    if "papermill" in notebook["metadata"]:
        found.append("metadata.papermill")
    for key in ("papermill", "execution"):
        if any(key in cell["metadata"] for cell in notebook["cells"]):
            found.append(f"cell.metadata.{key}")
    tags = [tag for cell in code for tag in cell["metadata"].get("tags", [])]
    if "injected-parameters" in tags:
        found.append("a cell that papermill injected")
    if parameterised and tags.count("parameters") != 1:
        found.append(f"{tags.count('parameters')} cells tagged 'parameters'")
    if "parameters" in tags:
        seen, written = set(papermill.inspect_notebook(path)), set(declared_parameters(path))
        found += [f"{name}: papermill cannot read it, or it has no type" for name in sorted(seen ^ written)]
    return found


@cases(named(".ipynb"))
def test_a_notebook_is_fit_to_be_committed(path):
    takes_parameters = path.stem.startswith("train_") or any((ROOT / "params").glob(f"*/{path.stem}"))
    assert not notebook_problems(path, takes_parameters)


GOOD = {"source": "1", "metadata": {"tags": ["nbval-check-output"]}}
GOOD["outputs"] = [{"output_type": "execute_result", "execution_count": 1, "metadata": {}, "data": {"text/plain": "1"}}]
TAKES = {"source": "tokens: int = 64  # latent tokens", "metadata": {"tags": ["parameters"]}}


@pytest.mark.parametrize(
    ("cells", "metadata", "complaint"),
    [
        ([TAKES, GOOD], {}, None),
        ([GOOD], {}, "0 cells tagged 'parameters'"),
        ([TAKES, GOOD | {"execution_count": None}], {}, "no executed cell that nbval compares"),
        ([TAKES, GOOD | {"outputs": []}], {}, "no executed cell that nbval compares"),
        ([TAKES, GOOD | {"metadata": {}}], {}, "no executed cell that nbval compares"),
        (
            [TAKES, GOOD, {"source": "?", "outputs": [{"output_type": "error"}]}],
            {},
            "an error among its outputs",
        ),
        ([TAKES, GOOD, {"source": "#" * 1_000_001}], {}, "larger than 1 MB"),
        ([TAKES, GOOD], {"papermill": {}}, "metadata.papermill"),
        ([TAKES, GOOD, {"source": "", "metadata": {"execution": {}}}], {}, "cell.metadata.execution"),
        (
            [TAKES, GOOD, TAKES | {"metadata": {"tags": ["injected-parameters"]}}],
            {},
            "a cell that papermill injected",
        ),
        (
            [TAKES | {"source": "tokens: int | None = 64"}, GOOD],
            {},
            "tokens: papermill cannot read it, or it has no type",
        ),
        (
            [TAKES | {"source": "tokens = 64"}, GOOD],
            {},
            "tokens: papermill cannot read it, or it has no type",
        ),
    ],
)
def test_an_unfit_notebook_is_rejected(tmp_path, cells, metadata, complaint):
    problems = notebook_problems(write_notebook(tmp_path / "n.ipynb", cells, **metadata), parameterised=True)
    assert complaint in problems if complaint else not problems
