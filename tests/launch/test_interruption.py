"""A run that is stopped, or finds no room to write, goes on as if it had not, bit for bit."""

import resource
import shutil
import signal

import jax
import pytest
from command_lines import (
    TINY,
    final_arrays,
    num_lines,
    own_recipe,
    run,
    snapshot,
    start,
    wait_for,
)

from ebjax.training import Checkpointer
from launch import evaluate, export, report, runs, sample, train


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


def _call(command, name, *args):
    with pytest.raises(SystemExit) as exit_:
        command.main([f"launch.{name}", *map(str, args)])
    return exit_.value.code


def test_only_one_process_trains_in_a_run_directory(tmp_path, capsys):
    workdir = tmp_path / "run"
    args = [*_long_run(tmp_path), "--config.num_steps=200000", f"--workdir={workdir}"]
    process = start("train", *args, cwd=tmp_path)
    try:
        wait_for(lambda: num_lines(workdir / "metrics.jsonl") >= 5, process)
        config = (workdir / "config.json").stat().st_mtime_ns
        for more in ([], ["--overwrite"]):
            assert _call(train, "train", *args, *more) == 2
            err = capsys.readouterr().err
            assert err.startswith(f"launch.train: workdir is {workdir}, in which another process")
            assert err.count("\n") == 1
        assert (workdir / "config.json").stat().st_mtime_ns == config
        assert process.poll() is None
        # Those that look are not kept out, nor told of checkpoints that come and go.
        look = f"--workdir={workdir}"
        assert _call(sample, "sample", look, f"--output={tmp_path / 'x.npz'}") == 0
        assert _call(evaluate, "evaluate", look) == 0
        assert _call(report, "report", look, f"--output={tmp_path / 'x.html'}") == 0
        assert capsys.readouterr().err == ""
    finally:
        process.kill()
        process.communicate()
    with runs.lock_workdir(workdir):  # nothing is left of the lock of a killed process
        pass


def test_what_looks_works_where_a_run_is_trained(finished_copy, tmp_path, capsys):
    with runs.lock_workdir(finished_copy):
        assert _call(train, "train", *TINY, f"--workdir={finished_copy}") == 2
        assert "another process trains" in capsys.readouterr().err
        args = (f"--workdir={finished_copy}", f"--output={tmp_path / 'x.stablehlo'}")
        assert _call(export, "export", *args, "--platforms=cpu") == 0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """As ``uninterrupted``, with the devices and the compiler options of this process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert _call(train, "train", *_long_run(folder), "--quiet", f"--workdir={folder / 'run'}") == 0
    return folder / "run"


@pytest.mark.parametrize(
    ("limit", "saved"),
    [
        (100, []),  # bytes of a file: config.json does not fit
        (1000, []),  # nor the first checkpoint
        (3000, [120, 130]),  # nor all metrics and events
        (30_000, [590, 600]),  # nor the first picture
    ],
)
def test_a_full_disk_is_a_sentence_and_the_run_goes_on(undisturbed, tmp_path, capsys, limit, saved):
    workdir = tmp_path / "run"
    args = (*_long_run(tmp_path), "--quiet", f"--workdir={workdir}")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        assert _call(train, "train", *args) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    err = capsys.readouterr().err
    assert "File too large" in err
    assert "the same command goes on from it." in err
    assert err.count("\n") == 1
    checkpoints = workdir / "checkpoints"
    found = Checkpointer(checkpoints, read_only=True).steps() if checkpoints.exists() else []
    assert found == saved
    assert not [path for path in workdir.rglob("*.tmp") if path.is_file()]
    assert _call(train, "train", *args) == 0
    _same(workdir, undisturbed)


def test_a_finished_run_that_finds_no_room_keeps_its_files(finished_copy, monkeypatch, capsys):
    before = snapshot(finished_copy)

    def full(file, **arrays):
        file.write(b"a part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train.np, "savez", full)
    assert _call(train, "train", *TINY, "--quiet", f"--workdir={finished_copy}") == 1
    assert "No space left on device" in capsys.readouterr().err
    after = snapshot(finished_copy)
    assert {name: after.get(name) for name in before} == before


def test_checkpoints_of_a_version_without_rollbacks_go_on(finished_copy):
    loaded = runs.load_run(str(finished_copy))
    old = {name: value for name, value in loaded.state._asdict().items() if name != "rollbacks"}
    shutil.rmtree(finished_copy / "checkpoints")
    checkpointer = Checkpointer(finished_copy / "checkpoints")
    checkpointer.save(40, old)
    checkpointer.close()
    found = runs.load_run(str(finished_copy)).state
    assert int(found.rollbacks) == 0
    for name in ("params", "ema", "opt_state", "carry"):
        one, other = getattr(loaded.state, name), getattr(found, name)
        assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), one, other)), name
