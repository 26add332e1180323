"""Adversarial loss: every equation by hand, its schedule, and two processes against one."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import nn

from softvq_lib.draws import Rows
from softvq_lib.losses.adversarial import (
    LeCam,
    adaptive_weight,
    consistency_loss,
    discriminator_loss,
    discriminator_objective,
    generator_loss,
    ramp,
)
from softvq_lib.losses.augmentation import Augmentation
from softvq_lib.losses.discriminator import BatchNorm, Discriminator, Head, build_discriminator

REAL = torch.tensor([[2.0, 0.5], [-1.0, 0.0]])
FAKE = torch.tensor([[-2.0, 0.5], [1.0, -0.5]])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 4, side: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=generator(seed)) * 2 - 1


class Pixels(Discriminator):
    """One head on the pixels themselves: batch norm and spectral norm without a transformer."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.head = Head(3)

    def features(self, images, draws=None):
        return [images.float().flatten(2)]

    def heads(self, features, groups=1):
        return self.head(features[0], groups)


# -- equations by hand ---------------------------------------------------------------------------------------------


def test_hinge_losses_by_hand():
    assert generator_loss(FAKE).item() == pytest.approx(0.25)  # -(-2 + 0.5 + 1 - 0.5) / 4
    # real: (0 + 0.5 + 2 + 1) / 4; fake: (0 + 1.5 + 2 + 0.5) / 4
    assert discriminator_loss(REAL, FAKE).item() == pytest.approx(0.5 * (3.5 / 4 + 4 / 4))
    assert discriminator_loss(torch.full((2, 3), 1.5), torch.full((2, 3), -1.5)) == 0


def test_consistency_by_hand_and_both_sides_learn():
    logits, strong = REAL.clone().requires_grad_(), FAKE.clone().requires_grad_()
    loss = consistency_loss(logits, strong)
    assert loss.item() == pytest.approx((16 + 0 + 4 + 0.25) / 4)
    loss.backward()
    torch.testing.assert_close(logits.grad, (REAL - FAKE) / 2)
    torch.testing.assert_close(strong.grad, (FAKE - REAL) / 2)


def test_lecam_by_hand():
    lecam = LeCam(decay=0.9)
    lecam.update(torch.tensor(2.0), torch.tensor(-1.0))
    assert (lecam.ema_real.item(), lecam.ema_fake.item()) == pytest.approx((0.2, -0.1))
    lecam.update(torch.tensor(1.0), torch.tensor(0.0))
    assert (lecam.ema_real.item(), lecam.ema_fake.item()) == pytest.approx((0.28, -0.09))
    # real above -0.09: 2.09, 0.59, 0, 0.09; fake below 0.28: 2.28, 0, 0, 0.78
    above = (2.09**2 + 0.59**2 + 0 + 0.09**2) / 4
    below = (2.28**2 + 0 + 0 + 0.78**2) / 4
    assert lecam(REAL, FAKE).item() == pytest.approx(above + below)


def test_lecam_averages_are_saved_and_hold_no_graph():
    lecam, mean = LeCam(), torch.tensor(3.0, requires_grad=True)
    lecam.update(mean * 1, mean * 2)
    assert not lecam.ema_real.requires_grad
    restored = LeCam()
    restored.load_state_dict(lecam.state_dict())
    assert (restored.ema_real.item(), restored.ema_fake.item()) == pytest.approx((0.003, 0.006))
    assert restored.decay == 0.999


def test_means_of_micro_batches_average_to_the_batch():
    lecam = LeCam()
    lecam.update(torch.tensor(100.0), torch.tensor(-50.0))
    for loss in (discriminator_loss, consistency_loss, lecam, lambda _, fake: generator_loss(fake)):
        parts = [loss(REAL[i : i + 1], FAKE[i : i + 1]) for i in range(2)]
        torch.testing.assert_close((parts[0] + parts[1]) / 2, loss(REAL, FAKE))


def test_adaptive_weight_by_hand():
    nll, adversarial = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.3, 0.4]])
    assert adaptive_weight(nll, adversarial).item() == pytest.approx(5 / 0.5001)
    assert adaptive_weight(nll, torch.zeros(1, 2)).item() == 1e4
    assert adaptive_weight(torch.zeros(1, 2), adversarial) == 0
    assert not adaptive_weight(nll.requires_grad_(), adversarial).requires_grad


@pytest.mark.parametrize(
    ("step", "start", "warmup", "share"),
    [(0, 0, 0, 1), (99, 100, 0, 0), (100, 100, 0, 1), (99, 100, 50, 0), (100, 100, 50, 0), (125, 100, 50, 0.5)]
    + [(150, 100, 50, 1), (10_000, 100, 50, 1)],
)
def test_ramp(step, start, warmup, share):
    assert ramp(step, start, warmup) == share


# -- the discriminator's objective ---------------------------------------------------------------------------------


def test_objective_is_the_weighted_sum_of_terms_computed_one_by_one():
    discriminator, lecam, x, y = Pixels(), LeCam(), images(), images(seed=1) * 0.5
    lecam.update(torch.tensor(300.0), torch.tensor(-400.0))
    loss, terms = discriminator_objective(
        discriminator, lecam, x, y, generator(7), disc_weight=0.3, lecam_weight=0.02, consistency_weight=5.0
    )
    draws = generator(7)
    weak, strong = (Augmentation.draw(x, draws, strength=name) for name in ("weak", "strong"))
    real, fake, real_strong, fake_strong = (discriminator(view) for view in (weak(x), weak(y), strong(x), strong(y)))
    expected = {
        "discriminator": discriminator_loss(real, fake),
        "lecam": lecam(real, fake),
        "consistency": ((real - real_strong).square().mean() + (fake - fake_strong).square().mean()) / 2,
        "logits_real": real.mean(),
        "logits_fake": fake.mean(),
    }
    assert terms.keys() == expected.keys()
    for name, term in expected.items():
        assert not terms[name].requires_grad
        torch.testing.assert_close(terms[name], term.detach(), atol=1e-5, rtol=1e-5)
    total = 0.3 * (expected["discriminator"] + 0.02 * expected["lecam"]) + 5 * expected["consistency"]
    torch.testing.assert_close(loss, total, atol=1e-5, rtol=1e-5)


