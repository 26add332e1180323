"""What the papermill command does with and without an output path, as the README tells it.

This is the bare ``papermill <notebook> -p tokens 64`` in its three situations: on a terminal,
with redirected output, and with piped input. The notebook is a small stand-in, so that this takes seconds.
"""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from repository import write_notebook

PAPERMILL = Path(sys.executable).with_name("papermill")  # of this environment, activated or not


PARAMETERS = {"source": "tokens: int = 32  # latent tokens", "metadata": {"tags": ["parameters"]}}


def notebook(path: Path, source: str) -> Path:
    """Writes a notebook with the parameter `tokens` and one cell of code."""
    return write_notebook(path, [PARAMETERS, {"source": source}])


def printed(executed: str) -> str:
    """What the last cell of an executed notebook printed."""
    return "".join(json.loads(executed)["cells"][-1]["outputs"][0]["text"]).strip()


@pytest.fixture
def source(tmp_path):
    return notebook(tmp_path / "train.ipynb", "import sys\nprint(tokens, sys.prefix)")


def papermill(path, *output, **streams):
    command = [PAPERMILL, path, *output, "-p", "tokens", "64"]
    return subprocess.run(command, cwd=path.parent, timeout=300, **streams)


@pytest.fixture
def terminal():
    """The two ends of a pseudo-terminal: ours, and the one a command takes for its screen and keyboard."""
    ours, theirs = pty.openpty()
    yield ours, theirs
    os.close(ours)
    os.close(theirs)


def test_an_output_path_keeps_the_source_and_runs_in_this_environment(source, tmp_path):
    before = source.read_bytes()
    done = papermill(source, tmp_path / "out.ipynb", stdin=subprocess.DEVNULL, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert printed((tmp_path / "out.ipynb").read_text()) == f"64 {sys.prefix}"
    assert source.read_bytes() == before


def test_on_a_terminal_papermill_asks_for_an_output_path(source, terminal):
    before, (ours, theirs) = source.read_bytes(), terminal
    done = papermill(source, stdin=theirs, stdout=theirs, stderr=theirs)
    assert done.returncode == 2
    assert b"Missing argument 'OUTPUT_PATH'" in os.read(ours, 10_000)
    assert source.read_bytes() == before


def test_with_redirected_output_the_executed_notebook_is_what_is_printed(source, terminal, tmp_path):
    before, (_, theirs) = source.read_bytes(), terminal
    with open(tmp_path / "out.ipynb", "wb") as out:
        done = papermill(source, stdin=theirs, stdout=out, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr.decode()
    assert printed((tmp_path / "out.ipynb").read_text()).startswith("64 ")
    assert source.read_bytes() == before


@pytest.mark.parametrize("piped", [b"", b"yes\n", b"{}"], ids=["nothing", "text", "json"])
def test_with_piped_input_that_is_no_notebook_it_fails_and_writes_nothing(source, piped):
    before = source.read_bytes()
    done = papermill(source, input=piped, capture_output=True)
    assert done.returncode == 1
    assert source.read_bytes() == before


def test_piped_input_does_no_harm_where_an_output_path_is_given(source, tmp_path):
    before = source.read_bytes()
    other = notebook(tmp_path / "other.ipynb", "print('piped')").read_bytes()
    done = papermill(source, tmp_path / "out.ipynb", input=other, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert printed((tmp_path / "out.ipynb").read_text()).startswith("64 ")
    assert source.read_bytes() == before


def test_a_notebook_piped_in_is_run_and_written_to_the_only_path(tmp_path):
    """Given a notebook on its input, papermill takes a lone path as the output: the README warns of this."""
    target = tmp_path / "lone.ipynb"
    other = notebook(tmp_path / "other.ipynb", "print('piped', tokens)").read_bytes()
    done = papermill(target, input=other, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert printed(target.read_text()) == "piped 64"
