"""Writes one HTML page of one or several runs: settings, curves, figures of merit, pictures.

  python -m launch.report --workdir=runs/a --workdir=runs/b --output=report.html

Settings in which the runs differ stand first, the curves of a metric share one panel, and pictures
of one kind follow each other. A --workdir of a launch.sweep or launch.reproduce stands for all
runs in it. The page holds everything that it shows and asks nothing of the network. Runs that go on
yet, were stopped or are damaged are shown as far as they can be read.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from ebjax.figures.style import COLORS, INK, style_axes
from ebjax.training import read_metrics
from launch import command, runs
from launch.runs import UserError

__all__ = ["main"]

FLAGS = flags.FlagValues()
flags.DEFINE_multi_string(
    "workdir", None, "Run directory, or a folder of them; give it several times.", flag_values=FLAGS
)
flags.DEFINE_string("output", "report.html", "File to write, ending in .html.", flag_values=FLAGS)

_MAX_POINTS = 500
_NUM_COLUMNS = 3
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1b2a41; margin: 2rem auto; max-width: 72rem;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: 0.87rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 0.25rem 0.9rem 0.25rem 0; border-bottom: 1px solid #e3e7ed;
  vertical-align: top; }
th, td.number { text-align: right; }
tr.differs td { background: #fdf3e7; }
.wide { overflow-x: auto; }
.dot { display: inline-block; width: 0.7em; height: 0.7em; border-radius: 50%;
  margin-right: 0.4em; }
.note { color: #a3402a; }
.muted { color: #6b778a; }
figure { display: inline-block; margin: 0 1rem 1rem 0; max-width: 100%; }
figcaption { font-size: 0.87rem; }
img { max-width: max(100%, 48rem); }
figure img { max-width: 48rem; }
"""
_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


class _Shown(NamedTuple):
    """What could be read of a run.

    Attributes:
      name: how the page calls it.
      path: its directory.
      color: of its curves.
      settings: its config.
      rows: its log points.
      figures: its figures of merit, those of the end.
      pictures: the contents of its PNG files by name.
      energy_use: what it took, where it was measured.
      notes: a sentence for each thing that is missing or damaged.
    """

    name: str
    path: Path
    color: str
    settings: dict[str, Any]
    rows: list[dict[str, float]]
    figures: dict[str, Any]
    pictures: dict[str, bytes]
    energy_use: dict[str, Any]
    notes: list[str]


def _find_runs(workdirs: Sequence[str]) -> list[Path]:
    """The run directories that are meant, each once.

    Raises:
      UserError: if one holds no run.
    """
    found: list[Path] = []
    for workdir in workdirs:
        path = runs.find_workdir(workdir)
        if (path / "config.json").exists():
            found.append(path)
            continue
        inside = sorted(config.parent for config in path.glob("*/config.json"))
        if not inside:
            raise UserError(
                f"workdir is {workdir}, which holds no run (no config.json) and no folder of runs; "
                "give the --workdir of a launch.train or launch.sweep."
            )
        found += inside
    return list(dict.fromkeys(found))


