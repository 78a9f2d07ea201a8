"""Run directories and recipes: what a command needs to find a run again."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections

from ebjax.training import Checkpointer, TrainingConfig, init_state
from ebjax.types import Recipe, Run, TrainState

__all__ = [
    "LoadedRun",
    "UserError",
    "default_config",
    "find_recipe",
    "load_run",
    "open_workdir",
    "write_json",
]

RECIPES = {
    "digits": "ebjax.recipes.digits",
    "hypergrid": "gflownet.recipes.hypergrid",
}

# What a run directory holds, in the order in which a person is told of it.
CONTENTS = {
    "config.json": "all settings; restores the run with no other input",
    "metrics.jsonl": "one JSON object a log point",
    "tensorboard": "the same as TensorBoard events, and speed",
    "checkpoints": "saved states; a second launch.train goes on from the newest",
    "damaged_checkpoints": "states that could not be read, set aside",
    "evaluation.json": "figures of merit at the end of the run",
    "samples.npz": "samples drawn at the end of the run",
    "figures": "pictures of samples, energies and training",
}


class UserError(Exception):
    """Something that the user can mend; its text is one sentence for them."""


def find_recipe(name: str, module: str | None = None) -> Recipe:
    """The recipe of a config: a built-in one by name, or ``module.recipe`` of a user's module.

    Raises:
      UserError: if there is no such recipe.
    """
    if module is None and name not in RECIPES:
        raise UserError(
            f"recipe is {name!r}; it must be one of {', '.join(RECIPES)}, or --recipe_module must "
            "name the Python module that defines it."
        )
    module = module or RECIPES[name]
    try:
        recipe = importlib.import_module(module).recipe
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"recipe_module is {module!r}; it must be an importable module that defines 'recipe' "
            f"({error})."
        ) from None
    return recipe


def default_config(name: str, module: str | None = None) -> ml_collections.ConfigDict:
    """The defaults of a recipe in the form that command-line flags override.

    >>> default_config("hypergrid").side
    8
    """
    recipe = find_recipe(name, module)
    return ml_collections.ConfigDict({"recipe": name, **dataclasses.asdict(recipe.config())})


def make_config(recipe: Recipe, settings: Mapping[str, Any]) -> TrainingConfig:
    """Checks settings and makes them the recipe's config.

    Raises:
      UserError: naming the field, its value and what is accepted.
    """
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    settings.pop("recipe", None)
    known = [field.name for field in dataclasses.fields(recipe.config)]
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise UserError(f"config has no field {unknown[0]!r}; its fields are {', '.join(known)}.")
    try:
        return recipe.config(**settings)
    except ValueError as error:
        raise UserError(str(error)) from None


class WorkdirPlan(NamedTuple):
    """What training will do with a run directory: looked at, nothing written yet.

    Attributes:
      path: the directory.
      config: the settings, those of the old run where the new ones leave them open.
      must_clear: whether an old run is in it and is to be removed.
      is_resumed: whether an old run is in it and goes on.
    """

    path: Path
    config: TrainingConfig
    must_clear: bool
    is_resumed: bool


def open_workdir(
    workdir: str, recipe: Recipe, settings: Mapping[str, Any], *, overwrite: bool
) -> WorkdirPlan:
    """Looks at a run directory and decides whether training may write there.

    Raises:
      UserError: if it is not a directory, cannot be written, holds other things than a run, or
        holds a run with other settings (other than those that may change when a run goes on).
    """
    path = Path(workdir).expanduser().absolute()
    parent = next(p for p in (path, *path.parents) if p.exists())
    if not parent.is_dir():
        raise UserError(f"workdir is {workdir}; {parent} is a file, and a run needs a folder.")
    if not os.access(parent, os.W_OK | os.X_OK | os.R_OK):
        raise UserError(f"workdir is {workdir}; {parent} cannot be written, choose another folder.")
    config = make_config(recipe, settings)
    if not path.exists() or not any(path.iterdir()):
        return WorkdirPlan(path, config, must_clear=False, is_resumed=False)
    if not (path / "config.json").exists():
        foreign = sorted(p.name for p in path.iterdir())
        raise UserError(
            f"workdir is {workdir}, which holds no run (no config.json) but other files such as "
            f"{foreign[0]!r}; choose an empty or a new folder."
        )
    if overwrite:
        return WorkdirPlan(path, config, must_clear=True, is_resumed=False)
    saved = read_config(path)
    if saved["recipe"] != settings["recipe"]:
        raise UserError(
            f"config.recipe is {settings['recipe']!r}, but the run in {workdir} was made with "
            f"{saved['recipe']!r}; give another --workdir, or --overwrite to start again."
        )
    follows = {
        field.name
        for field in dataclasses.fields(recipe.config)
        if field.metadata.get("follows") and settings[field.name] == -1
    }
    config = make_config(recipe, {**settings, **{name: saved[name] for name in follows}})
    old = make_config(recipe, saved)
    for field in dataclasses.fields(config):
        name = field.name
        if name not in TrainingConfig.RESUMABLE and getattr(config, name) != getattr(old, name):
            raise UserError(
                f"config.{name} is {getattr(config, name)!r}, but the run in {workdir} was made "
                f"with {getattr(old, name)!r}; give that value to go on with it, another "
                "--workdir, or --overwrite to start again."
            )
    return WorkdirPlan(path, config, must_clear=False, is_resumed=True)


def prepare_workdir(plan: WorkdirPlan, recipe_name: str) -> None:
    """Carries out a plan: clears an old run if asked, and writes ``config.json``."""
    if plan.must_clear:
        for name in CONTENTS:
            target = plan.path / name
            if target.is_dir():
                shutil.rmtree(target)
            elif target.exists():
                target.unlink()
    plan.path.mkdir(parents=True, exist_ok=True)
    settings = {"recipe": recipe_name, **dataclasses.asdict(plan.config)}
    write_json(plan.path / "config.json", settings)


def read_config(workdir: Path) -> dict[str, Any]:
    """The settings of the run in a directory.

    Raises:
      UserError: if there is no run or its ``config.json`` cannot be read.
    """
    path = workdir / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"workdir is {workdir}, which holds no run (no config.json); give the --workdir of a "
            "launch.train."
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}).") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("recipe"), str):
        raise UserError(f"{path} is not the config of a run: it names no recipe.")
    return settings


class LoadedRun(NamedTuple):
    """A run read back from its directory.

    Attributes:
      run: the recipe, built.
      config: its settings.
      state: the state of a checkpoint.
      recipe_name: the name of the recipe.
    """

    run: Run
    config: TrainingConfig
    state: TrainState
    recipe_name: str


def load_run(
    workdir: str, *, checkpoint: str = "newest", recipe_module: str | None = None
) -> LoadedRun:
    """Builds the run of a directory and restores one of its checkpoints.

    Args:
      workdir: the run directory.
      checkpoint: ``"newest"``, ``"best"`` or a step.
      recipe_module: where the recipe is, if it is not a built-in one.

    Raises:
      UserError: if the directory, its config or the checkpoint cannot be read.
    """
    path = Path(workdir).expanduser().absolute()
    settings = read_config(path)
    recipe = find_recipe(settings["recipe"], recipe_module)
    config = make_config(recipe, settings)
    run = recipe.build(config)
    if not (path / "checkpoints").is_dir():
        raise UserError(f"The run in {workdir} has no checkpoint yet; train it first.")
    checkpointer = Checkpointer(path / "checkpoints", read_only=True)
    steps = checkpointer.steps()
    if not steps:
        raise UserError(f"The run in {workdir} has no checkpoint yet; train it first.")
    step: int | None = None
    if checkpoint == "best":
        step = checkpointer.best_step(run.monitor_name)
        if step is None:
            raise UserError(f"checkpoint is 'best', but no checkpoint in {workdir} was judged.")
    elif checkpoint != "newest":
        if not checkpoint.isdigit() or int(checkpoint) not in steps:
            raise UserError(
                f"checkpoint is {checkpoint!r}; it must be newest, best or one of "
                f"{', '.join(map(str, steps))}."
            )
        step = int(checkpoint)
    try:
        restored = checkpointer.restore(init_state(run, config), step)
    except ValueError as error:
        raise UserError(str(error)) from None
    finally:
        checkpointer.close()
    assert restored is not None
    return LoadedRun(run, config, restored[1], settings["recipe"])


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
