"""The transformer of SiT and DiT on 1-D latent tokens: patch size 1, class and time by adaLN-zero (Sec. 4.1).

Parameters have the names of the published weights of both, so that those load as they are; `out_dim` is d for SiT and
2 d for DiT, whose second half is the variance.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from softvq_lib.generators.linear import Linear

_EPSILON = 1e-6  # of every layer norm
_FREQUENCIES = 256  # numbers that a time becomes before its two layers
_ROWS = 64  # conditionings of one matrix product when a sampler's are computed ahead


def sincos_positions(positions: Tensor, width: int) -> Tensor:
    """Return the fixed embedding of positions (n,): sines, then cosines, of width / 2 frequencies, (n, c)."""
    frequencies = 10000 ** -(torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angles = positions.double()[:, None] * frequencies  # (n, c / 2)
    return torch.cat([angles.sin(), angles.cos()], 1).float()


def grid_positions(side: int, width: int) -> Tensor:
    """Return fixed embeddings of a square of tokens in raster order, half for the column, half for the row, (l, c)."""
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.cat([sincos_positions(axis.flatten(), width // 2) for axis in (column, row)], 1)


def patchify(latents: Tensor, patch: int) -> Tensor:
    """Cut 2-D latents (b, d, height, width) into tokens of patch x patch positions, (b, l, d patch^2)."""
    return rearrange(latents, "b d (i p) (j q) -> b (i j) (d p q)", p=patch, q=patch)  # (b, l, d patch^2)


def unpatchify(tokens: Tensor, patch: int) -> Tensor:
    """Undo `patchify` for square latents: (b, l, d patch^2) to (b, d, height, width)."""
    side = math.isqrt(tokens.shape[1])
    return rearrange(tokens, "b (i j) (d p q) -> b d (i p) (j q)", i=side, p=patch, q=patch)  # (b, d, height, width)


class TimeEmbedder(nn.Module):
    """Embed times (n,) as cosines, then sines, of 128 frequencies and two layers, (n, c)."""

    def __init__(self, width: int, scale: float = 1.0):
        super().__init__()
        self.scale = scale
        self.mlp = nn.Sequential(Linear(_FREQUENCIES, width), nn.SiLU(), Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """Embed times (b,), from 0 for data to 1 for noise, as (b, c)."""
        half = _FREQUENCIES // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
        angles = self.scale * t.float()[:, None] * frequencies  # (n, 128)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], 1).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """A vector for each class; the row after the last class stands for "no class"."""

    def __init__(self, classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:
        """Embed labels (b,) as (b, c)."""
        return self.embedding_table(labels)


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=_EPSILON), 1 + scale)


def _adaln(width: int, parts: int) -> nn.Sequential:
    # The SiLU is applied once for all blocks; it stands here for the parameter's published name.
    return nn.Sequential(nn.SiLU(), Linear(width, parts * width))


class Attention(nn.Module):
    """Self-attention of (b, l, c), without normalisation of queries and keys."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attend among the tokens of x (b, l, c); same shape."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (b, h, l, c / h) each
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # (b, l, c)


class MLP(nn.Module):
    """Two layers with a GELU (tanh form) and four times the width between them."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = Linear(width, 4 * width)
        self.fc2 = Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map each token of x (b, l, c) by itself; same shape."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the conditioning."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = MLP(width)
        self.adaLN_modulation = _adaln(width, 6)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """Map x (b, l, c) under its modulation (b, 1, 6 c): shift, scale and gate of attention, then of the MLP."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation.chunk(6, -1)  # (b, 1, c) each
        x = torch.addcmul(x, gate, self.attn(_modulated(x, shift, scale)))
        return torch.addcmul(x, mlp_gate, self.mlp(_modulated(x, mlp_shift, mlp_scale)))


class FinalLayer(nn.Module):
    """Shift, scale and map to the output channels."""

    def __init__(self, width: int, out_dim: int):
        super().__init__()
        self.linear = Linear(width, out_dim)
        self.adaLN_modulation = _adaln(width, 2)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """Map x (b, l, c) under its modulation (b, 1, 2 c), shift and scale, to (b, l, out_dim)."""
        return self.linear(_modulated(x, *modulation.chunk(2, -1)))


