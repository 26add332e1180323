"""Images of few bytes, and extractors whose features are these bytes: fidelity of which every number is known."""

import numpy as np
import torch
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from softvq_lib.evaluation.extractors import Extractor
from softvq_lib.evaluation.fidelity import fidelity

SIDE, WIDTH, CLASSES = 5, 75, 6


class Flat(FeatureExtractorBase):
    """The bytes themselves are the features, and the first six the logits."""

    def __init__(self):
        super().__init__("flat", ["pixels", "logits"])

    def forward(self, images):
        pixels = images.flatten(1) / 255
        return pixels, 8 * pixels[:, :CLASSES]

    @staticmethod
    def get_provided_features_list():
        return ("pixels", "logits")


class Silent(Flat):
    """Without classes."""

    def forward(self, images):
        return super().forward(images)[:1]


FLAT = Extractor(Flat(), "Flat", WIDTH, "0" * 64, "none")
AS_INCEPTION = Extractor(Flat(), "Inception", WIDTH, "1" * 64, "none")


def pictures(n, seed=0, lightest=255):
    """Correlated bytes (n, 3, 5, 5)."""
    rng = np.random.default_rng(seed)
    values = rng.random((n, 3, SIDE, SIDE)) * rng.random((n, 3, 1, 1)) * rng.random((n, 1, 1, 1)) ** 0.5
    return torch.from_numpy((values * lightest).astype(np.uint8))


MADE, REAL = pictures(170, 1, 220), pictures(200, 2)


def measured(made=MADE, real=REAL, extractor=FLAT, **options):
    return fidelity(made, real, extractor, **{"progress": False, "batch_size": 32} | options)
