"""An energy of handwritten digits: persistent contrastive divergence with Langevin dynamics.

scikit-learn's bundled 1,797 images of 8x8 pixels, scaled to [-1, 1]; an MLP energy; chains that
persist between updates; samples from noise under the averaged weights. Step size and noise scale
of the sampler are set apart, as image models do: with h = 0.1 and s = 0.04 the chain is far colder
(temperature s²/(2h) = 0.008) than exp(-E), so it is the sampler and the energy together that make
the model.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ebjax.energies import mlp_energy
from ebjax.numerics import shuffled_index
from ebjax.objectives import persistent_contrastive_divergence
from ebjax.samplers import langevin, run_chain, sample
from ebjax.training import (
    AdamConfig,
    check_at_least,
    check_between,
    check_widths,
    setting,
)
from ebjax.types import Recipe, Run, Source, TrainState

__all__ = ["DigitsConfig", "recipe"]

_SPLIT_SEED = 0
_SHAPE = (8, 8, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DigitsConfig(AdamConfig):
    """Settings of the digits run."""

    num_steps: int = setting(3600)
    log_every: int = setting(60)
    checkpoint_every: int = setting(600)
    ema_decay: float = setting(0.998)
    num_held_out: int = setting(297, "images that training never sees")
    data_noise: float = setting(0.04, "standard deviation of noise on the data, pixels in [-1, 1]")
    hidden_features: tuple[int, ...] = setting((512, 512), "widths of the network's hidden layers")
    learning_rate_warmup_steps: int = setting(100)
    learning_rate_final_fraction: float = setting(0.02)
    adam_b1: float = setting(0.0)
    gradient_clip: float = setting(1.0)
    energy_regularizer: float = setting(0.01, "weight of the squared energies in the loss")
    langevin_steps: int = setting(30, "steps of a chain in one update")
    langevin_step_size: float = setting(0.1, "h of the sampler")
    langevin_noise_scale: float = setting(0.04, "standard deviation of the sampler's noise")
    chains_per_example: int = setting(16, "persistent chains that each example slot owns")
    rebirth_probability: float = setting(0.05, "chance that a chain starts anew from noise")
    sample_steps: int = setting(400, "steps from noise when samples are asked for")

    def __post_init__(self) -> None:
        """Checks types and ranges."""
        super().__post_init__()
        check_between(self, 2, 1500, "num_held_out")
        check_at_least(self, 1, "langevin_steps", "chains_per_example", "sample_steps")
        check_at_least(self, 0, "data_noise", "energy_regularizer", "langevin_noise_scale")
        check_at_least(self, 0, "langevin_step_size")
        check_between(self, 0, 1, "rebirth_probability")
        check_widths(self, "hidden_features")


def load_images(num_held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits as ``(training images, held-out images)`` [N, 8, 8, 1] in [-1, 1]."""
    from sklearn.datasets import load_digits

    images = (load_digits().images / 8.0 - 1.0).astype(np.float32).reshape(-1, *_SHAPE)
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(images))
    return images[order[num_held_out:]], images[order[:num_held_out]]


