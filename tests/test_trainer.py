"""The engine under a run: micro-batches, memory, numbers that are not finite, changed settings, the teacher."""

import json
import logging

import pytest
import torch
from test_faults import pictures
from test_training import at_step, interrupt, same_files, small, unstarted

from softvq_lib.losses import RECONSTRUCTION, adversarial
from softvq_lib.losses.alignment import Alignment
from softvq_lib.losses.networks import Networks
from softvq_lib.losses.perceptual import Perceptual
from softvq_lib.tokenizers.vit import Encoder
from softvq_lib.training import tokenizer as trainer
from softvq_lib.training import train
from softvq_lib.training.tokenizer import TokenizerTrainer

# Every term of Eq. 7, of single images alone: no entropy of a batch's mean posterior.
ALL = {
    "quantizer": "kl",
    "perceptual": "efflite0",
    "adversarial": "patch",
    "alignment": "efflite0",
    "alignment_width": 16,
    "precision": "fp32",
    "flip": True,
    "crop": 1.2,
}


def everything(unfinished):
    """All that a step may change, copied."""
    kept = {f"model.{k}": v for k, v in unfinished.bare.state_dict().items()}
    kept |= {f"average.{i}": value for i, value in enumerate(unfinished.average.values)}
    for name, part in unfinished.parts.items():
        kept |= {f"{name}.{k}": v for k, v in part.state_dict().items()}
    for name, optimizer in unfinished.optimizers.items():
        for i, state in optimizer.state_dict()["state"].items():
            kept |= {f"{name}_optimizer.{i}.{k}": v for k, v in state.items()}
    return {name: value.clone() for name, value in kept.items()}


# -- micro-batches and memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("terms", ["ae", "all"])
def test_micro_batches_add_up_to_the_batch(terms, monkeypatch, tmp_path):
    settings = {"quantizer": "ae", "precision": "fp32"} if terms == "ae" else ALL
    unfinished = unstarted(monkeypatch, **small(tmp_path, steps=4, **settings))
    batch = next(unfinished.batches(0))
    found = {}
    for size in (8, 4, 3):
        unfinished.micro_batch = size
        values = {name: float(term) for name, term in unfinished._accumulate(batch).items()}
        modules = [unfinished.bare, *unfinished.parts.values()]
        gradients = [p.grad for module in modules for p in module.parameters() if p.grad is not None]
        found[size] = values, torch.cat([gradient.flatten() for gradient in gradients])
        for module in modules:
            module.zero_grad(set_to_none=True)
    values, gradient = found[8]
    assert set(values) >= ({"loss", "reconstruction"} if terms == "ae" else {"perceptual", "lecam", "kl", "alignment"})
    for size in (4, 3):
        assert found[size][0] == pytest.approx(values, rel=1e-5, abs=1e-6)
        assert (found[size][1] - gradient).norm() < 1e-5 * gradient.norm()


def test_micro_batches_are_a_way_of_running_and_no_other_run(tmp_path):
    whole = train(**small(tmp_path, steps=3))
    assert train(**small(tmp_path, steps=3, micro_batch=2)).path == whole.path


def out_of_memory(most):
    """Let memory run out, after the work is done, with more than so many images."""
    backward = TokenizerTrainer.backward

    def limited(self, part, *others):
        terms = backward(self, part, *others)
        if len(part) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return terms

    return limited


REMEDIES = {"quantizer": "vq", "codebook_size": 32, "vq_revive": 0.5, "vq_kmeans": 2, "adversarial": "patch"}


@pytest.mark.parametrize("ema", [None, 0.9])
def test_memory_that_runs_out_halves_the_micro_batch(ema, monkeypatch, tmp_path, caplog):
    """All that the failed attempts have written is put back: k-means, restarts, averages of codes."""
    settings = {**REMEDIES, "vq_ema": ema, "steps": 2, "log_every": 1}
    expected = train(**small(tmp_path / "a", **settings, micro_batch=2))
    monkeypatch.setattr(TokenizerTrainer, "backward", out_of_memory(2))
    with caplog.at_level(logging.WARNING, "softvq_lib"):
        run = train(**small(tmp_path / "b", **settings))
    assert run.trained == 2 and run.manifest["micro_batch"] == 2 and "micro_batch" not in expected.manifest
    for tried, left in ((8, 4), (4, 2)):
        assert f"memory ran out with {tried} images at once: from now on {left}, of 8 a step" in caplog.text
    assert caplog.text.count("memory ran out") == 2
    same_files(expected, run, "checkpoints/step-00000002.safetensors")


