"""Posteriors with their two factors, for methods that go from the prior to the posterior."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax

from ebjax.types import EnergyFn, Moments, Target

__all__ = ["Posterior", "make_posterior"]


class Posterior(NamedTuple):
    """A ``Target``, attribute by attribute, that also has its prior and its likelihood.

        energy(x) = prior.energy(x) + likelihood(x),    log_z = log ∫ prior exp(-likelihood) dx

    The prior is normalised, so ``log_z`` is the log evidence.

    Attributes:
      energy: E = -log prior - log likelihood.
      event_shape: shape of one example.
      log_z: the log evidence.
      sample: one exact draw of the posterior.
      moments: the posterior's.
      modes: the posterior's.
      prior: its law, with ``log_z`` 0 and exact samples.
      likelihood: the energy -log p(data | x).
    """

    energy: EnergyFn
    event_shape: tuple[int, ...]
    log_z: float | None
    sample: Callable[[jax.Array], jax.Array] | None
    moments: Moments | None
    modes: jax.Array | None
    prior: Target
    likelihood: EnergyFn


def make_posterior(
    prior: Target,
    likelihood: EnergyFn,
    *,
    log_z: float | None = None,
    sample: Callable[[jax.Array], jax.Array] | None = None,
    moments: Moments | None = None,
    modes: jax.Array | None = None,
) -> Posterior:
    """Puts both factors together."""

    def energy(params, x):
        return prior.energy(params, x) + likelihood(params, x)

    return Posterior(energy, prior.event_shape, log_z, sample, moments, modes, prior, likelihood)
