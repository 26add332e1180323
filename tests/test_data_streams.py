"""Streaming: an order that processes, workers and restarts cannot change, and that reads no more than it must."""

import io
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from shard_files import TRAIN, numbers_of, same, samples, streamed, train, write, write_tar

from softvq_lib.data import DataConfig, UnreadableLog, open_dataset, shards, streams, validation_batches
from softvq_lib.data.images import fit, to_tensor
from softvq_lib.data.streams import StreamOrder


@pytest.fixture(scope="module", params=["tar", "parquet"])
def folder(request, tmp_path_factory):
    return write(tmp_path_factory.mktemp("shards") / "greys", request.param)


@pytest.fixture
def small(monkeypatch):
    """Lanes and windows that so few images have several of."""
    monkeypatch.setattr(streams, "LANES", 4)
    monkeypatch.setattr(streams, "WINDOW", 20)


def test_a_streamed_data_set_opens_as_a_loaded_one_does(folder):
    loaded, ours = open_dataset(DataConfig(str(folder)), 8), streamed(folder)
    assert ours.describe() == loaded.describe() == "greys: 103 training and 12 validation images, 3 classes (0, 1, 2)"
    assert ours.fingerprint != loaded.fingerprint
    for split in ("train", "validation"):
        pairs = [
            sorted((image.tobytes(), label) for image, label in (source[i] for i in range(len(source))))
            for source in (getattr(ours, split), getattr(loaded, split))
        ]
        assert pairs[0] == pairs[1] and len(pairs[0]) > 5
    for pattern in ("*", "*.tar" if "tar" in os.listdir(folder)[0] else "*.parquet"):
        assert streamed(folder / pattern).fingerprint == ours.fingerprint


def test_a_streamed_batch_shows_what_its_numbers_say(folder, small):
    for batch in train(streamed(folder).train, 14):
        assert numbers_of(batch.images) == batch.indices.tolist()
        assert batch.labels.tolist() == [number % 3 for number in batch.indices.tolist()]


@pytest.mark.parametrize("batch_size", [8, 7, 10])
def test_an_epoch_shows_every_picture_once_but_for_the_rest(folder, small, batch_size):
    steps = 103 // batch_size
    epochs = torch.stack([b.indices for b in train(streamed(folder).train, 3 * steps, batch_size=batch_size)])
    epochs = epochs.reshape(3, steps * batch_size).tolist()
    assert all(len(set(epoch)) == steps * batch_size for epoch in epochs)
    assert set().union(*epochs) == set(range(103))
    assert epochs[0] != epochs[1] != epochs[2] != sorted(epochs[2])


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(folder, small, workers):
    options = {"flip": True, "crop": 1.5, "seed": 3, "start_step": 2}
    source = streamed(folder).train
    assert same(train(source, 15, **options), train(source, 15, workers=workers, **options))


@pytest.mark.parametrize("parts", [2, 4])
def test_processes_share_the_same_batches(folder, small, parts):
    options = {"flip": True, "crop": 1.5, "steps": 15}
    whole = train(streamed(folder).train, **options)
    shares = [train(streamed(folder).train, part=(number, parts), **options) for number in range(parts)]
    for batch, *rows in zip(whole, *shares, strict=True):
        assert [len(row) for row in rows] == [8 // parts] * parts
        assert torch.equal(batch.images, torch.cat([row.images for row in rows]))
        assert torch.equal(batch.indices, torch.cat([row.indices for row in rows]))
        assert torch.equal(batch.labels, torch.cat([row.labels for row in rows]))


def test_a_later_start_goes_on_exactly_there(folder, small):
    options = {"flip": True, "crop": 1.5}
    whole = train(streamed(folder).train, 27, **options)
    for start in (1, 2, 3, 11, 12, 13, 26, 27):  # an epoch has 12 steps, a window of a lane 2 and a half
        assert same(whole[start:], train(streamed(folder).train, 27, start_step=start, **options))


def test_the_crop_is_that_of_seed_epoch_and_position(tmp_path):
    """The very generator of data sets that are not streamed."""
    rng = np.random.default_rng(0)
    for name in ("train", "val"):
        pictures = [Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)) for _ in range(6)]
        files = [io.BytesIO() for _ in pictures]
        for picture, file in zip(pictures, files, strict=True):
            picture.save(file, "png")
        write_tar(tmp_path / f"{name}.tar", [(f"{i}.png", file.getvalue()) for i, file in enumerate(files)])
    source = streamed(tmp_path).train
    batch = train(source, 4, batch_size=2, seed=5, crop=1.5, flip=True)[3]
    for row, index in enumerate(batch.indices.tolist()):
        generator = np.random.default_rng((5, 1, 1, row))  # three steps to an epoch: the first positions of the second
        pixels = fit(source[index][0], 8, generator, crop=1.5, flip=True)
        assert torch.equal(batch.images[row], to_tensor(torch.from_numpy(pixels.copy())[None])[0])


def test_seed_and_batch_size_decide_the_order(folder, small):
    source = streamed(folder).train
    orders = [
        torch.cat([batch.indices for batch in train(source, 6, **options)]).tolist()[:42]
        for options in ({}, {"seed": 1}, {"batch_size": 7})
    ]
    assert orders[0] != orders[1] and orders[0] != orders[2]


@pytest.fixture
def touched(monkeypatch):
    """Counts the rows that are read from shards, and the shards by name."""
    seen = {"rows": 0, "opened": 0, "shards": set()}
    for cls in (shards.TarShard, shards.ParquetShard):
        original = cls.rows

        def rows(self, start, original=original):
            seen["shards"].add(self.name)
            seen["opened"] += 1
            for row in original(self, start):
                seen["rows"] += 1
                yield row

        monkeypatch.setattr(cls, "rows", rows)
    return seen


