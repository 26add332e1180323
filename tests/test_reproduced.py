"""Every number of the paper has one line that says what becomes of it, and what is derived is right."""

import copy

import pytest

from softvq_lib import reproduced, results
from softvq_lib.reproduced import APPENDICES, METRICS, STATUSES, link, trace

from repository import ROOT

FOLDER = ROOT / "book" / "results"
PAPER = results.read_paper(FOLDER / "paper.json")
COMMUNITY = results.read_paper(FOLDER / "community.json")


@pytest.fixture(scope="module")
def lines():
    return trace(PAPER)


def of(lines, place, what, metric):
    (line,) = (x for x in lines if (x.number["place"], x.number["what"], x.number["metric"]) == (place, what, metric))
    return line


def test_every_number_has_one_line(lines):
    assert [line.number for line in lines] == PAPER
    assert {line.status for line in lines} == set(STATUSES)
    assert {number["metric"] for number in PAPER} == set(METRICS)


def test_a_line_says_why(lines):
    for line in lines:
        assert bool(line.here) == (line.status in ("equal", "differs")), line
        assert line.status != "differs" or line.remark, line
        assert line.status != "not here" or line.remark, line
        assert bool(line.pages) == (line.status == "mini"), line


def test_what_differs(lines):
    found = {(x.number["place"], x.number["what"], x.number["metric"]): x.here for x in lines if x.status == "differs"}
    assert found == {
        ("Sec. 1", "32 tokens, 256 px", "speed-up"): "18.7",
        ("Sec. 1", "64 tokens, 512 px", "speed-up"): "53.8",
        ("Sec. 4.2", "SoftVQ, 512 px, lowest", "rfid"): "0.71",
        ("Sec. 4.2", "DiT-XL, SoftVQ-L, 32 tokens, to DiT-XL/2, KL", "gfid_improvement"): "0.55",
        ("Tab. 1", "MAR-H, KL", "gflops"): "145.13",
        ("Tab. 1", "MAR-H, SoftVQ-L, 32 tokens", "gflops"): "67.95",
        ("Tab. 1", "MAR-H, SoftVQ-BL, 64 tokens", "gflops"): "86.57",
        ("Tab. 1", "SiT-XL/2, KL", "gflops"): "80.73",
        ("Tab. 2", "MAR-H, SoftVQ-BL, 64 tokens", "gflops"): "86.57",
        ("Tab. 3", "KL (SD-VAE)", "tokenizer_parameters"): "83.65",
    }


def test_what_is_equal(lines):
    equal = [line for line in lines if line.status == "equal"]
    assert len(equal) == 41
    for line in equal:
        assert float(line.here) == pytest.approx(line.number["value"], abs=0.5)
    assert of(lines, "Tab. 1", "SiT-XL, SoftVQ, 64 tokens", "gflops").here == "29.23"
    assert of(lines, "Sec. 4.1", "SoftVQ-L", "parameters").here == "608.14"


def test_a_corrected_number_changes_its_line():
    paper = copy.deepcopy(PAPER)
    (number,) = (n for n in paper if n["metric"] == "gfid_improvement" and n["value"] == 0.62)
    number["value"] = 0.55
    assert of(trace(paper), "Sec. 4.2", number["what"], "gfid_improvement").status == "equal"


def test_what_is_not_here(lines):
    score = of(lines, "Tab. 1", "SiT-XL, SoftVQ-L, 64 tokens", "is")
    assert score.status == "not here" and "Inception" in score.remark and score.remark.endswith("3.9 GPU-days")
    assert of(lines, "Tab. 1", "LDM-4, KL", "gfid").remark == reproduced.OTHERS
    assert "MI250" in of(lines, "Tab. 1", "MAR-H, KL", "throughput").remark
    assert of(lines, "Tab. 3", "VQ-S, 64 tokens", "gfid").pages == ("paper/table3", "train_generator")
    assert of(lines, "Tab. 4", "SoftVQ-B, no init, no target", "linear_probe").remark == ""


def test_counts_add_up(lines):
    assert reproduced.summary(lines).startswith(f"of {len(PAPER)} numbers:")
    last = reproduced.counts(lines).splitlines()[-1]
    assert sum(int(cell) for cell in last.split("|")[2:-1]) == len(PAPER)


@pytest.mark.parametrize("place", dict.fromkeys(number["place"] for number in PAPER))
def test_a_table_has_a_line_a_number(lines, place):
    text = reproduced.table(lines, place, ROOT / "book").splitlines()
    assert len(text) == 2 + sum(number["place"] == place for number in PAPER)
    assert {line.count("|") for line in text} == {6}
    assert not [line for line in text if "not run yet" in line]


def test_numbers_are_printed_as_in_the_paper(lines):
    text = reproduced.table(lines, "Tab. 1", ROOT / "book")
    assert "| Taming Transformers, VQ | tokens | 256 |" in text and "|  | gFID | 5.20 |" in text
    assert "|  | IS | 58.06 |" in reproduced.table(lines, "Tab. 2", ROOT / "book")


def test_links_lead_to_pages_that_are_there(tmp_path):
    (tmp_path / "paper").mkdir()
    assert link(["paper/table3", "quantizers"], tmp_path) == ""
    (tmp_path / "quantizers.md").touch()
    assert link(["paper/table3", "quantizers"], tmp_path) == "[reconstruction at mini scale](../quantizers.md)"
    (tmp_path / "paper" / "table3.md").touch()
    assert link(["paper/table3", "quantizers"], tmp_path) == "[Tab. 3 at mini scale](../paper/table3.md)"
    pages = {page for line in reproduced.COUNTERPARTS.values() for page in line if "{" not in page}
    assert all(link([page], ROOT / "book") for page in pages | {a[3] for a in APPENDICES if a[3]})


def test_what_others_found_stands_apart():
    assert {entry["source"] for entry in COMMUNITY} == {"community"}
    text = reproduced.community(COMMUNITY, PAPER)
    assert "| rFID | 0.61 | 0.61 | 0.91 |" in text and "| PSNR, dB | – | 22.97 | 23.11 |" in text


def test_appendices():
    text = reproduced.appendices(ROOT / "book")
    assert text.count("not checkable") == len(APPENDICES)
    assert all(f"| {name} |" in text for name in ("B.1", "B.2", "C.1", "C.2", "C.3", "D.2", "D.5"))
