"""Discrete kernels against their enumerated transition matrices, in double precision.

The matrix of a Metropolis kernel is built from the proposal's log-probabilities, as a function in
the kernel's file gives them, and from the acceptance that the kernel's own ``step`` reports when
its draws are replaced by chosen ones. Gibbs kernels are read as black boxes: where a uniform number
changes the outcome is found by bisection.
"""

import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.energies.boltzmann import enumerate_states

TEMPERATURE = 1.4
SHAPES = {"binary": (3, None), "categorical": (3, 3)}
each_kind = pytest.mark.parametrize("kind", SHAPES)


def module(name):
    return importlib.import_module(f"ebjax.samplers.{name}")


gwg, dlp, pas = (
    module(name) for name in ("gibbs_with_gradients", "discrete_langevin", "path_auxiliary")
)
single, discrete = module("gibbs"), module("discrete")


def rough_energy(params, x):
    """Neither symmetric nor multilinear: the gradient is not the difference of energies."""
    flat = x.reshape(-1)
    slope = jnp.sin(jnp.arange(1.0, flat.size + 1.0))
    pairs = jnp.cos(jnp.outer(jnp.arange(1.0, flat.size + 1.0), jnp.arange(2.0, flat.size + 2.0)))
    return params * (flat @ slope + 0.4 * flat @ pairs @ flat) + 0.3 * jnp.sum(flat * slope) ** 3


def states_of(kind):
    num_sites, num_categories = SHAPES[kind]
    return np.asarray(enumerate_states((num_sites,), num_categories), float), num_categories


def index_of(states):
    """Row numbers of positions among ``states``."""
    table = {np.asarray(x, np.float32).tobytes(): i for i, x in enumerate(states)}
    return lambda x: table[np.asarray(x, np.float32).tobytes()]


def stationary(energy_fn, params, states, temperature=TEMPERATURE):
    log_p = -np.array([energy_fn(params, jnp.asarray(x)) for x in states]) / temperature
    weights = np.exp(log_p - log_p.max())
    return weights / weights.sum()


def balance_error(law, matrix):
    flow = law[:, None] * matrix
    return np.abs(flow - flow.T).max()


def add_rejections(matrix):
    return matrix + np.diag(1.0 - matrix.sum(axis=1))


def gwg_matrix(monkeypatch, kind, balancing="sqrt"):
    states, num_categories = states_of(kind)
    kernel = gwg.gibbs_with_gradients(
        num_categories=num_categories, temperature=TEMPERATURE, balancing=balancing
    )
    options = kernel.step.keywords
    num_moves = states[0].size

    def one(x, move):
        state = kernel.init(rough_energy, 0.8, x)
        with monkeypatch.context() as patch:
            patch.setattr(gwg, "choose", lambda uniform, log_weights: move)
            patch.setattr(gwg, "uniforms", lambda key, shape, dtype: jnp.zeros(shape, dtype))
            new, info = kernel.step(jax.random.key(0), rough_energy, 0.8, state)
        log_q = gwg.log_proposal(state, **options)[move]
        return jnp.exp(log_q), info.acceptance_rate, new.position

    moves = jnp.arange(num_moves, dtype=jnp.int32)
    q, rate, ends = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))(states, moves)
    np.testing.assert_allclose(q.sum(axis=1), 1.0, atol=1e-12)
    matrix, find = np.zeros((len(states), len(states))), index_of(states)
    for i, k in itertools.product(range(len(states)), range(num_moves)):
        if q[i, k] > 0.0:
            matrix[i, find(ends[i, k])] += q[i, k] * rate[i, k]
            assert find(ends[i, k]) != i
    return add_rejections(matrix), kernel


