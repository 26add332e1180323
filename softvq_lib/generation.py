"""The generator experiment: train or load, sample by class, judge where there is a judge, record (Fig. 1, Sec. 4.2)."""

import logging
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from softvq_lib import config as strictly
from softvq_lib import results as rows_of
from softvq_lib.cards import Number
from softvq_lib.config import at_least
from softvq_lib.data import DataSplits
from softvq_lib.distributed import rank
from softvq_lib.experiments import RecordConfig
from softvq_lib.generators.loading import Loaded, describe_generator, load_generator
from softvq_lib.generators.sampling import SampleConfig
from softvq_lib.sampling import sample_images
from softvq_lib.tokenizers import Tokenizer
from softvq_lib.training import Run
from softvq_lib.training.engine import choose_device
from softvq_lib.training.generator import CONFIGS, completed
from softvq_lib.training.generator import train_generator as train

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShowConfig:
    """How the finished generator is looked at.

    Attributes:
        columns: Samples of each class in the grid.
        judged: Samples that a classifier trained on real digits judges, at least two of each; digits only. 0: none.
        sample_seed: Of the samples; image i has the seed sample_seed + i.
    """

    columns: int = 8
    judged: int = 0
    sample_seed: int = 0

    def __post_init__(self):
        at_least("columns", self.columns, 1)
        at_least("judged", self.judged, 0)
        if 0 < self.judged < 20:
            raise ValueError(f"judged={self.judged} is too few: give at least 20, two of each digit, or 0 for none.")
        at_least("sample_seed", self.sample_seed, 0)


GENERATOR_EXPERIMENT = (*CONFIGS, ShowConfig, RecordConfig)


@dataclass
class GeneratorExperiment:
    """A trained generator and samples of it.

    Attributes:
        run: The run on the disk.
        data: The data set whose latents it was trained on.
        tokenizer: Decodes its latents.
        loaded: The generator with the statistics of the latents.
        settings: How the samples were made.
        columns: Samples of each class in `grid`.
        seed: Of the first sample.
        judgement: What the judge of digits found (see `softvq_lib.evaluation.generated.judge`), the same of decoded
            held-out digits under `decoded_...`, and the judge's own accuracy; {} without a judge.
        judged: The images that were judged, (n, 3, height, width) in [-1, 1], and their labels (n,).
    """

    run: Run
    data: DataSplits
    tokenizer: Tokenizer
    loaded: Loaded
    settings: SampleConfig
    columns: int
    seed: int
    judgement: dict = field(default_factory=dict)
    judged: tuple[Tensor, Tensor] | None = None

    @property
    def classes(self) -> list[str]:
        """Names of the classes, of data without labels one."""
        return self.data.classes or ["image"]

    def sample(self, labels: Tensor, seed: int, progress=None) -> Tensor:
        """Generate images of the classes `labels` (b,), float32 (b, 3, height, width) in [-1, 1]."""
        seeds = range(seed, seed + len(labels))
        return sample_images(self.loaded, self.tokenizer, labels, seeds, self.settings, progress=progress)

    @property
    def labels(self) -> Tensor:
        """Classes of `grid`, (n,): at most ten, `columns` samples of each."""
        return torch.arange(min(10, len(self.classes))).repeat_interleave(self.columns)

    @cached_property
    def grid(self) -> Tensor:
        """Samples by class, (b, 3, height, width) in [-1, 1]."""
        return self.sample(self.labels, self.seed)

    @property
    def numbers(self) -> dict[str, tuple[float, float | None, float | None]]:
        """The judgement's single numbers with their intervals, None where there is none."""
        single = {name: value for name, value in self.judgement.items() if not isinstance(value, list)}
        return {name: x if isinstance(x, tuple) else (float(x), None, None) for name, x in single.items()}

    def rows(self) -> list[Number]:
        """All that was measured, by the names of results rows: the loss of held-out latents, and the judgement."""
        losses = [row["val_loss"] for row in self.run.metrics if "val_loss" in row]
        rows = [Number("val_loss", float(losses[-1]), self.run.manifest.get("held_out", 256))]
        for name, (value, low, high) in self.numbers.items():
            # Shares of the held-out digits, and what is measured on them.
            of_held_out = name.startswith("decoded") or name.endswith("recall") or name == "real_agreement"
            n = len(self.data.validation if of_held_out else self.judged[1])
            rows.append(Number(name, value, n, low, high, "" if low is None else "95 % Wilson"))
        return rows

    def __str__(self) -> str:
        identity = self.run.identity
        lines = [
            f"{identity['generator']} {identity['size']}, {identity['tokens']} tokens x {identity['dim']}, "
            f"{self.run.manifest['parameters'] / 1e6:.2f} M parameters, {identity['steps']} steps"
        ]
        for name, (value, low, high) in self.numbers.items():
            interval = "" if low is None else f"  [{low:.3f}, {high:.3f}]"
            lines.append(f"{name.replace('_', ' '):34}{value:8.3f}{interval}")
        return "\n".join(lines)


