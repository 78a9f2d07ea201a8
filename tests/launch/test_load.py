"""What a run has learned, used without the run: its energy, its flow, one draw of its sampler."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_lines import ROOT

import ebjax
import gflownet
from ebjax.energies import targets
from ebjax.evaluation import cell_total_variation, grid_figures, grid_law
from ebjax.loading import find_recipe
from ebjax.training import init_state
from gflownet.recipes.learned_target import learned_target
from launch import train

SMALL = {
    "composition": {"hidden_features": (8,), "num_noise_levels": 5, "sampler": "annealed"},
    "density": {"hidden_features": (8,), "sample_steps": 20, "num_frequencies": 4},
    "digits": {"hidden_features": (8,), "sample_steps": 10, "chains_per_example": 1},
    "images": {"features": (8,), "sample_steps": 10, "chains_per_example": 1},
    "jem": {"hidden_features": (8,), "sample_steps": 10, "chains_per_example": 1},
    "jarzynski": {"batch_size": 16, "num_data": 16},
    "energy_ood": {"hidden_features": (8,)},
    "rbm": {"num_hidden": 3, "sample_steps": 20},
    "diffusion": {"features": 8, "path_steps": 4, "batch_size": 16},
    "hypergrid": {"hidden_features": (8,), "batch_size": 4},
    "sets": {"hidden_features": (8,), "batch_size": 4, "size": "small"},
    "dags": {"hidden_features": (8,), "num_variables": 3},
    "sequences": {"hidden_features": (8,), "num_bits": 8},
}
# The samples that ``draw`` makes one of, and the energies that samples have beside them.
DRAWN = {
    "composition": ("positions", "energies"),
    "density": ("positions", "energies"),
    "digits": ("images", "energies"),
    "images": ("images", "energies"),
    "jem": ("images", "energies"),
    "jarzynski": ("positions", "energies"),
    "energy_ood": ("images_turned", "energies_turned"),
    "rbm": ("images", None),
    "diffusion": ("positions", None),
    "hypergrid": ("positions", None),
    "sets": ("sets", None),
    "dags": ("graphs", None),
    "sequences": ("tokens", None),
}
# Recipes whose ``sample`` is ``draw`` with the keys of a split.
SPLIT = ("density", "images", "jarzynski", "diffusion", "hypergrid", "sets", "dags", "sequences")


def built(name, **settings):
    recipe = find_recipe(name)
    config = recipe.config(**{"batch_size": 8, **SMALL[name], **settings})
    run = recipe.build(config)
    state = init_state(run, config)
    # The average differs from the parameters, as in a run.
    return run, state._replace(ema=jax.tree.map(lambda leaf: 0.9 * leaf, state.ema))


@pytest.mark.parametrize("name", DRAWN)
def test_what_a_recipe_names_is_what_it_samples(name):
    """Energies are those of the samples; a draw is a sample; all take ``learned_params``."""
    run, state = built(name)
    params = run.learned_params(state)
    samples = run.sample(jax.random.key(1), state, 6)
    arrays, energies = (samples.get(each) for each in DRAWN[name])
    assert (run.energy is None) != (run.flow is None)
    if energies is not None:
        found = jax.jit(jax.vmap(run.energy, (None, 0)))(params, arrays)
        np.testing.assert_allclose(found, energies, rtol=1e-4, atol=1e-4)
    if name == "energy_ood":
        assert run.draw is None
        return
    keys = jax.random.split(jax.random.key(1), 6)
    drawn = np.asarray(jax.jit(jax.vmap(run.draw, (0, None)))(keys, params))
    assert drawn.shape == arrays.shape
    assert len(np.unique(drawn.reshape(6, -1), axis=0)) > 1
    if name in SPLIT:
        np.testing.assert_allclose(drawn, arrays, rtol=1e-4, atol=1e-4)


def test_draws_of_digits_have_the_energy_of_its_samples():
    run, state = built("digits", sample_steps=50)
    energies_of = jax.jit(jax.vmap(run.energy, (None, 0)))
    keys = jax.random.split(jax.random.key(2), 400)
    drawn = np.asarray(
        energies_of(state.ema, jax.jit(jax.vmap(run.draw, (0, None)))(keys, state.ema))
    )
    sampled = run.sample(jax.random.key(3), state, 400)["energies"]
    error = np.sqrt((drawn.var() + sampled.var()) / 400)
    assert abs(drawn.mean() - sampled.mean()) < 5 * error
    noise = energies_of(state.ema, jax.random.uniform(keys[0], (400, 8, 8, 1), minval=-1.0))
    assert abs(np.mean(noise) - sampled.mean()) > 5 * error  # what no chain has moved


def test_draws_of_a_machine_follow_its_energy(tmp_path):
    """Four pixels: shares of draws against exp(-F) / Z of all 16 images."""
    path = tmp_path / "grey.npz"
    images = np.random.default_rng(0).integers(0, 256, (40, 2, 2)).astype(np.uint8)
    np.savez(path, images=images)
    run, state = built("rbm", data_path=str(path), num_held_out=4, weight_scale=1.0)
    num = 4000
    keys = jax.random.split(jax.random.key(0), num)
    drawn = np.asarray(jax.jit(jax.vmap(run.draw, (0, None)))(keys, state.ema))
    assert drawn.shape == (num, 2, 2)
    states = jnp.asarray(np.indices((2,) * 4).reshape(4, 16).T, jnp.float32).reshape(16, 2, 2)
    exact = jax.nn.softmax(-jax.vmap(run.energy, (None, 0))(state.ema, states))
    shares = np.bincount(drawn.reshape(num, 4).astype(int) @ [8, 4, 2, 1], minlength=16) / num
    z = (shares - exact) / np.sqrt(exact * (1 - exact) / num)
    assert np.abs(z).max() < 5
    wrong = jax.nn.softmax(jax.vmap(run.energy, (None, 0))(state.ema, states))
    assert np.abs((shares - wrong) / np.sqrt(wrong * (1 - wrong) / num)).max() > 5


@pytest.fixture(scope="module")
def density(tmp_path_factory):
    """A small run of a density, trained to its end."""
    workdir = tmp_path_factory.mktemp("density") / "run"
    flags = ["--config.objective=denoising_score_matching", "--config.num_noise_levels=1"]
    small = ["--config.hidden_features=(8,)", "--config.num_steps=20", "--config.batch_size=16"]
    with pytest.raises(SystemExit) as exit_:
        train.main(
            [
                "launch.train",
                "--config=density",
                *flags,
                *small,
                "--config.checkpoint_every=10",
                "--config.num_grid_points=51",
                "--quiet",
                f"--workdir={workdir}",
            ]
        )
    assert exit_.value.code == 0
    return workdir


def test_a_loaded_energy_has_the_law_that_was_judged(density):
    """Its divergence from the data by quadrature is the figure that training wrote."""
    energy = ebjax.load(density)
    assert (energy.step, energy.config.hidden_features) == (20, (8,))
    size = sum(leaf.size for leaf in jax.tree.leaves(energy.params))
    assert repr(energy) == f"LoadedEnergy(Density, {size:,} parameters, step 20)"
    options = {"bounds": (-5.0, 5.0), "num_points": 51}
    law = grid_law(energy.energy_fn, energy.params, **options)
    truth = grid_law(targets.eight_gaussians().energy, (), **options)
    written = json.loads((density / "evaluation.json").read_text())
    assert grid_figures(law, truth)["kl_reference_model"] == pytest.approx(written["kl"], rel=1e-6)
    earlier = ebjax.load(density, checkpoint=10)
    assert earlier.step == 10
    other = grid_law(earlier.energy_fn, earlier.params, **options)
    assert grid_figures(other, truth)["kl_reference_model"] != pytest.approx(written["kl"])
    drawn = energy.sample(jax.random.key(0), 4)["positions"]
    keys = jax.random.split(jax.random.key(0), 4)
    np.testing.assert_allclose(
        jax.vmap(energy.draw, (0, None))(keys, energy.params), drawn, rtol=1e-4, atol=1e-4
    )


def test_a_learned_energy_is_the_target_of_a_sampler(density):
    """Energy, log Z and draws are those of the run's law by quadrature."""
    run = find_recipe("diffusion")
    config = run.config(
        target="learned", energy_workdir=str(density), num_evaluated=500, **SMALL["diffusion"]
    )
    target, variance, law = learned_target(str(density))
    energy = ebjax.load(density)
    x = jnp.array([0.3, -1.0])
    assert float(target.energy((), x)) == float(energy.energy_fn(energy.params, x))
    box = (float(law.axes[0][0]), float(law.axes[0][-1]))
    other = grid_law(energy.energy_fn, energy.params, bounds=box, num_points=101)
    assert target.log_z == pytest.approx(other.log_z, abs=1e-3)
    draws = np.asarray(jax.vmap(target.sample)(jax.random.split(jax.random.key(0), 4000)))
    distance = cell_total_variation(draws, law)
    assert distance.total_variation < 1.5 * distance.of_exact_draws
    assert cell_total_variation(draws + 0.5, law).total_variation > 3 * distance.of_exact_draws
    assert 0.5 < variance / np.square(draws).mean() < 2.0
    built_run = run.build(config)
    figures = built_run.evaluate(jax.random.key(1), init_state(built_run, config))
    assert figures["elbo"] + figures["elbo_gap"] == pytest.approx(target.log_z, abs=1e-4)
    assert figures["eubo_gap"] > 0.0
    assert figures["total_variation"] > figures["total_variation_of_exact_draws"]


