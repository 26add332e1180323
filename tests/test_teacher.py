"""A teacher's features computed once for all runs: their values, being filled, shared, gone on with and refused."""

import json
import multiprocessing
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from softvq_lib.config import fingerprint
from softvq_lib.data import DataConfig, open_dataset, validation_batches
from softvq_lib.features import Features, build_features
from softvq_lib.losses import LossConfig
from softvq_lib.tokenizers import TokenizerConfig
from softvq_lib.training import TrainConfig, teacher, train
from softvq_lib.training import tokenizer as trainer
from softvq_lib.training.generator import LatentConfig, train_generator
from softvq_lib.training.teacher import HEADER, TOKENS, teacher_tokens

IMAGES = 100  # a whole batch and a part of one
DATA = DataConfig("digits", limit=IMAGES)
SIZES = {"image_size": 32, "side": 4}
SMALL = {"dataset": "digits", "limit": 64, "tokens": 4, "batch_size": 8, "val_images": 8, "steps": 4}
ALIGNED = {"alignment": "efflite0", "alignment_width": 16}


@pytest.fixture(scope="module")
def net():
    return build_features("efflite0")


@pytest.fixture(scope="module")
def data():
    return open_dataset(DATA, 32)


def opened(net, data, tmp_path, **more):
    return teacher_tokens(net, data, DATA, **SIZES, runs=str(tmp_path), **more)


def counted(monkeypatch, stop_after=None):
    """A list that grows with each batch that any net sees the tokens of; the call after `stop_after` is killed."""
    seen, tokens = [], Features.tokens

    def count(self, images, side=None):
        if stop_after is not None and len(seen) == stop_after:
            raise KeyboardInterrupt
        seen.append(len(images))
        return tokens(self, images, side)

    monkeypatch.setattr(Features, "tokens", count)
    return seen


def folder_of(tmp_path):
    (folder,) = (tmp_path / "teachers").iterdir()
    return folder


def test_it_holds_what_the_teacher_says_rounded(net, data, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher.engine, "has_bf16", lambda device: False)
    cached = opened(net, data, tmp_path)
    assert len(cached) == IMAGES and folder_of(tmp_path).name.startswith("efflite0-")
    whole = torch.cat([net.tokens(b.images, 4) for b in validation_batches(data.train, image_size=32, batch_size=64)])
    order = torch.tensor([99, 0, 64, 3])
    found = cached(order)
    assert found.dtype == torch.float32 and found.shape == (4, 16, net.width)
    torch.testing.assert_close(found, whole[order], rtol=2**-11, atol=2**-25)


def test_it_is_close_in_the_precision_of_the_device(net, data, tmp_path):
    cached = opened(net, data, tmp_path)
    (batch, *_) = validation_batches(data.train, image_size=32, batch_size=64)
    cosine = torch.cosine_similarity(cached(batch.indices), net.tokens(batch.images, 4), dim=-1)
    assert cosine.min() > 0.99


def test_the_second_opening_computes_nothing(net, data, tmp_path, monkeypatch):
    seen = counted(monkeypatch)
    first = opened(net, data, tmp_path)
    assert seen == [64, 36]
    second = opened(net, data, tmp_path)
    assert seen == [64, 36]
    assert torch.equal(first(torch.arange(IMAGES)), second(torch.arange(IMAGES)))


def test_one_that_was_killed_goes_on(net, data, tmp_path, monkeypatch):
    whole = opened(net, data, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        counted(patch, stop_after=1)
        opened(net, data, tmp_path)
    torn = folder_of(tmp_path) / TOKENS
    with open(torn, "ab") as file:  # killed in the middle of a write
        file.write(b"half of a batch")
    seen = counted(monkeypatch)
    resumed = opened(net, data, tmp_path)
    assert seen == [36]
    assert torn.read_bytes() == (whole.folder / TOKENS).read_bytes()
    assert resumed.header == whole.header


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("other", ["holds other features", "weights: 'x' there", "delete"]),
        ("no json", ["teacher.json cannot be read", "delete"]),
        ("no header", ["it is no header of features"]),
        ("torn", ["tokens.f16 is torn", "bytes expected", "delete"]),
        ("gone", ["tokens.f16 is torn", "0 found"]),
    ],
)
def test_what_does_not_fit_is_refused(net, data, tmp_path, damage, words):
    opened(net, data, tmp_path)
    folder = folder_of(tmp_path)
    header = json.loads((folder / HEADER).read_text())
    if damage == "other":
        (folder / HEADER).write_text(json.dumps(header | {"weights": "x"}))
    elif damage.startswith("no"):
        (folder / HEADER).write_text({"no json": "{", "no header": "[]"}[damage])
    elif damage == "torn":
        (folder / TOKENS).write_bytes((folder / TOKENS).read_bytes()[:-1])
    else:
        (folder / TOKENS).unlink()
    with pytest.raises(ValueError) as error:
        opened(net, data, tmp_path)
    for word in words:
        assert word in str(error.value)


