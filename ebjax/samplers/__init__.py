"""Samplers: kernels of one chain, and what runs them."""

from ebjax.samplers.langevin import LangevinInfo, LangevinState, langevin
from ebjax.samplers.mala import MALAInfo, MALAState, mala
from ebjax.samplers.run import Samples, run_chain, sample

__all__ = [
    "LangevinInfo",
    "LangevinState",
    "MALAInfo",
    "MALAState",
    "Samples",
    "langevin",
    "mala",
    "run_chain",
    "sample",
]
