"""The paper's recipes: each SoftVQ and control row of Tab. 1-4 has a parameter file that says what the paper says."""

import math
import shutil
from dataclasses import replace
from functools import cache

import pytest
import timm
import torch

from softvq_lib import config as strictly
from softvq_lib import results
from softvq_lib.evaluation.capacity import capacity_plan
from softvq_lib.features import NAMES, PACKAGED
from softvq_lib.losses import LossConfig
from softvq_lib.losses.alignment import Projector
from softvq_lib.losses.discriminator import DINO
from softvq_lib.losses.perceptual import PERCEPTUAL
from softvq_lib.paper_tables import paper_rows
from softvq_lib.tokenizers import Tokenizer
from softvq_lib.tokenizers.presets import ENCODERS
from softvq_lib.train import read_parameters
from softvq_lib.training.tokenizer import CONFIGS, train

from repository import ROOT

FOLDER = ROOT / "params" / "paper" / "train_tokenizer"
FILES = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
OBJECTIVES = sorted((ROOT / "params").glob("*/train_tokenizer/objective*.yaml"))

PAPER = results.read_paper(ROOT / "book" / "results" / "paper.json")
ROWS_3 = [row for row in PAPER if row["metric"] == "tokenizer_parameters" and "preset" in row]
MILLIONS = {row["preset"]: row["value"] for row in PAPER if row["metric"] == "parameters"}

# (tokenizer, tokens) of Tab. 1 and 2, with the tokenizer's rFID; Tab. 2 has 512 x 512 images.
ROWS_1 = {("b", 32): 0.89, ("bl", 32): 0.68, ("l", 32): 0.74, ("b", 64): 0.88, ("bl", 64): 0.65, ("l", 64): 0.61}
ROWS_2 = {("bl", 64): 0.71}
# (initial weights of the encoder, target of the alignment) of Tab. 4, with rFID and the file's name after softvq_b_64.
ROWS_4 = {
    (None, "none"): (0.98, "_scratch"),
    (None, "dinov2-b"): (0.93, "_scratch_dinov2"),
    ("dinov2-b", "none"): (0.73, "_dinov2_unaligned"),
    ("dinov2-b", "dinov2-b"): (0.88, ""),
    ("clip-b", "clip-b"): (0.75, "_clip"),
    ("eva02-b", "eva02-b"): (0.81, "_eva02"),
}
# Of these the paper has results in an appendix only.
APPENDIX = {"softvq_l_32_512"}

# What Sec. 4.1 states for all, beside 250K iterations.
STATED = {
    "perceptual_weight": 1.0,
    "adversarial_weight": 0.2,
    "alignment_weight": 0.1,
    "adversarial": "dino",
    "diffaug": True,
}
# What the text leaves open, as the authors' file has it.
RELEASED = {
    "reconstruction": "l2",
    "perceptual": "lpips",
    "perceptual_warmup": 10_000,
    "adversarial_start": 20_000,
    "adversarial_warmup": 0,
    "adversarial_adaptive": False,
    "consistency_weight": 4.0,
    "lecam_weight": 0.001,
    "discriminator_lr": None,
    "alignment_rule": "repeat",
    "alignment_random": False,
}
TRAINED = {
    "batch_size": 256,
    "lr": 1e-4,
    "warmup": 1 / 50,
    "min_lr": 0.1,
    "beta2": 0.95,
    "clip": 1.0,
    "ema": 0.9999,
    "precision": "bf16",
}


@cache
def configs(name: str) -> tuple:
    """The four configurations of a file, resolved."""
    tokenizer, data, loss, settings, _ = strictly.split(read_parameters(FILES[name]), *CONFIGS)
    tokenizer = tokenizer.resolved()
    return tokenizer, data, loss.resolved(tokenizer.quantizer), settings


@cache
def parameters(config) -> int:
    """Parameters of a tokenizer, counted without storage, with the patch embedding that the release never uses."""
    with torch.device("meta"):
        tokenizer = Tokenizer(config)
    unused = tokenizer.decoder.width * (3 * config.patch_size**2 + 1)
    return sum(parameter.numel() for parameter in tokenizer.parameters()) + unused


def initial(config) -> str | None:
    """Short name of the published weights that the encoder starts from."""
    timm_name = config.encoder_network[0]
    return next(name for name, known in ENCODERS.items() if known == timm_name) if config.pretrained else None


def teacher(loss: LossConfig) -> str | None:
    """Timm name of the alignment's target."""
    return None if loss.alignment == "none" else NAMES.get(loss.alignment, (loss.alignment,))[0]


def score(name: str) -> str:
    return next(line for line in FILES[name].read_text().splitlines() if line.startswith("# score:"))


def has(config, stated: dict) -> None:
    assert {name: getattr(config, name) for name in stated} == stated


