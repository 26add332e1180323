"""The evaluation experiment: reconstructions and samples against real images (Sec. 4.1), and the metrics themselves.

Two checks of the metrics stand beside the numbers: images made worse step by step, and how the Fréchet distance depends
on the number of images.
"""

import json
import logging
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from softvq_lib import config as strictly
from softvq_lib import results as rows_of
from softvq_lib.arms import GUIDED
from softvq_lib.config import at_least, one_of
from softvq_lib.data import DataConfig, DataSplits, Source, open_dataset
from softvq_lib.data.latents import tokenizer_hash
from softvq_lib.evaluation.class_judge import class_judge
from softvq_lib.evaluation.degradations import degradation_series
from softvq_lib.evaluation.export import CONVENTIONS, HEADER, check_tokenizer, sample_seeds
from softvq_lib.evaluation.extractors import EXTRACTORS, build_extractor
from softvq_lib.evaluation.frechet import GROUPS
from softvq_lib.evaluation.pixels import SUFFIXES, Pixels, open_pixels, to_bytes
from softvq_lib.evaluation.reconstruction import paired_statistics
from softvq_lib.evaluation.reference import image_statistics
from softvq_lib.evaluation_rows import EvaluationRows, measures
from softvq_lib.experiments import _SHOWABLE
from softvq_lib.generators.loading import Loaded, load_generator
from softvq_lib.generators.sampling import SampleConfig
from softvq_lib.losses.perceptual import PERCEPTUAL, build_perceptual
from softvq_lib.sampling import find_generator, sample_images
from softvq_lib.tokenizers import Tokenizer
from softvq_lib.training.engine import choose_device, choose_precision, device_name
from softvq_lib.training.generator import find_tokenizer
from softvq_lib.training.run import runs_folder
from softvq_lib.training.tokenizer import train

log = logging.getLogger(__name__)

SPLITS = ("validation", "train")
SHOWN = 8  # reconstructions that are shown and kept
SAMPLES_SHOWN = 40


@dataclass(frozen=True)
class EvaluateConfig:
    """What is judged, against which images, and by what.

    Attributes:
        tokenizer: Folder of a tokenizer, name of a run in the folder of runs, or a hub name. None: the generator's;
            without one, the one that `softvq_lib.train_tokenizer` trains on the same data with its defaults.
        generator: Judge samples too: folder of a generator, name of a run, or a hub name, which is sampled now; or the
            folder of an export of samples, of images, or an .npz of ADM's evaluator.
        dataset: As in `DataConfig`, like the two after it.
        image_column: Column of the images.
        label_column: Column of the labels.
        limit: Real images, the first of the fixed order of their split. None: all.
        split: `validation` or `train`.
        extractor: Network of the Fréchet distance, KID, precision and recall, a name of
            `softvq_lib.evaluation.extractors.EXTRACTORS`.
        perceptual: Network of the perceptual distance, see `build_perceptual`, or `none`. Neither network should be one
            that the tokenizer or generator was trained with; where it is, the experiment says so.
        convention: How pixels become bytes, a name of `softvq_lib.evaluation.export.CONVENTIONS`.
        samples: Images generated.
        guidance_scale: Classifier-free guidance of these samples. None: as the generator's authors sample.
        guidance_high: SiT, DiT: greatest noise level that is guided. None: alike.
        precision: Of sampling, as in `TrainConfig`; everything else is computed in float32.
        guided: Generate as many images again with this guidance, from the same noise, and judge them too; `samples` are
            then those of `guidance_scale`, by default without guidance. None: once.
        judge: Training images from which a linear head on the extractor's features learns the classes; it then says
            how many samples, and real images, are of their class. 0: no head.
        degradations: So many of the real images are also made worse step by step, to see how each metric answers. 0:
            none. It costs as much as judging twenty tokenizers on them.
        bias: Take the Fréchet distance of fewer and fewer images, and of two halves of the real ones.
        batch_size: Images at once.
        device: `auto`, `cpu` or a torch device.
        runs: Folder of all runs.
        seed: Of samples and noise.
        results: Folder whose `evaluate.jsonl` the measured rows are appended to. None: nothing is recorded.
        pictures: Keep pictures beside the rows.
    """

    tokenizer: str | None = None
    generator: str | None = None
    dataset: str = "digits"
    image_column: str | None = None
    label_column: str | None = None
    limit: int | None = 256
    split: str = "validation"
    extractor: str = "efflite0"
    perceptual: str = "efflite1"
    convention: str = "dit"
    samples: int = 256
    guidance_scale: float | None = None
    guidance_high: float | None = None
    precision: str = "fp32"
    guided: float | None = None
    judge: int = 0
    degradations: int = 0
    bias: bool = True
    batch_size: int = 64
    device: str = "auto"
    runs: str | None = None
    seed: int = 0
    results: str | None = None
    pictures: bool = True

    def __post_init__(self):
        one_of("split", self.split, SPLITS)
        one_of("extractor", self.extractor, EXTRACTORS)
        one_of("perceptual", self.perceptual, (*PERCEPTUAL, "none"))
        one_of("convention", self.convention, CONVENTIONS)
        one_of("precision", self.precision, ("auto", "bf16", "fp32"))
        for name in ("limit", "samples"):
            at_least(name, getattr(self, name), 10)
        for name in ("degradations", "judge", "guided"):
            at_least(name, getattr(self, name), 0)
        if 0 < self.degradations < 10:
            raise ValueError(f"degradations={self.degradations} is too few images: give at least 10, or 0 for none.")
        at_least("batch_size", self.batch_size, 1)
        at_least("seed", self.seed, 0)


