"""Sweeps: which executions of experiments a study consists of, as a product over parameter files; plans, runs nothing.

A sweep file names, in order, the experiments of an arm (its stages), each with a file of parameters, and factors whose
levels change some of these. Two arms that would execute the very same share the execution.
"""

import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from softvq_lib.config import fingerprint, nearest, one_of
from softvq_lib.train import read_parameters

# Where things lie and who computes them: no part of what an execution is.
_PLACES = ("dataset", "runs", "results", "device", "workers", "run")
# Of each experiment: which of its parameters names what an earlier stage of the arm made. A parameter that is given as
# stages, separated by commas, stands for what these made: `linear_probing.model: train_tokenizer,train_generator`.
_LINKS = {
    "distil_encoder": {},
    "train_tokenizer": {"encoder_start": "distil_encoder"},
    "train_generator": {"tokenizer": "train_tokenizer"},
    "evaluate": {"tokenizer": "train_tokenizer", "generator": "train_generator"},
    "linear_probing": {"model": "train_tokenizer"},
    "latent_space": {"tokenizer": "train_tokenizer"},
}
TRAINING = ("distil_encoder", "train_tokenizer", "train_generator")
_KEYS = ("sweep", "about", "name", "stages", "factors", "first", "unavailable", "only")


@dataclass(frozen=True)
class Cell:
    """One execution of an experiment.

    Attributes:
        experiment: Its name, that of a notebook.
        run: Of a training stage, the name of its run; of the others, of the run that it looks at last.
        parameters: All of it but the places.
        needs: Executions that make what this one reads.
        fingerprint: The sha256 (hex) of all that the outcome depends on; of what it needs, theirs.
    """

    experiment: str
    run: str
    parameters: dict[str, object] = field(hash=False, compare=False)
    needs: tuple["Cell", ...] = field(hash=False, compare=False)
    fingerprint: str

    @property
    def name(self) -> str:
        """For people, and for the ledger."""
        return f"{self.experiment} {self.run}"


@dataclass(frozen=True)
class Arm:
    """One design point of a sweep.

    Attributes:
        sweep: Name of its sweep.
        name: Its own, one in all sweeps.
        factors: Level by factor, as text.
        cells: In the order in which they are executed.
        first: Whether it belongs to the first pass.
        unavailable: Why it cannot be run everywhere; "" for one that can.
    """

    sweep: str
    name: str
    factors: dict[str, str]
    cells: tuple[Cell, ...]
    first: bool = True
    unavailable: str = ""

    def cell(self, experiment: str) -> Cell | None:
        """The execution of one experiment; None if it has none."""
        return next((cell for cell in self.cells if cell.experiment == experiment), None)


def read_plan(files: Iterable[Path], root: Path) -> list[Arm]:
    """Read sweep files; return all arms, those of the first pass before the others, files in the order given.

    Args:
        files: YAML files, see the class docstrings for what they hold.
        root: Folder that paths of parameter files start from.

    Raises:
        ValueError: for a file that cannot be read or has unknown keys, a factor or level that is not there, a stage
            that cannot follow, or a name of an arm that stands for two different ones.
    """
    arms: list[Arm] = []
    known: dict[str, Cell] = {}
    names: dict[str, str] = {}
    for path in files:
        for arm in _arms(Path(path), Path(root), known):
            if names.setdefault(arm.name, arm.sweep) != arm.sweep:
                raise ValueError(f"{path}: arm {arm.name!r} is one of sweep {names[arm.name]!r} already.")
            arms.append(arm)
    return sorted(arms, key=lambda arm: not arm.first)


def _arms(path: Path, root: Path, known: dict[str, Cell]) -> list[Arm]:
    sweep = read_parameters(path)
    for key in sweep:
        if key not in _KEYS:
            raise ValueError(f"{path}: unknown key {key!r}{nearest(key, _KEYS)} Known: {', '.join(_KEYS)}.")
    for key in ("sweep", "name", "stages", "factors"):
        if not sweep.get(key):
            raise ValueError(f"{path}: {key} is missing.")
    stages = {name: read_parameters(root / file) for name, file in sweep["stages"].items()}
    for name in stages:
        one_of(f"{path}: stage", name, _LINKS)
    factors = {name: _levels(name, levels) for name, levels in sweep["factors"].items()}
    for entry in ("first", "unavailable"):
        for name, levels in (sweep.get(entry) or {}).items():
            one_of(f"{path}: {entry}", name, factors)
            for level in levels:
                one_of(f"{path}: {entry}, {name}", str(level), factors[name])
    arms = []
    for choice in itertools.product(*(levels.items() for levels in factors.values())):
        chosen = dict(zip(factors, choice, strict=True))
        labels = {name: level for name, (level, _) in chosen.items()}
        if not _within(labels, sweep.get("only")):
            continue
        name = str(sweep["name"]).format(**labels)
        changed = _changed(stages, [changes for _, changes in chosen.values()], path)
        reasons = [
            why
            for factor, levels in (sweep.get("unavailable") or {}).items()
            for level, why in levels.items()
            if labels[factor] == str(level)
        ]
        cells = _cells(name, changed, known)
        first = all(labels[f] in map(str, levels) for f, levels in (sweep.get("first") or {}).items())
        arms.append(Arm(sweep["sweep"], name, labels, cells, first and not reasons, "; ".join(reasons)))
    if len({arm.name for arm in arms}) < len(arms):
        raise ValueError(f"{path}: name={sweep['name']!r} does not tell all arms apart: put every factor into it.")
    return arms


