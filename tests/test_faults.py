"""Runs that are killed, stopped, or lose their files and disk: what they have done is kept, and they go on exactly.

Kills are those of `faults.py`: a handful here, hundreds in the slow form.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from test_training import at_step, same_files, small

from softvq_lib.training import checkpoint, train

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
    made = {"run/metrics.jsonl", "run/tokenizer/model.safetensors", "run/images/step-00000012.png"}
    assert made <= set(report["files"])
    names = names_in_checkpoint(tmp_path, 12)
    for prefix in ("model.tokenizer.", "ema.tokenizer.", "discriminator.trained."):
        assert any(name.startswith(prefix) for name in names)
    for optimizer in ("model_optimizer", "discriminator_optimizer"):
        for moment in ("exp_avg", "exp_avg_sq", "step"):
            assert any(name.startswith(optimizer) and name.endswith(f".{moment}") for name in names)
    assert {"lecam.ema_real", "lecam.ema_fake"} <= names
    # The last row of metrics begins after step 8: the checkpoint of step 10 holds what has been added up.
    assert {"row.loss", "row.adversarial", "row.lecam", "row.gradient_norm"} <= names_in_checkpoint(tmp_path, 10)


def test_a_killed_generator_ends_like_an_unbroken_one(tmp_path):
    """Its latents, too."""
    report = campaign(6, tmp_path, "generator")
    assert report["inside_a_write"] >= 3
    assert {"run/metrics.jsonl", "run/generator/model.safetensors"} <= set(report["files"])
    assert any(name.startswith("latents/") for name in report["files"])
    assert any("latents/" in name for name in report["calls"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
def test_two_hundred_kills(kind, tmp_path):
    report = campaign(200, tmp_path, kind)
    assert report["inside_a_write"] >= 80
    # Every call that writes a checkpoint was the last thing that some process did.
    assert {name for name in report["calls"] if "checkpoints" in name} <= set(report["where"])


# -- another process -------------------------------------------------------------------------------------------------


def test_a_run_that_is_being_trained_is_refused_and_sigterm_saves_it(monkeypatch, tmp_path):
    """Another process stops itself before step 5, to be looked at; then it is told to end."""
    settings = {"steps": 9, "checkpoint_every": 4, "workers": 0, "log_every": 2}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the fork could use no others, and their number may change the last bits
    try:
        whole = train(**small(tmp_path / "a", **settings))
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks
        child = os.fork()
        if child == 0:
            try:
                at_step(monkeypatch, 5, lambda self: os.kill(os.getpid(), signal.SIGSTOP))
                train(**small(tmp_path / "b", **settings))
                os._exit(0)
            except SystemExit as error:
                os._exit(error.code)
            except BaseException:
                os._exit(1)
        assert os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1])
        (folder,) = (tmp_path / "b").iterdir()
        held = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "log.txt"}
        try:
            with pytest.raises(ValueError, match="is being trained by another process: wait for it"):
                train(**small(tmp_path / "b", **settings))
            assert held == {path: path.read_bytes() for path in held}
        finally:
            os.kill(child, signal.SIGTERM)
            os.kill(child, signal.SIGCONT)
            status = os.waitpid(child, 0)[1]
        assert os.waitstatus_to_exitcode(status) == 143
        assert checkpoint.newest(folder / "checkpoints").stem == "step-00000006"
        assert "stopped after step 6, which is saved" in (folder / "log.txt").read_text()
        resumed = train(**small(tmp_path / "b", **settings))
        assert resumed.trained == 3 and resumed.manifest["resumed_at"] == [6]
        same_files(whole, resumed, "checkpoints/step-00000009.safetensors")
    finally:
        torch.set_num_threads(threads)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# -- data and disk ---------------------------------------------------------------------------------------------------


def pictures(folder, count, size=(32, 32)):
    """A folder of training and one of validation images, and its parameters."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, number in (("train", count), ("val", 4)):
        (folder / split).mkdir(parents=True)
        for i in range(number):
            pixels = rng.integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize(size).save(folder / split / f"{i:03d}.png")
    return {"dataset": str(folder), "limit": None, "workers": 0, "val_images": 4}


