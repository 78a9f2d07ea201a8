"""A classifier of images that is a model of them as well: a joint energy model (JEM).

Labelled images of a file, scaled to [-1, 1]; scikit-learn's bundled 1,797 digits of 8x8 pixels by
default. A network with one logit a class; cross-entropy on clean labelled images plus the
likelihood of noisy images, estimated with persistent chains. With ``likelihood_weight=0`` the same
recipe is the plain classifier to compare with.

Step size and noise scale of the sampler are set apart, as the published systems do: with h = 0.1
and s = 0.01 the chain is far colder (temperature s²/(2h) = 0.0005) than exp(-E), so it is the
sampler and the energy together that make the model. Samples of a class descend E(x, y) = -f_y(x).

Grathwohl et al., "Your classifier is secretly an energy based model and you should treat it like
one", ICLR 2020.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ebjax.energies.joint import Classifier, free_energy, joint_energy
from ebjax.energies.networks import mlp_classifier, residual_classifier
from ebjax.numerics import shuffled_index
from ebjax.objectives.joint_classification import (
    JointBatch,
    class_gaussian_births,
    joint_classification,
)
from ebjax.objectives.regularizers import energy_magnitude
from ebjax.parallel import AXIS_NAME
from ebjax.recipes.image_files import ImageFileConfig, load_images
from ebjax.samplers import langevin
from ebjax.samplers.run import run_chain
from ebjax.training import check_at_least, check_between, check_widths, setting
from ebjax.types import Recipe, Run, Source, TrainState

__all__ = ["JemConfig", "recipe"]

_NETWORKS: dict[str, Callable[..., Classifier]] = {
    "mlp": mlp_classifier,
    "residual": residual_classifier,
}
# How many training images figures of merit and pictures look at, at most.
_MOST_TRAINING_IMAGES = 4000
_BIRTHS = ("noise", "class_gaussians")


@dataclasses.dataclass(frozen=True, kw_only=True)
class JemConfig(ImageFileConfig):
    """Settings of the joint classifier."""

    num_steps: int = setting(1600)
    batch_size: int = setting(64)
    log_every: int = setting(60)
    checkpoint_every: int = setting(400)
    ema_decay: float = setting(0.99)
    num_held_out: int = setting(497, "images that training never sees")
    likelihood_weight: float = setting(0.1, "w, weight of the likelihood; 0: plain classifier")
    data_noise: float = setting(0.03, "standard deviation of noise on the likelihood's images")
    classifier_network: str = setting("mlp", f"the classifier: {' or '.join(_NETWORKS)}")
    hidden_features: tuple[int, ...] = setting(
        (512, 512), "widths (mlp) or channels (residual) of the network's hidden layers"
    )
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
        check_at_least(self, 1, "langevin_steps", "chains_per_example", "sample_steps")
        check_at_least(self, 0, "data_noise", "energy_regularizer", "langevin_noise_scale")
        check_at_least(self, 0, "langevin_step_size")
        check_at_least(self, 0, "likelihood_weight", "sharpness_radius", "langevin_gradient_clip")
        check_between(self, 0, 1, "rebirth_probability")
        check_widths(self, "hidden_features")
        for name, known in (("births", _BIRTHS), ("classifier_network", tuple(_NETWORKS))):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}."
                )


class LabelledImages(NamedTuple):
    """Images [N, height, width, channels] in [-1, 1] and labels [N], for training and held out."""

    images: np.ndarray
    labels: np.ndarray
    held_out_images: np.ndarray
    held_out_labels: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image."""
        return self.images.shape[1:]

    @property
    def num_classes(self) -> int:
        """K, one more than the largest label."""
        return int(max(self.labels.max(), self.held_out_labels.max())) + 1


def load_labelled_images(config: JemConfig) -> LabelledImages:
    """Reads the images of a config and splits them at random, by its seed.

    Raises:
      ValueError: naming the file or setting that does not fit.
    """
    images = load_images(config, split_seed=config.seed)
    name, labels = images.raw.name, images.raw.labels
    if labels is None:
        raise ValueError(
            f"{name}: has no labels, and a classifier needs them; name them by label_key (.npz) "
            "or labels_path (.npy, IDX), or give each class a subfolder of the folder."
        )
    if labels.min() < 0 or labels.max() < 1:
        raise ValueError(
            f"{name}: its labels are from {labels.min()} to {labels.max()}; they must be 0 to K - "
            "1, with at least two classes."
        )
    return LabelledImages(
        images.take(images.training),
        labels[images.training],
        images.take(images.held_out),
        labels[images.held_out],
    )


