"""``import ebjax`` stays light and touches nothing of its host program."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ["distrax", "orbax.checkpoint", "matplotlib", "absl.app", "absl.flags", "sklearn"]


def modules_after(statement):
    program = f"import sys, json\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def brought_by_dependencies():
    """What jax, flax and optax import themselves is not ours to avoid."""
    return modules_after("import jax, flax.linen, optax, jax.experimental.multihost_utils")


def test_import_ebjax_leaves_the_heavy_ones_out(brought_by_dependencies):
    ours = modules_after("import ebjax, ebjax.energies.targets") - brought_by_dependencies
    assert "ebjax.samplers.run" in ours
    assert not ours & set(HEAVY)
    assert not {name for name in ours if name.startswith(("ebjax.training", "ebjax.recipes"))}


def test_a_target_is_what_brings_distrax():
    """The control: the check sees an import where there is one."""
    target = "ebjax.energies.targets.gaussian([0.0], [[1.0]])"
    assert "distrax" in modules_after(f"import ebjax; {target}")


def test_import_does_not_start_jax():
    """Devices may still be configured after the import, as the README says."""
    statement = (
        "import ebjax, jax; jax.config.update('jax_num_cpu_devices', 3); "
        "assert jax.device_count('cpu') == 3"
    )
    modules_after(statement)
