"""WebDataset shards, damaged and lost shards, a stand-in for the hub, and bad input's messages."""

import json
import tarfile

import datasets
import numpy as np
import pytest
from shard_files import encoded, numbers_of, same, samples, streamed, train, write, write_parquet, write_tar

from softvq_lib.data import DataConfig, open_dataset, shards, streams


@pytest.fixture
def small(monkeypatch):
    """Lanes and windows that so few images have several of."""
    monkeypatch.setattr(streams, "LANES", 4)
    monkeypatch.setattr(streams, "WINDOW", 20)


def test_webdataset_shards_are_held_out_from_and_labelled(tmp_path):
    write_tar(tmp_path / "a.tar", samples(range(20)))
    data = open_dataset(DataConfig(str(tmp_path / "a.tar")), 8)
    assert data.describe() == "a: 19 training and 1 validation images, 3 classes (0, 1, 2)"
    batch = train(data.train, 1)[0]
    assert [number % 3 for number in numbers_of(batch.images)] == batch.labels.tolist()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", ["jpg", "PNG", "webp", "jpeg"])
def test_webdataset_labels_may_lie_in_json(tmp_path, streaming, ending):
    for shard, numbers in {"imagenet-train-00.tar": range(10), "imagenet-validation-00.tar": range(10, 14)}.items():
        write_tar(
            tmp_path / shard,
            [
                pair
                for number in numbers
                for pair in (
                    (f"d.x/{number}.{ending}", encoded(number)),
                    (f"d.x/{number}.json", json.dumps({"label": "abc"[number % 3], "width": 8.5}).encode()),
                )
            ],
        )
    data = open_dataset(DataConfig(str(tmp_path / "*.tar"), streaming=streaming), 8)
    assert (len(data.train), len(data.validation), data.classes) == (10, 4, ["a", "b", "c"])
    for batch in train(data.train, 1, batch_size=5):
        assert [number % 3 for number in numbers_of(batch.images)] == batch.labels.tolist()
    named = open_dataset(DataConfig(str(tmp_path / "*.tar"), streaming=streaming, label_column="json.label"), 8)
    assert named.fingerprint == data.fingerprint


@pytest.mark.parametrize("streaming", [False, True])
def test_a_table_may_hold_json_too(tmp_path, streaming):
    for name in ("train", "val"):
        rows = [{"bytes": encoded(number), "path": None} for number in range(6)]
        table = datasets.Dataset.from_dict(
            {"png": rows, "json": [{"label": "ab"[n % 2], "score": 0.5} for n in range(6)]}
        )
        table.to_parquet(str(tmp_path / f"{name}.parquet"))
    data = open_dataset(DataConfig(str(tmp_path), streaming=streaming), 8)
    assert data.classes == ["a", "b"]
    (batch,) = train(data.train, 1, batch_size=6)
    assert [number % 2 for number in numbers_of(batch.images)] == batch.labels.tolist()


@pytest.mark.parametrize("streaming", [False, True])
def test_samples_without_a_picture_or_label(tmp_path, streaming):
    pairs = [pair for pair in samples(range(8)) if pair[0] not in ("0005.png", "0006.cls", "0007.cls")]
    hidden = [("._0001.png", b"x"), ("__0002.png", b"x"), ("README", b"x")]
    write_tar(tmp_path / "train.tar", [*pairs, *hidden])
    write_tar(tmp_path / "val.tar", samples(range(2)))
    data = open_dataset(DataConfig(str(tmp_path), streaming=streaming), 8)
    assert len(data.train) == 8
    (batch,) = train(data.train, 1, batch_size=8)
    shown = dict(zip(numbers_of(batch.images), batch.labels.tolist(), strict=True))
    assert shown == {0: 0, 1: 1, 2: 2, 3: 0, 4: 1, 6: -1, 7: -1}
    assert [reason for _, _, reason in batch.unreadable] == ["the cell is empty"]


def test_what_was_learnt_of_a_tar_is_kept(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "train.tar", samples(range(9)))
    first = shards.TarShard(str(path), "train.tar", "png", "cls")
    monkeypatch.setattr(tarfile, "open", None)
    again = shards.TarShard(str(path), "train.tar", "png", "cls")
    assert np.array_equal(first.offsets, again.offsets) and first.labels == again.labels == [0, 1, 2] * 3
    monkeypatch.undo()
    write_tar(path, samples(range(11)))
    assert shards.TarShard(str(path), "train.tar", "png", "cls").count == 11
    # No place for it is no reason to stop.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(path / "below-a-file"))
    assert shards.TarShard(str(path), "train.tar", "png", "cls").count == 11


