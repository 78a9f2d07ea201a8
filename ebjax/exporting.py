"""Writes a function as a file that runs where this package is not installed.

The file holds StableHLO, the portable and versioned form of XLA's programs, with parameters inside,
as ``jax.export`` writes it: no Python, no pickle. It runs with jax and flatbuffers alone, on a
later version as well (jax keeps old files readable for half a year at least):

    exported = jax.export.deserialize(bytearray(open("sampler.stablehlo", "rb").read()))
    samples = exported.call(jax.random.split(jax.random.key(0), 64))
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from ebjax.types import PyTree

__all__ = ["PLATFORMS", "export_function"]

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def export_function(
    function: Callable[[PyTree], PyTree],
    example: PyTree,
    path: str | os.PathLike[str],
    *,
    num_examples: int | None = None,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
) -> None:
    """Writes ``vmap(function)`` for examples [N, ...] to a file.

    What the function closes over becomes part of the file, so that a sampler and an energy of a
    run are written, with what they have learned, as

        energy = ebjax.load("runs/digits")
        ebjax.export_function(lambda key: energy.draw(key, energy.params), jax.random.key(0), path)
        ebjax.export_function(lambda x: energy.energy_fn(energy.params, x), jnp.zeros(shape), path)

    Args:
      function: pure, of one example; it returns arrays in tuples, lists and dicts.
      example: an example (its values do not matter): a key, an array or a pytree of them.
      path: of the file.
      num_examples: N, which the file then takes only; by default it takes any.
      platforms: where the file will run, of ``PLATFORMS``.

    Raises:
      ImportError: without flatbuffers.
      ValueError: if ``num_examples`` or ``platforms`` cannot be, or the function returns something
        that cannot be written.

    >>> import tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "square.stablehlo")
    >>> export_function(jnp.square, jnp.zeros(2), path)
    >>> square = jax.export.deserialize(bytearray(Path(path).read_bytes()))
    >>> square.call(jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])).tolist()
    [[1.0, 4.0], [9.0, 16.0], [25.0, 36.0]]
    """
    from jax import export

    if num_examples is not None and num_examples < 1:
        raise ValueError(f"num_examples is {num_examples}; it must be at least 1.")
    unknown = [platform for platform in platforms if platform not in PLATFORMS]
    if unknown or not platforms:
        raise ValueError(
            f"platforms is {', '.join(platforms)!r}; give one or more of {', '.join(PLATFORMS)}."
        )
    (size,) = export.symbolic_shape("n") if num_examples is None else (num_examples,)
    batch = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape), leaf.dtype),
        jax.tree.map(jnp.asarray, example),
    )
    exported = export.export(jax.jit(jax.vmap(function)), platforms=tuple(platforms))(batch)
    try:
        contents = exported.serialize()
    except ImportError:
        raise ImportError(
            "flatbuffers is missing; pip install 'ebjax[export]' brings it."
        ) from None
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(contents)
    temporary.replace(path)
