"""What a step of training costs: its time by stage, beside a plain loop, and what a run spends on data and checkpoints.

Stages are timed on the trainer itself: its methods and nets are watched from outside, and compute what they always do.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from softvq_lib import config as strictly
from softvq_lib.data import Batch, DataConfig, open_dataset
from softvq_lib.data.shapes import ShapesSource
from softvq_lib.evaluation.efficiency import interleaved, ratio_of_medians
from softvq_lib.evaluation.plain_loop import plain_step
from softvq_lib.losses.networks import build_networks
from softvq_lib.tokenizers import Tokenizer
from softvq_lib.training import Run, train
from softvq_lib.training.tokenizer import CONFIGS, TokenizerTrainer

# In the order of a step. Forward and backward are measured apart where there are both.
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


class Stages:
    """Seconds of each stage of a step: at any moment one of them is going on.

    Args:
        device: Waited for whenever a stage ends, where it is not the processor.
        clock: Seconds since some moment.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter):
        self.seconds: dict[str, float] = {}
        self.device, self.clock = device, clock
        self.now, self.since = "rest", clock()

    def enter(self, stage: str) -> str:
        """Begin a stage; return the one that ends by it."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        moment, before = self.clock(), self.now
        self.seconds[before] = self.seconds.get(before, 0.0) + moment - self.since
        self.now, self.since = stage, moment
        return before

    def at_gradient(self, tensor: Tensor, stage: str) -> None:
        """Begin a stage when the backward pass has the gradient of a tensor."""

        def begin(gradient: Tensor) -> None:
            self.enter(stage)

        if tensor.requires_grad:
            tensor.register_hook(begin)

    def call(self, owner: object, name: str, stage: str) -> None:
        """Make calls of a method a stage."""
        called = getattr(owner, name)

        def timed(*arguments: object, **named: object) -> object:
            before = self.enter(stage)
            try:
                return called(*arguments, **named)
            finally:
                self.enter(before)

        setattr(owner, name, timed)

    def net(self, module: nn.Module, stage: Callable[[tuple], str]) -> None:
        """Make forward and backward passes of a module two stages; its inputs say which."""
        left: list[str] = []

        def begin(module: nn.Module, inputs: tuple) -> None:
            left.append(self.enter(f"{stage(inputs)} forward"))

        def end(module: nn.Module, inputs: tuple, output: object) -> None:
            self.enter(left.pop())
            self.at_gradient(output[0] if isinstance(output, tuple) else output, f"{stage(inputs)} backward")

        module.register_forward_pre_hook(begin)
        module.register_forward_hook(end)


def watch(trainer: TokenizerTrainer, clock: Callable[[], float] = time.perf_counter) -> Stages:
    """Time the stages of a trainer's steps from now on."""
    stages = Stages(trainer.device, clock)
    tokenizer, nets = trainer.bare.tokenizer, trainer.networks
    for stage, modules in {
        "encoder": (tokenizer.encoder, tokenizer.to_latent),
        "quantizer": (tokenizer.quantizer,),
        "decoder": (tokenizer.from_latent, tokenizer.decoder),
        "teacher": (nets.alignment,),
        "perceptual": (nets.perceptual,),
    }.items():
        for module in filter(None, modules):
            stages.net(module, lambda inputs, stage=stage: stage)
    if nets.discriminator is not None:
        # The tokenizer's gradient comes through the discriminator; the discriminator's own step needs none of pixels.
        stages.net(nets.discriminator, lambda inputs: "adversarial" if inputs[0].requires_grad else "discriminator")
    if nets.perceptual is not None:  # the pixels are where both backward passes end that do not reach the tokenizer
        nets.perceptual.register_forward_pre_hook(lambda module, inputs: stages.at_gradient(inputs[1], "rest"))
    stages.call(trainer, "seen", "teacher forward")
    stages.call(trainer, "after_step", "discriminator forward")
    stages.call(trainer, "_accumulate", "rest")
    stages.call(trainer, "_update", "optimiser")
    return stages
