"""The masked categorical: what it draws, what it scores, and its gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gflownet import MaskedCategorical

FIVE_SIGMA = 2 * stats.norm.sf(5)
SIZE = 6
LOGITS = jnp.array([0.3, -1.0, 2.0, 0.0, 5.0, -0.5])
MASK = jnp.array([True, True, False, True, False, True])


@jax.jit
def draw(logits, mask, epsilon, seed):
    law = MaskedCategorical(logits, mask).explore(epsilon)
    keys = jax.random.split(jax.random.key(seed), 20_000)
    return jnp.bincount(jax.vmap(law.sample)(keys), length=SIZE + 1), law.probs()


def expected_probs(logits, mask, epsilon):
    mask = np.asarray(mask)
    weights = np.where(mask, np.exp(np.asarray(logits, np.float64)), 0.0)
    return (1 - epsilon) * weights / weights.sum() + epsilon * np.asarray(mask, float) / np.sum(
        mask
    )


@pytest.mark.parametrize("epsilon", [0.0, 0.25, 1.0])
def test_frequencies(epsilon):
    counts, probs = map(np.asarray, draw(LOGITS, MASK, epsilon, 0))
    mask = np.asarray(MASK)
    expected = expected_probs(LOGITS, MASK, epsilon)
    np.testing.assert_allclose(probs, expected, atol=1e-6)
    assert counts[:SIZE][~mask].sum() + counts[SIZE] == 0

    def fit(law):
        return stats.chisquare(counts[:SIZE][mask], 20_000 * law / law.sum()).pvalue

    assert fit(expected[mask]) > FIVE_SIGMA
    # The planted bugs: another share of exploration, actions off by one.
    assert fit(expected_probs(LOGITS, MASK, abs(epsilon - 0.1))[mask]) < FIVE_SIGMA
    if epsilon < 1.0:
        assert fit(np.roll(expected[mask], 1)) < FIVE_SIGMA


def test_a_draw_is_the_inverse_of_its_number():
    law = MaskedCategorical(LOGITS, MASK)
    keys = jax.random.split(jax.random.key(3), 100)
    drawn = jax.vmap(law.sample)(keys)
    numbers = jax.vmap(jax.random.uniform)(keys)
    np.testing.assert_array_equal(jax.vmap(law.invert)(numbers), drawn)
    assert len(np.unique(drawn)) > 2
    below = np.cumsum(expected_probs(LOGITS, MASK, 0.0))
    for number in (0.0, *(below[[0, 1, 3]] + 1e-5), 1.0 - 2.0**-24):
        first = np.flatnonzero(np.asarray(MASK) & (below > number))
        assert law.invert(jnp.float32(number)) == (first[0] if len(first) else SIZE - 1)


extreme = st.one_of(st.floats(-5, 5), st.sampled_from([-1e30, -1e4, -100.0, 100.0, 1e4, 1e30]))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    logits=st.lists(extreme, min_size=SIZE, max_size=SIZE),
    mask=st.lists(st.booleans(), min_size=SIZE, max_size=SIZE).filter(any),
    epsilon=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    forbidden=st.sampled_from([0.0, 1e30, -np.inf, np.inf]),
)
def test_forbidden_actions_are_never_drawn(logits, mask, epsilon, forbidden):
    mask = np.array(mask)
    logits = np.where(mask, np.array(logits, np.float32), np.float32(forbidden))
    counts, probs = map(np.asarray, draw(logits, mask, epsilon, 1))
    assert counts.sum() == 20_000
    assert counts[SIZE] == 0
    assert not counts[:SIZE][~mask].any()
    assert np.isfinite(probs).all()
    assert not probs[~mask].any()
    assert probs.sum() == pytest.approx(1.0, abs=1e-5)
    # Inversion at the ends of the unit interval: no draw of probability 0.
    assert not counts[:SIZE][probs == 0].any()


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-23])
@pytest.mark.parametrize("size", [6, 40, 1000])
def test_ends_of_the_unit_interval(monkeypatch, size, uniform):
    monkeypatch.setattr(
        jax.random, "uniform", lambda key, shape=(), dtype=jnp.float32: jnp.asarray(uniform, dtype)
    )
    rng = np.random.default_rng(0)
    masks = rng.random((200, size)) < 0.5
    masks[:, size // 2] = True
    masks[:, [0, -1]] = False
    logits = rng.standard_normal((200, size)).astype(np.float32)
    drawn = jax.vmap(lambda row, m: MaskedCategorical(row, m).sample(jax.random.key(0)))(
        logits, masks
    )
    assert masks[np.arange(200), np.asarray(drawn)].all()
    expected = masks.argmax(1) if uniform == 0 else size - 1 - masks[:, ::-1].argmax(1)
    np.testing.assert_array_equal(drawn, expected)


def test_log_prob_ignores_exploration():
    law = MaskedCategorical(LOGITS, MASK)
    expected = np.log(expected_probs(LOGITS, MASK, 0.0)[np.asarray(MASK)])
    for epsilon in (0.0, 0.5, 1.0):
        explored = law.explore(epsilon)
        np.testing.assert_array_equal(explored.log_probs(), law.log_probs())
        actual = jax.vmap(explored.log_prob)(jnp.arange(SIZE))
        np.testing.assert_allclose(actual[MASK], expected, atol=1e-6)
        assert (actual[~MASK] == -jnp.inf).all()
    # Control: what is drawn does change.
    assert not np.allclose(law.explore(0.5).probs(), law.probs(), atol=0.01)


@pytest.mark.parametrize("count", range(SIZE + 1))
def test_certainty(count):
    law = MaskedCategorical(LOGITS, jnp.arange(SIZE) < count)
    assert bool(law.is_certain()) == (count <= 1)
    if count == 1:
        assert law.log_prob(0) == 0.0
        assert not jax.grad(lambda row: law._replace(logits=row).log_prob(0))(LOGITS).any()


def test_gradients_are_finite_with_empty_rows():
    masks = jnp.array([MASK, jnp.zeros(SIZE, bool), jnp.arange(SIZE) == 2])
    logits = jnp.stack([LOGITS, LOGITS.at[0].set(jnp.inf), LOGITS.at[1].set(-jnp.inf)])
    actions = jnp.array([1, 0, 2])

    def total(logits):
        log_prob = jax.vmap(lambda row, m, a: MaskedCategorical(row, m).log_prob(a))(
            logits, masks, actions
        )
        return jnp.where(masks.any(axis=1), log_prob, 0.0).sum()

    value, gradient = jax.value_and_grad(total)(logits)
    assert np.isfinite(value)
    probs = expected_probs(LOGITS, MASK, 0.0)
    np.testing.assert_allclose(gradient[0], np.eye(SIZE)[1] - probs, atol=1e-6)
    assert not gradient[1:].any()


def test_empty_rows_have_no_probability():
    law = MaskedCategorical(LOGITS, jnp.zeros(SIZE, bool))
    assert not law.probs().any()
    assert not law.explore(1.0).probs().any()
    assert (law.log_probs() == -jnp.inf).all()


@pytest.mark.parametrize("mask", [MASK, jnp.zeros(SIZE, bool), jnp.arange(SIZE) == 2])
def test_no_logits_are_equal_logits(mask):
    uniform, zeros = MaskedCategorical(None, mask), MaskedCategorical(jnp.zeros(SIZE), mask)
    np.testing.assert_allclose(uniform.log_probs(), zeros.log_probs(), rtol=1e-6)
    np.testing.assert_allclose(uniform.probs(), zeros.probs(), rtol=1e-6)
    actions = jnp.arange(SIZE)
    np.testing.assert_allclose(
        jax.vmap(uniform.log_prob)(actions), jax.vmap(zeros.log_prob)(actions), rtol=1e-6
    )
    keys = jax.random.split(jax.random.key(0), 200)
    assert (jax.vmap(uniform.sample)(keys) == jax.vmap(zeros.sample)(keys)).all()
    behaved = [law.behave(LOGITS).explore(0.3).probs() for law in (uniform, zeros)]
    np.testing.assert_allclose(*behaved, rtol=1e-6)
