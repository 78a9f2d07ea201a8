"""Maximum likelihood by sampling: contrastive divergence (CD-k, short-run, persistent).

    ∇_θ (-log p_θ(x⁺)) = ∇_θ E_θ(x⁺) - E_{x⁻ ~ p_θ} ∇_θ E_θ(x⁻)

    loss = mean E(x⁺) - mean E(x⁻) + α mean(E(x⁺)² + E(x⁻)²) + penalties at x⁺ and at x⁻

The negatives x⁻ are the ends of Markov chains and constants in the loss. Where the chains start is
what the three differ in:

    CD-k          at the data, each time      blind to how much mass far modes have
    short-run     from noise, each time       the sampler, not the energy, is the model
    persistent    where they ended (PCD)      lags behind the parameters; a share is born anew

None is the exact gradient for finite chains: CD-k and short-run tend to it as k grows, PCD as the
learning rate falls. ``ebjax.objectives.jarzynski`` corrects for the lag by weights.

Conditional energies: a batch of pairs ``(x, context)`` and E(params, x, context).

Hinton, "Training products of experts by minimizing contrastive divergence", Neural Computation 14
(2002). Tieleman, "Training restricted Boltzmann machines using approximations to the likelihood
gradient", ICML 2008. Nijkamp, Hill, Zhu and Wu, "Learning non-convergent non-persistent short-run
MCMC toward energy-based model", NeurIPS 2019. Du and Mordatch, "Implicit generation and modeling
with energy based models", NeurIPS 2019 (replay with rebirth, energy regulariser). Yang and Ji,
"JEM++: improved techniques for training JEM", ICCV 2021 (informative births).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ebjax.objectives.chain_divergence import ChainDivergence, chain_divergence
from ebjax.objectives.persistent_chains import (
    ChainRules,
    PersistentChains,
    advance_chains,
    start_chains,
)
from ebjax.objectives.regularizers import Regularizer, mean_penalty
from ebjax.types import EnergyFn, Kernel, Objective, Position

__all__ = [
    "PersistentChains",
    "contrastive_divergence",
    "contrastive_loss",
    "persistent_contrastive_divergence",
    "short_run",
]


def contrastive_loss(
    positive_energy: jax.Array, negative_energy: jax.Array, *, energy_regularizer: float = 0.0
) -> jax.Array:
    """``E⁺ - E⁻ + α (E⁺² + E⁻²)`` of one pair.

    A step against its gradient lowers the energy of data and raises that of samples. The
    regulariser penalises the square of each energy, not of their mean, and so bounds their spread.

    >>> float(contrastive_loss(jnp.array(1.0), jnp.array(3.0), energy_regularizer=0.5))
    3.0
    """
    square = jnp.square(positive_energy) + jnp.square(negative_energy)
    return positive_energy - negative_energy + energy_regularizer * square


def persistent_contrastive_divergence(
    energy_fn: EnergyFn,
    kernel: Kernel | Callable[[jax.Array], Kernel],
    initial_position: Callable[..., Position],
    *,
    num_steps: int,
    chains_per_example: int = 1,
    rebirth_probability: float = 0.05,
    energy_regularizer: float = 0.0,
    regularizers: Sequence[Regularizer] = (),
    has_context: bool = False,
    divergence: ChainDivergence | None = None,
    target_acceptance: float | None = None,
    step_size: float = 0.1,
    adaptation_gain: float = 0.1,
    reset_margin: float | None = None,
    reset_patience: int = 1,
    axis_name: str | None = None,
) -> Objective:
    """Builds the objective.

    Each example slot owns ``chains_per_example`` chains. An update advances one of them, chosen at
    random, by ``num_steps`` transitions under the current parameters and writes it back to its
    place; with all slots this is a replay buffer of ``B * chains_per_example`` chains.

    Args:
      energy_fn: the energy that is trained.
      kernel: the transition of the chains; with ``target_acceptance`` a function ``step size ->
        Kernel``.
      initial_position: ``key -> x``, the noise that chains are born from, or ``(key, example) ->
        x`` where a birth depends on the example of the slot (its class, say). Which of the two is
        told by how many arguments it requires.
      num_steps: transitions of a chain in one update.
      chains_per_example: M, at least 1.
      rebirth_probability: chance that the chosen chain starts anew, in [0, 1]. At 1 no chain
        persists.
      energy_regularizer: α >= 0.
      regularizers: penalties, applied to data and negatives.
      has_context: whether the batch is a pair ``(x, context)`` and the energy takes the context as
        its third argument. A chain keeps the context of the example at its birth.
      divergence: the term that accounts for how the ends of the chains depend on the parameters.
      target_acceptance: acceptance rate that the step size of each slot is steered to.
      step_size: where an adaptive step size starts.
      adaptation_gain: g in ``log h <- log h + g (acceptance - target)``, once an update.
      reset_margin: all chains are born anew when samples have been lower than the data by more
        than this, on average: chains that fell into a pit of the energy do not find out by
        themselves. ``None`` never does that.
      reset_patience: for how many updates in a row before that happens.
      axis_name: the axis of the devices, for ``reset_margin`` and the entropy of ``divergence``.

    Returns:
      An ``Objective`` over batches of examples [B, ...], whose carry is ``PersistentChains``.
      Metrics: ``energy_data``, ``energy_samples``, ``energy_gap`` (data minus samples),
      ``sampler_gradient_norm`` and ``acceptance_rate`` where the kernel reports them, ``chain_age``
      (mean steps since birth), ``chains_finite`` (share of transitions that were finite), and where
      they are asked for ``penalty``, ``chain_divergence``, ``log_step_size`` (mean) and ``resets``
      (share of updates that ended in one).

    Raises:
      ValueError: naming the option that is out of range.

    >>> from ebjax.samplers import mala
    >>> energy_fn = lambda mean, x: 0.5 * jnp.sum((x - mean) ** 2)
    >>> objective = persistent_contrastive_divergence(
    ...     energy_fn, mala(step_size=0.5), lambda key: jax.random.normal(key, (2,)), num_steps=5)
    >>> batch = jnp.ones((100, 2))
    >>> chains = jax.jit(objective.init)(jax.random.key(0), jnp.zeros(2), batch)
    >>> keys = jax.random.split(jax.random.key(1), 100)
    >>> gradient_fn = jax.jit(jax.grad(objective.loss, has_aux=True))
    >>> gradient_fn(jnp.zeros(2), chains, keys, batch)[0].round(0).tolist()
    [-1.0, -1.0]
    """
    rules = ChainRules(
        kernel=kernel,
        initial_position=initial_position,
        num_steps=num_steps,
        chains_per_example=chains_per_example,
        rebirth_probability=rebirth_probability,
        has_context=has_context,
        num_differentiable_steps=0 if divergence is None else divergence.num_steps,
        step_size=step_size,
        target_acceptance=target_acceptance,
        adaptation_gain=adaptation_gain,
    )
    rules.check()
    if divergence is not None:
        divergence.check()
    if reset_margin is not None and not reset_margin >= 0.0:
        raise ValueError(f"reset_margin is {reset_margin}; it must be at least 0.")
    if reset_patience < 1:
        raise ValueError(f"reset_patience is {reset_patience}; it must be at least 1.")
    terms = _Terms(energy_regularizer, tuple(regularizers), divergence)
    reset = None if reset_margin is None else _Reset(reset_margin, reset_patience)

    def init(key, params, batch):
        del params
        chains = start_chains(key, rules, batch)
        if reset is None:
            return chains
        return chains._replace(num_low=jnp.zeros(len(chains.age), jnp.int32))

    def loss(params, carry, keys, batch):
        ends, carry, info = advance_chains(keys, rules, energy_fn, params, carry, batch)
        value, metrics = _loss(terms, energy_fn, params, ends, batch, has_context, axis_name)
        if reset is not None:
            carry, is_reset = _reset_low_chains(
                keys, rules, reset, carry, metrics, batch, axis_name
            )
            metrics["resets"] = is_reset.astype(value.dtype)
        metrics["chain_age"] = carry.age.mean(dtype=jnp.float32)
        metrics["chains_finite"] = info.is_finite.mean()
        if rules.target_acceptance is not None:
            metrics["log_step_size"] = carry.log_step_size.mean()
        reported = {"sampler_gradient_norm": "gradient_norm", "acceptance_rate": "acceptance_rate"}
        for name, field in reported.items():
            if hasattr(info, field):
                metrics[name] = getattr(info, field).mean()
        return value, (carry, metrics)

    return Objective(init=init, loss=loss)


class _Terms(NamedTuple):
    """What the loss is made of."""

    energy_regularizer: float
    regularizers: tuple[Regularizer, ...]
    divergence: ChainDivergence | None


def _loss(terms: _Terms, energy_fn, params, ends, batch, has_context, axis_name):
    """The loss of the local batch with its metrics, given the ends of the chains."""
    negatives = (ends.position, ends.context) if has_context else ends.position
    # One pass over data and samples together: half the calls, twice the batch.
    both = jax.tree.map(
        lambda a, b: jnp.concatenate([a, b]), batch, jax.lax.stop_gradient(negatives)
    )
    positions, contexts = both if has_context else (both, None)
    if has_context:
        energies = jax.vmap(energy_fn, (None, 0, 0))(params, positions, contexts)
    else:
        energies = jax.vmap(energy_fn, (None, 0))(params, positions)
    positive, negative = jnp.split(energies, 2)
    losses = jax.vmap(
        lambda p, n: contrastive_loss(p, n, energy_regularizer=terms.energy_regularizer)
    )(positive, negative)
    value = losses.mean()
    metrics = {
        "energy_data": positive.mean(),
        "energy_samples": negative.mean(),
        "energy_gap": positive.mean() - negative.mean(),
    }
    if terms.regularizers:
        # The mean over data and negatives is half the sum of their means.
        penalty = 2.0 * mean_penalty(terms.regularizers, energy_fn, params, positions, contexts)
        value, metrics["penalty"] = value + penalty, penalty
    if terms.divergence is not None:
        term = chain_divergence(terms.divergence, energy_fn, params, ends, axis_name=axis_name)
        value, metrics["chain_divergence"] = value + term, term
    return value, metrics


class _Reset(NamedTuple):
    """When all chains are born anew."""

    margin: float
    patience: int


def _reset_low_chains(keys, rules, reset: _Reset, chains, metrics, batch, axis_name):
    """All chains born anew once samples have been too low for long enough."""
    gap = metrics["energy_gap"]
    if axis_name is not None:
        gap = jax.lax.pmean(gap, axis_name)
    num_low = jnp.where(gap > reset.margin, chains.num_low + 1, 0)
    is_reset = num_low[0] >= reset.patience
    chains = chains._replace(num_low=num_low)

    def newborn(chains):
        def one(key, example, log_step_size):
            # Each slot by itself, from the key of its example, whatever device holds it.
            fresh = start_chains(
                jax.random.fold_in(key, 1), rules, jax.tree.map(lambda leaf: leaf[None], example)
            )
            fresh = jax.tree.map(lambda leaf: leaf[0], fresh)
            return fresh._replace(log_step_size=log_step_size)

        fresh = jax.vmap(one)(keys, batch, chains.log_step_size)
        return fresh._replace(num_low=jnp.zeros_like(chains.num_low))

    return jax.lax.cond(is_reset, newborn, lambda chains: chains, chains), is_reset


def contrastive_divergence(
    energy_fn: EnergyFn, kernel: Kernel, *, num_steps: int, **options: Any
) -> Objective:
    """CD-k: the chains start at the data, each time.

    Cheap and steady, and blind to what k steps from the data do not reach: two modes far apart keep
    whatever shares of the mass the energy started with.

    Args:
      energy_fn: the energy that is trained.
      kernel: the transition of the chains.
      num_steps: k.
      **options: ``energy_regularizer``, ``regularizers``, ``has_context``, ``divergence``,
        ``target_acceptance``, ``step_size``, ``adaptation_gain`` and ``axis_name`` of
        ``persistent_contrastive_divergence``.

    Returns:
      An ``Objective`` as of ``persistent_contrastive_divergence``, with the ends of the last update
      in its carry.

    Raises:
      ValueError: naming the option that is out of range.
    """
    birth = _context_free_birth if options.get("has_context") else _birth_at_the_example
    return _not_persistent(energy_fn, kernel, birth, num_steps, options)


def short_run(
    energy_fn: EnergyFn,
    kernel: Kernel,
    initial_position: Callable[..., Position],
    *,
    num_steps: int,
    **options: Any,
) -> Objective:
    """Short-run MCMC: the chains start at ``initial_position``, each time.

    What is learned is the law of ``num_steps`` transitions from there, a generator whose noise is
    that of the chain. The energy itself may be far from the data's: draw with the sampler that it
    was trained with.

    Args:
      energy_fn: the energy that is trained.
      kernel: the transition of the chains.
      initial_position: ``key -> x`` or ``(key, example) -> x``.
      num_steps: transitions of a chain.
      **options: as of ``contrastive_divergence``.

    Returns:
      An ``Objective`` as of ``persistent_contrastive_divergence``.

    Raises:
      ValueError: naming the option that is out of range.
    """
    return _not_persistent(energy_fn, kernel, initial_position, num_steps, options)


def _not_persistent(energy_fn, kernel, initial_position, num_steps, options):
    fixed = {"chains_per_example", "rebirth_probability", "reset_margin", "reset_patience"}
    for name in sorted(fixed & set(options)):
        raise ValueError(f"{name} is {options[name]}; chains that do not persist have none.")
    return persistent_contrastive_divergence(
        energy_fn,
        kernel,
        initial_position,
        num_steps=num_steps,
        rebirth_probability=1.0,
        **options,
    )


def _birth_at_the_example(key, example):
    del key
    return example


def _context_free_birth(key, example):
    del key
    return example[0]
