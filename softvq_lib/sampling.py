"""The sampling experiment: images by class of a finished generator, our own or published (Fig. 1), and their export."""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from softvq_lib import config as strictly
from softvq_lib.config import at_least, nearest, one_of, some
from softvq_lib.data import DataConfig, digits, mixed, open_dataset, photographs, shapes
from softvq_lib.data.latents import tokenizer_hash
from softvq_lib.evaluation import export
from softvq_lib.generators.loading import Loaded, load_generator
from softvq_lib.generators.sampling import SampleConfig, generate
from softvq_lib.pictures import Pictures, class_folders, write_pictures
from softvq_lib.tokenizers import Tokenizer
from softvq_lib.training.engine import choose_device
from softvq_lib.training.generator import find_tokenizer
from softvq_lib.training.generator import train_generator as train
from softvq_lib.training.run import runs_folder

_EMBEDDED = {
    "digits": digits.CLASSES,
    "shapes": shapes.CLASSES,
    "photographs": photographs.CLASSES,
    "mixed": mixed.CLASSES,
}
_IMAGENET = "ILSVRC/imagenet-1k"
_BAR_AFTER = 2.0  # seconds; shorter sampling shows no bar


@dataclass(frozen=True)
class SampleExperimentConfig:
    """Which generator is sampled, what of, and how. For what is as in `SampleConfig`, None is as its authors sample.

    Attributes:
        generator: Folder of a generator, name of a run in the folder of runs, or a hub name. None: the run that
            `softvq_lib.train_generator` trains by default, which is trained first where it is missing.
        tokenizer: Folder, run or hub name of the tokenizer that decodes. None: the one that the generator names.
        dataset: Data set whose class names are taken. None: the run's, if that is `digits`, `shapes` or ImageNet;
            ImageNet's for published weights; numbers for others.
        classes: Classes of the grid by number or name, separated by commas. None: the first ten.
        columns: Samples of each class in the grid.
        sample_seed: Of grid and export.
        exported: Images to export; 0: none.
        labels: Classes of the exported images: `balanced` or `random`.
        export: Folder of the export. None: `samples` in the run; without a run `samples/<name>` in the folder of runs.
        shard_size: Exported images to a file.
        convention: How pixels become bytes, a name in `softvq_lib.evaluation.export.CONVENTIONS`.
        npz: Write the finished export as one file for ADM's evaluator too, `samples.npz` in its folder.
        batch_size: Images made and decoded at once.
        device: `auto`, `cpu` or a torch device.
        runs: Folder of all runs, as in `TrainConfig`.
        solver: SiT: `euler`, `heun`, `adaptive` or `sde`. DiT: `ddpm`, `ddim` or `dpm++`.
        sample_steps: Steps of the solver; MAR: sets of tokens.
        diffusion: SiT: noise of the solver `sde`.
        guidance_scale: Classifier-free guidance; 1 is none.
        guidance_low: SiT, DiT: least noise level (0 data, 1 noise) that is guided.
        guidance_high: SiT, DiT: greatest.
        guidance_schedule: MAR: `linear` or `constant`.
        noise_temperature: MAR: factor of the noise that the head adds.
        head_steps: MAR: evaluations of the head for each set.
        head_solver: MAR: `ddpm`, `ddim` or `dpm++`.
    """

    generator: str | None = None
    tokenizer: str | None = None
    dataset: str | None = None
    classes: str | int | None = None
    columns: int = 8
    sample_seed: int = 0
    exported: int = 0
    labels: str = "balanced"
    export: str | None = None
    shard_size: int = 1000
    convention: str = "dit"
    npz: bool = False
    batch_size: int = 64
    device: str = "auto"
    runs: str | None = None
    solver: str | None = None
    sample_steps: int | None = None
    diffusion: str | None = None
    guidance_scale: float | None = None
    guidance_low: float | None = None
    guidance_high: float | None = None
    guidance_schedule: str | None = None
    noise_temperature: float | None = None
    head_steps: int | None = None
    head_solver: str | None = None

    def __post_init__(self):
        for name in ("columns", "shard_size", "batch_size"):
            at_least(name, getattr(self, name), 1)
        for name in ("sample_seed", "exported"):
            at_least(name, getattr(self, name), 0)
        one_of("labels", self.labels, export.LABELLINGS)
        one_of("convention", self.convention, export.CONVENTIONS)
        if self.npz and not self.exported:
            raise ValueError("npz=True needs an export: give exported, for example exported=50000.")
        self.sampling(SampleConfig())

    def sampling(self, default: SampleConfig) -> SampleConfig:
        """Return `default` with what is given here in its place."""
        given = {name: getattr(self, name) for name in strictly.fields_of(SampleConfig)}
        return replace(default, **{name: value for name, value in given.items() if value is not None})


