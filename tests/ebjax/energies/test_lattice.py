"""Lattice energies: enumeration, transfer matrices and closed forms agree; planted bugs do not."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.energies import lattice
from ebjax.energies.boltzmann import enumerate_law
from ebjax.energies.exact_lattice import (
    kaufman_energy,
    kaufman_log_z,
    onsager_energy,
    strip_log_z,
)
from ebjax.energies.lattice_field import phi4

SPINS = np.array([-1.0, 1.0])
BOND = np.outer(SPINS, SPINS)
CRITICAL = 0.5 * math.log(1.0 + math.sqrt(2.0))


def enumerated(target, num_categories=None):
    shape = target.event_shape if num_categories is None else target.event_shape[:-1]
    return enumerate_law(target.energy, (), shape, num_categories)


@pytest.mark.parametrize("shape", [(2, 2), (2, 3), (3, 4), (4, 3)])
@pytest.mark.parametrize("coupling", [0.2, CRITICAL, 0.9])
def test_kaufman_is_the_enumerated_torus(x64, shape, coupling):
    target = lattice.ising_lattice(shape, coupling=coupling)
    law = enumerated(target)
    assert abs(kaufman_log_z(shape, coupling) - law.log_z) < 1e-12
    energies = jax.vmap(lambda x: target.energy((), x))(law.states)
    mean = jnp.sum(jnp.exp(law.log_probs) * energies) / coupling / math.prod(shape)
    # The formula differentiates logarithms that vanish at the critical point.
    assert abs(kaufman_energy(shape, coupling) - mean) < 1e-9


def test_kaufman_energy_is_the_slope_of_log_z():
    for coupling in (0.3, 0.44, CRITICAL, 0.6):
        step = 1e-5
        high, low = (kaufman_log_z((16, 12), coupling + s) for s in (step, -step))
        slope = -(high - low) / (2.0 * step) / (16 * 12)
        assert abs(kaufman_energy((16, 12), coupling) - slope) < 1e-6


def test_onsager_is_the_limit_of_large_tori():
    assert abs(onsager_energy(0.3) + 0.7044990708) < 1e-9
    assert abs(onsager_energy(CRITICAL) + math.sqrt(2.0)) < 1e-9
    for coupling in (0.3, 0.6):
        assert abs(kaufman_energy((64, 64), coupling) - onsager_energy(coupling)) < 1e-9
    errors = [abs(kaufman_energy((n, n), CRITICAL) + math.sqrt(2.0)) for n in (8, 16, 32)]
    # At the critical point the error falls as 1/n.
    assert 1.9 < errors[0] / errors[1] < 2.1
    assert 1.9 < errors[1] / errors[2] < 2.1


@pytest.mark.parametrize("closes", list(itertools.product([False, True], repeat=2)))
def test_strips_are_the_enumerated_lattice(x64, closes):
    """With a field that differs from site to site, on sides that close or not, one by one."""
    shape, coupling = (3, 4), 0.37
    field = 0.5 * np.cos(np.arange(12.0)).reshape(shape)

    def energy_fn(params, x):
        spins = 2.0 * x - 1.0
        total = jnp.sum(field * spins)
        for axis in (0, 1):
            first, second = lattice.bonds(spins, axis, closes[axis])
            total = total + coupling * jnp.sum(first * second)
        return -total

    exact = enumerate_law(energy_fn, (), shape).log_z
    ours = strip_log_z(shape, coupling * BOND, field[..., None] * SPINS, closes)
    turned = strip_log_z(shape[::-1], coupling * BOND, field.T[..., None] * SPINS, closes[::-1])
    assert abs(ours - exact) < 1e-12
    assert abs(turned - exact) < 1e-12
    other = strip_log_z(
        shape, coupling * BOND, field[..., None] * SPINS, (closes[0], not closes[1])
    )
    assert abs(other - exact) > 1e-3, "the boundary matters"


def test_strips_are_tori_beyond_enumeration():
    assert (
        abs(strip_log_z((8, 20), 0.4 * BOND, 0.0 * SPINS, True) - kaufman_log_z((8, 20), 0.4))
        < 1e-9
    )
    target = lattice.ising_lattice((12, 30), coupling=0.4, field=0.1, periodic=False)
    assert target.log_z is not None
    with pytest.raises(ValueError, match="width 13"):
        strip_log_z((13, 13), BOND, SPINS, True)


KNOWN = {
    "graph": lambda: (
        lattice.ising(
            [(0, 1), (1, 2), (0, 3)], [0.4, -0.8, 1.1], [0.1, 0.2, -0.5, 0.0], num_sites=4
        ),
        None,
    ),
    "torus": lambda: (lattice.ising_lattice((3, 3), coupling=0.4), None),
    "field": lambda: (
        lattice.ising_lattice((2, 4), coupling=-0.4, field=np.arange(8.0).reshape(2, 4) / 9),
        None,
    ),
    "free": lambda: (lattice.ising_lattice((3, 3), coupling=0.4, periodic=False), None),
    "ring": lambda: (lattice.ising_lattice((7,), coupling=0.6, field=-0.2), None),
    "cube": lambda: (lattice.ising_lattice((2, 2, 2), coupling=0.2), None),
    "potts_graph": lambda: (
        lattice.potts([(0, 1), (1, 2)], [0.7, -0.3], [0.2, 0.0, -0.4], num_sites=3),
        3,
    ),
    "potts": lambda: (
        lattice.potts_lattice((2, 3), num_categories=3, coupling=0.6, field=[0.3, 0.0, -0.1]),
        3,
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_targets_know_their_law(x64, name):
    target, num_categories = KNOWN[name]()
    law = enumerated(target, num_categories)
    assert abs(target.log_z - law.log_z) < 1e-12
    assert isinstance(target.log_z, float)
    flat = law.states.reshape(len(law.states), -1)
    probs = jnp.exp(law.log_probs)
    np.testing.assert_allclose(target.moments.mean, probs @ flat, atol=1e-12)
    centred = flat - probs @ flat
    covariance = centred.T @ (probs[:, None] * centred)
    np.testing.assert_allclose(target.moments.covariance, covariance, atol=1e-12)
    draws = jax.vmap(target.sample)(jax.random.split(jax.random.key(0), 10_000))
    assert draws.shape == (10_000, *target.event_shape)
    error = draws.reshape(10_000, -1).mean(0) - target.moments.mean
    assert np.abs(error / np.sqrt(np.diag(covariance) / 10_000)).max() < 5.0


def test_long_potts_strips(x64):
    """A chain in closed form: Z = (e^J + K - 1)^(L-1) K without a field and ends."""
    target = lattice.potts_lattice((40,), num_categories=4, coupling=0.7, periodic=False)
    exact = 39 * math.log(math.exp(0.7) + 3.0) + math.log(4.0)
    assert abs(target.log_z - exact) < 1e-10


@pytest.mark.parametrize("name", KNOWN)
def test_energies_are_affine_in_every_variable(x64, name):
    """So a gradient has the exact energy of every change of one site."""
    target, num_categories = KNOWN[name]()
    x = target.sample(jax.random.key(3))
    energy, gradient = jax.value_and_grad(lambda x: target.energy((), x))(x)
    num_sites = x.size // (num_categories or 1)
    for site in range(num_sites):
        if num_categories is None:
            moved = x.reshape(-1).at[site].set(1.0 - x.reshape(-1)[site]).reshape(x.shape)
        else:
            rows = x.reshape(-1, num_categories)
            moved = rows.at[site].set(jnp.roll(rows[site], 1)).reshape(x.shape)
        change = target.energy((), moved) - energy
        assert abs(change - jnp.sum(gradient * (moved - x))) < 1e-12


def test_parametric_energies_are_the_targets():
    edges = lattice.lattice_edges((3, 4))
    x = jax.random.bernoulli(jax.random.key(0), 0.4, (3, 4)).astype(jnp.float32)
    on_graph, on_lattice = lattice.ising_energy(edges), lattice.ising_lattice_energy()
    params = on_graph.init(jax.random.key(1), x)
    assert params.coupling.shape == (24,)
    params = lattice.IsingParams(jnp.full(24, 0.3), jnp.full((3, 4), 0.1))
    target = lattice.ising_lattice((3, 4), coupling=0.3, field=0.1)
    assert abs(on_graph.apply(params, x) - target.energy((), x)) < 1e-5
    scalar = lattice.IsingParams(jnp.array(0.3), jnp.array(0.1))
    assert abs(on_lattice.apply(scalar, x) - target.energy((), x)) < 1e-5
    gradient = jax.grad(on_lattice.apply)(scalar, x)
    assert gradient.coupling.shape == ()
    for dtype in (jnp.float32, jnp.float16):
        assert target.energy((), x.astype(dtype)).dtype == dtype


@pytest.mark.parametrize("periodic", [True, False])
def test_the_free_field_is_gaussian(x64, periodic):
    target = phi4((3, 4), mass_squared=0.7, coupling=0.0, periodic=periodic)
    precision = jax.hessian(lambda x: target.energy((), x.reshape(3, 4)))(jnp.zeros(12))
    np.testing.assert_allclose(target.moments.covariance, np.linalg.inv(precision), atol=1e-12)
    log_z = 6.0 * math.log(2.0 * math.pi) - 0.5 * np.linalg.slogdet(precision)[1]
    assert abs(target.log_z - log_z) < 1e-12
    draws = jax.vmap(target.sample)(jax.random.split(jax.random.key(0), 20_000)).reshape(-1, 12)
    whitened = draws @ np.linalg.cholesky(precision)
    second = whitened.T @ whitened / len(draws)
    assert np.abs((second - np.eye(12)) * math.sqrt(len(draws) / 2.0)).max() < 5.0


@pytest.mark.parametrize("periodic", [True, False])
@pytest.mark.parametrize(("mass_squared", "coupling"), [(0.5, 2.0), (-1.5, 3.0)])
def test_a_chain_of_two_is_the_integral(x64, periodic, mass_squared, coupling):
    target = phi4((2,), mass_squared=mass_squared, coupling=coupling, periodic=periodic)
    grid = jnp.linspace(-9.0, 9.0, 801)
    energies = jax.vmap(
        jax.vmap(lambda a, b: target.energy((), jnp.stack([a, b])), (0, None)), (None, 0)
    )(grid, grid)
    exact = jax.nn.logsumexp(-energies) + 2.0 * jnp.log(grid[1] - grid[0])
    assert abs(target.log_z - exact) < 1e-10


def test_a_nearly_free_chain_is_nearly_gaussian():
    """The quadrature against the determinant, on a long chain, to first order in λ."""
    shape, mass_squared, coupling = (30,), 0.8, 1e-6
    free = phi4(shape, mass_squared=mass_squared, coupling=0.0)
    chain = phi4(shape, mass_squared=mass_squared, coupling=coupling)
    variance = free.moments.covariance[0, 0]
    assert abs(chain.log_z - (free.log_z - 30 * coupling / 24 * 3 * variance**2)) < 1e-9 * 30


WRONG = {
    "1 sites|at least 2": lambda: lattice.ising_lattice((1, 4), coupling=0.1),
    "there are 2": lambda: lattice.ising([(0, 2)], 1.0, 0.0, num_sites=2),
    "num_categories is 1": lambda: lattice.potts_lattice((2, 2), num_categories=1, coupling=0.1),
    "coupling is -1": lambda: phi4((2,), mass_squared=1.0, coupling=-1.0),
    "mass_squared -1": lambda: phi4((2,), mass_squared=-1.0, coupling=0.0),
    "coupling is 0": lambda: kaufman_log_z((2, 2), 0.0),
    "coupling is -0.1": lambda: onsager_energy(-0.1),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_calls_are_named(message):
    with pytest.raises(ValueError, match=message):
        WRONG[message]()
