"""Annealed Langevin dynamics: chains that follow a law as it sharpens, level by level.

    for σ in σ_1 > ... > σ_L:   repeat T times   x' = x - h_σ ∇E_σ(x) + sqrt(2 h_σ) ξ
    h_σ = h σ² / σ_L²

E_σ is the energy of the data's law convolved with N(0, σ²), learned for all σ at once by denoising
score matching, or any other energy indexed by a level. Wide levels join the modes, so that the
chain carries their weights down; plain Langevin dynamics keeps those of its start. The steps grow
with σ² so that the ratio of drift to noise is the same at all levels.

The step of Song and Ermon, x' = x + α s/2 + sqrt(α) ξ, is the one here with h = α/2.

Song and Ermon, "Generative modeling by estimating gradients of the data distribution", NeurIPS
2019, algorithm 1, and "Improved techniques for training score-based generative models", NeurIPS
2020 (the last denoising step).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from ebjax.energies.compose import condition
from ebjax.samplers.evaluate import value_and_gradient
from ebjax.samplers.langevin import check_positive, langevin
from ebjax.samplers.run import run_chain
from ebjax.types import EnergyFn, Kernel, Params, Position, bind

__all__ = ["annealed_langevin", "energy_from_score"]


def annealed_langevin(
    key: jax.Array,
    energy_fn: EnergyFn,
    params: Params,
    position: Position,
    *,
    noise_levels: npt.ArrayLike,
    num_steps: int,
    step_size: float | jax.Array,
    build_kernel: Callable[..., Kernel] = langevin,
    denoise: bool = False,
) -> tuple[Position, Any]:
    """Runs one chain down the levels.

    Pure, to embed in one's own ``jit`` and ``vmap``.

    Args:
      key: [] key of this chain.
      energy_fn: ``(params, x, level) -> []`` with ``level`` [] the σ. A model that takes the index
        of a level instead is given the index as ``jnp.searchsorted(-noise_levels, -level)``; one
        that gives a score is wrapped in ``energy_from_score``.
      params: its parameters.
      position: the start, best a draw of the widest law, N(0, σ_1²) where σ_1 is large.
      noise_levels: [L] positive, widest first; a geometric sequence is usual.
      num_steps: T, static, steps on each level.
      step_size: h > 0, the step on the last level; σ_L² at most, some tenth of it to be accurate.
      build_kernel: ``(step_size=...) -> Kernel``, given the traced step of a level: ``langevin``,
        ``mala`` (which leaves each level's law exactly invariant), or a ``functools.partial``.
      denoise: whether the end is x - σ_L² ∇E(x), the mean of the clean example given the noisy x
        (Tweedie's formula). It takes the noise of the last level away.

    Returns:
      ``(position, info)``: the end, and the kernel's info [L] averaged over each level's steps.

    Raises:
      ValueError: naming the argument that is out of range.

    >>> import jax, jax.numpy as jnp
    >>> def energy_fn(params, x, level):  # N(params, 1), convolved
    ...     return 0.5 * jnp.sum((x - params) ** 2) / (1.0 + level**2)
    >>> position, info = annealed_langevin(
    ...     jax.random.key(0), energy_fn, 3.0, jnp.zeros(2),
    ...     noise_levels=jnp.geomspace(10.0, 0.1, 5), num_steps=20, step_size=1e-3)
    >>> position.shape, info.gradient_norm.shape
    ((2,), (5,))
    """
    check_positive("step_size", step_size)
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; it must be at least 1.")
    if np.ndim(noise_levels) != 1 or np.shape(noise_levels)[0] == 0:
        raise ValueError(
            f"noise_levels has shape {np.shape(noise_levels)}; it must be a vector of at least one."
        )
    dtype = jnp.result_type(*jax.tree.leaves(position))
    levels = jnp.asarray(noise_levels).astype(dtype)
    last = levels[-1]

    def descend(position, indexed):
        index, level = indexed
        kernel = build_kernel(step_size=(step_size * jnp.square(level / last)).astype(dtype))
        at_level = condition(energy_fn, level)
        state = kernel.init(at_level, params, position)
        level_key = jax.random.fold_in(key, index)
        state, info = run_chain(level_key, kernel, at_level, params, state, num_steps)
        return state.position, info

    position, info = jax.lax.scan(descend, position, (jnp.arange(len(levels)), levels))
    if denoise:
        _, gradient, _ = value_and_gradient(condition(energy_fn, last), params, position)
        position = jax.tree.map(
            lambda x, g: x - (jnp.square(last) * g).astype(x.dtype), position, gradient
        )
    return position, info


def energy_from_score(score_fn: Callable[..., Position]) -> EnergyFn:
    """An energy function whose gradient is ``-score_fn(params, x, *context)``; its value is 0.

    For samplers that read the gradient alone (``langevin``, ``underdamped`` without its test,
    ``annealed_langevin``). The value is no energy, so Metropolis kernels must not take it, and
    nothing flows back into ``params``.

    Args:
      score_fn: ``(params, x, *context) -> ∇ log p(x)``, as ``x``.

    >>> energy_fn = energy_from_score(lambda params, x: params - x)
    >>> [float(v) for v in jax.value_and_grad(energy_fn, argnums=1)(1.0, 3.0)]
    [0.0, 2.0]
    """
    return bind(_linear, score_fn=score_fn)


def _linear(params, x, *context, score_fn):
    stop = jax.lax.stop_gradient
    score = stop(score_fn(params, stop(x), *context))
    products = jax.tree.map(lambda s, leaf: jnp.sum(-s * (leaf - stop(leaf))), score, x)
    return sum(jax.tree.leaves(products))
