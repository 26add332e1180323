"""Tables in Markdown, from results rows and nothing else."""

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from softvq_lib.style import QUANTIZER_NAMES
from softvq_lib.weights import sha256


def quantizer_label(config: dict) -> str:
    """Name a recorded run by its quantizer and what is special about it."""
    parts = [QUANTIZER_NAMES[config["quantizer"]]]
    if config["quantizer"] == "softvq" and config["posterior"] != "released":
        parts.append(config["posterior"])
    if config.get("vq_ema"):
        parts.append("with remedies")
    for name, word in (("product", "groups"), ("residual", "levels")):
        if config.get(name, 1) > 1:
            parts.append(f"{config[name]} {word}")
    return ", ".join(parts)


def _by_run(rows: list[dict]) -> list[dict[str, dict]]:
    """Group measured rows by run, and within it by metric; a paper's number never gets in."""
    runs: dict[str, dict[str, dict]] = {}
    for row in rows:
        if row["source"] == "measured":
            runs.setdefault(row["run"], {})[row["metric"]] = row
    return list(runs.values())


def _interval(row: dict, digits: int) -> str:
    value = f"{row['value']:.{digits}f}"
    return value if row["low"] is None else f"{value} [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"


def reconstruction(rows: list[dict]) -> str:
    """One line a recorded run: what it is, PSNR beside PCA with intervals, codebook use, training time."""
    runs = _by_run(rows)
    if not runs:
        return "*No rows have been recorded.*"
    lines = [
        "| quantizer | data | tokens × dim | steps | PSNR, dB | PCA 16 | PCA 64 | used | perplexity | minutes | n |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for metrics in runs:
        row = metrics["psnr"]
        config = row["config"]
        pca = [_interval(metrics[f"psnr_pca_{n}"], 2) if f"psnr_pca_{n}" in metrics else "–" for n in (16, 64)]
        cells = [
            quantizer_label(config),
            f"{row['data']}, {config['image_size']} px",
            f"{config['tokens']} × {config['dim']}",
            f"{config['steps']:,}",
            _interval(row, 2),
            *pca,
            f"{100 * metrics['usage']['value']:.0f} %" if "usage" in metrics else "–",
            f"{metrics['perplexity']['value']:.0f} of {config['codebook_size']}" if "perplexity" in metrics else "–",
            f"{row['train_seconds'] / 60:.1f}",
            f"{row['n']:,}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# Measurements of generated images and their column heads.
_JUDGED = {
    "class_agreement": "class agreement",
    "precision": "precision",
    "recall": "recall",
    "copied": "copied",
    "diversity": "diversity",
}


def generation(rows: list[dict]) -> str:
    """One line a recorded generator: what it is, its held-out loss, what the judge found, training time."""
    runs = _by_run(rows)
    if not runs:
        return "*No rows have been recorded.*"
    judged = [name for name in _JUDGED if any(name in metrics for metrics in runs)]
    heads = ["generator", "data", "tokens × dim", "steps", "guidance", "held-out loss", *map(_JUDGED.get, judged)]
    lines = ["| " + " | ".join([*heads, "minutes"]) + " |", "|---|---|---|--:|--:|--:|" + "--:|" * (len(judged) + 1)]
    for metrics in runs:
        row = metrics["val_loss"]
        config = row["config"]
        cells = [
            f"{config['generator'].upper().replace('IT', 'iT')}, {config['size']}",
            row["data"],
            f"{config['tokens']} × {config['dim']}",
            f"{config['steps']:,}",
            f"{config.get('sampling_guidance_scale', 1.0):g}",
            f"{row['value']:.3f}",
            *(_interval(metrics[name], 3) if name in metrics else "–" for name in judged),
            f"{row['train_seconds'] / 60:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def forward_cost(rows: list[dict]) -> str:
    """One line a measured forward pass: milliseconds a batch to encode and decode, and memory."""
    runs = _by_run([row for row in rows if row["run"].startswith("forward-")])
    if not runs:
        return "*No rows have been recorded.*"
    lines = [
        "| preset | image | tokens | precision | batch | encode, ms | decode, ms | to timm's | to timm's "
        "| of peak | of peak | peak MiB | weights, MiB |",
        "|---|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for metrics in runs:
        config = metrics["peak_mib"]["config"]
        cells = [
            config["preset"],
            f"{config['image_size']} px",
            f"{config['tokens']}",
            config["precision"],
            f"{config['batch_size']}",
            *(f"{1000 * metrics[name]['value']:.0f}" for name in ("encode_seconds", "decode_seconds")),
            *(f"{metrics[name]['value']:.2f}×" for name in ("encode_ratio", "decode_ratio")),
            *(f"{100 * metrics[name]['value']:.0f} %" for name in ("encode_peak_share", "decode_peak_share")),
            *(f"{metrics[name]['value']:.0f}" for name in ("peak_mib", "weights_mib")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def training_stages(rows: list[dict]) -> str:
    """One line a stage of a training step, one column a measured workload: milliseconds, forward + backward."""
    runs = _by_run([row for row in rows if row["run"].startswith("training-")])
    if not runs:
        return "*No rows have been recorded.*"
    heads = []
    for metrics in runs:
        config = metrics["seconds"]["config"]
        heads.append(f"{config['workload']}, {config['image_size']} px, batch {config['batch_size']}, ms | share")
    lines = ["| stage | " + " | ".join(heads) + " |", "|---|" + "--:|--:|" * len(runs)]
    stages = dict.fromkeys(name.split("_")[1] for metrics in runs for name in metrics if name.startswith("stage_"))
    for stage in stages:
        cells = [stage]
        for metrics in runs:
            names = (f"stage_{stage}{half}" for half in ("", "_forward", "_backward"))
            parts = [metrics[name]["value"] for name in names if name in metrics]
            cells.append(" + ".join(f"{1000 * part:.0f}" for part in parts))
            cells.append(f"{100 * sum(parts) / metrics['seconds']['value']:.0f} %")
        lines.append("| " + " | ".join(cells) + " |")
    totals = (f"{1000 * m['seconds']['value']:.0f} | {m['images_per_second']['value']:.1f} images/s" for m in runs)
    return "\n".join([*lines, "| whole step | " + " | ".join(totals) + " |"])


def training_ratio(rows: list[dict]) -> str:
    """One line a plain loop that training steps are measured against: seconds, ratio with its interval, agreement."""
    runs = _by_run([row for row in rows if row["run"].startswith("plain-")])
    if not runs:
        return "*No rows have been recorded.*"
    loops = {"each": "a reconstruction for each loss", "shared": "one reconstruction for all losses"}
    lines = [
        "| workload | plain loop | ours, s | plain, s | time ratio | terms differ by |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for metrics in runs:
        config = metrics["time_ratio"]["config"]
        seconds = (f"{metrics[name]['value']:.2f}" for name in ("seconds", "against_seconds"))
        cells = [config["workload"], loops[config["against"]], *seconds, _interval(metrics["time_ratio"], 2)]
        lines.append("| " + " | ".join([*cells, f"{metrics['difference']['value']:.0e}"]) + " |")
    return "\n".join(lines)


def run_shares(rows: list[dict]) -> str:
    """One line a training run: what share of its time it waited for data, and wrote checkpoints."""
    runs = _by_run([row for row in rows if row["run"].startswith("shares-")])
    if not runs:
        return "*No rows have been recorded.*"
    lines = ["| run | waiting for data | writing checkpoints |", "|---|--:|--:|"]
    for metrics in runs:
        shares = (metrics.get(name) for name in ("data_share", "checkpoint_share"))
        cells = ["–" if share is None else f"{100 * share['value']:.1f} %" for share in shares]
        lines.append("| " + " | ".join([metrics["data_share"]["config"]["run"], *cells]) + " |")
    return "\n".join(lines)


def quantizer_cost(rows: list[dict]) -> str:
    """One line a comparison of quantizers: processor time and memory, ours against theirs, ratios with intervals."""
    runs = _by_run([row for row in rows if row["run"].startswith("quantizer-")])
    if not runs:
        return "*No rows have been recorded.*"
    lines = [
        "| ours | against | codes | s | s | time ratio | extra MiB | extra MiB | memory ratio |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]

    def value(metrics: dict[str, dict], name: str, digits: int) -> str:
        return _interval(metrics[name], digits) if name in metrics else "–"

    for metrics in runs:
        config = metrics["time_ratio"]["config"]
        digits = {"seconds": 3, "against_seconds": 3, "time_ratio": 2, "mib": 0, "against_mib": 0, "memory_ratio": 2}
        cells = [config["subject"], config["against"], f"{config['codes']:,}"]
        lines.append("| " + " | ".join(cells + [value(metrics, name, d) for name, d in digits.items()]) + " |")
    for metrics in _by_run([row for row in rows if row["run"].startswith("memory-")]):
        row = metrics["mib"]
        lines.append(f"| {row['config']['subject']} | | {row['config']['codes']:,} | | | | {row['value']:.0f} | | |")
    return "\n".join(lines)


def trace_cost(rows: list[dict]) -> str:
    """One line a way to compute the Fréchet distance that ours is compared with: seconds, ratio, difference."""
    runs = _by_run([row for row in rows if row["run"].startswith("trace-")])
    if not runs:
        return "*No rows have been recorded.*"
    lines = [
        "| dimensions | against | ours, s | theirs, s | time ratio | distances differ by |",
        "|--:|---|--:|--:|--:|--:|",
    ]
    for metrics in runs:
        config = metrics["time_ratio"]["config"]
        seconds = [f"{metrics[name]['value']:.3g}" for name in ("seconds", "against_seconds")]
        cells = [f"{config['width']:,}", config["against"], *seconds, _interval(metrics["time_ratio"], 2)]
        lines.append("| " + " | ".join([*cells, f"{metrics['difference']['value']:.0e}"]) + " |")
    return "\n".join(lines)


_NAMED = ("torch", "timm", "numpy")  # packages whose versions are shown
_MOST = 3  # commits, code hashes and versions that are named each; of more their number is


def provenance(rows: list[dict]) -> str:
    """One sentence on where rows come from: commits, code, devices, versions, dates, data; short for many rows."""
    if not rows:
        return "*No rows have been recorded.*"

    def few(values: Iterable[str]) -> str:
        count = Counter(values)
        named = sorted(sorted(count), key=lambda value: -count[value])[:_MOST]
        more = len(count) - len(named)
        return ", ".join(sorted(named)) + (f" and {more} more" if more else "")

    commits = few(str(row["commit"])[:9] + ("+" if row["dirty"] else "") for row in rows)
    days = sorted({row["date"][:10] for row in rows})
    packages = [name for name in _NAMED if any(name in row["packages"] for row in rows)]
    versions = ", ".join(f"{n} {few(row['packages'].get(n, '?') for row in rows)}" for n in packages)
    said = [
        f"{len(rows)} measured row{'s' * (len(rows) > 1)}",
        f"commit {commits} (+: with changes since), code {few(row['code'][:9] for row in rows)}",
        few(row["device"] for row in rows),
        few(row["precision"] for row in rows),
        f"Python {few(row['python'] for row in rows)}, {versions}",
        " to ".join(dict.fromkeys((days[0], days[-1]))),
        "data " + few(f"{row['data']} {row['data_fingerprint'][:12]}".strip() for row in rows),
    ]
    return f"*Provenance: {'; '.join(said)}.*"


def derived_provenance(paths: Iterable[Path], by: Iterable[Callable] = ()) -> str:
    """One sentence on what was computed and not measured: the files that were read, and the functions that did it.

    Args:
        paths: Files; the first digits of their sha256 are shown.
        by: Functions that the numbers come from.
    """
    files = ", ".join(f"{path.name} (sha256 {sha256(path)[:12]})" for path in map(Path, paths))
    functions = ", ".join(f"`{function.__module__}.{function.__qualname__}`" for function in by)
    return f"*Provenance: derived, nothing was measured; from {files}{f'; by {functions}' if functions else ''}.*"


def parameter_counts(paper: list[dict]) -> str:
    """Parameters in millions of presets that the paper's rows name: ours, with the unused patch embedding, theirs."""
    import torch

    from softvq_lib.tokenizers import Tokenizer

    lines = [f"{'preset':8}{'ours, M':>10}{'+ unused, M':>13}{'paper, M':>10}"]
    for row in (row for row in paper if row["metric"] == "parameters"):
        with torch.device("meta"):
            tokenizer = Tokenizer.from_preset(row["preset"], tokens=64)
        count = sum(parameter.numel() for parameter in tokenizer.parameters())
        unused = tokenizer.decoder.width * (3 * tokenizer.config.patch_size**2 + 1)
        lines.append(f"{row['preset']:8}{count / 1e6:10.2f}{(count + unused) / 1e6:13.2f}{row['value']:10.0f}")
    return "\n".join(lines)


def parameters(rows: list[dict]) -> str:
    """One line an entry of `parameter_table`: ours in millions, and the paper's number in a column of its own."""
    lines = [
        "| tokenizer | tokens × dim | ours, M | with unused parts, M | what is counted | the paper, M |",
        "|---|--:|--:|--:|---|--:|",
    ]
    for row in rows:
        counts = (row["ours"], row["ours_with_unused"])
        cells = [
            row["what"],
            f"{row['tokens']} × {row['dim']}",
            *("–" if count is None else f"{count / 1e6:.2f}" for count in counts),
            row["note"],
            "–" if row["paper"] is None else f"{row['paper']} ({row['place']})",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
