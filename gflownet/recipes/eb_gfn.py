"""EB-GFN: the couplings of an Ising model from its samples, with a flow that draws the negatives.

    p(s) ∝ exp(s'J s),    J symmetric with zero diagonal, s ∈ {-1, 1}^D

The data are draws of J = σ A, A the adjacency of a torus, so that a bond counts twice: the critical
coupling is σ = 0.2203. All D (D - 1) / 2 couplings are learned. Negatives come from the flow, whose
target is the energy of the moment, or from persistent chains with as many evaluations of it
(``gflownet.recipes.eb_gfn_method``).

The figure is -log RMSE(J, σ A) over all D² entries. It says as much of the data as of the method:
of a finite sample the exact maximum of the likelihood has a figure of its own, and to that a method
can be held. Up to 16 spins the maximum is found by Newton's method on all states, and the gap of
the log-likelihood to it is exact. The maximum of the pseudolikelihood stands beside it at any size,
and J = 0; beyond σ = 0.4 that is as good as what is published.

Most couplings are 0, and what is learned of those is noise. The figure of the refit is that of the
largest pseudolikelihood where only couplings that stand out of the noise may differ from 0: those
beyond σ̂ √(2 log n), with n couplings in all and σ̂ their spread (the universal threshold).

Zhang, Malkin, Liu, Volokhova, Courville and Bengio, "Generative flow networks for discrete
probabilistic modeling", ICML 2022. Besag, "Statistical analysis of non-lattice data", The
Statistician 24 (1975). Donoho and Johnstone, "Ideal spatial adaptation by wavelet shrinkage",
Biometrika 81 (1994).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import expit

from ebjax.data import array_source
from ebjax.energies.lattice import lattice_edges
from ebjax.samplers import block_gibbs, color_graph, gibbs, parallel_tempering, sample
from ebjax.samplers.run import run_chain
from ebjax.training import check_at_least, setting
from ebjax.types import Energy, Kernel, Params, Recipe, Run, TrainState, bind
from gflownet.recipes.eb_gfn_method import EnergyAndFlowConfig, make_method, random_bits

__all__ = [
    "EBGFlowNetConfig",
    "coupling_matrix",
    "ising_samples",
    "maximum_likelihood",
    "maximum_pseudolikelihood",
    "recipe",
    "support",
    "true_couplings",
]

# Of the chains that draw data, and of those that show what was learned without a flow.
_NUM_SWEEPS = 500
# Replicas of the chains that draw data: from a bond where they mix at once, in steps (times the
# side) of which about a third is accepted at the critical coupling.
_WEAK_BOND, _BOND_STEP, _SWEEPS_OF_EXCHANGE = 0.3, 0.5, 5
_MAX_EXACT_SPINS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class EBGFlowNetConfig(EnergyAndFlowConfig):
    """Settings of the run."""

    side: int = setting(4, "sides of the torus; up to 4 likelihoods are exact")
    coupling: float = setting(0.2, "coupling of neighbours in the law of the data")
    num_examples: int = setting(2000, "draws to learn from")
    num_held_out: int = setting(2000, "draws to judge by while the run goes on")
    l1_weight: float = setting(0.0, "weight of Σ |J| over all entries")
    learning_rate: float = setting(5e-3, "largest learning rate of the couplings (Adam)")

    def __post_init__(self) -> None:
        """Checks types and ranges."""
        super().__post_init__()
        check_at_least(self, 3, "side")
        check_at_least(self, 1, "num_examples", "num_held_out")
        check_at_least(self, 0, "l1_weight")
        check_at_least(self, -10, "coupling")


def coupling_matrix(couplings: jax.Array, num_spins: int) -> jax.Array:
    """J [D, D], symmetric with zero diagonal, from its entries i < j [D (D - 1) / 2], row by row.

    >>> coupling_matrix(jnp.array([1.0, 2.0, 3.0]), 3).tolist()
    [[0.0, 1.0, 2.0], [1.0, 0.0, 3.0], [2.0, 3.0, 0.0]]
    """
    rows, columns = np.triu_indices(num_spins, 1)
    upper = jnp.zeros((num_spins, num_spins), couplings.dtype).at[rows, columns].set(couplings)
    return upper + upper.T


def _energy_of_matrix(matrix: jax.Array, x: jax.Array) -> jax.Array:
    """``-s'J s`` of x in {0, 1}, s = 2x - 1."""
    spins = 2.0 * jnp.ravel(x) - 1.0
    return -spins @ (matrix @ spins)


def _energy(couplings: jax.Array, x: jax.Array) -> jax.Array:
    return _energy_of_matrix(coupling_matrix(couplings, x.size), x)


