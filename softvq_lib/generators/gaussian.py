"""Gaussian diffusion in discrete time (Eq. 3): schedules, the hybrid loss and samplers, as DiT and MAR use them.

x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps with a_t the product of 1 - beta up to t = 0 ... T-1 (Ho et al. 2020). A
network sees x_t and t and returns eps and v on the last axis; v places the log variance of a step between that of the
posterior q(x_{t-1}|x_t, x_0) at -1 and log beta_t at 1 ("learned range", Nichol & Dhariwal 2021). Its loss is the
squared error of eps plus the variational bound in bits per channel, where the bound moves v alone.

The bound's term at t = 0 is the likelihood of 8-bit pixels in the published code. Latents are no pixels, and nothing
that this term trains is ever used: the mean is out of the bound's reach, and the last step of every sampler adds no
noise. So it is left out, unless `pixel_likelihood` asks for the published number.

Samplers: ancestral (`ddpm`), DDIM (`ddim`, Song et al. 2021) and second-order multistep DPM-Solver++ (`dpm++`, Lu et
al. 2022). n steps cost n evaluations. Public noise level: t / (T - 1), 0 for data and 1 for noise.

At its last timesteps `cosine` leaves next to nothing of the data: x_999 is divided by 5e-5 to tell x_0. A small network
with an error of 0.06 in eps there drew ancestral samples a thousand times too large in 100 steps; begun at 995 they had
the right variance. So samplers begin at the last timestep with half log signal-to-noise of -5.1 at least, which is 999
for `linear` and 995 for `cosine`; `full_range` is the published way, for networks trained long enough.
"""

import math
from collections.abc import Callable, Iterable
from functools import cached_property

import torch
from torch import Tensor

from softvq_lib.config import at_least, one_of
from softvq_lib.draws import Draws, normal, uniform

SCHEDULES = ("linear", "cosine")
SOLVERS = ("ddpm", "ddim", "dpm++")

_LEAST_SIGNAL = -5.1  # half the log signal-to-noise where samplers begin; diffusers' value


def betas(schedule: str, steps: int) -> Tensor:
    """Return the noise added at each step, (steps,) in float64.

    `linear` goes from 1e-4 to 0.02 at 1000 steps, in proportion at others; `cosine` is Nichol & Dhariwal's with offset
    0.008, at most 0.999.

    Raises:
        ValueError: for an unknown schedule, or so few steps that a linear beta reaches 1.
    """
    one_of("schedule", schedule, SCHEDULES)
    if schedule == "cosine":
        edges = torch.arange(steps + 1, dtype=torch.float64) / steps
        a = torch.cos((edges + 0.008) / 1.008 * math.pi / 2) ** 2  # (steps + 1,)
        return (1 - a[1:] / a[:-1]).clamp(max=0.999)
    at_least("steps", steps, 21)
    scale = 1000 / steps
    return torch.linspace(scale * 1e-4, scale * 0.02, steps, dtype=torch.float64)


def respace(steps: int | str, total: int) -> list[int]:
    """Choose timesteps, ascending, as the published code does.

    Args:
        steps: How many. A number spreads them evenly from 0 to total - 1 (250 of 1000: 0, 4, 8, 12, 16, 20, ... 995,
            999); 1 is the last. "ddim50" takes every 20th from 0.
        total: Number of timesteps T.

    Raises:
        ValueError: for a number below 1 or above `total`, or one for "ddim" that no stride gives.
    """
    text = str(steps)
    number = text.removeprefix("ddim")
    if isinstance(steps, bool) or not number.isdecimal() or not 1 <= int(number) <= total:
        raise ValueError(f"steps={steps!r} is not allowed: give 1 to {total}, or such a number after 'ddim'.")
    count = int(number)
    if number != text:
        strided = {len(range(0, total, stride)): range(0, total, stride) for stride in range(total, 0, -1)}
        if count not in strided:
            near = min(strided, key=lambda other: abs(other - count))
            raise ValueError(f"steps={steps!r}: no stride takes {count} of {total} timesteps; 'ddim{near}' exists.")
        return list(strided[count])
    if count == 1:
        return [total - 1]
    stride, position, chosen = (total - 1) / (count - 1), 0.0, []
    for _ in range(count):
        chosen.append(round(position))
        position += stride
    return chosen


