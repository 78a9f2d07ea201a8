"""The README's tables are those of the figures that are kept, and these reach their bars."""

import json
import statistics
from pathlib import Path

import pytest

from launch import readme
from launch.readme import FOLDER, kept_figures, shown, with_tables
from launch.runs import UserError
from launch.tables import TABLES

ROOT = Path(__file__).parents[2]
KEPT = sorted((ROOT / FOLDER).glob("*.json"))


def test_the_tables_of_the_readme_are_those_of_the_figures():
    text = (ROOT / "README.md").read_text()
    assert text.count("<!-- table ") == len(KEPT) > 0
    assert with_tables(text, ROOT / FOLDER) == text
    changed = text.replace("| trajectory balance |", "| other |")
    assert changed != with_tables(changed, ROOT / FOLDER) == text


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_figures_are_of_rows_that_exist_and_reach_their_bars(path):
    kept = json.loads(path.read_text())
    table = TABLES[kept["table"]]
    assert path.stem == kept["table"]
    assert set(kept["rows"]) == {row.name for row in table.rows}
    for bar in table.bars:
        mean = statistics.fmean(kept["rows"][bar.row]["figures"][bar.figure])
        assert bar.low <= mean <= bar.high, bar


def test_figures_are_kept_with_the_seeds_that_did_not_finish():
    finished = {"row": "fldb", "seed": 0, "figures": {"elbo_gap": 0.123456, "other": 1.0}}
    failed = {"row": "fldb", "seed": 1, "figures": None}
    kept = kept_figures({"table": "sets", "runs": [finished, failed]})
    assert kept == {
        "table": "sets",
        "rows": {"fldb": {"begun": 2, "figures": {"elbo_gap": [0.1235]}}},
    }


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([0.00182, 0.00211], "0.0020 ± 0.0002"),
        ([10.04], "10"),
        ([1.97], "2.0"),
        ([101234.0], "101234"),
        ([2.5e7], "2.5e+07"),
        ([0.0], "0.0"),
        ([-0.051], "-0.051"),
    ],
)
def test_numbers_are_written_for_people(values, text):
    assert shown(values) == text


_ONE_ROW = '{"table": "sets", "runs": [{"row": "fldb", "seed": 0, "figures": {"elbo_gap": 1.0}}]}'


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"table": "none", "runs": []}', '{"table": 1}', _ONE_ROW]
)
def test_other_files_are_refused(content, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text("nothing\n")
    Path("other.json").write_text(content)
    with pytest.raises(SystemExit) as stop:
        readme.main(["launch.readme", "--figures=other.json"])
    assert stop.value.code == 2
    assert "figures" in capsys.readouterr().err
    assert Path("README.md").read_text() == "nothing\n"


def test_a_table_without_figures_is_refused(tmp_path):
    with pytest.raises(UserError, match="no figures"):
        with_tables("<!-- table sets -->\n<!-- end -->\n", tmp_path)
