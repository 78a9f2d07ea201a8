"""Trains a population whose settings change while it trains, and keeps its best members.

  python -m launch.population --config=hypergrid --log_uniform.learning_rate=1e-4,1e-1 \\
      --log_uniform.log_z_learning_rate=1e-3,1 --members=8 --rounds=10 --workdir=runs/population
  python -m launch.population --config=density --uniform.energy_regularizer=0,0.1 \\
      --metrics=kl,log_z --maximize=log_z --workdir=runs/front

  --uniform.FIELD=A,B       members differ in this field, from A to B
  --log_uniform.FIELD=A,B   likewise, even on a logarithmic scale
  --config.FIELD=VALUE      the same for all members

After each of --rounds rounds the worst quarter takes over states and settings of the best and
changes the settings. All members train in one program. With several --metrics no one is best: the
members that no other one beats in all of them are kept.

Each member that is kept has a run directory of its own below --workdir, for launch.sample and the
others; population.json has settings, figures and parents of all rounds. The same command goes on
where it was stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from ebjax.training import (
    Checkpointer,
    MetricsWriter,
    Population,
    Range,
    TrainingConfig,
    init_state,
    non_dominated,
    train_population,
)
from ebjax.training.seeds import stacked_states, unstacked_states
from ebjax.types import Recipe, Run, TrainState
from launch import command, runs
from launch.axes import read_axes, split_axes
from launch.runs import UserError
from launch.train import StopSignal, finish

__all__ = ["main"]

FLAGS = flags.FlagValues()
command.define_config(FLAGS)
flags.DEFINE_string("workdir", None, "Where the population is kept.", flag_values=FLAGS)
flags.DEFINE_integer("members", 8, "How many members.", flag_values=FLAGS)
flags.DEFINE_integer("rounds", 10, "Rounds; they divide config.num_steps.", flag_values=FLAGS)
flags.DEFINE_float("quantile", 0.25, "Share of members replaced in a round.", flag_values=FLAGS)
flags.DEFINE_string(
    "metrics",
    None,
    "Comma-separated figures that rank; by default that which chooses the best checkpoint.",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "maximize", None, "Comma-separated ones of them of which higher is better.", flag_values=FLAGS
)
flags.DEFINE_string(
    "recipe_module", None, "Python module that defines your own 'recipe'.", flag_values=FLAGS
)


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _ranges(texts: Sequence[tuple[str, str, str]], config: Any) -> dict[str, Range]:
    axes = read_axes(texts, config)
    if not axes:
        raise UserError(
            "members differ in nothing; give --uniform.FIELD=A,B or --log_uniform.FIELD=A,B."
        )
    ranges = {}
    for axis in axes:
        if axis.kind == "grid" or not isinstance(axis.values[0], float):
            raise UserError(
                f"{axis.kind}.{axis.name} cannot vary within one program; give uniform or "
                "log_uniform ranges of real numbers."
            )
        low, high = axis.values
        ranges[axis.name] = Range(low, high, is_log=axis.kind == "log_uniform")
    return ranges


def _entry(number: int, population: Population, names: Sequence[str]) -> dict[str, Any]:
    """A round as population.json has it."""

    def numbers(values: np.ndarray) -> list[float | None]:
        return [float(value) if np.isfinite(value) else None for value in values]

    return {
        "round": number,
        "step": population.step,
        "settings": {name: numbers(values) for name, values in population.settings.items()},
        "figures": {
            name: numbers(values) for name, values in zip(names, population.scores.T, strict=True)
        },
        "parents": population.parents.tolist(),
        "next_settings": {
            name: numbers(values) for name, values in population.next_settings.items()
        },
    }


def _read_rounds(path: Path, about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rounds of an earlier call.

    Raises:
      UserError: if it was another population or the file cannot be read.
    """
    if not path.exists():
        return []
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        rounds = written.pop("rounds")
        for entry in rounds:
            _population_of(entry, [])
    except Exception as error:  # Damage can be anything.
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}: {error}); remove it or choose another "
            "workdir."
        ) from None
    wanted = json.loads(json.dumps(about))
    for name, value in wanted.items():
        if written.get(name) != value:
            raise UserError(
                f"{path} is of a population with {name} {written.get(name)!r}, not {value!r}; "
                "choose another workdir."
            )
    return rounds


