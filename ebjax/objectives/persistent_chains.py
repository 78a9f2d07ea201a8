"""Markov chains that belong to example slots: born, kept between updates, moved, born again.

Each slot owns M chains. An update moves one of them, chosen at random, by K transitions under the
current parameters and writes it back to its place, so that all slots together are a replay buffer
of B M chains. A chain is born at ``initial_position``: noise, a draw of a fitted law, the example.

With context c the chain draws from p(x | c). It keeps the context of the example that its slot held
at its birth: a chain whose context changed under it would be far from its new law.

The step size of a slot can follow its acceptance rate a, by Robbins and Monro on its logarithm,

    log h <- log h + g (a - a*)

with a constant gain g, as the energy changes for as long as it is trained. Such a chain is not
exactly invariant: h depends on where the chain has been.

Robbins and Monro, "A stochastic approximation method", Annals of Mathematical Statistics 22 (1951).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ebjax.samplers.run import run_chain
from ebjax.types import EnergyFn, Kernel, Params, Position, PyTree

__all__ = ["ChainRules", "Negative", "PersistentChains", "advance_chains", "start_chains"]


class PersistentChains(NamedTuple):
    """The chains that belong to the example slots. What a run does not use is ``()``.

    Attributes:
      position: [B, M, ...] M chains a slot.
      age: [B, M] int32, steps since the chain was born.
      context: [B, M, ...] the context of each chain.
      log_step_size: [B] of an adaptive sampler.
      num_low: [B] int32, updates in a row with samples far below the data, equal in all slots.
    """

    position: Position
    age: jax.Array
    context: Any = ()
    log_step_size: Any = ()
    num_low: Any = ()


class ChainRules(NamedTuple):
    """How chains live; the fields are static.

    Attributes:
      kernel: the transition; with ``target_acceptance`` a function ``step size -> Kernel``.
      initial_position: ``key -> x`` or ``(key, example) -> x``.
      num_steps: K, transitions in one update.
      chains_per_example: M.
      rebirth_probability: chance that the chosen chain starts anew.
      has_context: whether an example is a pair ``(x, context)``.
      num_differentiable_steps: how many of the last transitions pass gradient to the parameters.
      step_size: where an adaptive step size starts.
      target_acceptance: a*, or ``None`` for a fixed kernel.
      adaptation_gain: g.
    """

    kernel: Kernel | Callable[[jax.Array], Kernel]
    initial_position: Callable[..., Position]
    num_steps: int
    chains_per_example: int = 1
    rebirth_probability: float = 0.0
    has_context: bool = False
    num_differentiable_steps: int = 0
    step_size: float = 0.1
    target_acceptance: float | None = None
    adaptation_gain: float = 0.1

    def check(self) -> None:
        """Raises ``ValueError`` naming the option that is out of range."""
        if self.num_steps < 1:
            raise ValueError(
                f"num_steps is {self.num_steps}; a chain takes at least 1 step an update."
            )
        if self.chains_per_example < 1:
            raise ValueError(
                f"chains_per_example is {self.chains_per_example}; it must be at least 1."
            )
        if not 0.0 <= self.rebirth_probability <= 1.0:
            raise ValueError(
                f"rebirth_probability is {self.rebirth_probability}; it must be in [0, 1]."
            )
        if not 0 <= self.num_differentiable_steps <= self.num_steps:
            raise ValueError(
                f"num_differentiable_steps is {self.num_differentiable_steps}; it must be from 0 "
                f"to the {self.num_steps} steps of an update."
            )
        is_kernel = hasattr(self.kernel, "init") and hasattr(self.kernel, "step")
        if self.target_acceptance is None:
            if not is_kernel:
                raise ValueError(
                    f"kernel is {self.kernel!r}; it must be a Kernel, or with target_acceptance a "
                    "function of the step size."
                )
            return
        if is_kernel:
            raise ValueError(
                "kernel is a Kernel with a fixed step size; with target_acceptance give a function "
                "of the step size, such as lambda h: mala(step_size=h)."
            )
        if not 0.0 < self.target_acceptance < 1.0:
            raise ValueError(
                f"target_acceptance is {self.target_acceptance}; it must be between 0 and 1."
            )
        if not self.step_size > 0.0:
            raise ValueError(f"step_size is {self.step_size}; it must be positive.")
        if not self.adaptation_gain > 0.0:
            raise ValueError(f"adaptation_gain is {self.adaptation_gain}; it must be positive.")


class Negative(NamedTuple):
    """A sample for the loss: the end of a chain ``position`` [...] and its ``context``."""

    position: Position
    context: Any = ()


def takes_example(initial_position: Callable[..., Position]) -> bool:
    """Whether a birth asks for the example, by the number of arguments that it requires.

    >>> takes_example(lambda key: key), takes_example(lambda key, example: example)
    (False, True)
    """
    try:
        parameters = inspect.signature(initial_position).parameters.values()
    except ValueError:  # a builtin that does not say
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is p.empty for p in parameters) >= 2


def birth(rules: ChainRules, key: jax.Array, example: PyTree) -> Position:
    """Where the chain of one slot starts; consumes the key."""
    if takes_example(rules.initial_position):
        return rules.initial_position(key, example)
    return rules.initial_position(key)


def start_chains(key: jax.Array, rules: ChainRules, batch: PyTree) -> PersistentChains:
    """Newborn chains for a global batch [B, ...]; chain m of slot b has the context of b + m."""
    leaves = jax.tree.leaves(batch)
    batch_size = len(leaves[0])
    keys = jax.random.split(key, (batch_size, rules.chains_per_example))
    first, others = jnp.arange(batch_size)[:, None], jnp.arange(rules.chains_per_example)
    index = (first + others) % batch_size
    examples = jax.tree.map(lambda leaf: leaf[index], batch)
    position = jax.vmap(jax.vmap(lambda k, example: birth(rules, k, example)))(keys, examples)
    dtype = jnp.result_type(float)
    return PersistentChains(
        position=position,
        age=jnp.zeros(keys.shape, jnp.int32),
        context=examples[1] if rules.has_context else (),
        log_step_size=()
        if rules.target_acceptance is None
        else jnp.full(batch_size, jnp.log(rules.step_size), dtype),
    )


def advance_chains(
    keys: jax.Array,
    rules: ChainRules,
    energy_fn: EnergyFn,
    params: Params,
    chains: PersistentChains,
    batch: PyTree,
) -> tuple[Negative, PersistentChains, Any]:
    """Moves one chain of each slot.

    Gradient reaches ``params`` through the last ``num_differentiable_steps`` transitions of the
    returned ends, and nothing else.

    Args:
      keys: [B], one a slot, consumed.
      rules: how chains live.
      energy_fn: ``(params, x, *context) -> []``.
      params: its parameters.
      chains: the slots' chains.
      batch: [B, ...] the slots' examples.

    Returns:
      ``(ends [B, ...], chains, info)``: info is the kernel's, averaged over steps, [B] a field.
    """
    frozen = jax.lax.stop_gradient(params)

    def one(key, chains, example):
        return _advance_one(key, rules, energy_fn, (frozen, params), chains, example)

    ends, chains, info = jax.vmap(one)(keys, chains, batch)
    chains, info = jax.lax.stop_gradient((chains, info))
    if not rules.num_differentiable_steps:
        ends = jax.lax.stop_gradient(ends)
    return ends, chains, info


def _advance_one(key, rules, energy_fn, frozen_and_params, chains, example):
    """One slot: the end of its chosen chain, and the slot's chains with it written back."""
    choice_key, rebirth_key, birth_key, chain_key = jax.random.split(key, 4)
    row: Any = 0
    if rules.chains_per_example > 1:
        row = jax.random.randint(choice_key, (), 0, rules.chains_per_example)
    of_chains = chains._replace(log_step_size=(), num_low=())  # the others are the slot's
    kept = jax.tree.map(lambda leaf: leaf[row], of_chains)
    if rules.rebirth_probability > 0.0:
        # A birth may cost as much as a step: none is drawn where none can happen.
        is_reborn = jax.random.bernoulli(rebirth_key, rules.rebirth_probability)
        born = kept._replace(
            position=birth(rules, birth_key, example),
            age=jnp.zeros_like(kept.age),
            context=example[1] if rules.has_context else (),
        )
        kept = jax.tree.map(lambda b, k: jnp.where(is_reborn, b, k), born, kept)

    start, context = kept.position, kept.context
    conditional = energy_fn
    if rules.has_context:
        conditional = _given(energy_fn, context)
    kernel: Any = rules.kernel
    if rules.target_acceptance is not None:
        kernel = kernel(jnp.exp(chains.log_step_size))
    end, info = _run(chain_key, rules, kernel, conditional, frozen_and_params, start)
    moved = kept._replace(position=end, age=kept.age + rules.num_steps)
    written = jax.tree.map(lambda all_, leaf: all_.at[row].set(leaf), of_chains, moved)
    chains = written._replace(log_step_size=chains.log_step_size, num_low=chains.num_low)
    if rules.target_acceptance is not None:
        error = jnp.nan_to_num(info.acceptance_rate) - rules.target_acceptance
        log_step_size = chains.log_step_size + rules.adaptation_gain * error
        chains = chains._replace(log_step_size=log_step_size.astype(chains.log_step_size.dtype))
    return Negative(end, context), chains, info


def _given(energy_fn: EnergyFn, context: Any) -> EnergyFn:
    """The energy with its context bound, as one pytree."""
    return lambda params, x: energy_fn(params, x, context)


def _run(key, rules, kernel, energy_fn, frozen_and_params, position):
    """K transitions, the last of them under parameters that receive gradient."""
    frozen, params = frozen_and_params
    num_last = rules.num_differentiable_steps
    num_first = rules.num_steps - num_last
    infos = []
    if num_first:
        state = kernel.init(energy_fn, frozen, position)
        state, info = run_chain(key, kernel, energy_fn, frozen, state, num_first)
        position = state.position
        infos.append((num_first, info))
    if num_last:
        # A new state: what the old one keeps of the energy belongs to the frozen parameters.
        state = kernel.init(energy_fn, params, jax.lax.stop_gradient(position))
        last_key = jax.random.fold_in(key, rules.num_steps)
        state, info = run_chain(last_key, kernel, energy_fn, params, state, num_last)
        position = state.position
        infos.append((num_last, info))
    if len(infos) == 1:
        return position, infos[0][1]
    (n, first), (m, last) = infos
    return position, jax.tree.map(lambda a, b: (n * a + m * b) / (n + m), first, last)
