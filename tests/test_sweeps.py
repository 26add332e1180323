"""Plans of sweeps: products, shared executions, what is missing; and that the study's own sweeps can be planned."""

import json

import pytest
import yaml

from softvq_lib.config import split
from softvq_lib.distilling import DISTIL_EXPERIMENT
from softvq_lib.evaluate import EvaluateConfig
from softvq_lib.experiments import TOKENIZER_EXPERIMENT
from softvq_lib.generation import GENERATOR_EXPERIMENT
from softvq_lib.generators.sampling import SampleConfig
from softvq_lib.latent_space import LatentSpaceConfig
from softvq_lib.linear_probing import ProbeConfig
from softvq_lib.sweeps import executed, read_plan
from softvq_lib.training.generator import completed

from repository import ROOT

STAGES = {
    "train_tokenizer": {"quantizer": "softvq", "steps": 4, "seed": 0, "dataset": "digits"},
    "train_generator": {"generator": "sit", "steps": 2, "dataset": "digits"},
    "evaluate": {"limit": 20, "dataset": "digits"},
}


@pytest.fixture
def sweep(tmp_path):
    """Writes a sweep file with these entries in place of the defaults, and returns its path."""
    for name, parameters in STAGES.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(parameters))

    def write(called="a", **entries):
        base = {
            "sweep": called,
            "name": called + "-{quantizer}-{seed}",
            "stages": {stage: f"{stage}.yaml" for stage in STAGES},
            "factors": {"seed": [0, 1], "quantizer": {"soft": {"quantizer": "softvq"}, "ae": {"quantizer": "ae"}}},
        }
        path = tmp_path / f"{called}.sweep.yaml"
        path.write_text(yaml.safe_dump(base | entries, sort_keys=False))
        return path

    return write


def plan(sweep, *files):
    return read_plan(files, files[0].parent)


def test_a_product_has_an_arm_for_each_choice_with_linked_stages(sweep):
    arms = plan(sweep, sweep())
    assert [arm.name for arm in arms] == ["a-soft-0", "a-ae-0", "a-soft-1", "a-ae-1"]
    tokenizer, generator, evaluation = arms[3].cells
    assert (tokenizer.run, generator.run, evaluation.run) == ("a-ae-1", "a-ae-1-sit", "a-ae-1-sit")
    assert tokenizer.parameters == {"quantizer": "ae", "steps": 4, "seed": 1, "run": "a-ae-1"}
    assert generator.parameters["tokenizer"] == "a-ae-1" and generator.needs == (tokenizer,)
    assert evaluation.parameters == {"limit": 20, "tokenizer": "a-ae-1", "generator": "a-ae-1-sit"}
    assert arms[3].factors == {"seed": "1", "quantizer": "ae"}


def test_two_arms_that_are_the_same_share_the_execution(sweep):
    first, second = sweep("a"), sweep("b", factors={"seed": [0], "quantizer": {"base": {}, "vq": {"quantizer": "vq"}}})
    arms = {arm.name: arm for arm in plan(sweep, first, second)}
    assert arms["b-base-0"].cells == arms["a-soft-0"].cells
    assert not set(arms["b-vq-0"].cells) & set(arms["a-soft-0"].cells)


def test_what_an_execution_is_depends_on_what_it_needs_and_not_on_places(sweep, tmp_path):
    before = plan(sweep, sweep())[0]
    (tmp_path / "train_tokenizer.yaml").write_text(yaml.safe_dump(STAGES["train_tokenizer"] | {"dataset": "other"}))
    assert plan(sweep, sweep())[0].cells == before.cells
    (tmp_path / "train_tokenizer.yaml").write_text(yaml.safe_dump(STAGES["train_tokenizer"] | {"steps": 5}))
    assert not {cell.fingerprint for cell in plan(sweep, sweep())[0].cells} & {c.fingerprint for c in before.cells}


def test_levels_reach_other_stages_and_leave_stages_out(sweep):
    factors = {
        "seed": {0: {"seed": 7, "train_generator.seed": 8}},
        "quantizer": {"with": {}, "without": {"train_generator": None}},
    }
    with_it, without = plan(sweep, sweep(factors=factors))
    assert with_it.cell("train_generator").parameters["seed"] == 8
    assert with_it.cell("train_tokenizer").parameters["seed"] == 7
    assert without.cell("train_generator") is None
    assert without.cell("evaluate").parameters == {"limit": 20, "tokenizer": "a-with-0"}  # the same tokenizer


def test_the_first_pass_comes_first_and_what_cannot_be_run_is_not_in_it(sweep):
    path = sweep(first={"seed": [1]}, unavailable={"quantizer": {"ae": "needs a network"}})
    arms = plan(sweep, path)
    assert [(arm.name, arm.first) for arm in arms] == [
        ("a-soft-1", True),
        ("a-soft-0", False),
        ("a-ae-0", False),
        ("a-ae-1", False),
    ]
    assert arms[-1].unavailable == "needs a network"


