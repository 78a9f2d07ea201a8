"""An energy of images from a file, learned by sampling.

    pcd                    E(x), persistent Langevin chains               p ∝ exp(-E/τ), τ = s²/(2h)
    recovery_likelihood    E(y, t), short chains tethered to a noisier x  p_t ∝ exp(-E(·, t))

With ``normal_pixels`` the law that a network begins with is that of independent normal pixels with
mean m and deviation v of the training images: E = network + τ Σ (x - m)²/(2 v²) and chains from
N(m, v²), or the law of such images at each noise level. Where most of an image is ground, chains
from uniform noise may never find it, and energies of data and chains then part.

Images are scaled to [-1, 1]; shapes are [height, width, channels]. The chains of ``pcd`` are far
colder than exp(-E): step size h and noise scale s are set apart, as image models do, so that what
they draw is, where they mix, the law of E/τ. The chains of ``recovery_likelihood`` have temperature
1, and its energy at the cleanest level is that of the data with a little noise.

Du and Mordatch, "Implicit generation and modeling with energy based models", NeurIPS 2019. Gao et
al., "Learning energy-based models by diffusion recovery likelihood", ICLR 2021.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from ebjax.data import array_source, stream_source
from ebjax.recipes.image_evaluation import ImageSets, evaluate_images, image_figures
from ebjax.recipes.image_files import ImageFileConfig, load_images
from ebjax.recipes.image_models import BOUNDS, build_model, pixels_of
from ebjax.training import check_at_least, check_between, check_widths, setting
from ebjax.types import Recipe, Run, TrainState

__all__ = ["ImagesConfig", "recipe"]

OBJECTIVES = ("pcd", "recovery_likelihood")
NETWORKS = ("mlp", "convolutional", "residual")
# How many images figures of merit and pictures look at, at most.
_MOST_TRAINING_IMAGES, _MOST_LABELLED_IMAGES, _MOST_HELD_OUT_IMAGES = 20_000, 4000, 2000


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagesConfig(ImageFileConfig):
    """Settings of the images run."""

    label_key: str = setting("", "name of the labels in an .npz; figures use them, training not")
    stream: bool = setting(False, "read images from disk as they are used (.npy, IDX)")
    data_noise: float = setting(0.04, "pcd: standard deviation of noise on the data")
    objective: str = setting("pcd", f"how the energy is learned: {' or '.join(OBJECTIVES)}")
    energy_network: str = setting("mlp", f"the energy: {', '.join(NETWORKS)}")
    features: tuple[int, ...] = setting((512, 512), "widths (mlp) or channels of its layers")
    num_steps: int = setting(3600)
    log_every: int = setting(60)
    checkpoint_every: int = setting(600)
    ema_decay: float = setting(0.998)
    learning_rate_warmup_steps: int = setting(100)
    learning_rate_final_fraction: float = setting(0.02)
    adam_b1: float = setting(0.0)
    gradient_clip: float = setting(1.0)
    energy_regularizer: float = setting(0.01, "pcd: weight of the squared energies in the loss")
    gradient_penalty: float = setting(0.0, "pcd: weight of the squared slope of the energy")
    normal_pixels: bool = setting(
        False, "begin with independent normal pixels as those of the training images"
    )
    reset_margin: float = setting(
        0.0, "pcd: chains lower than the data by more than this are born anew; 0: never"
    )
    langevin_steps: int = setting(30, "pcd: steps of a chain in one update")
    langevin_step_size: float = setting(0.1, "pcd: h of the sampler")
    langevin_noise_scale: float = setting(0.04, "pcd: standard deviation of the sampler's noise")
    chains_per_example: int = setting(16, "pcd: persistent chains that each example slot owns")
    rebirth_probability: float = setting(0.05, "pcd: chance that a chain starts anew from noise")
    sample_steps: int = setting(400, "pcd: steps from noise when samples are asked for")
    drift_steps: int = setting(2000, "steps of the long chains that evaluation looks at")
    num_levels: int = setting(6, "recovery_likelihood: noise levels")
    largest_log_snr: float = setting(5.0, "recovery_likelihood: signal to noise, cleanest level")
    recovery_steps: int = setting(20, "recovery_likelihood: steps of a chain on a level")
    step_share: float = setting(
        0.25, "recovery_likelihood: h as a share of a level's narrowest variance"
    )

    def __post_init__(self) -> None:
        """Checks types and ranges."""
        super().__post_init__()
        for name, known in (("objective", OBJECTIVES), ("energy_network", NETWORKS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}."
                )
        check_at_least(self, 1, "langevin_steps", "chains_per_example")
        check_at_least(self, 1, "sample_steps", "recovery_steps")
        check_at_least(self, 2, "num_levels")
        if self.drift_steps < 4 or self.drift_steps % 4:
            raise ValueError(f"drift_steps is {self.drift_steps}; it must be a multiple of 4.")
        check_at_least(self, 0, "data_noise", "energy_regularizer", "gradient_penalty")
        check_at_least(self, 0, "langevin_noise_scale", "reset_margin")
        check_at_least(self, 1e-6, "langevin_step_size")
        check_between(self, 1e-6, 1, "step_share")
        check_between(self, -4, 15, "largest_log_snr")
        check_between(self, 0, 1, "rebirth_probability")
        check_widths(self, "features")


def build(config: ImagesConfig) -> Run:
    """Makes the run of a config."""
    images = load_images(config, memory_map=config.stream)
    sets = ImageSets(
        training=images.take(images.training[:_MOST_TRAINING_IMAGES]),
        held_out=images.take(images.held_out[:_MOST_HELD_OUT_IMAGES]),
        training_labels=images.labels(images.training[:_MOST_LABELLED_IMAGES]),
        num_values=images.num_values,
    )
    noise = config.data_noise if config.objective == "pcd" else 0.0
    model = build_model(config, sets.held_out.shape[1:], pixels_of(sets.training, noise))
    options: dict[str, Any] = {
        "noise": noise,
        "bounds": BOUNDS if noise else None,
        "transform": images.transform,
        "with_labels": False,
    }
    if config.stream:
        source = stream_source(images.raw, index=images.training, **options)
    else:
        source = array_source(images.raw.examples[images.training], **options)
    draw_many = jax.jit(jax.vmap(model.draw, (0, None)))

    def draw(key, params, num_samples: int):
        return np.asarray(draw_many(jax.random.split(key, num_samples), params))

    def sample_images(key, state: TrainState, num_samples: int):
        from ebjax.evaluation import energies_of

        drawn = draw(key, state.ema, num_samples)
        return {"images": drawn, "energies": energies_of(model.energy, state.ema, drawn)}

    def monitor(key, state: TrainState):
        from ebjax.evaluation import frechet_distance

        return {"frechet_pixel": frechet_distance(draw(key, state.ema, 200), sets.held_out)}

    def evaluate(key, state: TrainState):
        return evaluate_images(
            key,
            state.ema,
            model,
            sets,
            lambda key, num: draw(key, state.ema, num),
            drift_steps=config.drift_steps,
        )

    return Run(
        init=model.init,
        objective=model.objective,
        optimizer=config.optimizer(),
        source=source,
        sample=sample_images,
        evaluate=evaluate,
        figures=lambda key, state, samples: image_figures(key, state.ema, samples, model, sets),
        monitor=monitor,
        monitor_name="frechet_pixel",
        progress=("loss", "energy_data", "energy_samples", "gradient_norm"),
        energy=model.energy,
        draw=model.draw,
    )


recipe = Recipe(ImagesConfig, build, seed_is_key=True)
