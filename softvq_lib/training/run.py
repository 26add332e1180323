"""A run: a directory named by its configuration, holding manifest, metrics, checkpoints and the tokenizer."""

import json
import logging
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cached_property
from importlib import metadata
from pathlib import Path

from softvq_lib import ROOT, cards, config
from softvq_lib.cards import Number, Trained
from softvq_lib.training.config import TrainConfig
from softvq_lib.training.files import locked, read_lines, write_json

log = logging.getLogger(__name__)

_PACKAGES = ("torch", "torchvision", "timm", "accelerate", "numpy", "datasets")


def runs_folder(runs: str | None) -> Path:
    """Return the folder of all runs: the one asked for, $SOFTVQ_RUNS, the checkout's, or `runs` right here."""
    chosen = runs or os.environ.get("SOFTVQ_RUNS")
    if chosen:
        return Path(chosen).expanduser().resolve()
    checkout = (ROOT / "pyproject.toml").exists()
    return (ROOT if checkout else Path.cwd()) / "runs"


def code_hash() -> str:
    """Return a sha256 of the library's source that a run's outcome depends on."""
    package = Path(__file__).parents[1]
    parts = ("tokenizers", "losses", "generators", "training", "data")
    files = sorted(path for part in parts for path in (package / part).rglob("*.py"))
    files += [package / f"{part}.py" for part in ("distributed", "draws", "features", "weights")]
    return config.fingerprint({str(path.relative_to(package)): path.read_text() for path in files})