def _levels(factor: str, levels: object) -> dict[str, dict[str, object]]:
    """Levels by their names: a list gives values of the parameter that the factor is called by."""
    if isinstance(levels, list):
        return {str(level): {factor: level} for level in levels}
    return {str(level): dict(changes or {}) for level, changes in levels.items()}


def _within(labels: Mapping[str, str], only: object) -> bool:
    """Whether one of the alternatives of `only`, each levels by factor, has these levels; True where there are none."""
    if not only:
        return True
    return any(all(labels[f] in map(str, levels) for f, levels in one.items()) for one in only)


def _changed(
    stages: Mapping[str, dict[str, object]], changes: Iterable[Mapping[str, object]], path: Path
) -> dict[str, dict[str, object]]:
    """Parameters by stage after the levels' changes; `stage.parameter` or a bare one of the tokenizer's stage."""
    made = {name: dict(parameters) for name, parameters in stages.items()}
    left_out = set()
    for change in changes:
        for key, value in change.items():
            stage, dot, parameter = key.rpartition(".")
            if key in made and value is None:
                left_out.add(key)
                continue
            stage = stage if dot else ("train_tokenizer" if "train_tokenizer" in made else next(iter(made)))
            one_of(f"{path}: stage of {key}", stage, made)
            made[stage][parameter] = value
    return {name: parameters for name, parameters in made.items() if name not in left_out}


def _cells(name: str, stages: Mapping[str, dict[str, object]], known: dict[str, Cell]) -> tuple[Cell, ...]:
    made: dict[str, Cell] = {}
    for experiment, parameters in stages.items():
        links: dict[str, object] = {}
        needs: list[Cell] = []
        for parameter, source in _LINKS[experiment].items():
            there = [made[stage] for stage in str(parameters.get(parameter) or source).split(",") if stage in made]
            if there:
                links[parameter] = ",".join(cell.run for cell in there)
                needs += there
        kept = {key: value for key, value in parameters.items() if key not in _PLACES and key not in links}
        print_of = fingerprint([experiment, kept, [need.fingerprint for need in needs]])
        if print_of in known:
            made[experiment] = known[print_of]
            continue
        if not needs and experiment not in TRAINING:
            sources = " or ".join(_LINKS[experiment].values())
            raise ValueError(f"arm {name!r}: stage {experiment} has nothing to look at: put {sources} before it.")
        run = _run_name(name, experiment, kept) if experiment in TRAINING else needs[-1].run
        full = kept | links | ({"run": run} if experiment in TRAINING else {})
        made[experiment] = known[print_of] = Cell(experiment, run, full, tuple(needs), print_of)
    return tuple(made.values())


def _run_name(arm: str, experiment: str, parameters: Mapping[str, object]) -> str:
    if experiment == "train_generator":
        return f"{arm}-{parameters.get('generator', 'sit')}"
    return f"{arm}-start" if experiment == "distil_encoder" else arm


# -- the ledger: what has been executed --------------------------------------------------------------------------------

LEDGER = "cells.jsonl"
AGAIN = "again.jsonl"  # beside it: what was run once more, and how it compares


def row_files(folder: Path) -> list[Path]:
    """Every file of results rows below a folder, in order of their paths; ledgers are left out."""
    return [path for path in sorted(Path(folder).rglob("*.jsonl")) if path.name not in (LEDGER, AGAIN)]


def read_ledger(results: Path) -> list[dict]:
    """Read the entries of all executions whose rows lie in a folder of results, oldest first.

    Raises:
        ValueError: naming file and number of a line that is damaged.
    """
    path, entries = Path(results) / LEDGER, []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            entries.append(json.loads(line))
        except ValueError:
            raise ValueError(f"{path}, line {number} is damaged: {line[:60]!r}.") from None
    return entries


def executed(results: Path) -> dict[str, dict]:
    """The newest entry of the ledger by the fingerprint of its execution."""
    return {entry["fingerprint"]: entry for entry in read_ledger(results)}