class Schedule:
    """Tables over timesteps, in float64.

    Args:
        alpha_bar: a_t, (T,), falling.
        timesteps: Which of the training's timesteps these are, ascending. None: all of them.

    Attributes:
        previous: a of the step before, 1 before the first, (T,).
        beta: 1 - a_t / a_{t-1}, (T,).
    """

    def __init__(self, alpha_bar: Tensor, timesteps: list[int] | None = None):
        self.timesteps = list(range(len(alpha_bar))) if timesteps is None else timesteps
        self.alpha_bar = alpha_bar
        self.previous = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
        self.beta = 1 - alpha_bar / self.previous

    @cached_property
    def posterior_variance(self) -> Tensor:
        """Variance of q(x_{t-1}|x_t, x_0), (T,); 0 at the first."""
        return self.beta * (1 - self.previous) / (1 - self.alpha_bar)

    @cached_property
    def log_variance(self) -> Tensor:
        """Bounds of the learned log variance, (2, T): the posterior's, at the first step the second's, and log beta."""
        lower = self.posterior_variance.clone()
        lower[:1] = lower[1:2]
        return torch.stack([lower, self.beta]).log()

    def at(self, timesteps: list[int]) -> "Schedule":
        """Return the schedule that visits only these timesteps, at the noise levels they have."""
        return Schedule(self.alpha_bar[timesteps], timesteps)


