"""Training: run directories, checkpoints, the loop, and the tokenizer trainer on it (Sec. 4.1)."""

from softvq_lib.training.config import TrainConfig
from softvq_lib.training.run import Run
from softvq_lib.training.tokenizer import train
from softvq_lib.training.validation import Reconstruction, reconstruct

__all__ = ["Reconstruction", "Run", "TrainConfig", "reconstruct", "train"]
