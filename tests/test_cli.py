"""The command `softvq`: its help, what it writes, what it refuses, and that it says so in one line."""

import inspect
import json
import os
import re
import signal
from dataclasses import fields

import click
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_runs import NAMES, content, randomised

from softvq_lib import __version__, coding, evaluate, pictures, results, sampling
from softvq_lib.cli import cli
from softvq_lib.data import DataConfig, open_dataset, validation_batches
from softvq_lib.evaluation.export import to_uint8
from softvq_lib.tokenizers import Tokenizer
from softvq_lib.training import trainer

IMAGES = 10


@pytest.fixture
def tokenizer(tiny_runs):
    return Tokenizer.from_pretrained(tiny_runs / "tok" / "tokenizer")


def images_of(folder, tokenizer):
    """All images of a folder in the order of their names, as the tokenizer sees them."""
    data = open_dataset(DataConfig(str(folder)), 16)
    batches = [next(validation_batches(part, image_size=16, batch_size=64)) for part in (data.train, data.validation)]
    images = torch.cat([batch.images for batch in batches])
    names = [part.name(i) for part in (data.train, data.validation) for i in range(len(part))]
    return images[np.argsort(names)], sorted(names)


# -- help ------------------------------------------------------------------------------------------------------------


def test_help_and_version_teach(softvq):
    code, out, _ = softvq("--help")
    assert code == 0 and all(word in out for word in (*cli.commands, "Exit codes", "130", "--overwrite"))
    assert softvq("--version")[:2] == (0, f"softvq, version {__version__}\n")
    for name in cli.commands:
        code, out, err = softvq(name, "--help")
        assert code == 0 and "Examples:" in out and f"softvq {name}" in out and err == ""


@pytest.mark.parametrize(
    ("command", "function", "config"),
    [
        ("encode", coding.encode_images, DataConfig),
        ("decode", coding.decode_latents, None),
        ("sample", sampling.sample_pictures, sampling.SampleExperimentConfig),
        ("evaluate", None, evaluate.EvaluateConfig),
    ],
)
def test_the_defaults_that_help_tells_are_the_functions(command, function, config):
    defaults = {field.name: field.default for field in fields(config)} if config else {}
    defaults |= {name: p.default for name, p in inspect.signature(function).parameters.items()} if function else {}
    told = 0
    for option in cli.commands[command].params:
        text = re.search(r"\[default: (.*)\]", getattr(option, "help", None) or "")
        if text and defaults.get(option.name) is not None:
            told += 1
            assert text[1].split(" ")[0] == str(defaults[option.name]), option.name
        known = option.name in defaults or option.name in (
            "out",
            "overwrite",
            "images",
            "file",
            "given",
            "help",
            "debug",
        )
        assert known, f"{option.name} is no parameter of the function"
    assert told >= 2


def test_wrong_usage_is_told_with_the_nearest_name(refused):
    assert "did you mean 'encode'?" in refused("encod")
    assert "Missing argument 'TOKENIZER'" in refused("encode")
    assert "--batch-size" in refused("encode", "tok", "x", "-o", "y", "--batch-sise", 3)
    assert "not a valid integer" in refused("encode", "tok", "x", "-o", "y", "--batch-size", "many")
    assert "batch_size=0 is not allowed" in refused("encode", "tok", "digits", "-o", "y", "--batch-size", 0)
    assert "IMAGES is missing" in refused("evaluate", "tok")
    assert "GENERATOR is missing" in refused("sample", "-o", "y")
    assert "did you mean 'guidance_scale'?" in refused("sample", "gen", "-o", "y", "-p", "guidance_scal", 2)


def test_an_error_that_nobody_foresaw_is_one_line_too(softvq, refused, monkeypatch):
    def fail(*_):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("softvq_lib.describing.list_runs", fail)
    assert refused("info", code=1) == "error: RuntimeError: two lines (not foreseen: --debug shows where)"
    with pytest.raises(RuntimeError):
        softvq("info", "--debug")
    with pytest.raises(RuntimeError):
        softvq("--debug", "info")


# -- encode and decode -----------------------------------------------------------------------------------------------


