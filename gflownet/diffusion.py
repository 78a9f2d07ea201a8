"""Diffusion samplers: GFlowNets that draw from a continuous energy by a controlled random walk.

From s_0 = 0, with T steps of length dt = 1 / T,

    P_F   s_{i+1} = s_i + u(s_i, i dt) dt + σ √dt ε
    P_B   the Brownian bridge back to 0, which has nothing to learn

The path without drift has the same bridge and ends at N(0, σ² I): all but the drift cancels, and

    w(τ) = log R(x) - log N(x; 0, σ² I) - Σ_i [u_i · (s_{i+1} - s_i) / σ² - |u_i|² dt / (2 σ²)]

is log R + log P_B - log P_F, whatever noise moved the path. E exp w = Z at any drift; w = log Z on
every path at the best one, as the number of steps grows.

    tb        (log Z - w)² with a learned log Z
    vargrad   (w - mean w)², the mean over the policy's own paths
    pis       -w on paths of the policy itself, with gradient through the path (reverse KL)
    db, subtb, fldb, flsubtb
              the parts of a path, by flows of the states between: see ``diffusion_flows``

The learned log Z of ``tb`` follows the mean of w and not log Z; quote ``FlowBounds``. On-policy
training loses modes that it once forgot. ``local_search_steps`` moves Metropolis-adjusted Langevin
chains, one an example slot, born from the policy's draws; half of the paths are then bridges back
from where these chains are. Each chain steers its step size h to the acceptance rate a* = 0.574
that is best in high dimensions, log h <- log h + 0.1 (a - a*): one that is born far out, where the
energy is steep, shortens its steps until it moves.

Zhang and Chen, "Path integral sampler", ICLR 2022. Lahlou et al., "A theory of continuous
generative flow networks", ICML 2023. Sendera et al., "Improved off-policy training of diffusion
samplers", NeurIPS 2024 (local search, the network).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ebjax.samplers import mala
from ebjax.samplers.run import run_chain
from ebjax.types import EnergyFn, Objective, Params, bind
from gflownet.diffusion_flows import (
    PARTIAL_LOSSES,
    log_reference,
    partial_losses,
    relative_flows,
)
from gflownet.policies.diffusion import DiffusionFlow, DiffusionPolicy

__all__ = [
    "DIFFUSION_LOSSES",
    "DiffusionProcess",
    "backward_path",
    "controls_of",
    "diffusion_objective",
    "draw",
    "forward_path",
    "log_weight",
    "target_log_weight",
]

DIFFUSION_LOSSES = ("tb", "vargrad", "pis", *PARTIAL_LOSSES)

Drift = Callable[[jax.Array, jax.Array], jax.Array]

_TARGET_ACCEPTANCE = 0.574
_ADAPTATION_GAIN = 0.1


class DiffusionProcess(NamedTuple):
    """``num_steps`` T >= 1 and ``variance`` σ² > 0 of the walk without drift at its end."""

    num_steps: int
    variance: float

    def check(self) -> None:
        """Raises ``ValueError`` naming the setting that is out of range."""
        if self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps}; a path has at least 1 step.")
        if not (math.isfinite(self.variance) and self.variance > 0.0):
            raise ValueError(f"variance is {self.variance}; it must be a positive number.")


def _bound_drift(
    policy: DiffusionPolicy, params: Params, energy_fn: EnergyFn, energy_params: Params
) -> Drift:
    """``(x, time) -> u``; the slope of the energy is a constant to the objective."""

    def drift(x, time):
        slope = None
        if policy.uses_slope:
            slope = -jax.lax.stop_gradient(jax.grad(energy_fn, argnums=1)(energy_params, x))
        return policy.drift(params, x, time, slope)

    return drift


def forward_path(
    key: jax.Array,
    process: DiffusionProcess,
    drift: Drift,
    dim: int,
    *,
    exploration: jax.Array | float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """One path of the policy, and its control term ``Σ [u · Δs / σ² - |u|² dt / (2 σ²)]``.

    Args:
      key: of the noise.
      process: steps and variance.
      drift: ``(x, time) -> u``.
      dim: D.
      exploration: c, further noise of each step: its variance is σ² dt + c².

    Returns:
      ``(path [T + 1, D], control [])``; gradients flow through both.
    """
    step = 1.0 / process.num_steps
    deviation = jnp.sqrt(process.variance * step + jnp.square(exploration))

    def body(carry, inputs):
        x, control = carry
        noise, time = inputs
        u = drift(x, time)
        move = u * step + deviation * noise
        control += (u @ move - 0.5 * step * u @ u) / process.variance
        return (x + move, control), x + move

    noises = jax.random.normal(key, (process.num_steps, dim))
    start = jnp.zeros(dim)
    times = jnp.arange(process.num_steps) * step
    (_, control), path = jax.lax.scan(body, (start, jnp.zeros(())), (noises, times))
    return jnp.concatenate([start[None], path]), control


def backward_path(key: jax.Array, process: DiffusionProcess, x: jax.Array) -> jax.Array:
    """[T + 1, D] a Brownian bridge from 0 to ``x``."""
    count = process.num_steps
    noise = jax.random.normal(key, (count, *x.shape))
    walk = jnp.cumsum(noise, axis=0) * math.sqrt(process.variance / count)
    share = (jnp.arange(1, count + 1) / count).reshape(-1, *[1] * x.ndim)
    path = walk + share * (x - walk[-1])
    return jnp.concatenate([jnp.zeros_like(x)[None], path.at[-1].set(x)])


def controls_of(process: DiffusionProcess, drift: Drift, path: jax.Array) -> jax.Array:
    """[T] the terms of the control of a given path [T + 1, D], all steps at once."""
    step = 1.0 / process.num_steps
    u = jax.vmap(drift)(path[:-1], jnp.arange(process.num_steps) * step)
    moves = path[1:] - path[:-1]
    return jnp.sum(u * moves - 0.5 * step * jnp.square(u), axis=-1) / process.variance


def log_weight(
    process: DiffusionProcess, energy: jax.Array, x: jax.Array, control: jax.Array
) -> jax.Array:
    """[] w of a path that ends at ``x`` [D] with ``energy`` = -log R(x)."""
    return -energy - log_reference(x, process.variance) - control


def draw(
    key: jax.Array,
    process: DiffusionProcess,
    policy: DiffusionPolicy,
    params: Params,
    energy_fn: EnergyFn,
    energy_params: Params,
    dim: int,
) -> tuple[jax.Array, jax.Array]:
    """One draw: ``(x [D], w [])``; expectations under R / Z are means weighted by exp w."""
    drift = _bound_drift(policy, params, energy_fn, energy_params)
    path, control = forward_path(key, process, drift, dim)
    return path[-1], log_weight(process, energy_fn(energy_params, path[-1]), path[-1], control)


def target_log_weight(
    key: jax.Array,
    process: DiffusionProcess,
    policy: DiffusionPolicy,
    params: Params,
    energy_fn: EnergyFn,
    energy_params: Params,
    x: jax.Array,
) -> jax.Array:
    """[] w of a bridge back from ``x`` [D], a draw of the target: above log Z on average."""
    drift = _bound_drift(policy, params, energy_fn, energy_params)
    controls = controls_of(process, drift, backward_path(key, process, x))
    return log_weight(process, energy_fn(energy_params, x), x, controls.sum())


class _Chains(NamedTuple):
    """The local search: ``position`` [B, D], ``log_step_size`` [B], ``age`` [B] in updates."""

    position: jax.Array
    log_step_size: jax.Array
    age: jax.Array


class _Rules(NamedTuple):
    """The options of ``diffusion_objective``."""

    energy_fn: EnergyFn
    policy: DiffusionPolicy
    process: DiffusionProcess
    dim: int
    loss: str
    exploration: Callable[[jax.Array], jax.Array] | float
    energy_params: Params
    local_search_steps: int
    local_search_step_size: float
    rebirth_probability: float
    flow: DiffusionFlow | None
    decay: float
    axis_name: str | None


def diffusion_objective(
    energy_fn: EnergyFn,
    policy: DiffusionPolicy,
    process: DiffusionProcess,
    dim: int,
    *,
    loss: str = "tb",
    exploration: Callable[[jax.Array], jax.Array] | float = 0.0,
    energy_params: Params = (),
    local_search_steps: int = 0,
    local_search_step_size: float = 0.1,
    rebirth_probability: float = 0.02,
    flow: DiffusionFlow | None = None,
    decay: float = 2.0,
    axis_name: str | None = None,
) -> Objective:
    """Builds the objective: one path an example slot and update.

    Args:
      energy_fn: ``(energy_params, x [D]) -> []``, -log R.
      policy: the drift.
      process: steps and variance.
      dim: D.
      loss: one of ``DIFFUSION_LOSSES``.
      exploration: c, further noise of each step, a number or a schedule of the update count. Not
        with "pis".
      energy_params: parameters of the energy.
      local_search_steps: Metropolis-adjusted Langevin steps that each slot's chain takes an update;
        0 has no chains and all paths are the policy's. Not with "pis".
      local_search_step_size: h of these at the start.
      rebirth_probability: chance that a chain goes on from the policy's draw.
      flow: flows of the states on the way, for the losses of a path's parts.
      decay: λ >= 0 of "subtb" and "flsubtb".
      axis_name: the mapped axis of devices, over which "vargrad" takes its mean.

    Returns:
      An ``Objective`` whose parameters are ``{"policy": ..., "flow": ..., "log_z": []}`` (``flow``
      if it is used, no ``log_z`` with "vargrad" and "pis"), and whose batch is not used. Metrics:
      ``elbo`` (mean w of the policy's paths, below log Z without exploration), ``log_z`` where it
      is learned, ``log_reward``, ``exploration``, and ``acceptance_rate`` and ``log_step_size``
      (mean) of the chains.

    Raises:
      ValueError: naming the option that is out of range.
    """
    process.check()
    if loss not in DIFFUSION_LOSSES:
        raise ValueError(f"loss is {loss!r}; it must be one of {', '.join(DIFFUSION_LOSSES)}.")
    if local_search_steps < 0:
        raise ValueError(f"local_search_steps is {local_search_steps}; it must be at least 0.")
    is_off_policy = local_search_steps > 0 or callable(exploration) or exploration != 0.0
    if loss == "pis" and is_off_policy:
        raise ValueError(
            "loss is 'pis', an expectation under the policy itself; exploration and "
            "local_search_steps must be 0."
        )
    if not 0.0 <= rebirth_probability <= 1.0:
        raise ValueError(f"rebirth_probability is {rebirth_probability}; it must be in [0, 1].")
    if loss in PARTIAL_LOSSES and flow is None:
        raise ValueError(f"loss is {loss!r}, which needs flow, the flows of states on the way.")
    if not decay >= 0.0:
        raise ValueError(f"decay is {decay}; it must be at least 0.")
    rules = _Rules(
        energy_fn,
        policy,
        process,
        dim,
        loss,
        exploration,
        energy_params,
        local_search_steps,
        local_search_step_size,
        rebirth_probability,
        flow,
        decay,
        axis_name,
    )
    return Objective(init=bind(_init, rules=rules), loss=bind(_loss, rules=rules))


def _init(key, params, batch, *, rules: _Rules):
    del params
    size = len(jax.tree.leaves(batch)[0])
    noise = jax.random.normal(key, (size, rules.dim))
    return _Chains(
        position=math.sqrt(rules.process.variance) * noise,
        log_step_size=jnp.full(size, jnp.log(rules.local_search_step_size)),
        age=jnp.zeros(size, jnp.int32),
    )


def _loss(params, carry: _Chains, keys, batch, *, rules: _Rules):
    del batch
    share = rules.exploration(carry.age[0]) if callable(rules.exploration) else rules.exploration
    share = jnp.maximum(share, 0.0)
    drift = _bound_drift(rules.policy, params["policy"], rules.energy_fn, rules.energy_params)
    draw_keys, chain_keys, bridge_keys = jax.vmap(lambda k: jax.random.split(k, 3), out_axes=1)(
        keys
    )
    metrics: dict[str, jax.Array] = {}
    if rules.loss == "pis":
        paths, controls = jax.vmap(lambda key: forward_path(key, rules.process, drift, rules.dim))(
            draw_keys
        )
        weights, energies = _weights(rules, paths[:, -1], controls)
        value = -weights.mean()
        carry = carry._replace(age=carry.age + 1)
        return value, (carry, {"elbo": weights.mean(), "log_reward": -energies.mean()})

    frozen = _bound_drift(
        rules.policy,
        jax.lax.stop_gradient(params["policy"]),
        rules.energy_fn,
        rules.energy_params,
    )
    paths, _ = jax.vmap(
        lambda key: forward_path(key, rules.process, frozen, rules.dim, exploration=share)
    )(draw_keys)
    is_own = jnp.ones(len(keys), bool)
    if rules.local_search_steps:
        carry, acceptance = _search(chain_keys, rules, carry, paths[:, -1])
        bridges = jax.vmap(lambda key, x: backward_path(key, rules.process, x))(
            bridge_keys, carry.position
        )
        # Slots take turns, so that each chain is looked at every other update.
        is_own = (jnp.arange(len(keys)) + carry.age) % 2 == 0
        paths = jnp.where(is_own[:, None, None], paths, bridges)
        metrics["acceptance_rate"] = acceptance
        metrics["log_step_size"] = carry.log_step_size.mean()
    paths = jax.lax.stop_gradient(paths)
    controls = jax.vmap(lambda path: controls_of(rules.process, drift, path))(paths)
    weights, energies = _weights(rules, paths[:, -1], controls.sum(axis=1))
    own, num_own = jnp.sum(jnp.where(is_own, weights, 0.0)), is_own.sum()
    metrics |= {
        "elbo": own / jnp.maximum(num_own, 1),
        "log_reward": jnp.sum(jnp.where(is_own, -energies, 0.0)) / jnp.maximum(num_own, 1),
        "exploration": share,
    }
    carry = carry._replace(age=carry.age + 1)
    if "log_z" in params:
        metrics["log_z"] = params["log_z"]
    if rules.loss in PARTIAL_LOSSES:
        return _partial(rules, params, paths, controls, energies), (carry, metrics)
    if rules.loss == "tb":
        residuals = params["log_z"] - weights
    else:
        # Of the policy's own paths only: there it is the baseline of least variance.
        if rules.axis_name is not None:
            own, num_own = jax.lax.psum((own, num_own), rules.axis_name)
        residuals = weights - jax.lax.stop_gradient(own) / jnp.maximum(num_own, 1)
    return jnp.mean(jnp.square(residuals)), (carry, metrics)


def _partial(rules: _Rules, params, paths, controls, last_energies) -> jax.Array:
    """[] the loss of the parts of paths [B, T + 1, D]."""
    assert rules.flow is not None
    kind = PARTIAL_LOSSES[rules.loss]
    energies = jnp.broadcast_to(last_energies[:, None], paths.shape[:2])
    if kind.is_forward_looking:
        of_states = jax.vmap(jax.vmap(rules.energy_fn, (None, 0)), (None, 0))
        energies = of_states(rules.energy_params, paths)
    log_flow = functools.partial(rules.flow.log_flow, params["flow"])

    def flows_of(path, energies):
        return relative_flows(
            path,
            energies,
            rules.process.variance,
            params["log_z"],
            log_flow,
            is_forward_looking=kind.is_forward_looking,
        )

    decay = rules.decay if kind.decay is None else kind.decay
    return partial_losses(jax.vmap(flows_of)(paths, energies), controls, decay=decay).mean()


def _weights(rules: _Rules, ends: jax.Array, controls: jax.Array) -> tuple[jax.Array, jax.Array]:
    energies = jax.vmap(rules.energy_fn, (None, 0))(rules.energy_params, ends)
    return jax.vmap(lambda e, x, c: log_weight(rules.process, e, x, c))(
        energies, ends, controls
    ), energies


def _search(keys, rules: _Rules, carry: _Chains, drawn: jax.Array) -> tuple[_Chains, Any]:
    """Chains take their steps; some go on from what the policy drew."""

    def one(key, position, log_step_size, fresh):
        birth_key, chain_key = jax.random.split(key)
        is_born = jax.random.bernoulli(birth_key, rules.rebirth_probability)
        position = jnp.where(is_born | ~jnp.isfinite(position).all(), fresh, position)
        kernel = mala(step_size=jnp.exp(log_step_size))
        state = kernel.init(rules.energy_fn, rules.energy_params, position)
        state, info = run_chain(
            chain_key,
            kernel,
            rules.energy_fn,
            rules.energy_params,
            state,
            rules.local_search_steps,
        )
        error = jnp.nan_to_num(info.acceptance_rate) - _TARGET_ACCEPTANCE
        return state.position, log_step_size + _ADAPTATION_GAIN * error, info.acceptance_rate

    # All chains are born at the first update: there was no policy before.
    positions = jnp.where((carry.age == 0)[:, None], drawn, carry.position)
    positions, log_step_size, acceptance = jax.vmap(one)(
        keys, positions, carry.log_step_size, drawn
    )
    carry = carry._replace(position=positions, log_step_size=log_step_size)
    return carry, acceptance.mean()