@dataclass
class SampleExperiment:
    """A generator that is ready to be sampled, and what was exported.

    Attributes:
        loaded: The generator with the statistics of its latents.
        tokenizer: Decodes its latents.
        settings: How it is sampled.
        classes: Names of all its classes.
        labels: Classes of `grid`, (b,).
        columns: Samples of each class in `grid`.
        seed: Of grid and export.
        batch_size: Images made and decoded at once.
        folder: Of the export, whether or not there is one.
        exported: Header of the export, None without one.
    """

    loaded: Loaded
    tokenizer: Tokenizer
    settings: SampleConfig
    classes: list[str]
    labels: Tensor
    columns: int
    seed: int
    batch_size: int
    folder: Path
    exported: dict | None = None

    @property
    def seeds(self) -> list[int]:
        """One for each image of `grid`. They follow from class and column, whatever other classes are asked for."""
        every = export.sample_seeds(self.seed, self.columns * len(self.classes))
        return [every[label + len(self.classes) * (i % self.columns)] for i, label in enumerate(self.labels.tolist())]

    def sample(self, labels: Tensor, seeds: Sequence[int], progress=None) -> Tensor:
        """Generate images of the classes `labels` (b,), see `sample_images`."""
        options = {"batch_size": self.batch_size, "progress": progress}
        return sample_images(self.loaded, self.tokenizer, labels, seeds, self.settings, **options)

    @cached_property
    def grid(self) -> Tensor:
        """The first samples of each class, as a balanced export has them, (b, 3, height, width) in [-1, 1]."""
        return self.sample(self.labels, self.seeds)

    def __str__(self) -> str:
        config = self.loaded.model.config
        parameters = sum(parameter.numel() for parameter in self.loaded.model.parameters())
        settings = self.settings.arguments(config.generator)
        lines = [
            f"{self.loaded.origin or 'generator'}: {config.generator} {config.size}, {config.tokens} tokens x "
            f"{config.dim}, {parameters / 1e6:.2f} M parameters, {config.classes} classes",
            "sampled with " + ", ".join(f"{name}={value!r}" for name, value in settings.items()),
        ]
        if self.exported:
            made = self.exported
            lines.append(f"exported {made['count']:,} images, labels {made['labels']}, in {len(made['shards'])} shards")
        return "\n".join(lines)


@torch.no_grad()
def sample_images(
    loaded: Loaded,
    tokenizer: Tokenizer,
    labels: Tensor,
    seeds: Sequence[int],
    settings: SampleConfig,
    *,
    batch_size: int = 64,
    progress: Callable[[Iterable], Iterable] | None = None,
) -> Tensor:
    """Generate and decode images, float32 (b, 3, height, width) in [-1, 1] on the CPU, where the weights are.

    An image depends on its label and seed alone, up to the rounding of other batch sizes.

    Args:
        loaded: The generator, with the numbers that its latents were normalised by.
        tokenizer: That decodes.
        labels: (b,).
        seeds: One for each image.
        settings: How it is sampled.
        batch_size: Images sampled and decoded at once.
        progress: Goes round the batches. None: `tqdm`, for several batches that take longer than two seconds.

    Raises:
        ValueError: for another number of seeds than labels, images that are not finite, and as the model's `sample`
            does.
    """
    from tqdm import tqdm

    at_least("batch_size", batch_size, 1)
    if len(labels) != len(seeds):
        raise ValueError(f"{len(seeds)} seeds for {len(labels)} labels: give one seed an image.")
    device = next(tokenizer.parameters()).device
    starts = range(0, len(labels), batch_size)
    bar = {"desc": "samples", "unit": "batch", "delay": _BAR_AFTER, "disable": len(starts) == 1}
    parts = []
    for start in progress(starts) if progress else tqdm(starts, **bar):
        rows = slice(start, start + batch_size)
        latents = generate(loaded.model, labels[rows], seeds[rows], settings, batch_size=batch_size)
        images = tokenizer.decode(loaded.denormalise(latents).to(device)).float().cpu()
        if not images.isfinite().all():
            raise ValueError(
                f"among the images from {start} on some are not finite: use more steps, less guidance, or a generator "
                "that is trained further."
            )
        parts.append(images.clamp(-1, 1))
    return torch.cat(parts)


