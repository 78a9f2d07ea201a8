"""Workloads of this package, through the code that its users run."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ebjax.energies import mlp_energy, targets
from ebjax.objectives import persistent_contrastive_divergence
from ebjax.parallel import AXIS_NAME, data_parallel
from ebjax.samplers import langevin, sample
from ebjax.training import by_group, initial_state, make_update, make_update_many
from ebjax.types import Objective, Params, Source
from gflownet.environments.hypergrid import HypergridState, hypergrid
from gflownet.objectives import trajectory_balance
from gflownet.policies import mlp_policy
from gflownet.types import Environment, Policy
from launch.benchmarks.grid_law import grid_positions, time_to_law_workload
from launch.benchmarks.workload import Workload

__all__ = [
    "FlowParts",
    "dispatch",
    "flow_hypergrid",
    "flow_workload",
    "hypergrid_flow",
    "pcd",
    "sampler",
    "time_to_law",
    "training_workload",
]

_NO_DATA = Source((), lambda arrays, key, position: position)


def sampler(
    *,
    means: Any,
    standard_deviation: float,
    num_chains: int,
    num_steps: int,
    step_size: float,
    seed: int,
    num_devices: int = 1,
) -> Workload:
    """Langevin chains by `ebjax.samplers.sample` on a Gaussian mixture, final positions only.

    Args:
        means: centres of the equally weighted modes, [M, d].
        standard_deviation: that of every mode.
        num_chains: chains C, started uniformly on the box that holds the means.
        num_steps: steps of one `run()`.
        step_size: of the kernel.
        seed: of the start and the noise.
        num_devices: local devices that the chains are spread over.
    """
    kernel = langevin(step_size=step_size)
    centres = np.asarray(means, np.float32)
    energy_fn = targets.gaussian_mixture(centres, standard_deviation).energy
    low, high = centres.min(axis=0), centres.max(axis=0)
    start_key, key = jax.random.split(jax.random.key(seed))
    shape = (num_chains, centres.shape[1])
    position = low + (high - low) * jax.random.uniform(start_key, shape)
    count = 0

    def run() -> Mapping[str, float]:
        nonlocal position, count
        draws = sample(
            jax.random.fold_in(key, count),
            kernel,
            energy_fn,
            (),
            position,
            num_samples=1,
            thinning=num_steps,
            num_devices=num_devices,
        )
        position, count = jax.block_until_ready(draws.positions[0]), count + 1
        return {"mean_energy": float(draws.info.energy.mean())}

    return Workload(
        name=f"ebjax langevin, {num_chains} chains, {num_devices} devices",
        run=run,
        warm_up_seconds=_compile_seconds(run),
        note="the runner with its default diagnostics",
    )


class TrainingProgram:
    """The training loop's own compiled program, with the state that it advances."""

    def __init__(
        self,
        init: Callable[[jax.Array], Any],
        objective: Objective,
        optimizer: optax.GradientTransformation,
        source: Source,
        *,
        batch_size: int,
        seed: int,
        backend: str = "pmap",
        num_devices: int = 1,
    ) -> None:
        """Makes the first state; the program is compiled when it is first advanced."""
        state = jax.jit(
            lambda key: initial_state(key, init, objective, optimizer, source, batch_size)
        )(jax.random.key(seed))
        update = make_update(
            objective, optimizer, source, batch_size=batch_size, axis_name=AXIS_NAME
        )
        self._program = data_parallel(
            make_update_many(update), devices=jax.devices()[:num_devices], backend=backend
        )
        self._replicated, self._split = self._program.place(state._replace(carry=()), state.carry)
        self._arrays = self._program.place_constant(source.arrays)

    def advance(self, num_updates: int) -> Mapping[str, float]:
        """Updates in one dispatch; the metrics of the last one."""
        count = self._program.place_constant(jnp.asarray(num_updates, jnp.int32))
        self._replicated, self._split, metrics = self._program.step(
            self._replicated, self._split, (self._arrays, count)
        )
        return {key: float(value) for key, value in jax.device_get(metrics).items()}

    @property
    def params(self) -> Params:
        """The parameters, on the host."""
        return self._program.collect(self._replicated, self._split)[0].params


def training_workload(
    name: str,
    init: Callable[[jax.Array], Any],
    objective: Objective,
    optimizer: optax.GradientTransformation,
    source: Source,
    *,
    batch_size: int,
    num_updates: int,
    steps_per_call: int,
    seed: int,
    backend: str = "pmap",
    num_devices: int = 1,
    note: str = "",
) -> Workload:
    """`num_updates` of the training loop's program in one `run()`."""
    program = TrainingProgram(
        init,
        objective,
        optimizer,
        source,
        batch_size=batch_size,
        seed=seed,
        backend=backend,
        num_devices=num_devices,
    )

    def run(updates: int = num_updates) -> Mapping[str, float]:
        for first in range(0, updates, steps_per_call):
            metrics = program.advance(min(steps_per_call, updates - first))
        return metrics

    return Workload(name, run, _compile_seconds(lambda: run(1)), note)


