"""Damage to any part of a run directory: a command does without it, or says so in one sentence.

One part is damaged at a time. Where a command succeeds, its result is that of the whole run, or of
the checkpoint before the damaged one; where it does not, nothing is changed or lost.
"""

import contextlib
import io
import json
import random
import shutil
import zlib

import jax
import numpy as np
import pytest
from command_lines import final_arrays, own_recipe, snapshot

import ebjax
import gflownet
from launch import evaluate, export, report, sample, train

# tensorstore finishes reads of damaged files after their event loop is gone.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def _half(data):
    return data[: len(data) // 2]


def _noise(data):
    return random.Random(len(data)).randbytes(max(len(data), 9))


def _one_byte(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0x55]) + data[middle + 1 :] if data else b"x"


def _values(value):
    """All values of a JSON object replaced by one."""
    return lambda data: json.dumps(dict.fromkeys(json.loads(data), value)).encode()


def _unknown_field(data):
    return json.dumps({**json.loads(data), "of_no_version": 1}).encode()


def _line(change):
    """The third of the lines replaced by what ``change`` makes of it."""

    def damaged(data):
        lines = data.split(b"\n")
        lines[2] = json.dumps(change(json.loads(lines[2]))).encode()
        return b"\n".join(lines)

    return damaged


def _line_of(value):
    return _line(lambda row: {**dict.fromkeys(row, value), "step": row["step"]})


_DEEP = 100_000 * b"["
ANY = {"empty": lambda data: b"", "half": _half, "noise": _noise, "gone": None, "folder": "folder"}
BINARY = {**ANY, "one byte": _one_byte}
JSON = {
    **ANY,
    "null": lambda data: b"null",
    "list": lambda data: b"[1]",
    "deep": lambda data: _DEEP,
    "unknown field": _unknown_field,
    "texts": _values("text"),
    "lists": _values([None]),
    "nulls": _values(None),
    "huge": _values(10**400),
}
LINES = {
    **ANY,
    "list": _line(lambda row: [1]),
    "deep": lambda data: data.replace(b"\n", b"\n" + _DEEP + b"\n", 1),
    "texts": _line_of("text"),
    "objects": _line_of({}),
    "huge": _line_of(10**400),
    "far step": _line(lambda row: {**row, "step": 10**30}),
    "no step": _line(lambda row: {"loss": 1.0}),
    "unknown field": _line(lambda row: {**row, "of_no_version": 1.0}),
}
FOLDER = {"gone": None, "empty folder": "empty folder", "file": "file"}
# Of several files that fit one is taken.
PARTS = {
    "config.json": JSON,
    "metrics.jsonl": LINES,
    "evaluation.json": JSON,
    "energy_use.json": JSON,
    "samples.npz": BINARY,
    "figures/training_curves.png": BINARY,
    "tensorboard/*": BINARY,
    "train.lock": ANY,
    "figures": FOLDER,
    "tensorboard": FOLDER,
    "checkpoints": FOLDER,
    "checkpoints/40": FOLDER,
    "checkpoints/40/about": FOLDER,
    "checkpoints/40/state": FOLDER,
    "checkpoints/40/about/metadata": JSON,
    "checkpoints/40/_CHECKPOINT_METADATA": JSON,
    "checkpoints/30/_CHECKPOINT_METADATA": JSON,
    "checkpoints/40/state/_METADATA": JSON,
    "checkpoints/40/commit_success.txt": ANY,
    "checkpoints/40/state/manifest.ocdbt": BINARY,
    "checkpoints/40/state/ocdbt.process_0/manifest.ocdbt": BINARY,
    "checkpoints/40/state/d/*": BINARY,
    "checkpoints/40/state/ocdbt.process_0/d/*": BINARY,
}
COMMANDS = {"train": train, "evaluate": evaluate, "sample": sample, "export": export}
COMMANDS["report"] = report
CALLS = {
    "train": ("train",),
    "longer": ("train", "--config.num_steps=60"),
    "evaluate": ("evaluate", "--json=OUT/figures.json"),
    "best": ("evaluate", "--checkpoint=best", "--json=OUT/figures.json"),
    "older": ("evaluate", "--checkpoint=30", "--json=OUT/figures.json"),
    "sample": ("sample", "--num_samples=3", "--output=OUT/samples.npz"),
    "export": ("export", "--platforms=cpu", "--output=OUT/sampler.stablehlo"),
    "report": ("report", "--output=OUT/page.html"),
    "load": (),
}
CELLS = [(part, damage) for part, damages in PARTS.items() for damage in damages]


def _call(name, workdir, out, own):
    """The exit code of a call, and its line on stderr."""
    if name == "load":
        return _load(workdir, out)
    command, *args = CALLS[name]
    args = [arg.replace("OUT", str(out)) for arg in args]
    args += [*own, "--quiet"] if command == "train" else []
    err = io.StringIO()
    with contextlib.redirect_stderr(err), pytest.raises(SystemExit) as exit_:
        COMMANDS[command].main([f"launch.{command}", f"--workdir={workdir}", *args])
    return exit_.value.code, err.getvalue()


