"""Time and memory of SoftVQ against its plain matrix form and against another library's hard VQ.

Sound on a busy machine: processor time instead of wall time, rounds in which every subject takes its turn, ratios of
medians with a bootstrap interval over rounds, and one subject measured against itself, whose ratio has to be 1. Memory
is the peak of a fresh process for each subject.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import numpy as np
import torch

from softvq_lib.config import at_least, one_of, strict
from softvq_lib.evaluation import statistics

IMPLEMENTATIONS = ("softvq_lib", "plain", "vector-quantize-pytorch")


@dataclass(frozen=True)
class Subject:
    """What is measured: forward and backward of one quantizer with all its losses, in fp32.

    Attributes:
        implementation: `softvq_lib`; `plain`, the same formula as matrices; `vector-quantize-pytorch`, that library's
            hard VQ with cosine similarity and moving-average codebook.
        posterior: Form of SoftVQ.
        kl: With the KL term.
        tokens: Tokens of a batch, b l.
        codes: Codes k.
        dim: Channels d.
    """

    implementation: str = "softvq_lib"
    posterior: str = "released"
    kl: bool = True
    tokens: int = 4096
    codes: int = 8192
    dim: int = 32

    def __post_init__(self):
        one_of("implementation", self.implementation, IMPLEMENTATIONS)
        for name in ("tokens", "codes", "dim"):
            at_least(name, getattr(self, name), 1)

    def __str__(self) -> str:
        if self.implementation == "vector-quantize-pytorch":
            return "vector-quantize-pytorch, cosine VQ"
        name = "plain" if self.implementation == "plain" else "SoftVQ"
        return f"{name} {self.posterior}, {'with' if self.kl else 'without'} KL term"


def work(subject: Subject, seed: int = 0) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """Build a subject; return a function that runs it once and gives z (tokens, dim) and the gradient of z_hat.

    Raises:
        ImportError: when the library to compare with is not installed.
    """
    from softvq_lib.tokenizers.plain import plain
    from softvq_lib.tokenizers.softvq import SoftVQ

    generator = torch.Generator().manual_seed(seed)
    z_hat = torch.randn(1, subject.tokens, subject.dim, generator=generator).requires_grad_()
    upstream = torch.randn(1, subject.tokens, subject.dim, generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if subject.implementation == "vector-quantize-pytorch":
            from vector_quantize_pytorch import VectorQuantize

            model = VectorQuantize(dim=subject.dim, codebook_size=subject.codes, use_cosine_sim=True)
        else:
            model = SoftVQ(subject.tokens, subject.dim, subject.codes, posterior=subject.posterior)

    def softvq() -> tuple[torch.Tensor, torch.Tensor | None]:
        z, losses = model.train(subject.kl)(z_hat)  # in evaluation there is no KL term
        return z, losses.get("kl")

    def matrices() -> tuple[torch.Tensor, torch.Tensor | None]:
        entropy_temperature = model.entropy_temperature if subject.kl else None
        return plain(subject.posterior, z_hat, model.codebook, model.temperature, entropy_temperature)

    def hard() -> tuple[torch.Tensor, torch.Tensor]:
        z, _, commitment = model(z_hat)
        return z, commitment.sum()

    forward = {"softvq_lib": softvq, "plain": matrices, "vector-quantize-pytorch": hard}[subject.implementation]

    def once() -> tuple[torch.Tensor, torch.Tensor]:
        z_hat.grad = None
        model.zero_grad(set_to_none=True)
        z, loss = forward()
        total = (z * upstream).sum()
        (total if loss is None else total + loss).backward()
        return z.detach()[0], z_hat.grad[0]

    return once


@contextmanager
def pinned(threads: int):
    """Compute on so many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def interleaved(subjects: dict[str, Callable[[], object]], rounds: int, threads: int = 1) -> dict[str, np.ndarray]:
    """Return processor seconds of each subject in each round, (rounds,), after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    with pinned(threads):
        for _ in range(rounds + 1):
            for name, run in subjects.items():
                start = time.process_time()
                run()
                seconds[name].append(time.process_time() - start)
    return {name: np.array(values[1:]) for name, values in seconds.items()}


def ratio_of_medians(ours: np.ndarray, theirs: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Return the ratio of medians of two subjects over the same rounds (n,), with a 95 % bootstrap interval.

    Raises:
        ValueError: for other than the same three rounds or more.
    """
    return statistics.ratio_of_medians(ours, theirs, seed=seed).triple


