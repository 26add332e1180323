"""Diffusion-loss head of MAR (Sec. 2.2): an MLP that denoises one token given its condition z."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softvq_lib.draws import Draws
from softvq_lib.generators.gaussian import GaussianDiffusion
from softvq_lib.generators.transformer import TimeEmbedder


def _adaln(width: int, parts: int) -> nn.Sequential:
    # The SiLU is applied once for all blocks; it stands here for the parameter's published name.
    return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))


class _Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = _adaln(width, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation[1](y).chunk(3, dim=-1)
        return torch.addcmul(x, gate, self.mlp(torch.addcmul(shift, self.in_ln(x), 1 + scale)))


class _Final(nn.Module):
    def __init__(self, width: int, out: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = _adaln(width, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation[1](y).chunk(2, dim=-1)
        return self.linear(torch.addcmul(shift, self.norm_final(x), 1 + scale))


class HeadNet(nn.Module):
    """Predict the noise in a token and the interpolation of its log variance.

    Args:
        dim: Channels d of a token.
        condition: Channels c of the condition.
        width: Width of the MLP.
        depth: Residual blocks.
    """

    def __init__(self, dim: int, condition: int, width: int, depth: int):
        super().__init__()
        self.time_embed = TimeEmbedder(width)
        self.cond_embed = nn.Linear(condition, width)
        self.input_proj = nn.Linear(dim, width)
        self.res_blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.final_layer = _Final(width, 2 * dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for i in (0, 2):
            nn.init.normal_(self.time_embed.mlp[i].weight, std=0.02)
        # Blocks start as the identity and the output at 0.
        for block in (*self.res_blocks, self.final_layer):
            nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Predict (..., 2 d); leading axes broadcast, so that what several tokens share is embedded once.

        Args:
            x: Noisy tokens (..., d).
            t: Times (...), integers in 0 to 999.
            condition: `cond_embed` of the conditions z, (..., width).
        """
        y = F.silu(self.time_embed(t.flatten()).view(*t.shape, -1) + condition)
        x = self.input_proj(x)
        for block in self.res_blocks:
            x = block(x, y)
        return self.final_layer(x, y)


class DiffusionHead(nn.Module):
    """The head's network with its diffusion process: cosine schedule of 1000 steps.

    Args:
        dim: Channels d of a token.
        condition: Channels c of the condition.
        width: Width of the MLP.
        depth: Its residual blocks.

    Attributes:
        diffusion: The process. With its `full_range` samples begin at timestep 999 as the published code's do; they
            begin a little later otherwise, since a head trained for less than very long fails there.
    """

    def __init__(self, dim: int, condition: int, width: int, depth: int):
        super().__init__()
        self.net = HeadNet(dim, condition, width, depth)
        self.diffusion = GaussianDiffusion("cosine")

    def terms(self, z: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> dict[str, Tensor]:
        """Return the terms of each token's loss, (r, m), for r draws of noise and time on m tokens.

        Args:
            z: Conditions (m, c).
            x0: Tokens (m, d).
            noise: Standard normal (r, m, d).
            t: (r, m), integers in 0 to 999.
        """
        x0 = x0.expand_as(noise)  # (r, m, d)
        prediction = self.net(self.diffusion.add_noise(x0, noise, t), t, self.net.cond_embed(z))  # (r, m, 2 d)
        return self.diffusion.terms(prediction, x0, noise, t)

    def sample(self, z: Tensor, draws: Draws, guidance_scale: float, **settings: object) -> Tensor:
        """Draw tokens (b, n, d).

        Args:
            z: Conditions (1, b, n, c), or for guidance (2, b, n, c): with the class and without it.
            draws: Source of the noise.
            guidance_scale: Factor of the difference that the class makes to the predicted noise.
            settings: For `GaussianDiffusion.sample`: steps, solver and temperature.
        """
        dim = self.net.input_proj.in_features
        condition = self.net.cond_embed(z)  # (1 or 2, b, n, width)

        def model(x: Tensor, t: Tensor) -> Tensor:
            prediction = self.net(x.to(z.dtype), t[:1], condition)  # (1 or 2, b, n, 2 d); all rows are at one time
            if len(prediction) == 1:
                return prediction[0]
            (eps, v), (eps_null, _) = (part.split(dim, dim=-1) for part in prediction)
            return torch.cat([eps_null + guidance_scale * (eps - eps_null), v], dim=-1)

        return self.diffusion.sample(model, (*z.shape[1:3], dim), draws, z, **settings)
