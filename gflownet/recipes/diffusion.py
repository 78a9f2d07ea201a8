"""A diffusion sampler of a continuous energy, trained as a GFlowNet and judged by exact samples.

``elbo`` and ``eubo`` bound log Z from both sides; ``log_z`` is the importance-weighted estimate
between them. A sampler that lost modes has a small gap to its own ELBO and a large one to the EUBO,
which exact draws of the target are pushed back through the walk to get.

The target may be an energy that another run has learned (``target`` "learned", ``energy_workdir``
its directory). In the plane its log Z and its draws are exact by quadrature; elsewhere what needs
them is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ebjax.energies import targets
from ebjax.parallel import AXIS_NAME
from ebjax.training import (
    AdamConfig,
    by_group,
    check_at_least,
    check_between,
    setting,
)
from ebjax.types import Flow, Params, Recipe, Run, Source, Target, TrainState
from gflownet.diffusion import (
    DIFFUSION_LOSSES,
    DiffusionProcess,
    diffusion_objective,
    draw,
    target_log_weight,
)
from gflownet.diffusion_flows import PARTIAL_LOSSES
from gflownet.policies.diffusion import diffusion_flow, diffusion_policy
from gflownet.recipes.learned_target import learned_target

if TYPE_CHECKING:
    from ebjax.evaluation import GridLaw

__all__ = ["DiffusionConfig", "recipe"]


# Target, and the variance of the walk without drift.
_TARGETS: dict[str, tuple[Callable[[int], Target], float]] = {
    "nine_gaussians": (lambda dim: targets.nine_gaussians(), 5.0),
    "twenty_five_gaussians": (lambda dim: targets.twenty_five_gaussians(), 5.0),
    "funnel": (lambda dim: targets.funnel(dim or 10), 5.0),
    "many_well": (lambda dim: targets.many_well(dim or 32), 1.0),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionConfig(AdamConfig):
    """Settings of a diffusion sampler."""

    target: str = setting("nine_gaussians", f"the energy: {', '.join(_TARGETS)}, learned")
    energy_workdir: str = setting("", "learned: the run directory of what learned the energy")
    target_dim: int = setting(0, "funnel, many_well: dimensions; 0: 10 and 32")
    loss: str = setting("tb", f"what is minimised: {', '.join(DIFFUSION_LOSSES)}")
    num_steps: int = setting(2000)
    batch_size: int = setting(256)
    steps_per_call: int = setting(20)
    ema_decay: float = setting(0.99)
    learning_rate: float = setting(5e-3)
    gradient_clip: float = setting(10.0)
    log_z_learning_rate: float = setting(0.1, "learning rate of log Z; not with vargrad and pis")
    flow_learning_rate: float = setting(1e-2, "db, subtb, fldb, flsubtb: that of the flows")
    subtrajectory_decay: float = setting(2.0, "subtb, flsubtb: lambda")
    path_steps: int = setting(40, "T, steps of a path")
    variance: float = setting(0.0, "of the walk without drift at its end; 0: as the target needs")
    features: int = setting(64, "width of the network")
    num_layers: int = setting(2, "hidden layers of the network")
    uses_slope: bool = setting(False, "whether the drift follows the slope of the energy")
    exploration: float = setting(0.2, "further noise of a step, at the start; not with pis")
    exploration_decay_steps: int = setting(-1, "when it has fallen to 0", follows="num_steps")
    local_search_steps: int = setting(2, "steps of each slot's chain in an update; not with pis")
    local_search_step_size: float = setting(0.05, "of these chains, at the start")
    rebirth_probability: float = setting(0.02, "chance that a chain goes on from a new draw")
    num_evaluated: int = setting(2000, "paths in each direction when the sampler is judged")

    def __post_init__(self) -> None:
        """Checks types and ranges."""
        if self.loss == "pis":
            object.__setattr__(self, "exploration", 0.0)
            object.__setattr__(self, "local_search_steps", 0)
        super().__post_init__()
        if (self.target == "learned") != bool(self.energy_workdir):
            raise ValueError(
                f"target is {self.target!r} and energy_workdir {self.energy_workdir!r}; a run "
                "directory goes with target 'learned', and only with that."
            )
        for name, known in (("target", (*_TARGETS, "learned")), ("loss", DIFFUSION_LOSSES)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}."
                )
        check_at_least(self, 1, "path_steps", "features", "num_layers")
        check_at_least(self, 2, "num_evaluated")
        check_at_least(self, 0, "variance", "log_z_learning_rate", "exploration", "target_dim")
        check_at_least(self, 0, "exploration_decay_steps", "local_search_steps")
        check_at_least(self, 0, "flow_learning_rate", "subtrajectory_decay")
        check_at_least(self, 1e-9, "local_search_step_size")
        check_between(self, 0, 1, "rebirth_probability")


class _Sampler:
    """The walk to a target and its drift, judged by exact draws of the target if there are any.

    What is compiled is made once, here. ``params`` are those of the policy.
    """

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config
        self.law: GridLaw | None = None
        if config.target == "learned":
            self.target, variance, self.law = learned_target(config.energy_workdir)
        else:
            make, variance = _TARGETS[config.target]
            self.target = make(config.target_dim)
        (self.dim,) = self.target.event_shape
        self.process = DiffusionProcess(config.path_steps, config.variance or variance)
        self.policy = diffusion_policy(
            self.dim,
            features=config.features,
            num_layers=config.num_layers,
            uses_slope=config.uses_slope,
        )
        self.draw_many = jax.jit(jax.vmap(self.draw, (0, None)))
        self.push_back_many = jax.jit(jax.vmap(self._push_back, (0, None)))
        self.draw_exact_many = jax.jit(jax.vmap(self._draw_exact))

    def draw(self, key, params: Params):
        """``(x [D], w [])``."""
        return draw(key, self.process, self.policy, params, self.target.energy, (), self.dim)

    def _push_back(self, key, params: Params):
        """[] w of a bridge back from an exact draw."""
        sample_key, bridge_key = jax.random.split(key)
        x, energy_fn = self._draw_exact(sample_key), self.target.energy
        return target_log_weight(bridge_key, self.process, self.policy, params, energy_fn, (), x)

    def _draw_exact(self, key):
        return self.target.sample(key)

    def exact(self, key, num: int) -> np.ndarray:
        """[num, D] exact draws."""
        return np.asarray(self.draw_exact_many(jax.random.split(key, num)))

    def sample(self, key, state: TrainState, num_samples: int):
        positions, weights = self.draw_many(jax.random.split(key, num_samples), state.ema["policy"])
        return {"positions": np.asarray(positions), "log_weights": np.asarray(weights)}

    def bounds(self, key, state: TrainState, num: int):
        """``(FlowBounds, draws [num, D])``, from that many paths in each direction."""
        from gflownet.evaluation import bounds_of_weights

        forward_key, backward_key = jax.random.split(key)
        drawn, back = self.sample(forward_key, state, num), None
        if self.target.sample is not None:
            back = self.push_back_many(jax.random.split(backward_key, num), state.ema["policy"])
        return bounds_of_weights(drawn["log_weights"], back), drawn["positions"]

    def monitor(self, key, state: TrainState):
        bounds, _ = self.bounds(key, state, 500)
        upper = bounds.log_z if bounds.eubo is None else bounds.eubo
        return {"gap": upper - bounds.elbo}

    def evaluate(self, key, state: TrainState):
        from ebjax.evaluation import cell_total_variation, maximum_mean_discrepancy

        num, exact_log_z = self.config.num_evaluated, self.target.log_z
        draw_key, data_key, other_key = jax.random.split(key, 3)
        bounds, positions = self.bounds(draw_key, state, num)
        figures = {
            "elbo": bounds.elbo,
            "log_z": bounds.log_z,
            "log_z_standard_error": bounds.log_z_standard_error,
            "effective_share": bounds.effective_sample_size / num,
        }
        if exact_log_z is None or bounds.eubo is None:
            return figures
        held_out, other = self.exact(data_key, num), self.exact(other_key, num)
        figures |= {
            "elbo_gap": exact_log_z - bounds.elbo,
            "log_z_error": bounds.log_z - exact_log_z,
            "eubo_gap": bounds.eubo - exact_log_z,
            "mmd": maximum_mean_discrepancy(positions, held_out),
            "mmd_of_exact_samples": maximum_mean_discrepancy(other, held_out),
            **_mode_figures(self.target, positions, held_out),
        }
        if self.law is not None:
            distance = cell_total_variation(positions, self.law)
            figures["total_variation"] = distance.total_variation
            figures["total_variation_of_exact_draws"] = distance.of_exact_draws
        return figures

    def figures(self, key, state: TrainState, samples):
        del state
        shown = {"diffusion sampler": samples["positions"]}
        if self.target.sample is not None:
            shown = {"exact draws": self.exact(key, len(samples["positions"])), **shown}
        return {"samples": _scatter(shown, self.config.target)}


def build(config: DiffusionConfig) -> Run:
    """Makes the run of a config."""
    sampler = _Sampler(config)
    flow = diffusion_flow(sampler.dim, features=config.features, num_layers=config.num_layers)
    exploration: Any = 0.0
    if config.exploration:
        exploration = optax.linear_schedule(config.exploration, 0.0, config.exploration_decay_steps)
    objective = diffusion_objective(
        sampler.target.energy,
        sampler.policy,
        sampler.process,
        sampler.dim,
        loss=config.loss,
        exploration=exploration,
        local_search_steps=config.local_search_steps,
        local_search_step_size=config.local_search_step_size,
        rebirth_probability=config.rebirth_probability,
        flow=flow,
        decay=config.subtrajectory_decay,
        axis_name=AXIS_NAME,
    )
    inits, optimizers = {"policy": sampler.policy.init}, {"policy": config.optimizer()}
    if config.loss not in ("vargrad", "pis"):
        inits["log_z"] = lambda key: jnp.zeros(())
        optimizers["log_z"] = config.optimizer(config.log_z_learning_rate)
    if config.loss in PARTIAL_LOSSES:
        inits["flow"] = lambda key: flow.init(jax.random.fold_in(key, 1))
        optimizers["flow"] = config.optimizer(config.flow_learning_rate)
    return Run(
        init=lambda key: {name: init(key) for name, init in inits.items()},
        objective=objective,
        optimizer=by_group(optimizers),
        source=Source((), lambda arrays, key, position: position),
        sample=sampler.sample,
        evaluate=sampler.evaluate,
        figures=sampler.figures,
        monitor=sampler.monitor,
        monitor_name="gap",
        progress=("loss", "elbo", "log_reward", "gradient_norm"),
        learned_params=lambda state: state.ema["policy"],
        flow=Flow(sampler.process, sampler.policy),
        draw=lambda key, params: sampler.draw(key, params)[0],
    )


def _mode_figures(target: Target, drawn: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Share of the draws by nearest mode, or by the sign of each coordinate where wells are."""
    if target.modes is None or len(target.modes) > 100:
        # What is lost first: the side of a coordinate that has less mass.
        ours, theirs = (drawn > 0).mean(axis=0), (exact > 0).mean(axis=0)
        return {"largest_side_error": float(np.abs(ours - theirs).max())}
    modes = np.asarray(target.modes)

    def shares(points):
        nearest = np.square(points[:, None] - modes).sum(-1).argmin(-1)
        return np.bincount(nearest, minlength=len(modes)) / len(points)

    ours = shares(drawn)
    return {
        "num_modes": float(len(modes)),
        "modes_covered": float(np.sum(ours > 0.25 / len(modes))),
        "mode_mass_error": float(0.5 * np.abs(ours - shares(exact)).sum()),
    }


def _scatter(draws: dict[str, np.ndarray], title: str):
    """The first two coordinates of draws, one panel each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.0 * len(draws), 4.2), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(draws), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (name, points) in zip(panels, draws.items(), strict=True):
        axes.scatter(points[:, 0], points[:, 1], s=3, alpha=0.5, linewidths=0, color="#2a6f97")
        axes.set_title(f"{title.replace('_', ' ')}: {name}", fontsize=10)
        axes.set_xlabel("first coordinate", fontsize=8)
    panels[0].set_ylabel("second coordinate", fontsize=8)
    edge = 1.3 * float(np.abs(next(iter(draws.values()))[:, :2]).max())
    panels[0].set_xlim(-edge, edge)
    panels[0].set_ylim(-edge, edge)
    return figure


recipe = Recipe(DiffusionConfig, build, seed_is_key=True)
