"""Notebooks run from top to bottom, and what is committed of them is fit to be read."""

import re
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parent.parent
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
    """What a cell shows: streams by name, pictures, text."""
    return {
        output.get("name") or ("picture" if "image/png" in output.data else "text")
        for output in cell.outputs
    }


def text_of(output):
    """All that a person may read of an output."""
    return output.get("text") or output.data.get("text/plain", "")


def test_there_are_notebooks():
    assert {"quickstart", "samplers", "training"} <= {path.stem for path in PATHS}


@each_notebook
def test_runs_and_shows_what_is_committed(path, monkeypatch):
    # Tests compile with little optimisation; a notebook runs as it would for its reader.
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    committed, notebook = read(path), read(path)
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    )
    client.execute()
    for before, after in zip(code_cells(committed), code_cells(notebook), strict=True):
        # Warnings depend on the machine.
        assert kinds(after) - {"stderr"} == kinds(before), before.source


@each_notebook
def test_committed_outputs_are_fit_to_be_read(path):
    cells = code_cells(read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert {output.output_type for output in outputs} <= {
        "stream",
        "display_data",
        "execute_result",
    }
    for output in outputs:
        assert output.get("name") != "stderr"
        assert len(text_of(output).splitlines()) <= 20
        # Neither folders of the machine nor bars of progress.
        assert not re.search(r"(^|[\s'\"=])/\w+/|[A-Z]:\\|\r|it/s", text_of(output))


def test_all_find_or_install_the_package_alike():
    first = {path.stem: code_cells(read(path))[0].source.split("\n\n")[0] for path in PATHS}
    assert len(set(first.values())) == 1, first
    assert "import ebjax" in first["quickstart"]
    assert "%pip install" in first["quickstart"]


@each_notebook
def test_cells_are_short_and_public(path):
    notebook = read(path)
    for cell in code_cells(notebook):
        assert len(cell.source.splitlines()) <= 80, cell.source
        assert not re.search(r"(import |\w\.)_(?!replace|asdict|fields)", cell.source), cell.source
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for name in re.findall(r"\]\(([\w.]+)\)", cell.source):
                assert (path.parent / name).exists(), name
