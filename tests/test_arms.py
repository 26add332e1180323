"""Rows of a plan's arms: which row is whose, and the pairs that comparisons are made of."""

import numpy as np
import pytest

from softvq_lib import results as rows_of
from softvq_lib.again import between_seeds, compare, table
from softvq_lib.arms import Measured, grouped, measured, pairs, select
from softvq_lib.sweeps import Arm, Cell


def row(experiment, run, metric, value, **config):
    filled = {
        "experiment": experiment,
        "run": run,
        "metric": metric,
        "value": float(value),
        "config": config or {"x": 1},
    }
    filled |= {"low": None, "high": None, "interval": "", "n": 10, "seed": 0, "source": "measured", "data": "d"}
    filled |= {"data_fingerprint": "f", "config_hash": "h", "commit": None, "dirty": None, "code": "c", "device": "cpu"}
    return filled | {"precision": "float32", "packages": {"torch": "2"}, "python": "3", "date": "2026-01-01"}


def arm(quantizer, seed=0, tokens=2, sweep="s"):
    name = f"{quantizer}-{tokens}-{seed}"
    tokenizer = Cell("train_tokenizer", name, {}, (), f"t{name}")
    generator = Cell("train_generator", f"{name}-sit", {}, (tokenizer,), f"g{name}")
    looks = [
        Cell(what, f"{name}-sit", {}, (tokenizer, generator), what + name) for what in ("evaluate", "linear_probing")
    ]
    factors = {"seed": str(seed), "tokens": str(tokens), "quantizer": quantizer}
    return Arm(sweep, name, factors, (tokenizer, generator, *looks))


def test_rows_are_found_by_what_they_are_of(tmp_path):
    name = "ae-2-0"
    z = {"source": name, "features": "z", "pooling": "flatten"}
    hidden = {"source": f"{name}-sit", "features": "hidden", "pooling": "mean", "block": 4, "noise_level": 0.5}
    found = [
        row("train_tokenizer", name, "psnr", 1),
        row("train_generator", f"{name}-sit", "val_loss", 2),
        row("evaluate", name, "psnr", 3, judged="reconstructions"),
        row("evaluate", f"{name}-sit", "KID-EffLite0", 4, judged="samples"),
        row("evaluate", f"{name}-sit, guided 2", "KID-EffLite0", 5, judged="samples"),
        row("evaluate", "photos, halves", "FD", 9, halves=True),
        row("linear_probing", "d-ae-z-flatten", "accuracy", 6, **z, block=None),
        row("linear_probing", "d-ae-z-flatten", "macro_accuracy", 7, **z),
        row("linear_probing", "d-b", "accuracy", 8, **hidden),
    ]
    for one in found:
        rows_of.append(tmp_path / f"{one['experiment']}.jsonl", [one])
    (ours, other) = measured([arm("ae"), arm("vq")], tmp_path)
    assert {metric: row["value"] for metric, row in ours.rows.items()} == {
        "training.psnr": 1,
        "generator.val_loss": 2,
        "reconstruction.psnr": 3,
        "samples.KID-EffLite0": 4,
        "guided.KID-EffLite0": 5,
        "probe.z.flatten": 6,
        "probe.z.flatten.macro": 7,
        "probe.block4.noise0.5": 8,
    }
    assert other.rows == {} and other.value("training.psnr") is None


def some(values):
    """Arms with one metric, by (quantizer, seed); None: not measured."""
    return [
        Measured(arm(quantizer, seed), {} if value is None else {"m": {"value": value}})
        for (quantizer, seed), value in values.items()
    ]


def test_pairs_are_those_where_both_were_measured():
    arms = some({("ae", 0): 1.0, ("ae", 1): 2.0, ("ae", 2): 3.0, ("vq", 0): 5.0, ("vq", 1): None, ("vq", 2): 9.0})
    a, b, there, planned = pairs(arms, "m", {"quantizer": "ae"}, {"quantizer": "vq"}, ["seed"])
    assert a.tolist() == [1, 3] and b.tolist() == [5, 9] and there == [("0",), ("2",)] and planned == 3


def test_a_level_that_no_arm_has_is_an_error():
    arms = some({("ae", 0): 1.0, ("vq", 0): 1.0})
    assert len(select(arms, "s", {"quantizer": ["ae", "vq"], "tokens": 2})) == 2
    with pytest.raises(ValueError, match="quantizer='eq' is no level in sweep 's'"):
        select(arms, "s", {"quantizer": "eq"})
    with pytest.raises(ValueError, match="sweep 't' is not planned"):
        select(arms, "t")


def test_the_deviation_between_seeds_is_pooled_by_hand():
    arms = some({("ae", 0): 1.0, ("ae", 1): 3.0, ("vq", 0): 10.0, ("vq", 1): 10.0, ("vq", 2): 13.0, ("kl", 0): 99.0})
    deviation, degrees = between_seeds(arms, "m")
    # Sums of squares 2 and 6, with 1 and 2 degrees of freedom.
    assert degrees == 3 and np.isclose(deviation, (8 / 3) ** 0.5)
    assert [key for key, _ in grouped(arms, ["quantizer"])] == [("ae",), ("vq",), ("kl",)]


def test_a_rerun_is_held_against_the_interval_of_one_more_seed():
    arms = some({("ae", 0): 1.0, ("ae", 1): 3.0, ("vq", 0): 0.0})
    (near,) = compare(arms, Measured(arm("ae"), {"m": {"value": 1.0}, "other": {"value": 0.0}}))
    # Student's t with one degree of freedom: 12.7062; 2 ** .5 * (3 / 2) ** .5 = 1.7321.
    assert np.isclose(near.high - 2.0, 12.7062 * 1.7321, rtol=1e-3) and near.inside and near.recorded == 1.0
    (far,) = compare(arms, Measured(arm("ae"), {"m": {"value": 40.0}}))
    assert far.inside is False and "| m | 1 | 40 | [-20.01, 24.01] | no |" in table([far])


def test_without_two_seeds_there_is_no_interval():
    (only,) = compare(some({("ae", 0): 1.0}), Measured(arm("ae"), {"m": {"value": 1.5}}))
    assert only.inside is None and "no two seeds" in table([only])
    with pytest.raises(ValueError, match="nothing is recorded of 'vq-2-0'"):
        compare(some({("ae", 0): 1.0}), Measured(arm("vq"), {"m": {"value": 1.5}}))
