"""Images of every kind as bytes, statistics of their features, saved references, and what is refused."""

import json

import numpy as np
import pytest
import torch
from flat_features import AS_INCEPTION, FLAT, MADE, REAL, SIDE, WIDTH, Flat, measured, pictures
from PIL import Image

from softvq_lib.data import Source
from softvq_lib.evaluation import export
from softvq_lib.evaluation.frechet import Moments, frechet_distance
from softvq_lib.evaluation.pixels import open_pixels
from softvq_lib.evaluation.reference import (
    Sample,
    image_statistics,
    load_statistics,
    reference_statistics,
    save_statistics,
    write_batch,
)


def exported(folder, images, labels, convention="mar"):
    """A finished export as `export_samples` writes it, in shards of 64."""
    folder.mkdir()
    shards = []
    for number, part in enumerate(images.permute(0, 2, 3, 1).numpy().copy() for images in images.split(64)):
        name = f"samples-{number:05d}.npy"
        shards.append({"name": name, "count": len(part), "sha256": export._save(folder / name, part)})
    header = {"count": len(images), "image_size": SIDE, "uint8": convention, "shards": shards}
    (folder / "samples.json").write_text(json.dumps(header))
    np.save(folder / "labels.npy", labels)
    return folder


class Held(Source):
    """Pictures with labels."""

    def __init__(self, images, labels=None):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        label = -1 if self.labels is None else int(self.labels[index])
        return Image.fromarray(self.images[index].permute(1, 2, 0).numpy()), label


def saved_pictures(folder, images):
    (folder / "deep").mkdir(parents=True)
    for number, image in enumerate(images):
        path = folder / ("deep" if number % 2 else "") / f"{number:03d}.png"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return folder


def every_kind(tmp_path, images):
    np.savez_compressed(tmp_path / "batch.npz", images.permute(0, 2, 3, 1).numpy())
    return {
        "bytes": images,
        "floats": images / 127.5 - 1,
        "array": images.permute(0, 2, 3, 1).numpy(),
        "stream": images.split(33),
        "source": Held(images),
        "export": exported(tmp_path / "export", images, np.arange(len(images)) % 3),
        "npz": tmp_path / "batch.npz",
    }


def test_every_kind_of_images_gives_the_same(tmp_path):
    images = REAL[:130]
    kinds = every_kind(tmp_path, images)
    folder = saved_pictures(tmp_path / "pictures", images)
    wanted = image_statistics(images, FLAT, progress=False)
    rules = dict.fromkeys(kinds, "stored") | {"floats": "dit", "export": "mar"}
    for kind, given in kinds.items():
        for options in ({}, {"image_size": SIDE}) if kind == "source" else ({},):
            statistics = image_statistics(given, FLAT, progress=False, batch_size=32, **options)
            assert statistics.facts["fingerprint"] == wanted.facts["fingerprint"], kind
            assert statistics.facts["image_size"] == [SIDE, SIDE] and statistics.count == 130
            assert statistics.facts["uint8"] == rules[kind] and torch.equal(statistics.sample, wanted.sample)
            assert statistics.facts["crop"] == ("centre" if options else "as given")
    sorted_by_path = image_statistics(folder, FLAT, progress=False)
    assert sorted_by_path.count == 130
    torch.testing.assert_close(sorted_by_path.moments.mean, wanted.moments.mean)
    larger = image_statistics(folder, FLAT, image_size=3, progress=False)
    assert larger.facts["image_size"] == [3, 3] and larger.facts["crop"] == "centre"


def test_bytes_by_each_convention():
    floats = torch.rand(40, 3, SIDE, SIDE) * 2.2 - 1.1
    for convention in export.CONVENTIONS:
        (batch, _), *_ = open_pixels(floats, convention=convention).batches(40)
        assert torch.equal(batch, export.to_uint8(floats, convention).permute(0, 3, 1, 2))
        assert open_pixels(floats, convention=convention).uint8 == convention


def broken(value, at):
    images = torch.zeros(60, 3, SIDE, SIDE)
    images[at, 0, 2, 2] = value
    return images


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (broken(torch.nan, 41), r"generated images: image 41 is not finite \(1 of the 28 in its batch\)"),
        (broken(torch.inf, 0), "image 0 is not finite"),
        (broken(255.0, 3), r"values up to 255: give floats in \[-1, 1\]"),
        (torch.zeros(20, 1, 4, 4), r"of shape \(20, 1, 4, 4\): give at least one, as"),
        (torch.zeros(0, 3, 4, 4), "give at least one"),
        (torch.zeros(20, 3, 5, 5, dtype=torch.int64), "are of type torch.int64"),
        ([MADE[:20], MADE[:20, :, :, :4]], "image 20 is 5 x 4 pixels and the first one 5 x 5"),
        ([np.zeros((2, 3))], "yields ndarray: batches are tensors"),
        ([], "generated images: there are no images"),
        (Held(MADE[:0]), "generated images: there are no images"),
        (7, "images of type int: give a tensor"),
    ],
)
def test_images_that_cannot_be_used(images, words):
    with pytest.raises(ValueError, match=words):
        measured(images, REAL, measures=("kid",))


