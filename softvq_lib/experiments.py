"""Experiments, one function a notebook: train or load, measure, record."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from softvq_lib import config as strictly
from softvq_lib import results as rows_of
from softvq_lib.cards import Number
from softvq_lib.data import DataSplits
from softvq_lib.distributed import rank
from softvq_lib.evaluation import bootstrap_mean, pca_psnr
from softvq_lib.tokenizers.loading import describe
from softvq_lib.training import Reconstruction, Run, reconstruct
from softvq_lib.training.engine import choose_device
from softvq_lib.training.tokenizer import CONFIGS, train

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RecordConfig:
    """What is kept of an experiment.

    Attributes:
        results: Folder whose `train_tokenizer.jsonl` the measured rows are appended to. None: nothing is recorded.
        pictures: Keep pictures beside the rows.
    """

    results: str | None = None
    pictures: bool = True


@dataclass(frozen=True)
class BaselineConfig:
    """What stands beside a tokenizer's numbers.

    Attributes:
        pca: Measure PCA of as many components on the same images, up to `PCA_MOST` pixels.
    """

    pca: bool = True


PCA_MOST = 64  # pixels
TOKENIZER_EXPERIMENT = (*CONFIGS, BaselineConfig, RecordConfig)

_OF_JUPYTER = {"In", "Out", "exit", "quit", "get_ipython", "open"}


def parameters(namespace: Mapping[str, object]) -> dict[str, object]:
    """Collect a notebook's parameters: the plain values among its global names, `parameters(globals())`.

    A value that papermill was given under a misspelt name is a global like any other, so that whoever gets this
    dictionary can refuse it; papermill itself only logs it. Names that start with an underscore are left out.
    """
    return {
        name: value
        for name, value in namespace.items()
        if not name.startswith("_")
        and name not in _OF_JUPYTER
        and (value is None or isinstance(value, (bool, int, float, str, list, tuple, dict)))
    }


@dataclass
class TokenizerExperiment:
    """A trained tokenizer with what was measured on held-out images.

    Attributes:
        run: The run on the disk.
        data: The data set that it was trained and measured on.
        measured: PSNR by image, codebook usage, some reconstructions.
        pca: PSNR in dB by image, (n,), of the linear baseline, by number of components; {} for images above
            `PCA_MOST` pixels.
    """

    run: Run
    data: DataSplits
    measured: Reconstruction
    pca: dict[int, np.ndarray]

    @property
    def image_size(self) -> int:
        """Height and width of the images in pixels."""
        return self.run.identity["image_size"]

    @property
    def gain(self) -> float:
        """Held-out PSNR after training less that before it, in dB."""
        curve = [row["val_psnr"] for row in self.run.metrics if "val_psnr" in row]
        return curve[-1] - curve[0]

    def table(self) -> list[dict[str, object]]:
        """Held-out PSNR of the tokenizer and of PCA: mean over images, 95 % bootstrap interval (None for one), n."""
        identity = self.run.identity
        ours = f"{identity['quantizer']}, {identity['tokens']} tokens x {identity['dim']}"
        methods = {ours: self.measured.psnr} | {f"PCA, {n} components": values for n, values in self.pca.items()}
        lines = []
        for name, values in methods.items():
            mean, low, high = bootstrap_mean(values) if len(values) > 1 else (float(values[0]), None, None)
            lines.append({"method": name, "psnr": mean, "low": low, "high": high, "n": len(values)})
        return lines

    def numbers(self) -> list[Number]:
        """All that was measured, with intervals where there are any, by the names of results rows."""
        names = ("psnr", *(f"psnr_pca_{n}" for n in self.pca))
        how = "95 % percentile bootstrap over images"
        rows = [
            Number(name, line["psnr"], line["n"], line["low"], line["high"], "" if line["low"] is None else how)
            for name, line in zip(names, self.table(), strict=True)
        ]
        return rows + [Number(name, value, len(self.measured.psnr)) for name, value in self.measured.usage.items()]

    def __str__(self) -> str:
        lines = [f"{'':34}{'PSNR, dB':>9}  95 % interval      n"]
        for row in self.table():
            interval = "one image alone" if row["low"] is None else f"[{row['low']:.2f}, {row['high']:.2f}]"
            lines.append(f"{row['method']:34}{row['psnr']:9.2f}  {interval}  {row['n']:6d}")
        usage = self.measured.usage
        if usage:
            size = self.run.identity["codebook_size"]
            lines.append(
                f"codebook usage {100 * usage['usage']:.1f} % of {size} codes, perplexity {usage['perplexity']:.1f}"
            )
        return "\n".join(lines)


def train_tokenizer(**values: object) -> TokenizerExperiment | None:
    """Train (or load) a tokenizer, measure it on held-out images beside PCA, and record the rows if asked to.

    Of several processes that train together the first measures and returns the experiment; the others return None.

    Args:
        values: Fields of `TokenizerConfig`, `DataConfig`, `LossConfig`, `TrainConfig`, `BaselineConfig` and
            `RecordConfig`.

    Raises:
        ValueError: for a parameter that is unknown (the nearest is named) or out of range, and for data or folders
            that cannot be used; nothing is trained or changed then.
    """
    _, data_config, _, settings, _, baseline, record = strictly.split(values, *TOKENIZER_EXPERIMENT)
    mine = {**strictly.fields_of(BaselineConfig), **strictly.fields_of(RecordConfig)}
    run = train(**{name: value for name, value in values.items() if name not in mine})
    if rank():
        return None
    image_size, device = run.identity["image_size"], choose_device(settings.device)
    data = run.data  # opening reads every file for the fingerprint: once is enough
    experiment = TokenizerExperiment(
        run=run,
        data=data,
        measured=reconstruct(run.tokenizer.to(device), data.validation, limit=settings.val_images),
        # Of larger images the matrix would not fit into memory.
        pca=pca_psnr(data.train, data.validation, image_size=image_size, limit=settings.val_images)
        if baseline.pca and image_size <= PCA_MOST
        else {},
    )
    _describe(experiment)
    if record.results:
        _record(experiment, Path(record.results), record.pictures, data_config.dataset in _SHOWABLE)
    return experiment


def _describe(experiment: TokenizerExperiment) -> None:
    """Put what was measured into the config.json and the model card of the run's tokenizer."""
    run = experiment.run
    folder = run.path / "tokenizer"
    run.tokenizer.trained = run.described(run.tokenizer.config, experiment.numbers(), run.tokenizer.trained)
    try:
        describe(run.tokenizer, folder)
    except OSError as error:  # somebody else's run, for one
        log.warning("the model card in %s is left as it is (%s).", folder, error.strerror)


