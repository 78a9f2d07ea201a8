"""The commands as a user calls them: from any folder, again, after damage, after a bad loss."""

import json
import shutil

import numpy as np
import pytest
from command_lines import ROOT, TINY, final_arrays, own_recipe, run, snapshot

from ebjax.training import Checkpointer, read_metrics


def test_train_leaves_a_run_directory(finished):
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        "config.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "evaluation.json",
        "samples.npz",
        "figures",
    }
    assert not [name for name in names if name.endswith(".tmp")]
    settings = json.loads((finished / "config.json").read_text())
    assert settings["recipe"] == "hypergrid"
    assert settings["hidden_features"] == [16]
    assert settings["num_steps"] == settings["learning_rate_decay_steps"] == 40
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == list(range(5, 41, 5))
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert [row["step"] for row in rows if "total_variation" in row] == [10, 20, 30, 40]
    assert list((finished / "tensorboard").glob("events*"))
    pictures = list((finished / "figures").glob("*.png"))
    assert {path.stem for path in pictures} >= {"distributions", "training_curves"}
    assert all(path.stat().st_size > 1000 for path in pictures)
    assert len(np.load(finished / "samples.npz")["positions"]) == 500


def test_sample_and_evaluate_read_a_run_back(finished, tmp_path):
    before = snapshot(finished)
    draw = ("sample", f"--workdir={finished}", "--num_samples=5", "--seed=1")
    out, err = run(*draw, "--output=a.npz", cwd=tmp_path)
    assert "a.npz" in out
    assert "step 40" in out
    assert err == ""
    run(*draw, "--output", "b.npz", "--checkpoint=40", cwd=tmp_path)
    first, second = np.load(tmp_path / "a.npz"), np.load(tmp_path / "b.npz")
    assert set(first) == {"positions", "log_rewards", "lengths"}
    assert first["positions"].shape == (5, 2)
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
    _, err = run("evaluate", f"--workdir={finished}", "--json=figures.json", cwd=tmp_path)
    assert err == ""
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {"total_variation", "jensen_shannon", "log_z", "log_z_exact"} <= set(figures)
    assert figures["step"] == 40
    trained = json.loads((finished / "evaluation.json").read_text())
    for name in ("total_variation", "jensen_shannon", "log_z", "log_z_exact"):
        assert figures[name] == pytest.approx(trained[name], rel=1e-6)
    assert snapshot(finished) == before


def test_a_second_train_goes_on_or_changes_no_checkpoint(finished_copy):
    """The path of a config, from the repository; the end is where one run would have ended."""
    by_path = ["--config", "launch/configs/hypergrid.py", *TINY[1:], f"--workdir={finished_copy}"]
    before = snapshot(finished_copy / "checkpoints")
    metrics = (finished_copy / "metrics.jsonl").read_bytes()
    out, err = run("train", *by_path, cwd=ROOT)
    assert "finished at step 40" in out
    assert err == ""
    assert snapshot(finished_copy / "checkpoints") == before
    assert (finished_copy / "metrics.jsonl").read_bytes() == metrics
    out, _ = run("train", *by_path, "--config.num_steps=50", cwd=ROOT)
    assert "going on from step 40" in out
    rows = read_metrics(finished_copy / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(5, 51, 5))
    assert (finished_copy / "metrics.jsonl").read_bytes().startswith(metrics)
    # The decay was made for 40 steps and is kept.
    settings = json.loads((finished_copy / "config.json").read_text())
    assert settings["learning_rate_decay_steps"] == 40


def test_overwrite_starts_again(finished, finished_copy):
    (finished_copy / "notes.txt").write_text("mine")
    workdir = f"--workdir={finished_copy}"
    run("train", *TINY, "--config.seed=1", "--overwrite", "--quiet", workdir, cwd=finished_copy)
    assert json.loads((finished_copy / "config.json").read_text())["seed"] == 1
    assert [row["step"] for row in read_metrics(finished_copy / "metrics.jsonl")] == list(
        range(5, 41, 5)
    )
    assert (finished_copy / "notes.txt").read_text() == "mine"
    assert final_arrays(finished_copy)[1] != final_arrays(finished)[1]


