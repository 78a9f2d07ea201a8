"""Reports on a run: a table of its components, its speed, and the way into ArviZ."""

from __future__ import annotations

import importlib
import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from ebjax.samplers.diagnostics.component import component_figures
from ebjax.samplers.diagnostics.convergence import (
    check_draws,
    effective_sample_size,
    map_jitted,
)
from ebjax.samplers.run import Samples
from ebjax.types import PyTree

__all__ = ["Efficiency", "Summary", "efficiency", "summary", "to_arviz"]

_COLUMNS = {"mean": "mean", "sd": "sd", "mcse": "mcse", "ess_bulk": "ess bulk"}
_COLUMNS |= {"ess_tail": "ess tail", "r_hat": "R-hat"}


class Summary(dict[str, dict[str, float]]):
    """Component -> its figures: ``mean, sd, mcse, ess_bulk, ess_tail, r_hat``.

    Printed as a table. ``summary(...)["x[0]"]["r_hat"]`` is one figure, and
    ``pandas.DataFrame(summary(...)).T`` a frame.
    """

    max_rows = 50

    def worst(self) -> dict[str, float]:
        """The smallest effective sizes and the largest R-hat; NaN if one is NaN."""
        table = {name: np.array([row[name] for row in self.values()]) for name in _COLUMNS}
        return {
            "ess_bulk": float(table["ess_bulk"].min()),
            "ess_tail": float(table["ess_tail"].min()),
            "r_hat": float(table["r_hat"].max()),
        }

    def __str__(self) -> str:
        rows = [["", *_COLUMNS.values()]]
        for name, figures in itertools.islice(self.items(), self.max_rows):
            values = [f"{figures[key]:.4g}" for key in ("mean", "sd", "mcse")]
            values += [f"{figures[key]:.0f}" for key in ("ess_bulk", "ess_tail")]
            rows.append([name, *values, f"{figures['r_hat']:.3f}"])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
            for row in rows
        ]
        if len(self) > self.max_rows:
            lines.append(f"... {len(self) - self.max_rows} more")
        return "\n".join(lines)

    __repr__ = __str__


def _component_names(draws: PyTree) -> list[str]:
    """As ``x[0, 1]``, a leaf's path followed by the indices of the component."""
    names = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(draws):
        prefix = jax.tree_util.keystr(path, simple=True, separator=".") or "x"
        event = np.shape(leaf)[2:]
        names += [
            f"{prefix}[{', '.join(map(str, index))}]" if event else prefix
            for index in np.ndindex(*event)
        ]
    return names


def summary(draws: PyTree) -> Summary:
    """Mean, sd, error of the mean, effective sizes and R-hat of each component.

    Args:
      draws: pytree of [N, C, ...], N at least 4, as in ``Samples.positions``.

    Returns:
      A ``Summary``, on the host.

    Raises:
      ValueError: naming a shape that is not [N, C, ...].

    >>> import jax
    >>> x = jax.random.normal(jax.random.key(0), (250, 4, 2))
    >>> table = summary({"x": x})
    >>> list(table)
    ['x[0]', 'x[1]']
    >>> bool(abs(table["x[0]"]["mean"]) < 0.2 and table.worst()["r_hat"] < 1.02)
    True
    >>> print(str(table).splitlines()[0])
              mean      sd     mcse  ess bulk  ess tail  R-hat
    """
    check_draws(draws)
    results = jax.device_get(map_jitted(draws, function=component_figures))
    is_row = lambda node: isinstance(node, dict) and set(node) == set(_COLUMNS)  # noqa: E731
    leaves = jax.tree.leaves(results, is_leaf=is_row)
    columns = {name: np.concatenate([np.ravel(leaf[name]) for leaf in leaves]) for name in _COLUMNS}
    table = Summary()
    for row, component in enumerate(_component_names(draws)):
        table[component] = {name: float(columns[name][row]) for name in _COLUMNS}
    return table


class Efficiency(NamedTuple):
    """What independent draws cost.

    Attributes:
      ess: smallest effective sample size over components.
      seconds: wall time of the run, compiled.
      ess_per_step: over the steps of all chains that led to the samples, thinned ones included.
      ess_per_second: as said.
      ess_per_evaluation: over all evaluations of the energy by all chains, with its gradient or
        without, start and burn-in included.
      compile_seconds: how much longer the first run took.
    """

    ess: float
    seconds: float
    ess_per_step: float
    ess_per_second: float
    ess_per_evaluation: float
    compile_seconds: float


