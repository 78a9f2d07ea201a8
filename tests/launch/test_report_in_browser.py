"""A report as a browser shows it: pictures are decoded, nothing overflows, nothing complains."""

import html
import json
import re
import shutil
import subprocess

import matplotlib.image
import pytest

from launch import report

NAMES = ("chromium", "chromium-browser", "google-chrome", "microsoft-edge")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(NAMES)} is on PATH")

# Stands first in the page, so that it sees all that goes wrong.
LISTEN = """<script>
const complaints = [];
for (const kind of ["error", "warn"])
  console[kind] = (...words) => complaints.push(words.join(" "));
addEventListener("error", (event) => complaints.push(event.message || event.target.tagName), true);
</script>"""
# Stands last, and writes what it finds into the page.
LOOK = """<script>
addEventListener("load", () => {
  const found = document.createElement("pre");
  found.id = "found";
  found.textContent = JSON.stringify({
    complaints,
    pictures: [...document.images].map((image) => [image.alt, image.naturalWidth]),
    loaded: performance.getEntriesByType("resource").map((each) => each.name),
    rows: [...document.querySelectorAll("table")].map((table) => table.rows.length),
    width: innerWidth,
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    clipped: [...document.querySelectorAll("h1, h2, p, summary, figcaption")].filter(
      (each) => each.getBoundingClientRect().right > innerWidth).length,
    shown: [...document.images].map((image) => image.getBoundingClientRect().width),
  });
  document.body.append(found);
});
</script>"""


def _browse(page, *flags, width=1280):
    done = subprocess.run(
        [
            BROWSER,
            *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--no-first-run", "--host-resolver-rules=MAP * ~NOTFOUND"),
            f"--user-data-dir={page.parent / 'profile'}",
            f"--window-size={width},2400",
            *flags,
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout


def _found(page, width):
    """What the browser says of a copy of the page."""
    text = page.read_text(encoding="utf-8")
    copy = page.with_name("copy.html")
    text = text.replace("<head>", f"<head>{LISTEN}", 1).replace("</body>", f"{LOOK}</body>", 1)
    copy.write_text(text, encoding="utf-8")
    dom = _browse(copy, "--dump-dom", width=width)
    (found,) = re.findall(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
    return json.loads(html.unescape(found))


@pytest.fixture
def page(finished, finished_copy, tmp_path):
    """A report of two runs."""
    config = json.loads((finished_copy / "config.json").read_text())
    (finished_copy / "config.json").write_text(json.dumps({**config, "seed": 7}))
    output = tmp_path / "page.html"
    workdirs = [f"--workdir={path}" for path in (finished, finished_copy)]
    with pytest.raises(SystemExit) as exit_:
        report.main(["launch.report", *workdirs, f"--output={output}"])
    assert exit_.value.code == 0
    return output


@pytest.mark.parametrize("width", [1280, 400])
def test_a_page_is_shown_whole(page, width):
    found = _found(page, width)
    assert found["complaints"] == []
    assert all(name.startswith("data:") for name in found["loaded"])
    names = [name for name, _ in found["pictures"]]
    assert names[0] == "metrics over the steps"
    assert sum(name.startswith("distributions of ") for name in names) == 2
    assert all(pixels > 100 for _, pixels in found["pictures"])
    assert len(found["rows"]) == 4  # the runs, figures of merit, settings that differ and others
    assert found["rows"][0] == 2
    assert min(found["rows"][1:]) > 1
    assert width <= found["width"] <= max(width, 500)  # some have a least width
    assert found["overflow"] == 0
    assert found["clipped"] == 0
    # On narrow pages as well large enough to be read.
    for shown, (_, pixels) in zip(found["shown"], found["pictures"], strict=True):
        assert shown > min(pixels, 700)


def test_a_page_is_drawn(page, tmp_path):
    _browse(page, f"--screenshot={tmp_path / 'shot.png'}")
    shot = matplotlib.image.imread(tmp_path / "shot.png")[..., :3]
    assert shot.shape[1] == 1280
    is_white = (shot > 0.99).all(axis=-1)
    assert 0.5 < is_white.mean() < 0.98
    for part in (is_white[:600], is_white[600:1500]):  # text and tables, curves
        assert not part.all()


def test_what_is_wrong_with_a_page_is_seen(page):
    wrong = (
        '<img src="data:image/png;base64,AAAA" alt="broken">'
        '<div style="width: 3000px">too wide</div><script>nothing()</script>'
    )
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{wrong}</body>"))
    found = _found(page, 400)
    assert dict(found["pictures"])["broken"] == 0
    assert found["overflow"] > 2000
    assert any("nothing is not defined" in each for each in found["complaints"])
    assert "IMG" in found["complaints"]
