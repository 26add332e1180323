"""Surroundings of every test: no network, no display, two threads, all output in a scratch directory."""

import os
import shutil
import tempfile

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