def test_folders_and_files_that_cannot_be_used(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no images \(.png, .jpg"):
        measured(tmp_path / "empty")
    with pytest.raises(ValueError, match="is no folder"):
        measured(tmp_path / "missing")
    with pytest.raises(ValueError, match="missing.npz cannot be read as an .npz"):
        measured(tmp_path / "missing.npz")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match="holds x, but moments are arrays mu and sigma"):
        measured(tmp_path / "other.npz")
    np.savez(tmp_path / "floats.npz", np.zeros((20, 5, 5, 3)))
    with pytest.raises(ValueError, match=r"arr_0 is float64 \(20, 5, 5, 3\), but images are uint8"):
        measured(tmp_path / "floats.npz")
    folder = saved_pictures(tmp_path / "pictures", MADE[:12])
    Image.new("RGB", (7, 5)).save(folder / "zz.png")
    with pytest.raises(ValueError, match=r"zz.png is 7 x 5 pixels and the first one 5 x 5: give image_size"):
        measured(folder, measures=("kid",))
    (folder / "000.png").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"000.png.* (unreadable|cannot be read)"):
        measured(folder, measures=("kid",), image_size=5)
    export_folder = exported(tmp_path / "export", MADE, np.zeros(len(MADE)))
    with pytest.raises(ValueError, match="convention='dit', but .* was written with 'mar'"):
        measured(export_folder, convention="dit")
    (export_folder / "samples-00001.npy").write_bytes(b"torn")
    with pytest.raises(ValueError, match="samples-00001.npy is missing or damaged"):
        measured(export_folder)


def test_sides_that_do_not_fit_each_other():
    with pytest.raises(
        ValueError, match=r"image_size of generated images is \[5, 5\], but of reference images it is \[4"
    ):
        measured(MADE, REAL[..., :4, :4])
    made, real = open_pixels(MADE, crop="adm", what="a"), open_pixels(REAL, crop="centre", what="b")
    with pytest.raises(ValueError, match="crop of a is adm, but of b it is centre: crop both in the same way"):
        measured(made, real)
    a, b = open_pixels(MADE / 127.5 - 1, convention="dit"), open_pixels(REAL / 127.5 - 1, convention="repa")
    with pytest.raises(ValueError, match="uint8 of images is dit, but of images it is repa"):
        measured(a, b)
    other = image_statistics(REAL, AS_INCEPTION, progress=False)
    with pytest.raises(ValueError, match="extractor of generated images is .*'Flat'.* it is .*'Inception'"):
        measured(MADE, other)


def test_mismatched_labels(tmp_path):
    labels = torch.arange(200) % 4
    made, real = exported(tmp_path / "x", MADE, np.arange(170) % 3), Held(REAL, labels)
    words = r"x and reference images are of different classes: none in the first alone, 1 \(3\) in the second alone"
    with pytest.raises(ValueError, match=words):
        measured(made, real)
    assert measured(made, real, match_labels=False)["FD-Flat"].value > 0
    assert measured(open_pixels(MADE, labels=torch.arange(170) % 4), real)["FD-Flat"].value > 0
    assert measured(MADE, real)["FD-Flat"].value > 0  # of which nobody knows the labels
    with pytest.raises(ValueError, match="3 labels for 170 images"):
        open_pixels(MADE, labels=torch.zeros(3))
    with pytest.raises(ValueError, match="labels go with a tensor"):
        open_pixels(real, labels=labels)


def test_a_sample_is_random_and_does_not_depend_on_batches():
    rows = torch.arange(1000.0)[:, None]
    whole, parts = Sample(50), Sample(50)
    whole.update(rows)
    for part in rows.split(7):
        parts.update(part)
    assert torch.equal(whole.rows, parts.rows) and len(whole.rows.unique()) == 50
    counts = torch.zeros(40)
    for seed in range(400):
        sample = Sample(10, seed)
        sample.update(torch.arange(40.0)[:, None])
        counts[sample.rows[:, 0].long()] += 1
    assert counts.sum() == 4000 and counts.min() > 60 and counts.max() < 140  # 100 expected, sd 9


