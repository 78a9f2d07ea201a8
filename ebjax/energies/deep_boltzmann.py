"""Deep Boltzmann machines: layers of binary units, each coupled to the next.

    E(x_0, ..., x_L) = -Σ_l b_l · x_l - Σ_l x_l' W_l x_{l+1}        x_l ∈ {0,1}^{n_l}
    p(x_li = 1 | rest) = σ(b_l + W_{l-1}' x_{l-1} + W_l x_{l+1})_i

x_0 is visible, the others are hidden. With one hidden layer it is the RBM. Layers of even index are
independent of each other given those of odd index and the other way round, so two blocks make a
Gibbs sampler, and one of the two families can be summed out in closed form: exact log Z, and the
exact free energy F(v) = -log Σ_h exp(-E), cost 2^(units of the smaller family).

Mean field replaces the hidden units by independent ones with means q, at a fixed point of
q_l = σ(b_l + W_{l-1}' q_{l-1} + W_l q_{l+1}); E_q[E] - H(q) >= F(v).

Salakhutdinov and Hinton, "Deep Boltzmann machines", AISTATS 2009.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ebjax.energies.boltzmann import enumerate_states
from ebjax.energies.networks.multilayer import check_widths
from ebjax.types import Energy, bind

__all__ = [
    "DeepBoltzmannParams",
    "MeanField",
    "deep_boltzmann",
    "deep_boltzmann_blocks",
    "deep_boltzmann_energy",
    "deep_boltzmann_free_energy",
    "deep_boltzmann_log_z",
    "deep_boltzmann_mean_field",
]

State = tuple[jax.Array, ...]


class DeepBoltzmannParams(NamedTuple):
    """``weights`` W_l [n_l, n_{l+1}] for l < L and ``biases`` b_l [n_l] for l <= L."""

    weights: tuple[jax.Array, ...]
    biases: tuple[jax.Array, ...]


def deep_boltzmann_energy(params: DeepBoltzmannParams, x: State) -> jax.Array:
    """[] ``E(x_0, ..., x_L)``, affine in each layer.

    Raises:
      ValueError: if ``x`` has another number of layers than the machine.
    """
    if len(x) != len(params.biases):
        raise ValueError(f"The state has {len(x)} layers; the machine has {len(params.biases)}.")
    energy = jnp.zeros((), x[0].dtype)
    for layer, bias in zip(x, params.biases, strict=True):
        energy = energy - layer @ bias
    for (below, above), weights in zip(itertools.pairwise(x), params.weights, strict=True):
        energy = energy - (below @ weights) @ above
    return energy


def deep_boltzmann(*, scale: float = 0.01) -> Energy:
    """The joint law of all layers, x = ``(x_0 [n_0], ..., x_L [n_L])``, at least two of them.

    Args:
      scale: standard deviation of the initial weights; the biases start at 0.

    >>> energy = deep_boltzmann()
    >>> state = (jnp.ones(4), jnp.ones(3), jnp.ones(2))
    >>> params = energy.init(jax.random.key(0), state)
    >>> [weights.shape for weights in params.weights], energy.apply(params, state).shape
    ([(4, 3), (3, 2)], ())
    """
    return Energy(bind(_init, scale=scale), deep_boltzmann_energy)


def _init(key, x, *, scale):
    sizes = check_widths("The sizes of the layers", [layer.size for layer in x], minimum=2)
    keys = jax.random.split(key, len(sizes) - 1)
    weights = tuple(
        scale * jax.random.normal(k, shape)
        for k, shape in zip(keys, itertools.pairwise(sizes), strict=True)
    )
    return DeepBoltzmannParams(weights, tuple(jnp.zeros(size) for size in sizes))


def deep_boltzmann_blocks(num_layers: int) -> tuple[int, ...]:
    """The block of each layer for ``ebjax.samplers.block_gibbs``: odd layers, then even ones.

    Args:
      num_layers: L + 1, the visible one included.

    >>> deep_boltzmann_blocks(4)
    (1, 0, 1, 0)
    """
    if num_layers < 2:
        raise ValueError(f"num_layers is {num_layers}; a machine has at least 2.")
    return tuple(1 - layer % 2 for layer in range(num_layers))


def _field(params: DeepBoltzmannParams, x: Sequence[jax.Array], layer: int) -> jax.Array:
    """[n_l] ``b_l + W_{l-1}' x_{l-1} + W_l x_{l+1}``: minus the gradient in x_l."""
    field = params.biases[layer]
    if layer > 0:
        field = field + x[layer - 1] @ params.weights[layer - 1]
    if layer + 1 < len(params.biases):
        field = field + params.weights[layer] @ x[layer + 1]
    return field