def build(config: DigitsConfig) -> Run:
    """Makes the run of a config."""
    training, held_out = load_images(config.num_held_out)
    energy = mlp_energy(config.hidden_features)
    kernel = langevin(
        step_size=config.langevin_step_size,
        noise_scale=config.langevin_noise_scale,
        bounds=(-1.0, 1.0),
    )

    def noise(key: jax.Array) -> jax.Array:
        return jax.random.uniform(key, _SHAPE, minval=-1.0, maxval=1.0)

    def example(images, key, position):
        image = images[shuffled_index(key, position, len(training))]
        jitter = config.data_noise * jax.random.normal(jax.random.fold_in(key, position), _SHAPE)
        return jnp.clip(image + jitter, -1.0, 1.0)

    objective = persistent_contrastive_divergence(
        energy.apply,
        kernel,
        noise,
        num_steps=config.langevin_steps,
        chains_per_example=config.chains_per_example,
        rebirth_probability=config.rebirth_probability,
        energy_regularizer=config.energy_regularizer,
    )
    energies_of = jax.jit(jax.vmap(energy.apply, (None, 0)))

    def run_chains(key, state: TrainState, num_chains: int, **options):
        noise_key, chain_key = jax.random.split(key)
        start = jax.vmap(noise)(jax.random.split(noise_key, num_chains))
        draws = sample(chain_key, kernel, energy.apply, state.ema, start, **options)
        return start, draws.positions

    def draw(key, params):
        noise_key, chain_key = jax.random.split(key)
        chain = kernel.init(energy.apply, params, noise(noise_key))
        chain, _ = run_chain(chain_key, kernel, energy.apply, params, chain, config.sample_steps)
        return chain.position

    def sample_images(key, state: TrainState, num_samples: int):
        _, positions = run_chains(
            key, state, num_samples, num_samples=1, thinning=config.sample_steps
        )
        images = positions[0]
        return {
            "images": np.asarray(images),
            "energies": np.asarray(energies_of(state.ema, images)),
        }

    def monitor(key, state: TrainState):
        from ebjax.evaluation import frechet_distance

        del key
        chains = np.asarray(state.carry.position).reshape(-1, *_SHAPE)
        return {"frechet_pixel": frechet_distance(chains, held_out)}

    def evaluate(key, state: TrainState):
        from sklearn.metrics import roc_auc_score

        from ebjax.evaluation import frechet_distance, maximum_mean_discrepancy

        sample_key, noise_key = jax.random.split(key)
        draws = sample_images(sample_key, state, 1000)
        noises = jax.vmap(noise)(jax.random.split(noise_key, 1000))
        energy_held_out = np.asarray(energies_of(state.ema, held_out))
        energy_noise = np.asarray(energies_of(state.ema, noises))
        labels = np.repeat([0, 1], [len(energy_held_out), len(energy_noise)])
        return {
            "energy_training": float(energies_of(state.ema, training).mean()),
            "energy_held_out": float(energy_held_out.mean()),
            "energy_samples": float(draws["energies"].mean()),
            "energy_noise": float(energy_noise.mean()),
            "frechet_pixel": frechet_distance(draws["images"], held_out),
            "frechet_pixel_of_training_images": frechet_distance(training, held_out),
            "mmd": maximum_mean_discrepancy(draws["images"], held_out),
            "mmd_of_training_images": maximum_mean_discrepancy(training, held_out),
            "auroc_noise": float(
                roc_auc_score(labels, np.concatenate([energy_held_out, energy_noise]))
            ),
        }

    def figures(key, state: TrainState, samples):
        from ebjax.figures import chain_strip, energy_histogram, image_grids

        strip_key, noise_key = jax.random.split(key)
        noises = jax.vmap(noise)(jax.random.split(noise_key, 500))
        num_times = 10
        every = max(1, config.sample_steps // num_times)
        start, positions = run_chains(strip_key, state, 16, num_samples=num_times, thinning=every)
        return {
            "samples": image_grids({"data": training, "samples": samples["images"]}),
            "energies": energy_histogram(
                {
                    "data, training": energies_of(state.ema, training),
                    "data, held out": energies_of(state.ema, held_out),
                    "samples": samples["energies"],
                    "noise": energies_of(state.ema, noises),
                },
                close_up=("data, training", "data, held out", "samples"),
            ),
            "chains": chain_strip(
                np.concatenate([start[None], positions]), [every * t for t in range(num_times + 1)]
            ),
        }

    return Run(
        init=lambda key: energy.init(key, jnp.zeros(_SHAPE)),
        objective=objective,
        optimizer=config.optimizer(),
        source=Source(jnp.asarray(training), example),
        sample=sample_images,
        evaluate=evaluate,
        figures=figures,
        monitor=monitor,
        monitor_name="frechet_pixel",
        progress=("loss", "energy_data", "energy_samples", "gradient_norm"),
        energy=energy.apply,
        draw=draw,
    )


recipe = Recipe(DigitsConfig, build, seed_is_key=True)
