"""Objectives: what a training step of an energy minimises."""

from ebjax.objectives.chain_divergence import ChainDivergence
from ebjax.objectives.conditional_noise_contrastive import (
    conditional_noise_contrastive,
    gaussian_perturbation,
)
from ebjax.objectives.contrastive_divergence import (
    PersistentChains,
    contrastive_divergence,
    contrastive_loss,
    persistent_contrastive_divergence,
    short_run,
)
from ebjax.objectives.cooperative import cooperative, refined_proposal
from ebjax.objectives.denoising_score_matching import (
    annealed_denoising_score_matching,
    denoising_score_matching,
    geometric_noise_levels,
)
from ebjax.objectives.energy_bounded import OutlierBatch, energy_bounded
from ebjax.objectives.flow_contrastive import flow_contrastive
from ebjax.objectives.jarzynski import JarzynskiWalkers, jarzynski
from ebjax.objectives.joint_classification import JointBatch, joint_classification
from ebjax.objectives.minimum_probability_flow import minimum_probability_flow
from ebjax.objectives.noise_contrastive import NoiseLaw, noise_contrastive, noise_law
from ebjax.objectives.pseudolikelihood import pseudolikelihood
from ebjax.objectives.ratio_matching import ratio_matching
from ebjax.objectives.rbm_contrastive_divergence import rbm_persistent_contrastive_divergence
from ebjax.objectives.recovery_likelihood import recovery_likelihood, recovery_sample
from ebjax.objectives.recovery_schedule import RecoverySchedule, cosine_noise, recovery_schedule
from ebjax.objectives.regularizers import (
    Regularizer,
    energy_magnitude,
    gradient_penalty,
    regularized,
)
from ebjax.objectives.score_matching import (
    finite_difference_score_matching,
    score_matching,
    sliced_score_matching,
)

__all__ = [
    "ChainDivergence",
    "JarzynskiWalkers",
    "JointBatch",
    "NoiseLaw",
    "OutlierBatch",
    "PersistentChains",
    "RecoverySchedule",
    "Regularizer",
    "annealed_denoising_score_matching",
    "conditional_noise_contrastive",
    "contrastive_divergence",
    "contrastive_loss",
    "cooperative",
    "cosine_noise",
    "denoising_score_matching",
    "energy_bounded",
    "energy_magnitude",
    "finite_difference_score_matching",
    "flow_contrastive",
    "gaussian_perturbation",
    "geometric_noise_levels",
    "gradient_penalty",
    "jarzynski",
    "joint_classification",
    "minimum_probability_flow",
    "noise_contrastive",
    "noise_law",
    "persistent_contrastive_divergence",
    "pseudolikelihood",
    "ratio_matching",
    "rbm_persistent_contrastive_divergence",
    "recovery_likelihood",
    "recovery_sample",
    "recovery_schedule",
    "refined_proposal",
    "regularized",
    "score_matching",
    "short_run",
    "sliced_score_matching",
]
