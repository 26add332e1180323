"""What a run, a model or an output is, in a few lines: the command `softvq info`."""

import json
from pathlib import Path

from softvq_lib import pictures
from softvq_lib.config import nearest, some
from softvq_lib.data.latents import read_header, tokenizer_hash
from softvq_lib.training.run import Run, runs_folder
from softvq_lib.weights import CONFIG, WEIGHTS, read_settings


def list_runs(runs: str | None = None) -> str:
    """Return a line for each run in the folder of runs: name, status, steps, seconds of training and data.

    Args:
        runs: Folder of all runs, as in `TrainConfig`.
    """
    home = runs_folder(runs)
    found = [_run(path.parent) for path in sorted(home.glob("*/config.json"))]
    if not found:
        return f"no runs in {home}"
    lines = [("run", "status", "steps", "seconds", "data")]
    for run in found:
        manifest, identity = run.manifest, run.identity
        data = manifest.get("data", {}).get("name", "?")
        lines.append((run.name, _status(run), str(identity.get("steps", "?")), f"{run.seconds:.0f}", data))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{word:{width}}" for word, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def describe(name: str, runs: str | None = None) -> str:
    """Return what a run, a folder of a model, of latents or of pictures holds, an entry a line.

    Args:
        name: A folder, or the name of a run.
        runs: Folder of all runs.

    Raises:
        ValueError: when it is none of these (the nearest run is named), or a model or header is damaged.
    """
    home = runs_folder(runs)
    for folder in (Path(name).expanduser(), home / name):
        if (header := read_header(folder)) is not None:
            return _latents(folder, header)
        if (header := pictures.read_header(folder)) is not None:
            there = sum((folder / file).is_file() for file in header["files"])
            return _lines(
                folder, what=header.get("what"), status=header["status"], pictures=f"{there} of {len(header['files'])}"
            )
        if (folder / "manifest.json").exists():
            return _of_run(_run(folder))
        if models := _models(folder):
            return "\n".join(map(_model, models))
    there = sorted(path.name for path in home.glob("*") if (path / "config.json").exists() or _models(path))
    listed = f"Runs: {some(there)}." if there else "There are no runs yet."
    raise ValueError(
        f"{name!r} is no run of {home} and no folder of a model, of latents or of pictures"
        f"{nearest(name, there) or '.'} {listed}"
    )


def _run(folder: Path) -> Run:
    try:
        return Run(folder, json.loads((folder / "config.json").read_text())["identity"])
    except (OSError, ValueError, KeyError, TypeError):
        return Run(folder, {})


def _status(run: Run) -> str:
    done = [row["step"] for row in run.metrics if "loss" in row]
    return "finished" if run.manifest.get("status") == "finished" else f"unfinished, step {done[-1] if done else 0}"


def _lines(title: object, **entries: object) -> str:
    shown = {name.replace("_", " "): value for name, value in entries.items() if value is not None}
    return "\n".join([str(title), *(f"  {name:12} {value}" for name, value in shown.items())])


def _of_run(run: Run) -> str:
    manifest = run.manifest
    parameters = manifest.get("parameters")
    text = _lines(
        run.path,
        status=_status(run),
        data=manifest.get("data", {}).get("name"),
        steps=run.identity.get("steps"),
        seconds=f"{run.seconds:.0f}",
        device=manifest.get("device_name"),
        parameters=parameters and f"{parameters / 1e6:.2f} M",
    )
    return "\n".join([text, *map(_model, _models(run.path))])


def _models(folder: Path) -> list[Path]:
    """The folder itself where it holds a model, and those of a run's models."""
    return [place for place in (folder, folder / "tokenizer", folder / "generator") if (place / WEIGHTS).exists()]


def _model(folder: Path) -> str:
    from softvq_lib.generators.loading import load_generator
    from softvq_lib.tokenizers import Tokenizer

    if "generator" in read_settings(folder / CONFIG):
        loaded = load_generator(folder)
        config = loaded.model.config
        return _lines(
            f"generator {config.generator} {config.size}",
            latents=f"{config.tokens} tokens x {config.dim} channels",
            classes=config.classes,
            tokenizer=loaded.tokenizer,
            parameters=_millions(loaded.model),
        )
    model = Tokenizer.from_pretrained(folder)
    config = model.config
    codes = (
        None if config.quantizer in ("ae", "kl") else f"{config.codebooks} codebooks of {config.codebook_size} codes"
    )
    return _lines(
        f"tokenizer {config.preset}, {config.quantizer}",
        images=f"{config.image_size} x {config.image_size} pixels",
        latents=f"{config.tokens} tokens x {config.dim} channels",
        codes=codes,
        parameters=_millions(model),
        sha256=tokenizer_hash(model),
    )


def _millions(model) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M"


def _latents(folder: Path, header: dict) -> str:
    status = header.get("status", "finished" if "mean" in header else "partial")
    encoded = f"{sum(entry['count'] for entry in header['shards']):,} of {header['images']:,}"
    return _lines(
        folder,
        status=status,
        images=f"{encoded}, {header.get('name')}, {header['split']}",
        latents=f"{header['tokens']} tokens x {header['dim']} channels, {header['dtype']}",
        left_out=len(header.get("left_out", [])) or None,
        tokenizer=f"sha256 {header['tokenizer']}",
    )
