"""Model cards: the README.md beside saved weights, made of what was recorded about them and of nothing else."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from softvq_lib.config import strict

CARD = "README.md"
TAGS = ("arxiv:2412.10958",)
LICENCE = "Apache-2.0. The data that it was trained on may set terms of its own."
# A card with this line is written anew when what it tells changes; one without it is somebody's own, and stays.
OURS = "This card was made by softvq_lib from config.json; without this line it is kept as it is."

# What metrics are called in a card; others by their own names.
_METRICS = {
    "psnr": "PSNR, dB",
    "usage": "share of codes that are used",
    "perplexity": "perplexity of the average posterior, codes",
    "val_loss": "loss of held-out latents",
    "class_agreement": "share that a classifier takes for their class",
    "agreement": "share that the classifier takes for their class",
}
# Settings of a run that name a network with weights of its own.
_TEACHERS = ("perceptual", "alignment", "align_teacher", "encoder_start")
_BASELINES = {
    r"psnr_pca_(\d+)": "PSNR of PCA with {} components, dB",
    r"decoded_(\w+)": "{}, of decoded held-out images",
    r"real_(\w+)": "{}, of held-out images themselves",
}
_CITATION = """\
```bibtex
@inproceedings{chen2025softvq,
  title     = {{SoftVQ-VAE}: Efficient 1-Dimensional Continuous Tokenizer},
  author    = {Chen, Hao and Wang, Ze and Li, Xiang and Sun, Ximeng and Chen, Fangyi and Liu, Jiang and Wang, Jindong
               and Raj, Bhiksha and Liu, Zicheng and Barsoum, Emad},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year      = {2025},
  note      = {arXiv:2412.10958}
}
```"""


@dataclass(frozen=True)
class Trained:
    """What a model was trained on and how, and what was measured of it: `trained` in its config.json.

    Attributes:
        data: Name of the data set, never a path.
        data_fingerprint: Of its pictures and how they are split, sha256 (hex).
        images: Number of training pictures.
        held_out: Number of held-out pictures.
        classes: Number of classes; 0 without labels.
        settings: Of data, losses and optimiser, by name; not those of the model.
        config_hash: Fingerprint of the run's whole configuration.
        measured: Numbers of the run's own results, see `measured`.
    """

    data: str
    data_fingerprint: str
    images: int
    held_out: int
    classes: int
    settings: dict
    config_hash: str
    measured: list = field(default_factory=list)


@dataclass(frozen=True)
class Number:
    """A measured number.

    Attributes:
        metric: Its name in results rows.
        value: The number.
        n: Images that it is of.
        low: Lower end of its interval, None without one.
        high: Upper end.
        interval: How these were made, "" without.
    """

    metric: str
    value: float
    n: int
    low: float | None = None
    high: float | None = None
    interval: str = ""


def read_trained(value: Mapping | None) -> Trained | None:
    """Check `trained` of a config.json.

    Raises:
        ValueError: for an entry that is unknown, missing or of another type.
    """
    if value is None:
        return None
    try:
        trained = strict(Trained, value)
        for number in trained.measured:
            strict(Number, number)
    except (TypeError, ValueError) as error:
        raise ValueError(f"trained: {error}") from None
    return trained


def make(
    *,
    title: str,
    model_name: str,
    about: str,
    use: str,
    purpose: str,
    config: Mapping[str, object],
    trained: Mapping | None,
    task: str,
    tags: Sequence[str],
    licence: str | None = None,
    library: str = "softvq_lib",
) -> ModelCard:
    """Put a card together.

    Args:
        title: Its headline.
        model_name: The model's name in the index of results.
        about: What the model is, and its architecture; Markdown.
        use: How it is loaded; Markdown with code that runs in the model's folder.
        purpose: What it is made for, without the limits that follow from its data.
        config: Its settings by name.
        trained: As in `Trained`; None where it is not recorded.
        task: Task of the Hugging Face hub that comes nearest.
        tags: Beside `TAGS`.
        licence: Text in place of `LICENCE`, for weights whose licence is not ours to name; the head then has none.
        library: That loads it, by the hub's name.

    Raises:
        ValueError: for a `trained` that is not one.
    """
    told = read_trained(trained)
    head = ModelCardData(
        library_name=library, license=None if licence else "apache-2.0", pipeline_tag=task, tags=[*TAGS, *tags]
    )
    if told is not None:
        head.model_name, head.eval_results = model_name, _results(told, task) or None
        if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", told.data):
            head.datasets = [told.data]
    sections = {
        "": f"# {title}\n\n{about}",
        "Use": use,
        "Training": _training(told),
        "Measured": _measured(told),
        "Intended use and limits": f"{purpose} {_limits(told)}",
        "Configuration": _table(["setting", "value"], [(k, v) for k, v in config.items() if v is not None]),
        "Licence": licence or LICENCE,
        "Citation": _CITATION,
    }
    text = "\n\n".join(f"## {name}\n\n{body}" if name else body for name, body in sections.items())
    return ModelCard(f"---\n{head.to_yaml()}\n---\n\n{text}\n\n{OURS}\n")


def write(card: ModelCard, folder: Path) -> bool:
    """Write a card into a model's folder, unless there is one that is somebody's own; return whether it was written."""
    path, text = folder / CARD, str(card)
    if path.exists() and (OURS not in (held := path.read_text(encoding="utf-8")) or held == text):
        return False
    part = path.with_name(f".{CARD}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return True


def joined(rows: Sequence[Number], before: Mapping | None, config_hash: str) -> list[dict]:
    """Return numbers as config.json holds them, without what is not there; then those of `before` that are not in them.

    Args:
        rows: What was measured now.
        before: What an earlier call made `trained` of the same run; another run's counts for nothing.
        config_hash: The run's.
    """
    new = [{k: v for k, v in asdict(row).items() if v not in (None, "")} for row in rows]
    same = before is not None and before.get("config_hash") == config_hash
    names = {row["metric"] for row in new}
    return new + [row for row in before["measured"] if row["metric"] not in names] if same else new


def _results(trained: Trained, task: str) -> list[EvalResult]:
    kind = trained.data if "/" in trained.data else re.sub(r"[^a-z0-9]+", "-", trained.data.lower()).strip("-")
    return [
        EvalResult(
            task_type=task,
            dataset_type=kind or "data",
            dataset_name=trained.data,
            metric_type=row["metric"],
            metric_value=row["value"],
            metric_name=_named(row["metric"]),
        )
        for row in trained.measured
        if not _baseline(row["metric"])
    ]


def _baseline(metric: str) -> str | None:
    """Say what a number is that stands beside the model's own, for comparison; None for the model's own."""
    for pattern, said in _BASELINES.items():
        if found := re.fullmatch(pattern, metric):
            return "for comparison: " + said.format(*(_METRICS.get(x, x.replace("_", " ")) for x in found.groups()))
    return None


def _named(metric: str) -> str:
    return _baseline(metric) or _METRICS.get(metric, metric.replace("_", " "))


def _training(trained: Trained | None) -> str:
    if trained is None:
        return "What it was trained on, and how, is not recorded in its config.json."
    classes = f"{trained.classes} classes" if trained.classes else "no labels"
    rows = [(name, value) for name, value in sorted(trained.settings.items()) if value is not None]
    return (
        f"Trained on {trained.data}: {trained.images:,} training and {trained.held_out:,} held-out images, {classes}. "
        f"Fingerprint of the data and their split: `{trained.data_fingerprint}`. Fingerprint of the run's "
        f"configuration: `{trained.config_hash}`.\n\n{_table(['setting', 'value'], rows)}"
    )


def _measured(trained: Trained | None) -> str:
    if trained is None or not trained.measured:
        return "No measured numbers are recorded in its config.json."
    rows = []
    for each in trained.measured:
        row = Number(**each)
        interval = "" if row.low is None else f"[{row.low:.4g}, {row.high:.4g}]"
        rows.append((_named(row.metric), f"{row.value:.4g}", interval, row.interval, row.n))
    return f"With the held-out images of {trained.data}, by the run itself:\n\n" + _table(
        ["metric", "value", "interval", "how", "images"], rows
    )


def _limits(trained: Trained | None) -> str:
    if trained is None:
        return "Which images it has seen is not recorded: try it on yours before you rely on it."
    others = [
        f"{name}={trained.settings[name]!r}" for name in _TEACHERS if trained.settings.get(name, "none") != "none"
    ]
    if trained.settings.get("pretrained"):
        others.append("the published weights that its encoder started from")
    seen = f"It has seen the {trained.images:,} training images of {trained.data} and no others"
    seen += f", apart from what networks were trained on that it learnt from: {', '.join(others)}." if others else "."
    return (
        f"{seen} Nothing was measured on other images; expect worse there, and try it on yours before you rely on it. "
        "It carries over whatever bias these images have. It was made to study the method, and was not checked for any "
        "use that affects people."
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
