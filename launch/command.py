"""What all commands share: flags, help, errors in one sentence, exit codes.

Exit codes: 0 done, 1 the run failed (a loss that is not finite, a full disk), 2 something in the
call is wrong.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import flags
from absl.flags import FlagValues
from ml_collections import ConfigDict, config_flags

from launch.runs import UserError, find_recipe

__all__ = ["Command", "builtin_configs", "define_config", "main", "output_file", "required", "seed"]


@dataclasses.dataclass(frozen=True)
class Command:
    """A command line.

    Attributes:
      name: as in ``python -m NAME``.
      description: what ``--help`` opens with.
      flags: its flags, defined with ``flag_values``.
      run: what it does once they are parsed; its exit code, 0 for ``None``.
      has_config: whether ``--config`` is among them.
    """

    name: str
    description: str
    flags: FlagValues
    run: Callable[[FlagValues], int | None]
    has_config: bool = False


def builtin_configs() -> dict[str, Path]:
    """The configs that come with the package, by their bare name."""
    folder = Path(__file__).parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.py")) if path.stem != "__init__"}


def required(flag_values: FlagValues, what: str) -> None:
    """Raises ``UserError`` if ``--config``, or ``--workdir`` for ``what``, is missing."""
    if flag_values.config is None:
        raise UserError(
            f"--config is missing; give one of {', '.join(builtin_configs())} or a path."
        )
    if flag_values.workdir is None:
        raise UserError(f"--workdir is missing; give the directory of the {what}.")


def define_config(flag_values: FlagValues) -> None:
    """Adds ``--config`` and ``--config.field=value``."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        f"Built-in config ({', '.join(builtin_configs())}) or path of a Python file with a "
        "get_config(). Override its fields with --config.field=value.",
        flag_values=flag_values,
    )


def seed(flag_values: FlagValues) -> int:
    """The value of ``--seed``, checked.

    Raises:
      UserError: if no key holds it.
    """
    value: Any = flag_values["seed"].value
    if not 0 <= value < 2**32:
        raise UserError(f"seed is {value}; it must be at least 0 and below 2**32.")
    return value


def output_file(flag_values: FlagValues, name: str) -> Path:
    """The path of a file that a command will write, checked.

    Raises:
      UserError: if it cannot be written there.
    """
    value: Any = flag_values[name].value
    try:
        path = Path(value).expanduser().absolute()
        if path.is_dir():
            raise UserError(f"{name} is {value!r}; that is a folder, give the name of a file.")
        if not path.parent.is_dir():
            raise UserError(f"{name} is {value!r}; its folder does not exist.")
    except (OSError, RuntimeError) as error:
        raise UserError(f"{name} is {value!r}; it cannot be looked at ({error}).") from None
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"{name} is {value!r}; its folder cannot be written.")
    return path


def main(command: Command, argv: list[str] | None = None) -> None:
    """Runs a command and exits."""
    argv = list(sys.argv if argv is None else argv)
    _quieten()
    try:
        sys.exit(_run(command, argv))
    except UserError as error:
        _complain(command, str(error))
        sys.exit(2)
    except (OSError, MemoryError, jax.errors.JaxRuntimeError) as error:
        text = str(error).strip() or type(error).__name__
        _complain(command, text if text.endswith(".") else f"{text}.")
        sys.exit(1)
    except KeyboardInterrupt:
        _complain(command, "interrupted.")
        sys.exit(130)


def _complain(command: Command, text: str) -> None:
    """One line on stderr."""
    print(f"{command.name}: {' '.join(text.split())}", file=sys.stderr)


def _run(command: Command, argv: list[str]) -> int:
    wants_help = any(re.fullmatch(r"--?(h|help)", arg) for arg in argv[1:])
    argv = [arg for arg in argv if not re.fullmatch(r"--?(h|help)", arg)]
    if command.has_config:
        argv = _resolve_config(argv)
        _load_config(argv)
    values = _fresh(command)
    try:
        rest = _parse(values, argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(_sentence(command, argv, error)) from None
    if wants_help:
        print(_help(command, values))
        return 0
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r} is not a flag; see --help.")
    return command.run(values) or 0


def _fresh(command: Command) -> FlagValues:
    """Its flags without what an earlier call in this process left in them."""
    values = command.flags
    for name in [name for name in values if name.startswith("config.")]:
        delattr(values, name)
    values.unparse_flags()
    for name in values:
        values[name].unparse()
    return values