def _l1(energy_fn, couplings, x, *, weight):
    """Half of the penalty, which counts at the data and at the negatives."""
    del energy_fn, x
    return weight * jnp.abs(couplings).sum()


def ising_samples(key: jax.Array, side: int, coupling: float, num: int) -> np.ndarray:
    """[num, side²] float32 in {0, 1}: ends of as many chains of block Gibbs from random spins.

    Where bonds are strong, chains keep to the sign and the stripes that they fell into; there each
    is the cold replica of parallel tempering.

    Args:
      key: of the chains.
      side: of the torus, at least 3.
      coupling: σ; a bond of the lattice has twice that.
      num: of chains.
    """
    num_spins, bond = side * side, 2.0 * abs(coupling)
    kernel = block_gibbs(blocks=color_graph(lattice_edges((side, side)), num_spins))
    num_replicas = 1 + int(np.ceil((bond - _WEAK_BOND) * side / _BOND_STEP))
    if num_replicas > 1:
        ladder = np.linspace(_WEAK_BOND / bond, 1.0, num_replicas)
        kernel = parallel_tempering(
            kernel, inverse_temperatures=ladder, num_local_steps=_SWEEPS_OF_EXCHANGE
        )
    start_key, chain_key = jax.random.split(key)
    draws = sample(
        chain_key,
        kernel,
        _energy_of_matrix,
        jnp.asarray(true_couplings(side, coupling), jnp.float32),
        jax.random.bernoulli(start_key, 0.5, (num, num_spins)).astype(jnp.float32),
        num_samples=1,
        thinning=_NUM_SWEEPS // (_SWEEPS_OF_EXCHANGE if num_replicas > 1 else 1),
    )
    return np.asarray(draws.positions[-1])


def true_couplings(side: int, coupling: float) -> np.ndarray:
    """[D, D] σ A of the torus."""
    matrix = np.zeros((side * side, side * side))
    first, second = lattice_edges((side, side)).T
    matrix[first, second] = matrix[second, first] = coupling
    return matrix


@functools.lru_cache(maxsize=2)
def _pair_products(num_spins: int) -> np.ndarray:
    """[2^(D - 1), D (D - 1) / 2] s_i s_j of all states whose first spin is up, float64."""
    numbers = np.arange(2 ** (num_spins - 1))[:, None]
    spins = 1.0 - 2.0 * (numbers >> np.arange(num_spins)[::-1] & 1)
    rows, columns = np.triu_indices(num_spins, 1)
    return spins[:, rows] * spins[:, columns]


def exact_law(couplings: np.ndarray, num_spins: int) -> tuple[np.ndarray, float]:
    """``(p [2^(D - 1)], log Z)``; each p is that of a state and its mirror image together.

    >>> round(exact_law(true_couplings(4, 0.2)[np.triu_indices(16, 1)], 16)[1], 6)
    14.561093
    """
    scores = 2.0 * _pair_products(num_spins) @ np.asarray(couplings, np.float64)
    peak = scores.max()
    weights = np.exp(scores - peak)
    total = weights.sum()
    return weights / total, float(peak + np.log(2.0 * total))


def maximum_likelihood(examples: np.ndarray) -> np.ndarray:
    """[D (D - 1) / 2] couplings i < j of the largest likelihood, by Newton's method on all states.

    Args:
      examples: [N, D] in {0, 1}, at most 16 spins.

    Raises:
      ValueError: for more spins, or if there is no maximum: spins that always or never agree.
    """
    num_spins = examples.shape[1]
    if num_spins > _MAX_EXACT_SPINS:
        raise ValueError(f"examples have {num_spins} spins; at most {_MAX_EXACT_SPINS} are listed.")
    observed, products = _mean_products(examples), _pair_products(num_spins)
    if np.abs(observed).max() == 1.0:
        raise ValueError("examples have two spins that always or never agree; give more of them.")

    def log_likelihood(couplings):
        return 2.0 * couplings @ observed - exact_law(couplings, num_spins)[1]

    couplings = np.zeros(len(observed))
    for _ in range(50):
        law, _ = exact_law(couplings, num_spins)
        mean = law @ products
        gradient = 2.0 * (observed - mean)
        if np.abs(gradient).max() < 1e-9:
            break
        curvature = 4.0 * (products.T @ (law[:, None] * products) - np.outer(mean, mean))
        step = np.linalg.solve(curvature, gradient)
        size, here = 1.0, log_likelihood(couplings)
        while size > 1e-6 and log_likelihood(couplings + size * step) < here:
            size *= 0.5
        couplings = couplings + size * step
    return couplings


