"""Sweeps: which runs, that none is repeated or lost, and what is said to be best."""

import contextlib
import doctest
import io
import json
import signal
import statistics

import numpy as np
import pytest
from command_lines import (
    environment,
    final_arrays,
    num_lines,
    own_recipe,
    run,
    snapshot,
    start,
    wait_for,
)

from ebjax.training import read_metrics
from launch import schedule, sweep, together, train
from launch.axes import Axis
from launch.sweep import points_of


@pytest.fixture
def counted(monkeypatch):
    """Trains in this process, which is faster; the flags of each run that was made."""
    made = []

    def train_here(self, arguments, environment):
        flags = arguments[arguments.index("launch.train") :]
        made.append(flags)
        said = io.StringIO()
        with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as exit_:
            train.main(flags)
        return exit_.value.code, said.getvalue()

    monkeypatch.setattr(schedule._Processes, "run", train_here)
    return made


def call(*args, code=0):
    with pytest.raises(SystemExit) as exit_:
        sweep.main(["launch.sweep", *map(str, args)])
    assert exit_.value.code == code


@pytest.fixture
def base(tmp_path):
    """Flags of a sweep of the recipe that fits a number, which diverges where it is told to."""
    steps = ["--config.num_steps=10", "--config.break_at=-1", "--metric=x"]
    return [*own_recipe(tmp_path), *steps, f"--workdir={tmp_path / 'sweep'}"]


def test_points_are_draws_times_grid():
    axes = [
        Axis("grid", "side", (8, 16)),
        Axis("uniform", "epsilon", (0.25, 0.5)),
        Axis("log_uniform", "rate", (1e-4, 1e-1)),
        Axis("uniform", "width", (3, 5)),
        Axis("log_uniform", "depth", (1, 100)),
    ]
    points = points_of(axes, trials=500, seed=1)
    assert len(points) == 1000
    assert points[:6] == points_of(axes, trials=3, seed=1)  # more trials keep the first ones
    assert points[:2] != points_of(axes, trials=1, seed=2)
    values = {name: np.array([point[name] for point in points[::2]]) for name in points[0]}
    assert np.array_equal(values["rate"], [point["rate"] for point in points[1::2]])
    assert all(float(f"{value:.3g}") == value for value in values["rate"])
    # Kolmogorov's distance to the uniform law; 1.95 is exceeded once in 1000 times.
    for uniform in (4 * (values["epsilon"] - 0.25), np.log10(values["rate"]) / 3 + 4 / 3):
        ranks = np.arange(501) / 500
        ordered = np.sort(uniform)
        distance = max(np.abs(ordered - ranks[1:]).max(), np.abs(ordered - ranks[:-1]).max())
        assert distance * 500**0.5 < 1.95
    counts = np.bincount(values["width"])
    assert list(counts[:3]) == [0, 0, 0]
    assert np.abs(counts[3:] - 500 / 3).max() < 5 * (500 * 2 / 9) ** 0.5
    assert values["depth"].min() == 1
    assert values["depth"].max() > 50
    below = np.mean(values["depth"] < 10)  # log(9.5 / 0.5) / log(100.5 / 0.5)
    share = np.log(19.0) / np.log(201.0)
    assert abs(below - share) < 5 * (share * (1 - share) / 500) ** 0.5


