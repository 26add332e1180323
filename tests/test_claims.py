"""Registered claims: read strictly, held against the plan; verdicts on simulated rows of which the truth is known."""

import json
import re
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from softvq_lib import claim_figures, claim_tables, claims
from softvq_lib.arms import Measured
from softvq_lib.claim_forms import Correlation, Finite, Nothing, reachable
from softvq_lib.evaluation.associations import compare_correlations
from softvq_lib.evaluation.comparisons import holm, paired_comparison
from softvq_lib.evaluation.power import paired_power, pairs_needed
from softvq_lib.results import read_paper
from softvq_lib.sweeps import Arm, read_plan

from repository import ROOT

REGISTRY = ROOT / "book" / "results" / "claims.json"
M, LEAST = "samples.KID-EffLite0", 0.03
SEEDS, TOKENS = "012", ("2", "4", "8", "16")
SIDES = {"a": {"quantizer": "softvq"}, "b": {"quantizer": "vq"}, "over": ["seed", "tokens"]}


@pytest.fixture(scope="module")
def registry():
    return claims.read_registry(REGISTRY)


@pytest.fixture(scope="module")
def plan():
    return [Measured(arm) for arm in read_plan(sorted((ROOT / "sweeps" / "mini").glob("*.yaml")), ROOT)]


# -- the registry ----------------------------------------------------------------------------------------------------


def test_all_claims_are_registered(registry):
    numbers = {claim.number for claim in registry.claims}
    assert {f"C{number}" for number in range(1, 19)} <= numbers == set(claim_tables.TITLES)
    assert all(claim.place and claim.claim.endswith(".") and claim.decision for claim in registry.claims)


def test_four_claims_are_primary_with_twelve_pairs_each(registry):
    primary = registry.of_kind("primary")
    assert [claim.id for claim in primary] == ["C1", "C2", "C3", "C2-C3"]
    assert all((claim.pairs, claim.first_pairs, claim.smallest_p) == (12, 2, 2 / 4096) for claim in primary)
    assert all(claim.smallest_p * len(primary) <= registry.alpha for claim in primary)


def test_what_the_registry_names_is_planned(registry, plan):
    claims.check_plan(registry, plan)
    compared = {claim.sweep for claim in registry.claims} - {""}
    assert {arm.arm.sweep for arm in plan} - compared == {"pilot", "pilot_few"}


def test_the_tests_and_pages_that_it_names_exist(registry):
    for claim in registry.of_kind("exact"):
        for name in claim.test.tests:
            file, _, test = name.partition("::")
            assert f"def {test}(" in (ROOT / file).read_text(), name
        assert all((ROOT / "book" / f"{page}.ipynb").is_file() for page in claim.test.pages)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sweep": "tokenizer"}, "'tokenizers'"),
        ({"metric": "sample.KID-EffLite0"}, "'samples'"),
        ({"metric": "latents.cosine"}, "is not measured in"),
        ({"pairs": 11}, "pairs=11, but by the plan it is 12"),
        ({"smallest_p": 0.01}, "smallest_p=0.01"),
        ({"over": ["seed", "token"]}, "'tokens'"),
        ({"over": ["seed"]}, "do not tell arms apart"),
        ({"b": {"quantizer": "vp", "alignment": "on"}}, "'vq'"),
        ({"b": {"quantiser": "vq"}}, "quantiser"),
    ],
)
def test_what_is_not_planned_is_named(registry, plan, change, words):
    claim = next(claim for claim in registry.claims if claim.id == "C2")
    test = {name: value for name, value in change.items() if hasattr(claim.test, name)}
    rest = {name: value for name, value in change.items() if name not in test}
    wrong = replace(claim, test=replace(claim.test, **test), **rest)
    with pytest.raises(ValueError, match=re.escape(words)):
        claims.check_plan(replace(registry, claims=(wrong,)), plan)


# -- reading ---------------------------------------------------------------------------------------------------------