def _compile_seconds(run: Callable[[], Any]) -> float:
    """What the first run takes more than the second."""
    times = []
    for _ in range(2):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return times[0] - times[1]


def flow_hypergrid(
    *,
    dim: int,
    side: int,
    num_trajectories: int,
    num_updates: int,
    seed: int,
    num_devices: int = 1,
    **options: Any,
) -> Workload:
    """Trajectory balance on the hypergrid, learned P_B on the shared trunk.

    Args:
        dim: number D of grid dimensions.
        side: number of values that each coordinate takes.
        num_trajectories: trajectories B of one update.
        num_updates: updates of one `run()`, in one dispatch.
        seed: seed of the network and of all sampling.
        num_devices: devices that the trajectories are split over.
        **options: of `hypergrid_flow`.
    """
    parts = hypergrid_flow(dim=dim, side=side, **options)
    return flow_workload(
        f"gflownet hypergrid {dim}-D side {side}",
        parts.init,
        parts.objective,
        parts.optimizer,
        num_trajectories=num_trajectories,
        num_updates=num_updates,
        seed=seed,
        num_devices=num_devices,
    )


class FlowParts(NamedTuple):
    """What trains a flow."""

    environment: Environment
    policy: Policy
    init: Callable[[jax.Array], Any]
    objective: Objective
    optimizer: optax.GradientTransformation


def hypergrid_flow(
    *,
    dim: int,
    side: int,
    hidden: tuple[int, ...] = (256, 256),
    stop_bias: float = 0.0,
    learning_rate: float = 1e-3,
    log_z_learning_rate: float = 0.1,
    epsilon: float = 0.1,
    frozen: bool = False,
    chunk_size: int = 144,
) -> FlowParts:
    """Trajectory balance on the hypergrid, learned P_B on the shared trunk.

    Args:
        dim: number D of grid dimensions.
        side: number of values that each coordinate takes.
        hidden: widths of the hidden layers.
        stop_bias: added to the initial bias of the stop logit.
        learning_rate: Adam's rate for the network.
        log_z_learning_rate: Adam's rate for log Z.
        epsilon: exploration at the first update, annealed linearly to 0 over 30,000.
        frozen: rates of zero (schedules, so that no work can be left out).
        chunk_size: states evaluated at a time in the gradient pass; 144 hold an average batch of
            the short trajectories.
    """
    environment = hypergrid(dim=dim, side=side)
    policy = mlp_policy(environment.num_actions, hidden)
    objective = trajectory_balance(
        environment,
        policy,
        epsilon=optax.linear_schedule(epsilon, 0.0, 30_000),
        chunk_size=chunk_size,
    )

    def init(key: jax.Array) -> Any:
        params = policy.init(key, environment.observe(environment.initial(key)))
        last = params[f"Dense_{len(hidden)}"]
        last = {**last, "bias": last["bias"].at[environment.stop_action].add(stop_bias)}
        return {"policy": {**params, f"Dense_{len(hidden)}": last}, "log_z": jnp.zeros(())}

    def rate(value: float) -> optax.Schedule:
        # A schedule is computed at run time, so that a rate of zero saves no work.
        return lambda count: jnp.where(count >= 0, 0.0 if frozen else value, 1.0)

    optimizer = by_group(
        {
            "policy": optax.adam(rate(learning_rate)),
            "log_z": optax.adam(rate(log_z_learning_rate)),
        }
    )
    return FlowParts(environment, policy, init, objective, optimizer)


def time_to_law(
    *,
    dim: int,
    side: int,
    num_trajectories: int,
    seed: int,
    total_variation: float,
    updates_per_look: int,
) -> Workload:
    """From nothing to a total variation: each `run()` builds, compiles and trains a new flow.

    Args:
        total_variation: to the exact law, where a run ends.
        updates_per_look: updates between two looks at the law.
        (the others): as in `flow_hypergrid`; a run adds one to the seed.
    """

    def start(seed: int):
        parts = hypergrid_flow(dim=dim, side=side)
        program = TrainingProgram(
            parts.init,
            parts.objective,
            parts.optimizer,
            _NO_DATA,
            batch_size=num_trajectories,
            seed=seed,
        )
        positions = grid_positions(dim, side)
        states = HypergridState(jnp.asarray(positions), jnp.zeros(len(positions), bool))

        def logits(params: Params, state: HypergridState) -> jax.Array:
            env = parts.environment
            masks = env.forward_mask(state), env.backward_mask(state)
            forward = parts.policy.apply(params, env.observe(state), *masks).forward
            return jax.vmap(forward.log_prob)(jnp.arange(env.num_actions))

        logits_fn = jax.jit(jax.vmap(logits, (None, 0)))
        return program.advance, lambda: logits_fn(program.params["policy"], states)

    return time_to_law_workload(
        f"gflownet hypergrid {dim}-D side {side}",
        start,
        dim=dim,
        side=side,
        seed=seed,
        total_variation=total_variation,
        updates_per_look=updates_per_look,
    )


