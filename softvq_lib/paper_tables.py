"""Tab. 1-4 of the paper as it prints them, in Markdown, from its own numbers alone; measured ones stand beside them."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from softvq_lib.config import nearest, one_of

NOT_RUN = "not run"
NOT_PRINTED = "–"


class _Column(NamedTuple):
    """A printed column of numbers."""

    metric: str
    head: str
    digits: int  # at least so many decimals
    unit: str = ""


_SYSTEMS = (
    _Column("tokens", "# tokens ↓", 0),
    _Column("rfid", "tok. rFID ↓", 2),
    _Column("gflops", "Gflops ↓", 2),
    _Column("throughput", "throughput (imgs/sec)", 2),
    _Column("gfid", "w/o CFG: gFID ↓", 2),
    _Column("is", "w/o CFG: IS ↑", 1),
    _Column("gfid_guided", "w/ CFG: gFID ↓", 2),
    _Column("is_guided", "w/ CFG: IS ↑", 1),
)
_TOKENIZERS = (
    _Column("tokenizer_parameters", "# params", 0, " M"),
    _Column("tokens", "# tokens", 0),
    _Column("dim", "dim.", 0),
    _Column("rfid", "rFID ↓", 2),
    _Column("gfid", "SiT-L: gFID ↓", 2),
    _Column("is", "SiT-L: IS ↑", 1),
)
_ALIGNMENTS = (
    _Column("rfid", "rFID ↓", 2),
    _Column("linear_probe", "L.P. ↑", 2),
    _Column("gfid", "SiT-L: gFID ↓", 2),
    _Column("is", "SiT-L: IS ↑", 1),
)
# Place -> heads of the columns of words, and columns of numbers.
TABLES = {
    "Tab. 1": (("gen. model", "tok. model"), _SYSTEMS),
    "Tab. 2": (("gen. model", "tok. model"), _SYSTEMS),
    "Tab. 3": (("tokenizer",), _TOKENIZERS),
    "Tab. 4": (("enc. init.", "align. target"), _ALIGNMENTS),
}
_DAGGER = "† DPM-Solver, 50 steps."


@dataclass
class PaperRow:
    """One printed row of a table.

    Attributes:
        what: Its name in the entries of the paper's numbers.
        entry: All else that its own numbers say of it, such as `labels`, `preset` or `tokens`.
        numbers: Metric -> the entry of that number; one that is printed once for several rows is in each of them.
    """

    what: str = ""
    entry: dict = field(default_factory=dict)
    numbers: dict[str, dict] = field(default_factory=dict)


def paper_rows(paper: Iterable[dict], place: str) -> list[PaperRow]:
    """Join the numbers of a table by its printed rows, from the first to the last.

    Args:
        paper: As `results.read_paper` returns it.
        place: A table, such as `Tab. 1`.

    Raises:
        ValueError: for another place, two numbers in one cell, or a row that is missing or has two names.
    """
    one_of("place", place, TABLES)
    rows: dict[int, PaperRow] = {}
    for number in paper:
        if number["place"] != place:
            continue
        span = number.get("span", 1)
        for at in range(number["row"], number["row"] + span):
            row = rows.setdefault(at, PaperRow())
            if number["metric"] in row.numbers:
                raise ValueError(f"{place}, row {at}: {number['metric']} stands there twice, the second is {number}.")
            row.numbers[number["metric"]] = number
            if span == 1:
                if row.what not in ("", number["what"]):
                    raise ValueError(f"{place}, row {at} is {row.what!r}, and {number['what']!r}.")
                row.what = number["what"]
                row.entry = {name: value for name, value in number.items() if name not in _OF_A_NUMBER} | row.entry
    for at in range(1, max(rows, default=0) + 1):
        if at not in rows or not rows[at].what:
            raise ValueError(f"{place}, row {at} has no number of its own.")
    return [rows[at] for at in sorted(rows)]


_OF_A_NUMBER = ("metric", "value", "unit", "note", "also", "what")


def paper_table(
    paper: Iterable[dict],
    place: str,
    measured: Mapping[str, Iterable[dict]] | None = None,
    heads: Mapping[str, str] | None = None,
) -> str:
    """Print a table of the paper, with its doubts as notes below, and measured numbers in columns of their own.

    Args:
        paper: As `results.read_paper` returns it.
        place: `Tab. 1`, `Tab. 2`, `Tab. 3` or `Tab. 4`.
        measured: Name of a row of the paper, `what`, to the results rows that were measured or derived for it. Where
            there is none, the cell says so. None: the paper's columns alone.
        heads: Metric of the results rows to the head of its column, for those that are shown; default: all, by name.

    Raises:
        ValueError: for another place, a name that is no row of it, a results row whose source is the paper, or two
            rows of one metric and source for one row of the paper.
    """
    rows = paper_rows(paper, place)
    words, columns = TABLES[place]
    beside = _beside(measured, heads, [row.what for row in rows])
    notes: dict[str, int] = {}
    lines, group = [], None
    for row in rows:
        if row.entry.get("group", group) != group:
            group = row.entry["group"]
            lines.append([f"*{group}*"] + [""] * (len(words) + len(columns) + len(beside) - 1))
        cells = [NOT_PRINTED if label == "-" else label for label in row.entry["labels"]]
        cells += [_printed(row.numbers.get(column.metric), column, notes) for column in columns]
        lines.append(cells + [cell.get(row.what, NOT_RUN) for _, cell in beside])
    titles = [*words, *(column.head for column in columns), *(head for head, _ in beside)]
    rule = "|" + "---|" * len(words) + "--:|" * (len(titles) - len(words))
    table = "\n".join(["| " + " | ".join(titles) + " |", rule, *("| " + " | ".join(line) + " |" for line in lines)])
    below = [f"<sup>{number}</sup> {note}." for note, number in notes.items()]
    if any("†" in cell for line in lines for cell in line):
        below.insert(0, _DAGGER)
    return "\n\n".join([table, *below])


def _printed(number: dict | None, column: _Column, notes: dict[str, int]) -> str:
    """A number of the paper with its digits, and the sign of the note on it."""
    if number is None:
        return NOT_PRINTED
    value = number["value"]
    text = f"{value:.{column.digits}f}"
    text = (text if float(text) == value else str(value)) + column.unit
    if "note" not in number:
        return text
    return f"{text}<sup>{notes.setdefault(number['note'], len(notes) + 1)}</sup>"


def _beside(
    measured: Mapping[str, Iterable[dict]] | None, heads: Mapping[str, str] | None, names: list[str]
) -> list[tuple[str, dict[str, str]]]:
    """Columns beside the paper's, each of one source and one metric: its head, and its cells by name of the row."""
    if measured is None:
        return []
    cells: dict[tuple[str, str], dict[str, str]] = {("measured", metric): {} for metric in heads or ()}
    for what, rows in measured.items():
        if what not in names:
            raise ValueError(f"{what!r} is no row of this table{nearest(what, names)} Rows: {'; '.join(names)}.")
        for row in rows:
            source, metric = row["source"], row["metric"]
            if source == "paper":
                raise ValueError(f"{what!r}, {metric}: a number of the paper is not shown as one of this library.")
            if heads is not None and metric not in heads:
                continue
            column = cells.setdefault((source, metric), {})
            if what in column:
                raise ValueError(f"{what!r} has two {source} rows of {metric}, one of run {row['run']!r}: give one.")
            column[what] = _with_interval(row)
    if not cells:
        return [("measured", {})]
    return [(f"{source}: {(heads or {}).get(metric, metric)}", column) for (source, metric), column in cells.items()]


def _with_interval(row: dict) -> str:
    """Value to four digits, its interval to as many decimals, and n."""
    value = row["value"]
    decimals = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 3
    numbers = [f"{number:,.{decimals}f}" for number in (value, row["low"], row["high"]) if number is not None]
    interval = f" [{numbers[1]}, {numbers[2]}]" if len(numbers) == 3 else ""
    return f"{numbers[0]}{interval}, n {row['n']:,}"
