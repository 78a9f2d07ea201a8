"""Laws in the plane by name, and datasets drawn from known laws."""

from __future__ import annotations

import jax
import numpy as np

from ebjax.data.dataset import Dataset
from ebjax.types import Target

__all__ = ["SYNTHETIC_2D", "draws", "synthetic_2d"]

SYNTHETIC_2D = (
    "checkerboard",
    "eight_gaussians",
    "nine_gaussians",
    "pinwheel",
    "rings",
    "two_moons",
)


def synthetic_2d(name: str) -> Target:
    """A law in the plane with exact density and exact draws, with its default settings.

    Args:
      name: one of ``SYNTHETIC_2D``, each a function of ``ebjax.energies.targets``.

    Raises:
      ValueError: if there is no such law.

    >>> synthetic_2d("two_moons").event_shape
    (2,)
    """
    from ebjax.energies import targets

    if name not in SYNTHETIC_2D:
        raise ValueError(f"name is {name!r}; it must be one of {', '.join(SYNTHETIC_2D)}.")
    return getattr(targets, name)()


def draws(target: Target, num_examples: int, *, seed: int = 0, name: str = "") -> Dataset:
    """A dataset of independent exact draws [N, ...] of a known law.

    Raises:
      ValueError: if the law has no exact draws, or ``num_examples`` is below 1.

    >>> draws(synthetic_2d("eight_gaussians"), 10).examples.shape
    (10, 2)
    """
    if target.sample is None:
        raise ValueError("The target has no exact draws; give one with a 'sample'.")
    if num_examples < 1:
        raise ValueError(f"num_examples is {num_examples}; it must be at least 1.")
    keys = jax.random.split(jax.random.key(seed), num_examples)
    return Dataset(np.asarray(jax.jit(jax.vmap(target.sample))(keys)), None, name)
