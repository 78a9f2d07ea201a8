"""Exported samplers and energies: the same numbers where this package is not installed."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_lines import snapshot

import ebjax
import gflownet
from launch import export

CLEAN = """
import json, sys
import jax
exported = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
num = int(sys.argv[2])
drawn = exported.call(jax.random.split(jax.random.key(7), num))
ours = [name for name in sys.modules if name.split(".")[0] in ("ebjax", "gflownet", "launch")]
print(json.dumps([drawn.tolist(), ours]))
"""


def call(*args, code=0):
    with pytest.raises(SystemExit) as exit_:
        export.main(["launch.export", *map(str, args)])
    assert exit_.value.code == code


def test_an_exported_sampler_draws_the_same_in_a_clean_process(finished, tmp_path, capsys):
    """For any number of keys; isolated, so that the folder of the project is not on the path."""
    path = tmp_path / "grid.stablehlo"
    before = snapshot(finished)
    call(f"--workdir={finished}", f"--output={path}")
    assert "keys [N] to samples [N, 2]" in capsys.readouterr().out
    assert snapshot(finished) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["grid.stablehlo"]
    program = tmp_path / "clean.py"
    program.write_text(CLEAN)
    done = subprocess.run(
        [sys.executable, "-I", str(program), str(path), "40"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    drawn, ours = json.loads(done.stdout)
    assert ours == []
    flow = gflownet.load(finished)
    keys = jax.random.split(jax.random.key(7), 40)
    expected = jax.jit(jax.vmap(flow.draw, (0, None)))(keys, flow.params)
    assert drawn == np.asarray(expected).tolist()
    assert len(np.unique(drawn, axis=0)) > 5


def test_a_fixed_number_is_kept_to(finished, tmp_path, capsys):
    path = tmp_path / "grid.stablehlo"
    call(f"--workdir={finished}", f"--output={path}", "--num_samples=3", "--platforms=cpu")
    assert "keys [3] to samples [3, 2]" in capsys.readouterr().out
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    assert exported.platforms == ("cpu",)
    keys = jax.random.split(jax.random.key(0), 4)
    assert exported.call(keys[:3]).shape == (3, 2)
    with pytest.raises(ValueError, match="shape"):
        exported.call(keys)


def test_an_energy_is_exported_with_its_parameters(tmp_path):
    path = tmp_path / "energy.stablehlo"
    scale = jnp.array([1.0, 4.0])
    ebjax.export_function(lambda x: 0.5 * jnp.sum(scale * x["x"] ** 2), {"x": jnp.zeros(2)}, path)
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    x = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 2.0]], np.float32)
    np.testing.assert_allclose(exported.call({"x": x}), [0.5, 2.0, 8.5])
    assert exported.platforms == ("cpu", "cuda", "tpu")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_examples": 0}, "num_examples is 0; it must be at least 1"),
        ({"platforms": ("cpu", "abacus")}, "platforms is 'cpu, abacus'; give one or more of cpu"),
        ({"platforms": ()}, "platforms is ''; give one or more"),
    ],
)
def test_what_cannot_be_exported_is_refused(options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        ebjax.export_function(jnp.square, jnp.zeros(2), tmp_path / "f", **options)
    assert not list(tmp_path.iterdir())


def test_wrong_calls_are_one_sentence(finished, tmp_path, capsys, monkeypatch):
    workdir, output = f"--workdir={finished}", f"--output={tmp_path / 'f'}"
    for args, words in [
        ([output], "--workdir is missing"),
        ([workdir, output, "--num_samples=-1"], "num_samples is -1; it must be at least 0"),
        ([workdir, output, "--platforms=abacus"], "platforms is 'abacus'"),
        ([workdir, "--output=/no/such/folder/f"], "its folder does not exist"),
        ([f"--workdir={tmp_path / 'none'}", output], "holds no run"),
    ]:
        call(*args, code=2)
        err = capsys.readouterr().err
        assert words in err
        assert err.count("\n") == 1
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    for name in [name for name in sys.modules if name.startswith("jax._src.export.serialization")]:
        monkeypatch.delitem(sys.modules, name)
    call(workdir, output, "--platforms=cpu", code=2)
    assert "flatbuffers is missing; pip install 'ebjax[export]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
