"""The study's tables, figures and sentences: on made-up arms and rows by hand, over the real plan, byte for byte."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from softvq_lib import results, study, study_figures, study_reruns, study_tables, study_words
from softvq_lib.arms import Measured
from softvq_lib.study import DRAWINGS, Study
from softvq_lib.study_budget import budget
from softvq_lib.study_cells import Drawn, cell, of_which, point, table
from softvq_lib.study_words import Versus, sentence
from softvq_lib.sweeps import Arm, Cell, read_plan

from repository import ROOT

FOLDER = ROOT / "book" / "results"
PSNR, KID = "reconstruction.psnr", "samples.KID-EffLite0"
ORIGIN = {
    "config_hash": "0" * 64,
    "commit": "1" * 40,
    "dirty": False,
    "code": "2" * 64,
    "device": "a processor",
    "precision": "float32",
    "packages": {"torch": "2.6.0", "timm": "1.0.22", "numpy": "2.0.0"},
    "python": "3.11.7",
    "date": "2026-01-02T03:04:05+00:00",
    "data": "made up",
    "data_fingerprint": "3" * 64,
    "source": "measured",
}


def row(run: str, metric: str, value: float, half: float | None = 0.5, **more) -> dict:
    """A results row with an interval over images, or none."""
    ends = (None, None, "") if half is None else (value - half, value + half, "95 % made up over images")
    common = {"experiment": "evaluate", "run": run, "metric": metric, "value": value, "n": 100, "seed": 0}
    common |= dict(zip(("low", "high", "interval"), ends, strict=True)) | {"config": {"judged": "reconstructions"}}
    return results.check(ORIGIN | common | more)


def arm(seed: int, value: float | None = None, stages=("train_tokenizer", "evaluate"), unavailable="", **factors):
    """An arm of a made-up sweep whose PSNR was measured, or not."""
    name = "-".join([*factors.values(), str(seed)])
    cells = tuple(Cell(stage, name, {"guided": 2.0}, (), f"{stage} {name}") for stage in stages)
    planned = Arm("made_up", name, {"seed": str(seed), **factors}, cells, not unavailable and seed == 0, unavailable)
    return Measured(planned, {} if value is None else {PSNR: row(name, "psnr", value)})


THREE = [arm(seed, value, quantizer="softvq") for seed, value in enumerate((20.0, 21.0, 23.0))]


def test_three_seeds_give_the_mean_with_students_t():
    # mean 64/3, standard deviation sqrt(7/3), t(0.975, 2) = 4.302653
    half = 4.302653 * (7 / 3) ** 0.5 / 3**0.5
    found = point(THREE, PSNR)
    assert (found.over, found.values) == ("seeds", (20.0, 21.0, 23.0))
    assert np.allclose([found.value, found.low, found.high], [64 / 3, 64 / 3 - half, 64 / 3 + half])
    assert cell(THREE, PSNR) == "21.33<br>[17.54, 25.13]"


def test_one_seed_has_the_interval_of_its_row():
    assert point(THREE[:1], PSNR)[:4] == (20.0, 19.5, 20.5, "images")
    assert cell(THREE[:1], PSNR) == "20.00<br>[19.50, 20.50]"
    assert cell(THREE[:1], PSNR, mark=True) == "20.00<br>[19.50, 20.50]°"
    bare = Measured(THREE[0].arm, {PSNR: row("softvq-0", "psnr", 20.0, None)})
    assert cell([bare], PSNR) == "20.00"


def test_a_missing_number_says_why():
    assert cell([arm(0), arm(1)], PSNR) == "not run yet"
    assert cell([arm(0)], KID) == "–", "an arm without a generator has no samples"
    assert cell([arm(0, stages=("train_tokenizer", "train_generator", "evaluate"))], KID) == "not run yet"
    assert cell([arm(0, unavailable="its weights need a network")], PSNR) == "not run: its weights need a network"
    twice = [arm(0, unavailable="its weights need a network; its weights need a network")]
    assert cell(twice, PSNR) == "not run: its weights need a network"


def test_a_table_says_seeds_intervals_and_reasons():
    arms = [*THREE, arm(0, 19.0, quantizer="vq"), arm(1, quantizer="vq"), arm(0, quantizer="ae")]
    arms += [arm(0, quantizer="kl", unavailable="no weights")]
    found = table(arms, {"quantizer": "quantizer"}, [PSNR, "reconstruction.ssim"])
    assert found.content.splitlines() == [
        "*Intervals are at 95 %: Student's t over 3 seeds; those with ° over the images of a single run, which "
        "leave out what another seed would change.*",
        "",
        "| quantizer | seeds | PSNR, dB ↑ | SSIM ↑ |",
        "|---|--:|--:|--:|",
        "| SoftVQ | 3 of 3 | 21.33<br>[17.54, 25.13] | not run yet |",
        "| VQ | 1 of 2 | 19.00<br>[18.50, 19.50]° | not run yet |",
        "| AE | 0 of 1 | not run yet | – |",
        "| KL | 0 of 1 | not run: no weights | – |",
    ]
    assert [each["value"] for each in found.rows] == [20.0, 21.0, 23.0, 19.0]
    assert "4 measured rows; commit 111111111 (+: with changes since), code 222222222; a processor" in found.provenance
    assert "2026-01-02; data made up 333333333333" in found.provenance
    only = table(arms[3:5], {"quantizer": "quantizer"}, [PSNR]).content
    assert "over the images of a single run" in only and "°" not in only
    assert table(arms[5:6], {"quantizer": "quantizer"}, [PSNR]).content.startswith("| quantizer"), "no intervals"


def test_levels_that_are_numbers_are_sorted_as_numbers():
    arms = [arm(0, 20.0, tokens=tokens) for tokens in ("2", "16", "4")]
    lines = table(arms, {"tokens": "tokens"}, [PSNR]).content.splitlines()
    assert [line.split(" | ")[0] for line in lines[-3:]] == ["| 2", "| 4", "| 16"]


def test_real_images_stand_in_the_last_line():
    terms = {"floor": 0.0, "reference_n": 100}
    arms = [Measured(arm(0).arm, {"reconstruction.KID-EffLite0": row("0", "KID-EffLite0", 0.2, 0.01, terms=terms)})]
    agreement = row("0", "class_agreement", 0.1, 0.01, terms={"real": 0.314, "real_n": 100})
    arms[0].rows["samples.class_agreement"] = agreement
    metrics = ["reconstruction.KID-EffLite0", "samples.class_agreement"]
    assert table(arms, {"seed": "seed"}, metrics, floors=True).content.endswith("| *real images* |  | 0.000 | 31.4 |")


def test_what_is_shown_ends_in_its_origin(nothing):
    picture, below, text = nothing.show("steps", "steps-table")
    assert picture._repr_png_()[:4] == b"\x89PNG" and picture._repr_markdown_() is None
    assert below._repr_markdown_() == "*Provenance: no row has been recorded yet.*"
    assert text._repr_markdown_().startswith("| latents") and text._repr_png_() is None
    assert text._repr_markdown_().endswith("*Provenance: no row has been recorded yet.*")


def test_every_drawn_thing_has_a_line_on_its_origin():
    assert Drawn("nothing").provenance == "*Provenance: no row has been recorded yet.*"
    paper = Drawn("a table", files=(FOLDER / "paper.json",)).provenance
    assert paper.startswith("*Provenance: the paper's own numbers, from paper.json (sha256 ")
    both = Drawn("both", [row("a", "psnr", 20.0)], (FOLDER / "paper.json",)).provenance
    assert "the paper's own numbers" in both and "1 measured row;" in both


def test_intervals_of_a_figure_are_said_without_a_sign():
    points = [point(THREE, PSNR), point(THREE[:1], PSNR), None]
    assert "of what has one seed over the images" in of_which(points, "of what has one seed")
    assert of_which([None]) == ""


# -- sentences ---------------------------------------------------------------------------------------------------------


def versus(metric: str = PSNR) -> Versus:
    return Versus(metric, ("SoftVQ", "VQ"), {"quantizer": "softvq"}, {"quantizer": "vq"})


def test_sentences_say_what_the_rows_say():
    def arms(*pairs: tuple[float | None, float | None]) -> list[Measured]:
        sides = [("softvq", 0), ("vq", 1)]
        return [arm(seed, pair[side], quantizer=q) for seed, pair in enumerate(pairs) for q, side in sides]

    say = [sentence(arms(*pairs), versus()) for pairs in (
        [(None, 19.0), (20.0, None)],
        [(20.0, 19.0), (20.0, None)],
        [(20.0, 19.0), (21.0, 21.5)],
        [(20.0, 19.0), (21.0, 20.1), (22.0, 20.9)],
        [(19.0, 20.0), (20.1, 21.0), (20.9, 22.0)],
        [(20.0, 20.0), (21.0, 21.0)],
    )]  # fmt: skip
    assert say[0] == "SoftVQ against VQ, PSNR, dB: not run yet, 2 pairs planned."
    assert say[1] == (
        "SoftVQ has a higher PSNR, dB than VQ in 1 of 1 pair (2 planned); difference 1.00. "
        "Undecided: one pair has no spread."
    )
    # differences 1 and -0.5: mean 0.25, t(0.975, 1) = 12.7062 times 1.5 / 2
    assert say[2].endswith(
        "in 1 of 2 pairs; mean difference 0.25 [−9.28, 9.78], t over pairs: undecided at this power, "
        "the interval includes 0."
    )
    assert say[3].endswith("in 3 of 3 pairs; mean difference 1.00 [0.75, 1.25], t over pairs: points for SoftVQ.")
    assert say[4].endswith("in 0 of 3 pairs; mean difference −1.00 [−1.25, −0.75], t over pairs: points for VQ.")
    assert say[5].endswith("in 0 of 2 pairs: there is no difference.")


def test_less_is_better_where_it_is():
    arms = [arm(0, quantizer="softvq"), arm(0, quantizer="vq")]
    for each, value in zip(arms, (0.4, 0.5), strict=True):
        each.rows[KID] = row(each.arm.name, "KID-EffLite0", value, 0.01)
    assert sentence(arms, versus(KID)).startswith(
        "SoftVQ has a lower KID-EffLite0 than VQ in 1 of 1 pair; difference −0.1"
    )


def test_sentences_on_samples_begin_with_what_their_tokenizers_reconstruct():
    arms = [arm(0, quantizer=name) for name in ("softvq", "vq", "ae")]
    bounds = {"reconstruction.KID-EffLite0": (0.3, 0.4, 0.2), "reconstruction.recall-EffLite0": (0.01, 0.01, 0.5)}
    for place, each in enumerate(arms):
        for metric, values in bounds.items():
            each.rows[metric] = row(each.arm.name, metric.partition(".")[2], values[place], 0.01)
    for each, value in zip(arms, (0.45, 0.5), strict=False):
        each.rows[KID] = row(f"{each.arm.name}-sit", "KID-EffLite0", value, 0.01)
    said = study_words.shown(arms, "made_up", [versus(KID)])
    first, second = said.content.splitlines()
    # AE was not sampled, so its reconstructions bound nothing.
    assert first.endswith("have a KID of 0.300 to 0.400 and a recall of 0.010.")
    assert second.startswith("- SoftVQ has a lower KID-EffLite0 than VQ") and len(said.rows) == 6
    assert len(study_words.shown(arms, "made_up", [versus()]).content.splitlines()) == 1


# -- budget ------------------------------------------------------------------------------------------------------------


def test_the_budget_counts_a_shared_execution_once_and_says_what_it_does_not_know():
    first, second = arm(0, quantizer="softvq").arm, arm(1, quantizer="softvq").arm
    shared = Arm("other", "again", {"seed": "0"}, first.cells, True)
    entry = {"ended": "2026-01-02T", "machine": "m", "threads": 1, "commit": "4" * 40, "dirty": True}
    entries = [entry | {"experiment": "train_tokenizer", "fingerprint": first.cells[0].fingerprint, "seconds": 1800.0}]
    found = budget([first, second, shared], {"made_up": "1_made_up.yaml", "other": "6_other.yaml"}, entries)
    lines = found.content.splitlines()
    assert "| `1_made_up.yaml` | 1, 2 | 1 of 2 | 1 of 4 | tokenizer 30.0, evaluation ? | ≥ 0.5 | ≥ 1.0 |" in lines
    assert "| `6_other.yaml` | 1, 1 | 0 of 0 | 0 of 0 | tokenizer 30.0, evaluation ? | 0.0 | 0.0 |" in lines
    assert lines[-3:] == [
        "| first pass | ≥ 0.5 | ≥ 0.2 |",
        "| experiments 1 to 3 (files 1 to 3), all seeds | ≥ 1.0 | ≥ 0.5 |",
        "| everything | ≥ 1.0 | ≥ 0.5 |",
    ]
    assert "1 executions in the ledger; commit 444444444+; m; threads of each: 1; 2026-01-02" in found.provenance


# -- the real plan -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nothing(tmp_path_factory) -> Study:
    """The committed plan, of which nothing has been run."""
    return Study.of_checkout(ROOT, FOLDER, results=str(tmp_path_factory.mktemp("empty")))


def test_topics_name_every_change_of_the_sweep_once():
    sweep = yaml.safe_load((ROOT / "sweeps/mini/4_ablations.yaml").read_text())
    changes = [change for topic in study_tables.TOPICS for change in study_tables.of_topic(topic)]
    assert sorted([*changes, study_tables.BASE]) == sorted(sweep["factors"]["change"]) == sorted(study_tables.CHANGES)


def test_settings_of_the_papers_size_are_there():
    for name in study_tables.PAPER_SETTINGS.values():
        assert (ROOT / "params/paper/train_tokenizer" / f"{name}.yaml").is_file()


@pytest.mark.parametrize("name", DRAWINGS)
def test_everything_can_be_drawn_before_anything_was_run(nothing, name):
    for drawn in nothing.draw(name):
        assert drawn.provenance.startswith("*Provenance: ")
        if isinstance(drawn.content, str):
            paper = name.startswith("paper-") or name == "budget"
            assert paper or "not run yet" in drawn.content
            assert not {"FID"} & set(drawn.content.replace("|", " ").split()) or paper, "mini numbers are no FID"


def test_the_paper_and_what_was_measured_share_no_table(nothing):
    for name in DRAWINGS:
        for drawn in nothing.draw(name) if name != "samples" else []:
            assert not (drawn.files and drawn.rows)


def test_unavailable_cells_name_their_reason_and_settings(nothing):
    (found,) = nothing.draw("alignment")
    line = next(line for line in found.content.splitlines() if line.startswith("| CLIP-B"))
    assert "not run: its weights need a network" in line
    assert "CLIP-B / CLIP-B: `softvq_b_64_clip.yaml`" in found.content


def test_names_that_are_not_there_are_refused(nothing, tmp_path):
    with pytest.raises(ValueError, match="drawing='distorsion'"):
        nothing.draw("distorsion")
    with pytest.raises(ValueError, match="has no sweep files"):
        Study.read(tmp_path, tmp_path, root=ROOT, paper=FOLDER / "paper.json")
    with pytest.raises(ValueError, match="sweep='tokenisers'"):
        nothing.planned("tokenisers")
    assert nothing.planned("alignment") == "alignment: 21 arms, 7 of them in the first pass; 15 that cannot be run here"
    assert "reconstruction  " in study.index()


def filled(folder: Path, seeds: int) -> None:
    """Write made-up rows for the tokenizers of two sweeps, so that figures have something to draw."""
    arms = read_plan(sorted((ROOT / "sweeps" / "mini").glob("*.yaml")), ROOT)
    rng = np.random.default_rng(0)
    rows, seen = {"train_tokenizer": [], "evaluate": [], "linear_probing": []}, set()
    for each in arms:
        if each.unavailable or int(each.factors.get("seed", 0)) >= seeds:
            continue
        for cell_ in each.cells:
            if cell_.fingerprint in seen or cell_.experiment not in rows:
                continue
            seen.add(cell_.fingerprint)
            run = next((need.run for need in cell_.needs if need.experiment == "train_tokenizer"), cell_.run)
            value = float(rng.uniform(0.1, 0.9))
            if cell_.experiment == "train_tokenizer":
                more = {"experiment": "train_tokenizer", "curve": [[0, 9.0], [800, 18 + value]]}
                rows["train_tokenizer"].append(row(run, "psnr", 18 + value, **more))
            elif cell_.experiment == "evaluate":
                for metric in ("psnr", "ssim", "rFD-EffLite0-proj64-v1", "KID-EffLite0"):
                    rows["evaluate"].append(row(run, metric, value, 0.05))
                sampled = [need.run for need in cell_.needs if need.experiment == "train_generator"]
                for made in (f"{name}{how}" for name in sampled for how in ("", ", guided 2")):
                    rows["evaluate"].append(row(made, "KID-EffLite0", value, 0.05, config={"judged": "samples"}))
            else:
                config = {"source": run, "features": "z", "pooling": "flatten", "block": None}
                more = {"experiment": "linear_probing", "config": config}
                rows["linear_probing"].append(row(f"made-up-{run}", "accuracy", value, 0.05, **more))
    for name, its in rows.items():
        results.append(folder / f"{name}.jsonl", its)


def test_figures_of_some_seeds_show_what_is_there(tmp_path):
    filled(tmp_path, 1)
    one = Study.of_checkout(ROOT, FOLDER, results=str(tmp_path))
    drawn = study_figures.distortion(one.arms)
    assert "over the images of a single run" in drawn.note and len(drawn.rows) == 2 * 96 / 3
    lines = [line for axis in drawn.content.axes for line in axis.get_lines() if len(line.get_xdata()) == 4]
    assert len(lines) >= 2 * 2 * 4, "a line a quantizer in each of four panels"
    assert not any(text.get_text() == "not run yet" for axis in drawn.content.axes for text in axis.texts)
    said = study_words.factorial(one.arms).content
    assert "not run yet" not in said and "probe" in said.splitlines()[-1]


def test_two_processes_draw_the_same_bytes(tmp_path):
    committed, made_up = tmp_path / "committed", tmp_path / "made_up"
    shutil.copytree(FOLDER / "mini", committed)  # which a study that is running adds to
    filled(made_up, 3)
    drawn = []
    for name in ("a", "b"):
        for rows in (committed, made_up):
            out = tmp_path / name / rows.name
            command = [sys.executable, ROOT / "book" / "draw_figures.py", "--out", out, "--results", rows]
            subprocess.run(command, check=True, capture_output=True)
        files = sorted((tmp_path / name).rglob("*.*"))
        drawn.append({path.relative_to(tmp_path / name).as_posix(): path.read_bytes() for path in files})
    assert drawn[0].keys() == drawn[1].keys() and len(drawn[0]) > 2 * len(DRAWINGS)
    assert [name for name in drawn[0] if drawn[0][name] != drawn[1][name]] == []
    assert sum(name.endswith(".svg") for name in drawn[0]) > 20


# -- pages -------------------------------------------------------------------------------------------------------------

PAGES = [ROOT / "book" / f"{name}.ipynb" for name in ("experiments", "tables", "ablations")]
PAGES += sorted((ROOT / "book" / "paper").glob("*.ipynb"))


def page_problems(path: Path) -> list[str]:
    """Cells that show a table or figure of which the page does not say where its numbers come from."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    sources = ["".join(cell["source"]) for cell in cells]
    # A page of derived numbers alone says it once, in a cell of its own.
    if any("derived_provenance(" in source for source in sources) and not any("study" in s for s in sources):
        return []
    found = []
    for cell_, source in zip(cells, sources, strict=True):
        kinds = {kind for output in cell_["outputs"] for kind in output.get("data", {})}
        shown = bool(kinds - {"text/plain"}) or "display(" in source or "Markdown(" in source
        if "study.show(" in source:
            texts = ["".join(o.get("data", {}).get("text/markdown", "")) for o in cell_["outputs"]]
            if not texts or "*Provenance: " not in texts[-1]:
                found.append(f"{cell_['id']}: shown without its origin: store its outputs anew")
        elif shown or any(output["output_type"] == "execute_result" for output in cell_["outputs"]):
            found.append(f"{cell_['id']}: shows something, but not by study.show, which says where it comes from")
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_says_where_each_table_and_figure_comes_from(path):
    assert not page_problems(path)


