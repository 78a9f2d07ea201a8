"""Writes the tables of README.md from the figures that runs gave, so that the two cannot differ.

  python -m launch.reproduce --table=sets --json=sets.json
  python -m launch.readme --figures=sets.json

Figures that are given are kept in ``.github/figures``, one file a table, and every table between

  <!-- table NAME -->
  <!-- end -->

is written anew from what is kept there. Without ``--figures`` the tables alone are written. The
folder is that of the README, where the command is run.
"""

from __future__ import annotations

import decimal
import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from launch import command, runs
from launch.runs import UserError
from launch.tables import DATASETS_2D, FLOW_OBJECTIVES, NEGATIVES, OBJECTIVES_2D, TABLES

__all__ = ["TABLES_AS_TEXT", "kept_figures", "main", "shown", "with_tables"]

FOLDER = Path(".github/figures")

FLAGS = flags.FlagValues()
flags.DEFINE_multi_string(
    "figures", [], "A file that launch.reproduce --json wrote. Repeatable.", flag_values=FLAGS
)

# Row -> {"begun": how many seeds, "figures": {name: values of the seeds that finished}}.
Rows = Mapping[str, Mapping[str, Any]]

_BLOCK = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def kept_figures(results: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of what ``launch.reproduce --json`` wrote: the columns of its table.

    Raises:
      UserError: if it is not such a file, or of a table that there is no longer.
    """
    try:
        name, outcomes = results["table"], results["runs"]
        table = TABLES[name]
        rows: dict[str, Any] = {}
        for outcome in outcomes:
            row = rows.setdefault(outcome["row"], {"begun": 0, "figures": {}})
            row["begun"] += 1
            for column in table.columns:
                if column in (outcome["figures"] or {}):
                    value = float(f"{outcome['figures'][column]:.4g}")
                    row["figures"].setdefault(column, []).append(value)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            "figures name a file that launch.reproduce --json did not write."
        ) from error
    return {"table": name, "rows": rows}


def shown(values: Sequence[float]) -> str:
    """A mean, and the standard deviation where there are several.

    >>> shown([0.123]), shown([0.0012, 0.0014]), shown([184.0, 190.0]), shown([])
    ('0.12', '0.0013 ± 0.0001', '187 ± 4', '—')
    """
    if not values:
        return "—"
    mean = statistics.fmean(values)
    if len(values) == 1:
        return _plain(mean, 2)
    return f"{_plain(mean, 2)} ± {_plain(statistics.stdev(values), 1)}"


def _plain(value: float, digits: int) -> str:
    """So many significant digits, all those before the point, and no exponent below a million."""
    if abs(value) >= 1e6:
        return f"{value:.{digits}g}"
    return f"{round(value):d}" if abs(value) >= 10**digits else _positional(value, digits)


def _positional(value: float, digits: int) -> str:
    return format(decimal.Decimal(f"{value:.{digits - 1}e}"), "f")


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _cell(rows: Rows, row: str, figure: str) -> str:
    """The figure of a row; how many seeds finished where some did not."""
    values = rows[row]["figures"].get(figure, [])
    begun = rows[row]["begun"]
    missing = f" ({len(values)} of {begun})" if len(values) < begun and values else ""
    return shown(values) + missing


def _objectives_2d(rows: Rows) -> str:
    head = ["objective", *(name.replace("_", " ") for name in DATASETS_2D)]
    return _markdown(
        head,
        [
            [f"`{name}`", *(_cell(rows, f"{dataset}-{name}", "kl") for dataset in DATASETS_2D)]
            for name in OBJECTIVES_2D
        ],
    )


_FLOW_NAMES = {
    "tb": "trajectory balance",
    "vargrad": "log-partition variance",
    "db": "detailed balance",
    "mdb": "detailed balance, modified for states that may stop",
    "subtb": "subtrajectory balance",
    "fm": "flow matching",
    "fldb": "forward-looking detailed balance",
    "flsubtb": "forward-looking subtrajectory balance",
    "led": "learned energy decomposition",
    "soft_dqn": "soft Q-learning",
    "munchausen": "Munchausen Q-learning",
    "pcl": "path consistency",
    "tlm": "backward policy by likelihood",
    "reverse_kl": "KL divergence of the policy from the target",
    "forward_kl": "KL divergence of the target from the policy, on exact draws",
}


def _flow_objectives(rows: Rows) -> str:
    lines = [
        [
            _FLOW_NAMES[name],
            f"`{name}`",
            *(_cell(rows, f"{name}{ending}", "total_variation") for ending in ("-easier", "")),
        ]
        for name in FLOW_OBJECTIVES
    ]
    return _markdown(["objective", "`NAME`", "R0 = 0.1", "R0 = 0.001"], lines)


def _environments(rows: Rows) -> str:
    about = {
        "hypergrid": "hypergrid, 4-D side 6, R0 = 0.1",
        "dags": "graphs of five variables",
        "phylogeny": "trees of six species",
        "continuous": "box, steps of any length",
    }
    objectives = ("tb", "vargrad", "db", "subtb")
    return _markdown(
        ["environment", *(f"`{name}`" for name in objectives)],
        [
            [text, *(_cell(rows, f"{name}-{key}", "jensen_shannon") for key in objectives)]
            for name, text in about.items()
        ],
    )


def _laws(table: str) -> list[str]:
    """What a table of EB-GFN learns, by each kind of negatives."""
    names = [row.name for row in TABLES[table].rows]
    return [name.removesuffix("-flow") for name in names if name.endswith("-flow")]


def _eb_gfn_lattices(rows: Rows) -> str:
    def mean(row: str, figure: str) -> str:
        return f"{statistics.fmean(_values(rows, row, f'negative_log_rmse{figure}')):.2f}"

    return _markdown(
        ["lattice", "coupling", *(f"`{kind}`" for kind in NEGATIVES), "pseudolikelihood", "J = 0"],
        [
            [
                *name.split("_"),
                *(
                    f"{mean(f'{name}-{kind}', '')}, refit {mean(f'{name}-{kind}', '_of_refit')}"
                    for kind in NEGATIVES
                ),
                mean(f"{name}-flow", "_of_pseudolikelihood"),
                mean(f"{name}-flow", "_of_zero"),
            ]
            for name in _laws("eb_gfn_lattices")
        ],
    )


def _eb_gfn_plane(rows: Rows) -> str:
    return _markdown(
        ["law", "entropy", *(f"gap, `{kind}`" for kind in NEGATIVES), "gap of the flow itself"],
        [
            [
                law.replace("_", " "),
                f"{_values(rows, f'{law}-flow', 'entropy')[0]:.3f}",
                *(_cell(rows, f"{law}-{kind}", "gap") for kind in NEGATIVES),
                _cell(rows, f"{law}-flow", "gap_of_flow"),
            ]
            for law in _laws("eb_gfn_plane")
        ],
    )


def _by_row(name: str) -> Callable[[Rows], str]:
    """Rows and columns as ``launch.reproduce`` prints them."""
    table = TABLES[name]

    def write(rows: Rows) -> str:
        return _markdown(
            ["row", "finished", *(column.replace("_", " ") for column in table.columns)],
            [
                [
                    row.name,
                    _finished(rows, row.name),
                    *(shown(_values(rows, row.name, column)) for column in table.columns),
                ]
                for row in table.rows
            ],
        )

    return write


def _values(rows: Rows, row: str, column: str) -> list[float]:
    return rows[row]["figures"].get(column, [])


def _finished(rows: Rows, row: str) -> str:
    num_finished = max((len(values) for values in rows[row]["figures"].values()), default=0)
    return f"{num_finished}/{rows[row]['begun']}"


TABLES_AS_TEXT: dict[str, Callable[[Rows], str]] = {
    **{name: _by_row(name) for name in TABLES},
    "eb_gfn_lattices": _eb_gfn_lattices,
    "eb_gfn_plane": _eb_gfn_plane,
    "environments": _environments,
    "flow_objectives": _flow_objectives,
    "objectives_2d": _objectives_2d,
}


def with_tables(text: str, folder: Path) -> str:
    """A README with every table between its marks written anew.

    Args:
      text: of the README.
      folder: of the figures that are kept.

    Raises:
      UserError: if there are no figures of a table.
    """

    def write(match: re.Match[str]) -> str:
        first, name, last = match.groups()
        path = folder / f"{name}.json"
        if name not in TABLES_AS_TEXT or not path.is_file():
            raise UserError(f"README.md has a table {name}, of which {folder} holds no figures.")
        return f"{first}\n{TABLES_AS_TEXT[name](json.loads(path.read_text())['rows'])}\n{last}"

    return _BLOCK.sub(write, text)


def _run(flag_values: flags.FlagValues) -> None:
    readme = Path("README.md")
    if not readme.is_file():
        raise UserError("there is no README.md here; run this in the folder of the project.")
    for name in flag_values.figures:
        try:
            results = json.loads(Path(name).read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"figures is {name!r}, which is not a readable JSON file.") from error
        kept = kept_figures(results)
        missing = [row.name for row in TABLES[kept["table"]].rows if row.name not in kept["rows"]]
        if missing:
            raise UserError(
                f"figures is {name!r}, which lacks {len(missing)} rows of the table "
                f"{kept['table']}, {missing[0]} first; run it without --only."
            )
        FOLDER.mkdir(parents=True, exist_ok=True)
        runs.write_json(FOLDER / f"{kept['table']}.json", kept)
    text = with_tables(readme.read_text(encoding="utf-8"), FOLDER)
    with runs.replacing(readme) as path:
        path.write_text(text, encoding="utf-8")


COMMAND = command.Command("launch.readme", __doc__ or "", FLAGS, _run)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    command.main(COMMAND, argv)


if __name__ == "__main__":
    main()
