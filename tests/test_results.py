"""Results rows and their files: what is refused, lines that do not tear, and tables that never mix sources."""

import inspect
import io
import json
import math
import resource
import shutil
import subprocess
import sys
from hashlib import sha256

import numpy as np
import pytest

from softvq_lib import figures, generator_tables, results, tables
from softvq_lib.evaluation.generator_cost import GeneratorCost
from softvq_lib.style import SAVE_METADATA
from softvq_lib.sweeps import row_files

from repository import ROOT

FOLDER = ROOT / "book" / "results"
ORIGIN = results.origin()
NONE = "*No rows have been recorded.*"


def row_of(**changes) -> dict:
    """A complete row, changed; ... leaves an entry out."""
    row = {
        "experiment": "evaluate",
        "run": "digits-1",
        "metric": "psnr",
        "value": 20.0,
        "low": 19.0,
        "high": 21.0,
        "interval": "95 % bootstrap over images",
        "n": 100,
        "seed": 0,
        "source": "measured",
        "data": "digits",
        "data_fingerprint": "ab" * 32,
        "config": {"tokens": 4},
        "config_hash": "cd" * 32,
        "device": "a processor",
        "precision": "fp32",
        **ORIGIN,
    }
    return {name: value for name, value in (row | changes).items() if value is not ...}


# -- rows that are refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"code": ...}, "'code' is missing; no number without it"),
        ({"date": ...}, "'date' is missing"),
        ({"code": ""}, "code='' is empty; no number without its origin"),
        ({"packages": {}}, "packages={} is empty"),
        ({"config": {}}, "config={} is empty"),
        ({"device": ""}, "device='' is empty"),
        ({"source": "guessed"}, "source='guessed'; allowed: paper, derived, measured"),
        ({"vlaue": 1.0}, "unknown entry 'vlaue', did you mean 'value'"),
        ({"value": "20"}, "value='20' is not of type"),
        ({"value": 20}, "value=20 is not of type"),
        ({"n": True}, "n=True is not of type"),
        ({"n": 0}, "n=0"),
        ({"n": -3}, "n=-3"),
        ({"value": math.nan}, "value=nan is not finite"),
        ({"value": math.inf, "high": math.inf}, "value=inf is not finite"),
        ({"low": -math.inf}, "low=-inf is not finite"),
        ({"curve": [[0, 1.0], [1, math.nan]]}, "curve=.*nan.* is not finite"),
        ({"config": {"path": ROOT}}, "config=.* is no JSON"),
        ({"low": 20.5}, "low=20.5 is above value=20.0"),
        ({"high": 19.5}, "value=20.0 is above high=19.5"),
        ({"low": None}, "low=None, high=21.0, interval='95.*give all three, or none"),
        ({"interval": ""}, "interval=''; give all three"),
        ({"low": None, "high": None}, "low=None, high=None, interval='95"),
        ({"pictures": {"../a.png": "0" * 64}}, "pictures has '../a.png'"),
        ({"arrays": {"a.safetensors": "0123"}}, "arrays has 'a.safetensors': '0123'"),
    ],
)
def test_a_row_is_refused_by_entry_and_value(tmp_path, change, words):
    with pytest.raises(ValueError, match=f"results row of evaluate/digits-1/psnr: .*{words}"):
        results.append(tmp_path / "rows.jsonl", [row_of(), row_of(**change)])
    assert not (tmp_path / "rows.jsonl").exists()


def test_rows_without_interval_or_git_are_complete():
    for change in (
        {"low": None, "high": None, "interval": ""},
        {"commit": None, "dirty": None},
        {"low": 20.0 + 1e-13, "high": 20.0},
        {"data_fingerprint": "", "arrays": {"umap.safetensors": "0" * 64}},
    ):
        assert results.check(row_of(**change)) == row_of(**change)
    with pytest.raises(ValueError, match="entries by name are wanted, this is 3"):
        results.check(3)


# Beside the rows lie two accounts of what was executed.
ROWS = row_files(FOLDER)


