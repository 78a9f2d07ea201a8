"""The one seam between a function and the devices that it runs on.

Everything below is written for one device, with a collective over ``axis_name`` where it needs the
others. ``data_parallel`` turns such a step into one compiled program for N devices, and
``spread`` does the same for work that is split at its end (chains). Values are either *replicated*
(equal on all devices) or *split* along their leading axis.

Two backends give the same numbers:

- ``"pmap"``: ``jax.pmap`` with ``None`` for the replicated axes. Nothing is stacked by hand.
- ``"shard_map"``: ``jax.jit`` of ``jax.shard_map``. Its default ``check_vma=True`` would sum the
  gradient of replicated parameters over devices before the step's own ``pmean`` does, so the
  gradient would come out too large by the number of devices; the check is off.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ebjax.numerics import is_key
from ebjax.types import PyTree

__all__ = [
    "BACKENDS",
    "DataParallel",
    "data_parallel",
    "is_side_by_side",
    "on_accelerator",
    "side_by_side",
    "spread",
    "to_host",
]

AXIS_NAME = "devices"
BACKENDS = ("pmap", "shard_map")


class DataParallel(NamedTuple):
    """A step compiled for N devices, with the way in and out.

    Attributes:
      num_devices: N, over all processes.
      step: ``(replicated, split, constant) -> (replicated, split, metrics)``; the first two are
        donated, ``constant`` is replicated and kept.
      place: ``(replicated, split) -> (replicated, split)``, from global host arrays (every process
        gives the whole of them) to what ``step`` takes.
      collect: the way back, to global arrays on the host of every process.
      place_constant: replicates ``constant``.
    """

    num_devices: int
    step: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree, PyTree]]
    place: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]
    collect: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]
    place_constant: Callable[[PyTree], PyTree]


def data_parallel(
    step: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree, PyTree]],
    *,
    devices: list[jax.Device] | None = None,
    backend: str = "pmap",
) -> DataParallel:
    """Compiles ``step`` for all ``devices``.

    Args:
      step: ``(replicated, split, constant) -> (replicated, split, metrics)`` for one device. It may
        use collectives over ``AXIS_NAME``, must return equal ``replicated`` and ``metrics`` on all
        devices, and must keep shapes and dtypes.
      devices: all devices of all processes by default.
      backend: ``"pmap"`` or ``"shard_map"``.

    Returns:
      A ``DataParallel``.

    Raises:
      ValueError: for an unknown backend.
    """
    devices = jax.devices() if devices is None else devices
    if backend == "pmap":
        return _pmapped(step, devices)
    if backend == "shard_map":
        return _shard_mapped(step, devices)
    raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(BACKENDS)}.")


class _Nothing(NamedTuple):
    """A split tree without arrays, and one that tells ``pmap`` the devices apart."""

    tree: PyTree
    slots: jax.Array | np.ndarray


def _pmapped(step, devices: list[jax.Device]) -> DataParallel:
    def step_of_any(replicated, split, constant):
        if not isinstance(split, _Nothing):
            return step(replicated, split, constant)
        replicated, tree, metrics = step(replicated, split.tree, constant)
        return replicated, split._replace(tree=tree), metrics

    local = [device for device in devices if device.process_index == jax.process_index()]
    mesh = Mesh(np.array(local), (AXIS_NAME,))
    # One process may run on some of its devices; several processes always run on all.
    pmapped = jax.pmap(
        step_of_any,
        axis_name=AXIS_NAME,
        in_axes=(None, 0, None),
        out_axes=(None, 0, None),
        donate_argnums=(0, 1),
        devices=devices if jax.process_count() == 1 else None,
    )

    def local_part(leaf):
        part = np.asarray(leaf).reshape(len(devices), -1, *np.shape(leaf)[1:])
        first = devices.index(local[0])
        return part[first : first + len(local)]

    def merged(leaf):
        leaf = np.asarray(leaf).reshape(-1, *leaf.shape[2:])
        return multihost_utils.process_allgather(leaf, tiled=True)

    def place(replicated, split):
        if not jax.tree.leaves(split):
            split = _Nothing(split, np.zeros(len(devices), np.int32))
        split = _map_arrays(local_part, split)
        return (
            _put(replicated, mesh, PartitionSpec()),
            _put(split, mesh, PartitionSpec(AXIS_NAME)),
        )

    def collect(replicated, split):
        split = split.tree if isinstance(split, _Nothing) else _map_arrays(merged, split)
        return to_host(replicated), split

    return DataParallel(
        num_devices=len(devices),
        step=pmapped,
        place=place,
        collect=collect,
        place_constant=lambda constant: _put(constant, mesh, PartitionSpec()),
    )


def _shard_mapped(step, devices: list[jax.Device]) -> DataParallel:
    mesh = Mesh(np.array(devices), (AXIS_NAME,))
    everywhere, in_parts = PartitionSpec(), PartitionSpec(AXIS_NAME)
    mapped = jax.jit(
        jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(everywhere, in_parts, everywhere),
            out_specs=(everywhere, in_parts, everywhere),
            check_vma=False,
        ),
        donate_argnums=(0, 1),
    )

    def whole(leaf):
        return multihost_utils.process_allgather(leaf, tiled=True)

    return DataParallel(
        num_devices=len(devices),
        step=mapped,
        place=lambda replicated, split: (
            _put(replicated, mesh, everywhere),
            _put(split, mesh, in_parts),
        ),
        collect=lambda replicated, split: (to_host(replicated), _map_arrays(whole, split)),
        place_constant=lambda constant: _put(constant, mesh, everywhere),
    )


def _put(tree: PyTree, mesh: Mesh, spec: PartitionSpec) -> PyTree:
    """Host arrays on the devices of a mesh.

    New buffers, laid out as the step returns them: the step donates its inputs, and inputs of
    another layout would compile it a second time.
    """
    sharding = NamedSharding(mesh, spec)

    def put(leaf):
        value = np.asarray(leaf)
        return jax.make_array_from_callback(
            value.shape, sharding, lambda index: value[index].copy()
        )

    return _map_arrays(put, tree)


def spread(
    fn: Callable[[PyTree, PyTree], PyTree], num_devices: int, *, split_axis_out: PyTree = 0
) -> Callable[[PyTree, PyTree], PyTree]:
    """Runs ``fn(replicated, split) -> split`` on several local devices.

    Args:
      fn: the work of one device; it may use collectives over ``AXIS_NAME``. ``split`` has leading
        axes that ``num_devices`` divides.
      num_devices: how many local devices; 1 calls ``fn`` as it is.
      split_axis_out: where the split axis stands in the output, an integer for all of it or a
        prefix of its tree.

    Returns:
      A function with the global arrays in and out.

    Raises:
      ValueError: if there are fewer local devices.
    """
    if num_devices == 1:
        return fn
    devices = jax.local_devices()
    if num_devices > len(devices):
        raise ValueError(
            f"num_devices is {num_devices}, and this process has {len(devices)} "
            f"{devices[0].platform} devices. On CPU, call "
            f'jax.config.update("jax_num_cpu_devices", {num_devices}) before any other use of JAX.'
        )
    mesh = Mesh(np.array(devices[:num_devices]), (AXIS_NAME,))
    return jax.shard_map(
        fn,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(AXIS_NAME)),
        out_specs=jax.tree.map(
            lambda axis: PartitionSpec(*([None] * axis), AXIS_NAME), split_axis_out
        ),
        check_vma=False,
    )


def on_accelerator() -> bool:
    """Whether what is traced now runs, by default, on a GPU or TPU.

    There a kernel costs less than its start, and a loop that asks the device whether to go on waits
    for the answer. For choices that change the time, and numbers by rounding alone.
    """
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    platform = jax.default_backend() if device is None else getattr(device, "platform", device)
    return platform != "cpu"


_IS_SIDE_BY_SIDE = contextvars.ContextVar("is_side_by_side", default=False)


def side_by_side(fn: Callable, in_axes: PyTree = 0) -> Callable:
    """``jax.vmap(fn, in_axes)`` over whole runs, within which ``is_side_by_side()``."""

    def marked(*args):
        token = _IS_SIDE_BY_SIDE.set(True)
        try:
            return fn(*args)
        finally:
            _IS_SIDE_BY_SIDE.reset(token)

    return jax.vmap(marked, in_axes)


def is_side_by_side() -> bool:
    """Whether what is traced now is one of several runs in one program.

    Loops that end in one run and not in another then copy all that they carry at every step.
    """
    return _IS_SIDE_BY_SIDE.get()


def to_host(tree: PyTree) -> PyTree:
    """Replicated arrays as NumPy arrays of this process; keys stay keys."""

    def leaf_to_host(leaf):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            leaf = leaf.addressable_data(0)
        return np.asarray(leaf)

    return _map_arrays(leaf_to_host, tree)


def _map_arrays(fn, tree: PyTree) -> PyTree:
    """Maps over arrays, and over the data of keys."""

    def apply(leaf):
        if is_key(leaf):
            impl = jax.random.key_impl(leaf)
            return jax.random.wrap_key_data(fn(jax.random.key_data(leaf)), impl=impl)
        return fn(leaf)

    return jax.tree.map(apply, tree)
