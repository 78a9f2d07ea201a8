"""The no-U-turn sampler (NUTS): Hamiltonian Monte Carlo that finds the trajectory's length itself.

    ξ ~ N(0, I); the trajectory {(x, ξ)} is doubled, forward or backward in time by a fair coin,
    until it turns back on itself; a point of it is drawn with probability ∝ exp(-H(x, ξ))

A span of points from a to b with summed momenta ρ has turned when ρ'ξ_a <= 0 or ρ'ξ_b <= 0, or when
one of its halves has together with the nearest point of the other. A new half within which a
dyadic span has turned, or H has grown by more than a threshold, is dropped and ends the trajectory.
Which tree is grown depends on its set of points and not on the point started from, so the draw
leaves exp(-E) invariant for every step size and mass, exactly but for what is e^-1000 (or what the
threshold is) times less likely than the start. Within a new half points are drawn
by their weights; between the halves the new one is preferred, by min(1, w_new / w_old).

No recursion: leaf n of a half is tested against at most log2 of its predecessors, kept in a stack
of ``max_depth`` entries. Chains under ``vmap`` grow in step, and the loops end with the last chain.

Hoffman and Gelman, "The no-U-turn sampler", JMLR 15 (2014). Betancourt, "A conceptual introduction
to Hamiltonian Monte Carlo", arXiv:1701.02434 (2017). Phan, Pradhan and Jankowiak, "Composable
effects for flexible and accelerated probabilistic programming in NumPyro", arXiv:1912.11554 (2019).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from ebjax.numerics import inner_product, neighbouring_keys, random_normal_and_uniform
from ebjax.samplers.evaluate import GradientState, init_with_gradient
from ebjax.samplers.hamiltonian import (
    Phase,
    any_chain,
    check_step_size,
    inner_products,
    leapfrog,
)
from ebjax.samplers.metric import Metric, make_metric, scaled_gradient
from ebjax.types import EnergyFn, Kernel, Params, Position, bind

__all__ = ["NUTSInfo", "nuts"]

# One uniform float32 number decides all directions, a bit each.
_LARGEST_DEPTH = 20


class NUTSInfo(NamedTuple):
    """Diagnosis of one transition.

    Attributes:
      energy: [] E after the transition.
      acceptance_rate: [] mean of min(1, exp(H_start - H)) over all points evaluated; what a step
        size is tuned to.
      is_finite: [] bool, whether H was finite at all of them; where it is not the trajectory ends.
      is_divergent: [] bool, whether H grew beyond the threshold, which ended the trajectory.
      is_turning: [] bool, whether a U-turn ended it. If neither, it met ``max_depth``.
      energy_error: [] H of the point drawn less H of the start.
      num_evaluations: [] int32, leapfrog steps, each of which takes one gradient.
      depth: [] int32, how often the trajectory was doubled, the last half counted also if dropped.
    """

    energy: jax.Array
    acceptance_rate: jax.Array
    is_finite: jax.Array
    is_divergent: jax.Array
    is_turning: jax.Array
    energy_error: jax.Array
    num_evaluations: jax.Array
    depth: jax.Array


def nuts(
    *,
    step_size: float | jax.Array,
    inverse_mass: npt.ArrayLike | None = None,
    max_depth: int = 10,
    divergence_threshold: float | jax.Array = 1000.0,
) -> Kernel:
    """Builds the kernel.

    Args:
      step_size: h > 0, in units of the position (divided by those of F, if there is a mass).
      inverse_mass: M⁻¹, the diagonal [D] or a matrix [D, D] over the D components of the position
        raveled; ``None`` is the identity. Best near the covariance of the law.
      max_depth: static; a trajectory has at most ``2**max_depth`` points. From 1 to 20.
      divergence_threshold: growth of H above which a trajectory counts as divergent. The law is
        kept up to terms of exp(-threshold), so it should not be small.

    Returns:
      A ``Kernel`` with ``GradientState`` and ``NUTSInfo``. The number of gradients differs from
      transition to transition, so there is no reverse-mode gradient through it.

    Raises:
      ValueError: naming the option that is out of range.

    >>> import jax, jax.numpy as jnp
    >>> kernel = nuts(step_size=0.5)
    >>> def energy_fn(params, x):
    ...     return 0.5 * jnp.sum((x - params) ** 2)
    >>> state = kernel.init(energy_fn, 1.0, jnp.zeros(2))
    >>> state, info = kernel.step(jax.random.key(0), energy_fn, 1.0, state)
    >>> bool(info.is_turning), bool(info.acceptance_rate > 0.9)
    (True, True)
    """
    check_step_size(step_size)
    if not isinstance(max_depth, (int, np.integer)) or not 1 <= max_depth <= _LARGEST_DEPTH:
        raise ValueError(
            f"max_depth is {max_depth}; it must be an integer from 1 to {_LARGEST_DEPTH}."
        )
    if isinstance(divergence_threshold, (int, float)) and not divergence_threshold > 0.0:
        raise ValueError(f"divergence_threshold is {divergence_threshold}; it must be positive.")
    return Kernel(
        init=bind(init_with_gradient),
        step=bind(
            _step,
            step_size=step_size,
            metric=make_metric(inverse_mass),
            max_depth=int(max_depth),
            divergence_threshold=divergence_threshold,
        ),
        num_evaluations=None,
    )


class _Draw(NamedTuple):
    """A point drawn from a set of points: ``log_weight`` [] is log Σ exp(H_reference - H) of it."""

    state: GradientState
    energy_error: jax.Array
    log_weight: jax.Array


class _Status(NamedTuple):
    """What is known of the whole trajectory of one chain, each []."""

    is_growing: jax.Array
    is_finite: jax.Array
    is_divergent: jax.Array
    is_turning: jax.Array
    sum_acceptance: jax.Array
    num_evaluations: jax.Array
    depth: jax.Array


class _Checkpoints(NamedTuple):
    """Even leaves of the new half whose spans are not complete, a stack of [K, ...].

    Attributes:
      before: ξ of the point before the leaf.
      momentum: ξ of the leaf.
      sum_before: Σ ξ over the leaves before it.
    """

    before: Position
    momentum: Position
    sum_before: Position


class _Half(NamedTuple):
    """The new half while it grows.

    Attributes:
      step: [] step size, negative where the half grows backward in time.
      end: the last leaf, or what the first one will be next to.
      kinetic: [] kinetic energy of the last leaf.
      draw: a point drawn from the leaves; of no weight before the first.
      momentum_sum: Σ ξ over the leaves.
      checkpoints: of the leaves.
    """

    step: jax.Array
    end: Phase
    kinetic: jax.Array
    draw: _Draw
    momentum_sum: Position
    checkpoints: _Checkpoints


class _Tree(NamedTuple):
    """The trajectory: its two ends, of which ``end`` grew last, and what was drawn from it."""

    end: Phase
    other: Phase
    direction: jax.Array
    draw: _Draw
    momentum_sum: Position
    checkpoints: _Checkpoints


class _Problem(NamedTuple):
    """What stays fixed during a transition: arguments, and H at the point that it starts from."""

    energy_fn: EnergyFn
    params: Params
    metric: Metric
    step_size: jax.Array
    max_depth: int
    threshold: jax.Array
    key: jax.Array
    directions: jax.Array
    energy: jax.Array
    kinetic: jax.Array


def _has_turned(first, last, left_last, right_first, left_sum, right_sum) -> jax.Array:
    """[] bool: whether a span has, or one of its halves with the nearest point of the other."""
    add = lambda a, b: jax.tree.map(jnp.add, a, b)  # noqa: E731
    whole = add(left_sum, right_sum)
    left, right = add(left_sum, right_first), add(left_last, right_sum)
    products = inner_products(
        (whole, first),
        (whole, last),
        (left, first),
        (left, right_first),
        (right, left_last),
        (right, last),
    )
    return functools.reduce(jnp.minimum, products) <= 0.0


def _log_weight(energy_error: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(energy_error), -energy_error, -jnp.inf)


def _accepts(uniform: jax.Array, log_ratio: jax.Array) -> jax.Array:
    return uniform < jnp.exp(log_ratio)


def _choose(is_new: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(is_new, a, b), new, old)


def _read(stack: Position, index: int | jax.Array) -> Position:
    return jax.tree.map(lambda s: jax.lax.dynamic_index_in_dim(s, index, 0, False), stack)


def _write(stack: Position, entry: Position, index: jax.Array) -> Position:
    return jax.tree.map(
        lambda s, e: jax.lax.dynamic_update_index_in_dim(s, e, index, 0), stack, entry
    )


def _any_span_has_turned(half: _Half, leaf: jax.Array) -> jax.Array:
    """[] bool: tests the dyadic spans of 4 leaves or more that end at ``leaf``."""
    num_levels = jax.lax.population_count(leaf ^ (leaf + 1)) - 1  # trailing ones
    top = jax.lax.population_count(leaf >> 1)
    checkpoints = half.checkpoints
    subtract = functools.partial(jax.tree.map, jnp.subtract)

    def test(level, has_turned):
        left, right = top - level + 1, top - level + 2
        first, left_sum = _read((checkpoints.momentum, checkpoints.sum_before), left)
        left_last, right_first, right_sum = _read(checkpoints, right)
        return has_turned | _has_turned(
            first,
            half.end.momentum,
            left_last,
            right_first,
            subtract(right_sum, left_sum),
            subtract(half.momentum_sum, right_sum),
        )

    return jax.lax.fori_loop(2, num_levels + 1, test, _false_like(half.draw.log_weight))


def _false_like(array: jax.Array) -> jax.Array:
    """False, typed as varying over the devices of a caller's ``shard_map`` as ``array`` is."""
    return jnp.isnan(array) & False


