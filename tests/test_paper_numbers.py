"""The paper's numbers: every cell of Tab. 1-4 has its line, a sample is typed again by hand, and they fit together."""

import json
from collections import Counter

import pytest

from softvq_lib import results
from softvq_lib.paper_tables import NOT_RUN, TABLES, paper_rows, paper_table

from repository import ROOT

FILE = ROOT / "book" / "results" / "paper.json"
PAPER = results.read_paper(FILE)
VALUES = {(row["place"], row["what"], row["metric"]): row["value"] for row in PAPER}

# Lines of each table by metric. A number that is printed once for several rows is one line, but for the three of the
# twelve S tokenizers in Tab. 3, which are of another size each.
SYSTEMS = ("tokens", "rfid", "gflops", "throughput", "gfid", "is", "gfid_guided", "is_guided")
COUNTS = {
    "Tab. 1": dict(zip(SYSTEMS, (15, 22, 15, 23, 24, 24, 23, 23), strict=True)),
    "Tab. 2": dict(zip(SYSTEMS, (7, 7, 9, 9, 9, 5, 13, 9), strict=True)),
    "Tab. 3": dict.fromkeys(("tokenizer_parameters", "tokens", "dim", "rfid", "gfid", "is"), 17),
    "Tab. 4": dict.fromkeys(("rfid", "linear_probe", "gfid", "is"), 6),
}
PRINTED_ROWS = {"Tab. 1": 27, "Tab. 2": 14, "Tab. 3": 17, "Tab. 4": 6}

