"""Trains the rows of a table over several seeds and prints the table.

  python -m launch.reproduce --table=jarzynski
  python -m launch.reproduce --table=objectives_2d --only=pcd --seeds=3 --json=figures.json

Each row is a config with some fields changed; each seed of it is one launch.train in a run
directory of its own under --workdir, so a table that was interrupted goes on where it was, and
every run can be looked at. A run that diverges or fails is counted and not left out of sight. A
figure with a bar ends the output as

  ROW FIGURE=X at most Y: reached
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console
from rich.table import Table as RichTable

from launch import command, runs
from launch.runs import UserError, read_figures
from launch.schedule import Job, Outcome, flags_of, mean_and_deviation, run_jobs
from launch.tables import TABLES, Row, Table

__all__ = ["main", "reproduce"]

FLAGS = flags.FlagValues()
flags.DEFINE_string("table", None, f"Which table: {', '.join(TABLES)}.", flag_values=FLAGS)
flags.DEFINE_integer("seeds", 0, "Seeds of each row; 0: as the table says.", flag_values=FLAGS)
flags.DEFINE_string(
    "only", None, "Comma-separated parts of names: the rows that have one.", flag_values=FLAGS
)
flags.DEFINE_string("workdir", "runs/tables", "Where the runs are kept.", flag_values=FLAGS)
flags.DEFINE_string(
    "data_path", None, "The file that the table's data is in, if it needs one.", flag_values=FLAGS
)
flags.DEFINE_integer(
    "jobs", 1, "Runs at a time; with several, each has one CPU device.", flag_values=FLAGS
)
flags.DEFINE_string("json", None, "File to write all figures to as well.", flag_values=FLAGS)


def _job(row: Row, seed: int, folder: Path, data_path: str | None) -> Job:
    settings = {**row.settings, "seed": seed}
    if data_path is not None:
        settings["data_path"] = data_path
    workdir = folder / f"{row.name}-{seed}"
    if (workdir / "config.json").exists():
        _check_settings(settings, workdir)
    return Job(
        row.name,
        seed,
        workdir,
        (f"--config={row.config}", *row.flags, *flags_of(settings)),
        is_finished=read_figures(workdir) is not None,
    )


def _check_settings(settings: Mapping[str, Any], workdir: Path) -> None:
    """A run that is there must have been made with what its row means today.

    Raises:
      UserError: naming the first setting that differs.
    """
    saved = runs.read_config(workdir)
    recipe = runs.find_recipe(saved["recipe"], saved.get("recipe_module"))
    old = runs.make_config(recipe, saved, origin=f"{workdir / 'config.json'}: ")
    new = runs.make_config(recipe, settings)
    length = ["num_steps"] if old.num_steps != new.num_steps else []
    for name in (*runs.changed_settings(old, new), *length):
        raise UserError(
            f"the run in {workdir} was made with {name} {getattr(old, name)!r}, and its row "
            f"has {getattr(new, name)!r}; move it away, or give another --workdir."
        )


def reproduce(
    table: Table,
    *,
    folder: Path,
    seeds: int,
    console: Console,
    only: tuple[str, ...] = (),
    data_path: str | None = None,
    jobs: int = 1,
) -> dict[str, Any]:
    """Runs a table, prints it, and returns the figures of every run and of every bar."""
    rows = [row for row in table.rows if not only or any(part in row.name for part in only)]
    if not rows:
        names = ", ".join(row.name for row in table.rows)
        raise UserError(f"only is {','.join(only)!r}, which is in none of the rows {names}.")
    outcomes = run_jobs(
        [_job(row, seed, folder, data_path) for seed in range(seeds) for row in rows],
        folder=folder,
        num_parallel=jobs,
        console=console,
        names=table.columns,
    )
    _print_table(table, rows, outcomes, console)
    bars = _print_bars(table, rows, outcomes, console)
    for outcome in outcomes:
        if outcome.figures is None:
            console.print(
                f"{outcome.row}, seed {outcome.seed}: {outcome.error}", soft_wrap=True, markup=False
            )
    return {"runs": [outcome._asdict() for outcome in outcomes], "bars": bars}


def _values(outcomes: list[Outcome], row: str, name: str) -> list[float]:
    return [
        outcome.figures[name]
        for outcome in outcomes
        if outcome.row == row and outcome.figures is not None and name in outcome.figures
    ]


def _print_table(table: Table, rows: list[Row], outcomes: list[Outcome], console: Console) -> None:
    shown = RichTable(title=table.about, title_justify="left")
    shown.add_column("row", no_wrap=True)
    shown.add_column("finished", justify="right", no_wrap=True)
    for name in table.columns:
        shown.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        own = [outcome for outcome in outcomes if outcome.row == row.name]
        finished = sum(outcome.figures is not None for outcome in own)
        cells = [mean_and_deviation(_values(outcomes, row.name, name)) for name in table.columns]
        shown.add_row(row.name, f"{finished}/{len(own)}", *cells)
    console.print(shown)
    console.print("Mean and standard deviation over the seeds that finished.")


def _print_bars(
    table: Table, rows: list[Row], outcomes: list[Outcome], console: Console
) -> list[dict[str, Any]]:
    """The means that have a bar; a row of which no seed finished has not reached it."""
    results = []
    names = {row.name for row in rows}
    for bar in table.bars:
        if bar.row not in names:
            continue
        values = _values(outcomes, bar.row, bar.figure)
        mean = statistics.fmean(values) if values else float("nan")
        is_reached = bar.low <= mean <= bar.high
        limits = [
            *([f"at least {bar.low:g}"] if bar.low > -float("inf") else []),
            *([f"at most {bar.high:g}"] if bar.high < float("inf") else []),
        ]
        verdict = "reached" if is_reached else "NOT REACHED"
        line = f"{bar.row} {bar.figure}={mean:.4g} {' and '.join(limits)}: {verdict}"
        console.print(line, highlight=False)
        results.append({**bar._asdict(), "mean": mean, "is_reached": is_reached})
    return results


def _run(flag_values: flags.FlagValues) -> int:
    if flag_values.table not in TABLES:
        raise UserError(f"table is {flag_values.table!r}; it must be one of {', '.join(TABLES)}.")
    for name, minimum in (("seeds", 0), ("jobs", 1)):
        if flag_values.get_flag_value(name, minimum) < minimum:
            raise UserError(f"{name} is {flag_values[name].value}; it must be at least {minimum}.")
    json_path = None if flag_values.json is None else command.output_file(flag_values, "json")
    table = TABLES[flag_values.table]
    if table.needs_data and flag_values.data_path is None:
        raise UserError(f"--data_path is missing; the table {flag_values.table} needs a file.")
    figures = reproduce(
        table,
        folder=runs.find_workdir(flag_values.workdir) / flag_values.table,
        seeds=flag_values.seeds or table.seeds,
        console=Console(width=None if sys.stdout.isatty() else 160),
        only=tuple(flag_values.only.split(",")) if flag_values.only else (),
        data_path=flag_values.data_path,
        jobs=flag_values.jobs,
    )
    if json_path is not None:
        runs.write_json(json_path, {"table": flag_values.table, **figures})
    return 0 if all(bar["is_reached"] for bar in figures["bars"]) else 1


COMMAND = command.Command("launch.reproduce", __doc__ or "", FLAGS, _run)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    command.main(COMMAND, argv)


if __name__ == "__main__":
    main()
