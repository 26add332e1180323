"""DiT on 1-D latent tokens: the transformer of SiT with a Gaussian diffusion in discrete time (Sec. 4.1)."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from softvq_lib.config import one_of
from softvq_lib.draws import Draws, normal, uniform
from softvq_lib.generators.alignment import alignment, projector
from softvq_lib.generators.gaussian import GaussianDiffusion
from softvq_lib.generators.guidance import Guidance, check_labels, guided
from softvq_lib.generators.presets import GeneratorConfig
from softvq_lib.generators.transformer import Ahead, Transformer


class DiT(nn.Module):
    """Generate latents (b, l, d), normalised to mean 0 and variance 1, by class.

    Args:
        config: A `GeneratorConfig` for `dit`, with the latents' tokens, dim and classes.

    Attributes:
        backbone: The transformer; it predicts eps and v, (b, l, 2d), from timesteps 0 to 999.
        diffusion: Schedule, loss and samplers.
    """

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        config = config.resolved()
        one_of("generator", config.generator, ("dit",))
        self.config = config
        self.diffusion = GaussianDiffusion(config.schedule)
        self.backbone = Transformer(
            tokens=config.tokens,
            dim=config.dim,
            out_dim=2 * config.dim,
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
            draws: For the labels that are dropped (in training only), the timesteps and the noise.
            teacher: Features (b, n, align_width) of the images, where the configuration asks for alignment.

        Returns:
            loss: Scalar.
            terms: Detached scalars: `mse` of the noise, the bound `vb` in bits per channel, and with alignment
                `alignment`, unweighted.

        Raises:
            ValueError: for a label out of range, latents or features of another shape, or missing features.
        """
        check_labels(labels, self.config.classes)
        block = self.config.align_block
        if (block is None) != (teacher is None):
            have, want = ("no", "with") if teacher is None else ("a", "without")
            raise ValueError(f"a model {want} alignment got {have} teacher's features: see align_block.")
        b = len(x)
        drop = uniform((b,), draws, x) < (self.config.label_dropout if self.training else 0)
        labels = torch.where(drop, self.config.classes, labels)
        t = self.diffusion.times((b,), draws, x)
        noise = normal(tuple(x.shape), draws, x)
        output = self.backbone(self.diffusion.add_noise(x, noise, t), t, labels, hidden=block)
        output, h = output if block is not None else (output, None)
        terms = {name: term.mean() for name, term in self.diffusion.terms(output, x, noise, t).items()}
        loss = terms["mse"] + terms["vb"]
        if block is not None:
            terms["alignment"] = alignment(self.projector(h), teacher)
            loss = loss + self.config.align_weight * terms["alignment"]
        return loss, {name: term.detach() for name, term in terms.items()}

    def evaluations(
        self,
        steps: int | str = 250,
        solver: str = "ddpm",
        *,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
    ) -> int:
        """Return how often `sample` evaluates the network for each image; a guided evaluation counts as two.

        Raises:
            ValueError: as `sample` does.
        """
        guidance = Guidance(guidance_scale, tuple(guidance_interval))
        times = self.diffusion.sampling(steps, solver).timesteps
        return sum(2 if guidance.active(self.diffusion.noise_level(t)) else 1 for t in times)

    @torch.no_grad()
    def sample(
        self,
        labels: Tensor,
        *,
        draws: Draws,
        steps: int | str = 250,
        solver: str = "ddpm",
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        progress: Callable[[Iterable], Iterable] | None = None,
    ) -> Tensor:
        """Generate normalised latents (b, l, d) of the classes `labels` (b,).

        Guidance moves eps and leaves the variance alone.

        Args:
            labels: int64 (b,), 0 to `classes` - 1.
            draws: For the noise. With `Seeds` an image does not depend on the others.
            steps: 1 to 1000 (`dpm++`: below), each one evaluation of the network; or "ddim50", for 50 strides of 20.
            solver: `ddpm` (ancestral), `ddim` (without noise) or `dpm++` (second order, for 20 to 50 steps).
            guidance_scale: 1 is no guidance.
            guidance_interval: Least and greatest noise level t / 999 that is guided.
            progress: Goes round the steps, such as `tqdm`.

        Raises:
            ValueError: for a label out of range, or steps, a solver or guidance that are not allowed.
        """
        check_labels(labels, self.config.classes)
        guidance = Guidance(guidance_scale, tuple(guidance_interval))
        times = self.diffusion.sampling(steps, solver).timesteps[::-1]
        weight = self.backbone.x_embedder.weight
        null = torch.full_like(labels, self.config.classes)
        # Each class is embedded once; `rows` says which class an image has.
        classes, rows = torch.unique(torch.cat([labels, null]).to(weight.device), return_inverse=True)
        ahead = Ahead(self.backbone, classes, times)

        def network(x: Tensor, t: float, rows: Tensor) -> Tensor:
            return self.backbone.run(x.to(weight.dtype), ahead.at(t), rows).to(x.dtype)

        predict = guided(network, *rows.chunk(2), guidance, channels=self.config.dim)
        coming = iter(times)  # read here and not from t, which may be on a device that would be waited for

        def model(x: Tensor, t: Tensor) -> Tensor:
            now = next(coming)
            return predict(x, now, self.diffusion.noise_level(now))

        shape = (len(labels), self.config.tokens, self.config.dim)
        return self.diffusion.sample(model, shape, draws, weight, steps=steps, solver=solver, progress=progress)
