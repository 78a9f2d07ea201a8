"""EB-GFN: the law of the negatives and both gradients against enumeration, and its recipe."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from small_environments import exact_tables, random_tables, tabular, tabulate
from test_local_search import all_moves, target, transition_matrix

from ebjax.energies.lattice import ising_lattice
from ebjax.objectives.pseudolikelihood import flip_differences, pseudolikelihood_loss
from ebjax.training import train
from ebjax.types import Energy
from gflownet.environments.sequences import SequenceState, sequence_index, sequences
from gflownet.objectives import trajectory_balance
from gflownet.objectives.energy_based_flow import energy_based_flow, rising_steps
from gflownet.recipes import eb_gfn, eb_gfn_method
from gflownet.recipes.eb_gfn import EBGFlowNetConfig, build
from gflownet.sampling import backward_sampler, forward_sampler, mixed_sampler

FIVE_SIGMA = 2 * stats.norm.sf(5)
# With a power of 2 the mean of counts is exact in single precision.
NUM_BITS, BATCH = 3, 2048
ENERGIES = np.random.default_rng(0).standard_normal(2**NUM_BITS)
# The law of the data, unlike that of the energy.
DATA_LAW = np.random.default_rng(1).dirichlet(np.ones(2**NUM_BITS))
KEYS = jax.random.split(jax.random.key(0), BATCH)


@functools.cache
def bits():
    """Three bits in any order; the energy is a table of its eight values."""

    def log_reward(params, tokens):
        table = jnp.asarray(ENERGIES) if isinstance(params, tuple) else params
        return -table[sequence_index(tokens, 2)]

    return sequences(log_reward, vocabulary=2, length=NUM_BITS, order="any_order")


@functools.cache
def ends():
    """[8] places of the terminal states among all, in the order of the table."""
    terminal = np.flatnonzero(tabulate.__wrapped__(bits()).is_terminal)
    tokens = np.asarray(bits().enumerate().tokens)[terminal]
    return terminal[np.argsort(tokens @ [4, 2, 1])]


def flows():
    """Tables of the policy: of the exact flow, and of none."""
    return {"exact": exact_tables(bits(), "random")[0], "random": random_tables(bits(), 1)}


def law_of_moves(tables, num_steps, *, is_tested=True):
    """[8, 8] transition matrix of the negatives; or one without the Metropolis test."""
    log_reward = np.asarray(tabulate.__wrapped__(bits()).log_reward, np.float64)
    moves = all_moves(bits(), tables, num_steps, False)
    if not is_tested:
        moves = [move._replace(back=np.inf) for move in moves]
    return transition_matrix(moves, log_reward)[np.ix_(ends(), ends())]


def data():
    """[B] terminal states by their shares in ``DATA_LAW``, and their places in the table."""
    index = np.random.default_rng(2).choice(2**NUM_BITS, BATCH, p=DATA_LAW)
    states = jax.tree.map(lambda leaf: jnp.asarray(leaf)[ends()[index]], bits().enumerate())
    return states, index


def params_of(tables):
    dtype = jnp.result_type(float)
    params = {"energy": ENERGIES, "policy": tables, "log_z": 0.3}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)


def gradient_fn():
    """``(params, carry, keys, batch, K) -> gradient, (carry, metrics)``, compiled."""
    environment, policy = tabular(bits())

    def gradient(params, carry, keys, batch, num_steps):
        objective = energy_based_flow(
            environment, policy, num_steps=lambda count: num_steps, chunk_size=512
        )
        return jax.grad(objective.loss, has_aux=True)(params, carry, keys, batch)

    return jax.jit(gradient)


compiled = functools.cache(gradient_fn)


def carry_of(count):
    return jnp.zeros(count, jnp.int32), (jnp.zeros(count // 2, jnp.int32), ())


def negatives_fit(gradient, index, law):
    """p-value of the negatives, which the gradient of a table counts, under their law."""
    observed = np.bincount(index, minlength=len(law)) - BATCH * np.asarray(gradient, np.float64)
    if (observed < -0.5).any() or np.abs(observed - observed.round()).max() > 1e-3:
        return 0.0
    return stats.chisquare(observed.round(), BATCH * law).pvalue


@pytest.mark.parametrize("num_steps", [1, 2, 3])
@pytest.mark.parametrize("name", ["exact", "random"])
def test_negatives_leave_the_law_invariant_whatever_the_flow(name, num_steps, x64):
    law, matrix = target(bits())[ends()], law_of_moves(flows()[name], num_steps)
    np.testing.assert_allclose(law, np.exp(-ENERGIES) / np.exp(-ENERGIES).sum(), rtol=1e-12)
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0, atol=1e-12)
    np.testing.assert_allclose(law @ matrix, law, atol=1e-14)
    is_independent = np.abs(matrix - law).max() < 1e-12
    assert is_independent == (name == "exact" and num_steps == NUM_BITS)
    if is_independent:
        # Then the expected gradient is that of the likelihood.
        gradient = jax.grad(lambda e: DATA_LAW @ e + jax.nn.logsumexp(-e))(jnp.asarray(ENERGIES))
        np.testing.assert_allclose(DATA_LAW - DATA_LAW @ matrix, gradient, atol=1e-12)


@pytest.mark.parametrize(("name", "num_steps"), [("exact", 3), ("exact", 1), ("random", 2)])
def test_the_gradient_of_the_energy_has_the_expectation_of_the_moves(name, num_steps):
    tables, (states, index) = flows()[name], data()
    gradient, (carry, metrics) = compiled()(
        params_of(tables), carry_of(BATCH), KEYS, states, num_steps
    )
    data_law = np.bincount(index, minlength=8) / BATCH
    law = data_law @ law_of_moves(tables, num_steps)
    assert negatives_fit(gradient["energy"], index, law) > FIVE_SIGMA
    # The planted bugs: the wrong sign, every move accepted.
    assert negatives_fit(-gradient["energy"], index, law) < FIVE_SIGMA
    untested = data_law @ law_of_moves(tables, num_steps, is_tested=False)
    fits_untested = negatives_fit(gradient["energy"], index, untested) > FIVE_SIGMA
    assert fits_untested == (name == "exact")  # which accepts every move
    assert (carry[0] == 1).all()
    assert metrics["steps_back"] == num_steps
    assert metrics["energy_gap"] == pytest.approx(float(gradient["energy"] @ ENERGIES), abs=1e-4)
    if name == "exact":
        assert metrics["acceptance_rate"] == pytest.approx(1.0, abs=1e-5)
    else:
        assert 0.1 < metrics["acceptance_rate"] < 0.95
    assert 0.0 < metrics["share_moved"] < 1.0


def flow_gradient(params, states):
    """Of trajectory balance alone, with the same trajectories."""
    environment, policy = tabular(bits())
    flow_keys = jax.vmap(jax.random.split, out_axes=1)(KEYS)[1]
    energies = params["energy"]
    sampler = mixed_sampler(
        [
            (forward_sampler(environment, policy, reward_params=energies), 1),
            (backward_sampler(environment, policy, reward_params=energies), 1),
        ]
    )
    objective = trajectory_balance(environment, policy, sampler=sampler, chunk_size=512)
    own = {name: params[name] for name in ("policy", "log_z")}
    return jax.jit(jax.grad(lambda p: objective.loss(p, carry_of(BATCH)[1], flow_keys, states)[0]))(
        own
    )


def leaking_sampler(parts):
    """Rewards of trajectories pass their gradient to the energy."""
    inner = mixed_sampler(parts)

    def sample(params, carry, keys, batch):
        t, carry, metrics = inner.sample(params, carry, keys, batch)
        log_reward = jax.vmap(bits().log_reward, (None, 0))(params["energy"], t.terminal)
        return t._replace(log_reward=log_reward), carry, metrics

    return inner._replace(sample=sample)


def test_neither_loss_reaches_the_other(monkeypatch):
    """The flow's gradient is that of trajectory balance, the energy's is that of counts."""
    params, (states, index) = params_of(flows()["random"]), data()
    law = np.bincount(index, minlength=8) / BATCH @ law_of_moves(flows()["random"], 2)
    arguments = params, carry_of(BATCH), KEYS, states, 2
    gradient, _ = compiled()(*arguments)
    expected = flow_gradient(params, states)
    close = functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-4)
    jax.tree.map(close, {name: gradient[name] for name in expected}, expected)
    assert np.abs(expected["policy"]["forward"]).max() > 0.01
    # The planted bug: the energy is no constant in the flow's loss.
    monkeypatch.setitem(energy_based_flow.__globals__, "mixed_sampler", leaking_sampler)
    leaking, _ = gradient_fn()(*arguments)
    assert negatives_fit(leaking["energy"], index, law) < FIVE_SIGMA


def test_devices_share_the_batch():
    params, states = params_of(flows()["random"]), data()[0]
    expected = compiled()(params, carry_of(BATCH), KEYS, states, 2)
    parts = [
        compiled()(params, carry_of(BATCH // 2), keys, batch, 2)
        for keys, batch in zip(
            KEYS.reshape(2, -1),
            (
                jax.tree.map(lambda x, part=part: x.reshape(2, -1, *x.shape[1:])[part], states)
                for part in (0, 1)
            ),
            strict=True,
        )
    ]
    close = functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-4)
    for get in (lambda part: part[0], lambda part: part[1][1]):
        mean = jax.tree.map(lambda a, b: 0.5 * (a + b), *map(get, parts))
        jax.tree.map(close, mean, get(expected))


def test_the_schedule_of_moves_reaches_the_whole_length():
    schedule = rising_steps(16, 1000)
    steps = np.asarray(jax.vmap(schedule)(jnp.arange(1200)))
    exact = np.clip(16 * np.arange(1, 1201) // 1000, 1, 16)
    np.testing.assert_array_equal(steps, exact)
    assert rising_steps(5, 0)(jnp.asarray(0)) == 5
    with pytest.raises(ValueError, match="most is 0"):
        rising_steps(0, 5)
    with pytest.raises(ValueError, match="num_steps is 0"):
        energy_based_flow(*tabular(bits()), num_steps=0)


# The recipe.


@pytest.fixture(autouse=True)
def _fewer_sweeps(monkeypatch):
    """Small lattices need few."""
    monkeypatch.setattr(eb_gfn, "_NUM_SWEEPS", 100)


@functools.cache
def draws():
    return eb_gfn.ising_samples(jax.random.key(3), 4, 0.2, 4000)


def test_data_and_the_exact_law_have_the_coupling_of_the_recipe():
    truth = eb_gfn.true_couplings(4, 0.2)
    upper = np.triu_indices(16, 1)
    observed = eb_gfn._mean_products(draws())[truth[upper] > 0].mean()

    def z(coupling):
        """Mean correlation of neighbours, in standard errors over draws."""
        law, _ = eb_gfn.exact_law(eb_gfn.true_couplings(4, coupling)[upper], 16)
        products = eb_gfn._pair_products(16)[:, truth[upper] > 0].mean(axis=1)
        mean = law @ products
        return (observed - mean) / np.sqrt((law @ products**2 - mean**2) / len(draws()))

    assert abs(z(0.2)) < 5.0
    # The planted bug: a bond that counts once.
    assert abs(z(0.1)) > 5.0


def test_newton_finds_the_largest_likelihood():
    some = draws()[:, :9]
    law, _ = eb_gfn.exact_law(eb_gfn.maximum_likelihood(some), 9)
    mean = law @ eb_gfn._pair_products(9)
    np.testing.assert_allclose(mean, eb_gfn._mean_products(some), atol=1e-9)
    with pytest.raises(ValueError, match="have 36 spins"):
        eb_gfn.maximum_likelihood(np.zeros((3, 36)))
    with pytest.raises(ValueError, match="always or never agree"):
        eb_gfn.maximum_likelihood(np.zeros((3, 4)))


@pytest.mark.parametrize(
    ("side", "coupling"), [(3, -0.2), (3, 0.25)], ids=["frustrated", "tempered"]
)
def test_data_of_odd_sides_and_of_strong_bonds_have_their_law(side, coupling):
    upper = np.triu_indices(side**2, 1)
    truth = eb_gfn.true_couplings(side, coupling)[upper]
    law, _ = eb_gfn.exact_law(truth, side**2)
    products = eb_gfn._pair_products(side**2)
    mean = law @ products
    observed = eb_gfn._mean_products(eb_gfn.ising_samples(jax.random.key(1), side, coupling, 2000))
    z = (observed - mean) / np.sqrt((1.0 - mean**2) / 2000)
    assert np.abs(z).max() < 5.0
    # The planted bug: a bond that counts once.
    half = eb_gfn.exact_law(truth / 2, side**2)[0] @ products
    assert np.abs((observed - half) / np.sqrt((1.0 - half**2) / 2000)).max() > 5.0


def test_tempered_data_have_the_correlation_of_the_exact_log_z():
    side, bond, step = 8, 0.6, 1e-3
    x = eb_gfn.ising_samples(jax.random.key(2), side, bond / 2, 200)
    spins = 2.0 * x.reshape(-1, side, side) - 1.0
    products = (spins * np.roll(spins, 1, axis=1)).mean(axis=(1, 2))
    log_z = [ising_lattice((side, side), coupling=bond + h).log_z for h in (-step, step)]
    exact = (log_z[1] - log_z[0]) / (2 * step) / (2 * side**2)
    assert abs(products.mean() - exact) < 5.0 * products.std() / np.sqrt(len(products))


def test_replicas_dissolve_the_stripes_that_chains_fall_into(monkeypatch):
    def share_of_stripes():
        x = eb_gfn.ising_samples(jax.random.key(2), 10, 0.5, 400)
        return np.mean(np.abs(2.0 * x.mean(axis=1) - 1.0) < 0.5)

    assert share_of_stripes() == 0.0  # a stripe has 20 bonds against it, each worth 2
    # The planted bug: one chain. Of 200 draws 0.075 were striped; 0.03 is 3.4 standard errors off.
    monkeypatch.setattr(eb_gfn, "_WEAK_BOND", 1.0)
    assert share_of_stripes() > 0.03


def test_the_pseudolikelihood_is_that_of_the_objectives(x64):
    some = draws()[:50, :6]
    couplings = np.random.default_rng(0).normal(size=15) / 5
    spins = 2.0 * some.astype(float) - 1.0

    def loss(couplings):
        def of_one(x):
            return pseudolikelihood_loss(flip_differences(eb_gfn._energy, couplings, x))

        return jax.vmap(of_one)(jnp.asarray(some, float)).mean()

    matrix = np.asarray(eb_gfn.coupling_matrix(jnp.asarray(couplings), 6))
    value, gradient = eb_gfn._pseudo_log_likelihood(matrix, spins)
    expected, slope = jax.value_and_grad(loss)(jnp.asarray(couplings))
    assert -value == pytest.approx(float(expected))
    np.testing.assert_allclose(-gradient[np.triu_indices(6, 1)], slope, rtol=1e-6)
    best = eb_gfn.maximum_pseudolikelihood(some)
    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(best)), 0.0, atol=1e-5)
    is_free = np.arange(15) % 2 == 0
    held = eb_gfn.maximum_pseudolikelihood(some, is_free)
    assert not held[~is_free].any()
    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(held))[is_free], 0.0, atol=1e-5)


def test_the_refit_on_the_support_is_nearer_than_all_couplings():
    truth = eb_gfn.true_couplings(4, 0.2)
    everything = eb_gfn.maximum_pseudolikelihood(draws())
    found = eb_gfn.support(everything, len(draws()))
    np.testing.assert_array_equal(found, truth[np.triu_indices(16, 1)] != 0)
    refit = eb_gfn.maximum_pseudolikelihood(draws(), found)
    near, far = (eb_gfn._negative_log_rmse(one, truth) for one in (refit, everything))
    # 32 of 120 couplings carry noise in place of all: log √(120 / 32) = 0.66, and half of it.
    assert near > far + 0.3
    # Without couplings beyond the noise, all are 0.
    nothing = np.random.default_rng(0).normal(scale=0.001, size=120)
    assert not eb_gfn.support(nothing, len(draws())).any()


def test_a_random_order_has_even_places():
    config = EBGFlowNetConfig(order="random_order", hidden_features=(8,))
    energy = Energy(init=lambda key, x: jnp.zeros(()), apply=lambda params, x: x.sum())
    method = eb_gfn_method.make_method(config, energy, 4)
    environment, policy = method.flow.flow
    params = method.init(jax.random.key(0))
    params = jax.tree.map(
        lambda leaf: leaf + 0.3 * jnp.arange(leaf.size).reshape(leaf.shape), params
    )
    state = SequenceState(jnp.array([2, 1, 2, 2]), jnp.array(False))
    output = policy.apply(
        params,
        environment.observe(state),
        environment.forward_mask(state),
        environment.backward_mask(state),
    )
    places = output.forward.probs().reshape(4, 2)
    np.testing.assert_allclose(places.sum(axis=1), [1 / 3, 0, 1 / 3, 1 / 3], rtol=1e-5)
    assert abs(places[0, 0] - places[0, 1]) > 0.01
    backward = output.backward.probs()
    np.testing.assert_allclose(backward[backward > 0], 1.0, rtol=1e-5)  # one place is full


TINY = {
    "num_examples": 1000,
    "num_held_out": 500,
    "num_steps": 150,
    "batch_size": 128,
    "learning_rate": 0.01,
    "rising_updates": 50,
    "hidden_features": (16,),
    "log_every": 50,
    "checkpoint_every": 150,
    "num_evaluated": 100,
    "ema_decay": 0.9,
}


@pytest.mark.parametrize("negatives", ["flow", "gibbs", "gibbs_with_gradients"])
def test_a_short_run_finds_couplings(negatives, monkeypatch):
    if negatives != "flow":
        monkeypatch.setattr(eb_gfn, "_MAX_EXACT_SPINS", 9)
    config = EBGFlowNetConfig(**TINY, negatives=negatives)
    run = build(config)
    state = train(run, config).state
    found = run.evaluate(jax.random.key(0), state)
    assert found["negative_log_rmse_of_zero"] == pytest.approx(-np.log(0.1))
    assert found["negative_log_rmse"] > found["negative_log_rmse_of_zero"] + 0.3
    assert found["negative_pseudo_log_likelihood"] < 0.75 * 16 * np.log(2.0)
    assert ("log_likelihood_gap" in found) == (negatives == "flow")
    assert (run.flow is not None) == (negatives == "flow") == ("log_z_error" in found)
    if negatives == "flow":
        assert found["log_likelihood_gap"] > 0.0
        assert 0.0 < found["kullback_leibler"] < 1.0
        assert np.isfinite(found["elbo_gap"])
        spins = run.sample(jax.random.key(1), state, 8)
        assert spins["spins"].shape == (8, 4, 4)
        assert set(np.unique(spins["spins"])) == {0.0, 1.0}
        assert set(run.figures(jax.random.key(2), state, spins)) == {"couplings"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"side": 2}, "side is 2"),
        ({"order": "prepend_append"}, "order is 'prepend_append'"),
        ({"negatives": "noise"}, "negatives is 'noise'"),
        ({"batch_size": 7}, "batch_size is 7"),
        ({"chain_steps": 0}, "chain_steps is 0"),
        ({"hidden_features": ()}, "hidden_features is"),
    ],
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        EBGFlowNetConfig(**settings)
