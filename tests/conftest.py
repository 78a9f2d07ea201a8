"""Eight CPU devices for every test, and double precision for those that ask for it."""

import jax
import pytest

# Before JAX starts: tests of 1, 2 and 8 devices run in this process.
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def x64():
    """Arrays are float64 by default within the test."""
    with jax.enable_x64(True):
        yield
