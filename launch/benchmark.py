"""Times this package against its peers on the same work, in turn, in one run.

  python -m launch.benchmark --suite=langevin
  python -m launch.benchmark --suite=gflownet_hypergrid --json=figures.json

Each variant runs in a process of its own. The variants take turns for several rounds, so that a
machine which slows down slows all of them; a ratio is the median over rounds of the two rates of
the same round. Compilation is reported apart. A comparison ends the output as

  NAME vs PEER ratio=X bar=Y

where it has a bar.

Peers come with the extra 'bench' (see CONTRIBUTING.md for the two that pip cannot resolve); those
that are not installed are skipped with a line that says how to install them.
"""

from __future__ import annotations

import collections
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console
from rich.table import Table

from launch import command, runs
from launch.benchmarks.suite import Suite, Variant
from launch.benchmarks.suites import SUITES
from launch.runs import UserError

__all__ = ["main", "run_suite"]

FLAGS = flags.FlagValues()
flags.DEFINE_string("suite", None, f"Which suite: {', '.join(SUITES)}.", flag_values=FLAGS)
flags.DEFINE_string("json", None, "File to write all figures to as well.", flag_values=FLAGS)
flags.DEFINE_integer("rounds", 9, "How many times each variant runs.", flag_values=FLAGS)
flags.DEFINE_string(
    "only",
    None,
    "Comma-separated parts of names: run the variants that have one.",
    flag_values=FLAGS,
)


class _Worker:
    """A process with one workload."""

    def __init__(self, variant: Variant):
        self.variant = variant
        self.seconds: list[float] = []
        self.facts: list[dict[str, float]] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "launch.benchmarks.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # The processes share a GPU, of which each would take most of the memory.
            env={"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ},
        )
        fields = ("module", "function", "options", "num_devices")
        self.start = self._ask(json.dumps({name: getattr(variant, name) for name in fields}))

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            assert self._process.stderr is not None
            tail = self._process.stderr.read().strip().splitlines()[-1:]
            raise RuntimeError(f"the process of {self.variant.name} ended: {' '.join(tail)}")
        return json.loads(answer)

    def run(self) -> None:
        """One round."""
        answer = self._ask("run")
        self.seconds.append(answer["seconds"])
        self.facts.append(answer["facts"])

    def rates(self) -> list[float]:
        """Units of work a second, by round."""
        return [self.variant.work / seconds for seconds in self.seconds]

    def figures(self, fact: str) -> list[float]:
        """A measured figure, or the rate, by round."""
        return [facts[fact] for facts in self.facts] if fact else self.rates()

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def run_suite(
    suite: Suite, *, rounds: int, console: Console, only: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Runs a suite, prints its table and comparisons, and returns all figures."""
    workers: dict[str, _Worker] = {}
    try:
        for variant in suite.variants:
            if only and not any(part in variant.name for part in only):
                continue
            try:
                worker = _Worker(variant)
            except RuntimeError as error:
                console.print(f"{variant.name} is left out: {error}", soft_wrap=True, markup=False)
                continue
            if "missing" in worker.start:
                worker.close()
                console.print(
                    f"{variant.name} is left out: {worker.start['missing']}",
                    soft_wrap=True,
                    markup=False,
                )
                continue
            workers[variant.name] = worker
        for _ in range(rounds):
            for worker in workers.values():
                worker.run()
    finally:
        for worker in workers.values():
            worker.close()
    _print_table(suite, workers, console)
    comparisons = _compare(suite, workers, console)
    rows = [
        {
            "name": worker.variant.name,
            "rates": worker.rates(),
            "compile_seconds": worker.start["warm_up_seconds"],
            "facts": worker.facts[-1],
            "note": worker.start["note"],
        }
        for worker in workers.values()
    ]
    return {"unit": suite.unit, "rows": rows, "comparisons": comparisons}


def _compare(suite: Suite, workers: dict[str, _Worker], console: Console) -> list[dict[str, Any]]:
    """Ratios, median over rounds, and the geometric means of those that have a group."""
    comparisons, groups = [], collections.defaultdict(list)
    for comparison in suite.comparisons:
        if comparison.name not in workers or comparison.peer not in workers:
            continue
        own, peer = (
            workers[name].figures(comparison.fact) for name in (comparison.name, comparison.peer)
        )
        ratio = statistics.median(a / b for a, b in zip(own, peer, strict=True))
        comparisons.append({**comparison._asdict(), "ratio": ratio})
        of_what = f" {comparison.fact}" if comparison.fact else ""
        line = f"{comparison.name} vs {comparison.peer}{of_what} ratio={ratio:.2f}"
        if comparison.group:
            groups[comparison.group, comparison.bar].append(ratio)
        elif comparison.bar:
            line += f" bar={comparison.bar:g}"
        console.print(line, highlight=False)
    for (group, bar), ratios in groups.items():
        mean = statistics.geometric_mean(ratios)
        line = f"{group}, geometric mean of {len(ratios)} ratio={mean:.2f} bar={bar:g}"
        console.print(line, highlight=False)
    for limit in suite.limits:
        if limit.name in workers:
            figure = workers[limit.name].facts[-1][limit.fact]
            line = f"{limit.name} {limit.fact}={figure:.3g} at most {limit.bar:g}"
            console.print(line, highlight=False)
    return comparisons


def _print_table(suite: Suite, workers: dict[str, _Worker], console: Console) -> None:
    table = Table(title=suite.about, title_justify="left")
    table.add_column("variant", no_wrap=True)
    for column in (f"{suite.unit}/s", "min", "max", "compile s"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("measured")
    for worker in workers.values():
        rates = worker.rates()
        numbers = (statistics.median(rates), min(rates), max(rates))
        table.add_row(
            worker.variant.name,
            *(f"{number:,.4g}" if number < 1e5 else f"{number / 1e6:.3f} M" for number in numbers),
            f"{worker.start['warm_up_seconds']:.1f}",
            ", ".join(f"{name} {value:.3g}" for name, value in worker.facts[-1].items()),
        )
    console.print(table)


def _run(flag_values: flags.FlagValues) -> int:
    if flag_values.suite not in SUITES:
        raise UserError(f"suite is {flag_values.suite!r}; it must be one of {', '.join(SUITES)}.")
    if flag_values.rounds < 1:
        raise UserError(f"rounds is {flag_values.rounds}; it must be at least 1.")
    json_path = Path(flag_values.json).expanduser() if flag_values.json else None
    if json_path is not None and not json_path.absolute().parent.is_dir():
        raise UserError(f"json is {flag_values.json!r}; its folder does not exist.")
    only = tuple(flag_values.only.split(",")) if flag_values.only else ()
    console = Console(width=None if sys.stdout.isatty() else 160)
    figures = run_suite(
        SUITES[flag_values.suite], rounds=flag_values.rounds, console=console, only=only
    )
    if json_path is not None:
        runs.write_json(json_path, {"suite": flag_values.suite, **figures})
    return 0


COMMAND = command.Command("launch.benchmark", __doc__ or "", FLAGS, _run)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    command.main(COMMAND, argv)


if __name__ == "__main__":
    main()