@dataclass
class Evaluation:
    """What was measured.

    Attributes:
        rows: Results rows, one a number. Tables and figures are made of them.
        images: The first real images, (m, 3, height, width) in [-1, 1].
        reconstructions: Theirs.
        psnr: Of these and all other images in dB, (n,).
        samples: The first generated images; None where nothing was generated.
        notes: Sentences that belong beside the numbers.
    """

    rows: list[dict]
    images: Tensor
    reconstructions: Tensor
    psnr: np.ndarray
    samples: Tensor | None = None
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        judged = [row for row in self.rows if "judged" in row["config"]]
        lines = []
        for run in dict.fromkeys(row["run"] for row in judged):
            mine = [row for row in judged if row["run"] == run]
            lines.append(f"{run}: {mine[0]['config']['judged']}, {mine[0]['data']} {mine[0]['config']['split']}")
            for row in mine:
                floor = row.get("terms", {}).get("floor")
                against = "" if floor is None else f", floor {floor:.4g}"
                interval = "" if row["low"] is None else f"  [{row['low']:.4g}, {row['high']:.4g}]"
                lines.append(f"  {row['metric']:28}{row['value']:9.4g}{interval}{against}, n = {row['n']:,}")
        return "\n".join([*lines, *self.notes])


def evaluate(**values: object) -> Evaluation:
    """Judge a tokenizer's reconstructions, and a generator's samples if one is given; record the rows if asked to.

    Everything is measured on bytes, as stored images have them. Image by image: PSNR, SSIM and a perceptual distance.
    Of all images: Fréchet distance, KID, precision and recall, each with its floor. A Fréchet distance of no more
    images than features is not taken, but that on 64 of their projections.

    Args:
        values: Fields of `EvaluateConfig`.

    Raises:
        ValueError: for a parameter that is unknown (the nearest is named) or out of range; a tokenizer, generator or
            data that cannot be used or do not belong together; images that are not finite.
    """
    config = strictly.strict(EvaluateConfig, values)
    device = choose_device(config.device)
    loaded, folder = _generator(config)
    name, tokenizer, data = _tokenizer(config, loaded)
    size = tokenizer.to(device).config.image_size
    if loaded:
        loaded.model.to(device)
    extractor = build_extractor(config.extractor)
    perceptual = None if config.perceptual == "none" else build_perceptual(config.perceptual, size).to(device)
    options = {"batch_size": config.batch_size, "device": device, "progress": sys.stderr.isatty()}

    def images_of(limit: int | None) -> Pixels:
        source = _First(getattr(data, config.split), limit)
        workers = 0 if device.type == "cpu" else None
        return open_pixels(source, image_size=size, what=f"{data.name}, {config.split}", workers=workers)

    originals = images_of(config.limit)
    judge = None
    if config.judge:
        judge = class_judge(data, extractor, config.judge, size, runs_folder(config.runs) / "judges", **options)
    seen_by = judge.see if judge else None
    real = image_statistics(originals, extractor, seen_by=seen_by, **options)
    agreement = judge.agreement() if judge else None
    asked = {name: getattr(config, name) for name in ("limit", "split", "convention", "perceptual")}
    asked |= {"image_size": size, **extractor.identity}
    rows = EvaluationRows(asked, data, device_name(device), config.seed)
    found = Evaluation(rows.rows, *_first(tokenizer, originals, device), np.empty(0))
    found.notes += _shared(config, name, folder)
    for note in found.notes:
        log.warning("%s", note)

    @torch.no_grad()
    def reconstruct(images: Tensor, first: int) -> Tensor:
        return tokenizer(images)[0].float().clamp(-1, 1)

    run = _short(name)
    about = {key: value for key, value in asdict(tokenizer.config).items() if key != "pretrained"}
    about |= {"judged": "reconstructions", "tokenizer": run, "tokenizer_hash": tokenizer_hash(tokenizer)}
    how = {"what": f"reconstructions by {run}", "convention": config.convention, **options}
    by_image, decoded = paired_statistics(originals, reconstruct, extractor, perceptual, **how)
    found.psnr = by_image["psnr"]
    rows.by_image(run, about, by_image)
    found.notes += rows.of_all(run, about, decoded, real, config.bias)
    for scale in _scales(config) if config.generator else ():
        run, shown = _short(config.generator), []
        if scale is not None and scale == config.guided:
            run += f"{GUIDED} {scale:g}"
        settings = _sampling(config, loaded, scale)
        samples = _samples(config, loaded, settings, tokenizer, real.facts["classes"], shown)
        about = {"judged": "samples", "generator": _short(config.generator), **_how(settings, loaded, name)}
        about |= {"sampling_precision": config.precision} if loaded else {}
        made = image_statistics(samples, extractor, seen_by=seen_by, **options)
        found.notes += rows.of_all(run, about, made, real, config.bias)
        if judge:
            rows.agreement(run, about, judge.agreement(), agreement)
        found.samples = torch.cat(shown)[:SAMPLES_SHOWN] / 127.5 - 1
    of_images = f"{data.name} {config.split} {size} px"
    if config.bias:
        halves = real.groups[: GROUPS // 2], real.groups[GROUPS // 2 :]
        rows.limits(f"{of_images}, halves", {"halves": True}, "", *halves)
    if config.degradations:
        few = images_of(config.degradations)
        untouched = image_statistics(few, extractor, **options)
        how = {"measures": measures(untouched, untouched), "seed": config.seed, **options}
        rows.series(of_images, degradation_series(few, untouched, extractor, perceptual, **how))
    if config.results:
        _record(found, Path(config.results), config.pictures, config.dataset in _SHOWABLE)
    return found


class _First(Source):
    """The first images of a source."""

    def __init__(self, source: Source, limit: int | None):
        self.source, self.embedded = source, source.embedded
        self.count = min(len(source), limit or len(source))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        return self.source[self._check(index)]

    def name(self, index: int) -> str:
        return self.source.name(index)


def _generator(config: EvaluateConfig) -> tuple[Loaded | None, Path | None]:
    """Return the generator to sample and its folder; neither where there is none, or its images lie there already."""
    if config.generator is None or _is_images(config.generator):
        return None, None
    source = find_generator(config.generator, config.runs)
    loaded = load_generator(source)
    for scale in _scales(config):
        _sampling(config, loaded, scale).arguments(loaded.model.config.generator)
    if loaded.tokenizer is None and config.tokenizer is None:
        raise ValueError(f"generator={config.generator!r} does not say whose latents it makes: give tokenizer.")
    return loaded, source if isinstance(source, Path) else None


def _tokenizer(config: EvaluateConfig, loaded: Loaded | None) -> tuple[str, Tokenizer, DataSplits]:
    """Return a tokenizer, its name, and the data; check that the generator belongs to both."""
    given = {name: getattr(config, name) for name in ("dataset", "image_column", "label_column")}
    name = config.tokenizer or (loaded.tokenizer if loaded else None)
    if name is None:
        name = train(**given, runs=config.runs, device=config.device).name
    tokenizer = find_tokenizer(name, config.runs)
    data = open_dataset(DataConfig(**given), tokenizer.config.image_size)
    if loaded:
        check_tokenizer(loaded, tokenizer)
        ours, theirs = loaded.model.config.classes, len(data.classes or [None])
        if ours != theirs:
            raise ValueError(
                f"generator={config.generator!r} makes {ours} classes, but dataset={config.dataset!r} has {theirs}: "
                "judge it against images of its own classes."
            )
    return name, tokenizer, data


def _is_images(name: str) -> bool:
    """Whether a path is an export of samples, a folder of images or an .npz, and no generator."""
    path = Path(name).expanduser()
    if path.suffix == ".npz" or (path / HEADER).exists():
        return True
    return path.is_dir() and any(file.suffix.lower() in SUFFIXES for file in path.iterdir())


def _scales(config: EvaluateConfig) -> tuple[float | None, ...]:
    """The guidance of each set of samples; None as the generator's authors sample."""
    if config.guided is None:
        return (config.guidance_scale,)
    return (1.0 if config.guidance_scale is None else config.guidance_scale, config.guided)


def _sampling(config: EvaluateConfig, loaded: Loaded | None, scale: float | None) -> SampleConfig | None:
    """How samples are made; None where nobody knows."""
    if loaded is None:
        return None
    given = {"guidance_scale": scale, "guidance_high": config.guidance_high}
    return replace(loaded.sampling, **{name: value for name, value in given.items() if value is not None})


def _how(settings: SampleConfig | None, loaded: Loaded | None, tokenizer: str) -> dict[str, object]:
    """Return for the rows how samples were made, as far as it is known."""
    if loaded is None:
        return {}
    how = asdict(settings.resolved(loaded.model))
    sampling = {f"sampling_{name}": value for name, value in how.items() if value is not None}
    model = {f"generator_{name}": value for name, value in asdict(loaded.model.config).items()}
    return {"tokenizer": _short(tokenizer), **model, **sampling}


def _samples(
    config: EvaluateConfig,
    loaded: Loaded | None,
    settings: SampleConfig | None,
    tokenizer: Tokenizer,
    classes: list[int] | None,
    shown: list[Tensor],
) -> Pixels:
    """Return the samples to judge, of the classes of the real images in turn; the first ones are put into `shown`."""
    if loaded is None:
        pixels = open_pixels(config.generator)
    else:
        labels = torch.tensor(classes or [0]).repeat(-(-config.samples // len(classes or [0])))[: config.samples]
        seeds = sample_seeds(config.seed, config.samples)
        device = next(loaded.model.parameters()).device
        dtype = choose_precision(config.precision, device)

        def sampled(size: int) -> Iterator[tuple[Tensor, Tensor]]:
            for start in range(0, config.samples, size):
                part = slice(start, start + size)
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    images = sample_images(loaded, tokenizer, labels[part], seeds[part], settings, batch_size=size)
                yield to_bytes(images.float(), config.convention, start, "samples"), labels[part]

        size = (tokenizer.config.image_size,) * 2
        what = f"samples of {_short(config.generator)}"
        pixels = Pixels(what, sampled, config.samples, size, config.convention, "centre")

    def batches(size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        for images, labels in pixels.batches(size):
            if sum(map(len, shown)) < SAMPLES_SHOWN:
                shown.append(images)
            yield images, labels

    return replace(pixels, batches=batches)


@torch.no_grad()
def _first(tokenizer: Tokenizer, originals: Pixels, device: torch.device) -> tuple[Tensor, Tensor]:
    images = next(iter(originals.batches(SHOWN)))[0] / 127.5 - 1
    return images, tokenizer(images.to(device))[0].float().clamp(-1, 1).cpu()


def _short(name: str) -> str:
    """Name a run, tokenizer or generator for people: a run, a hub name, or the last folder of a path."""
    path = Path(name).expanduser()
    if name.count("/") == 1 and not path.exists():
        return name
    return [part for part in path.resolve().parts if part not in ("tokenizer", "generator", "samples")][-1]


_SAME = {"dino": "dino-s"}  # body of the discriminator of that name


def _shared(config: EvaluateConfig, tokenizer: str, generator: Path | None) -> list[str]:
    """Say which of the networks that judge were there in training: what is minimised says little."""
    notes = []
    homes = [Path(tokenizer).expanduser(), Path(tokenizer).expanduser().parent, runs_folder(config.runs) / tokenizer]
    homes += [generator.parent] if generator else []
    for home in dict.fromkeys(homes):
        try:
            identity = json.loads((home / "config.json").read_text())["identity"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # no run, so nobody knows
        if identity.get("alignment_random"):
            identity |= {"alignment": None}
        for term in ("perceptual", "adversarial", "alignment", "align_teacher"):
            network = _SAME.get(identity.get(term), identity.get(term))
            for judge in ("extractor", "perceptual"):
                if network not in (None, "none") and getattr(config, judge) == network:
                    notes.append(
                        f"{judge}={network!r} judges what was trained with it (as {term} of {home.name}), which "
                        "flatters: take another."
                    )
    return notes


def _record(found: Evaluation, folder: Path, shown: bool, originals: bool) -> None:
    """Append the rows, the first of them with pictures where these are to be shown."""
    if shown:
        _keep_pictures(found, folder, originals)
    rows_of.append(folder / "evaluate.jsonl", found.rows)


def _keep_pictures(found: Evaluation, folder: Path, originals: bool) -> None:
    from torchvision.utils import save_image

    sheets = {"decoded": found.reconstructions} | ({"originals": found.images} if originals else {})
    run = re.sub(r"[^A-Za-z0-9_.-]+", "-", found.rows[0]["run"])
    with tempfile.TemporaryDirectory() as scratch:
        pictures = {f"{run}-{name}.png": Path(scratch) / f"{name}.png" for name in sheets}
        for images, path in zip(sheets.values(), pictures.values(), strict=True):
            save_image(images, path, nrow=SHOWN, normalize=True, value_range=(-1, 1), padding=1, pad_value=1)
        found.rows[0]["pictures"] = rows_of.keep_pictures(folder / "evaluate", pictures)
