"""Peers that train energies by persistent contrastive divergence: torchebm and a minimal script.

The data are eight Gaussians on a circle, the energy is an MLP with SiLU. torchebm is driven as its
documentation shows; the minimal script is what a competent JAX user writes for this one job.
"""

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from launch.benchmarks.workload import Workload, compile_ahead, import_peer

ENERGY_REGULARIZATION = 0.01
NUM_GAUSSIANS, GAUSSIANS_RADIUS, GAUSSIANS_STANDARD_DEVIATION = 8, 2.0, 0.2


class _ContrastiveState(NamedTuple):
    """Training state of the minimal script: MLP, Adam state, buffer [N, 2], next key."""

    params: list[tuple[jax.Array, jax.Array]]
    optimizer_state: optax.OptState
    buffer: jax.Array  # [N, 2]
    key: jax.Array  # []


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
    torch = import_peer("torch", peer="torchebm")
    losses = import_peer("torchebm.losses", peer="torchebm")
    samplers = import_peer("torchebm.samplers", peer="torchebm")
    started = time.perf_counter()
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    layers = []
    widths = (2, *hidden)
    for inputs, outputs in itertools.pairwise(widths):
        layers += [torch.nn.Linear(inputs, outputs), torch.nn.SiLU()]
    network = torch.nn.Sequential(*layers, torch.nn.Linear(widths[-1], 1))
    model = torchebm_model(lambda position: network(position).squeeze(-1), network=network)
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
    compiled, warm_up_seconds = compile_ahead(updates, state)

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


def torchebm_model(energy: Callable[[Any], Any], *, network: Any = None) -> Any:
    """A torchebm model with the energy [B, d] -> [B]; owns the parameters of `network`, if any."""
    base_model: Any = import_peer("torchebm.core", peer="torchebm").BaseModel

    class Model(base_model):
        """torchebm asks for a subclass, and torchebm is imported lazily: hence a local class."""

        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, position: Any) -> Any:
            """Energies [B] of positions [B, d]."""
            return energy(position)

    return Model()
