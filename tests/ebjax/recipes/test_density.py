"""The density recipe: exact figures, settings that follow the objective, laws that are learned."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.energies import targets
from ebjax.objectives.denoising_score_matching import denoising_score_matching
from ebjax.recipes.density import DATASETS, DensityConfig, build, recipe
from ebjax.recipes.density_methods import METHODS, Method, data_frame
from ebjax.training import initial_state, train

module = importlib.import_module("ebjax.recipes.density")

TINY = {
    "hidden_features": (8,),
    "batch_size": 8,
    "langevin_steps": 2,
    "chains_per_example": 2,
    "walkers_moved": 1,
    "sample_steps": 20,
    "num_noise_levels": 3,
    "recovery_levels": 2,
    "flow_layers": 2,
    "num_devices": 1,
}
OBJECTIVES = list(METHODS)


def shapes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


STABILIZERS = {
    "gradient_penalty": 0.1,
    "spectral_bound": 2.0,
    "divergence_weight": 1.0,
    "reset_margin": 3.0,
}


@pytest.mark.parametrize(
    ("objective", "options"),
    [*((name, {}) for name in OBJECTIVES), ("pcd", STABILIZERS)],
    ids=[*OBJECTIVES, "pcd-held"],
)
def test_each_objective_fits_the_loop(objective, options):
    """Parameters, carry and samples keep their shapes; nothing is compiled."""
    config = DensityConfig(objective=objective, **TINY, **options)
    run = build(config)
    method = METHODS[objective](config, data_frame(targets.eight_gaussians()))

    def start(key):
        return initial_state(key, run.init, run.objective, run.optimizer, run.source, 8)

    def step(state):
        batch, keys = jnp.zeros((8, 2)), jax.random.split(jax.random.key(0), 8)
        loss = jax.value_and_grad(run.objective.loss, has_aux=True)
        (value, (carry, metrics)), gradient = loss(state.params, state.carry, keys, batch)
        updates, opt_state = run.optimizer.update(gradient, state.opt_state, state.params)
        return value, carry, metrics, updates, opt_state

    state = jax.eval_shape(start, jax.random.key(0))
    # One device is the whole axis here.
    value, carry, metrics, updates, opt_state = jax.eval_shape(
        jax.vmap(step, axis_name="devices", axis_size=1, in_axes=None), state
    )
    inner = lambda tree: jax.tree.map(lambda leaf: (leaf.shape[1:], leaf.dtype), tree)  # noqa: E731
    assert value.shape == (1,)
    assert inner(carry) == shapes(state.carry)
    assert inner(updates) == shapes(state.params)
    assert inner(opt_state) == shapes(state.opt_state)
    assert all(leaf.shape == (1,) for leaf in metrics.values())
    draw = jax.eval_shape(method.sample, jax.random.key(0), state.params)
    assert draw.shape == (2,)
    assert jax.eval_shape(method.data_energy, state.params, jnp.zeros(2)).shape == ()


def test_weights_held_by_their_norm_have_no_scale():
    config = DensityConfig(spectral_bound=2.0, num_frequencies=0, base_scale=0.0, **TINY)
    method = METHODS["pcd"](config, data_frame(targets.eight_gaussians()))
    params = method.init(jax.random.key(0))
    large = jax.tree.map(lambda leaf: 7.0 * leaf if leaf.ndim == 2 else leaf, params)
    x = jnp.array([0.3, -1.2])
    energies = [method.data_energy(each, x) for each in (params, large)]
    np.testing.assert_allclose(energies[0], energies[1], rtol=1e-5)


def test_open_settings_follow_the_objective_and_the_data():
    pcd, matching = DensityConfig(), DensityConfig(objective="score_matching", dataset="rings")
    assert (pcd.num_steps, pcd.langevin_steps, pcd.adam_b1) == (2000, 40, 0.0)
    assert pcd.energy_regularizer == 0.01
    assert matching.energy_regularizer == 0.0
    assert matching.langevin_step_size < pcd.langevin_step_size
    assert matching.learning_rate_decay_steps == matching.num_steps
    assert DensityConfig(objective="score_matching", data_noise=0.0).data_noise == 0.0
    names = {"eight_gaussians", "two_moons", "pinwheel", "checkerboard", "rings"}
    assert set(DATASETS) == names == set(module._BY_DATASET)
    assert set(module._OWN) == set(METHODS)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dataset", "spirals"),
        ("objective", "guess"),
        ("hidden_features", ()),
        ("num_noise_levels", 0),
        ("rebirth_probability", 1.5),
        ("perturbation_scale", 0.0),
        ("flow_layers", 1),
        ("num_grid_points", 3),
        ("learning_rate", -2.0),
    ],
)
def test_impossible_settings_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        recipe.config(**{field: value})


def with_law(energy_fn, monkeypatch, dataset="eight_gaussians"):
    """A run whose model has a given energy, and a state of it."""
    target = getattr(targets, dataset)()
    method = Method(
        init=lambda key: jnp.zeros(()),
        objective=denoising_score_matching(lambda params, x: params, noise_level=1.0),
        data_energy=lambda params, x: energy_fn(x) + params,
        sample=lambda key, params: target.sample(key),
    )
    monkeypatch.setitem(METHODS, "pcd", lambda config, frame: method)
    run = build(DensityConfig(dataset=dataset, num_grid_points=161, **TINY))
    state = initial_state(jax.random.key(0), run.init, run.objective, run.optimizer, run.source, 8)
    return run, state._replace(ema=jnp.asarray(3.0))


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_law_of_the_data_has_no_divergence(dataset, monkeypatch):
    """With a constant added, which is log Z and nothing else."""
    target = getattr(targets, dataset)()
    run, state = with_law(lambda x: target.energy((), x), monkeypatch, dataset)
    figures = run.monitor(jax.random.key(0), state)
    assert abs(figures["kl"]) < 1e-5
    assert figures["total_variation"] < 1e-5


def test_figures_of_the_law_of_the_data(monkeypatch):
    target = targets.eight_gaussians()
    run, state = with_law(lambda x: target.energy((), x), monkeypatch)
    figures = run.evaluate(jax.random.key(0), state)
    assert abs(figures["kl"]) < 1e-5
    assert abs(figures["mmd"]) < 0.01
    assert abs(figures["log_z"] - (target.log_z - 3.0)) < 1e-4
    assert figures["boundary_mass"] < 1e-6
    assert figures["modes_covered"] == 8
    assert figures["mode_mass_error"] < 1e-4


def test_lost_modes_are_counted_and_cost_their_logarithm(monkeypatch):
    """A model of every second Gaussian and a wide floor, against the figures of that law."""
    target = targets.eight_gaussians()
    half = targets.gaussian_mixture(np.asarray(target.modes)[::2], 0.2)
    floor = targets.gaussian_mixture(np.zeros((1, 2)), 1.0)

    def energy_fn(x):
        kept, rest = half.energy((), x), floor.energy((), x)
        return -jnp.logaddexp(jnp.log(0.99) - kept, jnp.log(0.01) - rest)

    run, state = with_law(energy_fn, monkeypatch)
    figures = run.evaluate(jax.random.key(0), state)
    assert figures["num_modes"] == 8
    assert figures["modes_covered"] == 4
    assert figures["mode_mass_error"] == pytest.approx(0.5 * 0.99, abs=0.01)
    # Half the data at odds 2 * 0.99, the other half in the floor: by the law's own samples.
    keys = jax.random.split(jax.random.key(1), 20_000)
    draws = jax.jit(jax.vmap(target.sample))(keys)
    ratio = jax.jit(jax.vmap(lambda x: energy_fn(x) - target.energy((), x)))(draws)
    error = float(ratio.std()) / len(keys) ** 0.5
    assert abs(figures["kl"] - float(ratio.mean())) < 5.0 * error
    assert figures["kl"] > 1.0


def run_density(objective, dataset="eight_gaussians", **options):
    config = DensityConfig(objective=objective, dataset=dataset, num_devices=1, **options)
    run = build(config)
    return run, train(run, config).state


def test_a_short_run_learns_and_is_drawn():
    """Noise-contrastive estimation, the fastest: a flat start has KL above 1.5."""
    run, state = run_density(
        "noise_contrastive", num_steps=300, hidden_features=(64,), sample_steps=100
    )
    figures = run.evaluate(jax.random.key(1), state)
    assert figures["kl"] < 0.5
    assert figures["modes_covered"] == 8
    # Its own estimate of log Z is that of quadrature.
    assert abs(float(state.ema["log_z"]) - figures["log_z"]) < 0.3
    samples = run.sample(jax.random.key(2), state, 200)
    assert samples["positions"].shape == (200, 2)
    pictures = run.figures(jax.random.key(3), state, samples)
    assert set(pictures) == {"landscape"}
    assert len(pictures["landscape"].axes) == 5
