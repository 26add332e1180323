"""Generators of latents (Sec. 2.2, 4.1): SiT, DiT and MAR on 1-D tokens, guidance and sampling."""

from softvq_lib.generators.build import build_generator
from softvq_lib.generators.dit import DiT
from softvq_lib.generators.gaussian import GaussianDiffusion
from softvq_lib.generators.guidance import Guidance
from softvq_lib.generators.interpolant import DIFFUSIONS, Interpolant
from softvq_lib.generators.mar import MAR
from softvq_lib.generators.presets import GENERATORS, SIZES, GeneratorConfig
from softvq_lib.generators.sampling import SampleConfig, generate
from softvq_lib.generators.sit import SiT
from softvq_lib.generators.solvers import SOLVERS
from softvq_lib.generators.transformer import Transformer

__all__ = [
    "DIFFUSIONS",
    "GENERATORS",
    "MAR",
    "SIZES",
    "SOLVERS",
    "DiT",
    "GaussianDiffusion",
    "GeneratorConfig",
    "Guidance",
    "Interpolant",
    "SampleConfig",
    "SiT",
    "Transformer",
    "build_generator",
    "generate",
]
