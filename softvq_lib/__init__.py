"""SoftVQ-VAE (arXiv:2412.10958): tokenizers, losses, trainers and measurements of the paper.

Axis letters in shape comments, everywhere: b batch, n image patches, l latent tokens, d latent channels, k codes,
c transformer width, h heads. Images are float tensors (b, 3, height, width) in [-1, 1].
"""

import importlib
from pathlib import Path

__version__ = "0.1.0"

ROOT = Path(__file__).resolve().parents[1]

# Imported when first used, so that `import softvq_lib` costs nothing.
_PUBLIC = {
    "Tokenizer": "softvq_lib.tokenizers",
    "TokenizerConfig": "softvq_lib.tokenizers",
    "PRESETS": "softvq_lib.tokenizers",
    "SoftVQ": "softvq_lib.tokenizers",
    "DataConfig": "softvq_lib.data",
    "open_dataset": "softvq_lib.data",
    "TrainConfig": "softvq_lib.training",
    "GeneratorConfig": "softvq_lib.generators",
    "load_generator": "softvq_lib.generators.loading",
    "train_tokenizer": "softvq_lib.experiments",
    "train_generator": "softvq_lib.generation",
    "distil_encoder": "softvq_lib.distilling",
    "encode_images": "softvq_lib.coding",
    "decode_latents": "softvq_lib.coding",
    "sample_generator": "softvq_lib.sampling",
    "sample_pictures": "softvq_lib.sampling",
    "efficiency": "softvq_lib.costs",
    "parameters": "softvq_lib.experiments",
}

__all__ = ["ROOT", "__version__", *_PUBLIC]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'softvq_lib' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
