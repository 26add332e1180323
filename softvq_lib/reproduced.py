"""Every number of the paper, and what becomes of it here: derived exactly, testable at mini scale, or out of reach.

Numbers of another scale never stand beside the paper's: where one of these can be tested on small images, a link says
which page does it.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from softvq_lib.audit_numbers import Numbers, range_of_ratio
from softvq_lib.audit_tables import DIT, SIT, throughputs
from softvq_lib.paper_tables import TABLES

# What may become of a number, and how the headline says it.
STATUSES = {
    "equal": "derived exactly here, and equal",
    "differs": "derived exactly here, and different",
    "mini": "testable at mini scale",
    "not here": "not reproducible here",
    "setting": "settings, which are chosen and not found",
}
METRICS = {
    "rfid": "rFID",
    "gfid": "gFID",
    "is": "IS",
    "gfid_guided": "gFID, guided",
    "is_guided": "IS, guided",
    "gflops": "Gflops",
    "throughput": "images a second",
    "tokens": "tokens",
    "dim": "channels",
    "tokenizer_parameters": "parameters, M",
    "parameters": "parameters, M",
    "generator_parameters": "parameters, M",
    "linear_probe": "linear probing, %",
    "speed-up": "speed-up",
    "iteration_ratio": "times fewer steps",
    "token_ratio": "times fewer tokens",
    "gfid_improvement": "gain in gFID",
    "gflops_saving": "Gflops saved, %",
    "training": "hours on 8 MI250",
    "training_steps": "steps, M",
    "training_epochs": "epochs",
    "loss_weight": "weight of a loss",
    "temperature": "temperature",
}
SETTINGS = ("tokens", "dim", "training_steps", "training_epochs", "loss_weight", "temperature")

# Metric -> pages on which it is looked into at mini scale, the first of them that exists; {} is the paper's table.
COUNTERPARTS = {
    "rfid": ("paper/table{}", "quantizers"),
    "gfid": ("paper/table{}", "train_generator"),
    "gfid_guided": ("paper/table{}", "train_generator"),
    "linear_probe": ("paper/table{}", "linear_probing"),
    "throughput": ("efficiency",),
    "training": ("efficiency",),
}
TITLES = {
    "quantizers": "reconstruction at mini scale",
    "train_generator": "generation at mini scale",
    "linear_probing": "linear probing at mini scale",
    "efficiency": "ratios of time on one machine",
    "method": "a derivation of its own",
    "evaluate": "both measures at mini scale",
}
# Why a number cannot be had here, by metric, and for all else of other systems.
REASONS = {
    "is": "needs Inception's classes of ImageNet",
    "is_guided": "needs Inception's classes of ImageNet",
    "throughput": "images a second of an AMD MI250; of this generator no time is measured here",
    "gflops": "this generator is not built here",
}
OTHERS = "another system's number, which the paper quotes"
OTHER_TOKENIZER = "another tokenizer: needs its weights, and ImageNet for them or for a SiT-L"

BATCH = 256  # of DiT, SiT and MAR, whose settings the paper says to follow
IMAGES = 1_281_167  # of ImageNet's training set

# What the main text leaves to its appendices, which could not be obtained: which, where it says so, what is there, and
# the page that has an answer of its own.
APPENDICES = (
    ("B.1", "Sec. 3.2", "derivation of the KL term", "method"),
    ("B.2", "Sec. 3.2", "GMMVQ: details and results", "quantizers"),
    ("C.1", "Sec. 4.1", "settings of the tokenizers' training", None),
    ("C.2", "Sec. 4.1", "settings of the generators' training and sampling", None),
    ("C.3", "Sec. 4.4", "protocol of linear probing", "linear_probing"),
    ("D.2", "Sec. 4.2", "MAR-H and SiT-XL at 512 px with 32 tokens", None),
    ("D.5", "Sec. 4.1", "precision and recall of all systems", "evaluate"),
    (
        "not legible",
        "Sec. 4.5",
        "ablations: product and residual quantization, GMMVQ, codebook size, latent size, temperature",
        "quantizers",
    ),
)


@dataclass(frozen=True)
class Line:
    """What becomes of one number.

    Attributes:
        number: The paper's entry.
        status: One of `STATUSES`.
        here: The value that was derived, "" where none was.
        remark: How it was derived, why it differs, or why it cannot be had.
        pages: Pages that look into it at mini scale, the best first.
    """

    number: dict
    status: str
    here: str = ""
    remark: str = ""
    pages: tuple[str, ...] = ()


# -- what is derived -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Derived:
    value: float
    digits: int  # decimals that the paper prints
    remark: str


def _counted(numbers: Numbers) -> dict[tuple[str, str, str], _Derived]:
    """Sizes and Gflops, by place, name and metric."""
    from softvq_lib.evaluation.generator_cost import generator_config, generator_table, parameter_count
    from softvq_lib.evaluation.parameters import METRICS as SIZES
    from softvq_lib.evaluation.parameters import parameter_table

    found = {}
    of_metric = {(n["place"], n["what"]): n["metric"] for n in numbers.paper if n["metric"] in SIZES}
    for row in parameter_table(numbers.paper):
        if row["paper"] is None or row["ours"] is None:
            continue
        key = (row["place"], row["what"], of_metric[row["place"], row["what"]])
        if "in_tab_3" in row:
            remark = "with the alignment head, no more than one codebook, and what nothing reads; "
            remark += f"{row['ours'] / 1e6:.2f} as built"
            found[key] = _Derived(row["in_tab_3"] / 1e6, 0, remark)
        else:
            found[key] = _Derived(row["ours"] / 1e6, 0, row["note"])
    for n in numbers.paper:
        if n["metric"] == "generator_parameters":
            count = parameter_count(generator_config(n["generator"], n["size"], 64, 32))
            found[n["place"], n["what"], n["metric"]] = _Derived(count / 1e6, 0, "on 64 tokens")
    for cost in generator_table(numbers.paper):
        if cost.macs is not None:
            counted = cost.as_printed / 1e9
            remark = f"{cost.macs / 1e9:.2f} with all products; counted are {cost.note}"
            if cost.what.startswith("MAR-H"):
                remark = f"by {100 * abs(counted / cost.paper - 1):.2f} %: the mask is random; {remark}"
            found[cost.place, cost.what, "gflops"] = _Derived(counted, 2, remark)
    return found


def _ratios(n: Numbers) -> dict[tuple[str, str, str], _Derived]:
    """What the text computes from the tables, computed from them again."""
    found = {}
    for name, (_, ours, base) in throughputs(n).items():
        low, high = range_of_ratio(ours, base)
        remark = f"{ours:.2f} / {base:.2f} by the tables, {low:.1f} to {high:.1f} with what rounding hides"
        found["Sec. 1", name, "speed-up"] = _Derived(ours / base, 0, remark)
    names = ("DiT-XL/2 and SiT-XL/2, KL", "DiT-XL and SiT-XL, SoftVQ")
    steps = [n("Sec. 4.1", what, "training_steps") for what in names]
    key = ("Sec. 1", "SoftVQ, training iterations", "iteration_ratio")
    found[key] = _Derived(steps[0] / steps[1], 1, f"{steps[0]:g}M / {steps[1]:g}M steps of Sec. 4.1")

    def gain(place: str, what: str, digits: int, table: str, base: str, ours: str) -> None:
        values = [n(table, name, "gfid") for name in (base, ours)]
        remark = f"{values[0]:.2f} − {values[1]:.2f} in {table}"
        found[place, what, "gfid_improvement"] = _Derived(values[0] - values[1], digits, remark)

    for model, base in (("DiT-XL", DIT), ("SiT-XL", SIT)):
        ours = f"{model}, SoftVQ-L, 32 tokens"
        gain("Sec. 4.2", f"{ours}, to {base}", 2, "Tab. 1", base, ours)
    gain("Sec. 4.3", "SiT-L, SoftVQ-S, 32 tokens, to KL", 1, "Tab. 3", "KL (SD-VAE)", "SoftVQ-S, 32 tokens")
    tokens = [n("Tab. 1", what, "tokens") for what in (SIT, "SiT-XL, SoftVQ-L, 32 tokens")]
    remark = f"{tokens[0]:.0f} / {tokens[1]:.0f}, positions of a latent to tokens"
    found["Sec. 4.2", "SoftVQ, 32 tokens, to KL", "token_ratio"] = _Derived(tokens[0] / tokens[1], 0, remark)
    few, many = (n("Tab. 1", what, "gflops") for what in ("MAR-H, SoftVQ-BL, 64 tokens", "MAR-H, KL"))
    key = ("Sec. 4.2", "MAR-H, SoftVQ-BL, 64 tokens, to KL", "gflops_saving")
    found[key] = _Derived(100 * (1 - few / many), 0, f"1 − {few:.2f} / {many:.2f}, not counted alike")
    for size, table in ((256, "Tab. 1"), (512, "Tab. 2")):
        values = [row["rfid"] for what, row in n.rows(table).items() if "SoftVQ" in what]
        for end, value in (("lowest", min(values)), ("highest", max(values))):
            found["Sec. 4.2", f"SoftVQ, {size} px, {end}", "rfid"] = _Derived(value, 2, f"the {end} of {table}")
    return found


# -- what is not -----------------------------------------------------------------------------------------------------


def _own(number: dict) -> bool:
    """Whether a number is of the paper's own tokenizers: SoftVQ, VQ-S or AE-S."""
    return "quantizer" in number or "SoftVQ" in number["what"]


