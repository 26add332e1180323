"""Execute what is missing of a study: `python book/run_sweeps.py sweeps/mini`, a notebook by papermill for each cell.

What the ledger has is skipped, what was interrupted goes on, and nothing is committed. An execution that only makes
what a missing one reads is done again where its run is gone. The executed copy of each notebook stays in its run.
Several machines or processes share the work by index (`--part 1/4`), or one machine by `--jobs`; rows and ledger are
appended whole, so they may write to the same folder.
"""

import argparse
import fcntl
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # from a checkout that is not installed

import yaml  # noqa: E402

from softvq_lib.again import compare, table  # noqa: E402
from softvq_lib.arms import measured  # noqa: E402
from softvq_lib.config import nearest  # noqa: E402
from softvq_lib.sweeps import AGAIN, LEDGER, TRAINING, Arm, Cell, executed, read_plan  # noqa: E402
from softvq_lib.training.run import now, provenance, runs_folder  # noqa: E402

NOTEBOOKS = ROOT / "book"
GUESS = {"train_tokenizer": 200.0, "train_generator": 200.0, "evaluate": 120.0}  # seconds before anything is known


class Failed(RuntimeError):
    """An execution ended with an error."""


class Runner:
    """Executes cells, each at most once at a time.

    Args:
        results: Folder of rows and ledger.
        runs: Folder of runs.
        given: Parameters for every execution, such as the data set.
        threads: Of one execution.
    """

    def __init__(self, results: Path, runs: Path, given: dict[str, object], threads: int):
        self.results, self.runs, self.given, self.threads = results, runs, given, threads
        self.done = executed(results)
        self.locks: dict[str, threading.Lock] = {}
        self.guard = threading.Lock()
        self.processes: set[subprocess.Popen] = set()
        self.stopping = False
        self.origin = provenance()

    def made(self, cell: Cell) -> bool:
        """Whether what a training makes lies there, or what others measure was recorded."""
        if cell.experiment not in TRAINING:
            return cell.fingerprint in self.done
        manifest = self.runs / cell.run / "manifest.json"
        return manifest.exists() and json.loads(manifest.read_text()).get("status") == "finished"

    def missing(self, cells: Iterable[Cell]) -> list[Cell]:
        """What has to be executed for all of these to be in the ledger, needs before what needs them."""
        order: dict[str, Cell] = {}

        def add(cell: Cell, needed: bool) -> None:
            if cell.fingerprint in self.done and (not needed or self.made(cell)):
                return
            for need in cell.needs:
                add(need, True)
            order[cell.fingerprint] = cell

        for cell in cells:
            add(cell, False)
        return list(order.values())

    def run(self, cell: Cell) -> float:
        """Execute a cell unless another thread did meanwhile; return its seconds."""
        with self.guard:
            lock = self.locks.setdefault(cell.fingerprint, threading.Lock())
        with lock:
            if cell.fingerprint in self.done and self.made(cell):
                return 0.0
            return self._run(cell)

    def _run(self, cell: Cell) -> float:
        work = self.runs / ".cells"
        work.mkdir(parents=True, exist_ok=True)
        stem = f"{cell.run}-{cell.experiment}"
        parameters, copy, log = (work / f"{stem}.{end}" for end in ("yaml", "ipynb", "log"))
        values = cell.parameters | self.given | {"runs": str(self.runs), "results": str(self.results)}
        parameters.write_text(yaml.safe_dump(values, sort_keys=False))
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads), "JUPYTER_PREFER_ENV_PATH": "1"}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        command = [sys.executable, "-m", "papermill", "--no-progress-bar", "--log-output"]
        command += [str(NOTEBOOKS / f"{cell.experiment}.ipynb"), str(copy), "-f", str(parameters)]
        began = time.perf_counter()
        with open(log, "w") as file:
            if self.stopping:
                raise Failed(f"{cell.name}: not started")
            # A session of its own, so that stopping reaches the kernel as well.
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            self.processes.add(process)
            code = process.wait()
            self.processes.discard(process)
        if code:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            raise Failed(f"{cell.name}: {lines[-1] if lines else f'exit {code}'} (the whole log: {log})")
        home = self.runs / cell.run / "notebooks"
        home.mkdir(parents=True, exist_ok=True)
        copy.replace(home / copy.name.replace(f"{cell.run}-", ""))
        seconds = time.perf_counter() - began
        self._note(cell, seconds)
        return seconds

    def _note(self, cell: Cell, seconds: float) -> None:
        entry = {
            "experiment": cell.experiment,
            "run": cell.run,
            "fingerprint": cell.fingerprint,
            "seconds": round(seconds, 1),
            **self.where(),
        }
        append_line(self.results / LEDGER, entry)
        self.done[cell.fingerprint] = entry

    def where(self) -> dict[str, object]:
        """When, on what and with which code something was executed, for the ledger."""
        machine = f"{platform.machine()}, {os.cpu_count()} cores"
        code = {name: self.origin[name] for name in ("commit", "dirty", "code")}
        return {"ended": now(), "machine": machine, "threads": self.threads, **code}

    def stop(self) -> None:
        """Stop what is running, kernels included; a training goes on from its last checkpoint another time."""
        self.stopping = True
        for process in list(self.processes):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)


