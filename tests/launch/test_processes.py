"""Two processes on loopback, one CPU device each: train, save, go on, stop, fail together."""

import queue
import shutil
import signal
import socket
import time

import jax
import numpy as np
import pytest
from command_lines import TINY, num_lines, own_recipe, run, snapshot, start, wait_for
from jax.experimental import multihost_utils

from ebjax.training import Checkpointer, read_metrics
from launch import processes, runs

TWO_DEVICES = {"JAX_NUM_CPU_DEVICES": "2"}
BACKENDS = ("pmap", "shard_map")


def start_pair(*args, cwd, own=((), ())):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    pair = (f"--coordinator_address=localhost:{port}", "--num_processes=2")
    return [
        start("train", *args, *own[index], *pair, f"--process_id={index}", cwd=cwd)
        for index in range(2)
    ]


def finish_pair(processes, *, code=0, timeout=120):
    try:
        results = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [code, code], results
    return results


def state_of(workdir):
    state = runs.load_run(str(workdir)).state
    return jax.tree.leaves(state._replace(key=jax.random.key_data(state.key)))


def _train_and_compare(tmp_path, args, backend, names):
    """10 steps by two processes, 10 more by two, 10 more by one; against 30 by one."""
    args = [*args, f"--config.backend={backend}", "--config.checkpoint_every=10"]
    args = [*args, "--config.log_every=5", "--config.num_devices=0"]
    alone = ["--config.num_steps=30", f"--workdir={tmp_path / 'alone'}"]
    run("train", *args, *alone, cwd=tmp_path, env=TWO_DEVICES)
    workdir = f"--workdir={tmp_path / 'pair'}"
    for num_steps in (10, 20):
        each = ["--config.num_steps=" + str(num_steps), workdir]
        (out, _), (silent, _) = finish_pair(start_pair(*args, *each, cwd=tmp_path))
        assert "on 2 CPU devices" in out
        assert "steps" not in silent  # the second process leaves the talking to the first
        assert Checkpointer(tmp_path / "pair" / "checkpoints", read_only=True).steps()[-1] == (
            num_steps
        )
    assert "going on from step 10" in out
    out, _ = run("train", *args, "--config.num_steps=30", workdir, cwd=tmp_path, env=TWO_DEVICES)
    assert "going on from step 20" in out
    expected = read_metrics(tmp_path / "alone" / "metrics.jsonl")
    found = read_metrics(tmp_path / "pair" / "metrics.jsonl")
    assert [row["step"] for row in found] == [5, 10, 15, 20, 25, 30]
    for one, two in zip(expected, found, strict=True):
        assert set(one) == set(two)
        for name in set(names) & set(one):  # equal up to the order of a sum over two devices
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), (name, two["step"])
    for one, two in zip(state_of(tmp_path / "alone"), state_of(tmp_path / "pair"), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_processes_train_save_and_go_on(tmp_path, backend):
    args = [*own_recipe(tmp_path), "--config.break_at=-1"]
    _train_and_compare(tmp_path, args, backend, ["loss", "gradient_norm"])


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_processes_train_a_flow(tmp_path, backend):
    args = [*TINY, "--config.learning_rate_decay_steps=30"]
    _train_and_compare(tmp_path, args, backend, ["loss", "log_z", "elbo", "total_variation"])


def test_a_wrong_call_ends_both(tmp_path, finished_copy):
    before = snapshot(finished_copy)
    args = [*TINY, "--config.num_devices=2", f"--workdir={finished_copy}"]
    # Both are wrong.
    for _, err in finish_pair(start_pair(*args, "--config.side=9", cwd=tmp_path), code=2):
        assert err.count("config.side is 9") == 1
        assert "Traceback" not in err
    # One is wrong, and the other one does not wait for it.
    own = ((), ("--config.batch_size=0",))
    first, second = finish_pair(start_pair(*args, cwd=tmp_path, own=own), code=2)
    assert "process_id 1 cannot go on" in first[1]
    assert "batch_size is 0" in second[1]
    # Both are right, and not the same.
    shutil.rmtree(tmp_path / "new", ignore_errors=True)
    own = ((), ("--config.seed=3",))
    args = [*TINY, "--config.num_devices=2", f"--workdir={tmp_path / 'new'}"]
    for _, err in finish_pair(start_pair(*args, cwd=tmp_path, own=own), code=2):
        assert "config is not the same" in err
        assert "Traceback" not in err
    assert not (tmp_path / "new").exists()
    assert snapshot(finished_copy) == before


def test_sigterm_to_both_saves_and_the_pair_goes_on(tmp_path):
    workdir = tmp_path / "run"
    args = [*own_recipe(tmp_path), "--config.break_at=-1", f"--workdir={workdir}"]
    pair = start_pair(*args, "--config.num_steps=200000", cwd=tmp_path)
    wait_for(lambda: num_lines(workdir / "metrics.jsonl") >= 5, pair[0])
    for process in pair:
        process.send_signal(signal.SIGTERM)
    (out, err), _ = finish_pair(pair)
    assert "stopped by a preemption at step " in out
    assert "Traceback" not in err
    step = int(out.split("preemption at step ")[1].split(",")[0])
    assert Checkpointer(workdir / "checkpoints", read_only=True).steps()[-1] == step
    end = step + 10
    (out, _), _ = finish_pair(start_pair(*args, f"--config.num_steps={end}", cwd=tmp_path))
    assert f"going on from step {step}" in out


def test_a_bad_loss_ends_both(tmp_path):
    args = [*own_recipe(tmp_path), f"--workdir={tmp_path / 'run'}"]
    for _, err in finish_pair(start_pair(*args, cwd=tmp_path), code=1):
        assert "not finite at step 27" in err
        assert "Traceback" not in err


def test_a_stranger_who_connects_and_goes_ends_nothing(monkeypatch):
    told, ends = [], queue.Queue()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "leave", ends.put)
    monkeypatch.setattr(
        multihost_utils, "broadcast_one_to_all", lambda numbers: told.append(numbers) or numbers
    )

    def connect(words):
        connection = socket.create_connection(("localhost", int(told[-1][0])))
        connection.sendall(words)
        return connection

    for is_regular in (True, False):
        with processes.watching_each_other("localhost:1"):
            hello = told[-1][1:].tobytes()
            for words in (b"", b"GET / HTTP/1.1", bytes(len(hello))):
                connect(words).close()
            other = connect(hello)
            if is_regular:
                other.sendall(processes._GOODBYE)
            other.close()
            if is_regular:
                with pytest.raises(queue.Empty):
                    ends.get(timeout=1)
            else:
                assert "another process has ended" in ends.get(timeout=10)
    assert told[0][1:].tolist() != told[1][1:].tolist()


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_is_lost_ends_the_other_and_the_pair_goes_on(tmp_path, killed):
    workdir = tmp_path / "run"
    args = [*own_recipe(tmp_path), "--config.break_at=-1", f"--workdir={workdir}"]
    pair = start_pair(*args, "--config.num_steps=200000", cwd=tmp_path)
    wait_for(lambda: num_lines(workdir / "metrics.jsonl") >= 5, pair[0])
    pair[killed].kill()
    other = pair[1 - killed]
    started = time.monotonic()
    try:
        _, err = other.communicate(timeout=100)
    finally:
        other.kill()
    assert time.monotonic() - started < 15  # JAX alone would notice after 20 s
    assert other.returncode != 0
    # Where JAX notices first that its process 0 is gone, the words are its own.
    assert "another process has ended" in err or (killed == 0 and "another task died" in err)
    assert "Traceback" not in err
    step = Checkpointer(workdir / "checkpoints", read_only=True).steps()[-1]
    end = f"--config.num_steps={step + 10}"
    (out, _), _ = finish_pair(start_pair(*args, end, cwd=tmp_path))
    assert f"going on from step {step}" in out