def test_images_go_to_latents_and_back(softvq, photos, tokenizer, tmp_path):
    code, out, err = softvq("encode", "tok", photos, "-o", tmp_path / "z")
    assert (code, err) == (0, "") and out.startswith("10 images in ") and "4 tokens x 3 channels, float32" in out
    images, names = images_of(photos, tokenizer)
    with torch.no_grad():
        z = tokenizer.encode(images).z
        decoded = to_uint8(tokenizer.decode(z).clamp(-1, 1)).numpy()
    stored = load_file(tmp_path / "z" / "shard-00000.safetensors")
    assert torch.equal(stored["latents"][:, 0], z) and stored["indices"].tolist() == list(range(IMAGES))
    assert stored["labels"].tolist() == [0] * 5 + [1] * 5
    assert json.loads((tmp_path / "z" / "latents.json").read_text())["status"] == "finished"
    assert json.loads((tmp_path / "z" / "names.json").read_text()) == names

    code, out, _ = softvq("decode", "tok", tmp_path / "z", "-o", tmp_path / "back")
    assert code == 0 and out == f"10 pictures in {tmp_path / 'back'}\n"
    for name, pixels in zip(names, decoded, strict=True):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "back" / name)), pixels)
    assert json.loads((tmp_path / "back" / "pictures.json").read_text())["status"] == "finished"
    assert len(open_dataset(DataConfig(str(tmp_path / "back")), 16).classes) == 2

    # Latents that any program wrote; of a cache's shard the image is decoded, not its mirror image.
    save_file({"latents": z + 0}, tmp_path / "any.safetensors")
    assert softvq("decode", "tok", tmp_path / "any.safetensors", "-o", tmp_path / "numbers")[0] == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "numbers" / "00003.png")), decoded[3])
    assert softvq("encode", "tok", photos, "-o", tmp_path / "both", "--flips")[0] == 0
    shard = tmp_path / "both" / "shard-00000.safetensors"
    assert softvq("decode", "tok", shard, "-o", tmp_path / "shard")[0] == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "shard" / "00003.png")), decoded[3])


def test_splits_are_those_of_training(softvq, photos, tmp_path):
    for split, count in (("all", 10), ("train", 9), ("validation", 1)):
        assert softvq("encode", "tok", photos, "-o", tmp_path / split, "--split", split)[1].startswith(
            f"{count} images"
        )
    softvq("decode", "tok", tmp_path / "validation", "-o", tmp_path / "held_out")
    held_out = open_dataset(DataConfig(str(photos)), 16).validation.name(0)
    assert (tmp_path / "held_out" / held_out).is_file()
    assert softvq("encode", "tok", "digits", "-o", tmp_path / "digits", "--split", "validation")[0] == 0
    assert not (tmp_path / "digits" / "names.json").exists()


def test_two_images_whose_names_differ_in_the_ending_alone(softvq, photos, tmp_path):
    Image.open(photos / "cat" / "0.png").save(photos / "cat" / "0.jpg")
    softvq("encode", "tok", photos, "-o", tmp_path / "z")
    softvq("decode", "tok", tmp_path / "z", "-o", tmp_path / "back")
    assert {p.name for p in (tmp_path / "back" / "cat").iterdir()} == {"0.jpg.png", "0.png.png"} | {
        f"{n}.png" for n in (2, 4, 6, 8)
    }


def test_broken_images_stop_it_or_are_left_out(softvq, refused, photos, tmp_path):
    (photos / "cat" / "2.png").write_bytes(b"no picture")
    (photos / "dog" / "3.png").write_bytes((photos / "dog" / "3.png").read_bytes()[:60])
    said = refused("encode", "tok", photos, "-o", tmp_path / "z")
    assert "2 of 10 images found unreadable" in said and "cat/2.png (not a picture" in said and "dog/3.png" in said
    assert json.loads((tmp_path / "z" / "latents.json").read_text())["status"] == "partial"
    assert "is unfinished" in refused("decode", "tok", tmp_path / "z", "-o", tmp_path / "back")
    code, out, err = softvq("encode", "tok", photos, "-o", tmp_path / "z", "--unreadable", 0.2)
    assert code == 0 and out.startswith("8 images") and "2 unreadable left out" in out
    assert "warning: unreadable image left out: cat/2.png" in err
    softvq("decode", "tok", tmp_path / "z", "-o", tmp_path / "back")
    assert "cat/2.png" not in content(tmp_path / "back") and len(content(tmp_path / "back")) == 8 + 1
    assert "unreadable=2.0 is a share" in refused("encode", "tok", photos, "-o", tmp_path / "y", "--unreadable", 2)


def test_a_model_or_data_that_are_not_there(refused, photos, tmp_path):
    said = refused("encode", "tak", photos, "-o", tmp_path / "z")
    assert "did you mean 'tok'?" in said and "Trained there: tok" in said
    assert "did you mean 'gen'?" in refused("sample", "gan", "-o", tmp_path / "z")
    assert "no such folder" in refused("encode", "tok", tmp_path / "nowhere", "-o", tmp_path / "z")
    assert "there is no" in refused("decode", "tok", tmp_path / "nowhere", "-o", tmp_path / "z")
    assert "did you mean 'tok'?" in refused("info", "tik")
    assert not (tmp_path / "z").exists()