def _full_like(array: jax.Array, value: float) -> jax.Array:
    """``jnp.full_like``, typed as varying over the devices of a ``shard_map`` as ``array`` is."""
    return jnp.where(_false_like(array), array, jnp.asarray(value, array.dtype))


def _uniform(problem: _Problem, index: jax.Array) -> jax.Array:
    """[] number ``index`` of the transition: leaf n of a half of L leaves has L + n."""
    key = neighbouring_keys(problem.key, index[None])[0]
    return random_normal_and_uniform(key, jnp.zeros((0,), problem.kinetic.dtype))[1][0]


def _grow(
    problem: _Problem, leaf: jax.Array, num_leaves: jax.Array, half: _Half, status: _Status
) -> tuple[_Half, _Status]:
    """Adds one leaf. In a chain that has ended it does so too, to no effect on what is kept."""
    start = half.end.momentum
    slot = jax.lax.population_count(leaf >> 1) + (leaf & 1)  # odd leaves go where nobody reads
    end, state = leapfrog(problem.energy_fn, problem.params, problem.metric, half.end, half.step)
    entry = _Checkpoints(start, end.momentum, half.momentum_sum)
    square, product = inner_products((end.momentum, end.momentum), (end.momentum, start))
    kinetic = 0.5 * square
    energy_error = (state.energy - problem.energy) + (kinetic - problem.kinetic)
    is_finite = jnp.isfinite(energy_error)
    log_weight = _log_weight(energy_error)
    total = jnp.logaddexp(half.draw.log_weight, log_weight)
    is_taken = _accepts(_uniform(problem, num_leaves + leaf), log_weight - total)
    taken, error = _choose(
        is_taken, (state, energy_error), (half.draw.state, half.draw.energy_error)
    )
    last_kinetic = half.kinetic
    half = half._replace(
        end=end,
        kinetic=kinetic,
        draw=_Draw(taken, error, total),
        momentum_sum=jax.tree.map(jnp.add, half.momentum_sum, end.momentum),
        checkpoints=_write(half.checkpoints, entry, slot),
    )

    # A pair has turned when ξ_a'ξ_b <= -min(|ξ_a|², |ξ_b|²).
    pair_has_turned = product <= -2.0 * jnp.minimum(last_kinetic, kinetic)
    is_turning = ((leaf & 1) == 1) & pair_has_turned | _any_span_has_turned(half, leaf)
    is_divergent = ~is_finite | (energy_error > problem.threshold)
    growing = status.is_growing
    acceptance = jnp.exp(jnp.minimum(log_weight, 0.0))
    return half, _Status(
        is_growing=growing & ~is_divergent & ~is_turning,
        is_finite=status.is_finite & (is_finite | ~growing),
        is_divergent=status.is_divergent | (growing & is_divergent),
        is_turning=status.is_turning | (growing & is_turning & ~is_divergent),
        sum_acceptance=status.sum_acceptance + jnp.where(growing, acceptance, 0.0),
        num_evaluations=status.num_evaluations + growing,
        depth=status.depth,
    )


