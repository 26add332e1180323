"""Distil an encoder from a teacher whose features are known, for tokenizers to start from (Tab. 4, initial weights).

The paper starts its encoders from DINOv2. Where these weights cannot be had, or a network is of another size than the
published ones, the encoder's transformer is first trained to predict a packaged teacher's features of each image patch.
"""

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softvq_lib import config as strictly
from softvq_lib import weights
from softvq_lib.data import Batch, DataConfig, DataSplits, open_dataset, validation_batches
from softvq_lib.features import Features, build_features
from softvq_lib.losses.alignment import alignment_loss
from softvq_lib.tokenizers import Tokenizer, TokenizerConfig
from softvq_lib.tokenizers.vit import Encoder, patch_outputs
from softvq_lib.training import engine
from softvq_lib.training.config import TrainConfig
from softvq_lib.training.run import Run, open_run, runs_folder, slug
from softvq_lib.training.teacher import TeacherTokens, check_unchanging, teacher_tokens
from softvq_lib.training.trainer import Trainer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DistilConfig:
    """Which encoder is distilled from whom.

    Attributes:
        preset: Row of `PRESETS`; its encoder's network is trained.
        image_size: Height and width in pixels. None: the preset's.
        patch_size: Side of a patch in pixels. None: the preset's.
        encoder: Another network of the encoder, as in `TokenizerConfig`. None: the preset's.
        teacher: Whose features are predicted, see `softvq_lib.features`.
        teacher_random: A control: the teacher has random weights.
        cached: The teacher's features of the training images are computed once for all runs, and rounded to float16.
            For images that come unchanged every time: no `flip`, `crop` 1.
    """

    preset: str = "tiny"
    image_size: int | None = None
    patch_size: int | None = None
    encoder: str | None = None
    teacher: str = "efflite2"
    teacher_random: bool = False
    cached: bool = True

    def __post_init__(self):
        if not self.teacher:
            raise ValueError("teacher='' names nothing: write the name of a net such as efflite2.")
        self.tokenizer()

    def tokenizer(self) -> TokenizerConfig:
        """Return the configuration of a tokenizer with this encoder, resolved.

        Raises:
            ValueError: see `TokenizerConfig`.
        """
        sizes = {"image_size": self.image_size, "patch_size": self.patch_size, "encoder": self.encoder}
        return TokenizerConfig(preset=self.preset, tokens=1, dim=1, quantizer="ae", **sizes).resolved()


CONFIGS = (DistilConfig, DataConfig, TrainConfig)

# Where the defaults differ from the tokenizers'.
DEFAULTS = {"steps": 400, "limit": 500}


def distil(**parameters: object) -> Run:
    """Distil the encoder that flat parameters describe, or load it when its run is finished already.

    An interrupted run goes on from its newest checkpoint. The result lies in the folder `encoder` of the run, from
    which `encoder_start` of `train_tokenizer` takes it. Parameters are the fields of `DistilConfig`, `DataConfig` and
    `TrainConfig`.

    Raises:
        ValueError: for a parameter that is unknown or out of range, data or weights that cannot be had, or a folder
            that cannot be used.
    """
    config, data_config, settings = strictly.split(DEFAULTS | parameters, *CONFIGS)
    if config.cached:
        check_unchanging("cached", data_config)
    engine.choose_device(settings.device)
    sizes = config.tokenizer()
    data = open_dataset(data_config, sizes.image_size)
    identity = {
        "distilled": _description(sizes),
        **{name: getattr(config, name) for name in ("teacher", "teacher_random", "cached")},
        **{"data": data.fingerprint, "flip": data_config.flip, "crop": data_config.crop},
        **settings.identity(),
    }
    run = open_run(f"{slug(data.name)}-{config.preset}-distilled-{slug(config.teacher)}", identity, settings)
    run.data = data
    if run.found_finished():
        return run
    teacher = build_features(
        config.teacher,
        random=config.teacher_random,
        seed=settings.seed,
        image_size=sizes.image_size,
        patch_size=sizes.patch_size,
    )
    trainer = DistilTrainer(run, teacher, data, config, data_config, settings)
    return trainer.run_to_the_end(parameters)


class Distilled(nn.Module):
    """An encoder's transformer on image patches alone, without latent tokens, and a linear map to the teacher's width.

    Args:
        config: Resolved, of a tokenizer with this encoder.
        teacher_width: Channels of the teacher's features.
    """

    def __init__(self, config: TokenizerConfig, teacher_width: int):
        super().__init__()
        network, overrides = config.encoder_network
        encoder = Encoder(network, config.image_size, config.patch_size, config.tokens, overrides)
        self.vit = encoder.vit
        self.head = nn.Linear(encoder.width, teacher_width)

    def forward(self, images: Tensor) -> Tensor:
        """Predict the teacher's features (b, n, teacher_width) of images (b, 3, height, width) in [-1, 1]."""
        return self.head(patch_outputs(self.vit, images))


