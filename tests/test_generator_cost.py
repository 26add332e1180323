"""Multiply-accumulates of generators: the closed form against a counter, the references' and the paper's numbers."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from softvq_lib import generator_tables, results
from softvq_lib.evaluation import generator_cost as cost
from softvq_lib.evaluation.generator_cost import CONVENTIONS, TOKENS, forward_macs, generator_config, generator_table
from softvq_lib.generators import GeneratorConfig, build_generator

from repository import ROOT

PAPER = results.read_paper(ROOT / "book" / "results" / "paper.json")


@pytest.fixture(scope="module")
def table() -> dict:
    return {(row.place, row.what): row for row in generator_table(PAPER)}


def giga(generator: str, size: str, tokens: int, dim: int = 32, convention: str = "true", **options) -> float:
    return forward_macs(generator_config(generator, size, tokens, dim), convention, **options) / 1e9


def counted(call) -> float:
    """MACs of a call on tensors without storage, attention's products included."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("generator", "size"), [("sit", "s"), ("sit", "xl"), ("dit", "b"), ("dit", "xl")])
def test_a_counter_finds_the_same_in_transformers(generator, size, tokens):
    config = generator_config(generator, size, tokens, TOKENS[tokens])
    with torch.device("meta"):
        model = build_generator(config).backbone

    def run() -> None:
        model(torch.empty(1, tokens, config.dim), torch.empty(1), torch.zeros(1, dtype=torch.long))

    assert forward_macs(config) == counted(run)


@pytest.mark.parametrize(("repeat", "tokens", "kept"), [(1, 32, 0), (3, 64, 5), (1, 1024, 5)])
def test_a_counter_finds_the_same_in_mar(repeat, tokens, kept):
    """Encoder and decoder with some tokens known, then the head on the others: what a step of training runs."""
    config = GeneratorConfig("mar", "b", tokens=tokens, dim=TOKENS[tokens], classes=9, head_repeat=repeat)
    with torch.device("meta"):
        model = build_generator(config).eval()
    masked = tokens - kept

    def run() -> None:
        z = model._conditions(
            torch.empty(1, tokens, config.dim), torch.empty(1, 768), torch.zeros(1, kept, dtype=torch.long)
        )
        net = model.diffloss.net
        net(torch.empty(repeat, masked, config.dim), torch.empty(repeat, masked), net.cond_embed(z[0, :masked]))

    assert forward_macs(config, kept=kept) == counted(run)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_a_counter_finds_the_same_in_mar_that_samples(steps, scale, monkeypatch):
    monkeypatch.setattr("softvq_lib.generators.mar.check_labels", lambda labels, classes: None)  # there is no storage
    config = GeneratorConfig("mar", "tiny", tokens=8, dim=4, classes=5)
    model = build_generator(config).eval().to("meta")  # the schedule of noise is numbers, so it is built elsewhere
    labels, settings = torch.zeros(1, dtype=torch.long, device="meta"), {"guidance_scale": scale, "head_steps": 3}
    macs = counted(lambda: model.sample(labels, draws=None, steps=steps, **settings))
    assert cost.sampling_macs(config, steps, **settings) == macs


def test_sampling_of_transformers_is_a_pass_for_each_evaluation():
    for generator in ("sit", "dit"):
        config = generator_config(generator, "b", 64, 32)
        one = forward_macs(config)
        assert cost.sampling_macs(config, 250) == 250 * one
        assert cost.sampling_macs(config, 250, guidance_scale=2.0) == 500 * one
    # Of levels 1, 0.9 ... 0.1 those up to 0.7 are guided.
    interval = {"guidance_scale": 2.0, "guidance_interval": (0.0, 0.7)}
    assert cost.sampling_macs(generator_config("sit", "b", 64, 32), 10, **interval) == 17 * forward_macs(
        generator_config("sit", "b", 64, 32)
    )
    with pytest.raises(ValueError, match="steps=9 is not allowed"):
        cost.sampling_macs(generator_config("mar", "b", 8, 32), 9)


def test_the_transformers_of_the_references():
    for tokens, velocity, with_variance in [
        (32, 14.565, 14.566),
        (64, 29.034, 29.037),
        (128, 58.370, 58.374),
        (256, 118.626, 118.636),
        (1024, 524.557, 524.595),
    ]:
        assert round(giga("sit", "xl", tokens), 3) == velocity
        assert round(giga("dit", "xl", tokens), 3) == with_variance
    assert [round(giga("dit", "xl", tokens, 16), 3) for tokens in (256, 1024)] == [118.621, 524.538]
    sizes = {"l": (9.872, 19.689, 80.698), "b": (2.784, 5.560, 23.005), "s": (0.701, 1.410, 6.056)}
    for size, numbers in sizes.items():
        found = [giga("dit", size, 32), giga("dit", size, 64), giga("dit", size, 256, 16)]
        assert found == pytest.approx(numbers, abs=6e-4)
    assert [round(giga("sit", "xl", n, dead_projector=True), 3) for n in (32, 64)] == [14.774, 29.454]


