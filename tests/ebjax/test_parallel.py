"""The seam to the devices: values come back as they went in, and wrong calls are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.parallel import AXIS_NAME, data_parallel, on_accelerator, spread, to_host

BACKENDS = ("pmap", "shard_map")


def _program(num_devices, backend):
    def step(replicated, split, constant):
        total = jax.lax.psum(split["x"].sum(), AXIS_NAME)
        split = {**split, "x": split["x"] + constant}
        return {**replicated, "w": replicated["w"] + total}, split, {"total": total}

    return data_parallel(step, devices=jax.devices()[:num_devices], backend=backend)


def _values():
    replicated = {"w": np.float32(1.5), "key": jax.random.key(3), "n": np.arange(3, dtype=np.int32)}
    split = {
        "x": np.arange(16, dtype=np.float32).reshape(8, 2),
        "keys": jax.random.split(jax.random.key(1), 8),
    }
    return replicated, split


def _plain(tree):
    return jax.tree.map(
        lambda x: np.asarray(
            jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        ),
        tree,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_devices", [1, 2, 8])
def test_placing_and_collecting_is_the_identity(num_devices, backend):
    program = _program(num_devices, backend)
    back = program.collect(*program.place(*_values()))
    for expected, found in zip(
        jax.tree.leaves(_plain(_values())), jax.tree.leaves(_plain(back)), strict=True
    ):
        assert expected.dtype == found.dtype
        np.testing.assert_array_equal(expected, found)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_devices", [1, 2, 8])
def test_a_step_sees_its_part_and_the_sum_of_all(num_devices, backend):
    program = _program(num_devices, backend)
    assert program.num_devices == num_devices
    given = _values()
    placed = program.place(*given)
    constant = program.place_constant(jnp.float32(0.5))
    replicated, split, metrics = program.step(*placed, constant)
    replicated, split, metrics = program.step(replicated, split, constant)  # constants are kept
    replicated, split = program.collect(replicated, split)
    first, second = 120.0, 128.0
    assert float(replicated["w"]) == 1.5 + first + second
    assert float(jax.device_get(metrics["total"])) == second
    np.testing.assert_array_equal(split["x"], given[1]["x"] + 1.0)
    np.testing.assert_array_equal(
        given[1]["x"], _values()[1]["x"]
    )  # what was given is the caller's


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend is 'tpu'; it must be one of pmap, shard_map"):
        data_parallel(lambda r, s, c: (r, s, {}), backend="tpu")


@pytest.mark.parametrize("num_devices", [1, 2, 8])
def test_spread_is_the_function(num_devices):
    def fn(scale, x):
        return (scale * x).T  # the split axis becomes the second one

    x = jnp.arange(24.0).reshape(8, 3)
    spread_fn = spread(fn, num_devices, split_axis_out=1)
    np.testing.assert_array_equal(spread_fn(2.0, x), fn(2.0, x))
    np.testing.assert_array_equal(jax.jit(spread_fn)(2.0, x), fn(2.0, x))


def test_spread_over_devices_that_do_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"num_devices is 9, and this process has 8 cpu devices"):
        spread(lambda replicated, split: split, 9)


def test_to_host_keeps_keys():
    tree = to_host({"key": jax.random.key(5), "x": jnp.ones(2)})
    assert isinstance(tree["x"], np.ndarray)
    assert jax.random.key_data(tree["key"]).tolist() == [0, 5]


@pytest.mark.parametrize("nothing", [(), {"a": (), "b": None}])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_devices", [1, 2])
def test_a_step_may_have_nothing_to_split(num_devices, backend, nothing):
    def step(replicated, split, constant):
        assert jax.tree.structure(split) == jax.tree.structure(nothing)
        return replicated + jax.lax.psum(constant, AXIS_NAME), split, {}

    program = data_parallel(step, devices=jax.devices()[:num_devices], backend=backend)
    placed = program.place(np.float32(1.0), nothing)
    for _ in range(2):
        *placed, _ = program.step(*placed, program.place_constant(jnp.float32(0.5)))
    replicated, split = program.collect(*placed)
    assert replicated == 1.0 + 2 * 0.5 * num_devices
    assert split == nothing


def test_an_accelerator_is_what_programs_run_on_by_default(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert on_accelerator()
    with jax.default_device(jax.devices("cpu")[0]):
        assert not on_accelerator()
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert not on_accelerator()
