"""The committed files of the explorable pictures, as tests read them."""

import base64
import io
import json

import numpy as np
from PIL import Image

from repository import ROOT

FOLDER = ROOT / "book" / "_static" / "explore"
KINDS = ("reconstruction", "posterior", "tokens", "cost")


def read_data(kind: str) -> dict:
    """The data of a kind, from the script that brings them into a page."""
    text = (FOLDER / f"data_{kind}.js").read_text()
    return json.loads(text[text.index(f".data.{kind} = ") + len(f".data.{kind} = ") : text.rindex(";")])


def pixels_of(png: str, size: int) -> list[np.ndarray]:
    """Pictures (size, size, 3) of a row."""
    row = np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"))
    return np.split(row, row.shape[1] // size, axis=1)
