"""Energy-based models in JAX: energies, samplers, objectives, training.

``import ebjax`` brings the parts that are embedded in other programs: ``ebjax.energies``,
``ebjax.samplers`` and ``ebjax.objectives``. ``ebjax.training`` (which loads Orbax) and
``ebjax.recipes`` are imported where they are used.
"""

from ebjax import energies, objectives, samplers
from ebjax.types import Energy, EnergyFn, Kernel, Objective, Source, Target, TrainState

__version__ = "0.1.0"

__all__ = [
    "Energy",
    "EnergyFn",
    "Kernel",
    "Objective",
    "Source",
    "Target",
    "TrainState",
    "energies",
    "objectives",
    "samplers",
]
