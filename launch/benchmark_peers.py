"""The peer side of the benchmark: the same work, done by other libraries and by minimal scripts.

Every function here builds one `Workload`. Its `run()` does a fixed number of updates (or sampler
steps), waits for the device, and returns what it measured; its state goes on from one `run()` to
the next, so that training continues. Compilation happens when the workload is built and is
reported apart. Throw the first `run()` away: it also pays for allocation and thread start-up.

Each peer is imported inside the function that needs it, and `PeerMissing` says how to install it.
Peers are driven through their public interfaces, in the fastest form that we could find:

- gfnx: rollout, loss and update inside one jitted `fori_loop`; no metric, callback or stored logit;
- torchgfn: sampling without a graph, one vectorised loss pass, fused Adam;
- torchebm, blackjax: as their documentation shows, keeping the final state only;
- minimal scripts: what a competent JAX user writes for this one job and no other.

Torch workloads run on the CPU; JAX workloads run on JAX's default device.

Conventions. p(x) is proportional to exp(-E(x)); trajectory balance is the mean over trajectories of
    (log_z + sum log_pf - sum log_pb - log R(x))^2;
a trajectory's length counts its transitions, the stop included; one Langevin step is
    x <- x - step_size * grad E(x) + noise_scale * sqrt(2 * step_size) * standard normal.
Shapes: B batch or trajectories, C chains, D grid dimensions, M mixture modes, T time.
"""

import functools
import importlib
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

REWARD_BASE, REWARD_RING, REWARD_PEAK = 1e-3, 0.5, 2.0
EPSILON_ANNEALING_UPDATES = 30_000
ENERGY_REGULARIZATION = 0.01
NUM_GAUSSIANS, GAUSSIANS_RADIUS, GAUSSIANS_STANDARD_DEVIATION = 8, 2.0, 0.2

INSTALL = {
    "gfnx": "pip install equinox flashbax jax_tqdm jaxtyping networkx omegaconf hydra-core pillow "
    "&& pip install --no-deps gfnx",
    "torchgfn": "pip install torch tensordict torch_geometric einops dill "
    "linear-attention-transformer && pip install --no-deps torchgfn",
    "torchebm": "pip install torch torchebm",
    "blackjax": "pip install blackjax",
}


class PeerMissing(ImportError):  # noqa: N818 (the name says what happened)
    """A peer library (or one of its own dependencies) cannot be imported.

    Args:
        name: the peer, as `pip` knows it.
        how_to_install: a shell command that installs it.
    """

    def __init__(self, name: str, how_to_install: str) -> None:
        super().__init__(f"The peer {name} cannot be imported. To install: {how_to_install}")
        self.name = name
        self.how_to_install = how_to_install


class Workload(NamedTuple):
    """A fixed amount of work that can be timed again and again.

    Attributes:
        name: the library, and what it does.
        run: does the work, waits for the device, and returns measured facts; keeps its state.
        warm_up_seconds: seconds that tracing, compiling or filling a buffer took beforehand.
        note: what a reader of the timing has to know.
    """

    name: str
    run: Callable[[], Mapping[str, float]]
    warm_up_seconds: float
    note: str


class _FlowState(NamedTuple):
    """Training state of gfnx: params {"network", "log_z"}, Adam state, number of updates done."""

    params: dict[str, Any]
    optimizer_state: optax.OptState
    num_updates: jax.Array  # []


class _ContrastiveState(NamedTuple):
    """Training state of the minimal script: MLP, Adam state, buffer [N, 2], next key."""

    params: list[tuple[jax.Array, jax.Array]]
    optimizer_state: optax.OptState
    buffer: jax.Array  # [N, 2]
    key: jax.Array  # []


