"""What a person sees on a terminal."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
from command_lines import environment, own_recipe


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    """What a run writes to a terminal of 120 columns."""
    folder = tmp_path_factory.mktemp("terminal")
    args = [*own_recipe(folder), "--workdir=run", "--config.break_at=-1", "--config.num_steps=400"]
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.train", *args],
        cwd=folder,
        env=environment() | {"TERM": "xterm-256color"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    text = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        text += part
    os.close(ours)
    assert process.wait(timeout=60) == 0, text
    return text.decode()


def _plain(text):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_the_live_bar_shows_steps_loss_speed_and_time_left(screen):
    frames = re.split(r"\r|\n", _plain(screen))
    assert any(re.match(r"0/400 steps .* compiling", frame) for frame in frames)
    moving = [frame for frame in frames if re.match(r"\d+/400 steps ", frame)]
    assert any(re.search(r"[\d.e+]+ steps/s, \d+:\d\d left", frame) for frame in moving)
    assert moving[-1].startswith("400/400 steps")
    assert any(re.match(r"loss [\d.e+-]+", frame) for frame in frames)
    assert not any(frame.startswith("step ") for frame in frames)  # lines are for pipes


def test_the_live_bar_never_wraps(screen):
    assert max(len(frame) for frame in re.split(r"\r|\n", _plain(screen))) <= 120


def test_the_run_ends_with_what_it_left(screen):
    assert screen.rstrip().count("\x1b[?25l") == screen.count("\x1b[?25h")  # the cursor is back
    for name in ("config.json", "metrics.jsonl", "checkpoints/", "samples.npz", "figures/"):
        assert name in _plain(screen)
