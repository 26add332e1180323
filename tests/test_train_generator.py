"""Training generators on cached latents: learning, resumption, micro-batches, processes, latents, identity."""

import json
import logging
import shutil
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from faults import deterministic
from safetensors.torch import load_file
from test_faults import pictures
from test_processes import assert_close_metrics, parameter_file, two_processes
from test_training import Interrupted

from softvq_lib.data.latents import LatentCache, tokenizer_hash
from softvq_lib.features import build_features
from softvq_lib.generators.loading import load_generator
from softvq_lib.tokenizers import Tokenizer
from softvq_lib.train import main, read_parameters
from softvq_lib.training import TrainConfig, train
from softvq_lib.training import generator as trainer
from softvq_lib.training.generator import GeneratorTrainer, find_tokenizer, train_generator
from softvq_lib.training.run import open_run

SMALL = {
    "dataset": "digits",
    "limit": 64,
    "batch_size": 8,  # eight batches an epoch
    "val_images": 16,
    "log_every": 2,
    "checkpoint_every": 100,
}
SAMPLED = {
    "sit": {"generator": "sit", "sample_steps": 2},
    "dit": {"generator": "dit", "solver": "ddim", "sample_steps": 2},
    "mar": {"generator": "mar", "buffer": 4, "sample_steps": 2, "head_solver": "ddim", "head_steps": 2},
}
ALIGNED = {"align_teacher": "efflite0", "align_block": 2}


def tokenizer_folder(folder, **more):
    """A tokenizer of 4 tokens, two steps old."""
    settings = {**SMALL, "tokens": 4, "steps": 2, "workers": 0, **more}
    return train(**settings, runs=str(folder)).path / "tokenizer"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def other(tokenizer, tmp_path_factory):
    """A tokenizer that differs in one weight."""
    changed = Tokenizer.from_pretrained(tokenizer)
    with torch.no_grad():
        next(changed.parameters()).view(-1)[0] += 1
    changed.save_pretrained(folder := tmp_path_factory.mktemp("other") / "tokenizer")
    return folder


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """The projector to a teacher has five million parameters, which would take most of the time."""
    monkeypatch.setattr("softvq_lib.generators.alignment._HIDDEN", 64)


def small(tmp_path, tokenizer, kind="sit", **more):
    """Parameters of a run of a second, on digits."""
    return {**SMALL, **SAMPLED[kind], "tokenizer": str(tokenizer), "runs": str(tmp_path), **more}


def at_step(monkeypatch, step, act):
    """Have `act(trainer)` called before a step is made."""
    update = GeneratorTrainer._update

    def updated(self, *arguments):
        if self.step == step:
            act(self)
        return update(self, *arguments)

    monkeypatch.setattr(GeneratorTrainer, "_update", updated)


def unstarted(monkeypatch, **parameters):
    """The trainer that `train_generator` would set to work."""
    made = []
    with monkeypatch.context() as patch:
        patch.setattr(GeneratorTrainer, "fit", lambda self: made.append(self))
        train_generator(**parameters)
    return made[0]


def scatter(model, std=0.1):
    """Give every parameter random values: what begins as 0 hides the rest."""
    draws = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std, generator=draws)


def folders(runs, what="digits-*"):
    return sorted(path.name for path in runs.glob(what))


# -- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SAMPLED)
def test_it_learns_and_a_finished_run_is_loaded(kind, tokenizer, tmp_path, caplog):
    run = train_generator(**small(tmp_path, tokenizer, kind, steps=24))
    assert run.trained == 24 and run.finished
    held_out = [row["val_loss"] for row in run.metrics if "val_loss" in row]
    assert len(held_out) == 6 and held_out[-1] < 0.75 * held_out[0]
    losses = [row["loss"] for row in run.metrics if "loss" in row]
    assert len(losses) == 12 and sum(losses[-4:]) < 0.75 * sum(losses[:4])
    assert list(run.snapshots) == [2, 3, 6, 12, 24]
    assert {"commit", "code", "packages", "device_name", "precision", "data"} <= set(run.manifest)
    _check_saved(run, tokenizer)
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file()}
    shutil.rmtree(tmp_path / "latents")  # nobody needs them any more
    with caplog.at_level(logging.INFO, "softvq_lib"):
        again = train_generator(**small(tmp_path, tokenizer, kind, steps=24, log_every=3, guidance_scale=2.0))
    assert again.trained == 0 and again.path == run.path and "not trained again" in caplog.text
    assert before == {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file()}
    assert not (tmp_path / "latents").exists()


