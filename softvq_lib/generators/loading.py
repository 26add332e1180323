"""Generators on the disk and the hub: config.json and model.safetensors, with the statistics of the latents."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from softvq_lib import cards, weights
from softvq_lib.config import one_of, split
from softvq_lib.data.latents import NORMALISE
from softvq_lib.generators import published
from softvq_lib.generators.build import build_generator
from softvq_lib.generators.card import card
from softvq_lib.generators.dit import DiT
from softvq_lib.generators.mar import MAR
from softvq_lib.generators.presets import GeneratorConfig
from softvq_lib.generators.sampling import SampleConfig
from softvq_lib.generators.sit import SiT

_TRANSFORMER = {
    "tokens": ("backbone.pos_embed", 1, 0),
    "dim": ("backbone.x_embedder.weight", 1, 0),
    "classes": ("backbone.y_embedder.embedding_table.weight", 0, 1),  # one more row, for "no class"
    "width": ("backbone.x_embedder.weight", 0, 0),
}
# What tensors tell of the configuration: the tensor, its axis, and how many more that axis has.
_TOLD: dict[str, dict[str, tuple[str, int, int]]] = {
    "sit": _TRANSFORMER,
    "dit": _TRANSFORMER,
    "mar": {
        "tokens": ("diffusion_pos_embed_learned", 1, 0),
        "dim": ("z_proj.weight", 1, 0),
        "classes": ("class_emb.weight", 0, 0),
        "width": ("z_proj.weight", 0, 0),
    },
}


@dataclass(frozen=True)
class About:
    """What config.json says beside the configuration.

    Attributes:
        mean: Mean of the latents over the data, one number or one a channel.
        std: Their standard deviation.
        normalise: Which of both: `scalar` or `channel`.
        tokenizer: Name of the tokenizer whose latents they are.
        tokenizer_hash: Its fingerprint, as the cache of latents recorded it.
        origin: Name of the published generator that the weights come from.
        weights_sha256: Checksum of model.safetensors.
        trained: What it was trained on and how, and what was measured, see `softvq_lib.cards.Trained`.
    """

    mean: float | list | None = None
    std: float | list | None = None
    normalise: str = "scalar"
    tokenizer: str | None = None
    tokenizer_hash: str | None = None
    origin: str | None = None
    weights_sha256: str | None = None
    trained: dict | None = None


@dataclass(frozen=True)
class Loaded:
    """A generator and what is needed to use it.

    Attributes:
        model: SiT, DiT or MAR in evaluation mode.
        mean: Mean of the latents that it was trained on, () or (d,).
        std: Their standard deviation, () or (d,).
        tokenizer: Name of the tokenizer that decodes its latents, None where unknown.
        tokenizer_hash: Fingerprint of that tokenizer, None where unknown.
        origin: Name of the published generator that it is, None for ours.
        sampling: How its authors sample; the defaults for ours.
        trained: What it was trained on and how, and what was measured, see `softvq_lib.cards.Trained`.
    """

    model: SiT | DiT | MAR
    mean: Tensor
    std: Tensor
    tokenizer: str | None = None
    tokenizer_hash: str | None = None
    origin: str | None = None
    sampling: SampleConfig = SampleConfig()
    trained: dict | None = None

    def normalise(self, z: Tensor) -> Tensor:
        """Map a tokenizer's latents (b, l, d) to what the model is trained on."""
        return (z - self.mean.to(z)) / self.std.to(z)

    def denormalise(self, x: Tensor) -> Tensor:
        """Map the model's latents (b, l, d) to what the tokenizer decodes."""
        return x * self.std.to(x) + self.mean.to(x)