def test_latents_that_do_not_fit_are_not_decoded(softvq, refused, photos, tmp_path):
    out = ("-o", tmp_path / "back")
    softvq("encode", "tok", photos, "-o", tmp_path / "z")
    file = tmp_path / "x.safetensors"
    for tensors, words in (
        ({"latents": torch.zeros(2, 4, 5)}, "4 tokens x 5 channels, but this tokenizer decodes 4 x 3"),
        ({"latents": torch.zeros(2, 12)}, "latents (2, 12): a tensor `latents` (n, l, d)"),
        ({"latents": torch.zeros(2, 4, 3).int()}, "of floats is wanted"),
        ({"z": torch.zeros(2, 4, 3)}, "holds z (2, 4, 3)"),
        ({"latents": torch.full((2, 4, 3), torch.nan)}, "the latents of 00000.png are not finite"),
    ):
        save_file(tensors, file)
        assert words in refused("decode", "tok", file, *out)
    file.write_bytes(b"torn")
    assert "no whole safetensors file" in refused("decode", "tok", file, *out)
    other = randomised(Tokenizer.from_preset("tiny", tokens=4, dim=3, image_size=16, patch_size=8), std=0.2)
    other.save_pretrained(tmp_path / "other")
    assert "latents of another tokenizer" in refused("decode", tmp_path / "other", tmp_path / "z", *out)
    Tokenizer.from_preset("tiny", tokens=8, dim=3, image_size=16).save_pretrained(tmp_path / "more")
    assert "4 tokens x 3 channels, but this tokenizer decodes 8 x 3" in refused(
        "decode", tmp_path / "more", tmp_path / "z", *out
    )
    shard = tmp_path / "z" / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    assert "is damaged: sha256" in refused("decode", "tok", tmp_path / "z", *out)
    assert not any((tmp_path / "back").rglob("*.png"))


# -- train -----------------------------------------------------------------------------------------------------------


TRAIN = (
    "-p",
    "pca",
    "false",
    "-p",
    "limit",
    48,
    "-p",
    "tokens",
    4,
    "-p",
    "val_images",
    16,
    "-p",
    "batch_size",
    8,
    "-p",
    "steps",
    12,
)


def test_ctrl_c_saves_the_step_and_training_goes_on_to_the_same_bytes(softvq, tmp_path, monkeypatch):
    command = ("train", "train_tokenizer", *TRAIN, "-p", "log_every", 3, "-p", "run", "mine", "-p", "runs")
    code, out, _ = softvq(*command, tmp_path / "whole")
    assert code == 0 and "PSNR, dB" in out and f"run mine: {tmp_path / 'whole' / 'mine'}" in out
    append, handler = trainer.Trainer._append, signal.getsignal(signal.SIGINT)

    pressed = []

    def interrupting(self, name, row):
        append(self, name, row)
        if self.step == 6 and not pressed:
            pressed.append(True)
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_append", interrupting)
        code, out, err = softvq(*command, tmp_path / "cut")
    assert (code, out) == (130, "") and "finishing the step and saving" in err and "stopped after step 6" in err
    assert signal.getsignal(signal.SIGINT) is handler  # a shell ignores it for what it starts in the background
    code, out, _ = softvq(*command, tmp_path / "cut")
    assert code == 0 and json.loads((tmp_path / "cut" / "mine" / "manifest.json").read_text())["resumed_at"] == [6]
    for name in ("tokenizer/model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "cut" / "mine" / name).read_bytes() == (tmp_path / "whole" / "mine" / name).read_bytes()
    listed = softvq("info", "--runs", tmp_path / "cut")[1].splitlines()
    assert listed[0].split() == ["run", "status", "steps", "seconds", "data"] and listed[1].split()[:3] == [
        "mine",
        "finished",
        "12",
    ]
    assert "tokenizer tiny, softvq" in softvq("info", "mine", "--runs", tmp_path / "cut")[1]


def test_train_tells_mistakes(refused, tmp_path):
    (tmp_path / "x.yaml").write_text("tokens: 4")
    said = refused("train", tmp_path / "x.yaml", "--experiment", "train_tokeniser")
    assert "did you mean 'train_tokenizer'?" in said
    assert "did you mean 'tokens'?" in refused("train", "train_tokenizer", "-p", "tokenz", 4)
    assert "requires 2 arguments" in refused("train", "train_tokenizer", "-p", "tokens")


# -- sample, evaluate, info ------------------------------------------------------------------------------------------


def test_samples_by_class_are_those_of_the_grid(softvq, refused, tmp_path):
    steps = ("-p", "sample_steps", 2)
    code, out, _ = softvq(
        "sample", "gen", "-o", tmp_path / "s", "--classes", "star,0", "--each", 3, "--seed", 5, *steps
    )
    assert code == 0 and out.startswith("6 pictures in ")
    found = sampling.sample_generator(generator="gen", classes="star,0", columns=3, sample_seed=5, sample_steps=2)
    pixels = to_uint8(found.grid).numpy()
    for number, (name, column) in enumerate((name, column) for name in ("star", "circle") for column in range(3)):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "s" / name / f"{column:05d}.png")), pixels[number])
    before = content(tmp_path / "s")
    # All classes, and more of each, where the first ones stay.
    assert softvq("sample", "gen", "-o", tmp_path / "s", "--each", 4, "--seed", 5, *steps)[0] == 0
    made = content(tmp_path / "s")
    assert {path.name for path in (tmp_path / "s").iterdir() if path.is_dir()} == set(NAMES) and len(made) == 4 * 8 + 1
    assert all(made[name] == before[name] for name in before if name.endswith(".png"))
    assert "seed: 5 there, 6 asked for" in refused("sample", "gen", "-o", tmp_path / "s", "--seed", 6, *steps)
    assert "'stir' is not known, did you mean 'star'?" in refused(
        "sample", "gen", "-o", tmp_path / "t", "--classes", "stir"
    )
    code, out, _ = softvq("sample", "gen", "-o", tmp_path / "export", "--export", 16, *steps)
    assert code == 0 and "exported 16 images" in out and (tmp_path / "export" / "samples.json").exists()
    assert "leave them out with --export" in refused(
        "sample", "gen", "-o", tmp_path / "e", "--export", 16, "--overwrite"
    )


