"""One function for all formats: find the tokenizer and its latents' statistics, write a new folder, check it."""

import copy
import importlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from softvq_lib.config import at_least, one_of
from softvq_lib.data.latents import HEADER, NORMALISE, read_header, tokenizer_hash
from softvq_lib.tokenizers import Tokenizer
from softvq_lib.training.generator import find_tokenizer
from softvq_lib.weights import CONFIG, read_settings

# What each format needs, and the extra of the package that brings it.
FORMATS = {"onnx": (("onnx", "onnxruntime", "onnxscript"), "export"), "diffusers": (("diffusers",), "export")}
TOLERANCE = 1e-4
# What an export consists of: names, and how those of weights begin, which large models have several of.
_FILES = {CONFIG, "README.md", "autoencoder_softvq.py"}
_STEMS = ("encoder.onnx", "decoder.onnx", "diffusion_pytorch_model")


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Attributes:
        folder: Where it lies.
        to: Its format.
        differences: The largest difference between its output and the tokenizer's, by the name of the output, relative
            to the largest number in it, or absolute where that is below 1.
        tolerance: That they were held against.
        bytes: Of all files together.
    """

    folder: Path
    to: str
    differences: dict[str, float]
    tolerance: float
    bytes: int

    def __str__(self) -> str:
        lines = [f"{self.folder}: {self.to}, {self.bytes / 1e6:.1f} MB, its output is that of the tokenizer"]
        lines += [f"{name:24}differs by at most {worst:.1e}" for name, worst in self.differences.items()]
        return "\n".join([*lines, f"{'':24}of {self.tolerance:g} that are allowed"])


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of the latents over the data.

    Attributes:
        mean: A number, or one a channel.
        std: Alike, above 0.
        known: Whether they were measured; else they are 0 and 1.
    """

    mean: float | list[float] = 0.0
    std: float | list[float] = 1.0
    known: bool = False


def export(
    tokenizer: str | Path | Tokenizer,
    out: str | Path,
    *,
    to: str = "onnx",
    statistics: str | Path | None = None,
    normalise: str = "scalar",
    grid: Sequence[int] | None = None,
    opset: int = 18,
    tolerance: float = TOLERANCE,
    overwrite: bool = False,
    runs: str | None = None,
) -> Exported:
    """Write a tokenizer in another format into a new folder, and check that its output is the same.

    `onnx`: `encoder.onnx` and `decoder.onnx`, see `softvq_lib.conversion.onnx`. `diffusers`: a model as pipelines of
    diffusers use one, see `softvq_lib.conversion.autoencoder`. Either folder has a model card.

    Args:
        tokenizer: A tokenizer, its folder, the name of a run in the folder of runs, or a hub name.
        out: The folder, which must not exist or be empty, but for `overwrite`. It is there only when the check has been
            passed.
        to: A key of `FORMATS`.
        statistics: Where mean and standard deviation of the latents are from: a generator that was trained on them, or
            a cache of latents. None: the tokenizer's own, which published ones have; else 0 and 1.
        normalise: Of a cache of latents: `scalar`, one number for all channels, or `channel`, one for each.
        grid: diffusers: rows and columns that the tokens are laid out in, (h, w) with h w = l. None: the most nearly
            square.
        opset: ONNX: version of the operators, 18 or above.
        tolerance: Largest difference that passes, relative as in `Exported.differences`.
        overwrite: Replace what an earlier call wrote into the folder, once the new files have passed the check.
        runs: Folder of all runs, as in `TrainConfig`.

    Raises:
        ValueError: for a format that is not known or whose packages are missing, a tokenizer that is not found,
            statistics of other latents, a grid that does not fit, a folder that is not new, or output that is unequal;
            then nothing is left in `out`.
        OSError: when the disk is full, or the hub cannot be reached.
    """
    one_of("to", to, FORMATS)
    one_of("normalise", normalise, NORMALISE)
    at_least("opset", opset, 18)
    at_least("tolerance", tolerance, 0, above=True)
    if grid is not None and to != "diffusers":
        raise ValueError(f"grid={tuple(grid)} is for to='diffusers' alone: leave it out with to={to!r}.")
    require(to)
    out = Path(out).expanduser()
    check_new(out, overwrite)
    model = copy.deepcopy(tokenizer) if isinstance(tokenizer, Tokenizer) else find_tokenizer(str(tokenizer), runs)
    model = model.cpu().float().eval()
    known = find_statistics(statistics, model, normalise, runs)
    with new_folder(out, overwrite) as part:
        if to == "onnx":
            from softvq_lib.conversion import onnx

            onnx.write(model, part, known, opset=opset)
            differences = onnx.differences(model, part)
        else:
            from softvq_lib.conversion import autoencoder

            autoencoder.write(model, part, known, grid=grid)
            differences = autoencoder.differences(model, part, known)
        refuse_unequal(differences, tolerance, to)
        size = sum(path.stat().st_size for path in part.rglob("*") if path.is_file())
    return Exported(out, to, differences, tolerance, size)


