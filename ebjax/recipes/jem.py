"""A classifier of handwritten digits that is a model of them as well: a joint energy model (JEM).

scikit-learn's bundled 1,797 images of 8x8 pixels, scaled to [-1, 1]; an MLP with ten logits; cross-
entropy on clean labelled images plus the likelihood of noisy images, estimated with persistent
chains. With ``likelihood_weight=0`` the same recipe is the plain classifier to compare with.

Step size and noise scale of the sampler are set apart, as the published systems do: with h = 0.1
and s = 0.01 the chain is far colder (temperature s²/(2h) = 0.0005) than exp(-E), so it is the
sampler and the energy together that make the model. Samples of a class descend E(x, y) = -f_y(x).

Grathwohl et al., "Your classifier is secretly an energy based model and you should treat it like
one", ICLR 2020.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ebjax.energies.joint import free_energy, joint_energy
from ebjax.energies.networks import mlp_classifier
from ebjax.numerics import shuffled_index
from ebjax.objectives.joint_classification import (
    JointBatch,
    class_gaussian_births,
    joint_classification,
)
from ebjax.objectives.regularizers import energy_magnitude
from ebjax.parallel import AXIS_NAME
from ebjax.samplers import langevin
from ebjax.samplers.run import run_chain
from ebjax.training import (
    AdamConfig,
    check_at_least,
    check_between,
    check_widths,
    setting,
)
from ebjax.types import Recipe, Run, Source, TrainState

__all__ = ["JemConfig", "recipe"]

_SHAPE = (8, 8, 1)
_NUM_CLASSES = 10
_BIRTHS = ("noise", "class_gaussians")


@dataclasses.dataclass(frozen=True, kw_only=True)
class JemConfig(AdamConfig):
    """Settings of the joint classifier of digits."""

    num_steps: int = setting(1600)
    batch_size: int = setting(64)
    log_every: int = setting(60)
    checkpoint_every: int = setting(400)
    ema_decay: float = setting(0.99)
    num_held_out: int = setting(497, "images that training never sees")
    likelihood_weight: float = setting(0.1, "w, weight of the likelihood; 0: plain classifier")
    data_noise: float = setting(0.03, "standard deviation of noise on the likelihood's images")
    hidden_features: tuple[int, ...] = setting((512, 512), "widths of the network's hidden layers")
    learning_rate_final_fraction: float = setting(0.05)
    energy_regularizer: float = setting(0.0, "weight of the squared energies in the loss")
    sharpness_radius: float = setting(0.0, "of adaptive sharpness-aware steps; 0 takes plain ones")
    langevin_steps: int = setting(20, "steps of a chain in one update")
    langevin_step_size: float = setting(0.1, "h of the sampler")
    langevin_noise_scale: float = setting(0.01, "standard deviation of the sampler's noise")
    langevin_gradient_clip: float = setting(0.0, "largest component of its gradient; 0: no limit")
    births: str = setting("noise", f"what chains are born from: {' or '.join(_BIRTHS)}")
    chains_per_example: int = setting(32, "persistent chains that each example slot owns")
    rebirth_probability: float = setting(0.05, "chance that a chain starts anew")
    sample_steps: int = setting(400, "steps from birth when samples are asked for")

    def __post_init__(self) -> None:
        """Checks types and ranges."""
        super().__post_init__()
        check_between(self, 100, 1500, "num_held_out")
        check_at_least(self, 1, "langevin_steps", "chains_per_example", "sample_steps")
        check_at_least(self, 0, "data_noise", "energy_regularizer", "langevin_noise_scale")
        check_at_least(self, 0, "langevin_step_size")
        check_at_least(self, 0, "likelihood_weight", "sharpness_radius", "langevin_gradient_clip")
        check_between(self, 0, 1, "rebirth_probability")
        check_widths(self, "hidden_features")
        if self.births not in _BIRTHS:
            raise ValueError(f"births is {self.births!r}; it must be one of {', '.join(_BIRTHS)}.")


@dataclasses.dataclass(frozen=True)
class Digits:
    """Images [N, 8, 8, 1] in [-1, 1] and their labels [N], for training and held out."""

    images: np.ndarray
    labels: np.ndarray
    held_out_images: np.ndarray
    held_out_labels: np.ndarray


def load_labelled_images(num_held_out: int, seed: int) -> Digits:
    """scikit-learn's digits, split at random."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images / 8.0 - 1.0).astype(np.float32).reshape(-1, *_SHAPE)
    labels = digits.target.astype(np.int32)
    order = np.random.default_rng(seed).permutation(len(images))
    kept, out = order[num_held_out:], order[:num_held_out]
    return Digits(images[kept], labels[kept], images[out], labels[out])