def _double(
    problem: _Problem, depth: jax.Array, tree: _Tree, status: _Status
) -> tuple[_Tree, _Status]:
    """Grows a new half as large as the tree, and joins the two where it is whole."""
    direction = (1 - 2 * ((problem.directions >> depth) & 1)).astype(tree.direction.dtype)
    end, other = _choose(
        direction == tree.direction, (tree.end, tree.other), (tree.other, tree.end)
    )
    num_leaves = jnp.left_shift(jnp.int32(1), depth)
    half = _Half(
        end=end,
        step=direction * problem.step_size,
        kinetic=problem.kinetic,  # any number, since the first leaf closes no pair
        draw=tree.draw._replace(log_weight=_full_like(tree.draw.log_weight, -jnp.inf)),
        momentum_sum=jax.tree.map(lambda xi: _full_like(xi, 0.0), tree.momentum_sum),
        checkpoints=tree.checkpoints,
    )
    status = status._replace(depth=status.depth + status.is_growing)

    def body(loop):
        leaf, half, status = loop
        return leaf + 1, *_grow(problem, leaf, num_leaves, half, status)

    _, half, status = jax.lax.while_loop(
        lambda loop: (loop[0] < num_leaves) & any_chain(loop[2].is_growing),
        body,
        (jnp.int32(0), half, status),
    )
    log_ratio = half.draw.log_weight - tree.draw.log_weight
    uniform = _uniform(problem, 2**problem.max_depth + depth)
    is_taken = _accepts(uniform, jnp.where(status.is_growing, log_ratio, -jnp.inf))
    state, error = _choose(is_taken, half.draw[:2], tree.draw[:2])
    bottom = _read(half.checkpoints, 0)
    has_turned = _has_turned(
        other.momentum,
        half.end.momentum,
        bottom.before,
        bottom.momentum,
        tree.momentum_sum,
        half.momentum_sum,
    )
    tree = _Tree(
        end=half.end,
        other=other,
        direction=direction,
        draw=_Draw(state, error, jnp.logaddexp(tree.draw.log_weight, half.draw.log_weight)),
        momentum_sum=jax.tree.map(jnp.add, tree.momentum_sum, half.momentum_sum),
        checkpoints=half.checkpoints,
    )
    return tree, status._replace(
        is_growing=status.is_growing & ~has_turned,
        is_turning=status.is_turning | (status.is_growing & has_turned),
    )


