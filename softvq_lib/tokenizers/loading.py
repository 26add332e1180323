"""Tokenizers on the disk and the hub: config.json and model.safetensors, checked before a model is made of them."""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from softvq_lib.config import split
from softvq_lib.tokenizers import published
from softvq_lib.tokenizers.presets import PRESETS, TokenizerConfig

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_PICKLES = {".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle"}
_CONVERT = (
    "A pickle can run any code when it is read, so none is opened here. Convert it where you trust its source: "
    "safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors'), of the dictionary of "
    "tensors alone, and put it in a folder with its config.json."
)


@dataclass(frozen=True)
class About:
    """What config.json says beside the configuration.

    Attributes:
        latent_mean: Mean of the latents over the data, None where unknown.
        latent_std: Their standard deviation.
        origin: Name of the published tokenizer that the weights come from.
        weights_sha256: Checksum of model.safetensors.
    """

    latent_mean: float | None = None
    latent_std: float | None = None
    origin: str | None = None
    weights_sha256: str | None = None


def load(cls: type[nn.Module], source: str | Path, **hub: object) -> nn.Module:
    """Make a `cls` of a folder or a hub name, see `Tokenizer.from_pretrained`."""
    config_file, weights_file = _locate(str(source), hub)
    settings = _read_settings(config_file)
    theirs = published.is_published(settings)
    try:
        if theirs:
            config = published.read(settings)
            name = source if not Path(source).is_dir() else Path(source).expanduser().resolve()
            about = About(*published.statistics(settings, config, str(name)), origin=_origin(name))
        else:
            config, about = split(settings, TokenizerConfig, About)
            if "preset" not in settings:
                raise ValueError("neither a preset nor the authors' settings (encoder_model, ...) are in it.")
        config = replace(config, pretrained=False).resolved()  # no download: the weights are here
        model = _on_meta(cls, config)
    except ValueError as error:
        raise ValueError(f"{config_file}: {error}") from None
    _verify(weights_file, about.weights_sha256)
    _fill(model, weights_file, config_file, theirs)
    model.latent_mean, model.latent_std, model.origin = about.latent_mean, about.latent_std, about.origin
    return model.eval()


def save(model: nn.Module, folder: Path) -> None:
    """Write weights, then config.json with their checksum; nothing in it is None."""
    part = folder / f".{WEIGHTS}.part"
    try:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(tensors, part, metadata={"format": "pt"})
        about = About(model.latent_mean, model.latent_std, model.origin, _sha256(part))
        os.replace(part, folder / WEIGHTS)
    finally:
        part.unlink(missing_ok=True)
    settings = {**asdict(replace(model.config, pretrained=False)), **asdict(about)}
    settings = {key: value for key, value in settings.items() if value is not None}
    (folder / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _origin(name: str | Path) -> str:
    return Path(name).name if Path(name).is_absolute() else str(name)


def _locate(source: str, hub: dict) -> tuple[Path, Path]:
    """Return the paths of config.json and model.safetensors, downloaded or from the cache for a hub name."""
    path = Path(source).expanduser()
    if path.suffix in _PICKLES and not path.is_dir():
        raise ValueError(f"{source} is a pickle. {_CONVERT}")
    if path.is_file():
        raise ValueError(f"{source} is a file: give the folder that holds {CONFIG} and {WEIGHTS}.")
    if path.is_dir():
        pickles = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLES)
        if not (path / WEIGHTS).exists() and pickles:
            raise ValueError(f"{source} holds no {WEIGHTS}, but {', '.join(pickles)}. {_CONVERT}")
        for name in (CONFIG, WEIGHTS):
            if not (path / name).is_file():
                raise ValueError(f"{source} holds no {name}: give a folder that save_pretrained wrote, or a hub name.")
        return path / CONFIG, path / WEIGHTS
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
        raise ValueError(
            f"there is no folder {source}: give a folder that holds {CONFIG} and {WEIGHTS}, or a hub name such as "
            "'SoftVQVAE/softvq-l-64'."
        )
    return _download(source, CONFIG, hub), _download(source, WEIGHTS, hub)


