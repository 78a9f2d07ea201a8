"""Block and checkerboard Gibbs against enumerated laws, as black boxes, in double precision.

A sweep draws every site once, so the end of a sweep tells all its draws. The probability of each is
found by bisection of the uniform number (blocks), or read off the threshold (checkerboard).
"""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.energies.boltzmann import (
    Layers,
    RBMParams,
    enumerate_states,
    logit_table,
    rbm_joint_energy,
)
from ebjax.energies.exact_lattice import kaufman_energy
from ebjax.energies.lattice import (
    ising,
    ising_lattice,
    lattice_edges,
    potts,
)
from ebjax.samplers.run import sample
from ebjax.types import Kernel

block = importlib.import_module("ebjax.samplers.block_gibbs")
board = importlib.import_module("ebjax.samplers.checkerboard")

TEMPERATURE = 1.3
EDGES = np.array([(0, 1), (1, 2), (2, 3), (0, 3), (1, 3)])
COUPLING, FIELD = np.array([0.8, -0.6, 0.5, 1.1, 0.3]), np.array([0.2, -0.4, 0.7, 0.1])
COLORS = block.color_graph(EDGES, 4)
RBM = RBMParams(
    jnp.array([[0.9, -1.2], [0.4, 0.7], [-0.8, 0.5]]),
    jnp.array([0.3, -0.5, 0.1]),
    jnp.array([-0.2, 0.6]),
)


def as_layers(flat):
    return Layers(flat[:3], flat[3:])


def rbm_of_leaves(params, x):
    return rbm_joint_energy(RBMParams(*(leaf.astype(x.visible.dtype) for leaf in RBM)), x)


# name -> (energy, sites, categories, blocks, from a raveled state)
CASES = {
    "ising": (
        ising(EDGES, COUPLING, FIELD, num_sites=4).energy,
        4,
        None,
        COLORS,
        lambda flat: flat,
    ),
    "potts": (
        potts(EDGES[:4], COUPLING[:4], np.array([0.3, -0.2, 0.0]), num_sites=4).energy,
        4,
        3,
        [0, 1, 0, 1],
        lambda flat: flat,
    ),
    "rbm": (rbm_of_leaves, 5, None, Layers(1, 0), as_layers),
    "table": (
        logit_table(np.sin(np.arange(1.0, 28.0)).reshape(3, 3, 3)).energy,
        3,
        3,
        [0, 1, 2],
        lambda flat: flat,
    ),
}
each_case = pytest.mark.parametrize("name", CASES)


def probability_of_value(draw, wanted, num_categories, num_steps=55):
    """How much of (0, 1) gives the wanted value: the draw is monotone in the uniform number."""

    def first_beyond(is_before):
        low, high = jnp.zeros(wanted.shape[:1]), jnp.ones(wanted.shape[:1])
        for _ in range(num_steps):
            middle = 0.5 * (low + high)
            before = is_before(draw(middle))
            low, high = jnp.where(before, middle, low), jnp.where(before, high, middle)
        return low

    if num_categories is None:
        up = first_beyond(lambda drawn: drawn == 1.0)
        return jnp.where(wanted == 1.0, up, 1.0 - up)
    value = jnp.argmax(wanted, axis=-1)
    below = first_beyond(lambda drawn: jnp.argmax(drawn, axis=-1) < value)
    return first_beyond(lambda drawn: jnp.argmax(drawn, axis=-1) <= value) - below


