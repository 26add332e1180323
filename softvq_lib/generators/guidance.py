"""Classifier-free guidance inside an interval of noise levels, for every generator."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from softvq_lib.config import at_least

Model = Callable[[Tensor, float, Tensor], Tensor]  # x (b, l, d), time, labels (b,) -> prediction (b, l, ...)


@dataclass(frozen=True)
class Guidance:
    """How far predictions move from those without a class to those with it, and at which noise levels.

    Attributes:
        scale: 1 leaves predictions with the class as they are, 0 takes those without, above 1 goes beyond.
        interval: Least and greatest noise level (0 data, 1 noise), both included, at which scale applies. Outside
            nothing is computed for it.
    """

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        at_least("guidance_scale", self.scale, 0)
        values = tuple(self.interval)
        if len(values) != 2 or not all(math.isfinite(v) for v in values) or not 0 <= values[0] <= values[1] <= 1:
            raise ValueError(
                f"guidance_interval={values} is not allowed: give the least and the greatest noise level, in this "
                "order, from 0 (data) to 1 (noise), for example (0.0, 0.7)."
            )

    def active(self, level: float) -> bool:
        """Whether a step at this noise level is guided, and so costs two evaluations instead of one."""
        return self.scale != 1 and self.interval[0] <= level <= self.interval[1]


def guided(model: Model, labels: Tensor, null: Tensor, guidance: Guidance, channels: int | None = None):
    """Return a function of x, time and noise level that predicts with guidance.

    Predictions with and without class are one batch of 2 b, and only where guidance is active.

    Args:
        model: Predicts from x (b, l, d), the time it was trained with, and labels (b,).
        labels: (b,).
        null: What stands for "no class", (b,).
        guidance: Scale and interval.
        channels: Leading channels of the prediction to guide; the others are those with the class. None: all.
    """

    def predict(x: Tensor, t: float, level: float) -> Tensor:
        if not guidance.active(level):
            return model(x, t, labels)
        with_class, without = model(torch.cat([x, x]), t, torch.cat([labels, null])).chunk(2)  # (b, l, d) each
        moved = without[..., :channels].lerp(with_class[..., :channels], guidance.scale)
        return moved if channels is None else torch.cat([moved, with_class[..., channels:]], -1)

    return predict


def check_labels(labels: Tensor, classes: int) -> None:
    """Raise ValueError unless labels (b,) are integers from 0 to classes - 1."""
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels of shape {tuple(labels.shape)} and type {labels.dtype}: give integers (batch,).")
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise ValueError(f"label {int(wrong[0])} is out of range: give labels from 0 to {classes - 1}.")
