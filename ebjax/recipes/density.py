"""A law in the plane, learned by any objective, and judged exactly by quadrature.

The data are draws of a known law, so that the divergence from it of what was learned is a number
and no estimate. One config chooses the data set and the objective; settings that are left at -1
follow the objective (and the step size of chains the data set).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from ebjax.energies import targets
from ebjax.recipes.density_methods import KERNELS, METHODS, data_frame
from ebjax.training import (
    AdamConfig,
    by_group,
    check_at_least,
    check_between,
    check_widths,
    setting,
)
from ebjax.types import Recipe, Run, Source, Target, TrainState

__all__ = ["DATASETS", "DensityConfig", "recipe"]

DATASETS = ("eight_gaussians", "two_moons", "pinwheel", "checkerboard", "rings")

# Steps of chains are half the variance of the finest structure, or less; frequencies one over its
# deviation, or less. Where energies get as steep as at edges, chains without a Metropolis test
# overshoot, the more the energy is raised where they land: then training runs away.
_BY_DATASET: dict[str, dict[str, Any]] = {
    "eight_gaussians": {"langevin_step_size": 0.02, "frequency_scale": 1.5},
    "two_moons": {"langevin_step_size": 0.05, "frequency_scale": 1.0},
    "pinwheel": {"langevin_step_size": 0.005, "frequency_scale": 3.0, "kernel": "mala"},
    "checkerboard": {"langevin_step_size": 0.02, "frequency_scale": 2.0, "kernel": "mala"},
    "rings": {"langevin_step_size": 0.003, "frequency_scale": 4.0, "kernel": "mala"},
}

_BY_SAMPLES: dict[str, Any] = {
    "learning_rate": 1e-3,
    "adam_b1": 0.0,
    "ema_decay": 0.99,
    "learning_rate_final_fraction": 1.0,
    "base_scale": 0.0,
}
_COMMON: dict[str, Any] = {
    "num_steps": 2000,
    "batch_size": 256,
    "learning_rate": 3e-3,
    "learning_rate_final_fraction": 0.0,
    "adam_b1": 0.9,
    "ema_decay": 0.99,
    "base_scale": 2.0,
    "energy_regularizer": 0.0,
    "langevin_steps": 40,
    "kernel": "langevin",
    "data_noise": 0.0,
    "num_noise": 1,
}
# What each objective changes of that.
_OWN: dict[str, dict[str, Any]] = {
    "pcd": {**_BY_SAMPLES, "energy_regularizer": 0.01},
    "cd": {**_BY_SAMPLES, "energy_regularizer": 0.01},
    "short_run": {**_BY_SAMPLES, "energy_regularizer": 0.01},
    "jarzynski": {"langevin_steps": 10, "base_scale": 1.4, "ema_decay": 0.99, "adam_b1": 0.0},
    "score_matching": {"data_noise": 0.1},
    "sliced_score_matching": {"data_noise": 0.1},
    "finite_difference_score_matching": {"data_noise": 0.1},
    # No chains: an update is cheap, and each level sees a tenth of it.
    "denoising_score_matching": {"num_steps": 6000},
    "recovery_likelihood": {"langevin_steps": 15, "energy_regularizer": 0.01},
    "noise_contrastive": {"num_noise": 4},
    "conditional_noise_contrastive": {"num_noise": 4},
    "flow_contrastive": {},
    "cooperative": {**_BY_SAMPLES, "energy_regularizer": 0.01, "kernel": "mala"},
}
_BOUNDS = (-5.0, 5.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DensityConfig(AdamConfig):
    """Settings of a density run; -1 follows the objective."""

    dataset: str = setting("eight_gaussians", f"the law: {', '.join(DATASETS)}")
    objective: str = setting("pcd", f"how it is learned: {', '.join(_OWN)}")
    num_steps: int = setting(-1, follows="objective")
    batch_size: int = setting(-1, follows="objective")
    ema_decay: float = setting(-1.0, follows="objective")
    hidden_features: tuple[int, ...] = setting((128, 128), "widths of the network's hidden layers")
    num_frequencies: int = setting(32, "random Fourier features of the position, 0 for none")
    frequency_scale: float = setting(
        -1.0, "standard deviation of their frequencies", follows="dataset"
    )
    base_scale: float = setting(
        -1.0,
        "deviation of the Gaussian that the energy starts from, in that of the data; 0: none",
        follows="objective",
    )
    data_noise: float = setting(
        -1.0, "standard deviation of noise on the data", follows="objective"
    )
    learning_rate: float = setting(-1.0, follows="objective")
    learning_rate_final_fraction: float = setting(-1.0, follows="objective")
    adam_b1: float = setting(-1.0, follows="objective")
    energy_regularizer: float = setting(-1.0, "weight of squared energies", follows="objective")
    gradient_penalty: float = setting(0.0, "pcd: weight of the squared slope of the energy")
    spectral_bound: float = setting(
        0.0, "pcd: largest singular value of each weight matrix; 0: not held"
    )
    divergence_weight: float = setting(
        0.0, "pcd: weight of the term for how chains depend on the parameters"
    )
    reset_margin: float = setting(
        0.0, "pcd: chains lower than the data by more than this are born anew; 0: never"
    )
    langevin_steps: int = setting(
        -1, "steps of a chain in one update (recovery_likelihood: on a level)", follows="objective"
    )
    langevin_step_size: float = setting(-1.0, "h of the chains", follows="dataset")
    kernel: str = setting(
        "auto",
        f"the chains of training: {', '.join(KERNELS)}, or 'auto': as the law needs",
        follows="dataset",
    )
    chains_per_example: int = setting(20, "pcd, jarzynski: chains of each example slot")
    walkers_moved: int = setting(4, "jarzynski: how many of these move in one update")
    rebirth_probability: float = setting(0.0, "pcd: chance that a chain starts anew from noise")
    num_slices: int = setting(1, "sliced objectives: slices of an example")
    finite_difference_step: float = setting(0.05, "finite differences: the step in a coordinate")
    num_noise_levels: int = setting(10, "denoising: noise levels, 1 for a plain energy")
    narrowest_noise: float = setting(0.07, "denoising: the noise level of the law that is learned")
    widest_noise: float = setting(2.0, "denoising: the widest noise level")
    recovery_levels: int = setting(6, "recovery_likelihood: levels")
    recovery_step: float = setting(0.1, "recovery_likelihood: h in units of the tether's variance")
    shared_noise: bool = setting(True, "recovery_likelihood: same noise in both of a pair")
    num_noise: int = setting(
        -1, "contrastive estimation: noise points of an example", follows="objective"
    )
    perturbation_scale: float = setting(
        0.5, "conditional_noise_contrastive: deviation of the noise in that of the data"
    )
    flow_layers: int = setting(6, "flow_contrastive, cooperative: coupling layers")
    flow_player: str = setting("likelihood", "flow_contrastive: adversarial or likelihood")
    flow_learning_rate: float = setting(1e-3, "flow_contrastive, cooperative: of the flow")
    num_proposals: int = setting(
        16, "cooperative: draws of the flow of which the energy chooses one for a chain"
    )
    sample_steps: int = setting(500, "steps from noise when samples are asked for")
    num_grid_points: int = setting(201, "points of the quadrature in a direction")

    def __post_init__(self) -> None:
        """Fills in what follows the objective, then checks types and ranges."""
        for name, known in (("dataset", DATASETS), ("objective", METHODS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}."
                )
        own = {**_COMMON, **_OWN[self.objective], **_BY_DATASET[self.dataset]}
        if self.kernel == "auto":
            object.__setattr__(self, "kernel", own["kernel"])
        for field in dataclasses.fields(self):
            follows = field.metadata.get("follows") in ("objective", "dataset")
            if follows and getattr(self, field.name) == -1:
                object.__setattr__(self, field.name, own[field.name])
        super().__post_init__()
        if self.kernel not in KERNELS:
            raise ValueError(
                f"kernel is {self.kernel!r}; it must be one of auto, {', '.join(KERNELS)}."
            )
        check_at_least(self, 1, "langevin_steps", "chains_per_example", "num_slices", "num_noise")
        check_at_least(self, 1, "walkers_moved", "num_proposals")
        check_at_least(self, 1, "num_noise_levels", "recovery_levels", "sample_steps")
        check_at_least(self, 0, "base_scale", "data_noise", "flow_learning_rate")
        check_at_least(self, 0, "energy_regularizer", "num_frequencies", "gradient_penalty")
        check_at_least(self, 0, "spectral_bound", "divergence_weight", "reset_margin")
        check_at_least(self, 1e-6, "langevin_step_size", "finite_difference_step", "recovery_step")
        check_at_least(self, 1e-6, "narrowest_noise", "perturbation_scale", "frequency_scale")
        check_at_least(self, 2, "flow_layers")
        check_between(self, 0, 1, "rebirth_probability")
        check_between(self, 11, 2001, "num_grid_points")
        check_widths(self, "hidden_features")


def _mode_masses(law, modes) -> np.ndarray:
    """[number of modes] mass of the points nearer to a mode than to any other."""
    points = np.stack(np.meshgrid(*law.axes, indexing="ij"), axis=-1)
    nearest = np.square(points[..., None, :] - np.asarray(modes)).sum(-1).argmin(-1)
    mass = np.exp(law.log_weights + law.log_density)
    return np.bincount(nearest.ravel(), weights=mass.ravel(), minlength=len(modes))


def build(config: DensityConfig) -> Run:
    """Makes the run of a config."""
    target: Target = getattr(targets, config.dataset)()
    method = METHODS[config.objective](config, data_frame(target))

    def example(arrays, key, position):
        del arrays
        draw_key, noise_key = jax.random.split(jax.random.fold_in(key, position))
        return target.sample(draw_key) + config.data_noise * jax.random.normal(noise_key, (2,))

    groups = {
        "energy": config.optimizer(),
        "log_z": config.optimizer(10.0 * config.learning_rate),
        "flow": config.optimizer(config.flow_learning_rate),
        "sampler": config.optimizer(config.flow_learning_rate),
    }
    names = {
        "noise_contrastive": ["energy", "log_z"],
        "flow_contrastive": ["energy", "log_z", "flow"],
        "cooperative": ["energy", "sampler"],
    }
    used = names.get(config.objective)
    draw_many = jax.jit(jax.vmap(method.sample, (0, None)))
    energies_of = jax.jit(jax.vmap(method.data_energy, (None, 0)))

    def law_of(state: TrainState):
        from ebjax.evaluation import grid_law

        return grid_law(
            method.data_energy, state.ema, bounds=_BOUNDS, num_points=config.num_grid_points
        )

    def law_of_data():
        from ebjax.evaluation import grid_law

        return grid_law(target.energy, (), bounds=_BOUNDS, num_points=config.num_grid_points)

    def sample(key, state: TrainState, num_samples: int):
        positions = draw_many(jax.random.split(key, num_samples), state.ema)
        return {
            "positions": np.asarray(positions),
            "energies": np.asarray(energies_of(state.ema, positions)),
        }

    def data(key, num: int) -> np.ndarray:
        assert target.sample is not None  # every law of DATASETS has exact draws
        return np.asarray(jax.jit(jax.vmap(target.sample))(jax.random.split(key, num)))

    def monitor(key, state: TrainState):
        from ebjax.evaluation import grid_figures

        del key
        figures = grid_figures(law_of(state), law_of_data())
        return {"kl": figures["kl_reference_model"], "total_variation": figures["total_variation"]}

    def evaluate(key, state: TrainState):
        from ebjax.evaluation import grid_figures, maximum_mean_discrepancy

        law, reference = law_of(state), law_of_data()
        exact = grid_figures(law, reference)
        figures = {
            "kl": exact["kl_reference_model"],
            "total_variation": exact["total_variation"],
            "cross_entropy": exact["kl_reference_model"] + exact["entropy_reference"],
            "entropy": exact["entropy_model"],
            "log_z": exact["log_z"],
            "boundary_mass": law.boundary_mass,
        }
        if target.modes is not None:
            masses, true = (_mode_masses(each, target.modes) for each in (law, reference))
            figures["num_modes"] = float(len(true))
            figures["modes_covered"] = float(np.sum(masses > 0.25 * true))
            figures["mode_mass_error"] = float(0.5 * np.abs(masses - true).sum())
        sample_key, data_key, other_key = jax.random.split(key, 3)
        draws, held_out = sample(sample_key, state, 1000)["positions"], data(data_key, 1000)
        figures["samples_finite"] = float(np.isfinite(draws).all(axis=1).mean())
        if figures["samples_finite"] == 1.0:
            figures["mmd"] = maximum_mean_discrepancy(draws, held_out)
        figures["mmd_of_data"] = maximum_mean_discrepancy(data(other_key, 1000), held_out)
        return figures

    def figures(key, state: TrainState, samples):
        from ebjax.recipes.density_figures import landscape

        drawn = {"data": data(key, 2000), "samples": samples["positions"]}
        return {"landscape": landscape(law_of_data(), law_of(state), drawn)}

    return Run(
        init=method.init,
        objective=method.objective,
        optimizer=by_group({n: groups[n] for n in used}) if used else groups["energy"],
        source=Source((), example),
        sample=sample,
        evaluate=evaluate,
        figures=figures,
        monitor=monitor,
        monitor_name="kl",
        progress=("loss", "gradient_norm"),
        energy=method.data_energy,
        draw=method.sample,
    )


recipe = Recipe(DensityConfig, build, seed_is_key=True)
