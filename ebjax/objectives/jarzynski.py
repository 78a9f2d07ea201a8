"""Maximum likelihood by reweighted walkers: Jarzynski's equality corrects the lag of the chains.

Walkers X_i move while the parameters do, so their law is that of no θ. Weights e^{A_i} make it
right at every update, whatever the step size h and the learning rate:

    E_{p_θ} g = E[g(X) e^A] / E[e^A],        Z_θ / Z_{θ_0} = E[e^A]

    α_θ(x, y) = E_θ(x) + (y - x)·∇E_θ(x) / 2 + h |∇E_θ(x)|² / 4
    X' = X - h ∇E_θ(X) + sqrt(2h) ξ                under the old θ
    A <- A - α_θ'(X', X) + α_θ(X, X')              once θ' is known
    A <- A - E_θ'(X') + E_θ(X')                    walkers that did not move, or moved by a kernel
                                                   that leaves exp(-E_θ) invariant
    loss = mean E(x⁺) - Σ_i w_i E(X_i),   w = softmax A over all walkers, a constant

-α_θ(x, y) is the log density of the step x -> y under exp(-E_θ), up to a function of |y - x| that
is the same both ways, so the increment of A is the log ratio of the step back under θ' to the step
forth under θ. The walkers must start as exact draws of p_{θ_0}; from the data with A = 0 it is
persistent contrastive divergence. Walkers are resampled by their weights when these grow uneven.

Between calls of the loss the carry holds the move that was made under θ; a call begins with the
increment of A, the new parameters being known by then. Shape legend: B slots, M walkers a slot.

Jarzynski, "Nonequilibrium equality for free energy differences", PRL 78 (1997). Carbone, Hua, Coste
and Vanden-Eijnden, "Efficient training of energy-based models using Jarzynski equality", NeurIPS
2023.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ebjax.numerics import random_normal_like
from ebjax.objectives.regularizers import Regularizer, mean_penalty
from ebjax.samplers.evaluate import value, value_and_gradient
from ebjax.samplers.run import run_chain
from ebjax.samplers.smc.feynman_kac import Population, resample, reweight
from ebjax.samplers.smc.resampling import RESAMPLERS
from ebjax.types import EnergyFn, Kernel, Objective, Params, Position

__all__ = ["JarzynskiWalkers", "jarzynski", "step_action"]


class JarzynskiWalkers(NamedTuple):
    """The walkers that belong to the example slots, after a move that is not yet weighted.

    Attributes:
      position: [B, M, ...] X'.
      previous: [B, M, ...] X, from where the last Langevin step led; ``()`` with a kernel.
      action: [B, M] α_θ(X, X') of that step, or E_θ(X') of walkers that are weighted by energy.
      is_step: [B, M] bool, which of the two; ``()`` with a kernel.
      log_weight: [B, M] A up to the parameters of the move, of mean weight 1 over all walkers.
      log_z: [B] estimate of log Z_θ, equal in all slots.
      num_resamplings: [B] int32, equal in all slots.
    """

    position: Position
    previous: Any
    action: jax.Array
    is_step: Any
    log_weight: jax.Array
    log_z: jax.Array
    num_resamplings: jax.Array


def step_action(
    energy: jax.Array, gradient: Position, displacement: Position, step_size: float | jax.Array
) -> jax.Array:
    """[] ``α(x, y) = E(x) + (y - x)·∇E(x) / 2 + h |∇E(x)|² / 4`` of a Langevin step x -> y.

    Args:
      energy: [] E(x).
      gradient: ∇E(x), as x.
      displacement: y - x.
      step_size: h.

    >>> float(step_action(jnp.array(1.0), jnp.array([2.0]), jnp.array([0.5]), 0.1))
    1.600000023841858
    """
    terms = jax.tree.map(
        lambda g, d: jnp.sum(0.5 * d * g + 0.25 * step_size * jnp.square(g)), gradient, displacement
    )
    return energy + sum(jax.tree.leaves(terms))


class _Rules(NamedTuple):
    """Static options."""

    kernel: Kernel | float
    walkers_per_example: int
    num_steps: int
    num_moved: int
    resampling: str
    ess_threshold: float
    axis_name: str | None

    @property
    def is_langevin(self) -> bool:
        """Whether the kernel is the step size of Langevin steps."""
        return isinstance(self.kernel, (int, float))


class _Walker(NamedTuple):
    """One walker at the current parameters; ``gradient`` is ``()`` with a kernel."""

    position: Position
    energy: jax.Array
    gradient: Any


def jarzynski(
    energy_fn: EnergyFn,
    kernel: Kernel | float,
    initial_position: Callable[[jax.Array, Params], Position],
    *,
    walkers_per_example: int = 1,
    num_steps: int = 1,
    moved_per_example: int | None = None,
    initial_log_z: float | Callable[[Params], jax.Array] = 0.0,
    resampling: str = "systematic",
    ess_threshold: float = 0.5,
    regularizers: Sequence[Regularizer] = (),
    axis_name: str | None = None,
) -> Objective:
    """Builds the objective.

    Args:
      energy_fn: the energy that is trained.
      kernel: the step size h > 0 of unadjusted Langevin steps, whose error the weights take away;
        or a ``Kernel`` that leaves exp(-E) invariant, such as ``mala`` (and unlike ``langevin``).
      initial_position: ``(key, params) -> x``, an exact draw at the initial parameters: start from
        an energy that can be sampled, or run a long chain here.
      walkers_per_example: M, at least 1; there are N = B M walkers in all.
      num_steps: moves of a walker in one update, at least 1.
      moved_per_example: how many of the M walkers of a slot move in one update, chosen at random;
        all by default. The others are reweighted where they are.
      initial_log_z: log Z at the initial parameters, or a function of them. Without it ``log_z``
        and ``cross_entropy`` are relative to it.
      resampling: a name of ``ebjax.samplers.smc.resampling.RESAMPLERS``.
      ess_threshold: walkers are resampled where their effective sample size is below this fraction
        of N; 0 never does.
      regularizers: penalties, applied to the data. A penalty at samples would act through the
        weights too.
      axis_name: the axis of the devices that the slots are split over.

    Returns:
      An ``Objective`` over batches of examples [B, ...], whose carry is ``JarzynskiWalkers``. The
      numbers do not depend on the number of devices. Metrics: ``energy_data``, ``energy_samples``
      (weighted), ``energy_gap``, ``ess`` (fraction of N, before resampling), ``log_z``,
      ``cross_entropy`` (log Z + mean energy of the batch: the loss of a likelihood, on data not
      trained on a validation curve), ``num_resamplings``, ``walkers_finite``, ``acceptance_rate``
      where a kernel reports it, and ``penalty`` where there is one.

    Raises:
      ValueError: naming the option that is out of range.

    >>> energy_fn = lambda mean, x: 0.5 * jnp.sum((x - mean) ** 2)
    >>> draw = lambda key, mean: mean + jax.random.normal(key, (2,))
    >>> objective = jarzynski(energy_fn, 0.1, draw, walkers_per_example=10)
    >>> batch, mean = jnp.ones((100, 2)), jnp.zeros(2)
    >>> init, loss_fn = jax.jit(objective.init), jax.jit(objective.loss)
    >>> walkers = init(jax.random.key(0), mean, batch)
    >>> keys = jax.random.split(jax.random.key(1), 100)
    >>> loss, (walkers, metrics) = loss_fn(mean, walkers, keys, batch)
    >>> loss, (walkers, metrics) = loss_fn(mean + 0.1, walkers, keys, batch)
    >>> bool(metrics["ess"] > 0.9), bool(abs(metrics["log_z"]) < 0.01)
    (True, True)
    """
    num_moved = walkers_per_example if moved_per_example is None else moved_per_example
    rules = _Rules(
        kernel, walkers_per_example, num_steps, num_moved, resampling, ess_threshold, axis_name
    )
    _check(rules)
    penalties = tuple(regularizers)

    def init(key, params, batch):
        batch_size = len(jax.tree.leaves(batch)[0])
        keys = jax.random.split(key, (batch_size, walkers_per_example))
        position = jax.vmap(jax.vmap(initial_position, (0, None)), (0, None))(keys, params)
        evaluate = lambda x: value(energy_fn, params, x)[0]  # noqa: E731
        energy = jax.vmap(jax.vmap(evaluate))(position)
        log_z = initial_log_z(params) if callable(initial_log_z) else initial_log_z
        is_langevin = rules.is_langevin
        return JarzynskiWalkers(
            position=position,
            previous=position if is_langevin else (),
            action=energy,
            is_step=jnp.zeros(energy.shape, bool) if is_langevin else (),
            log_weight=jnp.zeros_like(energy),
            log_z=jnp.full(batch_size, log_z, energy.dtype),
            num_resamplings=jnp.zeros(batch_size, jnp.int32),
        )

    def loss(params, carry, keys, batch):
        frozen = jax.lax.stop_gradient(params)
        carry = jax.lax.stop_gradient(carry)
        population, ess, is_finite = _weigh(rules, energy_fn, frozen, carry)
        log_weights = population.log_weights
        positive, samples = _energies(energy_fn, params, batch, population.particles.position)
        # The mean weight is 1 over all devices, so the mean over devices of local means is right.
        weights = jnp.where(log_weights > -jnp.inf, jnp.exp(log_weights), 0.0)
        weighted = jnp.where(weights > 0.0, weights * samples, 0.0).mean()
        objective_value = positive.mean() - weighted
        metrics = {
            "energy_data": positive.mean(),
            "energy_samples": weighted,
            "energy_gap": positive.mean() - weighted,
            "ess": ess,
            "log_z": population.log_z,
            "cross_entropy": population.log_z + positive.mean(),
            "walkers_finite": is_finite.astype(positive.dtype),
        }
        if penalties:
            metrics["penalty"] = mean_penalty(penalties, energy_fn, params, batch)
            objective_value += metrics["penalty"]
        carry, more = _move(rules, energy_fn, frozen, population, ess, keys)
        return objective_value, (carry, {**metrics, **more})

    return Objective(init=init, loss=loss)


def _check(rules: _Rules) -> None:
    kernel = rules.kernel
    is_kernel = hasattr(kernel, "init") and hasattr(kernel, "step")
    if not is_kernel and not (isinstance(kernel, (int, float)) and kernel > 0.0):
        raise ValueError(
            f"kernel is {kernel!r}; it must be a Kernel or the positive step size of "
            "Langevin steps."
        )
    if rules.walkers_per_example < 1:
        raise ValueError(
            f"walkers_per_example is {rules.walkers_per_example}; it must be at least 1."
        )
    if rules.num_steps < 1:
        raise ValueError(f"num_steps is {rules.num_steps}; it must be at least 1.")
    if not 1 <= rules.num_moved <= rules.walkers_per_example:
        raise ValueError(
            f"moved_per_example is {rules.num_moved}; it must be from 1 to the "
            f"{rules.walkers_per_example} walkers of a slot."
        )
    if rules.resampling not in RESAMPLERS:
        raise ValueError(
            f"resampling is {rules.resampling!r}; it must be one of {', '.join(RESAMPLERS)}."
        )
    if not 0.0 <= rules.ess_threshold <= 1.0:
        raise ValueError(f"ess_threshold is {rules.ess_threshold}; it must be in [0, 1].")


def _energies(energy_fn, params, batch, position) -> tuple[jax.Array, jax.Array]:
    """Energies of data [B] and of walkers [B M], in one pass."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), batch, position)
    energies = jax.vmap(energy_fn, (None, 0))(params, both)
    num_data = len(jax.tree.leaves(batch)[0])
    return energies[:num_data], energies[num_data:]