def test_other_teachers_data_and_sizes_have_features_of_their_own(net, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher, "_fill", lambda folder, identity, *rest: (folder / TOKENS).touch() or {"bytes": 0})
    monkeypatch.setattr(teacher, "TeacherTokens", lambda folder, header: SimpleNamespace(folder=folder))

    def folder(net=net, limit=10, **sizes):
        data = DataConfig("digits", limit=limit)
        return teacher_tokens(net, open_dataset(data, 32), data, **SIZES | sizes, runs=str(tmp_path)).folder

    random = [build_features("efflite0", random=True, seed=seed) for seed in (0, 1)]
    others = [
        folder(net=other) for other in (build_features("efflite1"), build_features("efflite0", least=64), *random)
    ]
    others += [folder(limit=11), folder(side=8), folder(image_size=64)]
    assert len({folder(), *others}) == 8
    assert folder() == folder(net=build_features("efflite0"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"flip": True}, ["mine=True", "flip=True", "flip=False", "mine=False"]),
        ({"crop": 1.25}, ["crop=1.25", "crop=1"]),
        ({"streaming": True}, ["streaming=True", "streaming=False"]),
    ],
)
def test_images_that_change_are_refused(change, words):
    with pytest.raises(ValueError) as error:
        teacher.check_unchanging("mine", DataConfig("somewhere", **change))
    for word in words:
        assert word in str(error.value)


def test_images_that_are_not_square_are_refused_by_name(net, tmp_path):
    (tmp_path / "images").mkdir()
    for number, size in enumerate([(32, 32), (65, 64), (32, 48), (64, 64)] * 2):
        Image.new("RGB", size, (9 * number, 50, 100)).save(tmp_path / "images" / f"{number}.png")
    config = DataConfig(str(tmp_path / "images"), workers=0)
    with pytest.raises(ValueError, match=r"\((2|6)\.png\).*not square.*make the images square"):
        teacher_tokens(net, open_dataset(config, 32), config, **SIZES, runs=str(tmp_path / "runs"))
    for number in (2, 6):
        (tmp_path / "images" / f"{number}.png").unlink()
    cached = teacher_tokens(net, open_dataset(config, 32), config, **SIZES, runs=str(tmp_path / "runs"))
    assert cached(torch.arange(len(cached))).isfinite().all()  # 65 x 64 is 32 x 32 to the pixel, wherever it is cropped


