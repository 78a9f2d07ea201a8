"""Ways to learn a law in the plane: each objective with its network, and how its law is read off.

A plain energy is a network on top of a wide Gaussian, ``E(x) = g(x) + |x - m|²/(2 (c s)²)``, with m
and s the mean and the deviation of the data: objectives that look at the data only would say
nothing of the energy far away. The two that learn many noise levels at once condition the network
on the level, and scale it so that its own slope is of order one at all of them:

    denoising    E(x, σ) = |x - m|²/(2v) + (√v/σ) g((x - m)/√v, log σ),   v = s² + σ²
    recovery     E(y, t) = |y|²/2 + g(y, t)/σ_t                         for standardised data
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ebjax.energies import mlp_energy
from ebjax.energies.spectral import normalized_objective, spectral_normalize
from ebjax.objectives.chain_divergence import ChainDivergence
from ebjax.objectives.conditional_noise_contrastive import (
    conditional_noise_contrastive,
    gaussian_perturbation,
)
from ebjax.objectives.contrastive_divergence import (
    contrastive_divergence,
    persistent_contrastive_divergence,
    short_run,
)
from ebjax.objectives.cooperative import cooperative, refined_proposal
from ebjax.objectives.denoising_score_matching import (
    annealed_denoising_score_matching,
    denoising_score_matching,
    geometric_noise_levels,
)
from ebjax.objectives.jarzynski import jarzynski
from ebjax.objectives.noise_contrastive import NoiseLaw, noise_contrastive
from ebjax.objectives.recovery_likelihood import (
    energy_of_data,
    recovery_likelihood,
    recovery_sample,
)
from ebjax.objectives.recovery_schedule import cosine_noise, recovery_schedule
from ebjax.objectives.regularizers import energy_magnitude, gradient_penalty
from ebjax.objectives.score_matching import (
    finite_difference_score_matching,
    score_matching,
    sliced_score_matching,
)
from ebjax.parallel import AXIS_NAME
from ebjax.samplers import langevin, mala, run_chain
from ebjax.samplers.annealed import annealed_langevin
from ebjax.types import EnergyFn, Kernel, Objective, Params, Target

__all__ = ["KERNELS", "METHODS", "Frame", "Method", "data_frame"]

KERNELS = {"langevin": langevin, "mala": mala}


class Frame(NamedTuple):
    """Where the data are: ``mean`` [2], and ``deviation``, one number for both coordinates."""

    mean: np.ndarray
    deviation: float


def data_frame(target: Target) -> Frame:
    """Mean and deviation of a target with known moments."""
    assert target.moments is not None
    variance = float(np.trace(target.moments.covariance)) / 2.0
    return Frame(np.asarray(target.moments.mean, np.float32), variance**0.5)


class Method(NamedTuple):
    """A way to learn a law.

    Attributes:
      init: ``key -> params``.
      objective: what is minimised.
      data_energy: ``(params, x) -> []``, the energy of the law that was learned.
      sample: ``(key, params) -> x``, one draw by the sampler that belongs to the objective.
    """

    init: Callable[[jax.Array], Params]
    objective: Objective
    data_energy: EnergyFn
    sample: Callable[[jax.Array, Params], jax.Array]


def _network(config: Any):
    return mlp_energy(
        config.hidden_features,
        num_frequencies=config.num_frequencies,
        frequency_scale=config.frequency_scale,
    )


def _level_network(config: Any, deviation: float):
    """A network of a standardised position and a level in [-1, 1], and what it is given of them.

    Frequencies are fixed and of the position alone: a level that turned all phases would make
    neighbouring levels strangers.
    """
    normal = np.random.default_rng(0).normal(size=(config.num_frequencies, 2))
    frequencies = (config.frequency_scale * deviation * normal).astype(np.float32)

    def features(position, level):
        angles = jnp.asarray(frequencies, position.dtype) @ position
        level = jnp.asarray(level, position.dtype)[None]
        return jnp.concatenate([position, jnp.sin(angles), jnp.cos(angles), level])

    return mlp_energy(config.hidden_features), features


def _plain_energy(config: Any, frame: Frame):
    """``(init, energy_fn)`` of an energy of the position alone."""
    network = _network(config)
    precision = 0.0
    if config.base_scale:
        precision = 1.0 / (config.base_scale * frame.deviation) ** 2

    def energy_fn(params, x):
        base = 0.5 * precision * jnp.sum(jnp.square(x - frame.mean))
        return network.apply(params, x) + base

    return lambda key: network.init(key, jnp.zeros(2)), energy_fn


def _kernel(config: Any) -> Kernel:
    return KERNELS[config.kernel](step_size=config.langevin_step_size)


def _wide_noise(key: jax.Array, frame: Frame) -> jax.Array:
    """Where chains are born: a Gaussian a little wider than the data."""
    width = 1.4 * frame.deviation
    return jnp.asarray(frame.mean) + width * jax.random.normal(key, (2,))


def _draw_by_chains(config: Any, frame: Frame, energy_fn: EnergyFn, num_steps: int, kernel=None):
    """``(key, params) -> x``: a chain from wide noise, with a Metropolis test by default."""
    kernel = mala(step_size=config.langevin_step_size) if kernel is None else kernel

    def draw(key, params):
        start_key, chain_key = jax.random.split(key)
        state = kernel.init(energy_fn, params, _wide_noise(start_key, frame))
        state, _ = run_chain(chain_key, kernel, energy_fn, params, state, num_steps)
        return state.position

    return draw


def _plain(build: Callable[[Any, Frame, EnergyFn], Objective]):
    """A method of an energy of the position alone, whose params are those of the energy."""

    def method(config: Any, frame: Frame) -> Method:
        init, energy_fn = _plain_energy(config, frame)
        draw = _draw_by_chains(config, frame, energy_fn, config.sample_steps)
        return Method(init, build(config, frame, energy_fn), energy_fn, draw)

    return method


def _persistent(config: Any, frame: Frame) -> Method:
    """With what holds the training stable; the weights may be normalised, then the law's too."""
    init, energy_fn = _plain_energy(config, frame)
    is_normal = config.spectral_bound > 0.0

    def data_energy(params, x):
        if is_normal:
            params = spectral_normalize(params, bound=config.spectral_bound)
        return energy_fn(params, x)

    divergence = ChainDivergence(config.divergence_weight) if config.divergence_weight else None
    objective = persistent_contrastive_divergence(
        energy_fn,
        _kernel(config),
        lambda key: _wide_noise(key, frame),
        num_steps=config.langevin_steps,
        chains_per_example=config.chains_per_example,
        rebirth_probability=config.rebirth_probability,
        energy_regularizer=config.energy_regularizer,
        regularizers=[gradient_penalty(config.gradient_penalty)] if config.gradient_penalty else [],
        divergence=divergence,
        reset_margin=config.reset_margin or None,
        axis_name=AXIS_NAME,
    )
    if is_normal:
        objective = normalized_objective(objective, bound=config.spectral_bound)
    draw = _draw_by_chains(config, frame, data_energy, config.sample_steps)
    return Method(init, objective, data_energy, draw)


