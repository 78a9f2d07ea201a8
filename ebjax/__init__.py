"""Energy-based models in JAX: energies, samplers, objectives, training.

``import ebjax`` brings the parts that are embedded in other programs: ``ebjax.energies``,
``ebjax.samplers`` and ``ebjax.objectives``. ``ebjax.training`` (which loads Orbax) and
``ebjax.recipes`` are imported where they are used. ``ebjax.load`` reads what a run has learned
(``ebjax.export_function`` writes it for programs without this package).
"""

from ebjax import energies, objectives, samplers
from ebjax.exporting import export_function
from ebjax.loading import load
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
    "export_function",
    "load",
    "objectives",
    "samplers",
]
