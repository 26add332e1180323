"""Surroundings of every test: no network, no display, two threads, all output in a scratch directory."""

import os
import shutil
import tempfile

import pytest

# Set before any test module is imported: torch, matplotlib and the hub libraries read these once, at import.
_SCRATCH = tempfile.mkdtemp(prefix="softvq-tests-")
os.environ.update(
    SOFTVQ_RUNS=os.path.join(_SCRATCH, "runs"),
    HF_HOME=os.path.join(_SCRATCH, "huggingface"),
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    MPLBACKEND="Agg",
    OMP_NUM_THREADS="2",
    OMP_WAIT_POLICY="PASSIVE",  # waiting threads that spin take the processors from each other
    MKL_NUM_THREADS="2",
    TOKENIZERS_PARALLELISM="false",
)
for _name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HUGGINGFACE_HUB_CACHE"):
    os.environ.pop(_name, None)  # each would win over HF_HOME


def pytest_unconfigure():
    """Removes the session's scratch directory."""
    shutil.rmtree(_SCRATCH, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory):
    """A folder of runs with the tokenizer `tok` and the generators `gen` and `mar`, see `tiny_runs.write_runs`."""
    from tiny_runs import write_runs

    return write_runs(tmp_path_factory.mktemp("tiny_runs"))


@pytest.fixture
def photos(tmp_path):
    """A folder of ten images in the classes `cat` and `dog`, of several sizes."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(10):
        path = tmp_path / "photos" / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(256, size=(20, 16 + number, 3), dtype=np.uint8)).save(path)
    return tmp_path / "photos"


@pytest.fixture
def softvq(tiny_runs, monkeypatch, capsys):
    """Run a command line and return its exit code, standard output and standard error."""
    from softvq_lib.cli import main

    monkeypatch.setenv("SOFTVQ_RUNS", str(tiny_runs))

    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def refused(softvq):
    """Run a command line that must fail: return what it says, one line on standard error and no traceback."""

    def call(*arguments, code=2):
        found, out, err = softvq(*arguments)
        last = err.splitlines()[-1]
        assert found == code and out == "" and last.startswith("error: "), err
        assert "Traceback" not in err and err.count("error: ") == 1
        return last

    return call
