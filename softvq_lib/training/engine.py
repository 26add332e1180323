"""What every trainer needs: device, precision, optimiser groups, learning rate, moving average, logging."""

import logging
import math
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

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
    """AdamW that decays the matrices of linear and patch layers only."""
    decayed, free = [], []
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decayed if id(parameter) in matrices else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, beta2), fused=True)


def moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average whose decay grows with the first updates, so that the start is soon forgotten."""

    def update(averages, parameters, updates):
        now = min(decay, (1 + int(updates)) / (10 + int(updates)))
        torch._foreach_lerp_(averages, parameters, 1 - now)

    return AveragedModel(model, multi_avg_fn=update)


def check_finite(step: int, norm: torch.Tensor, terms: dict[str, torch.Tensor], indices: torch.Tensor) -> None:
    """Stop before a step that would spoil the weights.

    Raises:
        FloatingPointError: naming the step, the terms and the images.
    """
    if torch.isfinite(norm) and all(torch.isfinite(term) for term in terms.values()):
        return
    values = ", ".join(f"{name}={term.item():.4g}" for name, term in terms.items())
    shown = ", ".join(map(str, indices[:8].tolist()))
    raise FloatingPointError(
        f"step {step}: loss or gradient is not finite ({values}; gradient norm {norm.item():.4g}; images {shown}, …). "
        "The weights of the last checkpoint are untouched: try a smaller lr or precision='fp32'."
    )


@contextmanager
def log_to(path: Path):
    """Copy the library's log into a file, and to the console when nobody else shows it."""
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