# -- rows to files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "tokens"), ROWS_1, ids=str)
def test_a_row_of_tab_1_has_its_file(preset, tokens):
    name = f"softvq_{preset}_{tokens}"
    config = configs(name)[0]
    has(config, {"preset": preset, "quantizer": "softvq", "tokens": tokens, "image_size": 256})
    assert f"rFID {ROWS_1[preset, tokens]}" in score(name)


@pytest.mark.parametrize(("preset", "tokens"), ROWS_2, ids=str)
def test_a_row_of_tab_2_has_its_file(preset, tokens):
    name = f"softvq_{preset}_{tokens}_512"
    config = configs(name)[0]
    has(config, {"preset": preset, "quantizer": "softvq", "tokens": tokens, "image_size": 512, "patches": 1024})
    assert f"rFID {ROWS_2[preset, tokens]}" in score(name)


@pytest.mark.parametrize("row", ROWS_3, ids=lambda row: row["what"])
def test_a_row_of_tab_3_has_its_file(row):
    name = f"{row['quantizer']}_{row['preset']}_{row['tokens']}"
    tokenizer, _, loss, _ = configs(name)
    has(tokenizer, {key: row[key] for key in ("preset", "quantizer", "tokens", "dim")})
    assert loss.alignment == ("dinov2-b" if row["quantizer"] == "softvq" else "none")
    # All twelve are 46 M in the paper, which one codebook and the projector of the alignment make of them.
    single = parameters(replace(tokenizer, pretrained=False, codebooks=1))
    single += sum(parameter.numel() for parameter in Projector(tokenizer.dim, 1024, 768).parameters())
    assert round(single / 1e6) == row["value"] == 46


def test_tab_3_has_twelve_rows():
    assert len(ROWS_3) == 12
    assert {row["place"] for row in ROWS_3} == {"Tab. 3"}


@pytest.mark.parametrize(("place", "rows"), [("Tab. 1", ROWS_1), ("Tab. 2", ROWS_2)])
def test_these_are_all_rows_on_softvq(place, rows):
    found: dict[tuple, set] = {}
    for row in paper_rows(PAPER, place):
        if row.entry.get("quantizer") == "softvq":
            found.setdefault((row.entry["preset"], row.entry["tokens"]), set()).add(row.numbers["rfid"]["value"])
    expected = {row: {rfid} for row, rfid in rows.items()}
    if place == "Tab. 1":
        expected["l", 32].add(0.61)  # in the row of MAR-H
    assert found == expected


def test_these_are_all_rows_of_tab_4():
    found = {
        (row.entry["init"], row.entry["target"] or "none"): row.numbers["rfid"]["value"]
        for row in paper_rows(PAPER, "Tab. 4")
    }
    assert found == {row: rfid for row, (rfid, _) in ROWS_4.items()}


def test_tab_3_has_the_score_of_each_file():
    for row in paper_rows(PAPER, "Tab. 3"):
        if "quantizer" in row.entry:
            name = f"{row.entry['quantizer']}_{row.entry['preset']}_{row.entry['tokens']}"
            rfid, gfid, inception = (row.numbers[metric]["value"] for metric in ("rfid", "gfid", "is"))
            assert f"rFID {rfid:.2f}; a SiT-L on it gets gFID {gfid:.2f}, IS {inception:.1f}" in score(name)


@pytest.mark.parametrize(("start", "target"), ROWS_4, ids=str)
def test_a_row_of_tab_4_has_its_file(start, target):
    rfid, suffix = ROWS_4[start, target]
    name = "softvq_b_64" + suffix
    tokenizer, _, loss, _ = configs(name)
    has(tokenizer, {"preset": "b", "quantizer": "softvq", "tokens": 64, "dim": 32, "image_size": 256})
    assert initial(tokenizer) == start
    assert teacher(loss) == (None if target == "none" else ENCODERS[target])
    assert f"rFID {rfid}" in score(name)


def test_every_file_is_some_row():
    named = {f"softvq_{preset}_{tokens}" for preset, tokens in ROWS_1}
    named |= {f"softvq_{preset}_{tokens}_512" for preset, tokens in ROWS_2}
    named |= {f"{row['quantizer']}_{row['preset']}_{row['tokens']}" for row in ROWS_3}
    named |= {"softvq_b_64" + suffix for _, suffix in ROWS_4.values()}
    assert set(FILES) == named | APPENDIX