def require(to: str) -> None:
    """Raise ValueError, with the remedy, where a package that a format needs is missing."""
    packages, extra = FORMATS[to]
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ValueError(
                f"to={to!r} needs {', '.join(packages)}, and {name} cannot be imported ({error}): install the extra "
                f"`{extra}`, pip install 'softvq-book[{extra}]', or pip install -e '.[{extra}]' in a checkout."
            ) from None


def find_statistics(source: str | Path | None, tokenizer: Tokenizer, normalise: str, runs: str | None) -> Statistics:
    """Return mean and standard deviation of a tokenizer's latents; arguments as in `export`.

    Raises:
        ValueError: for a source that is not found, is not finished, or belongs to another tokenizer.
    """
    from softvq_lib.evaluation.export import check_tokenizer
    from softvq_lib.generators.loading import load_generator
    from softvq_lib.sampling import find_generator

    if source is None:
        if tokenizer.latent_std is None:
            return Statistics()
        return Statistics(tokenizer.latent_mean or 0.0, tokenizer.latent_std, known=True)
    folder = Path(source).expanduser()
    if (folder / HEADER).is_file():
        header = read_header(folder)
        if header["tokenizer"] != tokenizer_hash(tokenizer):
            raise ValueError(f"{folder} holds latents of another tokenizer: give a cache of this one's.")
        if "mean" not in header:
            raise ValueError(f"{folder} is not finished: encode the data set to its end first.")
        return Statistics(header["mean"][normalise], header["std"][normalise], known=True)
    loaded = load_generator(find_generator(str(source), runs))
    check_tokenizer(loaded, tokenizer)
    return Statistics(loaded.mean.tolist(), loaded.std.tolist(), known=True)


def relative(found: object, wanted: object) -> float:
    """Return the largest difference of two arrays of one shape, relative to the largest number of `wanted` above 1.

    Raises:
        ValueError: for two shapes.
    """
    import numpy as np

    found, wanted = np.asarray(found, dtype=np.float64), np.asarray(wanted, dtype=np.float64)
    if found.shape != wanted.shape:
        raise ValueError(f"its output has the shape {found.shape}, the tokenizer's {wanted.shape}.")
    worst = np.abs(found - wanted).max() / max(1.0, np.abs(wanted).max())
    return float(worst)


def refuse_unequal(differences: dict[str, float], tolerance: float, to: str) -> None:
    """Raise ValueError for a difference that is not within the tolerance, or no number."""
    bad = {name: worst for name, worst in differences.items() if not worst <= tolerance}
    if bad:
        said = "; ".join(f"{name} by {worst:.3g}" for name, worst in bad.items())
        raise ValueError(
            f"the output of the {to} export is not that of the tokenizer: it differs in {said}, where tolerance="
            f"{tolerance:g} is allowed. Nothing is kept. Other versions of the packages may do it right; a larger "
            "tolerance lets it pass."
        )


def check_new(folder: Path, overwrite: bool = False) -> None:
    """Check that a folder may be written.

    Args:
        folder: The folder.
        overwrite: It may also hold what `export` wrote, and nothing else.

    Raises:
        ValueError: for anything else that exists.
    """
    if not (folder.exists() or folder.is_symlink()):
        return
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {None}
    if not names or (overwrite and _is_export(folder, names)):
        return
    remedy = "choose another folder, or remove it first"
    if overwrite:
        raise ValueError(f"{folder} holds more than an earlier export, so it is not replaced: {remedy}.")
    raise ValueError(f"{folder} exists, and nothing is written over unasked: {remedy}.")


def _is_export(folder: Path, names: set[str]) -> bool:
    """Tell whether a folder holds one whole export and no other file."""
    if CONFIG not in names or any(name not in _FILES and not name.startswith(_STEMS) for name in names):
        return False
    settings = read_settings(folder / CONFIG)
    return settings.get("format") == "onnx" or settings.get("_class_name") == "AutoencoderSoftVQ"


@contextmanager
def new_folder(folder: Path, overwrite: bool = False) -> Iterator[Path]:
    """Give a hidden folder beside `folder` to write into, which takes its name at the end and goes with an error.

    Args:
        folder: The folder; arguments as in `check_new`.
        overwrite: See there.

    Raises:
        ValueError: when something came into the folder's place meanwhile.
    """
    part, old = (folder.with_name(f".{folder.name}.{word}") for word in ("part", "old"))
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        check_new(folder, overwrite)
        if folder.is_dir():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
