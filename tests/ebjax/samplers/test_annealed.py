"""Annealed Langevin against the exact law of its chain, and against what plain Langevin does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.samplers import langevin, mala, run_chain
from ebjax.samplers.annealed import annealed_langevin, energy_from_score

NUM_CHAINS = 20_000
LEVELS = np.geomspace(6.0, 0.3, 8)
NUM_STEPS, STEP_SIZE = 10, 0.02
MEAN, WIDTH = 1.5, 0.5


def gaussian_energy(params, x, level):
    """N(1.5, 0.5²) convolved with N(0, level²)."""
    return 0.5 * jnp.sum((x - MEAN) ** 2) / (WIDTH**2 + level**2)


def gaussian_law(start, *, exponent=2.0, denoise=False):
    """Exact mean and variance of the end of the chain from a point: each step is affine."""
    mean, variance = start, 0.0
    for level in LEVELS:
        step_size = STEP_SIZE * (level / LEVELS[-1]) ** exponent
        keep = 1.0 - step_size / (WIDTH**2 + level**2)
        for _ in range(NUM_STEPS):
            mean = MEAN + keep * (mean - MEAN)
            variance = keep**2 * variance + 2.0 * step_size
    if denoise:
        keep = 1.0 - LEVELS[-1] ** 2 / (WIDTH**2 + LEVELS[-1] ** 2)
        mean, variance = MEAN + keep * (mean - MEAN), keep**2 * variance
    return mean, variance


def ends_of(energy_fn, starts, **options):
    options = {
        "noise_levels": LEVELS,
        "num_steps": NUM_STEPS,
        "step_size": STEP_SIZE,
        **options,
    }
    run = lambda key, x: annealed_langevin(key, energy_fn, (), x, **options)  # noqa: E731
    return jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), len(starts)), starts)


def gaussian_z_scores(law, **options):
    ends, info = ends_of(gaussian_energy, jnp.full((NUM_CHAINS,), -2.0), **options)
    assert info.is_finite.shape == (NUM_CHAINS, len(LEVELS))
    assert np.all(info.is_finite == 1.0)
    ends = np.asarray(ends, np.float64)
    mean, variance = law
    z_mean = (ends.mean() - mean) / np.sqrt(variance / NUM_CHAINS)
    z_variance = (((ends - mean) ** 2).mean() / variance - 1.0) * np.sqrt(NUM_CHAINS / 2.0)
    return max(abs(z_mean), abs(z_variance))


@pytest.mark.parametrize("denoise", [False, True])
def test_law_of_the_chain_on_a_gaussian(denoise):
    law = gaussian_law(-2.0, denoise=denoise)
    assert gaussian_z_scores(law, denoise=denoise) < 5.0
    assert gaussian_z_scores(law, denoise=not denoise) > 5.0
    # Steps that grow with σ, or with half the noise, have other laws.
    assert gaussian_z_scores(gaussian_law(-2.0, exponent=1.0, denoise=denoise), denoise=denoise) > 5
    cold = functools.partial(langevin, temperature=0.5)
    assert gaussian_z_scores(law, denoise=denoise, build_kernel=cold) > 5.0


# A mixture: modes far apart at the last level, joined at the first.

WEIGHTS, CENTRES, WIDTHS = np.array([0.75, 0.25]), np.array([-3.0, 3.0]), np.array([0.3, 0.4])
MIXTURE_LEVELS = np.geomspace(10.0, 0.2, 12)
MIXTURE_STEPS, MIXTURE_STEP_SIZE, MIXTURE_CHAINS = 25, 0.01, 5_000
MIXTURE = {
    "noise_levels": MIXTURE_LEVELS,
    "num_steps": MIXTURE_STEPS,
    "step_size": MIXTURE_STEP_SIZE,
}


def mixture_energy(params, x, level):
    scale = jnp.sqrt(WIDTHS**2 + level**2)
    logs = jnp.log(WEIGHTS) + jax.scipy.stats.norm.logpdf(x, CENTRES, scale)
    return -jax.nn.logsumexp(logs)


def grid_law():
    """Share on the left of the annealed chain's end: its density carried over a grid, exactly."""
    grid = np.linspace(-70.0, 70.0, 1201)
    width = grid[1] - grid[0]
    density = np.exp(-0.5 * (grid / MIXTURE_LEVELS[0]) ** 2)
    density /= density.sum()
    for level in MIXTURE_LEVELS:
        step_size = MIXTURE_STEP_SIZE * (level / MIXTURE_LEVELS[-1]) ** 2
        gradient = jax.vmap(jax.grad(lambda x, s=level: mixture_energy((), x, s)))(grid)
        centre = grid - step_size * np.asarray(gradient)
        move = np.exp(-0.25 * (grid[:, None] - centre) ** 2 / step_size)
        move *= width / np.sqrt(4.0 * np.pi * step_size)
        for _ in range(MIXTURE_STEPS):
            density = move @ density
    assert abs(density.sum() - 1.0) < 1e-5
    return density[grid < 0.0].sum()


