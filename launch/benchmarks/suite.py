"""What a suite is made of: variants that take turns, and the ratios that have a bar."""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["Comparison", "Limit", "Suite", "Variant"]


class Variant(NamedTuple):
    """One row of a table.

    Attributes:
      name: of the row.
      module: file of ``launch.benchmarks`` that has the workload.
      function: in that file.
      options: its arguments.
      work: units of work of one run.
      num_devices: virtual CPU devices of its process.
    """

    name: str
    module: str
    function: str
    options: dict[str, Any]
    work: int
    num_devices: int = 1


class Comparison(NamedTuple):
    """A ratio of rates: ``name`` over ``peer`` must be at least ``bar``; 0 is no bar.

    The ratios of one ``group`` have no bar of their own but one of their geometric mean. With a
    ``fact`` that measured figure is compared and not the rate.
    """

    name: str
    peer: str
    bar: float = 0.0
    group: str = ""
    fact: str = ""


class Limit(NamedTuple):
    """A measured figure with a bar: ``fact`` of ``name``, after the last round, at most ``bar``."""

    name: str
    fact: str
    bar: float


class Suite(NamedTuple):
    """Variants that take turns, and what is compared.

    Attributes:
      about: a line for people.
      unit: of work.
      variants: the rows.
      comparisons: the ratios.
      limits: figures with a bar of their own.
    """

    about: str
    unit: str
    variants: tuple[Variant, ...]
    comparisons: tuple[Comparison, ...]
    limits: tuple[Limit, ...] = ()