def _flat(tree: Any) -> Any:
    """[B, M, ...] as [B M, ...], the order that makes all devices' parts the whole."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)


def _weigh(rules: _Rules, energy_fn, params, carry: JarzynskiWalkers):
    """The population at the parameters that have become known since the move."""
    position, action = _flat(carry.position), _flat(carry.action)
    if not rules.is_langevin:
        energy = jax.vmap(lambda x: value(energy_fn, params, x)[0])(position)
        walkers, increments = _Walker(position, energy, ()), action - energy
    else:
        energy, gradient, _ = jax.vmap(lambda x: value_and_gradient(energy_fn, params, x))(position)
        back = jax.tree.map(jnp.subtract, _flat(carry.previous), position)
        step_size: Any = rules.kernel
        backward = jax.vmap(step_action, (0, 0, 0, None))(energy, gradient, back, step_size)
        walkers = _Walker(position, energy, gradient)
        increments = action - jnp.where(_flat(carry.is_step), backward, energy)
    population = Population(
        particles=walkers,
        log_weights=_flat(carry.log_weight),
        log_z=carry.log_z[0],
        eves=jnp.zeros(energy.shape, jnp.int32),
        num_resamplings=carry.num_resamplings[0],
    )
    population, ess, is_finite = reweight(population, increments, axis_name=rules.axis_name)
    num_walkers = energy.size * _num_devices(rules.axis_name)
    return population, ess / num_walkers, is_finite


def _num_devices(axis_name: str | None) -> int:
    return 1 if axis_name is None else jax.lax.axis_size(axis_name)


def _shared_key(keys: jax.Array, axis_name: str | None) -> jax.Array:
    """The key of the first slot of all, on every device."""
    first = keys[0]
    if axis_name is None:
        return first
    data = jax.lax.all_gather(jax.random.key_data(first), axis_name)[0]
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(first))


def _move(rules: _Rules, energy_fn, params, population: Population, ess, keys):
    """Resamples if need be and moves: the carry for the next call, and metrics."""
    slot_keys = jax.vmap(lambda key: jax.random.split(key, 3))(keys)  # [B, 3]
    population, _ = resample(
        _shared_key(slot_keys[:, 2], rules.axis_name),
        population,
        ess * population.log_weights.size * _num_devices(rules.axis_name),
        method=rules.resampling,
        ess_threshold=rules.ess_threshold,
        axis_name=rules.axis_name,
    )
    shape = (len(keys), rules.walkers_per_example)
    walkers, log_weight = jax.tree.map(
        lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]),
        (population.particles, population.log_weights),
    )
    carry = JarzynskiWalkers(
        position=walkers.position,
        previous=walkers.position if rules.is_langevin else (),
        action=walkers.energy,
        is_step=jnp.zeros(shape, bool) if rules.is_langevin else (),
        log_weight=log_weight,
        log_z=jnp.broadcast_to(population.log_z, shape[:1]),
        num_resamplings=jnp.broadcast_to(population.num_resamplings, shape[:1]),
    )

    def one_slot(keys, walkers, log_weight):
        if rules.num_moved == rules.walkers_per_example:
            rows = jnp.arange(rules.num_moved)
        else:
            rows = jax.random.permutation(keys[1], rules.walkers_per_example)[: rules.num_moved]
        chosen, log_weight = jax.tree.map(lambda leaf: leaf[rows], (walkers, log_weight))
        move = _by_langevin if rules.is_langevin else _by_kernel
        walker_keys = jax.random.split(keys[0], rules.num_moved)
        moved, info = jax.vmap(lambda k, w, a: move(k, rules, energy_fn, params, w, a))(
            walker_keys, chosen, log_weight
        )
        return rows, moved, info

    rows, moved, info = jax.vmap(one_slot)(slot_keys, walkers, log_weight)
    names = ("position", "previous", "action", "is_step", "log_weight")
    kept = tuple(getattr(carry, name) for name in names)
    if rules.num_moved < rules.walkers_per_example:
        write = jax.vmap(lambda all_, row, some: all_.at[row].set(some))
        moved = jax.tree.map(lambda all_, some: write(all_, rows, some), kept, moved)
    carry = carry._replace(**dict(zip(names, moved, strict=True)))
    metrics = {"num_resamplings": population.num_resamplings.astype(ess.dtype)}
    if hasattr(info, "acceptance_rate"):
        metrics["acceptance_rate"] = info.acceptance_rate.mean()
    return carry, metrics


def _by_langevin(key, rules: _Rules, energy_fn, params, walker: _Walker, log_weight):
    """Steps of one walker; all but the last can be weighted at once, at the same parameters."""
    step_size = rules.kernel

    def step(key, walker):
        noise = random_normal_like(key, walker.position)
        scale = jnp.sqrt(2.0 * step_size)
        move = jax.tree.map(
            lambda g, xi: (scale * xi - step_size * g).astype(xi.dtype), walker.gradient, noise
        )
        position = jax.tree.map(jnp.add, walker.position, move)
        # Rounded as the positions are, so that the step back is the step forth.
        move = jax.tree.map(jnp.subtract, position, walker.position)
        return position, move, step_action(walker.energy, walker.gradient, move, step_size)

    def weighted_step(loop, t):
        walker, log_weight = loop
        position, move, forward = step(jax.random.fold_in(key, t), walker)
        energy, gradient, _ = value_and_gradient(energy_fn, params, position)
        back = jax.tree.map(jnp.negative, move)
        log_weight += forward - step_action(energy, gradient, back, step_size)
        return (_Walker(position, energy, gradient), log_weight), None

    if rules.num_steps > 1:
        times = jnp.arange(1, rules.num_steps)
        (walker, log_weight), _ = jax.lax.scan(weighted_step, (walker, log_weight), times)
    position, _, forward = step(jax.random.fold_in(key, 0), walker)
    return (position, walker.position, forward, jnp.array(True), log_weight), ()


def _by_kernel(key, rules: _Rules, energy_fn, params, walker: _Walker, log_weight):
    """Steps of one walker that leave its law as it is, so that weights do not change."""
    kernel: Any = rules.kernel
    state = kernel.init(energy_fn, params, walker.position)
    state, info = run_chain(key, kernel, energy_fn, params, state, rules.num_steps)
    energy, _ = value(energy_fn, params, state.position)
    return (state.position, (), energy, (), log_weight), info
