"""Figures of merit: what a trained energy, its samples and its scores are worth.

distances            between two samples: Fréchet, MMD
two_sample           whether a classifier tells them apart
classifier_features  Fréchet distance in features trained on labelled data
neighbors            copies of training examples, modes found
quadrature           laws in one or two dimensions on a grid: log Z, divergences
likelihood           log-likelihood from a known log Z, bits a dimension, overfitting
annealed_bounds      bounds of log Z and of held-out likelihood by annealing both ways
base_laws            where annealing starts
drift                long chains from data
detection            outliers: AUROC, AUPR, FPR at a given TPR
classification       accuracy, log-likelihood, calibration
"""

from ebjax.evaluation.annealed_bounds import LogZBounds, ais_bounds, annealed_log_likelihood
from ebjax.evaluation.base_laws import bernoulli_base, normal_base, uniform_base
from ebjax.evaluation.classification import (
    ReliabilityCurve,
    classification_figures,
    expected_calibration_error,
    reliability_curve,
)
from ebjax.evaluation.classifier_features import (
    ClassifierFeatures,
    classifier_features,
    frechet_distance_of_classifier_features,
)
from ebjax.evaluation.detection import fpr_at_tpr, out_of_distribution_figures
from ebjax.evaluation.distances import frechet_distance, maximum_mean_discrepancy
from ebjax.evaluation.drift import Drift, long_run_drift
from ebjax.evaluation.likelihood import (
    bits_per_dimension,
    energies_of,
    enumerated_log_likelihood,
    held_out_energy_gap,
    log_likelihood,
)
from ebjax.evaluation.neighbors import memorization_figures, modes_covered, nearest_neighbors
from ebjax.evaluation.quadrature import (
    CellDistance,
    GridLaw,
    cell_total_variation,
    grid_figures,
    grid_law,
)
from ebjax.evaluation.two_sample import TwoSampleTest, classifier_two_sample_test

__all__ = [
    "CellDistance",
    "ClassifierFeatures",
    "Drift",
    "GridLaw",
    "LogZBounds",
    "ReliabilityCurve",
    "TwoSampleTest",
    "ais_bounds",
    "annealed_log_likelihood",
    "bernoulli_base",
    "bits_per_dimension",
    "cell_total_variation",
    "classification_figures",
    "classifier_features",
    "classifier_two_sample_test",
    "energies_of",
    "enumerated_log_likelihood",
    "expected_calibration_error",
    "fpr_at_tpr",
    "frechet_distance",
    "frechet_distance_of_classifier_features",
    "grid_figures",
    "grid_law",
    "held_out_energy_gap",
    "log_likelihood",
    "long_run_drift",
    "maximum_mean_discrepancy",
    "memorization_figures",
    "modes_covered",
    "nearest_neighbors",
    "normal_base",
    "out_of_distribution_figures",
    "reliability_curve",
    "uniform_base",
]