def build(config: JemConfig) -> Run:
    """Makes the run of a config."""
    data = load_labelled_images(config)
    classifier = _NETWORKS[config.classifier_network](data.num_classes, config.hidden_features)
    kernel = langevin(
        step_size=config.langevin_step_size,
        noise_scale=config.langevin_noise_scale,
        gradient_clip=config.langevin_gradient_clip or None,
        bounds=(-1.0, 1.0),
    )
    num_training = len(data.images)

    def noise(key: jax.Array) -> jax.Array:
        return jax.random.uniform(key, data.shape, minval=-1.0, maxval=1.0)

    birth: Any = noise
    if config.births == "class_gaussians":
        birth = class_gaussian_births(data.images, data.labels, bounds=(-1.0, 1.0))

    def example(arrays, key, position):
        images, labels = arrays
        label_key, image_key = jax.random.split(key)
        one = shuffled_index(label_key, position, num_training)
        other = shuffled_index(image_key, position, num_training)
        jitter = jax.random.normal(jax.random.fold_in(image_key, position), data.shape)
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
        """End of a chain; a label of -1 descends the energy of all classes."""

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
        labels = np.arange(num_samples) % data.num_classes
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
        init=lambda key: classifier.init(key, jnp.zeros(data.shape)),
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


def _foreign_images(key, data: LabelledImages, noise) -> np.ndarray:
    """Held-out images with their pixels in another order, and as many of uniform noise."""
    num = len(data.held_out_images)
    flat = data.held_out_images.reshape(num, -1)
    order = np.random.default_rng(1).permutation(flat.shape[1])
    permuted = flat[:, order].reshape(data.held_out_images.shape)
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
    training = data.images[:_MOST_TRAINING_IMAGES]
    judge = SVC(gamma="scale").fit(
        training.reshape(len(training), -1), data.labels[: len(training)]
    )
    judged = judge.predict(draws["images_of_class"].reshape(1000, -1))
    figures = {
        **classification_figures(logits, data.held_out_labels),
        "accuracy_training": float(
            np.mean(logits_of(state.ema, training).argmax(axis=1) == data.labels[: len(training)])
        ),
        "energy_held_out": float(energy_held_out.mean()),
        "energy_samples": float(draws["energies"].mean()),
        "energy_foreign": float(energy_foreign.mean()),
        "energy_gap": float(energy_held_out.mean() - draws["energies"].mean()),
        "frechet_pixel": frechet_distance(draws["images"], data.held_out_images),
        "frechet_pixel_of_noise": frechet_distance(noises, data.held_out_images),
        "frechet_pixel_of_training_images": frechet_distance(training, data.held_out_images),
        "samples_of_class_recognised": float(np.mean(judged == draws["labels"])),
        "auroc_foreign": out_of_distribution_figures(energy_held_out, energy_foreign)["auroc"],
    }
    if config.likelihood_weight:
        chains = np.asarray(state.carry.position).reshape(-1, *data.shape)
        figures["frechet_pixel_of_chains"] = frechet_distance(chains, data.held_out_images)
        figures["energy_chains"] = float(energies_of(state.ema, chains).mean())
    return figures


def _pictures(key, data, state, logits_of, energies_of, samples, noise):
    from ebjax.evaluation import reliability_curve
    from ebjax.figures import energy_histogram, image_grids, reliability_diagram

    probabilities = np.asarray(jax.nn.softmax(logits_of(state.ema, data.held_out_images)))
    curve = reliability_curve(probabilities, data.held_out_labels)
    rows = np.full((8, data.num_classes, *data.shape), -1.0)  # empty where a class has fewer
    for one in range(data.num_classes):
        members = data.images[data.labels == one][:8]
        rows[: len(members), one] = members
    training = data.images[:_MOST_TRAINING_IMAGES]
    return {
        "samples_by_class": image_grids(
            {
                "data": rows.reshape(-1, *data.shape),
                "samples of each class": samples["images_of_class"],
            },
            num_columns=data.num_classes,
        ),
        "samples": image_grids({"data": data.images, "samples": samples["images"]}),
        "reliability": reliability_diagram({"held out": curve}),
        "energies": energy_histogram(
            {
                "data, training": np.asarray(energies_of(state.ema, training)),
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
