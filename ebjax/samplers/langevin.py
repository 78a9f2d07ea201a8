"""Unadjusted Langevin algorithm (ULA), and with minibatches of data: SGLD.

    x' = x - h M⁻¹ ∇E(x) + s F ξ,    ξ ~ N(0, I),    F F' = M⁻¹,    s = sqrt(2 h τ) unless set apart

The Euler-Maruyama discretisation of dX = -M⁻¹ ∇E dt + sqrt(2τ) F dW, whose law is proportional to
exp(-E/τ) whatever M is. Without a Metropolis test its own stationary law differs from that by O(h).
For a Gaussian with precision λ (and M = 1) it is a Gaussian with variance s² / (1 - (1 - hλ)²).

With data y_1 ... y_N and E(x) = E_0(x) + Σ_i e(x, y_i), each step of SGLD has its own minibatch B
of n of them and the energy E_0(x) + N/n Σ_{i in B} e(x, y_i). Its gradient is right on average, and
its noise adds to that of the chain: another O(h) beside the discretisation, gone as h_t → 0.

Roberts and Tweedie, "Exponential convergence of Langevin distributions and their discrete
approximations", Bernoulli 2 (1996). Welling and Teh, "Bayesian learning via stochastic gradient
Langevin dynamics", ICML 2011.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy.typing as npt

from ebjax.numerics import all_finite, inner_product, random_normal_like
from ebjax.samplers.evaluate import value_and_gradient
from ebjax.samplers.metric import make_metric, scaled_noise, velocity
from ebjax.types import EnergyFn, Kernel, Params, Position, PyTree, bind

Schedule = Callable[[jax.Array], jax.Array]

__all__ = [
    "Dataset",
    "LangevinInfo",
    "LangevinState",
    "langevin",
    "minibatched",
    "polynomial_decay",
    "posterior_energy",
    "sgld",
]


class LangevinState(NamedTuple):
    """The chain's point.

    Attributes:
      position: any pytree of arrays.
      count: [] int32, steps done, where the step size is a schedule; else ``()``.
    """

    position: Position
    count: Any = ()


class LangevinInfo(NamedTuple):
    """Diagnosis of one step.

    Attributes:
      energy: [] energy before the step.
      gradient_norm: [] norm of the energy's gradient before the step, before clipping.
      is_finite: [] bool, whether the energy and its gradient before the step are finite; if they
        are not, neither is any later position.
    """

    energy: jax.Array
    gradient_norm: jax.Array
    is_finite: jax.Array


def check_positive(name: str, value: Any, *, or_zero: bool = False) -> None:
    """Raises ``ValueError`` if an option is a Python number that is not positive."""
    if not isinstance(value, numbers.Real):
        return
    if not (float(value) > 0.0 or (or_zero and float(value) == 0.0)):
        raise ValueError(f"{name} is {value}; it must be positive{' or zero' if or_zero else ''}.")


def langevin(
    *,
    step_size: float | jax.Array | Schedule,
    temperature: float | jax.Array = 1.0,
    inverse_mass: npt.ArrayLike | None = None,
    noise_scale: float | jax.Array | None = None,
    gradient_clip: float | None = None,
    bounds: tuple[float, float] | None = None,
) -> Kernel:
    """Builds the kernel.

    Args:
      step_size: h > 0, in squared units of the position (times 1/energy). A function of the number
        of steps done makes it a schedule, ``polynomial_decay`` or one of optax.
      temperature: τ >= 0; the chain's law is exp(-E/τ) as h → 0. At 0 it descends the gradient.
      inverse_mass: M⁻¹, ``None`` for the identity, the diagonal [D] or a positive definite [D, D]
        over the raveled position; best near the covariance of the law.
      noise_scale: standard deviation s of the noise of one step, in units of the position, set
        apart from h and τ as image models do. The law is then the one at temperature s²/(2h).
      gradient_clip: clips each component of the gradient to [-c, c]. It keeps chains from flying
        off where the energy is steep, and it breaks the law: where a component exceeds c the chain
        feels a linear energy of slope c, so that even as h → 0 it is not exp(-E/τ) that it draws.
      bounds: clips each component of the position to [low, high] after the step. The chain then
        piles up mass on the faces of the box, which no density on it has (see
        ``ebjax.samplers.constrained`` for chains that do not).

    Returns:
      A ``Kernel`` with ``LangevinState`` and ``LangevinInfo``. One gradient a step.

    Raises:
      ValueError: naming the option that is out of range.

    >>> import jax, jax.numpy as jnp
    >>> kernel = langevin(step_size=0.1)
    >>> def energy_fn(params, x):
    ...     return 0.5 * jnp.sum((x - params) ** 2)
    >>> state = kernel.init(energy_fn, 1.0, jnp.zeros(2))
    >>> state, info = kernel.step(jax.random.key(0), energy_fn, 1.0, state)
    >>> state.position.shape, float(info.energy)
    ((2,), 1.0)
    """
    check_positive("step_size", step_size)
    check_positive("temperature", temperature, or_zero=True)
    check_positive("noise_scale", noise_scale, or_zero=True)
    return Kernel(
        init=bind(_init_scheduled if callable(step_size) else _init),
        step=bind(
            _step,
            step_size=step_size,
            temperature=temperature,
            metric=make_metric(inverse_mass),
            noise_scale=noise_scale,
            gradient_clip=gradient_clip,
            bounds=bounds,
        ),
    )


def _init(energy_fn: EnergyFn, params: Params, position: Position) -> LangevinState:
    del energy_fn, params  # the next step needs nothing but the position
    return LangevinState(position)


def _init_scheduled(energy_fn: EnergyFn, params: Params, position: Position) -> LangevinState:
    return _init(energy_fn, params, position)._replace(count=jnp.zeros((), jnp.int32))


def _step(
    key: jax.Array,
    energy_fn: EnergyFn,
    params: Params,
    state: LangevinState,
    *,
    step_size,
    temperature,
    metric,
    noise_scale,
    gradient_clip,
    bounds,
) -> tuple[LangevinState, LangevinInfo]:
    count = state.count
    if callable(step_size):
        step_size, count = step_size(count), count + 1
    energy, gradient, _ = value_and_gradient(energy_fn, params, state.position)
    drift = gradient
    if gradient_clip is not None:
        drift = jax.tree.map(lambda g: jnp.clip(g, -gradient_clip, gradient_clip), gradient)
    scale = jnp.sqrt(2.0 * step_size * temperature) if noise_scale is None else noise_scale
    noise = random_normal_like(key, state.position)

    def move(x, g, xi):
        moved = x + (scale * xi - step_size * g).astype(x.dtype)
        return moved if bounds is None else jnp.clip(moved, *bounds)

    position = jax.tree.map(
        move, state.position, velocity(metric, drift), scaled_noise(metric, noise)
    )
    info = LangevinInfo(
        energy=energy,
        gradient_norm=jnp.sqrt(inner_product(gradient, gradient)),
        is_finite=all_finite((energy, gradient)),
    )
    return LangevinState(position, count), info


def polynomial_decay(
    initial: float | jax.Array,
    *,
    offset: float | jax.Array = 1.0,
    power: float | jax.Array = 0.55,
) -> Schedule:
    """The step size ``h_t = h_0 (1 + t / b)^-γ``, which is ``a (b + t)^-γ`` with ``a = h_0 b^γ``.

    With γ in (1/2, 1] the sum of the h_t diverges and that of their squares does not, so that
    averages of SGLD weighted by h_t converge to those under exp(-E).

    Args:
      initial: h_0 > 0, the first step size.
      offset: b > 0, steps after which it has decayed by 2^-γ.
      power: γ >= 0.

    Returns:
      ``count -> h_count``, a ``step_size`` of ``langevin`` and ``sgld``.

    Raises:
      ValueError: naming the argument that is out of range.

    >>> float(polynomial_decay(0.4, offset=10.0, power=1.0)(30))
    0.1
    """
    check_positive("initial", initial)
    check_positive("offset", offset)
    check_positive("power", power, or_zero=True)
    return bind(_polynomial, initial=initial, offset=offset, power=power)


def _polynomial(count, *, initial, offset, power):
    return initial * (1.0 + count / offset) ** -power


class Dataset(NamedTuple):
    """Data that an energy sums over, whole or a minibatch.

    Attributes:
      examples: [N, ...] a pytree with a leading axis of examples.
      scale: what the sum is multiplied by: 1 for all data, N/n for a minibatch of n.
    """

    examples: PyTree
    scale: Any = 1.0


def posterior_energy(
    prior_fn: EnergyFn, datum_fn: Callable[[Params, Position, PyTree], jax.Array]
) -> EnergyFn:
    """``E((params, dataset), x) = E_0(params, x) + scale Σ_i e(params, x, y_i)``.

    Any kernel takes it, on all data; ``sgld`` and ``minibatched`` ones draw a minibatch a step.

    Args:
      prior_fn: E_0, minus the log prior.
      datum_fn: e, minus the log likelihood of one example.

    >>> prior_fn = lambda params, x: 0.5 * x**2
    >>> datum_fn = lambda params, x, y: 0.5 * (x - y) ** 2
    >>> energy_fn = posterior_energy(prior_fn, datum_fn)
    >>> float(energy_fn(((), Dataset(jnp.array([1.0, 3.0]))), 1.0))
    2.5
    """
    return bind(_posterior, prior_fn=prior_fn, datum_fn=datum_fn)


def _posterior(params, x, *, prior_fn, datum_fn):
    params, dataset = params
    energies = jax.vmap(lambda datum: datum_fn(params, x, datum))(dataset.examples)
    return prior_fn(params, x) + dataset.scale * jnp.sum(energies)


def take_examples(dataset: Dataset, index: jax.Array) -> Dataset:
    """The minibatch of the examples ``index`` [n], scaled so that its sum is right on average."""
    num_examples = len(jax.tree.leaves(dataset.examples)[0])
    examples = jax.tree.map(lambda leaf: leaf[index], dataset.examples)
    return Dataset(examples, dataset.scale * (num_examples / len(index)))


def minibatched(kernel: Kernel, *, batch_size: int, replace: bool = True) -> Kernel:
    """The kernel with a fresh minibatch in each step, drawn from the step's key.

    For kernels without a Metropolis test: ``langevin``, ``underdamped`` (stochastic gradient HMC).
    A test against the energy of a minibatch accepts for the wrong law. ``params`` is a pair
    ``(params, Dataset)``, of which ``init`` sees all data and a step n examples.

    Args:
      kernel: the transition under a given minibatch.
      batch_size: n, static, at least 1.
      replace: whether an example may come twice. If not, the gradient's variance is smaller by
        (N - n) / (N - 1), but each step shuffles all N.

    Raises:
      ValueError: if ``batch_size`` is below 1, or (in a step) above N without replacement.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
    step = bind(_minibatched, kernel=kernel, batch_size=batch_size, replace=replace)
    return kernel._replace(step=step)


