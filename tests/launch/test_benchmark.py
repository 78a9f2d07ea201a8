"""The benchmark command: its suites, its ratios, its errors."""

import json
import statistics

import pytest
from rich.console import Console

from launch import benchmark
from launch.benchmarks.suite import Comparison, Suite, Variant
from launch.benchmarks.suites import SUITES


def tiny(name, steps_per_call, num_updates=20):
    options = {
        "num_updates": num_updates,
        "steps_per_call": steps_per_call,
        "backend": "pmap",
        "num_devices": 1,
    }
    return Variant(name, "own", "dispatch", options, num_updates)


def test_suite_prints_a_table_and_the_median_of_paired_ratios():
    suite = Suite(
        "tiny",
        "updates",
        (tiny("a", 10), tiny("b", 1)),
        (Comparison("a", "b", 0.5), Comparison("a", "not there", 1.0)),
    )
    console = Console(record=True, width=160)
    figures = benchmark.run_suite(suite, rounds=3, console=console)
    rates = {row["name"]: row["rates"] for row in figures["rows"]}
    assert all(len(values) == 3 and min(values) > 0 for values in rates.values())
    (comparison,) = figures["comparisons"]
    expected = statistics.median(a / b for a, b in zip(rates["a"], rates["b"], strict=True))
    assert comparison["ratio"] == pytest.approx(expected)
    last = console.export_text().strip().splitlines()[-1]
    assert last == f"a vs b ratio={expected:.2f} bar=0.5"


def test_missing_peer_is_skipped_with_a_line(monkeypatch):
    variant = Variant("gone", "missing", "missing", {}, 1)
    monkeypatch.setattr(
        benchmark._Worker, "_ask", lambda self, line: {"missing": "pip install 'it[bench]'"}
    )
    console = Console(record=True, width=160)
    figures = benchmark.run_suite(
        Suite("none", "updates", (variant,), ()), rounds=1, console=console
    )
    assert figures["rows"] == []
    assert "gone is left out: pip install 'it[bench]'" in console.export_text()


def test_broken_workload_is_reported_and_the_rest_goes_on():
    broken = Variant("broken", "own", "dispatch", {"no_such_option": 1}, 1)
    console = Console(record=True, width=300)
    suite = Suite("both", "updates", (broken, tiny("fine", 10)), ())
    figures = benchmark.run_suite(suite, rounds=1, console=console)
    assert [row["name"] for row in figures["rows"]] == ["fine"]
    assert "no_such_option" in console.export_text()


@pytest.mark.parametrize("name", SUITES)
def test_suites_are_consistent(name):
    suite = SUITES[name]
    names = [variant.name for variant in suite.variants]
    assert len(set(names)) == len(names)
    for comparison in suite.comparisons:
        assert {comparison.name, comparison.peer} <= set(names)
    json.dumps([variant._asdict() for variant in suite.variants])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--suite=none"], "none"),
        ([], "suite"),
        (["--suite=dispatch", "--rounds=0"], "rounds"),
        (["--suite=dispatch", "--json=/no/such/folder/x.json"], "/no/such/folder"),
    ],
)
def test_bad_calls_end_with_one_sentence(arguments, named, capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(["launch.benchmark", *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert named in error
    assert len(error.splitlines()) == 1
    benchmark.FLAGS.unparse_flags()