def test_a_run_that_goes_on_remembers_the_micro_batch(monkeypatch, tmp_path):
    settings = {"steps": 6, "checkpoint_every": 2}
    with monkeypatch.context() as patch:
        patch.setattr(TokenizerTrainer, "backward", out_of_memory(4))
        interrupt(patch, 3, **small(tmp_path, **settings))
    again = unstarted(monkeypatch, **small(tmp_path, **settings))
    assert again.micro_batch == 4
    assert unstarted(monkeypatch, **small(tmp_path, **settings, micro_batch=8)).micro_batch == 8


def test_memory_that_does_not_suffice_for_one_image_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(TokenizerTrainer, "backward", out_of_memory(0))
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        train(**small(tmp_path, steps=2))


def test_another_error_is_not_taken_for_a_lack_of_memory(monkeypatch, tmp_path):
    def broken(self, *arguments):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(TokenizerTrainer, "backward", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        train(**small(tmp_path, steps=2))


# -- numbers that are not finite -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stepped(tmp_path_factory):
    """A trainer with all terms on, three steps old, and its next batch."""
    with pytest.MonkeyPatch.context() as patch:
        settings = small(tmp_path_factory.mktemp("stepped"), **{**ALL, "quantizer": "softvq"}, steps=9)
        unfinished = unstarted(patch, **settings)
    batches = unfinished.batches(0)
    for step in range(3):
        unfinished._update(next(batches))
        unfinished.step = step + 1
    return unfinished, next(batches)


def spoiled(function, row=None):
    """Make what a function returns NaN: of one image, or all of it."""

    def wrapper(*arguments, **options):
        value = function(*arguments, **options).clone()
        if row is None:
            return value * float("nan")
        value[row] = float("nan")
        return value

    return wrapper


# Term -> where its number comes from, and the image that it is spoiled for; None where a number is of the whole batch.
SPOILED = {
    "reconstruction": (RECONSTRUCTION, "l2", 2),
    "perceptual": (Perceptual, "forward", 5),
    "alignment": (Alignment, "forward", 1),
    "adversarial": (Networks, "generator_loss", None),
    "discriminator": (adversarial, "discriminator_loss", None),
    "consistency": (adversarial, "consistency_loss", None),
    "lecam": (adversarial.LeCam, "forward", None),
    "z_hat": (Encoder, "forward", 6),
}


def refused(stepped, *words):
    """Make the step, which must be refused with these words, and leave all as it was."""
    unfinished, batch = stepped
    before = everything(unfinished)
    with pytest.raises(FloatingPointError) as error:
        unfinished._update(batch)
    for word in ("step 3: ", *words):
        assert word in str(error.value), str(error.value)
    after = everything(unfinished)
    assert before.keys() == after.keys()
    assert not [name for name, value in before.items() if not torch.equal(value, after[name])]
    for module in (unfinished.bare, *unfinished.parts.values()):
        module.zero_grad(set_to_none=True)


@pytest.mark.parametrize("term", SPOILED)
def test_a_term_that_is_not_finite_is_named_with_its_images(term, stepped, monkeypatch):
    place, name, row = SPOILED[term]
    if isinstance(place, dict):
        monkeypatch.setitem(place, name, spoiled(place[name], row))
    else:
        monkeypatch.setattr(place, name, spoiled(getattr(place, name), row))
    numbers = stepped[1].indices.tolist()
    images = ", ".join(map(str, numbers)) if row is None else str(numbers[row])
    words = ["z_hat holds NaN"] if term == "z_hat" else [f"{term}=nan", "not finite"]
    refused(stepped, f"images {images})", *words)


def test_a_quantizers_term_that_is_not_finite_is_named(stepped, monkeypatch):
    quantizer = stepped[0].bare.tokenizer.quantizer
    forward = quantizer.forward

    def broken(*arguments):
        z, losses = forward(*arguments)
        return z, {**losses, "kl": losses["kl"] * float("inf")}

    monkeypatch.setattr(quantizer, "forward", broken)
    refused(stepped, "kl=", "kl", "not finite")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["gradient_norm", "discriminator_gradient_norm"])
