"""A restricted Boltzmann machine of binary images: persistent contrastive divergence, AIS.

    F(v) = -b·v - Σ_j log(1 + exp(c_j + (v' W)_j)),    p(v) ∝ exp(-F(v))

The chains draw both layers in turn and persist between updates; the gradient of F puts the
conditional means of the hidden units in the place of their draws, at the data and at the chains.
The likelihood of held-out images comes from annealed importance sampling (which flatters where its
chains miss modes), from annealing back from the images (which does not), and exactly where one of
the layers has at most 20 units.

The default data are scikit-learn's 8x8 digits, ``data_path`` names other images (MNIST as
``.npz``, ``.npy`` or IDX). Pixels become binary at a threshold, or anew in each pass with their
grey value as the probability.

Tieleman, "Training restricted Boltzmann machines using approximations to the likelihood gradient",
ICML 2008.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ebjax.data import array_source, load_dataset, split
from ebjax.energies.boltzmann import MAX_STATES, RBMParams, rbm_free_energy, rbm_log_z
from ebjax.objectives.contrastive_divergence import contrastive_divergence
from ebjax.objectives.pseudolikelihood import pseudolikelihood_loss
from ebjax.objectives.rbm_contrastive_divergence import rbm_persistent_contrastive_divergence
from ebjax.samplers.rbm_marginal import (
    rbm_annealed_log_likelihood,
    rbm_annealed_log_z,
    rbm_marginal_gibbs,
)
from ebjax.samplers.run import run_chain, sample
from ebjax.training import (
    ScheduleConfig,
    check_at_least,
    check_between,
    setting,
)
from ebjax.types import Kernel, Objective, Recipe, Run, TrainState

__all__ = ["RBMConfig", "free_energy_differences", "load_images", "recipe"]

_SPLIT_SEED = 0
_BINARIZE_SEED = 1
_METHODS = ("persistent", "from_data")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RBMConfig(ScheduleConfig):
    """Settings of the run."""

    num_steps: int = setting(6000)
    batch_size: int = setting(100)
    checkpoint_every: int = setting(2000)
    data_path: str = setting("digits", "file of images [N, ...], or 'digits' for scikit-learn's")
    data_key: str = setting("", "name of the images in an .npz file; '' for 'images'")
    num_held_out: int = setting(297, "images that training never sees")
    threshold: float = setting(0.5, "grey value from which a pixel is 1, as a share of the largest")
    stochastic_binarization: bool = setting(False, "draw pixels with their grey value instead")
    num_hidden: int = setting(64, "hidden units")
    weight_scale: float = setting(0.01, "standard deviation of the initial weights")
    bias_from_data: bool = setting(True, "start the visible bias at the log-odds of the data")
    method: str = setting("persistent", f"where chains start: {' or '.join(_METHODS)}")
    gibbs_steps: int = setting(1, "steps of a chain in one update")
    chains_per_example: int = setting(1, "persistent chains that each example slot owns")
    rebirth_probability: float = setting(0.0, "chance that a persistent chain starts anew")
    learning_rate: float = setting(0.05)
    momentum: float = setting(0.0, "momentum of gradient descent")
    weight_decay: float = setting(1e-4, "factor of the weights (not the biases) in the gradient")
    sample_steps: int = setting(1000, "Gibbs steps from independent pixels when samples are drawn")
    ais_chains: int = setting(500, "chains of annealed importance sampling")
    ais_temperatures: int = setting(2000, "temperatures of annealed importance sampling")

    def __post_init__(self) -> None:
        """Checks types and ranges."""
        super().__post_init__()
        check_at_least(self, 1, "num_held_out", "num_hidden", "gibbs_steps", "chains_per_example")
        check_at_least(self, 1, "sample_steps", "ais_temperatures")
        check_at_least(self, 2, "ais_chains")
        check_at_least(self, 0, "weight_scale", "weight_decay")
        check_between(self, 0, 1, "threshold", "rebirth_probability")
        check_between(self, 0, 0.999999, "momentum")
        if self.method not in _METHODS:
            raise ValueError(f"method is {self.method!r}; it must be one of {', '.join(_METHODS)}.")


def load_images(config: RBMConfig) -> tuple[np.ndarray, np.ndarray]:
    """``(training [N, ...], held out [M, ...])``, grey values in [0, 1] as float32.

    Raises:
      ValueError: if the file cannot be read, or float values are not in [0, 1].
    """
    is_npz = config.data_path.endswith(".npz")
    key = config.data_key or ("images" if is_npz else None)
    dataset = load_dataset(config.data_path, key=key)
    images = np.asarray(dataset.examples)
    if images.dtype.kind in "iu":
        # Bytes count to 255, scikit-learn's digits to 16.
        largest = 255.0 if images.max() > 16 else max(1.0, float(images.max()))
        images = images.astype(np.float32) / np.float32(largest)
    images = images.astype(np.float32)
    if images.min() < 0.0 or images.max() > 1.0:
        raise ValueError(
            f"{config.data_path}: has values from {images.min():g} to {images.max():g}; pixels are "
            "whole numbers from 0, or floats in [0, 1]."
        )
    training, held_out = split(dataset._replace(examples=images), config.num_held_out, _SPLIT_SEED)
    return np.asarray(training.examples), np.asarray(held_out.examples)


def free_energy_differences(params: RBMParams, x: jax.Array) -> jax.Array:
    """Changes of F by single flips [V, 1], as ``flip_differences`` but for V H operations."""
    sign = 1.0 - 2.0 * x
    logits = params.hidden_bias + x @ params.weights
    moved = jax.nn.softplus(logits + sign[:, None] * params.weights)
    change = -sign * params.visible_bias - jnp.sum(moved - jax.nn.softplus(logits), axis=-1)
    return change[:, None]


def _weights_only(params: RBMParams) -> RBMParams:
    return RBMParams(True, False, False)  # type: ignore[arg-type]


def _log_odds(images: np.ndarray) -> np.ndarray:
    """[V] log-odds of the pixels' means, with one image more of each value."""
    flat = images.reshape(len(images), -1)
    mean = (flat.sum(axis=0, dtype=np.float64) + 1.0) / (len(flat) + 2.0)
    return np.log(mean / (1.0 - mean)).astype(np.float32)