def dlp_matrix(monkeypatch, kind, is_adjusted=True, step_size=0.7, gradient_power=0.5):
    states, num_categories = states_of(kind)
    options = {
        "step_size": step_size,
        "num_categories": num_categories,
        "temperature": TEMPERATURE,
        "gradient_power": gradient_power,
    }
    kernel = dlp.discrete_langevin(**options, is_adjusted=is_adjusted)

    def one(x, y):
        state = kernel.init(rough_energy, 0.8, x)

        def forced(key, shape, dtype):
            # Below any probability where binary sites are to flip, above any where not.
            flips = jnp.zeros(shape, dtype)
            return flips if num_categories else flips.at[:-1].set(jnp.where(x != y, 0.0, 1.0))

        with monkeypatch.context() as patch:
            patch.setattr(dlp, "uniforms", forced)
            patch.setattr(dlp, "choose_category", lambda uniform, logits: y)
            _, info = kernel.step(jax.random.key(0), rough_energy, 0.8, state)
        return jnp.exp(dlp.log_proposal(state, y, **options)), info.acceptance_rate

    q, rate = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))(states, states)
    np.testing.assert_allclose(q.sum(axis=1), 1.0, atol=1e-12)
    matrix = np.asarray(q * rate)
    return (add_rejections(matrix) if is_adjusted else matrix), kernel


def paths_of(kind, length, is_fast):
    """Moves (site, value) of all paths, [P, length, 2]; the value is ignored for binary sites."""
    num_sites, num_categories = SHAPES[kind]
    values = range(num_categories or 1)
    moves = list(itertools.product(range(num_sites), values))
    paths = itertools.product(moves, repeat=length)
    if is_fast:
        paths = [p for p in paths if len({site for site, _ in p}) == length]
    return np.array(list(paths)).reshape(-1, length, 2)


def sequential_probability(log_weights, path):
    """Drawing distinct sites one after the other, written as it is said."""
    weights = np.exp(log_weights - np.max(log_weights)).copy()
    probability = 1.0
    for site, value in path:
        chosen = weights[site] if weights.ndim == 1 else weights[site, value]
        probability *= chosen / weights.sum()
        weights[site] = 0.0
    return probability


def pas_matrix(monkeypatch, kind, is_fast, radius=1.5):
    states, num_categories = states_of(kind)
    kernel = pas.path_auxiliary(
        radius=radius, is_fast=is_fast, num_categories=num_categories, temperature=TEMPERATURE
    )
    max_length, num_sites = kernel.step.keywords["max_length"], len(states[0])
    options = {
        name: kernel.step.keywords[name] for name in ("num_categories", "temperature", "balancing")
    }
    log_q_at = lambda state: discrete.move_log_weights(state, **options)  # noqa: E731
    find = index_of(states)
    matrix = np.zeros((len(states), len(states)))

    def one(x, path):
        length = len(path)
        state = kernel.init(rough_energy, 0.8, x)
        padded = jnp.concatenate([path, jnp.zeros((max_length - length, 2), path.dtype)])
        length_uniform = (length - 0.5) / (2 * radius - 1)

        def forced(key, shape, dtype):
            if is_fast:
                gumbel = (
                    jnp.full(num_sites, -8.0).at[path[:, 0]].set(30.0 - 8.0 * jnp.arange(length))
                )
                tail = jnp.zeros(shape[0] - num_sites - 1)
                return jnp.concatenate(
                    [jnp.exp(-jnp.exp(-gumbel)), jnp.array([length_uniform]), tail]
                )
            index = padded[:, 0] * (num_categories or 1) + padded[:, 1]
            moves = jnp.stack([index, index], axis=-1).reshape(-1).astype(dtype)
            return jnp.concatenate([jnp.array([length_uniform, 0.0]), moves])

        with monkeypatch.context() as patch:
            patch.setattr(pas, "uniforms", forced)
            patch.setattr(pas, "choose", lambda u, log_weights: u[0].astype(jnp.int32))
            patch.setattr(
                pas,
                "choose_category",
                lambda u, logits: jax.nn.one_hot(padded[:, 1], num_categories),
            )
            new, info = kernel.step(jax.random.key(0), rough_energy, 0.8, state)
        return new.position, info.acceptance_rate

    log_weights = np.asarray(
        jax.vmap(lambda x: log_q_at(kernel.init(rough_energy, 0.8, x)))(states)
    )
    for length in range(1, max_length + 1):
        paths = paths_of(kind, length, is_fast)
        ends, rates = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))(
            states, jnp.asarray(paths)
        )
        total = np.zeros(len(states))
        for i, (p, path) in itertools.product(range(len(states)), enumerate(paths)):
            if is_fast:
                q = sequential_probability(log_weights[i], path)
            else:
                q = fresh_probability(log_weights, states, find, i, path, num_categories)
            if q == 0.0:
                continue
            total[i] += q
            # A path whose end is its start changes nothing, accepted or not.
            matrix[i, find(ends[i, p])] += q * rates[i, p] / (2 * radius - 1)
        np.testing.assert_allclose(total, 1.0, atol=1e-12)
    return add_rejections(matrix), kernel


