"""Other libraries' laws as energies, and kernels of one library in another's place.

    distrax, TFP, numpyro distribution    energy_fn = from_distribution(law)
    any log density                       energy_fn = from_log_prob(log_prob)
    numpyro model                         energy_fn, position, constrain = from_numpyro(model, ...)
    a kernel of this library, in blackjax algorithm = to_blackjax(mala(...), energy_fn, params)
    blackjax, as a kernel of this library kernel = from_blackjax(lambda f: blackjax.nuts(f, ...))

An energy is -log p up to a constant, so nothing here is more than a change of sign and of the order
of arguments. numpyro is imported when it is asked for, the others not at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ebjax.numerics import all_finite, is_key
from ebjax.types import EnergyFn, Kernel, Params, Position, PyTree, bind

__all__ = [
    "BlackjaxInfo",
    "NumpyroEnergy",
    "SamplingAlgorithm",
    "from_blackjax",
    "from_distribution",
    "from_log_prob",
    "from_numpyro",
    "to_blackjax",
]


def from_log_prob(log_prob: Callable[..., jax.Array], *, has_params: bool = False) -> EnergyFn:
    """``E(params, x) = -log_prob(x)``, or ``-log_prob(params, x)``, summed to a scalar.

    Args:
      log_prob: a log density, normalised or not. Entries of what it returns (one for each of
        several independent components) are added.
      has_params: whether ``log_prob`` takes the parameters first.

    >>> energy_fn = from_log_prob(lambda x: -0.5 * x**2)
    >>> float(energy_fn((), jnp.array([1.0, 2.0])))
    2.5
    """
    return bind(_negative_log_prob, log_prob=log_prob, has_params=has_params)


def _negative_log_prob(params, x, *context, log_prob, has_params):
    if has_params:
        return -jnp.sum(log_prob(params, x, *context))
    return -jnp.sum(log_prob(x, *context))


def from_distribution(law: Any) -> EnergyFn:
    """``E(params, x) = -log p(x)`` for a distribution of distrax, TFP or numpyro.

    A batch of independent distributions counts as their product: x is [*batch, *event] and the
    energy the sum. The energy is +inf (or NaN, as the library has it) outside the support.

    Args:
      law: an object with ``log_prob``, or ``params -> such an object`` for a law that is learned.

    Raises:
      TypeError: if it is neither.

    >>> import distrax
    >>> energy_fn = from_distribution(lambda params: distrax.Normal(params, 1.0))
    >>> float(jax.grad(energy_fn, argnums=1)(3.0, jnp.array(1.0)))
    -2.0
    """
    if hasattr(law, "log_prob"):
        return bind(_distribution_energy, law=law)
    if callable(law):
        return bind(_distribution_energy, build=law)
    raise TypeError(
        f"law is a {type(law).__name__}; it must have log_prob, or be a function of the parameters "
        "that returns a distribution."
    )


def _distribution_energy(params, x, *, law=None, build=None):
    law = build(params) if law is None else law
    return -jnp.sum(law.log_prob(x))


class NumpyroEnergy(NamedTuple):
    """A numpyro model over its unconstrained space.

    Attributes:
      energy_fn: ignores its ``params``; -log joint density, with the Jacobians of the transforms.
      position: a dict of unconstrained values by site, where the energy is finite.
      constrain: ``position -> dict`` of the sites in their own supports, deterministic ones too.
    """

    energy_fn: EnergyFn
    position: Position
    constrain: Callable[[Position], dict[str, jax.Array]]


def from_numpyro(
    model: Callable, *args: Any, key: jax.Array | None = None, **kwargs: Any
) -> NumpyroEnergy:
    """The posterior of a numpyro model as an energy, with somewhere to start.

    Args:
      model: the model; its observed sites are the data.
      *args: its arguments.
      key: [] draws the start; key 0 by default. Give [C] keys for C starts, leading axis C.
      **kwargs: its keyword arguments.

    Returns:
      ``NumpyroEnergy``; unpacks as ``energy_fn, position, constrain``.

    Raises:
      ImportError: if numpyro is not installed.
      ValueError: if the model has no continuous latent site.
    """
    try:
        from numpyro.infer import util
    except ImportError as error:
        raise ImportError(
            "from_numpyro needs numpyro: pip install numpyro (or the extra: pip install "
            "ebjax[numpyro])."
        ) from error
    key = jax.random.key(0) if key is None else key
    # It knows a batch of keys by the axes before the words of one.
    words = jax.random.key_data(key) if is_key(key) else key
    found = util.initialize_model(words, model, model_args=args, model_kwargs=kwargs)
    position = found.param_info.z
    if not jax.tree.leaves(position):
        raise ValueError("The model has no continuous latent site, so there is nothing to sample.")
    energy_fn = bind(_ignore_params, potential=found.potential_fn)
    return NumpyroEnergy(energy_fn, position, found.postprocess_fn)


def _ignore_params(params, x, *, potential):
    del params
    return potential(x)


class SamplingAlgorithm(NamedTuple):
    """What blackjax's own algorithms are: ``init`` and ``step`` of one chain, laws bound."""

    init: Callable[..., Any]
    step: Callable[[jax.Array, Any], tuple[Any, Any]]


