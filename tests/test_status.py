"""What the status page and the first page say is counted right, from files that are there."""

import json

import numpy as np
import pytest

from softvq_lib import results, status, token_figures
from softvq_lib.claims import read_registry
from softvq_lib.headline import cards, primary_claims, speed_ups
from softvq_lib.reproduced import Line
from softvq_lib.sweeps import Arm, Cell

from repository import ROOT, write_notebook

FOLDER = ROOT / "book" / "results"
ROW = {
    "experiment": "e",
    "run": "r",
    "metric": "psnr",
    "value": 1.0,
    "low": None,
    "high": None,
    "interval": "",
    "n": 3,
    "seed": 0,
    "source": "measured",
    "data": "digits",
    "data_fingerprint": "ab" * 32,
    "config": {"tokens": 4, "dim": 6},
    "config_hash": "c",
    "commit": "0123456789",
    "dirty": True,
    "code": "d",
    "device": "a machine",
    "precision": "fp32",
    "packages": {"torch": "2.9.0"},
    "python": "3.11.7",
    "date": "2026-01-02T03:04:05+00:00",
}


def lines_of(table: str) -> list[list[str]]:
    """Cells of a Markdown table, without head and rule."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def dashes(days: str) -> str:
    """Dates as they are shown."""
    return days.replace("-", status.NO_BREAK)


def test_rows_are_counted(tmp_path):
    rows = [ROW, ROW | {"run": "s", "train_seconds": 1800.0, "dirty": False, "date": "2026-01-05T00:00:00+00:00"}]
    results.append(tmp_path / "a" / "rows.jsonl", rows)
    (tmp_path / "cells.jsonl").write_text("")
    files = status.read_all(tmp_path)
    assert list(files) == ["a/rows.jsonl"]
    (line,) = lines_of(status.measured(files))
    assert line == ["`a/rows.jsonl`", "2", "2", dashes("2026-01-02 to 2026-01-05"), "a machine", "0.5"]
    assert lines_of(status.versions(rows)) == [["Python", "3.11.7 (2)"], ["torch", "2.9.0 (2)"]]
    assert lines_of(status.data([*rows, ROW | {"data": "none", "data_fingerprint": ""}])) == [
        ["digits", "`abababababababab`", "2", "e"],
        ["none", "–", "1", "e"],
    ]


def test_the_same_files_give_the_same_page():
    assert status.measured(status.read_all(FOLDER)) == status.measured(status.read_all(FOLDER))
    assert status.executions(FOLDER) == status.executions(FOLDER)


def test_a_ledger_is_summed(tmp_path):
    assert "No ledger" in status.executions(tmp_path)
    entry = {"experiment": "e", "seconds": 60, "machine": "m", "threads": 1, "ended": "2026-01-02T00:00:00+00:00"}
    (tmp_path / "mini").mkdir()
    (tmp_path / "mini" / "cells.jsonl").write_text("\n".join(map(json.dumps, [entry, entry | {"seconds": 7140}])))
    assert lines_of(status.executions(tmp_path)) == [
        ["`mini` e", "2", "1.0 to 119.0", "2.0", dashes("2026-01-02"), "m, 1 used"]
    ]


def test_what_is_missing_is_said_with_its_reason():
    cells = [Cell("e", f"r{k}", {}, (), f"f{k}") for k in range(4)]
    arms = [
        Arm("s", "whole", {}, (cells[0],)),
        Arm("s", "begun", {}, (cells[0], cells[1])),
        Arm("s", "left", {}, (cells[2],)),
        Arm("s", "away", {}, (cells[3],), unavailable="a network; a network"),
    ]
    (line,) = lines_of(status.missing(arms, ["f0"]))
    assert line == ["s", "4", "1", "1", "1 wait for their turn; 1 cannot be run here: a network"]


def test_the_cost_of_what_was_not_run_comes_from_its_header(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "big.yaml").write_text(
        "# row: Tab. 1,\n#   first\n# cost: a year\n# command: x\nsteps: 1\n# row: no\n"
    )
    assert lines_of(status.not_affordable(tmp_path)) == [["`train/big`", "Tab. 1, first", "a year"]]


def test_pages_say_how_their_outputs_come_about(tmp_path):
    cells = [{"source": "1", "metadata": {"tags": ["nbval-check-output"]}}, {"source": "2", "execution_count": None}]
    (tmp_path / "paper").mkdir()
    written = [
        write_notebook(tmp_path / "train_a.ipynb", cells),
        write_notebook(tmp_path / "paper" / "b.ipynb", cells[:1]),
    ]
    assert lines_of(status.pages(written, tmp_path, ["train_*.ipynb"], lambda name: f"<{name}>")) == [
        ["<paper/b>", "run when built", "1 of 1", "1"],
        ["<train_a>", "stored outputs", "1 of 2", "1"],
    ]


# -- the first page ----------------------------------------------------------------------------------------------------


def verdict(claim, word, n=0, planned=12, holds=None):
    """A verdict on a claim of the registry."""
    from softvq_lib.claim_rules import Found
    from softvq_lib.claims import Verdict

    return Verdict(claim, word, Found(n=n, planned=planned, holds=holds))


def test_the_headline_counts():
    claims = read_registry(FOLDER / "claims.json").claims
    primary = [claim for claim in claims if claim.kind == "primary"]
    exact = [claim for claim in claims if claim.kind == "exact"]
    verdicts = [
        verdict(primary[0], "holds", 12),
        verdict(primary[1], "undecided at this power", 3),
        verdict(exact[0], "exact: holds", holds=True),
        verdict(exact[1], "exact: does not hold", holds=False),
    ]
    number = {"metric": "speed-up", "value": 18, "what": "32 tokens, 256 px"}
    lines = [
        Line(number, "differs", "18.7"),
        *[Line({"metric": "rfid"}, s) for s in ("equal", "mini", "mini", "not here")],
    ]
    said = cards(lines, verdicts, {"numbers": "here", "claims": "there"})
    assert "card} 1 of 2\n:link: here" in said and "1 differ." in said
    assert said.count("card} 1 of 2\n:link: there") == 2 and "15 of 24 pairs" in said
    assert "card} 3\n:link: here" in said and "what 2 of them compare" in said
    assert primary_claims(verdicts).count("\n") == 1
    assert f"{primary[0].claim} ({primary[0].place}) → **holds**, 12 of 12 pairs." in primary_claims(verdicts)
    assert speed_ups(lines).endswith("18 times with 32 tokens, 256 px (by its tables 18.7).")


@pytest.fixture
def kept(tmp_path):
    """Rows of two tokenizers that saw the same two images."""
    rng, rows = np.random.default_rng(0), []
    images = rng.integers(0, 255, (2, 8, 8, 3), dtype=np.uint8)
    for tokens, dim in ((2, 12), (4, 6)):
        decoded = images + np.uint8(1)
        z = rng.normal(size=(2, tokens, dim)).astype(np.float16)
        files = results.keep_arrays(tmp_path, {f"{tokens}.safetensors": {"images": images, "z": z, "decoded": decoded}})
        rows.append(ROW | {"run": str(tokens), "config": {"tokens": tokens, "dim": dim}, "arrays": files})
    return rows, tmp_path


def test_an_image_its_tokens_and_reconstructions_are_drawn(kept):
    rows, folder = kept
    figure = token_figures.draw_tokens(rows, folder, which=1)
    labels = sorted(axis.get_xlabel() for axis in figure.axes)
    assert labels == ["2 tokens of 12 channels", "4 tokens of 6 channels", "48.1 dB", "48.1 dB", "image, 8×8 px"]
    tiles = {axis.get_xlabel(): len(axis.images) for axis in figure.axes}
    assert tiles["4 tokens of 6 channels"] == 4 and tiles["2 tokens of 12 channels"] == 2


def test_tokens_of_different_images_are_refused(kept):
    rows, folder = kept
    arrays = results.read_arrays(rows[0], "2.safetensors", folder)
    files = results.keep_arrays(folder, {"2.safetensors": arrays | {"images": arrays["images"][::-1]}})
    with pytest.raises(ValueError, match="of different images"):
        token_figures.draw_tokens([rows[0] | {"arrays": files}, rows[1]], folder)
    with pytest.raises(ValueError, match="record a tokenizer's first"):
        token_figures.draw_tokens([], folder)


def test_tiles_hold_all_numbers_in_order():
    for d, shape in ((16, (4, 4)), (32, (4, 8)), (128, (8, 16)), (7, (1, 7))):
        tile = token_figures.tile(np.arange(d))
        assert tile.shape == shape and (tile.ravel() == np.arange(d)).all()


def test_what_the_first_page_shows_is_what_the_tokenizer_does():
    torch = pytest.importorskip("torch")
    from softvq_lib import Tokenizer

    tokenizer = Tokenizer.from_preset("tiny", quantizer="softvq", tokens=4, image_size=16, patch_size=8).eval()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    seen = token_figures.seen_by(tokenizer, images)
    assert seen["images"].shape == seen["decoded"].shape == (2, 16, 16, 3)
    with torch.no_grad():
        z = tokenizer.encode(images).z
        decoded = tokenizer.decode(z)
    assert np.allclose(seen["z"], z, atol=1e-2)
    error = ((decoded.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1).numpy() - seen["decoded"]
    assert np.abs(error).max() <= 0.51


def test_the_recorded_tokens_are_whole():
    rows = results.read(FOLDER / "tokens.jsonl")
    assert len(rows) >= 2
    for row in rows:
        arrays = results.read_arrays(row, next(iter(row["arrays"])), FOLDER / "tokens")
        assert arrays["z"].shape[1:] == (row["config"]["tokens"], row["config"]["dim"])
        assert token_figures.psnr_of(arrays).mean() == pytest.approx(row["value"])
