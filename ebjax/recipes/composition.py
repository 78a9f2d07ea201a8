"""Two laws in the plane, learned apart and sampled together: product, mixture, negation, tempering.

Each law has an energy of position and noise level, learned by denoising score matching. Nothing is
trained on the composition; it is made when samples are asked for:

    product     U = E_1 + E_2
    mixture     U = -log Σ_i exp(-E_i - log Z_i), each with its log Z of every level
    negation    U = (1 + α) E_1 - α E_2
    tempering   U = (E_1 + E_2) / τ

and drawn from by one of

    smc         weighted reverse diffusion with Markov steps (``reverse_diffusion_smc``)
    annealed    Metropolis-adjusted Langevin chains down the levels
    mala        the same chain at the narrowest level alone, from a wide Gaussian
    reverse     reverse diffusion along the composed slope, which is biased

the first three with as many evaluations of the energies. The law ``exp(-U) / Z`` at the narrowest
level is known by quadrature, and so is how far each sampler is from it (``tv``) and how far it is
from the composition of the true laws (``tv_of_learning``, which no sampler can mend).

Du et al., "Reduce, reuse, recycle: compositional generation with energy-based diffusion models and
MCMC", ICML 2023. Thornton et al., "Composition and control with distilled energy diffusion models
and sequential Monte Carlo", AISTATS 2025.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ebjax.energies import condition, mixture, sum_of, targets, temper
from ebjax.objectives.denoising_score_matching import annealed_denoising_score_matching
from ebjax.recipes.density import DATASETS
from ebjax.recipes.density_methods import data_frame, level_energy
from ebjax.samplers import annealed_langevin, mala, run_chain
from ebjax.samplers.smc import reverse_diffusion_sample, reverse_diffusion_smc, systematic
from ebjax.training import AdamConfig, check_at_least, check_between, check_widths, setting
from ebjax.types import EnergyFn, Objective, Params, Recipe, Run, Source, Target, TrainState

__all__ = ["CompositionConfig", "recipe"]

_OPERATIONS = ("product", "mixture", "negation", "tempering")
_SAMPLERS = ("smc", "annealed", "mala", "reverse")
_BOUNDS = (-5.0, 5.0)
# A few draws are a part of a population that is large enough.
_MIN_PARTICLES = 2000

_CORNERS = np.array([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])


def _law(name: str) -> Target:
    """A law by name. Four and three Gaussians in the corners of a square have an exact product."""
    if name == "four_corners":
        return targets.gaussian_mixture(_CORNERS, 0.35, (0.4, 0.1, 0.1, 0.4))
    if name == "three_corners":
        return targets.gaussian_mixture(_CORNERS[[0, 2, 3]], 0.35, (0.2, 0.6, 0.2))
    return getattr(targets, name)()


_LAWS = ("four_corners", "three_corners", *DATASETS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompositionConfig(AdamConfig):
    """Settings of the run."""

    first: str = setting("four_corners", f"one law: {', '.join(_LAWS)}")
    second: str = setting("three_corners", "the other law")
    operation: str = setting("product", f"what is made of them: {', '.join(_OPERATIONS)}")
    negation_weight: float = setting(0.3, "negation: share taken away")
    temperature: float = setting(2.0, "tempering: τ; 2 is the geometric mean of both laws")
    sampler: str = setting("smc", f"what draws samples: {', '.join(_SAMPLERS)}")
    num_steps: int = setting(8000)
    batch_size: int = setting(256)
    learning_rate: float = setting(3e-3)
    learning_rate_final_fraction: float = setting(0.0)
    ema_decay: float = setting(0.995)
    steps_per_call: int = setting(50)
    hidden_features: tuple[int, ...] = setting((128, 128), "widths of the networks' hidden layers")
    num_frequencies: int = setting(32, "random Fourier features of the position, 0 for none")
    frequency_scale: float = setting(1.0, "standard deviation of their frequencies")
    num_noise_levels: int = setting(100, "noise levels, of training and of samplers")
    narrowest_noise: float = setting(0.1, "the noise level of the laws that are composed")
    widest_noise: float = setting(4.0, "the widest noise level")
    markov_steps: int = setting(3, "smc: Markov steps at each level; other chains take as many")
    step_fraction: float = setting(0.2, "their step size in units of the variance of the noise")
    num_evaluated: int = setting(4000, "samples when samplers are judged")
    num_grid_points: int = setting(201, "points of the quadrature in a direction")

    def __post_init__(self) -> None:
        """Checks types and ranges."""
        super().__post_init__()
        for name, known in (
            ("first", _LAWS),
            ("second", _LAWS),
            ("operation", _OPERATIONS),
            ("sampler", _SAMPLERS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}."
                )
        check_at_least(self, 1, "markov_steps", "num_evaluated")
        check_at_least(self, 2, "num_noise_levels")
        check_at_least(self, 0, "num_frequencies")
        check_at_least(self, 1e-6, "narrowest_noise", "frequency_scale", "step_fraction")
        check_at_least(self, 1e-6, "temperature", "negation_weight")
        check_between(self, 11, 2001, "num_grid_points")
        if self.widest_noise <= self.narrowest_noise:
            raise ValueError(
                f"widest_noise is {self.widest_noise}; it must be above narrowest_noise, "
                f"{self.narrowest_noise}."
            )
        check_widths(self, "hidden_features")


def _compose(
    config: CompositionConfig, first: EnergyFn, second: EnergyFn
) -> tuple[EnergyFn, float]:
    """``(U of params (first, second), its power)``: at wide noise U is about that of N(0, σ²)."""
    if config.operation == "product":
        return sum_of(first, second), 2.0
    if config.operation == "mixture":
        return mixture(first, second), 1.0
    if config.operation == "negation":
        share = config.negation_weight
        return sum_of(first, second, weights=(1.0 + share, -share)), 1.0
    return temper(sum_of(first, second), config.temperature), 2.0 / config.temperature


def _normalised(energy_fn: EnergyFn, levels: np.ndarray) -> EnergyFn:
    """E + log Z at a level, with params ``(θ, log Z [levels])``; the ladder is falling."""

    def normalised(params, x, level):
        index = jnp.searchsorted(-jnp.asarray(levels, x.dtype), -level)
        return energy_fn(params[0], x, level) + params[1][index]

    return normalised


def _without_noise(law: Target) -> EnergyFn:
    """E + log Z of a true law, at every level, with params ``()``."""
    assert law.log_z is not None  # every law here has one
    log_z = law.log_z
    return lambda params, x, level: law.energy((), x) + log_z


def _pair(both: Mapping[str, Objective]) -> Objective:
    """Both objectives at once, on params and batches ``{"first": ..., "second": ...}``."""

    def init(key, params, batch):
        return {name: each.init(key, params[name], batch[name]) for name, each in both.items()}

    def loss(params, carry, keys, batch):
        total, carries, metrics = jnp.zeros(()), {}, {}
        for index, (name, each) in enumerate(both.items()):
            own_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
            value, (carries[name], own) = each.loss(
                params[name], carry[name], own_keys, batch[name]
            )
            total += value
            metrics |= {f"{key}_{name}": figure for key, figure in own.items()}
        return total, (carries, metrics)

    return Objective(init=init, loss=loss)


class _Composition:
    """Two laws and U, made of the energies that learn them: samplers, quadrature, figures of merit.

    What is compiled is made once, here, so that no call compiles anew. ``params`` of U are those of
    ``learned``: ``((θ_1, log Z_1 [levels]), (θ_2, log Z_2))``.
    """

    def __init__(self, config: CompositionConfig) -> None:
        self.config = config
        self.laws = {"first": _law(config.first), "second": _law(config.second)}
        frames = {name: data_frame(law) for name, law in self.laws.items()}
        learners = {name: level_energy(config, frame) for name, frame in frames.items()}
        self.inits = {name: init for name, (init, _, _) in learners.items()}
        self.energies = {name: energy_fn for name, (_, energy_fn, _) in learners.items()}
        self.levels = learners["first"][2]
        self.composed, power = _compose(
            config, *(_normalised(energy_fn, self.levels) for energy_fn in self.energies.values())
        )
        truth, _ = _compose(config, *map(_without_noise, self.laws.values()))
        self.truth = condition(truth, 0.0)
        narrowest = jnp.asarray(self.levels[-1], jnp.float32)
        self.at_narrowest = condition(self.composed, narrowest)
        self.parts = {name: condition(each, narrowest) for name, each in self.energies.items()}
        # The laws at the widest level: mean, deviation of each, deviation of U's.
        self.centre = np.mean([frame.mean for frame in frames.values()], axis=0)
        deviation = max(frame.deviation for frame in frames.values())
        self.width = float(np.hypot(self.levels[0], deviation))
        self.scale = self.width / power**0.5
        self.smc = functools.partial(
            reverse_diffusion_smc,
            noise_levels=self.levels,
            mean=self.centre,
            num_mcmc_steps=config.markov_steps,
            step_fraction=config.step_fraction,
        )
        self.learned = jax.jit(self._learned)
        self.draw_many = jax.jit(self._draw_many, static_argnums=(0, 3))
        self.energies_of = jax.jit(jax.vmap(self.at_narrowest, (None, 0)))

    def init(self, key):
        keys = jax.random.split(key)
        return {name: init(own) for (name, init), own in zip(self.inits.items(), keys, strict=True)}

    def example(self, arrays, key, position):
        del arrays
        keys = jax.random.split(jax.random.fold_in(key, position))
        return {
            name: law.sample(own) for (name, law), own in zip(self.laws.items(), keys, strict=True)
        }

    def _learned(self, params: Params) -> Params:
        """The params of U; constants cancel but in a mixture."""
        out = []
        for name, energy_fn in self.energies.items():
            log_z = jnp.zeros(len(self.levels))
            if self.config.operation == "mixture":
                _, info = self.smc(
                    jax.random.key(0), energy_fn, params[name], scale=self.width, num_particles=4000
                )
                log_z = info.log_z[: len(self.levels)]
            out.append((params[name], log_z))
        return tuple(out)

    def _draw_many(self, sampler: str, key, params: Params, num: int):
        """``(positions [num, 2], log Z)``, equally weighted; log Z is NaN but for smc."""
        if sampler == "smc":
            return self._resampled(key, params, num)
        start_key, chain_key = jax.random.split(key)
        starts = self.centre + self.scale * jax.random.normal(start_key, (num, 2))
        keys = jax.random.split(chain_key, num)
        return jax.vmap(functools.partial(self._chain, sampler, params))(keys, starts), jnp.nan

    def _resampled(self, key, params: Params, num: int):
        """``(positions [num, 2], log Z)`` of weighted reverse diffusion."""
        population, _ = self.smc(
            key, self.composed, params, scale=self.scale, num_particles=max(num, _MIN_PARTICLES)
        )
        order_key, draw_key = jax.random.split(jax.random.fold_in(key, 1))
        ancestors = systematic(draw_key, population.log_weights)
        chosen = jax.random.permutation(order_key, ancestors)[:num]
        return population.particles.position[chosen], population.log_z

    def _chain(self, sampler: str, params: Params, key, start):
        """[2] the end of one chain without weights."""
        levels, config = self.levels, self.config
        if sampler == "reverse":
            return reverse_diffusion_sample(key, self.composed, params, start, noise_levels=levels)
        # Evaluations of U by weighted reverse diffusion, per level and particle.
        num_steps = config.markov_steps + 3
        step_size = config.step_fraction * levels[-1] ** 2
        if sampler == "annealed":
            return annealed_langevin(
                key,
                self.composed,
                params,
                start,
                noise_levels=levels,
                num_steps=num_steps,
                step_size=step_size,
                build_kernel=mala,
            )[0]
        kernel = mala(step_size=step_size)
        state = kernel.init(self.at_narrowest, params, start)
        num_steps *= len(levels)
        return run_chain(key, kernel, self.at_narrowest, params, state, num_steps)[0].position

    def grid(self, energy_fn: EnergyFn, params: Params):
        from ebjax.evaluation import grid_law

        num_points = self.config.num_grid_points
        return grid_law(energy_fn, params, bounds=_BOUNDS, num_points=num_points)

    def sample(self, key, state: TrainState, num_samples: int):
        params = self.learned(state.ema)
        positions, _ = self.draw_many(self.config.sampler, key, params, num_samples)
        return {
            "positions": np.asarray(positions),
            "energies": np.asarray(self.energies_of(params, positions)),
        }

    def monitor(self, key, state: TrainState):
        from ebjax.evaluation import grid_figures

        del key
        figures = {}
        for name, law in self.laws.items():
            learned = self.grid(self.parts[name], state.ema[name])
            exact = grid_figures(learned, self.grid(law.energy, ()))
            figures[f"total_variation_{name}"] = exact["total_variation"]
        return {"total_variation": max(figures.values()), **figures}

    def evaluate(self, key, state: TrainState):
        from ebjax.evaluation import cell_total_variation, grid_figures

        params = self.learned(state.ema)
        law = self.grid(self.at_narrowest, params)
        figures: dict[str, Any] = {}
        for index, sampler in enumerate(_SAMPLERS):
            own_key = jax.random.fold_in(key, index)
            positions, log_z = self.draw_many(sampler, own_key, params, self.config.num_evaluated)
            distance = cell_total_variation(np.asarray(positions), law)
            figures[f"tv_{sampler}"] = distance.total_variation
            figures["tv_of_exact_draws"] = distance.of_exact_draws
            if sampler == "smc":
                figures["log_z_error"] = float(log_z) - law.log_z
        true_law = self.grid(self.truth, ((), ()))
        figures["tv_of_learning"] = grid_figures(law, true_law)["total_variation"]
        return figures | self.monitor(key, state)

    def figures(self, key, state: TrainState, samples):
        from ebjax.recipes.density_figures import laws_and_draws

        config, params = self.config, self.learned(state.ema)
        shown = {
            f"first: {config.first}": self.grid(self.parts["first"], state.ema["first"]),
            f"second: {config.second}": self.grid(self.parts["second"], state.ema["second"]),
            f"{config.operation}, exact": self.grid(self.at_narrowest, params),
        }
        drawn = {
            name: np.asarray(self.draw_many(name, key, params, len(samples["positions"]))[0])
            for name in ("smc", "mala", "reverse")
        }
        return {"composition": laws_and_draws(shown, drawn)}


def build(config: CompositionConfig) -> Run:
    """Makes the run of a config."""
    made = _Composition(config)
    objectives = {
        name: annealed_denoising_score_matching(energy_fn, noise_levels=made.levels)
        for name, energy_fn in made.energies.items()
    }
    # A draw by itself has no population.
    chain = "annealed" if config.sampler == "smc" else config.sampler
    return Run(
        init=made.init,
        objective=_pair(objectives),
        optimizer=config.optimizer(),
        source=Source((), made.example),
        sample=made.sample,
        evaluate=made.evaluate,
        figures=made.figures,
        monitor=made.monitor,
        monitor_name="total_variation",
        progress=("loss", "gradient_norm"),
        energy=made.at_narrowest,
        learned_params=lambda state: made.learned(state.ema),
        draw=lambda key, params: made.draw_many(chain, key, params, 1)[0][0],
    )


recipe = Recipe(CompositionConfig, build, seed_is_key=True)
