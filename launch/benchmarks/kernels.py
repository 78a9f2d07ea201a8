"""Kernels on two standard targets: this package and blackjax, on the same energies.

- `mixture`: forty Gaussians in 2-D (`targets.forty_gaussians`);
- `gaussian`: 100-d, diagonal, variances from 1e-2 to 1e2 (condition number 1e4).

Final states only, chains vmapped, steps scanned; step sizes are those of `STEP_SIZES` for both.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ebjax.energies import targets
from ebjax.samplers import hmc, langevin, mala, nuts, sample
from launch.benchmarks.workload import Workload, compile_ahead, import_peer

__all__ = ["STEP_SIZES", "blackjax_kernel", "ebjax_kernel"]

NUM_LEAPFROG = 10
STEP_SIZES = {
    "mixture": {"ula": 0.1, "mala": 0.1, "hmc": 0.3, "nuts": 0.5},
    "gaussian": {"ula": 2e-3, "mala": 2e-3, "hmc": 0.08, "nuts": 0.1},
}


def _target(name: str) -> Any:
    laws: dict[str, Callable[[], Any]] = {
        "mixture": targets.forty_gaussians,
        "gaussian": targets.ill_conditioned_gaussian,
    }
    return laws[name]()


def _start(target: Any, num_chains: int, seed: int) -> jax.Array:
    """Positions [C, D] drawn from the target itself, so that all chains do typical work."""
    return jax.vmap(target.sample)(jax.random.split(jax.random.key(seed), num_chains))


def ebjax_kernel(
    *,
    algorithm: str,
    target: str,
    num_chains: int,
    num_steps: int,
    seed: int,
    num_devices: int = 1,
) -> Workload:
    """`ebjax.samplers.sample`, final positions only.

    Args:
        algorithm: `"ula"`, `"mala"`, `"hmc"` (10 leapfrog steps) or `"nuts"`.
        target: `"mixture"` or `"gaussian"`.
        num_chains: chains C.
        num_steps: transitions of one `run()`.
        seed: of the start and the noise.
        num_devices: local devices that the chains are spread over.
    """
    step_size = STEP_SIZES[target][algorithm]
    kernel = {
        "ula": lambda: langevin(step_size=step_size),
        "mala": lambda: mala(step_size=step_size),
        "hmc": lambda: hmc(step_size=step_size, num_steps=NUM_LEAPFROG),
        "nuts": lambda: nuts(step_size=step_size),
    }[algorithm]()
    law = _target(target)
    position, key, count = _start(law, num_chains, seed), jax.random.key(seed + 1), 0

    def run() -> Mapping[str, float]:
        nonlocal position, count
        draws = sample(
            jax.random.fold_in(key, count),
            kernel,
            law.energy,
            (),
            position,
            num_samples=1,
            thinning=num_steps,
            num_devices=num_devices,
        )
        position, count = jax.block_until_ready(draws.positions[0]), count + 1
        facts = {"mean_energy": float(draws.info.energy.mean())}
        if "acceptance_rate" in draws.info._fields:
            facts["acceptance_rate"] = float(draws.info.acceptance_rate.mean())
        facts["gradients_a_step"] = float(np.mean(draws.num_evaluations)) / num_steps
        return facts

    times = []
    for _ in range(2):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    note = f"the runner with its diagnostics; step size {step_size}"
    return Workload(f"ebjax {algorithm}", run, times[0] - times[1], note)


def blackjax_kernel(
    *, algorithm: str, target: str, num_chains: int, num_steps: int, seed: int
) -> Workload:
    """The same with blackjax: a key per chain and step, one jitted scan over vmapped kernels.

    Raises:
        PeerMissing: if blackjax cannot be imported.
    """
    blackjax = import_peer("blackjax", peer="blackjax")
    law = _target(target)
    step_size = STEP_SIZES[target][algorithm]
    step, init = _blackjax_step(blackjax, algorithm, law, step_size)
    state = jax.vmap(init)(_start(law, num_chains, seed))

    def one_step(state: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        state, acceptance, work = jax.vmap(step)(jax.random.split(key, num_chains), state)
        return state, jnp.stack([jnp.mean(acceptance), jnp.mean(work)])

    def steps(state: Any, key: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
        key, key_steps = jax.random.split(key)
        state, facts = jax.lax.scan(one_step, state, jax.random.split(key_steps, num_steps))
        position = getattr(state, "position", state)
        mean_energy = jnp.mean(jax.vmap(lambda x: law.energy((), x))(position))
        return state, key, jnp.stack([mean_energy, *jnp.mean(facts, axis=0)])

    key = jax.random.key(seed + 1)
    compiled, warm_up_seconds = compile_ahead(steps, state, key)

    def run() -> Mapping[str, float]:
        nonlocal state, key
        state, key, facts = jax.block_until_ready(compiled(state, key))
        names = ("mean_energy", "acceptance_rate", "gradients_a_step")
        return dict(zip(names, np.asarray(facts).tolist(), strict=True))

    note = f"vmapped chains in one lax.scan; step size {step_size}"
    return Workload(f"blackjax {algorithm}", run, warm_up_seconds, note)


def _blackjax_step(
    blackjax: Any, algorithm: str, law: Any, step_size: float
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`(step, init)`, step: (key, state) -> (state, acceptance rate, gradients)."""

    def log_density(position: jax.Array) -> jax.Array:
        return -law.energy((), position)

    if algorithm == "ula":  # which blackjax does not have: SGLD on the full gradient
        gradient = jax.grad(log_density)
        sgld = blackjax.sgld(lambda position, minibatch: gradient(position))
        one = jnp.float32(1.0)
        return lambda key, state: (sgld.step(key, state, 0, step_size), one, one), lambda x: x
    dim = law.event_shape[0]
    # blackjax's MALA has the step size of ours: proposals x + h ∇log p + sqrt(2h) noise.
    kernel = {
        "mala": lambda: blackjax.mala(log_density, step_size),
        "hmc": lambda: blackjax.hmc(log_density, step_size, jnp.ones(dim), NUM_LEAPFROG),
        "nuts": lambda: blackjax.nuts(log_density, step_size, jnp.ones(dim)),
    }[algorithm]()

    def step(key: jax.Array, state: Any) -> tuple[Any, jax.Array, jax.Array]:
        state, info = kernel.step(key, state)
        work = jnp.float32(getattr(info, "num_integration_steps", 1))
        return state, info.acceptance_rate, work

    return step, kernel.init
