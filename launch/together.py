"""Trains the runs of several seeds in one program, each into a run directory of its own.

What it leaves are ordinary run directories. A seed that diverged has no figures of merit, and
``launch.train`` goes on with it from its last good checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence

from rich.console import Console

from ebjax.training import Checkpointer, MetricsWriter, init_state, train_seeds
from ebjax.types import Recipe
from launch import runs
from launch.runs import UserError
from launch.train import StopSignal, finish

__all__ = ["train_together"]


def train_together(
    plans: Sequence[runs.WorkdirPlan],
    recipe: Recipe,
    recipe_name: str,
    recipe_module: str | None = None,
    *,
    console: Console,
) -> bool:
    """Trains and judges what the plans say, where it is all at one step and not done yet.

    Returns:
      Whether a signal stopped it; everything is saved then.

    Raises:
      UserError: if the recipe does not permit it.
    """
    if not recipe.seed_is_key:
        raise UserError(
            f"together is True, but the recipe {recipe_name!r} uses config.seed for more than the "
            "run's key (to split its data, say); leave --together out."
        )
    if len(plans) < 2:
        return False
    with contextlib.ExitStack() as held:
        for plan in plans:
            held.enter_context(runs.lock_workdir(plan.path))
        return _train(plans, recipe, recipe_name, recipe_module, console)


def _train(
    plans: Sequence[runs.WorkdirPlan],
    recipe: Recipe,
    recipe_name: str,
    recipe_module: str | None,
    console: Console,
) -> bool:
    configs = [plan.config for plan in plans]
    try:
        run = recipe.build(configs[0])
    except ValueError as error:
        raise UserError(str(error)) from None
    restored = [
        runs.restore(plan.path, run, plan.config) if plan.is_resumed else None for plan in plans
    ]
    states = [
        init_state(run, config) if state is None else state
        for state, config in zip(restored, configs, strict=True)
    ]
    step = int(states[0].step)
    is_alike = all(int(state.step) == step for state in states)
    if not is_alike or step >= configs[0].num_steps or run.source.load is not None:
        return False
    for plan in plans:
        runs.prepare_workdir(plan, recipe_name, recipe_module)
    checkpointers = [
        Checkpointer(
            plan.path / "checkpoints",
            config=dataclasses.asdict(plan.config),
            keep_last=plan.config.keep_last,
            keep_best=plan.config.keep_best,
            best_name=run.monitor_name,
        )
        for plan in plans
    ]
    for checkpointer in checkpointers:
        checkpointer.set_aside(step)
    log_every = configs[0].log_every
    writers = [MetricsWriter(plan.path, resume_step=step, log_every=log_every) for plan in plans]
    console.print(f"{len(plans)} seeds together, from step {step}", highlight=False)
    try:
        with StopSignal() as stop_signal:
            ended = train_seeds(
                run,
                configs,
                initial=states,
                on_log=lambda i, step, metrics: writers[i].write(step, metrics),
                on_save=lambda i, step, state, figures: checkpointers[i].save(step, state, figures),
                should_stop=stop_signal,
            )
    finally:
        for writer in writers:
            writer.close()
        for checkpointer in checkpointers:
            checkpointer.close()
    if stop_signal():
        return True
    for plan, state in zip(plans, ended, strict=True):
        if state is not None:
            finish(recipe.build(plan.config), plan.config, state, plan.path)
    return False