def test_names_of_classes_become_folders():
    assert pictures.class_folders(["n01 gold fish, Carassius", "a/b", "a:b", "..", "été"]) == [
        "n01_gold_fish",
        "a_b",
        "a_b_2",
        "3",
        "été",
    ]
    assert pictures.png_names(["a/x.jpg", "a/x.png", "b.tar.jpg"]) == ["a/x.jpg.png", "a/x.png.png", "b.tar.png"]


def test_evaluate_prints_the_numbers_and_records_them(softvq, refused, tmp_path):
    options = ("--limit", 10, "--perceptual", "none", "-p", "bias", "false")
    code, out, err = softvq("evaluate", "tok", "shapes", *options, "--results", tmp_path)
    assert code == 0 and "tok: reconstructions, shapes validation" in out and "psnr" in out and "n = 10" in out
    rows = results.read(tmp_path / "evaluate.jsonl")
    assert {"psnr", "ssim"} <= {row["metric"] for row in rows} and rows[0]["run"] == "tok"
    file = tmp_path / "x.yaml"
    file.write_text("tokenizer: tok\ndataset: shapes\nlimit: 12\nperceptual: none\nbias: false\n")
    assert "n = 10" in softvq("evaluate", "-f", file, "--limit", 10)[1], "what is given goes before the file"
    assert "did you mean 'efflite0'?" in refused("evaluate", "tok", "shapes", "--extractor", "eflite0")


def test_info_tells_what_lies_there(softvq, photos, tiny_runs, tmp_path):
    softvq("encode", "tok", photos, "-o", tmp_path / "z")
    softvq("decode", "tok", tmp_path / "z", "-o", tmp_path / "back")
    for name, words in (
        (tmp_path / "z", ("status       finished", "10 of 10", "4 tokens x 3 channels")),
        (tmp_path / "back", ("decoded", "10 of 10", "finished")),
        (tiny_runs / "tok" / "tokenizer", ("tokenizer tiny, softvq", "16 x 16 pixels", "4 tokens x 3 channels")),
        (tiny_runs / "gen" / "generator", ("generator sit tiny", "classes      8", "tokenizer    tok")),
    ):
        code, out, _ = softvq("info", name)
        assert code == 0 and all(word in out for word in words), out


def test_the_commands_are_click_commands_with_short_help():
    assert isinstance(cli, click.Group) and all(
        command.get_short_help_str(70).endswith(".") for command in cli.commands.values()
    )
    assert not any("..." in command.get_short_help_str(62) for command in cli.commands.values())
