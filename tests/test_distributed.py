"""Two processes with half of a batch each compute what one computes with all of it: values, gradients, codebooks.

Every case is a function that runs anywhere. Here it runs on the whole batch, in two gloo processes on the halves; the
processes are started once. The first word of a result's name says how the processes' results make up the whole one:
`mean` of both, `rows` one after the other, or the `same` in both to the last bit.
"""

from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch import distributed as dist

from softvq_lib.distributed import gather_across, mean_across, rank, world
from softvq_lib.draws import Rows
from softvq_lib.tokenizers import GMMVQ, KL, POSTERIORS, VQ, Product, Residual, SoftVQ
from softvq_lib.tokenizers.quantizer import kl_term

PROCESSES = 2
BATCH, TOKENS, DIM, CODES = 24, 4, 4, 10


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def part(seed: int, *shape: int) -> Tensor:
    """This process's rows of a random batch."""
    rows = BATCH // world()
    whole = torch.randn(BATCH, *shape, generator=seeded(seed), dtype=torch.float64)
    return whole[rank() * rows : (rank() + 1) * rows].clone().requires_grad_()


def mean_of_rows() -> dict[str, Tensor]:
    x = part(0, 3)
    value = mean_across(x.mean(0)).pow(3).sum()
    value.backward()
    return {"same value": value, "rows gradient": x.grad / world()}


def all_rows() -> dict[str, Tensor]:
    x = part(0, 3, 2)
    found = gather_across(x.transpose(1, 2))
    assert not found.requires_grad
    return {"same rows": found}


def term(pooled: bool) -> dict[str, Tensor]:
    x = part(0, TOKENS, CODES)
    log_q = x.log_softmax(-1).unflatten(1, (2, -1)).transpose(0, 1).flatten(1, 2)  # (n, t, k)
    value = kl_term(log_q, pooled=pooled)
    value.backward()
    return {"mean value": value, "rows gradient": x.grad / world()}


def trained(make) -> dict[str, Tensor]:
    """Three batches forward and backward; gradients gather over them."""
    torch.manual_seed(0)
    quantizer, found = make().double().train(), {}
    for step in range(3):
        x, generator = part(step, TOKENS, quantizer.hat_dim), seeded(step)
        z, losses = quantizer(x, Rows(generator, BATCH, rank() * len(x)) if world() > 1 else generator)
        ((z * part(step + 10, TOKENS, z.shape[-1])).mean() + sum(losses.values())).backward()
        found |= {f"rows z {step}": z, f"rows gradient {step}": x.grad / world()}
        found |= {f"mean {name} {step}": value for name, value in losses.items()}
        found |= {f"same {name} {step}": value.clone() for name, value in quantizer.state_dict().items()}
        found[f"same generator {step}"] = torch.rand(1, generator=generator)
    gradients = {f"mean gradient of {name}": p.grad for name, p in quantizer.named_parameters() if p.requires_grad}
    return found | gradients


def softvq(posterior: str, pooled: bool) -> SoftVQ:
    quantizer = SoftVQ(TOKENS, DIM, CODES, 2, posterior, 0.3, 0.1)
    quantizer.form = replace(quantizer.form, pooled=pooled)
    return quantizer


def vq(dim: int = DIM, **settings) -> VQ:
    return VQ(TOKENS, dim, CODES, 2, entropy_temperature=0.3, **settings)


REMEDIES = {"ema": 0.3, "revive": 0.5, "kmeans": 3}
QUANTIZERS = {
    **{f"{form} {pooled=}": partial(softvq, form, pooled) for form in POSTERIORS for pooled in (True, False)},
    "kl": lambda: KL(DIM),
    "vq": vq,
    "vq ema": lambda: vq(ema=0.3, l2=False),
    "vq revive": lambda: vq(revive=0.995),
    "vq kmeans": lambda: vq(kmeans=3, l2=False),
    "vq all remedies": lambda: vq(**REMEDIES),
    "gmmvq": lambda: GMMVQ(TOKENS, DIM, CODES, 2, temperature=0.3),
    "product": lambda: Product(DIM, [vq(DIM // 2, **REMEDIES) for _ in range(2)]),
    # No restarts: a token that a codeword was put on has nothing left over, and the direction of that is rounding.
    "residual": lambda: Residual(DIM, [vq(ema=0.3) for _ in range(2)], sphere=True),
    "soft residual": lambda: Residual(DIM, [softvq("released", True) for _ in range(2)], sphere=True),
}
CASES = {
    "mean_across": mean_of_rows,
    "gather_across": all_rows,
    "kl_term": partial(term, False),
    "kl_term pooled": partial(term, True),
    **{name: partial(trained, make) for name, make in QUANTIZERS.items()},
}


def process(number: int, folder: str) -> None:
    """Run every case as one of the processes and write down what it finds."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=number,
        world_size=PROCESSES,
        timeout=timedelta(seconds=60),
    )
    assert (rank(), world()) == (number, PROCESSES)
    found = {f"{case}/{name}": value for case, run in CASES.items() for name, value in run().items()}
    save_file({name: x.detach().clone().contiguous() for name, x in found.items()}, f"{folder}/{number}.safetensors")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, Tensor]]:
    """What each process has found, by "case/name"."""
    folder: Path = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(process, (str(folder),), nprocs=PROCESSES)
    return [load_file(folder / f"{number}.safetensors") for number in range(PROCESSES)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(found, case):
    expected = CASES[case]()
    assert {name for name in found[0] if name.startswith(f"{case}/")} == {f"{case}/{name}" for name in expected}
    for name, whole in expected.items():
        first, second = (each[f"{case}/{name}"] for each in found)
        if name.startswith("same"):
            assert torch.equal(first, second), name
            joined = first
        else:
            joined = torch.cat([first, second]) if name.startswith("rows") else (first + second) / 2
        torch.testing.assert_close(
            joined, whole.detach(), atol=1e-12, rtol=1e-9, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_alone_nothing_is_exchanged():
    x = torch.randn(3, 2, requires_grad=True)
    assert (rank(), world()) == (0, 1)
    assert mean_across(x) is x
    assert torch.equal(gather_across(x), x) and not gather_across(x).requires_grad
