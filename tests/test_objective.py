"""The whole objective (Eq. 7) as the trainer computes it: its terms, weights, schedules and gradients."""

import math

import pytest
import torch
from safetensors.torch import load_file
from test_training import small, unstarted

from softvq_lib.losses import RECONSTRUCTION, LossConfig, weighted
from softvq_lib.losses.adversarial import adaptive_weight, discriminator_objective
from softvq_lib.training import train

# Every term, with weights and schedules that leave none of them at 0 or 1.
ALL = {
    "perceptual": "efflite0",
    "perceptual_weight": 0.7,
    "perceptual_warmup": 8,
    "adversarial": "patch",
    "adversarial_weight": 0.3,
    "adversarial_start": 2,
    "adversarial_warmup": 4,
    "alignment": "efflite0",
    "alignment_weight": 0.4,
    "alignment_width": 16,
    "kl_weight": 0.05,
    "lecam_weight": 0.6,
    "precision": "fp32",
    "log_every": 1,
}
GENERATOR = {"reconstruction", "perceptual", "adversarial", "alignment", "kl"}
DISCRIMINATOR = {"discriminator", "consistency", "lecam", "logits_real", "logits_fake"}
NORMS = {"gradient_norm", "discriminator_gradient_norm"}


def begun(monkeypatch, tmp_path, step, **settings):
    """A trainer about to make a step, and the batch of it; LeCAM's averages are not at their start."""
    trainer = unstarted(monkeypatch, **small(tmp_path, **{**ALL, "steps": 12, **settings}))
    trainer.step = step
    trainer.networks.lecam.update(torch.tensor(40.0), torch.tensor(-70.0))
    return trainer, next(trainer.batches(step)).to(trainer.device)


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.requires_grad}


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    largest = max(g.abs().max() for g in expected.values())
    for name, gradient in expected.items():
        error = (found[name] - gradient).abs().max()
        assert error < 1e-5 * largest + 1e-4 * gradient.abs().max(), name


CASES = {
    "softvq, l2": {},
    "kl, l1, flip": {"quantizer": "kl", "reconstruction": "l1", "flip": True, "crop": 1.3},
    "vq, adaptive": {"quantizer": "vq", "codebook_weight": 0.6, "commit_weight": 0.2, "adversarial_adaptive": True},
    "no augmentation": {"diffaug": False, "consistency_weight": 0.0, "adversarial_adaptive": True},
}


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_eq_7(case, monkeypatch, tmp_path):
    """Beside one plain backward pass of the weighted sum, at step 5: ramps of 5/8 and 3/4."""
    trainer, batch = begun(monkeypatch, tmp_path, 5, **CASES[case])
    config, networks = trainer.loss_config, trainer.networks
    terms = trainer._accumulate(batch)
    ours, discriminator = gradients(trainer.bare), gradients(networks.discriminator)
    for module in (trainer.bare, networks.discriminator):
        module.zero_grad(set_to_none=True)

    teacher = networks.teacher_tokens(batch.images)
    reconstructions, code, aligned = trainer.bare(batch.images, trainer.draws("tokenizer", 0), teacher)
    pixel = RECONSTRUCTION[config.reconstruction](batch.images, reconstructions).mean()
    pixel = pixel + 0.7 * 5 / 8 * networks.perceptual(batch.images, reconstructions).mean()
    against = networks.generator_loss(config, reconstructions, trainer.draws("generator", 0))
    weight = 0.3 * 3 / 4
    if config.adversarial_adaptive:
        last = trainer.bare.tokenizer.decoder.to_pixels.weight
        both = [torch.autograd.grad(loss, last, retain_graph=True)[0] for loss in (pixel, against)]
        ratio = both[0].norm() / (both[1].norm() + 1e-4)
        torch.testing.assert_close(adaptive_weight(*both), ratio)
        weight = weight * ratio
        torch.testing.assert_close(terms["adversarial_weight"], weight, rtol=1e-4, atol=0)
    loss = pixel + weight * against + weighted(config, code.losses) + 0.4 * aligned.mean()
    inputs = [p for p in trainer.bare.parameters() if p.requires_grad]
    loss.backward(inputs=inputs)
    torch.testing.assert_close(terms["loss"], loss.detach(), rtol=1e-5, atol=1e-6)
    assert_same_gradients(ours, gradients(trainer.bare))

    judged, _ = discriminator_objective(
        networks.discriminator,
        networks.lecam,
        batch.images,
        reconstructions,
        trainer.draws("discriminator", 0),
        disc_weight=0.3 * 3 / 4,
        lecam_weight=0.6,
        consistency_weight=config.consistency_weight,
        augment=config.diffaug,
    )
    judged.backward()
    assert_same_gradients(discriminator, gradients(networks.discriminator))


def test_every_parameter_is_reached_and_no_frozen_one(monkeypatch, tmp_path):
    trainer, batch = begun(monkeypatch, tmp_path, 5)
    frozen = [p for net in (trainer.networks.perceptual, trainer.networks.teacher) for p in net.parameters()]
    before = [p.clone() for p in frozen]
    trainer._update(batch)
    trainer._accumulate(batch)  # after a step, since the projector's last layer may start at 0
    for module in (trainer.bare, trainer.networks.discriminator):
        assert not [name for name, gradient in gradients(module).items() if not gradient.abs().max() > 0]
    assert frozen and all(p.grad is None and not p.requires_grad for p in frozen)
    assert all(map(torch.equal, frozen, before))