def _check_saved(run, tokenizer):
    """The average of the weights is saved, with what the latents are."""
    held = load_file(run.path / "checkpoints" / "step-00000024.safetensors")
    assert {name.split(".")[0] for name in held} == {"model", "ema", "model_optimizer"}
    loaded = load_generator(run.path / "generator")
    weights = loaded.model.state_dict()
    assert all(torch.equal(tensor, held[f"ema.{name}"]) for name, tensor in weights.items())
    assert not all(torch.equal(tensor, held[f"model.{name}"]) for name, tensor in weights.items())
    assert loaded.tokenizer == str(tokenizer) and loaded.tokenizer_hash == run.identity["tokenizer"]
    assert loaded.tokenizer_hash == tokenizer_hash(Tokenizer.from_pretrained(tokenizer))


def test_alignment_is_learned_and_measured(tokenizer, tmp_path):
    run = train_generator(**small(tmp_path, tokenizer, steps=10, lr=3e-3, align_weight=2.0, **ALIGNED))
    assert run.identity["align_teacher"] == "efflite0" and run.identity["align_width"] == 320
    rows = [row for row in run.metrics if "val_loss" in row]
    for row in rows:
        assert row["val_loss"] == pytest.approx(row["val_denoising"] + 2 * row["val_alignment"], abs=1e-5)
    assert abs(rows[0]["val_alignment"]) < 0.2 and rows[-1]["val_alignment"] < -0.6
    assert load_generator(run.path / "generator").model.config.align_block == 2


# -- interruptions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("dit", {**ALIGNED, "label_dropout": 0.5, "flip": True}),
        ("mar", {"mask_per_sample": True, "dropout": 0.3, "flip": True}),
    ],
)
def test_an_interrupted_run_ends_like_an_unbroken_one(kind, more, tokenizer, tmp_path, monkeypatch):
    """All files: latents, checkpoints with weights, average and optimiser, metrics, pictures, the generator.

    `faults.py` kills SiT.
    """
    settings = {"steps": 6, "checkpoint_every": 2, "log_every": 3, "keep": 1, **more}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    train_generator(**small(tmp_path / "a", tokenizer, kind, **settings))

    def stop(self):
        raise Interrupted

    with monkeypatch.context() as patch:
        at_step(patch, 5, stop)
        with pytest.raises(Interrupted):
            train_generator(**small(tmp_path / "b", tokenizer, kind, **settings))
    resumed = train_generator(**small(tmp_path / "b", tokenizer, kind, **settings))
    assert resumed.trained == 2 and resumed.manifest["resumed_at"] == [4]
    whole, broken = deterministic(tmp_path / "a"), deterministic(tmp_path / "b")
    assert {"metrics.jsonl", "step-00000006.safetensors", "model.safetensors", "step-00000006.png"} <= {
        name.rsplit("/", 1)[1] for name in whole
    }
    assert whole.keys() == broken.keys()
    assert [name for name in whole if whole[name] != broken[name]] == []


