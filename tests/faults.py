"""Kill training runs and start them again: `python tests/faults.py KILLS SEED FOLDER` prints a report in JSON.

One process imports everything; each run is a fork of it that is really killed by SIGKILL, at a random moment or, every
second time, at one of the system calls of a checkpoint write. A run is started again until it ends, and its files are
then compared byte by byte with those of a run that nobody disturbed.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

# Where a checkpoint write can be cut: each is one system call that the writing code makes.
CALLS = ("fsync", "replace", "unlink")

TOKENIZER = {
    "dataset": "digits",
    "tokens": 4,
    "batch_size": 8,
    "limit": 64,
    "val_images": 8,
    "steps": 24,
    "checkpoint_every": 3,
    "log_every": 2,
    "workers": 2,
    "flip": True,
    "adversarial": "patch",
    "adversarial_start": 2,
    "adversarial_warmup": 4,
    "run": "run",
}


def deterministic(run: Path) -> dict[str, bytes]:
    """The files of a finished run that must not depend on interruptions: all but timings, log and manifest."""
    kept = {}
    for path in sorted(run.rglob("*")):
        if path.is_file() and path.name not in ("timings.jsonl", "log.txt", "manifest.json", "config.json", ".lock"):
            kept[path.relative_to(run).as_posix()] = path.read_bytes()
    return kept


def _die_inside_a_write(call: int) -> None:
    """Arrange that this process kills itself at the given system call made inside checkpoint writes."""
    from softvq_lib.training import checkpoint

    save, made, inside = checkpoint.save, 0, False

    def counted(function, name):
        def wrapper(*arguments, **options):
            nonlocal made
            if inside:
                made += 1
                if made == call:
                    if name == "fsync":  # half of the file has reached the disk
                        os.ftruncate(arguments[0], os.fstat(arguments[0]).st_size // 2)
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return wrapper

    def watched(*arguments, **options):
        nonlocal inside
        inside = True
        try:
            return save(*arguments, **options)
        finally:
            inside = False

    checkpoint.save = watched
    is_file = {"fsync": lambda fd: os.path.isfile(f"/proc/self/fd/{fd}")}
    for name in CALLS:
        function = getattr(os, name)
        wrapped = counted(function, name)
        if name == "fsync":
            setattr(os, name, lambda fd, f=function, w=wrapped: (w if is_file["fsync"](fd) else f)(fd))
        else:
            setattr(os, name, wrapped)


def start(train, parameters: dict, kill_at: float | None = None, kill_call: int | None = None) -> str:
    """Run `train(**parameters)` in a fork; return how it ended: "finished", "killed", or "failed: ..."."""
    child = os.fork()
    if child == 0:
        with open(Path(parameters["runs"]) / "output.txt", "a") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        try:
            if kill_call is not None:
                _die_inside_a_write(kill_call)
            train(**parameters)
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


def campaign(train, parameters: dict, kills: int, seed: int, folder: Path) -> dict:
    """Kill runs `kills` times in all; return what happened."""
    rng = random.Random(seed)
    whole = folder / "whole"
    whole.mkdir(parents=True)
    began = time.monotonic()
    if start(train, {**parameters, "runs": str(whole)}) != "finished":
        return {"error": (whole / "output.txt").read_text()[-3000:]}
    lasts = time.monotonic() - began
    expected = deterministic(whole / "run")
    report = {"kills": 0, "inside_a_write": 0, "runs": 0, "differing": [], "files": sorted(expected)}
    while report["kills"] < kills:
        broken = folder / f"broken-{report['runs']}"
        broken.mkdir()
        for attempt in range(8):  # then it is left in peace, so that every run ends
            peace = attempt == 7 or report["kills"] >= kills
            at, call = None, None
            if not peace and (attempt + report["runs"]) % 2:
                call = rng.randint(1, 30)
            elif not peace:
                at = rng.uniform(0.02, 0.8) * lasts
            ended = start(train, {**parameters, "runs": str(broken)}, at, call)
            if ended == "finished":
                break
            if ended != "killed":
                return {**report, "error": (broken / "output.txt").read_text()[-3000:]}
            report["kills"] += 1
            report["inside_a_write"] += call is not None
        found = deterministic(broken / "run")
        names = sorted({*expected, *found})
        differing = [name for name in names if expected.get(name) != found.get(name)]
        report["differing"] += [f"{broken.name}/{name}" for name in differing]
        report["runs"] += 1
    return report


if __name__ == "__main__":
    import datasets  # noqa: F401  (heavy imports once, before the forks)
    import timm  # noqa: F401
    import torch

    from softvq_lib.training import train

    torch.set_num_threads(1)
    print(json.dumps(campaign(train, TOKENIZER, int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))))
