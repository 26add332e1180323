"""Transformer encoder and decoder on image patches and 1-D latent tokens (Sec. 3.1, Fig. 2), built on timm."""

import torch
from einops import rearrange
from torch import Tensor, nn


def _vit(name: str, image_size: int, patch_size: int, overrides: dict, pretrained: bool = False) -> nn.Module:
    import timm

    # timm resamples the patch kernel and the position table of pretrained weights to the sizes asked for.
    return timm.create_model(
        name, img_size=image_size, patch_size=patch_size, num_classes=0, pretrained=pretrained, **overrides
    )


def _run(vit: nn.Module, patches: Tensor, latents: Tensor) -> Tensor:
    """Run a timm vision transformer on [cls; patches + 2-D positions; latents], (b, n, c) and (b, l, c)."""
    cls = vit.cls_token.expand(len(patches), -1, -1)
    x = torch.cat([cls, patches], dim=1) + vit.pos_embed  # (b, 1 + n, c)
    x = torch.cat([x, latents], dim=1)  # (b, 1 + n + l, c)
    return vit.norm(vit.blocks(vit.norm_pre(x)))


def _positions(tokens: int, width: int) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(1, tokens, width), std=0.02))


class Encoder(nn.Module):
    """Map images (b, 3, height, width) in [-1, 1] to the outputs of l learnable latent tokens, (b, l, c)."""

    def __init__(
        self, name: str, image_size: int, patch_size: int, tokens: int, overrides: dict, pretrained: bool = False
    ):
        super().__init__()
        self.vit = _vit(name, image_size, patch_size, overrides, pretrained)
        self.width = self.vit.embed_dim
        self.latent_tokens = nn.Parameter(torch.randn(1, tokens, self.width) * 0.02)
        self.latent_pos_embed = _positions(tokens, self.width)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.vit.patch_embed(images)  # (b, n, c)
        latents = (self.latent_tokens + self.latent_pos_embed).expand(len(images), -1, -1)  # (b, l, c)
        return _run(self.vit, patches, latents)[:, -self.latent_tokens.shape[1] :]  # (b, l, c)


class Decoder(nn.Module):
    """Map latent tokens (b, l, c) to images (b, 3, height, width) through n mask tokens and a linear pixel head."""

    def __init__(self, name: str, image_size: int, patch_size: int, tokens: int, overrides: dict):
        super().__init__()
        self.vit = _vit(name, image_size, patch_size, overrides)
        self.vit.patch_embed = nn.Identity()  # the decoder sees no pixels, so it carries no patch embedding
        self.width = self.vit.embed_dim
        self.side, self.patch_size = image_size // patch_size, patch_size
        self.mask_token = nn.Parameter(torch.randn(1, 1, self.width) * 0.02)
        self.latent_pos_embed = _positions(tokens, self.width)
        self.to_pixels = nn.Linear(self.width, 3 * patch_size**2)

    def forward(self, latents: Tensor) -> Tensor:
        n = self.side**2
        masks = self.mask_token.expand(len(latents), n, -1)  # (b, n, c)
        x = _run(self.vit, masks, latents + self.latent_pos_embed)[:, 1 : 1 + n]  # (b, n, c)
        pixels = self.to_pixels(x)
        return rearrange(
            pixels, "b (i j) (p q c) -> b c (i p) (j q)", i=self.side, p=self.patch_size, q=self.patch_size
        )  # (b, 3, height, width)
