"""Effective sample size a second after adaptation, on a Gaussian of condition number 1e4.

NUTS everywhere, 100-d, diagonal, variances from 1e-2 to 1e2. The effective sample size is the
smallest bulk one of all components, by the same function for all; the device is synchronised before
the clock is read.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ebjax.energies import targets
from ebjax.samplers import nuts, sample, warmup
from ebjax.samplers.diagnostics import effective_sample_size
from launch.benchmarks.workload import Workload, import_peer

__all__ = ["blackjax_nuts", "ebjax_nuts", "numpyro_nuts"]


def _workload(
    name: str,
    warm_up: Callable[[jax.Array], Any],
    draw: Callable[[jax.Array, Any], tuple[Any, Any]],
    note: str,
) -> Workload:
    """`warm_up(key)`, then `draw(key, adapted) -> (positions [N, C, D], evaluations)`."""
    count = 0

    def run() -> Mapping[str, float]:
        nonlocal count
        warm_up_key, draw_key = jax.random.split(jax.random.key(count))
        started = time.perf_counter()
        adapted = jax.block_until_ready(warm_up(warm_up_key))
        adapted_at = time.perf_counter()
        positions, evaluations = jax.block_until_ready(draw(draw_key, adapted))
        seconds = time.perf_counter() - adapted_at
        ess = float(np.min(effective_sample_size(jnp.asarray(positions))))
        count += 1
        return {
            "ess": ess,
            "ess_a_second": ess / seconds,
            "ess_a_second_with_warm_up": ess / (seconds + adapted_at - started),
            "ess_an_evaluation": ess / float(np.sum(evaluations)),
        }

    started = time.perf_counter()
    run()
    return Workload(name, run, time.perf_counter() - started, note)


def _start(num_chains: int) -> jax.Array:
    return jax.random.normal(jax.random.key(12_345), (num_chains, 100))


def ebjax_nuts(*, num_chains: int, num_warmup: int, num_samples: int) -> Workload:
    """Pooled warm-up, then `sample`."""
    law = targets.ill_conditioned_gaussian()
    start = _start(num_chains)

    def draw(key: jax.Array, adapted: Any) -> tuple[Any, Any]:
        draws = sample(
            key, adapted.kernel, law.energy, (), adapted.positions, num_samples=num_samples
        )
        return draws.positions, draws.num_evaluations

    return _workload(
        "ebjax NUTS",
        lambda key: warmup(key, nuts, law.energy, (), start, num_steps=num_warmup),
        draw,
        "one adaptation for all chains",
    )


def blackjax_nuts(*, num_chains: int, num_warmup: int, num_samples: int) -> Workload:
    """Window adaptation of each chain, then NUTS in one scan.

    Raises:
        PeerMissing: if blackjax cannot be imported.
    """
    blackjax = import_peer("blackjax", peer="blackjax")
    law = targets.ill_conditioned_gaussian()
    start = _start(num_chains)

    def log_density(x: jax.Array) -> jax.Array:
        return -law.energy((), x)

    adaptation = blackjax.window_adaptation(blackjax.nuts, log_density, target_acceptance_rate=0.8)

    @jax.jit
    def warm_up(key: jax.Array) -> Any:
        def one(key: jax.Array, x: jax.Array) -> Any:
            (state, parameters), _ = adaptation.run(key, x, num_steps=num_warmup)
            return state, parameters

        return jax.vmap(one)(jax.random.split(key, num_chains), start)

    @jax.jit
    def draw(key: jax.Array, adapted: Any) -> tuple[Any, Any]:
        def one(key: jax.Array, state: Any, parameters: Any) -> Any:
            kernel = blackjax.nuts(log_density, **parameters)

            def body(state: Any, key: jax.Array) -> tuple[Any, Any]:
                state, info = kernel.step(key, state)
                return state, (state.position, info.num_integration_steps)

            return jax.lax.scan(body, state, jax.random.split(key, num_samples))[1]

        return jax.vmap(one, out_axes=1)(jax.random.split(key, num_chains), *adapted)

    return _workload("blackjax NUTS", warm_up, draw, "an adaptation for each chain")


def numpyro_nuts(*, num_chains: int, num_warmup: int, num_samples: int) -> Workload:
    """numpyro's `MCMC(NUTS)`, chains vectorised.

    Raises:
        PeerMissing: if numpyro cannot be imported.
    """
    infer = import_peer("numpyro.infer", peer="numpyro")
    law = targets.ill_conditioned_gaussian()
    start = _start(num_chains)
    mcmc = infer.MCMC(
        infer.NUTS(potential_fn=lambda x: law.energy((), x), target_accept_prob=0.8),
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=num_chains,
        chain_method="vectorized",
        progress_bar=False,
    )

    def warm_up(key: jax.Array) -> Any:
        mcmc.post_warmup_state = None
        mcmc.warmup(jax.random.key_data(key), init_params=start, collect_warmup=False)
        return mcmc.post_warmup_state

    def draw(key: jax.Array, adapted: Any) -> tuple[Any, Any]:
        mcmc.post_warmup_state = adapted
        mcmc.run(jax.random.key_data(key), extra_fields=("num_steps",))
        positions = mcmc.get_samples(group_by_chain=True)
        return jnp.swapaxes(positions, 0, 1), mcmc.get_extra_fields()["num_steps"]

    note = "an adaptation for each chain; its host code runs at every call"
    return _workload("numpyro NUTS", warm_up, draw, note)
