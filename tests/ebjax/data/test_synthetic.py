"""Laws in the plane by name."""

import numpy as np
import pytest

from ebjax.data import draws, synthetic_2d
from ebjax.data.synthetic import SYNTHETIC_2D
from ebjax.types import Target


@pytest.mark.parametrize("name", SYNTHETIC_2D)
def test_every_name_is_a_law_in_the_plane_with_exact_draws(name):
    target = synthetic_2d(name)
    assert target.event_shape == (2,)
    assert target.log_z is not None
    dataset = draws(target, 2000, seed=1, name=name)
    assert dataset.examples.shape == (2000, 2)
    assert dataset.name == name
    error = np.sqrt(np.diag(target.moments.covariance) / 2000)
    assert (np.abs(dataset.examples.mean(axis=0) - target.moments.mean) < 5 * error).all()
    assert not np.array_equal(dataset.examples, draws(target, 2000, seed=2).examples)


def test_what_does_not_exist_is_named():
    with pytest.raises(ValueError, match="name is 'spiral'; it must be one of checkerboard"):
        synthetic_2d("spiral")
    with pytest.raises(ValueError, match="no exact draws"):
        draws(Target(lambda params, x: x.sum(), (2,)), 10)
    with pytest.raises(ValueError, match="num_examples is 0"):
        draws(synthetic_2d("rings"), 0)
