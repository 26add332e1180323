"""What training costs: a step by stage and beside a plain loop, and a run's share of waiting for data and of saving.

Stages are timed on the trainer itself: its methods and nets are watched from outside and compute what they always do.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from softvq_lib import config as strictly
from softvq_lib.data import Batch, DataConfig, DataSplits, open_dataset
from softvq_lib.data.shapes import ShapesSource
from softvq_lib.evaluation.efficiency import interleaved, ratio_of_medians
from softvq_lib.evaluation.plain_loop import PASSES, plain_step
from softvq_lib.losses.networks import build_networks
from softvq_lib.tokenizers import Tokenizer
from softvq_lib.training import Run, train
from softvq_lib.training.files import read_lines
from softvq_lib.training.tokenizer import CONFIGS, TokenizerTrainer

# Parameters of training with all terms of Eq. 7. Images are mirrored at random, as in the recipes, so that a teacher
# is asked anew at every step. The nets of `s` are the paper's with random weights, on which time does not depend.
_ALL = {"flip": True, "perceptual": "efflite1", "adversarial": "patch", "alignment": "efflite2"}
_ALL |= {"lr": 1e-4, "device": "cpu"}
WORKLOADS: dict[str, dict[str, object]] = {
    "tiny": {**_ALL, "preset": "tiny", "image_size": 32, "tokens": 16, "batch_size": 4},
    "mini": {**_ALL, "preset": "mini", "image_size": 64, "patch_size": 8, "tokens": 32, "batch_size": 16},
    "s": {
        **_ALL,
        **{"preset": "s", "image_size": 256, "tokens": 64, "batch_size": 1},
        **{"perceptual": "lpips", "adversarial": "dino", "alignment": "dinov2-b", "dry_run": True},
    },
}
STAGES = (
    "data",
    "teacher",
    "encoder",
    "quantizer",
    "decoder",
    "perceptual",
    "adversarial",
    "discriminator",
    "optimiser",
    "rest",
)
PICTURES = 256
# Largest difference of a term, relative to it or to 1, at which the plain loop counts as computing the same.
TOLERANCE = 0.02


class Stages:
    """Seconds of each stage: at any moment one of them is going on.

    Args:
        device: Waited for whenever a stage ends, where it is not the processor.
    """

    def __init__(self, device: torch.device):
        self.seconds: dict[str, float] = {}
        self.device, self.now, self.since = device, "rest", time.perf_counter()

    def enter(self, stage: str) -> str:
        """Begin a stage; return the one that ends by it."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        moment, before = time.perf_counter(), self.now
        self.seconds[before] = self.seconds.get(before, 0.0) + moment - self.since
        self.now, self.since = stage, moment
        return before

    def at_gradient(self, tensor: Tensor, stage: str) -> None:
        """Begin a stage when a backward pass has the gradient of a tensor of any shape."""

        def begin(gradient: Tensor) -> None:
            self.enter(stage)

        if tensor.requires_grad:
            tensor.register_hook(begin)

    def call(self, owner: object, name: str, stage: str) -> None:
        """Make every call of an object's method a stage."""
        called = getattr(owner, name)

        def timed(*arguments: object, **named: object) -> object:
            before = self.enter(stage)
            try:
                return called(*arguments, **named)
            finally:
                self.enter(before)

        setattr(owner, name, timed)

    def net(self, module: nn.Module, stage: Callable[[tuple], str]) -> None:
        """Make forward and backward passes of a module two stages, whose name its inputs tell."""
        left: list[str] = []

        def begin(module: nn.Module, inputs: tuple) -> None:
            left.append(self.enter(f"{stage(inputs)} forward"))

        def end(module: nn.Module, inputs: tuple, output: object) -> None:
            self.enter(left.pop())
            self.at_gradient(output[0] if isinstance(output, tuple) else output, f"{stage(inputs)} backward")

        module.register_forward_pre_hook(begin)
        module.register_forward_hook(end)


