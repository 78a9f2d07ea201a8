"""The training loop: dispatches updates, reads metrics one call late, saves, stops when asked.

A run that diverges goes back to the last state that was good at a save, takes smaller steps from
there on, and stops when it has done so too often.

The loop runs *calls* of several updates. Calls end at every multiple of ``steps_per_call``,
``log_every`` and ``checkpoint_every`` counted from step 0, so a run that was stopped and resumed
makes the same calls, and logs the same numbers, as one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from ebjax.parallel import AXIS_NAME, DataParallel, data_parallel
from ebjax.training.checkpoint import Checkpointer
from ebjax.training.config import TrainingConfig
from ebjax.training.update import initial_state, load_arrays, make_update, make_update_many
from ebjax.types import PyTree, Run, Source, TrainState

__all__ = ["DivergenceError", "TrainResult", "choose_devices", "init_state", "train"]


class DivergenceError(ArithmeticError):
    """At ``step`` the loss or its gradient was not finite, or the loss beyond its limit."""

    def __init__(self, step: int, loss_limit: float = 0.0):
        limit = f", or the loss is beyond {loss_limit:g}" if loss_limit else ""
        super().__init__(f"The loss or its gradient is not finite{limit} at step {step}.")
        self.step = step


class TrainResult(NamedTuple):
    """What the loop leaves: the state on the host, and whether it reached ``num_steps``."""

    state: TrainState
    is_finished: bool


def choose_devices(batch_size: int, num_devices: int = 0) -> list[jax.Device]:
    """The devices that a batch is split over.

    Args:
      batch_size: examples of the global batch.
      num_devices: how many; 0 takes the largest number that divides the batch. Several processes
        always use all their devices.

    Raises:
      ValueError: if the devices do not exist or do not divide the batch.
    """
    devices = jax.devices()
    if jax.process_count() > 1:
        if num_devices not in (0, len(devices)):
            raise ValueError(
                f"num_devices is {num_devices}; {jax.process_count()} processes use all of their "
                f"{len(devices)} devices, so it must be 0 or {len(devices)}."
            )
        num_devices = len(devices)
    if num_devices == 0:
        num_devices = max(n for n in range(1, len(devices) + 1) if batch_size % n == 0)
    if num_devices > len(devices):
        raise ValueError(
            f"num_devices is {num_devices}; this machine has {len(devices)} "
            f"{devices[0].platform} devices."
        )
    if batch_size % num_devices:
        raise ValueError(
            f"batch_size is {batch_size}; it must be a multiple of the {num_devices} devices."
        )
    return devices[:num_devices]


def init_state(run: Run, config: TrainingConfig) -> TrainState:
    """The state of a run before its first update, a function of ``config.seed``."""
    key = jax.random.key(config.seed)
    return initial_state(key, run.init, run.objective, run.optimizer, run.source, config.batch_size)


def train(
    run: Run,
    config: TrainingConfig,
    *,
    checkpointer: Checkpointer | None = None,
    initial: TrainState | None = None,
    on_log: Callable[[int, dict[str, float], float], None] | None = None,
    on_call: Callable[[int, dict[str, float]], None] | None = None,
    on_compile: Callable[[float], None] | None = None,
    on_rollback: Callable[[DivergenceError, TrainState], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Trains until ``config.num_steps``, a stop, or a loss that is not finite.

    Args:
      run: what is trained.
      config: how long, how often.
      checkpointer: where states are saved; ``None`` saves nothing.
      initial: the state to go on from; a fresh one by default.
      on_log: called at log points with the step, the metrics (means over the last call) and the
        updates a second since the last log point. A log point is every ``log_every`` steps, every
        checkpoint and the end.
      on_call: called after every call with the step and its metrics, for progress display.
      on_compile: called once, with the seconds until the first call was on its way: tracing and
        compiling.
      on_rollback: called when the run diverged and goes on from the given state, which has an
        older step; what was logged after that step is void.
      should_stop: asked between calls; ``True`` saves the state and returns.

    Returns:
      A ``TrainResult``.

    Raises:
      DivergenceError: naming the step, if the run diverged and ``config.max_rollbacks`` are used
        up; checkpoints saved before it are good.
      ValueError: if the devices do not fit the batch.
    """
    devices = choose_devices(config.batch_size, config.num_devices)
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
    program = data_parallel(update_many, devices=devices, backend=config.backend)
    good = init_state(run, config) if initial is None else initial
    step = int(good.step)
    replicated, split = program.place(good._replace(carry=()), good.carry)
    arrays = _arrays_for(run.source, config, program, good.key, step)
    clock = _Clock(step)

    def fetch(device_metrics) -> dict[str, float]:
        metrics = {name: value.item() for name, value in jax.device_get(device_metrics).items()}
        bad_step = metrics.pop("bad_step")
        if bad_step >= 0:
            raise DivergenceError(bad_step, config.loss_limit)
        return metrics

    def report(end: int, metrics: dict[str, float]) -> None:
        if on_call is not None:
            on_call(end, metrics)
        if on_log is not None and (is_save_step(config, end) or end % config.log_every == 0):
            on_log(end, metrics, clock.rate(end))

    def save(end: int, metrics: dict[str, float], judge: bool) -> None:
        """Judges, logs and saves the state, in this order: a state that is saved is logged."""
        nonlocal good
        good = _collected(program, replicated, split)
        judgement = {}
        if judge and run.monitor is not None:
            key = jax.random.fold_in(jax.random.key(config.seed), end)
            judgement = run.monitor(key, good)
        report(end, metrics | judgement)
        if checkpointer is not None:
            checkpointer.save(end, good, judgement)

    def roll_back(error: DivergenceError) -> TrainState:
        """The last good state with one more rollback, or the error if there were too many."""
        if good.rollbacks >= config.max_rollbacks:
            raise error
        state = good._replace(rollbacks=good.rollbacks + 1)
        if on_rollback is not None:
            on_rollback(error, state)
        return state

    num_calls, stopping, unread = 0, False, None
    while step < config.num_steps and not stopping:
        end = next_call_end(config, step)
        num_updates = program.place_constant(jnp.asarray(end - step, jnp.int32))
        started = time.perf_counter()
        replicated, split, device_metrics = program.step(replicated, split, (arrays, num_updates))
        if num_calls == 0 and on_compile is not None:
            on_compile(time.perf_counter() - started)
        step, num_calls = end, num_calls + 1
        stopping = _all_agree_to_stop(should_stop(), num_calls)
        try:
            # The devices work on this call while the host reads the one before.
            if run.source.load is not None and step < config.num_steps:
                arrays = _arrays_for(run.source, config, program, good.key, step)
            if unread is not None:
                report(unread[0], fetch(unread[1]))
            unread = (step, device_metrics)
            if stopping or is_save_step(config, step):
                # What is saved must be good, so here the host waits.
                metrics, unread = fetch(device_metrics), None
                save(step, metrics, judge=is_save_step(config, step))
        except DivergenceError as error:
            good, unread = roll_back(error), None
            step = int(good.step)
            replicated, split = program.place(good._replace(carry=()), good.carry)
            if run.source.load is not None:
                arrays = _arrays_for(run.source, config, program, good.key, step)
            clock = _Clock(step)
    if checkpointer is not None:
        checkpointer.wait()
    return TrainResult(_collected(program, replicated, split), step >= config.num_steps)


