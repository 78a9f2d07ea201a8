"""Noise-contrastive estimation: an energy learns to tell data from a known noise.

    G(x) = log p(x) - log q(x),    log p(x) = -E(x) - log Z,    log Z a parameter
    loss = E_data softplus(log ν - G(x)) + ν E_noise softplus(G(y) - log ν)

A logistic regression with ν noise points to each data point, whose log-odds are G - log ν. It is
smallest where exp(-E) / Z is the law of the data, wherever the noise has mass; there ``log_z`` is
the log normaliser, which the loss finds and is not told. The larger ν, the nearer to maximum
likelihood; the nearer the noise to the data, the fewer examples it takes, and noise that is told
apart at once teaches nothing.

Shapes: M noise points an example.

Gutmann and Hyvärinen, "Noise-contrastive estimation: a new estimation principle for unnormalized
statistical models", AISTATS 2010.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ebjax.objectives.regularizers import Regularizer, mean_penalty
from ebjax.types import EnergyFn, Objective, Params, Position, Target

__all__ = [
    "NoiseLaw",
    "frozen_flow",
    "log_ratio",
    "noise_contrastive",
    "noise_contrastive_loss",
    "noise_law",
    "noise_ratio",
]


class NoiseLaw(NamedTuple):
    """A law that can be drawn from and whose density is known.

    Attributes:
      sample: ``key -> x``, one exact draw.
      log_prob: ``x -> []``, normalised.
    """

    sample: Callable[[jax.Array], Position]
    log_prob: Callable[[Position], jax.Array]


def noise_law(law: Any) -> NoiseLaw:
    """Makes a ``NoiseLaw`` of what has a density and draws.

    Args:
      law: a ``NoiseLaw``; a ``Target`` with ``sample`` and ``log_z``; or a distribution with
        ``sample(seed=key)`` and ``log_prob(x) -> []`` as distrax has them, its event being one
        whole example. For a flow see ``frozen_flow``.

    Raises:
      ValueError: if it is none of these.

    >>> from ebjax.energies import targets
    >>> law = noise_law(targets.gaussian(jnp.zeros(1), jnp.eye(1)))
    >>> round(float(law.log_prob(jnp.zeros(1))), 4)
    -0.9189
    """
    if isinstance(law, NoiseLaw):
        return law
    if isinstance(law, Target):
        log_z, sample = law.log_z, law.sample
        if log_z is None or sample is None:
            lacks = "log_z" if log_z is None else "sample"
            raise ValueError(f"noise is a Target whose {lacks} is None; noise needs both.")
        return NoiseLaw(sample, lambda x: -law.energy((), x) - log_z)
    if not (hasattr(law, "sample") and hasattr(law, "log_prob")):
        raise ValueError(
            f"noise is a {type(law).__name__}; it must be a NoiseLaw, a Target with samples and "
            "log_z, or a distribution with sample(seed=...) and log_prob."
        )

    def log_prob(x):
        value = law.log_prob(x)
        if jnp.shape(value) != ():
            raise ValueError(
                f"log_prob of the noise has shape {jnp.shape(value)} for one example; make all of "
                "an example one event (distrax.Independent)."
            )
        return value

    return NoiseLaw(lambda key: law.sample(seed=key), log_prob)


def frozen_flow(flow: Any, params: Params) -> NoiseLaw:
    """A flow (``ebjax.energies.flows.Flow``) with given parameters, as fixed noise."""
    return NoiseLaw(lambda key: flow.sample(params, key), lambda x: flow.log_prob(params, x))


def noise_contrastive_loss(
    data_log_ratio: jax.Array, noise_log_ratio: jax.Array, *, ratio: float
) -> jax.Array:
    """``softplus(log ν - G⁺) + ν mean softplus(G⁻ - log ν)`` of one example.

    Args:
      data_log_ratio: [] G at the example.
      noise_log_ratio: [M] G at its noise points.
      ratio: ν > 0, noise points to a data point. The mean over M times ν: M need not be ν.

    >>> value = noise_contrastive_loss(jnp.array(0.0), jnp.zeros(3), ratio=1.0)
    >>> round(float(value), 4)  # 2 log 2: a coin
    1.3863
    """
    offset = math.log(ratio)
    return jax.nn.softplus(offset - data_log_ratio) + ratio * jnp.mean(
        jax.nn.softplus(noise_log_ratio - offset)
    )


def log_ratio(energy_fn: EnergyFn, params: Params, log_noise: jax.Array, x: Position) -> jax.Array:
    """[] ``G = -E(x) - log Z - log q(x)`` with ``params = {"energy", "log_z"}``."""
    return -energy_fn(params["energy"], x) - params["log_z"] - log_noise


def noise_ratio(num_noise: int, ratio: float | None) -> float:
    """Checks the options and returns ν.

    Raises:
      ValueError: naming the option that is out of range.
    """
    if num_noise < 1:
        raise ValueError(f"num_noise is {num_noise}; it must be at least 1.")
    if ratio is None:
        return float(num_noise)
    if not (math.isfinite(ratio) and ratio > 0.0):
        raise ValueError(f"ratio is {ratio}; it must be a positive number, or None for num_noise.")
    return ratio


def ratio_metrics(data: jax.Array, noise: jax.Array, ratio: float) -> dict[str, jax.Array]:
    """Scalars that say how the classifier does, from G of data [B] and of noise [B, M]."""
    offset = math.log(ratio)
    is_right = jnp.mean(data > offset) + ratio * jnp.mean(noise < offset)
    return {
        "accuracy": is_right / (1.0 + ratio),
        "log_ratio_data": data.mean(),
        "log_ratio_noise": noise.mean(),
    }


def noise_contrastive(
    energy_fn: EnergyFn,
    noise: Any,
    *,
    num_noise: int = 1,
    ratio: float | None = None,
    regularizers: tuple[Regularizer, ...] = (),
) -> Objective:
    """Noise-contrastive estimation with a fixed noise.

    Args:
      energy_fn: the energy that is trained.
      noise: what ``noise_law`` takes. Its parameters, if it has any, get no gradient.
      num_noise: M noise points an example, drawn anew in each update.
      ratio: ν > 0, the weight of the noise; ``None`` for M.
      regularizers: penalties ``(energy_fn, params, x) -> []`` on data and noise.

    Returns:
      An ``Objective`` over batches of examples, without carry, whose params are
      ``{"energy": those of energy_fn, "log_z": []}``. Metrics: ``log_z``, ``accuracy`` (of the
      classifier; max(1, ν) / (1 + ν) says that it learned nothing), ``log_ratio_data`` and
      ``log_ratio_noise`` (mean log p - log q).

    Raises:
      ValueError: naming the option that is out of range.

    >>> from ebjax.energies import targets
    >>> noise = targets.gaussian(jnp.zeros(2), jnp.eye(2))
    >>> objective = noise_contrastive(lambda params, x: 0.5 * params * jnp.sum(x**2), noise)
    >>> params = {"energy": 1.0, "log_z": jnp.log(2 * jnp.pi)}  # the noise's own law
    >>> keys = jax.random.split(jax.random.key(0), 4)
    >>> loss, (_, metrics) = objective.loss(params, (), keys, jnp.ones((4, 2)))
    >>> round(float(loss), 3), abs(float(metrics["log_ratio_noise"])) < 1e-5
    (1.386, True)
    """
    law, ratio = noise_law(noise), noise_ratio(num_noise, ratio)

    def draw(key):
        points = jax.vmap(law.sample)(jax.random.split(key, num_noise))
        return points, jax.vmap(law.log_prob)(points)

    def loss(params, carry, keys, batch):
        points, log_noise = jax.vmap(draw)(keys)
        log_data = jax.vmap(law.log_prob)(batch)
        points, log_noise, log_data = jax.lax.stop_gradient((points, log_noise, log_data))
        # One pass over data and noise together.
        both = join_examples(batch, points)
        log_both = jnp.concatenate([log_data, log_noise.reshape(-1)])
        ratios = jax.vmap(lambda log_q, x: log_ratio(energy_fn, params, log_q, x))(log_both, both)
        data, contrast = ratios[: len(log_data)], ratios[len(log_data) :].reshape(log_noise.shape)
        losses = jax.vmap(lambda d, n: noise_contrastive_loss(d, n, ratio=ratio))(data, contrast)
        value = losses.mean()
        metrics = {"log_z": params["log_z"], **ratio_metrics(data, contrast, ratio)}
        if regularizers:
            metrics["penalty"] = mean_penalty(regularizers, energy_fn, params["energy"], both)
            value = value + metrics["penalty"]
        return value, (carry, metrics)

    return Objective(init=lambda key, params, batch: (), loss=loss)


def join_examples(batch: Position, points: Position) -> Position:
    """[B + B M, ...]: data [B, ...], then their noise [B, M, ...]."""
    return jax.tree.map(
        lambda data, noise: jnp.concatenate([data, noise.reshape(-1, *noise.shape[2:])]),
        batch,
        points,
    )
