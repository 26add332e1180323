"""Results rows: every number with its value, n, seed, interval and origin, as JSON lines that are only appended to.

Small files that belong to a row, pictures and arrays, lie in a folder beside the rows; the row holds their sha256.
"""

import fcntl
import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from softvq_lib.config import nearest
from softvq_lib.training.run import now, provenance
from softvq_lib.weights import sha256

if TYPE_CHECKING:
    import numpy as np

    from softvq_lib.training.run import Run

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
OPTIONAL = {"curve": list, "terms": dict, "pictures": dict, "arrays": dict, "train_seconds": float}
SOURCES = ("paper", "derived", "measured")
# Where a number comes from: none of it may be empty. A wheel knows no commit; the hash of the code stands for it.
ORIGIN = ("config", "config_hash", "code", "device", "precision", "packages", "python", "date")
FILES = ("pictures", "arrays")  # entries that map names of files to their sha256
MOST_BYTES = 2**20  # of a file of arrays, which is committed with the rows


def check(row: dict) -> dict:
    """Return the row if it is complete and in order.

    Raises:
        ValueError: naming the entry, and its value, that is missing, unknown, of another type, empty though it says
            where the number comes from, not finite, or outside its interval.
    """
    if not isinstance(row, dict):
        raise ValueError(f"results row: entries by name are wanted, this is {row!r:.80}.")
    at = "results row of " + "/".join(str(row.get(name, "?")) for name in ("experiment", "run", "metric"))
    known = REQUIRED | OPTIONAL
    for name in row:
        if name not in known:
            raise ValueError(f"{at}: unknown entry {name!r}{nearest(name, known)}")
    for name, kind in known.items():
        if name not in row:
            if name in REQUIRED:
                raise ValueError(f"{at}: {name!r} is missing; no number without it.")
        elif not isinstance(row[name], kind) or (kind is int and isinstance(row[name], bool)):
            raise ValueError(f"{at}: {name}={row[name]!r:.80} is not of type {kind}.")
    if row["source"] not in SOURCES:
        raise ValueError(f"{at}: source={row['source']!r}; allowed: {', '.join(SOURCES)}.")
    for name in ORIGIN:
        if not row[name]:
            raise ValueError(f"{at}: {name}={row[name]!r} is empty; no number without its origin.")
    _written_as_json(at, row)
    if row["n"] < 1:
        raise ValueError(f"{at}: n={row['n']}; a number comes from at least one.")
    _ordered(at, row)
    for entry in FILES:
        for name, digest in row.get(entry, {}).items():
            if Path(name).name != name or not re.fullmatch("[0-9a-f]{64}", str(digest)):
                raise ValueError(
                    f"{at}: {entry} has {name!r}: {digest!r}; a plain file name and its sha256 are wanted."
                )
    return row


def _written_as_json(at: str, row: dict) -> None:
    for name, value in row.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{at}: {name}={value!r:.80} is not finite or is no JSON.") from error


def _ordered(at: str, row: dict) -> None:
    low, high = row["low"], row["high"]
    if len({low is None, high is None, not row["interval"]}) > 1:
        raise ValueError(f"{at}: low={low}, high={high}, interval={row['interval']!r}; give all three, or none.")
    if low is None:
        return
    for less, more in (("low", "value"), ("value", "high")):
        # Equal numbers that were summed in another order may differ in their last digit.
        if row[less] > row[more] and not math.isclose(row[less], row[more], rel_tol=1e-9, abs_tol=1e-12):
            raise ValueError(f"{at}: {less}={row[less]} is above {more}={row[more]}.")


def origin() -> dict[str, object]:
    """The entries of a row that say with which code and packages, and when, it was measured."""
    here = provenance()
    return {"date": now(), **{name: here[name] for name in ("commit", "dirty", "code", "packages", "python")}}


def of_run(experiment: str, run: "Run") -> dict[str, object]:
    """The entries that the rows of a training run share: its data, configuration, hardware and code."""
    manifest = run.manifest
    return {
        "experiment": experiment,
        "run": run.name,
        "seed": run.identity["seed"],
        "source": "measured",
        "data": manifest["data"]["name"],
        "data_fingerprint": manifest["data"]["fingerprint"],
        "config": run.identity,
        "config_hash": run.config_hash,
        "device": manifest["device_name"],
        "precision": manifest["precision"],
        **origin(),
        "code": manifest["code"],  # that it was trained with
    }


