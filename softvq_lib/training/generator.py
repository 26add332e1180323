"""Train a generator, DiT, SiT or MAR, on a tokenizer's cached latents (Sec. 4.1)."""

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from softvq_lib import config as strictly
from softvq_lib.config import one_of
from softvq_lib.data import DataConfig, DataSplits, open_dataset, validation_batches
from softvq_lib.data.latents import NORMALISE, LatentCache, latent_batches, tokenizer_hash
from softvq_lib.draws import Rows
from softvq_lib.features import build_features
from softvq_lib.generators import GeneratorConfig
from softvq_lib.generators.build import build_generator
from softvq_lib.generators.loading import save_generator
from softvq_lib.generators.sampling import SampleConfig, generate
from softvq_lib.tokenizers import Tokenizer
from softvq_lib.training import engine
from softvq_lib.training.config import TrainConfig
from softvq_lib.training.files import check_writable, write_whole
from softvq_lib.training.latents import encode_dataset
from softvq_lib.training.run import Run, open_run, runs_folder, slug
from softvq_lib.training.tokenizer import train as train_tokenizer
from softvq_lib.training.trainer import Trainer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LatentConfig:
    """Which latents a generator is trained on.

    Attributes:
        tokenizer: Folder of a tokenizer, name of a run in the folder of runs, or a hub name. None: the one that
            `softvq_lib.train_tokenizer` trains on the same data with its defaults.
        latents: Folder of latent caches. None: `latents` in the folder of runs.
        normalise: By the mean and standard deviation of all latents (`scalar`, as the release does), or of each
            channel.
        align_teacher: Teacher of REPA, see `softvq_lib.features`; needs align_block.
    """

    tokenizer: str | None = None
    latents: str | None = None
    normalise: str = "scalar"
    align_teacher: str | None = None

    def __post_init__(self):
        one_of("normalise", self.normalise, NORMALISE)
        if self.tokenizer == "":
            raise ValueError("tokenizer='' names nothing: give a tokenizer's folder, a run, a hub name, or None.")


CONFIGS = (LatentConfig, GeneratorConfig, DataConfig, TrainConfig, SampleConfig)


# Where the generators' defaults differ from the tokenizers'.
DEFAULTS = {"steps": 200, "lr": 1.0e-3, "beta2": 0.99, "weight_decay": 0.0}


def find_tokenizer(name: str, runs: str | None = None) -> Tokenizer:
    """Load a tokenizer from a folder, from a run by its name, or from the hub.

    Raises:
        ValueError: for a folder or run that holds none, naming the runs that there are.
    """
    folder = Path(name).expanduser()
    for place in (folder, folder / "tokenizer", runs_folder(runs) / name / "tokenizer"):
        if (place / "config.json").exists() and (place / "model.safetensors").exists():
            return Tokenizer.from_pretrained(place).eval()
    if name.count("/") == 1 and not folder.exists():
        return Tokenizer.from_pretrained(name).eval()
    there = sorted(path.parents[1].name for path in runs_folder(runs).glob("*/tokenizer/model.safetensors"))
    listed = f" Trained there: {', '.join(there)}." if there else " None is trained there yet."
    raise ValueError(
        f"tokenizer={name!r} is no folder with a tokenizer, no run of {runs_folder(runs)} and no hub name.{listed}"
    )


def train_generator(**parameters: object) -> Run:
    """Train the generator that flat parameters describe, or load it when its run is finished already.

    Encodes the data set first, once for all generators on the same tokenizer and data. Parameters are the fields of
    `LatentConfig`, `GeneratorConfig`, `DataConfig`, `TrainConfig` and, for the pictures of progress, `SampleConfig`.

    Raises:
        ValueError: for a parameter that is unknown or out of range, or a tokenizer, data or folder that cannot be
            used.
    """
    latent, config, data_config, settings, samples = strictly.split(DEFAULTS | parameters, *CONFIGS)
    samples.arguments(config.generator)
    engine.choose_device(settings.device)
    if data_config.crop != 1:
        raise ValueError(f"crop={data_config.crop} has no meaning for latents, which are encoded once: leave it at 1.")
    if (latent.align_teacher is None) != (config.align_block is None):
        raise ValueError(
            f"align_teacher={latent.align_teacher!r} and align_block={config.align_block!r} belong together: give both "
            "or neither."
        )
    if latent.tokenizer is None:
        made = train_tokenizer(dataset=data_config.dataset, runs=settings.runs, device=settings.device)
        latent = replace(latent, tokenizer=made.name)
    tokenizer = find_tokenizer(latent.tokenizer, settings.runs)
    size = tokenizer.config.image_size
    data = open_dataset(data_config, size)
    teacher = None
    if latent.align_teacher is not None:
        teacher = build_features(latent.align_teacher)
        config = replace(config, align_width=teacher.width)
    config = replace(
        config,
        tokens=tokenizer.config.tokens,
        dim=tokenizer.config.dim,
        classes=config.classes or len(data.classes or [None]),
    ).resolved()
    accelerator = engine.accelerator(settings.device)
    tokenizer.to(accelerator.device)
    cache = _cache(tokenizer, data, data_config.flip, latent, settings, accelerator.main_process_first())
    identity = {
        **asdict(config),
        "data": data.fingerprint,
        "flip": data_config.flip,
        "tokenizer": cache.header["tokenizer"],
        "normalise": latent.normalise,
        **({"align_teacher": latent.align_teacher} if teacher else {}),
        **settings.identity(),
    }
    run = open_run(
        f"{slug(data.name)}-{config.generator}-{config.size}-{config.tokens}x{config.dim}", identity, settings
    )
    run.data = data
    if run.finished:
        run.warn_if_code_changed()
        log.info("run %s is finished: it is loaded, not trained again.", run.name)
        return run
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = build_generator(config)
    trainer = GeneratorTrainer(run, model, tokenizer, teacher, cache, data, data_config, latent, settings, samples)
    if trainer.main:
        check_writable(run.path, needed=trainer.checkpoint_bytes * (settings.keep + 1))
        run.claim(parameters, settings.change)
    with engine.log_to(run.path / "log.txt" if trainer.main else None):
        trainer.fit()
    return run