def _pseudo_log_likelihood(matrix: np.ndarray, spins: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean over spins [N, D] of Σ_i log p(s_i | rest), and its gradient by J [D, D].

    p(s_i | rest) = 1 / (1 + exp(-4 s_i (J s)_i)); J_ij and J_ji are one parameter.
    """
    scores = 4.0 * spins * (spins @ matrix)
    gradient = 4.0 * (spins * expit(-scores)).T @ spins / len(spins)
    return -float(np.logaddexp(0.0, -scores).sum(axis=1).mean()), gradient + gradient.T


def maximum_pseudolikelihood(examples: np.ndarray, is_free: np.ndarray | None = None) -> np.ndarray:
    """[D (D - 1) / 2] couplings i < j of the largest pseudolikelihood, by L-BFGS in float64.

    Args:
      examples: [N, D] in {0, 1}.
      is_free: [D (D - 1) / 2] bool, which couplings may differ from 0; all by default.

    >>> examples = np.array([[1, 1]] * 3 + [[1, 0]])
    >>> bool(np.isclose(maximum_pseudolikelihood(examples)[0], np.log(3) / 4, atol=1e-5))
    True
    """
    from scipy import optimize  # slow to import

    spins = _spins(examples)
    rows, columns = np.triu_indices(spins.shape[1], 1)
    couplings = np.zeros(len(rows))
    chosen = np.flatnonzero(np.ones(len(rows), bool) if is_free is None else is_free)
    at = rows[chosen], columns[chosen]

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        matrix = np.zeros((spins.shape[1],) * 2)
        matrix[at] = values
        value, gradient = _pseudo_log_likelihood(matrix + matrix.T, spins)
        return -value, -gradient[at]

    if len(chosen):
        options = {"maxiter": 1000, "ftol": 1e-12, "gtol": 1e-8}
        found = optimize.minimize(
            loss, couplings[chosen], jac=True, method="L-BFGS-B", options=options
        )
        couplings[chosen] = found.x
    return couplings


def support(couplings: np.ndarray, num_examples: int) -> np.ndarray:
    """[n] bool: the couplings [n] that stand out of the noise of the others, most of which are 0.

    |J| > σ̂ √(2 log n), which n normal numbers of standard deviation σ̂ hardly reach;
    σ̂ = median|J| / 0.6745, at least 1 / (2 √N), the standard error from N examples at J = 0.

    >>> support(np.array([0.1, -0.2, 0.1, 5.0, -0.1, 0.2]), 100).tolist()
    [False, False, False, True, False, False]
    """
    sizes = np.abs(couplings)
    spread = max(np.median(sizes) / 0.6745, 0.5 / np.sqrt(num_examples))
    return sizes > spread * np.sqrt(2.0 * np.log(len(sizes)))


def _spins(examples: np.ndarray) -> np.ndarray:
    """The same of {0, 1} in {-1, 1}, float64."""
    return 2.0 * np.asarray(examples, np.float64) - 1.0


def _mean_products(examples: np.ndarray) -> np.ndarray:
    """[D (D - 1) / 2] mean of s_i s_j."""
    spins = _spins(examples)
    return (spins.T @ spins / len(spins))[np.triu_indices(spins.shape[1], 1)]


def _negative_log_rmse(couplings: np.ndarray, truth: np.ndarray) -> float:
    """Over all D² entries of J, given those with i < j."""
    rows, columns = np.triu_indices(len(truth), 1)
    square = 2.0 * np.square(np.asarray(couplings, np.float64) - truth[rows, columns]).sum()
    return float(-0.5 * np.log(square / truth.size))


def _exact_figures(couplings: np.ndarray, best: np.ndarray, truth: np.ndarray, observed):
    """Of couplings beside those of the largest likelihood, and of the laws of all states."""
    upper = np.triu_indices(len(truth), 1)
    law, log_z = exact_law(truth[upper], len(truth))
    _, learned_log_z = exact_law(couplings, len(truth))
    _, best_log_z = exact_law(best, len(truth))
    mean = law @ _pair_products(len(truth))
    return {
        "negative_log_rmse_of_maximum_likelihood": _negative_log_rmse(best, truth),
        "largest_error_to_maximum_likelihood": float(np.abs(couplings - best).max()),
        "log_likelihood_gap": float(
            2.0 * (best - couplings) @ observed - best_log_z + learned_log_z
        ),
        "kullback_leibler": float(2.0 * (truth[upper] - couplings) @ mean - log_z + learned_log_z),
    }


def build(config: EBGFlowNetConfig) -> Run:
    """Makes the run of a config."""
    shape, num_spins = (config.side, config.side), config.side**2
    truth = true_couplings(config.side, config.coupling)
    drawn = ising_samples(
        jax.random.key(config.seed),
        config.side,
        config.coupling,
        config.num_examples + config.num_held_out,
    )
    training, held_out = np.split(drawn, [config.num_examples])
    regularizers = (bind(_l1, weight=config.l1_weight),) if config.l1_weight else ()
    num_couplings = num_spins * (num_spins - 1) // 2
    energy = Energy(init=lambda key, x: jnp.zeros(num_couplings), apply=_energy)
    method = make_method(config, energy, num_spins, regularizers=regularizers)
    sweep: Kernel = gibbs(scan="systematic", num_updates=num_spins)

    def last_of_chain(key, params: Params) -> jax.Array:
        start_key, chain_key = jax.random.split(key)
        chain = sweep.init(method.energy, params, random_bits(start_key, num_spins))
        return run_chain(chain_key, sweep, method.energy, params, chain, _NUM_SWEEPS)[0].position

    draw = last_of_chain if method.flow is None else method.flow.draw
    draw_many = jax.jit(jax.vmap(draw, (0, None)))

    def sample_spins(key, state: TrainState, num_samples: int):
        x = np.asarray(draw_many(jax.random.split(key, num_samples), state.ema))
        return {"spins": x.reshape(-1, *shape)}

    @functools.cache
    def best() -> np.ndarray:
        return maximum_likelihood(training)

    held_out_spins = _spins(held_out)

    def monitor(key, state: TrainState):
        del key
        matrix = np.asarray(coupling_matrix(state.ema["energy"], num_spins), np.float64)
        return {
            "negative_pseudo_log_likelihood": -_pseudo_log_likelihood(matrix, held_out_spins)[0]
        }

    def evaluate(key, state: TrainState):
        params = state.ema
        couplings = np.asarray(params["energy"], np.float64)
        is_exact = num_spins <= _MAX_EXACT_SPINS
        found = support(couplings, len(training))
        figures = {
            "negative_log_rmse": _negative_log_rmse(couplings, truth),
            "negative_log_rmse_of_refit": _negative_log_rmse(
                maximum_pseudolikelihood(training, found), truth
            ),
            "support_errors": int((found != (truth[np.triu_indices(num_spins, 1)] != 0)).sum()),
            "negative_log_rmse_of_pseudolikelihood": _negative_log_rmse(
                maximum_pseudolikelihood(training), truth
            ),
            "negative_log_rmse_of_zero": _negative_log_rmse(np.zeros_like(couplings), truth),
            **monitor(key, state),
        }
        if is_exact:
            figures |= _exact_figures(couplings, best(), truth, _mean_products(training))
        if method.flow is not None:
            bounds = method.flow.bounds(key, params, config.num_evaluated)
            log_z = exact_law(couplings, num_spins)[1] if is_exact else bounds.log_z
            figures |= {
                "log_z": float(params["log_z"]),
                "log_z_error": abs(float(params["log_z"]) - log_z),
                "elbo_gap": log_z - bounds.elbo,
            }
        return figures

    def figures(key, state: TrainState, samples):
        del key, samples
        learned = np.asarray(coupling_matrix(state.ema["energy"], num_spins))
        return {"couplings": _couplings({"true": truth, "learned": learned})}

    return Run(
        init=method.init,
        objective=method.objective,
        optimizer=method.optimizer,
        source=array_source(training),
        sample=sample_spins,
        evaluate=evaluate,
        figures=figures,
        monitor=monitor,
        monitor_name="negative_pseudo_log_likelihood",
        progress=method.progress,
        energy=method.energy,
        flow=None if method.flow is None else method.flow.flow,
        draw=draw,
    )


def _couplings(matrices: dict[str, np.ndarray]):
    """J side by side, in colours of one scale."""
    from matplotlib.figure import Figure

    from ebjax.figures.style import INK

    figure = Figure(figsize=(4.0 * len(matrices), 3.8), dpi=120, layout="constrained")
    limit = max(1e-6, *(float(np.abs(matrix).max()) for matrix in matrices.values()))
    all_axes = figure.subplots(1, len(matrices), squeeze=False)[0]
    for axes, (name, matrix) in zip(all_axes, matrices.items(), strict=True):
        image = axes.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit)
        axes.set_title(f"J, {name}", color=INK, fontsize=10)
        axes.set_axis_off()
    figure.colorbar(image, ax=list(all_axes), shrink=0.8)
    return figure


recipe = Recipe(EBGFlowNetConfig, build)
