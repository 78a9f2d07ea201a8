"""Places that cannot be written: one sentence, and nothing is changed."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_lines import environment, own_recipe, snapshot

from launch import train


def _calls(*calls):
    """``(exit code, stderr)`` of each call, in a process to which permissions apply."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("obeying_permissions.py"))],
        input=json.dumps([list(map(str, words)) for words in calls]),
        capture_output=True,
        text=True,
        env=environment(),
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(result) for result in json.loads(done.stdout)]


@contextlib.contextmanager
def _read_only(*folders):
    for folder in folders:
        folder.chmod(0o555)
    try:
        yield
    finally:
        for folder in folders:
            folder.chmod(0o755)


def test_a_folder_without_write_permission_is_a_sentence(tmp_path):
    own = [*own_recipe(tmp_path, "whole_recipe"), "--config.break_at=-1", "--quiet"]
    runs = {name: tmp_path / name for name in ("closed", "checkpoints", "tensorboard", "figures")}
    for path in runs.values():
        with pytest.raises(SystemExit) as exit_:
            train.main(["launch.train", *own, f"--workdir={path}"])
        assert exit_.value.code == 0
    closed, home = tmp_path / "closed", tmp_path / "home"
    home.mkdir()
    inside = {name: path / name for name, path in runs.items() if name != "closed"}
    look = f"--workdir={closed}"
    before = snapshot(tmp_path)
    with _read_only(closed, home, *inside.values()):
        refused = {
            ("train", *own, f"--workdir={home / 'new' / 'run'}"): f"{home} cannot be written",
            ("train", *own, look): f"{closed} cannot be written",
            ("train", *own, look, "--overwrite"): f"{closed} cannot be written",
            ("train", *own, look, "--config.num_steps=60"): f"{closed} cannot be written",
            ("sample", look, f"--output={home / 'x.npz'}"): "its folder cannot be written",
            ("export", look, f"--output={home / 'x.bin'}"): "its folder cannot be written",
            ("evaluate", look, f"--json={home / 'x.json'}"): "its folder cannot be written",
            ("report", look, f"--output={home / 'x.html'}"): "its folder cannot be written",
        }
        looks = [
            ("sample", look, f"--output={tmp_path / 'x.npz'}"),
            ("evaluate", look, f"--json={tmp_path / 'x.json'}"),
            ("export", look, f"--output={tmp_path / 'x.bin'}", "--platforms=cpu"),
            ("report", look, f"--output={tmp_path / 'x.html'}"),
        ]
        longer = [
            ("train", *own, f"--workdir={runs[name]}", "--config.num_steps=60") for name in inside
        ]
        control = ("sample", look, f"--output={home / 'control.npz'}")
        results = _calls(*refused, *looks, *longer, control)
    for (code, err), words in zip(results, refused.values(), strict=False):
        assert (code, err.count("\n")) == (2, 1), err
        assert words in err
    # Who looks needs no permission to write, and one that trains says where it was stopped.
    assert results[len(refused) : len(refused) + len(looks)] == [(0, "")] * len(looks)
    for (code, err), path in zip(results[-1 - len(longer) : -1], inside.values(), strict=True):
        assert (code, err.count("\n")) == (1, 1), err
        assert str(path) in err
        assert "Permission denied" in err
        assert "Traceback" not in err
    after = snapshot(tmp_path)
    for name in before:
        if not name.startswith(tuple(inside)):
            assert after[name] == before[name], name
    assert {path.name for path in tmp_path.glob("x.*")} == {"x.npz", "x.json", "x.bin", "x.html"}
    assert not os.listdir(home)
