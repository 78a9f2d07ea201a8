"""Trains a config at many settings, each with several seeds, and prints which are best.

  python -m launch.sweep --config=hypergrid --grid.learning_rate=1e-3,3e-3 --grid.side=8,16 \\
      --seeds=3 --workdir=runs/sweep
  python -m launch.sweep --config=density --log_uniform.learning_rate=1e-4,1e-2 \\
      --uniform.energy_regularizer=0,0.1 --trials=20 --metric=kl --workdir=runs/search

  --grid.FIELD=A,B,...      each of these values, with each of the other fields'
  --uniform.FIELD=A,B       a value from A to B in each of --trials
  --log_uniform.FIELD=A,B   likewise, even on a logarithmic scale; numbers have three digits
  --config.FIELD=VALUE      the same in all runs

Each run is a launch.train in a directory of its own below --workdir, named by its settings. The
same command goes on where it was: what is finished is not repeated, what was stopped goes on, and
more values, trials or seeds add runs. The table has the best mean over seeds first, settings of
which a run failed last; sweep.json in --workdir has all figures of all runs.

With --together one program of this process trains all seeds of a setting.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags
from rich.console import Console
from rich.table import Table

from ebjax.training import read_metrics
from ebjax.types import Recipe
from launch import command, runs
from launch.axes import Axis, draw, read_axes, split_axes
from launch.runs import UserError, read_figures
from launch.schedule import Job, Outcome, flags_of, mean_and_deviation, run_jobs
from launch.together import train_together

__all__ = ["main", "points_of"]

FLAGS = flags.FlagValues()
command.define_config(FLAGS)
flags.DEFINE_string("workdir", None, "Where the runs are kept.", flag_values=FLAGS)
flags.DEFINE_integer("seeds", 1, "Seeds of each setting, from config.seed on.", flag_values=FLAGS)
flags.DEFINE_integer("trials", 10, "How often random fields are drawn.", flag_values=FLAGS)
flags.DEFINE_integer("search_seed", 0, "Seed of these draws.", flag_values=FLAGS)
flags.DEFINE_string(
    "metric",
    None,
    "The figure that ranks, of launch.evaluate or the last log point; by default that which "
    "chooses the best checkpoint.",
    flag_values=FLAGS,
)
flags.DEFINE_bool("maximize", False, "Whether higher is better.", flag_values=FLAGS)
flags.DEFINE_integer(
    "jobs", 1, "Runs at a time; with several, each has one CPU device.", flag_values=FLAGS
)
flags.DEFINE_bool(
    "together",
    False,
    "Train the seeds of a setting in one program on one device, where the recipe permits it.",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "recipe_module", None, "Python module that defines your own 'recipe'.", flag_values=FLAGS
)


def points_of(axes: Sequence[Axis], *, trials: int, seed: int) -> list[dict[str, Any]]:
    """The settings of a sweep: each draw of the random fields with each point of the grid.

    A draw depends on its number, its field and the seed only, so that more trials add to fewer.

    >>> points_of([Axis("grid", "side", (8, 16)), Axis("grid", "dim", (2,))], trials=1, seed=0)
    [{'side': 8, 'dim': 2}, {'side': 16, 'dim': 2}]
    """
    random = [axis for axis in axes if axis.kind != "grid"]
    grid = [[(axis.name, value) for value in axis.values] for axis in axes if axis.kind == "grid"]
    draws = [
        {axis.name: draw(axis, trial, seed) for axis in random}
        for trial in range(trials if random else 1)
    ]
    return [{**dict(point), **draw} for draw in draws for point in itertools.product(*grid)]


def _name_of(point: Mapping[str, Any]) -> str:
    """The settings of a point as the name of a folder."""

    def shown(value: Any) -> str:
        text = "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
        return re.sub(r"[^\w.+-]", "_", text)

    return ",".join(f"{name}={shown(value)}" for name, value in point.items()) or "run"


def _jobs_of(
    flag_values: flags.FlagValues,
    recipe: Recipe,
    points: Mapping[str, Mapping[str, Any]],
    folder: Path,
) -> tuple[list[Job], list[runs.WorkdirPlan]]:
    """The runs of all points and seeds, each checked against what its directory holds."""
    config, module = flag_values.config, flag_values.recipe_module
    given = [name.partition(".")[2] for name in flag_values if name.startswith("config.")]
    fixed = {name: config[name] for name in given if name not in ("seed", "recipe")}
    common = [f"--config={config_flags.get_config_filename(flag_values['config'])}"]
    common += [f"--recipe_module={module}"] if module else []
    jobs, plans = [], []
    for i in range(flag_values.seeds):
        for name, point in points.items():
            varied = {**point, "seed": config.seed + i}
            workdir = folder / f"{name}-{config.seed + i}"
            settings = {**config.to_dict(), **varied}
            plan = runs.open_workdir(str(workdir), recipe, settings, overwrite=False)
            is_finished = plan.is_resumed and read_figures(workdir) is not None
            if is_finished:
                is_finished = runs.read_config(workdir).get("num_steps") == plan.config.num_steps
            arguments = (*common, *flags_of({**fixed, **varied}))
            jobs.append(Job(name, config.seed + i, workdir, arguments, is_finished))
            plans.append(plan)
    return jobs, plans


def _all_figures(workdir: Path) -> dict[str, float]:
    """Figures of merit, and of the last log point what is not among them."""
    try:
        rows = read_metrics(workdir / "metrics.jsonl")
    except ValueError as error:
        raise UserError(str(error)) from None
    return {**(rows[-1] if rows else {}), **(read_figures(workdir) or {})}


def _summary(
    points: Mapping[str, Mapping[str, Any]],
    jobs: Sequence[Job],
    outcomes: Sequence[Outcome],
    metric: str,
    *,
    maximize: bool,
) -> list[dict[str, Any]]:
    """A row for each point, best first."""
    by_run = {(outcome.row, outcome.seed): outcome for outcome in outcomes}
    rows = []
    for name, point in points.items():
        entries, values = [], []
        for job in (job for job in jobs if job.row == name):
            entry: dict[str, Any] = {"seed": job.seed, "workdir": str(job.workdir)}
            outcome = by_run[name, job.seed]
            if outcome.figures is None:
                entries.append({**entry, "error": outcome.error})
                continue
            figures = _all_figures(job.workdir)
            if metric not in figures:
                raise UserError(
                    f"metric is {metric!r}; the runs have the figures {', '.join(figures)}."
                )
            if math.isfinite(figures[metric]):
                values.append(figures[metric])
            entries.append({**entry, "figures": figures})
        rows.append(
            {
                "settings": dict(point),
                "mean": statistics.fmean(values) if values else None,
                "deviation": statistics.stdev(values) if len(values) > 1 else None,
                "values": values,
                "runs": entries,
            }
        )

    def rank(row):
        if not row["values"]:
            return (2, 0.0)
        return (len(row["values"]) < len(row["runs"]), row["mean"] * (-1 if maximize else 1))

    return sorted(rows, key=rank)


def _print_table(rows: Sequence[Mapping[str, Any]], metric: str, console: Console) -> None:
    shown = Table()
    names = list(dict.fromkeys(name for row in rows for name in row["settings"]))
    for name in [*names, "finished", metric]:
        shown.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        settings = [str(row["settings"].get(name, "")) for name in names]
        finished = f"{len(row['values'])}/{len(row['runs'])}"
        shown.add_row(*settings, finished, mean_and_deviation(row["values"]))
    console.print(shown)
    if any(len(row["runs"]) > 1 for row in rows):
        console.print("Mean and standard deviation over the seeds that finished.")


def _default_metric(config: ConfigDict, recipe: Recipe) -> str:
    """What chooses the best checkpoint of a run."""
    settings = {name: value for name, value in config.to_dict().items() if name != "recipe"}
    try:
        name = recipe.build(runs.make_config(recipe, settings)).monitor_name
    except ValueError as error:
        raise UserError(str(error)) from None
    if name is None:
        raise UserError("--metric is missing; this recipe does not say what makes a run good.")
    return name


def _run(flag_values: flags.FlagValues, texts: Sequence[tuple[str, str, str]]) -> int:
    config = flag_values.config
    command.required(flag_values, "sweep")
    for name, minimum in (("seeds", 1), ("trials", 1), ("jobs", 1), ("search_seed", 0)):
        value: Any = flag_values[name].value
        if value < minimum:
            raise UserError(f"{name} is {value}; it must be at least {minimum}.")
    axes = read_axes(texts, config)
    if not axes and flag_values.seeds == 1:
        raise UserError(
            "nothing varies; give --grid.FIELD=A,B or another of the flags that --help names."
        )
    points: dict[str, dict[str, Any]] = {}
    for point in points_of(axes, trials=flag_values.trials, seed=flag_values.search_seed):
        if points.setdefault(_name_of(point), point) != point:
            raise UserError(
                f"{point} and {points[_name_of(point)]} would share the folder {_name_of(point)}; "
                "give values that differ in letters and digits."
            )
    folder = runs.find_workdir(flag_values.workdir)
    recipe = runs.find_recipe(config.recipe, flag_values.recipe_module)
    jobs, plans = _jobs_of(flag_values, recipe, points, folder)
    metric = flag_values.metric or _default_metric(config, recipe)
    console = Console(width=None if sys.stdout.isatty() else 160)
    if flag_values.together:
        for name in points:
            unfinished = [
                plan
                for job, plan in zip(jobs, plans, strict=True)
                if job.row == name and not job.is_finished
            ]
            if train_together(
                unfinished, recipe, config.recipe, flag_values.recipe_module, console=console
            ):
                return 143
        jobs, _ = _jobs_of(flag_values, recipe, points, folder)
    outcomes = run_jobs(
        jobs, folder=folder, num_parallel=flag_values.jobs, console=console, names=(metric,)
    )
    rows = _summary(points, jobs, outcomes, metric, maximize=flag_values.maximize)
    _print_table(rows, metric, console)
    for outcome in outcomes:
        if outcome.figures is None:
            console.print(
                f"{outcome.row}, seed {outcome.seed}: {outcome.error}", soft_wrap=True, markup=False
            )
    about = {"recipe": config.recipe, "metric": metric, "maximize": flag_values.maximize}
    runs.write_json(folder / "sweep.json", {**about, "rows": rows})
    return 0 if any(row["values"] for row in rows) else 1


COMMAND = command.Command(
    "launch.sweep", __doc__ or "", FLAGS, functools.partial(_run, texts=()), has_config=True
)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    axes, others = split_axes(sys.argv if argv is None else argv)
    run = functools.partial(_run, texts=axes)
    command.main(dataclasses.replace(COMMAND, run=run), others)


if __name__ == "__main__":
    main()
