"""A folder of runs with a tokenizer and generators of random weights, for tests of what uses finished models."""

import json
from pathlib import Path

import torch

from softvq_lib.data.latents import tokenizer_hash
from softvq_lib.generators import GeneratorConfig, build_generator
from softvq_lib.generators.loading import save_generator
from softvq_lib.tokenizers import Tokenizer

CLASSES = 8  # of the data set `shapes`
NAMES = ["circle", "square", "triangle", "star", "ring", "cross", "heart", "crescent"]


def randomised(module, std=0.3):
    rng = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter.data, std=std, generator=rng)
    return module.eval()


def generator(kind="sit", classes=CLASSES):
    return randomised(build_generator(GeneratorConfig(kind, "tiny", tokens=4, dim=3, classes=classes)), std=0.1)


def write_runs(folder: Path) -> Path:
    """Write the tokenizer `tok` of 16 x 16 pixels, and on its latents `gen`, of `shapes`, and `mar`, of 12 classes."""
    # Random throughout: at its start a tokenizer's decoder hardly looks at the latents.
    tokenizer = randomised(Tokenizer.from_preset("tiny", tokens=4, dim=3, image_size=16, patch_size=8))
    tokenizer.save_pretrained(folder / "tok" / "tokenizer")
    known = {"tokenizer": "tok", "tokenizer_hash": tokenizer_hash(tokenizer), "mean": 0.1, "std": 2.0}
    save_generator(generator(), folder / "gen" / "generator", **known)
    (folder / "gen" / "config.json").write_text(json.dumps({"requested": {"dataset": "shapes"}}))
    save_generator(generator("mar", 12), folder / "mar" / "generator", **known)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """All files of a folder at any depth but its lock, by their paths inside it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.name != ".lock" and path.is_file()
    }