@cache
def gpu_days(generator: str, size: str, tokens: int, dim: int, images: int) -> float:
    """Days of one H100 that a generator's training on so many latents takes, by its operations."""
    from softvq_lib.evaluation.generator_cost import generator_config, training_hours

    return training_hours(generator_config(generator, size, tokens, dim), images) / 24


_GENERATED = ("gfid", "is", "gfid_guided", "is_guided")


def _training(number: dict, n: Numbers) -> str:
    """What the training of a number's generator would cost at the paper's scale; "" for what generates nothing."""
    if number["metric"] not in _GENERATED or "tokens" not in number or "dim" not in number:
        return ""
    if number["place"] in ("Tab. 3", "Tab. 4"):
        generator, size, steps = "sit", "l", n("Sec. 4.1", "SiT-L, SoftVQ", "training_steps")
    else:
        generator, size = number["generator"], number["size"]
        steps = n("Sec. 4.1", "DiT-XL and SiT-XL, SoftVQ", "training_steps")
    images = round(steps * 1e6) * BATCH
    if generator == "mar":
        images = round(n("Sec. 4.1", "MAR-H, SoftVQ", "training_epochs")) * IMAGES
    return f"{gpu_days(generator, size, number['tokens'], number['dim'], images):.1f} GPU-days"


