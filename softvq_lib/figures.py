"""Figures of the experiments: functions of a run, a measurement or of results rows, and of nothing else."""

from pathlib import Path

import numpy as np

from softvq_lib import results as rows_of
from softvq_lib.style import OKABE_ITO, WIDTH, colour_of, new_figure
from softvq_lib.tables import quantizer_label


def _tiles(images) -> list[np.ndarray]:
    """Split images (b, 3, height, width) in [-1, 1] into arrays (height, width, 3) in [0, 1]."""
    return list(((images.float().clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).cpu().numpy())


def _rows_of_tiles(rows: list[tuple[str, list[np.ndarray]]], captions: list[str] | None = None, width: float = WIDTH):
    """Draw labelled rows of pictures; captions stand under the last row."""
    columns = max(len(tiles) for _, tiles in rows)
    side = (width - 0.9) / columns
    figure, axes = new_figure(len(rows), columns, len(rows) * side + 0.25 * bool(captions), width, squeeze=False)
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0.01, hspace=0.01)
    for line, (label, tiles) in zip(axes, rows, strict=True):
        for axis in line:
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            for spine in axis.spines.values():
                spine.set_visible(False)
        for axis, tile in zip(line, tiles, strict=False):
            axis.imshow(tile, vmin=0, vmax=1, cmap="gray" if tile.ndim == 2 else None, interpolation="nearest")
        line[0].set_ylabel(label, rotation=0, ha="right", va="center")
    for axis, caption in zip(axes[-1], captions or [], strict=False):
        axis.set_xlabel(caption)
    return figure


def data_sheet(splits, image_size: int, count: int = 16):
    """Show the first training images of a data set, with their labels where it has any."""
    from softvq_lib.data import validation_batches

    batch = next(iter(validation_batches(splits.train, image_size=image_size, batch_size=count, limit=count)))
    tiles = _tiles(batch.images)
    half = (len(tiles) + 1) // 2
    return _rows_of_tiles([("train", tiles[:half]), ("", tiles[half:])] if len(tiles) > 1 else [("train", tiles)])


def reconstructions(measured):
    """Show held-out images, their reconstructions and the absolute difference, with each image's PSNR."""
    images, ours = _tiles(measured.images), _tiles(measured.reconstructions)
    difference = [np.abs(a - b).mean(-1) for a, b in zip(images, ours, strict=True)]
    captions = [f"{value:.1f} dB" for value in measured.psnr[: len(images)]]
    return _rows_of_tiles([("original", images), ("decoded", ours), ("error", difference)], captions)


def _strip(path: Path) -> list[np.ndarray]:
    """Cut a picture of square images side by side, one pixel of white around each, into its images."""
    from PIL import Image

    picture = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255
    pitch = picture.shape[0] - 1
    starts = range(1, picture.shape[1] - 1, pitch)
    return [picture[1:pitch, start : start + pitch - 1] for start in starts]


def progress(snapshots: dict[int, Path], originals: Path | None = None, width: float = WIDTH):
    """Show the same held-out images reconstructed at several steps of training, a row a step."""
    rows = [(f"step {step}", _strip(path)) for step, path in sorted(snapshots.items())]
    if originals is not None:
        rows.append(("original", _strip(originals)))
    return _rows_of_tiles(rows, width=width)


def curves(metrics: list[dict], quantizer: str = "softvq"):
    """Draw the training loss and its KL term, and the PSNR of held-out images, against the step."""
    figure, (left, right) = new_figure(1, 2, 2.7)
    training = [row for row in metrics if "loss" in row]
    steps = [row["step"] for row in training]
    left.plot(steps, [row["reconstruction"] for row in training], color=colour_of(quantizer))
    left.set(xlabel="step", ylabel="reconstruction loss", yscale="log")
    if training and "kl" in training[0]:
        twin = left.twinx()
        twin.plot(steps, [row["kl"] for row in training], color=OKABE_ITO["orange"], linewidth=1.2)
        twin.set_ylabel("KL term, nats", color=OKABE_ITO["orange"])
        twin.grid(False)
    held_out = [row for row in metrics if "val_psnr" in row]
    right.plot(
        [row["step"] for row in held_out], [row["val_psnr"] for row in held_out], "o-", color=colour_of(quantizer)
    )
    right.set(xlabel="step", ylabel="held-out PSNR, dB")
    return figure


# The terms of Eq. 7 and of the discriminator in the order in which they are drawn, and their names in figures.
TERMS = {
    "loss": "weighted sum",
    "reconstruction": "reconstruction",
    "perceptual": "perceptual",
    "adversarial": "adversarial",
    "alignment": "alignment",
    "kl": "KL",
    "codebook": "codebook",
    "commit": "commitment",
    "adversarial_weight": "adaptive weight",
    "discriminator": "hinge loss of D",
    "consistency": "consistency",
    "lecam": "LeCAM",
    "logits_real": "logits, real",
    "logits_fake": "logits, decoded",
    "gradient_norm": "gradient norm",
    "discriminator_gradient_norm": "gradient norm, D",
}


