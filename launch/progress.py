"""What a person sees of a run: a live bar on a terminal, a line a log point elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from launch.runs import CONTENTS

__all__ = ["RunProgress", "print_figures", "print_run_directory"]


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _number(value: float) -> str:
    return f"{value:.3g}"


class _Bar(Progress):
    """A bar, and below it the metrics, which are too wide to stand beside it."""

    metrics = ""

    def get_renderables(self):
        yield from super().get_renderables()
        yield Text(self.metrics, no_wrap=True, overflow="ellipsis")


class RunProgress:
    """Shows the metrics of a run, its speed and the time left.

    Args:
      console: where to.
      num_steps: the last step.
      first_step: the step that the run starts from.
      names: the metrics to show.
    """

    def __init__(
        self,
        console: Console,
        *,
        num_steps: int,
        first_step: int,
        names: Sequence[str],
    ):
        self._console, self._names = console, names
        self._num_steps, self._step = num_steps, first_step
        self._start: tuple[int, float] | None = None
        self._bar: _Bar | None = None
        if console.is_terminal and not console.quiet:
            self._bar = _Bar(
                TextColumn("[bold]{task.completed}[/bold]/{task.total} steps"),
                BarColumn(bar_width=40),
                TextColumn("{task.fields[speed]}"),
                console=console,
            )
            self._task = self._bar.add_task(
                "", total=num_steps, completed=first_step, speed="compiling"
            )
            self._bar.start()

    def on_call(self, step: int, metrics: Mapping[str, float]) -> None:
        """Moves the bar."""
        self._step = step
        if self._start is None:  # the first call holds the compilation
            self._start = (step, time.perf_counter())
        if self._bar is not None:
            self._bar.metrics = self._metrics(metrics)
            self._bar.update(self._task, completed=step, speed=self._speed())

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Prints a line where there is no terminal."""
        if self._bar is None:
            shown = (f"step {step}/{self._num_steps}", self._metrics(metrics), self._speed())
            line = "  ".join(part for part in shown if part)
            self._console.print(line, soft_wrap=True, highlight=False)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()

    def _metrics(self, metrics: Mapping[str, float]) -> str:
        shown = [f"{name} {_number(metrics[name])}" for name in self._names if name in metrics]
        return "  ".join(shown)

    def _speed(self) -> str:
        if self._start is None or self._step == self._start[0]:
            return ""
        rate = (self._step - self._start[0]) / (time.perf_counter() - self._start[1])
        left = _duration((self._num_steps - self._step) / rate)
        return f"{rate:.3g} steps/s, {left} left"


def print_figures(console: Console, figures: Mapping[str, float]) -> None:
    """Prints figures of merit as a table."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), f"{value:.6g}")
    console.print(table)


def print_run_directory(console: Console, workdir: Path) -> None:
    """Says what a run directory holds."""
    tree = Tree(f"[bold]{workdir}[/bold]")
    for name, about in CONTENTS.items():
        path = workdir / name
        if not path.exists():
            continue
        branch = tree.add(f"{name}{'/' if path.is_dir() else ''}  [dim]{about}[/dim]")
        if name == "figures":
            for figure in sorted(path.glob("*.png")):
                branch.add(figure.name)
    console.print(tree, soft_wrap=True, highlight=False)
