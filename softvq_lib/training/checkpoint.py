"""Checkpoints in safetensors: written whole, checksummed, the newest valid one used."""

import json
import logging
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as states

from softvq_lib.training.files import write_json, write_whole
from softvq_lib.weights import sha256

log = logging.getLogger(__name__)

# Whole tensors, gathered on the first process where a model is sharded.
_GATHERED = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
_WHOLE = states.StateDictOptions(full_state_dict=True)


def save(folder: Path, step: int, tensors: dict[str, Tensor], keep: int = 2) -> Path:
    """Write the checkpoint of a step, then drop all but the newest `keep`, and any of later steps: these are damaged.

    Tensors are of any shape, by name.

    The checksum is written last, so that a checkpoint without one is known to be unfinished.

    Raises:
        OSError: when it cannot be written; the earlier ones are as they were.
    """
    folder.mkdir(exist_ok=True)
    for torn in folder.glob(".*"):  # of a process that was killed while it, or safetensors, wrote
        torn.unlink()
    path = folder / f"step-{step:08d}.safetensors"
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    try:
        write_whole(path, lambda part: save_file(tensors, part))
        write_json(path.with_suffix(".json"), {"step": step, "sha256": sha256(path)})
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise OSError(
            f"{path} cannot be written ({reason}): free some space or mend the folder's rights, and start again. "
            "Earlier checkpoints are untouched."
        ) from error
    kept = sorted(folder.glob("step-*.safetensors"))
    here = kept.index(path) + 1
    for dropped in kept[: max(0, here - keep)] + kept[here:]:
        dropped.with_suffix(".json").unlink(missing_ok=True)
        dropped.unlink()
    return path


def newest(folder: Path) -> Path | None:
    """Find the checkpoint of the highest step whose checksum is right; report the damaged ones passed over."""
    for path in sorted(folder.glob("step-*.safetensors"), reverse=True):
        try:
            if json.loads(path.with_suffix(".json").read_text())["sha256"] != sha256(path):
                raise ValueError("its checksum is wrong")
            return path
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("checkpoint %s is damaged (%s): the one before it is used.", path.name, error)
    return None


def load(path: Path) -> tuple[int, dict[str, Tensor]]:
    """Read the step and the tensors, by name and of their shapes, of a checkpoint that `newest` found."""
    return int(path.stem.removeprefix("step-")), load_file(path)


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors, of any shape, whose names begin with `prefix.`, without it."""
    return {name[len(prefix) + 1 :]: value for name, value in tensors.items() if name.startswith(prefix + ".")}


def module_tensors(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    """Return a module's state as `prefix.<name>`, in whole shapes if sharded; empty on all but the first process."""
    state = states.get_model_state_dict(module, options=_GATHERED)
    return {f"{prefix}.{name}": value for name, value in state.items()}


def load_module(prefix: str, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Undo `module_tensors`, on every process; tensors have the shapes of the whole module.

    Raises:
        ValueError: when the tensors are those of another module.
    """
    wrong = f"the checkpoint's {prefix} does not fit this configuration: "
    state = part(tensors, prefix)
    unlike = sorted(state.keys() ^ states.get_model_state_dict(module).keys())
    if unlike:  # which the function below would let pass
        raise ValueError(f"{wrong}one of them has no {', '.join(unlike[:5])}{', …' if len(unlike) > 5 else ''}.")
    try:
        if any(True for _ in module.parameters()):
            states.set_model_state_dict(module, state, options=_WHOLE)
        else:  # it wants parameters, to know the devices
            module.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(wrong + " ".join(str(error).split())[:300]) from None


def optimizer_tensors(prefix: str, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimiser's state as `prefix.<parameter>.<name>`, in whole shapes; empty before its first step."""
    if not optimizer.state:
        return {}
    state = states.get_optimizer_state_dict(module, optimizer, options=_GATHERED).get("state", {})
    return {f"{prefix}.{name}.{key}": value for name, entry in state.items() for key, value in entry.items()}


def load_optimizer(prefix: str, module: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict) -> None:
    """Undo `optimizer_tensors`, on every process."""
    state: dict[str, dict[str, Tensor]] = {}
    for name, tensor in part(tensors, prefix).items():
        parameter, key = name.rsplit(".", 1)
        state.setdefault(parameter, {})[key] = tensor
    if state:
        groups = states.get_optimizer_state_dict(module, optimizer, options=_WHOLE)["param_groups"]
        states.set_optimizer_state_dict(module, optimizer, {"state": state, "param_groups": groups}, options=_WHOLE)
