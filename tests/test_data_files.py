"""Data sets from files and the hub: columns, splits, fingerprints, unreadable pictures, and bad input's messages."""

import io
import shutil

import datasets
import numpy as np
import pytest
from PIL import Image

from softvq_lib.data import DataConfig, UnreadableImage, open_dataset
from softvq_lib.data import fingerprints as fingerprints_module


def encoded(value, size=(8, 6)):
    file = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(file, "png")
    return file.getvalue()


def folder_of(root, places):
    """Write one grey picture per path, the n-th with value n, and return the folder."""
    for value, place in enumerate(places):
        path = root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(value))
    return root


def values_of(source):
    """The grey value and label of each picture."""
    return [(image.getpixel((0, 0))[0], label) for image, label in (source[i] for i in range(len(source)))]


def opened(dataset, **options):
    return open_dataset(DataConfig(str(dataset), **options), 8)


CLASSES_20 = [f"{name}/{i:02d}.png" for name in ("ape", "bee") for i in range(10)]


def test_a_folder_of_classes_is_labelled_and_split(tmp_path):
    data = opened(folder_of(tmp_path / "zoo", CLASSES_20))
    assert data.describe() == "zoo: 19 training and 1 validation images, 2 classes (ape, bee)"
    pairs = values_of(data.train) + values_of(data.validation)
    assert sorted(pairs) == [(value, value // 10) for value in range(20)]
    assert pairs != sorted(pairs)


def test_a_folder_of_splits_uses_them(tmp_path):
    places = ["train/a/0.png", "train/b/1.png", "train/b/2.png", "val/a/3.png", "val/b/4.png", "test/a/5.png"]
    data = opened(folder_of(tmp_path / "zoo", places))
    assert sorted(values_of(data.train)) == [(0, 0), (1, 1), (2, 1)]
    assert sorted(values_of(data.validation)) == [(3, 0), (4, 1)]


def test_split_folders_without_classes_have_no_labels(tmp_path):
    data = opened(folder_of(tmp_path / "zoo", ["train/0.png", "train/1.png", "test/2.png"]))
    assert data.classes is None and data.describe().endswith("no labels")
    assert sorted(values_of(data.train)) == [(0, -1), (1, -1)] and values_of(data.validation) == [(2, -1)]


@pytest.mark.parametrize(
    "places",
    [
        ["0.png", "1.png", "2.png"],
        ["only/0.png", "only/1.png", "only/2.png"],
        ["a/0.png", "b/c/1.png", "2.png"],
    ],
)
def test_a_folder_without_classes_is_fine(tmp_path, places):
    data = opened(folder_of(tmp_path / "zoo", places))
    assert data.classes is None
    assert sorted(values_of(data.train) + values_of(data.validation)) == [(0, -1), (1, -1), (2, -1)]


def test_no_picture_is_lost_to_its_name(tmp_path):
    """Names that look like splits, patterns or hidden parents change nothing."""
    places = ["test/train_0.png", "car/val-1.png", "car/[2].PNG", "train/3.png"]
    data = opened(folder_of(tmp_path / ".cache" / "my [data] *", [*places, ".hidden/4.png"]))
    assert data.classes == ["car", "test", "train"]
    assert sorted(values_of(data.train) + values_of(data.validation)) == [(0, 1), (1, 0), (2, 0), (3, 2)]


def test_a_metadata_file_gives_columns_to_a_folder(tmp_path):
    root = folder_of(tmp_path / "zoo", ["0.png", "1.png", "2.png"])
    (root / "metadata.csv").write_text("file_name,kind\n0.png,ape\n1.png,bee\n2.png,ape\n")
    data = opened(root, label_column="kind")
    assert data.classes == ["ape", "bee"]
    assert sorted(values_of(data.train) + values_of(data.validation)) == [(0, 0), (1, 1), (2, 0)]


def test_a_linked_folder_counts_as_a_class(tmp_path):
    folder_of(tmp_path, ["zoo/a/0.png", "elsewhere/1.png"])
    (tmp_path / "zoo" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "elsewhere")
    data = opened(tmp_path / "zoo")
    assert sorted(values_of(data.train) + values_of(data.validation)) == [(0, 0), (1, 1)]


def write_parquet(path, features=None, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(path))
    return path


def records(values):
    return [{"bytes": encoded(value), "path": None} for value in values]


def test_parquet_with_features_is_read_and_split_by_file_name(tmp_path):
    features = datasets.Features({"img": datasets.Image(), "kind": datasets.ClassLabel(names=["ape", "bee"])})
    write_parquet(tmp_path / "train-0.parquet", features, img=records([0, 1]), kind=[0, 1])
    write_parquet(tmp_path / "train-1.parquet", features, img=records([2]), kind=[1])
    write_parquet(tmp_path / "validation-0.parquet", features, img=records([3]), kind=[0])
    for dataset in (tmp_path, tmp_path / "*.parquet"):
        data = opened(dataset)
        assert data.classes == ["ape", "bee"] and data.name == tmp_path.name
        assert sorted(values_of(data.train)) == [(0, 0), (1, 1), (2, 1)]
        assert values_of(data.validation) == [(3, 0)]


@pytest.mark.parametrize("kind", ["record", "bytes"])
@pytest.mark.parametrize("labels", [[7, 3, 7, -1], ["b", "a", "b", None], None])
def test_parquet_without_features_is_understood(tmp_path, kind, labels):
    images = records(range(4)) if kind == "record" else [encoded(value) for value in range(4)]
    columns = {"photo": images} | ({"target": labels} if labels else {})
    data = opened(write_parquet(tmp_path / "valley.parquet", **columns))
    assert data.classes == (sorted({str(v) for v in labels} - {"-1", "None"}) if labels else None)
    assert sorted(values_of(data.train) + values_of(data.validation)) == [
        (0, 1 if labels else -1), (1, 0 if labels else -1), (2, 1 if labels else -1), (3, -1)
    ]  # fmt: skip


def test_columns_can_be_named(tmp_path):
    path = write_parquet(
        tmp_path / "a.parquet", image=records([1, 2]), back=records([3, 4]), label=[0, 1], paint=["red", "sky"]
    )
    data = opened(path, image_column="back", label_column="paint")
    assert data.classes == ["red", "sky"]
    assert sorted(values_of(data.train) + values_of(data.validation)) == [(3, 0), (4, 1)]
    assert data.fingerprint != opened(path).fingerprint


def test_a_test_split_serves_for_validation_and_limit_for_training(tmp_path):
    write_parquet(tmp_path / "train.parquet", image=records(range(10)))
    write_parquet(tmp_path / "test.parquet", image=records([50, 51]))
    everything, few = opened(tmp_path), opened(tmp_path, limit=3)
    assert len(few.train) == 3 and len(few.validation) == 2
    assert values_of(few.train) == values_of(everything.train)[:3]
    assert few.fingerprint != everything.fingerprint


def test_a_hub_data_set_is_identified_by_its_revision(tmp_path, monkeypatch):
    table = datasets.Dataset.from_dict({"image": records([0, 1, 2])})
    cached = tmp_path / "owner___name" / "default" / "0.0.0" / ("a1" * 20) / "train.arrow"
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict(train=table))
    monkeypatch.setattr(datasets.Dataset, "cache_files", [{"filename": str(cached)}])
    first = opened("owner/name")
    assert first.name == "owner/name" and len(first.train) == 2
    assert first.fingerprint == opened("owner/name").fingerprint
    monkeypatch.setattr(datasets.Dataset, "cache_files", [{"filename": str(cached).replace("a1", "b2")}])
    assert first.fingerprint != opened("owner/name").fingerprint


def test_the_fingerprint_follows_content_and_not_place(tmp_path):
    root = folder_of(tmp_path / "zoo", CLASSES_20)
    first = opened(root).fingerprint
    moved = tmp_path / "other" / "name"
    shutil.copytree(root, moved)
    assert opened(moved).fingerprint == first
    (moved / "notes.txt").write_text("no picture")
    assert opened(moved).fingerprint == first
    (moved / CLASSES_20[4]).write_bytes(encoded(99))
    changed = opened(moved).fingerprint
    (moved / CLASSES_20[4]).rename(moved / "bee" / "99.png")
    assert len({first, changed, opened(moved).fingerprint}) == 3


def test_the_order_of_a_moved_folder_is_the_same(tmp_path):
    root = folder_of(tmp_path / "zoo", CLASSES_20)
    shutil.copytree(root, tmp_path / "a")
    assert values_of(opened(root).train) == values_of(opened(tmp_path / "a").train)


def test_large_data_sets_are_hashed_by_sizes_and_beginnings(tmp_path, monkeypatch):
    for name, value in {"WHOLE": 10, "SAMPLED_FILES": 2, "SAMPLED_BYTES": 4}.items():
        monkeypatch.setattr(fingerprints_module, name, value)
    files = [tmp_path / name for name in "abc"]

    def hashed(*contents):
        for path, content in zip(files, contents, strict=True):
            path.write_bytes(content)
        return fingerprints_module.content_hash(tmp_path, files[::-1])

    first = hashed(b"abcdef", b"bbbbbb", b"cccccc")
    assert hashed(b"abcdXX", b"XXXXXX", b"ccccXX") == first
    assert hashed(b"Xbcdef", b"bbbbbb", b"cccccc") != first
    assert hashed(b"abcdef", b"bbbbbb", b"Xccccc") != first
    assert hashed(b"abcdef", b"bbbbbbb", b"cccccc") != first


def test_unreadable_pictures_are_named(tmp_path):
    root = folder_of(tmp_path / "zoo", ["a/0.png", "a/1.png", "b/2.png", "b/3.png"])
    (root / "a/0.png").write_bytes(b"")
    (root / "a/1.png").write_bytes(b"hello")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "b/2.png")
    (root / "b/2.png").write_bytes((root / "b/2.png").read_bytes()[:2000])
    data = opened(root)
    (root / "b/3.png").unlink()
    found = {}
    for source in (data.train, data.validation):
        for index in range(len(source)):
            with pytest.raises(UnreadableImage) as caught:
                source[index]
            assert caught.value.index == index and caught.value.name in str(caught.value)
            found[caught.value.name] = caught.value.reason
    assert sorted(found) == ["a/0.png", "a/1.png", "b/2.png", "b/3.png"]
    assert "empty" in found["a/0.png"] and "not a picture" in found["a/1.png"]
    assert "truncated" in found["b/2.png"] and "No such file" in found["b/3.png"]