def peak_mib(subject: Subject, threads: int = 1) -> float:
    """Return the memory that one run adds to a fresh process at its peak, in MiB, inputs and codebook not counted.

    The process is warmed up on a small subject first, so that libraries and their threads do not count either.
    """
    call = f"report_peak({json.dumps(asdict(subject))!r}, {threads})"
    code = f"from softvq_lib.evaluation import efficiency; efficiency.{call}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the process that measures memory failed:\n{done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def report_peak(subject: str, threads: int) -> None:
    """Print what `peak_mib` returns, for a subject as JSON."""
    subject = strict(Subject, json.loads(subject))
    with pinned(threads):
        work(Subject(**asdict(subject) | {"tokens": 64, "codes": 64}))()
        run = work(subject)
        before = reset_peak()
        run()
        print((peak_bytes() - before) / 2**20)


def _status(field: str) -> int | None:
    """Bytes by name of this process's memory in Linux, None elsewhere."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))
    except (OSError, StopIteration):
        return None


def peak_bytes() -> int:
    """Return the most bytes that this process has had in memory since `reset_peak`."""
    import resource

    # The number of `resource` may be that of the process which started this one, where it was larger.
    other = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return _status("VmHWM:") or other


def reset_peak() -> int:
    """Forget the peak so far where the system can; return the bytes to count from."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return peak_bytes()
    return _status("VmRSS:") or peak_bytes()


def comparisons(tokens: int = 4096, codes: int = 8192, dim: int = 32) -> list[tuple[Subject, Subject]]:
    """Return the pairs to compare: ours and what it is measured against. The first is against itself."""
    size = {"tokens": tokens, "codes": codes, "dim": dim}

    def of(implementation: str, posterior: str = "released", kl: bool = True) -> Subject:
        return Subject(implementation, posterior, kl, **size)

    ours = [(form, kl) for form in ("released", "squared", "paper") for kl in (True, False)]
    pairs = [(of("plain"), of("plain"))]
    pairs += [(of("softvq_lib", *which), of("plain", *which)) for which in ours]
    pairs += [(of("softvq_lib", "released", False), of("plain"))]
    pairs += [(of("softvq_lib", "released", kl), of("vector-quantize-pytorch")) for kl in (False, True)]
    return pairs


def quantizer_rows(
    tokens: int = 4096, codes: int = 8192, dim: int = 32, *, rounds: int = 9, threads: int = 1, memory: bool = True
) -> list[dict[str, object]]:
    """Measure `comparisons`; those with a library that is not installed are left out.

    Returns:
        One row a pair: names, processor seconds (medians), ratio with its interval, and extra MiB of both with theirs.
    """
    runs: dict[Subject, Callable[[], object]] = {}
    pairs = []
    for pair in comparisons(tokens, codes, dim):
        try:
            runs |= {subject: work(subject) for subject in pair if subject not in runs}
        except ImportError:
            continue
        pairs.append(pair)
    control = "again"
    seconds = interleaved({**runs, control: runs[pairs[0][0]]}, rounds, threads)
    mib = {subject: peak_mib(subject, threads) for subject in runs} if memory else {}
    rows = []
    for ours, theirs in pairs:
        mine = seconds[control if ours == theirs else ours]
        ratio, low, high = ratio_of_medians(mine, seconds[theirs])
        row = {"subject": str(ours), "against": str(theirs), "seconds": float(np.median(mine))}
        row |= {"against_seconds": float(np.median(seconds[theirs])), "ratio": ratio, "low": low, "high": high}
        if memory:
            row |= {"mib": mib[ours], "against_mib": mib[theirs], "memory_ratio": mib[ours] / mib[theirs]}
        rows.append(row | {"rounds": rounds, "threads": threads, "tokens": tokens, "codes": codes, "dim": dim})
    return rows
