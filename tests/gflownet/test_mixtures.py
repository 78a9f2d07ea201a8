"""Mixtures of Beta and von Mises laws, and laws over an index and a value."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from gflownet.distributions import MaskedCategorical
from gflownet.distributions_continuous import BetaMixture, ChartedLaw, VonMisesMixture
from gflownet.policies import mixture_policy
from gflownet.types import Action, Chart, ChartedObservation

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(2, 3))
ALPHA, BETA = 1.0 + RNG.exponential(3.0, (2, 2, 3))
MEAN, KAPPA = RNG.uniform(-4, 4, (2, 3)), RNG.exponential(3.0, (2, 3))
# Regular, at and near 1, below 1, far from symmetric.
BETAS = [(1, 1), (1.0005, 3), (2.5, 1.5), (1.2, 80), (60, 70), (0.5, 0.7), (0.8, 4)]
CONCENTRATIONS = [1e-3, 0.3, 0.7, 6.0, 90.0]


def array(x):
    return jnp.asarray(x, jnp.float32)


def mixture_of(kind, parameters):
    laws = {"beta": BetaMixture, "von_mises": VonMisesMixture}
    return laws[kind](*[array(leaf) for leaf in parameters])


def plain(kind, parameters, r):
    """[D] log-densities by scipy in double precision, r [D]."""
    logits, one, two = parameters
    weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    if kind == "beta":
        parts = stats.beta.pdf(r[:, None], one, two)
    else:
        parts = 2 * np.pi * stats.vonmises.pdf(2 * np.pi * r[:, None] - one, two)
    return np.log((weights * parts).sum(axis=1))


CASES = {"beta": (LOGITS, ALPHA, BETA), "von_mises": (LOGITS, MEAN, KAPPA)}


@pytest.mark.parametrize("kind", CASES)
def test_density_and_its_gradient(kind):
    parameters = CASES[kind]
    points = RNG.uniform(0.01, 0.99, (20, 2))
    log_density = lambda p, r: mixture_of(kind, p).log_density(r)  # noqa: E731
    gradient = jax.jit(jax.grad(lambda p, r: log_density(p, r).sum()))
    for r in points:
        expected = plain(kind, parameters, r)
        np.testing.assert_allclose(log_density(parameters, array(r)), expected, atol=2e-4)
    for r in points[:5]:
        found = gradient(tuple(array(leaf) for leaf in parameters), array(r))
        for place in range(3):
            for entry in np.ndindex(2, 3):
                shifted = [[leaf.copy() for leaf in parameters] for _ in range(2)]
                shifted[0][place][entry] += 1e-5
                shifted[1][place][entry] -= 1e-5
                up, down = (plain(kind, each, r).sum() for each in shifted)
                assert found[place][entry] == pytest.approx((up - down) / 2e-5, abs=2e-3)


@pytest.mark.parametrize("kind", CASES)
def test_density_integrates_to_one(kind):
    r = (np.arange(4000) + 0.5) / 4000
    law = mixture_of(kind, CASES[kind])
    density = jnp.exp(jax.vmap(law.log_density)(array(np.stack([r, r], axis=1))))
    np.testing.assert_allclose(density.mean(axis=0), 1.0, atol=1e-3)


def p_values(draws, cdfs):
    return np.array([stats.kstest(np.float64(d), cdf).pvalue for d, cdf in zip(draws.T, cdfs)])  # noqa: B905


@pytest.mark.parametrize("kind", CASES)
def test_draws(kind):
    # One component a coordinate, and one coordinate that mixes two.
    if kind == "beta":
        one, two = np.array(BETAS).T
        cdfs = [stats.beta(a, b).cdf for a, b in BETAS]
    else:
        one, two = np.linspace(-3, 9, len(CONCENTRATIONS)), np.array(CONCENTRATIONS)
        # The angle to the mean in [-1/2, 1/2] turns.
        cdfs = [lambda r, k=k: stats.vonmises.cdf(2 * np.pi * r, k) for k in CONCENTRATIONS]
    law = mixture_of(kind, (np.zeros((len(one), 1)), one[:, None], two[:, None]))
    draws = np.asarray(jax.jit(jax.vmap(law.sample))(jax.random.split(jax.random.key(3), 4000)))
    if kind == "von_mises":
        assert ((draws >= 0) & (draws <= 1)).all()
        turned = draws - one / (2 * np.pi)
        draws = turned - np.round(turned)
    assert (p_values(draws, cdfs) > 1e-4).all()
    # The planted bug: the law of the next coordinate.
    assert (p_values(draws, cdfs[1:] + cdfs[:1]) < 1e-4).all()


def test_draws_of_a_mixture():
    law = mixture_of("beta", ([[np.log(3.0), 0.0]], [[20.0, 2.0]], [[2.0, 20.0]]))
    draws = np.asarray(jax.jit(jax.vmap(law.sample))(jax.random.split(jax.random.key(0), 4000)))
    cdf = lambda r: 0.75 * stats.beta(20, 2).cdf(r) + 0.25 * stats.beta(2, 20).cdf(r)  # noqa: E731
    assert stats.kstest(np.float64(draws[:, 0]), cdf).pvalue > 1e-4


# Index 0 has one free coordinate, 1 two, 2 none.
CHART = Chart(
    low=array([[0.2, 0.5], [0.1, 0.3], [0.0, 0.0]]),
    width=array([[0.3, 0.0], [0.5, 0.25], [0.0, 0.0]]),
    log_scale=array([np.log(2.0), 0.7, 0.0]),
)


def law_of(mask=(True, True, True)):
    index = MaskedCategorical(array([0.3, -0.4, 0.9]), jnp.array(mask))
    return ChartedLaw(index, mixture_of("beta", CASES["beta"]), CHART)


def test_index_and_value_have_probability_one_in_all():
    law = law_of()
    middles = (np.arange(200) + 0.5) / 200
    mass = jnp.exp(law.log_prob(Action(jnp.int32(2), jnp.zeros(2))))
    one = 0.2 + 0.3 * middles
    values = array(np.stack([one, np.full(200, 0.5)], axis=1))
    log_prob = jax.jit(jax.vmap(lambda i, v: law.log_prob(Action(i, v))))
    # A unit of value has the measure exp(log_scale).
    mass += 2.0 * 0.3 * jnp.exp(log_prob(jnp.zeros(200, jnp.int32), values)).mean()
    x, y = np.meshgrid(0.1 + 0.5 * middles, 0.3 + 0.25 * middles)
    values = array(np.stack([x.ravel(), y.ravel()], axis=1))
    ones = jnp.ones(len(values), jnp.int32)
    mass += np.exp(0.7) * 0.5 * 0.25 * jnp.exp(log_prob(ones, values)).mean()
    assert mass == pytest.approx(1.0, abs=2e-3)


@pytest.mark.parametrize(
    ("index", "value"),
    [(0, [0.6, 0.5]), (0, [0.3, 0.51]), (1, [0.05, 0.4]), (2, [0.1, 0.0])],
)
def test_values_outside_of_their_chart_have_no_probability(index, value):
    assert law_of().log_prob(Action(jnp.int32(index), array(value))) == -jnp.inf


def test_determined_coordinates_have_no_density():
    law, action = law_of(), Action(jnp.int32(0), array([0.3, 0.5]))
    other = law._replace(unit=law.unit._replace(alpha=law.unit.alpha.at[1].add(3.0)))
    assert other.log_prob(action) == law.log_prob(action)
    both = Action(jnp.int32(1), array([0.3, 0.4]))
    assert other.log_prob(both) != law.log_prob(both)


def test_certainty():
    assert law_of((False, False, True)).is_certain()
    assert law_of((False, False, False)).is_certain()
    assert not law_of((True, False, False)).is_certain()
    assert not law_of((False, True, True)).is_certain()


def test_exploration_changes_draws_and_not_probabilities():
    law = law_of((True, True, False))
    keys = jax.random.split(jax.random.key(5), 4000)
    draw = jax.jit(lambda epsilon: jax.vmap(law.explore(epsilon).sample)(keys))
    share = float(law.which.probs()[0])
    for epsilon in (0.0, 0.5, 1.0):
        actions = jax.tree.map(np.asarray, draw(epsilon))
        expected = (1 - epsilon) * share + epsilon * 0.5
        error = np.sqrt(expected * (1 - expected) / 4000)
        assert abs((actions.which == 0).mean() - expected) < 5 * error
        r = (np.float64(actions.value[actions.which == 1, 1]) - 0.3) / 0.25
        p_value = stats.kstest(r, "uniform").pvalue
        assert p_value > 1e-4 if epsilon == 1.0 else p_value < 0.01
    action = Action(jnp.int32(1), array([0.3, 0.4]))
    assert law.explore(0.5).log_prob(action) == law.log_prob(action)


def test_policy_without_learned_backward_law_is_uniform():
    observation = ChartedObservation(jnp.ones(3), CHART, CHART)
    mask = jnp.array([True, True, False])
    for family in ("beta", "von_mises"):
        policy = mixture_policy(3, 2, (4,), family=family, backward="uniform", with_flow=True)
        params = policy.init(jax.random.key(0), observation)
        output = policy.apply(params, observation, mask, mask)
        value = output.backward.log_prob(Action(jnp.int32(1), array([0.3, 0.4])))
        assert value == pytest.approx(np.log(0.5 / (0.5 * 0.25)) - 0.7, abs=1e-5)
        assert output.log_flow.shape == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": "normal"}, "family is 'normal'"),
        ({"backward": "free"}, "backward is 'free'"),
        ({"num_components": 0}, "num_components is 0"),
        ({"value_dim": 0}, "value_dim is 0"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        mixture_policy(**{"num_actions": 2, "value_dim": 1, **options})
