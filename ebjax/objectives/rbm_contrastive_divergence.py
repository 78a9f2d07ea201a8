"""Persistent contrastive divergence of restricted Boltzmann machines: chains keep both layers.

    v ~ p(v | h),    loss = mean F(v⁺) - mean F(v),    h ~ p(h | v)

    F(v) = -b·v - Σ_j log(1 + exp(c_j + (v' W)_j))

The log-odds of h given v stand in F(v). A chain that ends an update by drawing its hidden units
gets them from the product of matrices that the loss needs anyhow: an update takes W h, v' W for
data and samples together, and the gradient. ``persistent_contrastive_divergence`` with
``rbm_marginal_gibbs`` keeps v alone, has the same law, and takes v' W of the samples twice. The
hidden units that begin an update were drawn under the parameters before it, as v was.

The gradient has the conditional means of the hidden units, not their draws.

Tieleman, "Training restricted Boltzmann machines using approximations to the likelihood gradient",
ICML 2008.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ebjax.energies.boltzmann import Layers, RBMParams
from ebjax.objectives.persistent_chains import ChainRules, PersistentChains, birth, start_chains
from ebjax.samplers.discrete import uniforms
from ebjax.samplers.rbm_marginal import rbm_marginal_gibbs
from ebjax.types import Objective, Position

__all__ = ["rbm_persistent_contrastive_divergence"]


class _Moved(NamedTuple):
    """Chains between their two layers.

    Attributes:
      visible: [B, V].
      uniform: [B, H] the numbers that will draw the hidden units.
      is_finite: [B] whether all log-odds so far were finite.
    """

    visible: jax.Array
    uniform: jax.Array
    is_finite: jax.Array


def rbm_persistent_contrastive_divergence(
    initial_position: Callable[..., Position],
    *,
    num_steps: int = 1,
    chains_per_example: int = 1,
    rebirth_probability: float = 0.0,
) -> Objective:
    """Builds the objective of ``RBMParams``, for examples [V] in {0, 1}.

    Args:
      initial_position: ``key -> v`` or ``(key, example) -> v``, the visible layer of a birth. Its
        hidden one is drawn given it.
      num_steps: draws of the visible layer in one update.
      chains_per_example: M chains an example slot, of which an update moves one, chosen at random.
      rebirth_probability: chance that the chosen chain starts anew, in [0, 1].

    Returns:
      An ``Objective`` over batches [B, V], whose carry is ``PersistentChains`` of ``Layers``.
      Metrics: ``energy_data`` and ``energy_samples`` (mean free energies), ``energy_gap`` (data
      minus samples), ``chain_age`` (mean steps since birth), ``chains_finite`` (share of chains
      whose log-odds were finite).

    Raises:
      ValueError: naming the option that is out of range.

    >>> from ebjax.energies.boltzmann import rbm
    >>> objective = rbm_persistent_contrastive_divergence(lambda key: jnp.zeros(3))
    >>> params = rbm(2).init(jax.random.key(0), jnp.zeros(3))
    >>> batch = jnp.ones((1000, 3))
    >>> chains = objective.init(jax.random.key(1), params, batch)
    >>> keys = jax.random.split(jax.random.key(2), 1000)
    >>> gradient, _ = jax.grad(objective.loss, has_aux=True)(params, chains, keys, batch)
    >>> gradient.visible_bias.round(1).tolist()
    [-0.5, -0.5, -0.5]
    """
    rules = ChainRules(
        kernel=rbm_marginal_gibbs(),
        initial_position=initial_position,
        num_steps=num_steps,
        chains_per_example=chains_per_example,
        rebirth_probability=rebirth_probability,
    )
    rules.check()

    def init(key, params, batch):
        birth_key, hidden_key = jax.random.split(key)
        chains = start_chains(birth_key, rules, batch)
        logits = _hidden_logits(params, chains.position)
        uniform = uniforms(hidden_key, logits.shape, logits.dtype)
        return chains._replace(position=Layers(chains.position, _draw(uniform, logits)))

    def loss(params, carry, keys, batch):
        frozen = jax.lax.stop_gradient(params)
        place, hidden, age = _choose(keys, rules, frozen, carry, batch)
        moved = _move(keys, rules.num_steps, frozen, hidden)
        both = jnp.concatenate([batch, moved.visible])
        logits = _hidden_logits(params, both)
        energies = -both @ params.visible_bias - jax.nn.softplus(logits).sum(axis=-1)
        positive, negative = jnp.split(energies, 2)
        value = positive.mean() - negative.mean()

        found = jax.lax.stop_gradient(logits[len(batch) :])
        ends = Layers(moved.visible, _draw(moved.uniform, found))
        carry = jax.tree.map(
            lambda all_, one: all_.at[place].set(one),
            carry,
            PersistentChains(ends, age + rules.num_steps),
        )
        is_finite = moved.is_finite & jnp.isfinite(found).all(axis=-1)
        metrics = {
            "energy_data": positive.mean(),
            "energy_samples": negative.mean(),
            "energy_gap": value,
            "chain_age": carry.age.mean(dtype=jnp.float32),
            "chains_finite": is_finite.mean(dtype=jnp.float32),
        }
        return value, (carry, metrics)

    return Objective(init=init, loss=loss)


def _hidden_logits(rbm: RBMParams, visible: jax.Array) -> jax.Array:
    return rbm.hidden_bias + visible @ rbm.weights


def _draw(uniform: jax.Array, logits: jax.Array) -> jax.Array:
    return (uniform < jax.nn.sigmoid(logits)).astype(logits.dtype)


def _choose(keys, rules: ChainRules, rbm: RBMParams, chains: PersistentChains, batch):
    """``(place, hidden [B, H], age [B])`` of the chain of each slot that moves."""
    place: tuple = (slice(None), 0)
    if rules.chains_per_example > 1:

        def choose(key):
            key = jax.random.fold_in(key, rules.num_steps)
            return jax.random.randint(key, (), 0, rules.chains_per_example)

        place = (jnp.arange(len(batch)), jax.vmap(choose)(keys))
    hidden, age = chains.position.hidden[place], chains.age[place]
    if rules.rebirth_probability == 0.0:
        return place, hidden, age

    def newborn(key, example):
        chance_key, birth_key, hidden_key = jax.random.split(
            jax.random.fold_in(key, rules.num_steps + 1), 3
        )
        logits = _hidden_logits(rbm, birth(rules, birth_key, example))
        born = _draw(uniforms(hidden_key, logits.shape, logits.dtype), logits)
        return jax.random.bernoulli(chance_key, rules.rebirth_probability), born

    is_reborn, born = jax.vmap(newborn)(keys, batch)
    return place, jnp.where(is_reborn[:, None], born, hidden), jnp.where(is_reborn, 0, age)


def _move(keys, num_steps: int, rbm: RBMParams, hidden: jax.Array) -> _Moved:
    """``num_steps`` draws of the visible layer, the first given ``hidden``."""
    num_visible, num_hidden = rbm.weights.shape

    def visible_step(step, hidden, was_finite):
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
        uniform = jax.vmap(lambda k: uniforms(k, (num_visible + num_hidden,), hidden.dtype))(
            step_keys
        )
        logits = rbm.visible_bias + hidden @ rbm.weights.T
        visible = _draw(uniform[:, :num_visible], logits)
        is_finite = was_finite & jnp.isfinite(logits).all(axis=-1)
        return _Moved(visible, uniform[:, num_visible:], is_finite)

    def both_steps(step, state):
        moved = visible_step(step, *state)
        logits = _hidden_logits(rbm, moved.visible)
        is_finite = moved.is_finite & jnp.isfinite(logits).all(axis=-1)
        return _draw(moved.uniform, logits), is_finite

    state = hidden, jnp.ones(len(hidden), bool)
    if num_steps > 1:
        state = jax.lax.fori_loop(0, num_steps - 1, both_steps, state)
    return visible_step(num_steps - 1, *state)
