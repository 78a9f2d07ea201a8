"""The suites by name."""

from __future__ import annotations

from launch.benchmarks.energy_suites import ENERGY_SUITES
from launch.benchmarks.flow_suites import FLOW_SUITES
from launch.benchmarks.sampler_suites import SAMPLER_SUITES
from launch.benchmarks.suite import Suite

__all__ = ["SUITES"]

SUITES: dict[str, Suite] = {**SAMPLER_SUITES, **FLOW_SUITES, **ENERGY_SUITES}
