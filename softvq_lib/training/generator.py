"""Train a generator, DiT, SiT or MAR, on a tokenizer's cached latents (Sec. 4.1)."""

import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from softvq_lib import config as strictly
from softvq_lib.config import nearest, one_of, some
from softvq_lib.data import DataConfig, DataSplits, open_dataset, validation_batches
from softvq_lib.data.latents import NORMALISE, LatentBatch, LatentCache, latent_batches, tokenizer_hash
from softvq_lib.draws import Rows
from softvq_lib.features import build_features
from softvq_lib.generators import GeneratorConfig
from softvq_lib.generators.build import build_generator
from softvq_lib.generators.loading import save_generator
from softvq_lib.generators.sampling import SampleConfig, generate
from softvq_lib.tokenizers import Tokenizer
from softvq_lib.training import engine
from softvq_lib.training.config import TrainConfig
from softvq_lib.training.files import write_whole
from softvq_lib.training.latents import encode_dataset
from softvq_lib.training.run import Run, open_run, runs_folder, slug
from softvq_lib.training.teacher import TeacherTokens, check_unchanging, teacher_tokens
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
        align_cached: Its features of the training images are computed once for all runs, and rounded to float16. Not
            with `flip`.
    """

    tokenizer: str | None = None
    latents: str | None = None
    normalise: str = "scalar"
    align_teacher: str | None = None
    align_cached: bool = False

    def __post_init__(self):
        one_of("normalise", self.normalise, NORMALISE)
        if self.tokenizer == "":
            raise ValueError("tokenizer='' names nothing: give a tokenizer's folder, a run, a hub name, or None.")


CONFIGS = (LatentConfig, GeneratorConfig, DataConfig, TrainConfig, SampleConfig)


# Where the generators' defaults differ from the tokenizers'.
DEFAULTS = {"steps": 200, "lr": 1.0e-3, "beta2": 0.99, "weight_decay": 0.0}


def completed(parameters: Mapping[str, object]) -> dict[str, object]:
    """Fill in the generators' defaults and, where latents are aligned, the width of the teacher.

    Raises:
        ValueError: for a teacher without a block, or the reverse, or a width that is not the teacher's.
    """
    parameters = DEFAULTS | dict(parameters)
    teacher, block, width = (parameters.get(name) for name in ("align_teacher", "align_block", "align_width"))
    if (teacher is None) != (block is None):
        raise ValueError(f"align_teacher={teacher!r} and align_block={block!r} belong together: give both or neither.")
    if isinstance(teacher, str):
        parameters["align_width"] = there = build_features(teacher).width
        if width not in (None, there):
            raise ValueError(f"align_width={width}, but align_teacher={teacher!r} has {there}: leave align_width out.")
    return parameters


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
    listed = f"Trained there: {some(there)}." if there else "None is trained there yet."
    raise ValueError(
        f"tokenizer={name!r} is no folder with a tokenizer, no run of {runs_folder(runs)} and no hub name"
        f"{nearest(name, there) or '.'} {listed}"
    )


def train_generator(**parameters: object) -> Run:
    """Train the generator that flat parameters describe, or load it when its run is finished already.

    Encodes the data set first, once for all generators on the same tokenizer and data. Parameters are the fields of
    `LatentConfig`, `GeneratorConfig`, `DataConfig`, `TrainConfig` and, for the pictures of progress, `SampleConfig`.

    Raises:
        ValueError: for a parameter that is unknown or out of range, or a tokenizer, data or folder that cannot be
            used.
    """
    latent, config, data_config, settings, samples = strictly.split(completed(parameters), *CONFIGS)
    samples.arguments(config.generator)
    engine.choose_device(settings.device)
    if data_config.crop != 1:
        raise ValueError(f"crop={data_config.crop} has no meaning for latents, which are encoded once: leave it at 1.")
    cached = latent.align_teacher is not None and latent.align_cached
    if cached:
        check_unchanging("align_cached", data_config)
    if latent.tokenizer is None:
        found = {name: getattr(data_config, name) for name in ("image_column", "label_column", "workers", "streaming")}
        made = train_tokenizer(dataset=data_config.dataset, runs=settings.runs, device=settings.device, **found)
        latent = replace(latent, tokenizer=made.name)
    tokenizer = find_tokenizer(latent.tokenizer, settings.runs)
    size = tokenizer.config.image_size
    data = open_dataset(data_config, size)
    for name in ("tokens", "dim"):
        wanted, there = getattr(config, name), getattr(tokenizer.config, name)
        if wanted not in (None, there):
            raise ValueError(f"{name}={wanted}, but the latents of this tokenizer have {there}: leave {name} out.")
    classes = len(data.classes or [None])
    if config.classes is not None and config.classes < classes:
        raise ValueError(
            f"classes={config.classes}, but the data have {classes}: give as many or more, or leave it out."
        )
    config = replace(
        config, tokens=tokenizer.config.tokens, dim=tokenizer.config.dim, classes=config.classes or classes
    ).resolved()
    accelerator = engine.accelerator(settings.device)
    tokenizer.to(accelerator.device)
    identity = {
        **asdict(config),
        "data": data.fingerprint,
        "flip": data_config.flip,
        "tokenizer": tokenizer_hash(tokenizer),
        "normalise": latent.normalise,
        **({"align_teacher": latent.align_teacher} if latent.align_teacher else {}),
        **({"align_cached": True} if cached else {}),
        **settings.identity(),
    }
    run = open_run(
        f"{slug(data.name)}-{config.generator}-{config.size}-{config.tokens}x{config.dim}", identity, settings
    )
    run.data, run.tokenizer = data, tokenizer
    if run.found_finished():
        return run
    cache = _cache(identity["tokenizer"], tokenizer, data, data_config, latent, settings, accelerator)
    teacher = None if latent.align_teacher is None else build_features(latent.align_teacher)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = build_generator(config)
    trainer = GeneratorTrainer(run, model, tokenizer, teacher, cache, data, data_config, latent, settings, samples)
    if trainer.main:
        # What this generator cannot be sampled with is found now, and not in the middle of training.
        generate(trainer.measured, torch.zeros(1, dtype=torch.long), [0], samples)
    return trainer.run_to_the_end(parameters)


def _cache(
    whose: str,
    tokenizer: Tokenizer,
    data: DataSplits,
    data_config: DataConfig,
    latent: LatentConfig,
    settings: TrainConfig,
    accelerator,
) -> LatentCache:
    """Encode the training images, on the first process, unless the latents of the hash `whose` lie there already."""
    folder = Path(latent.latents).expanduser() if latent.latents else runs_folder(settings.runs) / "latents"
    made_of = [whose, data.fingerprint, tokenizer.config.image_size, data_config.flip]
    folder /= f"{slug(data.name)}-{tokenizer.config.tokens}x{tokenizer.config.dim}-{strictly.fingerprint(made_of)[:8]}"
    with accelerator.main_process_first():
        return encode_dataset(tokenizer, data, folder, flips=data_config.flip, workers=data_config.workers)


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
        self.length = tokenizer.config.tokens + (self.bare.config.buffer or 0)
        self.tokenizer, self.cache, self.latent, self.samples = tokenizer.to(self.device), cache, latent, samples
        self.data_config = data_config
        self.teacher = None if teacher is None else teacher.to(self.device)
        self.cached: TeacherTokens | None = None
        if teacher is not None and latent.align_cached:
            sizes = {"image_size": tokenizer.config.image_size, "side": self._side}
            given = {"runs": settings.runs, "parameter": "align_cached"}
            self.cached = teacher_tokens(self.teacher, data, data_config, **sizes, **given)
        self.held_out: tuple[Tensor, Tensor, Tensor | None] | None = None
        if settings.gradient_checkpointing:
            _keep_inputs_alone(self.bare)
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

    def backward(self, part: LatentBatch, first: int, share: float) -> dict[str, Tensor]:
        with self._autocast():
            seen = self._seen(part)
            loss, terms = self.model(part.latents, self._labels(part.labels), self.draws("generator", first), seen)
        (share * loss).backward()
        return {"loss": loss.detach(), **terms}

    @property
    def _side(self) -> int:
        """Image patches along one side."""
        return self.tokenizer.config.image_size // self.tokenizer.config.patch_size

    def _seen(self, part: LatentBatch) -> Tensor | None:
        """What the teacher sees in the images of a batch, (b, n, c)."""
        if self.cached is not None:
            return self.cached(part.indices).to(self.device)
        if self.teacher is None:
            return None
        return self._teacher_tokens(part.images(self.data.train, self.tokenizer.config.image_size))

    @torch.no_grad()
    def _teacher_tokens(self, images: Tensor) -> Tensor:
        return self.teacher.tokens(images.to(self.device), self._side)

    @torch.no_grad()
    def _held_out(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Normalised latents and labels of the first held-out images, and what the teacher sees in them."""
        if self.held_out is None:
            count = min(256, self.settings.val_images)
            size = self.tokenizer.config.image_size
            batches = list(validation_batches(self.data.validation, image_size=size, batch_size=64, limit=count))
            z = torch.cat([self.tokenizer.encode(batch.images.to(self.device)).z for batch in batches])
            labels = torch.cat([batch.labels for batch in batches]).to(self.device)
            seen = torch.cat([self._teacher_tokens(batch.images) for batch in batches]) if self.teacher else None
            self.held_out = self.cache.normalise(z.float(), self.latent.normalise), self._labels(labels), seen
            self.run.update(held_out=len(labels))
        return self.held_out

    @torch.no_grad()
    def measure(self, model: nn.Module) -> dict[str, float]:
        """Measure the loss of held-out latents, always at the same noise, and draw a sample of each class."""
        z, labels, seen = self._held_out()
        generator = engine.step_generator(self.device, 0, 0, "held-out")
        loss, terms = model(z, labels, Rows(generator, len(z)), seen)
        row = {"val_loss": float(loss)} | {f"val_{name}": float(value) for name, value in terms.items()}
        if self.step:
            rows, columns = (min(10, self.bare.config.classes), 8)
            classes = torch.arange(rows).repeat_interleave(columns)
            images = self.decode(generate(model, classes, list(range(rows * columns)), self.samples))
            folder = self.run.path / "images"
            folder.mkdir(exist_ok=True)
            _grid(folder / f"step-{self.step:08d}.png", images, columns)
        log.info("step %d of %d: held-out loss %.4f", self.step, self.settings.steps, row["val_loss"])
        return row

    def decode(self, latents: Tensor) -> Tensor:
        """Map normalised latents (b, l, d) to images (b, 3, height, width), clamped to [-1, 1]."""
        z = self.cache.denormalise(latents, self.latent.normalise).to(self.device)
        return torch.cat([self.tokenizer.decode(part) for part in z.split(64)]).float().clamp(-1, 1).cpu()

    def export(self, model: nn.Module) -> None:
        made, part = (self.run.path / name for name in ("generator", ".generator.part"))
        shutil.rmtree(part, ignore_errors=True)
        mean, std = self.cache.statistics(self.latent.normalise)
        save_generator(
            model,
            part,
            tokenizer=self.latent.tokenizer,
            tokenizer_hash=self.cache.header["tokenizer"],
            mean=mean,
            std=std,
            normalise=self.latent.normalise,
            trained=self.run.described(model.config),
        )
        shutil.rmtree(made, ignore_errors=True)
        part.rename(made)


def _keep_inputs_alone(model: nn.Module) -> None:
    """Have a backward pass find each transformer block's input alone, and compute the rest again."""
    if hasattr(model, "backbone"):
        model.backbone.checkpointing = True
        return
    for block in (*model.encoder_blocks, *model.decoder_blocks):  # timm's
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def _grid(path: Path, images: Tensor, columns: int) -> None:
    from torchvision.utils import save_image

    write_whole(
        path,
        lambda part: save_image(
            images, part, nrow=columns, normalize=True, value_range=(-1, 1), padding=1, pad_value=1, format="png"
        ),
    )
