"""Tokenizers: one transformer trunk (Sec. 3.1), the quantizers between its halves (Sec. 3.2), and their presets."""

from softvq_lib.tokenizers.ae import AE
from softvq_lib.tokenizers.gmmvq import GMMVQ
from softvq_lib.tokenizers.kl import KL
from softvq_lib.tokenizers.presets import PRESETS, QUANTIZERS, TokenizerConfig
from softvq_lib.tokenizers.product import Product
from softvq_lib.tokenizers.quantizer import NotFiniteError, Quantizer
from softvq_lib.tokenizers.residual import Residual
from softvq_lib.tokenizers.softvq import POSTERIORS, SoftVQ
from softvq_lib.tokenizers.tokenizer import Code, Tokenizer
from softvq_lib.tokenizers.usage import CodebookUsage
from softvq_lib.tokenizers.vq import VQ

__all__ = [
    "AE",
    "GMMVQ",
    "KL",
    "POSTERIORS",
    "PRESETS",
    "QUANTIZERS",
    "VQ",
    "Code",
    "CodebookUsage",
    "NotFiniteError",
    "Product",
    "Quantizer",
    "Residual",
    "SoftVQ",
    "Tokenizer",
    "TokenizerConfig",
]