def test_an_unreadable_image_has_no_features(net, tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(110):
        Image.new("RGB", (32, 32), (number, 50, 100)).save(tmp_path / "images" / f"{number:03d}.png")
    config = DataConfig(str(tmp_path / "images"), workers=0)
    train = open_dataset(config, 32).train
    name = train.name(0)
    (tmp_path / "images" / name).write_bytes(b"no picture")
    data = open_dataset(config, 32)
    cached = teacher_tokens(net, data, config, **SIZES, runs=str(tmp_path / "runs"))
    missing = cached(torch.arange(len(cached))).isnan().flatten(1).any(1)
    assert [data.train.name(index) for index in missing.nonzero().flatten().tolist()] == [name]


def test_features_too_large_for_float16_are_refused():
    tokens = torch.ones(3, 2, 2)
    tokens[1, 0, 0] = 1e5
    with pytest.raises(ValueError, match=r"features of image 17 cannot be stored.*1e\+05.*mine=False"):
        teacher._stored(tokens, torch.tensor([5, 17, 9]), "mine")


def test_a_full_disk_is_noticed_before_the_teacher_runs(net, data, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match="0 MB of free space, but the features of 100 more images need 1 MB"):
        opened(net, data, tmp_path)


class _Slow:
    """Enough of a teacher to be cached: it says of which process it is, and takes its time."""

    label, fingerprint, least, size, width = "slow", "same", 1, None, 1

    def __init__(self, value):
        self.value, self.weight = value, torch.nn.Parameter(torch.zeros(()))

    def parameters(self):
        return iter([self.weight])

    def tokens(self, images, side):
        time.sleep(0.5)
        return torch.full((len(images), side * side, 1), self.value)


def _open_in_a_process(value, runs, found):
    cached = teacher_tokens(_Slow(value), open_dataset(DATA, 32), DATA, **SIZES, runs=runs)
    found.put((value, cached(torch.arange(IMAGES)).unique().tolist()))


def test_of_two_processes_one_computes_and_the_other_waits(tmp_path):
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    processes = [context.Process(target=_open_in_a_process, args=(v, str(tmp_path), found)) for v in (1.0, 2.0)]
    for process in processes:
        process.start()
    results = dict(found.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    assert results[1.0] == results[2.0] and len(results[1.0]) == 1


# -- in the trainers -------------------------------------------------------------------------------------------------


def test_an_aligned_run_needs_no_teacher_in_its_steps(tmp_path, monkeypatch):
    seen = counted(monkeypatch)
    run = train(**SMALL, **ALIGNED, alignment_cached=True, runs=str(tmp_path))
    assert seen == [64]
    other = train(**SMALL, **ALIGNED, alignment_cached=True, seed=1, runs=str(tmp_path))
    assert seen == [64] and other.path != run.path and run.identity["alignment_cached"] is True
    plain = train(**SMALL, **ALIGNED, runs=str(tmp_path))
    assert plain.path != run.path
    ours, theirs = ([row["alignment"] for row in it.metrics if "alignment" in row] for it in (run, plain))
    assert ours == pytest.approx(theirs, abs=2e-3)


def test_identities_are_what_they_were(tmp_path):
    """Names of runs made before these settings existed."""

    def name(**settings):
        loss = LossConfig(**settings).resolved("softvq")
        config = TokenizerConfig(tokens=16).resolved()
        data = SimpleNamespace(fingerprint="data")
        return fingerprint(trainer._identity(config, DataConfig(), loss, TrainConfig(), data))[:16]

    assert name() == name(alignment_cached=True) == "248615420ed83551"
    assert name(alignment="efflite2") == "4bcba74815f296a8"
    assert name(alignment="efflite2", alignment_cached=True) != name(alignment="efflite2")


def test_a_flip_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="alignment_cached=True.*flip=True"):
        train(**SMALL, **ALIGNED, alignment_cached=True, flip=True, runs=str(tmp_path / "runs"))
    with pytest.raises(ValueError, match="align_cached=True.*flip=True"):
        train_generator(
            align_teacher="efflite0", align_block=2, align_cached=True, flip=True, runs=str(tmp_path / "runs")
        )
    assert not (tmp_path / "runs").exists()


def test_a_generator_shares_the_features_of_the_tokenizers(tmp_path, monkeypatch):
    monkeypatch.setattr("softvq_lib.generators.alignment._HIDDEN", 16)
    made = train(**SMALL, **ALIGNED, alignment_cached=True, runs=str(tmp_path))
    seen = counted(monkeypatch)
    settings = {name: SMALL[name] for name in ("dataset", "limit", "batch_size", "val_images", "steps")}
    aligned = {"align_teacher": "efflite0", "align_block": 2, "sample_steps": 1}
    settings |= {"tokenizer": made.name, "runs": str(tmp_path), **aligned}
    run = train_generator(**settings, align_cached=True)
    assert seen == [8]  # the held-out images
    assert run.identity["align_cached"] is True
    plain = train_generator(**settings)
    assert "align_cached" not in plain.identity and plain.path != run.path
    ours, theirs = ([row["loss"] for row in it.metrics if "loss" in row] for it in (run, plain))
    assert np.allclose(ours, theirs, atol=5e-3)
    assert LatentConfig().align_cached is False
