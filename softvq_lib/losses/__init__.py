"""Losses of the training objective (Eq. 7)."""

from softvq_lib.losses.objective import LossConfig, objective
from softvq_lib.losses.reconstruction import psnr

__all__ = ["LossConfig", "objective", "psnr"]
