"""An image, the latent tokens that it becomes, and what the decoder makes of them: kept in rows, drawn from rows."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from softvq_lib import results as rows_of
from softvq_lib.style import OKABE_ITO, WIDTH, new_figure

if TYPE_CHECKING:
    from torch import Tensor

    from softvq_lib.tokenizers import Tokenizer
    from softvq_lib.training.run import Run

EXPERIMENT = "tokens"


def seen_by(tokenizer: "Tokenizer", images: "Tensor") -> dict[str, np.ndarray]:
    """Encode and decode images, and keep what is between.

    Args:
        tokenizer: In evaluation mode.
        images: (b, 3, height, width) in [-1, 1].

    Returns:
        images: uint8 (b, height, width, 3).
        z: Latent tokens, float16 (b, l, d).
        decoded: Reconstructions, uint8 (b, height, width, 3).
    """
    import torch

    with torch.no_grad():
        z = tokenizer.encode(images).z
        decoded = tokenizer.decode(z)

    def pixels(x: "Tensor") -> np.ndarray:
        return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()

    return {"images": pixels(images), "z": z.numpy().astype(np.float16), "decoded": pixels(decoded)}


def psnr_of(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """PSNR in dB of each image, (b,), of the 8-bit pixels that are kept."""
    error = (arrays["images"].astype(float) - arrays["decoded"].astype(float)) ** 2
    return 10 * np.log10(255**2 / error.reshape(len(error), -1).mean(1))


def record(run: "Run", images: "Tensor", data: str, results: Path) -> dict:
    """Append a row for a finished run to `tokens.jsonl` of a folder of results, with the arrays beside it; return it.

    Args:
        run: Of a tokenizer.
        images: (b, 3, height, width) in [-1, 1], that training did not see and that may be shown.
        data: What they are, for people; the row's fingerprint is of their pixels.
        results: The folder.
    """
    arrays = seen_by(run.tokenizer, images)
    files = rows_of.keep_arrays(Path(results) / EXPERIMENT, {f"{run.name}.safetensors": arrays})
    row = {
        **rows_of.of_run(EXPERIMENT, run),
        "data": data,
        "data_fingerprint": hashlib.sha256(arrays["images"].tobytes()).hexdigest(),
        "metric": "psnr",
        "value": float(psnr_of(arrays).mean()),
        "low": None,
        "high": None,
        "interval": "",
        "n": len(images),
        "arrays": files,
    }
    rows_of.append(Path(results) / f"{EXPERIMENT}.jsonl", [row])
    return row


def tile(token: np.ndarray) -> np.ndarray:
    """Fold the numbers of a token, (d,), into the squarest rectangle that holds them in order, d = height x width."""
    d = len(token)
    height = max(n for n in range(1, int(d**0.5) + 1) if d % n == 0)
    return token.reshape(height, d // height)


def draw_tokens(rows: Sequence[dict], folder: Path, which: int = 0):
    """Draw an image, and a line for each tokenizer: its tokens as tiles of their numbers, and the reconstruction.

    Args:
        rows: Of `record`, one a tokenizer, all of the same images; lines go from many tokens to few.
        folder: Where their arrays lie.
        which: Number of the image.

    Raises:
        ValueError: when there is no row, when arrays are missing or are not the ones that were recorded, or when the
            rows are of different images.
    """
    if not rows:
        raise ValueError("rows=[]: an image's tokens are drawn from recorded rows; record a tokenizer's first.")
    rows = sorted(rows, key=lambda row: -row["config"]["tokens"])
    kept = [rows_of.read_arrays(row, next(iter(row["arrays"])), folder) for row in rows]
    if any(not np.array_equal(arrays["images"], kept[0]["images"]) for arrays in kept):
        raise ValueError(f"rows of {', '.join(row['run'] for row in rows)}: of different images; record them anew.")

    layout = [["image", f"tokens {k}", f"decoded {k}"] for k in range(len(rows))]
    figure, axes = new_figure(1, 1, 0.95 * len(rows) + 0.1, WIDTH)
    axes.remove()
    axes = figure.subplot_mosaic(layout, width_ratios=[1.9, 4.6, 1])
    figure.get_layout_engine().set(w_pad=0.04, h_pad=0.03, wspace=0.03, hspace=0.03)
    for axis in axes.values():
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
        for spine in axis.spines.values():
            spine.set_visible(False)
    axes["image"].imshow(kept[0]["images"][which], interpolation="nearest")
    height, width = kept[0]["images"].shape[1:3]
    axes["image"].set_xlabel(f"image, {width}×{height} px")
    for k, (row, arrays) in enumerate(zip(rows, kept, strict=True)):
        _tiles(axes[f"tokens {k}"], arrays["z"][which].astype(np.float32))
        tokens = row["config"]["tokens"]
        axes[f"tokens {k}"].set_xlabel(f"{tokens} token{'s' * (tokens > 1)} of {row['config']['dim']} channels")
        axes[f"decoded {k}"].imshow(arrays["decoded"][which], interpolation="nearest")
        axes[f"decoded {k}"].set_xlabel(f"{psnr_of(arrays)[which]:.1f} dB")
    return figure


def _tiles(axis, z: np.ndarray) -> None:
    """The tokens (l, d) side by side; colours from the lowest to the highest number of the image."""
    tiles = [tile(token) for token in z]
    height, width = tiles[0].shape
    gap = 0.1 * len(z[0]) / height if len(z) > 2 else 0.03 * width
    most = np.abs(z).max()
    look = {"vmin": -most, "vmax": most, "cmap": "PuOr", "interpolation": "nearest"}
    for number, one in enumerate(tiles):
        left = number * (width + gap)
        axis.imshow(one, extent=(left, left + width, 0, height), **look)
        axis.add_patch(_frame(left, width, height))
    axis.set(xlim=(-0.3, len(z) * (width + gap) - gap + 0.3), ylim=(-0.1, height + 0.1), aspect="auto")


def _frame(left: float, width: int, height: int):
    from matplotlib.patches import Rectangle

    return Rectangle((left, 0), width, height, fill=False, linewidth=0.8, edgecolor=OKABE_ITO["black"])
