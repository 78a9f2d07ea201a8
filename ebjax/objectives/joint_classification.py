"""Joint energy model (JEM): a classifier that is trained as a model of its inputs as well.

    E(x) = -log Σ_k exp f_k(x),   p(y | x) = softmax f(x)
    loss = mean -log p(y | x_l) + w [ mean E(x_d) - mean E(x_q) ]

The first term is the cross-entropy on labelled examples x_l; the second is minus the log-likelihood
of inputs x_d, its gradient estimated with the ends x_q of persistent chains, which are constants in
the loss. Labelled and unlabelled examples are drawn independently. With w = 0 it is plain
classification, and no chain runs.

Sharpness-aware minimisation takes the gradient at w + ε, with the same x_q:

    ε = ρ θ² g / | |θ| g |,    g = gradient of the loss at θ      (adaptive: scaled by θ)

Shapes: K classes, logits f(x) [K].

Grathwohl et al., "Your classifier is secretly an energy based model and you should treat it like
one", ICLR 2020. Yang and Ji, "JEM++", ICCV 2021 (births from class Gaussians, clipped gradients).
Yang, Su and Ji, "Towards bridging the performance gaps of joint energy-based models", CVPR 2023
(sharpness-aware). Kwon et al., "ASAM", ICML 2021.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

from ebjax.energies.joint import LogitsFn, joint_energy
from ebjax.objectives.persistent_chains import ChainRules, advance_chains, start_chains
from ebjax.objectives.regularizers import Regularizer, mean_penalty
from ebjax.types import Kernel, Objective, Params, Position, bind

__all__ = [
    "JointBatch",
    "class_gaussian_births",
    "cross_entropy",
    "joint_classification",
    "sharpness_ascent",
]


class JointBatch(NamedTuple):
    """What one example slot gets.

    Attributes:
      labelled: [...] an input x_l.
      label: [] integer, its class.
      unlabelled: [...] another input x_d, for the likelihood.
    """

    labelled: Position
    label: jax.Array
    unlabelled: Position


def cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
    """[] ``-log softmax(f)_y`` of one example, ``logits`` [K] and ``label`` [] an integer.

    >>> round(float(cross_entropy(jnp.zeros(2), 1)), 4)
    0.6931
    """
    return -jax.nn.log_softmax(logits)[label]


def sharpness_ascent(params: Params, gradient: Params, radius: float) -> Params:
    """ε = ρ θ² g / | |θ| g |, the direction in which the loss rises most within an ellipsoid.

    Args:
      params: θ.
      gradient: g, likewise.
      radius: ρ >= 0; about 2 for this scaled form.

    >>> step = sharpness_ascent(jnp.array([2.0, 0.0]), jnp.array([3.0, 5.0]), 0.5)
    >>> step.tolist()
    [1.0, 0.0]
    """
    scaled = jax.tree.map(lambda w, g: jnp.abs(w) * g, params, gradient)
    scale = radius / jnp.maximum(optax.tree.norm(scaled), 1e-12)
    return jax.tree.map(lambda w, s: scale * jnp.abs(w) * s, params, scaled)


def joint_classification(
    logits_fn: LogitsFn,
    kernel: Kernel,
    initial_position: Callable[..., Position],
    *,
    num_steps: int,
    likelihood_weight: float = 1.0,
    chains_per_example: int = 1,
    rebirth_probability: float = 0.05,
    regularizers: tuple[Regularizer, ...] = (),
    sharpness_radius: float = 0.0,
    axis_name: str | None = None,
) -> Objective:
    """Builds the objective.

    Args:
      logits_fn: ``(params, x) -> [K]``.
      kernel: the transition of the chains. The published systems use ``langevin`` with
        ``noise_scale`` far below sqrt(2 h), and with ``gradient_clip`` and ``bounds`` (JEM++).
      initial_position: ``key -> x``, what chains are born from: noise, or
        ``class_gaussian_births``.
      num_steps: transitions of a chain in one update.
      likelihood_weight: w >= 0.
      chains_per_example: chains that each slot owns.
      rebirth_probability: chance that the chosen chain starts anew, in [0, 1].
      regularizers: penalties on E at x_d and x_q.
      sharpness_radius: ρ >= 0 of sharpness-aware minimisation; 0 leaves it out.
      axis_name: the mapped axis over which ε averages gradients; without it each device ascends
        its own part of the batch.

    Returns:
      An ``Objective`` over batches ``JointBatch`` [B, ...], whose carry is ``PersistentChains``
      (``()`` for w = 0). Metrics: ``cross_entropy``, ``accuracy`` and, for w > 0, ``energy_data``,
      ``energy_samples``, ``energy_gap`` (data minus samples), ``chain_age``, ``chains_finite``.

    Raises:
      ValueError: naming the option that is out of range.
    """
    for name, value in (
        ("likelihood_weight", likelihood_weight),
        ("sharpness_radius", sharpness_radius),
    ):
        if not (np.isfinite(value) and value >= 0.0):
            raise ValueError(f"{name} is {value}; it must be a finite number of at least 0.")
    rules = ChainRules(kernel, initial_position, num_steps, chains_per_example, rebirth_probability)
    rules.check()
    energy_fn = joint_energy(logits_fn)

    def init(key, params, batch):
        del params
        return start_chains(key, rules, batch.unlabelled) if likelihood_weight else ()

    def loss_at(params, batch, ends):
        """The loss with x_q given, and its metrics."""
        logits = jax.vmap(logits_fn, (None, 0))(params, batch.labelled)
        total = jax.vmap(cross_entropy)(logits, batch.label).mean()
        metrics = {
            "cross_entropy": total,
            "accuracy": (logits.argmax(-1) == batch.label).mean(dtype=jnp.float32),
        }
        if likelihood_weight:
            both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), batch.unlabelled, ends)
            energies = jax.vmap(energy_fn, (None, 0))(params, both)
            data, samples = (part.mean() for part in jnp.split(energies, 2))
            total = total + likelihood_weight * (data - samples)
            metrics |= {
                "energy_data": data,
                "energy_samples": samples,
                "energy_gap": data - samples,
            }
            if regularizers:
                penalty = 2.0 * mean_penalty(regularizers, energy_fn, params, both)
                total, metrics["penalty"] = total + penalty, penalty
        return total, metrics

    def loss(params, carry, keys, batch):
        ends: Any = ()
        chain_metrics = {}
        if likelihood_weight:
            negative, carry, info = advance_chains(
                keys, rules, energy_fn, params, carry, batch.unlabelled
            )
            ends = negative.position
            chain_metrics = {
                "chain_age": carry.age.mean(dtype=jnp.float32),
                "chains_finite": info.is_finite.mean(),
            }
        if sharpness_radius:
            frozen = jax.lax.stop_gradient(params)
            gradient = jax.grad(lambda p: loss_at(p, batch, ends)[0])(frozen)
            if axis_name is not None:
                gradient = jax.lax.pmean(gradient, axis_name)
            ascent = jax.lax.stop_gradient(sharpness_ascent(frozen, gradient, sharpness_radius))
            params = jax.tree.map(jnp.add, params, ascent)
        total, metrics = loss_at(params, batch, ends)
        return total, (carry, {**metrics, **chain_metrics})

    return Objective(init=init, loss=loss)


def class_gaussian_births(
    examples: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    bounds: tuple[float, float] | None = None,
    ridge: float = 1e-4,
) -> Callable[[jax.Array], jax.Array]:
    """Births from the Gaussian of a class: ``key -> x``, the class by its share.

    Chains start near the data, so few steps do. What they start with are the mean and the
    covariance of each class, so distances that compare only these say nothing of the model.

    Args:
      examples: [N, ...] training inputs.
      labels: [N] integers, their classes; a class without examples is left out.
      bounds: clips each component to [low, high].
      ridge: added to the variance of each component, > 0.

    Raises:
      ValueError: if the numbers of examples and labels differ, or ``ridge`` is not positive.

    >>> births = class_gaussian_births(np.array([[0.0], [0.1], [9.0], [9.1]]), [0, 0, 1, 1])
    >>> births(jax.random.key(0)).shape
    (1,)
    """
    examples, labels = np.asarray(examples, np.float64), np.asarray(labels)
    if labels.shape != examples.shape[:1] or not len(labels):
        raise ValueError(
            f"labels has shape {labels.shape} for examples of shape {examples.shape}; give one "
            "label for each example, at least one."
        )
    if not ridge > 0.0:
        raise ValueError(f"ridge is {ridge}; it must be positive.")
    flat = examples.reshape(len(examples), -1)
    classes, counts = np.unique(labels, return_counts=True)
    means, roots = [], []
    for one in classes:
        members = flat[labels == one]
        centred = members - members.mean(axis=0)
        covariance = centred.T @ centred / len(members) + ridge * np.eye(flat.shape[1])
        means.append(members.mean(axis=0))
        roots.append(np.linalg.cholesky(covariance))
    return bind(
        _class_gaussian,
        log_shares=jnp.asarray(np.log(counts / counts.sum()), float),
        means=jnp.asarray(np.stack(means), float),
        roots=jnp.asarray(np.stack(roots), float),
        shape=examples.shape[1:],
        bounds=bounds,
    )


def _class_gaussian(key, *, log_shares, means, roots, shape, bounds):
    class_key, noise_key = jax.random.split(key)
    one = jax.random.categorical(class_key, log_shares)
    noise = jax.random.normal(noise_key, means.shape[1:], means.dtype)
    x = (means[one] + roots[one] @ noise).reshape(shape)
    return x if bounds is None else jnp.clip(x, *bounds)
