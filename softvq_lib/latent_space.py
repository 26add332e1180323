"""The latent space experiment (Fig. 4, Sec. 4.4): numbers of a tokenizer's latents on held-out images, and UMAP."""

import json
import logging
import re
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np

from softvq_lib import config as strictly
from softvq_lib import results as rows_of
from softvq_lib.config import at_least
from softvq_lib.data import DataConfig, open_dataset
from softvq_lib.data.latents import tokenizer_hash
from softvq_lib.evaluation.code_use import CodeUse
from softvq_lib.evaluation.latent_space import (
    Bounds,
    Latents,
    collect_latents,
    cosine,
    embed,
    jackknife,
    mean_jackknife,
    purity,
    purity_bounds,
    silhouette,
)
from softvq_lib.evaluation.patch_attention import PatchAttention, best_strips
from softvq_lib.experiments import _SHOWABLE
from softvq_lib.training.engine import choose_device, device_name
from softvq_lib.training.generator import find_tokenizer
from softvq_lib.training.tokenizer import train

log = logging.getLogger(__name__)

OVER_IMAGES = "95 % jackknife over images"
OVER_GROUPS = "95 % jackknife over groups of images"
MEAN_OF = 100  # images whose mean shows none of them
COMPONENTS = 40  # most used codes whose use by class is kept
WHICH, HOW = ("z_hat", "z"), ("mean", "flat")


@dataclass(frozen=True)
class LatentSpaceConfig:
    """Which latents are looked at, and how.

    Attributes:
        tokenizer: Folder of a tokenizer, name of a run in the folder of runs, or a hub name. None: the one that
            `softvq_lib.train_tokenizer` trains on the same data with its defaults.
        dataset: As in `DataConfig`, like the four after it; its held-out images are what is encoded.
        image_column: Column of the images.
        label_column: Column of the labels.
        streaming: Read shards piece by piece.
        workers: Loader processes.
        limit: Held-out images, the first of their fixed order. None: all.
        batch_size: Images encoded at once.
        neighbours: Nearest neighbours of which the purity is the share of an image's own class.
        umap: Also embed the flattened latents in the plane.
        umap_points: Images embedded, the first.
        umap_seeds: One picture each, separated by commas.
        umap_neighbours: UMAP's n_neighbors.
        umap_min_dist: UMAP's min_dist, 0 to 1.
        block: Block of the encoder whose attention is shown, from 1. None: the mean over all.
        device: `auto`, `cpu` or a torch device.
        runs: Folder of all runs.
        seed: Of the shuffled labels that say what chance gives.
        results: Folder whose `latent_space.jsonl` the measured rows are appended to. None: nothing is recorded.
    """

    tokenizer: str | None = None
    dataset: str = "digits"
    image_column: str | None = None
    label_column: str | None = None
    streaming: bool = False
    workers: int | None = None
    limit: int | None = 1000
    batch_size: int = 64
    neighbours: int = 10
    umap: bool = True
    umap_points: int = 300
    umap_seeds: str = "0,1,2"
    umap_neighbours: int = 15
    umap_min_dist: float = 0.1
    block: int | None = None
    device: str = "auto"
    runs: str | None = None
    seed: int = 0
    results: str | None = None

    def __post_init__(self):
        if self.tokenizer == "":
            raise ValueError("tokenizer='' names nothing: give a tokenizer's folder, a run, a hub name, or None.")
        for name in ("limit", "batch_size", "neighbours", "umap_points", "block"):
            at_least(name, getattr(self, name), 1)
        at_least("umap_neighbours", self.umap_neighbours, 2)
        at_least("umap_min_dist", self.umap_min_dist, 0)
        at_least("seed", self.seed, 0)
        if self.umap_min_dist > 1:
            raise ValueError(f"umap_min_dist={self.umap_min_dist!r} is not allowed: give a number from 0 to 1.")
        if not self.seeds:
            raise ValueError(f"umap_seeds={self.umap_seeds!r} are no seeds: give some, such as '0,1,2'.")
        points = min(self.umap_points, self.limit or self.umap_points)
        if self.umap and points <= self.umap_neighbours:
            raise ValueError(
                f"{points} points are too few for umap_neighbours={self.umap_neighbours}: raise umap_points and limit."
            )

    @property
    def seeds(self) -> list[int]:
        """The seeds as numbers; [] where one is none."""
        parts = [part.strip() for part in self.umap_seeds.split(",")]
        return [int(part) for part in parts] if all(re.fullmatch(r"\d+", part) for part in parts) else []