def _log_sum(params, fixed: dict[int, jax.Array], kept: Sequence[int], batch_size: int):
    """log Σ exp(-E) over all layers but the fixed ones, those not kept in closed form."""
    sizes = [params.biases[layer].size for layer in kept]
    splits = list(itertools.accumulate(sizes))[:-1]
    dtype = params.biases[0].dtype
    states = jnp.asarray(enumerate_states((sum(sizes),)), dtype)
    summed = [i for i in range(len(params.biases)) if i not in kept and i not in fixed]

    def log_weight(state):
        x = [jnp.zeros_like(bias) for bias in params.biases]
        for layer, value in fixed.items():
            x[layer] = value
        for layer, value in zip(kept, jnp.split(state, splits), strict=True):
            x[layer] = value
        # With the summed layers at 0 the energy is that of the others alone.
        rest = -deep_boltzmann_energy(params, tuple(x))
        return rest + sum(jnp.sum(jax.nn.softplus(_field(params, x, layer))) for layer in summed)

    return jax.nn.logsumexp(jax.lax.map(log_weight, states, batch_size=batch_size))


def _smaller_family(params: DeepBoltzmannParams, layers: Sequence[int]) -> list[int]:
    """The layers of one parity, of which there are fewer units."""
    families = [[layer for layer in layers if layer % 2 == parity] for parity in (0, 1)]
    return min(families, key=lambda family: sum(params.biases[layer].size for layer in family))


def deep_boltzmann_log_z(params: DeepBoltzmannParams, *, batch_size: int = 2**12) -> jax.Array:
    """[] exact log Z, differentiable.

    Args:
      params: the machine.
      batch_size: states at a time.

    Raises:
      ValueError: if both the even and the odd layers have more than 20 units together.

    >>> params = DeepBoltzmannParams((jnp.zeros((3, 2)), jnp.zeros((2, 4))),
    ...                              (jnp.zeros(3), jnp.zeros(2), jnp.zeros(4)))
    >>> bool(jnp.isclose(deep_boltzmann_log_z(params), 9 * jnp.log(2.0)))
    True
    """
    kept = _smaller_family(params, range(len(params.biases)))
    return _log_sum(params, {}, kept, batch_size)


def deep_boltzmann_free_energy(
    params: DeepBoltzmannParams, x: jax.Array, *, batch_size: int = 2**12
) -> jax.Array:
    """[] exact ``F(v) = -log Σ_h exp(-E(v, h))`` of a visible layer ``x`` [n_0].

    Raises:
      ValueError: if both families of hidden layers have more than 20 units.
    """
    hidden = range(1, len(params.biases))
    kept = _smaller_family(params, hidden)
    if not kept:  # one hidden layer: it is summed in closed form
        fields = _field(params, (x, jnp.zeros_like(params.biases[1])), 1)
        return -x @ params.biases[0] - jnp.sum(jax.nn.softplus(fields))
    return -_log_sum(params, {0: x}, kept, batch_size)


class MeanField(NamedTuple):
    """Independent hidden units that stand for those of the machine given v.

    Attributes:
      means: L arrays [n_l], the means of the hidden layers.
      free_energy: [] ``E_q[E] - H(q)``, at least F(v).
      residual: [] largest change of a mean in the last sweep; 0 at a fixed point.
    """

    means: tuple[jax.Array, ...]
    free_energy: jax.Array
    residual: jax.Array


def deep_boltzmann_mean_field(
    params: DeepBoltzmannParams, x: jax.Array, *, num_steps: int = 25
) -> MeanField:
    """Mean field of the hidden layers given the visible one ``x`` [n_0].

    A sweep updates the odd layers and then the even ones. Each update is the exact minimum of
    E_q[E] - H(q) in that family, so a sweep never raises it.

    Args:
      params: the machine.
      x: the visible layer, in {0, 1} (or means of it).
      num_steps: sweeps, static, at least 1.

    Raises:
      ValueError: if ``num_steps`` is below 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; it must be at least 1.")
    num_layers = len(params.biases)
    order = [*range(1, num_layers, 2), *range(2, num_layers, 2)]

    def sweep(_, loop):
        means = list(loop[0])
        for layer in order:
            means[layer] = jax.nn.sigmoid(_field(params, means, layer))
        changes = [jnp.abs(a - b).max() for a, b in zip(means, loop[0], strict=True)]
        return tuple(means), functools.reduce(jnp.maximum, changes)

    start = (x, *(jnp.full_like(bias, 0.5) for bias in params.biases[1:]))
    means, residual = jax.lax.fori_loop(0, num_steps, sweep, (start, jnp.zeros((), x.dtype)))
    xlogy = jax.scipy.special.xlogy
    entropy = -sum(jnp.sum(xlogy(q, q) + xlogy(1.0 - q, 1.0 - q)) for q in means[1:])
    # The energy is affine in each unit, so its mean under independent units is its value there.
    return MeanField(means[1:], deep_boltzmann_energy(params, means) - entropy, residual)
