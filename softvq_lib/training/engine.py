"""What every trainer needs: device and processes, precision, optimiser groups, learning rate, logging."""

import logging
import math
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn

from softvq_lib.config import fingerprint

log = logging.getLogger(__name__)


def choose_device(name: str) -> torch.device:
    """Return the device named, or for `auto` the accelerator if there is one.

    Raises:
        ValueError: for a name that torch does not know or a device that is not there.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={name!r} cannot be used ({reason}): leave it at 'auto', or give 'cpu'.") from None
    return device


def device_name(device: torch.device) -> str:
    """Return the name of the hardware, with the number of threads for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return f"{able.get('cpu_name', 'CPU')}, {torch.get_num_threads()} threads"
    return str(device)


def has_bf16(device: torch.device) -> bool:
    """Tell whether the device computes in bfloat16 by hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    return False


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of autocast; fp32 means none."""
    if name == "fp32" or (name == "auto" and not has_bf16(device)):
        return torch.float32
    return torch.bfloat16


def short_attention(device: torch.device, dtype: torch.dtype, length: float):
    """Return the context in which a training step takes the attention of sequences of `length` tokens.

    On a CPU in bfloat16 torch's fused kernel spends half of a step in its backward pass; plain matrix products train
    the mini tokenizer 1.6 times as fast (33 tokens), a mini SiT 1.5 times (16 tokens). They store length x length
    weights of each head, so that is for short sequences.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    plain = device.type == "cpu" and dtype == torch.bfloat16 and length <= 256
    return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()


def learning_rate(step: int, steps: int, peak: float, warmup: float, floor: float) -> float:
    """Rise linearly over the first `warmup` share of steps, then fall along a half cosine to floor x peak.

    A function of the step alone, so that nothing needs to be saved.
    """
    rise = round(warmup * steps)
    if step < rise:
        return peak * (step + 1) / (rise + 1)
    share = (step - rise) / max(1, steps - 1 - rise)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share)))


def adamw(model: nn.Module, lr: float, beta2: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays the matrices of linear and convolutional layers only, but for `model.no_weight_decay()`."""
    decayed, free = [], []
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d))}
    if hasattr(model, "no_weight_decay"):
        parameters = dict(model.named_parameters())
        matrices -= {id(parameters[name]) for name in model.no_weight_decay()}
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decayed if id(parameter) in matrices else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, beta2), fused=True)


def accelerator(device: str):
    """Set up the processes that train together, as the launcher arranged them: alone, DDP or FSDP.

    Args:
        device: As in `choose_device`; among several processes each has the device that the launcher gave it.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs

    chosen = choose_device(device)
    # Buffers are equal on all processes without being sent: their updates come from statistics of the whole batch.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    made = Accelerator(cpu=chosen.type == "cpu", mixed_precision="no", kwargs_handlers=[ddp])
    if made.num_processes == 1:
        made.state.device = chosen
    return made


def step_generator(device: torch.device, seed: int, step: int, purpose: str) -> torch.Generator:
    """Return the generator of one step for one purpose.

    Seeded by these three alone: nothing of it needs to be saved for a run that goes on to draw the same numbers.
    """
    return torch.Generator(device).manual_seed(int(fingerprint([seed, step, purpose])[:12], 16))


def not_finite(step: int, values: dict[str, float], indices: list[int]) -> FloatingPointError:
    """Return the error that stops a step before it spoils the weights, naming the step, the terms and the images."""
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    shown = ", ".join(map(str, indices[:8])) + (", …" if len(indices) > 8 else "")
    listed = ", ".join(f"{name}={value:.4g}" for name, value in values.items())
    return FloatingPointError(
        f"step {step}: {' and '.join(bad)} not finite ({listed}; images {shown}). The weights of the last checkpoint "
        "are untouched: try a smaller lr or precision='fp32', and look at these images."
    )


@contextmanager
def log_to(path: Path | None):
    """Copy the library's log into a file, and to the console when nobody else shows it; nowhere without a path."""
    if path is None:
        yield
        return
    library = logging.getLogger("softvq_lib")
    handlers: list[logging.Handler] = [logging.FileHandler(path)]
    if not (library.handlers or logging.getLogger().handlers):
        handlers.append(logging.StreamHandler())
    level = library.level
    library.setLevel(logging.INFO if level == logging.NOTSET else level)
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        library.addHandler(handler)
    try:
        yield
    finally:
        library.setLevel(level)
        for handler in handlers:
            library.removeHandler(handler)
            handler.close()
