"""The evaluation experiment: its rows, what it refuses, its tables and figures; on a cheap stand-in for the network."""

import io
import json
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from softvq_lib import Tokenizer, evaluation_figures, evaluation_rows, results
from softvq_lib.data import DataConfig, open_dataset
from softvq_lib.data.latents import tokenizer_hash
from softvq_lib.draws import Seeds
from softvq_lib.evaluate import evaluate
from softvq_lib.evaluation import degradations
from softvq_lib.evaluation.export import export_samples
from softvq_lib.evaluation.extractors import Extractor
from softvq_lib.evaluation.fidelity import fidelity
from softvq_lib.evaluation.pixels import open_pixels
from softvq_lib.evaluation.reconstruction import compare, paired_statistics
from softvq_lib.evaluation.reference import image_statistics
from softvq_lib.generators import GeneratorConfig
from softvq_lib.generators.build import build_generator
from softvq_lib.generators.loading import load_generator, save_generator
from softvq_lib.generators.sampling import SampleConfig
from softvq_lib.losses.perceptual import Perceptual
from softvq_lib.style import SAVE_METADATA

EXPERIMENT = sys.modules[evaluate.__module__]


class Coarse(nn.Module):
    """Features: the image in 5 x 5 pixels, 75 numbers."""

    def forward(self, images):
        return (nn.functional.adaptive_avg_pool2d(images / 255.0, 5).flatten(1),)

    def maps(self, images):
        return [nn.functional.pixel_unshuffle(images + 2, 4)]


def coarse(name: str = "") -> Extractor:
    return Extractor(Coarse(), "Coarse", 75, "0" * 64, "5 x 5 px")


