"""Figures of merit: what a trained energy, its samples and its scores are worth.

distances        between two samples: Fréchet, MMD
detection        outliers: AUROC, AUPR, FPR at a given TPR
classification   accuracy, log-likelihood, calibration
"""

from ebjax.evaluation.classification import (
    ReliabilityCurve,
    classification_figures,
    expected_calibration_error,
    reliability_curve,
)
from ebjax.evaluation.detection import fpr_at_tpr, out_of_distribution_figures
from ebjax.evaluation.distances import frechet_distance, maximum_mean_discrepancy
from ebjax.evaluation.quadrature import GridLaw, grid_figures, grid_law

__all__ = [
    "GridLaw",
    "ReliabilityCurve",
    "classification_figures",
    "expected_calibration_error",
    "fpr_at_tpr",
    "frechet_distance",
    "grid_figures",
    "grid_law",
    "maximum_mean_discrepancy",
    "out_of_distribution_figures",
    "reliability_curve",
]
