"""Checkpoints of a training state: written in the background, read back whatever the devices.

Every process holds the whole state on its host when it saves and when it restores, so a run saved
on N devices resumes on M. The config and the versions of the libraries stand beside the arrays.
This is the only module that knows Orbax.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.metadata
import logging
import math
import os
import re
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from ebjax.numerics import is_key
from ebjax.types import PyTree

__all__ = ["Checkpointer", "library_versions"]

_log = logging.getLogger(__name__)
_SCHEMA = 1
# Fields that states of earlier versions lack; they take the values of a new state.
_ADDED_FIELDS = ("rollbacks",)
# How often a reader starts again because the run that it looks at goes on.
_MAX_READS = 10


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide what a checkpoint means."""
    names = ("ebjax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@contextlib.contextmanager
def _level(logger: logging.Logger, level: int | None):
    """Within it the logger says nothing below a level; ``None`` changes nothing."""
    before = logger.level
    if level is not None:
        logger.setLevel(max(level, before))
    try:
        yield
    finally:
        logger.setLevel(before)


class Checkpointer:
    """Saves and restores one run's states under one folder.

    Args:
      directory: where the checkpoints are, made when missing unless ``read_only``.
      config: the run's settings, saved beside each state.
      keep_last: how many of the newest are kept.
      keep_best: how many of the best by ``best_name`` are kept beside them.
      best_name: the metric, lower is better, that says which are best.
      read_only: for commands that only look.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        config: Mapping[str, Any] | None = None,
        keep_last: int = 2,
        keep_best: int = 0,
        best_name: str | None = None,
        read_only: bool = False,
    ):
        self._directory = Path(directory).absolute()
        self._config = dict(config or {})
        self._keep_last, self._keep_best, self._best_name = keep_last, keep_best, best_name
        self._metrics: dict[int, dict[str, float]] = {}
        self._is_read_only = read_only
        self._manager = self._open()
        for step in self.steps():
            self._metrics[step] = _numbers((self.about(step) or {}).get("metrics"))

    def _open(self) -> ocp.CheckpointManager:
        if not self._is_read_only and jax.process_index() == 0:
            # What a killed run left in part. Orbax would remove it in a thread that a manager does
            # not wait for when it is closed, and the next manager's would meet it there.
            for left in self._directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(left, ignore_errors=True)
        # That a folder is only read is what was asked for, and no reason for a warning.
        with _level(logging.getLogger("absl"), logging.ERROR if self._is_read_only else None):
            return ocp.CheckpointManager(
                self._directory,
                item_handlers={
                    "state": ocp.StandardCheckpointHandler(),
                    "about": ocp.JsonCheckpointHandler(),
                },
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=_Keep(self._kept_steps),
                    cleanup_tmp_directories=False,
                    create=not self._is_read_only,
                    read_only=self._is_read_only,
                    # What one damaged checkpoint says of itself must not hide the others.
                    lightweight_initialize=True,
                    # Else threads wait for minutes, also at exit, for one that cannot be made.
                    async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
                ),
            )

    def _reopen(self) -> None:
        """Looks at the folder anew."""
        self._manager.close()
        self._manager = self._open()

    def steps(self) -> list[int]:
        """Steps that were saved, oldest first."""
        return sorted(self._manager.all_steps())

    def about(self, step: int) -> dict[str, Any] | None:
        """What stands beside the arrays: ``config``, ``versions``, ``metrics``.

        ``None`` where it cannot be read.
        """
        try:
            about = self._manager.restore(
                step, args=ocp.args.Composite(about=ocp.args.JsonRestore())
            )["about"]
        except Exception:  # Orbax and its storage raise many types.
            return None
        return about if isinstance(about, dict) else None

    def best_step(self, name: str | None) -> int | None:
        """The step whose metric ``name`` was lowest, ``None`` where none was judged."""
        ranked = self._ranked(self.steps(), name)
        return ranked[0] if ranked else None

    def _ranked(self, steps: Sequence[int], name: str | None) -> list[int]:
        """The steps that ``name`` judges, best first; of equals the later one is better."""
        values = {step: self._metrics.get(step, {}).get(name or "", math.nan) for step in steps}
        judged = [step for step in steps if not math.isnan(values[step])]
        return sorted(judged, key=lambda step: (values[step], -step))

    def _kept_steps(self, steps: Sequence[int]) -> set[int]:
        latest = sorted(steps)[-self._keep_last :]
        return {*latest, *self._ranked(steps, self._best_name)[: self._keep_best]}

    def save(self, step: int, state: PyTree, metrics: Mapping[str, float] | None = None) -> None:
        """Saves a state given as host arrays, the same in all processes.

        Returns when the arrays are safe to change; writing goes on in the background.

        Raises:
          OSError: if this or the save before could not be written (a full disk, say). What was
            saved earlier is whole, and what is there in part is removed by the next run.
        """
        self._metrics[step] = {name: float(value) for name, value in (metrics or {}).items()}
        arrays = _without_keys(state)
        about = {
            "schema": _SCHEMA,
            "config": self._config,
            "versions": library_versions(),
            "metrics": self._metrics[step],
            "checksums": _checksums(arrays),
        }
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(arrays), about=ocp.args.JsonSave(about)
                ),
                force=True,
            )

    @contextlib.contextmanager
    def _writing(self):
        """Within it all that goes wrong is an ``OSError`` of one sentence."""
        try:
            yield
        except Exception as error:  # Orbax and its storage raise many types.
            raise OSError(
                f"A checkpoint in {self._directory} could not be written ({_reason(error)})"
            ) from error

    def restore(self, like: PyTree, step: int | None = None) -> tuple[int, PyTree] | None:
        """Restores the newest checkpoint that can be read, or the one of ``step``.

        A damaged checkpoint is skipped with a warning. One that a run removed meanwhile, for it
        goes on and saved newer ones, is none, and these are looked at.

        Args:
          like: a state of the same structure, shapes and dtypes; a checkpoint that differs in
            them is an error and not damage. What states of earlier versions lack is taken from it.
          step: which one; the newest that can be read by default.

        Returns:
          ``(step, state)`` in host arrays, or ``None`` where nothing was saved.

        Raises:
          ValueError: if there are checkpoints and none of them can be read, or if one holds a
            state of other structure, shapes or dtypes.
        """
        steps = self.steps() if step is None else [step]
        for _ in range(_MAX_READS):
            for candidate in reversed(steps):
                state = self._restore(candidate, like)
                if state is not None:
                    return candidate, state
            self._reopen()
            if step is not None or self.steps() == steps:
                break
            steps = self.steps()
        if steps:
            plural = "checkpoints" if len(steps) > 1 else "checkpoint"
            raise ValueError(
                f"The {plural} {', '.join(map(str, steps))} in {self._directory} cannot be read; "
                "restore the folder from a copy, or start again."
            )
        return None

    def _restore(self, step: int, like: PyTree) -> PyTree | None:
        """One state, ``None`` where it cannot be read."""
        difference = None
        try:
            # Orbax would cast, and tell a wrong structure by the error that damage gives.
            saved = self._manager.item_metadata(step)["state"]
            if saved is None:
                raise FileNotFoundError("its arrays are missing")
            template = jax.tree.map(_host_template, _without_keys(_older(like, saved)))
            about = self.about(step) or {}
            difference = _difference(template, saved, about.get("versions"))
            if difference is None:
                args = ocp.args.Composite(state=ocp.args.StandardRestore(template))
                state = self._manager.restore(step, args=args)["state"]
                # Not all that Orbax stores has a checksum of its own.
                if _checksums(state) != about.get("checksums"):
                    raise ValueError("its arrays are not those that were saved")
                return _with_keys(_younger(state, like), like)
        except Exception as error:  # Orbax and its storage raise many types.
            if (self._directory / str(step)).exists():
                _log.warning(
                    "Checkpoint %d in %s cannot be read and is skipped: %s",
                    step,
                    self._directory,
                    _first_line(error),
                )
        _drop_failed_tasks()
        if difference is not None:
            raise ValueError(f"Checkpoint {step} in {self._directory} {difference}")
        return None

    def set_aside(self, step: int) -> None:
        """Moves checkpoints newer than ``step`` (damaged ones) out of the way, keeping them.

        All processes call it; the first one moves.
        """
        for newer in [s for s in self.steps() if s > step]:
            target = self._directory.parent / "damaged_checkpoints" / str(newer)
            if jax.process_index() == 0:
                if target.exists():
                    shutil.rmtree(target)
                target.parent.mkdir(exist_ok=True)
                shutil.move(self._directory / str(newer), target)
                _log.warning("The damaged checkpoint %d is now %s.", newer, target)
            self._metrics.pop(newer, None)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("set_aside")
        self._reopen()

    def wait(self) -> None:
        """Returns when everything saved is on disk.

        Raises:
          OSError: if it could not be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and releases the folder; raises as ``wait`` does."""
        with self._writing():
            self._manager.close()


@dataclasses.dataclass
class _Keep(PreservationPolicy):
    """Orbax's form of a rule that says which steps are kept."""

    kept_steps: Callable[[Sequence[int]], set[int]]

    def should_preserve(self, checkpoints, *, context):
        del context
        kept = self.kept_steps([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step in kept for checkpoint in checkpoints]


def _drop_failed_tasks() -> None:
    """Orbax leaves tasks whose errors nobody asks for; asyncio would log each of them later."""
    logger = logging.getLogger("asyncio")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        gc.collect()
    finally:
        logger.disabled = was_disabled


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _reason(error: Exception) -> str:
    """What the operating system said, where the long sentence of the storage has it."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(code[1])) if code else _first_line(error)


def _numbers(values: Any) -> dict[str, float]:
    """Metrics as they were saved, without what damage has made of them."""
    if not isinstance(values, dict):
        return {}
    return {name: value for name, value in values.items() if isinstance(value, float)}


def _older(like: PyTree, saved: PyTree) -> PyTree:
    """A state by its fields, without those that a saved one is too old to have."""
    names = getattr(like, "_fields", ())
    missing = [name for name in _ADDED_FIELDS if name in names and name not in saved]
    if not missing:
        return like
    return {name: getattr(like, name) for name in names if name not in missing}


def _younger(state: PyTree, like: PyTree) -> PyTree:
    """The inverse of ``_older``, with the values of ``like``."""
    if not hasattr(like, "_fields") or not isinstance(state, dict):
        return state
    missing = [name for name in like._fields if name not in state]
    added = {name: jax.tree.map(np.asarray, getattr(like, name)) for name in missing}
    return like._replace(**state, **added)


def _without_keys(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: np.asarray(jax.random.key_data(x)) if is_key(x) else x, tree)


def _with_keys(tree: PyTree, like: PyTree) -> PyTree:
    return jax.tree.map(
        lambda x, template: (
            jax.random.wrap_key_data(x, impl=jax.random.key_impl(template))
            if is_key(template)
            else x
        ),
        tree,
        like,
    )


def _host_template(leaf: Any) -> np.ndarray:
    return np.zeros(np.shape(leaf), np.asarray(leaf).dtype)


def _difference(template: PyTree, saved: PyTree, versions: Any) -> str | None:
    """Where the metadata of a saved state differs from a template, as the end of a sentence."""
    expected, found = _described(template), _described(saved)
    maker, own = dict(versions or {}).get("ebjax"), library_versions().get("ebjax")
    origin = "" if maker in (None, own) else f" (saved by ebjax {maker}, this is {own})"
    for name in sorted({*expected, *found}):
        if name not in found:
            return f"does not hold {name}, which the config asks for ({expected[name]}){origin}."
        if name not in expected:
            return f"holds {name} ({found[name]}), which the config does not know{origin}."
        if found[name] != expected[name]:
            asked = expected[name]
            return f"holds {name} as {found[name]}, and the config asks for {asked}{origin}."
    return None


def _checksums(tree: PyTree) -> dict[str, int]:
    return {
        _name(path): zlib.crc32(np.asarray(leaf).tobytes())
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _described(tree: PyTree) -> dict[str, str]:
    """Type and shape of each array by its path, equal for tuples, lists and named tuples."""
    return {
        _name(path): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if getattr(leaf, "shape", None) is not None
    }
