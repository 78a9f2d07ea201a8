"""Figures of merit and pictures of a model of images.

The likelihood is a conservative bound by reverse annealing (``annealed_log_likelihood``), of the
law that the chains are meant to draw from:

    pcd                    exp(-E/τ) on the box [-1, 1]^D, of images with uniform noise of one level
    recovery_likelihood    exp(-E(·, 0)), of images with the normal noise of the cleanest level

Only the first is in bits of the stored pixels. ``exp(-E)`` itself at τ = 1 is no model of ``pcd``:
it was never sampled. Beside each stands what a normal law with the covariance of the training
images gives on the same task.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ebjax.energies import temper
from ebjax.recipes.image_models import BOUNDS, Model
from ebjax.samplers import box, mala
from ebjax.samplers.constrained import folded_energy

__all__ = ["ImageSets", "evaluate_images", "image_figures", "likelihood_figures", "outliers"]

_NUM_TEMPERATURES = 2000
_NUM_LIKELIHOOD_EXAMPLES = 64


class ImageSets(NamedTuple):
    """Images that figures look at, all [N, height, width, channels] in [-1, 1].

    Attributes:
      training: of the training set.
      held_out: that training never sees.
      training_labels: [N], or ``None``.
      num_values: how many values a pixel can take, ``None`` where they are not whole numbers.
    """

    training: np.ndarray
    held_out: np.ndarray
    training_labels: np.ndarray | None
    num_values: int | None


def outliers(key: jax.Array, images: np.ndarray) -> dict[str, np.ndarray]:
    """Images that are not like ``images`` [N, height, width, channels], by what was done to them.

    ``permuted``: the pixels of each image in an order of its own, so that all histograms stay.
    ``inverted``: black for white. ``noise``: uniform on [-1, 1].
    """
    permute_key, noise_key = jax.random.split(key)
    keys = jax.random.split(permute_key, len(images))
    permuted = jax.vmap(lambda key, x: jax.random.permutation(key, x.ravel()).reshape(x.shape))
    return {
        "permuted": np.asarray(permuted(keys, jnp.asarray(images))),
        "inverted": -images,
        "noise": np.asarray(jax.random.uniform(noise_key, images.shape, minval=-1.0)),
    }


def evaluate_images(
    key: jax.Array,
    params: Any,
    model: Model,
    sets: ImageSets,
    draw: Callable[[jax.Array, int], np.ndarray],
    *,
    drift_steps: int,
) -> dict[str, float]:
    """Figures of merit, by name.

    Args:
      key: [] key.
      params: of the energy, as they are sampled with.
      model: what was trained.
      sets: what to compare with.
      draw: ``(key, num) -> images``.
      drift_steps: length of the chains from held-out images that show whether the modes are real,
        several times that of training; a multiple of 4.

    Returns:
      Mean energies; Fréchet distances and MMD of samples to held-out images, and for comparison of
      training images; detection of outliers; distance to the nearest training image; drift of
      long chains; likelihood.
    """
    from ebjax.evaluation import (
        energies_of,
        frechet_distance,
        long_run_drift,
        maximum_mean_discrepancy,
        memorization_figures,
        out_of_distribution_figures,
    )

    sample_key, outlier_key, drift_key, likelihood_key = jax.random.split(key, 4)
    samples = draw(sample_key, 1000)
    reference = sets.training[: len(sets.held_out)]
    energy = {
        "training": energies_of(model.energy, params, reference),
        "held_out": energies_of(model.energy, params, sets.held_out),
        "samples": energies_of(model.energy, params, samples),
    }
    figures = {f"energy_{name}": float(values.mean()) for name, values in energy.items()}
    figures["frechet_pixel"] = frechet_distance(samples, sets.held_out)
    figures["frechet_pixel_of_training_images"] = frechet_distance(reference, sets.held_out)
    figures["mmd"] = maximum_mean_discrepancy(samples, sets.held_out)
    figures["mmd_of_training_images"] = maximum_mean_discrepancy(reference, sets.held_out)
    if sets.training_labels is not None:
        figures |= _class_figures(samples, reference, sets, sets.training_labels)
    for name, wrong in outliers(outlier_key, sets.held_out).items():
        scores = energies_of(model.energy, params, wrong)
        detected = out_of_distribution_figures(energy["held_out"], scores)
        figures[f"auroc_{name}"] = detected["auroc"]
        figures[f"fpr95_{name}"] = detected["fpr95"]
    figures |= memorization_figures(samples, sets.training, sets.held_out)
    drift = long_run_drift(
        drift_key,
        model.kernel,
        model.energy,
        params,
        jnp.asarray(sets.held_out[:200]),
        jnp.asarray(sets.held_out[-200:]),
        num_steps=drift_steps,
        num_records=4,
    )
    figures["drift_of_energy"] = drift.energy_drift
    figures["drift_of_mmd"] = float(drift.mmd[-1] - drift.mmd[0])
    return figures | likelihood_figures(likelihood_key, params, model, sets)


def _class_figures(samples, reference, sets: ImageSets, labels: np.ndarray) -> dict[str, float]:
    """Distance in the features of a classifier trained here, and how even the classes are."""
    from ebjax.evaluation import classifier_features, frechet_distance_of_classifier_features

    classifier = classifier_features(sets.training[: len(labels)], labels)
    shares = np.bincount(classifier.predict(samples), minlength=labels.max() + 1) / len(samples)
    figures = {"classifier_accuracy": classifier.accuracy}
    for name, images in (("", samples), ("_of_training_images", reference)):
        figures[f"frechet_distance_of_classifier_features{name}"] = (
            frechet_distance_of_classifier_features(images, sets.held_out, classifier)
        )
    figures["share_of_rarest_class"] = float(shares.min())
    figures["share_of_commonest_class"] = float(shares.max())
    return figures


def likelihood_figures(
    key: jax.Array, params: Any, model: Model, sets: ImageSets
) -> dict[str, float]:
    """Bits a dimension of held-out images, an upper bound in expectation, and of a normal law."""
    from ebjax.evaluation import annealed_log_likelihood, normal_base, uniform_base

    held_out_key, training_key, anneal_key = jax.random.split(key, 3)
    shape = sets.held_out.shape[1:]
    num_dims = math.prod(shape)
    held_out = _with_noise(held_out_key, sets.held_out, model, sets.num_values)
    training = _with_noise(training_key, sets.training, model, sets.num_values)
    energy = temper(model.energy, model.temperature)
    # The narrowest scale allows about the chain's own step; a Metropolis test that looks at all
    # dimensions at once wants steps that fall as D^(-1/3).
    step_size = model.step_size * min(1.0, 2.0 * num_dims ** (-1.0 / 3.0))
    ladder = (np.arange(1, _NUM_TEMPERATURES + 1) / _NUM_TEMPERATURES) ** 2
    if model.data_noise == 0.0:
        name, width = "tempered_bits_per_dim", _level_width(sets.num_values)
        # Chains run in R^D on the box's mirror images, with the weights of where they fold to.
        base, energy = uniform_base(shape, *BOUNDS), folded_energy(energy, box(*BOUNDS))
        steps = np.minimum(step_size * model.temperature / ladder, 0.05)
    else:
        name, width = "noisy_bits_per_dim", 1.0
        base = normal_base(training)
        steps = np.full(len(ladder), step_size)
    logs = annealed_log_likelihood(
        anneal_key,
        energy,
        params,
        base,
        mala,
        held_out[:_NUM_LIKELIHOOD_EXAMPLES],
        inverse_temperatures=ladder,
        chains_per_example=1,
        step_size=steps,
    )
    bits = -logs / (num_dims * math.log(2.0)) - math.log2(width)
    normal = -_normal_log_likelihood(training, held_out) / (num_dims * math.log(2.0))
    return {
        name: float(bits.mean()),
        f"{name}_standard_error": float(bits.std(ddof=1) / math.sqrt(len(bits))),
        f"{name}_of_normal_law": float(normal.mean() - math.log2(width)),
    }


def _level_width(num_values: int | None) -> float:
    """Distance of two levels in [-1, 1]; 1 where there are none, which makes bits of a density."""
    return 1.0 if num_values is None else (BOUNDS[1] - BOUNDS[0]) / num_values


def _with_noise(key, images, model: Model, num_values):
    """Images with the noise under which the law of the energy has a density."""
    if model.data_noise:
        return images + model.data_noise * jax.random.normal(key, images.shape)
    if num_values is None:
        return jnp.asarray(images)
    levels = jnp.round((images + 1.0) / 2.0 * (num_values - 1))
    return 2.0 * (levels + jax.random.uniform(key, images.shape)) / num_values - 1.0


def _normal_log_likelihood(training, examples) -> np.ndarray:
    """[N] log density of examples under a normal law with mean and covariance of the training."""
    training = np.asarray(training, np.float64).reshape(len(training), -1)
    examples = np.asarray(examples, np.float64).reshape(len(examples), -1)
    factor = np.linalg.cholesky(np.cov(training.T))
    white = np.linalg.solve(factor, (examples - training.mean(axis=0)).T)
    constant = np.log(np.diag(factor)).sum() + 0.5 * len(factor) * math.log(2.0 * math.pi)
    return -0.5 * np.square(white).sum(axis=0) - constant


def image_figures(
    key: jax.Array, params: Any, samples: dict[str, np.ndarray], model: Model, sets: ImageSets
) -> dict[str, Any]:
    """Pictures of samples, of the training images nearest to them, of energies and of chains."""
    from ebjax.evaluation import energies_of, nearest_neighbors
    from ebjax.figures import chain_strip, energy_histogram, image_grids

    path_key, outlier_key = jax.random.split(key)
    drawn = np.asarray(samples["images"])
    paths = jax.jit(jax.vmap(model.path, (0, None)))(jax.random.split(path_key, 16), params)
    energies = {
        "data, training": energies_of(model.energy, params, sets.training[:2000]),
        "data, held out": energies_of(model.energy, params, sets.held_out),
        "samples": samples["energies"],
    }
    wrong = {
        name: energies_of(model.energy, params, images)
        for name, images in outliers(outlier_key, sets.held_out).items()
    }
    nearest = sets.training[nearest_neighbors(drawn[:96], sets.training)[1][:, 0]]
    return {
        "samples": image_grids({"data": sets.training, "samples": drawn}),
        "nearest": image_grids({"samples": drawn, "nearest training images": nearest}),
        "energies": energy_histogram({**energies, **wrong}, close_up=tuple(energies)),
        "chains": chain_strip(np.moveaxis(np.asarray(paths), 0, 1), model.path_steps),
    }
