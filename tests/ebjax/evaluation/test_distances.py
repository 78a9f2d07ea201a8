"""Distances between samples against closed forms and direct sums."""

import numpy as np
import pytest
import scipy.linalg

from ebjax.evaluation import frechet_distance, maximum_mean_discrepancy


def with_moments(rng, num, mean, covariance):
    """A sample whose own mean and covariance (divisor N - 1) are exactly the given ones."""
    noise = rng.normal(size=(num, len(mean)))
    noise -= noise.mean(0)
    whitener = np.linalg.inv(np.linalg.cholesky(np.cov(noise.T)))
    return np.asarray(mean) + noise @ whitener.T @ np.linalg.cholesky(covariance).T


def random_covariance(rng, dim):
    root = rng.normal(size=(dim, dim))
    return root @ root.T + 0.1 * np.eye(dim)


@pytest.mark.parametrize("seed", range(3))
def test_frechet_distance_of_gaussians(seed):
    rng = np.random.default_rng(seed)
    mean_1, mean_2 = rng.normal(size=(2, 4))
    cov_1, cov_2 = random_covariance(rng, 4), random_covariance(rng, 4)
    first, second = with_moments(rng, 50, mean_1, cov_1), with_moments(rng, 70, mean_2, cov_2)
    cross = scipy.linalg.sqrtm(cov_1 @ cov_2).real
    expected = np.sum((mean_1 - mean_2) ** 2) + np.trace(cov_1 + cov_2 - 2.0 * cross)
    np.testing.assert_allclose(frechet_distance(first, second), expected, rtol=1e-9)
    np.testing.assert_allclose(frechet_distance(second, first), expected, rtol=1e-9)


def test_frechet_distance_of_diagonal_gaussians():
    rng = np.random.default_rng(0)
    first = with_moments(rng, 50, [0.0, 1.0], np.diag([4.0, 9.0]))
    second = with_moments(rng, 50, [2.0, 1.0], np.diag([1.0, 1.0]))
    np.testing.assert_allclose(frechet_distance(first, second), 4.0 + 1.0 + 4.0, rtol=1e-9)


def test_frechet_distance_is_zero_on_itself_also_where_pixels_are_constant():
    rng = np.random.default_rng(0)
    images = np.concatenate([rng.normal(size=(30, 2, 3)), np.ones((30, 2, 1))], axis=-1)
    assert frechet_distance(images, images) == pytest.approx(0.0, abs=1e-6)
    shifted = images + np.array([0.0, 0.0, 0.0, 3.0])
    assert frechet_distance(images, shifted) == pytest.approx(2 * 9.0, abs=1e-6)
    assert frechet_distance(np.ones((5, 3)), np.ones((4, 3))) == 0.0


def test_frechet_distance_of_one_dimension():
    first, second = np.array([[-1.0], [1.0]]), np.array([[2.0], [8.0]])
    expected = 25.0 + (np.sqrt(18.0) - np.sqrt(2.0)) ** 2
    assert frechet_distance(first, second) == pytest.approx(expected)


def direct_mmd(first, second, *, skip_diagonal=True):
    pool = [*first, *second]
    square = lambda a, b: float(np.sum((np.ravel(a) - np.ravel(b)) ** 2))  # noqa: E731
    scale = np.median(
        [square(a, b) for i, a in enumerate(pool) for j, b in enumerate(pool) if i != j]
    )
    kernel = lambda a, b: np.exp(-square(a, b) / scale)  # noqa: E731

    def within(sample):
        return np.mean(
            [
                kernel(a, b)
                for i, a in enumerate(sample)
                for j, b in enumerate(sample)
                if i != j or not skip_diagonal
            ]
        )

    across = np.mean([kernel(a, b) for a in first for b in second])
    return within(first) + within(second) - 2.0 * across


@pytest.mark.parametrize("shape", [(3,), (2, 2)])
def test_mmd_is_the_direct_sum(x64, shape):
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(7, *shape)), 0.5 + rng.normal(size=(9, *shape))
    ours = maximum_mean_discrepancy(first, second)
    np.testing.assert_allclose(ours, direct_mmd(first, second), rtol=1e-9)
    np.testing.assert_allclose(maximum_mean_discrepancy(second, first), ours, rtol=1e-9)


def replicate_z(statistic, shift):
    """Standard score of the mean of 400 independent values, SE from their spread."""
    rng = np.random.default_rng(0)
    values = [
        statistic(rng.normal(size=(8, 2)), shift + rng.normal(size=(11, 2))) for _ in range(400)
    ]
    return np.mean(values) / (np.std(values) / np.sqrt(len(values)))


def test_mmd_is_zero_in_expectation_for_equal_laws():
    assert abs(replicate_z(maximum_mean_discrepancy, 0.0)) < 5.0


def test_the_check_sees_a_shift_and_a_biased_estimate():
    assert replicate_z(maximum_mean_discrepancy, 0.7) > 5.0

    def biased(first, second):
        return direct_mmd(first, second, skip_diagonal=False)

    assert replicate_z(biased, 0.0) > 5.0


def test_mmd_is_a_number():
    assert type(maximum_mean_discrepancy(np.eye(3), np.ones((2, 3)))) is float


@pytest.mark.parametrize("distance", [frechet_distance, maximum_mean_discrepancy])
@pytest.mark.parametrize("bad", [np.ones(3), np.ones((1, 3))], ids=["rank", "one"])
def test_errors_name_the_shape(distance, bad):
    good = np.random.default_rng(0).normal(size=(4, 3))
    with pytest.raises(ValueError, match=r"first has shape \(" + str(bad.shape[0])):
        distance(bad, good)
    with pytest.raises(ValueError, match="second has shape"):
        distance(good, bad)
    with pytest.raises(ValueError, match="second has 1 of 12 values that are NaN"):
        distance(good, np.where(good == good.max(), np.nan, good))
    with pytest.raises(ValueError, match="3 components and those of second 2"):
        distance(good, good[:, :2])