def _minibatched(key, energy_fn, params, state, *, kernel, batch_size, replace):
    params, dataset = params
    num_examples = len(jax.tree.leaves(dataset.examples)[0])
    if not replace and batch_size > num_examples:
        raise ValueError(
            f"batch_size is {batch_size}; without replacement it must be at most the "
            f"{num_examples} examples."
        )
    index_key, step_key = jax.random.split(key)
    if replace:
        index = jax.random.randint(index_key, (batch_size,), 0, num_examples)
    else:
        index = jax.random.permutation(index_key, num_examples)[:batch_size]
    return kernel.step(step_key, energy_fn, (params, take_examples(dataset, index)), state)


def sgld(
    *,
    step_size: float | jax.Array | Schedule,
    batch_size: int,
    replace: bool = True,
    temperature: float | jax.Array = 1.0,
    inverse_mass: npt.ArrayLike | None = None,
) -> Kernel:
    """Stochastic gradient Langevin dynamics: ``minibatched(langevin(...))``.

    Args:
      step_size: as of ``langevin``, a schedule too.
      batch_size: n, static, at least 1.
      replace: as of ``minibatched``.
      temperature: as of ``langevin``.
      inverse_mass: as of ``langevin``.

    Returns:
      A ``Kernel`` for an energy of ``posterior_energy``, ``params`` being ``(params, Dataset)``.
      One gradient of a minibatch a step; ``info.energy`` is the minibatch's estimate.

    >>> energy_fn = posterior_energy(lambda _, x: 0.5 * x**2, lambda _, x, y: 0.5 * (x - y) ** 2)
    >>> params = ((), Dataset(jnp.linspace(0.0, 1.0, 1000)))
    >>> kernel = sgld(step_size=polynomial_decay(1e-4, offset=100.0), batch_size=10)
    >>> state = kernel.init(energy_fn, params, jnp.array(0.0))
    >>> state, info = kernel.step(jax.random.key(0), energy_fn, params, state)
    >>> int(state.count)
    1
    """
    kernel = langevin(step_size=step_size, temperature=temperature, inverse_mass=inverse_mass)
    return minibatched(kernel, batch_size=batch_size, replace=replace)
