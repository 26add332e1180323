"""The paper's recipes of generators: each SoftVQ and control row of Tab. 1-4 has a file that says what it says."""

from dataclasses import replace
from functools import cache

import pytest

from softvq_lib import config as strictly
from softvq_lib import results
from softvq_lib.evaluation.generator_cost import parameter_count, training_hours
from softvq_lib.paper_tables import paper_rows
from softvq_lib.tokenizers.published import STATISTICS
from softvq_lib.train import read_parameters
from softvq_lib.training import tokenizer as tokenizers
from softvq_lib.training.generator import CONFIGS, DEFAULTS

from repository import ROOT

FOLDER = ROOT / "params" / "paper" / "train_generator"
FILES = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
TOKENIZERS = {path.stem: path for path in (FOLDER.parent / "train_tokenizer").glob("*.yaml")}
IMAGES = 1_281_167  # of ImageNet's training split
PAPER = results.read_paper(ROOT / "book" / "results" / "paper.json")

# (generator, size of the SoftVQ tokenizer, tokens) -> gFID and IS without guidance, then with it.
ROWS_1 = {
    ("dit_xl", "b", 32): (9.83, 113.8, 3.91, 264.2),
    ("dit_xl", "bl", 32): (9.22, 115.8, 3.78, 266.7),
    ("dit_xl", "l", 32): (9.07, 117.2, 3.69, 270.4),
    ("dit_xl", "b", 64): (6.62, 129.2, 3.29, 262.5),
    ("dit_xl", "bl", 64): (6.53, 131.9, 3.11, 268.3),
    ("dit_xl", "l", 64): (5.83, 141.3, 2.93, 268.5),
    ("sit_xl", "b", 32): (7.99, 129.3, 2.51, 301.3),
    ("sit_xl", "bl", 32): (7.67, 133.9, 2.44, 308.8),
    ("sit_xl", "l", 32): (7.59, 137.4, 2.44, 310.6),
    ("sit_xl", "b", 64): (5.98, 138.0, 1.78, 279.0),
    ("sit_xl", "bl", 64): (5.80, 143.5, 1.88, 287.9),
    ("sit_xl", "l", 64): (5.35, 151.2, 1.86, 293.6),
    ("mar_h", "l", 32): (3.83, 211.2, 2.54, 273.6),
    ("mar_h", "bl", 64): (2.81, 218.3, 1.93, 289.4),
}
ROWS_2 = {("mar_h", "bl", 64): (8.21, 152.9, 3.42, 261.8), ("sit_xl", "bl", 64): (7.96, 133.9, 2.21, 290.5)}
# (quantizer, tokens) of an S tokenizer -> gFID and IS of SiT-L, without guidance.
ROWS_3 = {
    ("vq", 256): (19.02, 58.6),
    ("vq", 128): (18.51, 62.4),
    ("vq", 64): (20.07, 54.5),
    ("vq", 32): (21.57, 47.6),
    ("ae", 256): (22.11, 58.3),
    ("ae", 128): (22.31, 58.5),
    ("ae", 64): (25.53, 54.3),
    ("ae", 32): (28.18, 45.5),
    ("softvq", 256): (9.21, 93.6),
    ("softvq", 128): (10.12, 85.8),
    ("softvq", 64): (11.24, 89.4),
    ("softvq", 32): (12.89, 79.5),
}
# What follows softvq_b_64 in the name of the tokenizer's recipe; gFID and IS of SiT-L, without guidance.
ROWS_4 = {
    "_scratch": (20.33, 89.4),
    "_scratch_dinov2": (10.96, 101.9),
    "_dinov2_unaligned": (17.20, 91.5),
    "": (10.13, 103.4),
    "_clip": (9.89, 109.3),
    "_eva02": (10.34, 112.7),
}
INIT_AND_TARGET = {
    "_scratch": (None, None),
    "_scratch_dinov2": (None, "dinov2-b"),
    "_dinov2_unaligned": ("dinov2-b", None),
    "": ("dinov2-b", "dinov2-b"),
    "_clip": ("clip-b", "clip-b"),
    "_eva02": ("eva02-b", "eva02-b"),
}
APPENDIX = {"sit_xl_softvq_l_32_512", "mar_h_softvq_l_32_512"}

NAMED = {f"{generator}_softvq_{size}_{tokens}" for generator, size, tokens in ROWS_1}
NAMED |= {f"{generator}_softvq_{size}_{tokens}_512" for generator, size, tokens in ROWS_2}
NAMED |= {f"sit_l_{quantizer}_s_{tokens}" for quantizer, tokens in ROWS_3}
NAMED |= {f"sit_l_softvq_b_64{suffix}" for suffix in ROWS_4}