# Typed from the paper, not from the file.
SAMPLE_1 = {
    "Taming Transformers, VQ": {"rfid": 7.94, "gfid": 5.20, "tokens": 256},
    "RQ-Transformer, RQ": {"gflops": 908.91, "throughput": 7.85, "gfid": 3.80, "is": 323.7},
    "MaskGIT, VQ": {"rfid": 2.28, "gfid": 6.18, "is": 182.1},
    "MAGE, VQ": {"gfid": 6.93, "is": 195.8},
    "LlamaGen-3B, VQ": {"gfid_guided": 3.06, "is_guided": 279.7, "throughput": 2.90},
    "TiTok-S-128, VQ": {"tokens": 128, "rfid": 1.61, "gflops": 33.03, "gfid_guided": 1.97},
    "MAR-H, KL": {"rfid": 1.22, "gflops": 145.08, "throughput": 0.12, "gfid_guided": 1.55, "is_guided": 303.7},
    "MAR-H, SoftVQ-L, 32 tokens": {"rfid": 0.61, "gfid": 3.83, "gfid_guided": 2.54, "throughput": 2.08},
    "MAR-H, SoftVQ-BL, 64 tokens": {"rfid": 0.65, "gfid": 2.81, "gfid_guided": 1.93, "throughput": 0.89},
    "LDM-4, KL": {"tokens": 4096, "rfid": 0.27, "gfid": 10.56, "is": 103.5, "is_guided": 247.7},
    "MDTv2-XL/2, KL": {"throughput": 0.59, "gfid": 5.06, "gfid_guided": 1.58, "is_guided": 314.7},
    "DiT-XL/2, KL": {"gflops": 80.73, "throughput": 0.51, "gfid": 9.62, "is": 121.5, "gfid_guided": 2.27},
    "SiT-XL/2, KL": {"throughput": 0.54, "gfid": 8.30, "is": 131.7, "gfid_guided": 2.06, "is_guided": 270.3},
    "SiT-XL/2 + REPA, KL": {"gfid": 5.90, "is": 157.8, "gfid_guided": 1.42, "is_guided": 305.7},
    "DiT-XL, SoftVQ-L, 32 tokens": {"gfid": 9.07, "is": 117.2, "gfid_guided": 3.69, "throughput": 8.74},
    "DiT-XL, SoftVQ-BL, 64 tokens": {"rfid": 0.65, "gfid": 6.53, "is_guided": 268.3},
    "SiT-XL, SoftVQ-B, 32 tokens": {"rfid": 0.89, "throughput": 10.28, "gfid": 7.99, "is_guided": 301.3},
    "SiT-XL, SoftVQ-B, 64 tokens": {"gfid": 5.98, "is": 138.0, "gfid_guided": 1.78, "is_guided": 279.0},
    "SiT-XL, SoftVQ-L, 64 tokens": {"rfid": 0.61, "throughput": 5.39, "gfid": 5.35, "is": 151.2, "gfid_guided": 1.86},
}
SAMPLE_2 = {
    "BigGAN": {"gfid_guided": 8.43, "is_guided": 177.9},
    "TiTok-B, VQ": {"rfid": 1.52, "gfid_guided": 2.13},
    "MAR-H, SoftVQ-BL, 64 tokens": {"rfid": 0.71, "gfid": 8.21, "is": 152.9, "gfid_guided": 3.42, "throughput": 1.50},
    "ADM": {"gfid": 23.24, "is": 58.06, "gfid_guided": 3.85},
    "DiT-XL/2, KL": {"gflops": 373.34, "throughput": 0.10, "gfid_guided": 3.04, "is_guided": 240.8},
    "SiT-XL/2, KL": {"gflops": 373.32, "gfid_guided": 2.62},
    "U-ViT-H, DC-AE, 64 tokens": {"gflops": 32.99, "throughput": 15.23, "gfid": 12.26, "gfid_guided": 2.66},
    "SiT-XL, SoftVQ-BL, 64 tokens": {"throughput": 5.38, "gfid": 7.96, "gfid_guided": 2.21, "is_guided": 290.5},
}
SAMPLE_3 = {
    "KL (SD-VAE)": {"tokens": 1024, "dim": 4, "rfid": 0.62, "gfid": 18.79, "is": 72.0},
    "TiTok-BL-KL": {"tokenizer_parameters": 389, "rfid": 1.25, "gfid": 23.35},
    "TiTok-BL-VQ": {"tokenizer_parameters": 390, "rfid": 2.06, "gfid": 19.23, "is": 61.8},
    "DC-AE-f64": {"tokens": 16, "dim": 128, "rfid": 0.81, "is": 49.1},
    "VQ-S, 32 tokens": {"dim": 64, "rfid": 10.97, "gfid": 21.57, "is": 47.6},
    "AE-S, 256 tokens": {"dim": 8, "rfid": 1.15, "gfid": 22.11, "is": 58.3},
    "SoftVQ-S, 128 tokens": {"dim": 16, "rfid": 0.92, "gfid": 10.12, "is": 85.8},
    "SoftVQ-S, 32 tokens": {"rfid": 1.24, "gfid": 12.89, "is": 79.5},
}
SAMPLE_4 = {
    "SoftVQ-B, no init, no target": {"rfid": 0.98, "linear_probe": 5.42, "gfid": 20.33},
    "SoftVQ-B, init DINOv2-B, no target": {"rfid": 0.73, "linear_probe": 11.87, "gfid": 17.20, "is": 91.5},
    "SoftVQ-B, init DINOv2-B, target DINOv2-B": {"rfid": 0.88, "linear_probe": 42.42, "is": 103.4},
    "SoftVQ-B, init EVA-02-B, target EVA-02-B": {"linear_probe": 44.23, "gfid": 10.34, "is": 112.7},
}
SAMPLES = dict(zip(TABLES, (SAMPLE_1, SAMPLE_2, SAMPLE_3, SAMPLE_4), strict=True))


def of(place: str) -> list[dict]:
    return [row for row in PAPER if row["place"] == place]


def joined(place: str) -> dict[str, dict[str, float]]:
    """Name of each printed row -> its numbers."""
    return {row.what: {name: n["value"] for name, n in row.numbers.items()} for row in paper_rows(PAPER, place)}


