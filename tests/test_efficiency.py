"""The benchmark: what it measures is the same quantity, and its arithmetic is right. No test depends on speed."""

import sys

import numpy as np
import pytest
import torch

from softvq_lib.evaluation import efficiency
from softvq_lib.evaluation.efficiency import Subject

SMALL = {"tokens": 48, "codes": 64, "dim": 4}


@pytest.mark.parametrize("kl", [True, False])
@pytest.mark.parametrize("posterior", ["released", "squared", "paper"])
def test_subjects_of_a_pair_compute_the_same(posterior, kl):
    ours = efficiency.work(Subject("softvq_lib", posterior, kl, **SMALL))()
    theirs = efficiency.work(Subject("plain", posterior, kl, **SMALL))()
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-3 * b.abs().max()


def test_every_comparison_is_of_one_size():
    pairs = efficiency.comparisons(**SMALL)
    assert pairs[0][0] == pairs[0][1]  # the control
    assert {(s.tokens, s.codes, s.dim) for pair in pairs for s in pair} == {(48, 64, 4)}
    assert len({(str(a), str(b)) for a, b in pairs}) == len(pairs)


def test_ratio_of_medians():
    ours, theirs = np.array([1.0, 1.1, 0.9, 5.0, 1.0]), np.array([2.0, 2.2, 1.8, 2.0, 2.0])
    ratio, low, high = efficiency.ratio_of_medians(ours, theirs)
    assert ratio == 0.5 and 0.4 < low <= 0.5 <= high
    assert efficiency.ratio_of_medians(theirs, theirs) == (1, 1, 1)
    with pytest.raises(ValueError, match="three rounds"):
        efficiency.ratio_of_medians(ours[:2], theirs[:2])


def test_rounds_are_interleaved_and_the_first_does_not_count():
    threads, order = torch.get_num_threads(), []
    seconds = efficiency.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3)
    assert "".join(order) == "ab" * 4
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
    assert torch.get_num_threads() == threads


def test_rows(monkeypatch):
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)  # as where it is not installed
    rows = efficiency.quantizer_rows(**SMALL, rounds=3, memory=False)
    assert len(rows) == len(efficiency.comparisons()) - 2
    for row in rows:
        assert row["ratio"] > 0 and row["low"] <= row["ratio"] <= row["high"]
        assert row["seconds"] > 0 and row["rounds"] == 3 and row["codes"] == 64


def test_peak_memory_sees_the_posterior():
    """2000 x 4000 fp32 scores are 31 MiB; the plain form holds several, SoftVQ a few chunks."""
    size = {"tokens": 2000, "codes": 4000, "dim": 8}
    assert efficiency.peak_mib(Subject("plain", **size)) > 90
    assert efficiency.peak_mib(Subject("softvq_lib", **size)) < 30


def test_bad_subjects():
    with pytest.raises(ValueError, match="implementation='mine'"):
        Subject("mine")
    with pytest.raises(ValueError, match="codes=0"):
        Subject(codes=0)
    with pytest.raises(RuntimeError, match="posterior='none'"):
        efficiency.peak_mib(Subject(posterior="none", **SMALL))
