"""Energies of energies against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.energies import condition, mixture, negate, sum_of, temper


def quadratic(params, x, *context):
    return 0.5 * jnp.sum(jnp.square(x - params)) + sum(context)


def quartic(params, x, *context):
    return params * jnp.sum(x**4) - 2.0 * sum(context)


PARAMS = (jnp.array([0.3, -0.5]), jnp.array(0.7))
X = jnp.array([1.1, -0.4])
E1, E2 = quadratic(PARAMS[0], X), quartic(PARAMS[1], X)

# name -> the composed energy, its params, its value from E1 and E2
COMPOSED = {
    "sum": (lambda: sum_of(quadratic, quartic), PARAMS, lambda e1, e2: e1 + e2),
    "weighted_sum": (
        lambda: sum_of(quadratic, quartic, weights=(0.5, -3.0)),
        PARAMS,
        lambda e1, e2: 0.5 * e1 - 3.0 * e2,
    ),
    "sum_of_one": (lambda: sum_of(quadratic, weights=[2.0]), PARAMS[:1], lambda e1, e2: 2.0 * e1),
    "mixture": (
        lambda: mixture(quadratic, quartic),
        PARAMS,
        lambda e1, e2: -jnp.log(jnp.exp(-e1) + jnp.exp(-e2)),
    ),
    "weighted_mixture": (
        lambda: mixture(quadratic, quartic, weights=(0.2, 3.0)),
        PARAMS,
        lambda e1, e2: -jnp.log(0.2 * jnp.exp(-e1) + 3.0 * jnp.exp(-e2)),
    ),
    "temper": (lambda: temper(quadratic, 2.5), PARAMS[0], lambda e1, e2: e1 / 2.5),
    "negate": (lambda: negate(quadratic), PARAMS[0], lambda e1, e2: -e1),
    "nested": (
        lambda: temper(sum_of(negate(quadratic), quartic), 0.5),
        PARAMS,
        lambda e1, e2: (e2 - e1) / 0.5,
    ),
}
each_composition = pytest.mark.parametrize("name", COMPOSED)


@each_composition
def test_value_and_gradients(name, x64):
    build, params, formula = COMPOSED[name]
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), params)

    def direct(params, x):
        first, second = params if isinstance(params, tuple) else (params,), (PARAMS[1],)
        first, second = (*first, *second)[:2]
        return formula(quadratic(first, x), quartic(second, x))

    x = jnp.asarray(X, float)
    ours = jax.value_and_grad(build(), (0, 1))(params, x)
    theirs = jax.value_and_grad(direct, (0, 1))(params, x)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@each_composition
def test_equal_compositions_are_equal(name):
    build = COMPOSED[name][0]
    assert build() == build()
    assert hash(build()) == hash(build())
    for other in COMPOSED:
        assert (build() == COMPOSED[other][0]()) == (name == other)


@each_composition
def test_all_get_the_same_context(name):
    build, params, formula = COMPOSED[name]
    context = (jnp.array(0.4), jnp.array(-0.1))
    expected = formula(E1 + sum(context), E2 - 2.0 * sum(context))
    np.testing.assert_allclose(build()(params, X, *context), expected, rtol=1e-6)
    # Bound or passed, in part or in whole.
    given = condition(build(), *context)
    np.testing.assert_allclose(given(params, X), expected, rtol=1e-6)
    in_part = condition(build(), context[0])
    np.testing.assert_allclose(in_part(params, X, context[1]), expected, rtol=1e-6)


def test_condition_binds_from_the_left():
    energy_fn = condition(lambda params, x, y, z: params * x + 10.0 * y + 100.0 * z, 1.0)
    assert energy_fn(2.0, 3.0, 4.0) == 6.0 + 10.0 + 400.0
    assert condition(quadratic, 1.0) == condition(quadratic, 1.0)
    assert condition(quadratic, 1.0) != condition(quadratic, 2.0)


def test_mixture_is_stable_where_one_component_is_out_of_reach():
    far = mixture(quadratic, quadratic)
    params = (jnp.zeros(2), jnp.full(2, 1e4))
    value, gradient = jax.value_and_grad(far, 1)(params, X)
    np.testing.assert_allclose(value, quadratic(0.0, X), rtol=1e-6)
    np.testing.assert_allclose(gradient, X, rtol=1e-6)


def test_mixture_of_normalised_energies_has_the_given_shares(x64):
    """w_i Z_i is the share: integrate the first component's half of the line."""

    def normalised(mean, x):
        return 0.5 * jnp.square(x - mean) + 0.5 * jnp.log(2.0 * jnp.pi)

    grid = jnp.linspace(-40.0, 40.0, 4001)
    energy_fn = mixture(normalised, normalised, weights=(0.25, 0.75))
    density = jnp.exp(-jax.vmap(energy_fn, (None, 0))((-15.0, 15.0), grid)) * (grid[1] - grid[0])
    np.testing.assert_allclose(density[grid < 0].sum(), 0.25, rtol=1e-10)
    np.testing.assert_allclose(density.sum(), 1.0, rtol=1e-10)


def test_a_traced_temperature_is_one_program():
    tempered = jax.jit(lambda temperature: temper(quadratic, temperature)(PARAMS[0], X))
    for temperature in (0.5, 4.0):
        np.testing.assert_allclose(tempered(temperature), E1 / temperature, rtol=1e-6)
    assert tempered._cache_size() == 1


def test_params_must_fit():
    with pytest.raises(ValueError, match="zip"):
        sum_of(quadratic, quartic)((1.0,), X)


ERRORS = {
    "no energies": (lambda: sum_of(), "No energy functions"),
    "no energies to mix": (lambda: mixture(), "No energy functions"),
    "too few weights": (lambda: sum_of(quadratic, quartic, weights=[1.0]), "1 weights for 2"),
    "too many weights": (lambda: mixture(quadratic, weights=[1.0, 2.0]), "2 weights for 1"),
    "zero weight": (lambda: mixture(quadratic, quartic, weights=[1.0, 0.0]), "positive"),
    "negative weight": (lambda: mixture(quadratic, weights=[-1.0]), "-1.0"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_value(name):
    build, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        build()
