"""The audit of the paper: every check holds for the numbers that are printed, and falls when they are corrected."""

import copy
import re

import numpy as np
import pytest

from softvq_lib import audit, results, tables
from softvq_lib.audit import CHECKS, fallen, summary
from softvq_lib.audit import audit as run
from softvq_lib.audit_formulas import forms, kl_terms
from softvq_lib.audit_numbers import VERDICTS, Check, Finding, Numbers, range_of_ratio, signed
from softvq_lib.audit_tables import spearman

from repository import ROOT

FILE = ROOT / "book" / "results" / "paper.json"
PAPER = results.read_paper(FILE)
BY_NAME = {check.name: check for check in CHECKS}


@pytest.fixture(scope="module")
def audited():
    return run(PAPER)


def test_every_check_still_holds(audited):
    """Should a number of the paper be corrected, a check that no longer holds has to be taken out or changed."""
    assert fallen(audited) == []


def test_checks_are_named_once_and_have_a_known_verdict(audited):
    assert len(BY_NAME) == len(CHECKS) == len(audited)
    assert {check.verdict for check in CHECKS} == set(VERDICTS)
    order = [list(VERDICTS).index(check.verdict) for check, _ in audited]
    assert order == sorted(order)


def test_findings_are_sentences_with_numbers_of_the_paper(audited):
    for check, finding in audited:
        assert re.search(r"\d", finding.says + finding.follows) or "λ" in finding.says or "codebook" in finding.says
        assert finding.means.endswith("."), check.name
        assert not re.search(r"nan|inf\b|None", finding.says + finding.follows + finding.means), check.name
        assert "|" not in finding.says + finding.follows + finding.means, f"{check.name}: would break the table"


DIT_32 = "DiT-XL, SoftVQ-{}, 32 tokens"
T1, T2, T3, T4 = "Tab. 1", "Tab. 2", "Tab. 3", "Tab. 4"
BL_64 = "SiT-XL, SoftVQ-BL, 64 tokens"
# Check -> corrections of numbers, (place, what, metric, value), after which it must no longer hold.
CORRECTED = {
    "DiT's improvement": [("Sec. 4.2", "DiT-XL, SoftVQ-L, 32 tokens, to DiT-XL/2, KL", "gfid_improvement", 0.55)],
    "SiT's improvement": [(T1, "SiT-XL/2, KL", "gfid", 8.4)],
    "all variants": [(T1, DIT_32.format("B"), "gfid", 9.33)],
    "better than REPA": [(T1, "SiT-XL/2 + REPA, KL", "is", 147.8)],
    "state of the art": [(T2, "TiTok-B, VQ", "gfid_guided", 2.31)],
    "the best with guidance": [(T1, "SiT-XL, SoftVQ-B, 64 tokens", "gfid_guided", 1.9)],
    "DiT at 512 px": [(T2, "DiT-XL/2, KL", "gfid", 12.0)],
    "rFID of SoftVQ-L-32": [(T1, "MAR-H, SoftVQ-L, 32 tokens", "rfid", 0.74)],
    "range of rFID, 256 px": [(T1, DIT_32.format("B"), "rfid", 0.9)],
    "range of rFID, 512 px": [(T2, BL_64, "rfid", 0.64)],
    "TiTok's tokens": [(T1, "TiTok-S-128, VQ", "tokens", 256)],
    "18 times as fast": [("Sec. 1", "32 tokens, 256 px", "speed-up", 19)],
    "10 times as fast": [("Sec. 1", "64 tokens, 256 px", "speed-up", 11)],
    "55 times as fast": [("Sec. 1", "64 tokens, 512 px", "speed-up", 54)],
    "steps of samplers": [(T2, "U-ViT-H, DC-AE, 64 tokens", "throughput", 5.2)],
    "MAR-H's throughput": [(T2, "MAR-H, SoftVQ-BL, 64 tokens", "throughput", 0.89)],
    "steps of training": [("Sec. 4.2", "DiT-XL and SiT-XL, SoftVQ", "training_steps", 3)],
    "32 tokens against KL": [(T3, "KL (SD-VAE)", "gfid", 17.79)],
    "a superior rFID": [(T4, "SoftVQ-B, init DINOv2-B, no target", "rfid", 0.93)],
    "IS 89.4 twice": [(T4, "SoftVQ-B, no init, no target", "is", 59.4)],
    "what goes with gFID": [
        (T4, "SoftVQ-B, init CLIP-B, target CLIP-B", "linear_probe", 4.0),
        (T4, "SoftVQ-B, init DINOv2-B, target DINOv2-B", "linear_probe", 3.0),
    ],
    "quantizer or alignment": [(T4, "SoftVQ-B, no init, no target", "gfid", 15.33)],
    "the size of SoftVQ-S": [(T3, "SoftVQ-S, 64 tokens", "tokenizer_parameters", 45)],
    "the size of KL": [(T3, "KL (SD-VAE)", "tokenizer_parameters", 84)],
    "Gflops": [(T1, "SiT-XL/2, KL", "gflops", 118.62)],
    "MAR's saving": [("Sec. 4.2", "MAR-H, SoftVQ-BL, 64 tokens, to KL", "gflops_saving", 56)],
    "SiT-XL/2 at 256 px": [(T1, "SiT-XL/2, KL", "gflops", 80.73)],
    "32 times fewer tokens": [("Sec. 4.2", "SoftVQ, 32 tokens, to KL", "token_ratio", 8)],
    "speed and operations": [(T1, "SiT-XL/2, KL", "throughput", 1.3)],
    "hours of training": [("Sec. 4.2", "SiT-XL, KL, 400K steps", "training", 100)],
    "the sign of the KL term": [("Sec. 4.1", "λ4", "loss_weight", -0.01)],
    "the sign of Eq. 6": [("Sec. 4.1", "λ3", "loss_weight", -0.1)],
    "weights of Eq. 7": [("Sec. 4.1", "λ1, second", "loss_weight", 1.0)],
    "the temperature of the KL term": [("Sec. 3.2", "τ of Eq. 4", "temperature", 0.01)],
}
# These do not hang on printed numbers, but on formulas and code.
OF_CODE = {"the index of Eq. 5", "rows of patches", "the posterior", "fully differentiable", "one codebook"}