def sweep_matrix(monkeypatch, name, temperature=TEMPERATURE, blocks=None):
    energy_fn, num_sites, num_categories, case_blocks, build = CASES[name]
    blocks = case_blocks if blocks is None else blocks
    kernel = block.block_gibbs(
        blocks=blocks, num_categories=num_categories, temperature=temperature
    )
    states = jnp.asarray(enumerate_states((num_sites,), num_categories), float)
    original = block._draw_sites

    def one(x, y):
        log_probs = []

        def forced(leaf, gradient, uniform, *options):
            wanted = leaf_for(leaf, build(y))
            chance = probability_of_value(
                lambda u: original(leaf, gradient, u, *options)[0], wanted, num_categories
            )
            log_probs.append(jnp.log(chance))
            return wanted, jnp.ones(wanted.shape[:1], bool)

        def leaf_for(leaf, end):
            leaves = jax.tree.leaves(end)
            if len(leaves) == 1:
                return leaves[0]
            return next(part for part in leaves if part.shape == leaf.shape)

        with monkeypatch.context() as patch:
            patch.setattr(block, "_draw_sites", forced)
            state = kernel.init(energy_fn, (), build(x))
            new, info = kernel.step(jax.random.key(0), energy_fn, (), state)
        # Each call sees a whole array; only the sites of its block are drawn then.
        if isinstance(blocks, Layers):
            total = sum(jnp.sum(part) for part in log_probs)
        else:
            labels = np.asarray(blocks)
            total = sum(jnp.sum(part[labels == b]) for b, part in enumerate(log_probs))
        return jnp.exp(total), new.position, info.energy

    matrix, ends, energy = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))(states, states)
    reached = jnp.concatenate(
        [leaf.reshape(*leaf.shape[:2], -1) for leaf in jax.tree.leaves(ends)], -1
    )
    np.testing.assert_array_equal(reached[0], states.reshape(len(states), -1))
    energies = jax.vmap(lambda x: energy_fn((), build(x)))(states)
    np.testing.assert_allclose(energy, jnp.broadcast_to(energies, energy.shape), atol=1e-12)
    law = jax.nn.softmax(-energies / TEMPERATURE)
    return np.asarray(law), np.asarray(matrix)


@each_case
def test_a_sweep_of_blocks_leaves_the_law_invariant(monkeypatch, x64, name):
    law, matrix = sweep_matrix(monkeypatch, name)
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0, atol=1e-12)
    np.testing.assert_allclose(law @ matrix, law, atol=1e-12)


def test_the_check_sees_a_wrong_temperature(monkeypatch, x64):
    law, matrix = sweep_matrix(monkeypatch, "ising", temperature=1.0)
    assert np.abs(law @ matrix - law).max() > 1e-3


def test_the_check_sees_dependent_sites_in_a_block(monkeypatch, x64):
    """All sites at once. The energy is no longer that of the tangent either."""
    with pytest.raises(AssertionError):
        sweep_matrix(monkeypatch, "ising", blocks=[0, 0, 0, 0])


def test_many_blocks_are_looped_over(x64):
    """More blocks than are unrolled: the same chain as blocks in one program."""
    edges = [(i, j) for i in range(10) for j in range(i)]
    target = ising(edges, 0.2 * np.cos(np.arange(45.0)), np.sin(np.arange(10.0)), num_sites=10)
    kernel = block.block_gibbs(blocks=block.color_graph(edges, 10))
    assert kernel.num_evaluations == 10
    positions = jax.vmap(target.sample)(jax.random.split(jax.random.key(0), 20_000))
    draws = sample(
        jax.random.key(1), kernel, target.energy, (), positions, num_samples=1, thinning=3
    )
    z = (draws.positions[0].mean(0) - target.moments.mean) / np.sqrt(
        np.diag(target.moments.covariance) / len(positions)
    )
    assert np.abs(z).max() < 5.0
    np.testing.assert_allclose(draws.info.energy.shape, (1, 20_000))


def test_held_sites_stay():
    target = ising(EDGES, COUPLING, FIELD, num_sites=4)
    kernel = block.block_gibbs(blocks=[0, -1, 0, -1])
    state = kernel.init(target.energy, (), jnp.array([0.0, 1.0, 0.0, 0.0]))
    ends = jax.vmap(lambda key: kernel.step(key, target.energy, (), state)[0].position)(
        jax.random.split(jax.random.key(0), 100)
    )
    assert np.all(ends[:, 1] == 1.0)
    assert np.all(ends[:, 3] == 0.0)
    assert 0.0 < ends[:, 0].mean() < 1.0