def build(config: JemConfig) -> Run:
    """Makes the run of a config."""
    data = load_labelled_images(config.num_held_out, config.seed)
    classifier = mlp_classifier(_NUM_CLASSES, config.hidden_features)
    kernel = langevin(
        step_size=config.langevin_step_size,
        noise_scale=config.langevin_noise_scale,
        gradient_clip=config.langevin_gradient_clip or None,
        bounds=(-1.0, 1.0),
    )
    num_training = len(data.images)

    def noise(key: jax.Array) -> jax.Array:
        return jax.random.uniform(key, _SHAPE, minval=-1.0, maxval=1.0)

    birth: Any = noise
    if config.births == "class_gaussians":
        birth = class_gaussian_births(data.images, data.labels, bounds=(-1.0, 1.0))

    def example(arrays, key, position):
        images, labels = arrays
        label_key, image_key = jax.random.split(key)
        one = shuffled_index(label_key, position, num_training)
        other = shuffled_index(image_key, position, num_training)
        jitter = jax.random.normal(jax.random.fold_in(image_key, position), _SHAPE)
        noisy = jnp.clip(images[other] + config.data_noise * jitter, -1.0, 1.0)
        return JointBatch(images[one], labels[one], noisy)

    penalties: tuple = ()
    if config.energy_regularizer:
        penalties = (energy_magnitude(config.energy_regularizer),)
    objective = joint_classification(
        classifier.apply,
        kernel,
        birth,
        num_steps=config.langevin_steps,
        likelihood_weight=config.likelihood_weight,
        chains_per_example=config.chains_per_example,
        rebirth_probability=config.rebirth_probability,
        regularizers=penalties,
        sharpness_radius=config.sharpness_radius,
        axis_name=AXIS_NAME,
    )
    logits_of = jax.jit(jax.vmap(classifier.apply, (None, 0)))
    energies_of = jax.jit(jax.vmap(joint_energy(classifier.apply), (None, 0)))

    def draw(key, params, label=-1):
        """[8, 8, 1] end of a chain; a label of -1 descends the energy of all classes."""

        def descended(params, x):
            logits = classifier.apply(params, x)
            return jnp.where(label < 0, free_energy(logits), -logits[label])

        birth_key, chain_key = jax.random.split(key)
        state = kernel.init(descended, params, birth(birth_key))
        steps = config.sample_steps
        return run_chain(chain_key, kernel, descended, params, state, steps)[0].position

    draw_many = jax.jit(jax.vmap(draw, (0, None, 0)))

    def sample_images(key, state: TrainState, num_samples: int):
        any_key, class_key = jax.random.split(key)
        labels = np.arange(num_samples) % _NUM_CLASSES
        anything = np.full(num_samples, -1)
        images = draw_many(jax.random.split(any_key, num_samples), state.ema, anything)
        of_class = draw_many(jax.random.split(class_key, num_samples), state.ema, labels)
        return {
            "images": np.asarray(images),
            "energies": np.asarray(energies_of(state.ema, images)),
            "images_of_class": np.asarray(of_class),
            "labels": labels,
        }

    def monitor(key, state: TrainState):
        from ebjax.evaluation import classification_figures

        del key
        logits = np.asarray(logits_of(state.ema, data.held_out_images))
        figures = classification_figures(logits, data.held_out_labels)
        return {"accuracy_held_out": figures["accuracy"], "error_held_out": 1 - figures["accuracy"]}

    def evaluate(key, state: TrainState):
        return _figures_of_merit(
            key, config, data, state, logits_of, energies_of, sample_images, noise
        )

    def figures(key, state: TrainState, samples):
        return _pictures(key, data, state, logits_of, energies_of, samples, noise)

    return Run(
        init=lambda key: classifier.init(key, jnp.zeros(_SHAPE)),
        objective=objective,
        optimizer=config.optimizer(),
        source=Source((jnp.asarray(data.images), jnp.asarray(data.labels)), example),
        sample=sample_images,
        evaluate=evaluate,
        figures=figures,
        monitor=monitor,
        monitor_name="error_held_out",
        progress=("loss", "cross_entropy", "accuracy", "energy_gap")[
            : 4 if config.likelihood_weight else 3
        ],
        energy=joint_energy(classifier.apply),
        draw=draw,
    )


