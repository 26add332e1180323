"""One way to any generator: from its configuration."""

from softvq_lib.generators.dit import DiT
from softvq_lib.generators.mar import MAR
from softvq_lib.generators.presets import GeneratorConfig
from softvq_lib.generators.sit import SiT

_CLASSES = {"sit": SiT, "dit": DiT, "mar": MAR}


def build_generator(config: GeneratorConfig) -> SiT | DiT | MAR:
    """Build the generator that a configuration describes, with the random weights that training starts from.

    Raises:
        ValueError: when its tokens, dim or classes are not known.
    """
    return _CLASSES[config.generator](config)
