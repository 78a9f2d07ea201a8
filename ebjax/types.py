"""Contracts of the engine: small tuples of pure functions, all written for one example.

Sign convention, relied on everywhere: an energy ``E(params, x)`` defines the law

    p(x) = exp(-E(params, x)) / Z,    log Z = log ∫ exp(-E(params, x)) dx,

so lower energy is likelier, and a GFlowNet's log reward is ``-E(x) / temperature``.

Shape legend used in all docstrings: ``B`` examples of a global batch, ``C`` chains, ``N`` samples,
``T`` steps of a trajectory, ``D`` dimensions, ``A`` actions; ``[]`` is a scalar; ``...`` is the
shape of one example (for a pytree, of each of its leaves).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import optax

PyTree = Any
Params = PyTree
Position = PyTree
Metrics = Mapping[str, jax.Array]

__all__ = [
    "Energy",
    "EnergyFn",
    "Flow",
    "Kernel",
    "Metrics",
    "Moments",
    "Objective",
    "Params",
    "Position",
    "PyTree",
    "Recipe",
    "Run",
    "Source",
    "Target",
    "TrainState",
    "bind",
    "join_arrays",
    "split_arrays",
]


class EnergyFn(Protocol):
    """``(params, x, *context) -> []``: the energy of one example, lower is likelier."""

    def __call__(self, params: Params, x: Position, /, *context: Any) -> jax.Array:
        """Returns the energy of ``x``, a scalar."""


class Energy(NamedTuple):
    """A parametric energy.

    Attributes:
      init: ``(key, x) -> params``, given one example ``x`` (its values do not matter).
      apply: the ``EnergyFn``.
    """

    init: Callable[[jax.Array, Position], Params]
    apply: EnergyFn


class Moments(NamedTuple):
    """First two moments of a law on R^D: ``mean`` [D] and ``covariance`` [D, D]."""

    mean: jax.Array
    covariance: jax.Array


class Target(NamedTuple):
    """A known law, for tests, benchmarks and rewards; what is not known is ``None``.

    Attributes:
      energy: an ``EnergyFn`` that ignores its ``params`` (pass ``()``).
      event_shape: shape of one example.
      log_z: log of the normaliser of ``exp(-energy)``.
      sample: ``key -> x``, one exact draw.
      moments: exact mean and covariance.
      modes: [number of modes, ...], one point a mode.
    """

    energy: EnergyFn
    event_shape: tuple[int, ...]
    log_z: float | None = None
    sample: Callable[[jax.Array], jax.Array] | None = None
    moments: Moments | None = None
    modes: jax.Array | None = None


class Kernel(NamedTuple):
    """One transition of one Markov chain.

    ``params`` is an argument of both functions and may be traced, so that a kernel inside a
    training step is compiled once, however often the parameters change.

    Attributes:
      init: ``(energy_fn, params, position) -> state``. Every state has a field ``position``.
      step: ``(key, energy_fn, params, state) -> (state, info)``. ``info`` is a tuple of arrays
        for diagnosis; every info has the field ``is_finite``.
      num_evaluations: evaluations of the energy in one step, an evaluation with its gradient
        counting once; ``None`` where steps differ, and then the info has the field
        ``num_evaluations`` [] int32.
    """

    init: Callable[[EnergyFn, Params, Position], Any]
    step: Callable[[jax.Array, EnergyFn, Params, Any], tuple[Any, Any]]
    num_evaluations: int | None = 1


class Objective(NamedTuple):
    """What a training step minimises.

    ``carry`` is what persists between steps and belongs to examples: chains, replay, exploration
    counters. The leading axis of each of its leaves is the example slot of the global batch, so
    it is split over devices as the batch is, and a run may resume on another number of them.

    Attributes:
      init: ``(key, params, batch) -> carry`` for a global batch [B, ...].
      loss: ``(params, carry, keys, batch) -> (loss [], (carry, metrics))`` for the part of the
        batch that one device holds; ``keys`` [B] is one key an example, and ``metrics`` are
        scalars. Loss and metrics are means over examples, so that their mean over devices is
        their mean over the batch.
    """

    init: Callable[[jax.Array, Params, PyTree], PyTree]
    loss: Callable[
        [Params, PyTree, jax.Array, PyTree], tuple[jax.Array, tuple[PyTree, dict[str, jax.Array]]]
    ]


class Source(NamedTuple):
    """Where examples come from: a pure function of a key and a position in the stream.

    Attributes:
      arrays: what the function reads; lives on the devices, once each.
      example: ``(arrays, key, position) -> example``. ``key`` is the same during the whole run;
        ``position`` [] uint32 counts examples from its start (step times batch size plus slot),
        so the step is the whole state of the stream. Noise comes from ``fold_in(key, position)``.
      load: for data that does not fit in memory, ``(key, first, num) -> arrays``: reads on the
        host what ``example`` needs for the ``num`` positions from ``first`` on (modulo 2^32), in
        arrays of the same shapes whatever ``first`` is. The loop calls it before each dispatch
        and ``arrays`` is then not used.
    """

    arrays: PyTree
    example: Callable[[PyTree, jax.Array, jax.Array], PyTree]
    load: Callable[[jax.Array, int, int], PyTree] | None = None


class TrainState(NamedTuple):
    """All that a run needs to go on, beside its config.

    Attributes:
      step: [] int32, updates done.
      params: the parameters.
      ema: exponential moving average of the parameters.
      opt_state: the optimizer's state.
      carry: the objective's per-example state, leading axis ``B`` (see ``Objective``).
      key: the run's key, never changed; step and example index are folded into it.
      rollbacks: [] int32, how often the run diverged and went back to a good state.
    """

    step: jax.Array
    params: Params
    ema: Params
    opt_state: optax.OptState
    carry: PyTree
    key: jax.Array
    rollbacks: jax.Array


class Flow(NamedTuple):
    """What a run of a GFlowNet walks.

    Attributes:
      environment: a ``gflownet.Environment``, or what stands for it (the ``DiffusionProcess`` of
        a diffusion sampler).
      policy: for ``Run.learned_params``.
    """

    environment: Any
    policy: Any


def averaged_params(state: TrainState) -> Params:
    """The exponential moving average of the parameters."""
    return state.ema


class Run(NamedTuple):
    """A recipe made concrete: everything that the training loop and the commands need.

    Functions that take a state get it with global leading axes (``carry`` [B, ...]) and run
    outside the training step.

    Attributes:
      init: ``key -> params``.
      objective: what is minimised.
      optimizer: how.
      source: where examples come from.
      sample: ``(key, state, num_samples) -> arrays by name``, each [N, ...].
      evaluate: ``(key, state) -> figures by name`` (floats).
      figures: ``(key, state, samples) -> matplotlib figures by name``.
      monitor: ``(key, state) -> figures by name``, cheap enough for every checkpoint, or ``None``.
      monitor_name: the figure of ``monitor`` that says which checkpoint is best; lower is better.
      progress: the metrics that a person watches while the run goes on.
      learned_params: ``state -> params``, what the run has learned.
      energy: the energy of the law that was learned, for ``learned_params``; ``None`` where there
        is none.
      flow: the graph and the policy that was learned, for ``learned_params``; likewise.
      draw: ``(key, params) -> example``, one sample as a pure function of ``learned_params``, in
        the form that ``energy`` takes; likewise.
    """

    init: Callable[[jax.Array], Params]
    objective: Objective
    optimizer: optax.GradientTransformation
    source: Source
    sample: Callable[[jax.Array, TrainState, int], dict[str, Any]]
    evaluate: Callable[[jax.Array, TrainState], dict[str, float]]
    figures: Callable[[jax.Array, TrainState, dict[str, Any]], dict[str, Any]]
    monitor: Callable[[jax.Array, TrainState], dict[str, float]] | None = None
    monitor_name: str | None = None
    progress: tuple[str, ...] = ("loss",)
    learned_params: Callable[[TrainState], Params] = averaged_params
    energy: EnergyFn | None = None
    flow: Flow | None = None
    draw: Callable[[jax.Array, Params], PyTree] | None = None


class Recipe(NamedTuple):
    """A published system, or a user's own, in one file.

    Attributes:
      config: a frozen dataclass derived from ``ebjax.training.TrainingConfig``; its fields are
        the settings, each with a default and a line of help.
      build: ``config -> Run``.
      seed_is_key: whether ``config.seed`` enters training by the run's key and in no other way (no
        split of the data by it, say), so that one program can train several seeds.
    """

    config: type
    build: Callable[[Any], Run]
    seed_is_key: bool = False


class bind(functools.partial):  # noqa: N801  (a function to its callers)
    """``functools.partial`` that is equal to another one with the same function and options.

    Compiled functions are cached by their static arguments. Kernels made by ``bind`` from equal
    options are equal, so making the same kernel twice does not compile twice. Options that cannot
    be hashed (arrays) fall back to identity; as a pytree its leaves are its options, so that
    ``split_arrays`` can hand them to a compiled function as arguments.

    >>> bind(max, default=1) == bind(max, default=1)
    True
    >>> bind(max, default=1) == bind(max, default=2)
    False
    """

    def _token(self) -> Any:
        token = (self.func, self.args, tuple(sorted(self.keywords.items())))
        try:
            hash(token)
        except TypeError:
            return id(self)
        return token

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, bind) and self._token() == other._token())

    def __hash__(self) -> int:
        return hash(self._token())


def _bind_flatten(bound: bind):
    names = tuple(sorted(bound.keywords))
    return tuple(bound.keywords[name] for name in names), (bound.func, bound.args, names)


def _bind_unflatten(structure, options):
    function, args, names = structure
    return bind(function, *args, **dict(zip(names, options, strict=True)))


jax.tree_util.register_pytree_node(bind, _bind_flatten, _bind_unflatten)


def split_arrays(tree: PyTree) -> tuple[list[Any], Any]:
    """Takes a pytree of arrays and other things apart, so that it can pass through ``jax.jit``.

    A kernel with a tuned step size is such a tree: the arrays may change without compiling again.

    Returns:
      ``(arrays, rest)``: a list, and what ``join_arrays`` needs to put them back, hashable.

    >>> arrays, rest = split_arrays(bind(max, key=abs, default=np.ones(2)))
    >>> [array.shape for array in arrays]
    [(2,)]
    >>> join_arrays([3.0], rest).keywords == {"key": abs, "default": 3.0}
    True
    """
    leaves, structure = jax.tree.flatten(tree)
    arrays = [leaf for leaf in leaves if isinstance(leaf, (jax.Array, np.ndarray))]
    others = tuple(
        None if isinstance(leaf, (jax.Array, np.ndarray)) else (leaf,) for leaf in leaves
    )
    return arrays, (structure, others)


def join_arrays(arrays: Sequence[Any], rest: Any) -> PyTree:
    """Puts together what ``split_arrays`` took apart."""
    structure, others = rest
    remaining = iter(arrays)
    return jax.tree.unflatten(
        structure, [next(remaining) if other is None else other[0] for other in others]
    )