def train_generator(**values: object) -> GeneratorExperiment | None:
    """Train (or load) a generator on a tokenizer's latents, sample it, judge the samples, and record rows if asked to.

    Of several processes that train together the first samples and returns the experiment; the others return None.

    Args:
        values: Fields of `LatentConfig`, `GeneratorConfig`, `DataConfig`, `TrainConfig`, `SampleConfig`, `ShowConfig`
            and `RecordConfig`.

    Raises:
        ValueError: for a parameter that is unknown (the nearest is named) or out of range, and for a tokenizer, data
            or folders that cannot be used.
    """
    values = completed(values)
    _, _, data_config, settings, samples, show, record = strictly.split(values, *GENERATOR_EXPERIMENT)
    if show.judged and data_config.dataset != "digits":
        raise ValueError(
            f"judged={show.judged} needs dataset='digits', because the judge is a classifier of digits; with "
            f"dataset={data_config.dataset!r} leave judged out."
        )
    mine = {**strictly.fields_of(ShowConfig), **strictly.fields_of(RecordConfig)}
    run = train(**{name: value for name, value in values.items() if name not in mine})
    if rank():
        return None
    loaded = load_generator(run.path / "generator")
    device = choose_device(settings.device)
    loaded.model.to(device)
    experiment = GeneratorExperiment(
        run=run,
        data=run.data,
        tokenizer=run.tokenizer.to(device),
        loaded=loaded,
        settings=samples,
        columns=show.columns,
        seed=show.sample_seed,
    )
    if show.judged:
        experiment.judgement = _judge(experiment, show.judged)
    _describe(experiment)
    if record.results:
        _record(experiment, Path(record.results), record.pictures)
    return experiment


def _describe(experiment: GeneratorExperiment) -> None:
    """Put what was measured into the config.json and the model card of the run's generator."""
    folder, loaded = experiment.run.path / "generator", experiment.loaded
    try:
        describe_generator(folder, experiment.run.described(loaded.model.config, experiment.rows(), loaded.trained))
    except OSError as error:  # somebody else's run, for one
        log.warning("the model card in %s is left as it is (%s).", folder, error.strerror)


def _judge(experiment: GeneratorExperiment, count: int) -> dict:
    """Judge samples of all classes in turn; also what the tokenizer makes of held-out digits, the best to be had."""
    from softvq_lib.evaluation.generated import digit_classifier, judge, real_digits

    classifier = digit_classifier()
    labels = torch.arange(count) % len(experiment.classes)
    experiment.judged = experiment.sample(labels, 1_000_000 + experiment.seed), labels
    size = experiment.tokenizer.config.image_size
    (train_images, _), held_out = real_digits("train", size), real_digits("validation", size)
    found = judge(*experiment.judged, classifier, train_images, held_out)
    with torch.no_grad():
        device = next(experiment.tokenizer.parameters()).device
        decoded = [experiment.tokenizer(part.to(device))[0].cpu() for part in held_out[0].split(64)]
    decoded = torch.cat(decoded).clamp(-1, 1)
    same = judge(decoded, held_out[1], classifier, train_images, held_out)
    found |= {"real_agreement": classifier.held_out, "decoded_agreement": same["class_agreement"]}
    return found | {f"decoded_{name}": same[name] for name in ("precision", "recall", "copied", "diversity")}


def _beside_nearest(experiment: GeneratorExperiment, pairs: int = 40) -> Tensor:
    """Samples of all classes, eight a row, and under each row the training images nearest to them."""
    from softvq_lib.evaluation.generated import nearest, real_digits

    train_images, _ = real_digits("train", experiment.tokenizer.config.image_size)
    samples = experiment.judged[0]
    samples = samples[: min(pairs, len(samples)) // 8 * 8]
    closest = train_images[nearest(samples, train_images)[1]]
    return torch.stack([samples.unflatten(0, (-1, 8)), closest.unflatten(0, (-1, 8))], 1).flatten(0, 2)


def _record(experiment: GeneratorExperiment, folder: Path, shown: bool) -> None:
    from torchvision.utils import save_image

    run = experiment.run
    common = rows_of.of_run("train_generator", run)
    sampling = {f"sampling_{k}": v for k, v in vars(experiment.settings).items() if v is not None}
    common["config"] = run.identity | sampling
    sheets = {"samples": (experiment.grid, experiment.columns)} if shown else {}
    if shown and experiment.judged is not None:
        sheets["beside_nearest"] = (_beside_nearest(experiment), 8)
    pictures = {}
    for name, (images, columns) in sheets.items():
        path = pictures[f"{run.name}-{name}.png"] = run.path / "images" / f"{name}.png"
        save_image(images, path, nrow=columns, normalize=True, value_range=(-1, 1), padding=1, pad_value=1)
    rows = [common | vars(number) for number in experiment.rows()]
    rows[0]["curve"] = [[row["step"], row["val_loss"]] for row in run.metrics if "val_loss" in row]
    rows[0]["train_seconds"] = run.seconds
    if pictures:
        rows[0]["pictures"] = rows_of.keep_pictures(folder / "train_generator", pictures)
    rows_of.append(folder / "train_generator.jsonl", rows)