def terms(curves: dict[str, list], start: int | None = None):
    """Draw each unweighted term of the objective (Eq. 7) against the step, a panel each.

    Args:
        curves: [step, value] pairs by term, as `Run.curves` and the results rows have them.
        start: Step at which the adversarial term sets in, marked in every panel.
    """
    names = [*(name for name in TERMS if name in curves), *sorted(set(curves) - set(TERMS))]
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    figure, axes = new_figure(lines, columns, 1.45 * lines + 0.3, squeeze=False, sharex=True)
    for axis, name in zip(axes.flat, names, strict=False):
        axis.plot(*zip(*curves[name], strict=True), color=OKABE_ITO["blue"], linewidth=1)
        axis.set_title(TERMS.get(name, name))
        if start:
            axis.axvline(start, color=OKABE_ITO["grey"], linestyle="--", linewidth=0.8)
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    for axis in axes.flat[max(0, len(names) - columns) : len(names)]:  # the lowest of each column
        axis.set_xlabel("step")
        axis.tick_params(labelbottom=True)
    return figure


def code_usage(measured, quantizer: str = "softvq"):
    """Draw the average posterior over the codes, most used first, against an even use of all.

    A quantizer without codebook leaves the axes empty but for saying so.
    """
    figure, axis = new_figure(1, 1, 2.5, WIDTH * 0.6)
    if measured.code_probability is None:
        axis.set_axis_off()
        axis.set_title("no codebook")
        return figure
    for probability in measured.code_probability:
        axis.plot(np.sort(probability)[::-1], color=colour_of(quantizer), alpha=0.8)
    codes = measured.code_probability.shape[1]
    axis.axhline(1 / codes, color=OKABE_ITO["grey"], linestyle="--", linewidth=1)
    axis.annotate("even use", (codes, 1 / codes), ha="right", va="bottom", color=OKABE_ITO["grey"])
    axis.set(xlabel="code, most used first", ylabel="average posterior", yscale="log")
    axis.set_title(
        f"usage {100 * measured.usage['usage']:.0f} %, perplexity {measured.usage['perplexity']:.0f} of {codes}"
    )
    return figure


def recorded_curves(rows: list[dict]):
    """Draw held-out PSNR against the step for every recorded run, from results rows."""
    figure, axis = new_figure(1, 1, 3.0)
    for row in rows:
        if row["metric"] == "psnr" and row.get("curve"):
            axis.plot(*zip(*row["curve"], strict=True), "o-", label=row["run"])
    axis.set(xlabel="step", ylabel="held-out PSNR, dB", xlim=(0, None))
    axis.legend(loc="lower right")
    return figure


def compare_quantizers(rows: list[dict]):
    """Draw held-out PSNR, codebook usage and perplexity against the step, a line a recorded run."""
    figure, axes = new_figure(3, 1, 7.5, sharex=True)
    runs = {row["run"]: row["config"] for row in rows if row["metric"] == "psnr"}
    seen: dict[str, int] = {}
    for run, config in runs.items():
        style = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))[seen.setdefault(config["quantizer"], 0) % 5]
        seen[config["quantizer"]] += 1
        curves = {row["metric"]: row["curve"] for row in rows if row["run"] == run and row.get("curve")}
        for axis, metric in zip(axes, ("psnr", "usage", "perplexity"), strict=True):
            if metric in curves:
                axis.plot(
                    *zip(*curves[metric], strict=True),
                    linestyle=style,
                    marker="o",
                    markersize=3,
                    color=colour_of(config["quantizer"]),
                    label=quantizer_label(config),
                )
    axes[0].set(ylabel="held-out PSNR, dB")
    axes[1].set(ylabel="codebook usage", ylim=(0, 1.05))
    axes[2].set(ylabel="perplexity", xlabel="step", xlim=(0, None))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _recorded_pictures(row: dict, folder: Path) -> dict[str, Path]:
    """Find the pictures that a results row names, and check their sha256."""
    return {name: rows_of.find_file(row, name, folder) for name in row["pictures"]}


def recorded_progress(row: dict, folder: Path, last: int = 3):
    """Draw the `last` pictures of progress that a results row names, and the originals if it names them.

    Raises:
        ValueError: when a picture is missing or is not the one that was recorded.
    """
    snapshots, originals = {}, None
    for name, path in _recorded_pictures(row, folder).items():
        if name.endswith("-originals.png"):
            originals = path
        elif step := int(path.stem.rsplit("-", 1)[1]):
            snapshots[step] = path
    return progress(dict(sorted(snapshots.items())[-last:]), originals, 0.6 * WIDTH)


def recorded_grids(row: dict, folder: Path):
    """Show the sheets of samples that a results row names, side by side, by the last word of their names.

    Raises:
        ValueError: when a picture is missing or is not the one that was recorded.
    """
    from PIL import Image

    sheets = {path.stem.rsplit("-", 1)[1]: Image.open(path) for path in _recorded_pictures(row, folder).values()}
    widths = [sheet.width for sheet in sheets.values()]
    width = min(WIDTH, sum(widths) / 60)
    figure, axes = new_figure(
        1,
        len(sheets),
        width * max(s.height for s in sheets.values()) / sum(widths) + 0.3,
        width,
        squeeze=False,
        width_ratios=widths,
    )
    for axis, (name, sheet) in zip(axes[0], sheets.items(), strict=True):
        axis.imshow(np.asarray(sheet.convert("RGB")), interpolation="nearest")
        axis.grid(False)
        axis.spines[:].set_visible(False)
        axis.set(xticks=[], yticks=[], title=name.replace("_", " "))
    return figure
