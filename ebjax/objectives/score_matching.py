"""Score matching: the gradient of the energy is fitted to that of the data's law, without samples.

The Fisher divergence between the data's law p and the model exp(-E)/Z needs no Z, and by parts no
score of the data either:

    J = E_p ½|∇E + ∇log p|² = E_p[ ½|∇E|² - ΔE ] + constant

    implicit            ½|∇E|² - tr ∇²E                           (D Hessian-vector products)
    sliced              ½(v·∇E)² - v'∇²E v,    E[v v'] = I        (one product a slice)
      variance-reduced  ½|∇E|² - v'∇²E v
    finite difference   (E₊ - E₋)²/(8ε²) - (E₊ + E₋ - 2 E₀)/ε²,   E± = E(x ± εv)

The last agrees with the sliced one up to O(ε²), and its gradient in the parameters needs first
derivatives only. Where E is minus a log-density the model's score is -∇E, and so the sign of the
Laplacian is negative. Data should have a density: of data on a surface, or of few distinct points,
the loss has no minimum.

All of them weigh the places where data are. Of modes that are far apart they fix the shapes and
not the relative weights.

Shapes: x is [...], any array or pytree with D numbers; ``∇`` and ``Δ`` are in x.

Hyvärinen, "Estimation of non-normalized statistical models by score matching", JMLR 6 (2005). Song,
Garg, Shi and Ermon, "Sliced score matching", UAI 2019. Pang, Xu, Li, Song, Ermon and Zhu,
"Efficient learning of generative models via finite-difference score matching", NeurIPS 2020.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from ebjax.types import EnergyFn, Objective, Params, Position, bind

__all__ = [
    "SLICES",
    "draw_slices",
    "finite_difference_score_matching",
    "finite_difference_score_matching_loss",
    "score_matching",
    "score_matching_loss",
    "sliced_score_matching",
    "sliced_score_matching_loss",
]

SLICES = ("rademacher", "gaussian", "sphere")


def draw_slices(
    key: jax.Array, num_slices: int, dim: int, slices: str = "rademacher", dtype: Any = None
) -> jax.Array:
    """Independent random directions v with ``E[v v'] = I``.

    Args:
      key: [] key.
      num_slices: M.
      dim: D.
      slices: ``"rademacher"`` (signs; the trace estimate of the least variance among those with
        independent entries), ``"gaussian"`` or ``"sphere"`` (uniform, of radius sqrt(D)).
      dtype: of the result; the default float if left out.

    Returns:
      [M, D].

    Raises:
      ValueError: if there is no such law.

    >>> draw_slices(jax.random.key(0), 5, 3).shape
    (5, 3)
    """
    check_slices(slices)
    dtype = jnp.result_type(float) if dtype is None else dtype
    if slices == "rademacher":
        return jax.random.rademacher(key, (num_slices, dim), dtype)
    normal = jax.random.normal(key, (num_slices, dim), dtype)
    if slices == "gaussian":
        return normal
    return normal * jnp.sqrt(dim / jnp.sum(jnp.square(normal), axis=1, keepdims=True))


def check_slices(slices: str) -> None:
    """Raises ``ValueError`` unless ``slices`` names a law of directions."""
    if slices not in SLICES:
        raise ValueError(f"slices is {slices!r}; it must be one of {', '.join(SLICES)}.")


def _flat_energy(energy_fn: EnergyFn, params: Params, x: Position, context):
    """The energy as a function of the raveled x, and that x [D]."""
    flat, unravel = ravel_pytree(x)
    return (lambda point: energy_fn(params, unravel(point), *context)), flat


def _implicit_terms(energy_fn, params, x, *context):
    """``(½|∇E|², ΔE)`` of one example, the Laplacian forward over reverse."""
    energy, flat = _flat_energy(energy_fn, params, x, context)
    gradient, times_hessian = jax.linearize(jax.grad(energy), flat)
    hessian = jax.vmap(times_hessian)(jnp.eye(flat.size, dtype=flat.dtype))
    return 0.5 * jnp.sum(jnp.square(gradient)), jnp.trace(hessian)


def _sliced_terms(energy_fn, params, x, key, *context, num_slices, slices, variance_reduced):
    """``(½(v·∇E)² or ½|∇E|², v'∇²E v)``, means over the slices."""
    energy, flat = _flat_energy(energy_fn, params, x, context)
    gradient, times_hessian = jax.linearize(jax.grad(energy), flat)
    directions = draw_slices(key, num_slices, flat.size, slices, flat.dtype)
    curvature = jnp.sum(directions * jax.vmap(times_hessian)(directions), axis=1)
    if variance_reduced:
        half_square = 0.5 * jnp.sum(jnp.square(gradient))
    else:
        half_square = 0.5 * jnp.square(directions @ gradient).mean()
    return half_square, curvature.mean()


def _finite_difference_terms(energy_fn, params, x, key, *context, epsilon, num_slices, slices):
    """``((E₊ - E₋)²/(8ε²), (E₊ + E₋ - 2 E₀)/ε²)``, means over the slices."""
    energy, flat = _flat_energy(energy_fn, params, x, context)
    steps = epsilon * draw_slices(key, num_slices, flat.size, slices, flat.dtype)
    # One pass over all points: 2 M + 1 evaluations. Of their differences little would be left where
    # products round their factors.
    with jax.default_matmul_precision("highest"):
        energies = jax.vmap(energy)(jnp.concatenate([flat + steps, flat - steps, flat[None]]))
    plus, minus, here = jnp.split(energies, (num_slices, 2 * num_slices))
    half_square = 0.5 * jnp.square((plus - minus) / (2.0 * epsilon))
    curvature = (plus + minus - 2.0 * here) / epsilon**2
    return half_square.mean(), curvature.mean()


def score_matching_loss(
    energy_fn: EnergyFn, params: Params, x: Position, *context: Any
) -> jax.Array:
    """``½|∇E(x)|² - ΔE(x)`` of one example, the Laplacian exact.

    Args:
      energy_fn: twice differentiable in x; no piecewise linear activations.
      params: its parameters.
      x: [...] one example.
      *context: passed on to the energy.

    Returns:
      [] the loss; its mean over data is the Fisher divergence up to a constant.

    >>> energy_fn = lambda precision, x: 0.5 * precision * jnp.sum(x**2)
    >>> float(score_matching_loss(energy_fn, 2.0, jnp.array([1.0, 0.0, 3.0])))
    14.0
    """
    half_square, laplacian = _implicit_terms(energy_fn, params, x, *context)
    return half_square - laplacian


def sliced_score_matching_loss(
    energy_fn: EnergyFn,
    params: Params,
    x: Position,
    key: jax.Array,
    *context: Any,
    num_slices: int = 1,
    slices: str = "rademacher",
    variance_reduced: bool = True,
) -> jax.Array:
    """``½(v·∇E)² - v'∇²E v`` of one example, the mean over random slices v.

    In expectation over v it is ``score_matching_loss``.

    Args:
      energy_fn: twice differentiable in x.
      params: its parameters.
      x: [...] one example.
      key: [] key of the slices.
      *context: passed on to the energy.
      num_slices: M, at least 1.
      slices: the law of v, see ``draw_slices``.
      variance_reduced: whether the first term is ½|∇E|² itself, which is as cheap and varies less.

    Returns:
      [] the loss.

    >>> energy_fn = lambda precision, x: 0.5 * precision * jnp.sum(x**2)
    >>> x = jnp.array([1.0, 0.0, 3.0])
    >>> float(sliced_score_matching_loss(energy_fn, 2.0, x, jax.random.key(0)))
    14.0
    """
    half_square, curvature = _sliced_terms(
        energy_fn,
        params,
        x,
        key,
        *context,
        num_slices=num_slices,
        slices=slices,
        variance_reduced=variance_reduced,
    )
    return half_square - curvature


def finite_difference_score_matching_loss(
    energy_fn: EnergyFn,
    params: Params,
    x: Position,
    key: jax.Array,
    *context: Any,
    epsilon: float = 0.1,
    num_slices: int = 1,
    slices: str = "rademacher",
) -> jax.Array:
    """``(E₊ - E₋)²/(8ε²) - (E₊ + E₋ - 2 E₀)/ε²`` with ``E± = E(x ± εv)``, mean over slices v.

    The sliced loss (without variance reduction) of the same slices, up to O(ε²).

    Args:
      energy_fn: needs no derivative in x.
      params: its parameters.
      x: [...] one example.
      key: [] key of the slices.
      *context: passed on to the energy.
      epsilon: ε > 0, the length of the step in each coordinate, in units of x. Well below the scale
        on which the data's law bends; but in single precision rounding errs by 1e-7 |E| / ε².
      num_slices: M, at least 1.
      slices: the law of v, see ``draw_slices``.

    Returns:
      [] the loss.

    >>> energy_fn = lambda precision, x: 0.5 * precision * jnp.sum(x**2)
    >>> key, x = jax.random.key(0), jnp.array([3.0])
    >>> round(float(finite_difference_score_matching_loss(energy_fn, 2.0, x, key)), 3)
    16.0
    """
    half_square, curvature = _finite_difference_terms(
        energy_fn, params, x, key, *context, epsilon=epsilon, num_slices=num_slices, slices=slices
    )
    return half_square - curvature


def score_matching(energy_fn: EnergyFn) -> Objective:
    """Builds the objective with the exact Laplacian: D Hessian-vector products an example.

    Args:
      energy_fn: the energy that is trained, ``(params, x) -> []``.

    Returns:
      An ``Objective`` over batches of examples [B, ...], with nothing to carry. Metrics:
      ``square_gradient``, the mean of |∇E|², and ``laplacian``, that of ΔE. Where the model is
      right the two are equal, and the loss is minus half of each.
    """
    return _build(bind(_implicit_terms, energy_fn), takes_key=False)


def sliced_score_matching(
    energy_fn: EnergyFn,
    *,
    num_slices: int = 1,
    slices: str = "rademacher",
    variance_reduced: bool = True,
) -> Objective:
    """Builds the sliced objective: one Hessian-vector product a slice, whatever D is.

    Args:
      energy_fn: the energy that is trained, ``(params, x) -> []``.
      num_slices: M, at least 1.
      slices: ``"rademacher"``, ``"gaussian"`` or ``"sphere"``.
      variance_reduced: whether ½|∇E|² stands for the mean of ½(v·∇E)².

    Returns:
      An ``Objective`` as that of ``score_matching``; ``square_gradient`` and ``laplacian`` are
      estimates from the slices.

    Raises:
      ValueError: naming the option that is out of range.
    """
    _check(num_slices, slices)
    options = {
        "num_slices": num_slices,
        "slices": slices,
        "variance_reduced": variance_reduced,
    }
    return _build(bind(_sliced_terms, energy_fn, **options), takes_key=True)


def finite_difference_score_matching(
    energy_fn: EnergyFn, *, epsilon: float = 0.1, num_slices: int = 1, slices: str = "rademacher"
) -> Objective:
    """Builds the finite-difference objective: 2 M + 1 evaluations, no derivative in x.

    Args:
      energy_fn: the energy that is trained, ``(params, x) -> []``.
      epsilon: ε > 0, see ``finite_difference_score_matching_loss``.
      num_slices: M, at least 1.
      slices: ``"rademacher"``, ``"gaussian"`` or ``"sphere"``.

    Returns:
      An ``Objective`` as that of ``score_matching``; ``square_gradient`` and ``laplacian`` are
      estimates from the differences.

    Raises:
      ValueError: naming the option that is out of range.
    """
    _check(num_slices, slices)
    if not epsilon > 0:
        raise ValueError(f"epsilon is {epsilon}; it must be positive.")
    options = {"epsilon": epsilon, "num_slices": num_slices, "slices": slices}
    return _build(bind(_finite_difference_terms, energy_fn, **options), takes_key=True)


def _check(num_slices: int, slices: str) -> None:
    if num_slices < 1:
        raise ValueError(f"num_slices is {num_slices}; an example needs at least 1.")
    check_slices(slices)


def _build(terms_fn: Callable[..., tuple[jax.Array, jax.Array]], *, takes_key: bool) -> Objective:
    """The objective of ``(params, x[, key]) -> (half square, Laplacian)``."""

    def init(key, params, batch):
        del key, params, batch
        return ()

    def loss(params, carry, keys, batch):
        arguments = (params, batch, keys) if takes_key else (params, batch)
        axes = (None, 0, 0)[: len(arguments)]
        half_square, laplacian = jax.vmap(terms_fn, axes)(*arguments)
        metrics = {"square_gradient": 2.0 * half_square.mean(), "laplacian": laplacian.mean()}
        return (half_square - laplacian).mean(), (carry, metrics)

    return Objective(init=init, loss=loss)