def test_a_learned_target_that_cannot_be_is_one_sentence(tmp_path, finished):
    with pytest.raises(ValueError, match="holds no run"):
        learned_target(str(tmp_path))
    with pytest.raises(ValueError, match="learns no energy"):
        learned_target(str(finished))
    with pytest.raises(ValueError, match="energy_workdir"):
        find_recipe("diffusion").config(target="learned")


def test_a_loaded_flow_has_the_law_that_was_judged(finished):
    """Its exact law is as far from the target as training wrote."""
    flow = gflownet.load(str(finished))
    exact = gflownet.exact
    graph = exact.enumerate_graph(flow.environment)
    learned = exact.terminal_distribution(flow.environment, flow.policy, flow.params, graph)
    target, _ = exact.target_distribution(flow.environment, graph)
    written = json.loads((finished / "evaluation.json").read_text())
    assert exact.total_variation(learned, target) == pytest.approx(
        written["total_variation"], rel=1e-5
    )
    assert flow.sample(jax.random.key(0), 7)["positions"].shape == (7, 2)
    assert flow.config.num_steps == flow.step == 40
    assert repr(flow).startswith("LoadedFlow(Hypergrid, ")


@pytest.mark.parametrize("load", [ebjax.load, gflownet.load])
def test_what_cannot_be_loaded_is_one_sentence(load, tmp_path, finished, density):
    other = finished if load is ebjax.load else density
    for arguments, words in [
        ((tmp_path / "none",), "holds no run"),
        ((other,), "learns no"),
        (("",), "workdir is ''"),
    ]:
        with pytest.raises(ValueError, match=words) as error:
            load(*arguments)
        assert str(error.value).count("\n") == 0
    with pytest.raises(ValueError, match="checkpoint is '35'; it must be newest, best or one of"):
        load(finished, checkpoint=35)


def test_loading_brings_no_command(density, tmp_path):
    """In a process that knows nothing: no module of ``launch``, no flags, from any folder."""
    program = (
        "import sys, jax, ebjax; "
        "assert not any(name.startswith('ebjax.training') for name in sys.modules); "
        f"energy = ebjax.load({str(density)!r}); "
        "print(float(energy.energy_fn(energy.params, jax.numpy.ones(2)))); "
        "print([name for name in sys.modules if name.startswith(('launch', 'ml_collections'))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )
    value, modules = done.stdout.splitlines()
    energy = ebjax.load(density)
    assert float(value) == pytest.approx(float(energy.energy_fn(energy.params, jnp.ones(2))))
    assert modules == "[]"
