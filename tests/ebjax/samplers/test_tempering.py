"""Parallel tempering: exact invariance of swaps on a small space, cold law, tuned ladders."""

import importlib
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.energies import targets
from ebjax.samplers import mala, run_chain
from ebjax.samplers.evaluate import value
from ebjax.samplers.ladder import equalised, tune_ladder
from ebjax.samplers.smc.path import geometric_path, power_path
from ebjax.samplers.tempering import parallel_tempering, swap_log_ratios, swap_order
from ebjax.types import Kernel, bind

module = importlib.import_module("ebjax.samplers.tempering")

ENERGIES = np.array([0.3, -1.1, 1.4])
BETAS = (0.2, 0.5, 1.0)
STATES = np.array(list(itertools.product(range(3), repeat=3)))


class DiscreteState(NamedTuple):
    position: jax.Array
    energy: jax.Array
    parts: Any


class DiscreteInfo(NamedTuple):
    acceptance_rate: jax.Array
    is_finite: jax.Array


def _discrete_init(energy_fn, params, position):
    return DiscreteState(position, *value(energy_fn, params, position))


def _discrete_step(key, energy_fn, params, state):
    proposal_key, accept_key = jax.random.split(key)
    proposal = _discrete_init(energy_fn, params, jax.random.randint(proposal_key, (), 0, 3))
    rate = jnp.exp(jnp.minimum(state.energy - proposal.energy, 0.0))
    is_accepted = jax.random.uniform(accept_key) < rate
    new = jax.tree.map(lambda a, b: jnp.where(is_accepted, a, b), proposal, state)
    return new, DiscreteInfo(rate, jnp.array(True))


DISCRETE_KERNEL = Kernel(bind(_discrete_init), bind(_discrete_step))


def table_energy(params, x):
    return jnp.asarray(ENERGIES)[x] * params


def another_base(params, x):
    return jnp.asarray([0.9, 0.1, -0.7])[x]


# is it a path, the function that the kernel is given, its params, and the path itself
LAWS = {
    "power": (False, table_energy, 1.3, power_path(table_energy)),
    "path": (True, geometric_path(another_base, table_energy), ((), 1.3), None),
    "plain_path": (True, lambda p, x: p[0] * table_energy(p[1], x) + 0.1 * x, 1.3, None),
}


def replicas_of(name):
    is_path, energy_fn, params, _ = LAWS[name]
    options = {"kernel": DISCRETE_KERNEL, "inverse_temperatures": BETAS, "step_size": None}
    return module._replicas(energy_fn, params, jnp.array(0), is_path=is_path, **options), params


def swap_balance_error(name, parity):
    """Largest entry of πP - π for the product law over all 27 joint states."""
    replicas, params = replicas_of(name)

    @jax.jit
    @jax.vmap
    def rows(joint):
        log_ratio, energies = swap_log_ratios(replicas, params, replicas.init(params, joint))
        return jnp.exp(jnp.minimum(log_ratio, 0.0)), -energies.sum()

    rates, log_law = map(np.asarray, rows(jnp.asarray(STATES)))
    law = np.exp(log_law - log_law.max())
    law /= law.sum()
    index = {tuple(state): i for i, state in enumerate(STATES)}
    transition = np.zeros((27, 27))
    on_offer = [pair for pair in range(2) if pair % 2 == parity]
    for i, joint in enumerate(STATES):
        for swaps in itertools.product([False, True], repeat=len(on_offer)):
            is_swapped, probability = np.zeros(2, bool), 1.0
            for pair, swap in zip(on_offer, swaps, strict=True):
                is_swapped[pair] = swap
                probability *= rates[i, pair] if swap else 1.0 - rates[i, pair]
            order = np.asarray(swap_order(jnp.asarray(is_swapped)))
            transition[i, index[tuple(joint[order])]] += probability
    np.testing.assert_allclose(transition.sum(1), 1.0, atol=1e-12)
    assert np.mean(np.diag(transition) < 0.999) > 0.4
    return np.abs(law @ transition - law).max()


@pytest.mark.parametrize("parity", [0, 1])
@pytest.mark.parametrize("name", LAWS)
def test_swaps_keep_the_product_law(x64, name, parity):
    assert swap_balance_error(name, parity) < 1e-14


def test_the_check_sees_a_wrong_ratio(x64, monkeypatch):
    real = swap_log_ratios
    for wrong in (
        lambda *args: (-real(*args)[0], real(*args)[1]),
        lambda *args: (0.5 * real(*args)[0], real(*args)[1]),
        lambda *args: (jnp.zeros(2), real(*args)[1]),
    ):
        monkeypatch.setitem(globals(), "swap_log_ratios", wrong)
        assert swap_balance_error("power", 0) > 1e-3


