"""One's own images from end to end: the settings of it all, a folder to try it with, times of the stages, the rows."""

import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from softvq_lib import results as rows_of
from softvq_lib.config import at_least, fingerprint, strict
from softvq_lib.data import DataConfig, DataSplits, open_dataset, validation_batches
from softvq_lib.pictures import Pictures, class_folders, write_pictures
from softvq_lib.training.run import runs_folder

if TYPE_CHECKING:
    from softvq_lib.experiments import TokenizerExperiment
    from softvq_lib.generation import GeneratorExperiment

log = logging.getLogger(__name__)

WALL, CPU = "wall_seconds", "cpu_seconds"
STAGES = ("folder", "tokenizer", "latents", "generator", "samples")  # the order of the table; others come after these


@dataclass(frozen=True)
class OwnImagesConfig:
    """The few settings of the way from a folder of images to new ones; the experiments on it have many more.

    Attributes:
        folder: Folder of images, a folder a class if there are classes. None: `example_images`, written out.
        out: Folder of latents and pictures. None: `five_minutes` in the folder of runs.
        image_size: Pixels.
        preset: Size of the tokenizer, see `TokenizerConfig`.
        tokens: Latent tokens.
        perceptual: Network of the perceptual loss, see `LossConfig`.
        tokenizer_steps: Optimiser steps of the tokenizer.
        size: Of the generator, see `GeneratorConfig`.
        generator_steps: Optimiser steps of the generator.
        batch_size: Images a step, of both.
        guidance_scale: Classifier-free guidance of the samples; 1 is none.
        each: Samples of a class.
        seed: Of everything.
        device: As in `TrainConfig`.
        runs: Folder of all runs, as in `TrainConfig`.
        results: Folder whose `five_minutes.jsonl` times and PSNR are appended to. None: nothing is recorded.
    """

    folder: str | None = None
    out: str | None = None
    image_size: int = 32
    preset: str = "tiny"
    tokens: int = 16
    perceptual: str = "none"
    tokenizer_steps: int = 400
    size: str = "tiny"
    generator_steps: int = 250
    batch_size: int = 32
    guidance_scale: float = 1.5
    each: int = 8
    seed: int = 0
    device: str = "auto"
    runs: str | None = None
    results: str | None = None

    def __post_init__(self):
        for name in ("image_size", "tokens", "tokenizer_steps", "generator_steps", "batch_size", "each"):
            at_least(name, getattr(self, name), 1)


@dataclass(frozen=True)
class OwnImages:
    """A folder that is ready to be worked with.

    Attributes:
        folder: Of the images, what the experiments take as `dataset`.
        out: Of latents and pictures.
        data: The images, split.
        stages: A clock, which runs from now on.
    """

    folder: str
    out: Path
    data: DataSplits
    stages: "Stages"


def own_images(**values: object) -> OwnImages:
    """Open a folder of images, or write the example and open that, and start the clock.

    Args:
        values: Fields of `OwnImagesConfig`.

    Raises:
        ValueError: for a parameter that is unknown (the nearest is named) or out of range, or a folder that is
            missing, empty or damaged.
    """
    config = strict(OwnImagesConfig, values)
    out = Path(config.out).expanduser() if config.out else runs_folder(config.runs) / "five_minutes"
    stages = Stages()
    folder = config.folder or str(example_images(out / "images", image_size=config.image_size).folder)
    return OwnImages(folder, out, open_dataset(DataConfig(folder), config.image_size), stages)


def example_images(
    out: str | Path, *, dataset: str = "digits", count: int = 400, image_size: int = 32, progress: bool = False
) -> Pictures:
    """Write embedded images as a folder of PNG files, one folder a class, as one's own would lie there.

    Args:
        out: The folder.
        dataset: One that is embedded: `digits`, `shapes`, ...
        count: Images, the first of the training split.
        image_size: Their side in pixels.
        progress: Show a progress bar.

    Raises:
        ValueError: for an argument out of range, or a folder that holds something else.
    """
    at_least("count", count, 1)
    data = open_dataset(DataConfig(dataset, limit=count), image_size)
    batches = validation_batches(data.train, image_size=image_size, batch_size=count)
    (batch,) = batches
    folders = class_folders(data.classes)
    names = [f"{folders[label]}/{number:05d}.png" for number, label in enumerate(batch.labels.tolist())]
    identity = {"what": "examples", "data": data.fingerprint, "image_size": image_size}
    return write_pictures(
        out,
        names,
        lambda rows: batch.images[rows.start : rows.stop],
        identity=identity,
        convention="mar",  # rounds to the nearest level, so bytes stay as they were
        progress=progress,
    )