def test_statistics_do_not_depend_on_batches_nor_grow():
    small, large = (image_statistics(REAL, FLAT, batch_size=b, progress=False) for b in (3, 200))
    assert small.facts == large.facts and torch.equal(small.sample, large.sample)
    torch.testing.assert_close(small.moments.scatter, large.moments.scatter, rtol=1e-10, atol=1e-10)
    few, many = (image_statistics(pictures(n), FLAT, kept=50, progress=False) for n in (100, 3000))
    assert few.sample.shape == many.sample.shape == (50, WIDTH) and len(few.groups) == len(many.groups) == 8
    assert sum(group.count for group in many.groups) == many.count == 3000
    assert frechet_distance(many.moments, Moments.of(pictures(3000).flatten(1) / 255)) < 1e-6


def test_a_saved_reference_gives_the_same_numbers(tmp_path):
    found = measured()
    path = tmp_path / "real.safetensors"
    statistics = reference_statistics(REAL, path, FLAT, progress=False)
    for _ in range(5):
        save_statistics(statistics, tmp_path / "again.safetensors")
        assert path.read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    loaded = load_statistics(path)
    assert loaded.facts == statistics.facts and torch.equal(loaded.sample, statistics.sample)
    for each in measured(MADE, path).measures.values():
        same = found[each.name]
        for name in ("value", "low", "high", "floor"):
            assert getattr(each, name) == pytest.approx(getattr(same, name), rel=1e-6, abs=1e-9)
        assert (each.n, each.reference_n) == (170, 200)


def test_a_reference_is_reused_and_refused_for_others(tmp_path, monkeypatch):
    path = tmp_path / "real.safetensors"
    reference_statistics(REAL, path, FLAT, progress=False)
    with monkeypatch.context() as patched:
        patched.setattr(Flat, "forward", None)  # nothing is extracted again
        assert reference_statistics(REAL.split(7), path, FLAT, progress=False).count == 200
    cases = [
        ((REAL.flip(0), FLAT), {}, r"images: images \(\w{12}...\) there, images \(\w{12}...\) here"),
        ((REAL[..., :4, :4], FLAT), {}, r"image_size: \[5, 5\] there, \[4, 4\] here"),
        ((REAL, FLAT), {"crop": "adm"}, "crop: 'as given' there, 'adm' here"),
        ((REAL / 127.5 - 1, FLAT), {"convention": "repa"}, "uint8: 'stored' there, 'repa' here"),
        ((REAL, AS_INCEPTION), {}, "extractor: .*'Flat'.* there, .*'Inception'.* here"),
    ]
    for (images, extractor), options, words in cases:
        with pytest.raises(ValueError, match=f"holds other statistics \\({words}"):
            reference_statistics(images, path, extractor, progress=False, **options)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read as statistics"):
        measured(MADE, path)


def test_mean_and_covariance_alone(tmp_path):
    whole = image_statistics(REAL, AS_INCEPTION, progress=False)
    moments = {"mu": whole.moments.mean.numpy(), "sigma": whole.moments.covariance.numpy()}
    path = tmp_path / "stats.npz"
    np.savez(path, **moments)
    found = measured(MADE, path, AS_INCEPTION)
    assert list(found.measures) == ["FID", "FID-inf", "FID-proj64-v1", "IS"] and found.decides == "FID"
    fid = found["FID"]
    assert fid.value == pytest.approx(measured(extractor=AS_INCEPTION)["FID"].value, rel=1e-6)
    assert (fid.reference_n, fid.floor) == (None, None) and fid.interval == "jackknife, 8 groups of the judged alone"
    with pytest.raises(ValueError, match=r"KID needs images of the reference, but stats.npz is mean and covariance"):
        measured(MADE, path, AS_INCEPTION, measures=("frechet", "kid"))
    with pytest.raises(ValueError, match="of Inception's features, but the extractor is Flat"):
        measured(MADE, path)
    with pytest.raises(ValueError, match="give the images to judge"):
        measured(path, REAL, AS_INCEPTION)
    # ADM's files hold the moments of all images and some of the images.
    np.savez(tmp_path / "adm.npz", arr_0=REAL[:90].permute(0, 2, 3, 1).numpy(), **moments)
    adm = measured(MADE, tmp_path / "adm.npz", AS_INCEPTION)
    assert adm["FID"].value == pytest.approx(fid.value) and adm["KID"].reference_n == 90


def test_a_batch_for_adms_evaluator(tmp_path):
    path = write_batch(Held(REAL), tmp_path / "real.npz")
    with np.load(path) as archive:
        assert archive.files == ["arr_0"] and np.array_equal(archive["arr_0"], REAL.permute(0, 2, 3, 1).numpy())
    folder = exported(tmp_path / "export", REAL, np.zeros(200))
    assert write_batch(folder, tmp_path / "merged.npz").read_bytes() == path.read_bytes()
    assert measured(MADE, path)["FD-Flat"].value == pytest.approx(measured()["FD-Flat"].value)
    with pytest.raises(ValueError, match="does not tell their number"):
        write_batch(iter([REAL]), tmp_path / "stream.npz")