def save_generator(
    model: SiT | DiT | MAR,
    folder: str | Path,
    *,
    tokenizer: str | None,
    tokenizer_hash: str | None,
    mean: float | Sequence[float] | Tensor,
    std: float | Sequence[float] | Tensor,
    normalise: str = "scalar",
    origin: str | None = None,
    trained: Mapping | None = None,
) -> None:
    """Write weights, then config.json with their checksum, and the model card.

    Args:
        model: What to save.
        folder: Made where it is missing; a generator in it is replaced.
        tokenizer: Name of the tokenizer whose latents the model was trained on.
        tokenizer_hash: Its fingerprint.
        mean: Mean of these latents, a number or (d,).
        std: Their standard deviation, alike.
        normalise: `scalar`, one number for all channels, or `channel`, one for each.
        origin: Name of the published generator that the weights come from.
        trained: What it was trained on and how, see `softvq_lib.cards.Trained`.

    Raises:
        ValueError: for statistics that cannot be those of such latents, or a `trained` that is not one.
    """
    cards.read_trained(trained)
    mean, std = (_plain(x, normalise) for x in (mean, std))
    _check_statistics(mean, std, normalise, model.config.dim)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)

    def settings(sha256: str) -> dict:
        about = About(mean, std, normalise, tokenizer, tokenizer_hash, origin, sha256, trained)
        return {**asdict(model.config), **asdict(about)}

    weights.save(model, folder, settings)
    _write_card(folder, model.config, _parameters(model))


def describe_generator(folder: str | Path, trained: Mapping) -> None:
    """Put `trained` into the config.json of a saved generator and into its card, where they say other; not its weights.

    Raises:
        ValueError: for a folder without generator, or a `trained` that is not one.
    """
    cards.read_trained(trained)
    folder = Path(folder)
    known = weights.read_settings(folder / weights.CONFIG)
    if known.get("trained") != trained:
        weights.write_settings(folder, known | {"trained": dict(trained)})
    config, _ = split(known, GeneratorConfig, About)
    _write_card(folder, config.resolved(), _parameters(_empty(config.resolved())))


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _write_card(folder: Path, config: GeneratorConfig, parameters: int) -> None:
    _, about = split(weights.read_settings(folder / weights.CONFIG), GeneratorConfig, About)
    told = {name: getattr(about, name) for name in ("mean", "std", "tokenizer", "tokenizer_hash", "origin", "trained")}
    cards.write(card(config, parameters, **told), folder)


