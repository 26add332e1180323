"""Fidelity: the numbers of torch-fidelity, all kinds of images, saved references, few images, and what is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from softvq_lib.data import Source
from softvq_lib.evaluation import export, extractors
from softvq_lib.evaluation.extractors import Extractor, build_extractor
from softvq_lib.evaluation.fidelity import FOR_FEW, fidelity
from softvq_lib.evaluation.frechet import Moments, frechet_distance, groups_of, merged, projection
from softvq_lib.evaluation.kid import kernel_distance
from softvq_lib.evaluation.pixels import open_pixels
from softvq_lib.evaluation.reference import (
    SPLITS,
    Sample,
    image_statistics,
    load_statistics,
    reference_statistics,
    save_statistics,
    write_batch,
)

SIDE, WIDTH, CLASSES = 5, 75, 6


class Flat(FeatureExtractorBase):
    """The bytes themselves are the features, and the first six the logits."""

    def __init__(self):
        super().__init__("flat", ["pixels", "logits"])

    def forward(self, images):
        pixels = images.flatten(1) / 255
        return pixels, 8 * pixels[:, :CLASSES]

    @staticmethod
    def get_provided_features_list():
        return ("pixels", "logits")


class Silent(Flat):
    """Without classes."""

    def forward(self, images):
        return super().forward(images)[:1]


FLAT = Extractor(Flat(), "Flat", WIDTH, "0" * 64, "none")
AS_INCEPTION = Extractor(Flat(), "Inception", WIDTH, "1" * 64, "none")


def pictures(n, seed=0, lightest=255):
    """Correlated bytes (n, 3, 5, 5)."""
    rng = np.random.default_rng(seed)
    values = rng.random((n, 3, SIDE, SIDE)) * rng.random((n, 3, 1, 1)) * rng.random((n, 1, 1, 1)) ** 0.5
    return torch.from_numpy((values * lightest).astype(np.uint8))


MADE, REAL = pictures(170, 1, 220), pictures(200, 2)


def measured(made=MADE, real=REAL, extractor=FLAT, **options):
    return fidelity(made, real, extractor, **{"progress": False, "batch_size": 32} | options)


@pytest.fixture(scope="module")
def found():
    return measured()


def test_the_numbers_of_torch_fidelity(found):
    x, y = (images.flatten(1).double() / 255 for images in (MADE, REAL))
    fid = fid_statistics_to_metric(*(fid_features_to_statistics(side) for side in (x, y)), False)
    assert found["FD-Flat"].value == pytest.approx(fid[KEY_METRIC_FID], abs=1e-4, rel=1e-4)
    shares = prc_features_to_metric(x, y, verbose=False)  # generated, then real
    assert found["precision-Flat"].value == pytest.approx(shares[KEY_METRIC_PRECISION], abs=1e-4)
    assert found["recall-Flat"].value == pytest.approx(shares[KEY_METRIC_RECALL], abs=1e-4)
    # Theirs takes equal numbers, in one subset of all.
    ours = kernel_distance(x, y[:170])[0]
    kid = kid_features_to_metric(x, y[:170], kid_subsets=1, kid_subset_size=170, verbose=False)
    assert ours == pytest.approx(kid[KEY_METRIC_KID_MEAN], abs=1e-4, rel=1e-4)
    assert found["KID-Flat"].value == pytest.approx(kernel_distance(x, y)[0], rel=1e-4)
    # Theirs takes the parts one after the other.
    order = np.argsort(groups_of(0, 170, SPLITS), kind="stable")
    score = isc_features_to_metric(8 * x[order, :CLASSES], splits=SPLITS, shuffle=False)
    assert found["IS-Flat"].value == pytest.approx(score[KEY_METRIC_ISC_MEAN], rel=1e-4)


def test_precision_is_not_recall():
    """All generated images are one real image: they are real, and cover little."""
    one = REAL[:1].expand(60, -1, -1, -1)
    shares = [measured(a, b, measures=("precision", "recall")) for a, b in ((one, REAL), (REAL, one))]
    assert [shares[0][f"{name}-Flat"].value for name in ("precision", "recall")] == [1, 1 / 200]
    assert [shares[1][f"{name}-Flat"].value for name in ("precision", "recall")] == [1 / 200, 1]


def test_names_and_what_stands_beside_each_number(found):
    assert list(found.measures) == [
        *("FD-Flat", "FD-Flat-inf", "FD-Flat-proj64-v1", "KID-Flat", "precision-Flat", "recall-Flat", "IS-Flat")
    ]
    for each in found.measures.values():
        assert each.low <= each.value <= each.high and each.interval and (each.n, each.reference_n) == (170, 200)
        assert each.floor is not None and each.name in str(found)
    assert found["FD-Flat"].floor > 0.1 > abs(found["KID-Flat"].floor)
    projected = (Moments.of(x.flatten(1) / 255).project(projection(WIDTH)) for x in (MADE, REAL))
    assert found["FD-Flat-proj64-v1"].value == pytest.approx(frechet_distance(*projected), rel=1e-4)
    assert found.decides == "KID-Flat" and "170 images are fewer than 20 for each of 75 dimensions" in found.notes[0]
    assert (found.facts["uint8"], found.facts["crop"], found.facts["image_size"]) == ("stored", "as given", [5, 5])
    assert json.dumps(found.facts) and found.facts["extractor"] == "Flat"
    row = found.entries()[0]
    assert (row["metric"], row["n"], row["value"]) == ("FD-Flat", 170, found["FD-Flat"].value)
    assert set(row) == {"metric", "value", "low", "high", "interval", "n", "terms"}
    with pytest.raises(ValueError, match="measure='FID' is not known"):
        found["FID"]


def test_fid_is_a_name_for_inception_alone():
    names = list(measured(extractor=AS_INCEPTION).measures)
    assert names == ["FID", "FID-inf", "FID-proj64-v1", "KID", "precision", "recall", "IS"]
    for kind in ("r", "g"):
        assert list(measured(extractor=AS_INCEPTION, kind=kind).measures)[:2] == [f"{kind}FID", f"{kind}FID-inf"]
        assert list(measured(kind=kind).measures)[0] == f"{kind}FD-Flat"
    with pytest.raises(ValueError, match="kind='gen'"):
        measured(kind="gen")


def test_many_images_need_no_projection():
    many = measured(pictures(1600, 3), pictures(1500, 4), kept=200)
    assert many.decides == "FD-Flat" and "FD-Flat-proj64-v1" not in many.measures
    assert many["KID-Flat"].n == 200 and many["FD-Flat"].n == 1600
    assert many.notes[0] == "KID, precision and recall are of 200 random ones of the 1,600 generated images."
    assert many["FD-Flat-inf"].low < 0.05 * many["FD-Flat"].value


@pytest.mark.parametrize(("numbers", "few"), [((75, 300), FOR_FEW), ((300, 60), FOR_FEW[1:])])
def test_few_images_are_refused_a_frechet_distance(numbers, few):
    made, real = pictures(numbers[0]), pictures(numbers[1], 1)
    words = f"in 75 dimensions and needs 76 images or more of each; {numbers[0]} and {numbers[1]} are here"
    with pytest.raises(ValueError, match=words) as error:
        measured(made, real)
    assert "ask for KID-Flat, which is right for few" in str(error.value) and f"measures={few}" in str(error.value)
    offered = measured(made, real, measures=few)
    assert offered.decides == "KID-Flat" and "KID-Flat" in offered.measures
    with pytest.raises(ValueError, match="needs 76 images"):  # a stream tells its number at its end
        measured(iter([made]), real)


def test_hardly_any_images():
    with pytest.raises(ValueError, match=r"9 and 200 images are here \(judged and reference\): give 10 or more"):
        measured(MADE[:9], measures=("kid",))
    with pytest.raises(ValueError, match="FD-Flat-proj64-v1 is a distance in 64 dimensions and needs 65 images"):
        measured(MADE[:64], measures=("projected",))
    assert len(measured(MADE[:10], REAL[:10], measures=("kid", "precision", "recall", "score")).measures) == 4


def test_kid_is_unbiased_and_its_interval_covers():
    draws = torch.Generator().manual_seed(0)
    shift = 0.25

    def drawn(n):
        x, y = torch.randn(2, n, 8, generator=draws, dtype=torch.float64)
        return x, 0.8 * y + shift

    true = np.mean([kernel_distance(*drawn(1500))[0] for _ in range(12)])
    found = np.array([kernel_distance(*drawn(60)) for _ in range(300)])
    covered = ((found[:, 1] <= true) & (true <= found[:, 2])).mean()
    assert abs(found[:, 0].mean() - true) < 3 * found[:, 0].std() / 300**0.5 + 0.002 and 0.92 <= covered <= 0.985
    with pytest.raises(ValueError, match="KID needs 10 images or more of each; 9 and 20 are here"):
        kernel_distance(torch.randn(9, 4), torch.randn(20, 4))


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


def test_a_saved_reference_gives_the_same_numbers(tmp_path, found):
    path = tmp_path / "real.safetensors"
    statistics = reference_statistics(REAL, path, FLAT, progress=False)
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


def test_an_extractor_without_classes():
    silent = Extractor(Silent(), "Silent", WIDTH, "0" * 64, "none")
    assert "IS-Silent" not in measured(extractor=silent).measures
    with pytest.raises(ValueError, match="IS-Silent needs an extractor that tells classes"):
        measured(extractor=silent, measures=("score",))


def test_efflite_within_torch_fidelity():
    import timm
    from torch_fidelity import calculate_metrics

    from softvq_lib.features import load_in_order, packaged_weights

    extractor = build_extractor("efflite0")
    images = pictures(12)
    features, logits = extractor(images)
    assert features.shape == (12, 1280) and extractor.width == 1280 and extractor.label == "EffLite0"
    net = timm.create_model("tf_efficientnet_lite0").eval()
    load_in_order(net, packaged_weights("efflite0"))
    with torch.no_grad():
        larger = torch.nn.functional.interpolate(images[:2] / 127.5 - 1, (128, 128), mode="bilinear", antialias=True)
        torch.testing.assert_close(logits[:2], net(larger), rtol=1e-3, atol=1e-3)
    assert "enlarged to 128 px" in extractor.identity["preparation"]

    class Rows(torch.utils.data.Dataset):
        def __init__(self, rows):
            self.rows = rows

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, index):
            return self.rows[index]

    options = {"feature_extractor": "efflite0", "save_cpu_ram": True, "cuda": False, "verbose": False}
    theirs = calculate_metrics(
        input1=Rows(images), input2=Rows(images.flip(3)), fid=True, isc=True, isc_splits=1, **options
    )
    mirrored = extractor(images.flip(3))[0]
    ours = frechet_distance(Moments.of(features), Moments.of(mirrored))
    assert ours == pytest.approx(theirs[KEY_METRIC_FID], rel=1e-3)
    score = isc_features_to_metric(logits, splits=1, shuffle=False)
    assert score[KEY_METRIC_ISC_MEAN] == pytest.approx(theirs[KEY_METRIC_ISC_MEAN], rel=1e-4)
    with pytest.raises(ValueError, match="give uint8"):
        extractor.net(torch.zeros(1, 3, 8, 8))


def test_inception_without_a_network(tmp_path, monkeypatch):
    def unreachable(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(ValueError, match=r"Inception weights cannot be had from https.*no route.*Fetch.*efflite0"):
        measured(extractor="inception")
    with pytest.raises(ValueError, match="is no file: give weights-inception-2015-12-05-6726825d.pth"):
        build_extractor("inception", weights=tmp_path / "missing.pth")
    (tmp_path / "other.pth").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"sha256 d9298a10..., but the Inception weights of FID.* begin with 6726825d"):
        build_extractor("inception", weights=tmp_path / "other.pth")
    with pytest.raises(ValueError, match="extractor='inceptoin' is not known, did you mean 'inception'"):
        build_extractor("inceptoin")
    with pytest.raises(ValueError, match="belong to extractor='inception'"):
        build_extractor("efflite0", weights="x.pth")


def test_inception_runs(tmp_path, monkeypatch):
    """With random weights: the published ones need a network."""
    path = tmp_path / "weights.pth"
    with monkeypatch.context() as patched:
        module = "torch_fidelity.feature_extractor_inceptionv3"
        patched.setattr(f"{module}.load_state_dict_from_url", lambda *arguments, **options: {})
        patched.setattr(extractors.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.save(extractors.FeatureExtractorInceptionV3("random", ["2048"]).state_dict(), path)
    monkeypatch.setattr(extractors, "_inception_weights", lambda given: (given, "2" * 64))
    extractor = build_extractor("inception", weights=path)
    features, logits = extractor(pictures(2))
    assert features.shape == (2, 2048) and logits.shape == (2, 1008) and extractor.label == "Inception"
    assert "299 px" in extractor.identity["preparation"] and merged([Moments.of(features)]).count == 2