def test_the_best_mean_is_first_and_nothing_is_repeated(base, counted, tmp_path, capsys):
    grid = ["--grid.ema_decay=0.0,0.9", "--seeds=2"]
    call(*base, *grid)
    assert len(counted) == 4
    assert "--config.ema_decay=0.9" in counted[1]
    assert "--config.break_at=-1" in counted[1]
    folder = tmp_path / "sweep"
    values = {
        decay: [
            json.loads((folder / f"ema_decay={decay}-{seed}" / "evaluation.json").read_text())["x"]
            for seed in (0, 1)
        ]
        for decay in (0.0, 0.9)
    }
    assert values[0.0][0] != values[0.0][1]
    best = min(values, key=lambda decay: sum(values[decay]))
    written = json.loads((folder / "sweep.json").read_text())
    assert [row["settings"]["ema_decay"] for row in written["rows"]] == [best, 0.9 - best]
    row = written["rows"][0]
    assert row["mean"] == pytest.approx(sum(values[best]) / 2)
    assert row["deviation"] == pytest.approx(statistics.stdev(values[best]))
    assert [entry["seed"] for entry in row["runs"]] == [0, 1]
    out = capsys.readouterr().out
    assert f"{row['mean']:.4g} ± {row['deviation']:.2g}" in out
    # The same again trains nothing; the other end is best where higher is better.
    call(*base, *grid, "--maximize")
    assert len(counted) == 4
    written = json.loads((folder / "sweep.json").read_text())
    assert [row["settings"]["ema_decay"] for row in written["rows"]] == [0.9 - best, best]
    # Figures that damage has made of something else are made again; lost lines are a sentence.
    run_folder = folder / "ema_decay=0.9-1"
    figures = (run_folder / "evaluation.json").read_bytes()
    for damaged in (b"{", b"[1]", b'{"x": "low"}', b'{"x": null}', 100_000 * b"["):
        (run_folder / "evaluation.json").write_bytes(damaged)
        call(*base, *grid)
        assert counted.pop() == counted[3]
        assert (run_folder / "evaluation.json").read_bytes() == figures
    metrics = (run_folder / "metrics.jsonl").read_bytes()
    (run_folder / "metrics.jsonl").write_bytes(b"[1]\n" + metrics)
    capsys.readouterr()
    call(*base, *grid, code=2)
    assert capsys.readouterr().err.count("metrics.jsonl, line 1 is not a JSON object") == 1
    (run_folder / "metrics.jsonl").write_bytes(metrics)
    # More values and longer runs are the only ones that are made; the metric may be a log point's.
    call(*base, "--grid.ema_decay=0.0,0.5", "--metric=loss")
    assert len(counted) == 5
    call(*base, "--grid.ema_decay=0.0", "--grid.num_steps=15")
    call(*base, "--grid.ema_decay=0.5", "--config.num_steps=15", "--seeds=1")
    assert len(counted) == 7
    assert final_arrays(folder / "ema_decay=0.5-0")[0] == 15


def test_settings_that_fail_are_last_and_told(base, counted, tmp_path, capsys):
    call(*base, "--grid.break_at=7,-1")
    rows = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["rows"]
    assert [row["settings"]["break_at"] for row in rows] == [-1, 7]
    assert rows[1]["mean"] is None
    assert "not finite at step 7" in rows[1]["runs"][0]["error"]
    assert "not finite at step 7" in capsys.readouterr().out
    call(*base, "--grid.break_at=7", code=1)  # nothing finished
    # A change of what all runs share is refused before any of them is trained.
    before = snapshot(tmp_path / "sweep")
    call(*base, "--grid.break_at=-1,3", "--config.batch_size=8", code=2)
    assert "config.batch_size is 8, but the run in" in capsys.readouterr().err
    call(*base, "--grid.num_steps=0,10", code=2)
    assert "num_steps is 0" in capsys.readouterr().err
    assert snapshot(tmp_path / "sweep") == before


