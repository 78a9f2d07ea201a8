"""Samplers: kernels of one chain, and what runs, adapts and checks them.

Sequential Monte Carlo is in ``ebjax.samplers.smc``, figures of draws in
``ebjax.samplers.diagnostics``.
"""

from ebjax.samplers.adaptation import Warmup, warmup
from ebjax.samplers.adapters import (
    from_blackjax,
    from_distribution,
    from_log_prob,
    from_numpyro,
    to_blackjax,
)
from ebjax.samplers.annealed import annealed_langevin, energy_from_score
from ebjax.samplers.block_gibbs import block_gibbs, color_graph, rbm_gibbs
from ebjax.samplers.checkerboard import checkerboard_blocks, checkerboard_gibbs
from ebjax.samplers.constrained import (
    Domain,
    box,
    folded,
    projected_langevin,
    simplex,
    torus,
    unconstrain,
)
from ebjax.samplers.discrete_langevin import discrete_langevin
from ebjax.samplers.evaluate import GradientState
from ebjax.samplers.gibbs import gibbs
from ebjax.samplers.gibbs_with_gradients import gibbs_with_gradients
from ebjax.samplers.hmc import hmc
from ebjax.samplers.ladder import TunedLadder, tune_ladder
from ebjax.samplers.langevin import (
    LangevinInfo,
    LangevinState,
    langevin,
    minibatched,
    polynomial_decay,
    posterior_energy,
    sgld,
)
from ebjax.samplers.mala import MALAInfo, mala
from ebjax.samplers.nuts import nuts
from ebjax.samplers.path_auxiliary import path_auxiliary
from ebjax.samplers.random_walk import random_walk
from ebjax.samplers.reducers import expectation, fold, histogram, moments, pool_moments
from ebjax.samplers.run import Reducer, Samples, run_chain, sample
from ebjax.samplers.tempering import parallel_tempering
from ebjax.samplers.underdamped import underdamped
from ebjax.samplers.warmup_and_sample import warmup_and_sample
from ebjax.samplers.windows import Windows, warmup_windows

__all__ = [
    "Domain",
    "GradientState",
    "LangevinInfo",
    "LangevinState",
    "MALAInfo",
    "Reducer",
    "Samples",
    "TunedLadder",
    "Warmup",
    "Windows",
    "annealed_langevin",
    "block_gibbs",
    "box",
    "checkerboard_blocks",
    "checkerboard_gibbs",
    "color_graph",
    "discrete_langevin",
    "energy_from_score",
    "expectation",
    "fold",
    "folded",
    "from_blackjax",
    "from_distribution",
    "from_log_prob",
    "from_numpyro",
    "gibbs",
    "gibbs_with_gradients",
    "histogram",
    "hmc",
    "langevin",
    "mala",
    "minibatched",
    "moments",
    "nuts",
    "parallel_tempering",
    "path_auxiliary",
    "polynomial_decay",
    "pool_moments",
    "posterior_energy",
    "projected_langevin",
    "random_walk",
    "rbm_gibbs",
    "run_chain",
    "sample",
    "sgld",
    "simplex",
    "to_blackjax",
    "torus",
    "tune_ladder",
    "unconstrain",
    "underdamped",
    "warmup",
    "warmup_and_sample",
    "warmup_windows",
]
