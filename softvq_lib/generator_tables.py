"""Tables of what generators cost: multiply-accumulates (MACs) beside the paper's column, and measured times."""

from collections.abc import Iterable

from softvq_lib.evaluation.generator_cost import (
    CONVENTIONS,
    TOKENS,
    GeneratorCost,
    forward_macs,
    generator_config,
    parameter_count,
)

# The projector is dead weight of the authors' class of SiT, which their numbers count.
_PROJECTOR = {"dead_projector": True}
GENERATORS = {
    "DiT-XL": ("dit", "xl", {}),
    "SiT-XL": ("sit", "xl", {}),
    "SiT-XL with REPA's projector": ("sit", "xl", _PROJECTOR),
    "MAR-H": ("mar", "h", {}),
}
# What saves, and what it is compared with; both in one table of the paper.
SAVINGS = (
    ("Tab. 1", "DiT-XL, SoftVQ, 64 tokens", "DiT-XL/2, KL"),
    ("Tab. 1", "DiT-XL, SoftVQ, 32 tokens", "DiT-XL/2, KL"),
    ("Tab. 1", "SiT-XL, SoftVQ, 64 tokens", "SiT-XL/2, KL"),
    ("Tab. 1", "SiT-XL, SoftVQ, 32 tokens", "SiT-XL/2, KL"),
    ("Tab. 2", "SiT-XL, SoftVQ-BL, 64 tokens", "SiT-XL/2, KL"),
    ("Tab. 1", "MAR-H, SoftVQ-BL, 64 tokens", "MAR-H, KL"),
    ("Tab. 1", "MAR-H, SoftVQ-L, 32 tokens", "MAR-H, KL"),
)


def _table(heads: str, lines: Iterable[Iterable[str]], left: int) -> str:
    """Write Markdown with so many columns on the left and numbers in the others."""
    columns = heads.count("|") + 1
    rule = "|" + "---|" * left + "--:|" * (columns - left)
    return "\n".join([f"| {heads} |", rule, *("| " + " | ".join(cells) + " |" for cells in lines)])


def _giga(number: int | None) -> str:
    return "–" if number is None else f"{number / 1e9:,.2f}"


def macs_by_tokens() -> str:
    """Parameters and GMACs of a forward pass at 32, 64, 256 and 1024 tokens, in each convention."""
    lines = []
    for name, (generator, size, options) in GENERATORS.items():
        for tokens, dim in TOKENS.items():
            config = generator_config(generator, size, tokens, dim)
            macs = [_giga(forward_macs(config, convention, **options)) for convention in CONVENTIONS]
            lines.append([name, f"{tokens} × {dim}", f"{parameter_count(config) / 1e6:,.1f}", *macs])
    return _table("generator | tokens × dim | parameters, M | true | linear layers | timm's attention", lines, 1)


def macs_of_paper(costs: Iterable[GeneratorCost]) -> str:
    """One line a row of Tab. 1 and 2: GMACs, in truth and as the row was counted, beside the printed number."""
    lines = [
        [
            cost.what,
            cost.note,
            "–" if cost.tokens is None else str(cost.tokens),
            "–" if cost.parameters is None else f"{cost.parameters / 1e6:,.1f}",
            _giga(cost.macs),
            _giga(cost.as_printed),
            f"{cost.paper:.2f} ({cost.place})",
        ]
        for cost in costs
    ]
    heads = "generator, latents | what the paper counts | tokens | parameters, M | true GMACs | counted so | the paper"
    return _table(heads, lines, 2)


def savings(costs: Iterable[GeneratorCost]) -> str:
    """How many times fewer MACs SoftVQ's tokens take: like for like, and by the paper's columns."""
    rows = {(cost.place, cost.what): cost for cost in costs}
    lines = []
    for place, what, base in SAVINGS:
        few, many = rows[place, what], rows[place, base]
        printed = f"{many.paper:.2f} / {few.paper:.2f} = {many.paper / few.paper:.2f}× ({place})"
        like = f"{_giga(many.macs)} / {_giga(few.macs)} = {many.macs / few.macs:.2f}×"
        lines.append([what, base, like, printed])
    return _table("generator | against | like for like | by the paper's column", lines, 2)