def _git(*arguments: str) -> str | None:
    if not (ROOT / "pyproject.toml").exists():
        return None  # a wheel, perhaps inside a repository of someone else
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def provenance() -> dict[str, object]:
    """Return commit, whether files were changed since, code hash, python, packages and machine."""
    versions = {}
    for name in _PACKAGES:
        versions[name] = metadata.version(name)
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if changed is None else bool(changed),
        "code": code_hash(),
        "python": platform.python_version(),
        "packages": versions,
        "cpus": os.cpu_count(),
    }


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def slug(text: str) -> str:
    """Return text fit for a folder name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:24] or "data"


class Run:
    """A training run on the disk.

    Attributes:
        path: Its directory.
        identity: The resolved configuration that names it.
        trained: Optimiser steps made by this call; 0 when the run was found finished.
        data: The data set, as `train` opened it; None for a run that is only read.
    """

    def __init__(self, path: Path, identity: dict):
        self.path, self.identity, self.trained, self.data = Path(path), identity, 0, None
        self.requested: dict = {}

    @property
    def name(self) -> str:
        """Name of its directory."""
        return self.path.name

    @property
    def config_hash(self) -> str:
        """Fingerprint of the resolved configuration, a sha256 in hex."""
        return config.fingerprint(self.identity)

    @property
    def manifest(self) -> dict:
        """What was noted of it so far (state, device, versions, results); {} before it starts."""
        path = self.path / "manifest.json"
        return json.loads(path.read_text()) if path.exists() else {}

    @property
    def finished(self) -> bool:
        """Whether it has been trained to its end with just this configuration."""
        return self.manifest.get("status") == "finished" and not self.difference()

    @property
    def metrics(self) -> list[dict]:
        """Rows of losses and held-out measurements, by step."""
        return read_lines(self.path / "metrics.jsonl")

    def curves(self) -> dict[str, list[list[float]]]:
        """Of each term of the loss and each gradient norm, [step, mean since the row before]."""
        curves: dict[str, list[list[float]]] = {}
        for row in self.metrics:
            for name, value in row.items():
                if name not in ("step", "lr") and not name.startswith("val_"):
                    curves.setdefault(name, []).append([row["step"], value])
        return curves

    def described(self, model: object, measured: Sequence[Number] = (), before: dict | None = None) -> dict:
        """Return what the config.json of the model says of this run, see `softvq_lib.cards.Trained`.

        Args:
            model: Its configuration, a dataclass, whose settings are left out.
            measured: The run's own results.
            before: What it said so far; metrics that were not measured this time keep their numbers.
        """
        data = self.data
        assert data is not None, "a run that is only read knows no data"
        settings = {k: v for k, v in self.identity.items() if k != "data" and k not in config.fields_of(type(model))}
        if self.identity.get("pretrained"):  # the one setting of the model that only its training has
            settings["pretrained"] = True
        told = Trained(
            data=data.name,
            data_fingerprint=data.fingerprint,
            images=len(data.train),
            held_out=len(data.validation),
            classes=len(data.classes or []),
            settings=settings,
            config_hash=self.config_hash,
            measured=cards.joined(measured, before, self.config_hash),
        )
        return asdict(told)

    @property
    def seconds(self) -> float:
        """Seconds spent in optimiser steps, by the timings of the run; interruptions and measuring left out."""
        return sum(row.get("seconds", 0) for row in read_lines(self.path / "timings.jsonl"))

    @property
    def snapshots(self) -> dict[int, Path]:
        """Pictures of reconstructed held-out images, by step."""
        return {int(path.stem[5:]): path for path in sorted((self.path / "images").glob("step-*.png"))}

    @cached_property
    def tokenizer(self):
        """The trained tokenizer (moving average of the weights), in evaluation mode, on the CPU."""
        from softvq_lib.tokenizers import Tokenizer

        return Tokenizer.from_pretrained(self.path / "tokenizer").eval()

    def update(self, **entries: object) -> None:
        """Write entries into the manifest."""
        write_json(self.path / "manifest.json", {**self.manifest, **entries})

    def claim(self, requested: dict, change: bool = False) -> None:
        """Make the directory this run's, or check that it already is.

        Args:
            requested: Parameters as the user gave them.
            change: A run of another configuration may be taken over, by `adopt`; nothing is changed yet.

        Raises:
            ValueError: when it holds another configuration and `change` is not given; nothing is changed then.
        """
        self.requested = requested
        if not (self.path / "config.json").exists():
            # Hidden files may be left of a start that was killed.
            if any(not path.name.startswith(".") for path in self.path.iterdir()):
                raise ValueError(f"{self.path} is not empty and holds no run: choose another run name or runs folder.")
            self._write_config()
        elif not change and (difference := self.difference()):
            raise ValueError(
                f"{self.path} holds a run of another configuration ({difference}): choose another run name, leave run "
                "out to have one made, delete that folder, or say change=True to go on with the new settings."
            )

    def adopt(self) -> None:
        """Put this configuration in the place of another that the directory holds; log and note the difference."""
        difference = self.difference()
        if difference:
            log.warning("run %s goes on with changed settings: %s.", self.name, difference)
            changed = [*self.manifest.get("changed", []), {"time": now(), "difference": difference}]
            self.update(changed=changed, status="changed")
            self._write_config()

    def _write_config(self) -> None:
        ours = {"hash": self.config_hash, "identity": self.identity, "requested": self.requested}
        write_json(self.path / "config.json", ours)

    def difference(self) -> str:
        """Say in which settings the run on the disk differs from this one; empty when in none.

        Raises:
            ValueError: when what the run on the disk says of itself cannot be read.
        """
        held = self.path / "config.json"
        if not held.exists():
            return ""
        try:
            theirs = json.loads(held.read_text())["identity"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{held} cannot be read ({error}): move the folder away, or choose another run.") from None
        names = sorted(k for k in {*theirs, *self.identity} if theirs.get(k) != self.identity.get(k))
        return "; ".join(f"{k}: {theirs.get(k)!r} there, {self.identity.get(k)!r} asked for" for k in names)

    def locked(self) -> AbstractContextManager[None]:
        """Hold the run, so that no other process trains it at the same time.

        Raises:
            ValueError: when another process holds it.
        """
        return locked(self.path, "trained", otherwise="choose another run name")

    def found_finished(self) -> bool:
        """Whether it is finished, and to be loaded: logged, with a warning when the library has changed since."""
        if not self.finished:
            return False
        if self.manifest.get("code") not in (None, code_hash()):
            log.warning(
                "%s was trained with other code of softvq_lib than today's: delete its folder to train it anew.",
                self.name,
            )
        log.info("run %s is finished: it is loaded, not trained again.", self.name)
        return True


def open_run(name: str, identity: dict[str, object], settings: TrainConfig) -> Run:
    """Return the run of a configuration, named by `name` and a hash of it unless the settings name it.

    Raises:
        ValueError: when the folder holds a run of another configuration, unless `settings.change`.
    """
    run = Run(runs_folder(settings.runs) / (settings.run or f"{name}-{config.fingerprint(identity)[:8]}"), identity)
    if run.difference() and not settings.change:
        run.claim({})
    return run
