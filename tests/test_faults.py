"""Killed runs end like unbroken ones, byte for byte: `faults.py` with a handful of kills, and with hundreds (slow)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

FAULTS = Path(__file__).with_name("faults.py")


def campaign(kills: int, folder: Path, kind: str = "tokenizer") -> dict:
    command = [sys.executable, str(FAULTS), str(kills), "0", str(folder), kind]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert "error" not in report, report["error"]
    assert report["differing"] == []
    assert report["kills"] == sum(report["where"].values()) == kills
    return report


def names_in_checkpoint(folder: Path, step: int) -> set[str]:
    path = folder / "whole" / "run" / "checkpoints" / f"step-{step:08d}.safetensors"
    with safe_open(path, "pt") as tensors:
        return set(tensors.keys())


def test_a_killed_run_ends_like_an_unbroken_one(tmp_path):
    """With two loader processes and an active discriminator."""
    report = campaign(12, tmp_path)
    assert report["inside_a_write"] >= 5 and report["inside_a_write"] < report["kills"]
    assert report["where"].get("at any time", 0) > 0
    assert {"metrics.jsonl", "tokenizer/model.safetensors", "images/step-00000012.png"} <= set(report["files"])
    names = names_in_checkpoint(tmp_path, 12)
    for prefix in ("model.tokenizer.", "ema.tokenizer.", "discriminator.trained."):
        assert any(name.startswith(prefix) for name in names)
    for optimizer in ("model_optimizer", "discriminator_optimizer"):
        for moment in ("exp_avg", "exp_avg_sq", "step"):
            assert any(name.startswith(optimizer) and name.endswith(f".{moment}") for name in names)
    assert {"lecam.ema_real", "lecam.ema_fake"} <= names
    # The last row of metrics begins after step 8: the checkpoint of step 10 holds what has been added up.
    assert {"row.loss", "row.adversarial", "row.lecam", "row.gradient_norm"} <= names_in_checkpoint(tmp_path, 10)


@pytest.mark.slow
def test_two_hundred_kills(tmp_path):
    report = campaign(200, tmp_path)
    assert report["inside_a_write"] >= 80
    # Every call that writes a checkpoint was the last thing that some process did.
    assert {name for name in report["calls"] if "checkpoints" in name} <= set(report["where"])
