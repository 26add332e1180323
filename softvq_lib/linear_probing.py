"""The probing experiment: features of trained models and of baselines, a linear head on each (Fig. 3, Tab. 4)."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from softvq_lib import config as strictly
from softvq_lib import results as rows_of
from softvq_lib.config import at_least, one_of
from softvq_lib.data import DataConfig, DataSplits, open_dataset
from softvq_lib.evaluation.frozen_features import LATENTS, POOLINGS, FeatureName, read_features
from softvq_lib.evaluation.probe_subjects import Subject, baseline, find_model, of_model
from softvq_lib.evaluation.probing import Probed, probe
from softvq_lib.training.engine import choose_device, device_name
from softvq_lib.training.run import slug
from softvq_lib.training.tokenizer import train


@dataclass(frozen=True)
class ProbeConfig:
    """What is probed, and on which images. Lists are separated by commas.

    Attributes:
        model: Tokenizers and generators: runs, folders or hub names (whose last part begins with `sit` or `dit` where
            they are generators). None: the tokenizer that `softvq_lib.train_tokenizer` trains on the same data with
            its defaults.
        features: Of tokenizers: `z`, `z_hat`.
        pooling: Of tokenizers: `mean` over the tokens, `flatten`.
        blocks: Of SiT and DiT, from 1. None: all.
        noise_levels: Of SiT and DiT, from 0, data, to 1, noise.
        baselines: `pixels`; `random`, the first model's tokenizer with random weights; frozen networks by their names
            in `softvq_lib.features`, with random weights where `-random` follows. They see the images in the first
            model's size. "": none.
        dataset: As in `DataConfig`; it needs labels.
        image_column: As in `DataConfig`.
        label_column: As in `DataConfig`.
        limit: Training images, the first of the fixed order. None: all.
        val_images: Validation images, the first of the fixed order. None: all.
        workers: As in `DataConfig`.
        epochs: Passes over the features.
        batch_size: Images in a step of the head's training.
        seed: Of the noise, the random weights, the part of the training images that hyper-parameters are chosen on,
            and the order of training.
        device: `auto`, `cpu` or a torch device.
        runs: Folder of all runs.
        results: Folder whose `linear_probing.jsonl` the measured rows are appended to. None: nothing is recorded.
    """

    model: str | None = None
    features: str = "z,z_hat"
    pooling: str = "mean,flatten"
    blocks: str | None = None
    noise_levels: str = "0.25,0.5,0.75"
    baselines: str = "pixels,random,efflite0"
    dataset: str = "digits"
    image_column: str | None = None
    label_column: str | None = None
    limit: int | None = 1000
    val_images: int | None = 500
    workers: int | None = None
    epochs: int = 30
    batch_size: int = 128
    seed: int = 0
    device: str = "auto"
    runs: str | None = None
    results: str | None = None

    def __post_init__(self):
        for name, allowed in (("features", LATENTS), ("pooling", POOLINGS)):
            for entry in self.listed(name):
                one_of(name, entry, allowed)
        for name, number in (("blocks", int), ("noise_levels", float)):
            try:
                self.numbers(name, number)
            except ValueError:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: give numbers with commas, such as "
                    f"{'2,4' if number is int else '0.25,0.5'!r}."
                ) from None
        assert self.data, "which checks the parameters that concern data"
        at_least("epochs", self.epochs, 1)
        at_least("batch_size", self.batch_size, 2)
        at_least("val_images", self.val_images, 1)
        at_least("seed", self.seed, 0)
        for name in ("model", "features", "pooling", "blocks", "noise_levels", "baselines"):
            entries = self.listed(name)
            if not entries and getattr(self, name) is not None and name != "baselines":
                raise ValueError(f"{name}={getattr(self, name)!r} names nothing: give entries with commas.")
            if twice := sorted({entry for entry in entries if entries.count(entry) > 1}):
                raise ValueError(f"{name}={getattr(self, name)!r} names {', '.join(twice)} twice.")

    def listed(self, name: str) -> list[str]:
        """The entries of a list that is separated by commas; none of None."""
        return [entry.strip() for entry in (getattr(self, name) or "").split(",") if entry.strip()]

    def numbers(self, name: str, kind: type) -> list:
        """The entries as numbers."""
        return [kind(entry) for entry in self.listed(name)]

    @property
    def data(self) -> DataConfig:
        """The parameters that concern data."""
        names = ("dataset", "image_column", "label_column", "limit", "workers")
        return DataConfig(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class ProbeExperiment:
    """Accuracies of linear probes.

    Attributes:
        rows: Results rows, `accuracy`, `macro_accuracy` and `logistic_accuracy` for each feature.
    """

    rows: list[dict]

    def table(self) -> list[dict[str, object]]:
        """One line for each feature: accuracy with a 95 % Wilson interval, macro accuracy, the check, n, labels."""
        return table(self.rows)

    def __str__(self) -> str:
        lines = self.table()
        long = max(len(line["features"]) for line in lines)
        text = [f"{'':{long}}  width  accuracy  95 % interval   macro  logistic      n  labels behind it"]
        for line in lines:
            value, low, high, macro, logistic = (
                f"{100 * line[name]:.1f}" for name in ("accuracy", "low", "high", "macro", "logistic")
            )
            text.append(
                f"{line['features']:{long}}{line['width']:7d}{value:>8} %  {f'[{low}, {high}]':14}{macro:>6} %"
                f"{logistic:>8} %{line['n']:7d}  {line['labels'] or 'none'}"
            )
        return "\n".join(text)


def table(rows: list[dict]) -> list[dict[str, object]]:
    """Collect the rows of each feature into one line: shares from 0 to 1, n, width, and whose labels formed it."""
    runs: dict[str, dict[str, dict]] = {}
    for row in rows:
        runs.setdefault(row["run"], {})[row["metric"]] = row
    return [
        {
            "features": metrics["accuracy"]["config"]["label"],
            "data": metrics["accuracy"]["data"],
            "accuracy": metrics["accuracy"]["value"],
            **{name: metrics["accuracy"][name] for name in ("low", "high", "n")},
            "macro": metrics["macro_accuracy"]["value"],
            "logistic": metrics["logistic_accuracy"]["value"],
            **{name: metrics["accuracy"]["config"][name] for name in ("width", "images", "labels")},
        }
        for metrics in runs.values()
    ]


def markdown(rows: list[dict]) -> str:
    """The same as a table in Markdown, in percent."""
    if not rows:
        return "*No rows have been recorded.*"
    lines = [
        "| features | width | data | training images | accuracy, % | macro, % | logistic regression, % | n | labels |",
        "|---|--:|---|--:|--:|--:|--:|--:|---|",
    ]
    for line in table(rows):
        value, low, high, macro, logistic = (
            f"{100 * line[name]:.1f}" for name in ("accuracy", "low", "high", "macro", "logistic")
        )
        cells = [line["features"], f"{line['width']:,}", line["data"], f"{line['images']:,}"]
        cells += [f"{value} [{low}, {high}]", macro, logistic, f"{line['n']:,}", line["labels"] or "none"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def linear_probing(**values: object) -> ProbeExperiment:
    """Read features of models and baselines, probe each, and record the rows if asked to.

    Args:
        values: Fields of `ProbeConfig`.

    Raises:
        ValueError: for a parameter that is unknown (the nearest is named) or out of range, and for a model, data or
            features that cannot be used.
        OSError: when a hub name is asked for and the hub cannot be reached.
    """
    from tqdm import tqdm

    config = strictly.strict(ProbeConfig, values)
    device = choose_device(config.device)
    subjects = {subject.source: subject for subject in _subjects(config, device)}
    origin = {"device": device_name(device), **rows_of.origin()}
    rows = []
    for size in dict.fromkeys(subject.image_size for subject in subjects.values()):
        data = open_dataset(config.data, size)
        if data.classes is None:
            raise ValueError(
                f"dataset={config.dataset!r} has no labels, without which there is no probing: name its label_column."
            )
        readers = [subject.reader for subject in subjects.values() if subject.image_size == size]
        options = {"image_size": size, "seed": config.seed, "workers": config.workers, "device": device}
        known, labels = read_features(data.train, readers, limit=config.limit, **options)
        held_out, answers = read_features(
            data.validation, readers, split="validation", limit=config.val_images, **options
        )
        for name in tqdm(list(known), desc="probes", unit="probe"):
            found = probe(
                (known.pop(name), labels),
                (held_out.pop(name), answers),
                name=str(name),
                epochs=config.epochs,
                batch_size=config.batch_size,
                seed=config.seed,
                device=device,
            )
            rows += _rows(config, data, subjects[name.source], name, found, origin)
    if config.results:
        rows_of.append(Path(config.results) / "linear_probing.jsonl", rows)
    return ProbeExperiment(rows)


def _subjects(config: ProbeConfig, device: torch.device) -> list[Subject]:
    names = config.listed("model")
    if config.model is None:
        columns = {"image_column": config.image_column, "label_column": config.label_column}
        names = [train(dataset=config.dataset, runs=config.runs, device=config.device, **columns).name]
    latents = {"features": config.listed("features"), "pooling": config.listed("pooling")}
    states = {"blocks": config.numbers("blocks", int) or None, "noise_levels": config.numbers("noise_levels", float)}
    models = [find_model(name, config.runs) for name in names]
    found = [of_model(model, device, latents, states) for model in models]
    for name in config.listed("baselines"):
        found.append(baseline(name, models[0].tokenizer.config, config.seed, device, latents))
    sources = [subject.source for subject in found]
    if twice := sorted({source for source in sources if sources.count(source) > 1}):
        raise ValueError(f"{', '.join(twice)} would name several sources: rename a folder, or probe them one by one.")
    return found


def _rows(
    config: ProbeConfig, data: DataSplits, subject: Subject, name: FeatureName, found: Probed, origin: dict
) -> list[dict]:
    parts = [slug(data.name), subject.source, *filter(None, (name.features, name.pooling))]
    if name.block is not None:
        parts += [f"block{name.block}", f"noise{name.noise_level:g}"]
    setting = {
        "label": str(name),
        **asdict(name),
        "kind": subject.kind,
        "labels": subject.labels,
        "image_size": subject.image_size,
        **subject.more,
        **{entry: getattr(found, entry) for entry in ("width", "images", "classes", "lr", "weight_decay", "c")},
        **{entry: getattr(config, entry) for entry in ("epochs", "batch_size", "seed")},
    }
    common = {
        "experiment": "linear_probing",
        "run": "-".join(part.replace(" ", "_") for part in parts),
        "seed": config.seed,
        "source": "measured",
        "data": data.name,
        "data_fingerprint": data.fingerprint,
        "config": setting,
        "config_hash": strictly.fingerprint(setting),
        "precision": "float32",
        **origin,
    }
    values = {
        "accuracy": found.accuracy.row(),
        "macro_accuracy": {"value": found.macro, "low": None, "high": None, "interval": "", "n": found.accuracy.n},
        "logistic_accuracy": found.logistic.row(),
    }
    return [rows_of.check({**common, "metric": metric, **value}) for metric, value in values.items()]
