"""What has been run, when, on what machine, how long, with which versions and data; and what has not, and why.

Everything is computed from committed files: results rows, ledgers of executions, sweeps, parameter files, notebooks.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

from softvq_lib import results as rows_of
from softvq_lib.sweeps import LEDGER, Arm, read_ledger, row_files

NO_BREAK = "\u2011"  # a hyphen at which a date in a narrow column is not broken


def _table(heads: Sequence[str], lines: Iterable[Sequence[object]], right: Iterable[int] = ()) -> str:
    right = set(right)
    rule = "|" + "".join("--:|" if k in right else "---|" for k in range(len(heads)))
    return "\n".join(["| " + " | ".join(heads) + " |", rule, *("| " + " | ".join(map(str, x)) + " |" for x in lines)])


def _span(days: Iterable[str]) -> str:
    days = sorted({day[:10] for day in days})
    return " to ".join(dict.fromkeys((days[0], days[-1]))).replace("-", NO_BREAK)


def _few(values: Iterable[str], most: int = 3) -> str:
    """The most frequent values, and how many others there are."""
    counts = Counter(values)
    named = sorted(counts, key=lambda value: (-counts[value], value))
    return ", ".join(named[:most]) + (f" and {len(named) - most} more" if len(named) > most else "")


def read_all(folder: Path) -> dict[str, list[dict]]:
    """Read every file of results rows below a folder, by its path in it; ledgers are left out.

    Raises:
        ValueError: for a damaged row, see `results.read`.
    """
    return {path.relative_to(folder).as_posix(): rows_of.read(path) for path in row_files(folder)}


def measured(files: Mapping[str, list[dict]]) -> str:
    """One line a file of rows: how many runs and numbers, when, on what, and hours of training.

    Args:
        files: As `read_all` returns them.
    """
    lines = []
    for name, rows in files.items():
        trained = {row["run"]: row["train_seconds"] for row in rows if row.get("train_seconds")}
        hours = f"{sum(trained.values()) / 3600:.1f}" if trained else "–"
        runs = len({row["run"] for row in rows})
        device = _few((row["device"] for row in rows), 2)
        lines.append([f"`{name}`", runs, len(rows), _span(row["date"] for row in rows), device, hours])
    heads = ["rows", "runs", "numbers", "when", "on", "hours of training"]
    return _table(heads, lines, (1, 2, 5))


def executions(folder: Path) -> str:
    """One line an experiment of each ledger below a folder: how many executions, minutes of each, when, on what."""
    lines = []
    for path in sorted(Path(folder).rglob(LEDGER)):
        entries = read_ledger(path.parent)
        for experiment in dict.fromkeys(entry["experiment"] for entry in entries):
            mine = [entry for entry in entries if entry["experiment"] == experiment]
            minutes = sorted(entry["seconds"] / 60 for entry in mine)
            spread = f"{minutes[0]:.1f} to {minutes[-1]:.1f}" if len(mine) > 1 else f"{minutes[0]:.1f}"
            machine = _few(f"{entry['machine']}, {entry.get('threads', '?')} used" for entry in mine)
            when = _span(entry["ended"] for entry in mine)
            where = path.parent.relative_to(folder).as_posix()
            lines.append([f"`{where}` {experiment}", len(mine), spread, f"{sum(minutes) / 60:.1f}", when, machine])
    if not lines:
        return "*No ledger yet: no sweep has been run.*"
    heads = ["study, experiment", "executions", "minutes of each", "hours", "when", "machine, cores"]
    return _table(heads, lines, (1, 3))


def missing(arms: Iterable[Arm], done: Iterable[str]) -> str:
    """One line a sweep: arms planned, complete and begun, and what is known of why others are not.

    Args:
        arms: The plan.
        done: Fingerprints of executions in the ledger.
    """
    done, sweeps = set(done), {}
    for arm in arms:
        sweeps.setdefault(arm.sweep, []).append(arm)
    lines = []
    for name, mine in sweeps.items():
        away = [arm for arm in mine if arm.unavailable]
        rest = [arm for arm in mine if not arm.unavailable]
        counts = [sum(cell.fingerprint in done for cell in arm.cells) for arm in rest]
        whole = sum(count == len(arm.cells) for count, arm in zip(counts, rest, strict=True))
        begun = sum(0 < count < len(arm.cells) for count, arm in zip(counts, rest, strict=True))
        left = len(rest) - whole - begun
        why = [f"{left} wait for their turn"] if left else []
        reasons = Counter(", ".join(dict.fromkeys(arm.unavailable.split("; "))) for arm in away)
        why += [f"{count} cannot be run here: {reason}" for reason, count in reasons.items()]
        lines.append([name, len(mine), whole, begun, "; ".join(why) or "–"])
    return _table(["sweep", "arms planned", "complete", "begun", "not run, and why"], lines, (1, 2, 3))


def header(path: Path) -> dict[str, str]:
    """Entries `# name: text` at the top of a parameter file; text that goes on in the next line is joined."""
    found, last = {}, ""
    for line in Path(path).read_text().splitlines():
        if not line.startswith("#"):
            break
        entry = re.match(r"# ?([a-z]+): *(.*)", line)
        if entry:
            last = entry[1]
            found[last] = entry[2]
        elif last:
            found[last] += " " + line.lstrip("# ")
    return found


def not_affordable(folder: Path) -> str:
    """One line a parameter file of a scale: the row of the paper that it stands for, and what it would cost.

    Args:
        folder: Of the scale, with a folder for each experiment.
    """
    lines = []
    for path in sorted(Path(folder).glob("*/*.yaml")):
        said = header(path)
        lines.append([f"`{path.parent.name}/{path.stem}`", said.get("row", "–"), said.get("cost", "–")])
    return _table(["parameters", "what it stands for", "cost"], lines)


def versions(rows: Iterable[dict]) -> str:
    """One line a package: the versions that numbers were measured with, and how many by each."""
    counts: dict[str, Counter] = {}
    for row in rows:
        for name, version in {"Python": row["python"], **row["packages"]}.items():
            counts.setdefault(name, Counter())[version] += 1
    lines = [
        [name, ", ".join(f"{version} ({count:,})" for version, count in sorted(counts[name].items()))]
        for name in sorted(counts, key=str.lower)
    ]
    return _table(["package", "version (numbers measured with it)"], lines)


def data(rows: Iterable[dict]) -> str:
    """One line a data set: its fingerprints, how many numbers are of each, and by which experiments."""
    found: dict[tuple[str, str], Counter] = {}
    for row in rows:
        found.setdefault((row["data"], row["data_fingerprint"]), Counter())[row["experiment"]] += 1
    lines = [
        [name, f"`{fingerprint[:16]}`" if fingerprint else "–", f"{sum(counts.values()):,}", ", ".join(sorted(counts))]
        for (name, fingerprint), counts in sorted(found.items())
    ]
    return _table(["data", "fingerprint (sha256, begin)", "numbers", "experiments"], lines, (2,))


def pages(notebooks: Iterable[Path], folder: Path, stored: Sequence[str], link: Callable[[str], str] = str) -> str:
    """One line a notebook: how its outputs come about, and how many of its cells the tests compare.

    Args:
        notebooks: Their files.
        folder: Where they are, or some folders down from there.
        stored: Patterns of those that are shown as they were stored; the others run whenever the site is built.
        link: Writes the name of a page (its path without suffix) as a link.
    """
    lines = []
    for path in sorted(notebooks):
        name = path.relative_to(folder)
        code = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        compared = sum("nbval-check-output" in cell["metadata"].get("tags", []) for cell in code)
        run = sum(cell.get("execution_count") is not None for cell in code)
        how = "stored outputs" if any(fnmatch(name.as_posix(), pattern) for pattern in stored) else "run when built"
        lines.append([link(name.with_suffix("").as_posix()), how, f"{run} of {len(code)}", compared])
    return _table(["page", "its outputs", "cells run", "compared by tests"], lines, (2, 3))