# Data whose images may be shown; of any other, committed pictures show only what a model made.
_SHOWABLE = ("digits", "shapes")


def _thinned(curve: list[list[float]], most: int = 100) -> list[list[float]]:
    """Average neighbours of a curve of [step, value] pairs until at most so many are left."""
    points = np.array(curve)
    parts = np.array_split(points, min(most, len(points)))
    return [[int(part[-1, 0]), float(f"{part[:, 1].mean():.5g}")] for part in parts]


def _record(experiment: TokenizerExperiment, folder: Path, shown: bool, originals: bool) -> None:
    run = experiment.run
    common = rows_of.of_run("train_tokenizer", run)
    rows = [common | vars(number) for number in experiment.numbers()]
    if shown:
        pictures = {f"{run.name}-step-{step:08d}.png": path for step, path in run.snapshots.items()}
        if originals:
            pictures[f"{run.name}-originals.png"] = run.path / "images" / "originals.png"
        rows[0]["pictures"] = rows_of.keep_pictures(folder / "train_tokenizer", pictures)
    for row in rows:
        curve = [[at["step"], at[f"val_{row['metric']}"]] for at in run.metrics if f"val_{row['metric']}" in at]
        if curve:
            row["curve"] = curve
    rows[0]["train_seconds"] = run.seconds
    rows[0]["terms"] = {name: _thinned(curve) for name, curve in run.curves().items()}
    rows_of.append(folder / "train_tokenizer.jsonl", rows)