def watch(trainer: TokenizerTrainer) -> Stages:
    """Time the stages of a trainer's steps from now on; all terms of Eq. 7 are on."""
    stages = Stages(trainer.device)
    tokenizer, nets = trainer.bare.tokenizer, trainer.networks
    modules = {
        "encoder": (tokenizer.encoder, tokenizer.to_latent),
        "quantizer": (tokenizer.quantizer,),
        "decoder": (tokenizer.from_latent, tokenizer.decoder),
        "teacher": (nets.alignment,),  # its projector; the teacher itself is called through `seen`
        "perceptual": (nets.perceptual,),
    }
    for stage, those in modules.items():
        for module in those:
            stages.net(module, lambda inputs, stage=stage: stage)
    # On the way to the tokenizer's gradient its input requires one, in the discriminator's own step it does not.
    stages.net(nets.discriminator, lambda inputs: "adversarial" if inputs[0].requires_grad else "discriminator")
    # The losses of the pixels are differentiated down to the pixels: there these backward passes end.
    nets.perceptual.register_forward_pre_hook(lambda module, inputs: stages.at_gradient(inputs[1], "rest"))
    stages.call(trainer, "seen", "teacher forward")
    stages.call(trainer, "after_step", "discriminator forward")
    stages.call(trainer, "_accumulate", "rest")
    stages.call(trainer, "_update", "optimiser")
    return stages


def trainer_step(trainer: TokenizerTrainer, batch: Batch) -> dict[str, Tensor]:
    """Make one optimiser step as the trainer does; return the terms and gradient norms, scalars by name."""
    terms = trainer._update(batch)
    trainer.step += 1
    return terms


def stage_seconds(trainer: TokenizerTrainer, steps: int) -> list[dict[str, float]]:
    """Make steps on the trainer's own data; return the seconds of each stage in each of them, but for a first one."""
    stages = watch(trainer)
    batches = iter(trainer.batches(trainer.step))
    rows = []
    for _ in range(steps + 1):
        stages.enter("data")
        stages.seconds.clear()
        batch = next(batches)
        stages.enter("rest")
        trainer_step(trainer, batch)
        stages.enter("rest")
        rows.append(dict(stages.seconds))
    return rows[1:]


def write_pictures(folder: Path, image_size: int, count: int = PICTURES) -> Path:
    """Write pictures of shapes as JPEG files into a folder and return it."""
    folder.mkdir(parents=True)
    source = ShapesSource("train", image_size, count)
    for index in range(count):
        source[index][0].save(folder / f"{index}.jpg", quality=90)
    return folder