# --- GFlowNets: trajectory balance on the hypergrid ---------------------------------------------


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
    gfnx = _import_peer("gfnx", peer="gfnx")
    equinox = _import_peer("equinox", peer="gfnx")
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
        """Forward logits [..., D + 1] and backward logits [..., D] of observations [..., F]."""
        mlp = equinox.combine(params, network_static)
        logits = jax.vmap(mlp)(observation.reshape(-1, dim * side))
        logits = logits.reshape(*observation.shape[:-1], 2 * dim + 1)
        return logits[..., : dim + 1], logits[..., dim + 1 :]

    def log_prob(logits: jax.Array, invalid: jax.Array, action: jax.Array) -> jax.Array:
        """Log-probability of `action` among the actions that are not `invalid`."""
        log_probs = jax.nn.log_softmax(gfnx.utils.mask_logits(logits, invalid))
        return jnp.take_along_axis(log_probs, action[..., None], axis=-1)[..., 0]

    over_time = functools.partial(jax.vmap, in_axes=1, out_axes=1)  # gfnx itself batches over B

    def loss_fn(params: dict[str, Any], rollout: Any) -> jax.Array:
        """Trajectory balance on rollouts whose arrays are [B, T, ...]."""
        forward_logits, backward_logits = heads(params["network"], rollout.obs)
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

        def policy(key: jax.Array, observation: jax.Array, params: Any) -> tuple[jax.Array, dict]:
            logits, _ = heads(params, observation)
            explore = jax.random.bernoulli(key, exploration, (num_trajectories, 1))
            return jnp.where(explore, 0.0, logits), {}

        rollout, info = gfnx.utils.forward_rollout(
            key, num_trajectories, policy, state.params["network"], environment, environment_params
        )
        loss, gradient = jax.value_and_grad(loss_fn)(state.params, rollout)
        direction, optimizer_state = optimizer.update(gradient, state.optimizer_state)
        params = {
            name: jax.tree.map(
                lambda value, step, rate=rates[name]: value - rate * step, value, direction[name]
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
    rates = {
        "network": jnp.float32(0.0 if frozen else learning_rate),
        "log_z": jnp.float32(0.0 if frozen else log_z_learning_rate),
    }
    params = {"network": network_params, "log_z": jnp.float32(0.0)}
    state = _FlowState(params, optimizer.init(params), jnp.int32(0))
    compiled, warm_up_seconds = _compile(updates, state, key_run, rates)

    def run() -> Mapping[str, float]:
        nonlocal state
        state, total = jax.block_until_ready(compiled(state, key_run, rates))
        loss, mean_length = np.asarray(total) / num_updates
        log_z = float(state.params["log_z"])
        return {"loss": float(loss), "mean_length": float(mean_length), "log_z": log_z}

    return Workload(
        name=f"gfnx hypergrid {dim}-D side {side}",
        run=run,
        warm_up_seconds=warm_up_seconds,
        note="rollout, loss and update in one fori_loop; always scans dim * side + 1 steps",
    )


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
    torch = _import_peer("torch", peer="torchgfn")
    gym = _import_peer("gfn.gym", peer="torchgfn")
    gflownet = _import_peer("gfn.gflownet", peer="torchgfn")
    losses = _import_peer("gfn.gflownet.losses", peer="torchgfn")
    estimators = _import_peer("gfn.estimators", peer="torchgfn")
    modules = _import_peer("gfn.utils.modules", peer="torchgfn")
    preprocessors = _import_peer("gfn.preprocessors", peer="torchgfn")
    samplers = _import_peer("gfn.samplers", peer="torchgfn")
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


# --- Persistent contrastive divergence on eight Gaussians ---------------------------------------


def torchebm_pcd(
    *,
    step_size: float,
    noise_scale: float,
    num_updates: int,
    seed: int,
    hidden: Sequence[int] = (128, 128),
    batch_size: int = 256,
    langevin_steps: int = 60,
    buffer_size: int = 10_000,
    rebirth: float = 0.05,
    learning_rate: float = 1e-3,
    num_threads: int = 2,
) -> Workload:
    """Persistent contrastive divergence with torchebm's `ContrastiveDivergence`.

    The energy is an MLP 2-hidden-1 with SiLU, the data eight Gaussians on a circle of radius 2. The
    buffer starts as standard normal noise. torchebm's `new_sample_ratio` (our `rebirth`) adds noise
    of scale 0.01 to that fraction of the starting points instead of drawing them anew, and its
    buffer is a queue: the negatives overwrite the oldest rows, not the rows that they started from.

    Args:
        step_size: Langevin step size.
        noise_scale: factor of the noise sqrt(2 step_size) of a Langevin step; 1 is exact Langevin.
        num_updates: updates of one `run()`.
        seed: seed of the network, the data and the chains.
        hidden: widths of the hidden layers.
        batch_size: data points, and negative chains, of one update.
        langevin_steps: steps of one update.
        buffer_size: rows of the persistent buffer.
        rebirth: fraction of the chains that do not go on from the buffer.
        learning_rate: Adam's rate.
        num_threads: torch's intra-operation threads; set again at every `run()`.

    Returns:
        A workload that reports `loss` (over the run) and `negative_radius`, the mean distance from
        the origin of the last negatives (about 2 once trained).

    Raises:
        PeerMissing: if torchebm or torch cannot be imported.
    """
    torch = _import_peer("torch", peer="torchebm")
    losses = _import_peer("torchebm.losses", peer="torchebm")
    samplers = _import_peer("torchebm.samplers", peer="torchebm")
    started = time.perf_counter()
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    layers = []
    widths = (2, *hidden)
    for inputs, outputs in itertools.pairwise(widths):
        layers += [torch.nn.Linear(inputs, outputs), torch.nn.SiLU()]
    network = torch.nn.Sequential(*layers, torch.nn.Linear(widths[-1], 1))
    model = _torchebm_model(lambda position: network(position).squeeze(-1), network=network)
    objective = losses.ContrastiveDivergence(
        model=model,
        sampler=samplers.LangevinDynamics(model, step_size=step_size, noise_scale=noise_scale),
        k_steps=langevin_steps,
        persistent=True,
        buffer_size=buffer_size,
        init_steps=0,
        new_sample_ratio=rebirth,
        energy_reg_weight=ENERGY_REGULARIZATION,
    )
    objective.initialize_buffer((2,), init_noise_scale=1.0, generator=generator)
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate, fused=True)

    def run() -> Mapping[str, float]:
        torch.set_num_threads(num_threads)
        total = 0.0
        for _ in range(num_updates):
            mode = torch.randint(NUM_GAUSSIANS, (batch_size,), generator=generator)
            angle = mode * (2 * math.pi / NUM_GAUSSIANS)
            noise = torch.randn(batch_size, 2, generator=generator)
            centre = GAUSSIANS_RADIUS * torch.stack([angle.cos(), angle.sin()], dim=-1)
            data = centre + GAUSSIANS_STANDARD_DEVIATION * noise
            optimizer.zero_grad()
            loss, negatives = objective(data, generator=generator)
            loss.backward()
            optimizer.step()
            total += loss.item()
        radius = negatives.norm(dim=-1).mean().item()
        return {"loss": total / num_updates, "negative_radius": radius}

    return Workload(
        name="torchebm persistent contrastive divergence",
        run=run,
        warm_up_seconds=time.perf_counter() - started,
        note=f"CPU, {num_threads} threads; rebirth perturbs rows by 0.01, the buffer is a queue",
    )


def minimal_pcd(
    *,
    step_size: float,
    noise_scale: float,
    num_updates: int,
    seed: int,
    hidden: Sequence[int] = (128, 128),
    batch_size: int = 256,
    langevin_steps: int = 60,
    buffer_size: int = 10_000,
    rebirth: float = 0.05,
    learning_rate: float = 1e-3,
) -> Workload:
    """Persistent contrastive divergence as a minimal JAX script; arguments as in `torchebm_pcd`.

    One update: draw random rows of the buffer, replace a fraction `rebirth` by standard normal
    noise, run the Langevin chain in a `scan`, take one Adam step on
        mean E(data) - mean E(negatives) + 0.01 (mean E(data)^2 + mean E(negatives)^2),
    and write the negatives back to the rows that they came from. `num_updates` of them are scanned.

    Returns:
        A workload that reports `loss` (over the run) and `negative_radius`.
    """
    optimizer = optax.adam(learning_rate)
    noise_standard_deviation = noise_scale * math.sqrt(2 * step_size)

    def energy(params: list[tuple[jax.Array, jax.Array]], position: jax.Array) -> jax.Array:
        """Energies [B] of positions [B, 2]."""
        *hidden_layers, (last_weight, last_bias) = params
        for weight, bias in hidden_layers:
            position = jax.nn.silu(position @ weight + bias)
        return (position @ last_weight + last_bias)[:, 0]

    def draw_data(key: jax.Array) -> jax.Array:
        """A batch [B, 2] of the eight Gaussians."""
        key_mode, key_noise = jax.random.split(key)
        mode = jax.random.randint(key_mode, (batch_size,), 0, NUM_GAUSSIANS)
        angle = mode * (2 * math.pi / NUM_GAUSSIANS)
        centre = GAUSSIANS_RADIUS * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)
        noise = jax.random.normal(key_noise, (batch_size, 2))
        return centre + GAUSSIANS_STANDARD_DEVIATION * noise

    def langevin(params: Any, position: jax.Array, key: jax.Array) -> jax.Array:
        """The chain's final positions [B, 2]."""
        gradient_fn = jax.grad(lambda position: energy(params, position).sum())

        def step(position: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
            noise = jax.random.normal(key, position.shape)
            drift = step_size * gradient_fn(position)
            return position - drift + noise_standard_deviation * noise, None

        return jax.lax.scan(step, position, jax.random.split(key, langevin_steps))[0]

    def loss_fn(params: Any, data: jax.Array, negatives: jax.Array) -> jax.Array:
        """Contrastive divergence and the penalty on large energies."""
        data_energy, negative_energy = energy(params, data), energy(params, negatives)
        penalty = jnp.mean(data_energy**2) + jnp.mean(negative_energy**2)
        gap = jnp.mean(data_energy) - jnp.mean(negative_energy)
        return gap + ENERGY_REGULARIZATION * penalty

    def update(state: _ContrastiveState, _: None) -> tuple[_ContrastiveState, jax.Array]:
        """One update; facts are [loss, mean radius of the negatives]."""
        key, key_data, key_rows, key_mask, key_born, key_chain = jax.random.split(state.key, 6)
        rows = jax.random.randint(key_rows, (batch_size,), 0, buffer_size)
        is_reborn = jax.random.bernoulli(key_mask, rebirth, (batch_size, 1))
        newborn = jax.random.normal(key_born, (batch_size, 2))
        start = jnp.where(is_reborn, newborn, state.buffer[rows])
        negatives = langevin(state.params, start, key_chain)
        loss, gradient = jax.value_and_grad(loss_fn)(state.params, draw_data(key_data), negatives)
        direction, optimizer_state = optimizer.update(gradient, state.optimizer_state)
        params = optax.apply_updates(state.params, direction)
        buffer = state.buffer.at[rows].set(negatives)
        facts = jnp.stack([loss, jnp.mean(jnp.linalg.norm(negatives, axis=-1))])
        return _ContrastiveState(params, optimizer_state, buffer, key), facts

    def updates(state: _ContrastiveState) -> tuple[_ContrastiveState, jax.Array]:
        """`num_updates` updates; facts [num_updates, 2]."""
        return jax.lax.scan(update, state, None, length=num_updates)

    key_network, key_buffer, key_run = jax.random.split(jax.random.key(seed), 3)
    widths = (2, *hidden, 1)
    params = []
    for inputs, outputs in itertools.pairwise(widths):
        key_network, key_weight, key_bias = jax.random.split(key_network, 3)
        bound = 1 / math.sqrt(inputs)  # torch's initial law, which torchebm_pcd has too
        weight = jax.random.uniform(key_weight, (inputs, outputs), minval=-bound, maxval=bound)
        bias = jax.random.uniform(key_bias, (outputs,), minval=-bound, maxval=bound)
        params.append((weight, bias))
    buffer = jax.random.normal(key_buffer, (buffer_size, 2))
    state = _ContrastiveState(params, optimizer.init(params), buffer, key_run)
    compiled, warm_up_seconds = _compile(updates, state)

    def run() -> Mapping[str, float]:
        nonlocal state
        state, facts = jax.block_until_ready(compiled(state))
        facts = np.asarray(facts)
        return {"loss": float(facts[:, 0].mean()), "negative_radius": float(facts[-1, 1])}

    return Workload(
        name="minimal JAX persistent contrastive divergence",
        run=run,
        warm_up_seconds=warm_up_seconds,
        note="num_updates updates in one lax.scan; rows are drawn with replacement",
    )


# --- Langevin samplers on a Gaussian mixture ----------------------------------------------------


def torchebm_langevin(
    *,
    means: np.ndarray,
    num_chains: int,
    num_steps: int,
    seed: int,
    standard_deviation: float = 1.313,
    step_size: float = 0.1,
    num_threads: int = 2,
) -> Workload:
    """Unadjusted Langevin chains on a Gaussian mixture with torchebm's `LangevinDynamics`.

    Args:
        means: centres of the equally weighted modes, shape [M, d].
        num_chains: chains C, started uniformly on the box that holds the means.
        num_steps: steps of one `run()`.
        seed: seed of the start and of the noise.
        standard_deviation: that of every mode.
        step_size: Langevin step size.
        num_threads: torch's intra-operation threads; set again at every `run()`.

    Returns:
        A workload that reports `mean_energy`, the mean over chains of
        -log sum_m exp(-|x - mean_m|^2 / (2 standard_deviation^2)) at the final positions
        (about d/2 for modes far apart: d/2 / (1 - step_size / (2 standard_deviation^2)) for ULA).

    Raises:
        PeerMissing: if torchebm or torch cannot be imported.
    """
    torch = _import_peer("torch", peer="torchebm")
    samplers = _import_peer("torchebm.samplers", peer="torchebm")
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    centres = torch.as_tensor(np.asarray(means), dtype=torch.float32)
    precision = 1 / standard_deviation**2

    def energy(position: Any) -> Any:
        """Energies [C] of positions [C, d]."""
        square_distance = (position[:, None] - centres).square().sum(dim=-1)
        return -torch.logsumexp(-0.5 * precision * square_distance, dim=-1)

    sampler = samplers.LangevinDynamics(_torchebm_model(energy), step_size=step_size)
    low, high = centres.amin(dim=0), centres.amax(dim=0)
    uniform = torch.rand(num_chains, centres.shape[1], generator=generator)
    position = low + (high - low) * uniform

    def run() -> Mapping[str, float]:
        nonlocal position
        torch.set_num_threads(num_threads)
        position = sampler.sample(x=position, n_steps=num_steps, generator=generator)
        return {"mean_energy": energy(position).mean().item()}

    return Workload(
        name=f"torchebm Langevin, {num_chains} chains",
        run=run,
        warm_up_seconds=time.perf_counter() - started,
        note=f"CPU, {num_threads} threads; eager, the gradient by autograd",
    )


def blackjax_langevin(
    *,
    means: np.ndarray,
    standard_deviation: float,
    num_chains: int,
    num_steps: int,
    step_size: float,
    seed: int,
) -> Workload:
    """Unadjusted Langevin chains with blackjax's SGLD kernel on the full gradient.

    blackjax has no plain Langevin kernel; SGLD with a gradient estimator that ignores its
    minibatch is one. Chains are vmapped, steps scanned. Arguments as in `torchebm_langevin`.

    Returns:
        A workload that reports `mean_energy`.

    Raises:
        PeerMissing: if blackjax cannot be imported.
    """
    blackjax = _import_peer("blackjax", peer="blackjax")
    energy = _mixture_energy(means, standard_deviation)
    log_density_gradient = jax.grad(lambda position: -energy(position))
    kernel = blackjax.sgld(lambda position, minibatch: log_density_gradient(position))

    def step(key: jax.Array, position: jax.Array) -> tuple[jax.Array, jax.Array]:
        return kernel.step(key, position, 0, step_size), jnp.float32(1.0)

    return _chains_workload(
        f"blackjax SGLD kernel as ULA, {num_chains} chains",
        step,
        state=_uniform_start(means, num_chains, seed),
        energy=energy,
        num_steps=num_steps,
        seed=seed,
    )


def blackjax_mala(
    *,
    means: np.ndarray,
    standard_deviation: float,
    num_chains: int,
    num_steps: int,
    step_size: float,
    seed: int,
) -> Workload:
    """Metropolis-adjusted Langevin chains with blackjax; arguments as in `torchebm_langevin`.

    Returns:
        A workload that reports `mean_energy` and `acceptance_rate` (over the run).

    Raises:
        PeerMissing: if blackjax cannot be imported.
    """
    blackjax = _import_peer("blackjax", peer="blackjax")
    energy = _mixture_energy(means, standard_deviation)
    kernel = blackjax.mala(lambda position: -energy(position), step_size)

    def step(key: jax.Array, state: Any) -> tuple[Any, jax.Array]:
        state, info = kernel.step(key, state)
        return state, info.acceptance_rate

    return _chains_workload(
        f"blackjax MALA, {num_chains} chains",
        step,
        state=jax.vmap(kernel.init)(_uniform_start(means, num_chains, seed)),
        energy=energy,
        num_steps=num_steps,
        seed=seed,
    )


def minimal_langevin(
    *,
    means: np.ndarray,
    standard_deviation: float,
    num_chains: int,
    num_steps: int,
    step_size: float,
    seed: int,
) -> Workload:
    """Unadjusted Langevin chains as a minimal JAX script: the baseline that a library must match.

    One jitted `scan` over positions [C, d]; one key and one `jax.random.normal` for the whole batch
    at each step; nothing is kept but the final positions. Arguments as in `torchebm_langevin`.

    Returns:
        A workload that reports `mean_energy`.
    """
    energy = _mixture_energy(means, standard_deviation)
    gradient_fn = jax.vmap(jax.grad(energy))
    noise_standard_deviation = math.sqrt(2 * step_size)

    def step(carry: tuple[jax.Array, jax.Array], _: None) -> tuple[Any, None]:
        position, key = carry
        key, key_noise = jax.random.split(key)
        noise = noise_standard_deviation * jax.random.normal(key_noise, position.shape)
        return (position - step_size * gradient_fn(position) + noise, key), None

    def steps(position: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        (position, key), _ = jax.lax.scan(step, (position, key), None, length=num_steps)
        return position, key, jnp.mean(jax.vmap(energy)(position))

    position, key = _uniform_start(means, num_chains, seed), jax.random.key(seed + 1)
    compiled, warm_up_seconds = _compile(steps, position, key)

    def run() -> Mapping[str, float]:
        nonlocal position, key
        position, key, mean_energy = jax.block_until_ready(compiled(position, key))
        return {"mean_energy": float(mean_energy)}

    return Workload(
        name=f"minimal JAX Langevin, {num_chains} chains",
        run=run,
        warm_up_seconds=warm_up_seconds,
        note="one jitted lax.scan, one draw of noise for all chains",
    )


# --- What several of them share -----------------------------------------------------------------


def _import_peer(module: str, *, peer: str) -> ModuleType:
    """Imports `module`, or raises `PeerMissing` with the command that installs `peer`."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PeerMissing(peer, INSTALL[peer]) from error


def _single_width(hidden: Sequence[int]) -> int:
    """The common width of the hidden layers; both GFlowNet peers' MLPs take one width only."""
    if len(set(hidden)) != 1:
        raise ValueError(f"The hidden layers must have one common width, but hidden is {hidden}.")
    return hidden[0]


def _compile(function: Callable[..., Any], *arguments: Any) -> tuple[Callable[..., Any], float]:
    """The compiled `function` for these arguments, and the seconds that it took."""
    started = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    return compiled, time.perf_counter() - started


def _mixture_energy(
    means: np.ndarray, standard_deviation: float
) -> Callable[[jax.Array], jax.Array]:
    """The energy [d] -> [] of an equally weighted Gaussian mixture, up to a constant."""
    centres = jnp.asarray(means, jnp.float32)  # [M, d]
    precision = 1 / standard_deviation**2

    def energy(position: jax.Array) -> jax.Array:
        square_distance = jnp.sum(jnp.square(position - centres), axis=-1)  # [M]
        return -jax.nn.logsumexp(-0.5 * precision * square_distance)

    return energy


def _uniform_start(means: np.ndarray, num_chains: int, seed: int) -> jax.Array:
    """Positions [C, d], uniform on the smallest box that holds all means."""
    centres = jnp.asarray(means, jnp.float32)
    shape = (num_chains, centres.shape[1])
    low, high = centres.min(axis=0), centres.max(axis=0)
    return low + (high - low) * jax.random.uniform(jax.random.key(seed), shape)


def _chains_workload(
    name: str,
    step: Callable[[jax.Array, Any], tuple[Any, jax.Array]],
    *,
    state: Any,
    energy: Callable[[jax.Array], jax.Array],
    num_steps: int,
    seed: int,
) -> Workload:
    """vmapped chains of a kernel `(key, state) -> (state, acceptance rate)`, scanned over steps.

    Args:
        state: states of all chains, every leaf [C, ...]; positions, or with a field `position`.
    """
    num_chains = jax.tree.leaves(state)[0].shape[0]

    def one_step(state: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        state, acceptance_rate = jax.vmap(step)(jax.random.split(key, num_chains), state)
        return state, jnp.mean(acceptance_rate)

    def steps(state: Any, key: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
        key, key_steps = jax.random.split(key)
        state, acceptance_rate = jax.lax.scan(
            one_step, state, jax.random.split(key_steps, num_steps)
        )
        mean_energy = jnp.mean(jax.vmap(energy)(getattr(state, "position", state)))
        return state, key, jnp.stack([mean_energy, jnp.mean(acceptance_rate)])

    key = jax.random.key(seed + 1)
    compiled, warm_up_seconds = _compile(steps, state, key)

    def run() -> Mapping[str, float]:
        nonlocal state, key
        state, key, facts = jax.block_until_ready(compiled(state, key))
        mean_energy, acceptance_rate = np.asarray(facts)
        return {"mean_energy": float(mean_energy), "acceptance_rate": float(acceptance_rate)}

    return Workload(
        name=name,
        run=run,
        warm_up_seconds=warm_up_seconds,
        note="vmapped chains in one lax.scan, a key per chain and step",
    )


def _torchebm_model(energy: Callable[[Any], Any], *, network: Any = None) -> Any:
    """A torchebm model with the energy [B, d] -> [B]; owns the parameters of `network`, if any."""
    base_model: Any = _import_peer("torchebm.core", peer="torchebm").BaseModel

    class Model(base_model):
        """torchebm asks for a subclass, and torchebm is imported lazily: hence a local class."""

        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, position: Any) -> Any:
            """Energies [B] of positions [B, d]."""
            return energy(position)

    return Model()
