"""Model files on the disk and the hub: config.json and model.safetensors, checked before a model is made of them."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_PICKLES = {".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle"}
_CONVERT = (
    "A pickle can run any code when it is read, so none is opened here. Convert it where you trust its source: "
    "safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors'), of the dictionary of "
    "tensors alone, and put it in a folder with its config.json."
)


def save(model: nn.Module, folder: Path, settings: Callable[[str], dict]) -> None:
    """Write weights, then config.json with what `settings` makes of their checksum; nothing in it is None."""
    part = folder / f".{WEIGHTS}.part"
    try:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(tensors, part, metadata={"format": "pt"})
        known = settings(sha256(part))
        os.replace(part, folder / WEIGHTS)
    finally:
        part.unlink(missing_ok=True)
    write_settings(folder, known)


def write_settings(folder: Path, settings: Mapping[str, object]) -> None:
    """Write config.json whole, without what is None."""
    known = {key: value for key, value in settings.items() if value is not None}
    part = folder / f".{CONFIG}.part"
    try:
        part.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")
        os.replace(part, folder / CONFIG)
    finally:
        part.unlink(missing_ok=True)


def origin(name: str | Path) -> str:
    """Return what is said of a source of weights: a hub name or relative path, of an absolute path the last part."""
    return Path(name).name if Path(name).is_absolute() else str(name)


def locate(source: str, hub: dict) -> tuple[Path, Path]:
    """Return the paths of config.json and model.safetensors, downloaded or from the cache for a hub name.

    Raises:
        ValueError: for a pickle, a folder or file without these two, or what is neither a folder nor a hub name.
    """
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


def read_settings(path: Path) -> dict:
    """Read a config.json.

    Raises:
        ValueError: for a file that is not valid JSON, or holds no settings by name.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): get or write it again.") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds a {type(settings).__name__}, not settings by name.")
    return settings


def sha256(path: Path) -> str:
    """Return the sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(path: Path, recorded: str | None) -> None:
    """Compare the file's checksum with those of config.json and of a file beside it, where there are any.

    Raises:
        ValueError: when one of them is another.
    """
    beside = path.with_name(f"{path.name}.sha256")
    known = {CONFIG: recorded} if recorded else {}
    if beside.is_file():
        known[beside.name] = (beside.read_text().split() or [""])[0]
    found = sha256(path) if known else None
    for where, checksum in known.items():
        if checksum.lower() != found:
            raise ValueError(
                f"{path} is damaged or was replaced: its sha256 is {found}, but {where} records {checksum}. Get the "
                "file again; if you changed it yourself, correct that record."
            )


def fill(
    model: nn.Module,
    path: Path,
    config_file: Path,
    *,
    our_name: Callable[[str], str | None] = str,
    their_name: Callable[[str], str] = str,
    differences: Callable[[dict[str, tuple]], Iterable[str]] = lambda shapes: (),
) -> None:
    """Give the model the file's tensors, after checking their names, shapes, kinds and values.

    Args:
        model: On the meta device.
        path: The weights.
        config_file: That the model was made of, for messages.
        our_name: The model's name of a tensor of the file, None for one that is left out.
        their_name: The file's name of one of the model's.
        differences: What the shapes of the file's tensors, by our names, say against the configuration.

    Raises:
        ValueError: for a damaged file, or tensors that contradict the configuration.
    """
    wanted = model.state_dict()
    try:
        with safe_open(path, framework="pt") as file:
            sources = {our_name(name): name for name in file.keys()}  # noqa: SIM118
            sources.pop(None, None)
            shapes = {name: tuple(file.get_slice(source).get_shape()) for name, source in sources.items()}
            problems = [
                *differences(shapes),
                *_listed("missing", (their_name(name) for name in wanted if name not in shapes)),
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
    model.load_state_dict({name: x.to(wanted[name].dtype) for name, x in tensors.items()}, assign=True)


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
