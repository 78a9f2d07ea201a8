"""Energies: known laws, networks, latent and joint energies, and compositions of all."""

from ebjax.energies import targets
from ebjax.energies.compose import condition, mixture, negate, sum_of, temper
from ebjax.energies.joint import class_energy, free_energy, joint_energy
from ebjax.energies.latent import marginalize, minimize_latent
from ebjax.energies.learned_mixture import learned_gaussian_mixture
from ebjax.energies.networks import (
    Graph,
    class_conditional_energy,
    convolutional_energy,
    from_function,
    from_linen,
    from_nnx,
    graph_energy,
    mlp_classifier,
    mlp_energy,
    residual_classifier,
    residual_energy,
    set_energy,
    vision_transformer_classifier,
    vision_transformer_energy,
)
from ebjax.energies.spectral import spectrally_normalized

__all__ = [
    "Graph",
    "class_conditional_energy",
    "class_energy",
    "condition",
    "convolutional_energy",
    "free_energy",
    "from_function",
    "from_linen",
    "from_nnx",
    "graph_energy",
    "joint_energy",
    "learned_gaussian_mixture",
    "marginalize",
    "minimize_latent",
    "mixture",
    "mlp_classifier",
    "mlp_energy",
    "negate",
    "residual_classifier",
    "residual_energy",
    "set_energy",
    "spectrally_normalized",
    "sum_of",
    "targets",
    "temper",
    "vision_transformer_classifier",
    "vision_transformer_energy",
]