def corrected(changes: list[tuple]) -> list[dict]:
    paper = copy.deepcopy(PAPER)
    for place, what, metric, value in changes:
        (number,) = (n for n in paper if (n["place"], n["what"], n["metric"]) == (place, what, metric))
        number["value"] = value
    return paper


def test_every_check_has_its_correction():
    assert set(CORRECTED) | OF_CODE == set(BY_NAME)


@pytest.mark.parametrize("name", CORRECTED)
def test_a_check_falls_when_the_paper_is_corrected(name):
    found = run(corrected(CORRECTED[name]), [BY_NAME[name]])
    assert fallen(found) == [name]
    assert f"no longer hold: {name}" in summary(found)
    assert "**No longer so.**" in audit.table(found)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("DiT's improvement", "9.62 − 9.07 = 0.55"),
        ("Gflops", "4.1, 8.1 and 18.1 times the operations of 64 and 32 tokens at 256 px and 64 at 512 px"),
        ("55 times as fast", "5.38 / 0.10 = 53.8; with what rounding hides, 51 to 57; the same pair at 256 px: 10.0"),
        ("steps of training", "7 / 3 = 2.33, 7 / 2.5 = 2.80"),
        ("the size of KL", "counted: 83.7 million; DC-AE-f64, four rows below, has 677"),
        ("all variants", "gFID 9.83 against 9.62; DiT's IS on B, BL, L: 113.8, 115.8, 117.2 against 121.5"),
        ("quantizer or alignment", "alignment alone moves SoftVQ-B by 9.37, from 20.33 to 10.96"),
    ],
)
def test_what_follows(audited, name, words):
    (found,) = (finding.follows for check, finding in audited if check.name == name)
    assert words in found


def test_a_number_that_is_missing_is_named():
    numbers = Numbers(PAPER)
    assert numbers("Tab. 1", "SiT-XL/2 + REPA, KL", "throughput") == 0.54  # printed once for two rows
    with pytest.raises(ValueError, match="no gfid of 'DiT-XL/2' in Tab. 1"):
        numbers("Tab. 1", "DiT-XL/2", "gfid")


def test_helpers():
    assert range_of_ratio(5.38, 0.10) == pytest.approx((5.375 / 0.105, 5.385 / 0.095))
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == 1 and spearman([1, 2, 3, 4], [4, 3, 2, 1]) == -1
    assert (signed(-1.004), signed(1, 0)) == ("−1.00", "+1")


def test_eq_4_is_minus_the_mutual_information_by_its_sums():
    q = np.array([[0.5, 0.5, 0], [0.25, 0.25, 0.5]])
    joint, product = q / 2, np.outer([0.5, 0.5], q.mean(0))
    information = sum(p * np.log(p / r) for p, r in zip(joint.ravel(), product.ravel(), strict=True) if p)
    terms = kl_terms(q)
    assert terms["Eq. 4"] == pytest.approx(-information) == terms["−I(x; c)"]
    assert terms["KL(q ‖ uniform)"] == pytest.approx(np.mean([np.sum(p * np.log(3 * p)) for p in (q[0][:2], q[1])]))


def test_cosines_are_the_squared_distance_on_the_sphere():
    found = forms(0.07, 0.01)
    assert found["released, squared"] < 1e-12
    assert 0.09 < found["released, paper"] < 0.12
    assert found["perplexity at T"] < 3 < 500 < found["perplexity at τ"]


def test_the_tables_of_the_page(audited):
    lines = audit.table(audited).splitlines()
    assert len(lines) == 2 + len(VERDICTS) + len(CHECKS)
    shown = [audit.operations(PAPER), audit.speeds(PAPER), audit.confound(PAPER), audit.kl_signs()]
    for text in [audit.table(audited), *shown, audit.strips(PAPER), audit.posterior_forms(PAPER)]:
        assert len({line.count("|") for line in text.splitlines()}) == 1, text
    assert "| 64 tokens, 512 px | 55 | 5.38 / 0.10 = 53.8 | 51.2 to 56.7 |" in audit.speeds(PAPER)
    assert "| 64 | 4 of 16 in a row | 1 | 260 |" in audit.strips(PAPER)
    assert "| SoftVQ-B, no init, no target | Tab. 4 | no | 0.98 | 20.33 | 89.4 |" in audit.confound(PAPER)
    assert "0, but for rounding" in audit.posterior_forms(PAPER)
    assert "all hold" in summary(audited)


def test_a_check_of_ones_own():
    mine = Check("mine", "Tab. 1", "two values", lambda n: Finding("1", "2", "No.", False))
    assert fallen(run(PAPER, [mine])) == ["mine"]


def test_provenance_of_what_is_derived(tmp_path):
    path = tmp_path / "numbers.json"
    path.write_text("[]")
    text = tables.derived_provenance([path], [run])
    assert "numbers.json (sha256 4f53cda18c2b)" in text and "`softvq_lib.audit.audit`" in text
    assert tables.derived_provenance([path]).endswith("(sha256 4f53cda18c2b).*")