# Comparison -> where the paper has such a ratio, as its rows say: metric, place, what, and what to divide it by.
_PAPER = {
    "image-32-256-250": ("speed-up", "Sec. 1", "32 tokens, 256 px", None),
    "image-64-256-250": ("speed-up", "Sec. 1", "64 tokens, 256 px", None),
    "image-64-512-250": ("speed-up", "Sec. 1", "64 tokens, 512 px", None),
    "training-encoding": ("training", "Sec. 4.2", "SiT-XL, KL, 400K steps", "SiT-XL, SoftVQ, 400K steps"),
}
# Where less than the other's time is wanted, and how much.
_TARGETS = {"diffusers-itself": "1", "diffusers-step": "≤ 1", "diffusers-sampling": "≤ 0.85", "guided": "≤ 1.70"}


def _paper_ratio(name: str, paper: list[dict]) -> str:
    if name not in _PAPER:
        return "–"
    metric, place, *whats = _PAPER[name]
    values = {row["what"]: row["value"] for row in paper if (row["metric"], row["place"]) == (metric, place)}
    value, divisor = (values[what] if what else 1 for what in whats)
    return f"{value / divisor:.3g}× ({place})"


def _comparisons(rows: list[dict], source: str, targets: bool) -> list[tuple[dict, list[str]]]:
    """Of each comparison of a source with a target, or without, the row of its ratio and the first cells of a line."""
    runs: dict[str, dict[str, dict]] = {}
    for row in rows:
        if row["run"].startswith("generator-") and row["source"] == source:
            runs.setdefault(row["run"], {})[row["metric"]] = row
    found = []
    for metrics in runs.values():
        ratio = metrics["time_ratio"]
        config = ratio["config"]
        seconds = [f"{metrics[name]['value']:.3g}" for name in ("seconds", "against_seconds")]
        if (config["name"] in _TARGETS) == targets:
            sizes = f"{config['size'].upper()}, {config['batch_size']}"
            found.append((ratio, [sizes, config["what"], config["against"], *seconds]))
    return found


def speed_ups(rows: list[dict], paper: list[dict]) -> str:
    """One line a comparison of token counts: how many times as fast, with interval, beside MACs and the paper.

    What was measured, and what was computed from measured times, stand in tables of their own.
    """
    heads = "SiT, batch | what | against | s | s | times as fast | by MACs | the paper"
    titles = {"measured": "", "derived": "Derived, for 250 steps, from the times of fewer and of decoding:\n\n"}
    tables = []
    for source, title in titles.items():
        lines = []
        for ratio, cells in _comparisons(rows, source, targets=False):
            fast = f"{1 / ratio['value']:.2f}× [{1 / ratio['high']:.2f}, {1 / ratio['low']:.2f}]"
            expected = ratio["config"]["expected"]
            by_macs = "–" if expected is None else f"{1 / expected:.2f}×"
            lines.append([*cells, fast, by_macs, _paper_ratio(ratio["config"]["name"], paper)])
        if lines:
            tables.append(title + _table(heads, lines, 3))
    return "\n\n".join(tables) or "*No rows have been recorded.*"


def step_costs(rows: list[dict]) -> str:
    """One line a measured comparison of steps: the share of the other's time, with interval, and what is wanted."""
    lines = []
    for ratio, cells in _comparisons(rows, "measured", targets=True):
        interval = f"{ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"
        lines.append([*cells, interval, _TARGETS[ratio["config"]["name"]]])
    if not lines:
        return "*No rows have been recorded.*"
    return _table("SiT, batch | what | against | s | s | time ratio | wanted", lines, 3)