def _download(repository: str, name: str, hub: dict) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, name, **hub))
    except (OSError, HfHubHTTPError, EntryNotFoundError, HFValidationError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise ValueError(f"{repository} on the hub holds no {name}. (A pickle would not be read.)") from error
        reason = str(error).strip(". \n").splitlines() or [type(error).__name__]
        raise OSError(
            f"{repository} cannot be had: there is no folder of that name here, and asking the Hugging Face hub for "
            f"its {name} failed ({reason[0]}). Check the spelling and the network (HF_HUB_OFFLINE must not be set; a "
            "private repository needs a token), or download the repository elsewhere and give its folder."
        ) from error


def _read_settings(path: Path) -> dict:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): get or write it again.") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds a {type(settings).__name__}, not settings by name.")
    return settings


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify(path: Path, recorded: str | None) -> None:
    """Compare the file's checksum with those of config.json and of a file beside it, where there are any."""
    beside = path.with_name(f"{path.name}.sha256")
    known = {CONFIG: recorded} if recorded else {}
    if beside.is_file():
        known[beside.name] = (beside.read_text().split() or [""])[0]
    found = _sha256(path) if known else None
    for where, checksum in known.items():
        if checksum.lower() != found:
            raise ValueError(
                f"{path} is damaged or was replaced: its sha256 is {found}, but {where} records {checksum}. Get the "
                "file again; if you changed it yourself, correct that record."
            )


def _on_meta(cls: type[nn.Module], config: TokenizerConfig) -> nn.Module:
    """Build a model without memory or random draws, for its tensors to be put in place."""
    with torch.device("meta"):
        return cls(config)


def _fill(model: nn.Module, path: Path, config_file: Path, theirs: bool) -> None:
    """Give the model the file's tensors, after checking their names, shapes and values.

    Raises:
        ValueError: for a damaged file, or tensors that contradict the configuration.
    """
    wanted = model.state_dict()
    original = published.their_name if theirs else str
    try:
        with safe_open(path, framework="pt") as file:
            sources = {(published.our_name(name) if theirs else name): name for name in file.keys()}  # noqa: SIM118
            sources.pop(None, None)
            shapes = {name: tuple(file.get_slice(source).get_shape()) for name, source in sources.items()}
            _check_sizes(model, shapes, path, config_file)
            problems = [
                *_listed("missing", (original(name) for name in wanted if name not in shapes)),
                *_listed("unknown", (sources[name] for name in shapes if name not in wanted)),
                *_listed(
                    "of another shape",
                    (
                        f"{sources[name]} {shapes[name]} where {tuple(tensor.shape)} is wanted"
                        for name, tensor in wanted.items()
                        if name in shapes and shapes[name] != tuple(tensor.shape)
                    ),
                ),
            ]
            if problems:
                raise ValueError(f"{path} contradicts {config_file.name}: {'; '.join(problems)}.")
            # Copies, since the file is mapped into memory and may be overwritten while the model lives.
            tensors = {name: file.get_tensor(source).clone() for name, source in sources.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}){_diagnosis(path)}: get it again.") from None
    broken = _listed("not finite", (sources[name] for name, tensor in tensors.items() if not tensor.isfinite().all()))
    broken += _listed(
        "of another kind of number",
        (sources[name] for name, x in tensors.items() if x.is_floating_point() != wanted[name].is_floating_point()),
    )
    if broken:
        raise ValueError(f"{path} is damaged: {'; '.join(broken)}. Get it again, or train it anew.")
    tensors = {name: tensor.to(wanted[name].dtype) for name, tensor in tensors.items()}
    model.load_state_dict(tensors, assign=True)
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


def _listed(what: str, names: Iterable[str], most: int = 6) -> list[str]:
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return [f"{what}: {', '.join(names[:most])}{more}"] if names else []


def _diagnosis(path: Path) -> str:
    size = path.stat().st_size
    with open(path, "rb") as file:
        if file.read(32).startswith(b"version https://git-lfs"):
            return ", because it is Git LFS's pointer to the file and not the file"
    return f"; it is truncated, damaged, or no safetensors file ({size} bytes)"


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