def seconds_by_experiment(entries: Iterable[dict]) -> dict[str, float]:
    """Mean seconds of an execution so far, by experiment."""
    times: dict[str, list[float]] = {name: [guess] for name, guess in GUESS.items()}
    seen: dict[str, list[float]] = {}
    for entry in entries:
        seen.setdefault(entry["experiment"], []).append(entry["seconds"])
    return {name: sum(values) / len(values) for name, values in (times | seen).items()}


def clock(seconds: float) -> str:
    """Seconds for people."""
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def chosen(arms: Sequence[Arm], asked: argparse.Namespace) -> list[Arm]:
    """The arms that the command line asks for, in order."""
    found = [arm for arm in arms if not arm.unavailable and (arm.first or not asked.first)]
    if asked.only:
        found = [arm for arm in found if any(part in (arm.sweep, arm.name) for part in asked.only)]
        unknown = set(asked.only) - {arm.sweep for arm in arms} - {arm.name for arm in arms}
        if unknown:
            sweeps = ", ".join(dict.fromkeys(arm.sweep for arm in arms))
            raise ValueError(f"--only {' '.join(sorted(unknown))}: no sweep or arm. Sweeps: {sweeps}; --list has all.")
    part, _, parts = asked.part.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise ValueError(f"--part {asked.part} is not allowed: give I/N with 1 <= I <= N, such as 1/4.")
    return found[int(part) - 1 :: int(parts)]