def _cache(
    tokenizer: Tokenizer, data: DataSplits, flips: bool, latent: LatentConfig, settings: TrainConfig, main_first
):
    """Encode the training images, on the first process, unless their latents lie there already."""
    folder = Path(latent.latents).expanduser() if latent.latents else runs_folder(settings.runs) / "latents"
    made_of = [tokenizer_hash(tokenizer), data.fingerprint, tokenizer.config.image_size, flips]
    folder /= f"{slug(data.name)}-{tokenizer.config.tokens}x{tokenizer.config.dim}-{strictly.fingerprint(made_of)[:8]}"
    with main_first:
        return encode_dataset(tokenizer, data, folder, flips=flips)


class GeneratorTrainer(Trainer):
    """The generators' losses on the engine."""

    unit = "latents"

    def __init__(
        self,
        run: Run,
        model: nn.Module,
        tokenizer: Tokenizer,
        teacher: nn.Module | None,
        cache: LatentCache,
        data: DataSplits,
        data_config: DataConfig,
        latent: LatentConfig,
        settings: TrainConfig,
        samples: SampleConfig,
    ):
        super().__init__(run, model, data, settings)
        self.tokenizer, self.cache, self.latent, self.samples = tokenizer.to(self.device), cache, latent, samples
        self.data_config = data_config
        self.teacher = None if teacher is None else teacher.to(self.device)
        self.held_out: tuple[Tensor, Tensor] | None = None
        if settings.compile:
            self.bare.compile()

    def batches(self, start_step: int) -> Iterator:
        return latent_batches(
            self.cache,
            batch_size=self.settings.batch_size,
            seed=self.settings.seed,
            steps=self.settings.steps,
            start_step=start_step,
            flip=self.data_config.flip,
            normalise=self.latent.normalise,
            part=(self.rank, self.processes),
        )

    def _labels(self, labels: Tensor) -> Tensor:
        """Data without labels are one class."""
        return labels if self.data.classes else torch.zeros_like(labels)

    def backward(self, part, first: int, share: float) -> dict[str, Tensor]:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            seen = None if self.teacher is None else self._teacher_tokens(part)
            loss, terms = self.model(part.latents, self._labels(part.labels), self.draws("generator", first), seen)
        (share * loss).backward()
        return {"loss": loss.detach(), **terms}

    @torch.no_grad()
    def _teacher_tokens(self, part) -> Tensor:
        images = part.images(self.data.train, self.tokenizer.config.image_size).to(self.device)
        side = self.tokenizer.config.image_size // self.tokenizer.config.patch_size
        return self.teacher.tokens(images, side)

    @torch.no_grad()
    def _held_out(self) -> tuple[Tensor, Tensor]:
        """Normalised latents and labels of the first held-out images."""
        if self.held_out is None:
            count = min(256, self.settings.val_images)
            size = self.tokenizer.config.image_size
            batches = list(validation_batches(self.data.validation, image_size=size, batch_size=64, limit=count))
            z = torch.cat([self.tokenizer.encode(batch.images.to(self.device)).z for batch in batches])
            labels = torch.cat([batch.labels for batch in batches]).to(self.device)
            self.held_out = self.cache.normalise(z.float(), self.latent.normalise), self._labels(labels)
        return self.held_out

    @torch.no_grad()
    def measure(self, model: nn.Module) -> dict[str, float]:
        """Measure the loss of held-out latents, always at the same noise, and draw a sample of each class."""
        z, labels = self._held_out()
        generator = engine.step_generator(self.device, 0, 0, "held-out")
        row = {}
        if self.teacher is None:
            loss, terms = model(z, labels, Rows(generator, len(z)))
            row = {"val_loss": float(loss)} | {f"val_{name}": float(value) for name, value in terms.items()}
        if self.step:
            rows, columns = (min(10, self.bare.config.classes), 8)
            classes = torch.arange(rows).repeat_interleave(columns)
            images = self.decode(generate(model, classes, list(range(rows * columns)), self.samples))
            folder = self.run.path / "images"
            folder.mkdir(exist_ok=True)
            _grid(folder / f"step-{self.step:08d}.png", images, columns)
        log.info("step %d of %d: held-out loss %s", self.step, self.settings.steps, row.get("val_loss", "not measured"))
        return row

    def decode(self, latents: Tensor) -> Tensor:
        """Map normalised latents (b, l, d) to images (b, 3, height, width), clamped to [-1, 1]."""
        z = self.cache.denormalise(latents, self.latent.normalise).to(self.device)
        return torch.cat([self.tokenizer.decode(part) for part in z.split(64)]).float().clamp(-1, 1).cpu()

    def export(self, model: nn.Module) -> None:
        how = self.latent.normalise
        save_generator(
            model,
            self.run.path / "generator",
            tokenizer=self.latent.tokenizer,
            tokenizer_hash=self.cache.header["tokenizer"],
            mean=self.cache.header["mean"][how],
            std=self.cache.header["std"][how],
            normalise=how,
        )


def _grid(path: Path, images: Tensor, columns: int) -> None:
    from torchvision.utils import save_image

    write_whole(
        path,
        lambda part: save_image(
            images, part, nrow=columns, normalize=True, value_range=(-1, 1), padding=1, pad_value=1, format="png"
        ),
    )
