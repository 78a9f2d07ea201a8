"""Several seeds of one run in one program: the update of ``train``, mapped over whole states.

Small networks leave most of a device idle; their seeds, side by side, cost little more than one.
Each seed computes what ``train`` computes on one device, up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ebjax.numerics import is_key
from ebjax.parallel import AXIS_NAME, data_parallel, side_by_side, to_host
from ebjax.training.config import TrainingConfig
from ebjax.training.loop import init_state, is_save_step, next_call_end
from ebjax.training.update import make_update, make_update_many
from ebjax.types import Run, TrainState

__all__ = ["stacked_states", "train_seeds", "unstacked_states"]


def train_seeds(
    run: Run,
    configs: Sequence[TrainingConfig],
    *,
    initial: Sequence[TrainState] | None = None,
    on_log: Callable[[int, int, dict[str, float]], None] | None = None,
    on_save: Callable[[int, int, TrainState, dict[str, float]], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[TrainState | None]:
    """Trains one run for several seeds at once, on the first device.

    A seed whose loss is not finite, or beyond its limit, is left out from there on; there are no
    rollbacks.

    Args:
      run: built from any of the configs; its recipe must have ``seed_is_key``.
      configs: one a seed, alike in all else.
      initial: the states to go on from, all at one step; fresh ones by default.
      on_log: called at log points with the place of the seed in ``configs``, the step and the
        metrics (as in ``train``).
      on_save: called every ``checkpoint_every`` steps and when training ends, with the place of
        the seed, the step, its state on the host and the figures of ``run.monitor``.
      should_stop: asked between calls; ``True`` saves the states and returns.

    Returns:
      The state of each seed on the host, ``None`` where it diverged.

    Raises:
      ValueError: if there are no configs, if they differ in more than the seed, if the states are
        at several steps, or if the source reads on the host as it goes.
    """
    config = _common(configs)
    if run.source.load is not None:
        raise ValueError("source streams; several seeds at once need data that fits in memory.")
    update = make_update(
        run.objective,
        run.optimizer,
        run.source,
        batch_size=config.batch_size,
        ema_decay=config.ema_decay,
        rollback_factor=config.rollback_factor,
        axis_name=AXIS_NAME,
    )
    update_many = make_update_many(update, loss_limit=config.loss_limit or math.inf)
    program = data_parallel(
        side_by_side(update_many, (0, 0, None)), devices=jax.devices()[:1], backend=config.backend
    )
    if initial is None:
        initial = [init_state(run, config) for config in configs]
    steps = sorted({int(state.step) for state in initial})
    if len(steps) != 1:
        raise ValueError(f"initial has states at the steps {steps}; they must be at one step.")
    step = steps[0]
    states = stacked_states(initial)
    replicated, split = program.place(states._replace(carry=()), states.carry)
    arrays = program.place_constant(run.source.arrays)
    is_good = np.ones(len(configs), bool)
    stopping = False

    def collect() -> list[TrainState]:
        state, carry = program.collect(replicated, split)
        return unstacked_states(state._replace(carry=carry), len(configs))

    while step < config.num_steps and not stopping and is_good.any():
        end = next_call_end(config, step)
        num_updates = program.place_constant(jnp.asarray(end - step, jnp.int32))
        replicated, split, device_metrics = program.step(replicated, split, (arrays, num_updates))
        step, stopping = end, should_stop()
        metrics = jax.device_get(device_metrics)
        is_good &= metrics.pop("bad_step").reshape(-1) < 0
        is_save = is_save_step(config, step)
        saved = collect() if is_save or stopping else []
        for i in np.flatnonzero(is_good).tolist():
            row = {name: float(values.reshape(-1)[i]) for name, values in metrics.items()}
            judgement: dict[str, float] = {}
            if is_save and run.monitor is not None:
                key = jax.random.fold_in(jax.random.key(configs[i].seed), step)
                judgement = run.monitor(key, saved[i])
            # A state that is saved is logged.
            if on_log is not None and (is_save or step % config.log_every == 0):
                on_log(i, step, row | judgement)
            if on_save is not None and saved:
                on_save(i, step, saved[i], judgement)
    return [state if good else None for state, good in zip(collect(), is_good, strict=True)]


def _common(configs: Sequence[TrainingConfig]) -> TrainingConfig:
    """The first of the configs, which differ in their seeds only."""
    if not configs:
        raise ValueError("configs is empty; give one for each seed.")
    for config in configs:
        for name, value in vars(config).items():
            if name != "seed" and value != getattr(configs[0], name):
                raise ValueError(
                    f"configs have {name} {getattr(configs[0], name)!r} and {value!r}; they must "
                    "differ in their seeds only."
                )
    return configs[0]


def stacked_states(states: Sequence[TrainState]) -> TrainState:
    """One state with a leading axis of seeds."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def unstacked_states(states: TrainState, num: int) -> list[TrainState]:
    """The states of a stacked one, on the host."""

    def take(leaf, i):
        return leaf[i] if is_key(leaf) else np.asarray(leaf[i])

    host = to_host(states)
    return [jax.tree.map(lambda leaf, i=i: take(leaf, i), host) for i in range(num)]
