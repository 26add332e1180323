"""The training objective, a weighted sum of named terms (Eq. 7): its settings and its sum."""

import math
from dataclasses import asdict, dataclass, replace

from torch import Tensor

from softvq_lib.config import at_least, one_of
from softvq_lib.losses.alignment import RULES
from softvq_lib.losses.reconstruction import RECONSTRUCTION

_KL_WEIGHT = {"kl": 1e-6}
_OTHER_KL_WEIGHT = 0.01

# The settings that mean something only while a term is on, by the setting that switches it.
_SETTINGS_OF = {
    "perceptual": ("perceptual_weight", "perceptual_warmup"),
    "adversarial": (
        "adversarial_weight",
        "adversarial_start",
        "adversarial_warmup",
        "adversarial_adaptive",
        "diffaug",
        "consistency_weight",
        "lecam_weight",
        "discriminator_lr",
    ),
    "alignment": (
        "alignment_weight",
        "alignment_rule",
        "alignment_random",
        "alignment_width",
        "alignment_cached",
    ),
}


@dataclass(frozen=True)
class LossConfig:
    """The terms of Eq. 7 and their weights. A term that is off, or that the quantizer does not have, counts nothing.

    The term "kl" is two different things under one name, as in the paper: a Gaussian's divergence from N(0, 1),
    summed over a token's channels and all tokens (KL), and the entropy difference of Eq. 4, an average over tokens (the
    codebook quantizers). Their weights differ by four orders, so the default depends on the quantizer; `resolved`
    fills it in, in one place, and a run's identity holds the number.

    Attributes:
        reconstruction: `l2` (mean squared error, the release's) or `l1`.
        perceptual: Net of the perceptual loss: `none`, `lpips` (VGG), `efflite0`, `efflite1` or `efflite2`.
        perceptual_weight: lambda_1.
        perceptual_warmup: Steps over which lambda_1 rises linearly from 0.
        adversarial: Discriminator: `none`, `patch` (PatchGAN), `dino` (heads on a frozen DINO-S), or the timm name of
            another vision transformer as its frozen body.
        adversarial_weight: lambda_2, also of the discriminator's own loss.
        adversarial_start: Step from which the discriminator is trained and counts.
        adversarial_warmup: Steps over which lambda_2 then rises linearly from 0.
        adversarial_adaptive: Multiply lambda_2 by the ratio of the other pixel terms' gradient to this one's, taken at
            the decoder's last layer, as VQGAN does.
        diffaug: Show the discriminator augmented images only.
        consistency_weight: Of the discriminator's consistency regularisation; not multiplied by lambda_2.
        lecam_weight: Of LeCAM regularisation.
        discriminator_lr: Peak learning rate of the discriminator. None: the tokenizer's.
        alignment: Teacher whose features the latent tokens are aligned with (Eq. 6): `none`, `dinov2-b`, `clip-b`,
            `eva02-b`, `efflite0`, ..., or a timm name.
        alignment_weight: lambda_3.
        alignment_rule: How l tokens stand for n patches: `repeat` (Eq. 5), `area` (any l and n), `auto`, the first that
            fits, or `permuted`, a control: patches drawn at random, once and for all.
        alignment_random: A control: the teacher has random weights.
        alignment_width: Hidden width of the projector.
        alignment_cached: The teacher's features of the training images are computed once for all runs, and rounded to
            float16. For images that come unchanged every time: no `flip`, `crop` 1.
        dry_run: The nets of all these terms get random weights: tries a configuration where the weights cannot be had.
            Its scores mean nothing.
        kl_weight: lambda_4, of the quantizer's KL term. May be negative, to test its sign. None: 1e-6 for `kl`, 0.01
            for the others, as in the release.
        codebook_weight: Of VQ's "codebook" loss, which moves codewords to tokens.
        commit_weight: beta of Sec. 2.1, of VQ's "commit" loss, which keeps tokens at their codewords.
    """

    reconstruction: str = "l2"
    perceptual: str = "none"
    perceptual_weight: float = 1.0
    perceptual_warmup: int = 0
    adversarial: str = "none"
    adversarial_weight: float = 0.2
    adversarial_start: int = 0
    adversarial_warmup: int = 0
    adversarial_adaptive: bool = False
    diffaug: bool = True
    consistency_weight: float = 4.0
    lecam_weight: float = 0.001
    discriminator_lr: float | None = None
    alignment: str = "none"
    alignment_weight: float = 0.1
    alignment_rule: str = "auto"
    alignment_random: bool = False
    alignment_width: int = 1024
    alignment_cached: bool = False
    dry_run: bool = False
    kl_weight: float | None = None
    codebook_weight: float = 1.0
    commit_weight: float = 0.25

    def __post_init__(self):
        one_of("reconstruction", self.reconstruction, RECONSTRUCTION)
        one_of("alignment_rule", self.alignment_rule, RULES)
        if self.kl_weight is not None and not math.isfinite(self.kl_weight):
            raise ValueError(f"kl_weight={self.kl_weight!r} is not allowed: give a finite number, or None.")
        for name, value in asdict(self).items():
            if name != "kl_weight" and name.endswith(("_weight", "_warmup", "_start")):
                at_least(name, value, 0)
        at_least("discriminator_lr", self.discriminator_lr, 0, above=True)
        at_least("alignment_width", self.alignment_width, 1)
        for term, default in (("perceptual", "efflite1"), ("adversarial", "patch"), ("alignment", "efflite2")):
            if not getattr(self, term):
                raise ValueError(f"{term}='' names nothing: write none, or the name of a net such as {default}.")

    def resolved(self, quantizer: str) -> "LossConfig":
        """Return the configuration with the default weight of a quantizer's KL term filled in, by its name."""
        if self.kl_weight is not None:
            return self
        return replace(self, kl_weight=_KL_WEIGHT.get(quantizer, _OTHER_KL_WEIGHT))

    def identity(self) -> dict[str, object]:
        """Return the settings that the outcome depends on: not those of terms that are off."""
        values = asdict(self)
        for term, settings in _SETTINGS_OF.items():
            if values[term] == "none":
                for name in (term, *settings):
                    del values[name]
        for name in ("dry_run", "alignment_cached"):
            if not getattr(self, name):
                values.pop(name, None)
        return values


def weighted(config: LossConfig, losses: dict[str, Tensor]) -> Tensor | float:
    """Sum a quantizer's losses (scalars from `Code.losses`) with their weights; 0 where there are none.

    Raises:
        ValueError: when there is a KL term but no weight for it.
    """
    if "kl" in losses and config.kl_weight is None:
        raise ValueError("kl_weight=None depends on the quantizer: call config.resolved(quantizer) first.")
    weights = {"kl": config.kl_weight, "codebook": config.codebook_weight, "commit": config.commit_weight}
    return sum(weights[name] * term for name, term in losses.items())