# -- what all of them share ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_a_file_says_what_the_paper_says(name):
    tokenizer, data, loss, settings = configs(name)
    assert tokenizer.tokens * tokenizer.dim == 2048
    assert tokenizer.patch_size == 16
    has(loss, STATED | RELEASED)
    has(settings, TRAINED)
    assert settings.steps // 1000 == 250
    assert settings.steps == 50 * (1_281_167 // settings.batch_size)  # epochs of ImageNet's training images
    has(data, {"dataset": "ILSVRC/imagenet-1k", "flip": True, "crop": 1.25})
    assert settings.steps * settings.warmup == pytest.approx(settings.steps / 50)  # one epoch
    if tokenizer.quantizer != "ae":
        assert loss.kl_weight == 0.01
    if tokenizer.quantizer == "softvq":
        has(tokenizer, {"temperature": 0.07, "codebook_size": 8192, "codebooks": 4, "posterior": "released"})
    if "clip" not in name and "eva02" not in name:
        own = {"s": "dinov2-s", "b": "dinov2-b", "bl": "dinov2-b", "l": "dinov2-l"}[tokenizer.preset]
        assert initial(tokenizer) == (None if "scratch" in name else own)


@pytest.mark.parametrize("name", [name for name in FILES if configs(name)[0].quantizer == "softvq"])
def test_a_softvq_has_the_published_size(name):
    config = replace(configs(name)[0], pretrained=False)
    # Sec. 4.1 gives one number a size. Images of 512 px have longer position tables, 32 tokens wider codewords.
    widths = {"s": 384 + 384, "b": 768 + 768, "bl": 768 + 1024, "l": 1024 + 1024}[config.preset]
    million = (parameters(config) - (config.patches - 256) * widths) / 1e6
    assert million == pytest.approx(MILLIONS[config.preset], abs=2 if config.tokens == 32 else 1)


@pytest.mark.parametrize("name", FILES)
def test_all_weights_that_a_file_asks_for_are_published(name):
    tokenizer, _, loss, _ = configs(name)
    assert (loss.perceptual in PERCEPTUAL, loss.adversarial) == (True, "dino")
    wanted = {DINO, teacher(loss), tokenizer.encoder_network[0]} - {None}
    assert wanted <= set(timm.list_pretrained())
    if tokenizer.preset in ("s", "b", "bl") and "eva" not in name and "clip" not in name:
        assert loss.alignment in ("none", "dinov2-b")
    if tokenizer.preset == "l":
        assert loss.alignment == "dinov2-l"


@pytest.mark.parametrize("name", ["softvq_s_64", "vq_s_32", "softvq_b_64_scratch"])
def test_the_cost_in_a_header_is_the_capacity_plans(name):
    hours = capacity_plan({name: read_parameters(FILES[name])})[0]["gpu_hours"]
    cost = (
        f"# cost: {hours:.0f} GPU-hours for 64 million images, if an H100 (989 TFLOP/s) is used to 40 %; not run here"
    )
    assert cost in FILES[name].read_text().splitlines()


@pytest.mark.parametrize("name", FILES)
def test_a_header_names_both_ways_to_run_it(name):
    path = f"params/paper/train_tokenizer/{name}.yaml"
    header = [line for line in FILES[name].read_text().splitlines() if line.startswith("#")]
    assert f"# command: papermill book/train_tokenizer.ipynb runs/{name}.ipynb -f {path}" in header
    assert f"#          torchrun --nproc-per-node 8 -m softvq_lib.train {path}" in header
    assert any(line.startswith("# row: ") for line in header)


# -- they run --------------------------------------------------------------------------------------------------------


def test_a_step_of_the_smallest_recipe(tmp_path):
    """One optimiser step with every net of the paper's recipe, but of random weights; then all is there."""
    values = read_parameters(FILES["softvq_s_64"]) | {
        "dry_run": True,
        "pretrained": False,
        "dataset": "shapes",
        "image_column": None,
        "label_column": None,
        "limit": 2,
        "batch_size": 1,
        "steps": 1,
        "val_images": 1,
        "adversarial_start": 0,
        "precision": "auto",
        "runs": str(tmp_path),
    }
    try:
        run = train(**values)
        (row,) = [row for row in run.metrics if "loss" in row]
        assert run.finished and run.trained == 1
        terms = {
            "reconstruction",
            "perceptual",
            "adversarial",
            "alignment",
            "kl",
            "discriminator",
            "consistency",
            "lecam",
        }
        assert terms <= set(row)
        assert all(math.isfinite(value) for value in row.values())
        assert run.identity["adversarial"] == "dino" and run.identity["alignment"] == "dinov2-b"
        assert (row["gradient_norm"] > 0) and (row["discriminator_gradient_norm"] > 0)
    finally:
        shutil.rmtree(tmp_path)  # a gigabyte, which pytest would keep


@pytest.mark.parametrize("path", OBJECTIVES, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_the_small_recipes_have_all_terms_on_nets_that_need_no_network(path):
    tokenizer, _, loss, settings, _ = strictly.split(read_parameters(path), *CONFIGS)
    tokenizer = tokenizer.resolved()
    assert {loss.perceptual, loss.alignment} <= set(PACKAGED) - {"efflite0"}  # which is kept for scoring
    assert loss.adversarial == "patch"
    assert loss.resolved(tokenizer.quantizer).kl_weight == 0.01
    assert 0 < loss.adversarial_start < loss.adversarial_start + loss.adversarial_warmup < settings.steps
    if loss.alignment_rule == "repeat":
        assert tokenizer.patches % tokenizer.tokens == 0


def test_there_are_small_recipes_at_both_sizes():
    assert {path.stem for path in OBJECTIVES} == {"objective", "objective_32px", "objective_64px"}
