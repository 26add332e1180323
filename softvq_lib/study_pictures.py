"""Pictures of a study: latents in the plane (Fig. 4) and sheets of samples that were recorded (Fig. 1)."""

from pathlib import Path

import numpy as np

from softvq_lib import results as rows_of
from softvq_lib.arms import Measured, select
from softvq_lib.figures import recorded_grids
from softvq_lib.latent_figures import _CLASSES, _bare, _class_style, _names
from softvq_lib.study_cells import NOT_YET, Drawn, label
from softvq_lib.style import OKABE_ITO, new_figure


def umaps(arms: list[Measured], folder: Path, tokens: str) -> Drawn:
    """Draw the UMAPs of ẑ over those of z, a column a tokenizer of so many tokens, seed 0, points coloured by class.

    Args:
        arms: All of the study, of which those of the sweep `representations` are taken.
        folder: Where the arrays of the results rows lie.
        tokens: Latent tokens, as a level of that factor.

    Raises:
        ValueError: when arrays that a row names are missing, or are not the ones that were recorded.
    """
    mine = select(arms, "representations", {"tokens": tokens, "seed": "0"})
    figure, axes = new_figure(2, len(mine), 4.3, squeeze=False)
    rows, names = [], []
    for column, arm in zip(axes.T, mine, strict=True):
        aligned = "aligned" if arm.factors["alignment"] == "on" else "not aligned"
        column[0].set_title(f"{label('quantizer', arm.factors['quantizer'])},\n{aligned}", fontsize=11)
        for axis in column:
            _bare(axis)
        row = next((row for name, row in arm.rows.items() if name.startswith("latents.") and row.get("arrays")), None)
        arrays = rows_of.read_arrays(row, next(iter(row["arrays"])), folder) if row else {}
        if "umap_z" not in arrays:
            for axis in column:
                axis.text(0.5, 0.5, NOT_YET, transform=axis.transAxes, ha="center", color=OKABE_ITO["grey"], fontsize=9)
            continue
        rows.append(row)
        names, labels = _names(arrays), arrays["umap_labels"]
        for axis, which in zip(column, ("z_hat", "z"), strict=True):
            points = arrays[f"umap_{which}"][0].astype(np.float32)
            axis.scatter(*points[labels >= _CLASSES].T, s=2, color="#CCCCCC", linewidths=0)
            for number in range(min(_CLASSES, len(names))):
                axis.scatter(*points[labels == number].T, label=names[number], **_class_style(number))
    for axis, letter in zip(axes[:, 0], ("ẑ", "z"), strict=True):
        axis.set_ylabel(letter, rotation=0, ha="right", va="center", fontsize=16)
    drawn = [axis for axis in axes[0] if axis.get_legend_handles_labels()[0]]
    if drawn:
        handles = drawn[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=3, markerscale=1.8, handletextpad=0.1, fontsize=10)
    return Drawn(figure, rows, note="*Of 100 classes the first ten have a colour; UMAP with seed 0.*" if rows else "")


def samples(rows: list[dict], folder: Path) -> list[Drawn]:
    """The sheets of samples that rows name, each with what made it; none of them is of the study.

    Args:
        rows: Of generators.
        folder: Where the pictures of the rows lie.

    Raises:
        ValueError: when a picture is missing, or is not the one that was recorded.
    """
    found = []
    for row in (row for row in rows if row.get("pictures")):
        config = row["config"]
        kind = config["generator"].upper().replace("IT", "iT")
        what = f"**{kind}-{config['size']}** on {row['data']}, {config['tokens']} tokens of {config['dim']} channels, "
        what += f"{config['steps']:,} steps, guidance {config.get('sampling_guidance_scale', 1):g}"
        found.append(Drawn(recorded_grids(row, folder), [row], note=what))
    return found