@pytest.mark.parametrize("place", TABLES)
def test_every_number_of_a_table_has_its_line(place):
    assert Counter(row["metric"] for row in of(place)) == COUNTS[place]
    assert [row.entry["row"] for row in paper_rows(PAPER, place)] == list(range(1, PRINTED_ROWS[place] + 1))


@pytest.mark.parametrize("place", TABLES)
def test_a_sample_typed_by_hand(place):
    found = joined(place)
    for what, numbers in SAMPLES[place].items():
        assert {metric: found[what][metric] for metric in numbers} == numbers, what


def test_the_sample_is_large():
    assert sum(len(numbers) for sample in SAMPLES.values() for numbers in sample.values()) > 100


def test_the_text_has_its_numbers():
    text = {key: value for key, value in VALUES.items() if key[0] not in TABLES}
    counts = {"Sec. 1": 4, "Sec. 3.2": 1, "Sec. 4.1": 17, "Sec. 4.2": 12, "Sec. 4.3": 1}
    assert Counter(place for place, _, _ in text) == counts
    assert [
        VALUES["Sec. 1", f"{n} px", "speed-up"] for n in ("32 tokens, 256", "64 tokens, 256", "64 tokens, 512")
    ] == [
        18,
        10,
        55,
    ]
    assert VALUES["Sec. 1", "SoftVQ, training iterations", "iteration_ratio"] == 2.3
    assert VALUES["Sec. 4.1", "SiT-L", "generator_parameters"] == 458
    assert VALUES["Sec. 4.2", "SiT-XL, KL, 400K steps", "training"] == 72
    assert VALUES["Sec. 4.2", "SiT-XL, SoftVQ, 400K steps", "training"] == 20
    assert VALUES["Sec. 4.2", "SoftVQ, 512 px, lowest", "rfid"] == 0.64
    assert VALUES["Sec. 3.2", "τ of Eq. 4", "temperature"] == 0.07
    weights = [VALUES["Sec. 4.1", f"λ{n}", "loss_weight"] for n in ("1, first", "1, second", "3", "4")]
    assert weights == [1.0, 0.2, 0.1, 0.01]


def test_the_file_has_one_line_a_number_in_the_order_of_places():
    lines = FILE.read_text().splitlines()
    assert [json.loads(line.rstrip(",")) for line in lines[1:-1]] == PAPER and lines[0] + lines[-1] == "[]"
    order = [(row["place"], row.get("row", 0)) for row in PAPER]
    assert order == sorted(order)
    assert all(row["unit"] for row in PAPER)
    known = {"place", "row", "span", "what", "group", "labels", "metric", "value", "unit", "also", "note"}
    known |= {"preset", "quantizer", "tokens", "dim", "model", "generator", "size", "latents", "init", "target"}
    assert set().union(*PAPER) == known


def test_where_the_text_repeats_a_number():
    repeated = {(row["place"], row["metric"], row["value"]) for row in PAPER if "Sec. 4.3" in row.get("also", ())}
    sec_4_3 = {(metric, value) for place, metric, value in repeated if place == "Tab. 3"}
    for metric, values in {
        "rfid": (1.03, 1.25, 0.80, 1.24, 1.45, 10.97, 1.15, 2.01),
        "gfid": (11.24, 19.23, 9.21, 12.89),
        "is": (89.4, 61.8, 93.6, 79.5),
        "tokenizer_parameters": (46, 390),
    }.items():
        assert {value for name, value in sec_4_3 if name == metric} == set(values)
    first = {(row["metric"], row["value"]) for row in PAPER if "Sec. 1" in row.get("also", ())}
    assert first == {("gfid_guided", 1.78), ("gfid_guided", 2.21)}


# -- they fit together -----------------------------------------------------------------------------------------------