class _Images(NamedTuple):
    """The data, binary once and for all where they are looked at.

    Attributes:
      grey: [N, ...] training images as they were read.
      training: [N, V].
      held_out: [M, V].
      base_bias: [V] log-odds of the training pixels' means.
    """

    grey: np.ndarray
    training: jax.Array
    held_out: jax.Array
    base_bias: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image."""
        return self.grey.shape[1:]


def _binarizer(config: RBMConfig) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """``(key, grey image) -> [V]`` in {0, 1}."""

    def binarize(key: jax.Array, image: jax.Array) -> jax.Array:
        grey = jnp.ravel(image)
        level = jnp.asarray(config.threshold, grey.dtype)
        if config.stochastic_binarization:
            # Uniform on (0, 1], so that white is always 1 and black always 0.
            level = 1.0 - jax.random.uniform(key, grey.shape)
        return (grey >= level).astype(jnp.float32)

    return binarize


def _binary_images(config: RBMConfig) -> _Images:
    training, held_out = load_images(config)
    binarize = jax.jit(jax.vmap(_binarizer(config)))

    def fixed(images: np.ndarray) -> jax.Array:
        return binarize(jax.random.split(jax.random.key(_BINARIZE_SEED), len(images)), images)

    binary = fixed(training)
    return _Images(training, binary, fixed(held_out), _log_odds(np.asarray(binary)))


def _objective(config: RBMConfig, kernel: Kernel, independent_pixels) -> Objective:
    if config.method == "from_data":
        return contrastive_divergence(rbm_free_energy, kernel, num_steps=config.gibbs_steps)
    return rbm_persistent_contrastive_divergence(
        independent_pixels,
        num_steps=config.gibbs_steps,
        chains_per_example=config.chains_per_example,
        rebirth_probability=config.rebirth_probability,
    )


_free_energies = jax.jit(jax.vmap(rbm_free_energy, (None, 0)))


def _reconstruct(params: RBMParams, x: jax.Array) -> jax.Array:
    """[..., V] mean of the pixels given the mean of the hidden units given ``x`` [..., V]."""
    hidden = jax.nn.sigmoid(params.hidden_bias + x @ params.weights)
    return jax.nn.sigmoid(params.visible_bias + hidden @ params.weights.T)


@jax.jit
def _cheap_figures(params: RBMParams, images: jax.Array) -> dict[str, jax.Array]:
    """What needs no log Z."""

    def pseudo(x):
        return -pseudolikelihood_loss(free_energy_differences(params, x))

    return {
        "pseudo_log_likelihood": jax.lax.map(pseudo, images, batch_size=10).mean(),
        "reconstruction_error": jnp.abs(_reconstruct(params, images) - images).mean(),
    }


def _likelihoods(
    config: RBMConfig, images: _Images, key: jax.Array, params: RBMParams
) -> dict[str, float]:
    """Log-likelihoods, annealed both ways, and exact where one layer can be summed out."""
    forward_key, back_key = jax.random.split(key)
    annealed = rbm_annealed_log_z(
        forward_key,
        params,
        images.base_bias,
        num_chains=config.ais_chains,
        inverse_temperatures=config.ais_temperatures,
    )
    log_z, error = float(annealed.log_z), float(annealed.log_z_standard_error)
    scores = -np.asarray(_free_energies(params, images.held_out), np.float64)
    score = float(scores.mean())
    # As many chains back as there are forwards.
    back = rbm_annealed_log_likelihood(
        back_key,
        params,
        images.base_bias,
        images.held_out[: config.ais_chains],
        inverse_temperatures=config.ais_temperatures,
    )
    base_bias = jnp.asarray(images.base_bias)
    base = images.held_out * base_bias - jax.nn.softplus(base_bias)
    figures = {
        "log_likelihood_held_out": score - log_z,
        "log_likelihood_held_out_low": score - log_z - 2.0 * error,
        "log_likelihood_held_out_high": score - log_z + 2.0 * error,
        "log_likelihood_held_out_conservative": float(back.mean()),
        "standard_error_over_images": float(scores.std(ddof=1) / math.sqrt(len(scores))),
        "log_likelihood_training": -float(_free_energies(params, images.training).mean()) - log_z,
        "log_likelihood_of_independent_pixels": float(base.sum(axis=-1).mean()),
        "log_z": log_z,
        "log_z_standard_error": error,
    }
    if min(params.weights.shape) <= math.log2(MAX_STATES):
        exact = float(rbm_log_z(params))
        figures["log_z_exact"] = exact
        figures["log_likelihood_held_out_exact"] = score - exact
    return figures


def _pictures(config: RBMConfig, images: _Images, params: RBMParams, samples, chains_of):
    """Data beside samples, the weights, and chains that start from independent pixels."""
    from ebjax.figures import chain_strip, image_grids

    shape = images.shape
    if len(shape) not in (2, 3):
        return {}
    unit = (0.0, 1.0)
    weights = np.asarray(params.weights).T.reshape(-1, *shape)
    strongest = np.argsort(-np.abs(weights).reshape(len(weights), -1).sum(axis=1))
    limit = max(float(np.quantile(np.abs(weights), 0.995)), 1e-6)
    every = max(1, config.sample_steps // 10)
    positions = chains_of(16, 10, every).reshape(-1, 16, *shape)
    return {
        "samples": image_grids(
            {"data": np.asarray(images.training).reshape(-1, *shape), **samples}, limits=unit
        ),
        "filters": image_grids({"filters": weights[strongest]}, limits=(-limit, limit)),
        "chains": chain_strip(
            positions,
            [every * t for t in range(11)],
            limits=unit,
            label="Gibbs steps from independent pixels",
        ),
    }


def build(config: RBMConfig) -> Run:
    """Makes the run of a config."""
    images = _binary_images(config)
    num_visible = math.prod(images.shape)
    base_probability = jax.nn.sigmoid(jnp.asarray(images.base_bias))
    kernel = rbm_marginal_gibbs()

    def independent_pixels(key: jax.Array) -> jax.Array:
        return jax.random.bernoulli(key, base_probability).astype(jnp.float32)

    def init(key: jax.Array) -> RBMParams:
        weights = config.weight_scale * jax.random.normal(key, (num_visible, config.num_hidden))
        bias = images.base_bias if config.bias_from_data else np.zeros_like(images.base_bias)
        return RBMParams(weights, jnp.asarray(bias), jnp.zeros(config.num_hidden))

    def run_chains(key, params, num_chains: int, num_samples: int, thinning: int):
        start_key, chain_key = jax.random.split(key)
        start = jax.vmap(independent_pixels)(jax.random.split(start_key, num_chains))
        draws = sample(
            chain_key,
            kernel,
            rbm_free_energy,
            params,
            start,
            num_samples=num_samples,
            thinning=thinning,
        )
        return np.concatenate([np.asarray(start)[None], np.asarray(draws.positions)])

    def draw(key, params: RBMParams):
        start_key, chain_key = jax.random.split(key)
        chain = kernel.init(rbm_free_energy, params, independent_pixels(start_key))
        steps = config.sample_steps
        chain, _ = run_chain(chain_key, kernel, rbm_free_energy, params, chain, steps)
        return chain.position.reshape(images.shape)

    def sample_images(key, state: TrainState, num_samples: int):
        positions = run_chains(key, state.ema, num_samples, 1, config.sample_steps)[-1]
        probabilities = _reconstruct(state.ema, jnp.asarray(positions))
        return {
            "images": positions.reshape(-1, *images.shape),
            "probabilities": np.asarray(probabilities).reshape(-1, *images.shape),
        }

    def cheap_figures(params: RBMParams) -> dict[str, float]:
        found = _cheap_figures(params, images.held_out)
        return {name: float(value) for name, value in found.items()}

    def monitor(key, state: TrainState):
        del key
        figures = cheap_figures(state.ema)
        figures["negative_pseudo_log_likelihood"] = -figures.pop("pseudo_log_likelihood")
        # Grows as the machine learns its training images by heart.
        figures["free_energy_gap"] = float(
            _free_energies(state.ema, images.held_out).mean()
            - _free_energies(state.ema, images.training[: len(images.held_out)]).mean()
        )
        return figures

    return Run(
        init=init,
        objective=_objective(config, kernel, independent_pixels),
        optimizer=optax.chain(
            optax.add_decayed_weights(config.weight_decay, mask=_weights_only),
            optax.sgd(config.schedule(), momentum=config.momentum or None),
        ),
        source=array_source(images.grey, transform=_binarizer(config)),
        sample=sample_images,
        evaluate=lambda key, state: {
            **_likelihoods(config, images, key, state.ema),
            **cheap_figures(state.ema),
        },
        figures=lambda key, state, samples: _pictures(
            config,
            images,
            state.ema,
            samples,
            lambda *sizes: run_chains(key, state.ema, *sizes),
        ),
        monitor=monitor,
        monitor_name="negative_pseudo_log_likelihood",
        progress=("energy_gap", "chains_finite", "gradient_norm"),
        energy=lambda params, x: rbm_free_energy(params, jnp.ravel(x)),
        draw=draw,
    )


recipe = Recipe(RBMConfig, build, seed_is_key=True)