# -- micro-batches and processes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("sit", {"label_dropout": 0.5, **ALIGNED}),
        ("dit", {"label_dropout": 0.5}),
        ("mar", {"label_dropout": 0.5, "dropout": 0.0}),
        ("mar", {"mask_per_sample": True, "dropout": 0.0}),
    ],
)
def test_micro_batches_add_up_to_the_batch(kind, more, tokenizer, tmp_path, monkeypatch):
    """Of MAR, parts of a batch have one share of masked tokens too, where it is drawn once for the batch."""
    unfinished = unstarted(monkeypatch, **small(tmp_path, tokenizer, kind, steps=4, precision="fp32", **more))
    scatter(unfinished.bare)
    batch = next(unfinished.batches(0))
    found = {}
    for size in (8, 4, 3):
        unfinished.micro_batch = size
        values = {name: float(term) for name, term in unfinished._accumulate(batch).items()}
        gradients = [parameter.grad.flatten() for parameter in unfinished.bare.parameters()]
        found[size] = values, torch.cat(gradients)
        unfinished.bare.zero_grad(set_to_none=True)
    values, gradient = found[8]
    for size in (4, 3):
        assert found[size][0] == pytest.approx(values, rel=1e-5, abs=1e-6)
        assert (found[size][1] - gradient).norm() < 1e-5 * gradient.norm()


def test_two_processes_train_what_one_would_and_the_notebook_finds_it(tokenizer, tmp_path, capsys):
    more = {"steps": 3, "log_every": 1, "flip": True, "dropout": 0.0, "columns": 2, "precision": "fp32"}
    values = {**small(tmp_path / "two", tokenizer, "mar"), **more}
    text = "".join(f"{name}: {json.dumps(value)}\n" for name, value in values.items())
    path = parameter_file(tmp_path, text, "train_generator")
    done = two_processes("-m", "softvq_lib.train", str(path))
    assert done.stdout.count("mar tiny, 4 tokens x 16") == 1, "the first process alone reports"
    main([str(path)])
    assert capsys.readouterr().out.endswith(done.stdout.splitlines()[-1] + "\n")
    del values["columns"]
    run = train_generator(**values)
    assert run.trained == 0 and run.manifest["processes"] == 2 and run.manifest["distribution"] == "MULTI_CPU"
    alone = train_generator(**values | {"runs": str(tmp_path / "one")})
    assert alone.trained == 3 and alone.manifest["processes"] == 1 and alone.name == run.name
    assert_close_metrics(run.metrics, alone.metrics)
    assert "columns" in read_parameters(path) and "columns" not in run.identity


@pytest.mark.parametrize("kind", ["sit", "mar"])
def test_gradient_checkpointing_computes_the_same_twice(kind, tokenizer, tmp_path, monkeypatch):
    """With MAR's dropout."""
    from timm.models.vision_transformer import Attention as OfMAR

    from softvq_lib.generators.transformer import Attention as OfSiT

    passes = []
    attention = OfSiT if kind == "sit" else OfMAR
    forward = attention.forward

    def counting(self, *arguments, **options):
        passes.append(torch.is_grad_enabled())
        return forward(self, *arguments, **options)

    monkeypatch.setattr(attention, "forward", counting)
    found, trained = [], []
    for enable in (False, True):
        more = {"precision": "fp32", "gradient_checkpointing": enable}
        unfinished = unstarted(monkeypatch, **small(tmp_path, tokenizer, kind, **more))
        scatter(unfinished.bare)
        passes.clear()
        unfinished._accumulate(next(unfinished.batches(0)))
        trained.append(sum(passes))
        found.append([parameter.grad for parameter in unfinished.bare.parameters()])
    assert trained == [6, 12]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sit", "mar"])
def test_compiled_nets_compute_the_same(kind, tokenizer, tmp_path):
    """Needs a C++ compiler."""
    more = {"steps": 2, "log_every": 1, "precision": "fp32", **({"dropout": 0.0} if kind == "mar" else {})}
    plain, compiled = (
        train_generator(**small(tmp_path / str(way), tokenizer, kind, **more, compile=way)) for way in (False, True)
    )
    for ours, theirs in zip(plain.metrics, compiled.metrics, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-3, abs=1e-4)


# -- latents ---------------------------------------------------------------------------------------------------------


def epoch(unfinished):
    """The batches of the first epoch."""
    batches = unfinished.batches(0)
    return [next(batches) for _ in range(8)]