def test_swap_order():
    assert swap_order(jnp.array([True, False, False, True])).tolist() == [1, 0, 2, 4, 3]
    assert swap_order(jnp.zeros(0, bool)).tolist() == [0]


def cold_law_chi_square(num_chains=20_000, num_steps=7):
    """Exact draws of the product law, some steps: the joint law must be the product law again."""
    kernel = parallel_tempering(DISCRETE_KERNEL, inverse_temperatures=BETAS)
    laws = np.exp(-np.asarray(BETAS)[:, None] * ENERGIES * 1.3)
    laws /= laws.sum(1, keepdims=True)

    @jax.jit
    @jax.vmap
    def walk(key):
        start_key, chain_key = jax.random.split(key)
        state = kernel.init(table_energy, 1.3, jnp.array(0))
        start = jax.random.categorical(start_key, jnp.log(jnp.asarray(laws)), axis=-1)
        replicas, params = replicas_of("power")
        state = state._replace(position=start[-1], replicas=replicas.init(params, start))
        state, info = run_chain(chain_key, kernel, table_energy, 1.3, state, num_steps)
        return state.replicas.position, state.position, info

    ends, cold, info = walk(jax.random.split(jax.random.key(0), num_chains))
    np.testing.assert_array_equal(ends[:, -1], cold)
    code = np.asarray(ends) @ [9, 3, 1]
    counts = np.bincount(code, minlength=27)
    expected = num_chains * np.einsum("i,j,k->ijk", *laws).ravel()
    chi_square = ((counts - expected) ** 2 / expected).sum()
    return (chi_square - 26) / np.sqrt(2 * 26), info, laws


def test_the_product_law_is_invariant():
    score, info, laws = cold_law_chi_square()
    assert score < 5.0
    # The rates reported are those of exact draws: an expectation over the product law.
    for pair in range(2):
        log_a = (BETAS[pair + 1] - BETAS[pair]) * 1.3 * (ENERGIES[None] - ENERGIES[:, None])
        exact = (laws[pair][:, None] * laws[pair + 1][None] * np.exp(np.minimum(log_a, 0))).sum()
        assert abs(info.swap_acceptance_rate[:, pair].mean() - exact) < 1e-2


def test_the_invariance_check_sees_a_wrong_ratio(monkeypatch):
    real = swap_log_ratios
    monkeypatch.setattr(module, "swap_log_ratios", lambda *args: (-real(*args)[0], real(*args)[1]))
    assert cold_law_chi_square()[0] > 5.0


def test_the_invariance_check_sees_states_left_at_their_old_temperature(monkeypatch):
    monkeypatch.setattr(module._Replicas, "at_their_place", lambda self, params, states: states)
    assert cold_law_chi_square()[0] > 5.0


def test_replicas_know_their_energies(x64):
    target = targets.double_well(tilt=0.8)
    kernel = parallel_tempering(
        mala, inverse_temperatures=BETAS, step_size=(0.5, 0.2, 0.1), num_local_steps=3
    )
    state = kernel.init(target.energy, (), jnp.array([1.0, 0.3]))
    state, info = run_chain(jax.random.key(0), kernel, target.energy, (), state, 50)
    energy, gradient = jax.vmap(jax.value_and_grad(lambda x: target.energy((), x)))(
        state.replicas.position
    )
    betas = np.asarray(BETAS)
    np.testing.assert_allclose(state.replicas.energy, betas * energy, rtol=1e-12)
    np.testing.assert_allclose(state.replicas.gradient, betas[:, None] * gradient, rtol=1e-12)
    assert 0.0 < info.num_swaps < 2.0
    assert kernel.num_evaluations == 9
    assert info.num_evaluations == 9.0


def test_it_crosses_where_the_inner_kernel_does_not():
    """Two wells 9 kT deep: the share of the right one, from chains that all start on the left."""
    target = targets.double_well(tilt=0.5)
    start = target.modes[jnp.argmin(target.modes[:, 0])]
    tempered = parallel_tempering(
        mala, inverse_temperatures=(0.05, 0.15, 0.4, 1.0), step_size=(0.5, 0.2, 0.1, 0.05)
    )

    def right_share(kernel):
        @jax.jit
        @jax.vmap
        def walk(key):
            state = kernel.init(target.energy, (), start)
            return run_chain(key, kernel, target.energy, (), state, 800)[0].position[0] > 0.0

        return np.mean(walk(jax.random.split(jax.random.key(0), 1000)))

    draws = jax.vmap(target.sample)(jax.random.split(jax.random.key(1), 100_000))
    exact = np.mean(draws[:, 0] > 0.0)
    assert abs(right_share(tempered) - exact) < 5.0 * np.sqrt(exact * (1 - exact) / 1000) + 0.01
    assert right_share(mala(step_size=0.05)) < 0.5 * exact


