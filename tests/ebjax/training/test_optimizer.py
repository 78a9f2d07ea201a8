"""Clipping, schedules and groups."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ebjax.training import adam, by_group, learning_rate_schedule


def _first_moment(optimizer, gradient):
    state = optimizer.update(gradient, optimizer.init(gradient))[1]
    (moments,) = [
        leaf.mu
        for leaf in jax.tree.leaves(state, is_leaf=lambda leaf: hasattr(leaf, "mu"))
        if hasattr(leaf, "mu")
    ]
    return moments


@pytest.mark.parametrize(("clip", "scale"), [(0.0, 1.0), (1.0, 0.2), (10.0, 1.0)])
def test_clipping_bounds_the_global_norm(clip, scale):
    gradient = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}  # norm 5
    moments = _first_moment(adam(1.0, b1=0.0, gradient_clip=clip), gradient)
    np.testing.assert_allclose(moments["a"], 3.0 * scale, rtol=1e-6)
    np.testing.assert_allclose(moments["b"], 4.0 * scale, rtol=1e-6)


def test_schedule_warms_up_and_decays():
    rate = learning_rate_schedule(2.0, warmup_steps=10, decay_steps=110, final_fraction=0.1)
    np.testing.assert_allclose([rate(0), rate(5), rate(10)], [0.0, 1.0, 2.0], rtol=1e-6)
    # Half way down the cosine between 2.0 and 0.2.
    np.testing.assert_allclose([rate(60), rate(110), rate(500)], [1.1, 0.2, 0.2], rtol=1e-5)


def test_schedule_without_warm_up_or_decay():
    constant, warm = learning_rate_schedule(0.5), learning_rate_schedule(0.5, warmup_steps=4)
    np.testing.assert_allclose([constant(0), constant(99)], 0.5)
    np.testing.assert_allclose([warm(0), warm(2), warm(99)], [0.0, 0.25, 0.5])
    np.testing.assert_allclose(float(learning_rate_schedule(0.5, decay_steps=10)(0)), 0.5)


def test_schedule_that_ends_before_it_begins_is_refused():
    with pytest.raises(ValueError, match="is 5; it must be 0 or more than the 10"):
        learning_rate_schedule(1.0, warmup_steps=10, decay_steps=5)


def test_a_group_without_an_optimizer_is_refused():
    groups = by_group({"policy": optax.sgd(0.1)})
    with pytest.raises(ValueError, match="log_z"):
        groups.init({"policy": jnp.zeros(1), "log_z": jnp.zeros(())})
