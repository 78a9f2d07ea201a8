"""``bind``: functions with options, equal where the options are."""

import jax
import jax.numpy as jnp
import pytest

from ebjax.types import bind


def scaled(x, *, scale, shift=0.0):
    return scale * x + shift


def test_it_calls_as_partial_does():
    assert bind(scaled, scale=2.0)(3.0) == 6.0
    assert bind(scaled, scale=2.0)(3.0, shift=1.0) == 7.0


def test_equal_options_are_equal_and_hash_equal():
    first, second = bind(scaled, scale=2.0, shift=1.0), bind(scaled, shift=1.0, scale=2.0)
    assert first == second
    assert hash(first) == hash(second)
    assert len({first, second}) == 1


@pytest.mark.parametrize(
    "other",
    [bind(scaled, scale=3.0), bind(scaled, 2.0), bind(max, scale=2.0), scaled, None],
    ids=["option", "argument", "function", "unbound", "none"],
)
def test_different_ones_differ(other):
    assert bind(scaled, scale=2.0) != other


def test_it_nests():
    inner = bind(scaled, scale=2.0)
    assert bind(max, key=inner) == bind(max, key=bind(scaled, scale=2.0))
    assert bind(inner, shift=1.0) == bind(scaled, scale=2.0, shift=1.0)


def test_arrays_fall_back_to_identity():
    scale = jnp.ones(2)
    first, second = bind(scaled, scale=scale), bind(scaled, scale=scale)
    assert first == first
    assert first != second
    assert isinstance(hash(first), int)


def test_equal_functions_share_one_program():
    num_traces = 0

    def counted(x, *, scale):
        nonlocal num_traces
        num_traces += 1
        return scale * x

    apply = jax.jit(lambda fn, x: fn(x), static_argnums=0)
    for scale in (2.0, 2.0, 3.0, 2.0):
        assert apply(bind(counted, scale=scale), 1.0) == scale
    assert num_traces == 2
