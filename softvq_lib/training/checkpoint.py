"""Checkpoints in safetensors: written whole, checksummed, the newest valid one used."""

import hashlib
import json
import logging
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from softvq_lib.training.files import write_json, write_whole

log = logging.getLogger(__name__)

KEEP = 2


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save(folder: Path, step: int, tensors: dict[str, Tensor]) -> Path:
    """Write the checkpoint of a step, then drop all but the newest `KEEP`.

    The checksum is written last, so that a checkpoint without one is known to be unfinished.
    """
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step:08d}.safetensors"
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    write_whole(path, lambda part: save_file(tensors, part))
    write_json(path.with_suffix(".json"), {"step": step, "sha256": _sha256(path)})
    for old in sorted(folder.glob("step-*.safetensors"))[:-KEEP]:
        old.with_suffix(".json").unlink(missing_ok=True)
        old.unlink()
    return path


def newest(folder: Path) -> tuple[int, dict[str, Tensor]] | None:
    """Load the checkpoint of the highest step whose checksum is right; report the damaged ones passed over."""
    for path in sorted(folder.glob("step-*.safetensors"), reverse=True):
        try:
            about = json.loads(path.with_suffix(".json").read_text())
            if about["sha256"] != _sha256(path):
                raise ValueError("its checksum is wrong")
            return about["step"], load_file(path)
        except (OSError, ValueError, KeyError) as error:
            log.warning("checkpoint %s is damaged (%s): the one before it is used.", path.name, error)
    return None


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimiser's state as flat tensors, `<parameter>.<name>`."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": value for i, entry in state.items() for name, value in entry.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Undo `optimizer_tensors` on an optimiser of the same parameters."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        i, name = key.split(".", 1)
        state.setdefault(int(i), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