def _parse(values: FlagValues, argv: list[str]) -> list[str]:
    """Parses flags; config_flags looks for its overrides in ``sys.argv``."""
    given, sys.argv = sys.argv, argv
    try:
        return values(argv)
    finally:
        sys.argv = given


def _resolve_config(argv: list[str]) -> list[str]:
    """Replaces a bare name after ``--config`` by the path of the built-in config.

    It comes first then: what overrides a field takes its type from the config that was read.
    """
    configs, resolved = [], argv[:1]
    rest = iter(argv[1:])
    for arg in rest:
        if arg in ("--config", "-config"):
            arg = f"--config={next(rest, '')}"
        match = re.fullmatch(r"--?config=(.*)", arg)
        if match:
            path = builtin_configs().get(match[1], Path(match[1]))
            if not path.is_file():
                raise UserError(
                    f"config is {match[1]!r}; it must be one of {', '.join(builtin_configs())}, "
                    "or the path of a Python file with a get_config()."
                )
            configs.append(f"--config={path}")
        else:
            resolved.append(arg)
    return resolved[:1] + configs + resolved[1:]


def _sentence(command: Command, argv: list[str], error: Exception) -> str:
    """One sentence for a flag that could not be parsed: what was given, what is accepted."""
    config = _load_config(argv) if command.has_config else None
    for arg, following in zip(argv, [*argv[1:], ""], strict=True):
        match = re.fullmatch(r"--?config\.([\w.]+)(?:=(.*))?", arg, re.DOTALL)
        if match is None or config is None:
            continue
        name, value = match[1], following if match[2] is None else match[2]
        if name not in config:
            return f"config has no field {name!r}; its fields are {', '.join(config)}."
        if f"config.{name}" in str(error):
            kind = type(config[name]).__name__
            return f"config.{name} is {value!r}; it must be of type {kind}."
    text = str(error).strip().strip("'\"")
    return text if text.endswith((".", "?")) else text + "."


def _load_config(argv: list[str]) -> ConfigDict | None:
    """The config of a command line without its overrides, ``None`` where there is none.

    Raises:
      UserError: if the file cannot be loaded or does not give a config.
    """
    # ml_collections would run a second file of this process in the module of the first.
    sys.modules.pop("config_config", None)
    values = FlagValues()
    define_config(values)
    given = [arg for arg in argv[1:] if arg.startswith("--config=")]
    try:
        _parse(values, [argv[0], *given])
    except UserError:
        raise
    except Exception as error:  # The file is the user's Python.
        # Some errors bring the whole traceback along; its last line says what is wrong.
        said = str(error).strip()
        said = said.splitlines()[-1] if "Traceback" in said else said
        text = f"{type(error).__name__}: {said}"
        raise UserError(f"{given[-1][2:]} cannot be loaded ({text}).") from None
    if given and not isinstance(values.config, ConfigDict):
        raise UserError(
            f"{given[-1][2:]} gives {values.config!r}; get_config() must return a ConfigDict."
        )
    return values.config


def _help(command: Command, values: FlagValues) -> str:
    lines = [command.description.strip(), "", "Flags:"]
    seen = set()
    for name in values:
        flag = values[name]
        if name.startswith("config.") or flag.name in seen:
            continue
        seen.add(flag.name)
        default = "" if flag.default in (None, False) else f" (default: {flag.default})"
        lines.append(f"  --{flag.name}: {flag.help}{default}")
    config = values["config"].value if command.has_config else None
    if command.has_config and config is None:
        lines += ["", "Add --config=NAME to see the fields of a config."]
    elif config is not None:
        lines += ["", "Fields of the config, set with --config.FIELD=VALUE:"]
        recipe = find_recipe(config.recipe, _recipe_module(values))
        for field in dataclasses.fields(recipe.config):
            about = field.metadata.get("help", "")
            lines.append(f"  {field.name} = {config[field.name]!r}: {about}")
    return "\n".join(lines)


def _recipe_module(flag_values: FlagValues) -> str | None:
    return flag_values["recipe_module"].value if "recipe_module" in flag_values else None


def _quieten() -> None:
    """Warnings of the libraries below are not for the user of a command."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    for name in ("absl", "asyncio", "jax", "orbax", "tensorboardX"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # tensorstore finishes reads of damaged checkpoints after their event loop is gone.
    sys.unraisablehook = lambda unraisable: None
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