def torn(content, how):
    header = content.index(b"0003.png")
    if how == "inside a picture":
        return content[: header + 512 + 20]
    if how == "between samples":
        return content[:header]
    if how == "a damaged header":
        return content[:header] + b"\xff" * 512 + content[header + 512 :]
    return content[: header + 100]  # inside a header


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("how", ["inside a picture", "between samples", "a damaged header", "inside a header"])
def test_a_torn_tar_is_an_error_and_no_shorter_data_set(tmp_path, how, streaming):
    whole = write_tar(tmp_path / "train-1.tar", samples(range(8))).read_bytes()
    for name in ("train-0.tar", "val.tar"):
        (tmp_path / name).write_bytes(whole)
    (tmp_path / "train-1.tar").write_bytes(torn(whole, how))
    with pytest.raises(ValueError, match=r"shard .*train-1.tar cannot be read.*Fetch or write it again"):
        open_dataset(DataConfig(str(tmp_path), streaming=streaming), 8)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("change", ["gone", "shorter"])
def test_a_shard_lost_while_training_is_named(tmp_path, small, workers, change):
    for kind in ("tar", "parquet"):
        source = streamed(write(tmp_path / kind, kind)).train
        before = train(source, 30)
        for path in (tmp_path / kind).glob("train-*"):
            path.write_bytes(path.read_bytes()[:300]) if change == "shorter" else path.unlink()
        with pytest.raises(ValueError, match=rf"^shard .*train-\d.{kind} cannot be read.*last checkpoint is kept"):
            train(source, 30, workers=workers)
        assert len(before) == 30


# -- the hub, in a local stand-in ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_hub_data_set_streams_at_its_commit(tmp_path, monkeypatch, small, kind):
    build = datasets.load_dataset_builder

    def builder(name, **options):
        if options:
            return build(name, **options)
        place = f"local://{tmp_path}/{name}@{commit}"
        splits = {"train": f"{place}/train-*", "validation": f"{place}/val-*"}
        return build({"tar": "webdataset"}.get(kind, kind), data_files=splits)

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    monkeypatch.chdir(tmp_path.root)  # `datasets` takes such addresses relative to where it runs
    found = []
    for commit in ("a1" * 20, "b2" * 20):
        folder = write(tmp_path / "owner" / f"name@{commit}", kind)
        data = streamed("owner/name")
        assert (data.name, len(data.train), len(data.validation)) == ("owner/name", 103, 12)
        assert all("://" in shard.url for shard in data.train.shards)
        assert same(train(data.train, 14), train(streamed(folder).train, 14))
        assert streamed("owner/name").fingerprint == data.fingerprint
        found.append(data.fingerprint)
    assert found[0] != found[1]


def test_a_hub_data_set_of_other_files_is_not_streamed(tmp_path, monkeypatch):
    (tmp_path / "train.csv").write_text("a\n1\n")
    made = datasets.load_dataset_builder("csv", data_files=str(tmp_path / "train.csv"))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: made)
    with pytest.raises(ValueError, match="'owner/name' is not kept as parquet files or WebDataset shards.*leave"):
        streamed("owner/name")


# -- errors --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bad_place(tmp_path_factory):
    root = tmp_path_factory.mktemp("bad")
    write_tar(root / "alone" / "train-0.tar", samples(range(4)))
    write_tar(root / "empty" / "train-0.tar", [])
    write_tar(root / "texts" / "train-0.tar", [(f"{i}.txt", b"text") for i in range(3)])
    write_tar(root / "texts" / "val-0.tar", [(f"{i}.txt", b"text") for i in range(3)])
    write_parquet(root / "both" / "train-0.parquet", range(3))
    write_tar(root / "both" / "val-0.tar", samples(range(3)))
    (root / "images").mkdir()
    (root / "images" / "0.png").write_bytes(encoded(1))
    (root / "junk.tar").write_bytes(b"no tar at all" * 100)
    (root / "nothing.tar").write_bytes(b"")
    return root


@pytest.mark.parametrize(
    ("streaming", "dataset", "parts"),
    [
        (True, "digits", ["streaming has no meaning for dataset='digits'", "leave it out"]),
        (True, "images", ["holds neither parquet files nor WebDataset shards", "leave streaming out"]),
        (True, "images/0.png", ["file of kind '.png'", "shards (.tar)"]),
        (True, "alone", ["no split for validation", "validation*"]),
        (True, "absent/*.tar", ["matches no file", "Check the pattern"]),
        (True, "./absent.tar", ["holds no 'absent.tar'"]),
        (False, "./absent.tar", ["holds no 'absent.tar'"]),
        (True, "texts", ["no image column found", "txt (string)"]),
        (False, "texts", ["no image column found", "txt (string)"]),
        (False, "empty", ["holds no images"]),
        (True, "empty/train-0.tar", ["could not be loaded"]),
        (False, "both/*", ["matches both parquet and tar files", ".tar"]),
        (False, "junk.tar", ["junk.tar cannot be read"]),
        (False, "nothing.tar", ["nothing.tar cannot be read", "empty file"]),
        (True, "nobody/nothing", ["could not be had from the Hugging Face hub"]),
    ],
)
def test_a_bad_data_set_gets_a_clear_error(bad_place, monkeypatch, streaming, dataset, parts):
    monkeypatch.chdir(bad_place)
    with pytest.raises(ValueError) as caught:
        open_dataset(DataConfig(dataset, streaming=streaming), 8)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
