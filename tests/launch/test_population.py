"""The population command: members as run directories, going on, wrong calls in a sentence."""

import json

import numpy as np
import pytest
from command_lines import own_recipe

import ebjax
from ebjax.training import read_metrics
from launch import population, runs
from launch.population import _lineage

RANGE = "--log_uniform.learning_rate=1e-3,1e-1"


def call(*args, code=0):
    with pytest.raises(SystemExit) as exit_:
        population.main(["launch.population", *map(str, args)])
    assert exit_.value.code == code


@pytest.fixture
def density(tmp_path):
    """Flags of a small population of energies."""
    return [
        "--config=density",
        "--config.objective=denoising_score_matching",
        "--config.num_noise_levels=1",
        "--config.hidden_features=(8,)",
        "--config.num_grid_points=51",
        "--config.sample_steps=20",
        "--config.num_steps=30",
        "--members=4",
        "--rounds=3",
        RANGE,
        f"--workdir={tmp_path / 'population'}",
    ]


def test_the_best_is_a_run_and_a_stopped_population_goes_on(density, tmp_path, capsys, monkeypatch):
    whole = tmp_path / "population"
    call(*density)
    out = capsys.readouterr().out
    assert "round 3/3, step 30: best kl" in out
    written = json.loads((whole / "population.json").read_text())
    figures = written["rounds"][-1]["figures"]["kl"]
    best = int(np.argmin(figures))
    assert [path.name for path in whole.glob("member-*")] == [f"member-{best}"]
    config = runs.read_config(whole / f"member-{best}")
    rate = written["rounds"][-1]["settings"]["learning_rate"][best]
    assert config["learning_rate"] == rate
    assert ebjax.load(whole / f"member-{best}").step == 30
    judged = json.loads((whole / f"member-{best}" / "evaluation.json").read_text())
    assert judged["kl"] == pytest.approx(figures[best], rel=1e-6)
    rows = read_metrics(whole / f"member-{best}" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [10, 20, 30]
    assert rows[-1]["learning_rate"] == rate

    other = [*density[:-1], f"--workdir={tmp_path / 'other'}"]
    stops = iter([False, True])
    original = population.train_population
    monkeypatch.setattr(
        population,
        "train_population",
        lambda *args, **options: original(*args, **{**options, "should_stop": lambda: next(stops)}),
    )
    call(*other, code=143)
    monkeypatch.undo()
    call(*other)
    assert "round 1/3" not in capsys.readouterr().out.split("round 2/3")[1]
    joined = json.loads((tmp_path / "other" / "population.json").read_text())
    assert joined["rounds"] == written["rounds"]
    # A damaged state is passed over: the last round is trained again, to the same end.
    for path in (tmp_path / "other" / "checkpoints" / "30").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    call(*other)
    assert "round 3/3" in capsys.readouterr().out
    again = json.loads((tmp_path / "other" / "population.json").read_text())
    assert again["rounds"] == written["rounds"]
    call(*other, "--quantile=0.5", code=2)
    assert "quantile" in capsys.readouterr().err
    path = tmp_path / "other" / "population.json"
    text = path.read_text()
    for damaged in (
        text[: len(text) // 2],
        "[1]",
        100_000 * "[",
        json.dumps({**joined, "rounds": 3}),
        json.dumps({**joined, "rounds": [{"step": 10}]}),
        json.dumps({**joined, "rounds": [{**joined["rounds"][0], "figures": {"kl": ["low"]}}]}),
        json.dumps({**joined, "rounds": [{**joined["rounds"][0], "parents": None}]}),
    ):
        path.write_text(damaged)
        call(*other, code=2)
        err = capsys.readouterr().err
        assert f"{path} cannot be read" in err
        assert err.count("\n") == 1
        assert path.read_text() == damaged


def test_a_line_of_descent_follows_parents():
    rounds = [
        {
            "step": 1,
            "figures": {"kl": [3.0, 4.0]},
            "settings": {"a": [0.1, 0.2]},
            "parents": [0, 0],
        },
        {
            "step": 2,
            "figures": {"kl": [2.0, None]},
            "settings": {"a": [0.1, 0.3]},
            "parents": [0, 1],
        },
    ]
    assert _lineage(rounds, 1) == [{"step": 1, "kl": 3.0, "a": 0.1}, {"step": 2, "a": 0.3}]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "members differ in nothing"),
        (["--grid.learning_rate=0.1,0.2"], "grid.learning_rate cannot vary"),
        (["--uniform.batch_size=1,2"], "uniform.batch_size cannot vary"),
        ([RANGE, "--rounds=7"], "num_rounds is 7"),
        ([RANGE, "--metrics=nothing"], "no figure 'nothing'"),
        ([RANGE, "--maximize=kl", "--metrics=total_variation"], "maximize is 'kl'"),
    ],
)
def test_a_wrong_call_is_one_sentence(args, words, density, capsys):
    call(*[flag for flag in density if flag != RANGE], *args, code=2)
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


def test_a_recipe_that_judges_nothing_needs_metrics(tmp_path, capsys):
    flags = own_recipe(tmp_path)
    call(*flags, "--uniform.ema_decay=0.1,0.9", f"--workdir={tmp_path / 'x'}", code=2)
    assert "--metrics is missing" in capsys.readouterr().err
