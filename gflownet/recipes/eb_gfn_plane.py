"""EB-GFN: a law in the plane as bits, an energy of them, and a flow that draws the negatives.

    p(x) ∝ exp(-E(x)),    x ∈ {0, 1}^{2B}, E a perceptron

A coordinate is a sign and a Gray code (``gflownet.recipes.eb_gfn_plane_data``); the data are drawn
anew for each update. Negatives come from the flow, whose target is the energy of the moment, or
from persistent chains with as many evaluations of it (``gflownet.recipes.eb_gfn_method``). The flow
sets bits from the coarsest to the finest, so that one path leads to each x and its likelihood is
exact; the published one sets them in any order (``order``).

The figure is the negative log-likelihood of the energy on data, whose floor is the entropy of the
data's code; the gap is their Kullback-Leibler divergence. With B = 8 all 65,536 states are listed
and both are sums over the exact law of the code, as is log Z. Beyond that log Z is estimated by
importance weights of the flow, too low where it misses a mode, and the likelihood is a mean over
fresh draws. The law of the flow itself is judged by backward trajectories τ,

    -log p(x) = -log mean_τ P_F(τ) / P_B(τ | x)

on fresh draws, which is too high for few trajectories, and by the discrepancy of samples,
k(x, y) = exp(-0.1 Hamming distance).

Zhang, Malkin, Liu, Volokhova, Courville and Bengio, "Generative flow networks for discrete
probabilistic modeling", ICML 2022.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import logsumexp

from ebjax.energies.networks import mlp_energy
from ebjax.evaluation import GridLaw, energies_of
from ebjax.samplers.diagnostics import maximum_mean_discrepancy
from ebjax.training import check_at_least, check_between, check_widths, setting
from ebjax.types import Params, Recipe, Run, Source, TrainState
from gflownet.recipes.eb_gfn_method import EnergyAndFlowConfig, make_method
from gflownet.recipes.eb_gfn_plane_data import (
    LAWS,
    cell_centres,
    coded_law,
    decode,
    encode,
    entropy,
)

__all__ = ["EBGFlowNetPlaneConfig", "recipe"]

_MAX_EXACT_BITS = 8
_HAMMING_WIDTH = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class EBGFlowNetPlaneConfig(EnergyAndFlowConfig):
    """Settings of the run."""

    dataset: str = setting("two_spirals", f"the law: {', '.join(LAWS)}")
    order: str = setting("append")
    bits: int = setting(8, "of a coordinate; up to 8 likelihoods are exact")
    energy_features: tuple[int, ...] = setting((128, 128, 128), "widths of the energy's layers")
    learning_rate: float = setting(3e-3, "largest learning rate of the energy (Adam)")
    policy_learning_rate: float = setting(3e-3)
    hidden_features: tuple[int, ...] = setting((128, 128, 128))
    num_steps: int = setting(3000)
    num_paths: int = setting(
        20, "any_order, random_order: backward trajectories of an example when the flow is judged"
    )
    num_evaluated: int = setting(4000, "draws when the run is judged")

    def __post_init__(self) -> None:
        """Checks types and ranges."""
        super().__post_init__()
        if self.dataset not in LAWS:
            raise ValueError(f"dataset is {self.dataset!r}; it must be one of {', '.join(LAWS)}.")
        check_between(self, 2, 16, "bits")
        if self.negatives != "flow" and self.bits > _MAX_EXACT_BITS:
            raise ValueError(
                f"bits is {self.bits}; with negatives {self.negatives!r} it must be at most "
                f"{_MAX_EXACT_BITS}, as there is no flow to estimate log Z with."
            )
        check_at_least(self, 1, "num_paths")
        check_widths(self, "energy_features")


def build(config: EBGFlowNetPlaneConfig) -> Run:
    """Makes the run of a config."""
    law, bits = LAWS[config.dataset], config.bits
    num_bits, is_exact = 2 * bits, bits <= _MAX_EXACT_BITS
    shown_bits = min(bits, _MAX_EXACT_BITS)
    energy = mlp_energy(config.energy_features, activation=jax.nn.elu, center=0.5, scale=0.5)
    method = make_method(config, energy, num_bits)
    flow = method.flow
    centres = cell_centres(law.half_side, shown_bits)
    grid = jnp.asarray(np.stack(np.meshgrid(centres, centres, indexing="ij"), axis=-1), float)
    # All states where they are listed, and else one in each cell of the picture.
    states = encode(grid.reshape(-1, 2), law.half_side, bits)

    def example(arrays, key, position):
        del arrays
        return encode(law.sample(jax.random.fold_in(key, position)), law.half_side, bits)

    def data(key, num: int) -> jax.Array:
        return jax.jit(jax.vmap(example, (None, None, 0)))((), key, jnp.arange(num))

    def listed(key, params: Params) -> jax.Array:
        """A state by its exact probability."""
        energies = jax.lax.map(lambda x: method.energy(params, x), states, batch_size=1024)
        shares = jnp.cumsum(jax.nn.softmax(-energies))
        index = jnp.searchsorted(shares, jax.random.uniform(key, maxval=shares[-1]))
        return states[jnp.minimum(index, len(states) - 1)]

    draw = listed if flow is None else flow.draw
    draw_many = jax.jit(jax.vmap(draw, (0, None)))

    def sample(key, state: TrainState, num_samples: int):
        code = draw_many(jax.random.split(key, num_samples), state.ema)
        return {
            "bits": np.asarray(code),
            "positions": np.asarray(decode(code, law.half_side)),
        }

    def likelihood(key, params: Params) -> dict[str, float]:
        """``nll`` and ``log_z``; the key is not used where they are exact."""
        if is_exact:
            energies = energies_of(method.energy, params, states)
            log_z = float(logsumexp(-energies))
            return {"nll": float(coded_law(law, bits).ravel() @ energies) + log_z, "log_z": log_z}
        assert flow is not None  # as the config has checked
        bounds_key, data_key = jax.random.split(key)
        bounds = flow.bounds(bounds_key, params, config.num_evaluated)
        energies = energies_of(method.energy, params, data(data_key, config.num_evaluated))
        return {
            "nll": float(energies.mean()) + bounds.log_z,
            "log_z": bounds.log_z,
            "log_z_standard_error": bounds.log_z_standard_error,
        }

    def monitor(key, state: TrainState):
        return {"nll": likelihood(key, state.ema)["nll"]}

    def evaluate(key, state: TrainState):
        params = state.ema
        keys = jax.random.split(key, 5)
        figures = likelihood(keys[0], params)
        floor = entropy(law, bits)
        figures |= {"entropy": floor, "gap": figures["nll"] - floor}
        held_out = data(keys[1], config.num_evaluated)
        if flow is not None:
            num_paths = 1 if config.order == "append" else config.num_paths
            log_p = flow.log_probabilities(keys[2], params, held_out, num_paths)
            # Beside the energy on the same draws, so that their choice matters little.
            energies = energies_of(method.energy, params, held_out)
            gap = float(np.mean(-energies - figures["log_z"] - log_p))
            figures |= {
                "nll_of_flow": figures["nll"] + gap,
                "gap_of_flow": gap,
                "log_z_error": abs(float(params["log_z"]) - figures["log_z"]),
            }
        drawn = sample(keys[3], state, config.num_evaluated)["bits"]
        for name, draws in (("mmd", drawn), ("mmd_of_data", data(keys[4], len(drawn)))):
            figures[name] = float(
                maximum_mean_discrepancy(draws, held_out, bandwidth=_HAMMING_WIDTH)
            )
        return figures

    def figures(key, state: TrainState, samples):
        from ebjax.figures import density_2d

        del key
        energies = energies_of(method.energy, state.ema, states).reshape(len(centres), -1)
        with np.errstate(divide="ignore"):
            laws = {
                "data": _grid_law(centres, -np.log(coded_law(law, shown_bits))),
                "energy": _grid_law(centres, energies),
            }
        title = "energy" if flow is None else "flow"
        return {"densities": density_2d(laws, samples={f"{title}, samples": samples["positions"]})}

    return Run(
        init=method.init,
        objective=method.objective,
        optimizer=method.optimizer,
        source=Source((), example),
        sample=sample,
        evaluate=evaluate,
        figures=figures,
        monitor=monitor,
        monitor_name="nll",
        progress=method.progress,
        energy=method.energy,
        flow=None if flow is None else flow.flow,
        draw=draw,
    )


def _grid_law(centres: np.ndarray, energies: np.ndarray) -> GridLaw:
    """The law of the cells as a density in the plane."""
    log_area = 2.0 * np.log(centres[1] - centres[0])
    log_z = float(logsumexp(log_area - energies))
    return GridLaw(
        axes=(centres, centres),
        energies=energies,
        log_weights=np.full_like(energies, log_area),
        log_density=-energies - log_z,
        log_z=log_z,
        log_z_error=0.0,
        boundary_mass=0.0,
    )


recipe = Recipe(EBGFlowNetPlaneConfig, build, seed_is_key=True)
