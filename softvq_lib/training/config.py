"""Settings of a training run (Sec. 4.1 and the release's recipe)."""

from dataclasses import asdict, dataclass

from softvq_lib.config import at_least, one_of


@dataclass(frozen=True)
class TrainConfig:
    """How a tokenizer or a generator is trained.

    Attributes:
        steps: Optimiser steps.
        batch_size: Images a step.
        lr: Peak learning rate of AdamW.
        min_lr: Final learning rate as a share of `lr`.
        warmup: Share of the steps in which the learning rate rises linearly.
        weight_decay: On weight matrices only; none on biases, norms, tokens, position tables and codebooks.
        beta2: AdamW's second moment decay (the first is 0.9).
        clip: Largest gradient norm.
        ema: Decay of the weights' moving average, which is what is evaluated and saved.
        seed: Of initial weights, sample order and augmentation.
        precision: `auto` (bf16 where the device has it), `bf16` or `fp32`.
        device: `auto` or a torch device.
        val_images: Held-out images that are measured, the first of their fixed order.
        log_every: Steps between rows of metrics.
        checkpoint_every: Steps between checkpoints. None: a tenth of the steps, at most 1000.
        keep: Newest checkpoints that are kept.
        micro_batch: Images that a process takes through the nets at once; gradients add up to the batch. None: all of
            its share. Halved by itself when memory runs out. Terms of single images are exact; statistics over the
            batch, such as the mean posterior, are then those of micro-batches.
        gradient_checkpointing: Keep only transformer blocks' inputs for the backward pass: less memory, more time.
        compile: Compile the nets with torch.compile.
        change: Go on with a run although its configuration is another now; the difference is shown and kept.
        run: Name of the run directory. None: made from the configuration.
        runs: Folder of all runs. None: $SOFTVQ_RUNS, else `runs` in the checkout, else in the current folder.
    """

    steps: int = 800
    batch_size: int = 32
    lr: float = 5e-3
    min_lr: float = 0.1
    warmup: float = 0.05
    weight_decay: float = 1e-4
    beta2: float = 0.95
    clip: float = 1.0
    ema: float = 0.999
    seed: int = 0
    precision: str = "auto"
    device: str = "auto"
    val_images: int = 1000
    log_every: int = 10
    checkpoint_every: int | None = None
    keep: int = 2
    micro_batch: int | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    change: bool = False
    run: str | None = None
    runs: str | None = None

    # Where and how it is run and watched: not part of what is computed, so not of a run's identity.
    NOT_IDENTITY = (
        "device",
        "val_images",
        "log_every",
        "checkpoint_every",
        "keep",
        "micro_batch",
        "gradient_checkpointing",
        "compile",
        "change",
        "run",
        "runs",
    )

    def __post_init__(self):
        for name in ("steps", "batch_size", "val_images", "log_every", "checkpoint_every", "keep", "micro_batch"):
            at_least(name, getattr(self, name), 1)
        for name in ("min_lr", "warmup", "weight_decay", "seed"):
            at_least(name, getattr(self, name), 0)
        for name in ("lr", "clip"):
            at_least(name, getattr(self, name), 0, above=True)
        for name in ("min_lr", "warmup", "ema", "beta2"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value!r} is a share: give a number from 0 to 1.")
        one_of("precision", self.precision, ("auto", "bf16", "fp32"))
        if self.run is not None and (self.run in ("", ".", "..") or set(self.run) & set("/\\\0")):
            raise ValueError(f"run={self.run!r} is not a folder name: leave out slashes, or use runs for the folder.")

    def identity(self) -> dict[str, object]:
        """Return the settings that the outcome depends on."""
        return {name: value for name, value in asdict(self).items() if name not in self.NOT_IDENTITY}