def test_every_tokenizer_of_the_paper_has_as_many_numbers_a_latent():
    for row in paper_rows(PAPER, "Tab. 3"):
        if "quantizer" in row.entry:
            assert row.numbers["tokens"]["value"] * row.numbers["dim"]["value"] == 2048
            assert (row.entry["tokens"], row.entry["dim"]) == tuple(
                row.numbers[name]["value"] for name in ("tokens", "dim")
            )
    for place in ("Tab. 1", "Tab. 2"):
        ours = [row for row in paper_rows(PAPER, place) if "quantizer" in row.entry]
        assert len(ours) == {"Tab. 1": 14, "Tab. 2": 2}[place]
        assert all(row.entry["dim"] * row.numbers["tokens"]["value"] == 2048 for row in ours)


def test_a_tokenizer_has_one_rfid_in_all_rows_but_one():
    found: dict[tuple, set] = {}
    for row in paper_rows(PAPER, "Tab. 1"):
        if "quantizer" in row.entry:
            found.setdefault((row.entry["preset"], row.entry["tokens"]), set()).add(row.numbers["rfid"]["value"])
    assert {key: values for key, values in found.items() if len(values) > 1} == {("l", 32): {0.61, 0.74}}
    lowest, highest = (VALUES["Sec. 4.2", f"SoftVQ, 256 px, {end}", "rfid"] for end in ("lowest", "highest"))
    values = set().union(*found.values())
    assert (min(values), max(values)) == (lowest, highest) == (0.61, 0.89)
    (row,) = (row for row in PAPER if row["metric"] == "rfid" and row["value"] == 0.61 and row.get("row") == 8)
    assert "0.74" in row["note"]


def test_what_the_text_computes_from_the_tables():
    tab_1, tab_2, tab_3 = (joined(place) for place in ("Tab. 1", "Tab. 2", "Tab. 3"))
    # Sec. 4.2: 0.71 holds, 0.62 does not, and the line says so.
    better = "{}, SoftVQ-L, 32 tokens, to {}/2, KL".format
    saved = tab_1["SiT-XL/2, KL"]["gfid"] - tab_1["SiT-XL, SoftVQ-L, 32 tokens"]["gfid"]
    assert VALUES["Sec. 4.2", better("SiT-XL", "SiT-XL"), "gfid_improvement"] == pytest.approx(saved) == 0.71
    saved = tab_1["DiT-XL/2, KL"]["gfid"] - tab_1["DiT-XL, SoftVQ-L, 32 tokens"]["gfid"]
    assert saved == pytest.approx(0.55)
    claim = next(row for row in PAPER if row["what"] == better("DiT-XL", "DiT-XL") and row["place"] == "Sec. 4.2")
    assert claim["value"] == 0.62 and "= 0.55" in claim["note"]
    # Sec. 4.3
    saved = tab_3["KL (SD-VAE)"]["gfid"] - tab_3["SoftVQ-S, 32 tokens"]["gfid"]
    assert VALUES["Sec. 4.3", "SiT-L, SoftVQ-S, 32 tokens, to KL", "gfid_improvement"] == pytest.approx(saved)
    # Sec. 1: ratios of throughputs, rounded by the paper
    kl = tab_1["SiT-XL/2, KL"]["throughput"]
    assert tab_1["SiT-XL, SoftVQ-L, 32 tokens"]["throughput"] / kl == pytest.approx(18.7, abs=0.05)
    assert tab_1["SiT-XL, SoftVQ-L, 64 tokens"]["throughput"] / kl == pytest.approx(10, abs=0.05)
    ratio = tab_2["SiT-XL, SoftVQ-BL, 64 tokens"]["throughput"] / tab_2["SiT-XL/2, KL"]["throughput"]
    assert ratio == pytest.approx(53.8)
    # Sec. 4.2: "32x fewer tokens", "40%"
    assert tab_1["SiT-XL/2, KL"]["tokens"] / tab_1["SiT-XL, SoftVQ-L, 32 tokens"]["tokens"] == 32
    share = tab_1["MAR-H, SoftVQ-BL, 64 tokens"]["gflops"] / tab_1["MAR-H, KL"]["gflops"]
    assert 100 * (1 - share) == pytest.approx(40, abs=0.5)


