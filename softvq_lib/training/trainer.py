"""The training loop of tokenizers and generators: one process or many, resumable, guarded (Sec. 4.1)."""

import copy
import json
import logging
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from softvq_lib.data import Batch, DataConfig, DataSplits, UnreadableLog, training_batches
from softvq_lib.distributed import mean_across
from softvq_lib.draws import Rows
from softvq_lib.training import checkpoint, engine
from softvq_lib.training.average import Average
from softvq_lib.training.config import TrainConfig
from softvq_lib.training.files import check_writable, read_lines, write_whole
from softvq_lib.training.run import Run, now, provenance

log = logging.getLogger(__name__)

MEASURED_AT = (0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)  # shares of the steps at which held-out data are measured


class Trainer:
    """State of one call of a training function; each kind of model adds the methods at the end.

    A step is `backward` on every micro-batch, a look at whether all numbers are finite, and then the optimisers. Only
    the first process writes. Nothing is drawn but from generators that the seed and the step determine, so a checkpoint
    need not hold any random state.

    Args:
        run: Its directory; `settings.batch_size` images a step come from all processes together.
        model: What is trained and averaged.
        data: Named in the manifest and in error messages.
        settings: Steps, batches, optimiser, precision and checkpoints.

    Raises:
        ValueError: for a batch that the processes cannot share equally.
    """

    unit = "images"
    length = math.inf  # of the sequences that the transformers see, where it is known
    written: tuple[Tensor, ...] = ()  # trained tensors that a forward pass may write into

    def __init__(self, run: Run, model: nn.Module, data: DataSplits, settings: TrainConfig):
        self.run, self.data, self.settings = run, data, settings
        self.accelerator = engine.accelerator(settings.device)
        self.device, self.main = self.accelerator.device, self.accelerator.is_main_process
        self.sharded = self.accelerator.distributed_type.value == "FSDP"
        self.processes, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        if settings.batch_size % self.processes:
            raise ValueError(
                f"batch_size={settings.batch_size} cannot be shared by {self.processes} processes: choose a multiple "
                f"of {self.processes}, such as {-(-settings.batch_size // self.processes) * self.processes}."
            )
        self.rows = settings.batch_size // self.processes  # images of this process in a step
        self.micro_batch = min(self.rows, settings.micro_batch or run.manifest.get("micro_batch") or self.rows)
        self.dtype = engine.choose_precision(settings.precision, self.device)
        self.measured = copy.deepcopy(model).to(self.device).eval() if self.main else None
        self.bare = model.to(self.device)
        optimizer = engine.adamw(self.bare, settings.lr, settings.beta2, settings.weight_decay)
        self.model, prepared = self.accelerator.prepare(self.bare, optimizer)
        self.average = Average(self.model, settings.ema)
        # Each part beside the model is small, whole on every process, and its gradients are averaged by hand.
        self.parts: dict[str, nn.Module] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {"model": prepared.optimizer}
        self.peaks = {"model": settings.lr}
        self.step = 0
        self.sums: dict[
            str, tuple[Tensor, int]
        ] = {}  # of each term since the last row of metrics, and of how many steps
        self.every = settings.checkpoint_every or max(1, min(1000, settings.steps // 10))
        self.measured_at = {round(share * settings.steps) for share in MEASURED_AT}
        self.unreadable = UnreadableLog(len(data.train))
        self._stop = False

    def add(self, name: str, part: nn.Module, lr: float | None = None) -> nn.Module:
        """Add a part with parameters or buffers of its own, trained by its own AdamW at the peak rate `lr`."""
        self.parts[name] = part.to(self.device)
        if lr is not None:
            self.optimizers[name] = engine.adamw(part, lr, self.settings.beta2, self.settings.weight_decay)
            self.peaks[name] = lr
        return part

    @property
    def checkpoint_bytes(self) -> int:
        """About how large a checkpoint is: weights, their average and two moments of each."""
        modules = (self.bare, *self.parts.values())
        return 4 * sum(p.numel() * p.element_size() for m in modules for p in m.parameters())

    # -- state ---------------------------------------------------------------------------------------------------

    def _averaged(self) -> dict[str, Tensor]:
        """State of the model with averaged weights, copied; empty on all but the first process if it is sharded."""
        with self.average.applied():
            return {k: v.clone() for k, v in checkpoint.module_tensors("ema", self.model).items()}

    def _owner(self, name: str) -> nn.Module:
        return self.model if name == "model" else self.parts[name]

    def _save(self) -> None:
        began = time.perf_counter()
        tensors = checkpoint.module_tensors("model", self.model) | self._averaged()
        # Of a row of metrics that has begun.
        tensors |= {
            f"row.{name}": torch.stack([total.double(), total.new_tensor(times).double()])
            for name, (total, times) in self.sums.items()
        }
        for name, part in self.parts.items():
            tensors |= {f"{name}.{key}": value for key, value in part.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            tensors |= checkpoint.optimizer_tensors(f"{name}_optimizer", self._owner(name), optimizer)
        if self.main:
            checkpoint.save(self.run.path / "checkpoints", self.step, tensors, self.settings.keep)
        self.accelerator.wait_for_everyone()
        self._append("timings.jsonl", {"checkpoint_seconds": time.perf_counter() - began})

    def _restore(self) -> None:
        found = [checkpoint.newest(self.run.path / "checkpoints") if self.main else None]
        if self.processes > 1:
            torch.distributed.broadcast_object_list(found)
        if found[0]:
            self.step, tensors = checkpoint.load(found[0])
            if self.step > self.settings.steps:
                raise ValueError(
                    f"steps={self.settings.steps}, but run {self.run.name} is at step {self.step} already."
                )
            with self.average.applied():
                checkpoint.load_module("ema", self.model, tensors)
            checkpoint.load_module("model", self.model, tensors)
            for name, part in self.parts.items():
                if checkpoint.part(tensors, name) or not part.state_dict():
                    checkpoint.load_module(name, part, tensors)
                else:
                    log.warning("the checkpoint has no %s: it starts anew.", name)
            for name, optimizer in self.optimizers.items():
                checkpoint.load_optimizer(f"{name}_optimizer", self._owner(name), optimizer, tensors)
            self.sums = {name: (row[0], int(row[1])) for name, row in checkpoint.part(tensors, "row").items()}
            log.info("run %s goes on from step %d of %d.", self.run.name, self.step, self.settings.steps)
        if self.main:  # rows after the checkpoint will be written again; a row that a crash has torn goes with them
            for name in ("metrics.jsonl", "timings.jsonl"):
                path = self.run.path / name
                kept = [json.dumps(row) + "\n" for row in read_lines(path) if found[0] and row["step"] <= self.step]
                write_whole(path, lambda part, kept=kept: part.write_text("".join(kept)))

    def _append(self, name: str, row: dict) -> None:
        if self.main:
            with open(self.run.path / name, "a") as file:
                file.write(json.dumps({"step": self.step, **row}) + "\n")

    # -- one step ------------------------------------------------------------------------------------------------

    def _update(self, batch: Batch) -> dict[str, Tensor]:
        """Make one optimiser step with this process's images; return detached terms and gradient norms."""
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self._rate(self.peaks[name])
        while True:
            try:
                terms = self._accumulate(batch)
                break
            except Exception as error:
                from accelerate.utils.memory import should_reduce_batch_size

                short = isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
                if not short or self.micro_batch == 1:
                    raise
            self._halve()
        norms = {}
        for name in self.optimizers:
            if name == "model":
                norms["gradient_norm"] = self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.clip)
            elif any(p.grad is not None for p in self.parts[name].parameters()):
                self._share_gradients(self.parts[name])
                norm = nn.utils.clip_grad_norm_(self.parts[name].parameters(), self.settings.clip)
                norms[f"{name}_gradient_norm"] = norm
        norms = {name: getattr(norm, "full_tensor", lambda norm=norm: norm)() for name, norm in norms.items()}
        terms |= norms
        if self.processes > 1:  # all of them see the same numbers, and stop together if one is not finite
            means = mean_across(torch.stack([term.double() for term in terms.values()]))
            terms = dict(zip(terms, means, strict=True))
        # One number tells whether all are finite: a device is asked, and so waited for, only once.
        if not math.isfinite(sum(term.detach().double().abs() for term in terms.values())):
            values = {name: float(term) for name, term in terms.items()}
            raise engine.not_finite(self.step, values, batch.indices.tolist())
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.after_step(terms)
        self.average.update(self.step)
        return terms

    def _rate(self, peak: float) -> float:
        settings = self.settings
        return engine.learning_rate(self.step, settings.steps, peak, settings.warmup, settings.min_lr)

    def _accumulate(self, batch: Batch) -> dict[str, Tensor]:
        """Run `backward` on every micro-batch; return the averages of the terms."""
        # What a forward pass changes by itself, put back if memory runs out on the way.
        modules = (self.bare, *self.parts.values())
        changing = [x for m in modules for x in (*m.buffers(), *m.parameters()) if not x.requires_grad]
        held = [(x, x.detach().clone()) for x in (*changing, *self.written)]
        self.model.train()
        terms: dict[str, Tensor] = {}
        try:
            for start in range(0, len(batch), self.micro_batch):
                part = batch[start : start + self.micro_batch].to(self.device)
                share = len(part) / len(batch)
                last = start + self.micro_batch >= len(batch)
                attention = engine.short_attention(self.device, self.dtype, self.length)
                with attention, nullcontext() if last else self.accelerator.no_sync(self.model):
                    for name, term in self.backward(part, self.rank * self.rows + start, share).items():
                        terms[name] = terms.get(name, 0) + share * term.detach()
        except BaseException:
            with torch.no_grad():
                for x, before in held:
                    x.copy_(before)
            for optimizer in self.optimizers.values():
                optimizer.zero_grad(set_to_none=True)
            raise
        return terms

    def draws(self, purpose: str, first: int) -> Rows:
        """Return the random numbers of the rows `first`, `first + 1`, ... of the present step, for one purpose."""
        generator = engine.step_generator(self.device, self.settings.seed, self.step, purpose)
        return Rows(generator, self.settings.batch_size, first)

    def _halve(self) -> None:
        """Take half as many images at once from now on, also when the run is started again."""
        tried, self.micro_batch = self.micro_batch, -(-self.micro_batch // 2)
        if self.main:
            self.run.update(micro_batch=self.micro_batch)
        advice = f"memory ran out with {tried} images at once: from now on {self.micro_batch}, of {self.rows} a step"
        if self.processes > 1:  # the others are in the middle of the step, where they cannot be reached
            self.run.update(micro_batch=self.micro_batch)
            raise MemoryError(f"{advice}. Start the same command again (torchrun --max-restarts does): it goes on.")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        log.warning("%s; the batch stays as it is.", advice)

    def _share_gradients(self, part: nn.Module) -> None:
        """Average a part's gradients over the processes, in one message."""
        if self.processes == 1:
            return
        gradients = [p.grad for p in part.parameters() if p.grad is not None]
        flat = mean_across(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    # -- the loop ------------------------------------------------------------------------------------------------

    def run_to_the_end(self, requested: dict) -> Run:
        """Claim the run's folder for the parameters that were asked for, and `fit`, keeping a log there.

        Raises:
            ValueError: for a folder without room, that cannot be written to, or that holds anything else.
        """
        if self.main:
            check_writable(self.run.path, needed=self.checkpoint_bytes * (self.settings.keep + 1))
            self.run.claim(requested, self.settings.change)
        with engine.log_to(self.run.path / "log.txt" if self.main else None):
            self.fit()
        return self.run

    def fit(self) -> None:
        """Run all steps that are left, then export the averaged model.

        Raises:
            FloatingPointError: when a term or a gradient is not finite; nothing of that step is kept.
            SystemExit: after SIGTERM, once a checkpoint is written.
        """
        with self._terminable(), self.run.locked() if self.main else nullcontext():
            self._fit()

    def _fit(self) -> None:
        from tqdm import tqdm

        settings, run = self.settings, self.run
        began = now()
        self._restore()
        first = recorded = self.step
        if self.main:
            run.adopt()  # only now: the state of the run is known to fit the configuration
            run.update(
                status="running",
                started=run.manifest.get("started", began),
                resumed_at=[*run.manifest.get("resumed_at", []), *([first] if first else [])],
                data={"name": self.data.name, "fingerprint": self.data.fingerprint},
                device=str(self.device),
                device_name=engine.device_name(self.device),
                processes=self.processes,
                distribution=self.accelerator.distributed_type.value,
                precision=str(self.dtype).removeprefix("torch."),
                parameters=sum(parameter.numel() for parameter in self.exported(self.measured).parameters()),
                **provenance(),
            )
            manifest = run.manifest
            log.info("%s; %.2f M parameters", self.data.describe(), manifest["parameters"] / 1e6)
            many = f", {self.processes} processes" if self.processes > 1 else ""
            log.info("training on %s%s in %s", manifest["device_name"], many, manifest["precision"])
        if self.step == 0:
            self._measure()
        terminal = sys.stderr.isatty()
        bar = tqdm(
            total=settings.steps,
            initial=first,
            unit="step",
            desc=run.name,
            mininterval=0.5 if terminal else 10,
            disable=not self.main,
        )
        waited, clock = 0.0, time.perf_counter()
        batches = iter(self.batches(first))
        while self.step < settings.steps:
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            self.unreadable.add(batch.unreadable)
            terms = self._update(batch)
            self.step += 1
            bar.update()
            for name, value in terms.items():  # a term may begin in the middle of a row
                total, times = self.sums.get(name, (0.0, 0))
                self.sums[name] = total + value.double(), times + 1
            if self.step % settings.log_every == 0 or self.step == settings.steps:
                names = sorted(self.sums, key=lambda name: (name != "loss", name))  # also after a restart
                means = {name: float(self.sums[name][0]) / self.sums[name][1] for name in names}
                self._append("metrics.jsonl", {**means, "lr": self._last_rate()})
                seconds = time.perf_counter() - clock
                rate = (self.step - recorded) * settings.batch_size / seconds
                timing = {"seconds": seconds, "data_seconds": waited, "images_per_second": rate, "time": now()}
                self._append("timings.jsonl", timing)
                bar.set_postfix_str(f"loss {means['loss']:.4f}, {rate:.0f} {self.unit}/s", refresh=False)
                self.sums, waited, clock, recorded = {}, 0.0, time.perf_counter(), self.step
            pause = time.perf_counter()
            if self.step in self.measured_at:
                self._measure()
            stop = self._stopping()
            if (self.step % self.every == 0 or stop) and self.step < settings.steps:
                self._save()
            if stop and self.step < settings.steps:
                log.warning("stopped after step %d, which is saved: the same command goes on from there.", self.step)
                raise SystemExit(128 + signal.SIGTERM)
            clock += time.perf_counter() - pause  # the rate is that of training alone
        bar.close()
        self._save()
        averaged = self._averaged()
        if self.main:
            self.measured.load_state_dict(checkpoint.part(averaged, "ema"))
            self.export(self.exported(self.measured))
            run.trained = settings.steps - first
            run.update(status="finished", ended=now())
            log.info("finished %d steps: %s", settings.steps, run.path)
        self.accelerator.wait_for_everyone()

    def _last_rate(self) -> float:
        return self.optimizers["model"].param_groups[0]["lr"]

    def _measure(self) -> None:
        """Measure the averaged weights on the first process; the others wait."""
        averaged = self._averaged()
        if self.main:
            self.measured.load_state_dict(checkpoint.part(averaged, "ema"))
            self._append("metrics.jsonl", self.measure(self.exported(self.measured)))
        self.accelerator.wait_for_everyone()

    # -- being stopped -------------------------------------------------------------------------------------------

    @contextmanager
    def _terminable(self) -> Iterator[None]:
        """Note SIGTERM instead of dying of it, where signals reach us."""

        def note(number, frame):
            self._stop = True

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _stopping(self) -> bool:
        """Whether any process was asked to stop: all of them must stop after the same step."""
        if self.processes == 1:
            return self._stop
        return bool(mean_across(torch.tensor(float(self._stop), device=self.device)) > 0)

    def _autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    # -- what each kind of model adds ----------------------------------------------------------------------------

    def batches(self, start_step: int) -> Iterator[Batch]:
        """This process's share of the batches from a step on."""
        raise AssertionError("each trainer has its own batches")

    def image_batches(self, start_step: int, image_size: int, data: DataConfig) -> Iterator[Batch]:
        """This process's share of the batches of training images from a step on."""
        return training_batches(
            self.data.train,
            image_size=image_size,
            batch_size=self.settings.batch_size,
            seed=self.settings.seed,
            start_step=start_step,
            steps=self.settings.steps,
            flip=data.flip,
            crop=data.crop,
            workers=data.workers,
            part=(self.rank, self.processes),
        )

    def backward(self, part: Batch, first: int, share: float) -> dict[str, Tensor]:
        """Add `share` of the gradient of a micro-batch's loss; return its terms, detached scalars, "loss" among them.

        Args:
            part: Some rows of the step's batch, on the device.
            first: The number of its first row in the whole batch, for `draws`.
            share: Of these rows in this process's part of the batch.
        """
        raise AssertionError("each trainer has its own backward")

    def exported(self, model: nn.Module) -> nn.Module:
        """The part of what is trained that is measured and handed out."""
        return model

    def after_step(self, terms: dict[str, Tensor]) -> None:
        """Do what follows the optimisers' step, given its terms, scalars by name."""

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Measure a model on held-out data, keep pictures, and return the numbers to be logged."""
        raise AssertionError("each trainer has its own measure")

    def export(self, model: nn.Module) -> None:
        """Write the finished model into the run."""
        raise AssertionError("each trainer has its own export")
