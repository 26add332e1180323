"""Data: embedded, local and hub data sets behind one `dataset` parameter; batches in a resumable order."""

from softvq_lib.data.images import to_rgb
from softvq_lib.data.loading import Batch, training_batches, validation_batches
from softvq_lib.data.source import Source, UnreadableImage
from softvq_lib.data.splits import DataConfig, DataSplits, open_dataset
from softvq_lib.data.unreadable import UnreadableLog

__all__ = [
    "Batch",
    "DataConfig",
    "DataSplits",
    "Source",
    "UnreadableImage",
    "UnreadableLog",
    "open_dataset",
    "to_rgb",
    "training_batches",
    "validation_batches",
]