def interruptible() -> None:
    """Stop in order at SIGINT and SIGTERM, also where a shell in the background has the first one ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


def execute(runner: Runner, arms: Sequence[Arm], jobs: int) -> list[str]:
    """Execute what is missing of these arms, an arm at a time in each job; return what failed."""
    from tqdm import tqdm

    todo = {arm.name: runner.missing(arm.cells) for arm in arms}
    cells = {cell.fingerprint: cell for missing in todo.values() for cell in missing}
    expected = seconds_by_experiment(runner.done.values())
    left = {key: expected.get(cell.experiment, 60.0) for key, cell in cells.items()}
    failures: list[str] = []
    finished: set[str] = set()
    with tqdm(total=len(cells), unit="cell", disable=not cells) as bar:

        def work(arm: Arm) -> None:
            for cell in todo[arm.name]:
                if runner.stopping:
                    return
                try:
                    seconds = runner.run(cell)
                except Failed as error:
                    if not runner.stopping:
                        failures.append(str(error))
                        bar.write(f"FAILED {error}")
                    return
                with runner.guard:
                    if cell.fingerprint not in finished:
                        finished.add(cell.fingerprint)
                        left.pop(cell.fingerprint, None)
                        bar.update()
                    bar.set_postfix_str(f"about {clock(sum(left.values()) / jobs)} left")
                    if seconds:
                        bar.write(f"{cell.name}: {clock(seconds)}")

        with ThreadPoolExecutor(jobs) as pool:
            try:
                for future in [pool.submit(work, arm) for arm in arms]:
                    future.result()
            except KeyboardInterrupt:
                bar.write("stopping: what is interrupted goes on from its last checkpoint next time")
                runner.stop()
                raise
    return failures


def rerun(arm: Arm, plan: Sequence[Arm], results: Path, runs: Path, given: dict[str, object], threads: int) -> int:
    """Execute an arm in folders of its own, compare it with what is recorded, and record that; return 1 on a surprise.

    A rerun that was interrupted goes on; one that is finished is compared again.
    """
    runner = Runner(runs / "results", runs, given, threads)
    failures = execute(runner, [arm], 1)
    if failures:
        print(*failures, sep="\n", file=sys.stderr)
        return 1
    (apart,) = measured([arm], runs / "results")
    found = compare(measured(plan, results), apart)
    print(table(found))
    entry = {"arm": arm.name, "sweep": arm.sweep, "metrics": [asdict(one) for one in found], **runner.where()}
    append_line(results / AGAIN, entry)
    return int(any(one.inside is False for one in found))


def append_line(path: Path, entry: dict[str, object]) -> None:
    """Append an entry to a file of JSON lines that other processes append to as well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(entry, sort_keys=True) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and execute, or list, what is missing."""
    parser = argparse.ArgumentParser(prog="python book/run_sweeps.py", description=__doc__.splitlines()[0])
    parser.add_argument("sweeps", nargs="+", type=Path, help="sweep files, or folders of them")
    parser.add_argument("--results", type=Path, help="folder of rows and ledger; default: book/results/<folder's name>")
    parser.add_argument("--runs", type=Path, help="folder of runs; default: as for the notebooks")
    parser.add_argument("--dataset", help="in place of the parameter files' data set")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these sweeps or arms")
    parser.add_argument("--first", action="store_true", help="only the first pass")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="the I-th of N parts of the arms")
    parser.add_argument("--jobs", type=int, default=1, help="executions at a time (default 1)")
    parser.add_argument("--threads", type=int, help="threads of each (default: cores / jobs)")
    parser.add_argument(
        "--again", metavar="ARM", help="run this arm once more, apart, and hold it against what is recorded of it"
    )
    parser.add_argument("--list", action="store_true", help="show arms and what is missing of each; run nothing")
    asked = parser.parse_args(arguments)
    try:
        files = [file for path in asked.sweeps for file in (sorted(path.glob("*.yaml")) if path.is_dir() else [path])]
        if not files or min(asked.jobs, asked.threads or 1) < 1:
            raise ValueError("give sweep files, or a folder of them, and at least one job and thread.")
        scale = asked.sweeps[0] if asked.sweeps[0].is_dir() else asked.sweeps[0].parent
        results = (asked.results or NOTEBOOKS / "results" / scale.resolve().name).resolve()
        plan = read_plan(files, ROOT)
        arms = chosen(plan, asked)
        again = next((arm for arm in plan if arm.name == asked.again), None)
        if asked.again and again is None:
            raise ValueError(
                f"--again {asked.again}: no arm{nearest(asked.again, [a.name for a in plan])} --list has all."
            )
    except ValueError as error:
        sys.exit(f"error: {error}")
    runs = runs_folder(str(asked.runs) if asked.runs else None)
    given = {"dataset": str(Path(asked.dataset).expanduser().absolute())} if asked.dataset else {}
    threads = asked.threads or max(1, (os.cpu_count() or 1) // asked.jobs)
    if again:
        sys.exit(rerun(again, plan, results, runs / ".again" / again.name, given, threads))
    runner = Runner(results, runs, given, threads)
    if asked.list:
        for arm in arms:
            missing = ", ".join(cell.experiment for cell in runner.missing(arm.cells)) or "nothing"
            print(f"{arm.sweep:14}{arm.name:44}missing: {missing}")
        return
    interruptible()
    try:
        failures = execute(runner, arms, asked.jobs)
    except KeyboardInterrupt:
        sys.exit(130)
    if failures:
        again = shlex.join([sys.executable, *sys.argv])
        sys.exit("\n".join(["", f"{len(failures)} failed:", *failures, f"Once mended, go on with: {again}"]))


if __name__ == "__main__":
    main()
