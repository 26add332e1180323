"""Tokenizers on the disk and the hub: config.json and model.safetensors, checked before a model is made of them."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from softvq_lib import cards, weights
from softvq_lib.config import split
from softvq_lib.tokenizers import published
from softvq_lib.tokenizers.card import card
from softvq_lib.tokenizers.presets import PRESETS, TokenizerConfig


@dataclass(frozen=True)
class About:
    """What config.json says beside the configuration.

    Attributes:
        latent_mean: Mean of the latents over the data, None where unknown.
        latent_std: Their standard deviation.
        origin: Name of the published tokenizer that the weights come from.
        weights_sha256: Checksum of model.safetensors.
        trained: What it was trained on and how, and what was measured, see `softvq_lib.cards.Trained`.
    """

    latent_mean: float | None = None
    latent_std: float | None = None
    origin: str | None = None
    weights_sha256: str | None = None
    trained: dict | None = None


def load(cls: type[nn.Module], source: str | Path, **hub: object) -> nn.Module:
    """Make a `cls` of a folder or a hub name, see `Tokenizer.from_pretrained`.

    Raises:
        ValueError: as told there.
    """
    config_file, weights_file = weights.locate(str(source), hub)
    settings = weights.read_settings(config_file)
    theirs = published.is_published(settings)
    try:
        if theirs:
            config = published.read(settings)
            name = source if not Path(source).is_dir() else Path(source).expanduser().resolve()
            about = About(*published.statistics(settings, config, str(name)), origin=weights.origin(name))
        else:
            config, about = split(settings, TokenizerConfig, About)
            cards.read_trained(about.trained)
            if "preset" not in settings:
                raise ValueError("neither a preset nor the authors' settings (encoder_model, ...) are in it.")
        config = replace(config, pretrained=False).resolved()  # no download: the weights are here
        model = _on_meta(cls, config)
    except ValueError as error:
        raise ValueError(f"{config_file}: {error}") from None
    weights.verify(weights_file, about.weights_sha256)
    _fill(model, weights_file, config_file, theirs)
    model.latent_mean, model.latent_std, model.origin = about.latent_mean, about.latent_std, about.origin
    model.trained = about.trained
    return model.eval()


def save(model: nn.Module, folder: Path) -> None:
    """Write weights, then config.json with their checksum, in which nothing is None, and the model card."""
    weights.save(model, folder, lambda sha256: _settings(model, sha256))
    cards.write(card(model), folder)


def describe(model: nn.Module, folder: Path) -> None:
    """Write config.json and the card of a saved tokenizer anew, where they say other than `model`; not its weights."""
    known = weights.read_settings(folder / weights.CONFIG)
    told = _settings(model, known.get("weights_sha256"))
    if known != {name: value for name, value in told.items() if value is not None}:
        weights.write_settings(folder, told)
    cards.write(card(model), folder)


def _settings(model: nn.Module, sha256: str | None) -> dict:
    about = About(model.latent_mean, model.latent_std, model.origin, sha256, model.trained)
    return {**asdict(replace(model.config, pretrained=False)), **asdict(about)}


def _on_meta(cls: type[nn.Module], config: TokenizerConfig) -> nn.Module:
    """Build a model without memory or random draws, for its tensors to be put in place."""
    with torch.device("meta"):
        return cls(config)


def _fill(model: nn.Module, path: Path, config_file: Path, theirs: bool) -> None:
    """Give the model the file's tensors, and what follows from its configuration and is in no file."""
    names = {"our_name": published.our_name, "their_name": published.their_name} if theirs else {}

    def check(shapes: dict[str, tuple]) -> tuple:
        _check_sizes(model, shapes, path, config_file)
        return ()

    weights.fill(model, path, config_file, differences=check, **names)
    _fill_unsaved(model)
    assert not any(x.is_meta for x in (*model.parameters(), *model.buffers())), "a tensor that is not saved"


def _fill_unsaved(model: nn.Module) -> None:
    """Give the model what follows from its configuration and is in no file: rotary positions of the encoder."""
    names = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if not names:
        return
    with torch.random.fork_rng(devices=[]):  # loading leaves the random state as it was
        twin = type(model)(model.config)
    for name in names:
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, twin.get_buffer(name))


def _check_sizes(model: nn.Module, shapes: dict[str, tuple], path: Path, config_file: Path) -> None:
    """Raise ValueError when the two networks are those of another preset than the configuration's."""
    found, preset = _sizes(shapes), model.config.preset
    if found == _sizes(_shapes(model)):
        return
    for other in PRESETS:
        if found == _sizes(_shapes(_on_meta(type(model), replace(model.config, preset=other)))):
            names = f"encoder_model={PRESETS[other]['encoder']!r}, decoder_model={PRESETS[other]['decoder']!r}"
            raise ValueError(
                f"{path} has the tensors of preset={other!r} ({_spell(found)}), but {config_file.name} describes "
                f"preset={preset!r} ({_spell(_sizes(_shapes(model)))}). Get the two files from one place, or correct "
                f"{config_file.name} (in the authors' names: {names})."
            )


def _shapes(model: nn.Module) -> dict[str, tuple]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _sizes(shapes: dict[str, tuple]) -> dict[str, tuple[int, int]]:
    """Return width and number of blocks of encoder and decoder."""
    sizes = {}
    for part in ("encoder", "decoder"):
        width = shapes.get(f"{part}.latent_pos_embed", (0,))[-1]
        prefix = f"{part}.vit.blocks."
        sizes[part] = width, len({name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)})
    return sizes


def _spell(sizes: dict[str, tuple[int, int]]) -> str:
    return "; ".join(f"{part} {width} wide with {blocks} blocks" for part, (width, blocks) in sizes.items())