def test_a_file_that_vanishes_is_reported_and_left_out(monkeypatch, tmp_path, caplog):
    settings = pictures(tmp_path / "images", 104)
    at_step(monkeypatch, 2, lambda self: (tmp_path / "images/train/005.png").unlink())
    with caplog.at_level(logging.WARNING, "softvq_lib"):
        run = train(**small(tmp_path / "runs", **settings, steps=28))  # two epochs of 13 steps
    assert run.finished
    (line,) = [record.message for record in caplog.records if "unreadable" in record.message]
    assert "train/005.png" in line and "No such file" in line


def test_files_that_all_vanish_stop_it_and_the_checkpoint_stays(monkeypatch, tmp_path):
    settings = pictures(tmp_path / "images", 24)

    def vanish(self):
        for path in (tmp_path / "images/train").iterdir():
            path.unlink()

    with monkeypatch.context() as patch:
        at_step(patch, 3, vanish)
        with pytest.raises(ValueError, match="unreadable.*train/0.*No such file.*Repair or remove"):
            train(**small(tmp_path / "runs", **settings, steps=8, checkpoint_every=2))
    (folder,) = (tmp_path / "runs").iterdir()
    assert checkpoint.newest(folder / "checkpoints").stem == "step-00000004"


def test_images_of_every_kind_train(tmp_path, caplog):
    """One epoch over all modes, three broken files of 300, and a class folder without images."""
    from PIL import Image

    root, rng = tmp_path / "images", np.random.default_rng(0)
    for name in ("train/plain", "train/odd", "train/empty", "val/plain", "val/odd"):
        (root / name).mkdir(parents=True)
    for i in range(300):
        Image.new("RGB", (8, 8), (i % 256, 90, 30)).save(root / f"train/plain/{i}.png")
    colours = rng.integers(0, 256, (40, 36, 4), dtype=np.uint8)
    Image.fromarray(colours, "CMYK").save(root / "train/odd/cmyk.jpg")
    Image.fromarray(colours, "RGBA").save(root / "train/odd/alpha.png")
    Image.fromarray(colours[..., :2].copy().view(np.uint16)[..., 0]).save(root / "train/odd/16-bit.png")
    Image.fromarray(colours[..., 0]).save(root / "train/odd/grey.jpg")
    Image.fromarray(colours[..., 0]).convert("P").save(root / "train/odd/palette.gif")
    Image.fromarray(colours[..., 0]).convert("1").save(root / "train/odd/bits.png")
    (root / "train/odd/zero.png").touch()
    (root / "train/odd/text.jpg").write_text("no picture")
    (root / "train/odd/cut.jpg").write_bytes((root / "train/odd/cmyk.jpg").read_bytes()[:700])
    for name in ("val/plain/0.png", "val/odd/1.png"):
        Image.new("RGB", (50, 32), (200, 90, 30)).save(root / name)
    settings = {"dataset": str(root), "limit": None, "workers": 0, "batch_size": 51, "steps": 7}
    with caplog.at_level(logging.INFO, "softvq_lib"):
        run = train(**small(tmp_path / "runs", **settings))
    assert run.finished and run.data.classes == ["odd", "plain"]
    for name in ("zero.png: the file is empty", "text.jpg: not a picture", "cut.jpg: "):
        assert caplog.text.count(f"unreadable image left out: train/odd/{name}") == 1
    assert caplog.text.count("unreadable image left out") == 3


def test_a_data_set_of_one_image_trains(tmp_path):
    settings = pictures(tmp_path / "images", 1)
    run = train(**small(tmp_path / "runs", **settings, steps=12))
    losses = [row["reconstruction"] for row in run.metrics if "loss" in row]
    assert len(run.data.train) == 1 and losses[-1] < 0.5 * losses[0]


def test_a_disk_that_fills_up_stops_it_and_the_checkpoint_stays(monkeypatch, tmp_path):
    import resource

    settings = {"steps": 8, "checkpoint_every": 2}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda self: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1])))
        try:
            with pytest.raises(OSError, match="step-00000004.safetensors cannot be written.*free some space"):
                train(**small(tmp_path / "b", **settings))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
    (folder,) = (tmp_path / "b").iterdir()
    assert checkpoint.newest(folder / "checkpoints").stem == "step-00000002"
    resumed = train(**small(tmp_path / "b", **settings))
    same_files(train(**small(tmp_path / "a", **settings)), resumed, "checkpoints/step-00000008.safetensors")
