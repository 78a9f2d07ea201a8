"""An energy that a run has learned, as the target of a sampler."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from ebjax.loading import UserError, load
from ebjax.types import Target

if TYPE_CHECKING:
    from ebjax.evaluation import GridLaw

__all__ = ["learned_target"]

_NUM_DRAWS = 256
_NUM_GRID_POINTS = 301
_MOST_MASS_AT_THE_EDGE = 1e-3


def learned_target(workdir: str) -> tuple[Target, float, GridLaw | None]:
    """Reads the run in a directory.

    Args:
      workdir: the run directory of a ``launch.train``.

    Returns:
      ``(target, variance, law)``: the energy, of vectors [D] whatever the shape of an example; the
      mean square of a coordinate of the run's own draws; and where D is 2 the law by quadrature on
      a box of twice their size, from which the target has its log Z and its draws.

    Raises:
      ValueError: if there is no such run, it learns no energy or draws nothing, or the law is not
        within the box.
    """
    loaded = load(workdir)
    if loaded.draw is None:
        raise UserError(f"energy_workdir is {workdir}; its recipe draws no samples.")
    shape = jax.eval_shape(loaded.draw, jax.random.key(0), loaded.params).shape
    dim = math.prod(shape)
    keys = jax.random.split(jax.random.key(0), _NUM_DRAWS)
    draws = np.asarray(jax.jit(jax.vmap(loaded.draw, (0, None)))(keys, loaded.params))
    draws = draws.reshape(_NUM_DRAWS, dim)
    draws = draws[np.isfinite(draws).all(axis=1)]
    if not len(draws):
        raise UserError(f"energy_workdir is {workdir}; the run's own draws are not finite.")

    def energy(params, x):
        del params
        return loaded.energy_fn(loaded.params, x.reshape(shape))

    variance = float(np.square(draws).mean())
    if dim != 2:
        return Target(energy, (dim,)), variance, None
    from ebjax.evaluation import grid_law

    edge = 2.0 * float(np.abs(draws).max())
    law = grid_law(energy, (), bounds=(-edge, edge), num_points=_NUM_GRID_POINTS)
    if law.boundary_mass > _MOST_MASS_AT_THE_EDGE:
        raise UserError(
            f"energy_workdir is {workdir}; of the law it has learned, {law.boundary_mass:.1%} lies "
            f"at the edge of the box ±{edge:.3g}, twice as far as its draws: it has no end there."
        )
    return Target(energy, (2,), log_z=law.log_z, sample=_sampler(law)), variance, law


def _sampler(law: GridLaw):
    """Exact draws but for the width of a cell: a point by its mass, moved within its cell."""
    points = jnp.asarray(np.stack(np.meshgrid(*law.axes, indexing="ij"), -1).reshape(-1, 2), float)
    masses = np.exp(law.log_weights + law.log_density).ravel()
    cumulative = jnp.asarray(np.cumsum(masses / masses.sum()), float)
    cell = float(law.axes[0][1] - law.axes[0][0])

    def sample(key):
        point_key, move_key = jax.random.split(key)
        index = jnp.searchsorted(cumulative, jax.random.uniform(point_key))
        move = jax.random.uniform(move_key, (2,), minval=-0.5, maxval=0.5)
        return points[jnp.minimum(index, len(points) - 1)] + cell * move

    return sample
