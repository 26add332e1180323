"""Random numbers of a batch's rows: the same however the batch is cut, and for seeds the same in any company."""

import pytest
import torch
from torch import Generator, Tensor

from softvq_lib.draws import Draws, Rows, Seeds, generator_of, normal, uniform
from softvq_lib.tokenizers import KL

DOUBLE = torch.zeros((), dtype=torch.float64)
CUTS = [(7,), (3, 4), (1, 1, 5), (1,) * 7]


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def numbers(rows: int, draws: Draws, like: Tensor = DOUBLE) -> Tensor:
    """Three draws one after the other, (rows, 13)."""
    drawn = [normal((rows, 2, 3), draws, like), uniform((rows, 5), draws, like), normal((rows, 2), draws, like)]
    return torch.cat([x.flatten(1) for x in drawn], dim=1)


@pytest.mark.parametrize("cut", CUTS)
def test_rows_do_not_depend_on_the_cut(cut):
    whole, start = numbers(7, seeded()), 0
    for rows in cut:
        assert torch.equal(numbers(rows, Rows(seeded(), 7, start)), whole[start : start + rows])
        start += rows


def test_every_part_leaves_the_generator_in_the_same_state():
    generators = [seeded(), seeded()]
    for start, generator in zip((0, 4), generators, strict=True):
        numbers(3, Rows(generator, 7, start))
    assert torch.equal(*(generator.get_state() for generator in generators))


@pytest.mark.parametrize("like", [torch.zeros(1), DOUBLE])
@pytest.mark.parametrize("draws", [None, seeded(), Rows(seeded(), 9, 1), Seeds(range(8))])
def test_shape_type_and_range(draws, like):
    x, u = normal((8, 400), draws, like), uniform((8, 400), draws, like)
    assert x.shape == u.shape == (8, 400) and x.dtype == u.dtype == like.dtype
    assert abs(x.mean()) < 0.1 and abs(x.std() - 1) < 0.1
    assert 0 <= u.min() < 0.05 and 0.95 < u.max() < 1


def test_the_global_generator_is_used_only_when_there_is_none():
    before = torch.get_rng_state()
    for draws in (seeded(), Rows(seeded(), 3), Seeds(range(3))):
        numbers(3, draws)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(0)
    assert torch.equal(numbers(3, None), numbers(3, seeded()))


def test_a_seed_gives_its_row_in_any_company():
    together, alone = numbers(3, Seeds([11, 5, 11])), numbers(1, Seeds([5]))
    assert torch.equal(together[1], alone[0]) and torch.equal(together[0], together[2])
    assert len(together.unique()) == 2 * 13, "rows of other seeds and later draws are other numbers"


def test_the_generator_of_the_batch():
    generator = seeded()
    assert generator_of(Rows(generator, 4, 2)) is generator_of(generator) is generator
    assert generator_of(None) is None


def test_bad_numbers_of_rows_are_named():
    with pytest.raises(ValueError, match="rows 3 to 6 of a batch of 5"):
        normal((3, 2), Rows(seeded(), 5, 3), DOUBLE)
    with pytest.raises(ValueError, match="2 seeds for 3 rows: give one seed a row"):
        uniform((3, 2), Seeds([0, 1]), DOUBLE)


@pytest.mark.parametrize("cut", CUTS)
def test_kl_samples_do_not_depend_on_the_cut(cut):
    quantizer, z_hat = KL(2).train(), torch.randn(7, 3, 4, generator=seeded(1))
    starts = torch.tensor([0, *cut]).cumsum(0)[:-1].tolist()
    for whole, draws in (
        (quantizer(z_hat, seeded())[0], [Rows(seeded(), 7, start) for start in starts]),
        (quantizer.sample(z_hat, Seeds(range(7))), [Seeds(range(s, s + n)) for s, n in zip(starts, cut, strict=True)]),
    ):
        parts = [quantizer(x, each)[0] for x, each in zip(z_hat.split(cut), draws, strict=True)]
        torch.testing.assert_close(torch.cat(parts), whole, atol=1e-6, rtol=0)
