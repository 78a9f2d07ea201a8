"""The torus: its exact uniform flow, which objectives must find, and walks both ways."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bridges import check_walks, constant_target, draws_of, one_phase, walk

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
SIZE = 6


def uniform_flow(*, log_z=LOG_Z, backward_concentration=0.0) -> Policy:
    """P_F and P_B uniform, log F = 0 after the source; exact where the reward is 1."""

    def apply(params, observation, forward_mask, backward_mask):
        del params
        zeros = jnp.zeros((2, 1))
        law = lambda mask, kappa, chart: ChartedLaw(  # noqa: E731
            MaskedCategorical(jnp.zeros(2), mask),
            VonMisesMixture(zeros, zeros, zeros + kappa),
            chart,
        )
        return PolicyOutput(
            law(forward_mask, 0.0, observation.forward),
            law(backward_mask, backward_concentration, observation.backward),
            jnp.where(forward_mask[0], log_z, 0.0),
        )

    return Policy(lambda key, observation: {}, apply)


def losses_of(environment, policy):
    params = {"policy": {}, "log_z": jnp.float32(LOG_Z)}
    keys = jax.random.split(jax.random.key(0), SIZE)

    @jax.jit
    def losses(params):
        return {
            make.__name__: make(environment, policy).loss(
                params, jnp.zeros(SIZE, jnp.int32), keys, ()
            )[0]
            for make in (trajectory_balance, detailed_balance, subtrajectory_balance)
        }

    return losses(params)


def test_objectives_are_zero_at_the_uniform_flow():
    for name, loss in losses_of(FLAT, uniform_flow()).items():
        assert loss == pytest.approx(0.0, abs=1e-9), name


def test_objectives_are_not_zero_elsewhere():
    for name, loss in losses_of(FLAT, uniform_flow(backward_concentration=0.5)).items():
        assert loss > 1e-3, name

    def observe(state):
        # The planted bug: the first step back is drawn like the others, and is no point mass.
        observation = FLAT.observe(state)
        chart = observation.backward
        turn = jnp.full_like(chart.width, 2 * np.pi)
        return observation._replace(backward=chart._replace(width=turn))

    for name, loss in losses_of(FLAT._replace(observe=observe), uniform_flow()).items():
        assert loss > 1.0, name


def test_walks_both_ways():
    target = torus_target(2)
    environment = torus(target, num_steps=STEPS)
    x = draws_of(target)
    ends = TorusState(x, jnp.full(len(x), STEPS, jnp.int32))
    with pytest.MonkeyPatch.context() as patch:
        one_phase(patch)
        walks = walk(environment, ends, family="von_mises")
    check_walks(walks, target.log_z)
    assert (walks.ahead.length == STEPS).all()


def test_undoing_the_first_step_is_certain():
    policy = mixture_policy(2, 2, (4,), family="von_mises")
    params = policy.init(jax.random.key(0), FLAT.observe(FLAT.initial(jax.random.key(0))))
    state = TorusState(jnp.array([1.0, 5.0]), jnp.int32(1))
    masks = FLAT.forward_mask(state), FLAT.backward_mask(state)
    law = policy.apply(params, FLAT.observe(state), *masks).backward
    action = law.sample(jax.random.key(1))
    np.testing.assert_array_equal(action.value, state.position)
    assert law.is_certain()
    assert law.log_prob(action) == 0.0
    assert FLAT.undo(state, action).position.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("dim", "steps"), [(1, 1), (3, 4)])
def test_contract(dim, steps):
    check_environment(torus(torus_target(dim), num_steps=steps))


def test_impossible_arguments_are_named():
    with pytest.raises(ValueError, match="num_steps is 0"):
        torus(num_steps=0)
    assert torus(steps_target(3)).value_dim == 3
