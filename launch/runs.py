"""Run directories as commands write them; ``ebjax.loading`` reads them and lists the recipes."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections

from ebjax.loading import (
    LoadedRun,
    UserError,
    find_recipe,
    find_workdir,
    load_run,
    make_config,
    read_config,
    restore,
)
from ebjax.training import TrainingConfig
from ebjax.training.metrics import are_numbers
from ebjax.types import Recipe

__all__ = [
    "CONTENTS",
    "LoadedRun",
    "UserError",
    "WorkdirPlan",
    "changed_settings",
    "default_config",
    "find_recipe",
    "find_workdir",
    "load_run",
    "lock_workdir",
    "make_config",
    "open_workdir",
    "prepare_workdir",
    "read_config",
    "read_figures",
    "replacing",
    "restore",
    "write_json",
]

_LOCK = "train.lock"

# What a run directory holds, in the order in which a person is told of it.
CONTENTS = {
    "config.json": "all settings; restores the run with no other input",
    "metrics.jsonl": "one JSON object a log point",
    "tensorboard": "the same as TensorBoard events, and speed",
    "checkpoints": "saved states; a second launch.train goes on from the newest",
    "damaged_checkpoints": "states that could not be read, set aside",
    "evaluation.json": "figures of merit at the end of the run",
    "energy_use.json": "energy that was used, where it was tracked",
    "samples.npz": "samples drawn at the end of the run",
    "figures": "pictures of samples, energies and training",
}


def default_config(name: str, module: str | None = None) -> ml_collections.ConfigDict:
    """The defaults of a recipe in the form that command-line flags override.

    >>> default_config("hypergrid").side
    8
    """
    recipe = find_recipe(name, module)
    # A field that follows another one stays open here: the other may be overridden.
    settings = dataclasses.asdict(recipe.config())
    for field in dataclasses.fields(recipe.config):
        if field.metadata.get("follows"):
            settings[field.name] = field.default
    return ml_collections.ConfigDict({"recipe": name, **settings})


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


def _check_places(path: Path) -> None:
    """Nothing is in the way of what a run writes, which would end it at its first save or last."""
    for folder in (path / name for name in ("checkpoints", "figures", "tensorboard")):
        if folder.is_file():
            raise UserError(f"{folder} is a file where a folder must be; move it away.")
    for file in (path / "samples.npz", path / "evaluation.json", *path.glob("figures/*.png")):
        if file.is_dir():
            raise UserError(f"{file} is a folder where a file must be; move it away.")


def changed_settings(old: TrainingConfig, new: TrainingConfig) -> list[str]:
    """Names of the settings that differ, without those that may change when a run goes on."""
    names = [field.name for field in dataclasses.fields(new)]
    return [
        name
        for name in names
        if name not in TrainingConfig.RESUMABLE and getattr(old, name) != getattr(new, name)
    ]


def open_workdir(
    workdir: str, recipe: Recipe, settings: Mapping[str, Any], *, overwrite: bool
) -> WorkdirPlan:
    """Looks at a run directory and decides whether training may write there.

    Raises:
      UserError: if it is not a directory, cannot be written, holds other things than a run, has
        something in the way of what a run writes, or holds a run with other settings (other than
        those that may change when a run goes on).
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
        # A run that was killed while it wrote its first file left only these.
        foreign = [name for name in names if name not in ("config.json.tmp", _LOCK)]
        if foreign:
            raise UserError(
                f"workdir is {workdir}, which holds no run (no config.json) but other files such "
                f"as {foreign[0]!r}; choose an empty or a new folder."
            )
        return WorkdirPlan(path, config, must_clear=False, is_resumed=False)
    if overwrite:
        return WorkdirPlan(path, config, must_clear=True, is_resumed=False)
    _check_places(path)
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
        if field.metadata.get("follows") and settings.get(field.name) == field.default
    }
    config = make_config(recipe, {**settings, **followed})
    for name in changed_settings(old, config):
        raise UserError(
            f"config.{name} is {getattr(config, name)!r}, but the run in {workdir} was made "
            f"with {getattr(old, name)!r}; give that value to go on with it, another "
            "--workdir, or --overwrite to start again."
        )
    return WorkdirPlan(path, config, must_clear=False, is_resumed=True)


@contextlib.contextmanager
def lock_workdir(path: Path) -> Iterator[None]:
    """Within it no other process trains in a run directory, which is made if missing.

    The operating system holds the lock, and drops it when the process ends, however it ends; the
    file ``train.lock`` stays and means nothing by itself. File systems without locks do without.

    Raises:
      UserError: if another process trains there, or it cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        opened = (path / _LOCK).open("a")
    except OSError as error:
        raise UserError(
            f"workdir is {path}, which cannot be written ({error}); choose another folder."
        ) from None
    with opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"workdir is {path}, in which another process trains; wait for its end, or give "
                "another --workdir."
            ) from None
        except OSError:
            pass
        yield


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
    if plan.is_resumed and read_config(plan.path).get("num_steps") != plan.config.num_steps:
        # Figures of merit are those of the end, which is elsewhere now.
        (plan.path / "evaluation.json").unlink(missing_ok=True)
    names = {"recipe": recipe_name}
    if recipe_module is not None:
        names["recipe_module"] = recipe_module
    write_json(plan.path / "config.json", {**names, **dataclasses.asdict(plan.config)})


def read_figures(workdir: Path) -> dict[str, float] | None:
    """The figures of merit of a finished run, ``None`` where it has none that can be read."""
    try:
        figures = json.loads((workdir / "evaluation.json").read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError):
        return None
    return figures if isinstance(figures, dict) and are_numbers(figures.values()) else None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of ``path`` when the block has ended well.

    A reader sees the old file or the new one, never a part, and a full disk leaves the old one.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_json(path: Path, value: Any) -> None:
    """Writes JSON in the place of what was there."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