def test_a_process_reads_its_own_share_alone(folder, small, touched):
    source = streamed(folder).train
    train(source, 12, part=(1, 4))
    assert touched["rows"] == 12 * 2
    assert len(touched["shards"]) < len(TRAIN)


def test_starting_anywhere_reads_one_window_of_each_lane(folder, small, touched):
    source = streamed(folder).train
    train(source, 30, start_step=29)
    assert touched["rows"] <= streams.WINDOW


def test_pictures_of_a_batch_come_from_all_over_the_data():
    order = StreamOrder(np.full(100, 1000), 256, 0)
    assert (order.lanes, order.share, order.window, order.steps) == (64, 4, 32, 390)
    places = [order.pieces(0, lane, 0)[0] for lane in range(order.lanes)]
    assert len({shard for shard, _, _ in places}) > 50
    assert sum(after - first for lane in range(64) for _, first, after in order.pieces(0, lane, 0)) == 390 * 256
    turns = [order.turns(*key) for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert all(sorted(turn) == list(range(32)) for turn in turns) and len(set(map(tuple, turns))) == 4


@pytest.mark.parametrize(("batch_size", "lanes"), [(1, 1), (7, 7), (64, 64), (96, 48), (100, 50), (256, 64), (67, 1)])
def test_lanes_follow_from_the_batch_size(batch_size, lanes):
    assert StreamOrder(np.array([500]), batch_size, 0).lanes == lanes


@pytest.mark.parametrize("workers", [0, 2])
def test_validation_is_in_the_order_of_the_files(folder, workers):
    source = streamed(folder).validation
    batches = list(validation_batches(source, image_size=8, batch_size=4, limit=10, workers=workers))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(10))
    assert numbers_of(torch.cat([batch.images for batch in batches])) == list(range(103, 113))


def test_single_pictures_can_be_had_in_any_order(folder):
    source = streamed(folder).train
    numbers = [40, 41, 42, 3, 102, 0, 36, 37, 43]
    for held in (source, pickle.loads(pickle.dumps(source))):
        images = torch.stack([torch.from_numpy(np.asarray(held[number][0]).copy()) for number in numbers])
        assert numbers_of(to_tensor(images)) == numbers
    with pytest.raises(IndexError):
        source[103]


def test_a_forked_worker_opens_files_of_its_own(folder, touched, monkeypatch):
    source = streamed(folder).train
    assert [source[number][1] for number in range(4)] == [0, 1, 2, 0] and touched["opened"] == 1
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert [source[number][1] for number in range(4, 8)] == [1, 2, 0, 1] and touched["opened"] == 2


def test_limit_keeps_the_first_of_the_files(folder, small, touched):
    few = streamed(folder, limit=40)
    assert len(few.train) == 40 and len(few.validation) == 12
    assert few.fingerprint != streamed(folder).fingerprint
    indices = torch.cat([batch.indices for batch in train(few.train, 5)])
    assert sorted(indices.tolist()) == list(range(40))
    assert not {name for name in touched["shards"] if name[:7] == "train-3"}


@pytest.mark.parametrize("kind", ["tar", "parquet"])
@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_pictures_are_replaced_by_the_next_and_reported(tmp_path, small, kind, workers):
    whole = train(streamed(write(tmp_path / "whole", kind)).train, 24)
    source = streamed(write(tmp_path / "torn", kind, broken=[41, 102])).train
    batches = train(source, 24, workers=workers)
    indices, were = (torch.cat([batch.indices for batch in made]).tolist() for made in (batches, whole))
    assert indices == [{41: 42, 102: 0}.get(index, index) for index in were]
    assert numbers_of(torch.cat([batch.images for batch in batches])) == indices
    assert {report for batch in batches for report in batch.unreadable} == {
        (41, f"image 4 of train-1.{kind}", "not a picture that Pillow can read"),
        (102, f"image 19 of train-3.{kind}", "not a picture that Pillow can read"),
    }
    for start in (3, 14):
        assert same(batches[start:], train(source, 24, start_step=start))
    account = UnreadableLog(len(source))
    with pytest.raises(ValueError, match="2 of 103 images"):
        for batch in batches:
            account.add(batch.unreadable)


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_readable_is_an_error(tmp_path, small, workers):
    write_tar(tmp_path / "train.tar", samples(range(16), range(16)))
    write_tar(tmp_path / "val.tar", samples(range(4)))
    with pytest.raises(ValueError, match=r"in a row are unreadable.*not a picture"):
        train(streamed(tmp_path).train, 1, workers=workers)


def test_the_fingerprint_follows_content_and_not_place(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "moved")
    first = streamed(folder).fingerprint
    assert streamed(tmp_path / "moved").fingerprint == first
    name = next(name for name in os.listdir(folder) if name.startswith("train-1"))
    shutil.copy(folder / name.replace("1", "0"), tmp_path / "moved" / name)
    assert streamed(tmp_path / "moved").fingerprint != first


def test_what_cannot_be_shared_or_filled_is_an_error(folder):
    source = streamed(folder).train
    with pytest.raises(ValueError, match=r"3 processes cannot share the 8 lanes.*one of 1, 2, 4, 8 processes"):
        train(source, 1, part=(0, 3))
    with pytest.raises(ValueError, match="batch_size=104 is more than the 103 images.*leave streaming out"):
        train(source, 1, batch_size=104)