def _foreign_images(key, data: Digits, noise) -> np.ndarray:
    """Held-out images with their pixels in another order, and as many of uniform noise."""
    num = len(data.held_out_images)
    order = np.random.default_rng(1).permutation(64)
    permuted = data.held_out_images.reshape(num, 64)[:, order].reshape(-1, *_SHAPE)
    return np.concatenate([permuted, np.asarray(jax.vmap(noise)(jax.random.split(key, num)))])


def _figures_of_merit(key, config, data, state, logits_of, energies_of, sample_images, noise):
    from sklearn.svm import SVC

    from ebjax.evaluation import (
        classification_figures,
        frechet_distance,
        out_of_distribution_figures,
    )

    sample_key, noise_key, foreign_key = jax.random.split(key, 3)
    draws = sample_images(sample_key, state, 1000)
    energy_held_out = np.asarray(energies_of(state.ema, data.held_out_images))
    energy_foreign = np.asarray(energies_of(state.ema, _foreign_images(foreign_key, data, noise)))
    noises = np.asarray(jax.vmap(noise)(jax.random.split(noise_key, 1000)))
    logits = np.asarray(logits_of(state.ema, data.held_out_images))
    # Judged by a classifier that has nothing to do with the model.
    judge = SVC(gamma="scale").fit(data.images.reshape(-1, 64), data.labels)
    judged = judge.predict(draws["images_of_class"].reshape(-1, 64))
    figures = {
        **classification_figures(logits, data.held_out_labels),
        "accuracy_training": float(
            np.mean(logits_of(state.ema, data.images).argmax(axis=1) == data.labels)
        ),
        "energy_held_out": float(energy_held_out.mean()),
        "energy_samples": float(draws["energies"].mean()),
        "energy_foreign": float(energy_foreign.mean()),
        "energy_gap": float(energy_held_out.mean() - draws["energies"].mean()),
        "frechet_pixel": frechet_distance(draws["images"], data.held_out_images),
        "frechet_pixel_of_noise": frechet_distance(noises, data.held_out_images),
        "frechet_pixel_of_training_images": frechet_distance(data.images, data.held_out_images),
        "samples_of_class_recognised": float(np.mean(judged == draws["labels"])),
        "auroc_foreign": out_of_distribution_figures(energy_held_out, energy_foreign)["auroc"],
    }
    if config.likelihood_weight:
        chains = np.asarray(state.carry.position).reshape(-1, *_SHAPE)
        figures["frechet_pixel_of_chains"] = frechet_distance(chains, data.held_out_images)
        figures["energy_chains"] = float(energies_of(state.ema, chains).mean())
    return figures


def _pictures(key, data, state, logits_of, energies_of, samples, noise):
    from ebjax.evaluation import reliability_curve
    from ebjax.figures import energy_histogram, image_grids, reliability_diagram

    probabilities = np.asarray(jax.nn.softmax(logits_of(state.ema, data.held_out_images)))
    curve = reliability_curve(probabilities, data.held_out_labels)
    by_class = np.argsort(data.labels, kind="stable")
    first = [by_class[data.labels[by_class] == k][:8] for k in range(_NUM_CLASSES)]
    rows = np.stack(first, axis=1).ravel()
    return {
        "samples_by_class": image_grids(
            {"data": data.images[rows], "samples of each class": samples["images_of_class"]},
            num_columns=_NUM_CLASSES,
        ),
        "samples": image_grids({"data": data.images, "samples": samples["images"]}),
        "reliability": reliability_diagram({"held out": curve}),
        "energies": energy_histogram(
            {
                "data, training": np.asarray(energies_of(state.ema, data.images)),
                "data, held out": np.asarray(energies_of(state.ema, data.held_out_images)),
                "samples": samples["energies"],
                "foreign images": np.asarray(
                    energies_of(state.ema, _foreign_images(key, data, noise))
                ),
            },
            close_up=("data, training", "data, held out", "samples"),
        ),
    }


recipe = Recipe(JemConfig, build)
