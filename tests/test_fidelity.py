"""Measures of fidelity: the numbers of torch-fidelity, names, few images, KID's interval, and the extractors."""

import json

import numpy as np
import pytest
import torch
from flat_features import AS_INCEPTION, CLASSES, MADE, REAL, WIDTH, Silent, measured, pictures
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from softvq_lib.evaluation import extractors
from softvq_lib.evaluation.extractors import Extractor, build_extractor
from softvq_lib.evaluation.fidelity import FOR_FEW
from softvq_lib.evaluation.frechet import Moments, frechet_distance, groups_of, merged, projection
from softvq_lib.evaluation.kid import kernel_distance
from softvq_lib.evaluation.reference import SPLITS


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
