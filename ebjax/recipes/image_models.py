"""The two kinds of model of the images recipe: what is trained, and how it is drawn from."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ebjax.energies.networks import (
    class_conditional_energy,
    convolutional_energy,
    mlp_energy,
    residual_energy,
)
from ebjax.objectives.contrastive_divergence import persistent_contrastive_divergence
from ebjax.objectives.recovery_likelihood import (
    energy_of_data,
    recovery_chain,
    recovery_likelihood,
    recovery_sample,
    scaled_by_step_size,
)
from ebjax.objectives.recovery_schedule import (
    RecoverySchedule,
    cosine_noise,
    recovery_schedule,
    steps_of_narrow_data,
)
from ebjax.objectives.regularizers import gradient_penalty
from ebjax.parallel import AXIS_NAME
from ebjax.samplers import langevin, run_chain
from ebjax.types import Energy, Kernel, Objective

if TYPE_CHECKING:
    from ebjax.recipes.images import ImagesConfig

__all__ = ["BOUNDS", "Model", "Pixels", "build_model", "pixels_of"]

BOUNDS = (-1.0, 1.0)


class Model(NamedTuple):
    """What the two objectives differ in.

    Attributes:
      init: ``key -> params``.
      objective: what is minimised.
      energy: ``(params, x) -> []`` of one image in [-1, 1].
      draw: ``(key, params) -> image``, one chain from noise.
      path: ``(key, params) -> [times, ...]``, one chain on its way.
      path_steps: the step of each time of ``path``.
      temperature: τ of the chains; the law that is drawn is that of ``energy / τ``.
      kernel: the transition of a long chain on ``energy``, at that temperature.
      step_size: h of ``kernel``.
      data_noise: standard deviation of the noise on the images whose law ``energy`` is.
    """

    init: Callable[[jax.Array], Any]
    objective: Objective
    energy: Callable[..., jax.Array]
    draw: Callable[[jax.Array, Any], jax.Array]
    path: Callable[[jax.Array, Any], jax.Array]
    path_steps: tuple[int, ...]
    temperature: float
    kernel: Kernel
    step_size: float
    data_noise: float


class Pixels(NamedTuple):
    """``mean`` and ``deviation`` [height, width, channels] of training images, pixel by pixel."""

    mean: np.ndarray
    deviation: np.ndarray


def pixels_of(images: np.ndarray, noise: float) -> Pixels:
    """Of images [N, height, width, channels] with normal noise of that deviation."""
    return Pixels(images.mean(axis=0), np.sqrt(images.var(axis=0) + noise**2 + 1e-4))


def build_model(
    config: ImagesConfig, shape: tuple[int, int, int], pixels: Pixels | None = None
) -> Model:
    """The energy, how it is trained and how it is drawn from.

    Args:
      config: settings.
      shape: of an image.
      pixels: of the training images, where ``config.normal_pixels`` asks for them.

    Raises:
      ValueError: if they are asked for and not given.
    """
    if config.normal_pixels and pixels is None:
        raise ValueError("normal_pixels is True: give the pixels of the training images.")
    build = _pcd if config.objective == "pcd" else _recovery
    return build(config, shape, pixels if config.normal_pixels else None)


def _network(config: ImagesConfig) -> Energy:
    make: dict[str, Callable[..., Energy]] = {
        "mlp": mlp_energy,
        "convolutional": convolutional_energy,
        "residual": residual_energy,
    }
    return make[config.energy_network](config.features)


def _tilted(energy: Energy, pixels: Pixels, temperature: float) -> Energy:
    """The energy that, divided by the temperature, is a network and independent normal pixels."""

    def apply(params, x):
        mean, deviation = (jnp.asarray(values, x.dtype) for values in pixels)
        squares = jnp.sum(jnp.square((x - mean) / deviation))
        return energy.apply(params, x) + 0.5 * temperature * squares

    return Energy(energy.init, apply)


def _pcd(config: ImagesConfig, shape: tuple[int, int, int], pixels: Pixels | None) -> Model:
    temperature = config.langevin_noise_scale**2 / (2.0 * config.langevin_step_size)
    energy = _network(config)
    if pixels is not None:
        energy = _tilted(energy, pixels, temperature)
    kernel = langevin(
        step_size=config.langevin_step_size,
        noise_scale=config.langevin_noise_scale,
        bounds=BOUNDS,
    )

    def noise(key):
        if pixels is None:
            return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)
        start = pixels.mean + pixels.deviation * jax.random.normal(key, shape)
        return jnp.clip(start, *BOUNDS)

    penalties = [gradient_penalty(config.gradient_penalty)] if config.gradient_penalty else []
    objective = persistent_contrastive_divergence(
        energy.apply,
        kernel,
        noise,
        num_steps=config.langevin_steps,
        chains_per_example=config.chains_per_example,
        rebirth_probability=config.rebirth_probability,
        energy_regularizer=config.energy_regularizer,
        regularizers=penalties,
        reset_margin=config.reset_margin or None,
        axis_name=AXIS_NAME,
    )
    num_times = min(10, config.sample_steps)
    every = config.sample_steps // num_times

    def run(key, params, start, num_steps):
        state = kernel.init(energy.apply, params, start)
        return run_chain(key, kernel, energy.apply, params, state, num_steps)[0].position

    def draw(key, params):
        noise_key, chain_key = jax.random.split(key)
        return run(chain_key, params, noise(noise_key), config.sample_steps)

    def path(key, params):
        noise_key, chain_key = jax.random.split(key)

        def go_on(x, chain_key):
            x = run(chain_key, params, x, every)
            return x, x

        start = noise(noise_key)
        _, xs = jax.lax.scan(go_on, start, jax.random.split(chain_key, num_times))
        return jnp.concatenate([start[None], xs])

    return Model(
        init=lambda key: energy.init(key, jnp.zeros(shape)),
        objective=objective,
        energy=energy.apply,
        draw=draw,
        path=path,
        path_steps=tuple(every * time for time in range(num_times + 1)),
        temperature=temperature,
        kernel=kernel,
        step_size=config.langevin_step_size,
        data_noise=0.0,
    )


def _recovery(config: ImagesConfig, shape: tuple[int, int, int], pixels: Pixels | None) -> Model:
    schedule = recovery_schedule(
        cosine_noise(config.num_levels, largest_log_snr=config.largest_log_snr)
    )
    network = _level_network(config)
    fraction = steps_of_narrow_data(schedule, config.step_share)
    scaled = scaled_by_step_size(network.apply, schedule, step_fraction=fraction)

    means, deviations = _levels_of_pixels(schedule, pixels, shape)

    def energy_fn(params, y, level):
        mean, deviation = (jnp.asarray(values, y.dtype)[level] for values in (means, deviations))
        return scaled(params, y, level) + 0.5 * jnp.sum(jnp.square((y - mean) / deviation))

    options: dict[str, Any] = {
        "schedule": schedule,
        "num_steps": config.recovery_steps,
        "step_fraction": fraction,
    }
    objective = recovery_likelihood(
        energy_fn,
        level_weights=2.0 * fraction * schedule.step_noise[0] * schedule.step_noise,
        **options,
    )

    def draw(key, params):
        noise_key, chain_key = jax.random.split(key)
        start = jax.random.normal(noise_key, shape)
        x, _ = recovery_sample(chain_key, energy_fn, params, start, denoise=True, **options)
        return jnp.clip(x, *BOUNDS)

    def path(key, params):
        noise_key, chain_key = jax.random.split(key)

        def descend(noisier, level):
            level_key = jax.random.fold_in(chain_key, level)
            y, _ = recovery_chain(level_key, energy_fn, params, noisier, noisier, level, **options)
            x = y / jnp.asarray(schedule.scale, y.dtype)[level]
            return x, x

        start = jax.random.normal(noise_key, shape)
        _, xs = jax.lax.scan(descend, start, jnp.arange(config.num_levels)[::-1])
        return jnp.concatenate([start[None], xs])

    cleanest = energy_of_data(energy_fn, schedule)
    # A step of the cleanest level, in the units of the data.
    step_size = float(fraction[0] * (schedule.step_noise[0] / schedule.signal[1]) ** 2)
    return Model(
        init=lambda key: network.init(key, jnp.zeros(shape)),
        objective=objective,
        # Not as a ``bind``, whose arrays samplers would trace: the schedule is static.
        energy=lambda params, x: cleanest(params, x),
        draw=draw,
        path=path,
        path_steps=tuple(config.recovery_steps * time for time in range(config.num_levels + 1)),
        temperature=1.0,
        kernel=langevin(step_size=step_size),
        step_size=step_size,
        data_noise=float(schedule.noise[0] / schedule.signal[0]),
    )


def _levels_of_pixels(
    schedule: RecoverySchedule, pixels: Pixels | None, shape: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation [T, height, width, channels] of y, of images of independent pixels.

    Where these are not known they are N(0, 1), which is near the second moment of images.
    """
    mean, deviation = (np.zeros(shape), np.ones(shape)) if pixels is None else pixels
    signal, noise, scale = (
        values[: schedule.num_levels].reshape(-1, 1, 1, 1)
        for values in (schedule.signal, schedule.noise, schedule.scale)
    )
    return scale * signal * mean, scale * np.sqrt((signal * deviation) ** 2 + noise**2)


def _level_network(config: ImagesConfig) -> Energy:
    """A network of an image and a level: modulated layers, or planes that hold the level."""
    if config.energy_network == "mlp":
        return class_conditional_energy(config.num_levels, config.features)
    network = _network(config)

    def with_planes(x, level):
        planes = jnp.broadcast_to(
            jax.nn.one_hot(level, config.num_levels, dtype=x.dtype),
            (*x.shape[:2], config.num_levels),
        )
        return jnp.concatenate([x, planes], axis=-1)

    return Energy(
        init=lambda key, x: network.init(key, with_planes(x, 0)),
        apply=lambda params, x, level: network.apply(params, with_planes(x, level)),
    )
