"""What all commands share: flags, help, errors in one sentence, exit codes.

Exit codes: 0 done, 1 the run failed (a loss that is not finite), 2 something in the call is wrong.
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

from absl import flags
from ml_collections import config_flags

from launch.runs import UserError, find_recipe

__all__ = ["Command", "builtin_configs", "main"]


@dataclasses.dataclass(frozen=True)
class Command:
    """A command line.

    Attributes:
      name: as in ``python -m NAME``.
      description: what ``--help`` opens with.
      flags: its flags, defined with ``flag_values``.
      run: what it does once they are parsed.
      has_config: whether ``--config`` is among them.
    """

    name: str
    description: str
    flags: flags.FlagValues
    run: Callable[[flags.FlagValues], None]
    has_config: bool = False


def builtin_configs() -> dict[str, Path]:
    """The configs that come with the package, by their bare name."""
    folder = Path(__file__).parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.py")) if path.stem != "__init__"}


def define_config(flag_values: flags.FlagValues) -> None:
    """Adds ``--config`` and ``--config.field=value``."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        f"Built-in config ({', '.join(builtin_configs())}) or path of a Python file with a "
        "get_config(). Override its fields with --config.field=value.",
        flag_values=flag_values,
    )


def main(command: Command, argv: list[str] | None = None) -> None:
    """Runs a command and exits."""
    argv = list(sys.argv if argv is None else argv)
    _quieten()
    try:
        sys.exit(_run(command, argv))
    except UserError as error:
        print(f"{command.name}: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"{command.name}: {error.strerror or error}: {error.filename}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{command.name}: interrupted.", file=sys.stderr)
        sys.exit(130)


def _run(command: Command, argv: list[str]) -> int:
    wants_help = any(re.fullmatch(r"--?(h|help)", arg) for arg in argv[1:])
    argv = [arg for arg in argv if not re.fullmatch(r"--?(h|help)", arg)]
    if command.has_config:
        argv = _resolve_config(argv)
    try:
        rest = _parse(command.flags, argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(_sentence(command, argv, error)) from None
    except (ImportError, SyntaxError, NameError, OSError) as error:
        raise UserError(f"--config cannot be loaded: {error}.") from None
    if wants_help:
        print(_help(command))
        return 0
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r} is not a flag; see --help.")
    return command.run(command.flags) or 0


def _parse(values: flags.FlagValues, argv: list[str]) -> list[str]:
    """Parses flags; config_flags looks for its overrides in ``sys.argv``."""
    given, sys.argv = sys.argv, argv
    try:
        return values(argv)
    finally:
        sys.argv = given


def _resolve_config(argv: list[str]) -> list[str]:
    """Replaces a bare name after ``--config`` by the path of the built-in config."""
    resolved = []
    rest = iter(argv)
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
            arg = f"--config={path}"
        resolved.append(arg)
    return resolved


def _sentence(command: Command, argv: list[str], error: Exception) -> str:
    """One sentence for a flag that could not be parsed: what was given, what is accepted."""
    given = re.compile(r"--?config\.([\w.]+)(?:=(.*))?")
    overrides = [match.groups() for arg in argv if (match := given.fullmatch(arg))]
    if command.has_config and overrides:
        config = _load_config(argv)
        for name, value in overrides:
            if config is not None and name not in config:
                return f"config has no field {name!r}; its fields are {', '.join(config)}."
            if config is not None and f"config.{name}" in str(error):
                kind = type(config[name]).__name__
                return f"config.{name} is {value!r}; it must be of type {kind}."
    text = " ".join(str(error).strip().strip("'\"").split())
    return text if text.endswith((".", "?")) else text + "."


def _load_config(argv: list[str]):
    """The config of a command line without its overrides, ``None`` where there is none."""
    values = flags.FlagValues()
    define_config(values)
    path = [arg for arg in argv[1:] if re.fullmatch(r"--?config=.*", arg)]
    _parse(values, [argv[0], *path])
    return values.config


def _help(command: Command) -> str:
    lines = [command.description.strip(), "", "Flags:"]
    seen = set()
    for name in command.flags:
        flag = command.flags[name]
        if name.startswith("config.") or flag.name in seen:
            continue
        seen.add(flag.name)
        default = "" if flag.default in (None, False) else f" (default: {flag.default})"
        lines.append(f"  --{flag.name}: {flag.help}{default}")
    config = command.flags["config"].value if command.has_config else None
    if command.has_config and config is None:
        lines += ["", "Add --config=NAME to see the fields of a config."]
    elif config is not None:
        lines += ["", "Fields of the config, set with --config.FIELD=VALUE:"]
        recipe = find_recipe(config.recipe, _recipe_module(command.flags))
        for field in dataclasses.fields(recipe.config):
            about = field.metadata.get("help", "")
            lines.append(f"  {field.name} = {config[field.name]!r}: {about}")
    return "\n".join(lines)


def _recipe_module(flag_values: flags.FlagValues) -> str | None:
    return flag_values["recipe_module"].value if "recipe_module" in flag_values else None


def _quieten() -> None:
    """Warnings of the libraries below are not for the user of a command."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    for name in ("absl", "orbax", "jax", "tensorboardX"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
