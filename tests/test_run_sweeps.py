"""The runner of sweeps: what it skips, does again and goes on with; one sweep is really executed."""

import importlib.util
import json
import subprocess
import sys

import pytest
import yaml

from softvq_lib import results
from softvq_lib.sweeps import read_ledger, read_plan

from repository import ROOT

PATH = ROOT / "book" / "run_sweeps.py"
TINY = {"dataset": "digits", "preset": "tiny", "tokens": 4, "steps": 2, "batch_size": 4, "limit": 8, "val_images": 20}


@pytest.fixture(scope="module")
def runner():
    spec = importlib.util.spec_from_file_location("run_sweeps", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def study(tmp_path):
    """A sweep of two tokenizers, one of them with a generator and an evaluation; its plan."""
    files = {"train_tokenizer": TINY | {"pca": False, "pictures": False}, "train_generator": {"steps": 2}}
    files |= {"evaluate": {"limit": 10}}
    for name, parameters in files.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(parameters))
    sweep = {
        "sweep": "a",
        "name": "{kind}",
        "stages": {name: f"{name}.yaml" for name in files},
        "factors": {"kind": {"whole": {}, "bare": {"quantizer": "ae", "train_generator": None, "evaluate": None}}},
        "first": {"kind": ["whole"]},
    }
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False))
    return read_plan([tmp_path / "a.yaml"], tmp_path)


class Recorder:
    """Stands for the execution itself: notes what is executed, and makes what a training would leave behind."""

    def __init__(self, module, monkeypatch, failing=()):
        self.done, self.failing, self.module = [], failing, module
        monkeypatch.setattr(module.Runner, "_run", lambda runner, cell: self.run(runner, cell))

    def run(self, runner, cell):
        if cell.name in self.failing:
            raise self.module.Failed(f"{cell.name}: broken")
        self.done.append(cell.name)
        if cell.experiment in self.module.TRAINING:
            folder = runner.runs / cell.run
            folder.mkdir(parents=True)
            (folder / "manifest.json").write_text(json.dumps({"status": "finished"}))
        runner._note(cell, 3.0)
        return 3.0


ALL = ["train_tokenizer whole", "train_generator whole-sit", "evaluate whole-sit", "train_tokenizer bare"]


def new(module, tmp_path, runs="runs"):
    return module.Runner(tmp_path / "results", tmp_path / runs, {}, 1)


def test_each_is_executed_once_and_then_skipped(runner, study, tmp_path, monkeypatch):
    recorder = Recorder(runner, monkeypatch)
    assert runner.execute(new(runner, tmp_path), study, 1) == [] and recorder.done == ALL
    assert runner.execute(new(runner, tmp_path), study, 2) == [] and recorder.done == ALL
    assert [entry["run"] for entry in read_ledger(tmp_path / "results")] == ["whole", "whole-sit", "whole-sit", "bare"]


def test_what_a_missing_execution_reads_is_made_again_where_it_is_gone(runner, study, tmp_path, monkeypatch):
    recorder = Recorder(runner, monkeypatch, failing=("evaluate whole-sit",))
    assert runner.execute(new(runner, tmp_path), study, 1) == ["evaluate whole-sit: broken"]
    assert recorder.done == [ALL[0], ALL[1], ALL[3]]  # the other arm went on
    # Elsewhere the ledger is there, but not the runs: only the arm that still lacks something is made again.
    recorder = Recorder(runner, monkeypatch)
    elsewhere = new(runner, tmp_path, "elsewhere")
    assert [cell.name for cell in elsewhere.missing(study[1].cells)] == []
    assert runner.execute(elsewhere, study, 1) == [] and recorder.done == ALL[:3]


def test_changed_parameters_are_another_execution(runner, study, tmp_path, monkeypatch):
    recorder = Recorder(runner, monkeypatch)
    runner.execute(new(runner, tmp_path), study, 1)
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump({"limit": 20}))
    changed = read_plan([tmp_path / "a.yaml"], tmp_path)
    assert runner.execute(new(runner, tmp_path), changed, 1) == [] and recorder.done == [*ALL, "evaluate whole-sit"]


def asked(**given):
    return type("Asked", (), {"first": False, "only": None, "part": "1/1"} | given)


def test_parts_cover_all_arms_once(runner, study):
    parts = [runner.chosen(study, asked(part=f"{i}/2")) for i in (1, 2)]
    assert sorted(arm.name for part in parts for arm in part) == ["bare", "whole"]
    assert [arm.name for arm in runner.chosen(study, asked(first=True))] == ["whole"]
    assert [arm.name for arm in runner.chosen(study, asked(only=["bare"]))] == ["bare"]


@pytest.mark.parametrize(
    ("given", "message"), [({"part": "3/2"}, "--part 3/2"), ({"only": ["bear"]}, "no sweep or arm")]
)
def test_what_is_not_there_cannot_be_chosen(runner, study, given, message):
    with pytest.raises(ValueError, match=message):
        runner.chosen(study, asked(**given))


def test_a_sweep_is_executed_listed_and_rerun(tmp_path, study):
    def call(*options):
        command = [sys.executable, str(PATH), str(tmp_path / "b.yaml"), "--results", str(tmp_path / "results")]
        command += ["--runs", str(tmp_path / "runs"), "--threads", "1", *options]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    sweep = {"sweep": "b", "name": "b-{quantizer}", "factors": {"quantizer": ["ae"]}}
    stages = {"train_tokenizer": str(tmp_path / "train_tokenizer.yaml")}
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(sweep | {"stages": stages}))
    assert "b-ae" in (listed := call("--list").stdout) and "missing: train_tokenizer" in listed
    done = call()
    assert done.returncode == 0, done.stderr
    (row, *_) = results.read(tmp_path / "results" / "train_tokenizer.jsonl")
    assert row["run"] == "b-ae" and row["config"]["quantizer"] == "ae"
    assert (tmp_path / "runs" / "b-ae" / "notebooks" / "train_tokenizer.ipynb").exists()
    assert "missing: nothing" in call("--list").stdout
    again = call("--again", "b-ae")
    # One seed: there is no interval, so nothing can fall outside.
    assert again.returncode == 0 and "| training.psnr |" in again.stdout and "no two seeds" in again.stdout
    assert (tmp_path / "results" / "again.jsonl").exists()
    assert len(results.read(tmp_path / "results" / "train_tokenizer.jsonl")) == 1


def test_a_failure_is_named_with_its_reason_and_the_way_on(tmp_path, study):
    (tmp_path / "train_tokenizer.yaml").write_text(yaml.safe_dump(TINY | {"dim": -1}))
    sweep = {"sweep": "c", "name": "c-{quantizer}", "factors": {"quantizer": ["ae"]}}
    stages = {"train_tokenizer": str(tmp_path / "train_tokenizer.yaml")}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(sweep | {"stages": stages}))
    command = [sys.executable, str(PATH), str(tmp_path / "c.yaml"), "--results", str(tmp_path / "r")]
    done = subprocess.run([*command, "--runs", str(tmp_path / "runs")], capture_output=True, text=True)
    assert done.returncode == 1 and "dim=-1 is not allowed" in done.stderr and "go on with" in done.stderr
    assert not (tmp_path / "r").exists()


def test_a_sweep_file_that_is_not_there_is_an_error(tmp_path):
    done = subprocess.run([sys.executable, str(PATH), str(tmp_path / "x.yaml")], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "x.yaml is no file" in done.stderr