def load_generator(
    source: str | Path,
    *,
    mean: float | None = None,
    std: float | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> Loaded:
    """Load a saved generator, this library's or one that the paper's authors published.

    Args:
        source: Folder with config.json and model.safetensors, or hub name, e.g. "SoftVQVAE/sit-xl_softvq-l-64". The
            authors' are told from ours by the settings in their config.json; whose latents they were trained on, and
            mean and standard deviation of these, by the repository's or folder's name.
        mean: Mean of the latents, for published weights whose name does not tell.
        std: Their standard deviation.
        revision: Branch, tag or commit of a hub name.
        cache_dir: Folder for downloads; None: the hub's own.
        token: Access token for a private repository.
        force_download: Download again what the cache holds.
        local_files_only: Take a hub name from the cache alone.

    Returns:
        The generator in evaluation mode on the CPU, in fp32, and what belongs to it.

    Raises:
        ValueError: for a missing folder or file, a pickle, a damaged file, an unsupported or unknown setting, tensors
            that contradict the configuration, or statistics that are not known.
        OSError: when the hub cannot be reached, or does not know the name.
    """
    hub = {"revision": revision, "cache_dir": cache_dir, "token": token}
    hub |= {"force_download": force_download, "local_files_only": local_files_only}
    config_file, weights_file = weights.locate(str(source), hub)
    settings = weights.read_settings(config_file)
    theirs = published.is_published(settings)
    try:
        if theirs:
            name = source if not Path(source).is_dir() else Path(source).expanduser().resolve()
            config, about = _published(settings, str(name))
        else:
            config, about = split(settings, GeneratorConfig, About)
            cards.read_trained(about.trained)
            if "generator" not in settings:
                raise ValueError("neither a generator nor the authors' settings (input_size, ...) are in it.")
            config = config.resolved()
        if mean is not None or std is not None:
            about = About(**{**asdict(about), "mean": mean, "std": std, "normalise": "scalar"})
        if about.mean is None or about.std is None:
            raise ValueError(
                "mean and standard deviation of the latents are not known: give mean and std, or the folder the name "
                "of the repository, such as sit-xl_softvq-l-64."
            )
        _check_statistics(about.mean, about.std, about.normalise, config.dim)
    except ValueError as error:
        raise ValueError(f"{config_file}: {error}") from None
    weights.verify(weights_file, about.weights_sha256)
    model = _empty(config)
    names = {"our_name": published.our_name, "their_name": published.their_name} if theirs else {}
    weights.fill(
        model, weights_file, config_file, differences=lambda shapes: _differences(config, shapes, config_file), **names
    )
    assert not any(x.is_meta for x in (*model.parameters(), *model.buffers())), "a tensor that is not saved"
    if theirs and config.generator == "dit":
        model.diffusion.full_range = True  # as its authors sample, from the last timestep on
    return Loaded(
        model=model.eval(),
        mean=torch.tensor(about.mean),
        std=torch.tensor(about.std),
        tokenizer=about.tokenizer,
        tokenizer_hash=about.tokenizer_hash,
        origin=about.origin,
        sampling=published.SAMPLING[config.generator] if theirs else SampleConfig(),
        trained=about.trained,
    )


def _published(settings: dict, name: str) -> tuple[GeneratorConfig, About]:
    config = published.read(settings)
    tokenizer, mean, std = published.statistics(config, name)
    return config, About(mean, std, tokenizer=tokenizer, origin=weights.origin(name))


def _plain(value: float | Sequence[float] | Tensor, normalise: str) -> float | list:
    """Return numbers that JSON can hold; of the same one for every channel, one."""
    value = value.tolist() if isinstance(value, Tensor) else value
    if not isinstance(value, Sequence):
        return value
    return value[0] if normalise == "scalar" and len(set(value)) == 1 else list(value)


def _check_statistics(mean: float | list, std: float | list, normalise: str, dim: int) -> None:
    one_of("normalise", normalise, NORMALISE)
    for name, value in (("mean", mean), ("std", std)):
        numbers = value if isinstance(value, list) else [value]
        wanted = [dim] if normalise == "channel" else []
        if ([len(value)] if isinstance(value, list) else []) != wanted:
            many = f"{len(value)} numbers" if isinstance(value, list) else "one number"
            fits = f"{dim} numbers, one a channel" if wanted else "one number"
            raise ValueError(f"{name} is {many}, but normalise={normalise!r} of {dim} channels needs {fits}.")
        for number in numbers:
            number_type = isinstance(number, int | float) and not isinstance(number, bool)
            if not number_type or not math.isfinite(number) or (name == "std" and number <= 0):
                raise ValueError(f"{name}={number!r} is not a finite number{' above 0' if name == 'std' else ''}.")


def _empty(config: GeneratorConfig) -> SiT | DiT | MAR:
    """Build a model without memory or random draws for its parameters; tables that no file holds are there."""
    from accelerate import init_empty_weights

    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        return build_generator(config)


def _differences(config: GeneratorConfig, shapes: dict[str, tuple], config_file: Path) -> list[str]:
    """Say in the configuration's terms what tensors of these shapes are made for, where it says otherwise."""
    said = {"tokens": config.tokens, "dim": config.dim, "classes": config.classes, "width": config.row["width"]}
    found = {
        setting: shapes[name][axis] - more
        for setting, (name, axis, more) in _TOLD[config.generator].items()
        if len(shapes.get(name, ())) > axis
    }
    return [
        f"its tensors have {setting}={found[setting]}, but {config_file.name} {setting}={said[setting]}"
        for setting in found
        if found[setting] != said[setting]
    ]