# Sec. 4.1 ("We strictly follow their original training setup"), and what SiT, DiT, MAR and the authors' code do.
ALL = {"min_lr": 1.0, "ema": 0.9999, "precision": "bf16"}
ADAM = {"batch_size": 256, "lr": 1e-4, "warmup": 0.0, "weight_decay": 0.0, "beta2": 0.999}
TRAINED = {
    "sit": ALL | ADAM | {"clip": 1.0},
    "dit": ALL | ADAM | {"clip": 1e9},  # not clipped
    "mar": ALL | {"batch_size": 2048, "lr": 2e-4, "weight_decay": 0.02, "beta2": 0.95, "clip": 3.0},
}
NET = {
    "sit": {"positions": "sincos", "path": "gvp", "prediction": "velocity", "times": "lognormal"},
    "dit": {"positions": "sincos", "schedule": "cosine"},
    "mar": {"buffer": 64, "head_repeat": 4, "dropout": 0.1, "head_depth": None, "head_width": None},
}
SAMPLED = {
    "sit": {"solver": "sde", "sample_steps": 250},
    "dit": {"solver": "ddpm", "sample_steps": 250, "guidance_high": 1.0},
    "mar": {"head_steps": 100, "guidance_schedule": "linear", "guidance_scale": 3.2},
}
# Parameters with 64 tokens of 32 channels: those of the references, whose SiT and DiT count fixed positions too.
PARAMETERS = {
    ("sit", "xl"): 674_926_880 - 64 * 1152,
    ("dit", "xl"): 674_963_776 - 64 * 1152,
    ("mar", "h"): 941_760_064,
}
MILLIONS = {"sit_xl": 675, "dit_xl": 675, "sit_l": 458, "mar_h": 942}  # Sec. 4.1; of MAR-H its paper says 943


@cache
def configs(name: str) -> tuple:
    """The five configurations of a file."""
    return strictly.split(DEFAULTS | read_parameters(FILES[name]), *CONFIGS)


def recipe(name: str) -> str:
    """The recipe of the tokenizer that a file's generator is trained on, by its name."""
    return name.split("_", 2)[2]


@cache
def tokenizer(name: str):
    return strictly.split(read_parameters(TOKENIZERS[recipe(name)]), *tokenizers.CONFIGS)[0].resolved()


def generator(name: str):
    """What will be built: the file's generator on the tokenizer's tokens and channels and ImageNet's classes."""
    tokens, dim = tokenizer(name).tokens, tokenizer(name).dim
    return replace(configs(name)[1], tokens=tokens, dim=dim, classes=1000)


def header(name: str) -> list[str]:
    return [line for line in FILES[name].read_text().splitlines() if line.startswith("#")]


def has(config, stated: dict) -> None:
    assert {name: getattr(config, name) for name in stated} == stated


def scores(place: str, gfid: float, inception: float, *guided: float) -> str:
    with_guidance = "; with guidance gFID {:.2f}, IS {:.1f}".format(*guided) if guided else ", without guidance"
    return f"# score: {place}: gFID {gfid:.2f}, IS {inception:.1f}{with_guidance}"


# -- rows to files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS_1, ids=str)
def test_a_row_of_tab_1_has_its_file(row):
    name = "{}_softvq_{}_{}".format(*row)
    has(tokenizer(name), {"quantizer": "softvq", "preset": row[1], "tokens": row[2], "image_size": 256})
    assert scores("Tab. 1", *ROWS_1[row]) in header(name)


@pytest.mark.parametrize("row", ROWS_2, ids=str)
def test_a_row_of_tab_2_has_its_file(row):
    name = "{}_softvq_{}_{}_512".format(*row)
    has(tokenizer(name), {"quantizer": "softvq", "preset": row[1], "tokens": row[2], "image_size": 512})
    assert scores("Tab. 2", *ROWS_2[row]) in header(name)


@pytest.mark.parametrize("row", ROWS_3, ids=str)
def test_a_row_of_tab_3_has_its_file(row):
    quantizer, tokens = row
    name = f"sit_l_{quantizer}_s_{tokens}"
    has(tokenizer(name), {"quantizer": quantizer, "preset": "s", "tokens": tokens, "image_size": 256})
    assert scores("Tab. 3", *ROWS_3[row]) in header(name)


@pytest.mark.parametrize("suffix", ROWS_4)
def test_a_row_of_tab_4_has_its_file(suffix):
    name = f"sit_l_softvq_b_64{suffix}"
    has(tokenizer(name), {"quantizer": "softvq", "preset": "b", "tokens": 64, "image_size": 256})
    assert scores("Tab. 4", *ROWS_4[suffix]) in header(name)


