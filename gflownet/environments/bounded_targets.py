"""Densities on the unit cube and on the torus, with their normalisers and exact draws.

``p(x) ∝ exp(-energy(x))``, and the reward of a flow is ``exp(-energy)``.

Lahlou et al., "A theory of continuous generative flow networks", ICML 2023 (``steps_target``,
``torus_target``). Mila AI4Science et al., "Crystal-GFN", 2023 (``corners_target``).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr, ndtri

from ebjax.types import Target

__all__ = ["corners_target", "steps_target", "torus_target"]


def _check_dim(dim: int) -> None:
    if dim < 1:
        raise ValueError(f"dim is {dim}; it must be at least 1.")


def steps_target(
    dim: int = 2,
    *,
    reward_floor: float = 0.1,
    reward_outer: float = 0.5,
    reward_ring: float = 2.0,
) -> Target:
    """The rewards of the hypergrid as a density on [0, 1]^D.

        R(x) = R0 + R1 Π_k 1[1/4 < a_k] + R2 Π_k 1[3/10 < a_k < 4/10],    a_k = |x_k - 1/2|
        Z = R0 + R1 / 2^D + R2 / 5^D

    Args:
      dim: D.
      reward_floor: R0 > 0.
      reward_outer: R1 >= 0.
      reward_ring: R2 >= 0.

    Raises:
      ValueError: naming the argument that is out of range.

    >>> round(steps_target(2).log_z, 6)
    -1.187444
    """
    _check_dim(dim)
    if not reward_floor > 0:
        raise ValueError(f"reward_floor is {reward_floor}; it must be positive.")
    if reward_outer < 0 or reward_ring < 0:
        raise ValueError(
            f"reward_outer is {reward_outer} and reward_ring {reward_ring}; "
            "neither may be negative."
        )
    masses = [reward_floor, reward_outer * 0.5**dim, reward_ring * 0.2**dim]

    def energy(params, x):
        del params
        distance = jnp.abs(x - 0.5)
        in_outer = (distance > 0.25).all()
        in_ring = ((distance > 0.3) & (distance < 0.4)).all()
        return -jnp.log(reward_floor + reward_outer * in_outer + reward_ring * in_ring)

    def sample(key):
        """A part of the sum, then a uniform point of its region."""
        which_key, side_key, place_key = jax.random.split(key, 3)
        which = jax.random.categorical(which_key, jnp.log(jnp.asarray(masses)))
        side = jnp.where(jax.random.bernoulli(side_key, shape=(dim,)), 1.0, -1.0)
        inner, outer = jnp.asarray([[0.0, 0.5], [0.25, 0.5], [0.3, 0.4]])[which]
        distance = inner + (outer - inner) * jax.random.uniform(place_key, (dim,))
        return 0.5 + side * distance

    return Target(energy, (dim,), log_z=math.log(sum(masses)), sample=sample)


def corners_target(dim: int = 2, *, offset: float = 0.375, deviation: float = 0.05) -> Target:
    """Normal bumps near the 2^D corners of [0, 1]^D.

        R(x) = Π_k ½ Σ_± N(x_k; ½ ± offset, deviation²)

    Args:
      dim: D.
      offset: of the bumps from the middle, in (0, 1/2).
      deviation: of a bump, positive.

    Raises:
      ValueError: naming the argument that is out of range.
    """
    _check_dim(dim)
    if not 0 < offset < 0.5:
        raise ValueError(f"offset is {offset}; it must lie between 0 and 0.5.")
    if not deviation > 0:
        raise ValueError(f"deviation is {deviation}; it must be positive.")
    # In units of the deviation, from a middle of a bump to the near border and to the far one.
    near, far = (0.5 - offset) / deviation, (0.5 + offset) / deviation

    def energy(params, x):
        del params
        scaled = (jnp.abs(x - 0.5) - offset) / deviation
        mirrored = (jnp.abs(x - 0.5) + offset) / deviation
        log_density = jnp.logaddexp(-0.5 * scaled**2, -0.5 * mirrored**2)
        return dim * math.log(2.0 * deviation * math.sqrt(2.0 * math.pi)) - log_density.sum()

    def sample(key):
        """Of each coordinate a side, then the normal law between the borders."""
        side_key, place_key = jax.random.split(key)
        side = jnp.where(jax.random.bernoulli(side_key, shape=(dim,)), 1.0, -1.0)
        low, high = ndtr(-far), ndtr(near)
        uniform = jax.random.uniform(place_key, (dim,), minval=1e-7)
        z = ndtri(low + (high - low) * uniform)
        return 0.5 + side * (offset + deviation * z)

    inside = 0.5 * (math.erf(near / math.sqrt(2.0)) + math.erf(far / math.sqrt(2.0)))
    log_z = dim * math.log(inside)
    modes = 0.5 + offset * (2.0 * jnp.indices((2,) * dim).reshape(dim, -1).T - 1.0)
    return Target(energy, (dim,), log_z=log_z, sample=sample, modes=modes)


def torus_target(dim: int = 2) -> Target:
    """A smooth density of D angles.

        R(x) = ((Σ_{even k} sin x_k + Σ_{odd k} cos x_k + D) / (2 D))³
        Z = (2π)^D (1 + 3 / (2 D)) / 8

    since the sum has mean 0, mean square D / 2 and no third moment under uniform angles.

    Args:
      dim: D.

    >>> round(torus_target(2).log_z, 6)
    2.155928
    """
    _check_dim(dim)
    shift = 0.5 * math.pi * (jnp.arange(dim) % 2)

    def log_reward(x):
        share = 0.5 + jnp.sum(jnp.sin(x + shift)) / (2.0 * dim)
        return 3.0 * jnp.log(jnp.maximum(share, 1e-12))

    def sample(key):
        """Uniform angles, accepted with probability R <= 1."""

        def propose(loop):
            count, _, _ = loop
            place_key, coin_key = jax.random.split(jax.random.fold_in(key, count))
            x = jax.random.uniform(place_key, (dim,), maxval=2.0 * math.pi)
            is_accepted = jnp.log(jax.random.uniform(coin_key)) < log_reward(x)
            return count + 1, x, is_accepted

        start = (0, jnp.zeros(dim), jnp.zeros((), bool))
        return jax.lax.while_loop(lambda loop: ~loop[2], propose, start)[1]

    return Target(
        energy=lambda params, x: -log_reward(x),
        event_shape=(dim,),
        log_z=dim * math.log(2.0 * math.pi) + math.log((1.0 + 1.5 / dim) / 8.0),
        sample=sample,
    )
