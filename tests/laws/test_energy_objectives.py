"""Laws that every objective of an energy keeps. A new objective is one row of ``OBJECTIVES``.

The carry is a fixed point of the loss in shape and dtype and belongs to example slots, metrics are
scalars, keys decide, jit changes nothing, new parameters compile nothing, and a run is the same on
1, 2 and 8 devices, with plain SGD.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from ebjax.energies.boltzmann import rbm
from ebjax.objectives.chain_divergence import ChainDivergence
from ebjax.objectives.contrastive_divergence import (
    contrastive_divergence,
    persistent_contrastive_divergence,
    short_run,
)
from ebjax.objectives.cooperative import cooperative
from ebjax.objectives.jarzynski import jarzynski
from ebjax.objectives.rbm_contrastive_divergence import rbm_persistent_contrastive_divergence
from ebjax.objectives.regularizers import energy_magnitude, gradient_penalty, regularized
from ebjax.parallel import AXIS_NAME, data_parallel
from ebjax.samplers import gibbs, langevin, mala
from ebjax.training import initial_state, make_update, make_update_many
from ebjax.types import Source

BATCH_SIZE = 8
OPTIMIZER = optax.sgd(0.05)  # hides no wrong scale of a gradient, as Adam does


def energy_fn(params, x):
    """On R^2: anharmonic, so that no symmetry hides a mistake."""
    centred = x - params["mean"]
    return params["scale"] * jnp.sum(centred**2) + 0.05 * jnp.sum(x**4) + 0.3 * params["mean"] @ x


def energy_params(key):
    return {"mean": 0.3 * jax.random.normal(key, (2,)), "scale": jnp.ones(())}


def spin_energy(params, x):
    """On {0, 1}^4."""
    return 0.5 * x @ params["couplings"] @ x - params["bias"] @ x


def spin_params(key):
    couplings = 0.3 * jax.random.normal(key, (4, 4))
    return {"couplings": couplings + couplings.T, "bias": jnp.array([0.2, -0.1, 0.4, 0.0])}


def normal_point(key):
    return 0.5 + jax.random.normal(key, (2,))


def binary_point(key):
    return jax.random.bernoulli(key, 0.6, (4,)).astype(float)


def birth(key):
    return jax.random.normal(key, (2,))


def conditional_energy(params, x, label):
    return energy_fn(params, x - jnp.where(label == 1, 1.0, 0.0))


def labelled_point(key):
    label_key, point_key = jax.random.split(key)
    return normal_point(point_key), jax.random.bernoulli(label_key).astype(jnp.int32)


def gaussian_walker(key, params):
    return params["mean"] + birth(key)


def propose(sampler, key):
    return sampler + birth(key)


def reconstruction(sampler, key, proposal, refined):
    del proposal
    return jnp.sum(jnp.square(propose(sampler, key) - refined))


class Case(NamedTuple):
    """An objective in a setting.

    Attributes:
      build: ``axis_name -> Objective``; the name is ``None`` or the axis of the devices.
      init: ``key -> params``.
      example: ``key -> one example of the batch``.
      is_noisy: whether the loss depends on its keys.
    """

    build: Callable[[str | None], Any]
    init: Callable[[jax.Array], Any] = energy_params
    example: Callable[[jax.Array], Any] = normal_point
    is_noisy: bool = True


OBJECTIVES = {
    "persistent_contrastive_divergence": Case(
        lambda axis_name: persistent_contrastive_divergence(
            energy_fn,
            mala(step_size=0.3),
            birth,
            num_steps=2,
            chains_per_example=2,
            rebirth_probability=0.3,
            energy_regularizer=0.1,
        )
    ),
    "short_run_with_chain_divergence": Case(
        lambda axis_name: short_run(
            energy_fn,
            langevin(step_size=0.1),
            birth,
            num_steps=2,
            divergence=ChainDivergence(entropy_weight=0.3),
            axis_name=axis_name,
        )
    ),
    "contrastive_divergence": Case(
        lambda axis_name: contrastive_divergence(spin_energy, gibbs(), num_steps=2),
        spin_params,
        binary_point,
    ),
    "rbm_persistent_contrastive_divergence": Case(
        lambda axis_name: rbm_persistent_contrastive_divergence(
            binary_point, num_steps=2, chains_per_example=2, rebirth_probability=0.3
        ),
        lambda key: rbm(3, scale=1.0).init(key, binary_point(key)),
        binary_point,
    ),
    "conditional_adaptive_contrastive_divergence": Case(
        lambda axis_name: persistent_contrastive_divergence(
            conditional_energy,
            lambda step_size: mala(step_size=step_size),
            lambda key, example: example[0] + birth(key),
            num_steps=2,
            chains_per_example=2,
            has_context=True,
            target_acceptance=0.5,
            regularizers=(gradient_penalty(0.01),),
            reset_margin=0.0,
            axis_name=axis_name,
        ),
        example=labelled_point,
    ),
    "jarzynski": Case(
        lambda axis_name: jarzynski(
            energy_fn,
            0.1,
            gaussian_walker,
            walkers_per_example=3,
            num_steps=2,
            moved_per_example=2,
            ess_threshold=0.9999,
            axis_name=axis_name,
        ),
        is_noisy=False,  # walkers are weighed where they are, then moved
    ),
    "jarzynski_with_a_kernel": Case(
        lambda axis_name: jarzynski(
            energy_fn, mala(step_size=0.2), gaussian_walker, axis_name=axis_name
        ),
        is_noisy=False,
    ),
    "cooperative": Case(
        lambda axis_name: regularized(
            cooperative(energy_fn, propose, reconstruction, langevin(step_size=0.1), num_steps=2),
            lambda params, x: energy_fn(params["energy"], x),
            energy_magnitude(0.01),
        ),
        lambda key: {"energy": energy_params(key), "sampler": jnp.array([0.3, -0.2])},
    ),
}

each_objective = pytest.mark.parametrize("name", OBJECTIVES)
both_precisions = pytest.mark.parametrize("is_double", [False, True], ids=["float32", "float64"])


def source_of(name):
    def example(arrays, key, position):
        return OBJECTIVES[name].example(jax.random.fold_in(key, position))

    return Source((), example)


def start(name):
    """``(params, carry, keys, batch)`` of the whole batch, on one device."""
    case = OBJECTIVES[name]
    params = case.init(jax.random.key(0))
    batch = jax.vmap(case.example)(jax.random.split(jax.random.key(1), BATCH_SIZE))
    carry = case.build(None).init(jax.random.key(2), params, batch)
    return params, carry, jax.random.split(jax.random.key(3), BATCH_SIZE), batch


@functools.cache
def compiled(name):
    """The loss with its gradient, and where to start, in float64."""
    loss = OBJECTIVES[name].build(None).loss
    return jax.jit(jax.value_and_grad(loss, has_aux=True)), jax.jit(lambda: start(name))()


@each_objective
@both_precisions
def test_the_carry_is_a_fixed_point_and_belongs_to_slots(name, is_double):
    with jax.enable_x64(is_double):
        objective = OBJECTIVES[name].build(None)
        params, carry, keys, batch = jax.eval_shape(lambda: start(name))
        loss, (new, metrics) = jax.eval_shape(objective.loss, params, carry, keys, batch)
        chex.assert_trees_all_equal_structs(carry, new)
        chex.assert_trees_all_equal_shapes_and_dtypes(carry, new)
        for leaf in jax.tree.leaves(carry):
            assert leaf.shape[0] == BATCH_SIZE
        # A weak type would differ from that of the next step, and a loop would not compile.
        assert not any(leaf.weak_type for leaf in jax.tree.leaves(new))
        dtype = jnp.dtype("float64" if is_double else "float32")
        assert (loss.shape, loss.dtype) == ((), dtype)
        for metric, value in metrics.items():
            assert value.shape == (), metric
            assert jnp.issubdtype(value.dtype, jnp.floating), metric


@pytest.mark.slow  # without jit each operation of a sampler compiles by itself
@each_objective
def test_jit_equals_no_jit(name, x64):
    run, arguments = compiled(name)
    plain = OBJECTIVES[name].build(None).loss(*arguments)
    jitted, _ = run(*arguments)
    chex.assert_trees_all_close(plain, jitted, rtol=1e-10, atol=1e-10)


@each_objective
def test_keys_decide_and_nothing_compiles_twice(name, x64):
    run, (params, carry, keys, batch) = compiled(name)
    (loss, (new, metrics)), gradient = first = run(params, carry, keys, batch)
    chex.assert_tree_all_finite((loss, metrics, gradient))
    chex.assert_trees_all_equal(first, run(params, carry, keys, batch))
    num_programs = run._cache_size()
    others = jax.vmap(jax.random.fold_in, (0, None))(keys, 1)
    (other_loss, _), _ = run(params, carry, others, batch)
    assert (other_loss != loss) == OBJECTIVES[name].is_noisy
    moved = jax.tree.map(lambda leaf: leaf + 0.1, params)
    (moved_loss, _), _ = run(moved, new, others, batch)
    assert moved_loss != other_loss
    assert run._cache_size() == num_programs


@functools.cache
def first_state(name):
    """The state before the first update, from where runs on any devices start."""
    case = OBJECTIVES[name]
    objective, source = case.build(AXIS_NAME), source_of(name)

    def make():
        key = jax.random.key(4)
        return initial_state(key, case.init, objective, OPTIMIZER, source, BATCH_SIZE)

    return jax.jit(make)()


@functools.cache
def trained(name, num_devices, backend="pmap"):
    """Parameters, carry and metrics after three updates."""
    objective, state = OBJECTIVES[name].build(AXIS_NAME), first_state(name)
    update = make_update(
        objective, OPTIMIZER, source_of(name), batch_size=BATCH_SIZE, axis_name=AXIS_NAME
    )
    devices = jax.devices()[:num_devices]
    program = data_parallel(make_update_many(update), devices=devices, backend=backend)
    replicated, split = program.place(state._replace(carry=()), state.carry)
    constant = program.place_constant(((), jnp.asarray(3, jnp.int32)))
    replicated, split, metrics = program.step(replicated, split, constant)
    state, carry = program.collect(replicated, split)
    return state.params, carry, jax.device_get(metrics)


def assert_same(one, many):
    chex.assert_tree_all_finite((one[0], one[2]))
    chex.assert_trees_all_close(one, many, rtol=2e-4, atol=2e-5)


@each_objective
def test_one_device_equals_eight(name):
    assert_same(trained(name, 1), trained(name, 8))


@pytest.mark.slow
@each_objective
def test_one_device_equals_two(name):
    assert_same(trained(name, 1), trained(name, 2))


def test_backends_agree():
    name = "persistent_contrastive_divergence"
    assert_same(trained(name, 1), trained(name, 2, "shard_map"))


def test_the_comparison_of_devices_sees_a_sum_for_a_mean(monkeypatch):
    name = "persistent_contrastive_divergence"
    monkeypatch.setattr(jax.lax, "pmean", jax.lax.psum)
    wrong = trained.__wrapped__(name, 2)
    monkeypatch.undo()
    with pytest.raises(AssertionError):
        assert_same(trained(name, 1), wrong)
