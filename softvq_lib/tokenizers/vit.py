"""Transformer encoder and decoder on image patches and 1-D latent tokens (Sec. 3.1, Fig. 2), built on timm."""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from softvq_lib.config import nearest
from softvq_lib.tokenizers.presets import ENCODERS

# Modules of timm whose transformers are one sequence of tokens, to which more can be appended.
_FAMILIES = ("vision_transformer", "eva", "deit")


def _check(name: str, pretrained: bool) -> None:
    """Raise ValueError unless timm has a vision transformer of this name, and weights for it if they are asked for."""
    import timm
    from timm.models import get_pretrained_cfg, is_model_in_modules

    if not is_model_in_modules(name, _FAMILIES):
        valid = [*ENCODERS, *(other for family in _FAMILIES for other in timm.list_models(module=family))]
        problem = "is no plain vision transformer." if timm.is_model(name) else f"is not known{nearest(name, valid)}"
        raise ValueError(
            f"encoder={name!r} {problem} Allowed: {', '.join(ENCODERS)}, or a timm name of the modules "
            f"{', '.join(_FAMILIES)}."
        )
    try:
        weights = get_pretrained_cfg(name)
    except RuntimeError:
        tagged = timm.list_pretrained(f"{name.split('.')[0]}.*")
        raise ValueError(
            f"encoder={name!r} has a tag that timm does not know: choose among {', '.join(tagged) or 'none'}."
        ) from None
    if pretrained and not (weights and weights.has_weights):
        raise ValueError(f"encoder={name!r} has no published weights in timm: choose another, or pretrained=False.")


def _vit(name: str, image_size: int, patch_size: int, overrides: dict, pretrained: bool = False) -> nn.Module:
    import timm

    _check(name, pretrained)
    size = {"img_size": image_size, "patch_size": patch_size, "dynamic_img_size": False}
    try:
        # timm resamples the patch kernel and the position table of pretrained weights to the sizes asked for.
        vit = timm.create_model(name, num_classes=0, pretrained=pretrained, **size, **overrides)
    except OSError as error:
        if not pretrained:
            raise
        reason = (str(error).strip(". \n").splitlines() or [type(error).__name__])[0]
        raise OSError(
            f"the published weights of encoder={name!r} cannot be had ({reason}). Check the network (HF_HUB_OFFLINE "
            "must not be set), put them in the Hugging Face cache, or start from random weights: pretrained=False."
        ) from error
    vit.attn_pool = None  # it pools for a classifier; parameters without a gradient would stop distributed training
    return vit


def _rotations(vit: nn.Module, rope: Tensor | None, latents: int) -> list[dict]:
    """Return what each block is told of rotary positions: those of the image patches, none for latent tokens."""
    if rope is None:
        return [{}] * len(vit.blocks)
    sin, cos = rope.chunk(2, dim=-1)  # (..., n, c / h): of all heads, or of each
    still = torch.cat([torch.zeros_like(sin[..., :1, :]), torch.ones_like(cos[..., :1, :])], dim=-1)
    rope = torch.cat([rope, still.expand(*rope.shape[:-2], latents, -1)], dim=-2)  # (..., n + l, 2 c / h)
    return [{"rope": block} for block in (rope if vit.rope_mixed else [rope] * len(vit.blocks))]


def _run(vit: nn.Module, patches: Tensor, latents: Tensor) -> Tensor:
    """Run a timm vision transformer on [prefix; patches + 2-D positions; latents], (b, n, c) and (b, l, c).

    The prefix is the class token and, in some networks, registers.
    """
    embedded = vit._pos_embed(patches)  # (b, prefix + n, c), in the Eva family with the rotary positions of n patches
    x, rope = embedded if isinstance(embedded, tuple) else (embedded, None)
    x = vit.norm_pre(torch.cat([x, latents], dim=1))  # (b, prefix + n + l, c)
    for block, rotations in zip(vit.blocks, _rotations(vit, rope, latents.shape[1]), strict=True):
        if vit.grad_checkpointing:
            # No dropout anywhere, so the second pass needs no random state.
            x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False, **rotations)
        else:
            x = block(x, **rotations)
    return vit.fc_norm(vit.norm(x))  # which of the two is there depends on the network


def patch_outputs(vit: nn.Module, images: Tensor) -> Tensor:
    """Run a transformer on images (b, 3, height, width) in [-1, 1] without latent tokens.

    Returns:
        Outputs of the n patches, (b, n, c).
    """
    patches = vit.patch_embed(images)  # (b, n, c)
    return _run(vit, patches, patches[:, :0])[:, vit.num_prefix_tokens :]  # (b, n, c)


def _positions(tokens: int, width: int) -> nn.Parameter:
    positions = nn.Parameter(torch.empty(1, tokens, width))
    nn.init.trunc_normal_(positions, std=0.02)  # what it returns is not used: loaders put something else in its place
    return positions


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
        """Map images (b, 3, height, width) in [-1, 1] to the outputs of the latent tokens, (b, l, c)."""
        patches = self.vit.patch_embed(images)  # (b, n, c)
        latents = (self.latent_tokens + self.latent_pos_embed).expand(images.shape[0], -1, -1)  # (b, l, c)
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
        """Map latent tokens (b, l, c), of this transformer's width, to images (b, 3, height, width), about [-1, 1]."""
        n = self.side**2
        masks = self.mask_token.expand(latents.shape[0], n, -1)  # (b, n, c)
        prefix = self.vit.num_prefix_tokens
        x = _run(self.vit, masks, latents + self.latent_pos_embed)[:, prefix : prefix + n]  # (b, n, c)
        pixels = self.to_pixels(x)
        return rearrange(
            pixels, "b (i j) (p q c) -> b c (i p) (j q)", i=self.side, p=self.patch_size, q=self.patch_size
        )  # (b, 3, height, width)
