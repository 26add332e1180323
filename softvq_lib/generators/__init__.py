"""Generators of latents (Sec. 2.2, 4.1): SiT, DiT and MAR on 1-D tokens, and guidance."""

from softvq_lib.generators.guidance import Guidance
from softvq_lib.generators.interpolant import DIFFUSIONS, Interpolant
from softvq_lib.generators.presets import GENERATORS, SIZES, GeneratorConfig
from softvq_lib.generators.sit import SiT
from softvq_lib.generators.solvers import SOLVERS
from softvq_lib.generators.transformer import Transformer

__all__ = [
    "DIFFUSIONS",
    "GENERATORS",
    "SIZES",
    "SOLVERS",
    "GeneratorConfig",
    "Guidance",
    "Interpolant",
    "SiT",
    "Transformer",
]