def test_round_trips():
    """Two walkers that always exchange: each is at one end, then at the other."""
    flat = lambda params, x: 0.0 * x  # noqa: E731
    kernel = parallel_tempering(mala(step_size=0.1), inverse_temperatures=(0.1, 0.5, 1.0))
    state = kernel.init(flat, (), jnp.array(0.0))
    walkers, trips = [], []
    step = jax.jit(lambda key, state: kernel.step(key, flat, (), state))
    for i in range(12):
        state, info = step(jax.random.key(i), state)
        walkers.append(state.walkers.tolist())
        trips.append(int(state.num_round_trips))
        assert info.num_swaps == 1
    # Deterministic exchange: a walker needs 2 R steps from end to end and back.
    assert walkers[0] == [1, 0, 2]
    assert walkers[:6] == walkers[6:]
    assert sorted(map(tuple, walkers[:6])) == sorted(itertools.permutations(range(3)))
    # The first walker to come back to the top counts once it has been at the bottom.
    assert trips[-1] - trips[5] == 3


def test_equalised(x64):
    for first in (0.0, 0.1):
        ladder = jnp.array([first, 0.4, 0.7, 1.0])
        np.testing.assert_allclose(equalised(ladder, jnp.full(3, 0.3)), ladder, rtol=1e-12)
        assert np.all(np.diff(equalised(ladder, jnp.zeros(3))) > 0.0)
    # Λ = 0, 0.6, 0.8, 0.9 at the old rungs; thirds of 0.9 are at 0.3 and 0.6.
    rates = jnp.array([0.6, 0.2, 0.1])
    moved = equalised(jnp.array([0.0, 0.4, 0.7, 1.0]), rates)
    np.testing.assert_allclose(moved, [0.0, 0.2, 0.4, 1.0], atol=1e-12)
    moved = equalised(jnp.array([0.1, 0.4, 0.7, 1.0]), rates)
    np.testing.assert_allclose(moved, [0.1, 0.2, 0.4, 1.0], rtol=1e-12)


def test_a_tuned_ladder_rejects_equally():
    energy = lambda params, x: 0.5 * jnp.sum(x**2)  # noqa: E731
    first = np.linspace(0.02, 1.0, 6)
    tuned = tune_ladder(
        jax.random.key(0),
        mala,
        energy,
        (),
        jnp.ones((32, 8)),
        inverse_temperatures=first,
        step_size=0.1,
        target_acceptance=0.6,
        num_rounds=6,
        num_steps=16,
    )
    rates = np.asarray(tuned.rejection_rates)
    assert rates.max() - rates.min() < 0.1
    ladder = np.asarray(tuned.inverse_temperatures)
    assert (ladder[0], ladder[-1]) == (np.float32(0.02), 1.0)
    # For a Gaussian the rejection rate depends on the ratio of neighbours only.
    np.testing.assert_allclose(np.diff(np.log(ladder)), np.log(50.0) / 5, rtol=0.2)
    assert abs(tuned.barrier - rates.sum()) < 1e-5
    # The best step of MALA goes as 1/β.
    scaled = np.asarray(tuned.step_sizes) * ladder
    assert scaled.max() / scaled.min() < 2.0
    # The first ladder was far from it.
    untuned = tune_ladder(
        jax.random.key(0),
        mala,
        energy,
        (),
        jnp.ones((32, 8)),
        inverse_temperatures=first,
        step_size=tuned.step_sizes,
        num_rounds=1,
        num_steps=64,
    )
    assert np.ptp(untuned.rejection_rates) > 0.3


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"inverse_temperatures": (0.5, 0.2, 1.0)}, "inverse_temperatures"),
        ({"inverse_temperatures": (0.5, 0.9)}, "inverse_temperatures"),
        ({"inverse_temperatures": 1.0}, "inverse_temperatures"),
        ({"num_local_steps": 0}, "num_local_steps is 0"),
        ({"step_size": 0.1}, "step_size is 0.1"),
        ({"kernel": mala}, "step_size is None"),
    ],
)
def test_wrong_calls(options, match):
    options = {"kernel": mala(step_size=0.1), "inverse_temperatures": BETAS, **options}
    kernel = options.pop("kernel")
    with pytest.raises(ValueError, match=match):
        parallel_tempering(kernel, **options)
