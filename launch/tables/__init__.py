"""The tables of ``launch.reproduce``: which runs, which figures, and what they must reach."""

from __future__ import annotations

from launch.tables.energy_tables import DATASETS_2D, ENERGY_TABLES, OBJECTIVES_2D
from launch.tables.flow_tables import FLOW_OBJECTIVES, FLOW_TABLES, NEGATIVES
from launch.tables.table import Bar, Row, Table

__all__ = [
    "DATASETS_2D",
    "FLOW_OBJECTIVES",
    "NEGATIVES",
    "OBJECTIVES_2D",
    "TABLES",
    "Bar",
    "Row",
    "Table",
]

TABLES: dict[str, Table] = {**ENERGY_TABLES, **FLOW_TABLES}
