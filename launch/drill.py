"""Kills a training run at random moments, goes on each time, and compares what it leaves.

  python -m launch.drill --kills=30

A small run is trained twice: once undisturbed, and once by processes that each get a SIGKILL while
they start, train, save a checkpoint, are looked at by a launch.report (which is killed as well) or
end. Each must go on from the newest checkpoint that was complete, and the last one must leave what
the undisturbed run leaves, bit for bit: state, metrics, figures of merit, samples, pictures and no
other file. The exit code is 0 if all of this holds; if not it is 1, and the runs are kept.
"""

from __future__ import annotations

import dataclasses
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from ebjax.training import Checkpointer
from launch import command, runs
from launch.runs import UserError

__all__ = ["main"]

FLAGS = flags.FlagValues()
flags.DEFINE_integer("kills", 30, "How often the run is killed.", flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "Seed of the moments.", flag_values=FLAGS)
flags.DEFINE_string("workdir", None, "New folder, to keep the runs.", flag_values=FLAGS)

_LOG_EVERY, _CHECKPOINT_EVERY = 5, 10
_RUN = (
    "--config=hypergrid",
    "--config.hidden_features=(16,)",
    "--config.steps_per_call=5",
    f"--config.log_every={_LOG_EVERY}",
    f"--config.checkpoint_every={_CHECKPOINT_EVERY}",
)
_MOMENTS = ("training", "saving", "reporting", "starting")
_PATIENCE = 300.0  # seconds until a process that does nothing has failed


class _ViolationError(Exception):
    """Something that must not happen, as a sentence."""


class _Kill(NamedTuple):
    """What one kill met: its moment, the last step in the metrics, the newest checkpoint."""

    moment: str
    reached: int
    saved: int


