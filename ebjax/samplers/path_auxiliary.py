"""Path auxiliary sampler: several sites a step, along a path that the acceptance knows.

A length R is drawn, then a path x = x_0, x_1, ..., x_R = y of single-site moves, and

    a = min(1, π(y) q(path reversed | y) / (π(x) q(path | x))),    π = exp(-E/τ)

The path is part of the proposal, so the pair (path, reversed path) is in detailed balance and so
is their sum over paths. Two ways to draw it, both exact:

    fresh gradients (PAS)   each move ∝ g(exp(-Δ/τ)) with the gradient at the point it leaves; the
                            reversed move is weighed at the point it leaves; sites may come again
    fast (PAFS)             all moves weighed with ∇E(x), sites without replacement; the reversed
                            path in reversed order, weighed with ∇E(y): one gradient a step

R is uniform on 1 .. 2ρ - 1, of mean ρ, whatever the state. At R = 1 this is Gibbs with gradients.

Sun, Dai, Xia and Ramamurthy, "Path auxiliary proposal for MCMC in discrete space", ICLR 2022.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from ebjax.samplers.discrete import (
    DiscreteInfo,
    DiscreteState,
    accept_or_stay,
    apply_move,
    as_sites,
    check_balancing,
    check_num_categories,
    check_positive,
    choose,
    choose_category,
    init_with_gradient,
    move_log_weights,
    uniforms,
)
from ebjax.samplers.gibbs_with_gradients import log_proposal
from ebjax.types import EnergyFn, Kernel, Params, bind

__all__ = ["path_auxiliary"]


def path_auxiliary(
    *,
    radius: float | jax.Array,
    max_length: int | None = None,
    is_fast: bool = True,
    num_categories: int | None = None,
    temperature: float | jax.Array = 1.0,
    balancing: str = "sqrt",
) -> Kernel:
    """Builds the kernel.

    Args:
      radius: ρ >= 1, the mean number of moves of a path; R = 1 + floor((2ρ - 1) u), cut at
        ``max_length``. An acceptance rate near 0.57 is about the best ρ for many sites.
      max_length: static, the longest path. By default ``ceil(2 radius - 1)``; to be given where
        ``radius`` is an array.
      is_fast: static; one gradient a step, or a fresh one at each point of the path.
      num_categories: ``None`` for binary positions in {0, 1}, or K for one-hot ones [..., K].
      temperature: τ > 0; the chain's law is exp(-E/τ).
      balancing: g: ``"sqrt"``, ``"barker"`` (t/(1+t)), ``"min"`` or ``"max"`` of 1 and t.

    Returns:
      A ``Kernel`` with ``DiscreteState`` and ``DiscreteInfo``. One gradient a step, or
      ``max_length`` of them with fresh ones.

    Raises:
      ValueError: naming the option that is out of range.

    >>> import jax, jax.numpy as jnp
    >>> kernel = path_auxiliary(radius=2)
    >>> def energy_fn(params, x):
    ...     return -jnp.sum(params * x) + x[0] * x[1]
    >>> params = jnp.array([1.0, -0.5, 2.0])
    >>> state = kernel.init(energy_fn, params, jnp.zeros(3))
    >>> state, info = kernel.step(jax.random.key(0), energy_fn, params, state)
    >>> int(info.num_changed) <= 3
    True
    """
    check_num_categories(num_categories)
    check_positive(temperature=temperature)
    check_balancing(balancing)
    if isinstance(radius, int | float):
        if not 1 <= radius < math.inf:
            raise ValueError(f"radius is {radius}; it must be finite and at least 1.")
        max_length = math.ceil(2 * radius - 1) if max_length is None else max_length
    if max_length is None:
        raise ValueError("max_length is None; it must be given where radius is an array.")
    if max_length < 1:
        raise ValueError(f"max_length is {max_length}; it must be at least 1.")
    options = {
        "radius": radius,
        "max_length": max_length,
        "num_categories": num_categories,
        "temperature": temperature,
        "balancing": balancing,
    }
    step = bind(_fast_step if is_fast else _fresh_step, **options)
    return Kernel(bind(init_with_gradient), step, 1 if is_fast else max_length)


def _length(uniform: jax.Array, radius, max_length: int) -> jax.Array:
    length = 1 + jnp.floor((2.0 * radius - 1.0) * uniform).astype(jnp.int32)
    return jnp.minimum(length, max_length)


def log_ordered(
    log_rest: jax.Array, log_chosen: jax.Array, is_used: jax.Array, *, reverse: bool
) -> jax.Array:
    """log probability of drawing sites in an order, without replacement.

    The r-th draw has the mass of what is left, added up from the small end so that nothing
    cancels: log_rest, the sites never drawn, and those drawn later.

    Args:
      log_rest: [] log of the summed weights of sites that are not drawn.
      log_chosen: [R] log weights of the drawn sites, in the order of the forward path.
      is_used: [R] bool, false beyond the length of the path.
      reverse: whether they were drawn in the opposite order.
    """
    entries = jnp.where(is_used, log_chosen, -jnp.inf)
    later = jax.lax.cumlogsumexp(entries, reverse=not reverse)
    return jnp.sum(jnp.where(is_used, log_chosen - jnp.logaddexp(log_rest, later), 0.0))


def log_path(
    log_weights: jax.Array,
    order: jax.Array,
    values: jax.Array,
    is_used: jax.Array,
    *,
    reverse: bool,
) -> jax.Array:
    """log q of a path of distinct sites under weights that stay the same along it.

    Args:
      log_weights: [N] or [N, K], of the moves.
      order: [R] int32, distinct sites, those that are used first.
      values: [R] int32, the category each one moves to (ignored for binary sites).
      is_used: [R] bool.
      reverse: whether the path is walked from its end.
    """
    is_binary = log_weights.ndim == 1
    site_weights = log_weights if is_binary else jax.nn.logsumexp(log_weights, axis=-1)
    drawn = jnp.zeros(site_weights.shape, bool).at[order].set(is_used)
    log_rest = jax.nn.logsumexp(jnp.where(drawn, -jnp.inf, site_weights))
    chosen = site_weights[order]
    total = log_ordered(log_rest, chosen, is_used, reverse=reverse)
    if is_binary:
        return total
    within = log_weights[order, values] - chosen
    return total + jnp.sum(jnp.where(is_used, within, 0.0))


def _fast_step(
    key: jax.Array,
    energy_fn: EnergyFn,
    params: Params,
    state: DiscreteState,
    *,
    radius,
    max_length,
    **options,
) -> tuple[DiscreteState, DiscreteInfo]:
    num_categories, temperature = options["num_categories"], options["temperature"]
    sites, restore = as_sites(state.position, num_categories)
    num_sites = len(sites)
    max_length = min(max_length, num_sites)
    uniform = uniforms(key, (num_sites + max_length + 2,), sites.dtype)
    gumbel_uniform, rest = uniform[:num_sites], uniform[num_sites:]
    is_used = jnp.arange(max_length) < _length(rest[0], radius, max_length)

    log_weights = move_log_weights(state, **options)
    site_weights = log_weights
    if num_categories is not None:
        site_weights = jax.nn.logsumexp(log_weights, axis=-1)
    # The R largest of log weight plus Gumbel noise are R sequential draws without replacement.
    order = jax.lax.top_k(site_weights - jnp.log(-jnp.log(gumbel_uniform)), max_length)[1]
    if num_categories is None:
        new, old_values, new_values = 1.0 - sites[order], order, order
    else:
        new = choose_category(rest[2:], log_weights[order])
        new_values, old_values = jnp.argmax(new, axis=-1), jnp.argmax(sites[order], axis=-1)
    is_moved = is_used if num_categories is None else is_used[:, None]
    moved = sites.at[order].set(jnp.where(is_moved, new, sites[order]))
    proposal = init_with_gradient(energy_fn, params, restore(moved))
    log_acceptance = (
        (state.energy - proposal.energy) / temperature
        + log_path(move_log_weights(proposal, **options), order, old_values, is_used, reverse=True)
        - log_path(log_weights, order, new_values, is_used, reverse=False)
    )
    return accept_or_stay(rest[1], log_acceptance, state, proposal, num_categories)


def _fresh_step(
    key: jax.Array,
    energy_fn: EnergyFn,
    params: Params,
    state: DiscreteState,
    *,
    radius,
    max_length,
    **options,
) -> tuple[DiscreteState, DiscreteInfo]:
    num_categories, temperature = options["num_categories"], options["temperature"]
    sites, restore = as_sites(state.position, num_categories)
    uniform = uniforms(key, (2 * max_length + 2,), sites.dtype)
    length = _length(uniform[0], radius, max_length)

    def move(carry, inputs):
        here, log_forward, log_ratio = carry
        index, uniform = inputs
        move = choose(uniform, log_forward)
        sites = as_sites(here.position, num_categories)[0]
        moved, back = apply_move(sites, move, num_categories)
        there = init_with_gradient(energy_fn, params, restore(moved))
        log_backward = log_proposal(there, **options)
        next_ratio = log_ratio + log_backward[back] - log_forward[move]
        return jax.tree.map(
            lambda a, b: jnp.where(index < length, a, b),
            (there, log_backward, next_ratio),
            carry,
        ), None

    log_forward = log_proposal(state, **options)
    start = (state, log_forward, jnp.zeros((), log_forward.dtype))
    inputs = (jnp.arange(max_length), uniform[2:].reshape(max_length, 2))
    (proposal, _, log_ratio), _ = jax.lax.scan(move, start, inputs)
    log_acceptance = (state.energy - proposal.energy) / temperature + log_ratio
    return accept_or_stay(uniform[1], log_acceptance, state, proposal, num_categories)
