"""Energies: known laws, networks, and compositions of both."""

from ebjax.energies import targets
from ebjax.energies.compose import condition, mixture, negate, sum_of, temper
from ebjax.energies.networks import convolutional_energy, from_linen, mlp_energy

__all__ = [
    "condition",
    "convolutional_energy",
    "from_linen",
    "mixture",
    "mlp_energy",
    "negate",
    "sum_of",
    "targets",
    "temper",
]