def append(path: Path, rows: list[dict]) -> None:
    """Append checked rows to a JSON-lines file, making its folder; several processes may do so at once.

    Raises:
        ValueError: for a row that `check` refuses; then nothing is written.
        OSError: when they cannot be written whole; then none of them is left.
    """
    lines = "".join(json.dumps(check(row), sort_keys=True) + "\n" for row in rows).encode()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, os.SEEK_END)
        if end and lines:
            file.seek(-1, os.SEEK_END)
            # Should another program have left half a line, it stays a line of its own.
            lines = lines if file.read(1) == b"\n" else b"\n" + lines
        if (written := file.write(lines)) < len(lines):
            file.truncate(end)
            raise OSError(f"{path}: only {written} of {len(lines)} bytes could be written; none were kept.")


def read(path: Path) -> list[dict]:
    """Read and check all rows of a file; of rows with equal experiment, run and metric the last one counts.

    Returns:
        The rows; none where there is no such file.

    Raises:
        ValueError: naming file and number of a line that is damaged or that `check` refuses.
    """
    path, rows = Path(path), {}
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is damaged: {line[:60]!r}.") from error
        try:
            rows[check(row)["experiment"], row["run"], row["metric"]] = row
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return list(rows.values())


def read_paper(path: Path) -> list[dict]:
    """Read the paper's own numbers.

    Each says its `place` in the paper, `what` it is of, `metric`, `value` and `unit`; perhaps also which `preset`,
    `generator` and so on that is, where the text repeats it (`also`), and a `note` if there is a doubt. Numbers of a
    table say the `row` they are printed in, from 1, and the `span` of rows if they stand there once for several;
    those of a single row carry its `labels`, the words in it, and the `group` of rows that it belongs to.

    Raises:
        ValueError: for a number without place, or one that stands there twice.
    """
    rows = json.loads(Path(path).read_text())
    keys = Counter((row.get("place"), row.get("what"), row.get("metric")) for row in rows)
    for row in rows:
        key, value = (row.get("place"), row.get("what"), row.get("metric")), row.get("value")
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if None in key or not number or keys[key] > 1:
            raise ValueError(f"{path}: {row} lacks place, what, metric or value, or stands there twice.")
    return rows


# -- files whose sha256 stands in a row ------------------------------------------------------------------------------


def keep_pictures(folder: Path, pictures: Mapping[str, Path]) -> dict[str, str]:
    """Copy pictures into a folder of results and return their sha256 by file name, for a row's `pictures`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in pictures.items():
        shutil.copyfile(path, folder / name)
    return {name: sha256(folder / name) for name in pictures}


def keep_arrays(folder: Path, files: "Mapping[str, Mapping[str, np.ndarray]]") -> dict[str, str]:
    """Write files of arrays into a folder of results and return their sha256 by file name, for a row's `arrays`.

    Args:
        folder: Where they go; it is made.
        files: File name, which ends in `.safetensors`, to its arrays of any shape by name. Equal arrays give equal
            bytes.

    Raises:
        ValueError: for another ending, or a file above `MOST_BYTES`.
    """
    import numpy as np
    from safetensors.numpy import save

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, arrays in files.items():
        if not name.endswith(".safetensors"):
            raise ValueError(f"arrays are kept as safetensors: {name!r} should be '{Path(name).stem}.safetensors'.")
        data = save({key: np.ascontiguousarray(array) for key, array in arrays.items()})
        if len(data) > MOST_BYTES:
            raise ValueError(f"{name} has {len(data):,} bytes; allowed: {MOST_BYTES:,}. Keep fewer, or as float16.")
        (folder / name).write_bytes(data)
    return {name: sha256(folder / name) for name in files}


def find_file(row: dict, name: str, folder: Path) -> Path:
    """Return the path of a picture or of a file of arrays that a row names.

    Raises:
        ValueError: the row names no such file, or the file is missing or is another one; says both sha256.
    """
    named = {known: entry for entry in FILES for known in row.get(entry, {})}
    if name not in named:
        raise ValueError(
            f"the results row of {row['run']}, {row['metric']}, names no file {name!r}{nearest(name, named)} "
            f"It names: {', '.join(named) or 'none'}."
        )
    path, entry = Path(folder) / name, named[name]
    kind, recorded = entry.removesuffix("s"), row[entry][name]
    if not path.is_file():
        raise ValueError(f"{path} is missing; its results row names a {kind} with sha256 {recorded}.")
    if (found := sha256(path)) != recorded:
        raise ValueError(f"{path} is not the {kind} that its results row names: sha256 {found}, recorded {recorded}.")
    return path


def read_arrays(row: dict, name: str, folder: Path) -> "dict[str, np.ndarray]":
    """Read the arrays, by name and of any shape, of a file that a row names; raises ValueError as `find_file` does."""
    from safetensors.numpy import load_file

    return load_file(find_file(row, name, folder))
