"""Laws over actions with values: mixtures of Beta and von Mises laws behind a choice of an index.

    p(index, value) = p(index) Π_k q_k(r_k) / (Π_k width_k exp(log_scale)),  value = low + width · r

with the products over the coordinates k that are free at this index, those of positive width (see
``gflownet.types.Chart``). With two indices, a move and a stop, the first factor is Bernoulli.

Cheng, "Generating beta variates with nonintegral shape parameters", CACM 21 (1978). Best and
Fisher, "Efficient simulation of the von Mises distribution", JRSS C 28 (1979).
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.scipy.special import betaln, i0e

from gflownet.distributions import MaskedCategorical
from gflownet.types import Action, Chart

__all__ = ["BetaMixture", "ChartedLaw", "UnitLaw", "VonMisesMixture"]

# Coordinates so near to a border stand for it: densities are evaluated no closer.
_EDGE = 1e-6
# Values are sums and differences of single-precision positions of size 1.
_ROUNDING = 1e-5
_MAX_PROPOSALS = 1000


class UnitLaw(Protocol):
    """A law over [0, 1]^D with independent coordinates."""

    @property
    def is_periodic(self) -> bool:
        """Whether 0 and 1 are the same place."""

    def sample(self, key: jax.Array) -> jax.Array:
        """[D] one draw."""

    def log_density(self, r: jax.Array) -> jax.Array:
        """[D] of each coordinate."""


class BetaMixture(NamedTuple):
    """Of each coordinate a mixture of K Beta laws.

    Attributes:
      logits: [D, K] of the weights.
      alpha: [D, K] positive; from 1 on the density is bounded, and below 1 a part of the mass lies
        where single precision cannot tell it from the border.
      beta: [D, K] likewise.

    >>> uniform = BetaMixture(jnp.zeros((1, 2)), jnp.ones((1, 2)), jnp.ones((1, 2)))
    >>> bool(abs(uniform.log_density(jnp.array([0.3]))[0]) < 1e-6)
    True
    """

    logits: jax.Array
    alpha: jax.Array
    beta: jax.Array

    @property
    def is_periodic(self) -> bool:
        """No."""
        return False

    def sample(self, key: jax.Array) -> jax.Array:
        """[D] one draw: of each coordinate a component, then its law by Cheng's rejection."""
        which_key, draw_key = jax.random.split(key)
        alpha, beta = _chosen(which_key, self.logits, self.alpha, self.beta)
        return _beta_draw(draw_key, alpha, beta)

    def log_density(self, r: jax.Array) -> jax.Array:
        """[D] at r [D], which is kept off the borders by a millionth."""
        r = jnp.clip(r, _EDGE, 1.0 - _EDGE)[:, None]
        parts = (self.alpha - 1.0) * jnp.log(r) + (self.beta - 1.0) * jnp.log1p(-r)
        return _log_mixture(self.logits, parts - betaln(self.alpha, self.beta))


class VonMisesMixture(NamedTuple):
    """Of each coordinate a mixture of K von Mises laws of the angle φ = 2π r.

        q(r) = 2π Σ_k w_k exp(κ_k cos(φ - μ_k)) / (2π I_0(κ_k))

    Attributes:
      logits: [D, K] of the weights.
      mean: [D, K] angles μ.
      concentration: [D, K] κ > 0.

    >>> flat = VonMisesMixture(jnp.zeros((1, 2)), jnp.zeros((1, 2)), jnp.zeros((1, 2)))
    >>> bool(abs(flat.log_density(jnp.array([0.3]))[0]) < 1e-6)
    True
    """

    logits: jax.Array
    mean: jax.Array
    concentration: jax.Array

    @property
    def is_periodic(self) -> bool:
        """Yes."""
        return True

    def sample(self, key: jax.Array) -> jax.Array:
        """[D] one draw, by the rejection method of Best and Fisher."""
        which_key, draw_key = jax.random.split(key)
        mean, concentration = _chosen(which_key, self.logits, self.mean, self.concentration)
        angle = mean + _centred_von_mises(draw_key, concentration)
        return jnp.mod(angle / (2.0 * math.pi), 1.0)

    def log_density(self, r: jax.Array) -> jax.Array:
        """[D] at r [D], with period 1."""
        kappa = self.concentration
        # κ (cos - 1) - log I_0(κ) e^{-κ} does not overflow.
        cosine = jnp.cos(2.0 * math.pi * r[:, None] - self.mean) - 1.0
        return _log_mixture(self.logits, kappa * cosine - jnp.log(i0e(kappa)))


def _chosen(key: jax.Array, logits: jax.Array, *parameters: jax.Array) -> list[jax.Array]:
    """[D] parameters of a component drawn for each coordinate."""
    which = jax.random.categorical(key, logits, axis=-1)[:, None]
    return [jnp.take_along_axis(leaf, which, axis=1)[:, 0] for leaf in parameters]