def _load(workdir, out):
    """As ``_call``: what both packages load, written as figures."""
    try:
        energy, flow = ebjax.load(workdir), gflownet.load(workdir)
    except ValueError as error:
        return 2, f"{error}\n"
    assert energy.step == flow.step
    assert energy.params == flow.params
    figures = {"step": energy.step, "x": float(energy.params)}
    (out / "figures.json").write_text(json.dumps(figures))
    return 0, ""


def _results(out):
    """What a call has left in its folder, as comparable values."""
    found = {}
    for path in out.iterdir():
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                found[path.name] = {name: arrays[name].tolist() for name in arrays.files}
        elif path.suffix == ".json":
            found[path.name] = json.loads(path.read_text())
        elif path.suffix == ".stablehlo":
            sampler = jax.export.deserialize(bytearray(path.read_bytes()))
            found[path.name] = sampler.call(jax.random.split(jax.random.key(0), 3)).tolist()
        else:
            assert path.read_text(encoding="utf-8").endswith("</html>\n")
    return found


class Whole:
    """A finished run, the same one trained further, and what every call finds in it."""

    def __init__(self, folder):
        self.own = [*own_recipe(folder, "whole_recipe"), "--config.break_at=-1"]
        self.workdir, self.longer = folder / "run", folder / "longer"
        assert _call("train", self.workdir, folder, self.own) == (0, "")
        (self.workdir / "energy_use.json").write_text('{"energy_kwh": 1.0}\n')
        shutil.copytree(self.workdir, self.longer)
        assert _call("longer", self.longer, folder, self.own) == (0, "")
        self.results = {}
        for step in (30, 40):
            single = folder / f"until {step}"
            shutil.copytree(self.workdir, single)
            shutil.rmtree(single / "checkpoints" / str(70 - step))
            for name in set(CALLS) - {"train", "longer", "older"}:
                out = folder / f"{name} {step}"
                out.mkdir()
                assert _call(name, single, out, self.own) == (0, "")
                self.results[name, step] = _results(out)
        self.results["older", 40] = self.results["evaluate", 30]
        assert self.results["evaluate", 30] != self.results["evaluate", 40]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return Whole(tmp_path_factory.mktemp("whole"))


def _damage(workdir, part, damage):
    """Damages one part and returns its path from the run directory."""
    fitting = sorted(workdir.glob(part))
    path = fitting[zlib.crc32(damage.encode()) % len(fitting)]
    change = PARTS[part][damage]
    data = path.read_bytes() if path.is_file() else b""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if change in ("folder", "empty folder"):
        path.mkdir()
    elif change == "file":
        path.write_bytes(b"text")
    elif change is not None:
        path.write_bytes(change(data))
    return str(path.relative_to(workdir))


def _check(whole, folder, part, damage, name, caplog):
    workdir, out = folder / "run", folder / "out"
    shutil.copytree(whole.workdir, workdir)
    out.mkdir()
    damaged = _damage(workdir, part, damage)
    before = snapshot(workdir)
    code, err = _call(name, workdir, out, whole.own)
    after = snapshot(workdir)
    assert "Traceback" not in err + caplog.text
    if code != 0:
        assert code in (1, 2)
        assert err.count("\n") == 1, err
        assert err.endswith(".\n"), err
        assert str(workdir) in err
        assert not [path for path in out.iterdir() if path.suffix == ".tmp"]
        _only_added(before, after)
    elif name in ("train", "longer"):
        _as_if_whole(workdir, whole.workdir if name == "train" else whole.longer, damaged)
    else:
        assert after == before
        assert err == ""
        found = _results(out)
        is_skipped = "Checkpoint 40" in caplog.text or not any(
            "checkpoints/40/" in n for n in after
        )
        steps = (30,) if is_skipped and name != "older" else (40, 30) if name == "best" else (40,)
        assert any(found == whole.results[name, step] for step in steps)


def _only_added(before, after):
    """Nothing is changed; events that a run has begun may be left."""
    assert {name: after.get(name) for name in before} == before
    assert all(name.startswith("tensorboard") for name in set(after) - set(before))


def _as_if_whole(workdir, expected, damaged):
    """The run has gone on from what was whole and is what it would have been."""
    assert final_arrays(workdir) == final_arrays(expected)
    others = ("tensorboard", "checkpoints", "damaged_checkpoints", "energy_use.json", "train.lock")
    if damaged == "metrics.jsonl":
        others += (damaged, "figures/training_curves.png")  # lines that were lost stay lost
    one, other = (
        {name: data for name, data in snapshot(each).items() if not name.startswith(others)}
        for each in (workdir, expected)
    )
    assert one == other
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {
        path.name for path in (expected / "checkpoints").iterdir()
    }


@pytest.mark.parametrize(
    ("part", "damage", "name"),
    [(*cell, list(CALLS)[i % len(CALLS)]) for i, cell in enumerate(CELLS[::3])],
)
def test_damage_is_mended_or_named(whole, tmp_path, part, damage, name, caplog):
    _check(whole, tmp_path, part, damage, name, caplog)


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(("part", "damage"), CELLS)
def test_all_damage_is_mended_or_named(whole, tmp_path, part, damage, name, caplog):
    _check(whole, tmp_path, part, damage, name, caplog)
