"""Commands as a user calls them, and what they leave."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import in_haste

ROOT = Path(__file__).parents[2]
TINY = (
    "--config=hypergrid",
    "--config.hidden_features=(16,)",
    "--config.num_steps=40",
    "--config.log_every=5",
    "--config.checkpoint_every=10",
    "--config.steps_per_call=5",
)


_CACHE = tempfile.TemporaryDirectory(prefix="ebjax_test_cache_")


def environment():
    paths = [str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    clean = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    return {
        **clean,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "COLUMNS": "120",
        "XLA_FLAGS": in_haste.FLAGS,
        # The same programs are compiled by every command; this is most of their time.
        "JAX_COMPILATION_CACHE_DIR": _CACHE.name,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def start(command, *args, cwd, env=None):
    """Starts ``python -m launch.COMMAND ARGS``."""
    return subprocess.Popen(
        [sys.executable, "-m", f"launch.{command}", *map(str, args)],
        cwd=cwd,
        env=environment() | (env or {}),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run(command, *args, cwd, code=0, timeout=180, env=None):
    """Runs a command to its end and checks its exit code; ``(stdout, stderr)``."""
    process = start(command, *args, cwd=cwd, env=env)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == code, err or out
    return out, err


def snapshot(folder):
    """Paths and contents of a folder, to see that nothing has changed."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def final_arrays(workdir):
    """Bytes of all arrays of the newest checkpoint, and its step."""
    import jax
    import numpy as np

    from launch import runs

    state = runs.load_run(str(workdir)).state
    state = state._replace(key=jax.random.key_data(state.key))
    return int(state.step), [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def own_recipe(folder, module="breaking_recipe"):
    """Flags of a training run of a user's own recipe, with its config in ``folder``."""
    config = Path(folder) / "mine.py"
    config.write_text(
        "from launch.runs import default_config\n\n\n"
        f"def get_config():\n    return default_config('mine', {module!r})\n"
    )
    return [f"--config={config}", f"--recipe_module={module}"]


def wait_for(condition, process=None, timeout=120):
    """Waits until a condition holds; the process must not end before."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "waited too long"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.005)


def num_lines(path):
    """Whole lines of a file, 0 where there is none."""
    return path.read_bytes().count(b"\n") if path.exists() else 0
