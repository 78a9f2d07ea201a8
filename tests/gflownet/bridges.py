"""log Z of a flow from walks in both directions, by bounded averages.

With w(τ) = log R(x) + log P_B(τ | x) - log P_F(τ) and σ the logistic function, for any policy

    Z = E_{τ ~ P_F} [σ(w) f(τ)] / E_{x ~ R/Z, τ ~ P_B} [σ(-w) f(τ)]

with f any function, such as whether a bug touches the trajectory. Both averages are of numbers in
(0, 1), so that their standard errors can be trusted, however heavy the tails of exp w (Bennett
1976). Every factor of P_F and P_B that is missing shows in it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import expit

from ebjax.types import Target
from gflownet import backward_rollout, forward_rollout
from gflownet.policies import mixture_policy
from gflownet.scoring import score
from gflownet.types import Trajectories

BATCH_FIRST = ("terminal", "log_reward")


def join(leaves, is_batch_first):
    return jnp.concatenate(leaves, axis=0 if is_batch_first else 1)


class Walks(NamedTuple):
    """Trajectories in both directions, and log P_F and log P_B of each by ``score``, in numpy."""

    environment: object
    policy: object
    params: object
    ahead: Trajectories
    back: Trajectories
    ahead_scores: object
    back_scores: object


def small_policy(environment, *, family="beta", seed=1, features=(16,), **options):
    """A network with random parameters, and these."""
    policy = mixture_policy(
        environment.num_actions,
        environment.value_dim,
        features,
        family=family,
        num_components=2,
        **options,
    )
    observation = environment.observe(environment.initial(jax.random.key(0)))
    return policy, policy.init(jax.random.key(seed), observation)


def walk(environment, targets, *, family="beta", seed=1, **options) -> Walks:
    """As many walks ahead as there are ``targets``, terminal states drawn from R / Z."""
    policy, params = small_policy(environment, family=family, seed=seed, **options)
    count = len(jax.tree.leaves(targets)[0])

    @jax.jit
    def both(params, targets):
        keys = jax.random.split(jax.random.key(seed), 2 * count)
        ahead = forward_rollout(keys[:count], environment, policy, params)
        back = backward_rollout(keys[count:], environment, policy, params, targets)
        # One program for the scores of both.
        every = Trajectories(
            *(
                jax.tree.map(lambda *leaves, a=name in BATCH_FIRST: join(leaves, a), one, other)
                for name, one, other in zip(Trajectories._fields, ahead, back, strict=True)
            )
        )
        scores = score(environment, policy, params, every, is_on_policy=False, chunk_size=1024)
        parts = [
            (scores.log_pf[:, s], scores.log_pb[:, s]) for s in (slice(count), slice(count, None))
        ]
        return ahead, back, *parts

    return Walks(environment, policy, params, *jax.tree.map(np.asarray, both(params, targets)))


def log_weights(t: Trajectories) -> np.ndarray:
    """[B] w."""
    return np.float64(t.log_reward) + np.sum(t.log_pb - t.log_pf, axis=0, dtype=np.float64)


def log_z_of(walks: Walks, is_used=(True, True), errors=(0.0, 0.0)) -> tuple[float, float]:
    """The estimate from the trajectories that are used [B], ahead and back, and its standard error.

    ``errors`` [B] are added to w, to plant a bug.
    """
    a = expit(log_weights(walks.ahead) + errors[0]) * is_used[0]
    b = expit(-log_weights(walks.back) - errors[1]) * is_used[1]
    error = np.sqrt((a.var() / a.mean() ** 2 + b.var() / b.mean() ** 2) / len(a))
    return float(np.log(a.mean() / b.mean())), float(error)


def check_that_a_missing_factor_shows(walks: Walks, log_z: float, log_factors) -> None:
    """Where ``log_factors`` [B], ahead and back, are left out of w, the estimate is wrong.

    It is right as it stands, on the same trajectories, those which have the factor.
    """
    is_used = [np.abs(each) > 1e-6 for each in log_factors]
    estimate, error = log_z_of(walks, is_used)
    assert abs(estimate - log_z) < 5 * error
    wrong, error = log_z_of(walks, is_used, log_factors)
    assert abs(wrong - log_z) > 7 * error


def check_walks(walks: Walks, log_z: float) -> None:
    """The estimate is right, both ways of scoring agree, and walks have the right ends."""
    estimate, error = log_z_of(walks)
    assert error < 0.06
    assert abs(estimate - log_z) < 5 * error
    for t, scores in ((walks.ahead, walks.ahead_scores), (walks.back, walks.back_scores)):
        assert np.isfinite(log_weights(t)).all()
        np.testing.assert_allclose(scores, (t.log_pf, t.log_pb), atol=2e-4)
        retrace(walks.environment, t)


def retrace(environment, t: Trajectories) -> None:
    """Every step taken leads to the next state, and taken back to the one before."""
    first, then = (
        jax.tree.map(lambda leaf, s=s: leaf[s], t.states) for s in (np.s_[:-1], np.s_[1:])
    )
    there = jax.jit(jax.vmap(jax.vmap(environment.step)))(first, t.actions)
    back = jax.jit(jax.vmap(jax.vmap(environment.undo)))(then, t.actions)
    for got, expected in ((there, then), (back, first)):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            a, b = np.asarray(a)[t.valid], np.asarray(b)[t.valid]
            np.testing.assert_allclose(a, b, atol=1e-5 if a.dtype.kind == "f" else 0)
    source = environment.initial(jax.random.key(0))
    jax.tree.map(
        lambda leaf, s: np.testing.assert_array_equal(leaf[0], np.broadcast_to(s, leaf[0].shape)),
        t.states,
        source,
    )


def constant_target(dim: int, side: float = 1.0) -> Target:
    """R = 1 on [0, side]^D."""
    return Target(
        lambda params, x: jnp.zeros(()),
        (dim,),
        log_z=dim * float(np.log(side)),
        sample=lambda key: side * jax.random.uniform(key, (dim,)),
    )


def draws_of(target: Target, count: int = 4096, seed: int = 9) -> jax.Array:
    """[N, D] exact draws."""
    return jax.jit(jax.vmap(target.sample))(jax.random.split(jax.random.key(seed), count))
