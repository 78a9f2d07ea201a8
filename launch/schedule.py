"""Many runs, each a ``launch.train`` in a process of its own, in turn or several at once.

What is finished is not run again, what was stopped goes on, and a stop of the whole is passed on to
the runs, which save where they are.
"""

from __future__ import annotations

import concurrent.futures
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from launch.runs import UserError, read_figures

__all__ = ["Job", "Outcome", "flags_of", "mean_and_deviation", "run_jobs"]


class Job(NamedTuple):
    """A run that is wanted.

    Attributes:
      row: the name of what it is one seed of.
      seed: its seed.
      workdir: its run directory.
      flags: of ``launch.train``, ``--workdir`` and ``--quiet`` left out.
      is_finished: whether the directory holds its figures already.
    """

    row: str
    seed: int
    workdir: Path
    flags: tuple[str, ...]
    is_finished: bool


class Outcome(NamedTuple):
    """How one run ended: its figures of merit, or what it said when it failed."""

    row: str
    seed: int
    figures: dict[str, float] | None
    error: str = ""


def flags_of(settings: Mapping[str, Any]) -> list[str]:
    """``--config.name=value`` of each setting."""
    return [f"--config.{name}={value}" for name, value in settings.items()]


def mean_and_deviation(values: Sequence[float]) -> str:
    """As people read it: the mean, and the standard deviation where there are several.

    >>> mean_and_deviation([1.0, 2.0]), mean_and_deviation([3.0]), mean_and_deviation([])
    ('1.5 ± 0.71', '3', '')
    """
    if not values:
        return ""
    shown = f"{statistics.fmean(values):.4g}"
    return shown if len(values) == 1 else f"{shown} ± {statistics.stdev(values):.2g}"


def run_jobs(
    jobs: Sequence[Job],
    *,
    folder: Path,
    num_parallel: int,
    console: Console,
    names: Sequence[str],
) -> list[Outcome]:
    """Runs them, and prints a line as each one ends.

    Args:
      jobs: the runs, begun in this order.
      folder: what they share, for compiled programs.
      num_parallel: how many at a time; with several, each has one CPU device.
      console: where to.
      names: the figures that a line shows.

    Raises:
      UserError: if ``launch.train`` finds something wrong in a call; the others are then stopped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **os.environ,
    }
    if num_parallel > 1:
        environment["JAX_NUM_CPU_DEVICES"] = "1"
    outcomes: list[Outcome] = []
    num_there = sum(job.is_finished for job in jobs)
    started = time.perf_counter()
    with _Processes() as processes, concurrent.futures.ThreadPoolExecutor(num_parallel) as pool:
        futures = [pool.submit(_train, job, environment, processes.run) for job in jobs]
        try:
            for future in concurrent.futures.as_completed(futures):
                outcomes.append(future.result())
                pace = (time.perf_counter() - started) / max(1, len(outcomes) - num_there)
                _print_progress(console, outcomes, len(jobs), names, pace)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            processes.stop()
            raise
    return outcomes


class _Processes:
    """Processes that get the SIGTERM which this one gets."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._is_stopped = False
        self._previous: Any = None

    def __enter__(self) -> _Processes:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        return self

    def __exit__(self, *exception) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def run(self, arguments: list[str], environment: dict[str, str]) -> tuple[int, str]:
        """Runs one to its end: its exit code and what it said on stderr."""
        with self._lock:
            if self._is_stopped:
                return 1, "stopped"
            process = subprocess.Popen(
                arguments,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            self._running.add(process)
        _, said = process.communicate()
        with self._lock:
            self._running.discard(process)
        return process.returncode, said

    def stop(self) -> None:
        """Asks all of them to save and end, and starts no more."""
        with self._lock:
            self._is_stopped = True
            for process in self._running:
                process.terminate()


def _train(
    job: Job,
    environment: dict[str, str],
    run: Callable[[list[str], dict[str, str]], tuple[int, str]],
) -> Outcome:
    """One run, unless it is there already."""
    if not job.is_finished:
        arguments = [f"--workdir={job.workdir}", "--quiet", *job.flags]
        code, said = run([sys.executable, "-m", "launch.train", *arguments], environment)
        lines = said.strip().splitlines()
        if code == 2:
            raise UserError((lines or ["launch.train failed."])[-1])
        if code != 0 or read_figures(job.workdir) is None:
            return Outcome(job.row, job.seed, None, (lines or ["it left no figures"])[-1])
    return Outcome(job.row, job.seed, read_figures(job.workdir))


def _print_progress(
    console: Console, outcomes: list[Outcome], total: int, names: Sequence[str], pace: float
) -> None:
    last = outcomes[-1]
    left = pace * (total - len(outcomes))
    if last.figures is None:
        shown = "failed"
    else:
        known = [name for name in names if name in last.figures]
        shown = "  ".join(f"{name} {last.figures[name]:.4g}" for name in known)
    line = f"{len(outcomes)}/{total}  {last.row}, seed {last.seed}: {shown}, {left:.0f} s left"
    console.print(line, soft_wrap=True, highlight=False, markup=False)