def test_mar_of_the_references():
    """All tokens masked, and 30 % known; embedding and head on all of them."""
    for size, numbers in {
        "b": [(15.02, 15.81), (19.01, 20.69), (43.76, 50.54)],
        "l": [(35.03, 36.89), (44.02, 47.95), (99.34, 115.23)],
        "h": [(68.54, 72.16), (86.33, 93.97), (195.23, 226.03)],
    }.items():
        for (tokens, dim), (none, some) in zip([(32, 32), (64, 32), (256, 16)], numbers, strict=True):
            kept = tokens - math.ceil(0.7 * tokens)
            assert round(giga("mar", size, tokens, dim, all_tokens=True), 2) == none
            assert round(giga("mar", size, tokens, dim, all_tokens=True, kept=kept), 2) == some
    four = forward_macs(GeneratorConfig("mar", "h", tokens=64, dim=32)) / 1e9
    assert four - giga("mar", "h", 64) == pytest.approx(29.0 - 0.4, abs=0.05)  # z is embedded once for all four


def test_what_the_counter_of_the_paper_gives():
    """ptflops 0.7.5 on the references with 32 channels, to the digits that it was recorded with."""
    linear = {"convention": "linear"}
    assert [round(giga("dit", "xl", n, **linear), 4) for n in (32, 64)] == [14.5197, 28.8120]
    assert [round(giga("sit", "xl", n, **linear, dead_projector=True), 4) for n in (32, 64)] == [14.7285, 29.2296]
    assert [round(giga("dit", "xl", n, 16, "timm"), 4) for n in (256, 1024)] == [80.7330, 373.3363]
    assert round(giga("sit", "xl", 1024, 16, "timm"), 4) == 373.3174
    assert round(giga("dit", "xl", 256, 32, "timm"), 4) == 80.7472
    found = [giga("mar", "h", 32, all_tokens=True, **linear), giga("mar", "h", 64, kept=3, all_tokens=True, **linear)]
    found.append(giga("mar", "h", 256, 16, "timm", all_tokens=True))
    assert [round(number, 3) for number in found] == [67.941, 86.568, 145.134]


def test_every_gflops_of_the_paper_has_its_line(table):
    asked = {(row["place"], row["what"]): row["value"] for row in PAPER if row["metric"] == "gflops"}
    assert {key: row.paper for key, row in table.items()} == asked
    built = {key for key, row in table.items() if row.macs is not None}
    assert all(table[key].note == cost.NOT_BUILT for key in set(asked) - built)
    names = " ".join(what for _, what in set(asked) - built)
    assert all(name in names for name in ("U-ViT", "MDTv2", "LDM-4", "RQ", "LlamaGen", "TiTok"))
    assert len(built) == 14


def test_printed_digits_are_reproduced(table):
    uncertain = ("Tab. 1", "SiT-XL/2, KL")
    for key, row in table.items():
        if row.as_printed is None or key == uncertain:
            continue
        giga = row.as_printed / 1e9
        if row.what.startswith("MAR"):
            assert giga == pytest.approx(row.paper, rel=4e-4)
        else:
            assert round(giga, 2) == row.paper, key
    assert "not certain" in table[uncertain].note
    assert round(table[uncertain].as_printed / 1e9, 2) == 80.73


def test_savings_like_for_like_and_by_the_paper(table):
    lines = generator_tables.savings(table.values()).splitlines()[2:]
    found = [[part.split("×")[0] for part in line.split("= ")[1:]] for line in lines]
    assert found == [
        ["4.09", "2.80"],
        ["8.14", "5.56"],
        ["4.09", "2.80"],
        ["8.14", "5.56"],
        ["18.07", "12.77"],
        ["2.26", "1.68"],
        ["2.85", "2.14"],
    ]


def test_tables(table):
    text = generator_tables.macs_of_paper(table.values())
    assert "| SiT-XL, SoftVQ, 64 tokens | linear layers, without attention's products; with REPA's projector" in text
    assert "| 64 | 674.9 | 29.03 | 29.23 | 29.23 (Tab. 1) |" in text
    assert "| U-ViT-H/2, KL | not built here: the paper's figure | – | – | – | – | 128.89 (Tab. 1) |" in text
    text = generator_tables.macs_by_tokens()
    assert len(text.splitlines()) == 2 + 4 * 4
    assert "| DiT-XL | 1024 × 16 | 674.8 | 524.54 | 457.52 | 373.34 |" in text


def test_training_takes_three_passes():
    config = generator_config("sit", "xl", 64, 32)
    seconds = 3600 * cost.training_hours(config, 10**6)
    assert seconds * 0.4 * 989e12 == pytest.approx(6 * forward_macs(config) * 10**6)
    masked = generator_config("mar", "h", 64, 32)
    assert cost.training_hours(masked, 1) == pytest.approx(6 * forward_macs(masked, kept=8) / (0.4 * 989e12 * 3600))


def test_bad_questions_are_named():
    config = generator_config("mar", "b", 32, 64)
    with pytest.raises(ValueError, match=f"Allowed: {', '.join(map(repr, CONVENTIONS))}"):
        forward_macs(config, "timms")
    with pytest.raises(ValueError, match="kept=33 of tokens=32"):
        forward_macs(config, kept=33)
    with pytest.raises(ValueError, match="kept=-1"):
        forward_macs(config, kept=-1)
    with pytest.raises(ValueError, match="tokens is not given"):
        forward_macs(GeneratorConfig("sit", dim=4))
