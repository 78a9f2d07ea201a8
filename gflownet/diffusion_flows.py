"""Flows of the states between the two ends of a diffusion sampler's path, and losses of its parts.

With p_t = N(0, t σ² I), the law at time t of the walk without drift, the forward and the backward
density of a step differ by the control and by p alone,

    log P_F - log P_B = u · Δs / σ² - |u|² dt / (2 σ²) + log p_{t+dt}(s') - log p_t(s),

so that with h_i = log F(s_i) - log p_{t_i}(s_i) the residual of the part of a path from i to j is
h_i - h_j plus the controls between them, and no density stands at t = 0, where p is a point. h is
log Z at the start, log R - log p_1 at the end and a network in between. Looking forward it is

    h_i = network(s_i, t_i) + t_i [log R(s_i) - log p_{t_i}(s_i)],

which is right at the end already and gives the first updates the energy of all states on the way.

Zhang et al., "Diffusion generative flow samplers", ICLR 2024; Sendera et al., "Improved off-policy
training of diffusion samplers", NeurIPS 2024 (the forward-looking form).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gflownet.objectives.subtrajectory_balance import (
    subtrajectory_losses,
    subtrajectory_residuals,
)

__all__ = ["PARTIAL_LOSSES", "PartialLoss", "log_reference", "partial_losses", "relative_flows"]


class PartialLoss(NamedTuple):
    """``is_forward_looking``, and ``decay`` λ of subtrajectory balance, ``None`` where free."""

    is_forward_looking: bool
    decay: float | None


PARTIAL_LOSSES = {
    "db": PartialLoss(False, 0.0),
    "subtb": PartialLoss(False, None),
    "fldb": PartialLoss(True, 0.0),
    "flsubtb": PartialLoss(True, None),
}


def log_reference(x: jax.Array, variance: jax.Array | float) -> jax.Array:
    """[] log N(x; 0, variance I) of ``x`` [D].

    >>> round(float(log_reference(jnp.zeros(2), 1.0)), 4)
    -1.8379
    """
    return -0.5 * (jnp.sum(jnp.square(x)) / variance + x.size * jnp.log(2.0 * math.pi * variance))


def relative_flows(
    path: jax.Array,
    energies: jax.Array,
    variance: float,
    log_z: jax.Array,
    log_flow: Callable[[jax.Array, jax.Array], jax.Array],
    *,
    is_forward_looking: bool,
) -> jax.Array:
    """h of all states of one path.

    Args:
      path: [T + 1, D].
      energies: [T + 1] -log R of them; only the last is used unless looking forward.
      variance: σ².
      log_z: [].
      log_flow: ``(x [D], time []) -> []``, the network.
      is_forward_looking: whether the energy of the states on the way is used.

    Returns:
      [T + 1].
    """
    num_steps = len(path) - 1
    times = jnp.arange(1, num_steps + 1) / num_steps
    gains = -energies[1:] - jax.vmap(log_reference)(path[1:], times * variance)
    between = jax.vmap(log_flow)(path[1:-1], times[:-1])
    if is_forward_looking:
        between += times[:-1] * gains[:-1]
    return jnp.concatenate([log_z[None], between, gains[-1:]])


def partial_losses(flows: jax.Array, controls: jax.Array, *, decay: float) -> jax.Array:
    """Mean squares of the residuals of the parts of each path, those of length l weighted by λ^l.

    Args:
      flows: [B, T + 1], h.
      controls: [B, T] those of the steps.
      decay: λ in [0, ∞]: 0 has single steps only (detailed balance), ∞ the whole path.

    Returns:
      [B].

    >>> partial_losses(jnp.array([[1.0, 0.0, 0.0]]), jnp.array([[0.0, 2.0]]), decay=0.0).tolist()
    [2.5]
    """
    valid = jnp.ones_like(controls, bool)
    residuals = jax.vmap(subtrajectory_residuals)(flows, controls, jnp.zeros_like(controls), valid)
    return subtrajectory_losses(jnp.square(residuals), valid.T, decay=decay, normalize="trajectory")