def _log_mixture(logits: jax.Array, log_densities: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(jax.nn.log_softmax(logits) + log_densities, axis=-1)


def _until_accepted(key: jax.Array, propose, shape: tuple[int, ...]) -> jax.Array:
    """Draws by rejection, all entries until the last of them is accepted.

    Args:
      key: consumed.
      propose: ``(uniform, uniform) -> (proposals, accepted)``, each of the shape.
      shape: of the draw.
    """

    def body(loop):
        count, value, is_done = loop
        one, two = jax.random.uniform(jax.random.fold_in(key, count), (2, *shape), minval=1e-7)
        proposal, is_accepted = propose(one, two)
        value = jnp.where(is_done, value, proposal)
        return count + 1, value, is_done | is_accepted

    start = (0, jnp.zeros(shape), jnp.zeros(shape, bool))
    return jax.lax.while_loop(
        lambda loop: (loop[0] < _MAX_PROPOSALS) & ~loop[2].all(), body, start
    )[1]


def _beta_draw(key: jax.Array, alpha: jax.Array, beta: jax.Array) -> jax.Array:
    """Beta laws: r / (1 - r) is proposed log-logistic, of the exponent λ nearest to the law."""
    smaller, total = jnp.minimum(alpha, beta), alpha + beta
    # λ = 1 holds for all parameters from 1 on, where the formula is 0 / 0 at its start.
    is_regular = smaller > 1.001
    square = (2.0 * alpha * beta - total) / jnp.where(is_regular, total - 2.0, 1.0)
    power = jnp.where(is_regular, jnp.sqrt(jnp.abs(square)), jnp.minimum(smaller, 1.0))

    def propose(one, two):
        v = (jnp.log(one) - jnp.log1p(-one)) / power
        odds = alpha * jnp.exp(jnp.minimum(v, 60.0))
        log_ratio = total * jnp.log(total / (beta + odds)) + (alpha + power) * v - math.log(4.0)
        return odds / (beta + odds), log_ratio >= 2.0 * jnp.log(one) + jnp.log(two)

    return _until_accepted(key, propose, alpha.shape)


def _centred_von_mises(key: jax.Array, concentration: jax.Array) -> jax.Array:
    """Angles with mean 0, proposed by a wrapped Cauchy law."""
    angle_key, side_key = jax.random.split(key)
    kappa = jnp.maximum(concentration, 1e-4)
    tau = 1.0 + jnp.sqrt(1.0 + 4.0 * kappa**2)
    rho = (tau - jnp.sqrt(2.0 * tau)) / (2.0 * kappa)
    # (1 + ρ²) / (2 ρ) without the cancellation in ρ at a small κ; any number above 1 is right.
    shape = jnp.where(kappa < 0.02, 1.0 / kappa + kappa, (1.0 + rho**2) / (2.0 * rho))

    def propose(one, two):
        z = jnp.cos(math.pi * one)
        cosine = (1.0 + shape * z) / (shape + z)
        gap = kappa * (shape - cosine)
        return cosine, jnp.log(gap) + 1.0 - gap >= jnp.log(two)

    cosine = jnp.clip(_until_accepted(angle_key, propose, kappa.shape), -1.0, 1.0)
    is_left = jax.random.bernoulli(side_key, shape=kappa.shape)
    return jnp.where(is_left, -1.0, 1.0) * jnp.arccos(cosine)


class ChartedLaw(NamedTuple):
    """An index by a categorical law, then a value by a law in the chart of that index.

    Attributes:
      which: over the allowed indices.
      unit: over the coordinates r of all charts.
      chart: where the values of each index lie.
      epsilon: [] share of the uniform law over indices and charts; changes what ``sample`` draws.
    """

    which: MaskedCategorical
    unit: UnitLaw
    chart: Chart
    epsilon: jax.Array | float = 0.0

    def sample(self, key: jax.Array) -> Action:
        """One action."""
        index_key, unit_key, uniform_key = jax.random.split(key, 3)
        coin, *uniform = jax.random.uniform(uniform_key, (1 + self.chart.low.shape[-1],))
        explores = coin < self.epsilon
        index = self.which.explore(explores.astype(self.chart.low.dtype)).sample(index_key)
        r = jnp.where(explores, jnp.stack(uniform), self.unit.sample(unit_key))
        return Action(index, self.chart.low[index] + self.chart.width[index] * r)

    def log_prob(self, action: Action) -> jax.Array:
        """[] log-probability of the index plus log-density of the value; -inf outside its chart.

        Without exploration, as that of the policy itself.
        """
        low, width = self.chart.low[action.which], self.chart.width[action.which]
        is_free = width > 0.0
        offset = action.value - low
        r = offset / jnp.where(is_free, width, 1.0)
        density = self.unit.log_density(r) - jnp.log(jnp.where(is_free, width, 1.0))
        value = jnp.sum(jnp.where(is_free, density, 0.0)) - self.chart.log_scale[action.which]
        if not self.unit.is_periodic:
            is_inside = (offset >= -_ROUNDING) & (offset <= width + _ROUNDING)
            value = jnp.where(is_inside.all(), value, -jnp.inf)
        return self.which.log_prob(action.which) + value

    def is_certain(self) -> jax.Array:
        """[] bool: at most one index is allowed, and it has one value."""
        has_freedom = (self.chart.width > 0.0).any(axis=-1) & self.which.mask
        return self.which.is_certain() & ~has_freedom.any()

    def explore(self, epsilon: jax.Array | float) -> ChartedLaw:
        """The same law with share ``epsilon`` of uniform exploration in ``sample``."""
        return self._replace(epsilon=epsilon)