@dataclasses.dataclass
class _Drill:
    """A run that is killed again and again.

    Attributes:
      folder: what the processes share.
      num_steps: of the run.
      moments: says when to kill.
      violations: what went wrong so far.
      startup: seconds until a process trains, as last seen.
    """

    folder: Path
    num_steps: int
    moments: random.Random
    violations: list[str] = dataclasses.field(default_factory=list)
    startup: float = 5.0

    @property
    def workdir(self) -> Path:
        return self.folder / "killed"

    def start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        """A command in a process of its own; what it says is in ``NAME.txt``."""
        environment = {
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            **os.environ,
        }
        with (self.folder / f"{name}.txt").open("wb") as said:
            return subprocess.Popen(
                [sys.executable, "-m", f"launch.{name}", *arguments],
                stdout=said,
                stderr=subprocess.STDOUT,
                env=environment,
            )

    def train(self, workdir: Path) -> subprocess.Popen[bytes]:
        steps = f"--config.num_steps={self.num_steps}"
        return self.start("train", *_RUN, steps, f"--workdir={workdir}")

    def train_to_the_end(self, workdir: Path) -> None:
        process = self.train(workdir)
        try:
            code = process.wait()
        finally:
            process.kill()
        if code != 0:
            raise _ViolationError(f"launch.train ended with {code}: {self.said('train')}")

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.txt").read_text(errors="replace").strip()

    def reached(self) -> int:
        """The step of the last whole line of the metrics."""
        path = self.workdir / "metrics.jsonl"
        lines = path.read_bytes().count(b"\n") if path.exists() else 0
        return lines * _LOG_EVERY

    def saved(self) -> int:
        """The step of the newest checkpoint that is complete."""
        checkpoints = self.workdir / "checkpoints"
        steps = Checkpointer(checkpoints, read_only=True).steps() if checkpoints.exists() else []
        return steps[-1] if steps else 0

    def kill(self, moment: str) -> _Kill:
        """Starts the run and kills it."""
        saved_before = self.saved()
        processes = [self.train(self.workdir)]
        try:
            self._await(moment, processes)
        finally:
            for process in processes:
                process.send_signal(signal.SIGKILL)
                process.wait()
        self.check_resume(saved_before)
        page = self.folder / "report.html"
        if page.exists() and not page.read_text(encoding="utf-8").endswith("</html>\n"):
            self.violations.append("launch.report left a part of a page.")
        return _Kill(moment, self.reached(), self.saved())

    def _await(self, moment: str, processes: list[subprocess.Popen[bytes]]) -> None:
        """Returns when it is time to kill."""
        uniform, started = self.moments.uniform, time.monotonic()
        if moment == "starting":
            time.sleep(uniform(0, self.startup))
            return
        if moment == "reporting":
            time.sleep(uniform(0, self.startup))
            output = self.folder / "report.html"
            arguments = (f"--workdir={self.workdir}", f"--output={output}")
            processes.append(self.start("report", *arguments))
        # Lines after the newest checkpoint are written again.
        target = self.reached() + self.moments.randint(1, 6) * _LOG_EVERY
        target = self.num_steps if moment == "ending" else min(target, self.num_steps)
        is_over = self.reached() >= self.num_steps
        self._wait(lambda: self.reached() >= target, processes[0])
        if is_over:
            time.sleep(uniform(0, self.startup))
        else:
            self.startup = time.monotonic() - started
        if moment == "saving":
            pattern = "*.orbax-checkpoint-tmp*"
            self._wait(lambda: any((self.workdir / "checkpoints").glob(pattern)), processes[0])
        time.sleep(uniform(0, {"ending": 1.0, "saving": 0.03}.get(moment, 0.1)))

    def _wait(self, condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
        """Until it holds or the process has ended well.

        Raises:
          _ViolationError: if the process fails or does nothing.
        """
        end = time.monotonic() + _PATIENCE
        while not condition():
            code = process.poll()
            if code == 0:
                return
            if code is not None or time.monotonic() > end:
                state = "hangs" if code is None else f"ended with {code}"
                raise _ViolationError(f"launch.train {state}: {self.said('train')}")
            time.sleep(0.003)

    def check_resume(self, saved: int) -> None:
        """Whether the process that has just been killed went on from where it should."""
        said = self.said("train")
        found = re.search(r"(?:going on from|finished at) step (\d+)", said)
        if found and int(found[1]) != saved:
            self.violations.append(f"A run went on from step {found[1]}; {saved} was saved.")
        if "cannot be read" in said or (self.workdir / "damaged_checkpoints").exists():
            self.violations.append(f"The checkpoint of a killed run is damaged: {said}")


def _differences(killed: Path, undisturbed: Path) -> Iterator[str]:
    """A sentence for each thing that two finished runs do not have in common."""
    names, expected = _names(killed), _names(undisturbed)
    for name in sorted(names ^ expected):
        yield f"{name} is left only by the {'killed' if name in names else 'undisturbed'} run."
    for name in sorted(names & expected):
        one, other = killed / name, undisturbed / name
        if one.suffix == ".npz":
            is_same = _arrays_of(one) == _arrays_of(other)
        else:
            is_same = one.is_dir() or one.read_bytes() == other.read_bytes()
        if not is_same:
            yield f"{name} of the killed run is not that of the undisturbed one."
    for step in Checkpointer(undisturbed / "checkpoints", read_only=True).steps():
        if _state_of(killed, step) != _state_of(undisturbed, step):
            yield f"Checkpoint {step} of the killed run is not that of the undisturbed one."


def _names(workdir: Path) -> set[str]:
    """What is in a run directory, down to the names of checkpoints."""
    found = {str(path.relative_to(workdir)) for path in workdir.rglob("*")}
    return {name for name in found if not re.match(r"tensorboard/|checkpoints/[^/]+/", name)}


def _arrays_of(path: Path) -> dict[str, bytes]:
    with np.load(path) as arrays:
        return {name: arrays[name].tobytes() for name in arrays.files}


def _state_of(workdir: Path, step: int) -> list[bytes]:
    state = runs.load_run(str(workdir), checkpoint=str(step)).state
    state = state._replace(key=jax.random.key_data(state.key))
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def _drill(drill: _Drill, num_kills: int, console: Console) -> list[_Kill]:
    """The undisturbed run, the kills, the last process and the comparison."""
    drill.train_to_the_end(drill.folder / "undisturbed")
    kills: list[_Kill] = []
    num_ending = 1 + num_kills // 10
    for i in range(num_kills):
        is_ending = num_kills > 1 and i >= num_kills - num_ending
        kill = drill.kill("ending" if is_ending else _MOMENTS[i % len(_MOMENTS)])
        kills.append(kill)
        lost = max(kill.reached - kill.saved, 0)
        # One checkpoint may be on its way while the next steps are done; the next, whose line of
        # metrics is written before it, waits for it.
        if lost > 2 * _CHECKPOINT_EVERY:
            drill.violations.append(f"Kill {i + 1} lost {lost} steps.")
        console.print(
            f"{i + 1}/{num_kills}  killed while {kill.moment}, at step {kill.reached}; "
            f"saved {kill.saved}",
            highlight=False,
        )
    saved_before = drill.saved()
    drill.train_to_the_end(drill.workdir)
    drill.check_resume(saved_before)
    drill.violations += _differences(drill.workdir, drill.folder / "undisturbed")
    return kills


def _print_table(console: Console, kills: list[_Kill]) -> None:
    table = Table(box=None)
    for name in ("killed while", "kills", "steps lost, mean", "most"):
        table.add_column(name, justify="left" if name == "killed while" else "right")
    for moment in (*_MOMENTS, "ending"):
        lost = [max(k.reached - k.saved, 0) for k in kills if k.moment == moment]
        if lost:
            table.add_row(moment, str(len(lost)), f"{np.mean(lost):.1f}", str(max(lost)))
    console.print(table)


def _run(flag_values: flags.FlagValues) -> int:
    num_kills, seed = flag_values.kills, command.seed(flag_values)
    if num_kills < 1:
        raise UserError(f"kills is {num_kills}; it must be at least 1.")
    given = flag_values.workdir
    folder = Path(tempfile.mkdtemp(prefix="drill_")) if given is None else runs.find_workdir(given)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise UserError(f"workdir is {folder}, which is not empty; give a new folder.")
    console = Console()
    drill = _Drill(folder, num_steps=100 + 40 * num_kills, moments=random.Random(seed))
    try:
        _print_table(console, _drill(drill, num_kills, console))
    except _ViolationError as error:
        drill.violations.append(str(error))
    for violation in drill.violations:
        print(f"{COMMAND.name}: {violation}", file=sys.stderr)
    if drill.violations:
        print(f"{COMMAND.name}: the runs are kept in {folder}.", file=sys.stderr)
        return 1
    console.print(
        f"{num_kills} kills: the run equals the undisturbed one, bit for bit, and lost only steps "
        "after its last checkpoint.",
        soft_wrap=True,
        highlight=False,
    )
    if given is None:
        shutil.rmtree(folder)
    return 0


COMMAND = command.Command("launch.drill", __doc__ or "", FLAGS, _run)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    command.main(COMMAND, argv)


if __name__ == "__main__":
    main()
