"""MAR (Li et al. 2024; Sec. 2.2) on 1-D tokens: masked prediction of continuous tokens, a set of them at a time.

An encoder sees the tokens that are known, a decoder all positions, and a small diffusion model (`head`) draws each
unknown token given the decoder's output z at its position. Parameters carry the names of the published code.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from statistics import NormalDist

import torch
from torch import Tensor, nn

from softvq_lib.config import at_least, one_of
from softvq_lib.draws import Draws, Rows, generator_of, normal, uniform
from softvq_lib.generators.guidance import check_labels
from softvq_lib.generators.head import DiffusionHead
from softvq_lib.generators.presets import GeneratorConfig

GUIDANCE_SCHEDULES = ("linear", "constant")

_RATIO = NormalDist(1, 0.25)  # of the share of tokens that is masked in training, on [_LEAST_RATIO, 1]
_LEAST_RATIO = 0.7


def mask_ratio(u: float) -> float:
    """Return the share of masked tokens at quantile u in [0, 1] of the truncated normal distribution, 0.7 to 1."""
    low, high = _RATIO.cdf(_LEAST_RATIO), _RATIO.cdf(1)
    return min(1.0, max(_LEAST_RATIO, _RATIO.inv_cdf(low + u * (high - low))))


def set_sizes(tokens: int, steps: int) -> list[int]:
    """Return how many tokens each step of sampling draws: few at first, as a cosine says, and at least one.

    Raises:
        ValueError: for fewer steps than 1 or more than tokens.
    """
    if not 1 <= steps <= tokens:
        raise ValueError(f"steps={steps!r} is not allowed: each draws at least one token, so give 1 to {tokens}.")
    sizes, masked = [], tokens
    for step in range(1, steps):
        left = max(1, min(masked - 1, math.floor(tokens * math.cos(math.pi / 2 * step / steps))))
        sizes.append(masked - left)
        masked = left
    return [*sizes, masked]


class MAR(nn.Module):
    """Masked generator of l tokens of d channels.

    Args:
        config: With generator="mar"; what is None in it is taken from its size.

    Raises:
        ValueError: for a configuration of another generator, or one without tokens, dim or classes.
    """

    def __init__(self, config: GeneratorConfig):
        from timm.models.vision_transformer import Block

        super().__init__()
        one_of("generator", config.generator, ["mar"])
        self.config = config = config.resolved()
        width, depth, heads = (config.row[name] for name in ("width", "depth", "heads"))
        tokens, buffer = config.tokens, config.buffer
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.fake_latent = nn.Parameter(torch.empty(1, width))  # stands for "no class"
        self.class_emb = nn.Embedding(config.classes, width)

        def blocks() -> nn.ModuleList:
            drop = {"proj_drop": config.dropout, "attn_drop": config.dropout}
            return nn.ModuleList(Block(width, heads, qkv_bias=True, norm_layer=norm, **drop) for _ in range(depth))

        self.z_proj = nn.Linear(config.dim, width)
        self.z_proj_ln = norm(width)
        self.encoder_pos_embed_learned = nn.Parameter(torch.empty(1, buffer + tokens, width))
        self.encoder_blocks = blocks()
        self.encoder_norm = norm(width)
        self.decoder_embed = nn.Linear(width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.decoder_pos_embed_learned = nn.Parameter(torch.empty(1, buffer + tokens, width))
        self.decoder_blocks = blocks()
        self.decoder_norm = norm(width)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.empty(1, tokens, width))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for table in (self.class_emb.weight, *self.parameters(recurse=False)):
            nn.init.normal_(table, std=0.02)
        self.diffloss = DiffusionHead(config.dim, width, config.head_width, config.head_depth)

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that weight decay leaves alone: vectors, biases and the head."""
        return {
            name
            for name, parameter in self.named_parameters()
            if parameter.ndim == 1 or name.endswith(".bias") or name.startswith("diffloss.")
        }

    def forward(
        self, x: Tensor, labels: Tensor, draws: Draws, teacher: None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of predicting masked tokens from the others.

        Of each sample the mean over its masked tokens counts, then the mean over samples: with one ratio of masking
        for the batch that is the mean over all masked tokens.

        Args:
            x: Normalised latents (b, l, d).
            labels: Classes (b,), 0 to classes - 1.
            draws: Source of orders, ratios, noise, times, dropped labels and dropout. Dropout alone depends on the way
                a batch is cut into parts; the same parts draw the same again.
            teacher: Not for MAR.

        Returns:
            loss: Scalar.
            terms: Its parts, `mse` and `vb`, detached scalars.

        Raises:
            ValueError: for latents of another shape, a label out of range, or a teacher.
        """
        config = self.config
        if teacher is not None:
            raise ValueError("MAR has no alignment with a teacher: leave it out, or choose generator='sit' or 'dit'.")
        if x.ndim != 3 or x.shape[1:] != (config.tokens, config.dim):
            raise ValueError(
                f"latents of shape {tuple(x.shape)} do not fit this generator: give (batch, {config.tokens}, "
                f"{config.dim})."
            )
        b, tokens, d = x.shape
        order = uniform((b, tokens), draws, x).argsort(dim=1)
        masked = self._masked(b, draws, x)
        condition = self._classes(labels)
        if self.training:
            dropped = uniform((b,), draws, x) < config.label_dropout
            condition = torch.where(dropped[:, None], self.fake_latent, condition)  # (b, c)

        counts = torch.tensor(masked, device=x.device)[:, None]  # (b, 1)
        mask = order.argsort(dim=1) < counts  # (b, l): a sample's first tokens in its order are masked
        kept = order[:, min(masked) :].sort(dim=1).values  # (b, l - fewest masked)
        # Samples that keep fewer than others are padded with masked tokens, which nobody attends to.
        valid = None if len(set(masked)) == 1 else ~mask.gather(1, kept)
        with _dropout_from(draws, x, self.training and config.dropout > 0):
            z = self._conditions(x, condition, kept, valid)  # (b, l, c)

        # Drawn for all tokens, so that a sample's numbers do not depend on the masks of others.
        repeat = config.head_repeat
        noise = normal((b, repeat, tokens, d), draws, x).transpose(0, 1)[:, mask]  # (r, m, d)
        t = self.diffloss.diffusion.times((b, repeat, tokens), draws, x).transpose(0, 1)[:, mask]  # (r, m)
        share = (1 / (counts * b * repeat)).expand_as(mask)[mask]  # (m,)
        terms = self.diffloss.terms(z[mask], x[mask], noise, t)
        terms = {name: (term * share).sum() for name, term in terms.items()}
        return sum(terms.values()), {name: term.detach() for name, term in terms.items()}

    def _plan(self, steps: int | None, guidance_scale: float, guidance_schedule: str) -> list[tuple[int, float]]:
        """Return each step's number of tokens and guidance scale."""
        one_of("guidance_schedule", guidance_schedule, GUIDANCE_SCHEDULES)
        at_least("guidance_scale", guidance_scale, 0)
        tokens = self.config.tokens
        sizes = set_sizes(tokens, min(64, tokens) if steps is None else steps)
        # The share of known tokens after the step; the last counts as if it left one.
        known = [min(tokens - 1, total) / tokens for total in accumulate(sizes)]
        shares = known if guidance_schedule == "linear" else [1.0] * len(sizes)
        return [(size, 1 + (guidance_scale - 1) * share) for size, share in zip(sizes, shares, strict=True)]

    def evaluations(
        self, steps: int | None = None, *, guidance_scale: float = 1.0, guidance_schedule: str = "linear"
    ) -> int:
        """Return how often `sample` runs encoder and decoder for each image; a guided run counts as two.

        Raises:
            ValueError: as `sample` does.
        """
        return sum(1 if scale == 1 else 2 for _, scale in self._plan(steps, guidance_scale, guidance_schedule))

    @torch.no_grad()
    def sample(
        self,
        labels: Tensor,
        *,
        draws: Draws,
        steps: int | None = None,
        guidance_scale: float = 1.0,
        guidance_schedule: str = "linear",
        temperature: float = 1.0,
        head_steps: int = 100,
        head_solver: str = "ddpm",
        progress: Callable[[Iterable], Iterable] | None = None,
    ) -> Tensor:
        """Generate normalised latents (b, l, d) of the classes `labels` (b,), a set of tokens at each step.

        Each sample's tokens come in an order of its own.

        Args:
            labels: int64 (b,), 0 to `classes` - 1.
            draws: For the orders and the noise. With `Seeds` an image does not depend on the others.
            steps: Sets of tokens, 1 to l; each costs a run of encoder and decoder. None: 64, or l if fewer.
            guidance_scale: 1 is no guidance.
            guidance_schedule: `constant`, or `linear`: the scale grows from 1 with the share of tokens that are known.
            temperature: Factor of the noise that the head's steps add; at least 0.
            head_steps: Evaluations of the head for each set, 1 to 1000.
            head_solver: `ddpm`, `ddim` or `dpm++`, see `GaussianDiffusion`; only the first has a temperature.
            progress: Goes round the steps, such as `tqdm`.

        Raises:
            ValueError: for a label out of range, a setting that is not allowed, or a model in training mode.
        """
        if self.training:
            raise ValueError("the model is in training mode, with its dropout: call eval() before sampling.")
        plan = self._plan(steps, guidance_scale, guidance_schedule)
        head = {"steps": head_steps, "solver": head_solver, "temperature": temperature}
        b, masked = len(labels), self.config.tokens
        like = self.mask_token.new_empty(0, dtype=torch.promote_types(self.mask_token.dtype, torch.float32))
        order = uniform((b, masked), draws, like).argsort(dim=1)
        x = like.new_zeros(b, masked, self.config.dim)
        condition = self._classes(labels)  # (b, c)
        for size, scale in progress(plan) if progress else plan:
            kept, chosen = order[:, masked:].sort(dim=1).values, order[:, masked - size : masked].sort(dim=1).values
            z = condition if scale == 1 else torch.cat([condition, self.fake_latent.expand_as(condition)])
            copies = len(z) // b
            z = self._conditions(x.repeat(copies, 1, 1), z, kept.repeat(copies, 1))  # (copies b, l, c)
            z = _at(z, chosen.repeat(copies, 1)).unflatten(0, (copies, b))  # (copies, b, n, c)
            drawn = self.diffloss.sample(z, draws, scale, **head)  # (b, n, d)
            x = x.scatter(1, chosen[..., None].expand_as(drawn), drawn)
            masked -= size
        return x

    def _classes(self, labels: Tensor) -> Tensor:
        check_labels(labels, self.config.classes)
        return self.class_emb(labels.to(self.class_emb.weight.device))  # (b, c)

    def _masked(self, rows: int, draws: Draws, like: Tensor) -> list[int]:
        """Draw how many tokens of each sample are masked: one number for the batch, or one each."""
        if self.config.mask_per_sample:
            quantiles = uniform((rows,), draws, like).tolist()
        else:
            quantiles = uniform((1,), generator_of(draws), like).tolist() * rows
        return [math.ceil(self.config.tokens * mask_ratio(u)) for u in quantiles]

    def _conditions(self, x: Tensor, condition: Tensor, kept: Tensor, valid: Tensor | None = None) -> Tensor:
        """Run encoder and decoder.

        Args:
            x: Tokens (b, l, d); those that are not kept are not looked at.
            condition: Embedded classes (b, c).
            kept: Positions of known tokens, (b, k).
            valid: Which of these are known indeed, (b, k); None: all.

        Returns:
            z at every position, (b, l, c).
        """
        buffer = self.config.buffer
        slots = condition[:, None].expand(-1, buffer, -1)  # (b, buffer, c)
        h = torch.cat([slots, self.z_proj(_at(x, kept).to(self.z_proj.weight.dtype))], dim=1)  # (b, buffer + k, c)
        positions = self.encoder_pos_embed_learned.expand(len(x), -1, -1)
        positions = torch.cat([positions[:, :buffer], _at(positions[:, buffer:], kept)], dim=1)
        h = self.z_proj_ln(h + positions)
        seen = None
        if valid is not None:
            seen = torch.cat([valid.new_ones(len(x), buffer), valid], dim=1)[:, None, None]  # (b, 1, 1, buffer + k)
        for block in self.encoder_blocks:
            h = block(h, attn_mask=seen)
        h = self.decoder_embed(self.encoder_norm(h))

        slots, known = h[:, :buffer], h[:, buffer:]
        unknown = self.mask_token.to(h.dtype)
        if valid is not None:
            known = torch.where(valid[..., None], known, unknown)
        known = unknown.repeat(len(x), self.config.tokens, 1).scatter(1, kept[..., None].expand_as(known), known)
        h = torch.cat([slots, known], dim=1) + self.decoder_pos_embed_learned  # (b, buffer + l, c)
        for block in self.decoder_blocks:
            h = block(h)
        return self.decoder_norm(h)[:, buffer:] + self.diffusion_pos_embed_learned


def _at(x: Tensor, positions: Tensor) -> Tensor:
    """Take tokens (b, l, e) at positions (b, k): (b, k, e)."""
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


@contextmanager
def _dropout_from(draws: Draws, like: Tensor, active: bool):
    """Let dropout, which knows torch's global generator alone, follow `draws`; the global state stays as it was."""
    generator = generator_of(draws)
    if not active or generator is None:
        yield
        return
    seed = torch.randint(2**62, (1,), generator=generator, device=generator.device).item()
    if isinstance(draws, Rows):
        seed += draws.start  # parts of one batch must not share their masks
    with torch.random.fork_rng([like.device] if like.is_cuda else []):
        # torch.manual_seed would reach for every accelerator, which a model on the CPU has no need of.
        (torch.default_generator if like.device.type == "cpu" else torch).manual_seed(seed)
        yield
