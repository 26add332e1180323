"""Measurements of trained tokenizers (Sec. 4.1, Evaluation)."""

from softvq_lib.evaluation.baselines import pca_psnr
from softvq_lib.evaluation.cost import forward_cost
from softvq_lib.evaluation.efficiency import quantizer_rows
from softvq_lib.evaluation.fidelity import Fidelity, Measure, fidelity
from softvq_lib.evaluation.parameters import parameter_table
from softvq_lib.evaluation.reference import image_statistics, reference_statistics
from softvq_lib.evaluation.statistics import bootstrap_mean

__all__ = [
    "Fidelity",
    "Measure",
    "bootstrap_mean",
    "fidelity",
    "forward_cost",
    "image_statistics",
    "parameter_table",
    "pca_psnr",
    "quantizer_rows",
    "reference_statistics",
]
