"""One decision for all leaves: no chain has the position of one point and the energy of another.

How XLA fuses decides whether the mistake shows, so chains run in a process of their own, compiled
as users compile.
"""

import importlib
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.samplers import hmc, mala, random_walk, underdamped
from ebjax.samplers.decision import metropolis
from ebjax.samplers.smc.path import geometric_path

DIM, NUM_CHAINS, NUM_STEPS = 64, 4_000, 300
MATRIX = np.random.default_rng(0).normal(size=(DIM, DIM)).astype(np.float32) / 8.0
KERNELS = {
    "hmc": lambda: hmc(step_size=0.3, num_steps=3),
    "mala": lambda: mala(step_size=0.05),
    "random_walk": lambda: random_walk(step_size=0.2),
    "underdamped": lambda: underdamped(step_size=0.3, friction=1.0, metropolis=True),
}


def base(params, x):
    return 0.5 * jnp.dot(x, x) + 500.0


def target(params, x):
    """Large, so that a rounding is of 10^-4."""
    d = jnp.asarray(MATRIX) @ x
    return 0.5 * jnp.dot(x, x) + jnp.dot(jnp.exp(d) - d, jnp.ones(DIM)) + 1500.0


def num_mixed(kernel):
    """Chains [C] whose energies are not those of where they are, over all steps of a scan."""
    path = geometric_path(base, target)

    @jax.jit
    def run(beta, key, x):
        params = (beta, ((), ()))

        def body(state, t):
            keys = jax.random.split(jax.random.fold_in(key, t), NUM_CHAINS)
            step = jax.vmap(lambda key, state: kernel.step(key, path, params, state)[0])
            state = step(keys, state)
            there = jax.vmap(lambda x: path.evaluate(params, x, False))(state.position)
            ours = state.parts
            error = jnp.abs(ours.target_energy - there.target_energy)
            error = jnp.maximum(error, jnp.abs(ours.base_energy - there.base_energy))
            return state, jnp.sum(error > 0.05)

        state = jax.vmap(lambda x: kernel.init(path, params, x))(x)
        return jax.lax.scan(body, state, jnp.arange(NUM_STEPS))[1].sum()

    x = jax.random.normal(jax.random.key(0), (NUM_CHAINS, DIM))
    return int(run(jnp.float32(0.3), jax.random.key(1), x))


def compared_as_logarithms(uniform, log_acceptance):
    """The planted bug: the comparison is cheap enough for XLA to compute it anew in each fusion."""
    rate = jnp.minimum(log_acceptance, 0.0)
    return jnp.log(uniform) < rate, jnp.exp(rate)


def main():
    found = {name: num_mixed(make()) for name, make in KERNELS.items()}
    importlib.import_module("ebjax.samplers.hmc").metropolis = compared_as_logarithms
    found["planted"] = num_mixed(KERNELS["hmc"]())
    sys.stdout.write(json.dumps(found))


def test_energies_belong_to_positions():
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    planted = found.pop("planted")
    assert found == dict.fromkeys(KERNELS, 0)
    if planted == 0:
        pytest.skip("this compiler takes the decision once, or rounds it equally")


def test_what_is_accepted():
    log_ratio = jnp.array([0.3, 0.0, -1.0, -1.0, -jnp.inf, jnp.nan, -200.0])
    uniform = jnp.array([1.0 - 2.0**-24, 1.0 - 2.0**-24, 0.36, 0.37, 2.0**-24, 2.0**-24, 2.0**-24])
    is_accepted, rate = metropolis(uniform, log_ratio)
    assert is_accepted.tolist() == [True, True, True, False, False, False, False]
    np.testing.assert_allclose(rate, [1.0, 1.0, np.exp(-1), np.exp(-1), 0.0, 0.0, 0.0], atol=1e-7)


if __name__ == "__main__":
    main()