def fresh_probability(log_weights, states, find, start, path, num_categories):
    probability, x = 1.0, states[start].copy()
    for site, value in path:
        weights = np.exp(log_weights[find(x)])
        new = x.copy()
        if num_categories is None:
            probability *= weights[site] / weights.sum()
            new[site] = 1.0 - x[site]
        else:
            probability *= weights[site, value] / weights.sum()
            new[site] = np.eye(num_categories)[value]
        x = new
        if probability == 0.0:
            break
    return probability


def gibbs_matrix(monkeypatch, kind, scan="random"):
    """[sites] matrices of one update each, from the logits that the kernel draws by."""
    states, num_categories = states_of(kind)
    kernel = single.gibbs(num_categories=num_categories, temperature=TEMPERATURE, scan=scan)
    num_sites, num_values = len(states[0]), num_categories or 2
    find = index_of(states)

    def one(x, site, index):
        state = kernel.init(rough_energy, 0.8, x)._replace(site=site)
        seen = []

        def forced(uniform, logits):
            seen.append(jnp.exp(jax.nn.log_softmax(logits)))
            return jax.nn.one_hot(index, num_values)

        with monkeypatch.context() as patch:
            patch.setattr(single, "choose_category", forced)
            patch.setattr(
                single,
                "uniforms",
                lambda key, shape, dtype: jnp.array([[(site + 0.5) / num_sites, 0.5]]),
            )
            new, _ = kernel.step(jax.random.key(0), rough_energy, 0.8, state)
        return new.position, seen[0][index], new.site

    one = jax.vmap(jax.vmap(jax.vmap(one, (None, None, 0)), (None, 0, None)), (0, None, None))
    sites, values = jnp.arange(num_sites, dtype=jnp.int32), jnp.arange(num_values)
    ends, q, next_site = jax.jit(one)(states, sites, values)
    if scan == "systematic":
        np.testing.assert_array_equal(next_site[0, :, 0], (np.arange(num_sites) + 1) % num_sites)
    matrices = np.zeros((num_sites, len(states), len(states)))
    for i, j, k in np.ndindex(*q.shape):
        matrices[j, i, find(ends[i, j, k])] += q[i, j, k]
    np.testing.assert_allclose(matrices.sum(axis=-1), 1.0, atol=1e-12)
    return matrices, kernel


@each_kind
@pytest.mark.parametrize("balancing", sorted(discrete.BALANCING))
def test_gibbs_with_gradients_is_in_detailed_balance(monkeypatch, x64, kind, balancing):
    matrix, _ = gwg_matrix(monkeypatch, kind, balancing)
    law = stationary(rough_energy, 0.8, states_of(kind)[0])
    assert balance_error(law, matrix) < 1e-12


@each_kind
def test_discrete_langevin_is_in_detailed_balance(monkeypatch, x64, kind):
    matrix, _ = exact(monkeypatch, "dmala", kind)
    law = stationary(rough_energy, 0.8, states_of(kind)[0])
    assert balance_error(law, matrix) < 1e-12


def separate_energy(params, x):
    return params * jnp.sum(x * jnp.sin(jnp.arange(1.0, x.size + 1.0)).reshape(x.shape))


@each_kind
def test_any_power_of_the_gradient_is_in_detailed_balance(monkeypatch, x64, kind):
    states = states_of(kind)[0]
    matrix, _ = dlp_matrix(monkeypatch, kind, gradient_power=0.8)
    assert balance_error(stationary(rough_energy, 0.8, states), matrix) < 1e-12
    # Of sites that do not interact, power 1 and endless steps draw from the law itself.
    monkeypatch.setitem(globals(), "rough_energy", separate_energy)
    law = stationary(separate_energy, 0.8, states)
    for power, is_exact in ((1.0, True), (0.5, False)):
        options = {"step_size": 1e12, "gradient_power": power}
        matrix, _ = dlp_matrix(monkeypatch, kind, **options)
        assert balance_error(law, matrix) < 1e-12
        assert (np.abs(matrix - law).max() < 1e-9) == is_exact


