"""Run notebooks with their default parameters and store the outputs in them: `make notebooks`.

Nothing that differs between two machines is stored: no times, no progress bars and log lines (standard error).
Pictures are stored with at most 256 colours, which keeps the pages small.
"""

import base64
import io
import json
import os
import sys
import tempfile
from pathlib import Path

import papermill

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def kept_outputs(outputs: list[dict]) -> list[dict]:
    """Leave out standard error, and join what a cell printed, which may arrive in pieces."""
    kept: list[dict] = []
    for output in outputs:
        if output.get("name") == "stderr":
            continue
        if kept and output["output_type"] == kept[-1]["output_type"] == "stream":
            kept[-1]["text"] += output["text"]
        else:
            kept.append(output)
    for output in kept:
        data = output.get("data", {})
        if "image/png" in data:
            data["image/png"] = smaller(data["image/png"])
    return kept


def smaller(png: str) -> str:
    """Write an opaque PNG, in base64, with a palette, if that makes it smaller."""
    from PIL import Image

    picture = Image.open(io.BytesIO(base64.b64decode(png)))
    if "A" in picture.getbands() and picture.getextrema()[-1] != (255, 255):
        return png
    buffer = io.BytesIO()
    picture.convert("RGB").quantize(256, kmeans=4, dither=Image.Dither.NONE).save(buffer, "png", optimize=True)
    made = base64.b64encode(buffer.getvalue()).decode()
    return min(png, made, key=len)


def store_outputs(path: Path) -> None:
    """Execute a notebook in its own folder, with an empty runs folder, and write it back."""
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["SOFTVQ_RUNS"] = str(Path(scratch) / "runs")
        copy = Path(scratch) / path.name
        notebook = papermill.execute_notebook(path, copy, cwd=path.parent, progress_bar=False)
    notebook["metadata"] = METADATA
    for cell in notebook["cells"]:
        for name in ("papermill", "execution"):
            cell["metadata"].pop(name, None)
        if not cell["metadata"].get("tags", True):
            del cell["metadata"]["tags"]
        if cell["cell_type"] == "code":
            cell["outputs"] = kept_outputs(cell["outputs"])
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(name, flush=True)
        store_outputs(Path(name).resolve())
