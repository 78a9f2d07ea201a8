"""Flags that say in which fields of a config runs differ.

--grid.FIELD=A,B,...    --uniform.FIELD=A,B    --log_uniform.FIELD=A,B
"""

from __future__ import annotations

import ast
import math
import re
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from launch.runs import UserError

__all__ = ["Axis", "draw", "read_axes", "split_axes"]

_AXIS = re.compile(r"--?(grid|uniform|log_uniform)\.(\w+)(?:=(.*))?", re.DOTALL)


class Axis(NamedTuple):
    """A field that varies: how (``grid``, ``uniform``, ``log_uniform``), and its values or ends."""

    kind: str
    name: str
    values: tuple[Any, ...]


def split_axes(argv: Sequence[str]) -> tuple[list[tuple[str, str, str]], list[str]]:
    """``(kind, field, text)`` of the flags that name an axis, and the other arguments."""
    axes, others = [], []
    rest = iter(argv)
    for arg in rest:
        match = _AXIS.fullmatch(arg)
        if match is None:
            others.append(arg)
        else:
            axes.append((match[1], match[2], next(rest, "") if match[3] is None else match[3]))
    return axes, others


def _read_value(flag: str, text: str, like: Any) -> Any:
    """A value of the type of ``like``."""
    kind = type(like)
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind is tuple:
            value = ast.literal_eval(text)
            if not isinstance(value, tuple):
                raise ValueError
            return value
        return kind(text)
    except (KeyError, SyntaxError, ValueError):
        raise UserError(f"{flag} has {text!r}; it must be of type {kind.__name__}.") from None


def read_axes(texts: Sequence[tuple[str, str, str]], config: ConfigDict) -> list[Axis]:
    """Checks the axes of a command line against the config."""
    axes: list[Axis] = []
    for kind, name, text in texts:
        flag = f"{kind}.{name}"
        if name == "seed":
            raise UserError(f"{flag} is {text!r}; give --seeds, how many seeds each setting has.")
        if name not in config or name == "recipe":
            known = ", ".join(field for field in config if field not in ("recipe", "seed"))
            raise UserError(f"{flag} is {text!r}, but config has no such field; it has {known}.")
        if name in [axis.name for axis in axes]:
            raise UserError(f"{flag} is {text!r}, but {name} varies already; give it once.")
        # Not at the commas of a tuple.
        parts = [part.strip() for part in re.split(r",(?![^(]*\))", text)]
        values = tuple(_read_value(flag, part, config[name]) for part in parts)
        if kind != "grid":
            is_range = len(values) == 2 and type(values[0]) in (int, float)
            least = 0 if kind == "log_uniform" else -math.inf
            if not (is_range and least < values[0] < values[1] < math.inf):
                above = "above 0 " if kind == "log_uniform" else ""
                raise UserError(
                    f"{flag} is {text!r}; it must be two numbers {above}with a comma between, the "
                    "lower one first."
                )
        axes.append(Axis(kind, name, tuple(dict.fromkeys(values))))
    return axes


def draw(axis: Axis, trial: int, seed: int) -> Any:
    """A value of a random axis, which depends on the trial, the field and the seed only."""
    generator = np.random.default_rng([seed, trial, zlib.crc32(axis.name.encode())])
    low, high = axis.values
    is_whole = isinstance(low, int)
    if axis.kind == "log_uniform":
        # Whole numbers are rounded, and the ends have as much room as the others.
        room = 0.5 if is_whole else 0.0
        value = math.exp(generator.uniform(math.log(low - room), math.log(high + room)))
    elif is_whole:
        value = generator.integers(low, high + 1)
    else:
        value = generator.uniform(low, high)
    value = round(value) if is_whole else float(f"{value:.3g}")
    return min(max(value, low), high)
