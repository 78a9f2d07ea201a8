"""Trains a run described by a config, or goes on with one.

  python -m launch.train --config=digits --workdir=runs/digits
  python -m launch.train --config=hypergrid --workdir=runs/grid --config.side=16 --config.seed=1

The run directory receives config.json, metrics.jsonl, TensorBoard events, checkpoints, samples and
figures. The same command on the same directory goes on from the newest checkpoint; --overwrite
starts again. SIGTERM and Ctrl-C save the state before they end the run. Only one process (or group
of processes) trains in a directory at a time; commands that only look may do so meanwhile.

Several processes (hosts) run the same command with --coordinator_address, --num_processes and
--process_id, on a directory that all of them see.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from rich.console import Console

from ebjax.training import (
    Checkpointer,
    DivergenceError,
    MetricsWriter,
    TrainingConfig,
    choose_devices,
    init_state,
    read_metrics,
    train,
)
from ebjax.types import Run, TrainState
from launch import command, runs
from launch.energy_use import EnergyMeter, check_tracking
from launch.processes import agreed, barrier, connect, is_of_jax, leave, watching_each_other
from launch.progress import RunProgress, print_figures, print_run_directory
from launch.runs import UserError

__all__ = ["StopSignal", "finish", "main"]

FLAGS = flags.FlagValues()
command.define_config(FLAGS)
flags.DEFINE_string("workdir", None, "Run directory, made if missing.", flag_values=FLAGS)
flags.DEFINE_bool(
    "overwrite", False, "Remove the run in workdir and start again.", flag_values=FLAGS
)
flags.DEFINE_bool("quiet", False, "Print nothing but errors.", flag_values=FLAGS)
flags.DEFINE_string(
    "recipe_module", None, "Python module that defines your own 'recipe'.", flag_values=FLAGS
)
flags.DEFINE_bool(
    "track_energy", False, "Measure the energy that is used, by codecarbon.", flag_values=FLAGS
)
flags.DEFINE_string(
    "coordinator_address", None, "host:port of process 0, for several processes.", flag_values=FLAGS
)
flags.DEFINE_integer("num_processes", 1, "How many processes train together.", flag_values=FLAGS)
flags.DEFINE_integer("process_id", 0, "Which of them this one is.", flag_values=FLAGS)


def _use_devices(flag_values: flags.FlagValues) -> None:
    """One CPU device a core (other platforms ignore it), or several processes if asked."""
    connect(flag_values.coordinator_address, flag_values.num_processes, flag_values.process_id)
    if flag_values.num_processes > 1:
        return
    is_chosen = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not is_chosen and jax.config.jax_num_cpu_devices < 0:  # type: ignore[attr-defined]
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        # Too late where JAX has started already (in a notebook); it then keeps its devices.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", cores or 1)


class StopSignal:
    """Turns SIGTERM and Ctrl-C into a question that the loop asks between calls.

    A second Ctrl-C interrupts at once. Several processes stop by JAX's own preemption service.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number, frame) -> None:
        del frame
        self.name = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __call__(self) -> bool:
        """Whether a signal has come."""
        return self.name is not None


class _Start(NamedTuple):
    """A checked call: what is trained and from where, with nothing written yet."""

    plan: runs.WorkdirPlan
    recipe_name: str
    run: Run
    num_devices: int


def _checked_call(flag_values: flags.FlagValues) -> _Start:
    """What a call asks for, where nothing in it is wrong."""
    command.required(flag_values, "run")
    settings = flag_values.config.to_dict()
    if not isinstance(settings.get("recipe"), str):
        raise UserError(f"config.recipe is {settings.get('recipe')!r}; it must name a recipe.")
    recipe = runs.find_recipe(settings["recipe"], flag_values.recipe_module)
    plan = runs.open_workdir(flag_values.workdir, recipe, settings, overwrite=flag_values.overwrite)
    if flag_values.track_energy:
        check_tracking(plan.path)
    try:
        devices = choose_devices(plan.config.batch_size, plan.config.num_devices)
        run = recipe.build(plan.config)
    except ValueError as error:
        raise UserError(str(error)) from None
    return _Start(plan, settings["recipe"], run, len(devices))


def _lock(start: _Start, held: contextlib.ExitStack) -> None:
    """Keeps other processes out of the run directory, which the plan must still fit."""
    plan = start.plan
    held.enter_context(runs.lock_workdir(plan.path))
    is_there = (plan.path / "config.json").exists()
    if is_there != (plan.is_resumed or plan.must_clear):
        raise UserError(f"workdir is {plan.path}, which was changed meanwhile; call again.")


def _checked_state(start: _Start, held: contextlib.ExitStack) -> TrainState:
    """The state that training goes on from, which may be its first."""
    plan, config = start.plan, start.plan.config
    if jax.process_index() == 0:
        _lock(start, held)
    state = runs.restore(plan.path, start.run, config) if plan.is_resumed else None
    if state is None:
        return init_state(start.run, config)
    if state.step > config.num_steps:
        raise UserError(
            f"config.num_steps is {config.num_steps}, but the run in {plan.path} is at step "
            f"{state.step}; give at least that, or --overwrite to start again."
        )
    metrics = plan.path / "metrics.jsonl"
    try:
        if metrics.exists():
            read_metrics(metrics)
    except ValueError as error:
        raise UserError(str(error)) from None
    return state


