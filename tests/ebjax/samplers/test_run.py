"""The runner against a plain loop, on any number of devices and inside other programs."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from ebjax.numerics import neighbouring_keys
from ebjax.parallel import spread
from ebjax.samplers import langevin, mala, run_chain, sample
from ebjax.samplers.reducers import moments
from ebjax.types import Kernel

KEY = jax.random.key(0)
KERNEL = mala(step_size=0.3)
START = jax.random.normal(jax.random.key(9), (8, 3))


def energy_fn(params, x):
    return jnp.sum(0.25 * x**4 - 0.5 * x**2 + params * x)


class WalkState(NamedTuple):
    position: jax.Array


class WalkInfo(NamedTuple):
    distance: jax.Array
    is_finite: jax.Array


def _walk_step(key, energy_fn, params, state):
    stride = jax.random.randint(key, state.position.shape, -9, 10).astype(state.position.dtype)
    position = state.position + params * stride
    return WalkState(position), WalkInfo(jnp.abs(stride).sum(), jnp.array(True))


# Whole numbers only: nothing rounds, so programs that XLA fuses in other ways agree to the bit.
WALK = Kernel(lambda energy_fn, params, position: WalkState(position), _walk_step)
WHOLE_START = jnp.arange(24.0).reshape(8, 3)


def chain_by_hand(step_key, kernel, params, position, num_steps):
    """All positions and infos of one chain, one call a step; ``step_key`` gives the key of t."""
    step = jax.jit(lambda key, state: kernel.step(key, energy_fn, params, state))
    state, positions, infos = kernel.init(energy_fn, params, position), [], []
    for t in range(num_steps):
        state, info = step(step_key(t), state)
        positions.append(np.asarray(state.position))
        infos.append(info)
    return np.stack(positions), jax.tree.map(lambda *leaves: np.stack(leaves), *infos)


def of_chain(c):
    return lambda t: neighbouring_keys(jax.random.fold_in(KEY, t), jnp.int32(c))


def of_step(t):
    return jax.random.fold_in(KEY, t)


@pytest.mark.parametrize(("thinning", "num_burn_in"), [(1, 0), (3, 0), (2, 5)])
def test_sample_is_the_plain_loop(thinning, num_burn_in):
    """Bit for bit: thinning and burn-in choose among the steps and change none of them."""
    options = {"num_samples": 4, "thinning": thinning, "num_burn_in": num_burn_in}
    draws = sample(KEY, WALK, energy_fn, 2.0, WHOLE_START, **options)
    for c in (0, 5):
        num_steps = num_burn_in + 4 * thinning
        positions, info = chain_by_hand(of_chain(c), WALK, 2.0, WHOLE_START[c], num_steps)
        kept = positions[num_burn_in:][thinning - 1 :: thinning]
        np.testing.assert_array_equal(draws.positions[:, c], kept)
        np.testing.assert_array_equal(draws.state.position[c], positions[-1])
        distance = info.distance[num_burn_in:].reshape(4, thinning).mean(1)
        np.testing.assert_allclose(draws.info.distance[:, c], distance, rtol=1e-6)
        assert np.all(draws.info.is_finite == 1.0)


@pytest.mark.parametrize("kernel", [langevin(step_size=0.05), KERNEL], ids=["langevin", "mala"])
def test_sample_and_run_chain_are_the_plain_loop(kernel, x64):
    """With kernels that round, so to rounding."""
    start, c = START.astype(jnp.float64), 5
    draws = sample(KEY, kernel, energy_fn, 0.3, start, num_samples=3, thinning=2, num_burn_in=1)
    positions, info = chain_by_hand(of_chain(c), kernel, 0.3, start[c], 7)
    np.testing.assert_allclose(draws.positions[:, c], positions[2::2], rtol=1e-11)
    norms = info.gradient_norm[1:].reshape(3, 2).mean(1)
    np.testing.assert_allclose(draws.info.gradient_norm[:, c], norms, rtol=1e-11)
    positions, info = chain_by_hand(of_step, kernel, 0.3, start[c], 7)
    state = kernel.init(energy_fn, 0.3, start[c])
    state, mean_info = run_chain(KEY, kernel, energy_fn, 0.3, state, 7)
    np.testing.assert_allclose(state.position, positions[-1], rtol=1e-11)
    np.testing.assert_allclose(mean_info.gradient_norm, info.gradient_norm.mean(), rtol=1e-11)


def test_run_chain_is_the_plain_loop_to_the_bit():
    positions, info = chain_by_hand(of_step, WALK, 2.0, WHOLE_START[3], 9)
    state, mean_info = run_chain(KEY, WALK, energy_fn, 2.0, WalkState(WHOLE_START[3]), 9)
    np.testing.assert_array_equal(state.position, positions[-1])
    np.testing.assert_allclose(mean_info.distance, info.distance.mean(), rtol=1e-6)


def test_the_number_of_chains_changes_no_chain():
    many = sample(KEY, WALK, energy_fn, 1.0, WHOLE_START, num_samples=5).positions
    few = sample(KEY, WALK, energy_fn, 1.0, WHOLE_START[:3], num_samples=5).positions
    np.testing.assert_array_equal(many[:, :3], few)
    strides = many[-1] - WHOLE_START
    assert len(np.unique(strides, axis=0)) == len(START), "chains share their noise"


@pytest.mark.parametrize("num_devices", [2, 8])
def test_the_number_of_devices_changes_nothing(num_devices):
    options = {"num_samples": 5, "thinning": 2, "num_burn_in": 3}
    programs = [(WALK, WHOLE_START, 0.0), (KERNEL, START, 1e-4)]
    for kernel, start, rtol in programs if num_devices == 2 else programs[:1]:
        one = sample(KEY, kernel, energy_fn, 0.5, start, **options)
        many = sample(KEY, kernel, energy_fn, 0.5, start, **options, num_devices=num_devices)
        assert jax.tree.structure(one) == jax.tree.structure(many)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
            np.testing.assert_allclose(a, b, rtol=rtol, atol=0.1 * rtol)
        assert len(many.positions.sharding.device_set) == num_devices


def test_the_device_check_sees_keys_by_local_index(monkeypatch):
    """The planted bug: each device counts its own chains from 0."""

    def forgetful(fn, num_devices, **options):
        def local(replicated, split):
            _, positions = split
            return fn(replicated, (jnp.arange(len(positions)), positions))

        return spread(local, num_devices, **options)

    monkeypatch.setitem(run_chain.__globals__, "spread", forgetful)
    one, two = (  # a number of samples that is not compiled yet
        sample(KEY, WALK, energy_fn, 1.0, WHOLE_START, num_samples=6, num_devices=n).positions
        for n in (1, 2)
    )
    assert not np.array_equal(one, two)


def test_shapes_and_memory():
    """What comes back grows with N and C, and neither with thinning nor with burn-in."""
    positions = {"a": jnp.zeros((4, 2, 3)), "b": jnp.zeros(4)}
    tree_energy = lambda params, x: 0.5 * jnp.sum(x["a"] ** 2) + 0.5 * x["b"] ** 2  # noqa: E731

    def run(**options):
        def call(key):
            return sample(key, KERNEL, tree_energy, (), positions, num_samples=7, **options)

        return jax.eval_shape(call, KEY), jax.jit(call).lower(KEY).compile()

    draws, program = run()
    shapes = jax.tree.map(lambda leaf: leaf.shape, draws)
    assert shapes.positions == {"a": (7, 4, 2, 3), "b": (7, 4)}
    assert set(shapes.info) == {(7, 4)}
    assert shapes.state.position == {"a": (4, 2, 3), "b": (4,)}
    assert draws.info.is_finite.dtype == jnp.float32  # the share of finite steps
    _, long_program = run(thinning=100, num_burn_in=1000)
    sizes = [p.memory_analysis().temp_size_in_bytes for p in (program, long_program)]
    assert sizes[1] < sizes[0] + 4096


def test_many_calls_trace_once():
    num_traces = 0

    def counted(params, x):
        nonlocal num_traces
        num_traces += 1
        return energy_fn(params, x)

    def call(seed, **options):
        kernel = mala(step_size=0.3)  # made anew, equal to the last
        key = jax.random.key(seed)
        return sample(key, kernel, counted, 0.1 * seed, START + seed, num_samples=2, **options)

    call(0)
    once = num_traces
    for seed in range(1, 5):
        call(seed)
    assert num_traces == once
    call(5, thinning=2)
    assert num_traces > once


ERRORS = {
    "no chain axis": (jnp.float32(1.0), {}, "leading axis of chains"),
    "no leaves": ((), {}, "leading axis of chains"),
    "no chains": (jnp.zeros((0, 2)), {}, "at least 1"),
    "unequal chains": ((jnp.zeros((3, 2)), jnp.zeros(4)), {}, r"\[3, 4\]"),
    "num_samples": (START, {"num_samples": 0}, "num_samples is 0"),
    "thinning": (START, {"thinning": -1}, "thinning is -1"),
    "num_burn_in": (START, {"num_burn_in": -2}, "num_burn_in is -2"),
    "num_devices": (START, {"num_devices": 0}, "num_devices is 0"),
    "batch_size": (START, {"batch_size": 0}, "batch_size is 0"),
    "does not divide": (START, {"num_devices": 3}, "num_devices is 3; it must divide the 8"),
    "too many": (jnp.zeros((16, 2)), {"num_devices": 16}, "num_devices is 16"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_value(name):
    positions, options, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        sample(KEY, KERNEL, energy_fn, 0.3, positions, **{"num_samples": 2, **options})


def test_inside_jit_vmap_scan_of_another_program():
    """One run for each of several keys and parameters, in a scan, equals the separate runs."""
    seeds, params = jnp.arange(2), jnp.array([0.1, 0.5, -0.4])

    def call(seed, params):
        key = jax.random.fold_in(KEY, seed)
        return sample(key, KERNEL, energy_fn, params, START, num_samples=3).positions

    @jax.jit
    def program(seeds):
        def body(carry, seed):
            return carry, jax.vmap(lambda p: call(seed, p))(params)

        return jax.lax.scan(body, (), seeds)[1]

    together = program(seeds)
    for i, seed in enumerate(seeds):
        for j, p in enumerate(params):
            np.testing.assert_allclose(together[i, j], call(seed, p), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map(check_vma):
    mesh = Mesh(np.array(jax.devices()[:2]), ("devices",))
    split = PartitionSpec("devices")

    def call(params, positions):
        return sample(KEY, KERNEL, energy_fn, params, positions, num_samples=3).positions[-1]

    def run(params, positions):
        state = KERNEL.init(energy_fn, params, positions[0])
        return run_chain(KEY, KERNEL, energy_fn, params, state, 3)[0].position[None]

    for fn in (call, run):
        sharded = jax.shard_map(
            fn, mesh=mesh, in_specs=(PartitionSpec(), split), out_specs=split, check_vma=check_vma
        )
        parts = [fn(0.3, START[:4]), fn(0.3, START[4:])]
        np.testing.assert_allclose(
            jax.jit(sharded)(0.3, START), jnp.concatenate(parts), rtol=1e-5, atol=1e-6
        )


def test_inside_pmap():
    def call(positions):
        return sample(KEY, KERNEL, energy_fn, 0.3, positions, num_samples=3).positions

    mapped = jax.pmap(call)(START.reshape(2, 4, 3))
    for i in range(2):
        alone = call(START.reshape(2, 4, 3)[i])
        np.testing.assert_allclose(mapped[i], alone, rtol=1e-5, atol=1e-6)


def test_gradients_through_twenty_langevin_steps(x64):
    """Against central differences, for parameters and start."""
    kernel = langevin(step_size=0.05)

    @jax.jit
    def end(params, position):
        state = kernel.init(energy_fn, params, position)
        state, _ = run_chain(KEY, kernel, energy_fn, params, state, 20)
        return jnp.sum(jnp.sin(state.position) * jnp.array([1.0, 2.0, -0.5]))

    params, position = jnp.array(0.3), jnp.array([0.4, -1.1, 0.9])
    by_params, by_position = jax.grad(end, (0, 1))(params, position)
    eps = 1e-5
    central = (end(params + eps, position) - end(params - eps, position)) / (2 * eps)
    np.testing.assert_allclose(by_params, central, rtol=1e-7)
    for i in range(3):
        shift = jnp.zeros(3).at[i].set(eps)
        central = (end(params, position + shift) - end(params, position - shift)) / (2 * eps)
        np.testing.assert_allclose(by_position[i], central, rtol=1e-7)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
@pytest.mark.parametrize("num_devices", [1, 2])
def test_the_batch_size_changes_nothing(batch_size, num_devices):
    options = {"num_samples": 3, "thinning": 2, "num_burn_in": 1, "num_devices": num_devices}
    whole = sample(KEY, WALK, energy_fn, 1.0, WHOLE_START, **options)
    parts = sample(KEY, WALK, energy_fn, 1.0, WHOLE_START, **options, batch_size=batch_size)
    chex.assert_trees_all_equal(whole, parts)


def test_progress_is_told_and_changes_nothing():
    reports = []

    def on_progress(done, total, info):
        reports.append((done, total, float(info.distance)))

    options = {"thinning": 2, "num_burn_in": 1, "reducers": {"moments": moments()}}
    silent = sample(KEY, WALK, energy_fn, 1.0, WHOLE_START, num_samples=50, **options)
    options["on_progress"] = on_progress
    told = sample(KEY, WALK, energy_fn, 1.0, WHOLE_START, num_samples=50, **options)
    chex.assert_trees_all_close(silent, told, rtol=1e-6)
    assert [done for done, _, _ in reports] == [*range(3, 49, 3), 50]
    np.testing.assert_allclose(reports[0][2], silent.info.distance[:3].mean(), rtol=1e-6)
    options["keep_positions"] = False
    nothing = sample(KEY, WALK, energy_fn, 1.0, WHOLE_START, num_samples=50, **options)
    np.testing.assert_allclose(nothing.info.distance, silent.info.distance.mean(0), rtol=1e-6)


def test_memory_without_positions_does_not_grow():
    def size(num_samples):
        def call(key):
            return sample(
                key,
                KERNEL,
                energy_fn,
                0.3,
                START,
                num_samples=num_samples,
                keep_positions=False,
                reducers={"moments": moments()},
            )

        analysis = jax.jit(call).lower(KEY).compile().memory_analysis()
        return analysis.temp_size_in_bytes + analysis.output_size_in_bytes

    assert size(10_000) < size(10) + 10_000 * 4 * 2  # the steps' numbers, not positions


def test_evaluations_are_counted():
    num_calls = 0

    def counted(params, x):
        def count(_):
            nonlocal num_calls
            num_calls += 1

        jax.debug.callback(count, x[0])
        return energy_fn(params, x)

    options = {"num_samples": 4, "thinning": 3, "num_burn_in": 2}
    draws = sample(KEY, KERNEL, counted, 0.3, START[:1], **options)
    jax.effects_barrier()
    assert draws.num_evaluations.tolist() == [num_calls] == [1 + 2 + 12]


class CountedInfo(NamedTuple):
    is_finite: jax.Array
    num_evaluations: jax.Array


def test_evaluations_that_differ_from_step_to_step_are_summed():
    def varying(key, energy_fn, params, state):
        state, info = WALK.step(key, energy_fn, params, state)
        return state, CountedInfo(info.is_finite, info.distance.astype(jnp.int32))

    options = {"num_samples": 4, "thinning": 3, "num_burn_in": 2}
    kernel = Kernel(WALK.init, varying, None)
    draws = sample(KEY, kernel, energy_fn, 1.0, WHOLE_START, **options)
    every_step = sample(KEY, WALK, energy_fn, 1.0, WHOLE_START, num_samples=14)
    np.testing.assert_allclose(draws.num_evaluations, every_step.info.distance.sum(0))


def test_arrays_in_options_do_not_trace_again():
    num_traces = 0

    def counted(params, x):
        nonlocal num_traces
        num_traces += 1
        return energy_fn(params, x)

    ends, traces = [], []
    for step_size in (0.1, 0.2, 0.3):
        kernel = mala(step_size=jnp.float32(step_size))
        ends.append(sample(KEY, kernel, counted, 0.3, START, num_samples=2).positions)
        traces.append(num_traces)
    assert traces[0] == traces[2]
    assert not np.array_equal(ends[0], ends[1])
    fixed = sample(KEY, mala(step_size=0.3), energy_fn, 0.3, START, num_samples=2).positions
    np.testing.assert_allclose(ends[2], fixed, rtol=1e-5, atol=1e-6)