@each_kind
@pytest.mark.parametrize("is_fast", [True, False])
def test_path_auxiliary_is_in_detailed_balance(monkeypatch, x64, kind, is_fast):
    matrix, _ = exact(monkeypatch, "pas_fast" if is_fast else "pas_fresh", kind)
    law = stationary(rough_energy, 0.8, states_of(kind)[0])
    assert balance_error(law, matrix) < 1e-12


def test_long_paths_are_in_detailed_balance(monkeypatch, x64):
    matrix, _ = pas_matrix(monkeypatch, "binary", True, radius=2.0)
    law = stationary(rough_energy, 0.8, states_of("binary")[0])
    assert balance_error(law, matrix) < 1e-12


@each_kind
def test_every_gibbs_update_is_in_detailed_balance(monkeypatch, x64, kind):
    for scan in ("random", "systematic"):
        matrices, _ = gibbs_matrix(monkeypatch, kind, scan)
        law = stationary(rough_energy, 0.8, states_of(kind)[0])
        assert max(balance_error(law, matrix) for matrix in matrices) < 1e-12
        sweep = np.linalg.multi_dot(list(matrices))
        np.testing.assert_allclose(law @ sweep, law, atol=1e-12)
        if scan == "systematic":
            assert balance_error(law, sweep) > 1e-4, "a sweep is not reversible"


MATRICES = {
    "gwg": lambda patch, kind: gwg_matrix(patch, kind),
    "dmala": lambda patch, kind: dlp_matrix(patch, kind),
    "dula": lambda patch, kind: dlp_matrix(patch, kind, is_adjusted=False),
    "pas_fast": lambda patch, kind: pas_matrix(patch, kind, True),
    "pas_fresh": lambda patch, kind: pas_matrix(patch, kind, False),
    "gibbs": lambda patch, kind: (lambda m, k: (m.mean(axis=0), k))(*gibbs_matrix(patch, kind)),
}


CACHE = {}


def exact(monkeypatch, name, kind):
    """A matrix and its kernel, made once for all tests."""
    if (name, kind) not in CACHE:
        CACHE[name, kind] = MATRICES[name](monkeypatch, kind)
    return CACHE[name, kind]


