"""The torus: its exact uniform flow, which objectives must find, and walks both ways."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bridges import check_walks, constant_target, draws_of, walk

from gflownet.distributions import MaskedCategorical
from gflownet.distributions_continuous import ChartedLaw, VonMisesMixture
from gflownet.environments import TorusState, steps_target, torus, torus_target
from gflownet.objectives import detailed_balance, subtrajectory_balance, trajectory_balance
from gflownet.policies import mixture_policy
from gflownet.testing import check_environment
from gflownet.types import Policy, PolicyOutput

STEPS = 3
FLAT = torus(constant_target(2, 2 * np.pi), num_steps=STEPS)
LOG_Z = 2 * np.log(2 * np.pi)


def flow(params, observation, forward_mask, backward_mask):
    """P_F uniform, P_B of a concentration, log F = 0 after the source: exact at 0 for R = 1."""
    zeros = jnp.zeros((2, 1))

    def law(mask, concentration, chart):
        unit = VonMisesMixture(zeros, zeros, zeros + concentration)
        return ChartedLaw(MaskedCategorical(jnp.zeros(2), mask), unit, chart)

    return PolicyOutput(
        law(forward_mask, 0.0, observation.forward),
        law(backward_mask, params, observation.backward),
        jnp.where(forward_mask[0], LOG_Z, 0.0),
    )


FLOW = Policy(lambda key, observation: jnp.zeros(()), flow)


def losses_of(environment, *objectives):
    """``concentration -> losses``; so few trajectories compile fastest."""
    keys, carry = jax.random.split(jax.random.key(0), 6), jnp.zeros(6, jnp.int32)
    built = [make(environment, FLOW) for make in objectives]

    @jax.jit
    def losses(concentration):
        params = {"policy": concentration, "log_z": jnp.float32(LOG_Z)}
        return jnp.stack([objective.loss(params, carry, keys, ())[0] for objective in built])

    return losses


def test_objectives_are_zero_at_the_uniform_flow_only():
    losses = losses_of(FLAT, trajectory_balance, detailed_balance, subtrajectory_balance)
    np.testing.assert_allclose(losses(0.0), 0.0, atol=1e-9)
    assert (losses(0.5) > 1e-3).all()


def test_a_first_step_back_that_is_no_point_mass_shows():
    def observe(state):
        observation = FLAT.observe(state)
        chart = observation.backward
        turn = jnp.full_like(chart.width, 2 * np.pi)
        return observation._replace(backward=chart._replace(width=turn))

    # Each angle of the step has density 1 / 2π where its probability is 1.
    loss = losses_of(FLAT._replace(observe=observe), trajectory_balance)(0.0)[0]
    assert loss == pytest.approx((2 * np.log(2 * np.pi)) ** 2, rel=1e-4)


def test_walks_both_ways():
    target = torus_target(2)
    environment = torus(target, num_steps=STEPS)
    x = draws_of(target)
    ends = TorusState(x, jnp.full(len(x), STEPS, jnp.int32))
    walks = walk(environment, ends, family="von_mises")
    check_walks(walks, target.log_z)
    assert (walks.ahead.length == STEPS).all()


def test_undoing_the_first_step_is_certain():
    policy = mixture_policy(2, 2, (4,), family="von_mises")
    params = policy.init(jax.random.key(0), FLAT.observe(FLAT.initial(jax.random.key(0))))
    state = TorusState(jnp.array([1.0, 5.0]), jnp.int32(1))
    masks = FLAT.forward_mask(state), FLAT.backward_mask(state)
    law = policy.apply(params, FLAT.observe(state), *masks).backward
    action = jax.jit(lambda key: law.sample(key))(jax.random.key(1))
    np.testing.assert_array_equal(action.value, state.position)
    assert law.is_certain()
    assert law.log_prob(action) == 0.0
    assert FLAT.undo(state, action).position.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("dim", "steps"), [(3, 4)])
def test_contract(dim, steps):
    check_environment(torus(torus_target(dim), num_steps=steps))


def test_impossible_arguments_are_named():
    with pytest.raises(ValueError, match="num_steps is 0"):
        torus(num_steps=0)
    assert torus(steps_target(3)).value_dim == 3