def test_a_gradient_that_is_not_finite_holds_its_site():
    kernel = block.block_gibbs(blocks=[0, 0])
    energy_fn = lambda params, x: x @ jnp.array([jnp.nan, -50.0])  # noqa: E731
    state = kernel.init(energy_fn, (), jnp.zeros(2))
    state, info = kernel.step(jax.random.key(0), energy_fn, (), state)
    assert state.position.tolist() == [0.0, 1.0]
    assert not info.is_finite


def test_colors_are_proper_and_few():
    edges = lattice_edges((6, 6))
    colors = block.color_graph(edges, 36)
    np.testing.assert_array_equal(colors.reshape(6, 6), board.checkerboard_blocks((6, 6)))
    assert block.color_graph(lattice_edges((5,)), 5).max() == 2
    random = np.random.default_rng(0).integers(0, 30, (90, 2))
    random = random[random[:, 0] != random[:, 1]]
    colors = block.color_graph(random, 30)
    assert np.all(colors[random[:, 0]] != colors[random[:, 1]])
    degree = np.bincount(random.reshape(-1), minlength=30).max()
    assert colors.max() <= degree


def test_wrong_blocks_are_named():
    with pytest.raises(ValueError, match="without a gap"):
        block.block_gibbs(blocks=[0, 2])
    with pytest.raises(ValueError, match="itself"):
        block.color_graph([(1, 1)], 2)
    with pytest.raises(ValueError, match="there are 2"):
        block.color_graph([(0, 2)], 2)
    kernel = block.block_gibbs(blocks=[0, 1])
    state = kernel.init(None, (), jnp.zeros(3))
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        kernel.step(jax.random.key(0), lambda params, x: x.sum(), (), state)
    assert block.block_gibbs(blocks=[0, 1]) == block.block_gibbs(blocks=np.array([0, 1]))
    assert block.block_gibbs(blocks=[0, 1]) != block.block_gibbs(blocks=[1, 0])


LATTICES = {
    "torus": ((2, 4), True, 0.35, np.cos(np.arange(8.0)).reshape(2, 4)),
    "antiferromagnet": ((4, 2), True, -0.6, 0.2),
    "free": ((2, 4), False, 0.7, np.cos(np.arange(8.0)).reshape(2, 4)),
    "ring": ((6,), True, 0.9, -0.3),
    "cube": ((2, 2, 2), True, 0.2, 0.4),
}


def checkerboard_matrix(monkeypatch, name, temperature=TEMPERATURE):
    shape, periodic, coupling, field = LATTICES[name]
    target = ising_lattice(shape, coupling=coupling, field=field, periodic=periodic)
    kernel = board.checkerboard_gibbs(periodic=periodic, temperature=temperature)
    states = jnp.asarray(enumerate_states(shape), float)
    original = board.site_thresholds

    def one(x, y):
        seen = []

        def remember(*args):
            seen.append(original(*args).astype(float) * 2.0**-32)
            return original(*args)

        packed = jnp.stack(board.pack(y))
        # The smallest word makes a spin point up, the largest one down.
        words = jnp.where(packed == 1.0, jnp.uint32(0), jnp.uint32(2**32 - 1))
        with monkeypatch.context() as patch:
            patch.setattr(board, "site_thresholds", remember)
            patch.setattr(board, "random_words", lambda key, num: words.reshape(-1))
            state = kernel.init(target.energy, (), x)
            new, info = kernel.step(jax.random.key(0), target.energy, (), state)
        chance = jnp.where(packed == 1.0, jnp.stack(seen), 1.0 - jnp.stack(seen))
        return jnp.prod(chance), new.position, info

    over_all = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))
    matrix, ends, info = over_all(states, states)
    np.testing.assert_array_equal(ends[0], states)
    energies = jax.vmap(lambda x: target.energy((), x))(states)
    np.testing.assert_allclose(info.energy[1], energies, atol=1e-12)
    assert np.all(info.is_finite)
    return np.asarray(jax.nn.softmax(-energies / TEMPERATURE)), np.asarray(matrix)


