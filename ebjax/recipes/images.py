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
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ebjax.data import Dataset, array_source, load_dataset, split_index, stream_source
from ebjax.recipes.image_evaluation import ImageSets, evaluate_images, image_figures
from ebjax.recipes.image_models import BOUNDS, build_model, pixels_of
from ebjax.training import (
    AdamConfig,
    check_at_least,
    check_between,
    check_widths,
    setting,
)
from ebjax.types import Recipe, Run, TrainState, bind

__all__ = ["ImagesConfig", "recipe"]

OBJECTIVES = ("pcd", "recovery_likelihood")
NETWORKS = ("mlp", "convolutional", "residual")
_SPLIT_SEED = 0
# How many images figures of merit and pictures look at, at most.
_MOST_TRAINING_IMAGES, _MOST_LABELLED_IMAGES, _MOST_HELD_OUT_IMAGES = 20_000, 4000, 2000


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagesConfig(AdamConfig):
    """Settings of the images run."""

    data_path: str = setting(
        "digits", "images: .npz, .npy, IDX, a folder, or scikit-learn's 'digits'"
    )
    data_key: str = setting("", "name of the images in an .npz with several arrays")
    label_key: str = setting("", "name of the labels in an .npz; figures use them, training not")
    labels_path: str = setting("", "file with the labels of an .npy or IDX file")
    downsample: int = setting(1, "side of the blocks of pixels that are averaged to one")
    stream: bool = setting(False, "read images from disk as they are used (.npy, IDX)")
    num_held_out: int = setting(297, "images that training never sees")
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
        if not self.data_path:
            raise ValueError(
                "data_path is ''; give images: .npz, .npy, IDX, a folder of .png or .jpg, or "
                "'digits'."
            )
        for name, known in (("objective", OBJECTIVES), ("energy_network", NETWORKS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}."
                )
        check_at_least(self, 2, "num_held_out")
        check_at_least(self, 1, "downsample", "langevin_steps", "chains_per_example")
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


class Images(NamedTuple):
    """Images of a file, and how they become what the energy sees.

    Attributes:
      raw: the dataset as it stands in the file, images [N, height, width] or with channels.
      training: rows for training.
      held_out: rows that training never sees.
      transform: ``(key, x) -> image`` [height, width, channels] in [-1, 1]; the key is not used.
      num_values: how many values a pixel can take, ``None`` where they are not whole numbers.
    """

    raw: Dataset
    training: np.ndarray
    held_out: np.ndarray
    transform: Callable[[jax.Array, jax.Array], jax.Array]
    num_values: int | None

    def take(self, rows: np.ndarray) -> np.ndarray:
        """[n, height, width, channels] images of some rows, in [-1, 1]."""
        key = jax.random.key(0)  # not used
        return np.asarray(jax.vmap(self.transform, (None, 0))(key, self.raw.examples[rows]))

    def labels(self, rows: np.ndarray) -> np.ndarray | None:
        """[n] labels of some rows, if there are any."""
        return None if self.raw.labels is None else self.raw.labels[rows]


def load_images(config: ImagesConfig) -> Images:
    """Reads the images of a config and splits them.

    Raises:
      ValueError: naming the file or setting that does not fit.
    """
    raw = load_dataset(
        config.data_path,
        key=config.data_key or None,
        label_key=config.label_key or None,
        labels_path=config.labels_path or None,
        memory_map=config.stream,
    )
    shape = raw.examples.shape[1:]
    is_image = len(shape) == 2 or (len(shape) == 3 and shape[2] <= 4)
    if not is_image:
        raise ValueError(
            f"{raw.name}: an example has shape {shape}; images are [height, width] or [height, "
            "width, channels] with up to 4 channels."
        )
    if shape[0] % config.downsample or shape[1] % config.downsample:
        raise ValueError(
            f"downsample is {config.downsample}; it must divide the sides of the images, "
            f"{shape[0]} and {shape[1]}."
        )
    low, high = float(raw.examples.min()), float(raw.examples.max())
    is_whole = raw.examples.dtype.kind in "ui"
    if is_whole and low >= 0 and high > 16:
        low, high = 0.0, float(2 ** int(np.ceil(np.log2(high + 1))) - 1)  # the whole range of bytes
    if low == high:
        raise ValueError(f"{raw.name}: all pixels are {low}; images must differ from their ground.")
    training, held_out = split_index(len(raw.examples), config.num_held_out, _SPLIT_SEED)
    transform = bind(_to_image, downsample=config.downsample, low=low, high=high, is_whole=is_whole)
    return Images(raw, training, held_out, transform, int(high - low) + 1 if is_whole else None)


def _to_image(key, x, *, downsample, low, high, is_whole):
    del key
    x = jnp.asarray(x, jnp.float32)
    x = x.reshape(x.shape[0], x.shape[1], -1)
    if downsample > 1:
        height, width, channels = x.shape
        blocks = (height // downsample, downsample, width // downsample, downsample, channels)
        x = x.reshape(blocks).mean(axis=(1, 3))
        # So that a pixel takes as many values as before.
        x = jnp.round(x) if is_whole else x
    return 2.0 * (x - low) / (high - low) - 1.0


def build(config: ImagesConfig) -> Run:
    """Makes the run of a config."""
    images = load_images(config)
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
