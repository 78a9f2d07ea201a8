"""Warm-up and sampling in one call, in that order.

Draws of a kernel that still adapts do not follow the law; here none is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from ebjax.samplers.adaptation import Warmup, warmup
from ebjax.samplers.run import Samples, sample
from ebjax.types import EnergyFn, Kernel, Params, Position

__all__ = ["warmup_and_sample"]


def warmup_and_sample(
    key: jax.Array,
    make_kernel: Callable[..., Kernel],
    energy_fn: EnergyFn,
    params: Params,
    initial_positions: Position,
    *,
    num_warmup: int,
    num_samples: int,
    target_acceptance: float = 0.8,
    metric: str = "diagonal",
    initial_step_size: float = 1.0,
    num_devices: int = 1,
    **options: Any,
) -> tuple[Samples, Warmup]:
    """Adapts a kernel, freezes it, and samples with it from where the warm-up ended.

    Args:
      key: [] key.
      make_kernel: called with ``step_size`` and ``inverse_mass``: ``nuts``, ``mala``, or
        ``bind(hmc, num_steps=10)``.
      energy_fn: E.
      params: its parameters.
      initial_positions: [C, ...] of the chains, which share the adaptation.
      num_warmup: steps of ``warmup``.
      num_samples: N of ``sample``.
      target_acceptance: of ``warmup``; 0.8 suits HMC and NUTS, 0.57 MALA.
      metric: of ``warmup``.
      initial_step_size: of ``warmup``.
      num_devices: of both: local devices to spread the chains over.
      **options: of ``sample``, such as ``thinning``, ``reducers``.

    Returns:
      ``(draws, adapted)``; of ``draws`` nothing comes from the warm-up, whose evaluations are in
      ``adapted.info``.

    Raises:
      ValueError: naming the argument that is out of range.

    >>> import jax, jax.numpy as jnp
    >>> from ebjax.samplers import nuts
    >>> scales = jnp.array([0.1, 1.0, 10.0])
    >>> draws, adapted = warmup_and_sample(
    ...     jax.random.key(0), nuts, lambda params, x: 0.5 * jnp.sum((x / scales) ** 2), (),
    ...     jnp.ones((50, 3)), num_warmup=100, num_samples=40)
    >>> bool(jnp.all(abs(draws.positions.std((0, 1)) / scales - 1.0) < 0.1))
    True
    """
    warmup_key, sample_key = jax.random.split(key)
    adapted = warmup(
        warmup_key,
        make_kernel,
        energy_fn,
        params,
        initial_positions,
        num_steps=num_warmup,
        target_acceptance=target_acceptance,
        metric=metric,
        initial_step_size=initial_step_size,
        num_devices=num_devices,
    )
    assert adapted.kernel is not None  # since the chains share it
    draws = sample(
        sample_key,
        adapted.kernel,
        energy_fn,
        params,
        adapted.positions,
        num_samples=num_samples,
        num_devices=num_devices,
        **options,
    )
    return draws, adapted