class Stages:
    """Seconds that the stages of a piece of work take, one after the other from now on.

    Attributes:
        wall: Seconds by the clock, by stage.
        cpu: Seconds of the processors, of this process and those that it waited for, by stage. On a machine that does
            other work too they say what the clock cannot.
    """

    def __init__(self) -> None:
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}
        self._last = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), sum(os.times()[:4])

    def done(self, name: str) -> None:
        """Note that a stage ends here; a stage that is noted again goes on."""
        now = self._now()
        for seconds, before, after in zip((self.wall, self.cpu), self._last, now, strict=True):
            seconds[name] = seconds.get(name, 0.0) + after - before
        self._last = now


def record(
    stages: Stages, tokenizer: "TokenizerExperiment", generator: "GeneratorExperiment", results: str | Path
) -> list[dict]:
    """Append to `five_minutes.jsonl` how long each stage took and the PSNR, with a picture of samples.

    Runs that were found finished, or went on where they were interrupted, are not timed, and nothing is recorded.

    Args:
        stages: By name, all of them done.
        tokenizer: What it was trained to.
        generator: And the generator on it.
        results: Folder of the rows.

    Returns:
        The rows; none where nothing was recorded.
    """
    for run in (tokenizer.run, generator.run):
        if run.trained < run.identity["steps"]:
            log.warning("run %s was not trained from its beginning just now: no times are recorded.", run.name)
            return []
    folder, run = Path(results), generator.run
    config = {"tokenizer": tokenizer.run.identity, "generator": run.identity}
    common = rows_of.of_run("five_minutes", run) | {"config": config, "config_hash": fingerprint(config)}
    none = {"low": None, "high": None, "interval": ""}
    images = len(tokenizer.data.train) + len(tokenizer.data.validation)
    rows = [
        common | none | {"metric": metric, "value": sum(seconds.values()), "terms": dict(seconds), "n": images}
        for metric, seconds in ((WALL, stages.wall), (CPU, stages.cpu))
    ]
    psnr = tokenizer.table()[0]
    interval = "" if psnr["low"] is None else "95 % percentile bootstrap over images"
    shown = {"low": psnr["low"], "high": psnr["high"], "interval": interval}
    rows.append(common | shown | {"metric": "psnr", "value": psnr["psnr"], "n": psnr["n"]})
    for row, pictures in zip((rows[-1], rows[0]), _sheets(tokenizer, generator), strict=True):
        row["pictures"] = rows_of.keep_pictures(folder / "five_minutes", pictures)
    rows_of.append(folder / "five_minutes.jsonl", rows)
    return rows


def _sheets(tokenizer: "TokenizerExperiment", generator: "GeneratorExperiment") -> list[dict[str, Path]]:
    """Write what each model made as a picture, into the generator's run; no original is among them."""
    from torchvision.utils import save_image

    by_class = generator.grid.unflatten(0, (-1, generator.columns)).transpose(0, 1)  # (column, class, 3, height, width)
    sheets = {
        "decoded": (tokenizer.measured.reconstructions, 8),
        "samples": (by_class.flatten(0, 1), by_class.shape[1]),
    }
    look = {"normalize": True, "value_range": (-1, 1), "padding": 1, "pad_value": 1}
    made = []
    for name, (images, columns) in sheets.items():
        path = generator.run.path / "images" / f"{name}.png"
        save_image(images, path, nrow=columns, **look)
        made.append({f"{generator.run.name}-{name}.png": path})
    return made


def time_table(rows: list[dict]) -> str:
    """Show recorded times as a Markdown table: a row a stage, seconds by the clock and of the processors."""
    lines = []
    for wall in (row for row in rows if row["metric"] == WALL):
        cpu = next(row for row in rows if row["metric"] == CPU and row["run"] == wall["run"])
        stages = sorted(wall["terms"], key=lambda name: (STAGES.index(name) if name in STAGES else len(STAGES), name))
        lines += [
            f"| {wall['data']}, {wall['n']:,} images; {wall['device']} | seconds | processor seconds |",
            "|---|--:|--:|",
            *(f"| {stage} | {wall['terms'][stage]:.0f} | {cpu['terms'][stage]:.0f} |" for stage in stages),
            f"| **all** | **{wall['value']:.0f}** | **{cpu['value']:.0f}** |",
            "",
        ]
    return "\n".join(lines)
