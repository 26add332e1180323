"""Train a tokenizer with the whole objective (Eq. 7, Sec. 4.1)."""

import logging
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from softvq_lib import config as strictly
from softvq_lib.data import Batch, DataConfig, DataSplits, open_dataset
from softvq_lib.losses import LossConfig
from softvq_lib.losses.adversarial import adaptive_weight, discriminator_objective, ramp
from softvq_lib.losses.alignment import Alignment
from softvq_lib.losses.networks import Networks, build_networks
from softvq_lib.losses.objective import weighted
from softvq_lib.losses.reconstruction import RECONSTRUCTION
from softvq_lib.tokenizers import NotFiniteError, Tokenizer, TokenizerConfig
from softvq_lib.tokenizers.tokenizer import Code
from softvq_lib.training import engine
from softvq_lib.training.config import TrainConfig
from softvq_lib.training.distillation import find_encoder, start_encoder
from softvq_lib.training.files import write_whole
from softvq_lib.training.run import Run, open_run, slug
from softvq_lib.training.teacher import TeacherTokens, check_unchanging, teacher_tokens
from softvq_lib.training.trainer import Trainer
from softvq_lib.training.validation import reconstruct

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StartConfig:
    """What a tokenizer's training starts from, beside published weights (`TokenizerConfig.pretrained`).

    Attributes:
        encoder_start: Run, or folder, of a distilled encoder (`softvq_lib.distil_encoder`) whose transformer's weights
            the encoder starts from; latent tokens stay random. The run's identity holds the checksum of these weights.
    """

    encoder_start: str | None = None

    def __post_init__(self):
        if self.encoder_start == "":
            raise ValueError("encoder_start='' names nothing: give a run or folder of a distilled encoder, or None.")


CONFIGS = (TokenizerConfig, DataConfig, LossConfig, TrainConfig, StartConfig)
SHOWN = 8  # held-out images in each picture of progress


def train(**parameters: object) -> Run:
    """Train the tokenizer that flat parameters describe, or load it when its run is finished already.

    An interrupted run goes on from its newest checkpoint. Parameters are the fields of `TokenizerConfig`,
    `DataConfig`, `LossConfig`, `TrainConfig` and `StartConfig`. Started by `torchrun` or `accelerate launch` on several
    processes, these share the work.

    Raises:
        ValueError: for a parameter that is unknown or out of range, data or weights that cannot be had, or a folder
            that cannot be used; before anything is trained, leaving existing files as they were.
    """
    tokenizer_config, data_config, loss_config, settings, start = strictly.split(parameters, *CONFIGS)
    tokenizer_config = tokenizer_config.resolved()
    loss_config = loss_config.resolved(tokenizer_config.quantizer)
    if loss_config.alignment != "none" and loss_config.alignment_cached:
        check_unchanging("alignment_cached", data_config)
    if tokenizer_config.pretrained and start.encoder_start is not None:
        raise ValueError(
            f"pretrained=True and encoder_start={start.encoder_start!r} both say what the encoder starts from: leave "
            "one of them out."
        )
    distilled = None if start.encoder_start is None else find_encoder(start.encoder_start, settings.runs)
    engine.choose_device(settings.device)
    data = open_dataset(data_config, tokenizer_config.image_size)
    tokenizer, tokenizer_config = _build(tokenizer_config, settings.seed)
    identity = _identity(tokenizer_config, data_config, loss_config, settings, data)
    if distilled is not None:
        identity["encoder_start"] = start_encoder(tokenizer, distilled)
    name = f"{tokenizer_config.preset}-{tokenizer_config.quantizer}-{tokenizer_config.tokens}x{tokenizer_config.dim}"
    run = open_run(f"{slug(data.name)}-{name}", identity, settings)
    run.data = data
    if run.found_finished():
        return run
    networks = build_networks(loss_config, tokenizer_config, settings.seed)
    trainer = TokenizerTrainer(run, tokenizer, networks, data, data_config, loss_config, settings)
    return trainer.run_to_the_end(parameters)


