"""Figures of a flow that cannot be enumerated, from trajectories in both directions.

With τ a trajectory, x its end and w(τ) = log R(x) + log P_B(τ | x) - log P_F(τ):

    ELBO   E_{τ ~ P_F} w(τ)                          <= log Z
    EUBO   E_{x ~ R/Z, τ ~ P_B} w(τ)                 >= log Z
    log Z  log E_{τ ~ P_F} exp w(τ)                  unbiased in Z
    p(x)   E_{τ ~ P_B(. | x)} P_F(τ) / P_B(τ | x)    the law that the flow draws from

Both gaps are Kullback-Leibler divergences of trajectories, zero together. Correlations of log p
with log R look at shape, not at what is missed; a distance of samples has a floor, which samples of
the target itself do not fall below either: ``sampling_floor`` says where it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ebjax.types import Params
from gflownet.rollout import backward_rollout, forward_rollout
from gflownet.types import Environment, Policy, State

__all__ = [
    "FlowBounds",
    "bounds_of_weights",
    "correlations",
    "evidence_bounds",
    "log_probabilities",
    "modes_found",
    "sampling_floor",
    "top_rewards",
]


class FlowBounds(NamedTuple):
    """Estimates of log Z with their standard errors over trajectories.

    Attributes:
      elbo: mean of w under P_F, from below.
      elbo_standard_error: of it.
      log_z: the importance-weighted estimate.
      log_z_standard_error: by the delta method; too small where few weights decide.
      effective_sample_size: (Σ exp w)² / Σ exp 2w, of the number of trajectories.
      eubo: mean of w over targets and P_B, from above; ``None`` without targets.
      eubo_standard_error: of it.
    """

    elbo: float
    elbo_standard_error: float
    log_z: float
    log_z_standard_error: float
    effective_sample_size: float
    eubo: float | None = None
    eubo_standard_error: float | None = None


@functools.lru_cache(maxsize=16)
def _weights(environment: Environment, policy: Policy, is_backward: bool) -> Callable[..., Any]:
    """The compiled ``(keys, params, reward_params, terminal) -> (w, log_reward)``.

    Forwards there is no ``terminal``.
    """

    @jax.jit
    def compute(keys, params, reward_params, terminal):
        if is_backward:
            rolled = backward_rollout(
                keys, environment, policy, params, terminal, reward_params=reward_params
            )
        else:
            rolled = forward_rollout(keys, environment, policy, params, reward_params=reward_params)
        ratio = jnp.sum(rolled.log_pb - rolled.log_pf, axis=0)
        return rolled.log_reward + ratio, rolled.log_reward

    return compute


def _log_mean_exp(values: np.ndarray) -> np.ndarray:
    """Over the first axis."""
    return np.logaddexp.reduce(values, axis=0) - np.log(len(values))


def log_probabilities(
    key: jax.Array,
    environment: Environment,
    policy: Policy,
    params: Params,
    terminal: State,
    *,
    num_samples: int = 10,
    reward_params: Params = (),
) -> np.ndarray:
    """[N] log of an unbiased estimate of p(x); exact where an x has one path.

    Args:
      key: of the backward trajectories.
      environment: the graph.
      policy: P_F and P_B.
      params: the policy's parameters.
      terminal: [N, ...] terminal states.
      num_samples: backward trajectories of each.
      reward_params: of the reward, which the estimate does not depend on.
    """
    compute = _weights(environment, policy, True)
    size = len(jax.tree.leaves(terminal)[0])
    ratios = []
    for draw_key in jax.random.split(key, num_samples):
        weights, log_reward = compute(
            jax.random.split(draw_key, size), params, reward_params, terminal
        )
        ratios.append(np.asarray(log_reward - weights, np.float64))
    return _log_mean_exp(np.stack(ratios))


def evidence_bounds(
    key: jax.Array,
    environment: Environment,
    policy: Policy,
    params: Params,
    *,
    num_trajectories: int = 1000,
    targets: State | None = None,
    reward_params: Params = (),
) -> FlowBounds:
    """Bounds and an estimate of log Z.

    Args:
      key: of the trajectories.
      environment: the graph.
      policy: P_F and P_B.
      params: the policy's parameters.
      num_trajectories: of the forward policy.
      targets: [N, ...] terminal states drawn from R / Z, for the bound from above.
      reward_params: of the reward.
    """
    forward_key, backward_key = jax.random.split(key)
    weights, _ = _weights(environment, policy, False)(
        jax.random.split(forward_key, num_trajectories), params, reward_params, None
    )
    back = None
    if targets is not None:
        count = len(jax.tree.leaves(targets)[0])
        back, _ = _weights(environment, policy, True)(
            jax.random.split(backward_key, count), params, reward_params, targets
        )
    return bounds_of_weights(weights, back)


def bounds_of_weights(weights: Any, target_weights: Any = None) -> FlowBounds:
    """Bounds and an estimate of log Z from w of trajectories in both directions.

    Args:
      weights: [N] w of trajectories of P_F, at least 2.
      target_weights: [M] w of trajectories that P_B drew from targets.

    >>> bounds_of_weights(np.zeros(4)).log_z
    0.0
    """
    w = np.asarray(weights, np.float64)
    shares = np.exp(w - w.max())
    upper = error = None
    if target_weights is not None:
        back = np.asarray(target_weights, np.float64)
        upper, error = float(back.mean()), float(back.std(ddof=1) / np.sqrt(len(back)))
    return FlowBounds(
        elbo=float(w.mean()),
        elbo_standard_error=float(w.std(ddof=1) / np.sqrt(len(w))),
        log_z=float(_log_mean_exp(w)),
        log_z_standard_error=float(np.sqrt(shares.var(ddof=1) / len(w)) / shares.mean()),
        effective_sample_size=float(shares.sum() ** 2 / np.square(shares).sum()),
        eubo=upper,
        eubo_standard_error=error,
    )


def correlations(log_probability: np.ndarray, log_reward: np.ndarray) -> dict[str, float]:
    """``pearson`` and ``spearman`` of log p and log R.

    >>> correlations(np.array([0.0, 1.0, 2.0]), np.array([1.0, 2.0, 4.0]))["spearman"]
    1.0
    """
    from scipy import stats  # slow to import

    p, r = np.asarray(log_probability, np.float64), np.asarray(log_reward, np.float64)
    return {
        "pearson": float(stats.pearsonr(p, r).statistic),
        "spearman": float(stats.spearmanr(p, r).statistic),
    }


def top_rewards(
    states: np.ndarray, log_rewards: np.ndarray, k: int = 100
) -> dict[str, float | np.ndarray]:
    """The k best different objects of a sample.

    A sampler that is too greedy wins on the reward; look at the bounds beside it.

    Args:
      states: [N, ...] what tells objects apart.
      log_rewards: [N].
      k: how many, or all different ones if there are fewer.

    Returns:
      ``reward`` (their mean R), ``diversity`` (mean share of entries in which two of them differ),
      ``num_unique`` in the whole sample, and ``states`` of the best, best first.

    >>> best = top_rewards(np.array([[0, 1], [0, 1], [1, 1]]), np.log([2.0, 2.0, 4.0]), k=2)
    >>> round(best["reward"], 6), best["diversity"], best["num_unique"]
    (3.0, 0.5, 2)
    """
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1.")
    flat = np.asarray(states).reshape(len(states), -1)
    unique, first = np.unique(flat, axis=0, return_index=True)
    values = np.asarray(log_rewards, np.float64)[first]
    best = np.argsort(-values, kind="stable")[:k]
    chosen = unique[best]
    pairs = len(chosen) * (len(chosen) - 1)
    # A pair differs in an entry unless both have the same value there.
    differ = sum(
        len(column) ** 2 - np.square(np.unique(column, return_counts=True)[1]).sum()
        for column in chosen.T
    )
    return {
        "reward": float(np.exp(values[best]).mean()),
        "diversity": float(differ / pairs / chosen.shape[1]) if pairs else 0.0,
        "num_unique": len(unique),
        "states": chosen.reshape(-1, *np.shape(states)[1:]),
    }


def modes_found(states: np.ndarray, modes: np.ndarray, distance: int) -> int:
    """How many modes have a state within a Hamming distance.

    Args:
      states: [N, D].
      modes: [M, D].
      distance: entries in which a state may differ from the mode.

    >>> modes_found(np.array([[0, 0, 1]]), np.array([[0, 0, 0], [1, 1, 0]]), 1)
    1
    """
    unique = np.unique(np.asarray(states), axis=0)
    nearest = [int((unique != mode).sum(axis=1).min()) for mode in np.asarray(modes)]
    return int(np.sum(np.asarray(nearest) <= distance))


def sampling_floor(
    target: np.ndarray, num_samples: int, *, num_repeats: int = 20, seed: int = 0
) -> float:
    """The mean total variation between ``target`` [X] and that many perfect samples of it.

    >>> round(sampling_floor(np.ones(2) / 2, 100_000), 2)
    0.0
    """
    law = np.asarray(target, np.float64)
    law = law / law.sum()
    drawn = np.random.default_rng(seed).multinomial(num_samples, law, size=num_repeats)
    return float(0.5 * np.abs(drawn / num_samples - law).sum(axis=1).mean())
