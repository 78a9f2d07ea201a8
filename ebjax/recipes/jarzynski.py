"""Two modes far apart with unequal masses: what each way of drawing negatives learns of them.

Data of ¼ N(-5 e_1, I) + ¾ N(4 e_1, I); an energy with two means and one log weight as parameters,
which starts between the modes with equal weights; one set of walkers, one step of unadjusted
Langevin dynamics an update, three methods:

    jarzynski   walkers weighted by Jarzynski's equality, resampled     masses found
    pcd         the same walkers without weights                        all mass in one mode
    cd          chains that start at the data, each update              masses as they started

No chain crosses between the modes once they are apart, so only the weights know where mass belongs.
The law is known exactly, so everything is judged by numbers: masses, means, KL divergence, log Z.

Carbone, Hua, Coste and Vanden-Eijnden, "Efficient training of energy-based models using Jarzynski
equality", NeurIPS 2023.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ebjax.energies import targets
from ebjax.energies.learned_mixture import LearnedMixtureParams, learned_gaussian_mixture
from ebjax.objectives.contrastive_divergence import (
    contrastive_divergence,
    persistent_contrastive_divergence,
)
from ebjax.objectives.jarzynski import jarzynski
from ebjax.parallel import AXIS_NAME
from ebjax.samplers import langevin
from ebjax.training import TrainingConfig, check_at_least, check_between, setting
from ebjax.types import Recipe, Run, Source, TrainState

__all__ = ["JarzynskiConfig", "recipe"]

METHODS = ("jarzynski", "pcd", "cd")
_NUM_JUDGES = 100_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class JarzynskiConfig(TrainingConfig):
    """Settings of the run on two modes."""

    num_steps: int = setting(2000, "updates in all; may be raised later to go on with a run")
    batch_size: int = setting(2000, "examples of one update, and slots of walkers")
    log_every: int = setting(50, "steps between lines of metrics.jsonl")
    checkpoint_every: int = setting(500, "steps between checkpoints")
    steps_per_call: int = setting(50, "updates in one dispatch; metrics are means over these")
    method: str = setting("jarzynski", f"how negatives are drawn: {', '.join(METHODS)}")
    dim: int = setting(2, "dimensions")
    left_mode: float = setting(-5.0, "first coordinate of the left mode")
    right_mode: float = setting(4.0, "first coordinate of the right mode")
    left_mass: float = setting(0.25, "probability of the left mode")
    num_data: int = setting(2000, "examples that training sees, each once in a pass")
    initial_mean: float = setting(0.1, "the means start at minus and plus this")
    learning_rate: float = setting(0.02, "learning rate of gradient descent")
    walkers_per_example: int = setting(1, "walkers that each example slot owns")
    langevin_step_size: float = setting(0.1, "h of the sampler")
    langevin_steps: int = setting(1, "steps of a walker in one update")
    cd_steps: int = setting(4, "steps of a chain from the data, for the method 'cd'")
    ess_threshold: float = setting(
        0.862, "walkers are resampled below this effective fraction; 0.862: weights vary by 0.4"
    )

    def __post_init__(self) -> None:
        """Checks types and ranges."""
        super().__post_init__()
        check_at_least(self, 1, "dim", "walkers_per_example", "langevin_steps", "cd_steps")
        check_at_least(self, 2, "num_data")
        check_at_least(self, 0, "learning_rate", "initial_mean")
        check_between(self, 0, 1, "ess_threshold")
        check_between(self, 0.001, 0.999, "left_mass")
        check_between(self, -1e6, 1e6, "left_mode", "right_mode")
        if not self.langevin_step_size > 0:
            raise ValueError(
                f"langevin_step_size is {self.langevin_step_size}; it must be positive."
            )
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; it must be one of {', '.join(METHODS)}.")
        if not self.left_mode < self.right_mode:
            raise ValueError(
                f"left_mode is {self.left_mode} and right_mode {self.right_mode}; the first must "
                "be below the second."
            )


def build(config: JarzynskiConfig) -> Run:
    """Makes the run of a config."""
    axis = np.eye(1, config.dim)[0]
    truth = targets.gaussian_mixture(
        np.stack([config.left_mode * axis, config.right_mode * axis]),
        1.0,
        [config.left_mass, 1.0 - config.left_mass],
    )
    assert truth.sample is not None
    draw_truth = jax.jit(jax.vmap(truth.sample))
    model = learned_gaussian_mixture(2)
    data = np.asarray(draw_truth(jax.random.split(jax.random.key(config.seed), config.num_data)))

    def init(key):
        del key
        means = config.initial_mean * jnp.stack([-axis, axis])
        return LearnedMixtureParams(means.astype(jnp.float32), jnp.zeros(1))

    first = init(None)
    sizes = (config.walkers_per_example, config.langevin_steps)

    def weighted(axis_name):
        return jarzynski(
            model.apply,
            config.langevin_step_size,
            model.sample,
            walkers_per_example=sizes[0],
            num_steps=sizes[1],
            initial_log_z=model.log_z,
            ess_threshold=config.ess_threshold,
            axis_name=axis_name,
        )

    kernel = langevin(step_size=config.langevin_step_size)
    if config.method == "jarzynski":
        objective = weighted(AXIS_NAME)
    elif config.method == "pcd":
        objective = persistent_contrastive_divergence(
            model.apply,
            kernel,
            lambda key: model.sample(key, first),
            chains_per_example=sizes[0],
            num_steps=sizes[1],
            rebirth_probability=0.0,
        )
    else:
        objective = contrastive_divergence(model.apply, kernel, num_steps=config.cd_steps)

    energies_of = jax.jit(jax.vmap(model.apply, (None, 0)))
    energies_of_truth = jax.jit(jax.vmap(lambda x: truth.energy((), x)))

    def divergence(params, points):
        """Mean of log p_data - log p_model over draws of the data's law."""
        log_model = -energies_of(params, points) - model.log_z(params)
        return float(jnp.mean(-energies_of_truth(points) - log_model))

    def sample(key, state: TrainState, num_samples: int):
        draws = jax.jit(jax.vmap(model.sample, (0, None)))(
            jax.random.split(key, num_samples), state.params
        )
        return {
            "positions": np.asarray(draws),
            "energies": np.asarray(energies_of(state.params, draws)),
            "walkers": np.asarray(state.carry.position.reshape(-1, config.dim)),
        }

    def monitor(key, state: TrainState):
        del key
        params = state.params
        left, right = np.argsort(params.means[:, 0])
        return {
            "kl_of_training_data": divergence(params, data),
            "left_mass": float(model.shares(params)[left]),
            "left_mean": float(params.means[left, 0]),
            "right_mean": float(params.means[right, 0]),
        }

    def evaluate(key, state: TrainState):
        judges = draw_truth(jax.random.split(jax.random.key(config.seed + 1), _NUM_JUDGES))
        figures_ = monitor(key, state)
        figures_ |= {
            "kl": divergence(state.params, judges),
            "left_mass_of_data": float(np.mean(data[:, 0] < _middle(config))),
            "log_z_exact": float(model.log_z(state.params)),
        }
        if config.method == "jarzynski":
            # A call of the loss begins by weighting the walkers at the parameters that it is given.
            keys = jax.random.split(jax.random.key(0), config.batch_size)
            batch = jnp.asarray(np.resize(data, (config.batch_size, config.dim)))
            weigh = jax.jit(weighted(None).loss)
            _, (_, metrics) = weigh(state.params, state.carry, keys, batch)
            figures_["log_z"] = float(metrics["log_z"])
            figures_["log_z_error"] = abs(figures_["log_z"] - figures_["log_z_exact"])
            figures_["num_resamplings"] = float(state.carry.num_resamplings[0])
        return figures_

    def figures(key, state: TrainState, samples):
        del key
        title = f"{config.method}: left mass {monitor(None, state)['left_mass']:.3f}"
        return {"modes": _modes(config, data, samples, title)}

    def example(arrays, key, position):
        del key
        return arrays[position % config.num_data]

    return Run(
        init=init,
        objective=objective,
        optimizer=optax.sgd(config.learning_rate),
        source=Source(data, example),
        sample=sample,
        evaluate=evaluate,
        figures=figures,
        monitor=monitor,
        monitor_name="kl_of_training_data",
        progress=("loss", "log_z", "ess") if config.method == "jarzynski" else ("loss",),
        learned_params=lambda state: state.params,
        energy=model.apply,
        draw=model.sample,
    )


def _middle(config: JarzynskiConfig) -> float:
    return 0.5 * (config.left_mode + config.right_mode)


def _modes(config: JarzynskiConfig, data: np.ndarray, samples, title: str):
    """Densities of the first coordinate: the data, the model, and where the walkers are."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 3.2), layout="constrained")
    axes = figure.subplots()
    edges = np.linspace(config.left_mode - 4.5, config.right_mode + 4.5, 80).tolist()
    axes.hist(data[:, 0], edges, density=True, color="#8d99ae", alpha=0.5, label="data")
    for name, label, color in (
        ("positions", "model, exact draws", "#2a6f97"),
        ("walkers", "walkers, unweighted", "#e07a5f"),
    ):
        axes.hist(
            samples[name][:, 0], edges, density=True, histtype="step", color=color, label=label
        )
    axes.set_xlabel("first coordinate")
    axes.set_ylabel("density")
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure


recipe = Recipe(JarzynskiConfig, build)
