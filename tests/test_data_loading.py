"""Batches: an order that workers and restarts cannot change, whole epochs, and the account of unreadable pictures."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from shard_files import same

from softvq_lib.data import Source, UnreadableImage, UnreadableLog, training_batches, validation_batches
from softvq_lib.data.loading import worker_count


class Greys(Source):
    """Pictures whose grey value is their number; `broken` ones cannot be read."""

    def __init__(self, count, broken=(), size=(12, 12)):
        self.count, self.broken, self.size = count, set(broken), size

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        index = self._check(index)
        if index in self.broken:
            raise UnreadableImage(index, self.name(index), "torn")
        ramp = np.arange(self.size[0] * self.size[1]).reshape(self.size) % 5
        return Image.fromarray((index + ramp).astype(np.uint8)).convert("RGB"), index % 3


def train(source, steps, **options):
    defaults = {"image_size": 8, "batch_size": 4, "seed": 0}
    return list(training_batches(source, steps=steps, **(defaults | options)))


def test_a_batch_has_the_promised_form():
    (batch,) = train(Greys(20), 1)
    assert batch.images.shape == (4, 3, 8, 8) and batch.images.dtype == torch.float32
    assert batch.images.min() >= -1 and batch.images.max() <= 1 and len(batch) == 4
    assert batch.labels.dtype == batch.indices.dtype == torch.int64
    assert batch.labels.tolist() == [i % 3 for i in batch.indices.tolist()]
    assert batch.unreadable == []


def test_an_epoch_is_a_permutation_without_its_rest():
    indices = torch.stack([batch.indices for batch in train(Greys(22), 15)])
    epochs = indices.reshape(3, 5 * 4).tolist()
    assert all(len(set(epoch)) == 20 for epoch in epochs)
    assert set().union(*epochs) == set(range(22))
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_whole_epoch_shows_every_picture_once():
    indices = torch.cat([batch.indices for batch in train(Greys(20), 5)])
    assert sorted(indices.tolist()) == list(range(20)) != indices.tolist()


def test_a_small_set_fills_batches_with_one_permutation_after_another():
    indices = torch.cat([batch.indices for batch in train(Greys(3), 6, batch_size=4)]).tolist()
    assert all(sorted(indices[i : i + 3]) == [0, 1, 2] for i in range(0, 24, 3))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers):
    options = {"flip": True, "crop": 1.5, "seed": 3}
    source = Greys(30, broken=[5, 6], size=(12, 16))
    assert same(train(source, 9, workers=0, **options), train(source, 9, workers=workers, **options))


@pytest.mark.parametrize("count", [3, 22])
def test_a_later_start_goes_on_exactly_there(count):
    options = {"flip": True, "crop": 1.5}
    whole = train(Greys(count), 13, **options)
    for start in (1, 5, 12, 13):
        assert same(whole[start:], train(Greys(count), 13, start_step=start, **options))


def test_the_seed_decides_order_and_augmentation():
    source = Greys(20)
    assert not torch.equal(train(source, 1)[0].indices, train(source, 1, seed=1)[0].indices)
    single = Greys(1, size=(12, 40))
    one, other = (train(single, 4, seed=seed, crop=1.5, flip=True) for seed in (0, 1))
    assert not same(one, other)
    assert len({tuple(batch.images.flatten().tolist()) for batch in one}) == 4


def test_options_change_the_pictures_and_not_the_order():
    source = Greys(20, size=(12, 20))
    plain, flipped = train(source, 5), train(source, 5, flip=True)
    assert all(torch.equal(a.indices, b.indices) for a, b in zip(plain, flipped, strict=True))
    pairs = [(a, b) for p, f in zip(plain, flipped, strict=True) for a, b in zip(p.images, f.images, strict=True)]
    assert all(torch.equal(a, b) or torch.equal(a, b.flip(-1)) for a, b in pairs)
    assert 0 < sum(torch.equal(a, b) for a, b in pairs) < len(pairs)


def test_the_global_generators_are_left_alone():
    torch.manual_seed(5), np.random.seed(5)
    train(Greys(20), 3, crop=1.5, flip=True), list(validation_batches(Greys(5), image_size=8, batch_size=4))
    drawn = torch.rand(3).tolist(), np.random.rand(3).tolist()
    torch.manual_seed(5), np.random.seed(5)
    assert drawn == (torch.rand(3).tolist(), np.random.rand(3).tolist())


@pytest.mark.parametrize("workers", [0, 1])
def test_validation_is_in_order_and_ends_with_the_rest(workers):
    batches = list(validation_batches(Greys(10), image_size=8, batch_size=4, workers=workers))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(10))
    few = list(validation_batches(Greys(10), image_size=8, batch_size=4, limit=5))
    assert [len(batch) for batch in few] == [4, 1]
    assert torch.equal(few[0].images, batches[0].images)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_pictures_are_replaced_by_the_next_and_reported(workers):
    batches = train(Greys(20, broken=[3, 4, 19]), 5, workers=workers)
    indices = torch.cat([batch.indices for batch in batches]).tolist()
    whole = torch.cat([batch.indices for batch in train(Greys(20), 5)]).tolist()
    assert indices == [{3: 5, 4: 5, 19: 0}.get(i, i) for i in whole]
    reports = [report for batch in batches for report in batch.unreadable]
    assert set(reports) == {(i, f"image {i}", "torn") for i in (3, 4, 19)}


@pytest.mark.parametrize("broken", [[1], [0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [1, 4, 5, 6, 7, 8, 9]])
def test_validation_leaves_unreadable_pictures_out_and_reports_each(broken):
    batches = list(validation_batches(Greys(10, broken), image_size=8, batch_size=4))
    assert all(len(batch) for batch in batches)
    assert torch.cat([batch.indices for batch in batches]).tolist() == [i for i in range(10) if i not in broken]
    assert [report[0] for batch in batches for report in batch.unreadable] == broken


def test_nothing_readable_is_an_error():
    with pytest.raises(ValueError, match=r"none of the validation images can be read.*image 0 \(torn\)"):
        list(validation_batches(Greys(6, range(6)), image_size=8, batch_size=4))
    for workers in (0, 1):
        with pytest.raises(ValueError, match=r"in a row are unreadable.*\(torn\)"):
            train(Greys(6, range(6)), 1, workers=workers)


def test_each_unreadable_picture_is_logged_once(caplog):
    account = UnreadableLog(400)
    with caplog.at_level(logging.WARNING):
        for batch in train(Greys(20, [3]), 20):
            account.add(batch.unreadable)
    assert len(account) == 1
    assert [record.getMessage() for record in caplog.records] == ["unreadable image left out: image 3: torn"]


def test_more_than_one_percent_unreadable_stops():
    account = UnreadableLog(200)
    account.add([(7, "a/7.png", "torn"), (8, "a/8.png", "empty"), (7, "a/7.png", "torn")])
    with pytest.raises(
        ValueError, match=r"3 of 200 images .* 1% .* a/7.png \(torn\); a/8.png \(empty\); b.png"
    ) as caught:
        account.add([(9, "b.png", "torn")])
    assert "Repair or remove" in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_account_stops_training_and_validation(workers):
    source = Greys(30, [3])
    for batches in (
        training_batches(source, image_size=8, batch_size=4, seed=0, steps=20, workers=workers),
        validation_batches(source, image_size=8, batch_size=4, workers=workers),
    ):
        account = UnreadableLog(len(source))
        with pytest.raises(ValueError, match="1 of 30 images"):
            for batch in batches:
                account.add(batch.unreadable)


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"image_size": -8}, {"seed": -1}, {"crop": 0.5}, {"start_step": -1}, {"workers": -2}]
)
def test_bad_arguments_are_named_before_any_work(options):
    (name, value), *_ = options.items()
    defaults = {"image_size": 8, "batch_size": 4, "seed": 0, "steps": 3}
    with pytest.raises(ValueError, match=f"{name}={value}"):
        training_batches(Greys(5), **(defaults | options))


def test_an_empty_source_is_an_error():
    with pytest.raises(ValueError, match="no images"):
        training_batches(Greys(0), image_size=8, batch_size=4, seed=0, steps=1)
    with pytest.raises(ValueError, match="total=0"):
        UnreadableLog(0)


def test_embedded_data_need_no_workers(monkeypatch):
    source = Greys(5)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(3)), raising=False)
    assert (worker_count(source, None), worker_count(source, 7)) == (2, 7)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert worker_count(source, None) == 4
    source.embedded = True
    assert worker_count(source, None) == 0