def find_generator(name: str, runs: str | None = None) -> Path | str:
    """Return the folder of a generator, given itself or as a run by its name, or the hub name that it is.

    Raises:
        ValueError: for a folder or run that holds none, naming the runs that there are.
    """
    folder, home = Path(name).expanduser(), runs_folder(runs)
    for place in (folder, folder / "generator", home / name / "generator"):
        if (place / "config.json").exists() and (place / "model.safetensors").exists():
            return place
    if name.count("/") == 1 and not folder.exists():
        return name
    there = sorted(path.parents[1].name for path in home.glob("*/generator/model.safetensors"))
    listed = f"Finished there: {some(there)}." if there else "None is finished there yet."
    raise ValueError(
        f"generator={name!r} is no folder with a generator, no finished run of {home} and no hub name"
        f"{nearest(name, there) or '.'} {listed}"
    )


def sample_generator(**values: object) -> SampleExperiment:
    """Load a finished generator, export samples of it if asked to, and return it for more.

    Args:
        values: Fields of `SampleExperimentConfig`.

    Raises:
        ValueError: for a parameter that is unknown (the nearest is named) or out of range, a generator that is not
            there, a tokenizer that is not the generator's, a class that it does not have, or a folder that cannot be
            exported to.
        OSError: when the hub cannot be reached, or does not know the name.
    """
    config = strictly.strict(SampleExperimentConfig, values)
    device = choose_device(config.device)
    if config.generator is None:
        source: Path | str = train(runs=config.runs, device=config.device).path / "generator"
    else:
        source = find_generator(config.generator, config.runs)
    loaded = load_generator(source)
    settings = config.sampling(loaded.sampling)
    settings.arguments(loaded.model.config.generator)
    run = source.parent if isinstance(source, Path) and source.name == "generator" else None
    classes = class_names(loaded, config.dataset or _trained_on(loaded, run))
    labels = torch.tensor(read_classes(config.classes, classes)).repeat_interleave(config.columns)
    name = loaded.tokenizer if config.tokenizer is None else config.tokenizer
    if name is None:
        raise ValueError(f"the generator in {source} does not say whose latents it makes: give tokenizer.")
    tokenizer = find_tokenizer(name, config.runs)
    export.check_tokenizer(loaded, tokenizer)
    folder = run / "samples" if run else runs_folder(config.runs) / "samples" / Path(source).resolve().name
    experiment = SampleExperiment(
        loaded=loaded,
        tokenizer=tokenizer.to(device),
        settings=settings,
        classes=classes,
        labels=labels,
        columns=config.columns,
        seed=config.sample_seed,
        batch_size=config.batch_size,
        folder=Path(config.export).expanduser() if config.export else folder,
    )
    loaded.model.to(device)
    if config.exported:
        experiment.exported = export.export_samples(
            loaded,
            tokenizer,
            experiment.folder,
            count=config.exported,
            labels=config.labels,
            seed=config.sample_seed,
            batch_size=config.batch_size,
            shard_size=config.shard_size,
            settings=settings,
            convention=config.convention,
        )
    if config.npz:
        export.merge_npz(experiment.folder)
    return experiment