@pytest.fixture(scope="module", autouse=True)
def cheap():
    """A feature takes no time, and of each degradation there are three strengths."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EXPERIMENT, "build_extractor", coarse)
        patch.setattr(EXPERIMENT, "build_perceptual", lambda name, size: Perceptual(Coarse(), f"perceptual-{name}"))
        for kind, strengths in degradations.STRENGTHS.items():
            patch.setitem(degradations.STRENGTHS, kind, strengths[::2])
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run `mine` of an untrained tokenizer, and `theirs` of a generator on it."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_preset("tiny", tokens=4)
    tokenizer.save_pretrained(folder / "mine" / "tokenizer")
    (folder / "mine" / "config.json").write_text(json.dumps({"identity": {"perceptual": "efflite1"}}))
    config = GeneratorConfig(generator="sit", size="tiny", tokens=4, dim=tokenizer.config.dim, classes=10)
    about = {"tokenizer": "mine", "tokenizer_hash": tokenizer_hash(tokenizer), "mean": 0.0, "std": 1.0}
    save_generator(build_generator(config.resolved()), folder / "theirs" / "generator", **about)
    return folder


QUICK = {"tokenizer": "mine", "limit": 96, "perceptual": "none", "device": "cpu", "bias": False}


@pytest.fixture(scope="module")
def recorded(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    settings = QUICK | {"perceptual": "efflite0", "bias": True, "degradations": 90, "limit": 200}
    found = evaluate(**settings, generator="theirs", samples=80, runs=str(runs), results=str(folder))
    return found, folder


def named(rows, run):
    return {row["metric"]: row for row in rows if row["run"] == run}


def test_rows_are_whole_and_are_those_recorded(recorded):
    found, folder = recorded
    assert results.read(folder / "evaluate.jsonl") == found.rows
    ours, theirs = named(found.rows, "mine"), named(found.rows, "theirs")
    of_all = {"KID-Coarse", "precision-Coarse", "recall-Coarse"}
    limits = {"FD-Coarse", "FD-Coarse-inf", "FD-Coarse-proj64-v1", "FD-Coarse-proj64-v1-inf"}
    assert set(ours) == {"psnr", "ssim", "perceptual-efflite0", *of_all, *(f"r{name}" for name in limits)}
    assert set(theirs) == of_all | {f"g{name}" for name in limits}
    assert len(found.rows) == len({(row["run"], row["metric"]) for row in found.rows})
    row = ours["psnr"]
    assert row["value"] == pytest.approx(found.psnr.mean()) and row["n"] == 200
    assert (
        row["config"]["tokenizer"] == "mine" and row["config"]["tokens"] == 4 and row["config"]["convention"] == "dit"
    )
    assert row["config"]["extractor"] == "Coarse" and row["config"]["judged"] == "reconstructions"
    assert theirs["KID-Coarse"]["n"] == 80 and theirs["KID-Coarse"]["config"]["sampling_guidance_scale"] == 1
    assert ours["rFD-Coarse"]["terms"]["floor"] > 0 and ours["rFD-Coarse"]["config"]["decides"] == "KID-Coarse"
    assert all(row["commit"] == found.rows[0]["commit"] and row["data"] == "digits" for row in found.rows)
    text = str(found)
    assert "mine: reconstructions, digits validation" in text and "floor" in text and "KID-Coarse decides" in text


def test_what_is_recorded_is_what_the_library_measures(recorded, runs):
    data = open_dataset(DataConfig(), 32).validation
    tokenizer = Tokenizer.from_pretrained(runs / "mine" / "tokenizer")
    pixels = torch.stack([torch.from_numpy(np.array(data[i][0])) for i in range(200)]).permute(0, 3, 1, 2)
    with torch.no_grad():
        decoded = tokenizer(pixels / 127.5 - 1)[0].clamp(-1, 1)
    stored = (127.5 * decoded + 128).clamp(0, 255).to(torch.uint8)
    ours = named(recorded[0].rows, "mine")
    by_image = compare(pixels / 127.5 - 1, stored / 127.5 - 1)
    for name in ("psnr", "ssim"):
        assert ours[name]["value"] == pytest.approx(by_image[name].mean().item(), rel=1e-4)
    same = fidelity(stored, pixels, coarse(), kind="r", progress=False, measures=("frechet", "kid"))
    for name in ("rFD-Coarse", "rFD-Coarse-inf", "KID-Coarse"):
        assert ours[name]["value"] == pytest.approx(same[name].value, rel=1e-3)


def test_samples_are_judged_again_with_guidance_and_their_classes_by_a_head(runs, tmp_path, monkeypatch):
    made, sample_images = [], EXPERIMENT.sample_images

    def watched(loaded, tokenizer, labels, seeds, settings, **options):
        made.append((settings.guidance_scale, list(seeds)))
        return sample_images(loaded, tokenizer, labels, seeds, settings, **options)

    monkeypatch.setattr(EXPERIMENT, "sample_images", watched)
    quick = {"limit": 20, "samples": 20, "runs": str(runs), "perceptual": "none", "bias": False}
    asked = quick | {"generator": "theirs", "guided": 3.0, "judge": 200}
    found = evaluate(**asked, results=str(tmp_path / "rows"), pictures=False)
    plain, guided = (named(found.rows, run) for run in ("theirs", "theirs, guided 3"))
    assert set(plain) == set(guided) and "class_agreement" in plain
    config = plain["class_agreement"]["config"]
    assert config["sampling_guidance_scale"] == 1
    # Nothing was asked of the solver, and the rows say what it was all the same.
    assert (config["sampling_solver"], config["sampling_sample_steps"]) == ("euler", 50)
    assert guided["class_agreement"]["config"]["sampling_guidance_scale"] == 3
    assert [scale for scale, _ in made] == [1, 3] and made[0][1] == made[1][1]  # from the same noise
    terms = plain["class_agreement"]["terms"]
    # The head names real digits by their coarse shape, and an untrained generator's samples by chance.
    assert terms["real_n"] == 20 and terms["real"] > plain["class_agreement"]["high"]
    assert not (tmp_path / "rows" / "evaluate").exists() and "pictures" not in found.rows[0]


def test_unchanged_images_are_at_every_limit():
    few = EXPERIMENT._First(open_dataset(DataConfig(), 32).validation, 100)
    images = open_pixels(few, image_size=32)
    real = image_statistics(images, coarse(), progress=False)
    by_image, same = paired_statistics(images, lambda x, first: x, coarse(), progress=False, convention="mar")
    assert np.isinf(by_image["psnr"]).all() and (by_image["ssim"] == 1).all() and len(by_image["ssim"]) == 100
    assert same.facts["fingerprint"] == real.facts["fingerprint"] and same.facts["classes"] == list(range(10))
    found = fidelity(same, real, measures=("frechet", "kid", "precision", "recall"))
    assert found["FD-Coarse"].value == pytest.approx(0, abs=1e-6)
    assert found["KID-Coarse"].value <= 0 and found["precision-Coarse"].value == found["recall-Coarse"].value == 1
    with pytest.raises(ValueError, match="100 of 100 images came out identical"):
        evaluation_rows._over_images(by_image["psnr"])


def test_paired_images_must_fit():
    images = open_pixels(torch.zeros(4, 3, 16, 16))
    with pytest.raises(ValueError, match=r"reconstructions \(4, 3, 8, 8\): both need the same number, crop and size"):
        paired_statistics(images, lambda x, first: x[..., :8, :8], coarse(), progress=False)
    with pytest.raises(ValueError, match="copies: image 2 is not finite"):
        broken = torch.zeros(4, 3, 16, 16)
        broken[2, 0, 0] = math.nan
        paired_statistics(images, lambda x, first: broken, coarse(), what="copies", progress=False)


def test_metrics_fall_along_the_degradations(recorded):
    series = [row for row in recorded[0].rows if "kind" in row["config"]]
    assert {row["run"] for row in series} == {f"digits validation 32 px, {kind}" for kind in degradations.STRENGTHS}
    assert all(row["n"] == 90 and row["curve"][-1][1] == row["value"] for row in series)
    for metric, sign in (("psnr", -1), ("ssim", -1), ("perceptual-efflite0", 1), ("FD-Coarse", 1)):
        for row in (row for row in series if row["metric"] == metric):
            values = [sign * value for _, value in row["curve"]]
            assert len(values) == 3 and values == sorted(values), (row["run"], metric)
    again = degradations.degrade(torch.zeros(2, 3, 16, 16), "noise", 20, Seeds([1, 2]))
    assert torch.equal(again, degradations.degrade(torch.zeros(2, 3, 16, 16), "noise", 20, Seeds([1, 2])))


def test_the_distance_falls_with_the_number_of_images_and_its_limit_is_that_of_halves(recorded):
    rows = recorded[0].rows
    halves = named(rows, "digits validation 32 px, halves")
    assert set(halves) == {"FD-Coarse-inf", "FD-Coarse-proj64-v1-inf"}
    for row in (*halves.values(), named(rows, "mine")["rFD-Coarse-inf"], named(rows, "theirs")["gFD-Coarse-inf"]):
        numbers, distances = zip(*row["curve"], strict=True)
        assert list(numbers) == sorted(numbers, reverse=True) and list(distances) == sorted(distances)
        assert row["value"] < distances[0] and row["low"] < row["value"] < row["high"]
    row = halves["FD-Coarse-inf"]
    assert row["n"] == 100 and abs(row["value"]) < 0.25 * row["curve"][0][1]


def test_tables_are_made_of_rows(recorded):
    rows = recorded[0].rows
    table = evaluation_rows.table(rows)
    assert "| judged | reconstructions | samples |" in table and "| images | 200 | 80 |" in table
    psnr = named(rows, "mine")["psnr"]
    assert f"| PSNR, dB | {psnr['value']:.4g} [{psnr['low']:.3g}, {psnr['high']:.3g}] | – |" in table
    assert "| FD-Coarse | " in table and "rFD" not in table
    series = evaluation_rows.series_table(rows)
    assert "| digits validation 32 px, blur 2.5 |" in series and len(series.splitlines()) == 2 + 4 * 3
    assert "No rows" in evaluation_rows.table([]) and "No rows" in evaluation_rows.series_table([])


def drawn(figure, kind: str) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format=kind, metadata=SAVE_METADATA if kind == "svg" else None)
    return file.getvalue()


def test_a_figure_drawn_twice_is_the_same_bytes(recorded):
    found, folder = recorded
    for kind, draw in (
        ("png", lambda: evaluation_figures.degradations(found.rows)),
        ("png", lambda: evaluation_figures.bias(found.rows)),
        ("svg", lambda: evaluation_figures.bias(found.rows)),
        ("png", lambda: evaluation_figures.recorded_reconstructions(found.rows[0], folder / "evaluate")),
        ("png", lambda: evaluation_figures.samples(found.samples)),
    ):
        assert drawn(draw(), kind) == drawn(draw(), kind)


def test_the_figure_of_degradations_goes_from_best_to_worst(recorded):
    figure = evaluation_figures.degradations(recorded[0].rows)
    panels = {axis.get_title().split("\n")[0]: axis for axis in figure.axes if axis.get_title()}
    assert set(panels) == {"PSNR, dB", "SSIM", "perceptual-efflite0"} | {
        *("FD-Coarse", "FD-Coarse-proj64-v1", "KID-Coarse", "precision-Coarse", "recall-Coarse")
    }
    for name in ("PSNR, dB", "FD-Coarse"):
        lines = [line.get_ydata() for line in panels[name].lines]
        assert len(lines) == 4 and min(map(min, lines)) == 0 and max(map(max, lines)) == 1
        assert all(list(line) == sorted(line) for line in lines)


def test_the_figure_of_bias_has_a_panel_a_space(recorded):
    figure = evaluation_figures.bias(recorded[0].rows)
    assert [axis.get_title() for axis in figure.axes] == ["64 dimensions", "75 dimensions"]
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()][:2] == ["∞", "200"]


def test_figures_refuse_rows_without_origin_and_rows_that_do_not_fit(recorded):
    rows = recorded[0].rows
    bare = [{key: value for key, value in row.items() if key != "code"} for row in rows]
    for draw in (evaluation_figures.degradations, evaluation_figures.bias, evaluation_rows.table):
        with pytest.raises(ValueError, match="'code' is missing"):
            draw(bare)
    with pytest.raises(ValueError, match="'code' is missing"):
        evaluation_figures.recorded_reconstructions(bare[0], recorded[1] / "evaluate")
    others = [row | {"run": row["run"].replace("digits", "shapes")} for row in rows]
    with pytest.raises(ValueError, match="digits validation 32 px, shapes validation 32 px"):
        evaluation_figures.degradations(rows + others)
    with pytest.raises(ValueError, match="series of degraded images: none"):
        evaluation_figures.degradations(rows[:2])
    with pytest.raises(ValueError, match="ask for bias=True"):
        evaluation_figures.bias(rows[:2])


def test_a_network_that_was_there_in_training_is_told_apart(runs, caplog):
    found = evaluate(**QUICK | {"perceptual": "efflite1", "limit": 10, "bias": True}, runs=str(runs))
    (note,) = [note for note in found.notes if "trained with it" in note]
    assert "perceptual='efflite1'" in note and "of mine" in note and note in caplog.text
    assert {"KID-Coarse"} < set(named(found.rows, "mine"))
    assert not any("FD" in row["metric"] for row in found.rows), "10 images are too few even for 64 dimensions"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "photographs"
    folder.mkdir()
    draws = np.random.default_rng(0)
    for number in range(30):
        Image.fromarray(draws.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{number}.png")
    return folder


def test_of_other_data_no_originals_are_kept(runs, photographs, tmp_path):
    settings = QUICK | {"dataset": str(photographs), "split": "train", "limit": None}
    found = evaluate(**settings, runs=str(runs), results=str(tmp_path))
    assert set(found.rows[0]["pictures"]) == {"mine-decoded.png"} == {p.name for p in (tmp_path / "evaluate").iterdir()}
    assert evaluation_figures.recorded_reconstructions(found.rows[0], tmp_path / "evaluate").axes
    text = (tmp_path / "evaluate.jsonl").read_text()
    assert str(photographs.parent) not in text and str(runs) not in text


def test_images_that_lie_there_are_judged(runs, photographs, tmp_path):
    found = evaluate(**QUICK, generator=str(photographs), runs=str(runs))
    theirs = named(found.rows, "photographs")
    assert theirs["KID-Coarse"]["n"] == 30 and theirs["KID-Coarse"]["value"] > 0.1
    assert found.samples.shape == (30, 3, 32, 32)
    Image.new("RGB", (16, 16)).save(tmp_path / "small.png")
    for number in range(9):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / f"{number}.png")
    with pytest.raises(ValueError, match=r"image_size of .* is \[16, 16\]"):
        evaluate(**QUICK, generator=str(tmp_path), runs=str(runs))


def test_sets_of_labels_must_agree(runs, tmp_path):
    loaded, tokenizer = (
        load_generator(runs / "theirs" / "generator"),
        Tokenizer.from_pretrained(runs / "mine/tokenizer"),
    )
    quick = {"settings": SampleConfig(sample_steps=1), "progress": False}
    export_samples(loaded, tokenizer, tmp_path / "samples", count=12, labels="random", seed=0, **quick)
    with pytest.raises(ValueError, match="are of different classes: none in the first alone"):
        evaluate(**QUICK, generator=str(tmp_path / "samples"), runs=str(runs))
    with pytest.raises(ValueError, match="makes 10 classes, but dataset='shapes' has"):
        evaluate(**QUICK | {"dataset": "shapes"}, generator="theirs", runs=str(runs))


def test_images_that_are_not_finite_are_refused(runs, tmp_path):
    tokenizer = Tokenizer.from_pretrained(runs / "mine" / "tokenizer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EXPERIMENT, "find_tokenizer", lambda *_: tokenizer)
        patch.setattr(tokenizer, "decode", lambda z: torch.full((len(z), 3, 32, 32), math.nan))
        with pytest.raises(ValueError, match="reconstructions by mine: image 0 is not finite"):
            evaluate(**QUICK, runs=str(runs), results=str(tmp_path))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"tokeniser": "mine"}, "did you mean 'tokenizer'"),
        ({"tokenizer": "mime"}, "tokenizer='mime'.*Trained there: mine"),
        ({"generator": "their"}, "generator='their'.*theirs"),
        ({"generator": "theirs", "guidance_high": 2.0}, "guidance"),
        ({"extractor": "efflite3"}, "extractor='efflite3'.*did you mean"),
        ({"perceptual": "vgg"}, "perceptual='vgg'"),
        ({"convention": "adm"}, "convention='adm'"),
        ({"split": "test"}, "split='test'"),
        ({"limit": 9}, "limit=9"),
        ({"samples": 0}, "samples=0"),
        ({"degradations": 5}, "degradations=5 is too few"),
        ({"degradations": True}, "degradations=True is of type bool"),
        ({"dataset": "digit"}, "did you mean 'digits'"),
    ],
)
def test_evaluate_refuses(runs, bad, words):
    with pytest.raises(ValueError, match=words):
        evaluate(**QUICK | bad, runs=str(runs))


def test_an_empty_folder_is_refused(runs, tmp_path):
    with pytest.raises(ValueError, match="is empty"):
        evaluate(**QUICK | {"dataset": str(tmp_path)}, runs=str(runs))
    with pytest.raises(ValueError, match="is no folder with a generator"):
        evaluate(**QUICK, generator=str(tmp_path), runs=str(runs))
