"""The energy of a run: sessions add up, nothing is asked for unless told, damage is a sentence."""

import json
import sys
import types

import pytest
from command_lines import own_recipe, snapshot

from launch import train


class Tracker:
    """Stands for codecarbon's: each session takes 2 kWh, half of it in the processor."""

    running = 0  # how many measure at the moment

    def __init__(self, **options):
        assert options["save_to_file"] is False

    def start(self):
        Tracker.running += 1

    def stop(self):
        Tracker.running -= 1
        self.final_emissions_data = types.SimpleNamespace(
            energy_consumed=2.0, cpu_energy=1.0, gpu_energy=0.75, ram_energy=0.25, duration=60.0
        )


@pytest.fixture
def tracked(monkeypatch, tmp_path):
    """Calls ``launch.train --track_energy`` on a run of the recipe that fits a number."""
    module = types.SimpleNamespace(OfflineEmissionsTracker=Tracker)
    monkeypatch.setitem(sys.modules, "codecarbon", module)

    def call(*args, code=0):
        own = [*own_recipe(tmp_path), f"--workdir={tmp_path / 'run'}", "--quiet"]
        with pytest.raises(SystemExit) as exit_:
            train.main(["launch.train", *own, *args])
        assert exit_.value.code == code

    return call


def test_sessions_add_up_and_others_do_not_count(tracked, tmp_path):
    path = tmp_path / "run" / "energy_use.json"
    tracked("--config.break_at=-1", "--config.num_steps=10")
    assert not path.exists()
    tracked("--config.break_at=-1", "--config.num_steps=20", "--track_energy")
    tracked("--config.break_at=-1", "--config.num_steps=30", "--track_energy")
    assert json.loads(path.read_text()) == {
        "energy_kwh": 4.0,
        "cpu_kwh": 2.0,
        "gpu_kwh": 1.5,
        "memory_kwh": 0.5,
        "seconds": 120.0,
    }
    # What a run that diverges took counts as well; a new run starts from nothing.
    tracked("--config.break_at=7", "--overwrite", "--track_energy", code=1)
    assert json.loads(path.read_text())["energy_kwh"] == 2.0
    assert Tracker.running == 0


def test_a_measurement_that_fails_costs_no_run(tracked, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Tracker, "start", lambda self: None)
    monkeypatch.setattr(Tracker, "stop", lambda self: None)
    tracked("--config.break_at=-1", "--config.num_steps=10", "--track_energy")
    assert "could not measure the energy" in capsys.readouterr().err
    assert (tmp_path / "run" / "evaluation.json").exists()
    assert not (tmp_path / "run" / "energy_use.json").exists()


def test_what_cannot_be_tracked_is_one_sentence(tracked, tmp_path, monkeypatch, capsys):
    tracked("--config.break_at=-1", "--config.num_steps=10", "--track_energy")
    path = tmp_path / "run" / "energy_use.json"
    longer = ["--config.break_at=-1", "--config.num_steps=20", "--track_energy"]
    for text in ("{", "[]", '{"energy_kwh": 1.0}', path.read_text().replace("2.0", "NaN")):
        path.write_text(text)
        before = snapshot(tmp_path / "run")
        capsys.readouterr()
        tracked(*longer, code=2)
        assert snapshot(tmp_path / "run") == before
        err = capsys.readouterr().err
        assert "energy_use.json is damaged; remove it" in err
        assert err.count("\n") == 1
    before = snapshot(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    tracked(*longer, code=2)
    assert "pip install 'ebjax[energy]'" in capsys.readouterr().err
    assert snapshot(tmp_path / "run") == before