def test_unreadable_rows_are_named(tmp_path):
    images = [{"bytes": None, "path": None}, {"bytes": b"junk", "path": "x.png"}, *records([1, 2])]
    write_parquet(tmp_path / "train.parquet", image=images)
    write_parquet(tmp_path / "val.parquet", image=records([3]))
    source = opened(tmp_path).train
    found = {}
    for index in range(4):
        try:
            source[index]
        except UnreadableImage as error:
            found[error.name] = error.reason
    assert sorted(found) == ["row 0 of train", "row 1 of train, x.png"]
    assert "cell is empty" in found["row 0 of train"]


@pytest.mark.parametrize(
    ("dataset", "parts"),
    [
        ("digit", ["dataset='digit' is not known", "did you mean 'digits'", "owner/name"]),
        ("Shape", ["did you mean 'shapes'"]),
        ("folders", ["did you mean 'folder'"]),
        ("folder/absnt", ["no such folder", "holds no 'absnt'", "did you mean 'absent'"]),
        ("./nowhere/deep", ["no such folder", "holds no 'nowhere'"]),
        ("{tmp}/foldr", ["no such folder", "did you mean 'folder'"]),
        ("train.parquet", ["no such folder or file", "holds no 'train.parquet'"]),
        ("folder/empty", ["folder is empty", "one folder a class"]),
        ("folder/texts", ["holds 2 files (.csv, .txt) but no images"]),
        ("folder/texts/a.txt", ["file of kind '.txt'", "parquet"]),
        ("folder/x*.parquet", ["matches no file", "Check the pattern"]),
        ("folder/texts/*", ["which is not parquet", "for images give their folder"]),
        ("folder/one", ["one image only", "one for validation"]),
        ("folder/bad.parquet", ["bad.parquet is not a parquet file"]),
        ("folder/cut", ["could not be loaded", "may be damaged"]),
        ("folder/noimages.parquet", ["no image column found", "image_column", "count (int64), text (string)"]),
        ("folder/norows.parquet", ["holds no images"]),
        ("folder/valtest", ["has the splits validation, test and none named train"]),
        ("nobody/nothing", ["could not be had from the Hugging Face hub", "without a network use digits"]),
        (" ", ["dataset is empty"]),
    ],
)
def test_a_bad_data_set_gets_a_clear_error(bad_place, dataset, parts):
    with pytest.raises(ValueError) as caught:
        opened(dataset.format(tmp=bad_place))
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    root = tmp_path_factory.mktemp("bad")
    folder = root / "folder"
    for name in ("empty", "absent"):
        (folder / name).mkdir(parents=True)
    for name in ("texts/a.txt", "texts/b.csv"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("text")
    folder_of(folder, ["one/a.png", "valtest/val/0.png", "valtest/test/1.png"])
    (folder / "bad.parquet").write_bytes(b"hello")
    whole = write_parquet(folder / "whole" / "a.parquet", image=records([1, 2]), label=[0, 1], score=[0.5, 0.1])
    (folder / "cut").mkdir()
    (folder / "cut" / "a.parquet").write_bytes(whole.read_bytes()[:-20])
    write_parquet(folder / "noimages.parquet", count=[1], text=["a"])
    empty = datasets.Features({"image": datasets.Image()})
    write_parquet(folder / "norows.parquet", empty, image=[])
    return root


@pytest.fixture
def bad_place(bad_files, monkeypatch):
    monkeypatch.chdir(bad_files)
    return bad_files


@pytest.mark.parametrize(
    ("dataset", "options", "parts"),
    [
        ("folder/whole", {"image_column": "imag"}, ["image_column='imag' is no column", "did you mean 'image'"]),
        ("folder/whole", {"label_column": "lable"}, ["did you mean 'label'", "image (", "score (float64)"]),
        ("folder/whole", {"image_column": "label"}, ["does not hold images"]),
        ("folder/whole", {"label_column": "score"}, ["does not hold labels"]),
        ("folder/whole", {"crop": 0.8}, ["crop=0.8", "at least 1"]),
        ("folder/whole", {"limit": 0}, ["limit=0", "at least 1"]),
        ("folder/whole", {"workers": -1}, ["workers=-1"]),
        ("digits", {"label_column": "label"}, ["label_column='label' has no meaning", "leave it out"]),
    ],
)
def test_a_bad_parameter_gets_a_clear_error(bad_place, dataset, options, parts):
    with pytest.raises(ValueError) as caught:
        opened(dataset, **options)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_a_bad_image_size_gets_a_clear_error():
    with pytest.raises(ValueError, match="image_size=0"):
        open_dataset(DataConfig(), 0)
