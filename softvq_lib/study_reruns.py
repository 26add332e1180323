"""What a study kept of its own making: the attempt before it, and arms that were run again and held against it."""

import json
from collections.abc import Iterable
from pathlib import Path

from softvq_lib.again import Again, table
from softvq_lib.arms import Measured, measured
from softvq_lib.study_cells import METRICS, Drawn
from softvq_lib.sweeps import AGAIN, Arm, read_ledger

SHOWN = ("reconstruction.psnr", "reconstruction.KID-EffLite0", "samples.KID-EffLite0", "samples.class_agreement")


def attempt(plan: Iterable[Arm], folder: Path) -> Drawn:
    """Numbers of the arms that were run at half as many steps, one line an arm.

    Args:
        plan: The study's, whose names of arms the attempt shared.
        folder: Of its rows.
    """
    executed = {entry["run"] for entry in read_ledger(folder)}
    arms = [arm for arm in measured(plan, folder) if arm.rows and arm.arm.cells[0].run in executed]
    found = {arm.arm.cells[0].run: arm for arm in reversed(arms)}
    if not found:
        return Drawn("*The attempt: not run yet.*")
    heads = ["arm", *(METRICS[name].head for name in SHOWN)]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "--:|" * len(SHOWN)]
    for run, arm in reversed(found.items()):
        lines.append("| " + " | ".join([f"`{run}`", *(_cell(arm, name) for name in SHOWN)]) + " |")
    rows = [arm.rows[name] for arm in found.values() for name in SHOWN if name in arm.rows]
    return Drawn("\n".join(lines), rows)


def _cell(arm: Measured, name: str) -> str:
    if name not in arm.rows:
        return "not run"
    row, (_, digits, _, scale) = arm.rows[name], METRICS[name]
    ends = "" if row["low"] is None else f" [{row['low'] * scale:.{digits}f}, {row['high'] * scale:.{digits}f}]"
    return f"{row['value'] * scale:.{digits}f}{ends}"


def reruns(folder: Path) -> Drawn:
    """Each arm that was run again: how many of its numbers lie where one more seed is expected, and all of them.

    Args:
        folder: Of the study's rows, where the reruns are noted.
    """
    path = Path(folder) / AGAIN
    entries = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    newest = {entry["arm"]: entry for entry in entries}
    if not newest:
        return Drawn("*Reruns: not run yet.*")
    parts = []
    for name, entry in newest.items():
        found = [Again(**one) for one in entry["metrics"]]
        known = [one for one in found if one.inside is not None]
        threads = f"{entry['threads']} thread{'s' * (entry['threads'] > 1)}"
        inside, same = sum(one.inside for one in known), sum(_same(one) for one in found)
        parts.append(
            f"**`{name}`**, {threads}: {inside} of {len(known)} numbers inside the interval of one more seed, "
            f"{same} of {len(found)} the same to four digits.\n\n"
            + table([one for one in found if one.metric in METRICS])
        )
    return Drawn("\n\n".join(parts), ledger=list(newest.values()))


def _same(one: Again) -> bool:
    return f"{one.value:.4g}" == f"{one.recorded:.4g}"