def entry(id="C1", kind="primary", test=None, **more):
    test = test or {
        "rule": "paired",
        "a": {"quantizer": "softvq"},
        "b": {"quantizer": "vq"},
        "over": ["seed", "tokens"],
    }
    made = {"id": id, "place": "Tab. 3", "claim": "A claim.", "kind": kind, "sweep": "s", "metric": M}
    return made | {"direction": "less", "test": test, "decision": "-", "effect": LEAST} | more


def written(tmp_path, *entries, **more):
    path = tmp_path / "claims.json"
    head = {"about": "-", "scale": "-", "known_before": "-", "alpha": 0.05}
    path.write_text(json.dumps(head | {"claims": entries} | more))
    return path


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([entry(efect=1)], "unknown key 'efect', did you mean 'effect'?"),
        ([entry(kind="primry")], "did you mean 'primary'?"),
        ([entry(direction="lower")], "Allowed: 'less'"),
        ([entry(test={"rule": "pared", "a": {}})], "did you mean 'paired'?"),
        ([entry(test={"rule": "paired", "a": {}, "ovr": []})], "did you mean 'over'?"),
        ([entry(test={"rule": "paired", "a": {}})], "over"),
        ([entry(test={"rule": "exact", "check": "gflop"})], "did you mean 'gflops'?"),
        ([entry(effect=None)], "state the least that matters"),
        ([entry(effect=-1.0)], "state the least that matters"),
        ([entry(direction="within")], "belong together"),
        ([entry(), entry()], "C1 stands there twice"),
        ([entry(kind="not testable here", test={"rule": "none"})], "say why"),
        ([{"id": "C1"}], "place, claim, kind"),
    ],
)
def test_a_registry_is_read_strictly(tmp_path, entries, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        claims.read_registry(written(tmp_path, *entries))


def test_a_key_beside_the_claims_is_no_slip(tmp_path):
    with pytest.raises(ValueError, match="unknown key 'alfa', did you mean 'alpha'?"):
        claims.read_registry(written(tmp_path, entry(), alfa=0.1))


# -- verdicts --------------------------------------------------------------------------------------------------------


def row(value, run="r", metric=M):
    return {"experiment": "evaluate", "run": run, "metric": metric, "value": float(value)}


def study(value, keep=lambda factors: True, metrics=(M,), **levels):
    """Arms of sweep s over quantizers, seeds and tokens, with `value(factors, metric)` where `keep` says so."""
    levels = {"quantizer": ("softvq", "vq"), "seed": SEEDS, "tokens": TOKENS} | levels
    arms = []
    for choice in product(*levels.values()):
        factors = dict(zip(levels, choice, strict=True))
        name = "-".join(choice)
        rows = {metric: row(value(factors, metric), name, metric) for metric in metrics} if keep(factors) else {}
        arms.append(Measured(Arm("s", name, factors, ()), rows))
    return arms


def noisy(effect, sd=0.01, seed=0):
    """Values with so much less in SoftVQ, and noise."""
    rng = np.random.default_rng(seed)
    return lambda factors, metric: 0.5 - effect * (factors["quantizer"] == "softvq") + rng.normal(0, sd)


def judged(tmp_path, arms, *entries, **more):
    found = claims.verdicts(claims.read_registry(written(tmp_path, *entries)), arms, **more)
    assert claim_tables.primary(found) and claim_tables.verdicts_of(found) and claim_tables.summary(found)
    assert len(claim_figures.forest(found).axes) == 1
    return found


@pytest.mark.parametrize(
    ("effect", "sd", "verdict", "pointed"),
    [
        (0.05, 0.01, claims.HOLDS, claims.FOR),
        (-0.05, 0.01, claims.FAILS, claims.AGAINST),
        (0.0, 0.01, claims.FAILS, claims.OPEN),  # the effect that matters is excluded
        (0.0, 0.1, claims.UNDECIDED, claims.OPEN),  # nothing is
    ],
)
def test_the_truth_is_found(tmp_path, effect, sd, verdict, pointed):
    arms = study(noisy(effect, sd, seed=1))
    primary, other = judged(tmp_path, arms, entry(), entry("C1-b", "exploratory"))
    assert (primary.verdict, other.verdict) == (verdict, pointed)
    a, b = ([arm.value(M) for arm in arms if arm.factors["quantizer"] == name] for name in ("softvq", "vq"))
    expected = paired_comparison(np.array(a), np.array(b), over="pairs")
    assert primary.estimate.triple == pytest.approx(expected.triple) and primary.found.p == expected.p
    assert primary.holm == primary.found.p and other.holm is None  # one primary claim alone
    assert (primary.found.n, primary.found.planned, primary.found.smallest_p) == (12, 12, 2 / 4096)
    assert len(claims.rows_behind([primary, other])) == 24


def test_a_small_effect_that_is_certain_holds_and_says_that_it_is_small(tmp_path):
    (found,) = judged(tmp_path, study(noisy(0.01, 0.003)), entry())
    assert found.verdict == claims.HOLDS and "below the effect that matters" in found.words


def test_greater_is_the_other_side(tmp_path):
    up = entry("C1-b", "exploratory", direction="greater")
    assert judged(tmp_path, study(noisy(0.05)), entry(), up)[1].verdict == claims.AGAINST
    assert judged(tmp_path, study(noisy(-0.05)), entry(), up)[1].verdict == claims.FOR


def test_no_rows_at_all(tmp_path):
    primary, other = judged(tmp_path, study(noisy(0), lambda _: False), entry(), entry("C1-b", "exploratory"))
    assert (primary.verdict, other.verdict) == (claims.UNDECIDED, "undecided (no pairs)")
    assert primary.found.value is None and primary.power is None and "0 of 12 pairs" in primary.words
    assert claims.rows_behind([primary, other]) == []


def test_one_pair_has_no_interval(tmp_path):
    arms = study(noisy(0.05), lambda factors: (factors["seed"], factors["tokens"]) == ("0", "2"))
    primary, other = judged(tmp_path, arms, entry(), entry("C1-b", "exploratory"))
    assert other.verdict == "undecided (1 pair)" and other.estimate is None
    assert other.found.value == pytest.approx(arms[0].value(M) - arms[12].value(M))
    assert primary.verdict == claims.UNDECIDED and primary.power is None
    assert "power not estimable from 1 pair" in primary.words and primary.found.smallest_p == 1


def test_a_half_of_a_pair_is_no_pair(tmp_path):
    arms = study(noisy(0.05), lambda factors: factors != {"quantizer": "vq", "seed": "1", "tokens": "8"})
    primary, other = judged(tmp_path, arms, entry(), entry("C1-b", "exploratory"))
    assert primary.verdict == claims.UNDECIDED and "11 of 12 pairs" in primary.words and primary.holm is None
    assert primary.found.p == primary.found.smallest_p == 2 / 2**11
    assert other.verdict == claims.FOR


def test_power_is_that_of_the_pairs_that_there_are(tmp_path):
    arms = study(noisy(0.05, 0.03), lambda factors: factors["seed"] != "2")
    four = [entry(f"C{number}") for number in range(1, 5)]
    first, *_, other = judged(tmp_path, arms, *four, entry("C5", "exploratory"))
    sd = np.std(first.found.differences, ddof=1)
    assert len(first.found.differences) == 8
    assert first.power == pytest.approx(paired_power(LEAST, sd, 12, alpha=0.05 / 4))
    assert first.needed == pairs_needed(LEAST, sd, power=0.8, alpha=0.05 / 4)
    assert other.power == pytest.approx(paired_power(LEAST, sd, 12, alpha=0.05))
    assert f"{first.power:.2f}; {first.needed}" in claim_tables.primary([first])
    few = judged(
        tmp_path, study(noisy(0.05), lambda factors: factors["seed"] == "0" and factors["tokens"] < "3"), entry()
    )
    assert few[0].power is None and "not estimable from 2 pairs" in few[0].words


def test_power_of_large_effects_is_a_number(tmp_path):
    for sd in (0.001, 0.002, 0.004, 0.006, 0.008, 0.01):
        (found,) = judged(tmp_path, study(noisy(0.05, sd)), entry())
        assert 0.9 < found.power <= 1 and 2 <= found.needed <= 12


def test_holm_by_hand(tmp_path):
    """Four claims on four metrics: p is that of Holm in the order of their p, and one without rows counts as 1."""
    metrics = [f"samples.m{number}" for number in range(4)]
    effects = dict(zip(metrics, (0.05, 0.004, 0.006, 0.0), strict=True))
    rng = np.random.default_rng(3)
    arms = study(
        lambda factors, metric: rng.normal(0, 0.01) - effects[metric] * (factors["quantizer"] == "softvq"),
        metrics=metrics,
    )
    entries = [entry(f"C{number}", metric=metric) for number, metric in enumerate(metrics, 1)]
    found = judged(tmp_path, arms, *entries)
    p = {one.claim.id: one.found.p for one in found}
    assert {one.claim.id: one.holm for one in found} == holm(p)
    least = min(p, key=p.get)
    assert found[int(least[1]) - 1].holm == pytest.approx(4 * p[least])
    second = sorted(p, key=p.get)[1]
    assert found[int(second[1]) - 1].holm == pytest.approx(max(3 * p[second], 4 * p[least]))
    for arm in arms:
        del arm.rows[metrics[0]]
    left = judged(tmp_path, arms, *entries)
    assert left[0].holm is None and left[0].verdict == claims.UNDECIDED
    assert {one.claim.id: one.holm for one in left[1:]} == {
        name: value for name, value in holm(p | {"C1": 1.0}).items() if name != "C1"
    }


def test_interaction(tmp_path):
    rng = np.random.default_rng(0)

    def value(factors, metric):
        gain = 0.1 if factors["quantizer"] == "softvq" else 0.02
        return 0.5 - gain * (factors["alignment"] == "on") + rng.normal(0, 0.005)

    sides = product(("softvq", "vq"), ("on", "off"))
    levels = [dict(zip(("quantizer", "alignment"), side, strict=True)) for side in sides]
    test = {
        "rule": "interaction",
        **dict(zip(("a1", "a0", "b1", "b0"), levels, strict=True)),
        "over": ["seed", "tokens"],
    }
    (found,) = judged(tmp_path, study(value, alignment=("on", "off")), entry(test=test))
    assert found.verdict == claims.HOLDS and found.found.n == 12
    assert found.estimate.value == pytest.approx(-0.08, abs=0.01) and "first is -0.1" in found.words


def test_slopes_take_the_seeds_that_have_most_tokens(tmp_path):
    def value(factors, metric):
        slope = 0.1 if factors["quantizer"] == "softvq" else 0.3
        return -slope * np.log2(int(factors["tokens"])) + 0.01 * int(factors["seed"]) * (slope - 0.2)

    test = {"rule": "slope_difference", "a": {"quantizer": "softvq"}, "b": {"quantizer": "vq"}, "along": "tokens"}
    one = entry(kind="exploratory", direction="greater", test=test | {"over": ["seed"]})
    (whole,) = judged(tmp_path, study(value), one)
    assert whole.found.value == pytest.approx(0.2) and (whole.found.n, whole.found.planned) == (3, 3)
    assert "through tokens 2, 4, 8, 16" in whole.words and "-0.1 and -0.3" in whole.words
    (first,) = judged(tmp_path, study(value, lambda f: f["seed"] == "0" and f["tokens"] in ("2", "16")), one)
    assert first.verdict == "undecided (1 pair)" and first.found.value == pytest.approx(0.2)
    (mixed,) = judged(tmp_path, study(value, lambda f: f["seed"] == "0" or f["tokens"] in ("2", "16")), one)
    assert mixed.found.n == 1 and "2, 4, 8, 16" in mixed.words
    (single,) = judged(tmp_path, study(value, lambda f: f["tokens"] == "2"), one)
    assert single.found.n == 0 and single.verdict == "undecided (no pairs)"


@pytest.mark.parametrize(("effect", "verdict"), [(0.0, claims.FOR), (0.1, claims.AGAINST), (0.03, claims.OPEN)])
def test_equivalence(tmp_path, effect, verdict):
    one = entry(kind="exploratory", direction="within", test={"rule": "equivalence", **SIDES})
    (found,) = judged(tmp_path, study(noisy(effect)), one)
    assert found.verdict == verdict and found.estimate.interval.startswith("90 %")


def test_a_contrast_with_zero(tmp_path):
    test = {"rule": "paired", "a": {"quantizer": "vq"}, "over": ["seed", "tokens"]}
    (found,) = judged(tmp_path, study(noisy(0)), entry(kind="exploratory", direction="greater", test=test))
    assert found.found.value == pytest.approx(0.5, abs=0.02) and found.verdict == claims.FOR


def test_a_series_of_doses(tmp_path):
    dose = {"2": 0.0, "4": -0.1, "8": -0.2, "16": -0.3}
    rng = np.random.default_rng(0)
    test = {"rule": "ordered", "along": "tokens", "levels": list(dose), "over": ["seed", "quantizer"]}
    arms = study(lambda factors, metric: dose[factors["tokens"]] + rng.normal(0, 0.01))
    (found,) = judged(tmp_path, arms, entry(kind="exploratory", test=test))
    assert found.verdict == claims.FOR and found.found.n == 6 and found.found.value == pytest.approx(-0.1, abs=0.01)
    del arms[0].rows[M]
    assert judged(tmp_path, arms, entry(kind="exploratory", test=test))[0].found.n == 5


def test_correlations_over_means_of_seeds(tmp_path):
    metrics = ("probe.z.flatten", "reconstruction.psnr", M)
    rng = np.random.default_rng(0)

    def value(factors, metric):
        latent = np.log2(int(factors["tokens"])) + 5 * (factors["quantizer"] == "vq")
        sign, noise = {metrics[0]: (-1, 0.01), metrics[1]: (1, 9.0), M: (1, 0.01)}[metric]
        return sign * latent + rng.normal(0, noise)

    test = {"rule": "correlation", "x1": metrics[0], "x1_sign": -1, "x2": metrics[1], "y": M}
    one = entry(kind="exploratory", direction="greater", effect=0.2, test=test | {"group": ["quantizer", "tokens"]})
    arms = study(value, metrics=metrics)
    (found,) = judged(tmp_path, arms, one)
    points = [[np.mean([a.value(m) for a in arms[i::4][j : j + 3]]) for m in metrics] for j in (0, 3) for i in range(4)]
    x1, x2, y = np.array(points).T
    assert found.estimate.triple == pytest.approx(compare_correlations(-x1, x2, y).triple)
    assert (found.found.n, found.found.planned) == (8, 8) and "1.00" in found.words
    (few,) = judged(tmp_path, study(value, lambda factors: factors["quantizer"] == "vq", metrics), one)
    assert few.verdict == "undecided (4 points)" and few.estimate is None


def times(tmp_path, steps, seeds, target=0.5):
    """Runs of two quantizers that reach the target at so many steps, and an arm that sets it."""
    arms = study(
        lambda factors, metric: target + (0.1 if int(factors["steps"]) < steps[factors["quantizer"]] else -0.1),
        lambda factors: factors["seed"] in seeds,
        tokens=("16",),
        steps=("50", "100", "200", "400"),
    )
    arms.append(Measured(Arm("other", "aim", {"quantizer": "ae"}, ()), {M: row(target)}))
    test = {"rule": "time_to_target", "a": {"quantizer": "softvq"}, "b": {"quantizer": "vq"}, "along": "steps"}
    test |= {"over": ["seed"], "better": "lower", "target": {"sweep": "other", "levels": {"quantizer": "ae"}}}
    return judged(tmp_path, arms, entry(kind="exploratory", effect=0.5, test=test))[0]


def test_times_to_a_target(tmp_path):
    many = times(tmp_path, {"softvq": 100, "vq": 400}, SEEDS)
    assert many.found.value == 0.25 and many.verdict == claims.OPEN and many.estimate.high == np.inf
    assert many.found.p == pytest.approx(0.1) and many.found.smallest_p == pytest.approx(0.1)
    assert "target 0.5; steps to it: 100, 100, 100 and 400, 400, 400" in many.words
    one = times(tmp_path, {"softvq": 100, "vq": 400}, "0")
    assert one.verdict == "undecided (2 runs)" and one.found.value == 0.25
    late = times(tmp_path, {"softvq": 100, "vq": 800}, "0")
    assert late.found.value is None and "> 400" in late.words


def test_runs_that_must_be_there(tmp_path):
    one = entry(
        kind="exploratory", direction="equal", effect=None, test={"rule": "finite", "where": {"quantizer": "vq"}}
    )
    assert judged(tmp_path, study(noisy(0)), one)[0].verdict == claims.FOR
    assert judged(tmp_path, study(noisy(0), lambda f: f["seed"] != "2"), one)[0].verdict == "undecided (8 of 12)"


def test_recorded_ratios(tmp_path):
    ratio = {"experiment": "efficiency", "run": "r", "metric": "time_ratio", "value": 0.5, "low": 0.4, "high": 0.6}
    ratio |= {"n": 9, "interval": "95 %"}
    one = entry(kind="exploratory", test={"rule": "recorded", "file": "efficiency", "run": "r", "metric": "time_ratio"})
    for change, verdict in (({}, claims.FOR), ({"high": 1.1}, claims.OPEN), ({"low": 1.2}, claims.AGAINST)):
        changed = ratio | change | ({"value": 1.3, "high": 1.4} if "low" in change else {})
        found = judged(tmp_path, study(noisy(0)), one, recorded=[changed])
        assert found[0].verdict == verdict
        assert claims.rows_behind(found, study=False) == [changed] and claims.rows_behind(found) == []
    assert judged(tmp_path, study(noisy(0)), one)[0].verdict.startswith(claims.OPEN)


def test_equal_runs_are_not_compared(tmp_path):
    (found,) = judged(tmp_path, study(lambda factors, metric: 0.5), entry(kind="exploratory"))
    assert found.verdict.startswith(claims.OPEN) and "differences are 0" in found.words


def test_exact_claims_are_checked(registry):
    paper = read_paper(ROOT / "book" / "results" / "paper.json")
    exact = replace(registry, claims=tuple(registry.of_kind("exact", "not testable here")))
    verdicts = claims.verdicts(exact, [], paper)
    assert {verdict.verdict for verdict in verdicts} == {claims.EXACT, claims.UNTESTED}
    wrong = [row | {"value": row["value"] + 3} if row["metric"] in ("gflops", "parameters") else row for row in paper]
    found = {verdict.claim.id: verdict.verdict for verdict in claims.verdicts(exact, [], wrong)}
    assert (found["C6"], found["C7"], found["C12"]) == (claims.NOT_EXACT, claims.NOT_EXACT, claims.EXACT)


def test_the_smallest_p():
    correlation, finite = Correlation("x", "y", "z"), Finite({})
    assert (reachable(correlation, 5), reachable(finite, 3), reachable(Nothing(), 3)) == (0.0, 1.0, None)


def test_the_page_shows_what_is_registered(monkeypatch):
    """The cells of the page, run in their order: it stands on what the repository has, and nothing else."""
    cells = re.findall(r"```\{code-cell\} ipython3\n(.*?)```", (ROOT / "book" / "claims.md").read_text(), re.S)
    shown = []
    names = {}
    for cell in cells:
        source = re.sub(r"^:tags:.*\n", "", cell, flags=re.M).replace(
            "from IPython.display import Markdown, display", ""
        )
        exec(source, names | {"Markdown": str, "display": lambda *some: shown.extend(some)}, names)
    text = "\n".join(map(str, shown))
    assert len(cells) > 8 and all(f"**{claim.id}**" in text for claim in names["registry"].claims)
