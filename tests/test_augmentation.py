"""DiffAugment: each operation by hand, gradients, and the same numbers however a batch is cut."""

import pytest
import torch

from softvq_lib.draws import Rows
from softvq_lib.losses.augmentation import STRENGTHS, Augmentation, diff_augment

NEUTRAL = [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 4, side: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=generator(0)) * 2 - 1


def augmentation(operation: int, cutout: float = 0.2, **amounts: float) -> Augmentation:
    """One operation (colour, translation, cutout) on one image, its amounts by place: `a3=0.9`."""
    values = [amounts.get(f"a{i}", middle) for i, middle in enumerate(NEUTRAL)]
    return Augmentation(torch.arange(3) == operation, torch.tensor([values]), cutout)


def test_nothing_kept_leaves_images_as_they_are():
    assert torch.equal(diff_augment(images(), generator(1), strength="strong", probability=0), images())


def test_colour_by_hand():
    """Brightness +0.25, saturation x 1.5, contrast x 0.75, of pixels (.2, .4, .6) and (0, 0, .3)."""
    x = torch.tensor([[0.2, 0.0], [0.4, 0.0], [0.6, 0.3]]).view(1, 3, 1, 2)
    expected = torch.tensor([[0.3875, 0.275], [0.6125, 0.275], [0.8375, 0.6125]]).view(1, 3, 1, 2)
    torch.testing.assert_close(augmentation(0, a0=0.75, a1=0.75, a2=0.25)(x), expected)
    torch.testing.assert_close(augmentation(0)(x), x)


@pytest.mark.parametrize(
    ("amount", "change"), [("a0", lambda x: x - 0.5), ("a1", lambda x: x.mean(1, keepdim=True).expand_as(x))]
)
def test_the_least_of_brightness_and_saturation(amount, change):
    x = images(1)
    torch.testing.assert_close(augmentation(0, **{amount: 0.0})(x), change(x))


def test_translation_moves_whole_pixels_and_fills_with_zeros():
    x = images(1)
    moved = augmentation(1, a3=0.999, a4=0.0)(x)  # 16 pixels: by up to 2, down and to the left
    assert torch.equal(moved[:, :, 2:, :-2], x[:, :, :-2, 2:])
    assert not moved[:, :, :2].any() and not moved[:, :, :, -2:].any()
    assert torch.equal(augmentation(1)(x), x)


def test_every_translation_up_to_an_eighth_of_the_side_occurs_and_no_other():
    point = torch.zeros(500, 3, 32, 32)
    point[:, :, 16, 16] = 1
    keep = torch.tensor([False, True, False])
    moved = Augmentation(keep, torch.rand(500, 7, generator=generator(0)), 0.2)(point)
    _, rows, columns = (moved[:, 0] == 1).nonzero(as_tuple=True)
    assert len(rows) == 500
    assert set((rows - 16).tolist()) == set((columns - 16).tolist()) == set(range(-4, 5))


@pytest.mark.parametrize(
    ("side", "cutout", "centre", "hole"),
    [
        (20, 0.5, 0.5, (5, 15)),
        (20, 0.2, 0.5, (8, 12)),
        (20, 0.5, 0.0, (0, 5)),
        (20, 0.5, 0.999, (15, 20)),
        (15, 0.2, 0.5, (6, 9)),
        (15, 0.2, 0.999, (13, 15)),
    ],
)
def test_cutout_sets_a_square_to_zero(side, cutout, centre, hole):
    x = images(1, side)
    cut = augmentation(2, cutout, a5=centre, a6=centre)(x)
    inside = slice(*hole)
    expected = x.clone()
    expected[:, :, inside, inside] = 0
    assert torch.equal(cut, expected)


def test_gradients_are_those_of_an_affine_map():
    x, change, weight = images(), torch.randn(4, 3, 16, 16, generator=generator(2)), images().flip(0)
    augment = Augmentation.draw(x, generator(3), strength="strong")
    x.requires_grad_()
    (augment(x) * weight).sum().backward()
    difference = (weight * (augment(x.detach() + change) - augment(x.detach()))).sum()
    torch.testing.assert_close((x.grad * change).sum(), difference, atol=1e-3, rtol=1e-4)
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("seed", range(4))
def test_a_batch_in_parts_is_augmented_as_a_whole(strength, seed):
    x = images(5)
    whole = diff_augment(x, Rows(generator(seed), 5), strength=strength)
    parts = [
        diff_augment(part, Rows(generator(seed), 5, start), strength=strength)
        for start, part in ((0, x[:1]), (1, x[1:3]), (3, x[3:]))
    ]
    torch.testing.assert_close(torch.cat(parts), whole)
    assert torch.equal(whole, diff_augment(x, generator(seed), strength=strength))
    assert strength == "weak" or not torch.equal(whole, x)


def test_the_same_numbers_are_drawn_whatever_they_decide():
    ends = []
    for probability in (0.0, 0.5, 1.0):
        for strength in STRENGTHS:
            draws = generator(5)
            diff_augment(images(), draws, strength=strength, probability=probability)
            ends.append(draws.get_state())
    assert all(torch.equal(end, ends[0]) for end in ends)


def test_weak_keeps_each_operation_half_of_the_time_and_strong_always():
    draws = generator(0)
    kept = torch.stack([Augmentation.draw(images(1), draws).keep for _ in range(400)]).sum(0)
    assert ((kept > 160) & (kept < 240)).all()
    assert all(Augmentation.draw(images(1), draws, strength="strong").keep.all() for _ in range(20))


def test_one_augmentation_treats_all_images_alike():
    x = images()
    augment = Augmentation.draw(x, generator(0), strength="strong")
    assert torch.equal(augment(x), augment(x))
    hole = augment(torch.ones_like(x)) == 0
    assert hole.any() and not augment(x)[hole].any()


def test_images_of_a_batch_differ_in_their_amounts():
    same = images(1).expand(3, -1, -1, -1)
    a, b, c = diff_augment(same, generator(0), strength="strong")
    assert not torch.equal(a, b) and not torch.equal(b, c)


def test_halves_are_augmented_in_full_precision_and_the_global_generator_is_not_touched():
    state = torch.get_rng_state()
    assert diff_augment(images().bfloat16(), generator(0)).dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), state)


def test_an_unknown_strength_is_refused():
    with pytest.raises(ValueError, match="strength='stong' is not known, did you mean 'strong'"):
        diff_augment(images(), generator(0), strength="stong")