def _from_data(config: Any, frame: Frame, energy_fn: EnergyFn) -> Objective:
    del frame
    return contrastive_divergence(
        energy_fn,
        _kernel(config),
        num_steps=config.langevin_steps,
        energy_regularizer=config.energy_regularizer,
    )


def _short_run(config: Any, frame: Frame) -> Method:
    """The sampler is the model: draws take the steps of training and no others."""
    init, energy_fn = _plain_energy(config, frame)
    objective = short_run(
        energy_fn,
        _kernel(config),
        lambda key: _wide_noise(key, frame),
        num_steps=config.langevin_steps,
        energy_regularizer=config.energy_regularizer,
    )
    draw = _draw_by_chains(config, frame, energy_fn, config.langevin_steps, _kernel(config))
    return Method(init, objective, energy_fn, draw)


def _implicit(config: Any, frame: Frame, energy_fn: EnergyFn) -> Objective:
    del config, frame
    return score_matching(energy_fn)


def _sliced(config: Any, frame: Frame, energy_fn: EnergyFn) -> Objective:
    del frame
    return sliced_score_matching(energy_fn, num_slices=config.num_slices)


def _finite_difference(config: Any, frame: Frame, energy_fn: EnergyFn) -> Objective:
    del frame
    return finite_difference_score_matching(
        energy_fn, epsilon=config.finite_difference_step, num_slices=config.num_slices
    )


def _conditional_noise(config: Any, frame: Frame, energy_fn: EnergyFn) -> Objective:
    perturb = gaussian_perturbation(config.perturbation_scale * frame.deviation)
    return conditional_noise_contrastive(energy_fn, perturb, num_noise=config.num_noise)