@pytest.mark.parametrize("how", ["scalar", "channel"])
def test_the_net_sees_normalised_latents_and_the_generator_knows_how(how, tokenizer, tmp_path, monkeypatch):
    unfinished = unstarted(monkeypatch, **small(tmp_path, tokenizer, normalise=how, steps=8))
    x = torch.cat([batch.latents for batch in epoch(unfinished)]).flatten(0, 1)  # (64 l, d): every image once
    assert len(x) == 64 * 4
    for axis in (None, 0) if how == "channel" else (None,):
        mean, std = x.mean(axis), x.std(axis, correction=0)
        torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-5)
        torch.testing.assert_close(std, torch.ones_like(std), rtol=0, atol=1e-5)
    if how == "scalar":
        assert x.std(0, correction=0).std() > 0.01
    unfinished.export(unfinished.measured)
    loaded, cache = load_generator(unfinished.run.path / "generator"), unfinished.cache
    stored, x = torch.stack([cache[item][0][0] for item in range(64)]), cache.batch(range(64), normalise=how)
    assert torch.equal(loaded.normalise(stored), x) and torch.equal(loaded.denormalise(x), cache.denormalise(x, how))
    torch.testing.assert_close(loaded.denormalise(x), stored, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        images = unfinished.tokenizer.decode(stored).clamp(-1, 1)
    torch.testing.assert_close(unfinished.decode(x), images, rtol=1e-4, atol=1e-5)


def test_a_channel_that_never_changes_is_normalised_and_saved(tmp_path, monkeypatch):
    constant = Tokenizer.from_preset("tiny", quantizer="ae", tokens=4)
    scatter(constant, 0.5)
    with torch.no_grad():
        constant.to_latent.weight[3], constant.to_latent.bias[3] = 0, 0.25
    constant.save_pretrained(tmp_path / "tokenizer")
    unfinished = unstarted(monkeypatch, **small(tmp_path, tmp_path / "tokenizer", normalise="channel"))
    assert all((batch.latents[..., 3] == 0).all() for batch in epoch(unfinished))
    unfinished.export(unfinished.measured)
    loaded = load_generator(unfinished.run.path / "generator")
    assert (loaded.mean[3], loaded.std[3]) == (0.25, 1) and (loaded.std[:3] != 1).all()


def test_images_are_mirrored_only_if_asked_for(tokenizer, tmp_path, monkeypatch):
    for flip in (False, True):
        unfinished = unstarted(monkeypatch, **small(tmp_path, tokenizer, steps=8, flip=flip))
        flips = torch.cat([batch.flips for batch in epoch(unfinished)])
        assert 16 < flips.sum() < 48 if flip else not flips.any()
        assert unfinished.cache[0][0].shape == (1 + flip, 4, 16)
    assert len(folders(tmp_path, "latents/*")) == 2


def test_a_damaged_cache_is_mended_with_a_message(tokenizer, tmp_path, caplog):
    train_generator(**small(tmp_path, tokenizer, steps=1))
    (folder,) = (tmp_path / "latents").iterdir()
    (shard,) = folder.glob("shard-*.safetensors")
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with caplog.at_level(logging.WARNING, "softvq_lib"):
        run = train_generator(**small(tmp_path, tokenizer, steps=2))
    assert f"{shard} is truncated or torn: {len(whole)} bytes expected, {len(whole) // 2} found" in caplog.text
    assert run.trained == 2 and shard.read_bytes() == whole and len(folders(tmp_path, "latents/*")) == 1


def test_latents_lie_where_they_are_asked_for_and_are_made_as_asked(tokenizer, tmp_path, monkeypatch):
    asked, encode = [], trainer.encode_dataset
    monkeypatch.setattr(trainer, "encode_dataset", lambda *a, **o: asked.append(o["workers"]) or encode(*a, **o))
    more = {"latents": str(tmp_path / "elsewhere"), "workers": 0}
    run = unstarted(monkeypatch, **small(tmp_path / "runs", tokenizer, **more)).run
    assert folders(tmp_path / "runs", "*") == [run.name] and len(folders(tmp_path / "elsewhere")) == 1
    assert asked == [0]


# -- identity --------------------------------------------------------------------------------------------------------


def test_identity_is_what_the_outcome_depends_on(tokenizer, other, tmp_path, monkeypatch):
    class Named(Exception):
        pass

    def opened(*arguments):
        raise Named(open_run(*arguments))

    monkeypatch.setattr(trainer, "open_run", opened)
    monkeypatch.setattr(trainer, "find_tokenizer", cache(find_tokenizer))
    monkeypatch.setattr(trainer, "build_features", cache(build_features))

    def run(**more):
        with pytest.raises(Named) as found:
            train_generator(**small(tmp_path, tokenizer, steps=4) | more)
        return found.value.args[0]

    def name(**more):
        return run(**more).name

    base = name()
    shutil.copytree(tokenizer.parent, tmp_path / "mine")
    same = [
        *({"tokenizer": there} for there in ("mine", str(tmp_path / "mine"), str(tmp_path / "mine" / "tokenizer"))),
        {"latents": str(tmp_path / "elsewhere"), "micro_batch": 2, "gradient_checkpointing": True, "device": "cpu"},
        {"val_images": 3, "log_every": 1, "checkpoint_every": 1, "keep": 1, "workers": 0},
        {"solver": "heun", "sample_steps": 3, "guidance_scale": 3.0, "guidance_high": 0.7},
        {"tokens": 4, "dim": 16, "classes": 10, "path": "linear", "normalise": "scalar", "time_scale": 1.0},
    ]
    assert [name(**more) for more in same] == [base] * len(same)
    others = [
        *({"seed": 1}, {"lr": 2e-3}, {"steps": 5}, {"batch_size": 4}, {"limit": 63}, {"flip": True}),
        *({"normalise": "channel"}, {"label_dropout": 0.2}, {"classes": 11}, {"path": "gvp"}, {"ema": 0.5}),
        *({"size": "mini"}, {"generator": "dit", "solver": None}, {"tokenizer": str(other)}),
        *(ALIGNED, {**ALIGNED, "align_block": 3}, {**ALIGNED, "align_teacher": "efflite1"}),
    ]
    names = [base, *(name(**more) for more in others)]
    assert len(set(names)) == len(names)
    assert base.startswith("digits-sit-tiny-4x16-") and "digits-sit-mini-4x16-" in " ".join(names)
    assert not set(TrainConfig.NOT_IDENTITY) & set(run().identity)
    assert folders(tmp_path, "*") == ["mine"]


def test_another_tokenizer_has_latents_and_runs_of_its_own(tokenizer, other, tmp_path, monkeypatch):
    runs = [unstarted(monkeypatch, **small(tmp_path, folder, steps=1)).run for folder in (tokenizer, other)]
    assert runs[0].name != runs[1].name and folders(tmp_path, "digits-*") == sorted(run.name for run in runs)
    caches = [LatentCache.open(folder) for folder in (tmp_path / "latents").iterdir()]
    assert len(caches) == 2 and {cache.header["tokenizer"] for cache in caches} == {
        run.identity["tokenizer"] for run in runs
    }
    with pytest.raises(ValueError, match="another configuration.*tokenizer: "):
        train_generator(**small(tmp_path, other, steps=1, run=runs[0].name))


def test_without_a_tokenizer_the_one_of_the_same_data_is_trained(tokenizer, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(trainer, "train_tokenizer", lambda **o: asked.append(o) or SimpleNamespace(name=str(tokenizer)))
    settings = pictures(tmp_path / "images", 12)
    more = {"tokenizer": None, "image_column": "image", "device": "cpu"}
    unfinished = unstarted(monkeypatch, **small(tmp_path / "runs", tokenizer, steps=1) | settings | more)
    assert unfinished.latent.tokenizer == str(tokenizer)
    (options,) = asked
    given = {"dataset": settings["dataset"], "runs": str(tmp_path / "runs"), "workers": 0, **more}
    assert {name: value for name, value in options.items() if value} == {name: v for name, v in given.items() if v}
