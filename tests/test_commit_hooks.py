"""The hooks of each commit (.pre-commit-config.yaml): they pass on the repository, and clean what is not clean."""

import base64
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from repository import ROOT, name_of, named, repository_files, write_notebook

CONFIG = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
HOOKS = {hook["id"]: hook for repository in CONFIG["repos"] for hook in repository["hooks"]}


@pytest.fixture(scope="module")
def cleaner():
    found = importlib.util.spec_from_file_location("clean_notebooks", ROOT / "book" / "clean_notebooks.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def repository_with(folder: Path, files: list[Path]) -> Path:
    """A git repository of its own with copies of these files, so that hooks that mend change nothing here."""
    for path in files:
        copy = folder / name_of(path)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    for command in (["init", "--quiet"], ["add", "--all", "--force"]):
        subprocess.run(["git", *command], cwd=folder, check=True, capture_output=True)
    return folder


def run_hooks(folder: Path, *hooks: str) -> subprocess.CompletedProcess:
    """Run the hooks on all files of a repository, offline, with the commands of the environment of these tests."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PRE_COMMIT_HOME": str(folder.parent / "pre-commit"),
        "PRE_COMMIT_COLOR": "never",
    }
    for name in [name for name in environment if name.startswith("GIT_")]:
        del environment[name]  # the tests may run inside a hook themselves
    command = [sys.executable, "-m", "pre_commit", "run", "--all-files", *hooks]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="pre-commit works on a git repository")


@needs_git
def test_all_hooks_pass_on_this_repository(tmp_path):
    done = run_hooks(repository_with(tmp_path / "copy", repository_files()))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Passed") == len(HOOKS) >= 5, done.stdout


def test_no_hook_needs_a_network():
    assert [repository["repo"] for repository in CONFIG["repos"]] == ["local"]
    for hook in HOOKS.values():
        wrapper, command, *_ = hook["entry"].split()
        assert hook["language"] == "script" and os.access(ROOT / wrapper, os.X_OK)
        assert (Path(sys.executable).parent / command).exists(), f"{command} is not in the environment"


def picture(**options) -> str:
    """An image of many colours as base64."""
    buffer = io.BytesIO()
    Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 50).convert("RGB").save(buffer, "png", **options)
    return base64.b64encode(buffer.getvalue()).decode()


SVG = "<svg><metadata><dc:date>2026-01-01T00:00:00</dc:date></metadata><path d='M 0 0'/></svg>"
DIRTY = [
    {
        "source": ["x = 1\n", "print(x)"],
        "metadata": {
            "tags": ["nbval-check-output"],
            "execution": {"iopub.execute_input": "2026-01-01T00:00:00Z"},
            "ExecuteTime": {"start_time": "2026-01-01"},
            "papermill": {"duration": 1.5},
            "collapsed": True,
        },
        "outputs": [
            {"output_type": "stream", "name": "stderr", "text": "  5%|#    | 1/20 [00:01<00:19]"},
            {"output_type": "stream", "name": "stdout", "text": ["  0%\r", " 50%\r", "100%\n"]},
            {"output_type": "stream", "name": "stdout", "text": "1\n"},
        ],
    },
    {
        "source": "show()",
        "metadata": {"tags": []},
        "outputs": [
            {
                "output_type": "display_data",
                "metadata": {},
                "data": {
                    "application/vnd.jupyter.widget-view+json": {"model_id": "a", "version_major": 2},
                    "text/plain": "  0%|          | 0/20",
                },
            },
            {"output_type": "display_data", "metadata": {}, "data": {"image/png": picture(), "text/plain": ["a", "b"]}},
            {"output_type": "display_data", "metadata": {}, "data": {"image/svg+xml": SVG}},
        ],
    },
]


def test_a_dirty_notebook_is_cleaned_and_a_clean_one_left_alone(tmp_path, cleaner, capsys):
    state = {"application/vnd.jupyter.widget-state+json": {"state": {"a": {}}}}
    path = write_notebook(tmp_path / "dirty.ipynb", DIRTY, widgets=state, papermill={"end_time": "2026-01-01"})
    assert cleaner.main([str(path)]) == 1 and "cleaned" in capsys.readouterr().out
    once = path.read_bytes()
    assert cleaner.main([str(path)]) == 0 and path.read_bytes() == once

    notebook = json.loads(once)
    first, second = notebook["cells"]
    assert notebook["metadata"].keys() == {"kernelspec", "language_info"}
    assert first["metadata"] == {"tags": ["nbval-check-output"]} and second["metadata"] == {}
    assert first["source"] == "x = 1\nprint(x)"
    assert first["outputs"] == [{"output_type": "stream", "name": "stdout", "text": "100%\n1\n"}]
    png, svg = (output["data"] for output in second["outputs"])
    assert "dc:date" not in svg["image/svg+xml"] and "<path" in svg["image/svg+xml"]
    assert png["text/plain"] == "ab"
    assert Image.open(io.BytesIO(base64.b64decode(png["image/png"]))).size == (64, 64)
    assert not any(trace in once for trace in (b"2026", b"widget", b"papermill", b"0/20", b"1/20"))


def test_notebooks_saved_in_two_ways_end_as_the_same_bytes(tmp_path, cleaner):
    path = write_notebook(tmp_path / "one.ipynb", DIRTY)
    other = json.loads(path.read_text())
    for cell in other["cells"]:
        cell["source"] = "".join(cell["source"]).splitlines(keepends=True)
        cell["metadata"]["vscode"] = {"languageId": "python"}
    other = json.dumps(dict(reversed(other.items())), indent=4)
    assert cleaner.clean(json.loads(other)) == cleaner.clean(json.loads(path.read_text()))


def test_a_palette_is_found_once(cleaner):
    once = cleaner.smaller(picture())
    assert cleaner.smaller(once) == once


@needs_git
@pytest.mark.parametrize(
    ("hook", "name", "text"),
    [
        ("ruff-check", "a.py", '"""A."""\n\nimport os\n'),
        ("ruff-format", "a.py", "x = {  'a':1}\n"),
        ("large-files", "a.txt", "x" * 1_100_000),
        ("merge-conflicts", "a.md", "<<<<<<< HEAD\na\n=======\nb\n>>>>>>> other\n"),
        ("yaml", "a.yaml", "a: [1\n"),
        ("toml", "a.toml", "a = \n"),
    ],
    ids=lambda value: value if value in HOOKS else "",
)
def test_each_hook_stops_what_it_is_for(tmp_path, hook, name, text):
    needed = [ROOT / part for part in (".pre-commit-config.yaml", ".ci/in-env", "pyproject.toml")]
    folder = repository_with(tmp_path / "copy", needed)
    (folder / name).write_text(text)
    subprocess.run(["git", "add", "--force", name], cwd=folder, check=True)
    done = run_hooks(folder, hook)
    assert done.returncode != 0 and HOOKS[hook]["name"] in done.stdout


def test_the_committed_notebooks_are_clean(cleaner):
    unclean = [
        name_of(path) for path in named(".ipynb") if cleaner.clean(json.loads(path.read_text())) != path.read_text()
    ]
    assert not unclean, "clean them: .venv/bin/python book/clean_notebooks.py " + " ".join(unclean)
