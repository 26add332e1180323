"""The networks that the terms of Eq. 7 need, and how the terms use them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from softvq_lib.draws import Draws
from softvq_lib.features import Features, build_features
from softvq_lib.losses import adversarial
from softvq_lib.losses.alignment import Alignment
from softvq_lib.losses.augmentation import Augmentation
from softvq_lib.losses.discriminator import build_discriminator
from softvq_lib.losses.objective import LossConfig
from softvq_lib.losses.perceptual import Perceptual, build_perceptual
from softvq_lib.tokenizers import TokenizerConfig


@dataclass
class Networks:
    """What stands beside the tokenizer; None for terms that are off.

    Attributes:
        perceptual: Frozen.
        discriminator: Its heads are trained, with an optimiser of their own.
        lecam: Moving averages of the discriminator's outputs.
        teacher: Frozen.
        alignment: Projector, trained with the tokenizer.
        side: Image tokens along one side, n = side^2.
    """

    perceptual: Perceptual | None = None
    discriminator: nn.Module | None = None
    lecam: adversarial.LeCam | None = None
    teacher: Features | None = None
    alignment: Alignment | None = None
    side: int = 0

    def to(self, device: torch.device) -> "Networks":
        """Move all of them."""
        for net in (self.perceptual, self.discriminator, self.lecam, self.teacher, self.alignment):
            if net is not None:
                net.to(device)
        return self

    @torch.no_grad()
    def teacher_tokens(self, images: Tensor) -> Tensor:
        """The teacher's features of images (b, 3, height, width) in [-1, 1], one for each image token, (b, n, c)."""
        return self.teacher.tokens(images, self.side)

    def generator_loss(self, config: LossConfig, pixels: Tensor, draws: Draws) -> Tensor:
        """L_adv of Eq. 7 for reconstructions (b, 3, height, width)."""
        if config.diffaug:
            pixels = Augmentation.draw(pixels, draws)(pixels)
        return adversarial.generator_loss(self.discriminator(pixels, draws))


def build_networks(config: LossConfig, tokenizer: TokenizerConfig, seed: int) -> Networks:
    """Build the networks of the terms that are on; trained ones start from the seed.

    Args:
        config: Which terms are on, and their nets.
        tokenizer: Resolved: its sizes are the networks'.
        seed: Of trained networks' weights.

    Raises:
        ValueError: for a net that is not known, or whose weights cannot be had; the message says which can.
    """
    networks = Networks(side=tokenizer.image_size // tokenizer.patch_size)
    known = not config.dry_run
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.perceptual != "none":
            networks.perceptual = build_perceptual(config.perceptual, tokenizer.image_size, pretrained=known)
        if config.adversarial != "none":
            networks.discriminator = build_discriminator(
                config.adversarial, tokenizer.image_size, pretrained=known, seed=seed
            )
            networks.lecam = adversarial.LeCam()
        if config.alignment != "none":
            sizes = {"image_size": tokenizer.image_size, "patch_size": tokenizer.patch_size}
            random = config.alignment_random or config.dry_run
            networks.teacher = build_features(config.alignment, random=random, seed=seed, **sizes)
            networks.alignment = Alignment(
                tokenizer.dim,
                tokenizer.tokens,
                networks.side**2,
                networks.teacher.width,
                width_hidden=config.alignment_width,
                rule=config.alignment_rule,
                seed=seed,
            )
    return networks
