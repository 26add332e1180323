"""The transformers of the reference numbers in `data/generators`: their weights are drawn again from a seed."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from softvq_lib.generators.transformer import Transformer

GENERATORS = Path(__file__).parent / "data" / "generators"


def numbers(file: str, prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors of one file whose names begin with `prefix`, without it."""
    found = load_file(GENERATORS / f"{file}.safetensors")
    return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}


def _spread(name: str, fan_in: int) -> float:
    if name.endswith("bias"):
        return 0.1
    if "embedding_table" in name:
        return 0.5
    factor = 2 if "qkv" in name or "fc1" in name else 0.7 if "adaLN" in name else 1
    return factor * fan_in**-0.5


def transformer(name: str) -> Transformer:
    """Return one of the transformers, 64 wide with 2 blocks; `sit2d` and `dit2d` take patches of 2-D latents."""
    reference = numbers("transformer", f"{name}.")
    patches = name.endswith("2d")
    dim = 16 if patches else 8
    model = Transformer(
        tokens=16,
        dim=dim,
        out_dim=dim if name == "sit1d" else 2 * dim,
        classes=10,
        depth=2,
        width=64,
        heads=4,
        positions="grid" if patches else "sincos",
    )
    generator = torch.Generator().manual_seed(int(reference["seed"]))
    weights, sums = {}, []
    for key, parameter in model.named_parameters():
        fan_in = parameter[0].numel()
        weights[key] = torch.randn(parameter.shape, generator=generator) * _spread(key, fan_in)
        sums.append(weights[key].double().sum())
    torch.testing.assert_close(torch.stack(sums), reference["sums"], atol=1e-4, rtol=0, msg="not the weights meant")
    if patches:
        # The reference's output has the channels of a patch last, ours first.
        for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
            weights[key] = weights[key].unflatten(0, (4, -1)).transpose(0, 1).flatten(0, 1)
    model.load_state_dict(weights | {"pos_embed": model.pos_embed})
    return model.eval()
