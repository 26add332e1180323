"""One step of Eq. 7 as a plain loop makes it: what the trainer's throughput is measured against.

The same nets, random numbers, optimisers and precision as the trainer's, and so the same losses. What it does not do:
share a reconstruction between the losses, take images and reconstructions through the discriminator together, spare
the discriminator a gradient that nobody uses, or keep a teacher's features.
"""

import torch
from torch import Tensor, nn

from softvq_lib.data import Batch
from softvq_lib.losses.adversarial import consistency_loss, discriminator_loss, ramp
from softvq_lib.losses.augmentation import Augmentation
from softvq_lib.losses.objective import weighted
from softvq_lib.losses.reconstruction import RECONSTRUCTION
from softvq_lib.training import engine
from softvq_lib.training.tokenizer import TokenizerTrainer


def plain_step(trainer: TokenizerTrainer, batch: Batch, passes: str = "each") -> dict[str, Tensor]:
    """Make one optimiser step with a trainer's nets, in place of its own, and return the terms.

    Args:
        trainer: Of one process, with a discriminator and a teacher, and without the adaptive weight.
        batch: The whole of a step.
        passes: `each`: each loss of the pixels, and the discriminator's step, has a forward pass of the tokenizer of
            its own. `shared`: one pass serves them all.
    """
    config, settings, nets, step = trainer.loss_config, trainer.settings, trainer.networks, trainer.step
    tokenizer, discriminator, lecam = trainer.bare.tokenizer, nets.discriminator, nets.lecam
    images = batch.images.to(trainer.device)
    rise = ramp(step, config.adversarial_start, config.adversarial_warmup)
    for name, optimizer in trainer.optimizers.items():
        for group in optimizer.param_groups:
            group["lr"] = engine.learning_rate(
                step, settings.steps, trainer.peaks[name], settings.warmup, settings.min_lr
            )
    trainer.model.train()

    reconstructions, code = None, None

    def reconstruct() -> Tensor:
        nonlocal reconstructions, code
        if reconstructions is None or passes == "each":
            reconstructions, code = tokenizer(images, trainer.draws("tokenizer", 0))
        return reconstructions.float()

    def judge(x: Tensor, strength: str) -> Tensor:
        draws = trainer.draws("discriminator", 0)  # anew, so that all passes draw the same
        views = {name: Augmentation.draw(x, draws, strength=name) for name in ("weak", "strong")}
        return discriminator(views[strength](x) if config.diffaug or strength == "strong" else x, draws)

    with trainer.autocast():
        terms = {"reconstruction": RECONSTRUCTION[config.reconstruction](images, reconstruct()).mean(), **code.losses}
        terms["alignment"] = nets.alignment(code.z, nets.teacher_tokens(images)).mean()
        loss = terms["reconstruction"] + weighted(config, code.losses) + config.alignment_weight * terms["alignment"]
        terms["perceptual"] = nets.perceptual(images, reconstruct()).mean()
        loss = loss + config.perceptual_weight * ramp(step, 0, config.perceptual_warmup) * terms["perceptual"]
        terms["adversarial"] = nets.generator_loss(config, reconstruct(), trainer.draws("generator", 0))
        loss = loss + config.adversarial_weight * rise * terms["adversarial"]
    loss.backward()
    discriminator.zero_grad()  # of what the adversarial loss has left there

    with trainer.autocast():
        with torch.no_grad():
            fake = reconstruct().detach()
        logits = {(kind, s): judge(x, s) for kind, x in (("real", images), ("fake", fake)) for s in ("weak", "strong")}
        real, fake = logits["real", "weak"], logits["fake", "weak"]
        terms["discriminator"], terms["lecam"] = discriminator_loss(real, fake), lecam(real, fake)
        terms["consistency"] = (
            consistency_loss(real, logits["real", "strong"]) + consistency_loss(fake, logits["fake", "strong"])
        ) / 2
        judged = config.adversarial_weight * rise * (terms["discriminator"] + config.lecam_weight * terms["lecam"])
        judged = judged + config.consistency_weight * terms["consistency"]
    judged.backward()

    for name, optimizer in trainer.optimizers.items():
        part = trainer.model if name == "model" else discriminator
        terms[f"{name}_gradient_norm"] = nn.utils.clip_grad_norm_(part.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad()
    lecam.update(real.mean(), fake.mean())
    discriminator.advance()
    trainer.average.update(step)
    trainer.step += 1
    return {"loss": loss.detach(), **{name: term.detach() for name, term in terms.items()}}
