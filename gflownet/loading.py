"""Reads the flow that a run has learned.

flow = gflownet.load("runs/hypergrid")
flow.sample(jax.random.key(0), 100)["positions"]
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from ebjax.loading import UserError, described, learned_params, load_run
from ebjax.types import Params, PyTree

if TYPE_CHECKING:
    from ebjax.training import TrainingConfig

__all__ = ["LoadedFlow", "load"]


class LoadedFlow(NamedTuple):
    """A flow that a run has learned, to be used anywhere.

    Attributes:
      environment: the graph, a ``gflownet.Environment`` (of a diffusion sampler its
        ``DiffusionProcess``).
      policy: the policy on it.
      params: of the policy, averaged over the last updates.
      draw: ``(key, params) -> terminal state``, pure, one sample; ``None`` where the run has none.
      sample: ``(key, num) -> arrays by name`` [num, ...] on the host, as ``launch.sample`` writes
        them.
      config: the settings of the run.
      step: the updates that were done.
    """

    environment: Any
    policy: Any
    params: Params
    draw: Callable[[jax.Array, Params], PyTree] | None
    sample: Callable[[jax.Array, int], dict[str, Any]]
    config: TrainingConfig
    step: int

    def __repr__(self) -> str:
        """One line in a notebook, in the place of every parameter."""
        return described(self)


def load(
    workdir: str | Path, *, checkpoint: str | int = "newest", recipe_module: str | None = None
) -> LoadedFlow:
    """The flow that a run has learned, read from its directory.

        flow = gflownet.load("runs/hypergrid")
        keys = jax.random.split(jax.random.key(0), 100)
        gflownet.forward_rollout(keys, flow.environment, flow.policy, flow.params)

    Args:
      workdir: the run directory of a ``launch.train``.
      checkpoint: ``"newest"``, ``"best"`` or a step.
      recipe_module: where the recipe is, if it is not a built-in one and the run does not say.

    Raises:
      ValueError: if the directory, its config or the checkpoint cannot be read, or the run learns
        no flow.
    """
    run, config, state, name = load_run(
        str(workdir), checkpoint=str(checkpoint), recipe_module=recipe_module
    )
    if run.flow is None:
        raise UserError(f"workdir is {workdir}; its recipe {name!r} learns no flow.")
    return LoadedFlow(
        environment=run.flow.environment,
        policy=run.flow.policy,
        params=learned_params(run, state),
        draw=run.draw,
        sample=lambda key, num: run.sample(key, state, num),
        config=config,
        step=int(state.step),
    )