def to_blackjax(kernel: Kernel, energy_fn: EnergyFn, params: Params = ()) -> SamplingAlgorithm:
    """A kernel of this library where a blackjax sampling algorithm is expected.

    For example ``blackjax.util.run_inference_algorithm(key, to_blackjax(...), 1_000,
    initial_position=x)``. The parameters are bound: inside ``jit`` give traced ones rather than
    compile again for every value.

    Args:
      kernel: the transition.
      energy_fn: the energy of one example.
      params: its parameters.

    Returns:
      ``init(position, rng_key=None) -> state``, ``step(rng_key, state) -> (state, info)``.

    >>> from ebjax.samplers import mala
    >>> algorithm = to_blackjax(mala(step_size=0.5), lambda p, x: 0.5 * jnp.sum(x**2))
    >>> state = algorithm.init(jnp.ones(2))
    >>> state, info = algorithm.step(jax.random.key(0), state)
    >>> state.position.shape
    (2,)
    """

    def init(position, rng_key=None):
        del rng_key  # kernels start without noise
        return kernel.init(energy_fn, params, position)

    def step(rng_key, state):
        return kernel.step(rng_key, energy_fn, params, state)

    return SamplingAlgorithm(init, step)


class BlackjaxInfo(NamedTuple):
    """Diagnosis of one step of a foreign algorithm.

    Attributes:
      energy: [] of the new state.
      acceptance_rate: [] its own, NaN if it has none.
      is_finite: [] bool, whether the new state's position and energy are finite.
      num_evaluations: [] int32, gradients of the step.
      info: what the algorithm itself returned.
    """

    energy: jax.Array
    acceptance_rate: jax.Array
    is_finite: jax.Array
    num_evaluations: jax.Array
    info: PyTree


def from_blackjax(
    build: Callable[[Callable[[Position], jax.Array]], Any], *, num_evaluations: int | None = None
) -> Kernel:
    """A blackjax algorithm as a kernel of this library, to run and to compare.

    The algorithm must start without a key and have a ``position`` in its state, as random walks,
    MALA, HMC and NUTS have. It cannot be a move of this library's tempered samplers unless those
    initialise its state anew at every temperature.

    Args:
      build: ``log_density -> algorithm``, with ``init`` and ``step``; for example
        ``lambda f: blackjax.nuts(f, step_size=0.1, inverse_mass_matrix=ones)``.
      num_evaluations: gradients of one step, or ``None`` to read the algorithm's own count.

    Returns:
      A ``Kernel`` with the algorithm's own state and ``BlackjaxInfo``.
    """
    return Kernel(
        init=bind(_foreign_init, build=build),
        step=bind(_foreign_step, build=build, num_evaluations=num_evaluations),
        num_evaluations=num_evaluations,
    )


def _algorithm(build, energy_fn, params):
    return build(lambda x: -energy_fn(params, x))


def _foreign_init(energy_fn: EnergyFn, params: Params, position: Position, *, build) -> Any:
    return _algorithm(build, energy_fn, params).init(position)


def _foreign_step(
    key: jax.Array, energy_fn: EnergyFn, params: Params, state: Any, *, build, num_evaluations
) -> tuple[Any, BlackjaxInfo]:
    state, info = _algorithm(build, energy_fn, params).step(key, state)
    has_energy = hasattr(state, "logdensity")
    energy = -state.logdensity if has_energy else energy_fn(params, state.position)
    if num_evaluations is None:
        num_evaluations = getattr(info, "num_integration_steps", None)
        if num_evaluations is None:
            raise ValueError(
                f"{type(info).__name__} does not count its gradients; give num_evaluations."
            )
    return state, BlackjaxInfo(
        energy=energy,
        acceptance_rate=jnp.asarray(getattr(info, "acceptance_rate", jnp.nan), energy.dtype),
        is_finite=all_finite((state.position, energy)),
        num_evaluations=jnp.asarray(num_evaluations, jnp.int32),
        info=jax.tree.map(jnp.asarray, info),  # some hold Python numbers
    )
