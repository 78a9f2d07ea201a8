"""Chains stay where the law is, and leave where it is not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.evaluation import long_run_drift, maximum_mean_discrepancy
from ebjax.samplers import mala

KERNEL = mala(step_size=0.3)
DATA, REFERENCE = jax.random.normal(jax.random.key(0), (2, 400, 2))


def energy_fn(scale, x):
    return 0.5 * jnp.sum(jnp.square(x / scale))


def run(scale, data=DATA):
    return long_run_drift(
        jax.random.key(1), KERNEL, energy_fn, scale, data, REFERENCE, num_steps=80, num_records=8
    )


def test_data_of_the_law_itself_stays():
    drift = run(1.0)
    assert drift.steps.tolist() == list(range(0, 81, 10))
    error = np.hypot(drift.energy_standard_error[0], drift.energy_standard_error[-1])
    assert abs(drift.energy[-1] - drift.energy[0]) < 5.0 * error
    # The exact mean energy is D/2 at all times.
    assert np.all(np.abs(drift.energy - 1.0) < 5.0 * drift.energy_standard_error)
    assert np.abs(drift.mmd).max() < 0.01
    assert drift.is_finite
    np.testing.assert_allclose(drift.positions[0], DATA)


def test_an_energy_of_another_law_leaves_the_data():
    """The energies fall and the samples move away, although each step is small."""
    drift = run(0.4)
    assert drift.energy_drift < -0.5
    assert drift.mmd[-1] > 0.05 > 5 * drift.mmd[0]
    # The exact mean energy of the law reached.
    assert abs(drift.energy[-1] - 1.0) < 5.0 * drift.energy_standard_error[-1]


def test_the_first_row_is_the_data():
    drift = run(1.0, DATA + 1.0)
    np.testing.assert_allclose(
        drift.energy[0], 0.5 * np.square(np.asarray(DATA) + 1.0).sum(axis=1).mean(), rtol=1e-5
    )
    # Its own bandwidth is the reference's and not that of both.
    close = maximum_mean_discrepancy(np.asarray(DATA) + 1.0, REFERENCE)
    assert drift.mmd[0] == pytest.approx(close, rel=0.3)


@pytest.mark.parametrize(
    ("options", "data", "message"),
    [
        ({"num_steps": 10, "num_records": 3}, DATA, "num_steps is 10"),
        ({"num_steps": 0, "num_records": 1}, DATA, "num_steps is 0"),
        ({"num_steps": 4, "num_records": 2}, DATA[:1], "data has shape"),
        ({"num_steps": 4, "num_records": 2}, DATA / 0.0, "data has"),
    ],
)
def test_wrong_calls_are_named(options, data, message):
    with pytest.raises(ValueError, match=message):
        long_run_drift(jax.random.key(0), KERNEL, energy_fn, 1.0, data, REFERENCE, **options)
