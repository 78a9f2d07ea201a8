"""The loop: log points, saves, stops and resumes change nothing of what is computed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ebjax.training import Checkpointer, DivergenceError, TrainingConfig, init_state, train
from ebjax.types import Objective, Run, Source


def number_run(*, break_at=-1, **options):
    """Fits one number to noise; the loss is NaN at ``break_at``. Compiles in no time."""

    def loss(params, carry, keys, batch):
        value = jnp.mean(jnp.square(params - batch + 0.1 * jax.vmap(jax.random.normal)(keys)))
        return jnp.where(carry[0] == break_at, jnp.nan, value), (carry + 1, {"x": params})

    return Run(
        init=lambda key: jax.random.normal(key),
        objective=Objective(lambda key, params, batch: jnp.zeros(len(batch), jnp.int32), loss),
        optimizer=optax.adam(0.1),
        source=Source(
            (), lambda arrays, key, position: jax.random.normal(jax.random.fold_in(key, position))
        ),
        sample=lambda key, state, num: {},
        evaluate=lambda key, state: {},
        figures=lambda key, state, samples: {},
        **options,
    )


CONFIG = TrainingConfig(
    num_steps=30, batch_size=8, log_every=6, checkpoint_every=10, steps_per_call=4, num_devices=1
)


def arrays_of(state):
    state = state._replace(key=jax.random.key_data(state.key))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def assert_equal(one, other):
    for a, b in zip(arrays_of(one), arrays_of(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def logged(run, config, **options):
    rows = []
    result = train(
        run, config, on_log=lambda step, metrics, rate: rows.append((step, metrics)), **options
    )
    return result, rows


def test_log_points_are_multiples_saves_and_the_end():
    calls = []
    config = dataclasses.replace(CONFIG, num_steps=33)
    _, rows = logged(number_run(), config, on_call=lambda step, metrics: calls.append(step))
    assert [step for step, _ in rows] == [6, 10, 12, 18, 20, 24, 30, 33]
    assert calls == [4, 6, 8, 10, 12, 16, 18, 20, 24, 28, 30, 32, 33]
    assert all(set(metrics) == {"loss", "x", "gradient_norm"} for _, metrics in rows)


def test_a_state_is_judged_at_every_save():
    run = number_run(
        monitor=lambda key, state: {
            "score": float(state.step),
            "draw": float(jax.random.normal(key)),
        },
        monitor_name="score",
    )
    _, rows = logged(run, CONFIG)
    assert {s: m["score"] for s, m in rows if "score" in m} == {10: 10.0, 20: 20.0, 30: 30.0}
    draws = {m["draw"] for _, m in rows if "draw" in m}
    assert len(draws) == 3  # a key of its own each time
    assert {m["draw"] for _, m in logged(run, CONFIG)[1] if "draw" in m} == draws


@pytest.mark.parametrize("backend", ["pmap", "shard_map"])
@pytest.mark.parametrize("stop_after", [1, 3, 6])
def test_a_stopped_and_resumed_run_equals_one_that_was_not(tmp_path, stop_after, backend):
    config = dataclasses.replace(CONFIG, num_devices=2, backend=backend)
    run = number_run()
    whole, expected = logged(run, config)
    assert whole.is_finished
    asked = []
    with_saves = Checkpointer(tmp_path / "c")
    part, rows = logged(
        run,
        config,
        checkpointer=with_saves,
        should_stop=lambda: asked.append(None) or len(asked) >= stop_after,
    )
    with_saves.close()
    assert not part.is_finished
    checkpointer = Checkpointer(tmp_path / "c")
    step, state = checkpointer.restore(init_state(run, config))
    assert step == int(part.state.step)
    assert_equal(state, part.state)
    result, more = logged(run, config, checkpointer=checkpointer, initial=state)
    checkpointer.close()
    assert result.is_finished
    assert_equal(result.state, whole.state)
    assert rows + more == expected


def test_saved_on_8_devices_goes_on_on_1_and_2(tmp_path, pcd_run):
    run = pcd_run()
    config = dataclasses.replace(CONFIG, num_steps=4, checkpoint_every=4)
    on_8 = dataclasses.replace(config, num_devices=8)
    checkpointer = Checkpointer(tmp_path / "c", keep_last=9)
    saved = train(run, on_8, checkpointer=checkpointer).state
    _, restored = checkpointer.restore(init_state(run, config))
    checkpointer.close()
    assert_equal(restored, saved)
    longer = dataclasses.replace(on_8, num_steps=8)
    expected = arrays_of(train(run, longer, initial=restored).state)
    for num_devices in (1, 2):
        fewer = dataclasses.replace(longer, num_devices=num_devices)
        found = arrays_of(train(run, fewer, initial=restored).state)
        for a, b in zip(expected, found, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("break_at", [0, 3, 9, 10, 17, 29])
def test_a_bad_loss_names_its_step_and_spoils_no_checkpoint(tmp_path, break_at):
    run = number_run(break_at=break_at, monitor=lambda key, state: {"x": float(state.params)})
    checkpointer = Checkpointer(tmp_path / "c", keep_last=9)
    rows = []
    with pytest.raises(DivergenceError, match=rf"not finite at step {break_at}\.") as error:
        train(
            run,
            CONFIG,
            checkpointer=checkpointer,
            on_log=lambda step, metrics, rate: rows.append((step, metrics)),
        )
    assert error.value.step == break_at
    checkpointer.wait()
    good = [step for step in (10, 20, 30) if step <= break_at]
    assert checkpointer.steps() == good
    assert all(np.isfinite(list(metrics.values())).all() for _, metrics in rows)
    assert max([step for step, _ in rows], default=0) <= break_at
    checkpointer.close()


def test_a_finished_run_does_nothing(tmp_path):
    run = number_run()
    whole = train(run, CONFIG).state
    again, rows = logged(run, CONFIG, initial=whole)
    assert again.is_finished
    assert rows == []
    assert_equal(again.state, whole)


def test_what_is_given_is_not_consumed():
    run = number_run()
    state = init_state(run, CONFIG)
    before = arrays_of(state)
    train(run, CONFIG, initial=state)
    for a, b in zip(before, arrays_of(state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_energy_of_a_run_is_traced_once_whatever_it_does(tmp_path, pcd_run):
    counts = []

    def counted(apply):
        def energy_fn(params, x):
            counts.append(None)
            return apply(params, x)

        return energy_fn

    run = pcd_run(energy_fn=counted)
    after_calls = []
    config = dataclasses.replace(CONFIG, num_steps=23)  # calls of 4, 2, 2, 2, ... and 1 updates
    checkpointer = Checkpointer(tmp_path / "c")
    train(
        run,
        config,
        checkpointer=checkpointer,
        on_call=lambda step, metrics: after_calls.append(len(counts)),
    )
    checkpointer.close()
    assert len(after_calls) > 5
    assert len(set(after_calls)) == 1
    assert after_calls[0] <= 3  # the kernel's start, its step, the loss


def test_a_run_that_diverges_goes_back_and_takes_smaller_steps(tmp_path):
    """Gradient descent on x²/2 with rate 3 doubles x; with a quarter of it, it contracts."""

    def loss(params, carry, keys, batch):
        del keys, batch
        return 0.5 * params**2, (carry, {"x": params})

    run = number_run()._replace(
        init=lambda key: jnp.ones(()),
        objective=Objective(lambda key, params, batch: jnp.zeros(len(batch)), loss),
        optimizer=optax.sgd(3.0),
    )
    config = dataclasses.replace(CONFIG, loss_limit=1e4, max_rollbacks=3, keep_last=9)
    calls, rows = [], []
    checkpointer = Checkpointer(tmp_path / "c", keep_last=9)
    result = train(
        run,
        config,
        checkpointer=checkpointer,
        on_log=lambda step, metrics, rate: rows.append((step, float(metrics["x"]))),
        on_rollback=lambda error, state: calls.append(
            (error.step, int(state.step), int(state.rollbacks))
        ),
    )
    # |x| = 2^n passes the limit at n = 8; with half of the rate |1 - 1.5| = 0.5 contracts.
    assert calls == [(8, 0, 1)]
    assert result.is_finished
    assert int(result.state.rollbacks) == 1
    np.testing.assert_allclose(result.state.params, 0.5**30, rtol=1e-5)
    assert checkpointer.steps() == [10, 20, 30]
    # Killed after the rollback and before the next save, the run does the same again.
    again, _ = logged(run, config, initial=init_state(run, config))
    assert_equal(again.state, result.state)
    _, state = checkpointer.restore(init_state(run, config), 10)
    checkpointer.close()
    assert int(state.rollbacks) == 1
    assert_equal(logged(run, config, initial=state)[0].state, result.state)


def test_rollbacks_are_bounded():
    run = number_run(break_at=13)  # whatever the learning rate
    steps = []
    config = dataclasses.replace(CONFIG, max_rollbacks=2)
    with pytest.raises(DivergenceError, match=r"at step 13\."):
        train(run, config, on_rollback=lambda error, state: steps.append(int(state.step)))
    assert steps == [10, 10]


def test_a_loss_beyond_its_limit_is_divergence():
    config = dataclasses.replace(CONFIG, loss_limit=1e-6)
    with pytest.raises(DivergenceError, match=r"beyond 1e-06 at step 0\."):
        train(number_run(), config)


def test_streamed_data_gives_the_same_run_as_data_in_memory():
    data = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    asked = []

    def load(key, first, num):
        asked.append((first, num))
        shift = int(jax.random.randint(key, (), 0, 1000))
        return {"first": np.uint32(first), "rows": data[(shift + first + np.arange(num)) % 1000]}

    def streamed(arrays, key, position):
        return arrays["rows"][position - arrays["first"]]

    def in_memory(arrays, key, position):
        return arrays[(jax.random.randint(key, (), 0, 1000) + position.astype(int)) % 1000]

    results = [
        logged(number_run()._replace(source=source), dataclasses.replace(CONFIG, num_devices=2))
        for source in (Source(data, in_memory), Source((), streamed, load))
    ]
    assert_equal(results[0][0].state, results[1][0].state)
    assert results[0][1] == results[1][1]
    assert asked[0] == (0, 8)  # the first batch, for the shapes of the carry
    assert {num for _, num in asked[1:]} == {4 * 8}
    assert [first // 8 for first, _ in asked[1:]] == [0, 4, 6, 8, 10, 12, 16, 18, 20, 24, 28]
