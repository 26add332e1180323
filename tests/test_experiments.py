"""The training notebook and the experiment behind it: parameters, what it records, what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import papermill
import pytest

from softvq_lib import ROOT, figures, results, tables, train_tokenizer
from softvq_lib.config import fields_of
from softvq_lib.costs import EfficiencyConfig, efficiency
from softvq_lib.distilling import DISTIL_EXPERIMENT
from softvq_lib.evaluate import EvaluateConfig
from softvq_lib.experiments import TOKENIZER_EXPERIMENT, parameters
from softvq_lib.generation import GENERATOR_EXPERIMENT
from softvq_lib.latent_space import LatentSpaceConfig
from softvq_lib.linear_probing import ProbeConfig
from softvq_lib.own_images import OwnImagesConfig
from softvq_lib.sampling import SampleExperimentConfig
from softvq_lib.training import distillation
from softvq_lib.training.generator import DEFAULTS

NOTEBOOK = ROOT / "book" / "train_tokenizer.ipynb"
QUICK = {"tokens": 4, "steps": 12, "batch_size": 8, "limit": 64, "val_images": 40, "log_every": 4}


@pytest.mark.parametrize(
    ("notebook", "classes", "others"),
    [
        ("train_tokenizer", TOKENIZER_EXPERIMENT, {}),
        ("train_generator", GENERATOR_EXPERIMENT, DEFAULTS),
        ("distil_encoder", DISTIL_EXPERIMENT, distillation.DEFAULTS),
        ("sample", (SampleExperimentConfig,), {}),
        ("evaluate", (EvaluateConfig,), {}),
        ("linear_probing", (ProbeConfig,), {}),
        ("latent_space", (LatentSpaceConfig,), {}),
        ("efficiency", (EfficiencyConfig,), {}),
        ("five_minutes", (OwnImagesConfig,), {}),
    ],
)
def test_notebook_parameters_and_defaults_are_the_dataclasses(notebook, classes, others):
    path = ROOT / "book" / f"{notebook}.ipynb"
    declared = papermill.inspect_notebook(str(path))
    assert all(entry["help"] for entry in declared.values()), "each parameter is explained"
    namespace: dict = {}
    cell = next(
        cell for cell in json.loads(path.read_text())["cells"] if "parameters" in cell["metadata"].get("tags", [])
    )
    exec("from typing import Optional\n" + "".join(cell["source"]), namespace)
    defaults = {name: default for cls in classes for name, default in fields_of(cls).items()} | others
    assert {name: namespace[name] for name in declared} == defaults
    assert parameters({k: v for k, v in namespace.items() if k != "__builtins__"}) == defaults


def test_parameters_are_the_plain_values():
    namespace = {"tokens": 4, "run": None, "_hidden": 1, "json": json, "In": [], "Out": {}, "f": len, "tokkens": 5}
    assert parameters(namespace) == {"tokens": 4, "run": None, "tokkens": 5}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    experiment = train_tokenizer(**QUICK, runs=str(folder / "runs"), results=str(folder / "results"))
    return experiment, folder / "results"


def test_it_measures_and_records(recorded):
    experiment, folder = recorded
    assert experiment.run.trained == 12
    rows = results.read(folder / "train_tokenizer.jsonl")
    by_metric = {row["metric"]: row for row in rows}
    assert set(by_metric) == {"psnr", "psnr_pca_16", "psnr_pca_64", "usage", "perplexity"}
    row = by_metric["psnr"]
    assert row["value"] == pytest.approx(experiment.measured.psnr.mean())
    assert row["low"] < row["value"] < row["high"] and row["n"] == 40
    assert row["config_hash"] == experiment.run.config_hash and row["config"]["tokens"] == 4
    assert [step for step, _ in row["curve"]] == [0, 1, 2, 3, 6, 12]
    figures.recorded_progress(row, folder / "train_tokenizer")
    figures.recorded_curves(rows)
    table = tables.reconstruction(rows)
    assert "4 × 16" in table and f"{row['value']:.2f} [" in table and "digits, 32 px" in table
    assert row["data_fingerprint"][:12] in tables.provenance(rows)
    assert str(experiment).startswith(" ") and "PCA, 16 components" in str(experiment)


def test_a_second_call_measures_the_same_run(recorded):
    experiment, folder = recorded
    again = train_tokenizer(**QUICK, runs=str(experiment.run.path.parent))
    assert again.run.trained == 0
    assert again.measured.psnr.tolist() == experiment.measured.psnr.tolist()


def test_a_picture_that_is_not_the_recorded_one_is_refused(recorded, tmp_path):
    row = next(row for row in results.read(recorded[1] / "train_tokenizer.jsonl") if "pictures" in row)
    for name in row["pictures"]:
        (tmp_path / name).write_bytes(b"another")
    with pytest.raises(ValueError, match="not the picture"):
        figures.recorded_progress(row, tmp_path)


def test_pictures_of_other_data_show_no_originals(tmp_path):
    from PIL import Image

    (tmp_path / "images").mkdir()
    for i in range(30):
        Image.new("RGB", (32, 32), (8 * i, 100, 50)).save(tmp_path / "images" / f"{i}.png")
    settings = {**QUICK, "dataset": str(tmp_path / "images"), "workers": 0, "val_images": 2}
    experiment = train_tokenizer(**settings, runs=str(tmp_path / "runs"), results=str(tmp_path / "results"))
    row = next(row for row in results.read(tmp_path / "results" / "train_tokenizer.jsonl") if "pictures" in row)
    assert row["pictures"] and not any("originals" in name for name in row["pictures"])
    assert row["data"] == "images" and str(tmp_path) not in json.dumps(row)
    for draw in (figures.curves, figures.progress, figures.data_sheet, figures.reconstructions, figures.code_usage):
        arguments = {
            figures.curves: (experiment.run.metrics,),
            figures.progress: (experiment.run.snapshots,),
            figures.data_sheet: (experiment.data, 32),
        }.get(draw, (experiment.measured,))
        assert draw(*arguments).axes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"value": None}, "value=None"),
        ({"valu": 1.0}, "did you mean 'value'"),
        ({"source": "guessed"}, "source='guessed'"),
        ({"commit": ...}, "'commit' is missing"),
        ({"data_fingerprint": ...}, "'data_fingerprint' is missing"),
    ],
)
def test_a_row_without_its_origin_is_refused(recorded, tmp_path, change, words):
    row = dict(results.read(recorded[1] / "train_tokenizer.jsonl")[0])
    for name, value in change.items():
        if value is ...:
            del row[name]
        else:
            row[name] = value
    with pytest.raises(ValueError, match=words):
        results.append(tmp_path / "rows.jsonl", [row])
    assert not (tmp_path / "rows.jsonl").exists()


def test_rows_are_appended_and_the_last_of_a_kind_counts(recorded, tmp_path):
    row = results.read(recorded[1] / "train_tokenizer.jsonl")[0]
    results.append(tmp_path / "rows.jsonl", [row])
    other = {**row, "value": 1.0, "low": None, "high": None, "interval": ""}
    results.append(tmp_path / "rows.jsonl", [other])
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 2
    assert [kept["value"] for kept in results.read(tmp_path / "rows.jsonl")] == [1.0]


def test_committed_rows_are_whole():
    rows = results.read(ROOT / "book" / "results" / "train_tokenizer.jsonl")
    assert rows
    for row in rows:
        if "pictures" in row:
            figures.recorded_progress(row, ROOT / "book" / "results" / "train_tokenizer")


def test_efficiency_measures_and_records(tmp_path):
    small = {"bench_tokens": 16, "bench_codes": 8, "parts": "forward, quantizers"}
    rows = efficiency(tokens=4, batch_sizes="1, 2", rounds=3, **small, results=str(tmp_path))
    forward = {row["run"] for row in rows if row["run"].startswith("forward")}
    assert forward == {"forward-tiny-4-batch1-fp32", "forward-tiny-4-batch2-fp32"}
    ratios = [row for row in rows if row["metric"] == "time_ratio"]
    assert len(ratios) >= 8 and all(row["low"] <= row["value"] <= row["high"] for row in ratios)
    assert "| SoftVQ released, with KL term | plain released, with KL term | 8 |" in tables.quantizer_cost(rows)
    values = {row["metric"]: row["value"] for row in rows}
    assert values["encode_seconds"] > 0 and values["decode_seconds"] > 0
    assert values["weights_mib"] == pytest.approx(0.84, abs=0.1)
    assert results.read(tmp_path / "efficiency.jsonl") == rows
    assert "| tiny | 32 px | 4 | fp32 | 2 |" in tables.forward_cost(rows)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"presets": "s"}, "did you mean 'preset'"),
        ({"preset": "xl"}, "preset='xl'"),
        ({"batch_sizes": "1;4"}, "batch_sizes='1;4'.*'1,4'"),
        ({"precisions": "fp16"}, "precisions='fp16'"),
        ({"rounds": 0}, "rounds=0"),
        ({"parts": "forward,generator"}, "parts='generator'.*did you mean 'generators'"),
        ({"generator_size": "h"}, "generator_size='h'"),
        ({"peer_batch": 0}, "peer_batch=0"),
    ],
)
def test_efficiency_refuses(bad, words):
    with pytest.raises(ValueError, match=words):
        efficiency(**bad)


def test_numbers_of_the_paper_have_a_place(tmp_path):
    rows = results.read_paper(ROOT / "book" / "results" / "paper.json")
    assert {row["preset"]: row["value"] for row in rows if row["metric"] == "parameters"} == {
        "s": 45,
        "b": 173,
        "bl": 391,
        "l": 608,
    }
    (small,) = (row for row in rows if row["metric"] == "parameters" and row["preset"] == "s")
    assert "s            44.54        44.84        45" in tables.parameter_counts([small])
    for bad in ([{**rows[0], "place": None}], [rows[0], rows[0]]):
        (tmp_path / "paper.json").write_text(json.dumps(bad))
        with pytest.raises(ValueError, match="stands there twice"):
            results.read_paper(tmp_path / "paper.json")


def run_notebook(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "papermill", str(NOTEBOOK), str(tmp_path / "out.ipynb"), *arguments]
    return subprocess.run([*command, "--no-progress-bar"], cwd=tmp_path, capture_output=True, text=True)


def test_the_notebook_trains_from_an_empty_runs_folder_then_loads(tmp_path):
    """From another directory, with papermill's parameters; the source stays as it was."""
    source = NOTEBOOK.read_bytes()
    arguments = [word for name, value in QUICK.items() for word in ("-p", name, str(value))]
    arguments += ["-p", "runs", str(tmp_path / "runs")]
    done = run_notebook(tmp_path, *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    (run,) = (tmp_path / "runs").iterdir()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 12 and sum("loss" in line for line in lines) == 3
    stamp = (run / "metrics.jsonl").stat().st_mtime_ns
    assert run_notebook(tmp_path, *arguments).returncode == 0
    assert (run / "metrics.jsonl").stat().st_mtime_ns == stamp and len(list((tmp_path / "runs").iterdir())) == 1
    assert NOTEBOOK.read_bytes() == source


def test_the_notebook_refuses_a_misspelt_parameter(tmp_path):
    """papermill itself only logs an unknown name."""
    done = run_notebook(tmp_path, "-p", "tokkens", "64", "-p", "runs", str(tmp_path / "runs"))
    assert done.returncode == 1
    assert "unknown parameter 'tokkens', did you mean 'tokens'" in done.stderr
    assert not (tmp_path / "runs").exists()