def _build(config: TokenizerConfig, seed: int) -> tuple[Tokenizer, TokenizerConfig]:
    """Build the model from the seed; without its pretrained weights when these can't be had."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return Tokenizer(config), config
        except (OSError, RuntimeError) as error:
            if not config.pretrained:
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            log.warning("the encoder's published weights cannot be had (%s): it starts from random weights.", reason)
        config = replace(config, pretrained=False)
        torch.manual_seed(seed)
        return Tokenizer(config), config


def _identity(
    tokenizer: TokenizerConfig, data_config: DataConfig, loss: LossConfig, settings: TrainConfig, data: DataSplits
) -> dict[str, object]:
    """Return all that the outcome depends on. A setting that is off is left out, as if it did not exist."""
    model = {k: v for k, v in asdict(tokenizer).items() if not (k == "encoder" and v is None)}
    seen = {"data": data.fingerprint, "flip": data_config.flip, "crop": data_config.crop}
    return {**model, **seen, **loss.identity(), **settings.identity()}


class _Trained(nn.Module):
    """What one optimiser trains: the tokenizer and, where latents are aligned, the projector."""

    def __init__(self, tokenizer: Tokenizer, alignment: Alignment | None):
        super().__init__()
        self.tokenizer, self.alignment = tokenizer, alignment

    def forward(self, images: Tensor, draws, teacher: Tensor | None) -> tuple[Tensor, Code, Tensor | None]:
        reconstructions, code = self.tokenizer(images, draws)
        return reconstructions, code, None if teacher is None else self.alignment(code.z, teacher)


class TokenizerTrainer(Trainer):
    """Eq. 7 on the engine.

    The pixel losses (reconstruction, perceptual, adversarial) are differentiated down to the reconstruction alone;
    their weighted sum, with the losses of the latents, then goes back through decoder and encoder once. So the
    adaptive weight costs no second pass, and the discriminator sees the reconstruction that is there already.

    Before `adversarial_start` the discriminator rests, and LeCAM's averages with it. (The release computes it from the
    first step on, to move these averages, but does not train it.)
    """

    def __init__(
        self,
        run: Run,
        tokenizer: Tokenizer,
        networks: Networks,
        data: DataSplits,
        data_config: DataConfig,
        loss_config: LossConfig,
        settings: TrainConfig,
    ):
        tokenizer.set_gradient_checkpointing(settings.gradient_checkpointing)
        super().__init__(run, _Trained(tokenizer, networks.alignment), data, settings)
        config = tokenizer.config
        if self.sharded and (config.vq_ema is not None or config.vq_revive is not None or config.vq_kmeans):
            raise ValueError(
                "vq_ema, vq_revive and vq_kmeans write into the codebook, which FSDP shards: leave them out, or train "
                "with DDP."
            )
        if config.vq_revive is not None or config.vq_kmeans:
            self.written = tuple(p for p in tokenizer.quantizer.parameters() if p.requires_grad)
        self.length = config.patches + config.tokens
        self.data_config, self.loss_config = data_config, loss_config
        self.networks = networks.to(self.device)
        if networks.discriminator is not None:
            self.add("discriminator", networks.discriminator, loss_config.discriminator_lr or settings.lr)
            self.add("lecam", networks.lecam)
        unchanging = not data_config.flip and data_config.crop == 1
        cached = None
        if loss_config.alignment_cached and networks.teacher is not None:
            sizes = {"image_size": config.image_size, "side": networks.side}
            given = {"runs": settings.runs, "parameter": "alignment_cached"}
            cached = teacher_tokens(networks.teacher, data, data_config, **sizes, **given)
            networks.teacher = None  # it has done its work: no step runs it
        self.seen = _Teacher(networks, len(data.train) if unchanging else 0, cached)
        self.last_input: Tensor | None = None
        if loss_config.adversarial_adaptive:
            self.bare.tokenizer.decoder.to_pixels.register_forward_pre_hook(self._hold)
        if settings.compile:
            for net in (tokenizer.encoder, tokenizer.decoder, *filter(None, (networks.perceptual, networks.teacher))):
                net.compile()

    def _hold(self, module: nn.Module, inputs: tuple[Tensor]) -> None:
        self.last_input = inputs[0].detach()

    def batches(self, start_step: int) -> Iterator[Batch]:
        return self.image_batches(start_step, self.bare.tokenizer.config.image_size, self.data_config)

    def backward(self, part: Batch, first: int, share: float) -> dict[str, Tensor]:
        config, networks, images = self.loss_config, self.networks, part.images
        with self._autocast():
            teacher = self.seen(part, self.micro_batch)
            try:
                reconstructions, code, aligned = self.model(images, self.draws("tokenizer", first), teacher)
            except NotFiniteError as error:
                named = ", ".join(str(part.indices[row].item()) for row in error.rows[:8])
                raise FloatingPointError(f"step {self.step}: {error} (images {named})") from None
        pixels = reconstructions.detach().float().requires_grad_()
        each = {"reconstruction": RECONSTRUCTION[config.reconstruction](images, pixels)}  # of each image, (b,)
        weights = {"reconstruction": 1.0}
        if networks.perceptual is not None:
            with self._autocast():
                each["perceptual"] = networks.perceptual(images, pixels)
            weights["perceptual"] = config.perceptual_weight * ramp(self.step, 0, config.perceptual_warmup)
        self._check(each, part)
        loss = sum(weights[name] * value.mean() for name, value in each.items())
        (gradient,) = torch.autograd.grad(loss, pixels)
        terms = {name: value.mean() for name, value in each.items()}
        loss = loss.detach()
        if networks.discriminator is not None and self.step >= config.adversarial_start:
            rise = ramp(self.step, config.adversarial_start, config.adversarial_warmup)
            with self._autocast():
                terms["adversarial"] = networks.generator_loss(config, pixels, self.draws("generator", first))
            (against,) = torch.autograd.grad(terms["adversarial"], pixels)
            weight = config.adversarial_weight * rise
            if config.adversarial_adaptive:
                weight = weight * self._adaptive_weight(gradient, against)
                terms["adversarial_weight"] = torch.as_tensor(weight)
            gradient = gradient + weight * against
            loss = loss + weight * terms["adversarial"].detach()
            with self._autocast():
                judged, seen = discriminator_objective(
                    networks.discriminator,
                    networks.lecam,
                    images,
                    pixels,
                    self.draws("discriminator", first),
                    disc_weight=config.adversarial_weight * rise,
                    lecam_weight=config.lecam_weight,
                    consistency_weight=config.consistency_weight,
                    augment=config.diffaug,
                )
            (share * judged).backward()
            terms |= seen
        latent = weighted(config, code.losses)
        terms |= code.losses
        if aligned is not None:
            self._check({"alignment": aligned}, part)
            terms["alignment"] = aligned.mean()
            latent = latent + config.alignment_weight * terms["alignment"]
        roots, gradients = [reconstructions], [(share * gradient).to(reconstructions.dtype)]
        if isinstance(latent, Tensor):
            loss = loss + latent.detach()
            roots, gradients = [*roots, share * latent], [*gradients, None]
        torch.autograd.backward(roots, gradients)
        return {"loss": loss, **terms}

    def after_step(self, terms: dict[str, Tensor]) -> None:
        if "logits_real" in terms:
            self.networks.lecam.update(terms["logits_real"], terms["logits_fake"])
            self.networks.discriminator.advance()

    def _check(self, each: dict[str, Tensor], part: Batch) -> None:
        """Stop at losses (b,) that are not finite, naming the images that they come from."""
        if math_is_fine(each):
            return
        bad = torch.stack([~torch.isfinite(value) for value in each.values()]).any(0).cpu()
        values = {name: float(value.detach().mean()) for name, value in each.items()}
        raise engine.not_finite(self.step, values, part.indices[bad].tolist())

    def _adaptive_weight(self, gradient: Tensor, against: Tensor) -> Tensor:
        """VQGAN's weight from the gradients of both losses at the last layer, given those at the pixels.

        The layer is linear in its input x: the gradient at its weight is the sum of pixel gradient times x.
        """
        p = self.bare.tokenizer.decoder.patch_size

        def at_weight(pixels: Tensor) -> Tensor:
            patches = rearrange(pixels, "b c (i p) (j q) -> b (i j) (p q c)", p=p, q=p)  # (b, n, 3 p p)
            return torch.einsum("bno,bni->oi", patches, self.last_input.float())

        return adaptive_weight(at_weight(gradient), at_weight(against))

    def exported(self, model: nn.Module) -> Tokenizer:
        return model.tokenizer

    def measure(self, model: Tokenizer) -> dict[str, float]:
        """Measure on held-out images and draw some of them."""
        measured = reconstruct(
            model,
            self.data.validation,
            limit=min(256, self.settings.val_images),
            batch_size=min(64, self.rows),
            shown=SHOWN,
            dtype=self.dtype,
        )
        row = {"val_psnr": float(measured.psnr.mean())}
        row |= {f"val_{name}": value for name, value in measured.usage.items()}
        folder = self.run.path / "images"
        folder.mkdir(exist_ok=True)
        _picture(folder / "originals.png", measured.images)
        _picture(folder / f"step-{self.step:08d}.png", measured.reconstructions)
        codes = ""
        if measured.usage:
            codes = f", codebook usage {100 * row['val_usage']:.0f} %, perplexity {row['val_perplexity']:.0f}"
        log.info("step %d of %d: held-out PSNR %.2f dB%s", self.step, self.settings.steps, row["val_psnr"], codes)
        return row

    def export(self, model: Tokenizer) -> None:
        made, part = (self.run.path / name for name in ("tokenizer", ".tokenizer.part"))
        shutil.rmtree(part, ignore_errors=True)
        model.trained = self.run.described(model.config)
        model.eval().save_pretrained(part)
        shutil.rmtree(made, ignore_errors=True)
        part.rename(made)


def math_is_fine(each: dict[str, Tensor]) -> bool:
    """Tell whether all numbers, of any shape and by name, are finite, asking the device once."""
    return bool(torch.isfinite(torch.stack([value.detach().float().sum() for value in each.values()])).all())


class _Teacher:
    """The teacher's tokens of a batch; computed once an image where images come unchanged every time.

    They are kept of batches of one size alone, whose bits do not depend on an image's neighbours: a run that goes on
    after an interruption computes the very same again. An image is known by its pixels too, because those that are not
    square are cropped at another place each time.
    """

    MOST = 2**31  # bytes

    def __init__(self, networks: Networks, unchanging: int, cached: TeacherTokens | None = None):
        self.networks, self.images, self.cached, self.kept = networks, unchanging, cached, None
        self.pixels = torch.zeros(unchanging, dtype=torch.int64)  # a checksum of each; 0: not seen yet
        self.size = 0

    def __call__(self, part: Batch, size: int) -> Tensor | None:
        """Return tokens (b, n, c) of a part; `size` is that of all parts of a batch but perhaps the last."""
        if self.cached is not None:
            return self.cached(part.indices).to(part.images.device)
        if self.networks.teacher is None:
            return None
        if size != self.size:  # the first call, or memory has run out
            self.size, self.kept = size, None
            self.pixels.zero_()
        if not self.images or len(part) != size:
            return self.networks.teacher_tokens(part.images)
        pixels = _checksums(part.images)
        if torch.equal(self.pixels[part.indices], pixels):
            return self.kept[part.indices].to(part.images.device)
        tokens = self.networks.teacher_tokens(part.images)  # (b, n, c)
        if self.kept is None:
            if self.images * tokens[0].numel() * tokens.element_size() > self.MOST:
                self.images = 0
                return tokens
            self.kept = torch.empty(self.images, *tokens.shape[1:], dtype=tokens.dtype)
        self.kept[part.indices], self.pixels[part.indices] = tokens.cpu(), pixels
        return tokens


def _checksums(images: Tensor) -> Tensor:
    """Return a 64-bit number of each image (b, 3, height, width), (b,) on the CPU, that no other is likely to have."""
    bits = images.float().flatten(1).view(torch.int32).long()  # (b, 3 height width)
    places = torch.arange(1, bits.shape[1] + 1, device=bits.device)
    return ((bits ^ (places * 0x9E3779B97F4A7C1)) * (2 * places + 1)).sum(1).cpu()


def _picture(path: Path, images: Tensor) -> None:
    """Write images (b, 3, height, width) in [-1, 1] side by side as a PNG."""
    from torchvision.utils import save_image

    write_whole(
        path,
        lambda part: save_image(
            images, part, nrow=len(images), normalize=True, value_range=(-1, 1), padding=1, pad_value=1, format="png"
        ),
    )
