"""Results rows: every number with its value, n, seed, interval and origin, as JSON lines that are only appended to."""

import hashlib
import json
import shutil
from pathlib import Path

from softvq_lib.config import nearest
from softvq_lib.training.run import now, provenance

# What each row must say. `interval` names how low and high were made, "" where there is none.
REQUIRED = {
    "experiment": str,
    "run": str,
    "metric": str,
    "value": float,
    "low": float | None,
    "high": float | None,
    "interval": str,
    "n": int,
    "seed": int,
    "source": str,
    "data": str,
    "data_fingerprint": str,
    "config": dict,
    "config_hash": str,
    "commit": str | None,
    "dirty": bool | None,
    "code": str,
    "device": str,
    "precision": str,
    "packages": dict,
    "python": str,
    "date": str,
}
OPTIONAL = {"curve": list, "terms": dict, "pictures": dict, "train_seconds": float}
SOURCES = ("paper", "derived", "measured")


def check(row: dict) -> dict:
    """Return the row if it is complete.

    Raises:
        ValueError: naming the entry that is missing, unknown or of another type.
    """
    known = REQUIRED | OPTIONAL
    for name in row:
        if name not in known:
            raise ValueError(f"results row: unknown entry {name!r}{nearest(name, known)}")
    for name, kind in known.items():
        if name not in row:
            if name in REQUIRED:
                raise ValueError(
                    f"results row of {row.get('experiment')!r}: {name!r} is missing; no number without it."
                )
        elif not isinstance(row[name], kind):
            raise ValueError(f"results row: {name}={row[name]!r} is not of type {kind}.")
    if row["source"] not in SOURCES:
        raise ValueError(f"results row: source={row['source']!r}; allowed: {', '.join(SOURCES)}.")
    return row


def origin() -> dict[str, object]:
    """The entries of a row that say with which code and packages, and when, it was measured."""
    here = provenance()
    return {"date": now(), **{name: here[name] for name in ("commit", "dirty", "code", "packages", "python")}}


def append(path: Path, rows: list[dict]) -> None:
    """Append checked rows to a JSON-lines file, making its folder."""
    lines = [json.dumps(check(row), sort_keys=True) + "\n" for row in rows]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.writelines(lines)


def read(path: Path) -> list[dict]:
    """Read and check all rows of a file; of rows with equal experiment, run and metric the last one counts."""
    path = Path(path)
    rows = [check(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []
    return list({(row["experiment"], row["run"], row["metric"]): row for row in rows}.values())


def read_paper(path: Path) -> list[dict]:
    """Read the paper's own numbers; each says its place in the paper.

    Raises:
        ValueError: for a number without place, or one that stands there twice.
    """
    rows = json.loads(Path(path).read_text())
    keys = [(row.get("place"), row.get("what"), row.get("metric")) for row in rows]
    for row, key in zip(rows, keys, strict=True):
        if None in key or not isinstance(row.get("value"), (int, float)) or keys.count(key) > 1:
            raise ValueError(f"{path}: {row} lacks place, what, metric or value, or stands there twice.")
    return rows


def keep_pictures(folder: Path, pictures: dict[str, Path]) -> dict[str, str]:
    """Copy pictures into a folder of results and return their sha256 by file name, for a row."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = {}
    for name, path in pictures.items():
        shutil.copyfile(path, folder / name)
        kept[name] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return kept
