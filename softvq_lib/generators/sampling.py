"""Settings of sampling for all generators, and sampling in batches with a seed for each image (Sec. 4.1)."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from inspect import signature

import torch
from torch import Tensor, nn

from softvq_lib.config import at_least, one_of
from softvq_lib.draws import Seeds
from softvq_lib.generators.guidance import Guidance
from softvq_lib.generators.interpolant import DIFFUSIONS

# Which settings each generator has: our parameter and the argument of its `sample`.
_OF: dict[str, dict[str, str]] = {
    "sit": {"solver": "solver", "sample_steps": "steps", "diffusion": "diffusion"},
    "dit": {"solver": "solver", "sample_steps": "steps"},
    "mar": {
        "sample_steps": "steps",
        "guidance_schedule": "guidance_schedule",
        "noise_temperature": "temperature",
        "head_steps": "head_steps",
        "head_solver": "head_solver",
    },
}
_INTERVAL = ("sit", "dit")


@dataclass(frozen=True)
class SampleConfig:
    """How samples are made. None is the generator's own default; what a generator does not have must stay None.

    Attributes:
        solver: SiT: `euler`, `heun`, `adaptive` or `sde`. DiT: `ddpm`, `ddim` or `dpm++`.
        sample_steps: Steps of the solver; MAR: sets of tokens.
        diffusion: SiT: noise of the solver `sde`, a name in `DIFFUSIONS`.
        guidance_scale: Classifier-free guidance; 1 is none.
        guidance_low: SiT, DiT: least noise level (0 data, 1 noise) that is guided.
        guidance_high: SiT, DiT: greatest.
        guidance_schedule: MAR: `linear` or `constant`.
        noise_temperature: MAR: factor of the noise that the head adds.
        head_steps: MAR: evaluations of the head for each set.
        head_solver: MAR: `ddpm`, `ddim` or `dpm++`.
    """

    solver: str | None = None
    sample_steps: int | None = None
    diffusion: str | None = None
    guidance_scale: float = 1.0
    guidance_low: float = 0.0
    guidance_high: float = 1.0
    guidance_schedule: str | None = None
    noise_temperature: float | None = None
    head_steps: int | None = None
    head_solver: str | None = None

    def __post_init__(self):
        at_least("sample_steps", self.sample_steps, 1)
        if self.diffusion is not None:
            one_of("diffusion", self.diffusion, DIFFUSIONS)
        at_least("head_steps", self.head_steps, 1)
        at_least("noise_temperature", self.noise_temperature, 0)
        Guidance(self.guidance_scale, (self.guidance_low, self.guidance_high))

    def arguments(self, generator: str) -> dict[str, object]:
        """Return the keyword arguments for `sample` of a kind of generator: `sit`, `dit` or `mar`.

        Raises:
            ValueError: for a setting that this kind does not have.
        """
        one_of("generator", generator, _OF)
        mine = _OF[generator]
        for name in {name for settings in _OF.values() for name in settings} - set(mine):
            if getattr(self, name) is not None:
                having = " and ".join(kind for kind, settings in _OF.items() if name in settings)
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is for {having}, not for generator={generator!r}: leave it out."
                )
        chosen = {there: getattr(self, name) for name, there in mine.items() if getattr(self, name) is not None}
        chosen["guidance_scale"] = self.guidance_scale
        interval = (self.guidance_low, self.guidance_high)
        if generator in _INTERVAL:
            chosen["guidance_interval"] = interval
        elif interval != (0.0, 1.0):
            raise ValueError(
                f"guidance_low={interval[0]} and guidance_high={interval[1]} bound noise levels, which "
                f"generator={generator!r} does not go through: leave them out, and choose guidance_schedule."
            )
        return chosen

    def resolved(self, model: nn.Module) -> "SampleConfig":
        """Return the same with the defaults of a model's `sample` in the place of None, where that names a value.

        Args:
            model: SiT, DiT or MAR.
        """
        defaults = signature(model.sample).parameters
        mine = _OF[model.config.generator].items()
        return replace(self, **{name: defaults[there].default for name, there in mine if getattr(self, name) is None})


@torch.no_grad()
def generate(
    model: nn.Module,
    labels: Tensor,
    seeds: Sequence[int],
    settings: SampleConfig,
    *,
    batch_size: int = 64,
    progress: Callable[[Iterable], Iterable] | None = None,
) -> Tensor:
    """Generate normalised latents, (b, l, d) on the CPU, where the model's weights are.

    An image depends on its label and seed alone, up to the rounding of other batch sizes.

    Args:
        model: SiT, DiT or MAR.
        labels: (b,).
        seeds: One for each image.
        settings: How it is sampled; what its kind of generator has no use for is refused.
        batch_size: Images sampled at once.
        progress: Goes round the batches, such as `tqdm`.

    Raises:
        ValueError: for another number of seeds than labels, and as the model's `sample` does.
    """
    at_least("batch_size", batch_size, 1)
    if len(labels) != len(seeds):
        raise ValueError(f"{len(seeds)} seeds for {len(labels)} labels: give one seed an image.")
    arguments = settings.arguments(model.config.generator)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    starts = range(0, len(labels), batch_size)
    parts = []
    for start in progress(starts) if progress else starts:
        rows = slice(start, start + batch_size)
        parts.append(model.sample(labels[rows].to(device), draws=Seeds(seeds[rows], device), **arguments).cpu())
    model.train(was_training)
    return torch.cat(parts)
