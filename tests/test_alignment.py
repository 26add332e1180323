"""Representation alignment (Sec. 3.3): the spread of tokens over patches and the loss, by hand (Eq. 5-6)."""

import pytest
import torch
import torch.nn.functional as F

from softvq_lib.losses.alignment import RULES, Alignment, Projector, alignment_loss, assignment, to_patches


def test_repeat_gives_each_token_to_consecutive_patches():
    """Eq. 5 for l = 2 and n = 6: tokens 1, 1, 1, 2, 2, 2."""
    z = torch.tensor([[[1.0, 10.0], [2.0, 20.0]]])
    spread = to_patches(z, 6, "repeat")
    assert spread[0, :, 0].tolist() == [1, 1, 1, 2, 2, 2]
    assert spread[0, :, 1].tolist() == [10, 10, 10, 20, 20, 20]


@pytest.mark.parametrize(
    ("tokens", "shares"),
    [
        (3, [[1, 0, 0], [1 / 3, 2 / 3, 0], [0, 2 / 3, 1 / 3], [0, 0, 1]]),
        (5, [[0.8, 0.2, 0, 0, 0], [0, 0.6, 0.4, 0, 0], [0, 0, 0.4, 0.6, 0], [0, 0, 0, 0.2, 0.8]]),
        (8, [[0.5, 0.5, *[0] * 6], [0, 0, 0.5, 0.5, *[0] * 4], [*[0] * 4, 0.5, 0.5, 0, 0], [*[0] * 6, 0.5, 0.5]]),
    ],
)
def test_area_mixes_tokens_by_what_they_cover_of_each_of_four_patches(tokens, shares):
    for rule in ("area", "auto"):
        torch.testing.assert_close(assignment(tokens, 4, rule), torch.tensor(shares))


