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
    "WorkdirPlan",
    "default_config",
    "find_recipe",
    "load_run",
    "open_workdir",
    "prepare_workdir",
    "restore",
    "write_json",
]

RECIPES = {
    "density": "ebjax.recipes.density",
    "digits": "ebjax.recipes.digits",
    "energy_ood": "ebjax.recipes.energy_ood",
    "images": "ebjax.recipes.images",
    "jarzynski": "ebjax.recipes.jarzynski",
    "jem": "ebjax.recipes.jem",
    "rbm": "ebjax.recipes.rbm",
    "diffusion": "gflownet.recipes.diffusion",
    "hypergrid": "gflownet.recipes.hypergrid",
    "sets": "gflownet.recipes.sets",
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


# What config.json holds beside the fields of the config.
_NAMES_OF_RECIPE = ("recipe", "recipe_module")


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
    module = RECIPES[name] if module is None else module
    try:
        recipe = importlib.import_module(module).recipe
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"recipe_module is {module!r}; it must be an importable module that defines 'recipe' "
            f"({error})."
        ) from None
    if not isinstance(recipe, Recipe):
        raise UserError(f"recipe_module is {module!r}; its 'recipe' must be an ebjax.types.Recipe.")
    return recipe


def default_config(name: str, module: str | None = None) -> ml_collections.ConfigDict:
    """The defaults of a recipe in the form that command-line flags override.

    >>> default_config("hypergrid").side
    8
    """
    recipe = find_recipe(name, module)
    # A field that follows another one stays -1 here: the other may be overridden.
    settings = dataclasses.asdict(recipe.config())
    for field in dataclasses.fields(recipe.config):
        if field.metadata.get("follows"):
            settings[field.name] = field.default
    return ml_collections.ConfigDict({"recipe": name, **settings})


def make_config(recipe: Recipe, settings: Mapping[str, Any], *, origin: str = "") -> TrainingConfig:
    """Checks settings and makes them the recipe's config.

    Args:
      recipe: whose config.
      settings: its fields by name; those that are left out take their defaults.
      origin: where the settings stand, to open the sentence of an error with.

    Raises:
      UserError: naming the field, its value and what is accepted.
    """
    settings = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in settings.items()
        if name not in _NAMES_OF_RECIPE
    }
    known = [field.name for field in dataclasses.fields(recipe.config)]
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise UserError(
            f"{origin}config has no field {unknown[0]!r}; its fields are {', '.join(known)}."
        )
    try:
        return recipe.config(**settings)
    except (TypeError, ValueError) as error:
        raise UserError(f"{origin}{error}") from None


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
    path = find_workdir(workdir)
    parent = next(p for p in (path, *path.parents) if p.exists())
    if not parent.is_dir():
        raise UserError(f"workdir is {workdir}; {parent} is a file, and a run needs a folder.")
    if not os.access(parent, os.W_OK | os.X_OK | os.R_OK):
        raise UserError(f"workdir is {workdir}; {parent} cannot be written, choose another folder.")
    config = make_config(recipe, settings)
    names = sorted(p.name for p in path.iterdir()) if path.exists() else []
    if "config.json" not in names:
        # A run that was killed while it wrote its first file left only this one.
        foreign = [name for name in names if name != "config.json.tmp"]
        if foreign:
            raise UserError(
                f"workdir is {workdir}, which holds no run (no config.json) but other files such "
                f"as {foreign[0]!r}; choose an empty or a new folder."
            )
        return WorkdirPlan(path, config, must_clear=False, is_resumed=False)
    if overwrite:
        return WorkdirPlan(path, config, must_clear=True, is_resumed=False)
    saved = read_config(path)
    if saved["recipe"] != settings["recipe"]:
        raise UserError(
            f"config.recipe is {settings['recipe']!r}, but the run in {workdir} was made with "
            f"{saved['recipe']!r}; give another --workdir, or --overwrite to start again."
        )
    old = make_config(recipe, saved, origin=f"{path / 'config.json'}: ")
    followed = {
        field.name: getattr(old, field.name)
        for field in dataclasses.fields(recipe.config)
        if field.metadata.get("follows") and settings.get(field.name) == -1
    }
    config = make_config(recipe, {**settings, **followed})
    for field in dataclasses.fields(config):
        name = field.name
        if name not in TrainingConfig.RESUMABLE and getattr(config, name) != getattr(old, name):
            raise UserError(
                f"config.{name} is {getattr(config, name)!r}, but the run in {workdir} was made "
                f"with {getattr(old, name)!r}; give that value to go on with it, another "
                "--workdir, or --overwrite to start again."
            )
    return WorkdirPlan(path, config, must_clear=False, is_resumed=True)


