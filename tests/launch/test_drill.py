"""The drill: real runs stand it, and what it is there to find is found."""

import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
from command_lines import final_arrays, run

from launch import drill


def _stands(folder, kills):
    """The drill passes, and kept what it says it compared."""
    args = (f"--kills={kills}", "--seed=3", f"--workdir={folder / 'runs'}")
    out, err = run("drill", *args, cwd=folder, timeout=1800)
    assert err == ""
    assert f"{kills}/{kills}  killed while ending" in out
    assert f"{kills} kills: the run equals the undisturbed one, bit for bit" in out
    killed, undisturbed = folder / "runs" / "killed", folder / "runs" / "undisturbed"
    assert final_arrays(killed) == final_arrays(undisturbed)
    metrics = (killed / "metrics.jsonl").read_bytes()
    assert metrics == (undisturbed / "metrics.jsonl").read_bytes()
    # Each process began a file of events.
    assert len(list((killed / "tensorboard").iterdir())) > 1


def test_two_kills(tmp_path):
    _stands(tmp_path, 2)


@pytest.mark.slow
def test_thirty_kills(tmp_path):
    _stands(tmp_path, 30)


def _set_metric(workdir):
    path = workdir / "metrics.jsonl"
    path.write_text(path.read_text().replace("loss", "lost", 1))


def _set_sample(workdir):
    with np.load(workdir / "samples.npz") as arrays:
        changed = {name: arrays[name].copy() for name in arrays.files}
    next(iter(changed.values())).reshape(-1)[0] += 1
    np.savez(workdir / "samples.npz", **changed)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (_set_metric, "metrics.jsonl of the killed run"),
        (_set_sample, "samples.npz of the killed run"),
        (lambda workdir: (workdir / "samples.npz.tmp").touch(), "samples.npz.tmp is left only"),
        (lambda workdir: (workdir / "evaluation.json").unlink(), "evaluation.json is left only"),
        (lambda workdir: (workdir / "checkpoints" / "50.orbax-checkpoint-tmp").mkdir(), "50.orbax"),
        (lambda workdir: (workdir / "figures" / "training_curves.png").write_bytes(b""), "curves"),
    ],
)
def test_a_difference_is_found(finished, finished_copy, change, name):
    assert list(drill._differences(finished_copy, finished)) == []
    change(finished_copy)
    (found,) = drill._differences(finished_copy, finished)
    assert name in found


def test_another_state_is_found(finished, finished_copy):
    checkpoints = finished_copy / "checkpoints"
    shutil.rmtree(checkpoints / "40")
    shutil.copytree(checkpoints / "30", checkpoints / "40")
    (found,) = drill._differences(finished_copy, finished)
    assert "Checkpoint 40 of the killed run is not that" in found


def _killed_once(folder, monkeypatch, text, moment="training"):
    """A drill of one kill of a process that runs ``text`` in place of a training run."""
    (folder / "killed").mkdir()
    made = drill._Drill(folder, num_steps=100, moments=random.Random(0), startup=0.5)

    def start(self, name, *arguments):
        with (folder / f"{name}.txt").open("wb") as said:
            return subprocess.Popen([sys.executable, "-c", text], stdout=said, stderr=said)

    monkeypatch.setattr(drill._Drill, "start", start)
    return made, made.kill(moment)


_WRITE = "import time; open({path!r}, 'w').write(9 * 'line\\n'); time.sleep(60)"


@pytest.mark.parametrize(
    ("says", "words"),
    [
        ("print('going on from step 20', flush=True);", "went on from step 20; 0 was saved"),
        ("print('Checkpoint 3 cannot be read', flush=True);", "of a killed run is damaged"),
        ("", None),
    ],
)
def test_a_wrong_start_is_found(tmp_path, monkeypatch, says, words):
    text = says + _WRITE.format(path=str(tmp_path / "killed" / "metrics.jsonl"))
    made, kill = _killed_once(tmp_path, monkeypatch, text)
    assert kill == ("training", 45, 0)
    assert [words in violation for violation in made.violations] == ([True] if words else [])


def test_a_process_that_fails_is_found(tmp_path, monkeypatch):
    with pytest.raises(drill._ViolationError, match=r"ended with 1: .*no room"):
        _killed_once(tmp_path, monkeypatch, "raise SystemExit('no room')")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--kills=0"], "kills is 0"),
        (["--seed=-1"], "seed is -1"),
        (["--workdir=."], "not empty"),
    ],
)
def test_a_wrong_call_is_one_sentence(args, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").touch()
    with pytest.raises(SystemExit) as exit_:
        drill.main(["launch.drill", *args])
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