def test_a_killed_sweep_goes_on_where_it_was(tmp_path, monkeypatch):
    """SIGTERM reaches the run, which saves; the end is that of a run that was not stopped."""
    args = [
        *own_recipe(tmp_path),
        "--config.break_at=-1",
        "--metric=x",
        "--config.num_steps=100000",
    ]
    args += ["--config.log_every=1000", "--config.checkpoint_every=50000"]
    process = start("sweep", *args, "--grid.ema_decay=0.5", "--workdir=sweep", cwd=tmp_path)
    workdir = tmp_path / "sweep" / "ema_decay=0.5-0"
    wait_for(lambda: num_lines(workdir / "metrics.jsonl") > 2, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    step, _ = final_arrays(workdir)
    assert 0 < step < 100000
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    end = (step // 1000 + 2) * 1000
    ending = [*args, f"--config.num_steps={end}"]
    call(*ending, "--grid.ema_decay=0.5", "--workdir=sweep")
    train_args = [arg for arg in ending if not arg.startswith("--metric")]
    run("train", *train_args, "--config.ema_decay=0.5", "--workdir=whole", cwd=tmp_path)
    assert final_arrays(workdir) == final_arrays(tmp_path / "whole")
    assert (workdir / "metrics.jsonl").read_bytes() == (
        tmp_path / "whole" / "metrics.jsonl"
    ).read_bytes()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--grid.side=8,x"], "grid.side has 'x'; it must be of type int"),
        (["--grid.sides=8,16"], "grid.sides is '8,16', but config has no such field"),
        (["--grid.seed=1,2"], "give --seeds"),
        (["--grid.side", "8,16", "--uniform.side=8,16"], "side varies already"),
        (["--uniform.epsilon=0.5,0.1"], "uniform.epsilon is '0.5,0.1'; it must be two numbers"),
        (["--log_uniform.epsilon=0,0.1"], "it must be two numbers above 0"),
        (["--uniform.objective=db,tb"], "uniform.objective is 'db,tb'; it must be two numbers"),
        (
            ["--grid.hidden_features=(8,),8"],
            "grid.hidden_features has '8'; it must be of type tuple",
        ),
        (["--grid.data_path=a"], "no such field"),
        (["--grid.side=0,8"], "side is 0; it must be at least 2"),
        (["--grid.side=8", "--seeds=0"], "seeds is 0; it must be at least 1"),
        (["--grid.side=8", "--jobs=0"], "jobs is 0; it must be at least 1"),
        (["--uniform.epsilon=0,1", "--trials=0"], "trials is 0; it must be at least 1"),
        ([], "nothing varies"),
    ],
)
def test_a_wrong_call_is_one_sentence(args, words, tmp_path, capsys):
    call("--config=hypergrid", f"--workdir={tmp_path / 's'}", *args, code=2)
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("module", [schedule, sweep])
def test_examples(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_what_every_call_needs_is_asked_for(tmp_path, capsys):
    call("--grid.side=8", f"--workdir={tmp_path / 's'}", code=2)
    assert "--config is missing" in capsys.readouterr().err
    call("--grid.side=8", "--config=hypergrid", code=2)
    assert "--workdir is missing" in capsys.readouterr().err
    call(*own_recipe(tmp_path), "--seeds=2", f"--workdir={tmp_path / 's'}", code=2)
    assert "--metric is missing" in capsys.readouterr().err
    call("--help")
    out = capsys.readouterr().out
    assert "--grid.FIELD=A,B" in out
    assert all(f"--{name}: " in out for name in sweep.FLAGS)


def test_seeds_together_are_those_of_separate_runs(base, counted, tmp_path, monkeypatch, capsys):
    """Also after a stop, from which they go on together."""
    base = [*base, "--config.num_steps=20"]
    separate = [arg.replace("/sweep", "/separate") for arg in base]
    grid = ["--grid.ema_decay=0.5", "--seeds=3"]
    call(*separate, *grid)
    asked = []

    class StopsThen(together.StopSignal):
        def __call__(self):
            asked.append(None)
            return len(asked) >= 3

    with monkeypatch.context() as patch:
        patch.setattr(together, "StopSignal", StopsThen)
        call(*base, *grid, "--together", code=143)
    folders = [tmp_path / "sweep" / f"ema_decay=0.5-{seed}" for seed in range(3)]
    assert len({final_arrays(folder)[0] for folder in folders} - {20}) == 1
    assert not any((folder / "evaluation.json").exists() for folder in folders)
    num_before = len(counted)
    capsys.readouterr()
    call(*base, *grid, "--together")
    assert "3 seeds together, from step 15" in capsys.readouterr().out
    assert len(counted) == num_before
    for folder in folders:
        alone = tmp_path / "separate" / folder.name
        assert final_arrays(folder)[0] == final_arrays(alone)[0] == 20
        rows, others = (read_metrics(where / "metrics.jsonl") for where in (folder, alone))
        assert [row["step"] for row in rows] == [row["step"] for row in others]
        for row, other in zip(rows, others, strict=True):
            assert row == pytest.approx(other, rel=1e-4)
        figures = [json.loads((at / "evaluation.json").read_text()) for at in (folder, alone)]
        assert figures[0] == pytest.approx(figures[1], rel=1e-5)
    # A seed that diverges is left to the command that rolls back, and the others are as they were.
    call(*base, "--grid.break_at=7", "--seeds=2", "--together", code=1)
    assert len(counted) == num_before + 2
    rows = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["rows"]
    assert all("not finite at step 7" in entry["error"] for entry in rows[0]["runs"])


def test_a_recipe_whose_seed_is_more_than_its_key_is_not_trained_together(tmp_path, capsys):
    call("--config=jem", "--together", "--seeds=2", f"--workdir={tmp_path / 's'}", code=2)
    assert "the recipe 'jem' uses config.seed for more than" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()
