"""The cost of training: watching a step leaves it as it is, stages cover it, and a plain loop computes the same."""

import itertools
import json
import time

import pytest
import torch

from softvq_lib import tables
from softvq_lib.costs import efficiency
from softvq_lib.data import DataConfig, open_dataset
from softvq_lib.evaluation import training_cost
from softvq_lib.evaluation.plain_loop import PASSES, plain_step
from softvq_lib.training import Run

# Nets without pretrained weights, none of them large.
SMALL = {"batch_size": 4, "dry_run": True, "perceptual": "efflite0", "alignment": "efflite0", "precision": "fp32"}


@pytest.fixture(scope="module")
def data():
    return open_dataset(DataConfig("digits", limit=64), 32)


@pytest.fixture
def build(data):
    def made(**changes):
        parameters = {**training_cost.WORKLOADS["tiny"], **SMALL, "steps": 20, **changes}
        return training_cost.build_trainer(parameters, data)

    return made


def one_batch(trainer):
    return next(iter(trainer.batches(0)))


@pytest.mark.parametrize("passes", PASSES)
def test_the_plain_loop_computes_the_same(build, passes):
    """The second step's terms are equal only if the first one's gradients and updates were."""
    ours, plain = build(adversarial_warmup=2, perceptual_warmup=2), build(adversarial_warmup=2, perceptual_warmup=2)
    batch = one_batch(ours)
    for _ in range(2):
        terms, theirs = training_cost.trainer_step(ours, batch), plain_step(plain, batch, passes)
        assert {"loss", "kl", "alignment", "perceptual", "adversarial", "consistency", "gradient_norm"} <= theirs.keys()
        assert theirs.keys() <= terms.keys()
        assert training_cost.difference(terms, theirs) < 1e-4
    for a, b in zip(ours.bare.state_dict().values(), plain.bare.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert torch.allclose(ours.networks.lecam.ema_real, plain.networks.lecam.ema_real)


def test_without_augmentation_and_with_other_weights_too(build):
    settings = {"diffaug": False, "consistency_weight": 1.0, "alignment_weight": 0.5, "perceptual_weight": 0.3}
    ours, plain = build(**settings), build(**settings)
    batch = one_batch(ours)
    assert training_cost.difference(training_cost.trainer_step(ours, batch), plain_step(plain, batch)) < 1e-4


def test_watching_changes_nothing_and_stages_cover_the_step(build, monkeypatch):
    watched, alone = build(), build()
    batch = one_batch(alone)
    monkeypatch.setattr(time, "perf_counter", map(float, itertools.count()).__next__)  # a clock that each look moves
    stages = training_cost.watch(watched)
    began = stages.since
    terms = training_cost.trainer_step(watched, batch)
    stages.enter("rest")
    for name, value in training_cost.trainer_step(alone, batch).items():
        assert torch.equal(value, terms[name]), name
    for a, b in zip(watched.bare.state_dict().values(), alone.bare.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    both = ("teacher", "encoder", "quantizer", "decoder", "perceptual", "adversarial", "discriminator")
    expected = {f"{stage} {way}" for stage in both for way in ("forward", "backward")} | {"optimiser", "rest"}
    assert stages.seconds.keys() == expected and min(stages.seconds.values()) > 0
    assert sum(stages.seconds.values()) == stages.since - began


def test_stages_go_to_the_passes_they_are_named_after(build, monkeypatch):
    """By a clock that ticks with every operation of a stage's net, and stands still otherwise."""
    trainer, moment = build(), [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: moment[0])
    stages = training_cost.watch(trainer)
    decoder = trainer.bare.tokenizer.decoder.vit.norm

    def tick(*_):
        moment[0] += 1.0

    decoder.register_forward_hook(lambda module, inputs, output: tick() or output.register_hook(tick) and None)
    training_cost.trainer_step(trainer, one_batch(trainer))
    stages.enter("rest")
    assert {name: s for name, s in stages.seconds.items() if s} == {"decoder forward": 1.0, "decoder backward": 1.0}


def test_stage_seconds_of_steps(build):
    trainer = build(workers=0)
    rows = training_cost.stage_seconds(trainer, 2)
    assert len(rows) == 2 and trainer.step == 3
    for row in rows:
        assert {name.split()[0] for name in row} == set(training_cost.STAGES)


def test_a_difference_is_relative_to_large_terms_alone():
    ours = {"a": torch.tensor(10.1), "b": torch.tensor(0.02), "c": torch.tensor(1.0)}
    assert training_cost.difference(ours, {"a": torch.tensor(10.0), "b": torch.tensor(0.0)}) == pytest.approx(0.02)
    assert training_cost.difference(ours, {"a": torch.tensor(10.0)}) == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("wrong", [0.0, float("nan")])
def test_a_plain_loop_of_other_losses_is_refused(monkeypatch, wrong):
    def other(trainer, batch, passes):
        return training_cost.trainer_step(trainer, batch) | {"kl": torch.tensor(wrong)}

    monkeypatch.setattr(training_cost, "plain_step", other)
    with pytest.raises(RuntimeError, match="'tiny' does not compute the same losses"):
        training_cost.step_cost("tiny", rounds=3, **SMALL)


def test_shares_of_a_run(tmp_path):
    rows = [
        {"step": 10, "seconds": 4.0, "data_seconds": 0.25, "images_per_second": 8.0},
        {"step": 10, "checkpoint_seconds": 1.0},
        {"step": 20, "seconds": 4.0, "data_seconds": 0.15, "images_per_second": 8.0},
        {"step": 20, "checkpoint_seconds": 1.0},
    ]
    (tmp_path / "timings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = Run(tmp_path, {})
    assert training_cost.data_share(run) == pytest.approx(0.05)
    assert training_cost.checkpoint_share(run) == pytest.approx(0.2)


def test_real_runs_have_shares(tmp_path, monkeypatch):
    monkeypatch.setitem(training_cost.WORKLOADS, "tiny", training_cost.WORKLOADS["tiny"] | SMALL | {"workers": 0})
    small = {"steps": 3, "limit": 64, "val_images": 8, "checkpoint_every": 1}
    shares = training_cost.run_shares("tiny", 2, **small)
    assert shares.keys() == {"tiny on files", "defaults"}
    assert all(0 < share < 1 for those in shares.values() for share in those.values())


def test_rows_and_tables(tmp_path, monkeypatch):
    monkeypatch.setitem(training_cost.WORKLOADS, "tiny", training_cost.WORKLOADS["tiny"] | SMALL)
    shares = {"mini on files": {"data_share": 0.02}, "defaults": {"data_share": 0.03, "checkpoint_share": 0.01}}
    monkeypatch.setattr("softvq_lib.costs.run_shares", lambda workload, steps: shares)
    rows = efficiency(parts="training", rounds=3, run_steps=40, results=str(tmp_path))
    assert {row["run"] for row in rows} == {
        "training-tiny-fp32",
        "plain-each-tiny-fp32",
        "plain-shared-tiny-fp32",
        "shares-mini-on-files",
        "shares-defaults",
    }
    ratios = [row for row in rows if row["metric"] == "time_ratio"]
    assert all(0 < row["low"] <= row["value"] <= row["high"] for row in ratios)
    assert all(row["value"] < 1e-4 for row in rows if row["metric"] == "difference")
    stages = tables.training_stages(rows)
    assert [line.split(" | ")[0] for line in stages.splitlines()[2:]] == [f"| {s}" for s in training_cost.STAGES] + [
        "| whole step"
    ]
    assert "| stage | tiny, 32 px, batch 4, ms | share |" in stages
    assert "| tiny | a reconstruction for each loss |" in tables.training_ratio(rows)
    assert "| defaults | 3.0 % | 1.0 % |" in tables.run_shares(rows)
    assert "| mini on files | 2.0 % | – |" in tables.run_shares(rows)


@pytest.mark.parametrize("table", [tables.training_stages, tables.training_ratio, tables.run_shares])
def test_no_rows(table):
    assert table([]) == "*No rows have been recorded.*"


@pytest.mark.parametrize(
    ("bad", "words"),
    [({"workloads": "tiny,min"}, "workloads='min'.*did you mean 'mini'"), ({"run_steps": 0}, "run_steps=0")],
)
def test_bad_settings(bad, words):
    with pytest.raises(ValueError, match=words):
        efficiency(**bad)
    with pytest.raises(ValueError, match="workload='xl'"):
        training_cost.step_cost("xl")
    with pytest.raises(ValueError, match="rounds=2"):
        training_cost.step_cost("tiny", rounds=2)