def _population_of(entry: Mapping[str, Any], states: Sequence[TrainState]) -> Population:
    """The inverse of ``_entry``."""

    def arrays(by_name):
        return {
            name: np.array([np.nan if value is None else value for value in values], np.float64)
            for name, values in by_name.items()
        }

    return Population(
        step=int(entry["step"]),
        settings=arrays(entry["settings"]),
        scores=np.stack(list(arrays(entry["figures"]).values()), axis=1),
        parents=np.array(entry["parents"], np.int64),
        next_settings=arrays(entry["next_settings"]),
        states=list(states),
    )


def _restored(
    checkpointer: Checkpointer, run: Run, config: TrainingConfig, rounds: list, num_members: int
) -> tuple[Population | None, list[dict[str, Any]]]:
    """Where an earlier call was, and its rounds up to there."""
    steps = [entry["step"] for entry in rounds]
    if not steps:
        return None, []
    empty = stacked_states([init_state(run, config)] * num_members)
    try:
        restored = checkpointer.restore(empty)
    except ValueError as error:
        raise UserError(str(error)) from None
    if restored is None or restored[0] not in steps:
        return None, []
    rounds = rounds[: steps.index(restored[0]) + 1]
    return _population_of(rounds[-1], unstacked_states(restored[1], num_members)), rounds


def _lineage(rounds: Sequence[Mapping[str, Any]], member: int) -> list[dict[str, float]]:
    """Settings and figures of a member and of those it descends from, round by round."""
    rows: list[dict[str, float]] = []
    for entry in reversed(rounds):
        if rows:
            member = entry["parents"][member]
        values = {**entry["figures"], **entry["settings"]}
        row = {name: each[member] for name, each in values.items() if each[member] is not None}
        rows.append({"step": entry["step"], **row})
    return rows[::-1]


def _keep(
    folder: Path,
    member: int,
    rounds: Sequence[Mapping[str, Any]],
    population: Population,
    recipe: Recipe,
    settings: Mapping[str, Any],
    module: str | None,
) -> None:
    """A member as an ordinary run directory."""
    own = {name: float(values[member]) for name, values in population.settings.items()}
    own["seed"] = settings["seed"] + member
    plan = runs.open_workdir(
        str(folder / f"member-{member}"), recipe, {**settings, **own}, overwrite=True
    )
    run = recipe.build(plan.config)
    runs.prepare_workdir(plan, settings["recipe"], module)
    checkpointer = Checkpointer(
        plan.path / "checkpoints", config=dataclasses.asdict(plan.config), best_name=None
    )
    checkpointer.save(population.step, population.states[member], {})
    checkpointer.close()
    writer = MetricsWriter(plan.path, resume_step=0)
    for row in _lineage(rounds, member):
        writer.write(int(row.pop("step")), row)
    writer.close()
    finish(run, plan.config, population.states[member], plan.path)


def _print_table(
    population: Population, names: Sequence[str], front: np.ndarray, console: Console
) -> None:
    shown = Table()
    for name in ["member", *population.settings, *names]:
        shown.add_column(name.replace("_", " "), justify="right")
    order = np.argsort(np.where(np.isnan(population.scores[:, 0]), np.inf, population.scores[:, 0]))
    for i in order:
        settings = [f"{values[i]:.3g}" for values in population.settings.values()]
        scores = [f"{score:.4g}" for score in population.scores[i]]
        shown.add_row(f"{i}{' *' if front[i] else ''}", *settings, *scores)
    console.print(shown)
    console.print("* kept, as member-NUMBER")


class _Call(NamedTuple):
    """What was asked for, checked."""

    folder: Path
    recipe: Recipe
    config: TrainingConfig
    settings: dict[str, Any]
    ranges: dict[str, Range]
    figures: list[tuple[str, float]]
    about: dict[str, Any]


