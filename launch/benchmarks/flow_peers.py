"""Peers that train GFlowNets: gfnx and torchgfn, by trajectory balance on the hypergrid.

Each is driven through its public interface in the fastest form that we could find:

- gfnx: rollout, loss and update inside one jitted `fori_loop`; no metric, callback or stored logit;
- torchgfn: sampling without a graph, one vectorised loss pass, fused Adam.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from launch.benchmarks.grid_law import grid_positions, time_to_law_workload
from launch.benchmarks.workload import Workload, compile_ahead, import_peer

REWARD_BASE, REWARD_RING, REWARD_PEAK = 1e-3, 0.5, 2.0
EPSILON_ANNEALING_UPDATES = 30_000


class _FlowState(NamedTuple):
    """Training state of gfnx: params {"network", "log_z"}, Adam state, number of updates done."""

    params: dict[str, Any]
    optimizer_state: optax.OptState
    num_updates: jax.Array  # []


def gfnx_hypergrid(
    *,
    dim: int,
    side: int,
    num_trajectories: int,
    num_updates: int,
    seed: int,
    hidden: Sequence[int] = (256, 256),
    stop_bias: float = 0.0,
    learning_rate: float = 1e-3,
    log_z_learning_rate: float = 0.1,
    epsilon: float = 0.1,
    frozen: bool = False,
) -> Workload:
    """Trajectory balance on the hypergrid with gfnx's environment and `forward_rollout`.

    The network is one equinox MLP with a forward head and a backward head on its last layer, as in
    gfnx's own baseline. With probability `epsilon` (annealed linearly to 0 over 30,000 updates) a
    step is drawn uniformly among the valid actions; the loss is under the plain policy.

    Args:
        dim: number D of grid dimensions.
        side: number of values that each coordinate takes.
        num_trajectories: trajectories B of one update.
        num_updates: updates of one `run()`.
        seed: seed of the network and of all sampling.
        hidden: widths of the hidden layers; all equal.
        stop_bias: added to the stop logit, through the initial bias of the last layer; -2.4 makes
            the first trajectories of the 4-D, side-20 grid about 24 long.
        learning_rate: Adam's rate for the network.
        log_z_learning_rate: Adam's rate for log Z.
        epsilon: exploration probability at the first update.
        frozen: compute every update but multiply it by zero, so that lengths do not drift.

    Returns:
        A workload that reports `loss`, `mean_length` (both over the run) and `log_z`.

    Raises:
        PeerMissing: if gfnx or equinox cannot be imported.
        ValueError: if the widths in `hidden` differ.
    """
    return gfnx_workload(
        f"gfnx hypergrid {dim}-D side {side}",
        _gfnx_grid(dim, side, seed, hidden, stop_bias),
        num_trajectories=num_trajectories,
        num_updates=num_updates,
        learning_rate=learning_rate,
        log_z_learning_rate=log_z_learning_rate,
        epsilon=epsilon,
        frozen=frozen,
        note="rollout, loss and update in one fori_loop; always scans dim * side + 1 steps",
    )


def gfnx_time_to_law(
    *,
    dim: int,
    side: int,
    num_trajectories: int,
    seed: int,
    total_variation: float,
    updates_per_look: int,
) -> Workload:
    """From nothing to a total variation, as `launch.benchmarks.own.time_to_law`, with gfnx.

    Args:
        total_variation: to the exact law, where a run ends.
        updates_per_look: updates between two looks at the law.
        (the others): as in `gfnx_hypergrid`; a run adds one to the seed.

    Raises:
        PeerMissing: if gfnx or equinox cannot be imported.
    """

    def start(seed: int) -> tuple[Callable[[int], Any], Callable[[], Any]]:
        task = _gfnx_grid(dim, side, seed, (256, 256), 0.0)
        program = _GfnxProgram(
            task, num_trajectories=num_trajectories, num_updates=updates_per_look
        )
        observations = np.eye(side, dtype=np.float32)[grid_positions(dim, side)]
        logits_fn = jax.jit(jax.vmap(lambda params, seen: task.heads(params, seen)[0], (None, 0)))
        return (
            lambda _: program.advance(),
            lambda: logits_fn(program.state.params["network"], observations),
        )

    import_peer("gfnx", peer="gfnx")
    return time_to_law_workload(
        f"gfnx hypergrid {dim}-D side {side}",
        start,
        dim=dim,
        side=side,
        seed=seed,
        total_variation=total_variation,
        updates_per_look=updates_per_look,
    )


class GfnxTask(NamedTuple):
    """An environment of gfnx with a policy.

    Attributes:
        environment: gfnx's.
        environment_params: of it.
        key: of all sampling.
        network_params: parameters of the policy.
        heads: `(params, observation) -> (forward logits, backward logits)` of one state.
    """

    environment: Any
    environment_params: Any
    key: jax.Array
    network_params: Any
    heads: Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]]


def _gfnx_grid(dim: int, side: int, seed: int, hidden: Sequence[int], stop_bias: float) -> GfnxTask:
    gfnx = import_peer("gfnx", peer="gfnx")
    equinox = import_peer("equinox", peer="gfnx")
    width = _single_width(hidden)
    reward = gfnx.GeneralHypergridRewardModule(R0=REWARD_BASE, R1=REWARD_RING, R2=REWARD_PEAK)
    environment = gfnx.HypergridEnvironment(reward, dim=dim, side=side)
    key_environment, key_network, key_run = jax.random.split(jax.random.key(seed), 3)
    environment_params = environment.init(key_environment)
    network = equinox.nn.MLP(dim * side, 2 * dim + 1, width, len(hidden), key=key_network)
    last_bias = network.layers[-1].bias.at[dim].add(stop_bias)
    network = equinox.tree_at(lambda mlp: mlp.layers[-1].bias, network, last_bias)
    network_params, network_static = equinox.partition(network, equinox.is_array)

    def heads(params: Any, observation: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = equinox.combine(params, network_static)(observation.reshape(-1))
        return logits[: dim + 1], logits[dim + 1 :]

    return GfnxTask(environment, environment_params, key_run, network_params, heads)


def gfnx_workload(name: str, task: GfnxTask, *, note: str, **options: Any) -> Workload:
    """Trajectory balance with gfnx's `forward_rollout` on any of its environments.

    Args:
        name: of the workload.
        task: what is learned.
        note: of the workload.
        **options: of `_GfnxProgram`.
    """
    program = _GfnxProgram(task, **options)
    return Workload(
        name=name, run=program.advance, warm_up_seconds=program.warm_up_seconds, note=note
    )


class _GfnxProgram:
    """`num_updates` of trajectory balance in one call; arguments as in `gfnx_hypergrid`."""

    def __init__(
        self,
        task: GfnxTask,
        *,
        num_trajectories: int,
        num_updates: int,
        learning_rate: float = 1e-3,
        log_z_learning_rate: float = 0.1,
        epsilon: float = 0.1,
        frozen: bool = False,
    ) -> None:
        environment, environment_params, self._key, network_params, heads = task
        gfnx = import_peer("gfnx", peer="gfnx")

        def log_prob(logits: jax.Array, invalid: jax.Array, action: jax.Array) -> jax.Array:
            """Log-probability of `action` among the actions that are not `invalid`."""
            log_probs = jax.nn.log_softmax(gfnx.utils.mask_logits(logits, invalid))
            return jnp.take_along_axis(log_probs, action[..., None], axis=-1)[..., 0]

        over_batch = jax.vmap(heads, (None, 0))
        over_time = functools.partial(jax.vmap, in_axes=1, out_axes=1)  # gfnx itself batches over B

        def loss_fn(params: dict[str, Any], rollout: Any) -> jax.Array:
            """Trajectory balance on rollouts whose arrays are [B, T, ...]."""
            forward_logits, backward_logits = jax.vmap(over_batch, (None, 0))(
                params["network"], rollout.obs
            )
            before, after = (
                jax.tree.map(lambda leaf, part=part: leaf[:, part], rollout.state)
                for part in (slice(None, -1), slice(1, None))
            )
            action = rollout.action[:, :-1]
            forward_invalid = over_time(
                lambda state: environment.get_invalid_mask(state, environment_params)
            )(before)
            backward_invalid = over_time(
                lambda state: environment.get_invalid_backward_mask(state, environment_params)
            )(after)
            backward_action = over_time(
                lambda state, forward_action, next_state: environment.get_backward_action(
                    state, forward_action, next_state, environment_params
                )
            )(before, action, after)
            log_ratio = (
                log_prob(forward_logits[:, :-1], forward_invalid, action)
                - log_prob(backward_logits[:, 1:], backward_invalid, backward_action)
                - rollout.log_gfn_reward[:, :-1]
            )
            log_ratio = jnp.where(rollout.pad[:, :-1], 0.0, log_ratio)
            return jnp.mean(jnp.square(params["log_z"] + log_ratio.sum(axis=1)))

        optimizer = optax.scale_by_adam()

        def update(
            state: _FlowState, key: jax.Array, rates: dict[str, jax.Array]
        ) -> tuple[_FlowState, jax.Array]:
            """One rollout and one Adam step; facts are [loss, mean length]."""
            remaining = 1.0 - state.num_updates / EPSILON_ANNEALING_UPDATES
            exploration = epsilon * jnp.maximum(remaining, 0.0)

            def policy(
                key: jax.Array, observation: jax.Array, params: Any
            ) -> tuple[jax.Array, dict]:
                logits, _ = over_batch(params, observation)
                explore = jax.random.bernoulli(key, exploration, (num_trajectories, 1))
                return jnp.where(explore, 0.0, logits), {}

            rollout, info = gfnx.utils.forward_rollout(
                key,
                num_trajectories,
                policy,
                state.params["network"],
                environment,
                environment_params,
            )
            loss, gradient = jax.value_and_grad(loss_fn)(state.params, rollout)
            direction, optimizer_state = optimizer.update(gradient, state.optimizer_state)
            params = {
                name: jax.tree.map(
                    lambda value, step, rate=rates[name]: value - rate * step,
                    value,
                    direction[name],
                )
                for name, value in state.params.items()
            }
            facts = jnp.stack([loss, jnp.mean(info["trajectory_length"].astype(jnp.float32))])
            return _FlowState(params, optimizer_state, state.num_updates + 1), facts

        def updates(
            state: _FlowState, key: jax.Array, rates: dict[str, jax.Array]
        ) -> tuple[_FlowState, jax.Array]:
            """`num_updates` updates; the facts are summed over them."""

            def body(_: jax.Array, carry: tuple[_FlowState, jax.Array]) -> Any:
                state, total = carry
                state, facts = update(state, jax.random.fold_in(key, state.num_updates), rates)
                return state, total + facts

            return jax.lax.fori_loop(0, num_updates, body, (state, jnp.zeros(2)))

        # The rates are arguments of the compiled program: a zero cannot be folded into less work.
        self._rates = {
            "network": jnp.float32(0.0 if frozen else learning_rate),
            "log_z": jnp.float32(0.0 if frozen else log_z_learning_rate),
        }
        params = {"network": network_params, "log_z": jnp.float32(0.0)}
        self.state = _FlowState(params, optimizer.init(params), jnp.int32(0))
        self._num_updates = num_updates
        self._updates, self.warm_up_seconds = compile_ahead(
            updates, self.state, self._key, self._rates
        )

    def advance(self) -> Mapping[str, float]:
        """Does the updates; facts are means over them."""
        self.state, total = jax.block_until_ready(self._updates(self.state, self._key, self._rates))
        loss, mean_length = np.asarray(total) / self._num_updates
        log_z = float(self.state.params["log_z"])
        return {"loss": float(loss), "mean_length": float(mean_length), "log_z": log_z}


def torchgfn_hypergrid(
    *,
    dim: int,
    side: int,
    num_trajectories: int,
    num_updates: int,
    seed: int,
    hidden: Sequence[int] = (256, 256),
    stop_bias: float = 0.0,
    learning_rate: float = 1e-3,
    log_z_learning_rate: float = 0.1,
    epsilon: float = 0.1,
    frozen: bool = False,
    num_threads: int = 2,
) -> Workload:
    """Trajectory balance on the hypergrid with torchgfn's `HyperGrid` and `TBGFlowNet`.

    Network, reward, optimizer and exploration are those of `gfnx_hypergrid`: two heads on one
    shared trunk. Sampling builds no graph, and log-probabilities are computed again for the loss,
    because the sampling policy is not the policy that is scored.

    Args:
        num_threads: torch's intra-operation threads; set again at every `run()`.
        (the others): as in `gfnx_hypergrid`.

    Returns:
        A workload that reports `loss`, `mean_length` (both over the run) and `log_z`.

    Raises:
        PeerMissing: if torchgfn or torch cannot be imported.
        ValueError: if the widths in `hidden` differ.
    """
    torch = import_peer("torch", peer="torchgfn")
    gym = import_peer("gfn.gym", peer="torchgfn")
    gflownet = import_peer("gfn.gflownet", peer="torchgfn")
    losses = import_peer("gfn.gflownet.losses", peer="torchgfn")
    estimators = import_peer("gfn.estimators", peer="torchgfn")
    modules = import_peer("gfn.utils.modules", peer="torchgfn")
    preprocessors = import_peer("gfn.preprocessors", peer="torchgfn")
    samplers = import_peer("gfn.samplers", peer="torchgfn")
    width = _single_width(hidden)
    started = time.perf_counter()
    torch.manual_seed(seed)
    reward = {"R0": REWARD_BASE, "R1": REWARD_RING, "R2": REWARD_PEAK}
    environment = gym.HyperGrid(
        ndim=dim, height=side, reward_fn_kwargs=reward, validate_modes=False
    )
    preprocessor = preprocessors.KHotPreprocessor(height=side, ndim=dim)
    forward = modules.MLP(dim * side, dim + 1, width, len(hidden))
    backward = modules.MLP(dim * side, dim, width, len(hidden), trunk=forward.trunk)
    with torch.no_grad():
        forward.last_layer.bias[dim] += stop_bias
    log_pf, log_pb = (
        estimators.DiscretePolicyEstimator(
            head, environment.n_actions, preprocessor=preprocessor, is_backward=head is backward
        )
        for head in (forward, backward)
    )
    flow = gflownet.TBGFlowNet(pf=log_pf, pb=log_pb, init_logZ=0.0, loss_fn=losses.SquaredLoss())
    sampler = samplers.Sampler(estimator=log_pf)
    optimizer = torch.optim.Adam(
        [
            {"params": flow.pf_pb_parameters(), "lr": 0.0 if frozen else learning_rate},
            {"params": flow.logz_parameters(), "lr": 0.0 if frozen else log_z_learning_rate},
        ],
        fused=True,
    )
    num_updates_done = 0

    def run() -> Mapping[str, float]:
        nonlocal num_updates_done
        torch.set_num_threads(num_threads)
        total_loss, total_length = 0.0, 0
        for _ in range(num_updates):
            remaining = max(0.0, 1.0 - num_updates_done / EPSILON_ANNEALING_UPDATES)
            with torch.no_grad():
                trajectories = sampler.sample_trajectories(
                    environment, n=num_trajectories, epsilon=epsilon * remaining
                )
            optimizer.zero_grad()
            loss = flow.loss(environment, trajectories, recalculate_all_logprobs=True)
            loss.backward()
            optimizer.step()
            total_loss += loss.item()
            total_length += trajectories.terminating_idx.sum().item()
            num_updates_done += 1
        return {
            "loss": total_loss / num_updates,
            "mean_length": total_length / (num_updates * num_trajectories),
            "log_z": flow.logZ.item(),
        }

    return Workload(
        name=f"torchgfn hypergrid {dim}-D side {side}",
        run=run,
        warm_up_seconds=time.perf_counter() - started,
        note=f"CPU, {num_threads} threads; sampling ends with the longest trajectory",
    )


def _single_width(hidden: Sequence[int]) -> int:
    """The common width of the hidden layers; both GFlowNet peers' MLPs take one width only."""
    if len(set(hidden)) != 1:
        raise ValueError(f"The hidden layers must have one common width, but hidden is {hidden}.")
    return hidden[0]
