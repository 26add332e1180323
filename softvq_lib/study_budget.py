"""What a study costs: a table of its plan and of the times that its ledger of executions has."""

from collections.abc import Iterable, Mapping, Sequence

from softvq_lib.study_cells import Drawn
from softvq_lib.sweeps import Arm, Cell

_SHORT = {
    "distil_encoder": "distilling",
    "train_tokenizer": "tokenizer",
    "train_generator": "generator",
    "evaluate": "evaluation",
    "linear_probing": "probing",
    "latent_space": "latent space",
}


def budget(arms: Sequence[Arm], files: Mapping[str, str], entries: Iterable[dict]) -> Drawn:
    """One line a sweep: arms, executions done and planned, minutes of each, hours of all on one core and on two.

    An execution that several arms share counts in the first sweep that needs it. Times are those of the sweep's own
    executions, or of all sweeps where it has none yet.

    Args:
        arms: The plan.
        files: Sweep to the name of its file, in the order in which they are run.
        entries: Of the ledger.
    """
    done = {entry["fingerprint"]: entry for entry in entries}
    runnable = [arm for arm in arms if not arm.unavailable]
    firsts, alls = _owned([arm for arm in runnable if arm.first], files), _owned(runnable, files)
    overall = _means(done.values())
    lines, seen = [], {}
    totals: dict[str, list[tuple[float, bool]]] = {"first": [], "early": [], "all": []}
    for sweep in files:
        mine = [arm for arm in arms if arm.sweep == sweep]
        cells = {cell.fingerprint: cell for arm in mine for cell in arm.cells if not arm.unavailable}
        seen |= {key: done[key] for key in cells if key in done}
        means = overall | _means(done[key] for key in cells if key in done)
        stages = list(dict.fromkeys(cell.experiment for cell in cells.values()))
        hours = [_hours(owned[sweep], means, done) for owned in (firsts, alls)]
        totals["first"].append(hours[0])
        totals["all"].append(hours[1])
        if files[sweep][:1] in "123":
            totals["early"].append(hours[1])
        counted = [
            f"{sum(cell.fingerprint in done for cell in owned[sweep])} of {len(owned[sweep])}"
            for owned in (firsts, alls)
        ]
        away = sum(bool(arm.unavailable) for arm in mine)
        lines.append(
            [
                f"`{files[sweep]}`",
                f"{sum(arm.first for arm in mine)}, {len(mine) - away}" + f" (+ {away} not runnable here)" * bool(away),
                *counted,
                ", ".join(f"{_SHORT[s]} {means[s] / 60:.1f}" if s in means else f"{_SHORT[s]} ?" for s in stages),
                *(_said(*each) for each in hours),
            ]
        )
    heads = ["sweep", "arms: first pass, all", "executed: first pass", "executed: all", "minutes of each, one core"]
    heads += ["first pass, hours", "all, hours"]
    written = [heads, ["---"] + ["--:"] * 3 + ["---"] + ["--:"] * 2, *lines]
    text = "\n".join("| " + " | ".join(line) + " |" for line in written)
    names = {"first": "first pass", "early": "experiments 1 to 3 (files 1 to 3), all seeds", "all": "everything"}
    sums = [[names[name], *(_said(*_sum(hours, cores)) for cores in (1, 2))] for name, hours in totals.items()]
    rule = [["what", "one core, hours", "two cores, hours"], ["---", "--:", "--:"]]
    total = "\n".join("| " + " | ".join(line) + " |" for line in rule + sums)
    note = "*Hours of one core, of what is done and what is left, at the measured means. ? and ≥: of some "
    note += "experiment no execution has been timed yet, so its part is missing. An execution that several sweeps "
    note += "share counts once. Two cores run two executions at a time.*"
    return Drawn(f"{note}\n\n{text}\n\n{total}", ledger=list(seen.values()))


def _owned(arms: Sequence[Arm], files: Iterable[str]) -> dict[str, list[Cell]]:
    """Executions by the first sweep that needs them."""
    owned, taken = {}, set()
    for sweep in files:
        cells = {cell.fingerprint: cell for arm in arms if arm.sweep == sweep for cell in arm.cells}
        owned[sweep] = [cell for key, cell in cells.items() if key not in taken]
        taken |= set(cells)
    return owned


def _seconds(entry: dict) -> float:
    """Of one core."""
    return entry["seconds"] * entry.get("threads", 1)


def _means(entries: Iterable[dict]) -> dict[str, float]:
    times: dict[str, list[float]] = {}
    for entry in entries:
        times.setdefault(entry["experiment"], []).append(_seconds(entry))
    return {name: sum(values) / len(values) for name, values in times.items()}


def _hours(cells: Iterable[Cell], means: Mapping[str, float], done: Mapping[str, dict]) -> tuple[float, bool]:
    """Hours of one core, and whether all of them are known."""
    total, known = 0.0, True
    for cell in cells:
        if cell.fingerprint in done:
            total += _seconds(done[cell.fingerprint])
        elif cell.experiment in means:
            total += means[cell.experiment]
        else:
            known = False
    return total / 3600, known


def _sum(hours: Iterable[tuple[float, bool]], cores: int) -> tuple[float, bool]:
    hours = list(hours)
    return sum(each for each, _ in hours) / cores, all(known for _, known in hours)


def _said(hours: float, known: bool) -> str:
    return f"{'' if known else '≥ '}{hours:.1f}"
