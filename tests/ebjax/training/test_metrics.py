"""metrics.jsonl: what is written, what a resumed run drops, what is refused."""

import json
import logging
import math

import pytest

from ebjax.training import MetricsWriter, read_metrics


def _write(folder, steps, **options):
    writer = MetricsWriter(folder, **options)
    for step in steps:
        writer.write(step, {"loss": 1 / 3 + step}, steps_per_second=5.0)
    writer.close()


def test_one_object_a_line_with_step_and_loss(tmp_path):
    _write(tmp_path, [5, 10])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 5, "loss": 1 / 3 + 5},
        {"step": 10, "loss": 1 / 3 + 10},
    ]
    assert read_metrics(tmp_path / "metrics.jsonl") == [json.loads(line) for line in lines]
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_numbers_that_are_not_finite_are_numbers(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "a": NaN, "b": -Infinity, "c": 3}\n')
    ((step, a, b, c),) = (row.values() for row in read_metrics(path))
    assert (step, math.isnan(a), b, c) == (0, True, -math.inf, 3)


@pytest.mark.parametrize(
    ("resume_step", "is_lost"), [(10, False), (12, False), (14, False), (15, True), (40, True)]
)
def test_lines_that_are_missing_are_a_warning(tmp_path, caplog, resume_step, is_lost):
    _write(tmp_path, [5, 10])
    with caplog.at_level(logging.WARNING, "ebjax"):
        MetricsWriter(tmp_path, resume_step=resume_step, log_every=5).close()
    assert ("ends at step 10" in caplog.text) == is_lost


@pytest.mark.parametrize("tail", ['{"step": 15, "lo', "{", '{"step": 15, "loss": 1.0'])
def test_a_last_line_that_was_cut_is_dropped(tmp_path, tail):
    _write(tmp_path, [5, 10])
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + tail.encode())
    assert [row["step"] for row in read_metrics(path)] == [5, 10]
    _write(tmp_path, [15], resume_step=10)
    assert path.read_bytes().startswith(whole)
    assert [row["step"] for row in read_metrics(path)] == [5, 10, 15]


def test_lines_after_the_step_of_the_checkpoint_are_dropped(tmp_path):
    _write(tmp_path, [5, 10, 15, 20])
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    _write(tmp_path, [], resume_step=12)
    assert [row["step"] for row in read_metrics(path)] == [5, 10]
    _write(tmp_path, [15, 20], resume_step=10)
    assert path.read_bytes() == whole  # the same bytes, so numbers survive being read


@pytest.mark.parametrize(
    "line",
    [
        b"not json",
        b"[1, 2]",
        b'{"loss": 1}',
        b'{"step": "5"}',
        b"\xff",
        b'{"step": 6, "loss": "1.0"}',
        b'{"step": 6, "loss": null}',
        b'{"step": 6, "loss": 1' + 400 * b"0" + b"}",
        b'{"step": 5, "loss": 1.0}',  # not later than the line before
        100_000 * b"[",
    ],
)
def test_a_malformed_line_is_named(tmp_path, line):
    _write(tmp_path, [5])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + line + b"\n" + b'{"step": 10, "loss": 1.0}\n')
    damaged = path.read_bytes()
    with pytest.raises(ValueError, match="line 2 is not a JSON object with a step"):
        read_metrics(path)
    with pytest.raises(ValueError, match="line 2"):
        MetricsWriter(tmp_path, resume_step=5)
    assert path.read_bytes() == damaged


def test_a_run_that_went_back_writes_its_lines_again(tmp_path):
    _write(tmp_path, [5, 10, 20])
    expected = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "other").mkdir()
    writer = MetricsWriter(tmp_path / "other")
    for step in (5, 10, 15):
        writer.write(step, {"loss": 1 / 3 + step}, steps_per_second=5.0)
    writer.rewind(10)
    writer.write(20, {"loss": 1 / 3 + 20}, steps_per_second=5.0)
    writer.close()
    assert (tmp_path / "other" / "metrics.jsonl").read_bytes() == expected
