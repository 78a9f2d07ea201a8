"""Known laws: energies with exact samples, moments and log Z, for tests and benchmarks.

What is not known of a law is ``None``. The energy of a target ignores its ``params``; pass ``()``.

    gaussian     Gaussians, mixtures of them, a conjugate posterior
    synthetic    wells, a funnel, bent laws: shapes that are hard to sample
    planar       rings, moons, a pinwheel, a checkerboard
    bayesian     regressions and hierarchies on real data
    cox          the log-Gaussian Cox process
    physics      clusters of particles
    laplace      a Gaussian fitted to any energy at its mode
"""

from ebjax.energies.targets.bayesian import eight_schools, logistic_regression
from ebjax.energies.targets.cox import count_points, log_gaussian_cox
from ebjax.energies.targets.gaussian import (
    conjugate_gaussian,
    diagonal_gaussian,
    eight_gaussians,
    forty_gaussians,
    gaussian,
    gaussian_mixture,
    ill_conditioned_gaussian,
    isotropic_gaussian,
    nine_gaussians,
    twenty_five_gaussians,
)
from ebjax.energies.targets.laplace import laplace_approximation
from ebjax.energies.targets.physics import lennard_jones
from ebjax.energies.targets.planar import checkerboard, pinwheel, ring, rings, two_moons
from ebjax.energies.targets.posterior import Posterior
from ebjax.energies.targets.synthetic import (
    banana,
    double_well,
    funnel,
    many_well,
    rosenbrock,
)

__all__ = [
    "Posterior",
    "banana",
    "checkerboard",
    "conjugate_gaussian",
    "count_points",
    "diagonal_gaussian",
    "double_well",
    "eight_gaussians",
    "eight_schools",
    "forty_gaussians",
    "funnel",
    "gaussian",
    "gaussian_mixture",
    "ill_conditioned_gaussian",
    "isotropic_gaussian",
    "laplace_approximation",
    "lennard_jones",
    "log_gaussian_cox",
    "logistic_regression",
    "many_well",
    "nine_gaussians",
    "pinwheel",
    "ring",
    "rings",
    "rosenbrock",
    "twenty_five_gaussians",
    "two_moons",
]
