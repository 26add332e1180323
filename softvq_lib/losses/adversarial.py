"""Adversarial loss (the third term of Eq. 7): hinge, LeCAM, consistency, their weights and schedule (Sec. 4.1)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softvq_lib.config import at_least
from softvq_lib.distributed import mean_across
from softvq_lib.draws import Draws
from softvq_lib.losses.augmentation import Augmentation
from softvq_lib.losses.discriminator import Discriminator


def generator_loss(logits_fake: Tensor) -> Tensor:
    """Return minus the mean logit (b, p) of reconstructions."""
    return -logits_fake.mean()


def discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Return the hinge loss of logits (b, p): 0 when real ones are above 1 and others below -1."""
    return 0.5 * (F.relu(1 - logits_real).mean() + F.relu(1 + logits_fake).mean())


def consistency_loss(logits: Tensor, logits_strong: Tensor) -> Tensor:
    """Return the mean squared change of logits (b, p) when images are strongly augmented; both sides get gradients."""
    return F.mse_loss(logits_strong, logits)


class LeCam(nn.Module):
    """LeCAM regularisation (arXiv:2104.03310): logits stay near the moving average of the other kind.

    The averages start at 0, are buffers, so in the state dict, and move by `update`, once a step.
    """

    def __init__(self, decay: float = 0.999):
        super().__init__()
        at_least("decay", decay, 0)
        self.decay = decay
        self.register_buffer("ema_real", torch.zeros(()))
        self.register_buffer("ema_fake", torch.zeros(()))

    @torch.no_grad()
    def update(self, mean_real: Tensor, mean_fake: Tensor) -> None:
        """Move the averages towards the mean logits of this step, scalars, averaged over the processes."""
        means = mean_across(torch.stack([mean_real.detach().float(), mean_fake.detach().float()]))
        self.ema_real.lerp_(means[0], 1 - self.decay)
        self.ema_fake.lerp_(means[1], 1 - self.decay)

    def forward(self, logits_real: Tensor, logits_fake: Tensor) -> Tensor:
        """Return the penalty of logits (b, p)."""
        above = F.relu(logits_real - self.ema_fake).square().mean()
        return above + F.relu(self.ema_real - logits_fake).square().mean()


def discriminator_objective(
    discriminator: Discriminator,
    lecam: LeCam,
    images: Tensor,
    reconstructions: Tensor,
    draws: Draws,
    *,
    disc_weight: float = 0.2,
    lecam_weight: float = 0.001,
    consistency_weight: float = 4.0,
    augment: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the discriminator's loss to minimise and its unweighted, detached terms by name.

    The loss is disc_weight x (hinge + lecam_weight x LeCAM) + consistency_weight x consistency: the release does not
    multiply the consistency by disc_weight. Before the start step give 0 for both outer weights (`ramp`): then no
    graph is built, the loss has no gradient, and backward and optimiser step are to be left out.

    All terms are means over images, so those of micro-batches average to those of the batch. Once a step, from the
    first on, before the start too, call `lecam.update` with the step's terms "logits_real" and "logits_fake"; after
    the optimiser's step call `discriminator.advance()`.

    Differs from the release: images and their reconstructions get the same augmentation and crop, each in one pass
    through the frozen body; and LeCAM's penalty sees the averages before this step's update, not after it, a change of
    a thousandth, so that micro-batches do not depend on each other.

    Args:
        discriminator: Called once, with a group for each kind of images; may be wrapped for distributed training.
        lecam: Averages that its penalty is taken against; not moved here.
        images: (b, 3, height, width) in [-1, 1].
        reconstructions: Same shape; detached here.
        draws: Decide the augmentations, then the body's crop.
        disc_weight: Of hinge and LeCAM together.
        lecam_weight: Of LeCAM beside the hinge.
        consistency_weight: Of the consistency; 0 leaves it and its passes out.
        augment: Weakly augment what the hinge loss sees; the consistency's strong augmentation stays.

    Returns:
        Loss, and terms discriminator, lecam, logits_real, logits_fake (means), and consistency if its weight is not 0.
    """
    pair = images.float(), reconstructions.detach().float()
    weak, strong = (Augmentation.draw(images, draws, strength=strength) for strength in ("weak", "strong"))
    views = [weak(x) for x in pair] if augment else list(pair)
    if consistency_weight:
        views += [strong(x) for x in pair]
    with torch.set_grad_enabled(bool(disc_weight or consistency_weight)):
        logits = discriminator(torch.cat(views), draws, len(views)).chunk(len(views))
        real, fake = logits[:2]
        terms = {"discriminator": discriminator_loss(real, fake), "lecam": lecam(real, fake)}
        loss = disc_weight * (terms["discriminator"] + lecam_weight * terms["lecam"])
        if consistency_weight:
            terms["consistency"] = consistency_loss(torch.cat(logits[:2]), torch.cat(logits[2:]))
            loss = loss + consistency_weight * terms["consistency"]
    terms |= {"logits_real": real.mean(), "logits_fake": fake.mean()}
    return loss, {name: term.detach() for name, term in terms.items()}


@torch.no_grad()
def adaptive_weight(nll_gradient: Tensor, adversarial_gradient: Tensor) -> Tensor:
    """Return the factor that brings the adversarial gradient to the size of the others': |g_nll| / (|g_adv| + 1e-4).

    Args:
        nll_gradient: Of reconstruction and perceptual loss, with respect to the weight of the decoder's last layer.
        adversarial_gradient: Of the unweighted adversarial loss, likewise. Both are averaged over the processes here.

    Returns:
        A scalar from 0 to 1e4.
    """
    nll, adversarial = (mean_across(g.detach()).float().norm() for g in (nll_gradient, adversarial_gradient))
    return (nll / (adversarial + 1e-4)).clamp(0, 1e4)


def ramp(step: int, start: int, warmup: int = 0) -> float:
    """Return the share of a weight at a step: 0 before `start`, then linearly up to 1 over `warmup` steps."""
    if step < start:
        return 0.0
    return min(1.0, (step - start) / warmup) if warmup else 1.0