def prepare_workdir(plan: WorkdirPlan, recipe_name: str, recipe_module: str | None = None) -> None:
    """Carries out a plan: clears an old run if asked, and writes ``config.json``."""
    if plan.must_clear:
        # config.json last: what is left by a kill in the middle is still known for a run.
        for name in reversed(CONTENTS):
            target = plan.path / name
            if target.is_dir():
                shutil.rmtree(target)
            elif target.exists():
                target.unlink()
    plan.path.mkdir(parents=True, exist_ok=True)
    names = {"recipe": recipe_name}
    if recipe_module is not None:
        names["recipe_module"] = recipe_module
    write_json(plan.path / "config.json", {**names, **dataclasses.asdict(plan.config)})


def find_workdir(workdir: str) -> Path:
    """The path of a run directory, which need not exist.

    Raises:
      UserError: if it is no path.
    """
    if not workdir:
        raise UserError("workdir is ''; give the directory of the run.")
    try:
        path = Path(workdir).expanduser().absolute()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"workdir is {workdir}; it cannot be looked at ({error}).") from None
    return path


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
        raise UserError(f"{path} is not the config of a run: it is no object with a 'recipe'.")
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
    path = find_workdir(workdir)
    settings = read_config(path)
    recipe = find_recipe(settings["recipe"], recipe_module or settings.get("recipe_module"))
    config = make_config(recipe, settings, origin=f"{path / 'config.json'}: ")
    try:
        run = recipe.build(config)
    except ValueError as error:
        raise UserError(str(error)) from None
    restored = restore(path, run, config, checkpoint)
    if restored is None:
        raise UserError(f"The run in {workdir} has no checkpoint yet; train it first.")
    return LoadedRun(run, config, restored, settings["recipe"])


def restore(
    workdir: Path, run: Run, config: TrainingConfig, checkpoint: str = "newest"
) -> TrainState | None:
    """The state of one of a run's checkpoints, ``None`` where there is none; writes nothing.

    Raises:
      UserError: if there is no such checkpoint, or it cannot be read.
    """
    if not (workdir / "checkpoints").is_dir():
        return None
    checkpointer = Checkpointer(workdir / "checkpoints", read_only=True)
    try:
        steps = checkpointer.steps()
        if not steps:
            return None
        step: int | None = None
        if checkpoint == "best":
            step = checkpointer.best_step(run.monitor_name)
            if step is None:
                raise UserError(
                    f"checkpoint is 'best', but no checkpoint in {workdir} was judged; give "
                    f"newest or one of {', '.join(map(str, steps))}."
                )
        elif checkpoint != "newest":
            if not checkpoint.isdecimal() or int(checkpoint) not in steps:
                raise UserError(
                    f"checkpoint is {checkpoint!r}; it must be newest, best or one of "
                    f"{', '.join(map(str, steps))}."
                )
            step = int(checkpoint)
        restored = checkpointer.restore(init_state(run, config), step)
    except ValueError as error:
        raise UserError(str(error)) from None
    finally:
        checkpointer.close()
    return None if restored is None else restored[1]


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
