"""Times of generators: what is compared computes what its name says, and the arithmetic. No test depends on speed."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from softvq_lib import generator_tables, results
from softvq_lib.costs import efficiency
from softvq_lib.evaluation import throughput
from softvq_lib.evaluation.generator_cost import TOKENS, forward_macs
from softvq_lib.evaluation.throughput import Bench
from softvq_lib.generators import SiT, Transformer
from softvq_lib.generators.transformer import patchify, unpatchify

from repository import ROOT

SMALL = Bench(size="tiny", preset="tiny", kl_width=4, rounds=3)
PAPER = results.read_paper(ROOT / "book" / "results" / "paper.json")


class Turns:
    """Says that each subject took as many seconds as its name has been given, and runs it once, if asked to."""

    def __init__(self, seconds: dict[str, float], run: bool):
        self.seconds, self.run, self.outputs = seconds, run, {}

    def __call__(self, subjects, bench):
        if self.run:
            self.outputs |= {name: subject() for name, subject in subjects.items()}
        return {name: np.full(bench.rounds, self.seconds.get(name, 1.0)) for name in subjects}


@pytest.fixture
def turns(monkeypatch):
    def use(run: bool = True, **seconds: float) -> Turns:
        chosen = Turns({name.replace("_", " "): value for name, value in seconds.items()}, run)
        monkeypatch.setattr(throughput, "in_turns", chosen)
        return chosen

    return use


def test_diffusers_network_is_the_same_function():
    """At time 0, where both embed the time alike; with every weight random."""
    sizes = {"depth": 2, "width": 32, "heads": 2}
    ours = Transformer(tokens=16, dim=6, out_dim=5, classes=7, positions="grid", **sizes).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    x, y = torch.randn(3, 16, 6, generator=generator), torch.tensor([0, 7, 3])
    with torch.no_grad():
        theirs = throughput.in_diffusers(ours)(unpatchify(x, 1), torch.zeros(3), y).sample
        torch.testing.assert_close(patchify(theirs, 1), ours(x, torch.zeros(3), y), atol=1e-4, rtol=1e-4)


def test_the_autoencoder_is_sd_vae():
    with torch.device("meta"):
        model = throughput.autoencoder(128)
    assert sum(parameter.numel() for parameter in model.parameters()) == 83_653_863


def test_rounds_are_interleaved_and_the_first_does_not_count():
    threads, order = torch.get_num_threads(), []
    subjects = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    seconds = throughput.in_turns(subjects, SMALL)
    assert "".join(order) == "ab" * 4
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
    assert torch.get_num_threads() == threads


def test_sampling_compares_whole_images(turns):
    times = {"sample_32": 2, "sample_64": 4, "sample_256": 16, "sample_1024": 64, "decode_64_512": 8}
    used = turns(**times, decode_KL_512=100, decode_KL_256=10)
    found = {one.name: one for one in throughput.sampling(SMALL)}
    for tokens, dim in TOKENS.items():
        assert used.outputs[f"sample {tokens}"].shape == (1, tokens, dim)
    for pixels in (256, 512):
        assert used.outputs[f"decode KL {pixels}"].shape == (1, 3, pixels, pixels)
        assert used.outputs[f"decode 64 {pixels}"].shape == (1, 3, pixels, pixels)
    step = found["step-32"]
    assert (step.seconds, step.against_seconds, step.ratio, step.low, step.high) == (1, 8, 0.125, 0.125, 0.125)
    macs = [forward_macs(throughput.sit_config("tiny", tokens)) for tokens in (32, 256)]
    assert step.expected == macs[0] / macs[1]
    assert found["step-1024"].ratio == 4
    # Two steps were made.
    assert found["image-64-512-2"].ratio == pytest.approx((4 + 8) / (64 + 100))
    assert found["image-64-512-250"].ratio == pytest.approx((250 * 2 + 8) / (250 * 32 + 100))
    assert found["image-32-256-250"].ratio == pytest.approx((250 * 1 + 1) / (250 * 8 + 10))
    assert [one.name for one in found.values() if one.derived] == [
        "image-32-256-250",
        "image-64-256-250",
        "image-64-512-250",
    ]


def test_training_with_and_without_encoding(turns):
    used = turns(**{"64": 1, "256": 4, "encode": 2, "encode KL": 11})
    found = {one.name: one.ratio for one in throughput.training(replace(SMALL, batch_size=2))}
    assert found == {"training-cached": 1 / 4, "training-encoding": 3 / 15, "training-cache": 1 / 3}
    assert used.outputs["encode"].shape == (2, 64, 32) and used.outputs["encode KL"].shape == (2, 256, 16)


def test_a_training_step_trains():
    model = SiT(throughput.sit_config("tiny", 32))
    before = [parameter.clone() for parameter in model.parameters()]
    throughput.training_step(model, SMALL)()
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert any(moved) and all(parameter.grad is None for parameter in model.parameters())


def test_guidance_costs_what_is_announced(turns):
    used = turns(guided=3, plain=2)
    (found,) = throughput.guidance(SMALL)
    assert (found.ratio, found.expected) == (1.5, 1.7)
    assert used.outputs["guided"].shape == (1, 64, 32)
    model = throughput._sit(SMALL, 64)
    guided = {"solver": "sde", "guidance_scale": 1.75, "guidance_interval": (0.0, 0.7)}
    assert model.evaluations(250, **guided) / model.evaluations(250, solver="sde") <= 1.7


def test_diffusers_is_measured_at_equal_size(turns):
    used = turns(step=3, theirs=4, sampling=16, again=4)
    found = {one.name: one.ratio for one in throughput.against_diffusers(replace(SMALL, batch_size=2))}
    assert found == {"diffusers-itself": 1, "diffusers-step": 0.75, "diffusers-sampling": 0.5}
    assert used.outputs["step"].shape == (2, 64, 32) and used.outputs["theirs"].shape == (2, 32, 8, 8)


def test_rows_and_their_tables(turns, tmp_path):
    turns(False, sample_32=1, sample_64=2, sample_256=8, sample_1024=32, decode_KL_256=50, decode_KL_512=200)
    rows = efficiency(parts="generators", peer_batch=3, rounds=3, kl_width=4, results=str(tmp_path))
    assert results.read(tmp_path / "efficiency.jsonl") == rows
    assert {row["source"] for row in rows} == {"measured", "derived"}
    runs = {row["run"]: row["config"]["batch_size"] for row in rows}
    assert runs["generator-step-32-tiny-tiny-batch1-cpu"] == 1
    assert runs["generator-diffusers-step-tiny-tiny-batch3-cpu"] == 3
    text = generator_tables.speed_ups(rows, PAPER)
    assert "| TINY, 1 | a step on 32 tokens | a step on 256 tokens | 0.5 | 4 | 8.00× [8.00, 8.00] | 9.98× | – |" in text
    assert "| 64 tokens, 256 px, 250 steps and decoding | 256 patches of KL latents | 251 | 1.05e+03 | 4.18×" in text
    for place in ("18× (Sec. 1)", "10× (Sec. 1)", "55× (Sec. 1)", "3.6× (Sec. 4.2)"):
        assert text.count(place) == 1
    measured, derived = text.split("\n\nDerived, for 250 steps, ")
    assert derived.count(", 250 steps and decoding | ") == 3 and "250 steps" not in measured
    assert len(derived.splitlines()) == 2 + 2 + 3 and "diffusers" not in text
    text = generator_tables.step_costs(rows)
    assert "| TINY, 3 | SiT, one call | diffusers' DiT on 64 tokens | 1 | 1 | 1.00 [1.00, 1.00] | ≤ 1 |" in text
    assert len(text.splitlines()) == 2 + 4
    for table in (generator_tables.speed_ups([], PAPER), generator_tables.step_costs([])):
        assert table == "*No rows have been recorded.*"


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"size": "h"}, "size='h'"),
        ({"preset": "xl"}, "preset='xl'"),
        ({"rounds": 2}, "rounds=2"),
        ({"steps": 0}, "steps=0"),
    ],
)
def test_bad_benches(bad, words):
    with pytest.raises(ValueError, match=words):
        Bench(**bad)