def test_a_gradient_that_is_not_finite_is_named(which, value, stepped, monkeypatch):
    module = stepped[0].bare if which == "gradient_norm" else stepped[0].networks.discriminator
    parameter = next(module.parameters())

    def spoil(p):
        p.grad.view(-1)[0] = value

    hook = parameter.register_post_accumulate_grad_hook(spoil)
    try:
        refused(stepped, f"{which} not finite", f"{which}={value:.4g}")
    finally:
        hook.remove()


def test_after_a_number_that_is_not_finite_the_last_checkpoint_goes_on(monkeypatch, tmp_path):
    settings = {"steps": 6, "checkpoint_every": 2, "log_every": 1}
    whole = train(**small(tmp_path / "a", **settings))
    with monkeypatch.context() as patch:
        spoil = patch.setitem
        at_step(patch, 3, lambda self: spoil(RECONSTRUCTION, "l2", spoiled(RECONSTRUCTION["l2"], 0)))
        with pytest.raises(FloatingPointError, match="step 3: reconstruction not finite.*images.*last checkpoint"):
            train(**small(tmp_path / "b", **settings))
    resumed = train(**small(tmp_path / "b", **settings))
    assert resumed.manifest["resumed_at"] == [2]
    same_files(whole, resumed, "checkpoints/step-00000006.safetensors")


# -- going on --------------------------------------------------------------------------------------------------------


def test_a_torn_row_is_repaired_and_one_that_had_begun_goes_on(monkeypatch, tmp_path):
    """Rows of five steps, checkpoints every two: the state between holds what a row has added up so far."""
    settings = {"steps": 12, "checkpoint_every": 2, "log_every": 5, "adversarial": "patch", "adversarial_start": 3}
    whole = train(**small(tmp_path / "a", **settings))
    interrupt(monkeypatch, 9, **small(tmp_path / "b", **settings))
    (folder,) = (tmp_path / "b").iterdir()
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 10, "loss": 0.1\xff')
    resumed = train(**small(tmp_path / "b", **settings))
    assert resumed.manifest["resumed_at"] == [8]
    assert [row["step"] for row in resumed.metrics if "loss" in row] == [5, 10, 12]
    same_files(whole, resumed, "checkpoints/step-00000010.safetensors", "checkpoints/step-00000012.safetensors")


def test_a_change_of_settings_is_shown_kept_and_goes_on(tmp_path, caplog):
    settings = {"run": "mine", "checkpoint_every": 2}
    first = train(**small(tmp_path, steps=4, **settings))
    assert first.finished
    with pytest.raises(ValueError, match="lr: 0.005 there, 0.001 asked for; steps: 4 there, 6 asked for.*change=True"):
        train(**small(tmp_path, steps=6, lr=1e-3, **settings))
    with caplog.at_level(logging.WARNING, "softvq_lib"):
        longer = train(**small(tmp_path, steps=6, lr=1e-3, change=True, **settings))
    assert longer.trained == 2 and longer.finished and longer.manifest["resumed_at"] == [4]
    difference = "lr: 0.005 there, 0.001 asked for; steps: 4 there, 6 asked for"
    assert f"goes on with changed settings: {difference}" in caplog.text
    assert [entry["difference"] for entry in longer.manifest["changed"]] == [difference]
    assert [row["step"] for row in longer.metrics if "loss" in row] == [2, 4, 6]
    held = json.loads((longer.path / "config.json").read_text())
    assert held["identity"]["steps"] == 6 and held["hash"] == longer.config_hash
    assert train(**small(tmp_path, steps=6, lr=1e-3, **settings)).trained == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dim": 8}, "checkpoint's ema does not fit this configuration.*size mismatch"),
        ({"steps": 2}, "steps=2, but .* is at step 4 already"),
        ({"quantizer": "gmmvq"}, "does not fit this configuration: one of them has no .*quantizer.to_omega"),
    ],
)
def test_a_change_that_the_state_does_not_fit_is_refused_and_changes_nothing(change, words, tmp_path):
    run = train(**small(tmp_path, steps=4, run="mine"))
    kept = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file() and path.name != "log.txt"}
    with pytest.raises(ValueError, match=words):
        train(**small(tmp_path, run="mine", change=True, **{"steps": 8, **change}))
    assert kept == {path: path.read_bytes() for path in kept}
    assert train(**small(tmp_path, steps=4, run="mine")).trained == 0


