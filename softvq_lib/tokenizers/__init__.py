"""Tokenizers: one transformer trunk (Sec. 3.1), the quantizers between its halves (Sec. 3.2), and their presets."""

from softvq_lib.tokenizers.presets import PRESETS, TokenizerConfig
from softvq_lib.tokenizers.softvq import POSTERIORS, SoftVQ
from softvq_lib.tokenizers.tokenizer import QUANTIZERS, Code, Tokenizer
from softvq_lib.tokenizers.usage import CodebookUsage

__all__ = ["POSTERIORS", "PRESETS", "QUANTIZERS", "Code", "CodebookUsage", "SoftVQ", "Tokenizer", "TokenizerConfig"]