@pytest.mark.parametrize(
    ("source", "output", "complaint"),
    [
        ("display(*study.show('steps'))", {"text/markdown": "| a |\n\n*Provenance: no row*"}, None),
        ("display(*study.show('steps'))", {"text/markdown": "| a |"}, "shown without its origin"),
        ("study_figures.steps(arms)", {"image/png": ""}, "not by study.show"),
        ("display(Markdown(table))", {"text/markdown": "| a |"}, "not by study.show"),
        ("print(study.planned())", None, None),
    ],
)
def test_a_page_without_origin_is_noticed(tmp_path, source, output, complaint):
    outputs = [] if output is None else [{"output_type": "display_data", "data": output, "metadata": {}}]
    cells = [{"cell_type": "code", "id": "a", "source": source, "outputs": outputs, "metadata": {}}]
    (tmp_path / "page.ipynb").write_text(json.dumps({"cells": cells}))
    problems = page_problems(tmp_path / "page.ipynb")
    assert [complaint in problem for problem in problems] == [True] if complaint else not problems


def test_reruns_are_shown_with_what_lies_inside(tmp_path):
    assert "not run yet" in study_reruns.reruns(tmp_path).content
    one = {"metric": "reconstruction.psnr", "recorded": 20.0, "value": 20.5, "low": 19.0, "high": 21.0, "degrees": 2}
    far = one | {"metric": "samples.KID-EffLite0", "value": 30.0}
    bare = one | {"metric": "generator.val_loss", "value": 20.0, "low": None, "high": None, "degrees": 0}
    entry = {"arm": "a", "sweep": "s", "metrics": [one, far, bare], "threads": 2, "ended": "2026-01-01T00:00:00"}
    entry |= {"machine": "m", "commit": "c" * 40, "dirty": False, "code": "d"}
    (tmp_path / "again.jsonl").write_text(json.dumps(entry | {"metrics": [far]}) + "\n" + json.dumps(entry) + "\n")
    drawn = study_reruns.reruns(tmp_path)
    assert "**`a`**, 2 threads: 1 of 2 numbers inside the interval of one more seed, 1 of 3 the same" in drawn.content
    assert "| reconstruction.psnr | 20 | 20.5 | [19, 21] | yes |" in drawn.content
    assert "val_loss" not in drawn.content and "1 executions in the ledger" in drawn.provenance


def test_the_attempt_shows_the_arms_that_it_executed_alone(tmp_path):
    assert "not run yet" in study_reruns.attempt([], tmp_path).content
    plan = read_plan([ROOT / "sweeps" / "mini" / "1_tokenizers.yaml"], ROOT)
    drawn = study_reruns.attempt(plan, ROOT / "book" / "results" / "mini-800")
    assert [line.split("`")[1] for line in drawn.content.splitlines()[2:]] == [
        f"{quantizer}-on-2-s0" for quantizer in ("softvq", "vq", "ae", "kl")
    ]
    assert drawn.rows and "Provenance" in drawn.provenance