def test_objective_leaves_the_generator_and_the_averages_alone():
    discriminator, lecam, y = Pixels(), LeCam(), images(seed=1).requires_grad_()
    loss, _ = discriminator_objective(discriminator, lecam, images(), y * 0.5, generator(0))
    loss.backward()
    assert y.grad is None
    assert all(p.grad is not None for p in discriminator.parameters())
    assert lecam.ema_real == lecam.ema_fake == 0


def test_before_the_start_logits_are_reported_and_nothing_is_learned():
    x, y = images(), images(seed=1) * 0.5
    arguments = (Pixels(), LeCam(), x, y)
    loss, before = discriminator_objective(*arguments, generator(0), disc_weight=0.0, consistency_weight=0.0)
    assert loss == 0 and not loss.requires_grad
    _, after = discriminator_objective(*arguments, generator(0))
    assert before.keys() == after.keys() - {"consistency"}
    for name, term in before.items():
        torch.testing.assert_close(term, after[name])


def test_objective_in_parts_is_that_of_the_batch_for_patch():
    """Without statistics over the batch; then gradients and terms of micro-batches average to those of the batch."""
    discriminator, lecam, x, y = build_discriminator("patch", 16), LeCam(), images(), images(seed=1)
    terms, gradients = [], []
    for part in (slice(0, 4), slice(0, 2), slice(2, 4)):
        discriminator.zero_grad()
        loss, found = discriminator_objective(discriminator, lecam, x[part], y[part], Rows(generator(1), 4, part.start))
        loss.backward()
        terms.append(torch.stack([loss.detach(), *found.values()]))
        gradients.append(torch.cat([p.grad.flatten() for p in discriminator.parameters()]))
    for whole, *parts in (terms, gradients):
        torch.testing.assert_close((parts[0] + parts[1]) / 2, whole, atol=1e-6, rtol=1e-4)


def test_training_tells_images_from_reconstructions():
    discriminator, lecam = build_discriminator("patch", 16), LeCam(decay=0.9)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=3e-3, betas=(0.5, 0.9))
    x, y = images(8), nn.functional.avg_pool2d(images(8), 3, 1, 1)
    draws, hinges = generator(0), []
    for _ in range(30):
        loss, terms = discriminator_objective(
            discriminator, lecam, x, y, draws, disc_weight=1.0, consistency_weight=0.5
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        discriminator.advance()
        lecam.update(terms["logits_real"], terms["logits_fake"])
        hinges.append(terms["discriminator"].item())
    assert sum(hinges[-5:]) / 5 < 0.6 < 0.95 < hinges[0]
    assert lecam.ema_real > 0 > lecam.ema_fake


# -- processes -----------------------------------------------------------------------------------------------------


def measured(start: int, stop: int) -> dict[str, torch.Tensor]:
    """What a process with rows `start` to `stop` of a batch of 4 computes."""
    part, results = slice(start, stop), {}
    norm = BatchNorm(5)
    x = (torch.randn(4, 5, 6, generator=generator(0)) * 3 + 4)[part].requires_grad_()
    y = norm(x)
    (y * torch.randn(4, 5, 6, generator=generator(1))[part]).mean().backward()
    results |= {"rows.norm": y.detach(), "rows.norm_grad": x.grad, "mean.scale_grad": norm.weight.grad}
    discriminator, lecam = Pixels(), LeCam(decay=0.5)
    lecam.update(torch.tensor(0.4), torch.tensor(-0.6))
    pair = images()[part], (images(seed=1) * 0.5)[part]
    loss, terms = discriminator_objective(discriminator, lecam, *pair, Rows(generator(2), 4, start))
    loss.backward()
    lecam.update(terms["logits_real"], terms["logits_fake"])
    results |= {f"same.{name}": value for name, value in lecam.state_dict().items()}
    results |= {f"mean.{name}": value for name, value in {"loss": loss.detach(), **terms}.items()}
    results |= {f"mean.grad.{name}": p.grad for name, p in discriminator.named_parameters()}
    results["same.adaptive"] = adaptive_weight(x.detach().mean((0, 2)), y.detach().square().mean((0, 2)))
    return results


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        save_file(measured(2 * rank, 2 * rank + 2), f"{folder}/{rank}.safetensors")
    finally:
        dist.destroy_process_group()


def test_two_processes_compute_what_one_computes(tmp_path):
    """Outputs and their gradients by rows, averages everywhere, parameter gradients after averaging."""
    mp.spawn(process, (str(tmp_path),), nprocs=2)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    for name, whole in measured(0, 4).items():
        if name.startswith("rows."):
            scale = 2 if name.endswith("grad") else 1  # a process's loss is a mean over half as many rows
            both = torch.cat([first[name], second[name]]) / scale
        elif name.startswith("mean."):
            both = (first[name] + second[name]) / 2
        else:
            torch.testing.assert_close(first[name], second[name], atol=0, rtol=0)
            both = first[name]
        torch.testing.assert_close(both, whole, atol=1e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert first["mean.logits_fake"] != second["mean.logits_fake"]