def efficiency(
    run: Callable[[], Samples], *, thinning: int = 1, method: str = "bulk"
) -> Efficiency:
    """Times ``run``, compiled, and counts its independent draws.

    ``run`` is called twice; the second call is timed, and the clock is read when the devices have
    finished. The effective size is counted outside of the time.

    Args:
      run: ``() -> Samples``, such as a call of ``sample`` with everything given.
      thinning: steps between the kept positions, as given to ``sample``.
      method: of ``effective_sample_size``.

    Returns:
      An ``Efficiency``.

    Raises:
      ValueError: naming the shape or option that is out of range.

    >>> import jax, jax.numpy as jnp
    >>> from ebjax.samplers import mala, sample
    >>> energy_fn = lambda params, x: 0.5 * jnp.sum(x**2)
    >>> run = lambda: sample(jax.random.key(0), mala(step_size=0.5), energy_fn, (),
    ...                      jnp.zeros((8, 2)), num_samples=200)
    >>> figures = efficiency(run)
    >>> bool(0.0 < figures.ess_per_step < 1.0 and figures.ess_per_second > 0.0)
    True
    """
    start = time.perf_counter()
    jax.block_until_ready(run())
    middle = time.perf_counter()
    samples = jax.block_until_ready(run())
    seconds = time.perf_counter() - middle
    sizes = effective_sample_size(samples.positions, method=method)
    ess = min(float(np.min(leaf)) for leaf in jax.tree.leaves(sizes))
    num_draws, num_chains = np.shape(jax.tree.leaves(samples.positions)[0])[:2]
    return Efficiency(
        ess=ess,
        seconds=seconds,
        ess_per_step=ess / (num_draws * num_chains * thinning),
        ess_per_second=ess / seconds,
        ess_per_evaluation=ess / float(np.asarray(samples.num_evaluations).sum(dtype=np.float64)),
        compile_seconds=max(middle - start - seconds, 0.0),
    )


# The info's names -> those of ArviZ. `energy` is left out: ArviZ means the Hamiltonian by it.
_ARVIZ_NAMES = {"is_divergent": "diverging", "num_evaluations": "n_steps"}


def _import_arviz() -> Any:
    """ArviZ, which takes seconds to import, or the part of ArviZ 1 that converts."""
    for name in ("arviz", "arviz_base"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise ImportError(
        "to_arviz needs the package arviz; install it with pip install 'ebjax[arviz]'."
    )


def to_arviz(draws: PyTree, *, info: Any = None) -> Any:
    """Draws and the info of their steps as ArviZ takes them.

    Args:
      draws: pytree of [N, C, ...]; the leaves are named by their paths (``x`` for a bare array).
      info: a kernel's info with fields [N, C], as in ``Samples.info``: becomes ``sample_stats``,
        ``lp`` being ``-energy``.

    Returns:
      A ``DataTree`` (ArviZ 1 and later, or its part ``arviz_base`` alone) or ``InferenceData``
      (before), with the axes (chain, draw, ...).

    Raises:
      ImportError: if ArviZ is not installed.
    """
    arviz = _import_arviz()
    check_draws(draws)

    def chain_first(leaf):
        return np.swapaxes(np.asarray(leaf), 0, 1)

    posterior = {
        jax.tree_util.keystr(path, simple=True, separator=".") or "x": chain_first(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(draws)
    }
    groups = {"posterior": posterior}
    fields = {} if info is None else info._asdict()
    statistics = {
        _ARVIZ_NAMES.get(name, name): chain_first(value)
        for name, value in fields.items()
        if name != "energy" and np.ndim(value) >= 2
    }
    if "energy" in fields:
        statistics["lp"] = -chain_first(fields["energy"])
    if statistics:
        groups["sample_stats"] = statistics
    if "InferenceData" in vars(arviz):  # ArviZ 1 answers to the name, by a DataTree
        return arviz.from_dict(posterior, sample_stats=statistics or None)
    return arviz.from_dict(groups)