def flow_workload(
    name: str,
    init: Callable[[jax.Array], Any],
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    num_trajectories: int,
    num_updates: int,
    seed: int,
    num_devices: int,
) -> Workload:
    """A flow in the training loop's own program, all updates of a `run()` in one dispatch."""
    workload = training_workload(
        name,
        init,
        objective,
        optimizer,
        _NO_DATA,
        batch_size=num_trajectories,
        num_updates=num_updates,
        steps_per_call=num_updates,
        seed=seed,
        num_devices=num_devices,
        note="the training loop's program: rollout, loss, Adam, weight average",
    )

    def run() -> Mapping[str, float]:
        metrics = workload.run()
        return {
            "loss": metrics["loss"],
            "mean_length": metrics["trajectory_length"],
            "log_z": metrics["log_z"],
        }

    return workload._replace(run=run)


def pcd(
    *,
    step_size: float,
    noise_scale: float,
    num_updates: int,
    seed: int,
    hidden: tuple[int, ...] = (128, 128),
    batch_size: int = 256,
    langevin_steps: int = 60,
    buffer_size: int = 10_000,
    rebirth: float = 0.05,
    learning_rate: float = 1e-3,
    num_devices: int = 1,
) -> Workload:
    """Persistent contrastive divergence on eight Gaussians.

    Args:
        step_size: Langevin step size.
        noise_scale: factor of the noise sqrt(2 step_size) of a Langevin step.
        num_updates: updates of one `run()`.
        seed: seed of the network, the data and the chains.
        hidden: widths of the hidden layers.
        batch_size: data points, and negative chains, of one update.
        langevin_steps: steps of one update.
        buffer_size: persistent chains, rounded up to a multiple of the batch.
        rebirth: fraction of the chains that are born anew.
        learning_rate: Adam's rate.
        num_devices: devices that the batch is split over.
    """
    energy = mlp_energy(hidden)
    target = targets.eight_gaussians()
    modes = np.asarray(target.modes, np.float32)
    kernel = langevin(step_size=step_size, noise_scale=noise_scale * float(np.sqrt(2 * step_size)))
    objective = persistent_contrastive_divergence(
        energy.apply,
        kernel,
        lambda key: jax.random.normal(key, (2,)),
        num_steps=langevin_steps,
        chains_per_example=-(-buffer_size // batch_size),
        rebirth_probability=rebirth,
        energy_regularizer=0.01,
    )

    def example(arrays: jax.Array, key: jax.Array, position: jax.Array) -> jax.Array:
        mode_key, noise_key = jax.random.split(jax.random.fold_in(key, position))
        mode = arrays[jax.random.randint(mode_key, (), 0, len(modes))]
        return mode + 0.2 * jax.random.normal(noise_key, (2,))

    workload = training_workload(
        "ebjax persistent contrastive divergence",
        lambda key: energy.init(key, jnp.zeros(2)),
        objective,
        optax.adam(learning_rate),
        Source(modes, example),
        batch_size=batch_size,
        num_updates=num_updates,
        steps_per_call=num_updates,
        seed=seed,
        num_devices=num_devices,
        note="the training loop's program: chains, loss, Adam, weight average, metrics",
    )

    def run() -> Mapping[str, float]:
        metrics = workload.run()
        return {"loss": metrics["loss"], "chain_age": metrics["chain_age"]}

    return workload._replace(run=run)


def dispatch(
    *, num_updates: int, steps_per_call: int, backend: str, num_devices: int, seed: int = 0
) -> Workload:
    """Updates of one parameter: what the loop itself costs."""

    def loss(params: jax.Array, carry: jax.Array, keys: jax.Array, batch: jax.Array):
        del keys
        return jnp.mean(jnp.square(params - batch)), (carry, {})

    return training_workload(
        f"{backend}, {num_devices} devices, {steps_per_call} steps per call",
        lambda key: jax.random.normal(key),
        Objective(lambda key, params, batch: jnp.zeros(len(batch)), loss),
        optax.sgd(0.1),
        Source((), lambda arrays, key, position: position.astype(jnp.float32)),
        batch_size=8,
        num_updates=num_updates,
        steps_per_call=steps_per_call,
        seed=seed,
        backend=backend,
        num_devices=num_devices,
        note="one parameter, batch of 8",
    )