def rows_of(place: str, *names: str) -> dict[tuple, tuple]:
    """Of rows on SoftVQ and controls, what `names` say -> gFID and IS, without guidance and, if printed, with it."""
    metrics = ("gfid", "is", "gfid_guided", "is_guided")
    return {
        tuple(row.entry[name] for name in names): tuple(
            row.numbers[metric]["value"] for metric in metrics if metric in row.numbers
        )
        for row in paper_rows(PAPER, place)
        if "quantizer" in row.entry
    }


def test_these_are_all_rows_of_the_paper():
    for place, rows in (("Tab. 1", ROWS_1), ("Tab. 2", ROWS_2)):
        found = rows_of(place, "generator", "size", "preset", "tokens")
        assert {(f"{generator}_{size}", *which): n for (generator, size, *which), n in found.items()} == rows
    assert rows_of("Tab. 3", "quantizer", "tokens") == ROWS_3
    assert rows_of("Tab. 4", "init", "target") == {INIT_AND_TARGET[suffix]: n for suffix, n in ROWS_4.items()}


def test_every_file_is_some_row():
    assert len(NAMED) == len(ROWS_1) + len(ROWS_2) + len(ROWS_3) + len(ROWS_4)
    assert set(FILES) == NAMED | APPENDIX


# -- what they say ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_a_file_says_what_the_paper_says(name):
    latent, config, data, settings, samples = configs(name)
    kind, size = name.split("_")[:2]
    has(config, {"generator": kind, "size": size, "label_dropout": 0.1, "align_block": None, **NET[kind]})
    has(data, {"dataset": "ILSVRC/imagenet-1k", "flip": True, "crop": 1.0, "limit": None})
    has(settings, TRAINED[kind])
    has(samples, SAMPLED[kind])
    assert latent.normalise == "scalar"
    samples.arguments(kind)
    if kind == "mar":
        epoch = IMAGES // settings.batch_size
        assert settings.steps == 500 * epoch
        assert settings.warmup * settings.steps == 100 * epoch
        assert samples.sample_steps == tokenizer(name).tokens
    else:
        assert settings.steps == {"xl": 3_000_000, "l": 400_000}[size]
        assert samples.guidance_scale == {"xl": 1.75, "l": 1.0}[size]
    if kind == "sit":
        assert samples.guidance_high == {"xl": 0.7, "l": 1.0}[size]


@pytest.mark.parametrize("name", FILES)
def test_a_file_names_the_published_tokenizer_or_how_to_train_it(name):
    asked, mine = configs(name)[0].tokenizer, recipe(name)
    published = mine.removeprefix("softvq_").replace("_", "-")
    if mine.startswith("softvq_") and published in STATISTICS and not published.startswith("s-"):
        assert asked == f"SoftVQVAE/softvq-{published}"
    else:
        assert asked == mine
        command = "torchrun --nproc-per-node 8 -m softvq_lib.train"
        assert f"# before: {command} params/paper/train_tokenizer/{mine}.yaml -p run {mine}" in header(name)


@pytest.mark.parametrize("name", FILES)
def test_a_header_names_both_ways_to_run_it_and_the_cost(name):
    path = f"params/paper/train_generator/{name}.yaml"
    lines, settings = header(name), configs(name)[3]
    assert f"# command: papermill book/train_generator.ipynb runs/{name}.ipynb -f {path}" in lines
    assert f"#          torchrun --nproc-per-node 8 -m softvq_lib.train {path}" in lines
    images = settings.steps * settings.batch_size
    hours = training_hours(generator(name), images)
    cost = f"{hours:.0f} GPU-hours for {images / 1e6:.0f} million images, if an H100 (989 TFLOP/s) is used to 40 %"
    assert f"# cost: {cost}; not run here" in lines


# -- what they build -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_a_generator_has_the_size_of_the_paper(name):
    built = generator(name)
    assert built.tokens * built.dim == 2048
    count = parameter_count(built)
    assert round(count / 1e6) == MILLIONS["_".join(name.split("_")[:2])]
    alike = parameter_count(replace(built, tokens=64, dim=32))
    if (built.generator, built.size) in PARAMETERS:
        assert alike == PARAMETERS[built.generator, built.size]
    # Channels change the first and the last layer alone; MAR has tables of positions, and a head.
    width = built.row["width"]
    if built.generator == "mar":
        head = built.row["head_width"]
        assert count - alike == (built.dim - 32) * (width + head + 2 * head + 2) + (built.tokens - 64) * 3 * width
    else:
        parts = 1 if built.generator == "sit" else 2
        assert count - alike == (built.dim - 32) * (width + parts * (width + 1))