@pytest.mark.parametrize("name", LATTICES)
def test_a_checkerboard_sweep_leaves_the_law_invariant(monkeypatch, x64, name):
    law, matrix = checkerboard_matrix(monkeypatch, name)
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0, atol=1e-12)
    # Thresholds have 32 bits.
    np.testing.assert_allclose(law @ matrix, law, atol=1e-8)


def test_the_checkerboard_check_sees_bugs(monkeypatch, x64):
    law, matrix = checkerboard_matrix(monkeypatch, "torus", temperature=1.0)
    assert np.abs(law @ matrix - law).max() > 1e-4
    original = board._with_halo
    monkeypatch.setattr(board, "_with_halo", lambda x, periodic: original(x, not periodic))
    with pytest.raises(AssertionError):
        # Neighbours across the border where there is none; the energy of the info sees it at once.
        checkerboard_matrix(monkeypatch, "free")


def test_packing_has_an_inverse():
    for shape in ((6,), (3, 4), (2, 3, 6)):
        x = jnp.arange(np.prod(shape)).reshape(shape)
        even, odd = board.pack(x)
        np.testing.assert_array_equal(board.unpack(even, odd), x)
        parity = board.checkerboard_blocks(shape)
        np.testing.assert_array_equal(np.sort(even.ravel()), np.asarray(x)[parity == 0])
        np.testing.assert_array_equal(np.sort(odd.ravel()), np.asarray(x)[parity == 1])


def test_words_are_used_as_often_as_they_say():
    """The long-run energy of a torus is Kaufman's, and follows the parameters."""
    shape, coupling, num_chains = (8, 8), 0.3, 500
    target = ising_lattice(shape, coupling=coupling)
    kernel = board.checkerboard_gibbs(num_sweeps=5)
    start = jnp.zeros((num_chains, *shape))
    draws = sample(
        jax.random.key(0), kernel, target.energy, (), start, num_samples=20, num_burn_in=20
    )
    energy = jax.vmap(jax.vmap(lambda x: target.energy((), x)))(draws.positions) / coupling / 64
    np.testing.assert_allclose(draws.info.energy / coupling / 64, energy, atol=1e-4)
    means = np.asarray(energy, np.float64).mean(0)
    z = (means.mean() - kaufman_energy(shape, coupling)) / (means.std() / np.sqrt(num_chains))
    assert abs(z) < 5.0
    wrong = (means.mean() - kaufman_energy(shape, 0.31)) / (means.std() / np.sqrt(num_chains))
    assert abs(wrong) > 5.0


@pytest.mark.parametrize("outside", ["anisotropic", "quartic", "nan"])
def test_another_energy_is_refused(outside):
    def energy_fn(params, x):
        spins = 2.0 * x - 1.0
        across, down = (jnp.sum(spins * jnp.roll(spins, 1, axis)) for axis in (1, 0))
        return {
            "anisotropic": -0.3 * across - 0.3 * down - 0.1 * jnp.sum(spins[0] * spins[1]),
            "quartic": -0.3 * across - 0.3 * down + jnp.prod(x[:2, 0]),
            "nan": jnp.nan * across,
        }[outside]

    kernel = board.checkerboard_gibbs()
    state = kernel.init(energy_fn, (), jnp.ones((4, 4)))
    new, info = kernel.step(jax.random.key(0), energy_fn, (), state)
    assert not info.is_finite
    np.testing.assert_array_equal(new.position, state.position)


def test_odd_sides_are_refused():
    kernel = board.checkerboard_gibbs()
    assert isinstance(kernel, Kernel)
    state = kernel.init(None, (), jnp.ones((3, 4)))
    with pytest.raises(ValueError, match=r"\(3, 4\)"):
        kernel.step(jax.random.key(0), lambda params, x: x.sum(), (), state)
