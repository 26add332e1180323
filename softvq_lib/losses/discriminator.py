"""Discriminators: heads on a frozen vision transformer (the paper's is DINO-S), or PatchGAN for small images."""

import math
from abc import ABC, abstractmethod
from contextlib import nullcontext
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from softvq_lib.config import at_least, nearest
from softvq_lib.distributed import mean_across
from softvq_lib.draws import Draws, generator_of

DINO = "vit_small_patch16_224.dino"
_SLOPE = 0.2  # of all LeakyReLUs


class Discriminator(nn.Module, ABC):
    """Scores of local evidence that images are real: `features`, then `heads`.

    Spectral norms estimate the largest singular value with a vector that a power iteration improves. That iteration
    is `advance`, called once after each step of the discriminator's optimiser, and no forward pass changes anything:
    so results do not depend on how many passes a step makes. The vectors are in the state dict.
    """

    @abstractmethod
    def features(self, images: Tensor, draws: Draws = None) -> list[Tensor]:
        """Return what the heads read of images (b, 3, height, width) in [-1, 1]: the frozen part's work."""

    @abstractmethod
    def heads(self, features: list[Tensor], groups: int = 1) -> Tensor:
        """Return logits (b, p): the trainable part's work; each of `groups` equal parts is normalised alone."""

    def forward(self, images: Tensor, draws: Draws = None, groups: int = 1) -> Tensor:
        """Return logits (b, p), float32, high for real images.

        Real images, reconstructions and augmented views go through the frozen body in one pass, concatenated, with
        `groups` their number: each group is normalised alone, as if it were passed alone.

        Args:
            images: (b, 3, height, width) in [-1, 1]; b = groups x batch.
            draws: Decide the crop of images that are larger than the body's; nothing else is random.
            groups: Kinds of images in the batch, a divisor of b.
        """
        return self.heads(self.features(images, draws), groups).float()

    def train(self, mode: bool = True) -> "Discriminator":
        """Set the mode of all parts but the spectral norms, which `advance` alone changes."""
        super().train(mode)
        for norm in self._spectral_norms():
            norm.eval()  # in training mode each forward pass would advance it
        return self

    @torch.no_grad()
    def advance(self) -> None:
        """Make one power iteration of every spectral norm; call it once after each optimiser step."""
        for norm in self._spectral_norms():
            norm.train()
            norm()
            norm.eval()

    def _spectral_norms(self) -> list[nn.Module]:
        return [m.parametrizations.weight for m in self.modules() if parametrize.is_parametrized(m, "weight")]


class ViTDiscriminator(Discriminator):
    """Five heads on a frozen timm vision transformer: on its embedding and after each quarter of its blocks.

    The body is neither in `parameters()` nor in the state dict, so checkpoints hold the heads alone; it follows
    `.to(...)` and stays in evaluation mode. A feature is a patch token plus the class token, (b, c, n).

    Differs from the release: a body whose GELU is exact, as DINO was trained, not its tanh approximation.
    """

    def __init__(self, body: nn.Module):
        super().__init__()
        body.eval().requires_grad_(False)
        self._unregistered = (body,)  # in a tuple, where torch does not look for modules
        self.side = body.patch_embed.img_size[0]
        depth = len(body.blocks)
        for name in ("mean", "std"):
            statistic = torch.tensor(body.pretrained_cfg[name]).view(3, 1, 1)
            self.register_buffer(name, statistic, persistent=False)
        self.tapped = [math.ceil(depth * quarter / 4) - 1 for quarter in range(1, 5)]
        self.trained = nn.ModuleList(Head(body.embed_dim) for _ in range(5))

    @property
    def body(self) -> nn.Module:
        """The frozen transformer."""
        return self._unregistered[0]

    def _apply(self, fn, recurse=True):
        self.body._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def features(self, images: Tensor, draws: Draws = None) -> list[Tensor]:
        """Return five features (b, c, n) of images (b, 3, height, width) in [-1, 1].

        Gradients reach the images, if they require any, and nothing else.
        """
        x = (self.fit(images.float(), draws) + 1) / 2
        taps: list[Tensor] = []
        blocks, prefix = self.body.blocks, self.body.num_prefix_tokens
        hooks = [blocks[0].register_forward_pre_hook(lambda _, given: taps.append(given[0].float()))]
        hooks += [blocks[i].register_forward_hook(lambda _, given, x: taps.append(x.float())) for i in self.tapped]
        try:
            self.body.forward_features((x - self.mean) / self.std)
        finally:
            for hook in hooks:
                hook.remove()
        return [(x[:, prefix:] + (x[:, :1] if prefix else 0)).mT for x in taps]  # (b, c, n)

    def fit(self, images: Tensor, draws: Draws) -> Tensor:
        """Bring images (b, 3, height, width) to the body's side, in [-1, 1] as they are, but for bicubic overshoot.

        Larger ones: all are cropped at one random place, or all shrunk.
        """
        height, width = images.shape[-2:]
        if min(height, width) <= self.side:
            return F.interpolate(images, (self.side, self.side), mode="bicubic")
        numbers = torch.rand(3, generator=generator_of(draws), device=images.device)
        place = torch.arange(self.side, device=images.device)
        top, left = ((numbers[i] * (side - self.side + 1)).long() for i, side in ((1, height), (2, width)))
        part = images.index_select(2, top + place).index_select(3, left + place)
        whole = F.interpolate(images, (self.side, self.side), mode="area")
        return torch.where(numbers[0] < 0.5, part, whole)  # without waiting for an accelerator to decide

    def heads(self, features: list[Tensor], groups: int = 1) -> Tensor:
        return torch.cat([head(x, groups) for head, x in zip(self.trained, features, strict=True)], dim=1)


