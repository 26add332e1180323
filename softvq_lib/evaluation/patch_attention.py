"""Which image patches each latent token attends to: attention of the encoder's latent tokens (Sec. 3.1, Fig. 2).

timm computes attention by a fused kernel that keeps no weights. Here its layers compute it step by step while they are
watched, which timm offers too, and a hook takes the weights from where dropout would come. So rotary positions and
normalised queries are as the network has them.
"""

from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from softvq_lib.tokenizers import Tokenizer
from softvq_lib.tokenizers.tokenizer import Code


def _layer(block: nn.Module, number: int) -> nn.Module:
    """Return the one attention layer of a transformer block."""
    layers = [
        layer for layer in block.modules() if hasattr(layer, "fused_attn") and isinstance(layer.attn_drop, nn.Module)
    ]
    if len(layers) != 1:
        raise ValueError(
            f"block {number} of the encoder, a {type(block).__name__}, has {len(layers)} attention layers that can be "
            "watched; one is wanted: choose an encoder with plain blocks."
        )
    return layers[0]


class PatchAttention:
    """Sums the attention of latent tokens to image patches, averaged over heads, over the images that it encodes.

    Args:
        tokenizer: Whose encoder is watched.

    Attributes:
        images: Number of images so far.
        own: For each image, the share of the patches' attention that stays on a token's own strip of n / l patches,
            those that Eq. 5 aligns it with, averaged over tokens: (b, blocks) a batch. Empty where l does not divide n.

    Raises:
        ValueError: for an encoder whose attention cannot be watched.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.vit = tokenizer.encoder.vit
        self.layers = [_layer(block, number) for number, block in enumerate(self.vit.blocks, 1)]
        self.images, self.own = 0, []
        self._weights: list[Tensor] = []
        self._maps = self._shares = 0.0

    def encode(self, images: Tensor) -> Code:
        """Encode images (b, 3, height, width) in [-1, 1] as `Tokenizer.encode` does, and add their attention."""
        with self._watching():
            code = self.tokenizer.encode(images)
        weights = torch.stack(self._weights, 1).cpu().double()  # (b, blocks, l, n)
        self._weights = []
        share = weights.sum(-1)  # (b, blocks, l)
        maps = weights / share[..., None]
        self._maps, self._shares = self._maps + maps.sum(0), self._shares + share.sum(0)
        self.images += len(images)
        tokens, patches = maps.shape[2:]
        if patches % tokens == 0:
            strips = torch.eye(tokens, dtype=maps.dtype).repeat_interleave(patches // tokens, 1)  # (l, n)
            self.own.append((maps * strips).sum(-1).mean(-1))
        return code

    @contextmanager
    def _watching(self):
        tokens = self.tokenizer.config.tokens
        before = self.vit.num_prefix_tokens

        def take(module: nn.Module, inputs: tuple[Tensor], weights: Tensor) -> None:  # (b, h, t, t)
            self._weights.append(weights[:, :, -tokens:, before:-tokens].mean(1))  # (b, l, n)

        fused = [layer.fused_attn for layer in self.layers]
        hooks = [layer.attn_drop.register_forward_hook(take) for layer in self.layers]
        self._weights = []
        try:
            for layer in self.layers:
                layer.fused_attn = False
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for layer, was in zip(self.layers, fused, strict=True):
                layer.fused_attn = was

    def maps(self) -> Tensor:
        """Attention of each latent token over the patches, (blocks, l, n), averaged over images; rows sum to 1."""
        return self._maps / self.images

    def shares(self) -> Tensor:
        """Share of each token's attention that goes to patches at all, not to tokens, (blocks, l), 0 to 1."""
        return self._shares / self.images


def best_strips(maps: np.ndarray) -> float:
    """Share of the patches' attention on a token's strip, were the strips of Eq. 5 dealt out to tokens as suits best.

    Args:
        maps: Attention (blocks, l, n) whose rows sum to 1, l a divisor of n.
    """
    from scipy.optimize import linear_sum_assignment

    _, tokens, patches = maps.shape
    to_strips = maps.mean(0).reshape(tokens, tokens, patches // tokens).sum(-1)  # (l, l)
    return float(to_strips[linear_sum_assignment(to_strips, maximize=True)].mean())
