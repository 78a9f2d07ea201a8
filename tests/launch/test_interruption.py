"""A run that is killed or stopped at any moment goes on as if it had not been, bit for bit."""

import random
import signal
import time

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


def _kill_at_random_moments(folder, workdir, num_kills, seed):
    rng = random.Random(seed)
    metrics = workdir / "metrics.jsonl"
    for _ in range(num_kills):
        process = start("train", *_long_run(folder), f"--workdir={workdir}", cwd=folder)
        # Some lines further than the newest checkpoint can be, then any moment.
        target = num_lines(metrics) + rng.randint(1, 12)
        wait_for(lambda target=target: num_lines(metrics) >= min(target, 115), process)
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    run("train", *_long_run(folder), f"--workdir={workdir}", cwd=folder)


def test_sigkill_at_arbitrary_moments(uninterrupted, tmp_path):
    _kill_at_random_moments(tmp_path, tmp_path / "run", num_kills=4, seed=1)
    _same(tmp_path / "run", uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 6))
def test_sigkill_many_times(uninterrupted, tmp_path, seed):
    _kill_at_random_moments(tmp_path, tmp_path / "run", num_kills=10, seed=seed)
    _same(tmp_path / "run", uninterrupted)


def test_sigkill_of_a_flow(finished, tmp_path):
    """The recipe with everything: two optimizers, a decaying exploration, a judged checkpoint."""
    workdir = tmp_path / "grid"
    train = ("train", *TINY, f"--workdir={workdir}")
    for lines in (3, 7):
        process = start(*train, cwd=tmp_path)
        wait_for(lambda lines=lines: num_lines(workdir / "metrics.jsonl") >= lines, process)
        process.kill()
        process.communicate()
    run(*train, cwd=tmp_path)
    _same(workdir, finished)


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.5, 1.0, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0])
def test_sigkill_after_a_time(finished, tmp_path, delay):
    """Kills while the command starts and while it ends, too."""
    workdir = tmp_path / "grid"
    process = start("train", *TINY, f"--workdir={workdir}", cwd=tmp_path)
    time.sleep(delay)
    process.kill()
    process.communicate()
    run("train", *TINY, f"--workdir={workdir}", cwd=tmp_path)
    _same(workdir, finished)


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