def trace(paper: Iterable[dict]) -> list[Line]:
    """Say of each number of the paper, in its order, what becomes of it here.

    Args:
        paper: As `results.read_paper` returns it.
    """
    numbers = Numbers(paper)
    derived = _counted(numbers) | _ratios(numbers)
    return [_line(number, derived, numbers) for number in numbers.paper]


def _line(number: dict, derived: dict[tuple[str, str, str], _Derived], numbers: Numbers) -> Line:
    place, what, metric, value = (number[name] for name in ("place", "what", "metric", "value"))
    if (place, what, metric) in derived:
        found = derived[place, what, metric]
        equal = round(found.value, found.digits) == value
        digits = max(found.digits, _SHOWN.get(metric, 0))
        return Line(number, "equal" if equal else "differs", f"{found.value:.{digits}f}", found.remark)
    if metric in SETTINGS:
        other = metric in ("tokens", "dim", "training_steps") and not _own(number)
        return Line(number, "setting", remark="of another system" if other else "")
    if metric == "training":
        return Line(number, "mini", pages=COUNTERPARTS[metric])
    if metric == "throughput":
        if what == SIT or number.get("generator") == "sit":
            return Line(number, "mini", pages=COUNTERPARTS[metric])
        return Line(number, "not here", remark=REASONS[metric])
    if not _own(number):
        remark = REASONS[metric] if metric == "gflops" else OTHER_TOKENIZER if place == "Tab. 3" else OTHERS
        return Line(number, "not here", remark=remark)
    cost = _training(number, numbers)
    if metric in COUNTERPARTS:
        pages = tuple(page.format(place.removeprefix("Tab. ")) for page in COUNTERPARTS[metric])
        return Line(number, "mini", remark=cost, pages=pages)
    return Line(number, "not here", remark=", and ".join(filter(None, [REASONS[metric], cost])))


# Decimals that a derived value is shown with, where the paper has fewer.
_SHOWN = {"parameters": 2, "tokenizer_parameters": 2, "generator_parameters": 2, "speed-up": 1}


# -- shown -----------------------------------------------------------------------------------------------------------


