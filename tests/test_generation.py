"""The generator experiment: samples that are the same each time, what is judged and recorded, what is refused."""

import hashlib
import json
import shutil

import pytest
import torch
from test_faults import pictures
from test_train_generator import ALIGNED, SAMPLED, SMALL, folders, scatter

from softvq_lib import figures, results, tables
from softvq_lib.data.digits import CLASSES
from softvq_lib.evaluation import generated
from softvq_lib.generation import train_generator
from softvq_lib.sampling import sample_images
from softvq_lib.tokenizers import Tokenizer

JUDGED = 21  # no whole number of rows of eight


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A random tokenizer whose images differ from each other."""
    made = Tokenizer.from_preset("tiny", quantizer="ae", tokens=4)
    scatter(made, 0.5)
    made.save_pretrained(folder := tmp_path_factory.mktemp("tokenizer"))
    return folder


def quick(tmp_path, tokenizer, kind="sit", **more):
    """Parameters of an experiment of a second."""
    return {**SMALL, **SAMPLED[kind], "tokenizer": str(tokenizer), "runs": str(tmp_path / "runs"), "steps": 2, **more}


@pytest.fixture(scope="module")
def recorded(tokenizer, tmp_path_factory):
    """An experiment whose samples an untrained classifier has judged, and the folder of its rows."""
    classifier = generated.DigitClassifier().eval().requires_grad_(False)
    classifier.held_out = (0.1, 0.08, 0.12)
    folder = tmp_path_factory.mktemp("recorded")
    more = {"judged": JUDGED, "columns": 3, "guidance_scale": 2.0, "results": str(folder / "results")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generated, "digit_classifier", lambda: classifier)
        return train_generator(**quick(folder, tokenizer, **more)), folder


# -- sampling --------------------------------------------------------------------------------------------------------


def test_a_finished_generator_is_loaded_and_gives_the_same_samples(recorded, tokenizer):
    experiment, folder = recorded
    again = train_generator(**quick(folder, tokenizer, columns=3, guidance_scale=2.0))
    assert experiment.run.trained == 2 and again.run.trained == 0 and again.run.path == experiment.run.path
    assert torch.equal(experiment.grid, again.grid) and torch.equal(again.grid, again.sample(again.labels, 0))
    assert again.grid.shape == (30, 3, 32, 32) and again.grid.dtype == torch.float32
    assert again.grid.min() >= -1 and again.grid.max() <= 1 and again.grid.std(0).mean() > 0.05
    assert again.labels.tolist() == [label for label in range(10) for _ in range(3)] and again.classes == CLASSES


@pytest.mark.parametrize("kind", SAMPLED)
def test_a_sample_depends_on_its_class_and_seed_alone(kind, tokenizer, tmp_path):
    experiment = train_generator(**quick(tmp_path, tokenizer, kind, steps=1, guidance_scale=2.0, sample_seed=7))
    scatter(experiment.loaded.model)  # so that the class matters, too

    def sampled(rows, batch_size=64):
        labels, seeds = torch.tensor(rows) % 3, [7 + row for row in rows]
        return sample_images(
            experiment.loaded, experiment.tokenizer, labels, seeds, experiment.settings, batch_size=batch_size
        )

    expected = experiment.sample(torch.arange(5) % 3, 7)
    assert torch.equal(sampled(range(5)), expected)
    for rows, batch_size in ((list(range(5)), 2), ([4, 2, 0, 3, 1], 64), ([3], 64)):
        torch.testing.assert_close(sampled(rows, batch_size), expected[rows], rtol=0, atol=1e-4)
    for labels, seed in ((torch.arange(5) % 3, 8), (torch.arange(1, 6) % 3, 7)):
        different = (experiment.sample(labels, seed) - expected).abs().flatten(1).max(1).values
        assert different.min() > 5e-3


def test_a_tokenizer_that_has_moved_is_taken_from_where_it_is(tokenizer, tmp_path):
    shutil.copytree(tokenizer, tmp_path / "there")
    first = train_generator(**quick(tmp_path, tmp_path / "there", steps=1))
    grid = first.grid
    (tmp_path / "there").rename(tmp_path / "here")
    again = train_generator(**quick(tmp_path, tmp_path / "here", steps=1))
    assert again.run.trained == 0 and torch.equal(again.grid, grid)


def test_data_without_labels_are_one_class(tokenizer, tmp_path):
    settings = pictures(tmp_path / "images", 12)
    experiment = train_generator(**quick(tmp_path, tokenizer, steps=1, **settings))
    assert experiment.classes == ["image"] and experiment.run.identity["classes"] == 1
    assert experiment.labels.tolist() == [0] * 8
    assert experiment.grid.shape == (8, 3, 32, 32)


# -- rows ------------------------------------------------------------------------------------------------------------


def test_rows_are_whole(recorded, tokenizer):
    experiment, folder = recorded
    rows = {row["metric"]: row for row in results.read(folder / "results" / "train_generator.jsonl")}
    shares = {"class_agreement", "precision", "real_precision", "copied"}
    of_held_out = {"recall", "real_recall", "real_agreement"}
    of_held_out |= {f"decoded_{name}" for name in ("agreement", "precision", "recall", "copied")}
    plain = {"nearer_than_held_out", "diversity", "decoded_diversity"}
    assert set(rows) == {"val_loss"} | shares | of_held_out | plain
    for name, row in rows.items():
        assert results.check(row) is not None and row["run"] == experiment.run.name and row["source"] == "measured"
        on_held_out = name in of_held_out or name == "decoded_diversity"
        assert row["n"] == (16 if name == "val_loss" else 1000 if on_held_out else JUDGED)
        assert (row["interval"] == "95 % Wilson") == (name in shares | of_held_out)
        assert row["config_hash"] == experiment.run.config_hash and row["config"]["sampling_guidance_scale"] == 2
        assert row["data_fingerprint"] == experiment.data.fingerprint
    assert [rows["real_agreement"][name] for name in ("low", "value", "high")] == [0.08, 0.1, 0.12]
    assert rows["diversity"]["value"] == experiment.judgement["diversity"] > 0
    assert str(tokenizer) not in json.dumps(rows) and str(folder) not in json.dumps(rows)
    curve = rows["val_loss"]["curve"]
    assert [step for step, _ in curve] == [0, 1, 2] and curve[-1][1] == rows["val_loss"]["value"]
    assert rows["val_loss"]["train_seconds"] > 0
    assert tables.generation(list(rows.values())).count("SiT, tiny") == 1


def test_pictures_are_those_of_the_row(recorded):
    experiment, folder = recorded
    rows = results.read(folder / "results" / "train_generator.jsonl")
    (row,) = (row for row in rows if "pictures" in row)
    kept = folder / "results" / "train_generator"
    name = experiment.run.name
    assert set(row["pictures"]) == {f"{name}-samples.png", f"{name}-beside_nearest.png"}
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in kept.iterdir()} == row["pictures"]
    samples, nearest = (axis.images[0].get_array() for axis in figures.recorded_grids(row, kept).axes)
    if samples.shape[1] > nearest.shape[1]:
        samples, nearest = nearest, samples
    assert samples.shape == (10 * 33 + 1, 3 * 33 + 1, 3)
    assert nearest.shape == (4 * 33 + 1, 8 * 33 + 1, 3)  # two rows of eight, each over the nearest training images


def test_an_experiment_says_what_it_found(recorded):
    experiment, _ = recorded
    lines = str(experiment).splitlines()
    assert lines[0].startswith("sit tiny, 4 tokens x 16, ") and lines[0].endswith("M parameters, 2 steps")
    assert len(lines) == 1 + len(experiment.numbers) and any(
        line.startswith("real agreement ") and line.endswith("0.100  [0.080, 0.120]") for line in lines
    )
    images, labels = experiment.judged
    assert images.shape == (JUDGED, 3, 32, 32) and labels.tolist() == [i % 10 for i in range(JUDGED)]


def test_without_a_judge_the_loss_is_recorded_with_alignment_too(tokenizer, tmp_path):
    more = {"steps": 1, "columns": 2, "results": str(tmp_path / "results"), **ALIGNED}
    experiment = train_generator(**quick(tmp_path, tokenizer, **more))
    (row,) = results.read(tmp_path / "results" / "train_generator.jsonl")
    assert row["metric"] == "val_loss" and row["config"]["align_teacher"] == "efflite0"
    assert list(row["pictures"]) == [f"{experiment.run.name}-samples.png"]
    assert experiment.judgement == {} and experiment.judged is None and "\n" not in str(experiment)


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"judged": 100, "dataset": "shapes"}, ["judged=100", "dataset='digits'", "'shapes'"]),
        ({"judged": 19}, ["judged=19", "at least 20"]),
        ({"judged": -1}, ["judged=-1"]),
        ({"columns": 0}, ["columns=0"]),
        ({"sample_seed": -1}, ["sample_seed=-1"]),
        ({"colums": 2}, ["'colums'", "did you mean 'columns'"]),
        ({"results": 3}, ["results=3", "str"]),
        ({"tokens": 8}, ["tokens=8", "have 4", "leave tokens out"]),
        ({"dim": 8}, ["dim=8", "have 16", "leave dim out"]),
        ({"classes": 9}, ["classes=9", "have 10"]),
        ({"crop": 1.25}, ["crop=1.25", "at 1"]),
        ({"align_teacher": "efflite0"}, ["align_teacher='efflite0'", "align_block=None", "belong together"]),
        ({"align_block": 2}, ["align_teacher=None", "align_block=2", "belong together"]),
        ({**ALIGNED, "align_width": 7}, ["align_width=7", "'efflite0' has 320"]),
        ({**ALIGNED, "align_block": 7}, ["align_block=7", "1 to 6"]),
        ({"align_width": 320}, ["align_width=320", "align_block"]),
        ({**ALIGNED, "align_teacher": "efflite9"}, ["'efflite9'", "efflite0"]),
        ({**SAMPLED["mar"], **ALIGNED}, ["align_block=2", "'mar'"]),
        ({"generator": "siet"}, ["generator='siet'", "did you mean 'sit'"]),
        ({"generator": "dit", "path": "gvp"}, ["path='gvp'", "'sit'", "'dit'"]),
        ({**SAMPLED["mar"], "solver": "heun"}, ["solver='heun' is for sit and dit", "'mar'"]),
        ({"head_steps": 10}, ["head_steps=10 is for mar", "'sit'"]),
        ({**SAMPLED["mar"], "guidance_high": 0.7}, ["guidance_high=0.7", "guidance_schedule"]),
        ({"guidance_scale": -1.0}, ["guidance_scale=-1.0"]),
        ({"normalise": "batch"}, ["normalise='batch'", "'channel', 'scalar'"]),
        ({"tokenizer": ""}, ["tokenizer=''", "a run"]),
        ({"tokenizr": "x"}, ["'tokenizr'", "did you mean 'tokenizer'"]),
        ({"steps": 0}, ["steps=0"]),
        ({"dataset": "digit"}, ["'digit'", "digits"]),
        ({"device": "gpu"}, ["device='gpu'"]),
    ],
)
def test_bad_input_stops_before_anything_is_written(bad, words, tokenizer, tmp_path):
    with pytest.raises(ValueError) as error:
        train_generator(**quick(tmp_path, tokenizer, results=str(tmp_path / "results")) | bad)
    for word in words:
        assert word in str(error.value), str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "bad", "words"),
    [
        ("sit", {"solver": "ddim"}, "solver='ddim'.*'heun'"),
        ("dit", {"solver": "euler"}, "solver='euler'.*'ddpm'"),
        ("dit", {"sample_steps": 1001}, "steps=1001"),
        ("mar", {"sample_steps": 5}, "steps=5.*1 to 4"),
        ("mar", {"head_solver": "euler"}, "solver='euler'.*'ddpm'"),
    ],
)
def test_samples_that_cannot_be_made_are_refused_before_training(kind, bad, words, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=words):
        train_generator(**quick(tmp_path, tokenizer, kind, **bad))
    assert folders(tmp_path / "runs", "*") == ["latents"]


def test_a_tokenizer_that_is_not_there_is_told_with_those_that_are(tokenizer, tmp_path):
    for listed in ("None is trained there yet.", "Trained there: mine, yours."):
        with pytest.raises(ValueError) as error:
            train_generator(**quick(tmp_path, "theirs"))
        for word in ("tokenizer='theirs'", str(tmp_path / "runs"), listed):
            assert word in str(error.value)
        for name in ("mine", "yours"):
            shutil.copytree(tokenizer, tmp_path / "runs" / name / "tokenizer", dirs_exist_ok=True)
    assert folders(tmp_path / "runs", "*") == ["mine", "yours"]
