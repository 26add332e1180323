"""Train a tokenizer (Sec. 4.1): the loop on one device, resumable at any checkpoint."""

import json
import logging
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from softvq_lib import config as strictly
from softvq_lib.data import DataConfig, DataSplits, UnreadableLog, open_dataset, training_batches
from softvq_lib.losses import LossConfig, objective
from softvq_lib.tokenizers import NotFiniteError, Tokenizer, TokenizerConfig
from softvq_lib.training import checkpoint, engine
from softvq_lib.training.config import TrainConfig
from softvq_lib.training.files import check_writable, read_lines, write_whole
from softvq_lib.training.run import Run, now, provenance, runs_folder, slug
from softvq_lib.training.validation import reconstruct

log = logging.getLogger(__name__)

CONFIGS = (TokenizerConfig, DataConfig, LossConfig, TrainConfig)
SHOWN = 8  # held-out images in each picture of progress
_MEASURED_AT = (0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)  # shares of the steps at which the held-out images are measured


def train(**parameters: object) -> Run:
    """Train the tokenizer that flat parameters describe, or load it when its run is finished already.

    An interrupted run goes on from its newest checkpoint. Parameters are the fields of `TokenizerConfig`,
    `DataConfig`, `LossConfig` and `TrainConfig`.

    Raises:
        ValueError: for a parameter that is unknown or out of range, data that cannot be had, or a folder that cannot
            be used; before anything is trained, leaving existing files as they were.
    """
    tokenizer_config, data_config, loss_config, settings = strictly.split(parameters, *CONFIGS)
    tokenizer_config = tokenizer_config.resolved()
    loss_config = loss_config.resolved(tokenizer_config.quantizer)
    device = engine.choose_device(settings.device)
    data = open_dataset(data_config, tokenizer_config.image_size)
    model, tokenizer_config = _build(tokenizer_config, settings.seed)
    run = _open_run(tokenizer_config, data_config, loss_config, settings, data)
    run.data = data
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if run.finished:
        run.warn_if_code_changed()
        log.info("run %s is finished: it is loaded, not trained again.", run.name)
        return run
    check_writable(run.path, needed=4 * (checkpoint.KEEP + 2) * weights)
    run.claim(parameters)
    with engine.log_to(run.path / "log.txt"):
        _Trainer(run, model, data, data_config, loss_config, settings, device).fit()
    return run


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


def _open_run(
    tokenizer: TokenizerConfig, data_config: DataConfig, loss: LossConfig, settings: TrainConfig, data: DataSplits
) -> Run:
    training = {k: v for k, v in asdict(settings).items() if k not in TrainConfig.NOT_IDENTITY}
    seen = {"data": data.fingerprint, "flip": data_config.flip, "crop": data_config.crop}
    identity = {**asdict(tokenizer), **seen, **asdict(loss), **training}
    name = settings.run or "-".join(
        [
            slug(data.name),
            tokenizer.preset,
            tokenizer.quantizer,
            f"{tokenizer.tokens}x{tokenizer.dim}",
            strictly.fingerprint(identity)[:8],
        ]
    )
    run = Run(runs_folder(settings.runs) / name, identity)
    if (run.path / "config.json").exists():
        run.claim({})
    return run