def test_quiet_prints_nothing_and_piped_output_has_a_line_a_log_point(finished_copy):
    shutil.rmtree(finished_copy)
    out, err = run("train", *TINY, "--config.num_steps=15", f"--workdir={finished_copy}", cwd=ROOT)
    lines = [line for line in out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["5/15", "10/15", "15/15"]
    assert all("loss " in line and "log_z " in line for line in lines)
    assert "steps/s" in lines[-1]
    assert "left" in lines[-1]
    assert "\x1b" not in out
    assert str(finished_copy) in out
    assert err == ""
    out, err = run(
        "train", *TINY, "--config.num_steps=15", f"--workdir={finished_copy}", "--quiet", cwd=ROOT
    )
    assert (out, err) == ("", "")


def test_a_damaged_newest_checkpoint_is_skipped(finished, finished_copy):
    for path in (finished_copy / "checkpoints" / "40").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    _, err = run("evaluate", f"--workdir={finished_copy}", cwd=finished_copy)
    assert "Checkpoint 40" in err
    assert "Traceback" not in err
    assert err.count("\n") == 1
    out, err = run("train", *TINY, f"--workdir={finished_copy}", cwd=finished_copy)
    assert "going on from step 30" in out
    assert "damaged_checkpoints/40" in err
    assert "Traceback" not in err
    assert (finished_copy / "damaged_checkpoints" / "40").is_dir()
    assert (finished_copy / "metrics.jsonl").read_bytes() == (
        finished / "metrics.jsonl"
    ).read_bytes()
    assert final_arrays(finished_copy) == final_arrays(finished)


def test_what_a_kill_left_before_the_first_step_is_no_obstacle(tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "config.json.tmp").write_text('{"rec')
    run("train", *TINY, "--config.num_steps=5", f"--workdir={workdir}", cwd=tmp_path)
    assert not (workdir / "config.json.tmp").exists()


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    train = ("train", *own_recipe(tmp_path), f"--workdir={tmp_path / 'run'}")
    _, err = run(*train, cwd=tmp_path, code=1)
    assert "step 27" in err
    assert "last good checkpoint is step 20" in err
    assert "Traceback" not in err
    assert err.count("\n") == 1
    checkpointer = Checkpointer(tmp_path / "run" / "checkpoints", read_only=True)
    assert checkpointer.steps() == [10, 20]
    kept = snapshot(tmp_path / "run" / "checkpoints")
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")][-1] == 25
    # Deterministic, so it fails again and leaves the same; the run can be drawn from, and its
    # config.json knows where the recipe is.
    _, err = run(*train, cwd=tmp_path, code=1)
    assert "step 27" in err
    assert snapshot(tmp_path / "run" / "checkpoints") == kept
    run("sample", "--workdir=run", "--output=s.npz", cwd=tmp_path)
    assert np.load(tmp_path / "s.npz")["x"].shape == (64,)


def test_a_loss_that_is_bad_from_the_start_saves_nothing(tmp_path):
    train = ("train", *own_recipe(tmp_path), "--config.break_at=0", "--workdir=run")
    _, err = run(*train, cwd=tmp_path, code=1)
    assert "step 0" in err
    assert "Nothing was saved" in err
    assert err.count("\n") == 1


def test_rollbacks_are_told_and_then_used_up(tmp_path):
    """The second time, with a quarter of the learning rate, as it is the same step that is bad."""
    train = ("train", *own_recipe(tmp_path), "--config.max_rollbacks=2", "--workdir=run")
    out, err = run(*train, cwd=tmp_path, code=1)
    assert "Going back to step 20 with 0.5 of the learning rate (rollback 1 of 2)" in out
    assert "with 0.25 of the learning rate (rollback 2 of 2)" in out
    assert "All rollbacks are used up. The last good checkpoint is step 20." in err
    assert err.count("\n") == 1
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [5, 10, 15, 20, 25]
