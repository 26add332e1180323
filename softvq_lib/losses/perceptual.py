"""Perceptual distance (the second term of Eq. 7): how far apart a frozen net's features of two images lie."""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softvq_lib.config import at_least, one_of
from softvq_lib.features import OFFLINE, PACKAGED, build_features

PERCEPTUAL = ("lpips", *PACKAGED)
# Pixels below which a stage of the net would be left with nothing.
_LEAST = {"lpips": 16}
_ENLARGED = 32


class Perceptual(nn.Module):
    """The distance of LPIPS (Zhang et al. 2018), on the stages that a frozen net gives.

    At every place of a stage's map the channels are brought to unit length; the squared difference of two images is
    summed over the channels, averaged over the places, and summed over the stages. Nothing is drawn at random: LPIPS'
    dropout, which its linear layers have in training mode, is not here.

    Args:
        net: A module whose `maps(images)` is a list of (b, c, h, w).
        label: Name that results carry.
        weights: Of the channels of each stage, (1, c, 1, 1). None: equal, and stages are averaged.
    """

    def __init__(self, net: nn.Module, label: str, weights: list[Tensor] | None = None):
        super().__init__()
        self.net, self.label = net, label
        self.weights = nn.ParameterList(nn.Parameter(w.detach(), requires_grad=False) for w in weights or ())
        self.eval()

    def forward(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """Return the distance of each pair, (b,), with gradient to the reconstructions alone.

        Args:
            images: (b, 3, height, width) in [-1, 1], the originals.
            reconstructions: Same shape.
        """
        with torch.no_grad():
            targets = [_unit(target) for target in self.net.maps(images)]
        maps = [_unit(features) for features in self.net.maps(reconstructions)]
        weights = [w.flatten() for w in self.weights] or [1 / len(maps)] * len(maps)
        stages = zip(weights, maps, targets, strict=True)
        return sum((w * (m - target).square()).sum(-1).mean((1, 2)) for w, m, target in stages)  # (b,)


def _unit(maps: Tensor) -> Tensor:
    """Bring the channels of maps (b, c, h, w) to unit length; they come out last, (b, h, w, c), as they lie in memory.

    Autocast's half precision ends here. Where all channels are 0 so is the gradient, which LPIPS' own root makes NaN.
    """
    return F.normalize(maps.float().permute(0, 2, 3, 1), dim=-1)


class _VGG(nn.Module):
    """The stages of LPIPS' VGG16, from a model of the `lpips` package."""

    def __init__(self, lpips: nn.Module):
        super().__init__()
        # On the CPU, channels last takes .65 of the time forwards and .9 with the gradient (256 px).
        self.scaling, self.net = lpips.scaling_layer, lpips.net.to(memory_format=torch.channels_last)

    def maps(self, images: Tensor) -> list[Tensor]:
        return list(self.net(self.scaling(images).contiguous(memory_format=torch.channels_last)))


def build_perceptual(name: str, image_size: int, *, pretrained: bool = True) -> Perceptual:
    """Build a perceptual distance by name.

    `lpips` is LPIPS-VGG, with the published weights of its stages and channels. `efflite0`, `efflite1` and `efflite2`
    need no network and are labelled `perceptual-EffLite0` and so on: the same distance on EfficientNet-lite's five
    stages, with equal weights and averaged. They order distortions of equal PSNR
    as one would. EffLite1's distances of 64 px photographs at 22 dB, relative to white noise, are .05 for a shift of
    brightness, .21 for a tint, 1.01 for blur and 1.14 for JPEG; with random weights the first two lie anywhere in
    .3-1.2. Images are looked at in the size they have: enlarged to twice that, the distance forgives blur (.71) and
    costs four times as much. Below 32 px they are enlarged to it.

    A distance that scores a model must be on another net than the one it was trained with: one that was minimised says
    little.

    Args:
        name: `lpips`, `efflite0`, `efflite1` or `efflite2`.
        image_size: Side of the images in pixels.
        pretrained: False: random weights of the net, for tests.

    Raises:
        ValueError: for an unknown name, images too small for the net, or weights that cannot be had.
    """
    one_of("perceptual", name, PERCEPTUAL)
    at_least("image_size", image_size, _LEAST.get(name, 1))
    if name == "lpips":
        return _lpips(pretrained)
    features = build_features(name, random=not pretrained, least=_ENLARGED)
    return Perceptual(features, f"perceptual-{features.label}")


def _lpips(pretrained: bool) -> Perceptual:
    from lpips import LPIPS

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips asks torchvision for weights in a way that is on its way out
        torch.default_generator.manual_seed(0)
        try:
            lpips = LPIPS(net="vgg", pnet_rand=not pretrained, verbose=False)
        except OSError as error:
            raise ValueError(
                f"LPIPS needs the ImageNet weights of torchvision's vgg16, which cannot be had: {error} Ask for them "
                f"once with a network, which fills torch's cache. {OFFLINE}; results say perceptual-EffLite then."
            ) from error
    weights = [layer.model[-1].weight for layer in lpips.lins]
    return Perceptual(_VGG(lpips.requires_grad_(False)), "LPIPS-VGG" + ("" if pretrained else "-random"), weights)
