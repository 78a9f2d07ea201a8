"""How data are diffused for recovery likelihood: noise totals by level, and pairs of neighbours.

    x_t = ᾱ_t x + σ̄_t ε,    x_{t+1} = a_t x_t + σ_t ε',    a_t = ᾱ_{t+1}/ᾱ_t,  σ_t² = 1 - a_t²

for levels t = 0 ... T - 1, from nearly clean data x_0 to x_T, nearly N(0, I). The law that belongs
to level t is that of ``y = a_t x_t``, for which ``x_{t+1} = y + σ_t ε'``; at the top level it is
that of x_{T-1} itself.

Gao et al., "Learning energy-based models by diffusion recovery likelihood", ICLR 2021. Zhu et al.,
"Learning energy-based models by cooperative diffusion recovery likelihood", ICLR 2024 (the cosine
schedule, pairs with shared noise).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from ebjax.numerics import random_normal_like
from ebjax.types import Position

__all__ = [
    "RecoverySchedule",
    "at_level",
    "cosine_noise",
    "recovery_pair",
    "recovery_schedule",
    "steps_of_narrow_data",
]


class RecoverySchedule(NamedTuple):
    """How data are diffused; the top level is the last one.

    Attributes:
      signal: [T + 1] ᾱ_t.
      noise: [T + 1] σ̄_t, increasing, ``ᾱ² + σ̄² = 1``.
      step_signal: [T] a_t.
      step_noise: [T] σ_t.
      scale: [T] what ``y`` is of x_t: a_t, and 1 at the top.
      tether: [T] 1/σ_t², and 0 at the top.
    """

    signal: np.ndarray
    noise: np.ndarray
    step_signal: np.ndarray
    step_noise: np.ndarray
    scale: np.ndarray
    tether: np.ndarray

    @property
    def num_levels(self) -> int:
        """T."""
        return len(self.scale)


def recovery_schedule(noise: npt.ArrayLike) -> RecoverySchedule:
    """The schedule of given noise totals.

    Args:
      noise: σ̄ [T + 1], from the noise of the cleanest level (small, 0 for none) to that of the top
        (near 1), increasing within [0, 1].

    Raises:
      ValueError: if it is not such a vector.

    >>> recovery_schedule([0.0, 0.6, 1.0]).step_noise.round(3).tolist()
    [0.6, 1.0]
    """
    noise = np.asarray(noise, float)
    if noise.ndim != 1 or len(noise) < 2:
        raise ValueError(f"noise has shape {noise.shape}; give T + 1 totals for T levels.")
    if not (noise[0] >= 0 and noise[-1] <= 1 and np.all(np.diff(noise) > 0)):
        raise ValueError(
            f"noise is {noise.tolist()}; it must increase from 0 or more to 1 at most."
        )
    signal = np.sqrt(1.0 - noise**2)
    step_signal = signal[1:] / signal[:-1]
    step_noise = np.sqrt(1.0 - step_signal**2)
    is_top = np.arange(len(step_signal)) == len(step_signal) - 1
    return RecoverySchedule(
        signal=signal,
        noise=noise,
        step_signal=step_signal,
        step_noise=step_noise,
        scale=np.where(is_top, 1.0, step_signal),
        tether=np.where(is_top, 0.0, 1.0 / step_noise**2),
    )


def cosine_noise(
    num_levels: int = 6, *, largest_log_snr: float = 9.8, smallest_log_snr: float = -5.1
) -> np.ndarray:
    """The totals σ̄ [T + 1] of the cosine schedule: ᾱ = cos φ, σ̄ = sin φ with equal steps of φ.

    Args:
      num_levels: T, at least 1.
      largest_log_snr: log(ᾱ²/σ̄²) of the cleanest level.
      smallest_log_snr: the same at the top.

    Raises:
      ValueError: naming the argument that is out of range.

    >>> schedule = recovery_schedule(cosine_noise())  # the squares of the published σ_t
    >>> [round(float(s), 3) for s in schedule.step_noise**2]
    [0.064, 0.18, 0.303, 0.451, 0.652, 0.941]
    """
    if num_levels < 1:
        raise ValueError(f"num_levels is {num_levels}; there must be at least 1.")
    if not largest_log_snr > smallest_log_snr:
        raise ValueError(
            f"largest_log_snr is {largest_log_snr}; it must be above smallest_log_snr, "
            f"{smallest_log_snr}."
        )
    first, last = (math.atan(math.exp(-0.5 * snr)) for snr in (largest_log_snr, smallest_log_snr))
    return np.sin(np.linspace(first, last, num_levels + 1))


def steps_of_narrow_data(schedule: RecoverySchedule, share: float) -> np.ndarray:
    """Steps s_t [T], as shares of σ_t², for data with directions in which they do not vary.

        h_t = s_t σ_t² = share / (1/(scale_t σ̄_t)² + tether_t)

    In such a direction the law of y is N(., (scale_t σ̄_t)²), and a chain is stable for ``share``
    below 2; the lower the level, the narrower it is than the tether. The published steps, which
    grow with σ̄_t, do the same.

    Args:
      schedule: how data are diffused; its cleanest level must have noise.
      share: of the narrowest variance, positive.

    Raises:
      ValueError: if the cleanest level has no noise, or ``share`` is not positive.

    >>> steps_of_narrow_data(recovery_schedule([0.1, 0.6, 0.9, 1.0]), 0.5).round(3).tolist()
    [0.009, 0.066, 0.405]
    """
    if not share > 0.0:
        raise ValueError(f"share is {share}; it must be positive.")
    if not schedule.noise[0] > 0.0:
        raise ValueError("The cleanest level has no noise: narrow data leave no room for a step.")
    narrowest = 1.0 / ((schedule.scale * schedule.noise[:-1]) ** -2.0 + schedule.tether)
    return share * narrowest / schedule.step_noise**2


def at_level(values: np.ndarray, level: jax.Array, like: Position) -> jax.Array:
    """[] the value of a level, in the dtype of a position."""
    return jnp.asarray(values, jnp.result_type(*jax.tree.leaves(like)))[level]


def recovery_pair(
    key: jax.Array,
    x: Position,
    level: jax.Array,
    schedule: RecoverySchedule,
    *,
    shared_noise: bool = True,
) -> tuple[Position, Position]:
    """A data point of a level, and the noisier example that it is recovered from.

    Args:
      key: [] key of the noise.
      x: [...] one clean example, best scaled to variance 1.
      level: [] int, t.
      schedule: how data are diffused.
      shared_noise: whether both are made of the same noise, ``x_{t+1} = ᾱ_{t+1} x + σ̄_{t+1} ε``.
        Each then has its own law right but not the two together, so that no likelihood can be
        estimated from such pairs; it varies less. Otherwise ``x_{t+1} = a_t x_t + σ_t ε'`` with
        fresh noise.

    Returns:
      ``(y⁺, x_{t+1})``, both as ``x``.
    """
    first_key, second_key = jax.random.split(key)
    at = lambda values, index: at_level(values, index, x)  # noqa: E731
    noise = random_normal_like(first_key, x)

    def diffuse(index):
        signal, scale = at(schedule.signal, index), at(schedule.noise, index)
        return jax.tree.map(lambda leaf, xi: signal * leaf + scale * xi, x, noise)

    clean = diffuse(level)
    if shared_noise:
        noisier = diffuse(level + 1)
    else:
        signal, scale = at(schedule.step_signal, level), at(schedule.step_noise, level)
        fresh = random_normal_like(second_key, x)
        noisier = jax.tree.map(lambda leaf, xi: signal * leaf + scale * xi, clean, fresh)
    share = at(schedule.scale, level)
    return jax.tree.map(lambda leaf: share * leaf, clean), noisier
