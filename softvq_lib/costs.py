"""The efficiency experiment: time of tokenizers, their training, quantizers, generators, and the Fréchet distance."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from softvq_lib import config as strictly
from softvq_lib import results as rows_of
from softvq_lib.evaluation import forward_cost, quantizer_rows
from softvq_lib.evaluation.efficiency import Subject, peak_mib
from softvq_lib.evaluation.fidelity_cost import trace_rows
from softvq_lib.evaluation.throughput import Bench, throughput
from softvq_lib.evaluation.training_cost import WORKLOADS, run_shares, step_cost
from softvq_lib.generators import SIZES
from softvq_lib.tokenizers import PRESETS
from softvq_lib.training.engine import choose_device, device_name


@dataclass(frozen=True)
class EfficiencyConfig:
    """Which forward passes and which quantizers are measured.

    Attributes:
        parts: What is measured, separated by commas: `forward`, `training`, `quantizers`, `generators`, `fidelity`.
        preset: Size of the tokenizer.
        tokens: Latent tokens l.
        batch_sizes: Numbers of images, separated by commas.
        precisions: `fp32`, `bf16` or both, separated by commas.
        workloads: Training steps, rows of `WORKLOADS`, separated by commas.
        run_steps: Steps of a training run on files that tells the share of waiting for data; after it comes a run
            with all settings at their defaults, for the share of checkpoints. None: neither.
        bench_tokens: Tokens that the quantizers work on.
        bench_codes: Codes k of their codebook, of 32 channels.
        bench_memory: Measure their memory too, each in a process of its own, and SoftVQ's at `bench_large_codes`.
        bench_large_codes: Codes k of that last one.
        generator_size: Size of the SiT.
        generator_batch: Images at once that it samples and is trained on.
        generator_steps: Steps of its sampler in a round; the time of more is computed.
        generator_device: Where: `auto`, `cpu` or a torch device.
        peer_batch: Images at once beside diffusers' DiT.
        kl_width: Channels of the KL autoencoder that it is compared with; SD-VAE has 128.
        trace_width: Dimensions of the features whose Fréchet distance is timed.
        rounds: Passes timed of each.
        results: Folder whose `efficiency.jsonl` the measured rows are appended to. None: nothing is recorded.
    """

    parts: str = "forward,training,quantizers,generators,fidelity"
    preset: str = "tiny"
    tokens: int = 64
    batch_sizes: str = "1,4"
    precisions: str = "fp32"
    workloads: str = "tiny"
    run_steps: int | None = None
    bench_tokens: int = 256
    bench_codes: int = 512
    bench_memory: bool = False
    bench_large_codes: int = 65536
    generator_size: str = "tiny"
    generator_batch: int = 1
    generator_steps: int = 2
    generator_device: str = "cpu"
    peer_batch: int = 1
    kl_width: int = 8
    trace_width: int = 128
    rounds: int = 3
    results: str | None = None

    def __post_init__(self):
        for part in self.measured:
            strictly.one_of("parts", part, _PARTS)
        strictly.one_of("preset", self.preset, PRESETS)
        strictly.one_of("generator_size", self.generator_size, SIZES["sit"])
        for name in ("generator_batch", "generator_steps", "peer_batch", "kl_width", "trace_width"):
            strictly.at_least(name, getattr(self, name), 1)
        for workload in self.workloads.split(","):
            strictly.one_of("workloads", workload.strip(), WORKLOADS)
        strictly.at_least("run_steps", self.run_steps, 1)
        strictly.at_least("tokens", self.tokens, 1)
        for name in ("bench_tokens", "bench_codes", "bench_large_codes", "rounds"):
            strictly.at_least(name, getattr(self, name), 3 if name == "rounds" else 1)
        for precision in self.precisions.split(","):
            strictly.one_of("precisions", precision.strip(), ("fp32", "bf16"))
        if not all(size.strip().isdigit() and int(size) > 0 for size in self.batch_sizes.split(",")):
            raise ValueError(
                f"batch_sizes={self.batch_sizes!r}: give whole numbers above 0 with commas, such as '1,4'."
            )

    @property
    def measured(self) -> list[str]:
        """The names in `parts`."""
        return [part.strip() for part in self.parts.split(",")]


def efficiency(**values: object) -> list[dict]:
    """Measure on this machine's processor, record the rows if asked to, and return them.

    Args:
        values: Fields of `EfficiencyConfig`.

    Raises:
        ValueError: for a parameter that is unknown or out of range.
    """
    config = strictly.strict(EfficiencyConfig, values)
    rows = [row for part in config.measured for row in _PARTS[part](config)]
    if config.results:
        rows_of.append(Path(config.results) / "efficiency.jsonl", rows)
    return rows


def _rows(
    run: str, setting: dict, precision: str, rounds: int, values: dict[str, tuple | float], **other: str
) -> list[dict]:
    """Make one row a value; a value with an interval is (value, low, high). `other` replaces what rows usually say."""
    common = {
        "experiment": "efficiency",
        "run": run,
        "n": rounds,
        "seed": 0,
        "source": "measured",
        "data": "random numbers",
        "data_fingerprint": "",
        "config": setting,
        "config_hash": strictly.fingerprint(setting),
        "device": device_name(torch.device("cpu")),
        "precision": precision,
        **rows_of.origin(),
        **other,
    }
    rows = []
    for metric, value in values.items():
        value, low, high = value if isinstance(value, tuple) else (value, None, None)
        interval = "" if low is None else "95 % bootstrap over rounds"
        rows.append(
            rows_of.check({**common, "metric": metric, "value": value, "low": low, "high": high, "interval": interval})
        )
    return rows


def _forward_rows(config: EfficiencyConfig) -> list[dict]:
    rows = []
    for precision in map(str.strip, config.precisions.split(",")):
        for batch_size in map(int, config.batch_sizes.split(",")):
            cost = forward_cost(
                config.preset,
                batch_size=batch_size,
                tokens=config.tokens,
                precision=precision,
                rounds=config.rounds,
            )
            setting = {k: cost[k] for k in ("preset", "tokens", "image_size", "batch_size", "precision", "threads")}
            run = f"forward-{config.preset}-{config.tokens}-batch{batch_size}-{precision}"
            metrics = [f"{half}_{what}" for what in ("seconds", "ratio", "peak_share") for half in ("encode", "decode")]
            metrics += ["peak_mib", "weights_mib"]
            rows += _rows(run, setting, precision, config.rounds, {metric: cost[metric] for metric in metrics})
    return rows


def _training_rows(config: EfficiencyConfig) -> list[dict]:
    rows = []
    for workload in map(str.strip, config.workloads.split(",")):
        cost = step_cost(workload, rounds=config.rounds)
        setting = {"workload": workload, **cost["parameters"]}
        run, precision = f"training-{workload}-{cost['precision']}", cost["precision"]
        values = {name: cost[name] for name in ("seconds", "images_per_second")}
        values |= {f"stage_{name.replace(' ', '_')}": value for name, value in cost["stages"].items()}
        data = {"data": "shapes, JPEG files"}
        rows += _rows(run, setting | {"threads": cost["threads"]}, precision, config.rounds, values, **data)
        for passes, ratio in cost["ratio"].items():
            values = {"time_ratio": ratio, "seconds": cost["processor_seconds"]["ours"]}
            values |= {"against_seconds": cost["processor_seconds"][passes], "difference": cost["difference"][passes]}
            against = setting | {"against": passes, "threads": 1}
            rows += _rows(f"plain-{passes}-{workload}-{precision}", against, precision, config.rounds, values, **data)
    for name, shares in (run_shares("mini", config.run_steps) if config.run_steps else {}).items():
        setting = {"run": name, "steps": config.run_steps, "threads": torch.get_num_threads()}
        rows += _rows(f"shares-{name.replace(' ', '-')}", setting, precision, 1, shares, data=name)
    return rows


def _quantizer_rows(config: EfficiencyConfig) -> list[dict]:
    rows = []
    for pair in quantizer_rows(
        config.bench_tokens, config.bench_codes, rounds=config.rounds, memory=config.bench_memory
    ):
        setting = {k: pair[k] for k in ("subject", "against", "tokens", "codes", "dim", "threads")}
        run = f"quantizer-{pair['subject']}-against-{pair['against']}-{pair['tokens']}x{pair['codes']}"
        values = {"time_ratio": (pair["ratio"], pair["low"], pair["high"])}
        names = ("seconds", "against_seconds", "mib", "against_mib", "memory_ratio")
        values |= {name: float(pair[name]) for name in names if name in pair}
        rows += _rows(run, setting, "fp32", config.rounds, values)
    if config.bench_memory:
        subject = Subject(tokens=config.bench_tokens, codes=config.bench_large_codes)
        run = f"memory-{subject}-{subject.tokens}x{subject.codes}"
        rows += _rows(run, {"subject": str(subject), **asdict(subject)}, "fp32", 1, {"mib": peak_mib(subject)})
    return rows


def _generator_rows(config: EfficiencyConfig) -> list[dict]:
    device = choose_device(config.generator_device)
    bench = Bench(
        size=config.generator_size,
        preset=config.preset,
        kl_width=config.kl_width,
        batch_size=config.generator_batch,
        steps=config.generator_steps,
        rounds=config.rounds,
        device=str(device),
    )
    rows = []
    for found in throughput(bench, config.peer_batch):
        setting = asdict(found.bench) | {k: getattr(found, k) for k in ("name", "what", "against", "expected")}
        sizes = f"{bench.size}-{bench.preset}-batch{found.bench.batch_size}-{device.type}"
        values = {"time_ratio": (found.ratio, found.low, found.high)}
        values |= {name: getattr(found, name) for name in ("seconds", "against_seconds")}
        source = "derived" if found.derived else "measured"
        run = f"generator-{found.name}-{sizes}"
        rows += _rows(run, setting, "fp32", bench.rounds, values, device=device_name(device), source=source)
    return rows


def _fidelity_rows(config: EfficiencyConfig) -> list[dict]:
    rows = []
    for found in trace_rows(config.trace_width, features=2 * config.trace_width, rounds=config.rounds):
        setting = {name: found[name] for name in ("subject", "against", "width", "features", "threads")}
        values = {"time_ratio": (found["ratio"], found["low"], found["high"])}
        values |= {name: found[name] for name in ("seconds", "against_seconds", "difference")}
        run = f"trace-{found['width']}-against-{found['against']}"
        rows += _rows(run, setting, "fp64", config.rounds, values)
    return rows


# Parts of the experiment, in the order of the notebook.
_PARTS = {
    "forward": _forward_rows,
    "training": _training_rows,
    "quantizers": _quantizer_rows,
    "generators": _generator_rows,
    "fidelity": _fidelity_rows,
}