def build_trainer(parameters: dict[str, object], data: DataSplits) -> TokenizerTrainer:
    """Build the trainer that parameters describe, without a run on the disk."""
    tokenizer_config, data_config, loss_config, settings, _ = strictly.split(parameters, *CONFIGS)
    tokenizer_config = tokenizer_config.resolved()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        tokenizer = Tokenizer(tokenizer_config)
    networks = build_networks(loss_config, tokenizer_config, settings.seed)
    loss_config = loss_config.resolved(tokenizer_config.quantizer)
    return TokenizerTrainer(Run(Path(os.devnull), {}), tokenizer, networks, data, data_config, loss_config, settings)


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return the largest difference of a term, a scalar by name, that both have, relative to it or to 1."""
    both = ours.keys() & theirs.keys()
    each = [(ours[name] - theirs[name]).abs().double() / theirs[name].abs().clamp(min=1) for name in both]
    return float(torch.stack(each).max())  # NaN if one is


def step_cost(workload: str, *, rounds: int = 5, threads: int = 1, **changes: object) -> dict[str, object]:
    """Measure a training step by stage, and against plain loops in turns.

    Args:
        workload: Row of `WORKLOADS`.
        rounds: Steps measured of each, 3 or more.
        threads: Of the comparison, which counts processor time. The stages are measured by the clock, on all threads.
        changes: Parameters of training in place of the workload's.

    Returns:
        `stages` (median seconds by name), `seconds` a step, `images_per_second`; by the loop's `passes`, `ratio` with
        its 95 % interval, `processor_seconds` of ours and theirs (medians) and the `difference` of the terms of a first
        step; `precision`, `threads` of the stages, and the `parameters`.

    Raises:
        ValueError: for an unknown workload or too few rounds.
        RuntimeError: when a plain loop does not compute the same losses.
    """
    strictly.one_of("workload", workload, WORKLOADS)
    strictly.at_least("rounds", rounds, 3)
    parameters = WORKLOADS[workload] | changes
    with tempfile.TemporaryDirectory() as folder:
        pictures = write_pictures(Path(folder, "pictures"), parameters["image_size"])
        data = open_dataset(DataConfig(str(pictures)), parameters["image_size"])
        trainers = {name: build_trainer(parameters, data) for name in ("ours", *PASSES)}
        ours = trainers["ours"]
        batch = next(iter(ours.batches(0)))
        subjects = {"ours": lambda: trainer_step(ours, batch)}
        subjects |= {name: lambda name=name: plain_step(trainers[name], batch, name) for name in PASSES}
        first = {name: run() for name, run in subjects.items()}
        apart = {name: difference(first["ours"], first[name]) for name in PASSES}
        if not all(value <= TOLERANCE for value in apart.values()):
            raise RuntimeError(f"the plain loop of {workload!r} does not compute the same losses: {first}")
        seconds = interleaved(subjects, rounds, threads)
        rows = stage_seconds(ours, rounds)
    total = statistics.median(sum(row.values()) for row in rows)
    names = sorted({name for row in rows for name in row}, key=lambda x: (STAGES.index(x.split()[0]), "back" in x))
    median = {name: float(statistics.median(values)) for name, values in seconds.items()}
    return {
        "stages": {name: statistics.median(row.get(name, 0.0) for row in rows) for name in names},
        "seconds": total,
        "images_per_second": parameters["batch_size"] / total,
        "ratio": {name: ratio_of_medians(seconds["ours"], seconds[name]) for name in PASSES},
        "processor_seconds": median,
        "difference": apart,
        "precision": {torch.float32: "fp32", torch.bfloat16: "bf16"}[ours.dtype],
        "threads": torch.get_num_threads(),
        "parameters": parameters,
    }


def data_share(run: Run) -> float:
    """Return the part of a run's time in steps in which it waited for data."""
    rows = [row for row in read_lines(run.path / "timings.jsonl") if "seconds" in row]
    return sum(row["data_seconds"] for row in rows) / sum(row["seconds"] for row in rows)


def checkpoint_share(run: Run) -> float:
    """Return the part of a run's time, measuring left out, in which it wrote checkpoints."""
    saving = sum(row.get("checkpoint_seconds", 0.0) for row in read_lines(run.path / "timings.jsonl"))
    return saving / (saving + run.seconds)


def run_shares(workload: str, steps: int, /, **changes: object) -> dict[str, dict[str, float]]:
    """Train two models for real and return what share of their time did not go into steps.

    Args:
        workload: Row of `WORKLOADS` that the first is, on JPEG files; by as many loaders as by default.
        steps: Of it.
        changes: Parameters of the second, which has all others at their defaults, on the processor.

    Returns:
        By run: `data_share`, of waiting for images, and for the second `checkpoint_share`, of writing checkpoints.
    """
    with tempfile.TemporaryDirectory() as folder:
        runs = str(Path(folder, "runs"))
        parameters = WORKLOADS[workload] | {"steps": steps, "checkpoint_every": steps}
        pictures = write_pictures(Path(folder, "pictures"), parameters["image_size"])
        on_files = train(dataset=str(pictures), runs=runs, **parameters)
        defaults = train(device="cpu", runs=runs, **changes)
        return {
            f"{workload} on files": {"data_share": data_share(on_files)},
            "defaults": {"data_share": data_share(defaults), "checkpoint_share": checkpoint_share(defaults)},
        }