@pytest.mark.parametrize("path", ROWS, ids=lambda path: str(path.relative_to(FOLDER)))
def test_committed_rows_and_their_files_are_in_order(path):
    rows = results.read(path)
    assert rows
    for row in rows:
        for name in [*row.get("pictures", ()), *row.get("arrays", ())]:
            assert results.find_file(row, name, path.with_suffix("")).stat().st_size > 0


# -- lines -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"experiment": "evaluate", "val', "line 2 is damaged: b'{\"experiment"),
        ("", "line 2 is damaged"),
        ("[1, 2]", "line 2: results row: entries by name are wanted"),
        (json.dumps(row_of(n=0)), "line 2: results row of evaluate/digits-1/psnr: n=0"),
        (json.dumps(row_of(value=math.nan)), "line 2: .*value=nan"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line, words):
    path, whole = tmp_path / "rows.jsonl", json.dumps(row_of())
    path.write_text(f"{whole}\n{line}\n{whole}\n")
    with pytest.raises(ValueError, match=f"rows.jsonl, {words}"):
        results.read(path)


def test_rows_follow_half_a_line_on_a_line_of_their_own(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    results.append(path, [row_of()])
    path.write_bytes(path.read_bytes()[:-1])  # as an editor may leave it
    results.append(path, [row_of(metric="ssim")])
    assert [row["metric"] for row in results.read(path)] == ["psnr", "ssim"]
    path.write_bytes(path.read_bytes()[:-40])
    results.append(path, [row_of(metric="fd")])
    with pytest.raises(ValueError, match="line 2 is damaged"):
        results.read(path)
    assert json.loads(path.read_text().splitlines()[2])["metric"] == "fd"


def test_rows_that_do_not_fit_leave_nothing(tmp_path):
    path = tmp_path / "rows.jsonl"
    results.append(path, [row_of()])
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, limits[1]))
    try:
        with pytest.raises(OSError, match="only 100 of .* bytes could be written; none were kept"):
            results.append(path, [row_of(metric="ssim")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before


# Only what results.py itself needs is loaded: the package lies in a folder of its own, as a wheel is unpacked.
_APPEND = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
sys.modules["softvq_lib.training.run"] = SimpleNamespace(now=None, provenance=None)
from softvq_lib import results
row, metric = json.loads(sys.stdin.readline()), sys.argv[2]
print(flush=True)
sys.stdin.readline()  # both are there
for number in range(100):
    rows = [row | {"metric": f"{metric}-{number}-{part}", "data": metric * 3000} for part in range(3)]
    results.append(Path(sys.argv[1]), rows)
"""


def test_two_processes_append_at_once_from_an_installed_copy(tmp_path):
    package = tmp_path / "site" / "softvq_lib"
    package.mkdir(parents=True)
    for name in ("__init__", "config", "results"):
        shutil.copy(ROOT / "softvq_lib" / f"{name}.py", package)
    path = tmp_path / "somewhere" / "rows.jsonl"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": tmp_path}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", _APPEND, path, metric], env={"PYTHONPATH": str(package.parent)}, **pipes
        )
        for metric in "ab"
    ]
    for process in both:
        process.stdin.write(json.dumps(row_of()) + "\n")
        process.stdin.flush()
    for process in both:
        process.stdout.readline()
    for process in both:
        process.stdin.write("\n")
        process.stdin.close()
    assert [process.wait() for process in both] == [0, 0]
    for process in both:
        process.stdout.close()
    names = [row["metric"] for row in results.read(path)]
    assert len(names) == len(path.read_bytes().splitlines()) == 600
    # The rows of one call stay together.
    assert all(names[at].rsplit("-", 1)[0] == names[at + 2].rsplit("-", 1)[0] for at in range(0, 600, 3))


# -- files -----------------------------------------------------------------------------------------------------------

ARRAYS = {"z": np.arange(12, dtype=np.float32).reshape(3, 4).T, "label": np.array([1, 2, 3])}


def test_arrays_come_back_as_they_were(tmp_path):
    kept = results.keep_arrays(tmp_path / "rows", {"umap.safetensors": ARRAYS})
    row = results.check(row_of(arrays=kept))
    found = results.read_arrays(row, "umap.safetensors", tmp_path / "rows")
    assert set(found) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    again = results.keep_arrays(tmp_path / "again", {"umap.safetensors": dict(reversed(ARRAYS.items()))})
    assert again == kept


def test_a_file_that_is_not_the_recorded_one_is_refused_with_both_hashes(tmp_path):
    (tmp_path / "new.png").write_bytes(b"a picture")
    pictures = results.keep_pictures(tmp_path / "rows", {"a.png": tmp_path / "new.png"})
    arrays = results.keep_arrays(tmp_path / "rows", {"a.safetensors": ARRAYS})
    row = row_of(pictures=pictures, arrays=arrays)
    assert pictures == {"a.png": sha256(b"a picture").hexdigest()}
    assert results.find_file(row, "a.png", tmp_path / "rows").read_bytes() == b"a picture"
    other = sha256(b"another").hexdigest()
    for name, kind, recorded in (("a.png", "picture", pictures), ("a.safetensors", "array", arrays)):
        path = tmp_path / "rows" / name
        path.write_bytes(b"another")
        with pytest.raises(ValueError, match=f"{name} is not the {kind}.*sha256 {other}, recorded {recorded[name]}"):
            results.find_file(row, name, tmp_path / "rows")
        path.unlink()
        with pytest.raises(ValueError, match=f"{name} is missing; its results row names a {kind}.*{recorded[name]}"):
            results.find_file(row, name, tmp_path / "rows")
    with pytest.raises(ValueError, match="digits-1, psnr, names no file 'b.png', did you mean 'a.png'"):
        results.read_arrays(row, "b.png", tmp_path / "rows")


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        ("umap.npz", np.zeros(3), "'umap.npz' should be 'umap.safetensors'"),
        ("umap.safetensors", np.zeros(2**18), "umap.safetensors has 2,097,.* allowed: 1,048,576"),
    ],
)
def test_arrays_that_are_not_kept(tmp_path, name, array, words):
    with pytest.raises(ValueError, match=words):
        results.keep_arrays(tmp_path, {name: {"z": array}})
    assert not list(tmp_path.iterdir())


# -- tables never mix sources in a column ----------------------------------------------------------------------------

EFFICIENCY = results.read(FOLDER / "efficiency.jsonl")
PAPER = results.read_paper(FOLDER / "paper.json")
GENERATION = [
    row_of(
        metric=metric,
        config={"generator": "sit", "size": "b", "tokens": 4, "dim": 8, "steps": 9},
        train_seconds=60.0,
    )
    for metric in ("val_loss", "recall")
]
MEASURED = {
    tables.reconstruction: results.read(FOLDER / "train_tokenizer.jsonl"),
    tables.generation: GENERATION,
    tables.forward_cost: EFFICIENCY,
    tables.training_stages: EFFICIENCY,
    tables.training_ratio: EFFICIENCY,
    tables.run_shares: EFFICIENCY,
    tables.quantizer_cost: EFFICIENCY,
    tables.trace_cost: EFFICIENCY,
    generator_tables.step_costs: EFFICIENCY,
}


def strangers(rows: list[dict], source: str) -> list[dict]:
    """The rows with another source, for their own runs and for others."""
    strange = [row | {"source": source, "value": row["value"] + 1.0} for row in rows]
    return strange + [row | {"run": row["run"] + "-other"} for row in strange]


@pytest.mark.parametrize("source", ["paper", "derived"])
@pytest.mark.parametrize("table", MEASURED, ids=lambda table: table.__name__)
def test_a_table_of_measured_numbers_has_no_others(table, source):
    rows = [row for row in MEASURED[table] if row["source"] == "measured"]
    strange, text = strangers(rows, source), table(rows)
    assert text.startswith("| ") and table(strange) == NONE
    assert table(rows + strange) == table(strange + rows) == text


def test_derived_speed_ups_have_a_table_of_their_own():
    rows = [row for row in EFFICIENCY if row["run"].startswith("generator-")]
    measured, derived = ([row for row in rows if row["source"] == source] for source in ("measured", "derived"))
    assert measured and derived
    both = [generator_tables.speed_ups(some, PAPER) for some in (measured, derived)]
    assert generator_tables.speed_ups(rows, PAPER) == "\n\n".join(both)
    assert generator_tables.speed_ups(rows + strangers(rows, "paper"), PAPER) == "\n\n".join(both)
    assert both[1].startswith("Derived, ") and "erived" not in both[0]


def columns(text: str) -> dict[int, tuple[str, list[str]]]:
    """Of all tables in a text, the number of each column -> its head, and its cells."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    return {at: (lines[0][at], [line[at] for line in lines[1:]]) for at in range(len(lines[0]))}


def _counted() -> list[dict]:
    common = {"tokens": 64, "dim": 16, "ours_with_unused": None, "place": "Tab. 3", "note": "a sum"}
    return [{"what": "A", "ours": 5 * 10**7, "paper": 46, **common}, {"what": "B", "ours": None, "paper": 9, **common}]


def _costs(factor: float) -> list[GeneratorCost]:
    counts = {"tokens": 64, "parameters": 10**8, "macs": 10**9, "as_printed": 2 * 10**9}
    return [
        GeneratorCost(row["place"], row["what"], factor * row["value"], "a note", **counts)
        for row in PAPER
        if row["metric"] == "gflops"
    ]


def _changed(factor: float) -> list[dict]:
    return [row | {"value": factor * row["value"]} for row in PAPER]


BESIDE = {
    tables.parameters: lambda factor: tables.parameters([row | {"paper": factor * row["paper"]} for row in _counted()]),
    generator_tables.macs_of_paper: lambda factor: generator_tables.macs_of_paper(_costs(factor)),
    # Ratios of the paper's numbers: one number is another, the others stay.
    generator_tables.savings: lambda factor: generator_tables.savings(
        [*_costs(1.0)[:4], *(_costs(factor)[4:])] if factor > 1 else _costs(1.0)
    ),
    generator_tables.speed_ups: lambda factor: generator_tables.speed_ups(EFFICIENCY, _changed(factor)),
}


@pytest.mark.parametrize("table", BESIDE, ids=lambda table: table.__name__)
def test_the_papers_numbers_change_their_own_column_alone(table):
    before, after = columns(BESIDE[table](1.0)), columns(BESIDE[table](2.0))
    changed = [head for at, (head, cells) in before.items() if after[at] != (head, cells)]
    assert len(changed) == 1 and "the paper" in changed[0]


def test_no_table_is_left_out():
    public = {
        function
        for module in (tables, generator_tables)
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith("_")
    }
    others = {tables.quantizer_label, tables.provenance, tables.derived_provenance}  # no tables
    others |= {generator_tables.macs_by_tokens, tables.parameter_counts}  # counted; their tests know each column
    assert public == set(MEASURED) | set(BESIDE) | others


# -- the same bytes --------------------------------------------------------------------------------------------------


def test_rendering_twice_gives_the_same_bytes():
    rows = results.read(FOLDER / "train_tokenizer.jsonl")
    row = next(row for row in rows if "pictures" in row)
    drawn = {
        "svg": lambda: figures.recorded_curves(rows),
        "png": lambda: figures.recorded_progress(row, FOLDER / "train_tokenizer"),
    }
    for kind, draw in drawn.items():
        files = []
        for _ in range(2):
            file = io.BytesIO()
            draw().savefig(file, format=kind, metadata=SAVE_METADATA if kind == "svg" else None)
            files.append(file.getvalue())
        assert files[0] == files[1] and len(files[0]) > 1000
    for table, some in MEASURED.items():
        assert table(some) == table(json.loads(json.dumps(some)))
