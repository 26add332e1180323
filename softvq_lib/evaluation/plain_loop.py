"""One step of Eq. 7 as a plain loop makes it: what the trainer's time is measured against.

Nets, random numbers, optimisers and precision are a trainer's, so losses are equal. No pass of tokenizer or
discriminator is shared, the discriminator gets a gradient that nobody uses, and a teacher's features are not kept.
"""

import torch
from torch import Tensor, nn

from softvq_lib.data import Batch
from softvq_lib.losses.adversarial import consistency_loss, discriminator_loss, ramp
from softvq_lib.losses.augmentation import Augmentation
from softvq_lib.losses.objective import weighted
from softvq_lib.losses.reconstruction import RECONSTRUCTION
from softvq_lib.training.tokenizer import TokenizerTrainer

PASSES = ("each", "shared")


def plain_step(trainer: TokenizerTrainer, batch: Batch, passes: str = "each") -> dict[str, Tensor]:
    """Make one optimiser step with a trainer's nets and return the terms and gradient norms, detached scalars.

    Args:
        trainer: Of one process, with all terms of Eq. 7 on and the adaptive weight off.
        batch: The whole of a step.
        passes: `each`: every loss of the pixels, and the discriminator's step, reconstructs the images by a forward
            pass of its own. `shared`: one reconstruction serves them all.
    """
    config, nets, step = trainer.loss_config, trainer.networks, trainer.step
    discriminator, images = nets.discriminator, batch.images.to(trainer.device)
    rise = ramp(step, config.adversarial_start, config.adversarial_warmup)
    for name, optimizer in trainer.optimizers.items():
        for group in optimizer.param_groups:
            group["lr"] = trainer._rate(trainer.peaks[name])
    trainer.model.train()
    precision = torch.autocast(trainer.device.type, trainer.dtype, enabled=trainer.dtype != torch.float32)

    reconstructions, code = None, None

    def reconstruct() -> Tensor:
        nonlocal reconstructions, code
        if reconstructions is None or passes == "each":
            reconstructions, code = trainer.bare.tokenizer(images, trainer.draws("tokenizer", 0))
        return reconstructions.float()

    def judge(x: Tensor, strength: str) -> Tensor:
        draws = trainer.draws("discriminator", 0)  # anew: all views and passes are drawn alike
        views = {name: Augmentation.draw(x, draws, strength=name) for name in ("weak", "strong")}
        return discriminator(views[strength](x) if config.diffaug or strength == "strong" else x, draws)

    with precision:
        terms = {"reconstruction": RECONSTRUCTION[config.reconstruction](images, reconstruct()).mean(), **code.losses}
        terms["alignment"] = nets.alignment(code.z, nets.teacher_tokens(images)).mean()
        loss = terms["reconstruction"] + weighted(config, code.losses) + config.alignment_weight * terms["alignment"]
        terms["perceptual"] = nets.perceptual(images, reconstruct()).mean()
        loss = loss + config.perceptual_weight * ramp(step, 0, config.perceptual_warmup) * terms["perceptual"]
        terms["adversarial"] = nets.generator_loss(config, reconstruct(), trainer.draws("generator", 0))
        terms["loss"] = loss + config.adversarial_weight * rise * terms["adversarial"]
    terms["loss"].backward()
    discriminator.zero_grad()  # of what the adversarial loss has left there

    with precision:
        with torch.no_grad():
            fake = reconstruct().detach()
        pairs = (real, _), (fake, _) = [[judge(x, strength) for strength in ("weak", "strong")] for x in (images, fake)]
        terms |= {"discriminator": discriminator_loss(real, fake), "lecam": nets.lecam(real, fake)}
        terms["consistency"] = sum(consistency_loss(*pair) for pair in pairs) / 2
        judged = config.adversarial_weight * rise * (terms["discriminator"] + config.lecam_weight * terms["lecam"])
        (judged + config.consistency_weight * terms["consistency"]).backward()

    for name, part in (("gradient_norm", trainer.model), ("discriminator_gradient_norm", discriminator)):
        terms[name] = nn.utils.clip_grad_norm_(part.parameters(), trainer.settings.clip)
    for optimizer in trainer.optimizers.values():
        optimizer.step()
        optimizer.zero_grad()
    nets.lecam.update(real.mean(), fake.mean())
    discriminator.advance()
    trainer.average.update(step)
    trainer.step += 1
    return {name: term.detach() for name, term in terms.items()}