def summary(lines: Sequence[Line]) -> str:
    """Plain text: of how many numbers what becomes."""
    counts = Counter(line.status for line in lines)
    return "\n".join([f"of {len(lines)} numbers:", *(f"{counts[s]:5d}  {said}" for s, said in STATUSES.items())])


def _table(heads: Sequence[str], lines: Iterable[Sequence[object]], right: Sequence[int] = ()) -> str:
    """Write Markdown; columns of these numbers stand on the right."""
    rule = "|" + "".join("--:|" if k in right else "---|" for k in range(len(heads)))
    return "\n".join(["| " + " | ".join(heads) + " |", rule, *("| " + " | ".join(map(str, x)) + " |" for x in lines)])


def counts(lines: Sequence[Line]) -> str:
    """One line a place of the paper: how many numbers it has, and what becomes of them."""
    places = dict.fromkeys(line.number["place"] for line in lines)
    found = Counter((line.number["place"], line.status) for line in lines)
    rows = [[place, *(found[place, s] or "–" for s in STATUSES)] for place in places]
    rows.append(["**all**", *(sum(found[place, s] for place in places) for s in STATUSES)])
    heads = ["place", "equal", "different", "at mini scale", "not here", "settings"]
    return _table(heads, rows, range(1, 6))


def link(pages: Sequence[str], folder: Path) -> str:
    """Link the first of these pages that is there, from a page one folder down; "" where none is.

    Args:
        pages: Names without suffix, the most wanted first.
        folder: Where the pages are.
    """
    for page in pages:
        for path in sorted(Path(folder).glob(f"{page}.*")):
            title = TITLES.get(page) or f"Tab. {page[-1]} at mini scale"
            return f"[{title}](../{path.relative_to(folder).as_posix()})"
    return ""


def table(lines: Iterable[Line], place: str, folder: Path) -> str:
    """One line a number of a place: the paper's value, and what becomes of it.

    Args:
        lines: Of all places.
        place: The place that is shown, such as "Tab. 1".
        folder: Where the pages are that are linked.
    """
    rows, last = [], None
    for line in (line for line in lines if line.number["place"] == place):
        number = line.number
        what = "" if number["what"] == last else number["what"]
        last = number["what"]
        if line.status == "mini":
            said = f"see {link(line.pages, folder) or 'not run yet'}"
            said += f"; at the paper's scale {line.remark}" if line.remark else ""
        else:
            said = "; ".join(filter(None, [_SAID[line.status], line.remark]))
        rows.append([what, METRICS[number["metric"]], _printed(number), line.here or "–", said])
    return _table(["what", "number", "the paper", "derived here", "what becomes of it"], rows, (2, 3))


def _printed(number: dict) -> str:
    """A number with the decimals that its column has."""
    text = f"{number['value']:.{_DECIMALS.get(number['metric'], 0)}f}"
    return text if float(text) == number["value"] else str(number["value"])


_DECIMALS = {column.metric: column.digits for _, columns in TABLES.values() for column in columns}
_SAID = {"equal": "equal", "differs": "**different**", "not here": "not here", "setting": "a setting"}


def community(entries: Iterable[dict], paper: Iterable[dict]) -> str:
    """What others found with the released configuration, beside the paper's number.

    Args:
        entries: Numbers that others reported, as `results.read_paper` reads them.
        paper: The paper's.
    """
    values = {(entry["place"], entry["metric"]): entry["value"] for entry in entries}
    claimed = {"rfid": Numbers(paper)("Tab. 1", "SiT-XL, SoftVQ-L, 64 tokens", "rfid")}
    names = {"rfid": "rFID", "psnr": "PSNR, dB", "ssim": "SSIM"}
    rows = [
        [
            name,
            f"{claimed[metric]:.2f}" if metric in claimed else "–",
            f"{values['released weights', metric]:.2f}",
            f"{values['re-training', metric]:.2f}",
        ]
        for metric, name in names.items()
    ]
    return _table(["number", "the paper, Tab. 1", "released weights", "trained again"], rows, (1, 2, 3))


def appendices(folder: Path) -> str:
    """One line an appendix that the main text refers to: what it would say, and what this project has instead.

    Args:
        folder: Where the pages are that are linked.
    """
    rows = []
    for name, place, what, page in APPENDICES:
        said = "not checkable"
        if page and (found := link([page], folder)):
            said += f"; here: {found}"
        rows.append([name, place, what, said])
    return _table(["appendix", "cited in", "what is there", "here"], rows)