class _Trainer:
    """State of one call of `train`."""

    def __init__(
        self,
        run: Run,
        model: Tokenizer,
        data: DataSplits,
        data_config: DataConfig,
        loss_config: LossConfig,
        settings: TrainConfig,
        device: torch.device,
    ):
        self.run, self.data, self.data_config, self.loss_config = run, data, data_config, loss_config
        self.settings, self.device = settings, device
        self.model = model.to(device)
        self.average = engine.moving_average(self.model, settings.ema)
        self.optimizer = engine.adamw(self.model, settings.lr, settings.beta2, settings.weight_decay)
        self.dtype = engine.choose_precision(settings.precision, device)
        self.step = 0
        self.every = settings.checkpoint_every or max(1, min(1000, settings.steps // 10))
        self.measured_at = {round(share * settings.steps) for share in _MEASURED_AT}
        self.unreadable = UnreadableLog(len(data.train))

    # -- state ---------------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"ema.{name}": value for name, value in self.average.state_dict().items()}
        return tensors | {
            f"optimizer.{name}": value for name, value in checkpoint.optimizer_tensors(self.optimizer).items()
        }

    def _save(self) -> None:
        checkpoint.save(self.run.path / "checkpoints", self.step, self._tensors())

    def _restore(self) -> None:
        found = checkpoint.newest(self.run.path / "checkpoints")
        if found:
            self.step, tensors = found

            def part(prefix: str) -> dict[str, Tensor]:
                return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}

            self.model.load_state_dict(part("model."))
            self.average.load_state_dict(part("ema."))
            checkpoint.load_optimizer(self.optimizer, part("optimizer."))
            log.info("run %s goes on from step %d of %d.", self.run.name, self.step, self.settings.steps)
        for name in ("metrics.jsonl", "timings.jsonl"):  # rows after the checkpoint will be written again
            path = self.run.path / name
            kept = [json.dumps(row) + "\n" for row in read_lines(path) if row["step"] <= self.step]
            write_whole(path, lambda part, kept=kept: part.write_text("".join(kept if found else [])))

    def _append(self, name: str, row: dict) -> None:
        with open(self.run.path / name, "a") as file:
            file.write(json.dumps({"step": self.step, **row}) + "\n")

    # -- measuring -----------------------------------------------------------------------------------------------

    def _measure(self) -> None:
        """Measure the averaged weights on held-out images and draw some of them."""
        measured = reconstruct(
            self.average.module if self.step else self.model,
            self.data.validation,
            limit=min(256, self.settings.val_images),
            batch_size=min(64, self.settings.batch_size),
            shown=SHOWN,
            dtype=self.dtype,
        )
        row = {"val_psnr": float(measured.psnr.mean())}
        row |= {f"val_{name}": value for name, value in measured.usage.items()}
        self._append("metrics.jsonl", row)
        folder = self.run.path / "images"
        folder.mkdir(exist_ok=True)
        _picture(folder / "originals.png", measured.images)
        _picture(folder / f"step-{self.step:08d}.png", measured.reconstructions)
        codes = ""
        if measured.usage:
            codes = f", codebook usage {100 * row['val_usage']:.0f} %, perplexity {row['val_perplexity']:.0f}"
        log.info("step %d of %d: held-out PSNR %.2f dB%s", self.step, self.settings.steps, row["val_psnr"], codes)

    # -- the loop ------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Run all steps that are left, then export the averaged tokenizer."""
        from tqdm import tqdm

        settings, run = self.settings, self.run
        began = now()
        self._restore()
        first = self.step
        run.update(
            status="running",
            started=run.manifest.get("started", began),
            resumed_at=[*run.manifest.get("resumed_at", []), *([first] if first else [])],
            data={"name": self.data.name, "fingerprint": self.data.fingerprint},
            device=str(self.device),
            device_name=engine.device_name(self.device),
            precision=str(self.dtype).removeprefix("torch."),
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            **provenance(),
        )
        log.info("%s; tokenizer of %.2f M parameters", self.data.describe(), run.manifest["parameters"] / 1e6)
        log.info("training on %s in %s", run.manifest["device_name"], run.manifest["precision"])
        if self.step == 0:
            self._measure()
        batches = training_batches(
            self.data.train,
            image_size=self.model.config.image_size,
            batch_size=settings.batch_size,
            seed=settings.seed,
            start_step=self.step,
            steps=settings.steps,
            flip=self.data_config.flip,
            crop=self.data_config.crop,
            workers=self.data_config.workers,
        )
        terminal = sys.stderr.isatty()
        bar = tqdm(
            batches,
            total=settings.steps,
            initial=first,
            unit="step",
            desc=run.name,
            mininterval=0.5 if terminal else 10,
        )
        sums: dict[str, Tensor] = {}
        clock = time.perf_counter()
        for batch in bar:
            self.unreadable.add(batch.unreadable)
            terms = self._update(batch.images.to(self.device, non_blocking=True), batch.indices)
            self.step += 1
            for name, value in terms.items():
                sums[name] = sums.get(name, 0) + value
            if self.step % settings.log_every == 0 or self.step == settings.steps:
                count = (self.step - 1) % settings.log_every + 1
                means = {name: value.item() / count for name, value in sums.items()}
                self._append("metrics.jsonl", {**means, "lr": self.optimizer.param_groups[0]["lr"]})
                seconds = time.perf_counter() - clock
                rate = count * settings.batch_size / seconds
                self._append("timings.jsonl", {"seconds": seconds, "images_per_second": rate, "time": now()})
                bar.set_postfix_str(f"loss {means['loss']:.4f}, {rate:.0f} images/s", refresh=False)
                sums = {}
                clock = time.perf_counter()
            pause = time.perf_counter()
            if self.step in self.measured_at:
                self._measure()
            if self.step % self.every == 0 and self.step < settings.steps:
                self._save()
            clock += time.perf_counter() - pause  # the rate is that of training alone
        self._save()
        tokenizer = self.average.module.eval()
        tokenizer.save_pretrained(run.path / "tokenizer")
        run.trained = settings.steps - first
        run.update(status="finished", ended=now())
        log.info("finished %d steps: %s", settings.steps, run.path)

    def _update(self, images: Tensor, indices: Tensor) -> dict[str, Tensor]:
        """Make one optimiser step; return detached terms."""
        settings = self.settings
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = engine.learning_rate(self.step, settings.steps, settings.lr, settings.warmup, settings.min_lr)
        # Seeded by the step: nothing of it needs to be saved for a run that goes on to draw the same numbers.
        generator = torch.Generator(self.device)
        generator.manual_seed(int(strictly.fingerprint([settings.seed, self.step])[:8], 16))
        try:
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                reconstructions, code = self.model(images, generator)
        except NotFiniteError as error:
            shown = ", ".join(map(str, indices[:8].tolist()))
            raise FloatingPointError(f"step {self.step}: {error} (images {shown}, …)") from None
        loss, terms = objective(self.loss_config, images, reconstructions, code.losses)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        terms = {"loss": loss.detach(), **{name: term.detach() for name, term in terms.items()}}
        engine.check_finite(self.step, norm, terms, indices)
        self.optimizer.step()
        self.average.update_parameters(self.model)
        return {**terms, "gradient_norm": norm}


def _picture(path: Path, images: Tensor) -> None:
    """Write images (b, 3, height, width) in [-1, 1] side by side as a PNG."""
    from torchvision.utils import save_image

    write_whole(
        path,
        lambda part: save_image(
            images, part, nrow=len(images), normalize=True, value_range=(-1, 1), padding=1, pad_value=1, format="png"
        ),
    )
