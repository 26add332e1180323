"""SiT on 1-D latent tokens: a transformer that predicts the velocity of a stochastic interpolant (Sec. 4.1)."""

import torch
from torch import Tensor, nn

from softvq_lib.config import one_of
from softvq_lib.draws import Draws, normal, uniform
from softvq_lib.generators import solvers
from softvq_lib.generators.alignment import alignment, projector
from softvq_lib.generators.guidance import Guidance, check_labels, guided
from softvq_lib.generators.interpolant import Interpolant
from softvq_lib.generators.presets import GeneratorConfig
from softvq_lib.generators.transformer import Ahead, Transformer


class SiT(nn.Module):
    """Generate latents (b, l, d), normalised to mean 0 and variance 1, by class.

    Args:
        config: A `GeneratorConfig` for `sit`, with the latents' tokens, dim and classes.

    Attributes:
        backbone: The transformer, trained on noise levels as times.
        interpolant: Path, prediction and loss.
    """

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        config = config.resolved()
        one_of("generator", config.generator, ("sit",))
        self.config = config
        self.interpolant = Interpolant(config.path, config.prediction, config.weighting, config.times)
        self.backbone = Transformer(
            tokens=config.tokens,
            dim=config.dim,
            out_dim=config.dim,
            classes=config.classes,
            positions=config.positions,
            time_scale=config.time_scale,
            **config.row,
        )
        if config.align_block is not None:
            self.projector = projector(config.row["width"], config.align_width)

    def forward(
        self, x: Tensor, labels: Tensor, draws: Draws, teacher: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of normalised latents, and its terms.

        Args:
            x: Latents (b, l, d).
            labels: (b,).
            draws: For the labels that are dropped (in training only), the noise levels and the noise.
            teacher: Features (b, n, align_width) of the images, where the configuration asks for alignment.

        Returns:
            loss: Scalar.
            terms: Detached scalars: `denoising`, and with alignment `alignment`, unweighted.

        Raises:
            ValueError: for a label out of range, latents or features of another shape, or missing features.
        """
        check_labels(labels, self.config.classes)
        block = self.config.align_block
        if (block is None) != (teacher is None):
            have, want = ("no", "with") if teacher is None else ("a", "without")
            raise ValueError(f"a model {want} alignment got {have} teacher's features: see align_block.")
        b, labels = len(x), labels.long()
        drop = uniform((b,), draws, x) < (self.config.label_dropout if self.training else 0)
        labels = torch.where(drop, self.config.classes, labels)
        t = self.interpolant.draw_times(b, draws, x)
        noise = normal(tuple(x.shape), draws, x)
        noisy, _ = self.interpolant.noisy(x, noise, t)
        output = self.backbone(noisy, t, labels, hidden=block)
        output, h = output if block is not None else (output, None)
        loss = self.interpolant.loss(output, x, noise, t).mean()
        terms = {"denoising": loss.detach()}
        if block is not None:
            align = alignment(self.projector(h), teacher)
            loss = loss + self.config.align_weight * align
            terms["alignment"] = align.detach()
        return loss, terms

    def _times(self, solver: str, steps: int, diffusion: str) -> list[float]:
        one_of("solver", solver, solvers.SOLVERS)
        start, end = self.interpolant.ode_range()
        if solver == "sde":
            start, end = self.interpolant.sde_start(diffusion), 0.0
        return solvers.step_times(solver, steps, start, end)

    def evaluations(
        self,
        steps: int = 50,
        solver: str = "euler",
        *,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        diffusion: str = "sigma",
    ) -> int:
        """Return how often `sample` evaluates the network for each image; a guided evaluation counts as two.

        Raises:
            ValueError: for `adaptive`, which cannot say so in advance, and as `sample` does.
        """
        guidance = Guidance(guidance_scale, guidance_interval)
        levels = solvers.stages(solver, self._times(solver, steps, diffusion))
        return sum(2 if guidance.active(level) else 1 for level in levels)

    @torch.no_grad()
    def sample(
        self,
        labels: Tensor,
        *,
        draws: Draws,
        steps: int = 50,
        solver: str = "euler",
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        diffusion: str = "sigma",
        rtol: float = 1e-3,
        atol: float = 1e-6,
        progress: solvers.Progress | None = None,
    ) -> Tensor:
        """Generate normalised latents (b, l, d) of the classes `labels` (b,).

        Args:
            labels: int64 (b,), 0 to `classes` - 1.
            draws: For the noise. With `Seeds` an image does not depend on the others; with `adaptive`, whose steps
                are chosen for the batch, only up to its tolerance.
            steps: Steps of the solver; `adaptive` ignores them.
            solver: `euler`, `heun`, `adaptive`, or `sde` (Euler-Maruyama, whose last step adds no noise).
            guidance_scale: 1 is no guidance.
            guidance_interval: Least and greatest noise level that is guided.
            diffusion: Noise of `sde`, a name in `DIFFUSIONS`.
            rtol: Relative tolerance of `adaptive`.
            atol: Absolute tolerance of `adaptive`.
            progress: Goes round the steps, such as `tqdm`; `adaptive`, which has no steps to count, ignores it.

        Raises:
            ValueError: for a label out of range, steps below 1, or a solver or guidance that is not allowed.
        """
        check_labels(labels, self.config.classes)
        labels, guidance = labels.long(), Guidance(guidance_scale, tuple(guidance_interval))
        times = self._times(solver, steps, diffusion)
        weight = self.backbone.x_embedder.weight
        everyone = labels.to(weight.device)
        if guidance.scale != 1:
            everyone = torch.cat([everyone, torch.full_like(everyone, self.config.classes)])
        # Each class is embedded once; `rows` says which class an image has.
        classes, rows = torch.unique(everyone, return_inverse=True)
        ahead = Ahead(self.backbone, classes, [] if solver == "adaptive" else times[:-1])

        def velocity(x: Tensor, t: float, rows: Tensor) -> Tensor:
            output = self.backbone.run(x.to(weight.dtype), ahead.at(t), rows)
            return self.interpolant.velocity(output.to(x.dtype), x, torch.tensor(t, dtype=x.dtype))

        field = guided(velocity, rows[: len(labels)], rows[len(labels) :], guidance)
        shape = (len(labels), self.config.tokens, self.config.dim)
        noise = normal(shape, draws, torch.empty((), device=weight.device))
        # Steps add up in float64, where the device has it.
        x = noise if noise.device.type == "mps" else noise.double()
        go_round = progress or iter
        if solver == "sde":
            score, w = self.interpolant.score, self.interpolant.diffusion

            def at(t: float) -> Tensor:
                return torch.tensor(t, dtype=x.dtype)

            x = solvers.euler_maruyama(
                field, x, times, draws, lambda v, x, t: score(v, x, at(t)), lambda t: w(diffusion, at(t)), go_round
            )
        elif solver == "adaptive":
            x = solvers.adaptive(field, x, times, guidance.interval, rtol=rtol, atol=atol)
        else:
            x = (solvers.euler if solver == "euler" else solvers.heun)(field, x, times, go_round)
        return x.to(noise.dtype)