# What each metric is called. Vectors of an image are the mean over its tokens, or all tokens side by side (flat).
METRICS = {
    "cosine": "cosine of ẑ and z",
    **{
        f"{what}_{which}_{how}": f"{what} of {letter}, {how}"
        for what in ("purity", "silhouette")
        for how in HOW
        for which, letter in (("z_hat", "ẑ"), ("z", "z"), ("change", "z less that of ẑ"))
    },
    "purity_chance": "purity by chance",
    "purity_most": "purity that the sizes of the classes allow",
    "effective_codebook_size": "effective codebook size, exp H(E q)",
    "usage": "codes that are some token's most likely one",
    "posterior_entropy": "entropy of the posterior, nats",
    "mutual_information": "I(image, position; code) = -L_kl, nats",
    "mutual_information_image": "  of it I(image; code | position)",
    "mutual_information_position": "  of it I(position; code)",
    "class_information": "NMI of code and class",
    "class_information_chance": "  by chance (shuffled labels)",
    "patch_attention": "latents' attention that goes to patches",
    "strip_attention": "  of it to the token's own strip of patches",
    "strip_attention_best": "  the most, were strips dealt out anew",
    "strip_attention_even": "  were it even",
}


@dataclass
class LatentSpaceExperiment:
    """What was measured.

    Attributes:
        rows: Results rows, one a number.
        arrays: What the figures of `softvq_lib.latent_figures`, which say their shapes, need beside the rows.
        missing: What could not be measured, and why.
    """

    rows: list[dict]
    arrays: dict[str, np.ndarray]
    missing: list[str] = field(default_factory=list)

    @property
    def numbers(self) -> dict[str, tuple[float, float | None, float | None]]:
        """Value, low and high by metric; None where there is no interval."""
        return {row["metric"]: (row["value"], row["low"], row["high"]) for row in self.rows}

    def __str__(self) -> str:
        first = self.rows[0]
        lines = [f"{first['run']} on {first['n']:,} held-out images of {first['data']}"]
        for metric, (value, low, high) in self.numbers.items():
            interval = "" if low is None else f"  [{low:.4g}, {high:.4g}]"
            lines.append(f"{METRICS.get(metric, metric):46}{value:9.4g}{interval}")
        return "\n".join([*lines, *self.missing])


def latent_space(**values: object) -> LatentSpaceExperiment:
    """Measure the latents of a tokenizer on held-out images, embed them by UMAP, and record rows if asked to.

    Codes are left out for a quantizer that has none, numbers of classes for data without labels, attention for an
    encoder that cannot be watched; the experiment says so.

    Args:
        values: Fields of `LatentSpaceConfig`.

    Raises:
        ValueError: for a parameter that is unknown (the nearest is named) or out of range, a tokenizer or data that
            cannot be used, or too few images for the neighbours asked for.
    """
    settings = strictly.strict(LatentSpaceConfig, values)
    device = choose_device(settings.device)
    named = ("dataset", "image_column", "label_column", "streaming", "workers")
    given = {name: getattr(settings, name) for name in named}
    name = settings.tokenizer
    if name is None:
        name = train(**given, runs=settings.runs, device=settings.device).name
    tokenizer = find_tokenizer(name, settings.runs).to(device)
    data = open_dataset(DataConfig(**given), tokenizer.config.image_size)
    if settings.block and settings.block > len(tokenizer.encoder.vit.blocks):
        raise ValueError(f"block={settings.block}, but the encoder has {len(tokenizer.encoder.vit.blocks)} blocks.")

    missing: list[str] = []
    codes = _unless_missing(lambda: CodeUse(tokenizer.quantizer, tokenizer.config.tokens), missing)
    attention = _unless_missing(lambda: PatchAttention(tokenizer), missing)
    latents = collect_latents(
        tokenizer,
        data.validation,
        limit=settings.limit,
        batch_size=settings.batch_size,
        workers=settings.workers,
        codes=codes,
        attention=attention,
    )
    classes = data.classes or []
    if len(classes) < 2:
        classes = []
        missing.append("The data have no labels of two classes: no purity, no silhouette, no use of codes by class.")
    found = _Found(shown=len(latents.labels) >= MEAN_OF or settings.dataset in _SHOWABLE)
    found.of_latents(latents, settings, classes)
    if codes:
        found.of_codes(codes, latents.labels, classes, settings.seed)
    if attention:
        found.of_attention(attention)
    experiment = LatentSpaceExperiment([], found.arrays, missing)
    short = _short(name)
    config = {key: value for key, value in asdict(tokenizer.config).items() if key != "pretrained"}
    config |= {"tokenizer": short, "tokenizer_hash": tokenizer_hash(tokenizer)}
    left_out = {*named, "tokenizer", "device", "runs", "results", "batch_size"}
    config |= {key: value for key, value in asdict(settings).items() if key not in left_out}
    origin = rows_of.origin()
    origin["packages"] |= {package: version(package) for package in ("scikit-learn", "scipy", "umap-learn", "numba")}
    common = {
        "experiment": "latent_space",
        "run": short,
        "n": len(latents.labels),
        "seed": settings.seed,
        "source": "measured",
        "data": data.name,
        "data_fingerprint": data.fingerprint,
        "config": config,
        "config_hash": strictly.fingerprint(config),
        "device": device_name(device),
        "precision": "float32",
        **origin,
    }
    for metric, (bounds, interval) in found.numbers.items():
        value, low, high = (None if end is None else float(end) for end in bounds)
        row = {**common, "metric": metric, "value": value, "low": low, "high": high, "interval": interval}
        experiment.rows.append(row)
    if settings.results:
        _record(experiment, Path(settings.results))
    return experiment