def test_only_keeps_alternatives(sweep):
    path = sweep(only=[{"seed": [0]}, {"quantizer": ["ae"]}])
    assert [arm.name for arm in plan(sweep, path)] == ["a-soft-0", "a-ae-0", "a-ae-1"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"faktors": {}}, "unknown key 'faktors', did you mean 'factors'"),
        ({"stages": {"train_tokeniser": "train_tokenizer.yaml"}}, "did you mean 'train_tokenizer'"),
        ({"stages": {"evaluate": "evaluate.yaml", "train_tokenizer": "train_tokenizer.yaml"}}, "nothing to look at"),
        ({"stages": {"train_tokenizer": "missing.yaml"}}, "missing.yaml is no file"),
        ({"first": {"sead": [0]}}, "did you mean 'seed'"),
        ({"first": {"seed": [9]}}, "'9' is not known"),
        ({"name": "a-{quantizer}"}, "does not tell all arms apart"),
        ({"factors": {"seed": [0], "quantizer": {"x": {"probing.seed": 1}}}}, "stage of probing.seed"),
    ],
)
def test_a_sweep_that_cannot_be_planned_says_why(sweep, entries, message):
    with pytest.raises(ValueError, match=message):
        plan(sweep, sweep(**entries))


def test_a_name_stands_for_one_arm(sweep):
    clash = sweep("b", name="a-{quantizer}-{seed}")
    with pytest.raises(ValueError, match="is one of sweep 'a' already"):
        plan(sweep, sweep("a"), clash)


def test_the_ledger_has_the_newest_entry_and_names_damage(tmp_path):
    entries = [{"fingerprint": "x", "seconds": 1}, {"fingerprint": "x", "seconds": 2}]
    ledger = tmp_path / "cells.jsonl"
    ledger.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert executed(tmp_path) == {"x": entries[1]}
    assert executed(tmp_path / "nowhere") == {}
    ledger.write_text(ledger.read_text() + '{"finger')
    with pytest.raises(ValueError, match="line 3 is damaged"):
        executed(tmp_path)


@pytest.mark.parametrize("scale", sorted(path.name for path in (ROOT / "sweeps").iterdir()))
def test_the_study_is_planned_and_its_notebooks_know_every_parameter(scale):
    arms = read_plan(sorted((ROOT / "sweeps" / scale).glob("*.yaml")), ROOT)
    assert len({arm.name for arm in arms}) == len(arms)
    declared = {}
    for cell in {cell.fingerprint: cell for arm in arms for cell in arm.cells}.values():
        if cell.experiment not in declared:
            notebook = json.loads((ROOT / "book" / f"{cell.experiment}.ipynb").read_text())
            (source,) = (
                "".join(c["source"]) for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", [])
            )
            declared[cell.experiment] = {line.split(":")[0] for line in source.splitlines() if ":" in line}
        assert set(cell.parameters) <= declared[cell.experiment], cell.name


def test_pairs_of_the_study_share_all_but_the_quantizer():
    arms = read_plan([ROOT / "sweeps" / "mini" / "1_tokenizers.yaml"], ROOT)
    by_name = {arm.name: arm for arm in arms}
    soft, ae = (by_name[f"{name}-off-2-s0"].cell("train_tokenizer").parameters for name in ("softvq", "ae"))
    assert {key for key in soft | ae if soft.get(key) != ae.get(key)} == {"quantizer", "run"}
    assert sum(arm.first for arm in arms) == 16 and len(arms) == 96


@pytest.mark.parametrize("scale", sorted(path.name for path in (ROOT / "sweeps").iterdir()))
def test_every_execution_of_the_study_has_parameters_that_are_allowed(scale):
    """What a notebook would refuse at its start, after hours of others, is refused here."""
    classes = {
        "distil_encoder": DISTIL_EXPERIMENT,
        "train_tokenizer": TOKENIZER_EXPERIMENT,
        "train_generator": GENERATOR_EXPERIMENT,
        "evaluate": (EvaluateConfig,),
        "linear_probing": (ProbeConfig,),
        "latent_space": (LatentSpaceConfig,),
    }
    arms = read_plan(sorted((ROOT / "sweeps" / scale).glob("*.yaml")), ROOT)
    for cell in {cell.fingerprint: cell for arm in arms for cell in arm.cells if not arm.unavailable}.values():
        values = completed(cell.parameters) if cell.experiment == "train_generator" else cell.parameters
        config, *rest = split(values, *classes[cell.experiment])
        if cell.experiment == "train_tokenizer":
            assert config.resolved().dim, cell.name
        if cell.experiment == "train_generator":
            (samples,) = (one for one in rest if isinstance(one, SampleConfig))
            samples.arguments(cell.parameters["generator"])