def left_share(energy_fn=mixture_energy, **options):
    starts = MIXTURE_LEVELS[0] * jax.random.normal(jax.random.key(1), (MIXTURE_CHAINS,))
    ends, _ = ends_of(energy_fn, starts, **{**MIXTURE, **options})
    return float((ends < 0.0).mean())


def test_the_weights_of_modes_are_carried_down(x64):
    """The law of the chain is met; it is near the truth, and plain Langevin's is far from it."""
    expected = grid_law()
    error = np.sqrt(expected * (1.0 - expected) / MIXTURE_CHAINS)
    assert abs(left_share() - expected) < 5.0 * error
    assert abs(expected - WEIGHTS[0]) < 0.03
    plain = {
        "noise_levels": MIXTURE_LEVELS[-1:],
        "num_steps": MIXTURE_STEPS * len(MIXTURE_LEVELS),
    }
    # It keeps the weights of its start, half to each side.
    assert abs(left_share(**plain) - 0.5) < 5.0 * np.sqrt(0.25 / MIXTURE_CHAINS)
    # A planted fault: the energies of the levels in the wrong order.
    upside_down = lambda params, x, level: mixture_energy(params, x, 2.0 / level)  # noqa: E731
    assert abs(left_share(upside_down) - expected) > 5.0 * error


def test_a_score_does_what_its_energy_does(x64):
    score = lambda params, x, level: -jax.grad(mixture_energy, 1)(params, x, level)  # noqa: E731
    starts = jnp.linspace(-5.0, 5.0, 20)
    ours, info = ends_of(energy_from_score(score), starts, denoise=True)
    theirs, expected = ends_of(mixture_energy, starts, denoise=True)
    np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(info.gradient_norm, expected.gradient_norm, rtol=1e-10)
    assert np.all(info.energy == 0.0)


def test_a_score_that_is_not_finite_is_flagged():
    energy_fn = energy_from_score(lambda params, x, level: jnp.nan * x)
    _, info = ends_of(energy_fn, jnp.ones(2))
    assert not info.is_finite.any()


def test_a_metropolis_kernel_leaves_the_law_of_each_level_invariant():
    """One level, from exact draws, with steps so large that without a test the law is another."""
    level = 2.0
    scale = np.hypot(WIDTH, level)
    starts = MEAN + scale * jax.random.normal(jax.random.key(1), (NUM_CHAINS,))

    def score(build_kernel):
        options = {"noise_levels": [level], "step_size": 2.0, "build_kernel": build_kernel}
        ends, _ = ends_of(gaussian_energy, starts, **options)
        squares = ((np.asarray(ends, np.float64) - MEAN) / scale) ** 2
        return abs(squares.mean() - 1.0) * np.sqrt(NUM_CHAINS / 2.0)

    assert score(mala) < 5.0
    assert score(langevin) > 5.0


def test_one_level_is_a_chain_of_langevin():
    """The same draws: the level's key is folded out of the chain's."""
    key, start = jax.random.key(3), {"a": jnp.array([0.3, 0.2])}
    energy_fn = lambda params, x, level: gaussian_energy(params, x["a"], level)  # noqa: E731
    options = {"noise_levels": [0.7], "num_steps": 5, "step_size": 0.1}
    ours, _ = annealed_langevin(key, energy_fn, (), start, **options)
    kernel = langevin(step_size=0.1)
    at_level = lambda params, x: energy_fn(params, x, 0.7)  # noqa: E731
    state = kernel.init(at_level, (), start)
    state, _ = run_chain(jax.random.fold_in(key, 0), kernel, at_level, (), state, 5)
    np.testing.assert_allclose(ours["a"], state.position["a"], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_size": 0.0}, "step_size is 0.0"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"noise_levels": 1.0}, r"shape \(\)"),
        ({"noise_levels": []}, r"shape \(0,\)"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    options = {"noise_levels": [1.0], "num_steps": 1, "step_size": 0.1, **options}
    with pytest.raises(ValueError, match=message):
        annealed_langevin(jax.random.key(0), gaussian_energy, (), jnp.zeros(1), **options)
