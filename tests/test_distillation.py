"""Encoders distilled from a teacher: learning, resumption, what is handed out, and tokenizers that start from it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_training import Interrupted, unstarted

from softvq_lib import results
from softvq_lib.distilling import distil_encoder
from softvq_lib.tokenizers import Tokenizer
from softvq_lib.tokenizers.vit import patch_outputs
from softvq_lib.training import train
from softvq_lib.training.distillation import DistilTrainer, distil, find_encoder, start_encoder

SMALL = {
    "dataset": "digits",
    "teacher": "efflite0",
    "limit": 64,
    "batch_size": 8,
    "val_images": 16,
    "log_every": 2,
    "checkpoint_every": 100,
}
TOKENIZER = {"dataset": "digits", "limit": 64, "tokens": 4, "batch_size": 8, "val_images": 8, "steps": 2}


def small(tmp_path, **more):
    return {**SMALL, "runs": str(tmp_path), **more}


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    return distil(**small(tmp_path_factory.mktemp("distilled"), steps=24))


def test_it_learns_and_a_finished_run_is_loaded(distilled):
    assert distilled.trained == 24 and distilled.finished
    cosines = [row["val_cosine"] for row in distilled.metrics if "val_cosine" in row]
    assert len(cosines) == 6 and cosines[-1] > cosines[0] + 0.3
    losses = [row["loss"] for row in distilled.metrics if "loss" in row]
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.2
    assert {"commit", "code", "packages", "precision", "data", "constant_cosine"} <= set(distilled.manifest)
    again = distil(**small(distilled.path.parent, steps=24, workers=0))
    assert again.trained == 0 and again.path == distilled.path


def test_the_constant_is_what_one_prediction_for_all_images_scores(distilled, monkeypatch):
    """By brute force: the prediction that maximises the mean cosine is the mean of the unit vectors."""
    made = []
    with monkeypatch.context() as patch:
        patch.setattr(DistilTrainer, "fit", lambda self: made.append(self))
        distil(**small(distilled.path.parent, steps=25))
    made[0].run.path.mkdir(exist_ok=True)
    made[0].measure(made[0].measured)
    seen = torch.cat([seen for _, seen in made[0].held_out])
    unit = seen / seen.norm(dim=-1, keepdim=True)
    by_hand = unit.mean(0).norm(dim=-1).mean().item()
    assert distilled.manifest["constant_cosine"] == pytest.approx(by_hand, abs=1e-4)


@pytest.mark.parametrize("more", [{}, {"cached": False, "flip": True, "crop": 1.2}], ids=["cached", "augmented"])
def test_an_interrupted_run_ends_like_an_unbroken_one(tmp_path, monkeypatch, more):
    settings = {"steps": 12, "checkpoint_every": 4, **more}
    whole = distil(**small(tmp_path / "a", **settings))
    update = DistilTrainer._update

    def stop(self, *arguments):
        if self.step == 10:
            raise Interrupted
        return update(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(DistilTrainer, "_update", stop)
        distil(**small(tmp_path / "b", **settings))
    resumed = distil(**small(tmp_path / "b", **settings))
    assert resumed.trained == 4 and resumed.manifest["resumed_at"] == [8]
    for name in ("metrics.jsonl", "encoder/model.safetensors", "checkpoints/step-00000012.safetensors"):
        assert (whole.path / name).read_bytes() == (resumed.path / name).read_bytes(), name


def test_patches_alone_are_what_the_encoder_sees_without_latent_tokens():
    encoder = Tokenizer.from_preset("tiny", tokens=4).encoder.eval()
    images = torch.randn(2, 3, 32, 32)
    outputs = patch_outputs(encoder.vit, images)
    assert outputs.shape == (2, 16, 64)
    torch.testing.assert_close(outputs, encoder.vit.forward_features(images)[:, encoder.vit.num_prefix_tokens :])


def test_the_identity_tells_encoders_teachers_and_data_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(DistilTrainer, "fit", lambda self: None)
    changes = [{}, {"patch_size": 4}, {"teacher": "efflite1"}, {"teacher_random": True}, {"cached": False}]
    changes += [{"limit": 63}, {"seed": 1}, {"preset": "mini"}, {"image_size": 64}]
    names = [distil(**small(tmp_path, steps=1) | change).name for change in changes]
    assert len(set(names)) == len(names)
    assert all("distilled" in name for name in names)
    assert distil(**small(tmp_path, steps=1, image_size=32, patch_size=8)).name == names[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"flip": True}, ["cached=True", "flip=True", "cached=False"]),
        ({"teacher": ""}, ["teacher=''", "efflite2"]),
        ({"teacher": "eflite2"}, ["did you mean", "efflite2"]),
        ({"preset": "tinny"}, ["preset='tinny'", "did you mean 'tiny'"]),
        ({"tokens": 4}, ["unknown parameter 'tokens'"]),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(tmp_path, change, words):
    with pytest.raises(ValueError) as error:
        distil(**small(tmp_path / "runs", steps=1) | change)
    for word in words:
        assert word in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_the_experiment_records_its_rows(distilled, tmp_path):
    experiment = distil_encoder(**small(distilled.path.parent, steps=24), results=str(tmp_path))
    value, constant = results.read(tmp_path / "distil_encoder.jsonl")
    assert (value["metric"], constant["metric"]) == ("val_cosine", "val_cosine_constant")
    assert value["curve"] == experiment.curve and value["n"] == 16
    assert value["low"] < value["value"] < value["high"]
    assert distilled.name in str(experiment) and f"{constant['value']:.3f}" in str(experiment)


# -- a tokenizer that starts from it ---------------------------------------------------------------------------------


def test_a_tokenizer_starts_from_just_these_weights(distilled, tmp_path, monkeypatch):
    file = load_file(distilled.path / "encoder" / "model.safetensors")
    started, plain = (
        unstarted(monkeypatch, **TOKENIZER, runs=str(distilled.path.parent), **more).bare.tokenizer
        for more in ({"encoder_start": distilled.name}, {})
    )
    vit = started.encoder.vit.state_dict()
    assert set(vit) == set(file)
    assert all(torch.equal(vit[name], tensor) for name, tensor in file.items())
    assert all(parameter.requires_grad for parameter in started.parameters())
    others = [name for name, _ in plain.named_parameters() if not name.startswith("encoder.vit.")]
    for name in others:  # latent tokens, decoder and codebook are those of a start without it
        assert torch.equal(started.state_dict()[name], plain.state_dict()[name])
    assert not torch.equal(vit["pos_embed"], plain.encoder.vit.pos_embed)


def test_it_is_the_same_run_wherever_the_encoder_lies(distilled, tmp_path, monkeypatch):
    shutil.copytree(distilled.path / "encoder", tmp_path / "elsewhere")
    places = [distilled.name, str(distilled.path), str(distilled.path / "encoder"), str(tmp_path / "elsewhere")]
    runs = [unstarted(monkeypatch, **TOKENIZER, runs=str(distilled.path.parent), encoder_start=p).run for p in places]
    assert len({run.name for run in runs}) == 1
    about = json.loads((distilled.path / "encoder" / "config.json").read_text())
    assert runs[0].identity["encoder_start"] == about["weights_sha256"]
    plain = unstarted(monkeypatch, **TOKENIZER, runs=str(distilled.path.parent)).run
    assert "encoder_start" not in plain.identity and plain.name != runs[0].name


def test_a_finished_tokenizer_does_without_the_distilled_run(distilled, tmp_path):
    shutil.copytree(distilled.path / "encoder", tmp_path / "encoder")
    run = train(**TOKENIZER, runs=str(tmp_path / "runs"), encoder_start=str(tmp_path / "encoder"))
    shutil.rmtree(tmp_path / "encoder")
    image = torch.zeros(1, 3, 32, 32)
    assert Tokenizer.from_pretrained(run.path / "tokenizer")(image)[0].shape == image.shape
    assert "encoder_start" not in json.loads((run.path / "tokenizer" / "config.json").read_text())


def test_another_size_is_refused_with_both(distilled, tmp_path):
    for change, words in (
        ({"preset": "mini"}, ['"embed_dim": 64', '"embed_dim": 160']),
        ({"patch_size": 4}, ["patches of 8 px", "patches of 4 px"]),
        ({"image_size": 64, "patch_size": 8, "dim": 4}, ["for 32 px", "for 64 px"]),
        ({"encoder": "vit_tiny_patch16_224"}, ["vit_small_patch14_dinov2.lvd142m", "vit_tiny_patch16_224"]),
    ):
        with pytest.raises(ValueError) as error:
            train(**TOKENIZER, **change, runs=str(tmp_path / "runs"), encoder_start=str(distilled.path))
        for word in (*words, "distil one"):
            assert word in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_damaged_and_other_folders_are_refused(distilled, tmp_path):
    tokenizer = Tokenizer.from_preset("tiny", tokens=4)
    shutil.copytree(distilled.path / "encoder", tmp_path / "encoder")
    weights = tmp_path / "encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(ValueError, match="damaged or was replaced"):
        start_encoder(tokenizer, tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="holds no distilled encoder.*network"):
        start_encoder(tokenizer, tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=f"encoder_start='no' is no folder.*Distilled there: .*{distilled.name}"):
        find_encoder("no", str(distilled.path.parent))
    with pytest.raises(ValueError, match="None is distilled there yet"):
        find_encoder("no", str(tmp_path))


def test_two_starts_are_one_too_many(tmp_path):
    with pytest.raises(ValueError, match="pretrained=True and encoder_start='x'"):
        train(preset="s", tokens=4, image_size=256, pretrained=True, encoder_start="x", runs=str(tmp_path / "runs"))
    with pytest.raises(ValueError, match="encoder_start='' names nothing"):
        train(encoder_start="", runs=str(tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()
