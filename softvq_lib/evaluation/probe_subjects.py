"""What is probed (Sec. 4.4): tokenizers and generators by name, baselines, and whose labels formed their features.

A network that was trained on labels leaks them into whatever it teaches: a perceptual loss or an alignment (Eq. 6).
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from softvq_lib.data.latents import tokenizer_hash
from softvq_lib.evaluation.frozen_features import Reader, of_generator, of_network, of_pixels, of_tokenizer
from softvq_lib.features import NAMES, PACKAGED, build_features, fingerprint_of
from softvq_lib.generators.loading import Loaded, load_generator
from softvq_lib.generators.published import is_published
from softvq_lib.tokenizers import Tokenizer, TokenizerConfig
from softvq_lib.training.generator import find_tokenizer
from softvq_lib.training.run import runs_folder
from softvq_lib.weights import CONFIG

_RANDOM = "-random"
_SUPERVISED = {*PACKAGED, "lpips"}  # trained on the labels of ImageNet-1k; the others of NAMES on none


@dataclass(frozen=True)
class Subject:
    """A model or baseline.

    Attributes:
        source: Its name, as its features carry it; never a path.
        kind: `tokenizer`, `generator`, `network`, `pixels` or `random`.
        reader: Of its features, (b, f) of images (b, 3, height, width).
        image_size: Side of its images in pixels.
        labels: Whose class labels formed its features; "" where none did, "unknown" where nothing is known.
        more: What else rows say of it.
    """

    source: str
    kind: str
    reader: Reader
    image_size: int
    labels: str = ""
    more: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """A trained model, with the tokenizer that it is or works on.

    Attributes:
        name: As in rows.
        tokenizer: In evaluation mode.
        generator: None for a tokenizer.
        labels: As in `Subject`.
    """

    name: str
    tokenizer: Tokenizer
    generator: Loaded | None = None
    labels: str = ""


def find_model(name: str, runs: str | None = None) -> Model:
    """Load a tokenizer, or a generator with its tokenizer, whichever a folder, run or hub name is.

    Args:
        name: Folder, run, or hub name, which is a generator's where its last part begins with `sit` or `dit`.
        runs: Folder of all runs.

    Raises:
        ValueError: for a name of nothing, a damaged model, or a generator whose tokenizer is missing or another one.
        OSError: when the hub is needed and cannot be reached.
    """
    generator = _load_generator(name, runs)
    if generator is None:
        try:
            tokenizer = find_tokenizer(name, runs)
        except ValueError as error:
            raise ValueError(f"model={name!r} is no generator, and {error}") from None
        return Model(_short(name), tokenizer, labels=_labels(name, runs))
    if generator.tokenizer is None:
        raise ValueError(f"model={name!r} does not say on which tokenizer's latents it was trained.")
    tokenizer = find_tokenizer(generator.tokenizer, runs)
    if generator.tokenizer_hash not in (None, tokenizer_hash(tokenizer)):
        raise ValueError(
            f"tokenizer {generator.tokenizer!r} is not the one whose latents {name!r} was trained on: its weights or "
            "settings differ. Train the generator again on it, or bring the old one back."
        )
    parts = ["class labels in training", _labels(name, runs), _labels(generator.tokenizer, runs)]
    return Model(_short(name), tokenizer, generator, "; ".join(dict.fromkeys(filter(None, parts))))


def of_model(model: Model, device: torch.device | str, latents: dict, states: dict) -> Subject:
    """Make a model ready to be probed.

    Args:
        model: From `find_model`.
        device: Where it is moved to.
        latents: `features` and `pooling` of `of_tokenizer`.
        states: `blocks` and `noise_levels` of `of_generator`.

    Raises:
        ValueError: as these do.
    """
    tokenizer, size = model.tokenizer.to(device), model.tokenizer.config.image_size
    more = {name: getattr(tokenizer.config, name) for name in ("tokens", "dim", "quantizer")}
    if model.generator is None:
        more |= {"weights": tokenizer_hash(tokenizer)}
        return Subject(
            model.name, "tokenizer", of_tokenizer(tokenizer, model.name, **latents), size, model.labels, more
        )
    net = model.generator.model.to(device)
    more |= {"generator": net.config.generator, "size": net.config.size, "weights": fingerprint_of(net)}
    more |= {"tokenizer": _short(model.generator.tokenizer)}
    reader = of_generator(model.generator, tokenizer, model.name, **states)
    return Subject(model.name, "generator", reader, size, model.labels, more)


def baseline(
    name: str, config: TokenizerConfig, seed: int = 0, device: torch.device | str = "cpu", latents: dict | None = None
) -> Subject:
    """Make what models are compared with ready to be probed.

    Args:
        name: `pixels`; `random`, the tokenizer of `config` with random weights; or a name for `build_features`, with
            random weights where `-random` follows.
        config: Of the tokenizer; all see images of its size.
        seed: Of random weights. The global random state stays as it was.
        device: Where it is put.
        latents: For `random`, as in `of_model`.

    Raises:
        ValueError: for a name that is not known.
    """
    size = config.image_size
    if name == "pixels":
        return Subject("pixels", "pixels", of_pixels, size)
    if name == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            tokenizer = Tokenizer(replace(config, pretrained=False)).eval().to(device)
        reader = of_tokenizer(tokenizer, "random weights", **(latents or {}))
        return Subject("random weights", "random", reader, size, more={"preset": config.preset})
    random, plain = name.endswith(_RANDOM), name.removesuffix(_RANDOM)
    try:
        net = build_features(plain, random=random, seed=seed).to(device)
    except ValueError as error:
        raise ValueError(f"baselines={name!r} is not pixels, not random, and no network: {error}") from None
    labels = "" if random else "ImageNet-1k" if plain in _SUPERVISED else _taught_by({plain})
    more = {"weights": net.fingerprint}
    return Subject(net.label, "random" if random else "network", of_network(net), size, labels, more)


def _load_generator(name: str, runs: str | None) -> Loaded | None:
    folder = Path(name).expanduser()
    for place in (folder, folder / "generator", runs_folder(runs) / name / "generator"):
        settings = _settings(place)
        if "generator" in settings or is_published(settings):
            return load_generator(place)
    on_hub = name.count("/") == 1 and not folder.exists()
    return load_generator(name) if on_hub and folder.name.startswith(("sit", "dit")) else None


def _settings(folder: Path) -> dict:
    path = folder / CONFIG
    return json.loads(path.read_text()) if path.is_file() else {}


def _short(name: str) -> str:
    """Name a model in rows: never by a path."""
    path = Path(name)
    return path.parent.name if path.name in ("tokenizer", "generator") and path.parent.name else path.name


def _labels(name: str, runs: str | None) -> str:
    """Say whose labels came into a model through the networks that taught it, as its run's configuration tells."""
    folder = Path(name).expanduser()
    for place in (folder, folder.parent, runs_folder(runs) / name):
        if run := _settings(place).get("identity"):
            aligned = None if run.get("alignment_random") else run.get("alignment")
            return _taught_by({aligned, run.get("perceptual"), run.get("align_teacher")})
    return "unknown"


def _taught_by(teachers: Iterable[str | None]) -> str:
    teachers = {teacher for teacher in teachers if teacher not in (None, "none")}
    labelled = sorted(teachers & _SUPERVISED)
    known = [f"ImageNet-1k, through {' and '.join(labelled)}"] if labelled else []
    return "; ".join(known + ["unknown"] * bool(teachers - _SUPERVISED - set(NAMES)))