def _step(
    key: jax.Array,
    energy_fn: EnergyFn,
    params: Params,
    state: GradientState,
    *,
    step_size,
    metric,
    max_depth,
    divergence_threshold,
) -> tuple[GradientState, NUTSInfo]:
    noise_key, leaf_key = jax.random.split(key)
    momentum, uniform = random_normal_and_uniform(noise_key, state.position)
    # Noise is not typed as varying over devices, even where its key is.
    momentum = jax.tree.map(
        lambda xi, x: jnp.where(_false_like(x), x, xi), momentum, state.position
    )
    kinetic = 0.5 * inner_product(momentum, momentum)
    zero = _full_like(kinetic + state.energy, 0.0)
    is_false = _false_like(zero)
    # A start of infinite energy has no weight; errors are then energies, which have no threshold.
    is_infinite = jnp.isposinf(state.energy)
    problem = _Problem(
        energy_fn=energy_fn,
        params=params,
        metric=metric,
        step_size=step_size,
        max_depth=max_depth,
        threshold=jnp.where(is_infinite, jnp.inf, divergence_threshold),
        key=leaf_key,
        directions=jnp.where(is_false, 0, (uniform[0] * 2**max_depth).astype(jnp.int32)),
        energy=jnp.where(is_infinite, 0.0, state.energy),
        kinetic=kinetic,
    )
    phase = Phase(state.position, momentum, scaled_gradient(metric, state.gradient))
    stack = jax.tree.map(lambda xi: jnp.broadcast_to(xi, (max_depth, *xi.shape)), momentum)
    tree = _Tree(
        end=phase,
        other=phase,
        direction=_full_like(kinetic, 1.0),
        draw=_Draw(state, zero, jnp.where(is_infinite, -jnp.inf, zero)),
        momentum_sum=momentum,
        checkpoints=_Checkpoints(stack, stack, stack),
    )
    count = is_false.astype(jnp.int32)
    status = _Status(~is_false, ~is_false, is_false, is_false, zero, count, count)

    def body(loop):
        depth, tree, status = loop
        return depth + 1, *_double(problem, depth, tree, status)

    _, tree, status = jax.lax.while_loop(
        lambda loop: (loop[0] < max_depth) & any_chain(loop[2].is_growing),
        body,
        (jnp.int32(0), tree, status),
    )
    new = tree.draw.state
    return new, NUTSInfo(
        energy=new.energy,
        acceptance_rate=status.sum_acceptance / status.num_evaluations,
        is_finite=status.is_finite,
        is_divergent=status.is_divergent,
        is_turning=status.is_turning,
        energy_error=tree.draw.energy_error,
        num_evaluations=status.num_evaluations,
        depth=status.depth,
    )
