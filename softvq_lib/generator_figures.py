"""Figures of generators: samples by class (Fig. 1), the nearest training images beside them, curves of the training."""

import re

import numpy as np

from softvq_lib.style import COLOUR_CYCLE, WIDTH, new_figure


def _mosaic(images, columns: int, gap: int = 1) -> np.ndarray:
    """Lay images (b, 3, height, width) in [-1, 1] out in rows, white between: (height, width, 3) in [0, 1]."""
    pixels = ((images.float().clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).cpu().numpy()  # (b, height, width, 3)
    b, height, width, _ = pixels.shape
    rows = -(-b // columns)
    sheet = np.ones((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), np.float32)
    for number, picture in enumerate(pixels):
        top, left = (number // columns) * (height + gap), (number % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    return sheet


def _show(axis, images, columns: int, row_names: list[str] | None = None) -> None:
    axis.imshow(_mosaic(images, columns), interpolation="nearest")
    axis.grid(False)
    axis.spines[:].set_visible(False)
    axis.set(xticks=[], yticks=[])
    if row_names:
        pitch = images.shape[2] + 1
        axis.set_yticks([row * pitch + images.shape[2] / 2 for row in range(len(row_names))], row_names)
        axis.tick_params(length=0)


def short_name(name: str, length: int = 18) -> str:
    """Shorten the name of a class: WordNet's number and synonyms are left out, a long one is cut."""
    name = re.sub(r"^n\d{8}\W*", "", name.split(",")[0]).replace("_", " ") or name
    return name if len(name) <= length else f"{name[: length - 1]}…"


def class_grid(images, labels, classes: list[str] | None = None, columns: int = 8, width: float = WIDTH):
    """Show the first generated images of each class, a row a class.

    Args:
        images: (b, 3, height, width) in [-1, 1].
        labels: Their classes (b,).
        classes: Names of all classes. None: their numbers.
        columns: Images of each class at most.
        width: Inches.

    Raises:
        ValueError: for another number of labels than images, or a label without a name.
    """
    import torch

    if len(images) != len(labels):
        raise ValueError(f"{len(labels)} labels for {len(images)} images: give one an image.")
    shown = labels.unique().tolist()
    if classes is not None and not all(0 <= label < len(classes) for label in shown):
        raise ValueError(f"labels {shown} do not fit {len(classes)} names of classes.")
    rows = []
    for label in shown:
        row = images[labels == label][:columns]
        rows.append(torch.cat([row, row.new_ones(columns - len(row), *row.shape[1:])]))
    names = [str(label) if classes is None else short_name(classes[label]) for label in shown]
    figure, axis = new_figure(1, 1, (width - 0.5) * len(shown) / columns * images.shape[2] / images.shape[3], width)
    _show(axis, torch.cat(rows), columns, names)
    return figure


def beside_nearest(images, nearest_images, distances=None, width: float = WIDTH):
    """Show generated images over the training images nearest to them, so that copies would be seen.

    Args:
        images: (b, 3, height, width) in [-1, 1].
        nearest_images: The nearest training images, of that shape.
        distances: Root mean square difference of each pair, (b,), written underneath. None: nothing is.
        width: Inches.

    Raises:
        ValueError: for shapes that differ.
    """
    import torch

    if images.shape != nearest_images.shape:
        raise ValueError(f"images {tuple(images.shape)} and nearest ones {tuple(nearest_images.shape)} are no pairs.")
    b, side = len(images), images.shape[3] + 1
    figure, axis = new_figure(1, 1, 2 * (width - 1) / b * images.shape[2] / images.shape[3] + 0.3, width)
    _show(axis, torch.cat([images, nearest_images]), b, ["generated", "nearest"])
    if distances is not None:
        places = [column * side + images.shape[3] / 2 for column in range(b)]
        axis.set_xticks(places, [f"{distance:.2f}" for distance in torch.as_tensor(distances).tolist()])
    return figure


def learning_curve(runs: dict[str, list[dict]], metric: str = "val_loss", label: str = "held-out loss"):
    """Draw a metric against the step, a panel a run: losses of different generators have no common scale.

    Args:
        runs: Rows of metrics, with `step`, by the name over the panel; rows without the metric are passed over.
        metric: Its name in the rows.
        label: Of the vertical axis.

    Raises:
        ValueError: when no run has the metric.
    """
    curves = {name: [(row["step"], row[metric]) for row in rows if metric in row] for name, rows in runs.items()}
    curves = {name: sorted(points) for name, points in curves.items() if points}
    if not curves:
        raise ValueError(f"none of the runs {', '.join(runs)} has {metric!r} in its metrics.")
    columns = min(2, len(curves))
    lines = -(-len(curves) // columns)
    figure, axes = new_figure(lines, columns, 2.0 * lines + 0.6 * (lines == 1), squeeze=False)
    for axis, (name, points) in zip(axes.flat, curves.items(), strict=False):
        axis.plot(*zip(*points, strict=True), "o-", markersize=3, color=COLOUR_CYCLE[0])
        axis.set_ylim(bottom=0)
        if len(curves) > 1:
            axis.set_title(name)
    for axis in axes.flat[len(curves) :]:
        axis.set_axis_off()
    for axis in axes[-1]:
        axis.set_xlabel("step")
    for axis in axes[:, 0]:
        axis.set_ylabel(label)
    return figure
