"""Parameters of the tokenizers of Tab. 3 and Sec. 4.1: which agree with the paper, and by how much others differ."""

import sys

import pytest
import torch

from softvq_lib import results, tables
from softvq_lib.evaluation.parameters import METRICS, MODELS, NOT_BUILT, block, parameter_table

from repository import ROOT, pyproject

ROWS = results.read_paper(ROOT / "book" / "results" / "paper.json")


@pytest.fixture(scope="module")
def table():
    return {(row["place"], row["what"]): row for row in parameter_table(ROWS)}


def of(table: dict, what: str, place: str = "Tab. 3") -> dict:
    return table[place, what]


def test_every_number_of_the_paper_has_its_row(table):
    asked = {(row["place"], row["what"]): row["value"] for row in ROWS if row["metric"] in METRICS}
    assert {key: row["paper"] for key, row in table.items() if row["paper"] is not None} == asked
    assert {what for _, what in set(table) - set(asked)} == {"TiTok-BL-KL, our trunk", "TiTok-BL-VQ, our trunk"}


def test_a_transformer_block_has_what_torchs_own_has():
    layer = torch.nn.TransformerEncoderLayer(48, 4, 4 * 48, norm_first=True, device="meta")
    assert block(48) == sum(parameter.numel() for parameter in layer.parameters())


@pytest.mark.parametrize(
    ("what", "ours", "million"),
    [
        ("TiTok-BL-KL", 389_418_100, 389),
        ("TiTok-BL-VQ", 389_536_868, 390),
        ("DC-AE-f32", 323_356_460, 323),
        ("DC-AE-f64", 676_896_140, 677),
    ],
)
def test_what_others_built_agrees_with_the_paper(table, what, ours, million):
    row = of(table, what)
    assert (row["ours"], row["ours_with_unused"], row["paper"]) == (ours, None, million)
    assert round(ours / 1e6) == million


def test_sd_vae_is_an_eighth_of_what_the_paper_says(table):
    row = of(table, "KL (SD-VAE)")
    assert (row["ours"], row["paper"]) == (83_653_863, 676)


def test_sizes_of_sec_4_1_count_the_unused_part(table):
    rows = {row["what"]: row for (place, _), row in table.items() if place == "Sec. 4.1"}
    assert {what: round(row["ours_with_unused"] / 1e6, 2) for what, row in rows.items()} == {
        "SoftVQ-S": 44.84,
        "SoftVQ-B": 173.56,
        "SoftVQ-BL": 391.33,
        "SoftVQ-L": 608.92,
    }
    assert all(abs(row["ours_with_unused"] / 1e6 - row["paper"]) < 1 for row in rows.values())
    assert all(row["note"] == "4 codebooks of 8192 codes" for row in rows.values())


def test_rows_of_size_s_differ_by_the_codebook_alone(table):
    for tokens in (256, 128, 64, 32):
        ae, vq, soft = (of(table, f"{name}-S, {tokens} tokens") for name in ("AE", "VQ", "SoftVQ"))
        assert ae["tokens"] * ae["dim"] == 2048
        assert vq["ours"] == soft["ours"] == ae["ours"] + 4 * 8192 * ae["dim"]
        assert ae["ours_with_unused"] - ae["ours"] == 384 * (3 * 16**2 + 1)
        assert ae["note"].startswith("no codebook;")


def test_with_one_codebook_and_the_alignment_head_all_of_size_s_are_46_million(table):
    notes = [row["note"] for (_, what), row in table.items() if what.endswith(" tokens")]
    counts = [float(note.split()[-2]) for note in notes]
    assert len(counts) == 12
    assert {round(count) for count in counts} == {46}
    # By hand, SoftVQ-S with 32 tokens of 64: one codebook, and 64 -> 1024 -> 1024 -> 768.
    soft = of(table, "SoftVQ-S, 32 tokens")
    by_hand = soft["ours_with_unused"] - 3 * 8192 * 64 + 65 * 1024 + 1025 * 1024 + 1025 * 768
    assert soft["note"].endswith(f"{by_hand / 1e6:.2f} M")


def test_titok_on_our_trunk_has_our_layer_scale_and_codebooks(table):
    kl, vq = (of(table, f"TiTok-BL-{name}, our trunk") for name in ("KL", "VQ"))
    assert (kl["tokens"], kl["dim"], kl["paper"]) == (64, 16, None)
    # Instead of a mean and a variance a channel, VQ has one output and four codebooks.
    assert vq["ours"] - kl["ours"] == 4 * 8192 * 16 - 16 * (768 + 1)


def test_without_diffusers_three_rows_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    rows = parameter_table([row for row in ROWS if row.get("model") in MODELS])
    missing = [row["what"] for row in rows if row["ours"] is None]
    assert missing == ["KL (SD-VAE)", "DC-AE-f32", "DC-AE-f64"]
    assert "| DC-AE-f32 | 64 × 32 | – | – | " + NOT_BUILT + " | 323 (Tab. 3) |" in tables.parameters(rows)
    assert NOT_BUILT.endswith(f"install {pyproject()['project']['name']}[bench]")


def test_the_tests_have_all_that_the_extra_bench_names():
    extras = pyproject()["project"]["optional-dependencies"]
    assert set(extras["bench"]) <= set(extras["dev"])


def test_the_table_keeps_the_papers_numbers_in_the_last_column(table):
    lines = tables.parameters(list(table.values())).splitlines()
    assert len(lines) == 2 + len(table)
    assert "| SoftVQ-S | 64 × 32 | 44.54 | 44.84 | 4 codebooks of 8192 codes | 45 (Sec. 4.1) |" in lines
    assert any(line.startswith("| TiTok-BL-KL, our trunk | 64 × 16 | 389.48 |") and "| – |" in line for line in lines)


@pytest.mark.parametrize("model", [None, "dc-ae-f23"])
def test_a_row_that_nothing_can_be_built_from_is_refused(model):
    row = {"place": "Tab. 3", "what": "X", "metric": "tokenizer_parameters", "value": 1, "tokens": 64, "dim": 4}
    with pytest.raises(ValueError, match="'X' names no preset.*allowed: titok-bl-kl, "):
        parameter_table([row | {"model": model}])


def test_rows_of_other_metrics_are_left_out():
    assert parameter_table([{"place": "Tab. 3", "what": "VQ-S", "metric": "rfid", "value": 1.45}]) == []