def _unless_missing(make, missing: list[str]):
    """Return what `make` makes, or None where it refuses; then note why."""
    try:
        return make()
    except ValueError as error:
        log.info("left out: %s", error)
        missing.append(str(error))
        return None


def _short(name: str) -> str:
    """Name a tokenizer for people: a run, a hub name, or the last folder of a path."""
    if name.count("/") == 1 and not Path(name).expanduser().exists():
        return name
    parts = [part for part in Path(name).expanduser().resolve().parts if part != "tokenizer"]
    return parts[-1]


class _Found:
    """Numbers by metric, each with the kind of its interval, and arrays for the figures."""

    def __init__(self, shown: bool):
        self.numbers: dict[str, tuple[Bounds, str]] = {}
        self.arrays: dict[str, np.ndarray] = {}
        self.shown = shown  # whether the mean image may be kept

    def _bare(self, metric: str, value: float) -> None:
        self.numbers[metric] = (value, None, None), ""

    def of_latents(self, latents: Latents, settings: LatentSpaceConfig, classes: list[str]) -> None:
        near = cosine(latents.z_hat, latents.z)  # (n, l)
        self.numbers["cosine"] = mean_jackknife(near.mean(1)), OVER_IMAGES
        self.arrays["cosine"] = np.stack(mean_jackknife(near)).astype(np.float32)  # (3, l)
        if classes:
            for what, measure in (
                ("purity", lambda x: purity(x, latents.labels, settings.neighbours)),
                ("silhouette", lambda x: silhouette(x, latents.labels)),
            ):
                for how in HOW:
                    both = [measure(latents.features(which, how)) for which in WHICH]
                    both.append((both[1][0] - both[0][0], both[1][1] - both[0][1]))
                    for which, pair in zip((*WHICH, "change"), both, strict=True):
                        self.numbers[f"{what}_{which}_{how}"] = jackknife(*pair), OVER_IMAGES
            for metric, bound in zip(
                ("purity_chance", "purity_most"), purity_bounds(latents.labels, settings.neighbours), strict=True
            ):
                self._bare(metric, bound)
        if self.shown:
            pixels = np.rint((latents.mean_image.clip(-1, 1) + 1) * 127.5)
            self.arrays["mean_image"] = pixels.astype(np.uint8)  # (3, height, width)
        self.arrays["classes"] = np.frombuffer(json.dumps(classes).encode(), np.uint8)
        if settings.umap:
            rows = slice(settings.umap_points)
            for which in WHICH:
                x = latents.features(which, "flat")[rows]
                points = [embed(x, seed, settings.umap_neighbours, settings.umap_min_dist) for seed in settings.seeds]
                self.arrays[f"umap_{which}"] = np.stack(points).astype(np.float16)  # (seeds, points, 2)
            self.arrays["umap_labels"] = latents.labels[rows].astype(np.int16)

    def of_codes(self, codes: CodeUse, labels: np.ndarray, classes: list[str], seed: int) -> None:
        measured = {name: jackknife(*pair) for name, pair in codes.measure().items()}
        self.numbers["effective_codebook_size"] = tuple(map(np.exp, measured["code_entropy"])), OVER_GROUPS
        by_codebook = [np.exp(end) for end in measured["codebook_entropy"]]
        if len(by_codebook[0]) > 1:
            for number, ends in enumerate(zip(*by_codebook, strict=True)):
                self.numbers[f"effective_codebook_size_{number}"] = ends, OVER_GROUPS
        self._bare("usage", codes.usage())
        for metric in ("posterior_entropy", *(name for name in METRICS if name.startswith("mutual_information"))):
            self.numbers[metric] = measured[metric], OVER_GROUPS
        for metric in ("mutual_information", "posterior_entropy"):
            self.arrays[metric] = np.stack(measured[f"{metric}_by_position"]).astype(np.float32)  # (3, l)
        posterior = codes.mean_posterior()  # (codebooks, k)
        self.arrays["code_probability"] = -np.sort(-posterior, axis=1).astype(np.float32)
        if classes:
            value, without, chance = codes.class_information(labels, len(classes), seed=seed)
            self.numbers["class_information"] = jackknife(value, without), OVER_GROUPS
            self._bare("class_information_chance", chance)
            used = np.argsort(-posterior, axis=1, kind="stable")[:, :COMPONENTS]  # (codebooks, codes)
            by_class = codes.by_class(labels, len(classes))
            components = np.take_along_axis(by_class, used[None], 2)  # (classes, codebooks, codes)
            self.arrays["components"] = components.astype(np.float16)

    def of_attention(self, attention: PatchAttention) -> None:
        maps, shares = attention.maps().numpy(), attention.shares().numpy()  # (blocks, l, n), (blocks, l)
        self._bare("patch_attention", shares.mean())
        if attention.own:
            own = np.concatenate([part.numpy() for part in attention.own])  # (n, blocks)
            self.numbers["strip_attention"] = mean_jackknife(own.mean(1)), OVER_IMAGES
            self._bare("strip_attention_best", best_strips(maps))
            self._bare("strip_attention_even", 1 / maps.shape[1])
        self.arrays["attention"] = maps.astype(np.float16)  # (blocks, l, n)
        self.arrays["attention_share"] = shares.astype(np.float32)