class GaussianDiffusion:
    """A diffusion process whose network predicts eps and v; it has no parameters.

    Tensors carry channels last: data (b, ..., c) or rows (r, c), predictions the same with 2c.

    Args:
        schedule: One of `SCHEDULES`.
        steps: Number of timesteps T.
        pixel_likelihood: Use the published 8-bit likelihood as the bound's term at t = 0; else that term is 0.
        full_range: Begin sampling at T - 1 as the published code does, however little signal is left there.

    Raises:
        ValueError: for a value that is not allowed.
    """

    def __init__(
        self, schedule: str = "linear", steps: int = 1000, *, pixel_likelihood: bool = False, full_range: bool = False
    ):
        at_least("steps", steps, 2)
        self.schedule = Schedule((1 - betas(schedule, steps)).cumprod(0))
        self.steps = steps
        self.pixel_likelihood, self.full_range = pixel_likelihood, full_range
        self._tables: dict[tuple, Tensor] = {}

    def noise_level(self, t: Tensor | int) -> Tensor | float:
        """Return t / (T - 1) in [0, 1], of the shape of t: 0 for data, 1 for noise."""
        return t / (self.steps - 1)

    def times(self, shape: tuple[int, ...], draws: Draws, like: Tensor) -> Tensor:
        """Draw timesteps (b, ...), uniform over 0 ... T-1: int64 on the device of `like`."""
        u = uniform(shape, draws, like.new_empty(0, dtype=torch.float32))
        return (u * self.steps).long().clamp(max=self.steps - 1)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t, in fp32 at least.

        Args:
            x0: (b, ..., c), normalised to variance 1.
            noise: Standard normal, of that shape.
            t: (b,), or with more of the leading axes, integers in [0, T).
        """
        signal, sigma, *_ = self._at(t, x0)
        return signal * x0 + sigma * noise

    def loss(self, prediction: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the hybrid loss of each row, of the shape of t: the sum of `terms`."""
        return sum(self.terms(prediction, x0, noise, t).values())

    def terms(self, prediction: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> dict[str, Tensor]:
        """Return the loss's terms for each row, of the shape of t, in fp32 at least.

        Args:
            prediction: eps and v, (b, ..., 2c), of the network at `add_noise(x0, noise, t)` and t.
            x0: (b, ..., c).
            noise: What was added, (b, ..., c).
            t: (b,), or with more of the leading axes, integers in [0, T).

        Returns:
            mse: Mean squared error of eps.
            vb: KL(q(x_{t-1}|x_t, x_0) || p(x_{t-1}|x_t)) in bits per channel, without gradient to eps.
        """
        _, _, gap, weight = self._at(t, x0)
        eps, v = split(prediction, x0)
        error = (noise - eps).to(gap.dtype)
        # Of both Gaussians' log variances only the difference counts; the means differ by a multiple of the error.
        excess = gap * (v.to(gap.dtype) + 1) / 2
        kl = (excess + torch.expm1(-excess) + weight * error.detach() ** 2 * torch.exp(-excess)) / 2
        over = tuple(range(t.ndim, x0.ndim))
        vb = kl.mean(over)
        first = -self._pixel_log_likelihood(x0, error.detach(), excess).mean(over) if self.pixel_likelihood else 0.0
        return {"mse": (error**2).mean(over), "vb": torch.where(t == 0, first, vb) / math.log(2)}

    def _pixel_log_likelihood(self, x0: Tensor, error: Tensor, excess: Tensor) -> Tensor:
        """Log probability at t = 0 of the bin of width 2/255 around x_0 in [-1, 1], its outermost bins being open."""
        a, lower = self.schedule.alpha_bar[0].item(), self.schedule.log_variance[0, 0].item()
        offset = -math.sqrt((1 - a) / a) * error  # x_0 minus its prediction
        precision = torch.exp(-(lower + excess) / 2)
        above, below = (_cdf(precision * (offset + edge)) for edge in (1 / 255, -1 / 255))
        inside = torch.where(x0 < -0.999, above, torch.where(x0 > 0.999, 1 - below, above - below))
        return inside.clamp(min=1e-12).log()

    def _at(self, t: Tensor, like: Tensor) -> Tensor:
        """Return sqrt(a), sqrt(1 - a), log variance range and weight of the squared error: (4, b, 1, ...)."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        key = (like.device, dtype)
        if key not in self._tables:
            s = self.schedule
            gap = s.log_variance[1] - s.log_variance[0]
            weight = s.beta / ((1 - s.beta) * (1 - s.previous))  # squared factor of the means' distance / variance
            weight[0] = 0  # no posterior there
            tables = torch.stack([s.alpha_bar.sqrt(), (1 - s.alpha_bar).sqrt(), gap, weight])
            self._tables[key] = tables.to(dtype).to(like.device)
        return self._tables[key][:, t].reshape(4, *t.shape, *[1] * (like.ndim - t.ndim))

    def sampling(self, steps: int | str, solver: str) -> Schedule:
        """Return the schedule that a solver visits: one entry for each evaluation of the network.

        Raises:
            ValueError: for an unknown solver, or steps that `respace` refuses.
        """
        one_of("solver", solver, SOLVERS)
        timesteps, strided = respace(steps, self.steps), str(steps).startswith("ddim")
        count = len(timesteps)
        if solver == "dpm++" and (strided or count == self.steps):
            raise ValueError(f"steps={steps!r} is not for solver='dpm++': give a number from 1 to {self.steps - 1}.")
        if strided:
            return self.schedule.at(timesteps)
        a = self.schedule.alpha_bar
        told = self.steps if self.full_range else int(((a / (1 - a)).log() / 2 >= _LEAST_SIGNAL).sum())
        if solver != "dpm++":
            return self.schedule.at(respace(steps, max(told, count)))
        # Evenly from the last to 0, which is where the last step leads.
        last = max(told - 1, count)
        return self.schedule.at([round(i * (last / count)) for i in range(1, count + 1)])

    @torch.no_grad()
    def sample(
        self,
        model: Callable[[Tensor, Tensor], Tensor],
        shape: tuple[int, ...],
        draws: Draws,
        like: Tensor,
        *,
        steps: int | str = 250,
        solver: str = "ddpm",
        temperature: float = 1.0,
        eta: float = 0.0,
        progress: Callable[[Iterable], Iterable] | None = None,
    ) -> Tensor:
        """Generate from noise.

        Args:
            model: From x (b, ..., c) and t (b,) int64, all the same, to eps and v (b, ..., 2c).
            shape: (b, ..., c).
            draws: Source of the first noise and of each step's.
            like: Gives device and dtype, which is fp32 at least.
            steps: Evaluations of the model, 1 to T (`dpm++`: to T - 1), or "ddim50" for `respace`'s strides.
            solver: One of `SOLVERS`.
            temperature: Factor of the noise that a step adds, not of the first noise; at least 0.
            eta: Noise of `ddim` in [0, 1]: 0 adds none, 1 as much as `ddpm` at its lower variance.
            progress: Wraps the iterable of steps, as tqdm does.

        Returns:
            (b, ..., c).

        Raises:
            ValueError: for a value that is not allowed.
        """
        schedule = self.sampling(steps, solver)
        at_least("temperature", temperature, 0)
        if not 0 <= eta <= 1:
            raise ValueError(f"eta={eta!r} is not allowed: give a number from 0 to 1.")
        like = like.new_empty(0, dtype=torch.promote_types(like.dtype, torch.float32))
        x = normal(shape, draws, like)
        order = range(len(schedule.timesteps) - 1, -1, -1)
        before = None
        for i in progress(order) if progress else order:
            t = torch.full(shape[:1], schedule.timesteps[i], device=like.device)
            eps, v = (part.to(x.dtype) for part in split(model(x, t), x))
            if solver == "dpm++":
                x, before = _multistep(schedule, i, x, eps, before)
                continue
            mean, std = _ddpm(schedule, i, x, eps, v) if solver == "ddpm" else _ddim(schedule, i, x, eps, eta)
            x = mean if std is None else mean + temperature * std * normal(shape, draws, like)
        return x


def split(prediction: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Split (b, ..., 2c) into eps and v, each shaped as x (b, ..., c).

    Raises:
        ValueError: for another shape.
    """
    if prediction.shape != (*x.shape[:-1], 2 * x.shape[-1]):
        raise ValueError(
            f"a prediction of shape {tuple(prediction.shape)} for data of shape {tuple(x.shape)}: the network must "
            "return eps and v, twice the channels on the last axis."
        )
    return prediction.chunk(2, dim=-1)


def _ddpm(s: Schedule, i: int, x: Tensor, eps: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    """Mean and deviation of an ancestral step; no deviation at the last."""
    beta, a = s.beta[i].item(), s.alpha_bar[i].item()
    mean = (x - beta / math.sqrt(1 - a) * eps) / math.sqrt(1 - beta)
    if i == 0:
        return mean, None
    lower, upper = s.log_variance[:, i].tolist()
    return mean, torch.exp((lower + (upper - lower) * (v + 1) / 2) / 2)


def _ddim(s: Schedule, i: int, x: Tensor, eps: Tensor, eta: float) -> tuple[Tensor, float | None]:
    """Mean and deviation of a DDIM step; no deviation at the last or at eta = 0."""
    a, previous = s.alpha_bar[i].item(), s.previous[i].item()
    variance = eta**2 * s.posterior_variance[i].item()
    x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
    mean = math.sqrt(previous) * x0 + math.sqrt(max(0.0, 1 - previous - variance)) * eps
    return mean, math.sqrt(variance) if variance else None


def _multistep(
    s: Schedule, i: int, x: Tensor, eps: Tensor, before: tuple[float, Tensor] | None
) -> tuple[Tensor, tuple[float, Tensor]]:
    """A step of DPM-Solver++(2M): x_{t-1}, and what the next step needs of this one."""
    a, previous = s.alpha_bar[i].item(), s.previous[i].item()
    x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
    if i == 0:
        return x0, (0.0, x0)
    h = (math.log(previous / (1 - previous)) - math.log(a / (1 - a))) / 2
    target = x0
    if before is not None:
        h_before, x0_before = before
        target = x0 + h / (2 * h_before) * (x0 - x0_before)
    x = math.sqrt((1 - previous) / (1 - a)) * x - math.sqrt(previous) * math.expm1(-h) * target
    return x, (h, x0)


def _cdf(x: Tensor) -> Tensor:
    """Standard normal distribution function, in the tanh approximation of the published code."""
    return (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
