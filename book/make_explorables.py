"""Make the data of the explorable pictures: train what is missing of sweeps/explore, write book/_static/explore."""

import argparse
import io
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # from a checkout that is not installed

import torch  # noqa: E402
from PIL import Image  # noqa: E402

from softvq_lib import explorable_figures, explorables, results  # noqa: E402
from softvq_lib.data import DataConfig, open_dataset  # noqa: E402
from softvq_lib.experiments import TokenizerExperiment, train_tokenizer  # noqa: E402
from softvq_lib.method_figures import draw_assignment  # noqa: E402
from softvq_lib.sweeps import Arm, read_plan  # noqa: E402

SWEEPS = ROOT / "sweeps" / "explore"
FOLDER = ROOT / "book" / "_static" / "explore"
DATASET = "mixed"  # a sweep leaves the data set open
IMAGE_SIZE = 32
# Held-out pictures that are shown, by data set: number among its validation pictures, and name.
SHOWN = {
    "digits": {0: "digit 3", 6: "digit 7", 11: "digit 8"},
    "shapes": {17: "green heart", 13: "red ring", 61: "orange star", 44: "violet circle"},
    "photographs": {100: "portrait", 7: "dahlia", 136: "pagoda", 61: "petals", 106: "lake"},
}
TOKENS = ("softvq", 8)  # quantizer and tokens of the decoder that runs in the page
PAIR = (7, 8)  # of its static figure


def trained(arms: list[Arm], runs: str | None) -> dict[tuple[str, int], TokenizerExperiment]:
    """Train the tokenizers that are missing, load the others; by quantizer and tokens."""
    found = {}
    for number, arm in enumerate(arms, 1):
        print(f"{number} of {len(arms)}: {arm.name}", flush=True)
        experiment = train_tokenizer(**arm.cell("train_tokenizer").parameters, dataset=DATASET, runs=runs)
        print(experiment, flush=True)
        found[arm.factors["quantizer"], int(arm.factors["tokens"])] = experiment
    return found


def pictures() -> tuple[torch.Tensor, list[str]]:
    """The pictures that are shown, (m, 3, height, width) in [-1, 1], and their names."""
    parts, names = [], []
    for dataset, chosen in SHOWN.items():
        source = open_dataset(DataConfig(dataset), IMAGE_SIZE).validation
        parts.append(explorables.pictures_of(source, chosen, IMAGE_SIZE))
        names += chosen.values()
    return torch.cat(parts), names


def write(kind: str, data: dict, figure, provenance: str) -> None:
    """Write a picture's data as a script, which a page opened from a file can load too, and its static figure."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False)
    script = f"(window.softvqExplore = window.softvqExplore || {{ data: {{}} }}).data.{kind} = {text};\n"
    (FOLDER / f"data_{kind}.js").write_text(script)
    (FOLDER / f"provenance_{kind}.txt").write_text(provenance + "\n")
    file = io.BytesIO()
    figure.savefig(file, dpi=110)
    # 256 colours are enough for a stand-in, and a third of the bytes.
    Image.open(file).convert("RGB").quantize(256).save(FOLDER / f"still_{kind}.png", optimize=True)
    print(f"{kind}: {len(script) / 1024:.0f} KiB of data. {provenance}")


def main() -> None:
    """Read the command line, train, write."""
    parser = argparse.ArgumentParser(prog="python book/make_explorables.py", description=__doc__)
    parser.add_argument("--runs", help="folder of runs; default: as for the notebooks")
    parser.add_argument("--train", action="store_true", help="train what is missing and write nothing")
    asked = parser.parse_args()
    experiments = trained(read_plan(sorted(SWEEPS.glob("*.yaml")), ROOT), asked.runs)
    if asked.train:
        return
    images, names = pictures()
    data = explorables.reconstruction_data(experiments, images, names)
    figure = explorable_figures.draw_reconstructions(experiments, images)
    write("reconstruction", data, figure, explorables.provenance(experiments.values()))
    one = experiments[TOKENS]
    data = explorables.token_data(one, images, names, PAIR)
    write("tokens", data, explorable_figures.draw_tokens(one, data), explorables.provenance([one]))
    figure = draw_assignment()
    write("posterior", explorables.posterior_data(), figure, "Computed in the page; nothing in it is trained.")
    paper = results.read_paper(ROOT / "book" / "results" / "paper.json")
    measured = results.read(ROOT / "book" / "results" / "efficiency.jsonl")
    data = explorables.cost_data(paper, measured)
    write("cost", data, explorable_figures.draw_costs(data), explorables.cost_provenance(data))


if __name__ == "__main__":
    main()
