"""Reads run directories: the recipe, its settings, a checkpoint, and what was learned.

    energy = ebjax.load("runs/digits")
    energy.energy_fn(energy.params, x)

Training and its libraries are imported when a run is read, and not before.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from ebjax.types import EnergyFn, Params, Position, Recipe, Run, TrainState

if TYPE_CHECKING:
    from ebjax.training import TrainingConfig

__all__ = [
    "RECIPES",
    "LoadedEnergy",
    "LoadedRun",
    "UserError",
    "described",
    "find_recipe",
    "find_workdir",
    "learned_params",
    "load",
    "load_run",
    "make_config",
    "read_config",
    "restore",
]

RECIPES = {
    "composition": "ebjax.recipes.composition",
    "density": "ebjax.recipes.density",
    "digits": "ebjax.recipes.digits",
    "energy_ood": "ebjax.recipes.energy_ood",
    "images": "ebjax.recipes.images",
    "jarzynski": "ebjax.recipes.jarzynski",
    "jem": "ebjax.recipes.jem",
    "rbm": "ebjax.recipes.rbm",
    "continuous": "gflownet.recipes.continuous",
    "dags": "gflownet.recipes.dags",
    "diffusion": "gflownet.recipes.diffusion",
    "eb_gfn": "gflownet.recipes.eb_gfn",
    "eb_gfn_plane": "gflownet.recipes.eb_gfn_plane",
    "graph_problems": "gflownet.recipes.graph_problems",
    "hypergrid": "gflownet.recipes.hypergrid",
    "phylogeny": "gflownet.recipes.phylogeny",
    "sequences": "gflownet.recipes.sequences",
    "sets": "gflownet.recipes.sets",
}

# What config.json holds beside the fields of the config.
_NAMES_OF_RECIPE = ("recipe", "recipe_module")


class UserError(ValueError):
    """Something that the user can mend; its text is one sentence for them."""


def find_recipe(name: str, module: str | None = None, *, origin: str = "") -> Recipe:
    """The recipe of a config: a built-in one by name, or ``module.recipe`` of a user's module.

    Args:
      name: its name.
      module: where a user's own recipe is.
      origin: where both stand, to open the sentence of an error with.

    Raises:
      UserError: if there is no such recipe.
    """
    if module is None and name not in RECIPES:
        raise UserError(
            f"{origin}recipe is {name!r}; it must be one of {', '.join(RECIPES)}, or "
            "--recipe_module must name the Python module that defines it."
        )
    module = RECIPES[name] if module is None else module
    try:
        recipe = importlib.import_module(module).recipe
    except Exception as error:  # The module is the user's Python.
        raise UserError(
            f"{origin}recipe_module is {module!r}; it must be an importable module that defines "
            f"'recipe' ({type(error).__name__}: {error})."
        ) from None
    if not isinstance(recipe, Recipe):
        raise UserError(
            f"{origin}recipe_module is {module!r}; its 'recipe' must be an ebjax.types.Recipe."
        )
    return recipe


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
    except (OSError, RecursionError, ValueError) as error:
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
    origin = f"{path / 'config.json'}: "
    if recipe_module is None:
        recipe = find_recipe(settings["recipe"], settings.get("recipe_module"), origin=origin)
    else:
        recipe = find_recipe(settings["recipe"], recipe_module)
    config = make_config(recipe, settings, origin=origin)
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
    from ebjax.training import Checkpointer, init_state

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


class LoadedEnergy(NamedTuple):
    """An energy that a run has learned, to be used anywhere.

    Attributes:
      energy_fn: ``(params, x) -> []``, pure, of one example in the units of the run's samples.
      params: what it was learned to be, averaged over the last updates where the run averages.
      draw: ``(key, params) -> x``, pure, one example by the sampler of the run; ``None`` where
        the run draws nothing.
      sample: ``(key, num) -> arrays by name`` [num, ...] on the host, as ``launch.sample`` writes
        them.
      config: the settings of the run.
      step: the updates that were done.
    """

    energy_fn: EnergyFn
    params: Params
    draw: Callable[[jax.Array, Params], Position] | None
    sample: Callable[[jax.Array, int], dict[str, Any]]
    config: TrainingConfig
    step: int

    def __repr__(self) -> str:
        """One line in a notebook, in the place of every parameter."""
        return described(self)


def described(loaded: Any) -> str:
    """What ``load`` returned, in a line: the recipe, the size of ``params`` and the step."""
    recipe = type(loaded.config).__name__.removesuffix("Config")
    num_parameters = sum(jnp.size(leaf) for leaf in jax.tree.leaves(loaded.params))
    name = type(loaded).__name__
    return f"{name}({recipe}, {num_parameters:,} parameters, step {loaded.step:,})"


def load(
    workdir: str | Path, *, checkpoint: str | int = "newest", recipe_module: str | None = None
) -> LoadedEnergy:
    """The energy that a run has learned, read from its directory.

        energy = ebjax.load("runs/digits")
        energies = jax.vmap(energy.energy_fn, (None, 0))(energy.params, images)

    Args:
      workdir: the run directory of a ``launch.train``.
      checkpoint: ``"newest"``, ``"best"`` or a step.
      recipe_module: where the recipe is, if it is not a built-in one and the run does not say.

    Raises:
      ValueError: if the directory, its config or the checkpoint cannot be read, or the run learns
        no energy.
    """
    run, config, state, name = load_run(
        str(workdir), checkpoint=str(checkpoint), recipe_module=recipe_module
    )
    if run.energy is None:
        raise UserError(f"workdir is {workdir}; its recipe {name!r} learns no energy.")
    return LoadedEnergy(
        energy_fn=run.energy,
        params=learned_params(run, state),
        draw=run.draw,
        sample=lambda key, num: run.sample(key, state, num),
        config=config,
        step=int(state.step),
    )


def learned_params(run: Run, state: TrainState) -> Params:
    """What ``run.energy``, ``run.draw`` and the policy of ``run.flow`` take, as arrays of JAX."""
    return jax.tree.map(jnp.asarray, run.learned_params(state))