class Transformer(nn.Module):
    """Map noisy latents, their time and class to the prediction.

    Args:
        tokens: Latent tokens l.
        dim: Latent channels d.
        out_dim: Channels of the output.
        classes: Number of classes; label `classes` is "no class".
        depth: Number of blocks.
        width: Transformer width c.
        heads: Attention heads h, a divisor of the width.
        positions: `sincos`, `learned` or `grid` (a square of tokens).
        time_scale: Factor on the time.

    Attributes:
        checkpointing: Keep only the input of each block for the backward pass and compute the rest again. Off.
    """

    def __init__(
        self,
        *,
        tokens: int,
        dim: int,
        out_dim: int,
        classes: int,
        depth: int,
        width: int,
        heads: int,
        positions: str = "sincos",
        time_scale: float = 1.0,
    ):
        super().__init__()
        self.tokens, self.dim, self.classes = tokens, dim, classes
        self.checkpointing = False
        self.x_embedder = Linear(dim, width)
        self.t_embedder = TimeEmbedder(width, time_scale)
        self.y_embedder = LabelEmbedder(classes, width)
        if positions == "learned":
            self.pos_embed = nn.Parameter(torch.empty(1, tokens, width))
        else:
            grid = positions == "grid"
            fixed = grid_positions(math.isqrt(tokens), width) if grid else sincos_positions(torch.arange(tokens), width)
            self.register_buffer("pos_embed", fixed[None])  # (1, l, c)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final_layer = FinalLayer(width, out_dim)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for weight in (self.t_embedder.mlp[0].weight, self.t_embedder.mlp[2].weight):
            nn.init.normal_(weight, std=0.02)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        if isinstance(self.pos_embed, nn.Parameter):
            nn.init.normal_(self.pos_embed, std=0.02)
        # Zero: each block begins as the identity, and the output as 0.
        for linear in (*(block.adaLN_modulation[1] for block in self.blocks), self.final_layer.adaLN_modulation[1]):
            nn.init.zeros_(linear.weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def modulations(self, t: Tensor, y: Tensor) -> list[Tensor]:
        """Return shifts, scales and gates of all blocks, (r, 6 c) each, and of the final layer, (r, 2 c).

        Args:
            t: Times (r,), or (1,) for all rows.
            y: Labels (r,), `classes` for "no class".
        """
        c = F.silu(self.t_embedder(t) + self.y_embedder(y))  # (r, c)
        return [layer.adaLN_modulation[1](c) for layer in (*self.blocks, self.final_layer)]

    def run(
        self, x: Tensor, modulations: list[Tensor], rows: Tensor | None = None, *, hidden: int | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Do what `forward` does with `modulations` at hand.

        Args:
            x: Noisy latents (b, l, d).
            modulations: What `modulations` returned, r rows or one for all.
            rows: The row of each latent, (b,). None: they correspond.
            hidden: As in `forward`.

        Raises:
            ValueError: for latents of another shape.
        """
        if x.ndim != 3 or x.shape[1:] != (self.tokens, self.dim):
            raise ValueError(
                f"latents of shape {tuple(x.shape)} do not fit this generator: give (batch, {self.tokens}, {self.dim})."
            )
        x = self.x_embedder(x) + self.pos_embed
        h = None
        for number, (layer, m) in enumerate(zip((*self.blocks, self.final_layer), modulations, strict=True), 1):
            m = (m if rows is None else m[rows])[:, None]  # (b, 1, 6 c)
            if self.checkpointing and torch.is_grad_enabled() and layer is not self.final_layer:
                x = checkpoint(layer, x, m, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, m)
            if number == hidden:
                h = x
        return x if hidden is None else (x, h)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, *, hidden: int | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Predict from noisy latents.

        Args:
            x: (b, l, d).
            t: Times (b,), or (1,) for the whole batch.
            y: Labels (b,), `classes` for "no class".
            hidden: Block, from 1, whose output is wanted too.

        Returns:
            The prediction (b, l, out_dim); with `hidden` also that block's output (b, l, c).

        Raises:
            ValueError: for latents of another number of tokens or channels, or a block that is not there.
        """
        if hidden is not None and not 1 <= hidden <= len(self.blocks):
            raise ValueError(f"hidden={hidden} is no block of this model: choose 1 to {len(self.blocks)}.")
        return self.run(x, self.modulations(t, y), hidden=hidden)


class Ahead:
    """Modulations of one sampling run: by time, once for each class and for several of the coming times together.

    Where few images are sampled, reading the weights that make them would be a good part of each step. What is known
    is forgotten as soon as a time beyond it is asked for.

    Args:
        transformer: Whose modulations.
        classes: Distinct labels (r,).
        times: Times (n,) in the order of their use.
    """

    def __init__(self, transformer: Transformer, classes: Tensor, times: Sequence[float] = ()):
        self.transformer, self.classes = transformer, classes
        self.coming = list(times)
        self.known: dict[float, list[Tensor]] = {}

    def at(self, t: float) -> list[Tensor]:
        """Return the modulations at time t, a row a class: (r, 6 c) of each block, (r, 2 c) of the last layer."""
        if t not in self.known:
            r = len(self.classes)
            first = self.coming.index(t) if t in self.coming else len(self.coming)
            now = self.coming[first : first + max(1, _ROWS // r)] or [t]
            del self.coming[: first + len(now)]
            times = torch.tensor(now, device=self.classes.device, dtype=torch.float32).repeat_interleave(r)
            every = self.transformer.modulations(times, self.classes.repeat(len(now)))  # (len(now) r, 6 c) each
            self.known = {s: [m[i * r : (i + 1) * r] for m in every] for i, s in enumerate(now)}
        return self.known[t]