def _names_of(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    for length in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _colors(num: int) -> list[str]:
    """The colours of the figures, or where they are too few as many others."""
    if num <= len(COLORS):
        return list(COLORS[:num])
    return [to_hex(colormaps["turbo"](0.05 + 0.9 * i / (num - 1))) for i in range(num)]


def _read_object(path: Path, notes: list[str]) -> dict[str, Any]:
    """The JSON object of a file, empty where it is missing, and with a note where damaged."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError) as error:
        notes.append(f"{path.name} cannot be read as JSON ({error}).")
        return {}
    if not isinstance(value, dict):
        notes.append(f"{path.name} is no JSON object.")
        return {}
    return value


def _read_run(path: Path, name: str, color: str) -> _Shown:
    notes: list[str] = []
    settings = _read_object(path / "config.json", notes)
    rows: list[dict[str, float]] = []
    if (path / "metrics.jsonl").exists():
        try:
            rows = read_metrics(path / "metrics.jsonl")
        except (OSError, ValueError) as error:
            notes.append(str(error))
    figures = _read_object(path / "evaluation.json", notes)
    if not figures and not notes:
        last = f"at step {rows[-1]['step']} of {settings.get('num_steps')}" if rows else "not begun"
        notes.append(f"It is {last}, and has no figures of merit yet.")
    pictures = {}
    for file in sorted((path / "figures").glob("*.png")):
        contents = file.read_bytes()
        if contents.startswith(_PNG_START) and contents.endswith(_PNG_END):
            pictures[file.stem] = contents
        else:
            notes.append(f"figures/{file.name} is not a whole PNG file.")
    pictures.pop("training_curves", None)  # the page draws them for all runs
    energy_use = _read_object(path / "energy_use.json", notes)
    return _Shown(name, path, color, settings, rows, figures, pictures, energy_use, notes)


def _curves(shown: Sequence[_Shown]) -> Figure | None:
    """A panel for each metric, with a line for each run."""
    names = dict.fromkeys(key for run in shown for row in run.rows for key in row if key != "step")
    if not names:
        return None
    num_rows = math.ceil(len(names) / _NUM_COLUMNS)
    figure = Figure(figsize=(4.0 * _NUM_COLUMNS, 2.3 * num_rows), layout="constrained")
    panels = figure.subplots(num_rows, _NUM_COLUMNS, squeeze=False).ravel()
    for axes, name in zip(panels, names, strict=False):
        lowest, highest = math.inf, -math.inf
        for run in shown:
            points = [
                (row["step"], row[name])
                for row in run.rows
                if isinstance(row.get(name), int | float) and math.isfinite(row[name])
            ]
            if not points:
                continue
            steps, values = zip(*points[:: math.ceil(len(points) / _MAX_POINTS)], strict=True)
            axes.plot(
                steps,
                values,
                color=run.color,
                linewidth=1.2,
                marker="o" if len(steps) < 30 else None,
                markersize=2.5,
            )
            lowest, highest = min(lowest, *values), max(highest, *values)
        if lowest > 0 and highest > 100 * lowest:
            axes.set_yscale("log")
        axes.set_title(name.replace("_", " "), fontsize=9, color=INK, loc="left")
        style_axes(axes)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    return figure


def _image(contents: bytes, kind: str, about: str) -> str:
    """An image, in a box of its own that scrolls where the page is too narrow to read it."""
    encoded = base64.b64encode(contents).decode("ascii")
    image = f'<img src="data:image/{kind};base64,{encoded}" alt="{html.escape(about)}">'
    return f'<div class="wide">{image}</div>'


def _svg(figure: Figure, about: str) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return _image(file.getvalue(), "svg+xml", about)


def _heading(run: _Shown) -> str:
    return f'<span class="dot" style="background:{run.color}"></span>{html.escape(run.name)}'


def _number(value: Any) -> str:
    # Whole numbers of a damaged file may be too large for a float.
    is_small = isinstance(value, float) or (isinstance(value, int) and abs(value) < 1e300)
    return f"{value:.6g}" if is_small else str(value)


def _table(
    shown: Sequence[_Shown],
    names: Iterable[str],
    cell: Callable[[_Shown, str], str],
    *,
    is_marked: bool = False,
    with_heads: bool = True,
) -> str:
    """A row for each name, a column for each run."""
    lines = []
    if with_heads:
        lines = ["<tr><th></th>", *(f"<th>{_heading(run)}</th>" for run in shown), "</tr>"]
    kind = ' class="differs"' if is_marked else ""
    for name in names:
        cells = "".join(f'<td class="number">{html.escape(cell(run, name))}</td>' for run in shown)
        lines.append(f"<tr{kind}><td>{html.escape(name.replace('_', ' '))}</td>{cells}</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _all_names(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def _settings_section(shown: Sequence[_Shown]) -> str:
    known = [run for run in shown if run.settings]

    def cell(run: _Shown, name: str) -> str:
        value = run.settings.get(name, "")
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

    names = _all_names(run.settings for run in known)
    differing = [name for name in names if len({cell(run, name) for run in known}) > 1]
    equal = [name for name in names if name not in differing]
    parts = ["<h2>Settings</h2>"]
    if differing:
        parts += [
            "<p>The runs differ in these:</p>",
            _table(known, differing, cell, is_marked=True),
        ]
    elif len(known) > 1:
        parts.append("<p>The runs have the same settings.</p>")
    if equal:
        title = "Settings that are equal" if len(known) > 1 else "All settings"
        table = _table(known[:1], equal, cell, with_heads=False)
        parts.append(f"<details><summary>{title}</summary>{table}</details>")
    return "".join(parts)


def _page(shown: Sequence[_Shown]) -> str:
    recipes = _all_names({str(run.settings.get("recipe", "unknown")): 0} for run in shown)
    title = f"{', '.join(recipes)}: {len(shown)} {'run' if len(shown) == 1 else 'runs'}"
    sections = [f"<h1>{html.escape(title)}</h1>", _runs_section(shown)]
    names = _all_names(run.figures for run in shown)
    if names:
        sections.append("<h2>Figures of merit</h2>")
        sections.append(_table(shown, names, lambda run, name: _number(run.figures.get(name, ""))))
    sections.append(_settings_section(shown))
    curves = _curves(shown)
    if curves is not None:
        sections.append(
            f"<h2>Training, over the steps</h2>{_svg(curves, 'metrics over the steps')}"
        )
    if any(run.energy_use for run in shown):
        names = _all_names(run.energy_use for run in shown)
        sections.append("<h2>Energy used</h2>")
        sections.append(
            _table(shown, names, lambda run, name: _number(run.energy_use.get(name, "")))
        )
    for name in _all_names(run.pictures for run in shown):
        sections.append(f"<h2>{html.escape(name.replace('_', ' ').capitalize())}</h2>")
        for run in (run for run in shown if name in run.pictures):
            image = _image(run.pictures[name], "png", f"{name} of {run.name}")
            sections.append(f"<figure>{image}<figcaption>{_heading(run)}</figcaption></figure>")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body>{''.join(sections)}</body></html>\n"
    )


def _runs_section(shown: Sequence[_Shown]) -> str:
    lines = []
    for run in shown:
        notes = "".join(f'<br><span class="note">{html.escape(note)}</span>' for note in run.notes)
        step = run.rows[-1]["step"] if run.rows else ""
        lines.append(
            f"<tr><td>{_heading(run)}</td><td>step {step}</td>"
            f'<td><span class="muted">{html.escape(str(run.path))}</span>{notes}</td></tr>'
        )
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _run(flag_values: flags.FlagValues) -> None:
    if not flag_values.workdir:
        raise UserError("--workdir is missing; give the directory of a run.")
    output = command.output_file(flag_values, "output")
    if output.suffix != ".html":
        raise UserError(f"output is {flag_values.output!r}; it must end in .html.")
    paths = _find_runs(flag_values.workdir)
    names = _names_of(paths)
    shown = [
        _read_run(path, name, color)
        for path, name, color in zip(paths, names, _colors(len(paths)), strict=True)
    ]
    with runs.replacing(output) as path:
        path.write_text(_page(shown), encoding="utf-8")
    print(f"{output}: {', '.join(names)}")
    for run in shown:
        for note in run.notes:
            print(f"{run.name}: {note}")


COMMAND = command.Command("launch.report", __doc__ or "", FLAGS, _run)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    command.main(COMMAND, argv)


if __name__ == "__main__":
    main()