class Head(nn.Module):
    """Map a feature (b, c, n) to logits (b, n) by 1-D convolutions along the n patches."""

    def __init__(self, width: int):
        super().__init__()
        self.mix = spectral_norm(Conv1d(width, width, 1))
        self.mix_norm = BatchNorm(width)
        self.spread = spectral_norm(Conv1d(width, width, 9, padding=4, padding_mode="circular"))
        self.spread_norm = BatchNorm(width)
        self.out = spectral_norm(Conv1d(width, 1, 1))

    def forward(self, x: Tensor, groups: int = 1) -> Tensor:
        """Map a feature (b, c, n) of images in equal groups to logits (b, n)."""
        x = F.leaky_relu(self.mix_norm(self.mix(x), groups), _SLOPE)
        change = F.leaky_relu(self.spread_norm(self.spread(x), groups), _SLOPE)
        return self.out((x + change) / math.sqrt(2))[:, 0]


class BatchNorm(nn.Module):
    """Batch normalisation of (b, c, n) over the images of all processes and n, with a learned scale and shift.

    For backends without SyncBatchNorm. Keeps no running statistics: a discriminator is never evaluated. Each process
    must hold an equal share of the batch.
    """

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, groups: int = 1) -> Tensor:
        """Normalise x (b, c, n), each of its equal groups of images alone; float32."""
        x = x.float().unflatten(0, (groups, -1))  # (g, b, c, n)
        centred = x - mean_across(x.mean((1, 3), keepdim=True))
        variance = mean_across(centred.square().mean((1, 3), keepdim=True))  # (g, 1, c, 1)
        scale = (variance + self.eps).rsqrt() * self.weight[:, None]
        return (centred * scale + self.bias[:, None]).flatten(0, 1)  # (b, c, n)


class PatchDiscriminator(Discriminator):
    """PatchGAN (pix2pix) with spectral norm in place of batch norm, so that an image's logits are its own.

    Depth follows the image: one halving for 32 pixels, two for 64, three from 128 on. A logit sees 16, 34 or 70
    pixels; up to 128 pixels there are about 14 x 14 of them.
    """

    def __init__(self, image_size: int, width: int = 64):
        super().__init__()
        halvings = min(3, max(1, int(math.log2(image_size)) - 4))
        widths = [3, *(width * 2**i for i in range(halvings + 1))]
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise(widths)):
            conv = Conv2d(before, after, 4, stride=2 if i < halvings else 1, padding=1)
            layers += [spectral_norm(conv), nn.LeakyReLU(_SLOPE)]
        self.trained = nn.Sequential(*layers, spectral_norm(Conv2d(widths[-1], 1, 4, padding=1)))

    def features(self, images: Tensor, draws: Draws = None) -> list[Tensor]:
        """Return the images (b, 3, height, width) in [-1, 1] themselves: no part is frozen."""
        # The convolutions keep this layout, in which the CPU is a tenth faster.
        return [images.float().contiguous(memory_format=torch.channels_last)]

    def heads(self, features: list[Tensor], groups: int = 1) -> Tensor:
        return self.trained(features[0]).flatten(1)


class _WeightInFullPrecision:
    """A convolution whose spectral norm is computed outside autocast, where some devices would halve its precision."""

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            weight = self.weight
        return self._conv_forward(x, weight, self.bias)


class Conv1d(_WeightInFullPrecision, nn.Conv1d):
    """Convolution along the patches, (b, c, n)."""


class Conv2d(_WeightInFullPrecision, nn.Conv2d):
    """Convolution over the pixels, (b, c, height, width)."""


def build_discriminator(name: str, image_size: int, *, pretrained: bool = True, seed: int = 0) -> Discriminator:
    """Build a discriminator; the global random generator is left as it was.

    Args:
        name: `dino` (the release's), `patch` (small images, no frozen body), or any timm vision transformer as body.
        image_size: Side of the images in pixels; of use to `patch` alone.
        pretrained: Load the body's weights; False: random ones, of the seed, so a run that goes on needs the same one.
        seed: Of the heads' initial weights, and of a random body.

    Raises:
        ValueError: for a name that is no vision transformer, or weights that cannot be had.
    """
    at_least("image_size", image_size, 8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = PatchDiscriminator(image_size) if name == "patch" else ViTDiscriminator(_body(name, pretrained))
    return built.train()


def _body(name: str, pretrained: bool) -> nn.Module:
    import timm
    from timm.models import Eva, VisionTransformer

    published = timm.list_pretrained()
    valid = ["dino", "patch", *timm.list_models(), *published]
    if name not in valid:
        raise ValueError(
            f"discriminator={name!r} is not known{nearest(name, valid)} Allowed: 'dino', 'patch', or a vision "
            "transformer of timm by name."
        )
    model = DINO if name == "dino" else name
    remedy = "use discriminator='patch', which needs none, or pretrained=False for a random body."
    try:
        body = timm.create_model(model, pretrained=pretrained, num_classes=0)
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"the weights of {model!r} cannot be had ({reason}): {remedy}") from error
    if not isinstance(body, VisionTransformer | Eva):
        raise ValueError(f"discriminator={name!r} is no vision transformer of timm: use 'dino' or 'patch'.")
    return body
