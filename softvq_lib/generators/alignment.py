"""Alignment of a generator's features with those of a frozen teacher (REPA), as a further term of its loss.

The form is that of the tokenizer's alignment (Eq. 5, 6): token i answers for its run of the teacher's patches.
"""

from torch import Tensor, nn

from softvq_lib.losses.alignment import Projector, alignment_loss, to_patches

_HIDDEN = 2048  # width of the network between the transformer's features and the teacher's


def projector(width: int, out: int) -> nn.Sequential:
    """Return the network that maps a block's output (b, l, c) to a teacher's width, (b, l, out)."""
    return Projector(width, _HIDDEN, out)


def alignment(projected: Tensor, teacher: Tensor) -> Tensor:
    """Return minus the mean cosine between the tokens, spread over n patches, and the teacher's patches, a scalar.

    Args:
        projected: (b, l, width).
        teacher: (b, n, width).

    Raises:
        ValueError: for features of another width or batch.
    """
    return alignment_loss(to_patches(projected, teacher.shape[1]), teacher).mean()
