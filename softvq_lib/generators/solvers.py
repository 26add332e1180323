"""Solvers that take a latent from noise to data along a velocity: Euler, Heun, adaptive; Euler-Maruyama with noise.

Times go down from noise (about 1) to data (about 0). A field is a function of x, the time, and the noise level at which
the step began, where guidance is decided: so both slopes of a Heun step are slopes of one field.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from softvq_lib.config import at_least
from softvq_lib.draws import Draws, normal

Field = Callable[[Tensor, float, float], Tensor]
Progress = Callable[[Sequence], Iterable]  # such as tqdm; goes round the steps

SOLVERS = ("euler", "heun", "adaptive", "sde")
_LAST = 0.04  # where the stochastic sampler's last step begins, which adds no noise


def step_times(solver: str, steps: int, start: float, end: float) -> list[float]:
    """Return the times (steps + 1,) between which a solver steps; for `adaptive` just the two ends.

    Raises:
        ValueError: for fewer steps than 1.
    """
    at_least("steps", steps, 1)
    if solver == "adaptive":
        return [start, end]
    if solver == "sde":
        between = [start + (_LAST - start) * i / (steps - 1) for i in range(1, steps - 1)]
        return [start, *between, *([_LAST] if steps > 1 else []), end]
    return [start + (end - start) * i / steps for i in range(steps)] + [end]


def stages(solver: str, times: Sequence[float]) -> list[float]:
    """Return the noise level at which guidance is decided for each call of the field: their number is the cost.

    Euler and Euler-Maruyama call it once a step, Heun twice but for the last step, which is Euler's.

    Raises:
        ValueError: for `adaptive`, which calls it as often as it needs.
    """
    begins = list(times[:-1])
    if solver == "adaptive":
        raise ValueError("solver='adaptive' takes as many evaluations as it needs: choose 'euler', 'heun' or 'sde'.")
    return begins if solver != "heun" else sorted(begins + begins[:-1], reverse=True)


def euler(field: Field, x: Tensor, times: Sequence[float], progress: Progress = iter) -> Tensor:
    """First order: one call of the field a step takes x (b, l, d) from the first of the times to the last."""
    for t, s in progress(list(pairwise(times))):
        x = x + (s - t) * field(x, t, t)
    return x


def heun(field: Field, x: Tensor, times: Sequence[float], progress: Progress = iter) -> Tensor:
    """Second order: x (b, l, d) moves by the mean of the slopes at both ends of a step.

    The last step is Euler's, so n steps are 2 n - 1 calls of the field.
    """
    for t, s in progress(list(pairwise(times))):
        slope = field(x, t, t)
        if s != times[-1]:
            slope = (slope + field(x + (s - t) * slope, s, t)) / 2
        x = x + (s - t) * slope
    return x


def euler_maruyama(
    field: Field,
    x: Tensor,
    times: Sequence[float],
    draws: Draws,
    score: Callable[[Tensor, Tensor, float], Tensor],
    diffusion: Callable[[float], float],
    progress: Progress = iter,
) -> Tensor:
    """Reverse diffusion dx = (v - w score) dt + sqrt(2 w) dW; the last step adds no noise.

    Args:
        field: Velocity (b, l, d) of x, the time, and the time where the step began.
        x: Noise (b, l, d), at the first time.
        times: Noise levels from 1 down, ends of the steps.
        draws: For the noise of all steps but the last.
        score: Score (b, l, d) of velocity, x and time, so that both come from one call of the field.
        diffusion: w of the time.
        progress: Goes round the steps, such as `tqdm`.
    """
    for t, s in progress(list(pairwise(times))):
        velocity, w = field(x, t, t), diffusion(t)
        x = x + (s - t) * (velocity - w * score(velocity, x, t))
        if s != times[-1]:
            noise = normal(tuple(x.shape), draws, x.float())
            x = x + (2 * w * (t - s)) ** 0.5 * noise
    return x


def adaptive(
    field: Field, x: Tensor, times: Sequence[float], breaks: Iterable[float] = (), *, rtol: float, atol: float
) -> Tensor:
    """Dormand-Prince with steps as long as the error allows, chosen for the batch as a whole; x is (b, l, d).

    Args:
        field: Velocity (b, l, d) of x, the time, and the time where the piece began.
        x: Noise (b, l, d), at the first time.
        times: The two ends.
        breaks: Times where the field jumps; it is solved piece by piece between them.
        rtol: Relative tolerance of a step.
        atol: Absolute tolerance of a step.
    """
    from torchdiffeq import odeint

    start, end = times
    points = sorted({start, end, *(t for t in breaks if end < t < start)}, reverse=True)
    for t, s in pairwise(points):
        middle = (t + s) / 2
        span = torch.tensor([t, s], dtype=x.dtype, device=x.device)
        # A step ends on the last time; without that option it goes beyond and comes back by interpolation.
        options = {"step_t": span[1:]}
        x = odeint(
            lambda at, y, level=middle: field(y, float(at), level), x, span, rtol=rtol, atol=atol, options=options
        )
        x = x[-1]  # (b, l, d)
    return x
