"""Clean executed notebooks in place, so that two machines store the same: the hook that pre-commit runs on each commit.

Outputs stay, for the tests compare them. What goes is what differs from run to run or that no reader sees: times,
progress bars, log lines (standard error), the state of widgets, and what an editor notes for itself. Pictures are
stored with at most 256 colours, which keeps the pages small. A clean notebook is left as it is, to the byte.
"""

import base64
import io
import json
import re
import sys
from pathlib import Path

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
KEPT = ("tags", "mystnb")  # of a cell's metadata: what papermill, nbval and Jupyter Book read
WIDGET = "application/vnd.jupyter.widget-view+json"
DATE = re.compile(r"\s*<dc:date>.*?</dc:date>", re.S)  # matplotlib's, in an SVG


def joined(text: str | list[str]) -> str:
    """Text that editors store as a list of lines, as the one string that it is."""
    return text if isinstance(text, str) else "".join(text)


def as_on_a_terminal(text: str) -> str:
    """Leave out what a carriage return has overwritten: all states of a progress bar but the last."""
    return "\n".join(re.sub(r".*\r(?=.)", "", line).rstrip("\r") for line in text.split("\n"))


def smaller(png: str) -> str:
    """Write an opaque PNG, in base64, with a palette, if it has none and that makes it smaller."""
    from PIL import Image

    picture = Image.open(io.BytesIO(base64.b64decode(png)))
    if picture.mode == "P" or ("A" in picture.getbands() and picture.getextrema()[-1] != (255, 255)):
        return png
    buffer = io.BytesIO()
    picture.convert("RGB").quantize(256, kmeans=4, dither=Image.Dither.NONE).save(buffer, "png", optimize=True)
    made = base64.b64encode(buffer.getvalue()).decode()
    return min(png, made, key=len)


def clean_outputs(outputs: list[dict]) -> list[dict]:
    """Leave out standard error and widgets, and join what a cell printed, which may arrive in pieces."""
    kept: list[dict] = []
    for output in outputs:
        if output.get("name") == "stderr" or WIDGET in output.get("data", {}):
            continue
        if kept and output["output_type"] == kept[-1]["output_type"] == "stream":
            kept[-1]["text"] = joined(kept[-1]["text"]) + joined(output["text"])
        else:
            kept.append(output)
    for output in kept:
        if output["output_type"] == "stream":
            output["text"] = as_on_a_terminal(joined(output["text"]))
        data = output.get("data", {})
        for kind in data:
            if not kind.endswith("json"):
                data[kind] = joined(data[kind])
        if "image/png" in data:
            data["image/png"] = smaller(data["image/png"].strip())
        if "image/svg+xml" in data:
            data["image/svg+xml"] = DATE.sub("", data["image/svg+xml"])
    return kept


def clean(notebook: dict) -> str:
    """The text of the notebook's file, cleaned; the notebook itself is changed."""
    notebook["metadata"] = METADATA
    for cell in notebook["cells"]:
        cell["source"] = joined(cell["source"])
        cell["metadata"] = {name: cell["metadata"][name] for name in KEPT if cell["metadata"].get(name)}
        if cell["cell_type"] == "code":
            cell["outputs"] = clean_outputs(cell["outputs"])
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def main(names: list[str]) -> int:
    """Clean the files of these names; 1 if any was not clean, which stops a commit until it is looked at."""
    changed = 0
    for path in map(Path, names):
        text = path.read_text(encoding="utf-8")
        cleaned = clean(json.loads(text))
        if cleaned != text:
            path.write_text(cleaned, encoding="utf-8")
            print(f"cleaned {path}")
            changed = 1
    return changed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