def test_every_term_is_logged_with_the_weight_of_its_schedule(tmp_path):
    run = train(**small(tmp_path, **ALL, steps=8, checkpoint_every=3, keep=9))
    rows = {row["step"] - 1: row for row in run.metrics if "loss" in row}  # by the step before it was made
    assert list(rows) == list(range(8))
    always = {"step", "loss", "lr", "gradient_norm", *GENERATOR} - {"adversarial"}
    for step, row in rows.items():
        active = {"adversarial", "discriminator_gradient_norm"} | DISCRIMINATOR
        assert set(row) == always | (active if step >= 2 else set()), step
        expected = row["reconstruction"] + 0.7 * min(1, step / 8) * row["perceptual"]
        expected += 0.4 * row["alignment"] + 0.05 * row["kl"]
        if step >= 2:
            expected += 0.3 * min(1, (step - 2) / 4) * row["adversarial"]
        assert row["loss"] == pytest.approx(expected, rel=1e-4), step
    started, first, later = (load_file(run.path / "checkpoints" / f"step-{step:08d}.safetensors") for step in (3, 6, 8))
    # LeCAM begins with the discriminator and moves once a step.
    assert started["lecam.ema_real"].item() == pytest.approx(0.001 * rows[2]["logits_real"], rel=1e-3)
    fake = 0.0
    for step in range(2, 8):
        fake += 0.001 * (rows[step]["logits_fake"] - fake)
    assert later["lecam.ema_fake"].item() == pytest.approx(fake, rel=1e-3)
    moved = [name for name in first if name.startswith("discriminator.") and not torch.equal(first[name], later[name])]
    assert any("original" in name for name in moved) and any(name.endswith("_u") for name in moved)


def test_the_discriminator_rests_before_its_start(monkeypatch, tmp_path):
    trainer, batch = begun(monkeypatch, tmp_path, 1)
    before = {name: x.clone() for part in trainer.parts.values() for name, x in part.state_dict().items()}
    terms = trainer._update(batch)
    assert not set(terms) & ({"adversarial"} | DISCRIMINATOR | NORMS - {"gradient_norm"})
    after = {name: x for part in trainer.parts.values() for name, x in part.state_dict().items()}
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert not trainer.optimizers["discriminator"].state


def test_the_discriminator_has_a_learning_rate_of_its_own(monkeypatch, tmp_path):
    trainer, batch = begun(monkeypatch, tmp_path, 5, discriminator_lr=1e-4, warmup=0.0, min_lr=1.0)
    trainer._update(batch)
    rates = {name: {group["lr"] for group in o.param_groups} for name, o in trainer.optimizers.items()}
    assert rates == {"model": {5e-3}, "discriminator": {1e-4}}


def test_weighted_sum_by_hand():
    losses = {"kl": torch.tensor(-2.0), "commit": torch.tensor(3.0), "codebook": torch.tensor(5.0)}
    config = LossConfig(kl_weight=0.1, commit_weight=0.5, codebook_weight=2.0)
    assert weighted(config, losses).item() == pytest.approx(-0.2 + 1.5 + 10)
    images, ours = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.5)
    assert RECONSTRUCTION["l2"](images, ours).tolist() == [0.25, 0.25]
    assert RECONSTRUCTION["l1"](images, ours).tolist() == [0.5, 0.5]


def test_settings_of_terms_that_are_off_are_no_identity():
    plain = LossConfig().identity()
    assert set(plain) == {"reconstruction", "kl_weight", "codebook_weight", "commit_weight"}
    assert LossConfig(lecam_weight=0.5, perceptual_weight=2.0, alignment_rule="area").identity() == plain
    active = LossConfig(adversarial="patch", lecam_weight=0.5).identity()
    assert active["lecam_weight"] == 0.5 and active["adversarial"] == "patch" and "perceptual_weight" not in active
    assert LossConfig(dry_run=True).identity()["dry_run"] is True


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"perceptual": ""}, "perceptual='' names nothing.*efflite1"),
        ({"adversarial": ""}, "adversarial='' names nothing.*patch"),
        ({"alignment": ""}, "alignment='' names nothing.*efflite2"),
        ({"perceptual_weight": -1.0}, "perceptual_weight=-1.0"),
        ({"adversarial_start": -1}, "adversarial_start=-1"),
        ({"adversarial_warmup": -2}, "adversarial_warmup=-2"),
        ({"lecam_weight": math.nan}, "lecam_weight=nan"),
        ({"kl_weight": math.inf}, "kl_weight=inf"),
        ({"discriminator_lr": 0.0}, "discriminator_lr=0.0.*above 0"),
        ({"alignment_rule": "repat"}, "alignment_rule='repat'.*did you mean 'repeat'"),
        ({"alignment_width": 0}, "alignment_width=0"),
    ],
)
def test_bad_settings_are_named(bad, words):
    with pytest.raises(ValueError, match=words):
        LossConfig(**bad)
