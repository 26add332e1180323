"""Kill training runs and start them again: `python tests/faults.py KILLS SEED FOLDER [KIND]` prints a report in JSON.

One process imports everything; each run is a fork of it that is really killed by SIGKILL: at a random moment, or at a
chosen system call of those that make the run's files, half of them inside checkpoint writes. A run is started again
until it ends, and its files are then compared byte by byte with those of a run that nobody disturbed.
"""

import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

# Where the writing of files can be cut: each is one system call.
CALLS = ("fsync", "replace", "rename", "unlink", "rmdir")

# Every second checkpoint falls into the middle of a row of metrics.
TOKENIZER = {
    "dataset": "digits",
    "tokens": 4,
    "batch_size": 4,
    "limit": 64,
    "val_images": 8,
    "steps": 12,
    "checkpoint_every": 2,
    "log_every": 4,
    "workers": 2,
    "flip": True,
    "adversarial": "patch",
    "adversarial_start": 2,
    "adversarial_warmup": 4,
    "run": "run",
}

# Both flips are encoded; a checkpoint falls into the middle of a row of metrics, and of an epoch.
GENERATOR = {
    "dataset": "digits",
    "limit": 30,
    "flip": True,
    "batch_size": 4,
    "val_images": 8,
    "steps": 12,
    "checkpoint_every": 2,
    "log_every": 4,
    "workers": 0,
    "sample_steps": 2,
    "run": "run",
}


def tokenizer() -> tuple[Callable, dict]:
    """The tokenizer's training function and what it is given; its data are read once, before the forks."""
    from softvq_lib.data import DataConfig, open_dataset
    from softvq_lib.training import train

    open_dataset(DataConfig(dataset=TOKENIZER["dataset"]), 32)
    return train, TOKENIZER


def generator() -> tuple[Callable, dict]:
    """The generator's training function and what it is given; each run encodes the latents for itself."""
    from softvq_lib.training.generator import train_generator

    train, _ = tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        made = train(dataset="digits", tokens=4, steps=2, batch_size=4, limit=64, val_images=8, workers=0, runs=folder)
        kept = Path(sys.argv[3]) / "tokenizer"
        shutil.copytree(made.path / "tokenizer", kept)
    return train_generator, GENERATOR | {"tokenizer": str(kept)}


KINDS = {"tokenizer": tokenizer, "generator": generator}
# In the folder of runs and in that of each run, these tell when and where it was made; the last two are ours.
CIRCUMSTANCES = ("timings.jsonl", "log.txt", "manifest.json", "config.json", ".lock", "output.txt", "calls.json")


def deterministic(runs: Path) -> dict[str, bytes]:
    """The files of finished runs and their latents that must not depend on interruptions."""
    files = {path.relative_to(runs): path for path in sorted(runs.rglob("*")) if path.is_file()}
    return {
        place.as_posix(): path.read_bytes()
        for place, path in files.items()
        if not (len(place.parts) <= 2 and place.name in CIRCUMSTANCES)
    }


class Calls:
    """Notes the system calls that make a run's files, and kills the process at one of them.

    A call has a name such as "fsync run/checkpoints/step-#.safetensors": before the file gets its own name, with only
    half of its bytes on the disk.

    Args:
        runs: Folder of the runs; calls elsewhere do not count.
        deadly: Name of a call, and which one of this name is the last thing that the process does. None: live on.
    """

    def __init__(self, runs: Path, deadly: tuple[str, int] | None):
        self.runs, self.deadly = runs, deadly
        self.made: Counter[str] = Counter()
        for call in CALLS:
            setattr(os, call, self.watch(call, getattr(os, call)))

    def watch(self, call: str, function: Callable) -> Callable:
        def watched(target, *others, **options):
            if options.get("dir_fd") is None:
                self.see(call, target)
            return function(target, *others, **options)

        return watched

    def see(self, call: str, target: int | str | Path) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else target)
        if not path.is_relative_to(self.runs):
            return
        place = path.relative_to(self.runs).as_posix()
        name = f"{call} {re.sub('[0-9]+', '#', place.replace('/.', '/').lstrip('.').removesuffix('.part'))}"
        self.made[name] += 1
        if self.deadly == (name, self.made[name]):
            if call == "fsync" and path.is_file():
                os.ftruncate(target, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)