def level_energy(config: Any, frame: Frame):
    """``(init, energy_fn, levels)`` of an energy of position and noise level, as above."""
    network, features = _level_network(config, frame.deviation)
    levels = geometric_noise_levels(
        config.widest_noise, config.narrowest_noise, config.num_noise_levels
    )
    middle = 0.5 * float(np.log(levels[0] * levels[-1]))
    half_range = 0.5 * float(np.log(levels[0] / levels[-1]))

    def energy_fn(params, x, level):
        variance = frame.deviation**2 + jnp.square(level)
        scaled = (x - frame.mean) / jnp.sqrt(variance)
        feature = (jnp.log(level) - middle) / half_range
        out = network.apply(params, features(scaled, feature))
        return 0.5 * jnp.sum(jnp.square(scaled)) + jnp.sqrt(variance) / level * out

    return lambda key: network.init(key, features(jnp.zeros(2), 0.0)), energy_fn, levels


def _denoising(config: Any, frame: Frame) -> Method:
    """One level: a plain energy. Several: an energy of position and level."""
    if config.num_noise_levels == 1:
        single = _plain(
            lambda config, frame, energy_fn: denoising_score_matching(
                energy_fn, noise_level=config.narrowest_noise
            )
        )
        return single(config, frame)
    init, energy_fn, levels = level_energy(config, frame)
    narrowest = float(levels[-1])

    def draw(key, params):
        start_key, chain_key = jax.random.split(key)
        width = (frame.deviation**2 + levels[0] ** 2) ** 0.5
        start = frame.mean + width * jax.random.normal(start_key, (2,))
        position, _ = annealed_langevin(
            chain_key,
            energy_fn,
            params,
            start,
            noise_levels=levels,
            num_steps=max(1, config.sample_steps // len(levels)),
            step_size=0.2 * narrowest**2,
        )
        return position

    return Method(
        init=init,
        objective=annealed_denoising_score_matching(energy_fn, noise_levels=levels),
        data_energy=lambda params, x: energy_fn(params, x, jnp.asarray(narrowest, x.dtype)),
        sample=draw,
    )


def _recovery(config: Any, frame: Frame) -> Method:
    """Levels of standardised data; the law of the data is that of the cleanest level."""
    network, features = _level_network(config, frame.deviation)
    schedule = recovery_schedule(cosine_noise(config.recovery_levels))
    num_levels = schedule.num_levels
    options = {
        "num_steps": config.langevin_steps,
        "step_fraction": config.recovery_step,
        "build_kernel": KERNELS[config.kernel],
        "schedule": schedule,
    }

    def energy_fn(params, y, level):
        where = 2.0 * level / max(1, num_levels - 1) - 1.0
        out = network.apply(params, features(y, where))
        scale = jnp.asarray(1.0 / schedule.step_noise, y.dtype)[level]
        return 0.5 * jnp.sum(jnp.square(y)) + scale * out

    inner = recovery_likelihood(
        energy_fn,
        energy_regularizer=config.energy_regularizer,
        shared_noise=config.shared_noise,
        **options,
    )

    def loss(params, carry, keys, batch):
        return inner.loss(params, carry, keys, (batch - frame.mean) / frame.deviation)

    at_data = energy_of_data(energy_fn, schedule)

    def draw(key, params):
        start_key, chain_key = jax.random.split(key)
        start = jax.random.normal(start_key, (2,))
        x, _ = recovery_sample(chain_key, energy_fn, params, start, **options)
        return frame.mean + frame.deviation * x

    return Method(
        init=lambda key: network.init(key, features(jnp.zeros(2), 0.0)),
        objective=Objective(init=inner.init, loss=loss),
        data_energy=lambda params, x: at_data(params, (x - frame.mean) / frame.deviation),
        sample=draw,
    )


def _with_log_z(config: Any, frame: Frame):
    """``(init, energy_fn, data_energy, draw)`` where the params hold the energy's and log Z."""
    init, energy_fn = _plain_energy(config, frame)
    of_all = lambda params, x: energy_fn(params["energy"], x)  # noqa: E731
    draw = _draw_by_chains(config, frame, of_all, config.sample_steps)
    return (
        lambda key: {"energy": init(key), "log_z": jnp.zeros(())},
        energy_fn,
        of_all,
        draw,
    )


def _noise_contrastive(config: Any, frame: Frame) -> Method:
    init, energy_fn, of_all, draw = _with_log_z(config, frame)
    width = 1.2 * frame.deviation

    def log_prob(x):
        scaled = (x - frame.mean) / width
        return -0.5 * jnp.sum(jnp.square(scaled)) - float(np.log(2.0 * np.pi * width**2))

    noise = NoiseLaw(lambda key: frame.mean + width * jax.random.normal(key, (2,)), log_prob)
    objective = noise_contrastive(energy_fn, noise, num_noise=config.num_noise)
    return Method(init, objective, of_all, draw)


def _flow(config: Any, frame: Frame):
    from ebjax.energies.flows import coupling_flow

    return coupling_flow(
        (2,),
        num_layers=config.flow_layers,
        features=(32, 32),
        location=frame.mean,
        scale=frame.deviation,
    )


def _flow_contrastive(config: Any, frame: Frame) -> Method:
    from ebjax.objectives.flow_contrastive import flow_contrastive

    init, energy_fn, of_all, draw = _with_log_z(config, frame)
    flow = _flow(config, frame)

    def init_both(key):
        energy_key, flow_key = jax.random.split(key)
        return {**init(energy_key), "flow": flow.init(flow_key, jnp.zeros(2))}

    objective = flow_contrastive(
        energy_fn, flow, player=config.flow_player, num_noise=config.num_noise
    )
    return Method(init_both, objective, of_all, draw)


def _cooperative(config: Any, frame: Frame) -> Method:
    """A flow proposes, the energy chooses, short chains refine; draws are theirs together."""
    init, energy_fn = _plain_energy(config, frame)
    flow = _flow(config, frame)
    of_all = lambda params, x: energy_fn(params["energy"], x)  # noqa: E731
    kernel = _kernel(config)

    def init_both(key):
        energy_key, flow_key = jax.random.split(key)
        return {"energy": init(energy_key), "sampler": flow.init(flow_key, jnp.zeros(2))}

    together: dict[str, Any] = {
        "num_steps": config.langevin_steps,
        "num_proposals": config.num_proposals,
        "log_prob": flow.log_prob,
    }
    sample = refined_proposal(energy_fn, flow.sample, kernel, **together)

    def draw(key, params):
        return sample(params, key)[1].refined

    penalties = [energy_magnitude(config.energy_regularizer)] if config.energy_regularizer else []
    objective = cooperative(
        energy_fn,
        flow.sample,
        lambda params, key, proposal, refined: -flow.log_prob(params, refined),
        kernel,
        regularizers=penalties,
        **together,
    )
    return Method(init_both, objective, of_all, draw)


def _jarzynski(config: Any, frame: Frame) -> Method:
    """Starts from the wide Gaussian itself, the network's last layer zero, to draw from exactly."""
    if not config.base_scale:
        raise ValueError(
            f"base_scale is {config.base_scale}; with objective 'jarzynski' it must be positive, "
            "for walkers start as draws of that Gaussian."
        )
    init, energy_fn = _plain_energy(config, frame)
    width = config.base_scale * frame.deviation
    last_layer = f"Dense_{len(config.hidden_features)}"

    def init_at_base(key):
        params = init(key)
        return {**params, last_layer: jax.tree.map(jnp.zeros_like, params[last_layer])}

    # Weights take away the error of Langevin steps, at the price of their own spread.
    is_tested = config.kernel != "langevin"
    objective = jarzynski(
        energy_fn,
        _kernel(config) if is_tested else config.langevin_step_size,
        lambda key, params: frame.mean + width * jax.random.normal(key, (2,)),
        walkers_per_example=config.chains_per_example,
        num_steps=config.langevin_steps,
        moved_per_example=min(config.walkers_moved, config.chains_per_example),
        initial_log_z=float(np.log(2.0 * np.pi * width**2)),
        axis_name=AXIS_NAME,
    )
    draw = _draw_by_chains(config, frame, energy_fn, config.sample_steps)
    return Method(init_at_base, objective, energy_fn, draw)


METHODS: dict[str, Callable[[Any, Frame], Method]] = {
    "pcd": _persistent,
    "cd": _plain(_from_data),
    "short_run": _short_run,
    "score_matching": _plain(_implicit),
    "sliced_score_matching": _plain(_sliced),
    "finite_difference_score_matching": _plain(_finite_difference),
    "denoising_score_matching": _denoising,
    "recovery_likelihood": _recovery,
    "jarzynski": _jarzynski,
    "noise_contrastive": _noise_contrastive,
    "conditional_noise_contrastive": _plain(_conditional_noise),
    "flow_contrastive": _flow_contrastive,
    "cooperative": _cooperative,
}
