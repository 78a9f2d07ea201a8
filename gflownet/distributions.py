"""Laws over actions: the categorical over what is allowed."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ebjax.numerics import full_precision_matmul, masked_log_softmax
from gflownet.types import Distribution

__all__ = ["MaskedCategorical", "is_uniform"]

_BLOCK = 64


class MaskedCategorical(NamedTuple):
    """Categorical over the allowed actions, ``p_a ∝ exp(logit_a)``; it may be drawn from otherwise.

        log_prob = log softmax(logits over allowed)
        probs = (1 - ε) softmax(behaviour logits over allowed) + ε uniform(allowed)

    Attributes:
      logits: [A], or ``None`` for the uniform law over what is allowed, which costs no softmax.
      mask: [A] bool, ``True`` where allowed.
      epsilon: [] share of the uniform law; changes what ``sample`` draws, and ``probs``.
      behaviour_logits: [A] that ``sample`` and ``probs`` use instead, ``None`` for ``logits``.

    >>> law = MaskedCategorical(jnp.zeros(3), jnp.array([True, False, True]))
    >>> law.explore(1.0).probs().tolist()
    [0.5, 0.0, 0.5]
    """

    logits: jax.Array | None
    mask: jax.Array
    epsilon: jax.Array | float = 0.0
    behaviour_logits: jax.Array | None = None

    def log_probs(self) -> jax.Array:
        """[A] log-probabilities of the policy itself, without exploration; -inf where forbidden."""
        if self.logits is None:
            return jnp.where(self.mask, -self._log_count(), -jnp.inf)
        return masked_log_softmax(self.logits, self.mask)

    def log_prob(self, action: jax.Array) -> jax.Array:
        """[] log-probability of an action under the policy itself, without exploration."""
        if self.logits is None:
            return jnp.where(self.mask[action], -self._log_count(), -jnp.inf)
        # A sum and not an index: the gradient of an index is a scatter, which nothing fuses with.
        is_it = jnp.arange(self.mask.shape[0]) == action
        return jnp.sum(jnp.where(is_it, self.log_probs(), 0.0))

    def _log_count(self) -> jax.Array:
        """[] log of the number of allowed actions, 0 where there is none."""
        return jnp.log(jnp.maximum(self.mask.sum(dtype=jnp.result_type(float)), 1.0))

    def probs(self) -> jax.Array:
        """[A] probabilities that ``sample`` uses."""
        uniform = self.mask / jnp.maximum(self.mask.sum(), 1)
        logits = self.logits if self.behaviour_logits is None else self.behaviour_logits
        if logits is None:
            return uniform
        own = jnp.exp(masked_log_softmax(logits, self.mask))
        return (1.0 - self.epsilon) * own + self.epsilon * uniform

    def sample(self, key: jax.Array) -> jax.Array:
        """[] int32, by inversion of the distribution function: one uniform number a draw."""
        return self.invert(jax.random.uniform(key, dtype=self.probs().dtype))

    def invert(self, uniform: jax.Array) -> jax.Array:
        """[] int32, what ``sample`` draws by a number in [0, 1).

        The first *allowed* action at which the distribution function exceeds the number, so that
        a forbidden one is never drawn, however a device rounds its sums; 0 where none is allowed.
        """
        cumulative = _running_sum(self.probs())
        threshold = uniform.astype(cumulative.dtype) * cumulative[-1]
        places = jnp.arange(self.mask.shape[0], dtype=jnp.int32)
        beyond = jnp.where(self.mask & (cumulative > threshold), places, len(places))
        last_allowed = jnp.max(jnp.where(self.mask, places, 0))
        return jnp.minimum(beyond.min(), last_allowed)

    def is_certain(self) -> jax.Array:
        """[] bool: whether at most one action is allowed."""
        return self.mask.sum() <= 1

    def explore(self, epsilon: jax.Array | float) -> MaskedCategorical:
        """The same law with share ``epsilon`` of uniform exploration in ``sample``."""
        return self._replace(epsilon=epsilon)

    def behave(self, logits: jax.Array) -> MaskedCategorical:
        """The same law with ``sample`` by other logits [A], before uniform exploration."""
        return self._replace(behaviour_logits=logits)


def is_uniform(law: Distribution) -> bool:
    """Whether a law is the uniform one over what is allowed, which no parameters change."""
    return isinstance(law, MaskedCategorical) and law.logits is None


def _running_sum(values: jax.Array) -> jax.Array:
    """[A] cumulative sums by products with triangles of ones, several times faster than a scan."""
    size = values.shape[0]
    width = min(size, _BLOCK)
    blocks = jnp.pad(values, (0, -size % width)).reshape(-1, width)
    triangle = jnp.asarray(np.tri(width).T, values.dtype)
    within = full_precision_matmul(blocks, triangle)
    if len(blocks) == 1:
        return within[0]
    earlier = jnp.asarray(np.tri(len(blocks), k=-1).T, values.dtype)
    before = full_precision_matmul(within[:, -1], earlier)
    return (within + before[:, None]).reshape(-1)[:size]
