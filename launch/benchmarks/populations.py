"""Normalising constants by tempered SMC: this package and blackjax, errors beside the times.

Each `run()` is one estimate of log Z with a seed of its own; the facts are over all of them. The
log Z are those of normalised bases, so the truth is that of the target.

- `conjugate`: N(0, I) in 10-d with a Gaussian likelihood, closed form;
- `many_well`: 16 double wells (ManyWell-32), base N(0, I), 164.6957;
- `mixture`: forty Gaussians in 2-D, base N(0, 40² I), 0;
- `funnel`: Neal's in 10-d, base N(0, 5² I), 0;
- `cox`: log-Gaussian Cox process on 40 x 40 cells with simulated counts, whitened, base N(0, I);
- `cox_fitted`: the same from the Gaussian nearest to the posterior. `COX_LOG_Z` stands for the
  truth of both.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ebjax.energies import targets
from ebjax.samplers import hmc
from ebjax.samplers.smc import geometric_path, normal_energy, smc_sample
from ebjax.types import bind
from launch.benchmarks.workload import Workload, import_peer

__all__ = ["COX_LOG_Z", "blackjax_log_z", "ebjax_log_z"]

# With a standard error of 0.004: the mean of ten runs of 32 temperatures from the nearest Gaussian,
# by `python -m launch.benchmark --suite=cox_reference`. That Gaussian's lower bound is 425.678.
COX_LOG_Z = 428.492


class _Problem(NamedTuple):
    base: Callable[[Any, jax.Array], jax.Array]
    base_params: Any
    target: Callable[[Any, jax.Array], jax.Array]
    draw: Callable[[jax.Array], jax.Array]
    log_z: float


def _problem(name: str) -> _Problem:
    if name == "conjugate":
        posterior = targets.conjugate_gaussian(10)
        assert posterior.prior.sample is not None
        assert posterior.log_z is not None
        return _Problem(
            posterior.prior.energy, (), posterior.energy, posterior.prior.sample, posterior.log_z
        )
    if name in ("cox", "cox_fitted"):
        is_fitted = name == "cox_fitted"
        posterior = targets.log_gaussian_cox(is_whitened=not is_fitted, is_fitted=is_fitted)
        start = posterior.prior
        assert start.sample is not None
        return _Problem(start.energy, (), posterior.energy, start.sample, COX_LOG_Z)
    laws: dict[str, tuple[Callable[[], Any], float]] = {
        "many_well": (targets.many_well, 1.0),
        "mixture": (targets.forty_gaussians, 40.0),
        "funnel": (targets.funnel, 5.0),
    }
    law, scale = laws[name]
    target = law()
    assert target.log_z is not None
    dim = target.event_shape[0]

    def draw(key: jax.Array) -> jax.Array:
        return scale * jax.random.normal(key, (dim,))

    return _Problem(normal_energy, (0.0, scale), target.energy, draw, target.log_z)


def _facts(estimates: list[float], log_z: float, more: Mapping[str, float]) -> dict[str, float]:
    """Mean absolute error and bias, and how far apart the estimates lie."""
    values = np.asarray(estimates)
    errors = values - log_z
    return {
        "error": float(np.abs(errors).mean()),
        "bias": float(errors.mean()),
        "seeds": float(len(values)),
        "log_z": float(values.mean()),
        "spread": float(values.std(ddof=1)) if len(values) > 1 else float("nan"),
        **more,
    }


def ebjax_log_z(
    *,
    target: str,
    num_particles: int,
    num_leapfrog: int = 10,
    jitter: float = 0.0,
    ladder: tuple[int, float] | None = None,
    num_devices: int = 1,
    first_seed: int = 0,
    **options: Any,
) -> Workload:
    """`ebjax.samplers.smc.smc_sample` with HMC.

    Args:
        target: a name above.
        num_particles: particles N.
        num_leapfrog: leapfrog steps L of the moves.
        jitter: of HMC's step size.
        ladder: `(T, p)` for the inverse temperatures (t/T)^p; adaptive by default.
        num_devices: local devices that the particles are spread over.
        first_seed: of the first `run()`; each takes the next.
        **options: of `smc_sample`.
    """
    problem = _problem(target)
    path = geometric_path(problem.base, problem.target)
    temperatures = None
    if ladder is not None:
        temperatures = (np.arange(1, ladder[0] + 1) / ladder[0]) ** ladder[1]
    estimates: list[float] = []
    draw_all = jax.jit(lambda key: jax.vmap(problem.draw)(jax.random.split(key, num_particles)))
    move = bind(hmc, num_steps=num_leapfrog, jitter=jitter)

    def estimate(seed: int) -> Any:
        start_key, key = jax.random.split(jax.random.key(seed))
        return jax.block_until_ready(
            smc_sample(
                key,
                move,
                path,
                (problem.base_params, ()),
                draw_all(start_key),
                inverse_temperatures=temperatures,
                num_devices=num_devices,
                **options,
            )
        )

    started = time.perf_counter()
    estimate(1_000_000)
    warm_up_seconds = time.perf_counter() - started

    def run() -> Mapping[str, float]:
        result = estimate(first_seed + len(estimates))
        estimates.append(float(result.log_z))
        more = {
            "standard_error": float(result.log_z_standard_error),
            "temperatures": float(np.mean(result.num_temperatures)),
            "evaluations": float(result.num_evaluations),
        }
        return _facts(estimates, problem.log_z, more)

    return Workload(f"ebjax SMC, {target}", run, warm_up_seconds, f"HMC({num_leapfrog}) moves")


def blackjax_log_z(
    *,
    target: str,
    num_particles: int,
    step_size: float,
    num_mcmc_steps: int,
    num_leapfrog: int = 10,
    target_ess: float | None = None,
    ladder: tuple[int, float] | None = None,
) -> Workload:
    """The same with blackjax's tempered SMC, adaptive or on a ladder, systematic resampling.

    Raises:
        PeerMissing: if blackjax cannot be imported.
    """
    blackjax = import_peer("blackjax", peer="blackjax")
    smc = import_peer("blackjax.smc", peer="blackjax")
    resampling = import_peer("blackjax.smc.resampling", peer="blackjax")
    problem = _problem(target)

    def log_prior(x: jax.Array) -> jax.Array:
        return -problem.base(problem.base_params, x)

    def log_likelihood(x: jax.Array) -> jax.Array:
        return -problem.target((), x) - log_prior(x)

    dim = problem.draw(jax.random.key(0)).shape[0]
    kernel = blackjax.hmc.build_kernel()

    def move(key: jax.Array, state: Any, log_density: Any, **parameters: Any) -> Any:
        return kernel(key, state, log_density, num_integration_steps=num_leapfrog, **parameters)

    common = (log_prior, log_likelihood, move, blackjax.hmc.init)
    parameters = smc.extend_params(
        {"step_size": jnp.float32(step_size), "inverse_mass_matrix": jnp.ones(dim)}
    )
    if ladder is None:
        algorithm = blackjax.adaptive_tempered_smc(
            *common, parameters, resampling.systematic, target_ess, num_mcmc_steps=num_mcmc_steps
        )
    else:
        algorithm = blackjax.tempered_smc(
            *common, parameters, resampling.systematic, num_mcmc_steps=num_mcmc_steps
        )
        betas = jnp.asarray((np.arange(1, ladder[0] + 1) / ladder[0]) ** ladder[1])

    @jax.jit
    def estimate(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        start_key, key = jax.random.split(key)
        particles = jax.vmap(problem.draw)(jax.random.split(start_key, num_particles))
        state = algorithm.init(particles)

        def body(loop: Any) -> Any:
            state, log_z, count = loop
            more = () if ladder is None else (betas[count],)
            state, info = algorithm.step(jax.random.fold_in(key, count), state, *more)
            return state, log_z + info.log_likelihood_increment, count + 1

        def goes_on(loop: Any) -> jax.Array:
            return loop[0].tempering_param < 1.0 if ladder is None else loop[2] < ladder[0]

        _, log_z, count = jax.lax.while_loop(
            goes_on, body, (state, jnp.zeros(()), jnp.zeros((), jnp.int32))
        )
        return log_z, count

    started = time.perf_counter()
    jax.block_until_ready(estimate(jax.random.key(10_000)))
    warm_up_seconds = time.perf_counter() - started
    estimates: list[float] = []

    def run() -> Mapping[str, float]:
        log_z, count = jax.block_until_ready(estimate(jax.random.key(len(estimates))))
        estimates.append(float(log_z))
        return _facts(estimates, problem.log_z, {"temperatures": float(count)})

    return Workload(f"blackjax SMC, {target}", run, warm_up_seconds, f"HMC({num_leapfrog}) moves")