def _arrays_for(
    source: Source, config: TrainingConfig, program: DataParallel, key: jax.Array, step: int
) -> PyTree:
    """What the call from ``step`` on reads, on the devices; for all calls where nothing streams."""
    arrays = load_arrays(source, key, step, config.steps_per_call, config.batch_size)
    return program.place_constant(arrays)


def _collected(program: DataParallel, replicated: TrainState, split: PyTree) -> TrainState:
    """The whole state on the host."""
    state, carry = program.collect(replicated, split)
    return state._replace(carry=carry)


def is_save_step(config: TrainingConfig, step: int) -> bool:
    """Whether the state is judged and saved after so many updates."""
    return step % config.checkpoint_every == 0 or step == config.num_steps


def next_call_end(config: TrainingConfig, step: int) -> int:
    """The step at which the call from ``step`` on ends: the next multiple of what ends one."""
    periods = (config.steps_per_call, config.log_every, config.checkpoint_every)
    return min(config.num_steps, *(step - step % period + period for period in periods))


def _all_agree_to_stop(wants_to_stop: bool, num_calls: int) -> bool:
    """Several processes stop together, after the call that JAX chooses when one gets SIGTERM.

    It chooses the next number after those that it has seen, so calls are counted one by one.
    """
    if jax.process_count() == 1:
        return wants_to_stop
    return multihost_utils.reached_preemption_sync_point(num_calls)


class _Clock:
    """Updates a second between log points, the first interval (compilation) included once."""

    def __init__(self, step: int):
        self._step, self._time = step, time.perf_counter()

    def rate(self, step: int) -> float:
        now = time.perf_counter()
        rate = (step - self._step) / max(now - self._time, 1e-9)
        self._step, self._time = step, now
        return rate