def test_guidance_helps_and_more_tokens_help():
    for place in ("Tab. 1", "Tab. 2"):
        for what, numbers in joined(place).items():
            if {"gfid", "gfid_guided"} <= set(numbers):
                assert numbers["gfid_guided"] < numbers["gfid"], what
                assert numbers.get("is_guided", 1e9) > numbers.get("is", 0), what
    tab_1 = joined("Tab. 1")
    for what, numbers in tab_1.items():
        if "XL, SoftVQ" in what and what.endswith("32 tokens"):
            more = tab_1[what.replace("32", "64")]
            assert more["gfid"] < numbers["gfid"] and more["throughput"] < numbers["throughput"]
            assert more["gflops"] / numbers["gflops"] == pytest.approx(1.98, abs=0.01)


def test_uncertain_digits_are_marked():
    uncertain = {(row["place"], row["row"], row["metric"]) for row in PAPER if "not certain" in row.get("note", "")}
    assert uncertain == {("Tab. 1", 1, "is"), ("Tab. 1", 14, "gflops"), ("Tab. 3", 1, "tokenizer_parameters")}


# -- the tables ------------------------------------------------------------------------------------------------------


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("place", TABLES)
def test_a_table_prints_every_number_once_a_row(place):
    text = paper_table(PAPER, place)
    assert text == paper_table(results.read_paper(FILE), place)
    head, _, *lines = (line for line in text.splitlines() if line.startswith("|"))
    lines = [cells(line) for line in lines if not line.startswith("| *")]
    assert len(lines) == PRINTED_ROWS[place] and {len(line) for line in lines} == {len(cells(head))}
    words, columns = TABLES[place]
    for row, line in zip(paper_rows(PAPER, place), lines, strict=True):
        shown = [cell.split("<sup>")[0].removesuffix(" M") for cell in line[len(words) :]]
        found = {column.metric: float(cell) for column, cell in zip(columns, shown, strict=True) if cell != "–"}
        assert found == {metric: number["value"] for metric, number in row.numbers.items()}
    assert [cell for line in lines for cell in line if "nan" in cell.lower()] == []


def test_tables_look_as_printed():
    text = paper_table(PAPER, "Tab. 1").splitlines()
    assert text[2].startswith("| *Auto-regressive Models* |")
    assert "| RQ-Trans. | RQ | 256 | 3.20 | 908.91 | 7.85 | 3.80 | 323.7 | – | – |" in text
    assert "| SiT-XL | SoftVQ-BL | 64 | 0.65 | 29.23 | 5.42 | 5.80 | 143.5 | 1.88 | 287.9 |" in text
    assert "| + REPA | KL | 1024 | 0.62 | 81.92<sup>3</sup> | 0.54 | 5.90 | 157.8 | 1.42 | 305.7 |" in text
    assert "<sup>3</sup> the digits are not certain: the line below has 01.72." in text
    assert "† DPM-Solver, 50 steps." in text
    text = paper_table(PAPER, "Tab. 2").splitlines()
    assert "| ADM | – | – | – | – | – | 23.24 | 58.06 | 3.85 | 221.7 |" in text
    assert "| SoftVQ-S | 46 M | 32 | 64 | 1.24 | 12.89 | 79.5 |" in paper_table(PAPER, "Tab. 3").splitlines()
    assert "| – | DINOv2-B | 0.93 | 41.08 | 10.96 | 101.9 |" in paper_table(PAPER, "Tab. 4").splitlines()
    assert "†" not in paper_table(PAPER, "Tab. 4")


def row_of(metric: str, value: float, source: str = "measured", low=None, high=None, run: str = "digits-1") -> dict:
    return {"source": source, "metric": metric, "value": value, "low": low, "high": high, "n": 1000, "run": run}


WHAT = "SoftVQ-B, init CLIP-B, target CLIP-B"


