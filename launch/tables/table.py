"""What a table is made of: rows that run, figures that are shown, bars that must be reached."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["Bar", "Row", "Table"]


class Row(NamedTuple):
    """One row: a config with some of its fields changed.

    Attributes:
      name: of the row.
      config: a built-in config, or the path of a file with one.
      settings: fields that differ from its defaults.
      flags: further flags of ``launch.train``.
    """

    name: str
    config: str
    settings: Mapping[str, Any] = {}
    flags: tuple[str, ...] = ()


class Bar(NamedTuple):
    """The mean of ``figure`` over the seeds of ``row`` must lie in [low, high]."""

    row: str
    figure: str
    low: float = -math.inf
    high: float = math.inf


class Table(NamedTuple):
    """Runs that stand beside each other.

    Attributes:
      about: a line for people.
      rows: the runs.
      columns: the figures of ``launch.evaluate`` that are shown.
      seeds: how many, from 0 on.
      bars: what must be reached.
      needs_data: whether ``--data_path`` must name a file.
    """

    about: str
    rows: tuple[Row, ...]
    columns: tuple[str, ...]
    seeds: int = 3
    bars: tuple[Bar, ...] = ()
    needs_data: bool = False
