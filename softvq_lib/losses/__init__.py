"""Losses of the training objective (Eq. 7)."""

from softvq_lib.losses.objective import LossConfig, weighted
from softvq_lib.losses.reconstruction import RECONSTRUCTION, psnr

__all__ = ["RECONSTRUCTION", "LossConfig", "psnr", "weighted"]
