"""Alignment of a generator's features with those of a frozen teacher (REPA), as a further term of its loss."""

import torch.nn.functional as F
from torch import Tensor, nn

_PROJECTOR = 2048  # hidden width of the network between the transformer's features and the teacher's


def projector(width: int, out: int) -> nn.Sequential:
    """Return the network that maps a block's output (b, l, c) to a teacher's width, (b, l, out)."""
    return nn.Sequential(
        nn.Linear(width, _PROJECTOR),
        nn.SiLU(),
        nn.Linear(_PROJECTOR, _PROJECTOR),
        nn.SiLU(),
        nn.Linear(_PROJECTOR, out),
    )


def alignment(projected: Tensor, teacher: Tensor) -> Tensor:
    """Return minus the mean cosine between token i and the i-th run of n / l of the teacher's patches (Eq. 5, 6).

    Args:
        projected: (b, l, width).
        teacher: (b, n, width), n a multiple of l.

    Raises:
        ValueError: for other shapes.
    """
    b, tokens, width = projected.shape
    if teacher.ndim != 3 or len(teacher) != b or teacher.shape[1] % tokens or teacher.shape[2] != width:
        raise ValueError(
            f"the teacher's features of shape {tuple(teacher.shape)} do not fit: give ({b}, a multiple of {tokens}, "
            f"{width})."
        )
    runs = F.normalize(teacher, dim=-1).unflatten(1, (tokens, -1)).mean(2)  # (b, l, width)
    return -(F.normalize(projected, dim=-1) * runs).sum(-1).mean()