class DistilTrainer(Trainer):
    """Minus the cosine with the teacher's features, averaged over the patches (as in Eq. 6), on the engine."""

    def __init__(
        self,
        run: Run,
        teacher: Features,
        data: DataSplits,
        config: DistilConfig,
        data_config: DataConfig,
        settings: TrainConfig,
    ):
        self.sizes = config.tokenizer()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            model = Distilled(self.sizes, teacher.width)
        model.vit.set_grad_checkpointing(settings.gradient_checkpointing)
        super().__init__(run, model, data, settings)
        self.length = self.sizes.patches + model.vit.num_prefix_tokens
        self.data_config, self.teacher = data_config, teacher.to(self.device)
        self.side = self.sizes.image_size // self.sizes.patch_size
        self.cached: TeacherTokens | None = None
        if config.cached:
            given = {"image_size": self.sizes.image_size, "side": self.side, "runs": settings.runs}
            self.cached = teacher_tokens(self.teacher, data, data_config, **given)
        self.held_out: list[tuple[Tensor, Tensor]] = []
        if settings.compile:
            self.bare.compile()

    def batches(self, start_step: int) -> Iterator[Batch]:
        return self.image_batches(start_step, self.sizes.image_size, self.data_config)

    @torch.no_grad()
    def _seen(self, images: Tensor) -> Tensor:
        """The teacher's features of images on the device, (b, n, c)."""
        with self._autocast():
            return self.teacher.tokens(images, self.side)

    def backward(self, part: Batch, first: int, share: float) -> dict[str, Tensor]:
        seen = self._seen(part.images) if self.cached is None else self.cached(part.indices).to(self.device)
        with self._autocast():
            predicted = self.model(part.images)
        loss = alignment_loss(predicted, seen).mean()
        (share * loss).backward()
        return {"loss": loss.detach()}

    @torch.no_grad()
    def measure(self, model: Distilled) -> dict[str, float]:
        """Measure the cosine with the teacher on the first held-out images: mean, and its standard error over them."""
        if not self.held_out:
            count = min(256, self.settings.val_images)
            size = self.sizes.image_size
            for batch in validation_batches(self.data.validation, image_size=size, batch_size=64, limit=count):
                images = batch.images.to(self.device)
                self.held_out.append((images, self._seen(images)))
            seen = torch.cat([seen for _, seen in self.held_out])  # (images, n, c)
            # Features of all images share much: what one and the same prediction for all of them would score at best.
            constant = F.normalize(seen, dim=-1).mean(0).expand_as(seen)
            same = float(-alignment_loss(constant, seen).mean())
            self.run.update(held_out=len(seen), constant_cosine=same)
        with self._autocast():
            cosine = torch.cat([-alignment_loss(model(images), seen) for images, seen in self.held_out])  # (images,)
        row = {"val_cosine": float(cosine.mean())}
        if len(cosine) > 1:
            row["val_cosine_error"] = float(cosine.std() / len(cosine) ** 0.5)
        log.info("step %d of %d: held-out cosine %.4f", self.step, self.settings.steps, row["val_cosine"])
        return row

    def export(self, model: Distilled) -> None:
        made, part = (self.run.path / name for name in ("encoder", ".encoder.part"))
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        about = {**_description(self.sizes), "teacher": self.teacher.label, "teacher_weights": self.teacher.fingerprint}
        weights.save(model.vit, part, lambda sha256: {**about, "weights_sha256": sha256})
        shutil.rmtree(made, ignore_errors=True)
        part.rename(made)


def _description(config: TokenizerConfig) -> dict[str, object]:
    """All that must be equal for one encoder's transformer to take another's weights.

    The network itself, and not the preset that names it: what a preset means may change.
    """
    network, overrides = config.encoder_network
    return {
        "network": network,
        "overrides": dict(overrides),
        "image_size": config.image_size,
        "patch_size": config.patch_size,
    }


def find_encoder(name: str, runs: str | None = None) -> Path:
    """Find the folder of a distilled encoder, given it or its run's folder, or the run's name.

    Raises:
        ValueError: for a folder or run that holds none, naming the runs that there are.
    """
    folder = Path(name).expanduser()
    for place in (folder, folder / "encoder", runs_folder(runs) / name / "encoder"):
        if (place / weights.CONFIG).exists() and (place / weights.WEIGHTS).exists():
            return place
    there = sorted(path.parents[1].name for path in runs_folder(runs).glob(f"*/encoder/{weights.WEIGHTS}"))
    listed = f" Distilled there: {', '.join(there)}." if there else " None is distilled there yet."
    raise ValueError(
        f"encoder_start={name!r} is no folder with a distilled encoder and no run of {runs_folder(runs)}.{listed}"
    )


def start_encoder(tokenizer: Tokenizer, folder: Path) -> str:
    """Give a tokenizer's encoder the transformer of a distilled one; its latent tokens stay as they are.

    Returns:
        The sha256 (hex) of the weights.

    Raises:
        ValueError: when the two are not of one size, saying both, or the files are damaged.
    """
    about = weights.read_settings(folder / weights.CONFIG)
    wanted = _description(tokenizer.config)
    if missing := sorted({*wanted, "weights_sha256"} - set(about)):
        raise ValueError(f"{folder} holds no distilled encoder ({', '.join(missing)} missing in {weights.CONFIG}).")
    if any(about[name] != value for name, value in wanted.items()):
        raise ValueError(
            f"{folder} holds an encoder {_spell(about)}, but the tokenizer's is {_spell(wanted)}: distil one of the "
            "tokenizer's size, or choose the tokenizer's preset, encoder, image_size and patch_size as there."
        )
    weights.verify(folder / weights.WEIGHTS, about["weights_sha256"])
    weights.fill(tokenizer.encoder.vit, folder / weights.WEIGHTS, folder / weights.CONFIG)
    return about["weights_sha256"]


def _spell(about: dict) -> str:
    size, patch = about["image_size"], about["patch_size"]
    return f"for {size} px in patches of {patch} px ({about['network']}, {json.dumps(about['overrides'])})"