def _checked(flag_values: flags.FlagValues, texts: Sequence[tuple[str, str, str]]) -> _Call:
    settings = flag_values.config
    command.required(flag_values, "population")
    ranges = _ranges(texts, settings)
    folder = runs.find_workdir(flag_values.workdir)
    recipe = runs.find_recipe(settings.recipe, flag_values.recipe_module)
    config = runs.make_config(recipe, settings.to_dict())
    names = _names(flag_values.metrics)
    if not names:
        monitored = _built(recipe, config).monitor_name
        if monitored is None:
            raise UserError("--metrics is missing; this recipe does not say what makes a run good.")
        names = [monitored]
    maximized = _names(flag_values.maximize)
    for name in maximized:
        if name not in names:
            raise UserError(f"maximize is {name!r}; it must be of the metrics {', '.join(names)}.")
    about = {
        "settings": {"recipe": settings.recipe, **dataclasses.asdict(config)},
        "ranges": {name: list(each) for name, each in ranges.items()},
        "members": flag_values.members,
        "rounds_wanted": flag_values.rounds,
        "quantile": flag_values.quantile,
        "metrics": names,
        "maximize": maximized,
    }
    figures = [(name, -1.0 if name in maximized else 1.0) for name in names]
    return _Call(folder, recipe, config, settings.to_dict(), ranges, figures, about)


def _built(recipe: Recipe, config: TrainingConfig) -> Run:
    try:
        return recipe.build(config)
    except ValueError as error:
        raise UserError(str(error)) from None


def _run(flag_values: flags.FlagValues, texts: Sequence[tuple[str, str, str]]) -> int:
    call = _checked(flag_values, texts)
    with runs.lock_workdir(call.folder):
        return _train(call, flag_values)


def _train(call: _Call, flag_values: flags.FlagValues) -> int:
    """Trains from where an earlier call was, and keeps the best."""
    folder, recipe, config, num_members = call.folder, call.recipe, call.config, flag_values.members
    names = [name for name, _ in call.figures]
    signs = np.array([sign for _, sign in call.figures])
    path = folder / "population.json"
    rounds = _read_rounds(path, call.about)
    console = Console(width=None if sys.stdout.isatty() else 160)
    checkpointer = Checkpointer(folder / "checkpoints", config=dataclasses.asdict(config))
    initial, rounds = _restored(checkpointer, _built(recipe, config), config, rounds, num_members)
    checkpointer.set_aside(0 if initial is None else initial.step)

    def on_round(number: int, population: Population) -> None:
        rounds.append(_entry(number, population, names))
        # The file first: a state without its settings cannot go on.
        runs.write_json(path, {**call.about, "rounds": rounds})
        checkpointer.save(population.step, stacked_states(population.states), {})
        best = np.nanmin(population.scores * signs, axis=0) * signs
        told = "  ".join(f"{name} {value:.4g}" for name, value in zip(names, best, strict=True))
        num_copied = int(np.sum(population.parents != np.arange(num_members)))
        console.print(
            f"round {number}/{flag_values.rounds}, step {population.step}: best {told}, "
            f"{num_copied} replaced",
            soft_wrap=True,
            highlight=False,
        )

    try:
        with StopSignal() as stop_signal:
            population = train_population(
                recipe,
                config,
                call.ranges,
                num_members=num_members,
                num_rounds=flag_values.rounds,
                figures=call.figures,
                quantile=flag_values.quantile,
                initial=initial,
                on_round=on_round,
                should_stop=stop_signal,
            )
    except ValueError as error:
        raise UserError(str(error)) from None
    finally:
        checkpointer.close()
    if population.step < config.num_steps:
        return 143
    front = non_dominated(population.scores * signs)
    _print_table(population, names, front, console)
    for member in np.flatnonzero(front).tolist():
        _keep(folder, member, rounds, population, recipe, call.settings, flag_values.recipe_module)
    return 0


COMMAND = command.Command(
    "launch.population",
    __doc__ or "",
    FLAGS,
    functools.partial(_run, texts=()),
    has_config=True,
)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    axes, others = split_axes(sys.argv if argv is None else argv)
    run = functools.partial(_run, texts=axes)
    command.main(dataclasses.replace(COMMAND, run=run), others)


if __name__ == "__main__":
    main()
