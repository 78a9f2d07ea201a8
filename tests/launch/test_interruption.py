"""A run that is stopped, or finds no room to write, goes on as if it had not, bit for bit."""

import signal

import pytest
from command_lines import (
    TINY,
    final_arrays,
    num_lines,
    own_recipe,
    run,
    start,
    wait_for,
)

from ebjax.training import Checkpointer


def _same(workdir, uninterrupted):
    metrics = (workdir / "metrics.jsonl").read_bytes()
    assert metrics == (uninterrupted / "metrics.jsonl").read_bytes()
    assert final_arrays(workdir) == final_arrays(uninterrupted)


def _long_run(folder):
    """60 checkpoints in a few seconds: a kill often hits one that is being written."""
    return [*own_recipe(folder), "--config.break_at=-1", "--config.num_steps=600"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    run("train", *_long_run(folder), "--workdir=run", cwd=folder)
    return folder / "run"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_saves_and_exits_with_0(uninterrupted, tmp_path, number):
    workdir = tmp_path / "run"
    train = ("train", *_long_run(tmp_path), f"--workdir={workdir}")
    process = start(*train, cwd=tmp_path)
    wait_for(lambda: num_lines(workdir / "metrics.jsonl") >= 5, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert err == ""
    assert f"stopped by {number.name} at step " in out
    step = int(out.split(f"{number.name} at step ")[1].split(",")[0])
    assert Checkpointer(workdir / "checkpoints", read_only=True).steps()[-1] == step
    assert step < 600
    out, _ = run(*train, cwd=tmp_path)
    assert f"going on from step {step}" in out
    _same(workdir, uninterrupted)


def test_sigterm_before_the_first_step_leaves_a_run_that_goes_on(finished, tmp_path):
    workdir = tmp_path / "grid"
    process = start("train", *TINY, f"--workdir={workdir}", cwd=tmp_path)
    wait_for((workdir / "config.json").exists, process)
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "stopped by SIGTERM" in out
    run("train", *TINY, f"--workdir={workdir}", cwd=tmp_path)
    _same(workdir, finished)
