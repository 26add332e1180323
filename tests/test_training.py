"""Training runs: learning, identity, resumption, checkpoints, and what stops a run before it starts."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from softvq_lib.config import fields_of
from softvq_lib.losses import psnr
from softvq_lib.training import TrainConfig, checkpoint, engine, train
from softvq_lib.training import tokenizer as trainer
from softvq_lib.training.average import Average
from softvq_lib.training.files import check_writable, read_lines, write_whole

SMALL = {
    "dataset": "digits",
    "tokens": 4,
    "batch_size": 8,
    "limit": 64,
    "val_images": 16,
    "log_every": 2,
    "checkpoint_every": 100,
}


def small(tmp_path, **more):
    """Parameters of a run of a second, on digits."""
    return {**SMALL, "runs": str(tmp_path), **more}


class Interrupted(Exception):
    pass


def at_step(monkeypatch, step, act):
    """Have `act(trainer)` called before a step is made."""
    update = trainer.TokenizerTrainer._update

    def updated(self, *arguments):
        if self.step == step:
            act(self)
        return update(self, *arguments)

    monkeypatch.setattr(trainer.TokenizerTrainer, "_update", updated)


def interrupt(monkeypatch, step, **parameters):
    """Train until a step, there raise `Interrupted`; then undo all that was patched."""

    def stop(self):
        raise Interrupted

    at_step(monkeypatch, step, stop)
    with pytest.raises(Interrupted):
        train(**parameters)
    monkeypatch.undo()


def unstarted(monkeypatch, **parameters):
    """The trainer that `train` would set to work."""
    made = []
    with monkeypatch.context() as patch:
        patch.setattr(trainer.TokenizerTrainer, "fit", lambda self: made.append(self))
        train(**parameters)
    return made[0]


def same_files(first, second, *names):
    """Assert that two runs have the same bytes in metrics, weights and the files named."""
    for name in ("metrics.jsonl", "tokenizer/model.safetensors", *names):
        assert (first.path / name).read_bytes() == (second.path / name).read_bytes(), name


def test_it_learns_and_a_finished_run_is_loaded(tmp_path, caplog):
    run = train(**small(tmp_path, steps=24))
    assert run.trained == 24 and run.finished
    held_out = [row["val_psnr"] for row in run.metrics if "val_psnr" in row]
    assert held_out[-1] > held_out[0] + 1
    steps = [row["step"] for row in run.metrics if "loss" in row]
    assert steps == list(range(2, 25, 2))
    assert {"commit", "code", "packages", "device_name", "precision", "data"} <= set(run.manifest)
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file()}
    with caplog.at_level(logging.INFO, "softvq_lib"):
        again = train(**small(tmp_path, steps=24, device="cpu", workers=0, log_every=3))
    assert again.trained == 0 and again.path == run.path
    assert "not trained again" in caplog.text
    assert before == {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file()}
    image = torch.zeros(1, 3, 32, 32)
    assert again.tokenizer(image)[0].shape == image.shape


def test_changed_code_is_warned_of(tmp_path, caplog, monkeypatch):
    train(**small(tmp_path, steps=2))
    monkeypatch.setattr("softvq_lib.training.run.code_hash", lambda: "another")
    with caplog.at_level(logging.WARNING, "softvq_lib"):
        train(**small(tmp_path, steps=2))
    assert "other code" in caplog.text


def test_an_interrupted_run_ends_like_an_unbroken_one(tmp_path, monkeypatch):
    settings = {"steps": 12, "checkpoint_every": 4, "flip": True, "crop": 1.2}
    whole = train(**small(tmp_path / "a", **settings))
    interrupt(monkeypatch, 10, **small(tmp_path / "b", **settings))
    resumed = train(**small(tmp_path / "b", **settings))
    assert resumed.trained == 4 and resumed.manifest["resumed_at"] == [8]
    same_files(whole, resumed, "checkpoints/step-00000012.safetensors")


def test_identity_leaves_out_where_and_how_it_is_watched(tmp_path):
    names = set(fields_of(TrainConfig))
    assert set(TrainConfig.NOT_IDENTITY) < names
    base = train(**small(tmp_path, steps=1))
    assert not set(TrainConfig.NOT_IDENTITY) & set(base.identity)
    assert "workers" not in base.identity and "dataset" not in base.identity
    assert train(**small(tmp_path, steps=1, seed=1)).path != base.path


def test_same_pictures_elsewhere_are_the_same_run(tmp_path):
    from PIL import Image

    for i in range(12):
        Image.new("RGB", (32, 32), (20 * i, 100, 50)).save(_folder(tmp_path / "here") / f"{i}.png")
    shutil.copytree(tmp_path / "here", tmp_path / "there" / "here")
    common = {"steps": 1, "tokens": 4, "batch_size": 4, "workers": 0, "runs": str(tmp_path / "runs")}
    first = train(dataset=str(tmp_path / "here"), **common)
    assert train(dataset=str(tmp_path / "there" / "here"), **common).path == first.path


def _folder(path):
    path.mkdir(parents=True, exist_ok=True)
    return path


def test_a_damaged_checkpoint_is_reported_and_the_one_before_used(tmp_path, caplog):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, {"x": torch.full((4,), float(step))})
    assert [path.name for path in sorted(tmp_path.glob("*.safetensors"))] == [
        "step-00000002.safetensors",
        "step-00000003.safetensors",
    ]
    newest = tmp_path / "step-00000003.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    with caplog.at_level(logging.WARNING, "softvq_lib"):
        step, tensors = checkpoint.load(checkpoint.newest(tmp_path))
    assert step == 2 and tensors["x"][0] == 2
    assert "step-00000003.safetensors is damaged" in caplog.text
    # Once training goes on from there, the damaged one takes no good one's place.
    checkpoint.save(tmp_path, 2, {"x": torch.zeros(4)}, keep=1)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000002.safetensors", "step-00000002.json"}
    (tmp_path / "step-00000002.json").unlink()
    assert checkpoint.newest(tmp_path) is None


def test_the_newest_checkpoint_is_that_of_the_highest_step(tmp_path):
    for step in (9, 10, 100):
        checkpoint.save(tmp_path, step, {"x": torch.full((1000 // step,), float(step))}, keep=3)
    for path in tmp_path.glob("step-00000009.*"):  # the largest, and now the last to be changed
        os.utime(path, (2e9, 2e9))
    assert checkpoint.newest(tmp_path).stem == "step-00000100"


@pytest.mark.parametrize("damage", ["empty", "cut", "one bit", "no checksum", "checksum cut", "other checksum"])
def test_every_damage_is_noticed(tmp_path, damage):
    checkpoint.save(tmp_path, 1, {"x": torch.ones(4)})
    path = checkpoint.save(tmp_path, 2, {"x": torch.ones(4)})
    held, note = path.read_bytes(), path.with_suffix(".json")
    if damage == "no checksum":
        note.unlink()
    elif "checksum" in damage:
        note.write_text({"checksum cut": note.read_text()[:20], "other checksum": "[]"}[damage])
    else:
        path.write_bytes({"empty": b"", "cut": held[:-1], "one bit": held[:-1] + bytes([held[-1] ^ 1])}[damage])
    assert checkpoint.newest(tmp_path).stem == "step-00000001"


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_whole(path, lambda part: part.write_text("old"))

    def half(part):
        part.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, half)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_torn_last_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_lines(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"stepz": 3}, ["'stepz'", "did you mean 'steps'"]),
        ({"steps": 0}, ["steps=0", "at least 1"]),
        ({"batch_size": -2}, ["batch_size=-2"]),
        ({"lr": 0.0}, ["lr=0.0", "above 0"]),
        ({"lr": "1e-3"}, ["lr='1e-3'", "1.0e-4"]),
        ({"ema": 1.5}, ["ema=1.5", "from 0 to 1"]),
        ({"precision": "fp16"}, ["precision='fp16'", "'bf16'"]),
        ({"reconstruction": "l3"}, ["reconstruction='l3'", "'l2'"]),
        ({"device": "gpu"}, ["device='gpu'", "'auto'"]),
        ({"tokens": 6, "codebooks": 4}, ["tokens=6", "codebooks=4"]),
        ({"image_size": 32, "patch_size": 5}, ["image_size=32", "patch_size=5"]),
        ({"dataset": "digit"}, ["'digit'", "digits"]),
        ({"dataset": "no/such/folder"}, ["no/such/folder"]),
        ({"run": "a/b"}, ["run='a/b'"]),
    ],
)
def test_bad_input_stops_before_anything_is_written(tmp_path, bad, words):
    with pytest.raises(ValueError) as error:
        train(**small(tmp_path / "runs", **bad))
    for word in words:
        assert word in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_a_folder_of_another_configuration_is_left_alone(tmp_path):
    run = train(**small(tmp_path, steps=1, run="mine"))
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="another configuration.*lr: 0.005 there, 0.01 asked for.*run"):
        train(**small(tmp_path, steps=1, run="mine", lr=0.01))
    assert before == {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    _folder(tmp_path / "mine").joinpath("thesis.txt").write_text("dear")
    with pytest.raises(ValueError, match="holds no run"):
        train(**small(tmp_path, steps=1, run="mine"))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_full_disk_is_noticed_before_training(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"1 MB of free space.*needs about \d+ MB.*runs"):
        train(**small(tmp_path / "runs", steps=1))
    assert not (tmp_path / "runs").exists()


def test_read_only_folder_is_noticed(tmp_path):
    """As another user, since the superuser may write anywhere."""
    folder = _folder(tmp_path / "locked")
    folder.chmod(0o555)
    report, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0:
                for path in (tmp_path, *tmp_path.parents[:3]):
                    path.chmod(0o755)
                os.setuid(65534)
            check_writable(folder / "run", 1)
            os.write(write, b"nothing was raised")
        except BaseException as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    message = os.read(report, 4096).decode()
    assert "cannot be written to (Permission denied)" in message and "runs" in message


def test_a_write_that_fails_in_mid_run_keeps_the_earlier_checkpoint(tmp_path):
    """The disk fills up while a checkpoint is written: a limit on the size of files stands in for it."""
    import resource
    import signal

    path = checkpoint.save(tmp_path, 1, {"x": torch.zeros(1000)})
    held = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(OSError, match="step-00000002.*cannot be written.*File too large.*free some space"):
            checkpoint.save(tmp_path, 2, {"x": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == held
    assert checkpoint.newest(tmp_path) == path
    assert not list(tmp_path.glob(".*.part"))


def test_too_many_unreadable_images_stop_it(tmp_path):
    from PIL import Image

    folder = _folder(tmp_path / "images")
    for i in range(40):
        Image.new("RGB", (32, 32), (6 * i, 0, 0)).save(folder / f"{i:02d}.png")
    for i in (3, 17, 29):
        (folder / f"{i:02d}.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="unreadable.*1%"):
        train(dataset=str(folder), steps=20, batch_size=16, tokens=4, workers=0, runs=str(tmp_path / "runs"))


def test_pretrained_weights_that_cannot_be_had_are_said_and_named_in_the_identity(caplog):
    from softvq_lib.tokenizers import TokenizerConfig

    config = TokenizerConfig(preset="s", tokens=4, image_size=256, pretrained=True).resolved()
    with caplog.at_level(logging.WARNING, "softvq_lib"):
        tokenizer, used = trainer._build(config, seed=0)
    assert "starts from random weights" in caplog.text
    assert not used.pretrained and not tokenizer.config.pretrained


def test_learning_rate_by_hand():
    rates = [engine.learning_rate(step, 11, 1.0, 0.0, 0.1) for step in (0, 5, 10)]
    assert rates == pytest.approx([1.0, 0.55, 0.1])
    assert engine.learning_rate(0, 100, 1.0, 0.1, 0.1) == pytest.approx(1 / 11)
    assert engine.learning_rate(10, 100, 1.0, 0.1, 0.1) == pytest.approx(1.0)


def test_weight_decay_spares_all_but_matrices():
    from softvq_lib.tokenizers import Tokenizer

    model = Tokenizer.from_preset("tiny", tokens=4)
    decayed, free = engine.adamw(model, 1e-3, 0.95, 0.1).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert decayed["weight_decay"] == 0.1 and free["weight_decay"] == 0
    spared = {names[id(parameter)] for parameter in free["params"]}
    assert {"quantizer.codebook", "encoder.latent_tokens", "encoder.vit.pos_embed", "to_latent.bias"} <= spared
    assert all(name.endswith("weight") for name in (names[id(parameter)] for parameter in decayed["params"]))
    assert len(decayed["params"]) + len(free["params"]) == len(names)


def test_moving_average_by_hand():
    model = torch.nn.Linear(1, 1, bias=False)
    average = Average(model, 0.999)
    values = []
    for step, value in enumerate((1.0, 2.0, 3.0)):
        model.weight.data.fill_(value)
        average.update(step)
        with average.applied():
            values.append(model.weight.item())
        assert model.weight.item() == value
    # The first update copies; the decay then is (1 + n) / (10 + n) for n = 1, 2.
    second = 2 / 11 * 1.0 + 9 / 11 * 2.0
    assert values == pytest.approx([1.0, second, 3 / 12 * second + 9 / 12 * 3.0])


def test_psnr_by_hand():
    images = torch.zeros(2, 3, 4, 4)
    ours = torch.stack([torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 5.0)])
    # A range of 2: 10 log10(4 / 0.04) = 20 dB; the second is clamped to 1: 10 log10(4 / 1) = 6.02 dB.
    assert psnr(images, ours).tolist() == pytest.approx([20.0, 6.0206], abs=1e-4)


def test_checkpoint_holds_model_average_and_optimiser(tmp_path):
    run = train(**small(tmp_path, steps=2))
    tensors = load_file(sorted((run.path / "checkpoints").glob("*.safetensors"))[-1])
    kinds = {name.split(".")[0] for name in tensors}
    assert kinds == {"model", "ema", "model_optimizer"}
    assert json.loads((run.path / "config.json").read_text())["hash"] == run.config_hash
    assert Path(run.path / "log.txt").read_text().count("held-out PSNR") >= 2