def _run(flag_values: flags.FlagValues) -> int:
    _use_devices(flag_values)
    with StopSignal() as stop_signal, contextlib.ExitStack() as held:
        held.enter_context(watching_each_other(flag_values.coordinator_address))
        start = agreed(
            lambda: _checked_call(flag_values), lambda start: repr((start.plan, start.num_devices))
        )
        state = agreed(lambda: _checked_state(start, held), lambda state: str(state.step))
        try:
            return _carry_out(flag_values, start, state, stop_signal)
        except Exception as error:
            text = " ".join(str(error).split())[:400]
            is_lost = is_of_jax(error)
            if is_lost and jax.process_count() > 1 and "RESOURCE_EXHAUSTED" not in text:
                text = f"another process has ended or cannot be reached ({text})"
            text += (
                f"; what the run in {start.plan.path} had saved is there, and the same command "
                "goes on from it"
            )
            is_known = is_lost or isinstance(error, OSError | UserError)
            if jax.process_count() > 1:
                leave(text if is_known else traceback.format_exc())
            if is_known and not isinstance(error, UserError):
                raise OSError(text) from None
            raise


def _carry_out(
    flag_values: flags.FlagValues, start: _Start, state: TrainState, stop_signal: StopSignal
) -> int:
    """Prepares the run directory and trains."""
    is_first = jax.process_index() == 0
    if is_first:
        runs.prepare_workdir(start.plan, start.recipe_name, flag_values.recipe_module)
    barrier("prepared")
    console = Console(quiet=flag_values.quiet or not is_first)
    plural = "device" if start.num_devices == 1 else "devices"
    console.print(
        f"[bold]{start.recipe_name}[/bold] on {start.num_devices} "
        f"{jax.devices()[0].platform.upper()} {plural}"
    )
    is_tracked = flag_values.track_energy and is_first
    with EnergyMeter(start.plan.path) if is_tracked else contextlib.nullcontext():
        return _train(start.run, start.plan, state, console, stop_signal)


def _train(
    run: Run,
    plan: runs.WorkdirPlan,
    state: TrainState,
    console: Console,
    stop_signal: StopSignal,
) -> int:
    config, workdir, step = plan.config, plan.path, int(state.step)
    is_first = jax.process_index() == 0
    checkpointer = Checkpointer(
        workdir / "checkpoints",
        config=dataclasses.asdict(config),
        keep_last=config.keep_last,
        keep_best=config.keep_best,
        best_name=run.monitor_name,
    )
    if step:
        checkpointer.set_aside(step)
        is_done = step == config.num_steps
        console.print(f"{'finished at' if is_done else 'going on from'} step {step}")
    writer = (
        MetricsWriter(workdir, resume_step=step, log_every=config.log_every) if is_first else None
    )
    progress = RunProgress(console, num_steps=config.num_steps, first_step=step, names=run.progress)

    def on_log(step: int, metrics: dict[str, float], steps_per_second: float) -> None:
        if writer is not None:
            writer.write(step, metrics, steps_per_second=steps_per_second)
        progress.on_log(step, metrics)

    def on_rollback(error: DivergenceError, state: TrainState) -> None:
        step, count = int(state.step), int(state.rollbacks)
        if writer is not None:
            writer.rewind(step)
        share = config.rollback_factor**count
        console.print(
            f"{error} Going back to step {step} with {share:.3g} of the learning rate "
            f"(rollback {count} of {config.max_rollbacks}).",
            soft_wrap=True,
            highlight=False,
        )

    try:
        result = train(
            run,
            config,
            checkpointer=checkpointer,
            on_rollback=on_rollback,
            initial=state,
            on_log=on_log,
            on_call=progress.on_call,
            on_compile=lambda seconds: console.print(f"compiled in {seconds:.1f} s"),
            should_stop=stop_signal,
        )
    except DivergenceError as error:
        progress.close()
        checkpointer.wait()
        saved = checkpointer.steps()
        kept = f"The last good checkpoint is step {saved[-1]}." if saved else "Nothing was saved."
        used = " All rollbacks are used up." if config.max_rollbacks else ""
        text = f"{COMMAND.name}: {error}{used} {kept} A smaller learning rate often helps."
        print(text, file=sys.stderr)
        return 1
    finally:
        # All of them, also where a full disk ends one with an error.
        with contextlib.ExitStack() as closed:
            closed.callback(checkpointer.close)
            if writer is not None:
                closed.callback(writer.close)
            closed.callback(progress.close)
    if not result.is_finished:
        console.print(
            f"stopped by {stop_signal.name or 'a preemption'} at step {int(result.state.step)}, "
            "saved; the same command goes on from there"
        )
        return 0
    if is_first:
        print_figures(console, finish(run, config, result.state, workdir))
        print_run_directory(console, workdir)
    barrier("finished")
    return 0


def finish(run: Run, config: TrainingConfig, state: TrainState, workdir: Path) -> dict[str, float]:
    """Writes samples, pictures and figures of merit of a finished run; returns the last."""
    from ebjax.figures import training_curves  # matplotlib is slow to import

    sample_key, evaluate_key, figure_key = jax.random.split(jax.random.key(config.seed + 1), 3)
    samples = run.sample(sample_key, state, 500)
    with runs.replacing(workdir / "samples.npz") as path, path.open("wb") as file:
        np.savez(file, **samples)
    evaluation = run.evaluate(evaluate_key, state)
    folder = workdir / "figures"
    folder.mkdir(exist_ok=True)
    figures = run.figures(figure_key, state, samples)
    figures["training_curves"] = training_curves(read_metrics(workdir / "metrics.jsonl"))
    for name, figure in figures.items():
        with runs.replacing(folder / f"{name}.png") as path:
            figure.savefig(path, format="png")
    # Last, for it says that the run is finished.
    runs.write_json(workdir / "evaluation.json", evaluation)
    return evaluation


COMMAND = command.Command("launch.train", __doc__ or "", FLAGS, _run, has_config=True)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    command.main(COMMAND, argv)


if __name__ == "__main__":
    main()
