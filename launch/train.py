"""Trains a run described by a config, or goes on with one.

  python -m launch.train --config=digits --workdir=runs/digits
  python -m launch.train --config=hypergrid --workdir=runs/grid --config.side=16 --config.seed=1

The run directory receives config.json, metrics.jsonl, TensorBoard events, checkpoints, samples and
figures. The same command on the same directory goes on from the newest checkpoint; --overwrite
starts again. SIGTERM and Ctrl-C save the state before they end the run.

Several processes (hosts) run the same command with --coordinator_address, --num_processes and
--process_id, on a directory that all of them see.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from pathlib import Path

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from rich.console import Console

from ebjax.figures import training_curves
from ebjax.training import (
    Checkpointer,
    MetricsWriter,
    NonFiniteError,
    TrainingConfig,
    choose_devices,
    init_state,
    read_metrics,
    train,
)
from ebjax.types import Run, TrainState
from launch import command, runs
from launch.progress import RunProgress, print_figures, print_run_directory
from launch.runs import UserError

__all__ = ["main"]

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
flags.DEFINE_string(
    "coordinator_address", None, "host:port of process 0, for several processes.", flag_values=FLAGS
)
flags.DEFINE_integer("num_processes", 1, "How many processes train together.", flag_values=FLAGS)
flags.DEFINE_integer("process_id", 0, "Which of them this one is.", flag_values=FLAGS)


def _use_devices(flag_values: flags.FlagValues) -> None:
    """One CPU device a core (other platforms ignore it), and several processes if asked."""
    if flag_values.num_processes > 1:
        if flag_values.coordinator_address is None:
            raise UserError(
                f"num_processes is {flag_values.num_processes}, which needs --coordinator_address."
            )
        jax.distributed.initialize(
            flag_values.coordinator_address, flag_values.num_processes, flag_values.process_id
        )
    elif "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        jax.config.update("jax_num_cpu_devices", cores or 1)


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


class _StopSignal:
    """Turns SIGTERM and Ctrl-C into a question that the loop asks between calls."""

    def __init__(self) -> None:
        self.name: str | None = None
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._receive)

    def _receive(self, number, frame) -> None:
        del frame
        self.name = signal.Signals(number).name

    def __call__(self) -> bool:
        return self.name is not None


def _run(flag_values: flags.FlagValues) -> int:
    if flag_values.config is None:
        raise UserError(
            f"--config is missing; give one of {', '.join(command.builtin_configs())} or a path."
        )
    if flag_values.workdir is None:
        raise UserError("--workdir is missing; give the directory of the run.")
    settings = flag_values.config.to_dict()
    recipe = runs.find_recipe(settings.get("recipe", ""), flag_values.recipe_module)
    plan = runs.open_workdir(flag_values.workdir, recipe, settings, overwrite=flag_values.overwrite)
    config = plan.config
    _use_devices(flag_values)
    try:
        devices = choose_devices(config.batch_size, config.num_devices)
        run = recipe.build(config)
    except ValueError as error:
        raise UserError(str(error)) from None
    is_first = jax.process_index() == 0
    _barrier("checked")
    if is_first:
        runs.prepare_workdir(plan, settings["recipe"])
    _barrier("prepared")
    console = Console(quiet=flag_values.quiet or not is_first)
    plural = "device" if len(devices) == 1 else "devices"
    console.print(
        f"[bold]{settings['recipe']}[/bold] on {len(devices)} "
        f"{devices[0].platform.upper()} {plural}"
    )
    return _train(run, config, plan.path, console, quiet=flag_values.quiet or not is_first)


def _train(
    run: Run, config: TrainingConfig, workdir: Path, console: Console, *, quiet: bool
) -> int:
    is_first = jax.process_index() == 0
    checkpointer = Checkpointer(
        workdir / "checkpoints",
        config=dataclasses.asdict(config),
        keep_last=config.keep_last,
        keep_best=config.keep_best,
        best_name=run.monitor_name,
    )
    state = init_state(run, config)
    try:
        restored = checkpointer.restore(state)
    except ValueError as error:
        raise UserError(str(error)) from None
    step = 0
    if restored is not None:
        step, state = restored
        checkpointer.set_aside(step)
        is_done = step >= config.num_steps
        console.print(f"{'finished at' if is_done else 'going on from'} step {step}")
    if step > config.num_steps:
        raise UserError(
            f"config.num_steps is {config.num_steps}, but the run in {workdir} is at step {step}; "
            "give at least that, or --overwrite to start again."
        )
    writer = MetricsWriter(workdir, resume_step=step) if is_first else None
    progress = RunProgress(
        console, num_steps=config.num_steps, first_step=step, names=run.progress, quiet=quiet
    )

    def on_log(step: int, metrics: dict[str, float], steps_per_second: float) -> None:
        if writer is not None:
            writer.write(step, metrics, steps_per_second=steps_per_second)
        progress.on_log(step, metrics)

    stop_signal = _StopSignal()
    try:
        result = train(
            run,
            config,
            checkpointer=checkpointer,
            initial=state,
            on_log=on_log,
            on_call=progress.on_call,
            should_stop=stop_signal,
        )
    except NonFiniteError as error:
        progress.close()
        checkpointer.wait()
        saved = checkpointer.steps()
        kept = f"The last good checkpoint is step {saved[-1]}." if saved else "Nothing was saved."
        Console(stderr=True).print(
            f"{error} {kept} A smaller config.learning_rate often helps.", soft_wrap=True
        )
        return 1
    finally:
        progress.close()
        if writer is not None:
            writer.close()
        checkpointer.close()
    if not result.is_finished:
        console.print(
            f"stopped by {stop_signal.name or 'a preemption'} at step {int(result.state.step)}, "
            "saved; the same command goes on from there"
        )
        return 0
    if is_first:
        _finish(run, config, result.state, workdir, console)
    _barrier("finished")
    return 0


def _finish(
    run: Run, config: TrainingConfig, state: TrainState, workdir: Path, console: Console
) -> None:
    """Samples, figures of merit and pictures of a finished run."""
    sample_key, evaluate_key, figure_key = jax.random.split(jax.random.key(config.seed + 1), 3)
    samples = run.sample(sample_key, state, 500)
    np.savez(workdir / "samples.npz", **samples)
    evaluation = run.evaluate(evaluate_key, state)
    runs.write_json(workdir / "evaluation.json", evaluation)
    folder = workdir / "figures"
    folder.mkdir(exist_ok=True)
    figures = run.figures(figure_key, state, samples)
    figures["training_curves"] = training_curves(read_metrics(workdir / "metrics.jsonl"))
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png")
    print_figures(console, evaluation)
    print_run_directory(console, workdir)


COMMAND = command.Command("launch.train", __doc__ or "", FLAGS, _run, has_config=True)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    command.main(COMMAND, argv)


if __name__ == "__main__":
    main()