def test_measured_numbers_stand_in_columns_of_their_own():
    measured = {
        WHAT: [row_of("psnr", 23.4567, low=23.1, high=23.9), row_of("fd", 0.01234), row_of("fd", 7.0, "derived")],
        "SoftVQ-B, no init, no target": [row_of("psnr", 12345.6)],
    }
    alone, text = paper_table(PAPER, "Tab. 4"), paper_table(PAPER, "Tab. 4", measured)
    lines = [cells(line) for line in text.splitlines() if line.startswith("|")]
    width = len(cells(alone.splitlines()[0]))
    assert [line[:width] for line in lines] == [cells(line) for line in alone.splitlines() if line.startswith("|")]
    assert [line[width:] for line in lines] == [
        ["measured: psnr", "measured: fd", "derived: fd"],
        ["--:"] * 3,
        ["12,346, n 1,000", NOT_RUN, NOT_RUN],
        [NOT_RUN] * 3,
        [NOT_RUN] * 3,
        [NOT_RUN] * 3,
        ["23.46 [23.10, 23.90], n 1,000", "0.01234, n 1,000", "7.000, n 1,000"],
        [NOT_RUN] * 3,
    ]


def test_columns_may_be_chosen_and_are_there_before_anything_is_run():
    heads = {"psnr": "PSNR, dB"}
    text = paper_table(PAPER, "Tab. 4", {WHAT: [row_of("psnr", 1.0), row_of("fd", 2.0)]}, heads)
    assert cells(text.splitlines()[0])[-1] == "measured: PSNR, dB" and "fd" not in text
    assert paper_table(PAPER, "Tab. 4", {}, heads).count(NOT_RUN) == 6
    assert paper_table(PAPER, "Tab. 4", {}).count(NOT_RUN) == 6
    grouped = paper_table(PAPER, "Tab. 1", {}).splitlines()
    assert grouped[2].count("|") == grouped[3].count("|") and NOT_RUN not in grouped[2]


@pytest.mark.parametrize(
    ("place", "measured", "words"),
    [
        ("Tab. 5", None, "place='Tab. 5'.*'Tab. 1'"),
        ("Tab. 4", {"SoftVQ-B, init CLIP": []}, "no row of this table, did you mean"),
        ("Tab. 4", {WHAT: [row_of("gfid", 9.89, "paper")]}, "CLIP.*gfid: a number of the paper"),
        ("Tab. 4", {WHAT: [row_of("fd", 1.0), row_of("fd", 2.0, run="b")]}, "two measured rows of fd, one of run 'b'"),
    ],
)
def test_what_cannot_be_shown_is_refused(place, measured, words):
    with pytest.raises(ValueError, match=words):
        paper_table(PAPER, place, measured)


def number(**changes) -> dict:
    return {"place": "Tab. 4", "row": 1, "what": "A", "labels": ["A", "-"], "metric": "is", "value": 1.0} | changes


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ([number(), number(what="B", value=2.0, metric="is", span=1)], "row 1: is stands there twice"),
        ([number(), number(what="B", metric="gfid")], "row 1 is 'A', and 'B'"),
        ([number(), number(row=3, what="B")], "row 2 has no number of its own"),
        ([number(span=2)], "row 1 has no number of its own"),
    ],
)
def test_rows_that_cannot_be_joined_are_refused(numbers, words):
    with pytest.raises(ValueError, match=words):
        paper_rows(numbers, "Tab. 4")


@pytest.mark.parametrize(
    "change", [{"place": None}, {"what": None}, {"metric": None}, {"value": None}, {"value": True}, {"value": 1e999}]
)
def test_a_number_without_its_place_is_refused(tmp_path, change):
    path = tmp_path / "paper.json"
    path.write_text(json.dumps([number(**change)]))
    with pytest.raises(ValueError, match="paper.json.*lacks place, what, metric or value"):
        results.read_paper(path)
    path.write_text(json.dumps([number(), number(unit="IS")]))
    with pytest.raises(ValueError, match="stands there twice"):
        results.read_paper(path)
