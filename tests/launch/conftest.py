"""One tiny finished run, and the helpers of ``command_lines`` made importable."""

import shutil
import sys
from pathlib import Path

import jax
import pytest

# pytest's importlib mode leaves sys.path alone.
sys.path.insert(0, str(Path(__file__).parent))

from command_lines import TINY, run


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A tiny run, trained to its end in a folder that is not the repository; only to be read."""
    folder = tmp_path_factory.mktemp("elsewhere")
    run("train", *TINY, "--workdir=grid", cwd=folder)
    return folder / "grid"


@pytest.fixture
def finished_copy(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "grid")
    return tmp_path / "grid"


@pytest.fixture(scope="session", autouse=True)
def started():
    """JAX with the devices that tests/conftest.py asks for, before a command asks for others."""
    assert len(jax.devices()) == 8
