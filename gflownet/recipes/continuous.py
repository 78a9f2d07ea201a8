"""A GFlowNet on the box, the cube or the torus, judged by exact draws of its target.

``log_z`` is the importance-weighted estimate, between the bounds ``elbo`` and ``eubo``. As Lahlou
et al. (2023) do, draws are compared by the Jensen-Shannon divergence of kernel density estimates on
a grid; two sets of exact draws have one as well, which stands beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.special import logsumexp

from ebjax.parallel import AXIS_NAME
from ebjax.training import (
    AdamConfig,
    by_group,
    check_at_least,
    check_between,
    check_widths,
    setting,
)
from ebjax.types import Flow, Objective, Params, Recipe, Run, Source, Target, TrainState
from gflownet import objectives
from gflownet.environments import (
    BoxState,
    CubeState,
    TorusState,
    box,
    corners_target,
    cube,
    steps_target,
    torus,
    torus_target,
)
from gflownet.evaluation import bounds_of_weights
from gflownet.exact import jensen_shannon, total_variation
from gflownet.policies import mixture_policy
from gflownet.rollout import backward_rollout, forward_rollout
from gflownet.types import Environment, Policy, State, Trajectories

__all__ = ["ContinuousConfig", "kernel_density", "recipe"]

_ENVIRONMENTS = ("box", "cube", "corners", "torus")
_OBJECTIVES = ("tb", "vargrad", "db", "subtb")
_GRID = 100
_BLOCK = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContinuousConfig(AdamConfig):
    """Settings of a continuous flow."""

    environment: str = setting(
        "box", "box and cube with steps, cube with bumps at its corners, or torus"
    )
    dim: int = setting(2, "coordinates; the box has 2")
    radius: float = setting(0.25, "box: length of a step")
    min_increment: float = setting(0.1, "cube, corners: least increment of each coordinate")
    path_steps: int = setting(5, "torus: steps of a path")
    # Trajectory balance loses corners of the box in two of three seeds.
    objective: str = setting("subtb", f"how the flow is learned: {', '.join(_OBJECTIVES)}")
    subtrajectory_decay: float = setting(0.9, "subtb: lambda")
    num_steps: int = setting(3000)
    batch_size: int = setting(128)
    steps_per_call: int = setting(20)
    num_devices: int = setting(1)
    ema_decay: float = setting(0.99)
    learning_rate: float = setting(1e-3)
    gradient_clip: float = setting(10.0)
    log_z_learning_rate: float = setting(0.1, "tb: learning rate of log Z")
    hidden_features: tuple[int, ...] = setting((128, 128, 128), "widths of the hidden layers")
    num_components: int = setting(4, "Beta or von Mises laws of a coordinate")
    backward_policy: str = setting("learned", "P_B: 'learned' on the shared trunk or 'uniform'")
    epsilon: float = setting(0.1, "share of uniform exploration at the start")
    epsilon_decay_steps: int = setting(-1, "when it has fallen to 0", follows="num_steps")
    chunk_size: int = setting(128, "states evaluated at a time in the gradient pass")
    num_evaluated: int = setting(10_000, "draws in each direction when the flow is judged")

    def __post_init__(self) -> None:
        """Checks types and ranges."""
        super().__post_init__()
        for name, known in (
            ("environment", _ENVIRONMENTS),
            ("objective", _OBJECTIVES),
            ("backward_policy", ("learned", "uniform")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}."
                )
        check_at_least(self, 1, "dim", "path_steps", "num_components", "chunk_size")
        check_at_least(self, 0, "subtrajectory_decay", "log_z_learning_rate", "epsilon_decay_steps")
        check_at_least(self, 2, "num_evaluated")
        check_between(self, 0, 1, "epsilon")
        if self.environment == "box" and self.dim != 2:
            raise ValueError(f"dim is {self.dim}; the box has 2, and more are a cube.")
        check_widths(self, "hidden_features")


class _Problem(NamedTuple):
    """What is learned.

    Attributes:
      environment: the graph.
      target: its reward, with exact draws.
      terminal: ``position [D] -> state``, the terminal state there.
      side: length of a coordinate.
      family: of the policy's laws.
    """

    environment: Environment
    target: Target
    terminal: Callable[[jax.Array], State]
    side: float
    family: str


def _problem(config: ContinuousConfig) -> _Problem:
    yes, dim = jnp.ones((), bool), config.dim
    if config.environment == "torus":
        target = torus_target(dim)
        return _Problem(
            torus(target, num_steps=config.path_steps),
            target,
            lambda x: TorusState(x, jnp.full((), config.path_steps, jnp.int32)),
            2.0 * np.pi,
            "von_mises",
        )
    if config.environment == "box":
        target = steps_target(dim)
        environment = box(target, radius=config.radius)
        return _Problem(environment, target, lambda x: BoxState(x, yes, yes), 1.0, "beta")
    target = corners_target(dim) if config.environment == "corners" else steps_target(dim)
    environment = cube(target, min_increment=config.min_increment)
    active = jnp.ones(dim, bool)
    return _Problem(environment, target, lambda x: CubeState(x, active, yes, yes), 1.0, "beta")


def _objective(config: ContinuousConfig, environment: Environment, policy: Policy) -> Objective:
    options: dict[str, Any] = {"epsilon": config.epsilon, "chunk_size": config.chunk_size}
    if config.epsilon_decay_steps:
        options["epsilon"] = optax.linear_schedule(config.epsilon, 0.0, config.epsilon_decay_steps)
    if config.objective == "tb":
        return objectives.trajectory_balance(environment, policy, **options)
    options["axis_name"] = AXIS_NAME
    if config.objective == "vargrad":
        return objectives.log_partition_variance(environment, policy, **options)
    if config.objective == "db":
        return objectives.detailed_balance(environment, policy, **options)
    return objectives.subtrajectory_balance(
        environment, policy, decay=config.subtrajectory_decay, **options
    )


class _ContinuousFlow:
    """The graph and its policy, judged in both directions by exact draws of the target.

    What is compiled is made once, here, and runs in blocks of one size. ``params`` are those of the
    policy.
    """

    def __init__(self, config: ContinuousConfig) -> None:
        self.config, self.problem = config, _problem(config)
        self.environment, target = self.problem.environment, self.problem.target
        assert target.log_z is not None
        assert target.sample is not None
        self.log_z = target.log_z
        self.policy = mixture_policy(
            self.environment.num_actions,
            self.environment.value_dim,
            config.hidden_features,
            family=self.problem.family,
            num_components=config.num_components,
            backward=config.backward_policy,
            with_flow=config.objective in ("db", "subtb"),
            activation=nn.elu,
        )
        self.walk_block = jax.jit(self._walk)
        self.walk_back_block = jax.jit(self._walk_back)
        self.draw_exact_block = jax.jit(jax.vmap(target.sample))

    def _walk(self, keys, params: Params):
        return _kept(forward_rollout(keys, self.environment, self.policy, params))

    def _walk_back(self, keys, params: Params, positions):
        ends = jax.vmap(self.problem.terminal)(positions)
        return _kept(backward_rollout(keys, self.environment, self.policy, params, ends))

    def init(self, key):
        source = self.environment.observe(self.environment.initial(key))
        params = {"policy": self.policy.init(key, source)}
        return {**params, "log_z": jnp.zeros(())} if self.config.objective == "tb" else params

    def draw(self, key, params: Params):
        """[D] one sample."""
        return self._walk(key[None], params)["positions"][0]

    def exact(self, key, num: int) -> np.ndarray:
        """[num, D] exact draws."""
        return _in_blocks(self.draw_exact_block, key, num)

    def forth(self, key, params: Params, num: int) -> dict[str, np.ndarray]:
        """What is kept of trajectories from the source."""
        return _in_blocks(lambda keys: self.walk_block(keys, params), key, num)

    def back(self, key, params: Params, ends: np.ndarray) -> dict[str, np.ndarray]:
        """What is kept of trajectories back from positions [N, D], one each."""
        return _in_blocks(
            lambda keys, x: self.walk_back_block(keys, params, x), key, len(ends), ends
        )

    def sample(self, key, state: TrainState, num_samples: int):
        drawn = self.forth(key, state.ema["policy"], num_samples)
        return {name: drawn[name] for name in ("positions", "log_rewards", "lengths")}

    def bounds(self, key, state: TrainState, num: int):
        """``(FlowBounds, trajectories from the source)``, from as many in each direction."""
        params = state.ema["policy"]
        walk_key, back_key, target_key = jax.random.split(key, 3)
        drawn = self.forth(walk_key, params, num)
        returned = self.back(back_key, params, self.exact(target_key, num))
        return bounds_of_weights(drawn["weights"], returned["weights"]), drawn

    def monitor(self, key, state: TrainState):
        found, _ = self.bounds(key, state, _BLOCK)
        return {"gap": found.eubo - found.elbo}

    def evaluate(self, key, state: TrainState):
        bounds_key, one_key, two_key = jax.random.split(key, 3)
        num, side = self.config.num_evaluated, self.problem.side
        found, drawn = self.bounds(bounds_key, state, num)
        ours, one, two = (
            kernel_density(points, side=side, is_periodic=self.problem.family == "von_mises")
            for points in (drawn["positions"], self.exact(one_key, num), self.exact(two_key, num))
        )
        return {
            "log_z": found.log_z,
            "log_z_exact": self.log_z,
            "log_z_error": found.log_z - self.log_z,
            "log_z_standard_error": found.log_z_standard_error,
            "elbo_gap": self.log_z - found.elbo,
            "eubo_gap": found.eubo - self.log_z,
            "effective_share": found.effective_sample_size / num,
            "jensen_shannon": jensen_shannon(ours, one),
            "jensen_shannon_of_exact_samples": jensen_shannon(two, one),
            "mean_length": float(drawn["lengths"].mean()),
        }

    def figures(self, key, state: TrainState, samples):
        from gflownet.figures import grid_distributions

        del samples
        if self.config.dim != 2:
            return {}
        cells, params = _cells(2, self.problem.side), state.ema["policy"]
        returned = [self.back(each, params, cells) for each in jax.random.split(key, 10)]
        log_ratios = [one["log_rewards"] - one["weights"] for one in returned]
        laws = {
            "target": np.exp(returned[0]["log_rewards"] - self.log_z),
            "learned": np.exp(logsumexp(log_ratios, axis=0)) / len(log_ratios),
        }
        laws = {
            title: (density * (self.problem.side / _GRID) ** 2).reshape(_GRID, _GRID)
            for title, density in laws.items()
        }
        distance = total_variation(laws["learned"], laws["target"])
        subtitle = f"total variation on the grid {distance:.3f}"
        return {"densities": grid_distributions(laws, subtitle=subtitle)}


def build(config: ContinuousConfig) -> Run:
    """Makes the run of a config."""
    made = _ContinuousFlow(config)
    optimizers = {"policy": config.optimizer()}
    if config.objective == "tb":
        optimizers["log_z"] = config.optimizer(config.log_z_learning_rate)
    return Run(
        init=made.init,
        objective=_objective(config, made.environment, made.policy),
        optimizer=by_group(optimizers),
        source=Source((), lambda arrays, key, position: position),
        sample=made.sample,
        evaluate=made.evaluate,
        figures=made.figures,
        monitor=made.monitor,
        monitor_name="gap",
        progress=("loss", "elbo", "log_reward", "trajectory_length"),
        learned_params=lambda state: state.ema["policy"],
        flow=Flow(made.environment, made.policy),
        draw=made.draw,
    )


def _kept(rolled: Trajectories) -> dict[str, jax.Array]:
    """[B, ...] by name; ``weights`` are log R + log P_B - log P_F."""
    return {
        "positions": rolled.terminal.position,
        "log_rewards": rolled.log_reward,
        "lengths": rolled.length,
        "weights": rolled.log_reward + jnp.sum(rolled.log_pb - rolled.log_pf, axis=0),
    }


def _in_blocks(fn: Callable[..., Any], key: jax.Array, num: int, *inputs: np.ndarray) -> Any:
    """``fn(keys, *inputs)`` of ``num`` examples in blocks of one size, so that it compiles once."""
    padded = -(-num // _BLOCK) * _BLOCK
    keys = jax.random.split(key, padded)
    whole = [np.resize(leaf, (padded, *leaf.shape[1:])) for leaf in inputs]
    blocks = [
        fn(keys[start : start + _BLOCK], *(leaf[start : start + _BLOCK] for leaf in whole))
        for start in range(0, padded, _BLOCK)
    ]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:num], *blocks)


def _cells(dim: int, side: float) -> np.ndarray:
    """[100^D, D] middles of the cells of a grid, the last coordinate fastest."""
    middles = (np.arange(_GRID) + 0.5) / _GRID * side
    axes = np.meshgrid(*[middles] * dim, indexing="ij")
    return np.stack(axes, axis=-1).reshape(-1, dim).astype(np.float32)


def kernel_density(
    points: np.ndarray, *, side: float = 1.0, is_periodic: bool = False, bandwidth: float = 0.1
) -> np.ndarray:
    """A law over the cells of a grid, from points by the kernel ``exp(-|x - y| / h)``.

    Args:
      points: [N, D]; of more than 2 coordinates the first 2 are looked at.
      side: length of a coordinate.
      is_periodic: whether coordinates are angles of that period.
      bandwidth: h, as a share of the side.

    Returns:
      [100^min(D, 2)] probabilities.

    >>> law = kernel_density(np.array([[0.25]]))
    >>> int(law.argmax()), round(float(law.sum()), 6)
    (24, 1.0)
    """
    points = np.asarray(points, np.float32)[:, :2] / side
    cells = _cells(points.shape[1], 1.0)
    total = np.zeros(len(cells))
    for start in range(0, len(points), 500):
        offset = cells[:, None] - points[None, start : start + 500]
        if is_periodic:
            offset -= np.round(offset)
        distance = np.sqrt(np.square(offset).sum(axis=-1))
        total += np.exp(-distance / bandwidth).sum(axis=1, dtype=np.float64)
    return total / total.sum()


recipe = Recipe(ContinuousConfig, build, seed_is_key=True)
