"""Checkpoints of a training state: written in the background, read back whatever the devices.

Every process holds the whole state on its host when it saves and when it restores, so a run saved
on N devices resumes on M. The config and the versions of the libraries stand beside the arrays.
This is the only module that knows Orbax.
"""

from __future__ import annotations

import importlib.metadata
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from ebjax.types import PyTree

__all__ = ["Checkpointer", "library_versions"]

_log = logging.getLogger(__name__)
_SCHEMA = 1


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
        policies: list[Any] = [LatestN(keep_last)]
        if best_name is not None and keep_best:
            # Orbax keeps the largest; a checkpoint without the metric is never among the best.
            policies.append(
                BestN(
                    get_metric_fn=lambda metrics: -metrics[best_name],
                    n=keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy(policies),
                best_fn=_any_metric,  # without it Orbax does not write metrics
                cleanup_tmp_directories=not read_only,
                create=not read_only,
                read_only=read_only,
            ),
        )

    def steps(self) -> list[int]:
        """Steps that were saved, oldest first."""
        return sorted(self._manager.all_steps())

    def best_step(self, name: str | None) -> int | None:
        """The step whose metric ``name`` was lowest, ``None`` where none was judged."""
        judged = {step: (self._manager.metrics(step) or {}).get(name) for step in self.steps()}
        known = {step: value for step, value in judged.items() if value is not None}
        return min(known, key=known.__getitem__) if known else None

    def save(self, step: int, state: PyTree, metrics: Mapping[str, float] | None = None) -> None:
        """Saves a state given as host arrays, the same in all processes.

        Returns when the arrays are safe to change; writing goes on in the background.
        """
        about = {"schema": _SCHEMA, "config": self._config, "versions": library_versions()}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_without_keys(state)), about=ocp.args.JsonSave(about)
            ),
            metrics=dict(metrics) if metrics else None,
            force=True,
        )

    def restore(self, like: PyTree, step: int | None = None) -> tuple[int, PyTree] | None:
        """Restores the newest checkpoint that can be read, or the one of ``step``.

        A damaged checkpoint is skipped with a warning.

        Args:
          like: a state of the same structure, shapes and dtypes; a checkpoint that differs in
            them is an error and not damage.
          step: which one; the newest that can be read by default.

        Returns:
          ``(step, state)`` in host arrays, or ``None`` where nothing was saved.

        Raises:
          ValueError: if there are checkpoints and none of them can be read, or if one holds a
            state of other shapes.
        """
        steps = self.steps() if step is None else [step]
        template = jax.tree.map(_host_template, _without_keys(like))
        for candidate in reversed(steps):
            try:
                restored = self._manager.restore(
                    candidate, args=ocp.args.Composite(state=ocp.args.StandardRestore(template))
                )
            except Exception as error:  # Orbax and its storage raise many types.
                _log.warning(
                    "Checkpoint %d in %s cannot be read and is skipped: %s",
                    candidate,
                    self._directory,
                    _first_line(error),
                )
                continue
            state = restored["state"]
            _check_shapes(template, state, candidate)
            return candidate, _with_keys(state, like)
        if steps:
            raise ValueError(
                f"None of the checkpoints {', '.join(map(str, steps))} in {self._directory} can be "
                "read; remove the folder to start again, or restore it from a copy."
            )
        return None

    def set_aside(self, step: int) -> None:
        """Moves checkpoints newer than ``step`` (damaged ones) out of the way, keeping them."""
        for newer in [s for s in self.steps() if s > step]:
            self._manager.wait_until_finished()
            target = self._directory.parent / "damaged_checkpoints" / str(newer)
            if target.exists():
                shutil.rmtree(target)
            target.parent.mkdir(exist_ok=True)
            shutil.move(self._directory / str(newer), target)
            _log.warning("The damaged checkpoint %d is now %s.", newer, target)
        self._manager.reload()

    def wait(self) -> None:
        """Returns when everything saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and releases the folder."""
        self._manager.close()


def _any_metric(metrics: Mapping[str, float]) -> float:
    return next(iter(metrics.values()), 0.0)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _without_keys(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: np.asarray(jax.random.key_data(x)) if _is_key(x) else x, tree)


def _with_keys(tree: PyTree, like: PyTree) -> PyTree:
    return jax.tree.map(
        lambda x, template: (
            jax.random.wrap_key_data(x, impl=jax.random.key_impl(template))
            if _is_key(template)
            else x
        ),
        tree,
        like,
    )


def _host_template(leaf: Any) -> np.ndarray:
    return np.zeros(np.shape(leaf), np.asarray(leaf).dtype)


def _check_shapes(template: PyTree, state: PyTree, step: int) -> None:
    def check(path, expected, found):
        if np.shape(expected) != np.shape(found) or expected.dtype != np.asarray(found).dtype:
            raise ValueError(
                f"Checkpoint {step} holds {jax.tree_util.keystr(path)} as {found.dtype}"
                f"{list(np.shape(found))}, and the config asks for {expected.dtype}"
                f"{list(np.shape(expected))}."
            )

    jax.tree_util.tree_map_with_path(check, template, state)
