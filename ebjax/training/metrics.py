"""Where the metrics of a run go: one JSON object a line, and TensorBoard events.

``metrics.jsonl`` holds what the run computed and nothing of the machine, so that a run which was
stopped and resumed writes the same lines as one which was not. Speed goes to TensorBoard.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["MetricsWriter", "are_numbers", "read_metrics"]

_log = logging.getLogger(__name__)
_FLUSH_SECONDS = 10.0


def are_numbers(values: Iterable[Any]) -> bool:
    """Whether all of what was read from JSON are numbers that a float holds."""
    return all(
        isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**1023)
        for value in values
    )


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Reads ``metrics.jsonl``; a last line cut short by a kill is left out.

    Raises:
      ValueError: naming the line that is not a JSON object of numbers, or whose step is not larger
        than that of the line before.
    """
    rows: list[dict[str, float]] = []
    # Bytes that are not text make a line that is not JSON.
    lines = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            is_row = (
                isinstance(row, dict)
                and type(row.get("step")) is int
                and row["step"] > (rows[-1]["step"] if rows else -1)
                and are_numbers(row.values())
            )
        except (RecursionError, ValueError):
            is_row = False
        if not is_row:
            if number == len(lines):  # no newline after it: the writer was stopped in the middle
                break
            raise ValueError(
                f"{path}, line {number} is not a JSON object with a step, larger than the one "
                "before, and numbers."
            )
        rows.append(row)
    return rows


class MetricsWriter:
    """Appends to ``metrics.jsonl`` and TensorBoard events in ``workdir``.

    Args:
      workdir: the run directory.
      resume_step: the step that the run goes on from; later lines, written by a run that was
        killed after its last checkpoint, are dropped.
      log_every: steps between lines; with it, lines that are missing before ``resume_step`` are a
        warning.
    """

    def __init__(self, workdir: str | Path, *, resume_step: int = 0, log_every: int | None = None):
        self.path = Path(workdir) / "metrics.jsonl"
        self._log_every = log_every
        self._open(resume_step)

    def _open(self, last_step: int) -> None:
        """Drops what is later than a step and opens both files at their ends."""
        rows = read_metrics(self.path) if self.path.exists() else []
        rows = [row for row in rows if row["step"] <= last_step]
        logged = rows[-1]["step"] if rows else 0
        # A run that was stopped may have saved a step that is not one to be logged.
        if self._log_every and logged < last_step - last_step % self._log_every:
            _log.warning(
                "%s ends at step %d, and the run goes on from step %d; the lines between are lost.",
                self.path,
                logged,
                last_step,
            )
        _write_atomically(self.path, (json.dumps(row) + "\n" for row in rows))
        self._file = self.path.open("a", encoding="utf-8")
        # tensorboardX's own writer has a thread, which dies on a full disk and lets the run hang.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder = self.path.parent / "tensorboard"
        folder.mkdir(exist_ok=True)
        self._events = EventsWriter(str(folder / "events"))
        start = SessionLog(status=SessionLog.START)
        self._events.write_event(Event(step=last_step + 1, session_log=start))
        self._flushed = time.monotonic()

    def rewind(self, step: int) -> None:
        """Drops the log points after ``step``, to which the run went back."""
        self.close()
        self._open(step)

    def write(self, step: int, metrics: Mapping[str, float], **machine: float) -> None:
        """Writes one log point; ``machine`` (speed and the like) goes to TensorBoard only."""
        row = {"step": step, **{name: float(value) for name, value in metrics.items()}}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        for name, value in {**row, **machine}.items():
            if name != "step":
                event = Event(wall_time=time.time(), step=step, summary=scalar(name, value))
                self._events.write_event(event)
        if time.monotonic() > self._flushed + _FLUSH_SECONDS:
            self._events.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Flushes everything to disk."""
        try:
            self._file.close()
        finally:
            self._events.close()


def _write_atomically(path: Path, lines: Iterable[str]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