def frequency_z_scores(matrix, kernel, kind, num_draws=20_000):
    """Steps from two states, counted, against the rows of the matrix."""
    states, _ = states_of(kind)
    find, worst = index_of(states), 0.0

    @jax.jit
    def draw(x, keys):
        state = kernel.init(rough_energy, 0.8, x)
        return jax.vmap(lambda k: kernel.step(k, rough_energy, 0.8, state)[0].position)(keys)

    for start in (0, len(states) // 3):
        keys = jax.random.split(jax.random.key(start), num_draws)
        ends = np.asarray(draw(jnp.asarray(states[start]), keys))
        counts = np.zeros(len(states))
        unique, numbers = np.unique(ends.reshape(num_draws, -1), axis=0, return_counts=True)
        for row, number in zip(unique, numbers, strict=True):
            counts[find(row.reshape(states[0].shape))] += number
        row = matrix[start]
        assert np.all(counts[row < 1e-14] == 0)
        known = row * num_draws > 20.0
        error = counts[known] - row[known] * num_draws
        z = error / np.sqrt(num_draws * row[known] * (1.0 - row[known]) + 1e-9)
        worst = max(worst, np.abs(z).max())
    return worst


@each_kind
@pytest.mark.parametrize("name", MATRICES)
def test_steps_happen_as_often_as_the_matrix_says(monkeypatch, x64, name, kind):
    matrix, kernel = exact(monkeypatch, name, kind)
    assert frequency_z_scores(matrix, kernel, kind) < 5.0


@each_kind
def test_the_unadjusted_law_tends_to_the_target_for_quadratic_energies(monkeypatch, x64, kind):
    """At a finite step size it is another law; the adjusted one is not."""
    distances = []

    def quadratic(params, x):
        flat, index = x.reshape(-1), jnp.arange(x.size)
        return params * (
            flat @ jnp.sin(index + 1.0) + 0.2 * jnp.square(flat @ jnp.cos(index + 2.0))
        )

    monkeypatch.setitem(globals(), "rough_energy", quadratic)
    law = stationary(quadratic, 0.8, states_of(kind)[0])
    for step_size in (1.0, 0.2, 0.1):
        matrix, _ = dlp_matrix(monkeypatch, kind, is_adjusted=False, step_size=step_size)
        # The stationary law: the null space of P' - 1, with the sum 1.
        system = np.vstack([matrix.T - np.eye(len(law)), np.ones(len(law))])
        right = np.append(np.zeros(len(law)), 1.0)
        own = np.linalg.lstsq(system, right, rcond=None)[0]
        distances.append(np.abs(own - law).sum())
    assert distances[0] > 1e-2
    assert distances[0] > 3.0 * distances[1] > 9.0 * distances[2]


def balance_error_with(monkeypatch, kind, kernel_module, name, broken, make_matrix):
    law = stationary(rough_energy, 0.8, states_of(kind)[0])
    with monkeypatch.context() as patch:
        patch.setattr(kernel_module, name, broken)
        return balance_error(law, make_matrix(monkeypatch, kind)[0])


PLANTED = {
    "gwg": (gwg, gwg_matrix),
    "dmala": (dlp, dlp_matrix),
    "pas_fast": (pas, lambda patch, kind: pas_matrix(patch, kind, True)),
    "pas_fresh": (pas, lambda patch, kind: pas_matrix(patch, kind, False)),
}


@pytest.mark.parametrize("name", PLANTED)
def test_the_check_sees_a_missing_reverse_proposal(monkeypatch, x64, name):
    kernel_module, make_matrix = PLANTED[name]
    accept = discrete.accept_or_stay

    def uncorrected(uniform, log_acceptance, state, proposal, num_categories):
        plain = (state.energy - proposal.energy) / TEMPERATURE
        return accept(uniform, plain, state, proposal, num_categories)

    args = (kernel_module, "accept_or_stay", uncorrected, make_matrix)
    assert balance_error_with(monkeypatch, "binary", *args) > 1e-4


def test_the_check_sees_a_stale_gradient(monkeypatch, x64):
    """The reversed move weighed with the gradient at the start."""
    kernel_module, make_matrix = PLANTED["gwg"]
    init, starts = discrete.init_with_gradient, []

    def stale(energy_fn, params, position):
        return init(energy_fn, params, position)._replace(gradient=starts[-1].gradient)

    log_proposal = gwg.log_proposal

    def remember(state, **options):
        starts.append(state)
        return log_proposal(state, **options)

    monkeypatch.setattr(gwg, "log_proposal", remember)
    kernel = gwg.gibbs_with_gradients(temperature=TEMPERATURE)
    monkeypatch.setattr(gwg, "gibbs_with_gradients", lambda **options: kernel)
    args = (kernel_module, "init_with_gradient", stale, make_matrix)
    assert balance_error_with(monkeypatch, "binary", *args) > 1e-4


def test_the_check_sees_paths_weighed_with_replacement(monkeypatch, x64):
    def with_replacement(log_rest, log_chosen, is_used, *, reverse):
        total = jnp.logaddexp(log_rest, jax.nn.logsumexp(jnp.where(is_used, log_chosen, -jnp.inf)))
        return jnp.sum(jnp.where(is_used, log_chosen - total, 0.0))

    kernel_module, make_matrix = PLANTED["pas_fast"]
    args = (kernel_module, "log_ordered", with_replacement, make_matrix)
    assert balance_error_with(monkeypatch, "binary", *args) > 1e-4


def test_the_check_sees_a_wrong_temperature(monkeypatch, x64):
    law = stationary(rough_energy, 0.8, states_of("binary")[0], temperature=1.0)
    for make_matrix in (gwg_matrix, dlp_matrix):
        assert balance_error(law, make_matrix(monkeypatch, "binary")[0]) > 1e-4


@pytest.mark.parametrize("name", ["gwg", "dmala"])
def test_the_frequencies_see_another_matrix(monkeypatch, x64, name):
    matrix, kernel = exact(monkeypatch, name, "binary")
    wrong = 0.9 * matrix + 0.1 * np.eye(len(matrix))
    assert frequency_z_scores(wrong, kernel, "binary") > 5.0
