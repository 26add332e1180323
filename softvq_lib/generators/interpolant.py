"""Stochastic interpolants (SiT, Eq. 3): paths between data and noise, what a network may predict, and its loss.

A noisy latent is x_t = alpha_t data + sigma_t noise, with the noise level t from 0, data, to 1, noise. Its velocity is
dx_t/dt. SiT's own code runs time the other way: its t is 1 - t here, and its velocity has the other sign. REPA and the
published SoftVQ generators have the convention of this file.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from softvq_lib.config import one_of
from softvq_lib.draws import Draws, normal, uniform
from softvq_lib.generators.presets import PATHS, PREDICTIONS, TIMES, WEIGHTINGS

_VP_LEAST, _VP_RANGE = 0.1, 19.9  # beta at t = 0, and how much it grows to t = 1
_NEAR = 1e-3  # how near to an end without a finite velocity, score or diffusion a sampler and the training go
_NEAR_VP = 1e-5  # the same for VP in training


@dataclass(frozen=True)
class Coefficients:
    """alpha and sigma at some noise levels, and their derivatives; each of the shape of t."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor

    @property
    def diffusion(self) -> Tensor:
        """sigma d_sigma - sigma^2 d_alpha / alpha, of the shape of t: half the square of the forward noise rate."""
        return self.sigma * self.d_sigma - self.sigma.square() * self.d_alpha / self.alpha

    @property
    def wronskian(self) -> Tensor:
        """alpha d_sigma - sigma d_alpha, of the shape of t, which is above 0 all along a path."""
        return self.alpha * self.d_sigma - self.sigma * self.d_alpha


def _linear(t: Tensor) -> Coefficients:
    one = torch.ones_like(t)
    return Coefficients(1 - t, t, -one, one)


def _gvp(t: Tensor) -> Coefficients:
    rate = math.pi / 2
    cos, sin = torch.cos(rate * t), torch.sin(rate * t)
    return Coefficients(cos, sin, -rate * sin, rate * cos)


def _vp(t: Tensor) -> Coefficients:
    log_alpha = -0.25 * t.square() * _VP_RANGE - 0.5 * t * _VP_LEAST
    slope = -0.5 * (t * _VP_RANGE + _VP_LEAST)
    alpha, sigma = log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()
    return Coefficients(alpha, sigma, slope * alpha, -slope * alpha.square() / sigma)


_COEFFICIENTS: dict[str, Callable[[Tensor], Coefficients]] = {"linear": _linear, "gvp": _gvp, "vp": _vp}


def _level_of_ratio(path: str, ratio: Tensor) -> Tensor:
    """Return the noise level at which sigma / alpha is `ratio`."""
    if path == "linear":
        return ratio / (1 + ratio)
    if path == "gvp":
        return ratio.atan() * 2 / math.pi
    minus_log_alpha = torch.log1p(ratio.square()) / 2
    root = (_VP_LEAST**2 + 4 * _VP_RANGE * minus_log_alpha).sqrt()
    return (root - _VP_LEAST) / _VP_RANGE


# w of the reverse diffusion, by name: how much noise a stochastic sampler adds (and takes out) at noise level t.
DIFFUSIONS: dict[str, Callable[[Tensor, Coefficients], Tensor]] = {
    "sigma": lambda t, c: c.sigma,
    "linear": lambda t, c: t,
    "sbdm": lambda t, c: c.diffusion,
    "constant": lambda t, c: torch.ones_like(t),
    "decreasing": lambda t, c: 0.25 * (1 - torch.cos(math.pi * t)).square(),
    "increasing-decreasing": lambda t, c: torch.sin(math.pi * t).square(),
}