@pytest.mark.parametrize(("tokens", "n"), [(1, 7), (7, 49), (64, 256), (32, 1024), (16, 16)])
def test_area_is_repeat_where_tokens_divide_patches(tokens, n):
    z = torch.randn(2, tokens, 3)
    wanted = z.repeat_interleave(n // tokens, dim=1)
    for rule in ("repeat", "area", "auto"):
        assert torch.equal(to_patches(z, n, rule), wanted)


@pytest.mark.parametrize(("tokens", "n"), [(7, 64), (48, 256), (1024, 16), (100, 64)])
def test_every_patch_takes_one_whole_and_every_token_gives_alike(tokens, n):
    shares = assignment(tokens, n, "area")
    torch.testing.assert_close(shares.sum(1), torch.ones(n))
    torch.testing.assert_close(shares.sum(0), torch.full((tokens,), n / tokens))


@pytest.mark.parametrize("tokens", [16, 12])
def test_permuted_has_the_same_rows_in_another_order_set_by_the_seed(tokens):
    state = torch.get_rng_state()
    shares, permuted = assignment(tokens, 64), assignment(tokens, 64, "permuted", seed=3)
    assert not torch.equal(shares, permuted)
    assert sorted(shares.tolist()) == sorted(permuted.tolist())
    assert torch.equal(permuted, assignment(tokens, 64, "permuted", seed=3))
    assert not torch.equal(permuted, assignment(tokens, 64, "permuted", seed=4))
    assert torch.equal(state, torch.get_rng_state())


def test_loss_by_hand():
    """Cosines 24/25 and -1 in the first image, 0 and 1 in the second."""
    projected = torch.tensor([[[3.0, 4.0], [0.0, 2.0]], [[1.0, 0.0], [1.0, 1.0]]])
    teacher = torch.tensor([[[4.0, 3.0], [0.0, -1.0]], [[0.0, 5.0], [2.0, 2.0]]])
    torch.testing.assert_close(alignment_loss(projected, teacher), torch.tensor([0.02, -0.5]))


def test_loss_sees_directions_only():
    x, y = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    torch.testing.assert_close(alignment_loss(x, x), torch.full((2,), -1.0))
    torch.testing.assert_close(alignment_loss(x, -x), torch.full((2,), 1.0))
    scales = torch.rand(2, 5, 1) + 0.1
    torch.testing.assert_close(alignment_loss(3 * x * scales, y / scales), alignment_loss(x, y))


def test_alignment_equals_the_equations_as_printed():
    """Replicate each token, then the MLP, then the similarity of each pair, one at a time."""
    torch.manual_seed(0)
    alignment = Alignment(dim=4, tokens=3, patches=6, teacher_width=5, width_hidden=7)
    z, y = torch.randn(2, 3, 4), torch.randn(2, 6, 5)
    first, _, second, _, third = alignment.projector
    for image, loss in enumerate(alignment(z, y)):
        total = 0.0
        for patch in range(6):
            replicated = z[image, patch // 2]
            hidden = first(replicated)
            hidden = second(hidden * hidden.sigmoid())
            projected = third(hidden * hidden.sigmoid())
            total += (projected @ y[image, patch] / (projected.norm() * y[image, patch].norm())).item()
        assert loss.item() == pytest.approx(-total / 6, abs=1e-6)


def test_the_projector_is_the_releases():
    projector = Projector(32, 1024, 768)
    shapes = [tuple(parameter.shape) for parameter in projector.parameters()]
    assert shapes == [(1024, 32), (1024,), (1024, 1024), (1024,), (768, 1024), (768,)]
    assert [type(layer).__name__ for layer in projector] == ["Linear", "SiLU", "Linear", "SiLU", "Linear"]


@pytest.mark.parametrize("rule", RULES)
def test_gradients_reach_latents_and_projector_but_not_the_teacher(rule):
    alignment = Alignment(dim=4, tokens=2, patches=4, teacher_width=5, width_hidden=8, rule=rule)
    z, teacher = torch.randn(2, 2, 4, requires_grad=True), torch.randn(2, 4, 5, requires_grad=True)
    alignment(z, teacher).mean().backward()
    assert teacher.grad is None
    for tensor in (z, *alignment.parameters()):
        assert tensor.grad.abs().sum() > 0


def test_half_precision_gives_a_loss_in_full():
    alignment = Alignment(dim=4, tokens=3, patches=4, teacher_width=5, width_hidden=8)
    z, teacher = torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        loss = alignment(z, teacher.bfloat16())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, alignment(z, teacher), atol=0.02, rtol=0)


def test_a_checkpoint_holds_the_projector_alone():
    names = Alignment(dim=4, tokens=3, patches=4, teacher_width=5, width_hidden=8, rule="permuted").state_dict()
    assert all(name.startswith("projector.") for name in names)


@pytest.mark.parametrize("rule", RULES)
def test_it_builds_on_the_meta_device(rule):
    with torch.device("meta"):
        alignment = Alignment(dim=32, tokens=64, patches=256, teacher_width=768, rule=rule)
        assert alignment(torch.empty(2, 64, 32), torch.empty(2, 256, 768)).shape == (2,)


def test_training_brings_the_two_together():
    torch.manual_seed(0)
    alignment = Alignment(dim=4, tokens=4, patches=8, teacher_width=6, width_hidden=16)
    z, teacher = torch.nn.Parameter(torch.randn(3, 4, 4)), F.normalize(torch.randn(3, 8, 6), dim=-1)
    optimizer = torch.optim.Adam([z, *alignment.parameters()], lr=0.01)
    before = alignment(z, teacher).mean().item()
    for _ in range(100):
        optimizer.zero_grad()
        alignment(z, teacher).mean().backward()
        optimizer.step()
    # Two patches share a token, so the best that can be had is the mean of their two directions.
    best = -(teacher[:, ::2] + teacher[:, 1::2]).norm(dim=-1).mean().item() / 2
    assert best < alignment(z, teacher).mean().item() < 0.9 * best < before


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: assignment(48, 256, "repeat"), ["rule='repeat'", "l=48", "n=256", "rule='area'"]),
        (lambda: to_patches(torch.zeros(1, 32, 4), 16, "repeat"), ["l=32", "n=16", "rule='area'"]),
        (lambda: Alignment(4, 4, 16, 5, rule="repat"), ["rule='repat'", "did you mean 'repeat'"]),
        (lambda: alignment_loss(torch.zeros(2, 4, 8), torch.zeros(2, 1, 8)), ["(2, 4, 8)", "(2, 1, 8)"]),
    ],
)
def test_errors_name_the_values_and_the_remedy(call, words):
    with pytest.raises(ValueError) as error:
        call()
    for word in words:
        assert word in str(error.value)
