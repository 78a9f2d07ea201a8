"""What a run takes from the socket, measured by codecarbon; nothing is sent anywhere.

``energy_use.json`` adds up all sessions of a run that were tracked and not killed. Where a machine
gives no readings of its processor, codecarbon estimates from its model and load; what other
programs on the machine take is counted as well.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

from launch.runs import UserError, write_json

__all__ = ["EnergyMeter", "check_tracking"]

# By our names, of codecarbon's record; energies are in kWh.
_FIELDS = {
    "energy_kwh": "energy_consumed",
    "cpu_kwh": "cpu_energy",
    "gpu_kwh": "gpu_energy",
    "memory_kwh": "ram_energy",
    "seconds": "duration",
}


def check_tracking(workdir: Path) -> None:
    """Looks whether a run can be tracked, and writes nothing.

    Raises:
      UserError: without codecarbon, or if the file of earlier sessions cannot be read.
    """
    _tracker_class()
    _read(workdir / "energy_use.json")


def _tracker_class() -> Any:
    try:
        from codecarbon import OfflineEmissionsTracker
    except ImportError as error:
        raise UserError(
            f"track_energy needs codecarbon; pip install 'ebjax[energy]' brings it ({error})."
        ) from None
    return OfflineEmissionsTracker


def _read(path: Path) -> dict[str, float]:
    """What earlier sessions took."""
    if not path.exists():
        return dict.fromkeys(_FIELDS, 0.0)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        before = {name: float(found[name]) for name in _FIELDS}
    except (OSError, ValueError, TypeError, KeyError):
        before = {}
    if not before or not all(map(math.isfinite, before.values())):
        raise UserError(f"{path} is damaged; remove it, or go on without --track_energy.")
    return before


class EnergyMeter:
    """Measures what happens within its block and adds it to ``energy_use.json``.

    Args:
      workdir: the run directory.

    Raises:
      UserError: without codecarbon, or if the file is there and cannot be read.
    """

    def __init__(self, workdir: Path):
        self._path = workdir / "energy_use.json"
        self._before = _read(self._path)
        logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
        # The country decides emissions, which are not recorded.
        self._tracker = _tracker_class()(
            country_iso_code="USA",
            save_to_file=False,
            allow_multiple_runs=True,
            log_level="critical",
        )

    def __enter__(self) -> EnergyMeter:
        self._tracker.start()
        return self

    def __exit__(self, *exception) -> None:
        self._tracker.stop()
        # codecarbon keeps its errors to itself, and then has no record.
        record = getattr(self._tracker, "final_emissions_data", None)
        if record is None:
            print("codecarbon could not measure the energy of this session.", file=sys.stderr)
            return
        total = {
            name: self._before[name] + float(getattr(record, field))
            for name, field in _FIELDS.items()
        }
        write_json(self._path, total)