@dataclass(frozen=True)
class Interpolant:
    """A path, a prediction, and the loss that trains it; see `GeneratorConfig` for the names.

    Attributes:
        path: `linear`, `gvp` or `vp`.
        prediction: `velocity`, `noise` or `score`.
        weighting: `none`, `velocity` or `likelihood`; without effect on velocity, as in the reference.
        times: `uniform` or `lognormal`.
    """

    path: str = "linear"
    prediction: str = "velocity"
    weighting: str = "none"
    times: str = "uniform"

    def __post_init__(self):
        one_of("path", self.path, PATHS)
        one_of("prediction", self.prediction, PREDICTIONS)
        one_of("weighting", self.weighting, WEIGHTINGS)
        one_of("times", self.times, TIMES)

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return alpha, sigma and their derivatives at noise levels t of any shape."""
        return _COEFFICIENTS[self.path](t)

    def training_range(self) -> tuple[float, float]:
        """Return the least and the greatest noise level of the training."""
        if self.path == "vp":
            return _NEAR_VP, 1.0
        return (0.0, 1.0) if self.prediction == "velocity" else (_NEAR, 1 - _NEAR)

    def ode_range(self) -> tuple[float, float]:
        """Return the noise levels where the deterministic samplers begin and end."""
        if self.path == "vp":
            return 1.0, _NEAR
        return (1.0, 0.0) if self.prediction == "velocity" else (1 - _NEAR, _NEAR)

    def sde_start(self, diffusion: str = "sigma") -> float:
        """Return the noise level where the stochastic sampler begins; it ends at 0."""
        one_of("diffusion", diffusion, DIFFUSIONS)
        unbounded = self.path != "vp" and (self.prediction != "velocity" or diffusion == "sbdm")
        return 1 - _NEAR if unbounded else 1.0

    def draw_times(self, b: int, draws: Draws, like: Tensor) -> Tensor:
        """Draw noise levels for training, (b,), with dtype and device of `like`."""
        low, high = self.training_range()
        if self.times == "uniform":
            return low + (high - low) * uniform((b,), draws, like)
        return _level_of_ratio(self.path, normal((b,), draws, like).exp()).clamp(low, high)

    def noisy(self, data: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return x_t and its velocity, both (b, l, d), for data and noise (b, l, d) and noise levels (b,)."""
        c = self.coefficients(t[:, None, None])
        return c.alpha * data + c.sigma * noise, c.d_alpha * data + c.d_sigma * noise

    def loss(self, output: Tensor, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the loss of each latent, (b,): the mean over tokens and channels.

        Args:
            output: The network's output at x_t, (b, l, d).
            data: (b, l, d).
            noise: (b, l, d).
            t: Noise levels (b,).
        """
        c = self.coefficients(t[:, None, None])
        if self.prediction == "velocity":
            return (output - self.noisy(data, noise, t)[1]).square().mean((1, 2))
        error = output - noise if self.prediction == "noise" else output * c.sigma + noise
        error = error.square()
        if self.weighting == "velocity":
            error = error * (c.diffusion / c.sigma).square()
        elif self.weighting == "likelihood":
            error = error * c.diffusion / c.sigma.square()
        return error.mean((1, 2))

    def velocity(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Return the velocity (b, l, d) of what the network gave at x (b, l, d) and noise level t, one number."""
        if self.prediction == "velocity":
            return output
        c = self.coefficients(t)
        noise = output if self.prediction == "noise" else -c.sigma * output
        return (c.d_alpha * x + c.wronskian * noise) / c.alpha

    def score(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Return the gradient of the log density (b, l, d) at x, from the velocity there; t is above 0."""
        c = self.coefficients(t)
        return (c.d_alpha * x - c.alpha * velocity) / (c.wronskian * c.sigma)

    def diffusion(self, name: str, t: Tensor) -> Tensor:
        """Return w of the reverse diffusion at noise levels t, of any shape.

        Raises:
            ValueError: for a name that is not in `DIFFUSIONS`.
        """
        one_of("diffusion", name, DIFFUSIONS)
        return DIFFUSIONS[name](t, self.coefficients(t))