def test_a_term_that_is_switched_on_starts_anew(tmp_path, caplog):
    train(**small(tmp_path, steps=3, run="mine"))
    with caplog.at_level(logging.WARNING, "softvq_lib"):
        run = train(**small(tmp_path, steps=5, run="mine", adversarial="patch", change=True))
    assert run.trained == 2 and "the checkpoint has no discriminator: it starts anew" in caplog.text
    assert "discriminator" in run.metrics[-2] | run.metrics[-1]


def test_a_start_that_was_killed_at_once_can_be_repeated(tmp_path):
    (tmp_path / "mine").mkdir()
    for name in (".writable", ".config.json.part", ".lock"):
        (tmp_path / "mine" / name).write_text("1")
    assert train(**small(tmp_path, steps=1, run="mine")).trained == 1


# -- what is computed once, or in another way ------------------------------------------------------------------------


def counted(patch):
    """Count the images that the teacher looks at."""
    seen, ask = [], Networks.teacher_tokens

    def asked(self, images):
        seen.append(len(images))
        return ask(self, images)

    patch.setattr(Networks, "teacher_tokens", asked)
    return seen


# Two batches an epoch.
ALIGNED = {"alignment": "efflite0", "alignment_width": 16, "limit": 16, "steps": 5, "checkpoint_every": 3}


@pytest.mark.parametrize(("settings", "images"), [({}, 16), ({"flip": True}, 40), ({"crop": 1.2}, 40)])
def test_the_teacher_looks_once_at_images_that_do_not_change(settings, images, monkeypatch, tmp_path):
    seen = counted(monkeypatch)
    train(**small(tmp_path, **ALIGNED, **settings))
    assert sum(seen) == images


@pytest.mark.parametrize("micro_batch", [8, 7])
def test_a_teacher_that_is_asked_once_changes_no_bit(micro_batch, monkeypatch, tmp_path):
    """Neither where a run goes on in the second epoch, and asks it again about some images."""
    settings = {**ALIGNED, "micro_batch": micro_batch}
    with monkeypatch.context() as patch:
        patch.setattr(trainer._Teacher, "MOST", 0)
        expected = train(**small(tmp_path / "a", **settings))
    whole = train(**small(tmp_path / "b", **settings))
    same_files(expected, whole, "checkpoints/step-00000005.safetensors")
    interrupt(monkeypatch, 4, **small(tmp_path / "c", **settings))
    resumed = train(**small(tmp_path / "c", **settings))
    assert resumed.manifest["resumed_at"] == [3]
    same_files(expected, resumed, "checkpoints/step-00000005.safetensors")


def test_images_that_are_not_square_are_cropped_anew_and_looked_at_again(monkeypatch, tmp_path):
    settings = {**ALIGNED, **pictures(tmp_path / "images", 16, size=(48, 32)), "steps": 4}
    seen = counted(monkeypatch)
    whole = train(**small(tmp_path / "a", **settings))
    assert sum(seen) > 16
    monkeypatch.setattr(trainer._Teacher, "MOST", 0)
    same_files(train(**small(tmp_path / "b", **settings)), whole)


def test_gradient_checkpointing_computes_the_same_twice(monkeypatch, tmp_path):
    from timm.models.vision_transformer import Block

    passes, forward = [], Block.forward

    def counting(self, *arguments, **options):
        passes.append(torch.is_grad_enabled())
        return forward(self, *arguments, **options)

    monkeypatch.setattr(Block, "forward", counting)
    runs, trained = [], []
    for enable in (False, True):
        passes.clear()
        settings = small(tmp_path / str(enable), steps=4, precision="fp32", gradient_checkpointing=enable)
        runs.append(train(**settings))
        trained.append(sum(passes))
    assert trained[1] == 2 * trained[0] > 0
    same_files(*runs)


@pytest.mark.slow
def test_compiled_nets_compute_the_same(tmp_path):
    """Needs a C++ compiler."""
    settings = {**ALL, "steps": 2, "log_every": 1}
    plain, compiled = (train(**small(tmp_path / str(way), **settings, compile=way)) for way in (False, True))
    for ours, theirs in zip(plain.metrics, compiled.metrics, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-3, abs=1e-4)
