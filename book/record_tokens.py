"""Keep images, their tokens and their reconstructions by finished tokenizers, for the picture on the first page."""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # from a checkout that is not installed

from softvq_lib.data.images import fit, to_tensor  # noqa: E402
from softvq_lib.data.photographs import load_photograph  # noqa: E402
from softvq_lib.token_figures import record  # noqa: E402
from softvq_lib.training.run import Run  # noqa: E402

# Photographs that packages ship; the study's tokenizers, which train on Tiny-ImageNet, have not seen them.
PHOTOGRAPHS = ("flower", "hopper", "china")


def main() -> None:
    """Read the command line, encode, decode and record."""
    parser = argparse.ArgumentParser(prog="python book/record_tokens.py", description=__doc__)
    finished = "folder of a finished tokenizer, such as softvq-on-16-s0"
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=finished)
    parser.add_argument("--results", type=Path, default=ROOT / "book" / "results", help="default: book/results")
    asked = parser.parse_args()
    for folder in asked.runs:
        run = Run(folder, json.loads((folder / "config.json").read_text())["identity"])
        if run.manifest.get("status") != "finished":
            sys.exit(f"error: {folder} is not a finished run; `python book/run_sweeps.py` goes on with one.")
        data = f"photographs: {', '.join(PHOTOGRAPHS)}"
        print(record(run, images(run.identity["image_size"]), data, asked.results)["run"])


def images(size: int):
    """The middle of each photograph, (b, 3, size, size) in [-1, 1]."""
    import numpy as np
    import torch

    return to_tensor(torch.from_numpy(np.stack([fit(load_photograph(name), size) for name in PHOTOGRAPHS])))


if __name__ == "__main__":
    main()