def sample_pictures(
    out: str | Path, *, each: int = 8, overwrite: bool = False, progress: bool = True, **values: object
) -> Pictures:
    """Sample a finished generator by class into PNG files, or go on where that was interrupted.

    The pictures are the first ones of each class that a balanced export of the same seed has. They lie in a folder a
    class, as `open_dataset` reads them. More of each class, or more classes, may be asked for later.

    Args:
        out: Folder of these pictures alone.
        each: Pictures of a class.
        overwrite: Remove first the pictures that an earlier call wrote into the folder.
        progress: Show a progress bar.
        values: Fields of `SampleExperimentConfig`. `classes` None is all of them; `columns` and the export have no
            meaning here.

    Raises:
        ValueError: as `sample_generator`, and for a folder that holds something else or, unless `overwrite`, other
            pictures.
        OSError: when the disk is full on the way, or the hub cannot be reached.
    """
    at_least("each", each, 1)
    found = sample_generator(**values | {"columns": each})
    labels = found.labels
    if values.get("classes") is None:
        labels = torch.arange(len(found.classes)).repeat_interleave(each)
    found = replace(found, labels=labels)
    seeds, folders = found.seeds, class_folders(found.classes)
    names = [f"{folders[label]}/{number % each:05d}.png" for number, label in enumerate(labels.tolist())]
    identity = {
        "what": "samples",
        "generator": tokenizer_hash(found.loaded.model),
        "tokenizer": tokenizer_hash(found.tokenizer),
        "image_size": found.tokenizer.config.image_size,
        "settings": asdict(found.settings),
        "seed": found.seed,
    }

    def make(rows: range) -> Tensor:
        part = slice(rows.start, rows.stop)
        return found.sample(labels[part], seeds[part])

    options = {"batch_size": found.batch_size, "overwrite": overwrite, "progress": progress}
    options |= {"convention": str(values.get("convention", SampleExperimentConfig.convention))}
    return write_pictures(out, names, make, identity=identity, **options)


def _trained_on(loaded: Loaded, run: Path | None) -> str | None:
    """Return the data set that a generator was trained on, if its class names are at hand."""
    if loaded.origin and loaded.model.config.classes == 1000:
        return _IMAGENET
    if run is None or not (run / "config.json").exists():
        return None
    requested = json.loads((run / "config.json").read_text()).get("requested", {})
    dataset = requested.get("dataset", DataConfig.dataset)
    return dataset if dataset in (*_EMBEDDED, _IMAGENET) else None  # another is not opened for its names unasked


def class_names(loaded: Loaded, dataset: str | None) -> list[str]:
    """Return a name for each class of a generator; its number where there is none.

    Args:
        loaded: The generator.
        dataset: What it was trained on. None: numbers.

    Raises:
        ValueError: for a data set that cannot be opened or has more classes.
    """
    count = loaded.model.config.classes
    if dataset in _EMBEDDED:
        names = _EMBEDDED[dataset]
    elif dataset == _IMAGENET:
        from timm.data import ImageNetInfo

        about = ImageNetInfo("imagenet-1k")
        names = [about.index_to_description(number).split(",")[0] for number in range(1000)]
    else:
        names = [] if dataset is None else open_dataset(DataConfig(dataset), 1).classes or []
    if len(names) > count:
        raise ValueError(f"dataset={dataset!r} has {len(names)} classes, but the generator {count}: leave dataset out.")
    return [*names, *map(str, range(len(names), count))]


def read_classes(asked: str | int | None, names: Sequence[str]) -> list[int]:
    """Return class numbers of comma-separated numbers and names; a number that is itself a name is taken for that.

    Of a name with commas the part before the first is enough; case and underscores do not matter.

    Args:
        asked: None: the first ten classes.
        names: Of all classes.

    Raises:
        ValueError: for a number out of range, a name that is not known (the nearest is named) or stands for several
            classes, or a class that is asked for twice.
    """
    if asked is None:
        return list(range(min(10, len(names))))

    def plain(name: str) -> str:
        return name.replace("_", " ").strip().casefold()

    numbers: list[int] = []
    for word in str(asked).split(","):
        word = word.strip()
        found = [i for i, name in enumerate(names) if plain(word) in (plain(name), plain(name.split(",")[0]))]
        if not found and re.fullmatch(r"[+-]?\d+", word):
            if not 0 <= int(word) < len(names):
                raise ValueError(f"classes: {word} is out of range: give numbers from 0 to {len(names) - 1}, or names.")
            found = [int(word)]
        if not found:
            listed = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
            raise ValueError(f"classes: {word!r} is not known{nearest(word, names) or '.'} There are: {listed}.")
        if len(found) > 1:
            raise ValueError(f"classes: {word!r} is the name of {' and '.join(map(str, found))}: give the number.")
        if found[0] in numbers:
            raise ValueError(f"classes: {word!r} stands there twice: give each class once.")
        numbers += found
    return numbers