def _record(experiment: LatentSpaceExperiment, folder: Path) -> None:
    file = re.sub(r"[^\w.-]+", "-", experiment.rows[0]["run"]) + ".safetensors"
    experiment.rows[0]["arrays"] = rows_of.keep_arrays(folder / "latent_space", {file: experiment.arrays})
    rows_of.append(folder / "latent_space.jsonl", experiment.rows)


# Columns of the table: head, metric, and one whose value stands behind it.
_COLUMNS = (
    ("cos(ẑ, z)", "cosine", None),
    ("purity of ẑ", "purity_z_hat_flat", "purity_chance"),
    ("purity of z", "purity_z_flat", "purity_chance"),
    ("silhouette of ẑ", "silhouette_z_hat_flat", None),
    ("silhouette of z", "silhouette_z_flat", None),
    ("effective codes", "effective_codebook_size", None),
    ("I(image; code), nats", "mutual_information_image", None),
    ("I(position; code), nats", "mutual_information_position", None),
    ("NMI of code and class", "class_information", "class_information_chance"),
)


def table(rows: list[dict]) -> str:
    """One line a recorded tokenizer, in Markdown: values with 95 % intervals, chance in parentheses."""
    runs: dict[str, dict[str, dict]] = {}
    for row in rows:
        runs.setdefault(row["run"], {})[row["metric"]] = row
    if not runs:
        return "*No rows have been recorded.*"

    def cell(metrics: dict[str, dict], metric: str, chance: str | None) -> str:
        if metric not in metrics:
            return "–"
        value, low, high = (f"{metrics[metric][end]:.3g}" for end in ("value", "low", "high"))
        return f"{value} [{low}, {high}]" + (f" ({metrics[chance]['value']:.2g})" if chance else "")

    lines = [
        "| tokenizer | data | tokens × dim | codes | " + " | ".join(head for head, *_ in _COLUMNS) + " | n |",
        "|---|---|--:|--:|" + "--:|" * (len(_COLUMNS) + 1),
    ]
    for run, metrics in runs.items():
        first = next(iter(metrics.values()))
        config = first["config"]
        codes = f"{config['codebooks']} × {config['codebook_size']:,}" if "usage" in metrics else "–"
        cells = [f"{run} ({config['quantizer']})", first["data"], f"{config['tokens']} × {config['dim']}", codes]
        cells += [cell(metrics, metric, chance) for _, metric, chance in _COLUMNS]
        lines.append("| " + " | ".join([*cells, f"{first['n']:,}"]) + " |")
    return "\n".join(lines)
