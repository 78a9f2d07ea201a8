"""Reports: one page that needs nothing else, of runs that are whole, in part, or damaged."""

import base64
import html.parser
import json
import shutil

import numpy as np
import pytest
from command_lines import snapshot

from launch import report


class Page(html.parser.HTMLParser):
    """Texts, the cells of tables by row, addresses and pictures of a page; tags must be closed."""

    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.rows, self.marked = [], [], [], []
        self.addresses, self.images = [], {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.addresses += [attrs[name] for name in ("src", "href") if name in attrs]
        if tag == "img":
            self.images[attrs["alt"]] = attrs["src"]
        if tag == "tr":
            self.rows.append([])
            self.marked.append(attrs.get("class") == "differs")
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def row(self, name):
        (found,) = [row[1:] for row in self.rows if row and row[0] == name]
        return found

    def differing(self):
        return [row[0] for row, marked in zip(self.rows, self.marked, strict=True) if marked]


def call(*args, code=0):
    with pytest.raises(SystemExit) as exit_:
        report.main(["launch.report", *map(str, args)])
    assert exit_.value.code == code


def made(folder, *workdirs):
    output = folder / "page.html"
    call(*(f"--workdir={workdir}" for workdir in workdirs), f"--output={output}")
    return Page(output.read_text(encoding="utf-8"))


@pytest.fixture
def other(finished, tmp_path):
    """A copy of the run that calls itself another, and has not ended."""
    copy = tmp_path / "other"
    shutil.copytree(finished, copy)
    settings = json.loads((copy / "config.json").read_text())
    settings |= {"seed": 7, "objective": "<i>'x'&amp;"}
    (copy / "config.json").write_text(json.dumps(settings))
    (copy / "evaluation.json").unlink()
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    return copy


def test_a_page_holds_what_the_run_left(finished, tmp_path):
    before = snapshot(finished)
    page = made(tmp_path, finished)
    assert snapshot(finished) == before
    figures = json.loads((finished / "evaluation.json").read_text())
    for name, value in figures.items():
        (shown,) = page.row(name.replace("_", " "))
        assert float(shown) == pytest.approx(value, rel=1e-5)
    assert page.row("num steps") == ["40"]
    assert page.row("hidden features") == ["16"]
    assert page.differing() == []
    assert all(address.startswith("data:image/") for address in page.addresses)
    data = page.images["distributions of grid"].partition("base64,")[2]
    assert base64.b64decode(data) == (finished / "figures" / "distributions.png").read_bytes()
    svg = base64.b64decode(page.images["metrics over the steps"].partition("base64,")[2]).decode()
    assert svg.count('id="line2d') > 10
    assert not any(name.startswith("training") for name in page.images)


def test_runs_are_compared(finished, other, tmp_path):
    page = made(tmp_path, finished, other)
    assert sorted(page.differing()) == ["objective", "seed"]
    assert page.row("seed") == ["0", "7"]
    assert page.row("objective") == ["tb", "<i>'x'&amp;"]  # shown, and not read as HTML
    total_variation = page.row("total variation")
    assert float(total_variation[0]) > 0
    assert total_variation[1] == ""
    assert "It is at step 15 of 40, and has no figures of merit yet." in page.text
    assert {"distributions of grid", "distributions of other"} <= set(page.images)
    # A folder of runs stands for them; a run is shown once.
    page = made(tmp_path, tmp_path, other)
    assert page.row("num steps") == ["40"]
    assert "other" in page.text


@pytest.mark.parametrize(
    ("name", "contents", "words"),
    [
        ("config.json", b'{"recipe": "hyp', "config.json cannot be read as JSON"),
        ("config.json", b"[1]", "config.json is no JSON object"),
        ("evaluation.json", b"\xff\xfe", "evaluation.json cannot be read as JSON"),
        ("metrics.jsonl", b'{"step": 5}\n{"stop": 6}\n', "line 2 is not a JSON object"),
        ("figures/distributions.png", b"\x89PNG\r\n\x1a\n", "is not a whole PNG file"),
        ("energy_use.json", b"{", "energy_use.json cannot be read as JSON"),
    ],
)
def test_damage_is_a_sentence(finished_copy, tmp_path, capsys, name, contents, words):
    (finished_copy / name).write_bytes(contents)
    page = made(tmp_path, finished_copy)
    assert any(words in text for text in page.text)
    captured = capsys.readouterr()
    assert words in captured.out
    assert captured.err == ""
    # The rest of it is there.
    found = [
        "settings" if any("num steps" in row for row in page.rows) else "",
        "figures" if any("total variation" in row for row in page.rows) else "",
        "curves" if "metrics over the steps" in page.images else "",
        "pictures" if "distributions of grid" in page.images else "",
    ]
    lost = {"config": 0, "evaluation": 1, "metrics": 2, "figures/distributions": 3}
    assert [i for i in range(4) if not found[i]] == [
        lost[stem] for stem in [name.partition(".")[0]] if stem in lost
    ]


def test_values_that_are_not_numbers_are_shown(finished_copy, tmp_path):
    figures = {"nan": np.nan, "text": "lost", "none": None}
    (finished_copy / "evaluation.json").write_text(json.dumps(figures))
    rows = [{"step": 1, "loss": np.nan, "x": 3}, {"step": 2, "loss": np.inf, "x": 1e-9}]
    rows += [{"step": 3, "loss": 1.0, "x": 1e9}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (finished_copy / "metrics.jsonl").write_text(lines)
    page = made(tmp_path, finished_copy)
    assert [page.row(name) for name in figures] == [["nan"], ["lost"], ["None"]]
    assert "metrics over the steps" in page.images


def test_runs_are_told_apart_by_as_much_of_their_paths_as_it_takes(tmp_path):
    paths = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    assert report._names_of(paths) == ["a/run", "b/run"]
    assert report._names_of(paths[:1]) == ["run"]
    assert len(set(report._colors(30))) == 30


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "--workdir is missing"),
        (["--workdir=none"], "workdir is none, which holds no run"),
        (["--workdir="], "workdir is ''"),
        (["--workdir=GRID", "--output=page.pdf"], "it must end in .html"),
        (["--workdir=GRID", "--output=/no/such/folder/p.html"], "its folder does not exist"),
    ],
)
def test_a_wrong_call_is_one_sentence(args, words, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    call(*(arg.replace("GRID", str(finished)) for arg in args), code=2)
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_help_names_every_flag(capsys):
    call("--help")
    out = capsys.readouterr().out
    assert all(f"--{name}: " in out for name in report.FLAGS)