def start(
    train: Callable, parameters: dict, kill_at: float | None = None, deadly: tuple[str, int] | None = None
) -> str:
    """Run `train(**parameters)` in a fork; return how it ended: "finished", "killed", or "failed: ..."."""
    runs = Path(parameters["runs"])
    child = os.fork()
    if child == 0:
        with open(runs / "output.txt", "a") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        try:
            calls = Calls(runs, deadly)
            train(**parameters)
            (runs / "calls.json").write_text(json.dumps(calls.made))
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    ends = time.monotonic() + (kill_at if kill_at is not None else 600)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > ends:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            break
        time.sleep(0.002)
    if os.WIFSIGNALED(status):
        return "killed" if os.WTERMSIG(status) == signal.SIGKILL else f"failed: signal {os.WTERMSIG(status)}"
    return "finished" if os.WEXITSTATUS(status) == 0 else "failed: see output.txt"


def campaign(train: Callable, parameters: dict, kills: int, seed: int, folder: Path) -> dict:
    """Kill runs `kills` times in all; return what happened."""
    rng = random.Random(seed)
    whole = folder / "whole"
    whole.mkdir(parents=True)
    began = time.monotonic()
    if start(train, {**parameters, "runs": str(whole)}) != "finished":
        return {"error": (whole / "output.txt").read_text()[-3000:]}
    lasts = time.monotonic() - began
    made = json.loads((whole / "calls.json").read_text())
    of_checkpoints = [name for name in made if "checkpoints/" in name]
    others = [name for name in made if name not in of_checkpoints]
    expected = deterministic(whole)
    where: Counter[str] = Counter()
    report = {"runs": 0, "differing": [], "files": sorted(expected), "calls": made}
    while where.total() < kills:
        broken = folder / f"broken-{report['runs']}"
        broken.mkdir()
        for attempt in range(8):  # then it is left in peace, so that every run ends
            at = deadly = None
            if attempt < 7 and where.total() < kills:
                inside = sum(count for name, count in where.items() if name in of_checkpoints)
                if 2 * inside <= where.total():
                    # Those that have had least; the first few of a process, so that a run near its end has them too.
                    name = min(rng.sample(of_checkpoints, len(of_checkpoints)), key=where.__getitem__)
                    deadly = name, rng.randint(1, 3)
                elif rng.random() < 0.5:
                    deadly = rng.choice(others), 1
                else:
                    at = rng.uniform(0.02, 0.8) * lasts
            ended = start(train, {**parameters, "runs": str(broken)}, at, deadly)
            if ended == "finished":
                break
            if ended != "killed":
                return {**report, "error": (broken / "output.txt").read_text()[-3000:]}
            where[deadly[0] if deadly else "at any time"] += 1
        found = deterministic(broken)
        names = sorted({*expected, *found})
        report["differing"] += [f"{broken.name}/{name}" for name in names if expected.get(name) != found.get(name)]
        report["runs"] += 1
    inside = sum(count for name, count in where.items() if name in of_checkpoints)
    return {"kills": where.total(), "inside_a_write": inside, "where": dict(where.most_common()), **report}


if __name__ == "__main__":
    # Heavy imports once, before the forks.
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import timm  # noqa: F401
    import torch
    import torchvision  # noqa: F401

    torch.set_num_threads(1)
    kills, seed, folder, kind = [*sys.argv[1:], "tokenizer"][:4]
    print(json.dumps(campaign(*KINDS[kind](), int(kills), int(seed), Path(folder)), indent=1))
