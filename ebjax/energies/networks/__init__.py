"""Networks as energies: one example in, one scalar out. No layer mixes examples."""

from ebjax.energies.adapters import from_function, from_linen, from_nnx
from ebjax.energies.networks.attention import (
    set_energy,
    vision_transformer_classifier,
    vision_transformer_energy,
)
from ebjax.energies.networks.conditional import class_conditional_energy
from ebjax.energies.networks.convolutional import (
    convolutional_energy,
    residual_classifier,
    residual_energy,
)
from ebjax.energies.networks.graphs import Graph, graph_energy
from ebjax.energies.networks.multilayer import mlp_classifier, mlp_energy

__all__ = [
    "Graph",
    "class_conditional_energy",
    "convolutional_energy",
    "from_function",
    "from_linen",
    "from_nnx",
    "graph_energy",
    "mlp_classifier",
    "mlp_energy",
    "residual_classifier",
    "residual_energy",
    "set_energy",
    "vision_transformer_classifier",
    "vision_transformer_energy",
]
