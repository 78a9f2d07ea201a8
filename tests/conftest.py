"""Eight CPU devices for every test, double precision for those that ask for it, bounded memory."""

import gc
import os
import sys
from pathlib import Path

import jax
import pytest

# pytest's importlib mode leaves sys.path alone.
sys.path.insert(0, str(Path(__file__).parent))

import in_haste

# Tracing makes millions of small objects, few of them garbage, which costs time to look for.
gc.set_threshold(200_000, 20, 20)

# Before JAX starts: tests of 1, 2 and 8 devices run in this process.
jax.config.update("jax_num_cpu_devices", 8)


def pytest_configure(config):
    """Compiles in haste, unless slow tests run, whose programs run long."""
    if config.option.markexpr == "not slow":
        more = "--xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1"
        os.environ["XLA_FLAGS"] = f"{in_haste.FLAGS} {more} {os.environ.get('XLA_FLAGS', '')}"


def pytest_make_parametrize_id(val, argname):
    """Bytes, which may hold the time of their writing, do not name tests: workers must agree."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture
def x64():
    """Arrays are float64 by default within the test."""
    with jax.enable_x64(True):
        yield


# Compiled programs of thousands of tests fill the memory. They go after so many tests, where the
# module changes: within one, tests share them.
_TESTS_BETWEEN_CLEARANCES = 150
_num_tests = 0


def pytest_runtest_teardown(item, nextitem):
    """Drops compiled programs now and then."""
    global _num_tests
    _num_tests += 1
    is_last = nextitem is None or nextitem.path != item.path
    if is_last and _num_tests >= _TESTS_BETWEEN_CLEARANCES:
        _num_tests = 0
        jax.clear_caches()
