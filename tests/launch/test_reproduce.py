"""Tables of runs: every seed counts, a table goes on where it was, bars are judged."""

import io
import json

import pytest
from command_lines import environment, own_recipe, run
from rich.console import Console

from launch import reproduce as reproduction
from launch.reproduce import reproduce
from launch.runs import UserError, find_recipe, make_config
from launch.schedule import Outcome
from launch.tables import TABLES, Bar, Row, Table


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Runs of a recipe that fits a number: one that ends well, one that diverges."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    config, module = own_recipe(tmp_path)
    path = config.partition("=")[2]
    return Table(
        "Fits of a number",
        (
            Row("good", path, {"break_at": -1, "num_steps": 10}, (module,)),
            Row("bad", path, {"break_at": 7, "num_steps": 10}, (module,)),
        ),
        ("x",),
        bars=(Bar("good", "x", -1.0, 1.0), Bar("good", "x", low=2.0), Bar("bad", "x", high=9.0)),
    )


def made(table, folder, **options):
    file = io.StringIO()
    console = Console(file=file, width=160)
    figures = reproduce(table, folder=folder, console=console, **{"seeds": 2, **options})
    return figures, file.getvalue()


def test_every_seed_counts_and_bars_are_judged(table, tmp_path):
    figures, text = made(table, tmp_path / "t", jobs=2)
    by_row = {}
    for outcome in figures["runs"]:
        by_row.setdefault(outcome["row"], []).append(outcome["figures"])
    assert by_row["bad"] == [None, None]
    values = [entry["x"] for entry in by_row["good"]]
    assert values[0] != values[1]  # the seeds differ
    assert [bar["is_reached"] for bar in figures["bars"]] == [True, False, False]
    assert f"{sum(values) / 2:.4g} ±" in text
    assert "2/2" in text
    assert "0/2" in text
    assert "not finite at step 7" in text
    assert text.count("NOT REACHED") == 2
    # Again: what is there is read and not trained again; what failed is tried again.
    kept = tmp_path / "t" / "good-0" / "evaluation.json"
    kept.write_text(json.dumps({"x": 0.25}))
    figures, _ = made(table, tmp_path / "t", only=("good",), seeds=1)
    assert [outcome["figures"] for outcome in figures["runs"]] == [{"x": 0.25}]


def test_what_a_run_says_in_brackets_is_printed(table, tmp_path, monkeypatch):
    said = "x has shape [n, d]; to install: pip install 'it[rna]'"
    failed = [Outcome("good", 0, None, said)]
    monkeypatch.setattr(reproduction, "run_jobs", lambda jobs, **options: failed)
    _, text = made(table, tmp_path / "t", only=("good",), seeds=1)
    assert said in text


def test_a_run_with_other_settings_than_its_row_is_not_counted(table, tmp_path):
    made(table, tmp_path / "t", only=("good",), seeds=1)
    row = table.rows[0]
    other = table._replace(rows=(row._replace(settings={**row.settings, "break_at": 99}),))
    with pytest.raises(UserError, match=r"good-0 was made with break_at -1, and its row has 99"):
        made(other, tmp_path / "t", seeds=1)


def test_a_setting_that_does_not_exist_ends_the_table(table, tmp_path):
    wrong = table._replace(rows=(table.rows[0]._replace(settings={"wrong": 1}),))
    with pytest.raises(UserError, match="no field 'wrong'"):
        made(wrong, tmp_path / "t", seeds=1)


def test_rows_and_bars_of_the_tables_are_known():
    for name, table in TABLES.items():
        rows = {row.name for row in table.rows}
        assert len(rows) == len(table.rows), name
        assert {bar.row for bar in table.bars} <= rows, name
        assert all(bar.low < bar.high for bar in table.bars), name
        for row in table.rows:
            recipe = find_recipe(row.config)
            make_config(
                recipe,
                {"data_path": "digits", **row.settings} if table.needs_data else row.settings,
            )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "table is None; it must be one of"),
        (["--table=wrong"], "table is 'wrong'; it must be one of"),
        (["--table=hypergrid", "--seeds=-1"], "seeds is -1; it must be at least 0"),
        (["--table=hypergrid", "--jobs=0"], "jobs is 0; it must be at least 1"),
        (["--table=hypergrid", "--only=zzz", "--workdir=w"], "only is 'zzz', which is in none"),
    ],
)
def test_a_wrong_call_is_one_sentence(arguments, sentence, tmp_path):
    _, err = run("reproduce", *arguments, cwd=tmp_path, code=2)
    assert sentence in err
    assert len(err.strip().splitlines()) == 1
