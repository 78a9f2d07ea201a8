"""EB-GFN: the couplings of an Ising model from its samples, with a flow that draws the negatives.

    p(s) ∝ exp(s'J s),    J symmetric with zero diagonal, s ∈ {-1, 1}^D

The data are draws of J = σ A, A the adjacency of a torus, so that a bond counts twice: the critical
coupling is σ = 0.2203. All D (D - 1) / 2 couplings are learned. Negatives come from the flow, whose
target is the energy of the moment, or from persistent chains with as many evaluations of it
(``gflownet.recipes.eb_gfn_method``).

The figure is -log RMSE(J, σ A) over all D² entries. It says as much of the data as of the method:
of a finite sample the exact maximum of the likelihood has a figure of its own, and to that a method
can be held. Up to 16 spins the maximum is found by Newton's method on all states, and the gap of
the log-likelihood to it is exact. J = 0 stands beside them; beyond σ = 0.4 it is as good as what is
published.

Zhang, Malkin, Liu, Volokhova, Courville and Bengio, "Generative flow networks for discrete
probabilistic modeling", ICML 2022.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from ebjax.data import array_source
from ebjax.energies.lattice import ising_lattice, lattice_edges
from ebjax.samplers import checkerboard_gibbs, gibbs, sample
from ebjax.samplers.run import run_chain
from ebjax.training import check_at_least, setting
from ebjax.types import Energy, Kernel, Params, Recipe, Run, TrainState, bind
from gflownet.recipes.eb_gfn_method import EnergyAndFlowConfig, make_method, random_bits

__all__ = [
    "EBGFlowNetConfig",
    "coupling_matrix",
    "ising_samples",
    "maximum_likelihood",
    "recipe",
    "true_couplings",
]

# Of the chains that draw data, and of those that show what was learned without a flow.
_NUM_SWEEPS = 500
_MAX_EXACT_SPINS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class EBGFlowNetConfig(EnergyAndFlowConfig):
    """Settings of the run."""

    side: int = setting(4, "sides of the torus, even; up to 4 likelihoods are exact")
    coupling: float = setting(0.2, "coupling of neighbours in the law of the data")
    num_examples: int = setting(2000, "draws to learn from")
    num_held_out: int = setting(2000, "draws to judge by while the run goes on")
    l1_weight: float = setting(0.0, "weight of Σ |J| over all entries")
    learning_rate: float = setting(5e-3, "largest learning rate of the couplings (Adam)")

    def __post_init__(self) -> None:
        """Checks types and ranges."""
        super().__post_init__()
        if self.side < 4 or self.side % 2:
            raise ValueError(f"side is {self.side}; it must be even and at least 4.")
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


def _energy(couplings: jax.Array, x: jax.Array) -> jax.Array:
    """``-s'J s`` of x in {0, 1}, s = 2x - 1."""
    spins = 2.0 * jnp.ravel(x) - 1.0
    return -spins @ coupling_matrix(couplings, len(spins)) @ spins


def _l1(energy_fn, couplings, x, *, weight):
    """Half of the penalty, which counts at the data and at the negatives."""
    del energy_fn, x
    return weight * jnp.abs(couplings).sum()


def ising_samples(key: jax.Array, side: int, coupling: float, num: int) -> np.ndarray:
    """[num, side²] float32 in {0, 1}: ends of as many checkerboard chains from random spins.

    Above the critical coupling chains keep to the sign, and for long to the stripes, that they fell
    into; signs are equally likely.

    Args:
      key: of the chains.
      side: of the torus, even.
      coupling: σ; a bond of the lattice has twice that.
      num: of chains.
    """
    start_key, chain_key = jax.random.split(key)
    start = jax.random.bernoulli(start_key, 0.5, (num, side, side)).astype(jnp.float32)
    target = ising_lattice((side, side), coupling=2.0 * coupling)
    draws = sample(
        chain_key,
        checkerboard_gibbs(),
        target.energy,
        (),
        start,
        num_samples=1,
        thinning=_NUM_SWEEPS,
    )
    return np.asarray(draws.positions[-1]).reshape(num, -1)


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


def _mean_products(examples: np.ndarray) -> np.ndarray:
    """[D (D - 1) / 2] mean of s_i s_j."""
    spins = 2.0 * np.asarray(examples, np.float64) - 1.0
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

    def pseudo_log_likelihood(couplings: np.ndarray, examples: np.ndarray) -> float:
        """Σ_i log p(s_i | rest), mean over examples; p = σ(4 s_i (J s)_i)."""
        spins = 2.0 * examples.astype(np.float64) - 1.0
        matrix = np.asarray(coupling_matrix(jnp.asarray(couplings), num_spins), np.float64)
        return -float(np.logaddexp(0.0, -4.0 * spins * (spins @ matrix)).sum(axis=1).mean())

    def monitor(key, state: TrainState):
        del key
        value = pseudo_log_likelihood(np.asarray(state.ema["energy"]), held_out)
        return {"negative_pseudo_log_likelihood": -value}

    def evaluate(key, state: TrainState):
        params = state.ema
        couplings = np.asarray(params["energy"], np.float64)
        is_exact = num_spins <= _MAX_EXACT_SPINS
        figures = {
            "negative_log_rmse": _negative_log_rmse(couplings, truth),
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
