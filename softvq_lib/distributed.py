"""Statistics of the whole batch where several processes hold a part of it each, with their gradients."""

import torch
from torch import Tensor
from torch import distributed as dist


def world() -> int:
    """Number of processes that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process among them, from 0."""
    return dist.get_rank() if world() > 1 else 0


def mean_across(x: Tensor) -> Tensor:
    """Average a tensor over the processes; differentiable, on every backend.

    With gradients averaged over processes afterwards, as distributed training does, a loss of the average has the
    gradient that one process with the whole batch would have.

    Args:
        x: Of the same shape everywhere.
    """
    if world() == 1:
        return x
    return _Sum.apply(x) / world()


def gather_across(x: Tensor) -> Tensor:
    """Concatenate the rows (b, ...) of all processes in their order, without gradient: (processes x b, ...)."""
    if world() == 1:
        return x.detach()
    x = x.detach().contiguous()
    parts = [torch.empty_like(x) for _ in range(world())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


class _Sum(torch.autograd.Function):
    """Sum over processes; the gradient of a sum of copies is the sum of their gradients."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.detach().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total
