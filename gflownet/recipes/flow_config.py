"""Settings that all recipes of flows share: the objective, and what follows it.

Settings that are left at -1 or 'auto' follow the objective.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ebjax.training import TrainingConfig, check_at_least, check_between, check_widths, setting
from gflownet.local_search import ACCEPTANCE_RULES
from gflownet.objectives.subtrajectory_balance import NORMALIZATIONS
from gflownet.recipes.learners import LEARNERS, RESIDUAL_LOSSES
from gflownet.replay import REPLAY_RULES

__all__ = ["FlowConfig"]

_COMMON: dict[str, Any] = {
    "learning_rate": 1e-3,
    "epsilon": 0.1,
    "target_rate": 0.0,
    "terminal_weight": 1.0,
    "munchausen": 0.0,
}
# What each objective changes of that.
_OWN: dict[str, dict[str, Any]] = {
    "mdb": {"learning_rate": 2e-3},
    "soft_dqn": {"learning_rate": 2e-3, "target_rate": 0.25, "terminal_weight": 5.0},
    "munchausen": {
        "learning_rate": 2e-3,
        "target_rate": 0.25,
        "terminal_weight": 5.0,
        "munchausen": 0.15,
    },
    "tlm": {"target_rate": 0.25},
    # What looks forward by the reward does not cross its valleys unless it is sent there.
    "fldb": {"learning_rate": 2e-3, "epsilon": 1.0},
    "flsubtb": {"learning_rate": 2e-3, "epsilon": 1.0},
    "led": {"learning_rate": 2e-3, "epsilon": 1.0},
    # An expectation under the policy itself, and one under the target.
    "reverse_kl": {"epsilon": 0.0},
    "forward_kl": {"epsilon": 0.0},
}
# Objectives that do not teach P_B, which would otherwise drift with the shared trunk.
_UNIFORM = ("fm", "mdb", "soft_dqn", "munchausen", "forward_kl")
_HUBER = ("mdb", "soft_dqn", "munchausen")
_NEEDS_TARGET = ("tlm",)
_MAY_HAVE_TARGET = ("mdb", "soft_dqn", "munchausen", "tlm")
# Expectations under the policy, or of the target, in which trajectories of other origin do not fit.
_NO_OTHER_TRAJECTORIES = ("reverse_kl", "forward_kl", "tlm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowConfig(TrainingConfig):
    """Settings of a GFlowNet run; -1 and 'auto' follow the objective."""

    objective: str = setting("tb", f"how the flow is learned: {', '.join(LEARNERS)}")
    num_steps: int = setting(1000, "updates in all; may be raised later to go on with a run")
    batch_size: int = setting(16, "trajectories of one update, over all devices")
    log_every: int = setting(50, "steps between lines of metrics.jsonl")
    checkpoint_every: int = setting(250, "steps between checkpoints")
    steps_per_call: int = setting(50, "updates in one dispatch; metrics are means over these")
    num_devices: int = setting(1, "devices to use; 0 takes as many as divide batch_size")
    ema_decay: float = setting(0.99, "decay of the averaged parameters, used for sampling")
    hidden_features: tuple[int, ...] = setting((256, 256), "widths of the policy's hidden layers")
    backward_policy: str = setting(
        "auto",
        "P_B: 'learned' on the shared trunk, 'uniform', or 'auto': as the objective needs",
        follows="objective",
    )
    learning_rate: float = setting(-1.0, "learning rate of the policy (Adam)", follows="objective")
    learning_rate_decay_steps: int = setting(
        -1, "step at which the cosine decay ends; -1: num_steps, 0: no decay", follows="num_steps"
    )
    log_z_learning_rate: float = setting(
        0.1, "learning rate of log Z, about 100 times the policy's"
    )
    estimates_log_z: bool = setting(
        False, "tb, tlm: log Z starts where trajectories of the first policy put it, and not at 0"
    )
    epsilon: float = setting(-1.0, "share of uniform exploration at the start", follows="objective")
    epsilon_decay_steps: int = setting(500, "steps over which exploration falls to 0; 0 keeps it")
    temperature: float = setting(
        1.0, "T of the behaviour policy P_F^(1/T); above 1 it explores, and is not learned from"
    )
    stop_bias: float = setting(
        0.0, "what the behaviour policy takes from the logit of the stop; positive: longer paths"
    )
    replay: str = setting(
        "none", f"objects found before, trained on again: none, {', '.join(REPLAY_RULES)}"
    )
    replay_share: float = setting(0.5, "replay: share of an update's trajectories")
    replay_capacity: int = setting(1000, "replay: objects that a buffer keeps")
    replay_distance: float = setting(
        0.0, "replay: nothing is kept within this distance of something better; 0: no duplicates"
    )
    replay_buffers: int = setting(
        1, "replay: buffers, each of its part of the batch; devices share none"
    )
    local_search_revisions: int = setting(
        0, "revisions of each new object by local search, all of them trained on; 0: none"
    )
    local_search_steps: int = setting(
        4, "steps back of a revision; up to so many where paths may stop"
    )
    local_search_accept: str = setting(
        "better", f"which revisions a chain goes on from: {', '.join(ACCEPTANCE_RULES)}"
    )
    chunk_size: int = setting(128, "states evaluated at a time in the gradient pass")
    residual_loss: str = setting(
        "auto", f"loss of a residual: {', '.join(RESIDUAL_LOSSES)}, or 'auto'", follows="objective"
    )
    subtrajectory_decay: float = setting(0.9, "subtb, flsubtb: lambda")
    subtrajectory_normalize: str = setting(
        "trajectory", f"subtb, flsubtb: what weights are divided by: {', '.join(NORMALIZATIONS)}"
    )
    path_depth: int = setting(5, "pcl: steps of a window")
    flow_floor: float = setting(0.0, "fm: flow added to both sides of a state")
    terminal_weight: float = setting(
        -1.0, "fm, soft_dqn, munchausen: weight of last transitions", follows="objective"
    )
    munchausen: float = setting(
        -1.0, "munchausen: share of the policy's own log-probability", follows="objective"
    )
    target_rate: float = setting(
        -1.0,
        "mdb, soft_dqn, munchausen, tlm: how fast a target network follows; 0: none",
        follows="objective",
    )
    potential_dropout: float = setting(0.0, "led: chance that a step is left out of the fit")
    potential_learning_rate: float = setting(1e-2, "led: learning rate of the potential")

    def __post_init__(self) -> None:
        """Fills in what follows the objective, then checks types and ranges."""
        if self.objective not in LEARNERS:
            raise ValueError(
                f"objective is {self.objective!r}; it must be one of {', '.join(LEARNERS)}."
            )
        own = {**_COMMON, **_OWN.get(self.objective, {})}
        for name, value in own.items():
            if getattr(self, name) == -1:
                object.__setattr__(self, name, value)
        if self.backward_policy == "auto":
            kind = "uniform" if self.objective in _UNIFORM else "learned"
            object.__setattr__(self, "backward_policy", kind)
        if self.residual_loss == "auto":
            kind = "huber" if self.objective in _HUBER else "squared"
            object.__setattr__(self, "residual_loss", kind)
        super().__post_init__()
        check_at_least(self, 1, "chunk_size", "path_depth")
        check_at_least(self, 0, "learning_rate", "learning_rate_decay_steps", "log_z_learning_rate")
        check_at_least(self, 0, "epsilon_decay_steps", "flow_floor", "potential_learning_rate")
        check_at_least(self, 1e-6, "terminal_weight")
        check_at_least(self, 1, "replay_capacity", "replay_buffers", "local_search_steps")
        check_at_least(self, 0, "replay_distance", "local_search_revisions")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; it must be positive.")
        if not math.isfinite(self.stop_bias):
            raise ValueError(f"stop_bias is {self.stop_bias}; it must be a finite number.")
        check_between(self, 0, 1, "epsilon", "target_rate")
        check_between(self, 0, 0.999999, "munchausen", "potential_dropout")
        if not self.subtrajectory_decay >= 0:
            raise ValueError(
                f"subtrajectory_decay is {self.subtrajectory_decay}; it must be at least 0."
            )
        for name, known in (
            ("backward_policy", ("learned", "uniform")),
            ("residual_loss", tuple(RESIDUAL_LOSSES)),
            ("subtrajectory_normalize", NORMALIZATIONS),
            ("replay", ("none", *REPLAY_RULES)),
            ("local_search_accept", ACCEPTANCE_RULES),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}."
                )
        self._check_objective()
        self._check_slots()
        check_widths(self, "hidden_features")

    def _check_objective(self) -> None:
        """What an objective cannot do without, or with."""
        objective = f"with objective {self.objective!r}"
        if self.objective in ("reverse_kl", "forward_kl") and self.epsilon:
            raise ValueError(f"epsilon is {self.epsilon}; {objective} it must be 0.")
        for name, plain in (
            ("temperature", 1.0),
            ("stop_bias", 0.0),
            ("replay", "none"),
            ("local_search_revisions", 0),
        ):
            value = getattr(self, name)
            if self.objective in _NO_OTHER_TRAJECTORIES and value != plain:
                raise ValueError(f"{name} is {value!r}; {objective} it must be {plain!r}.")
        if self.objective not in _MAY_HAVE_TARGET and self.target_rate:
            raise ValueError(f"target_rate is {self.target_rate}; {objective} it must be 0.")
        if self.objective in _NEEDS_TARGET and not self.target_rate:
            raise ValueError(f"target_rate is {self.target_rate}; {objective} it must be positive.")
        if self.objective in _UNIFORM and self.backward_policy != "uniform":
            raise ValueError(
                f"backward_policy is {self.backward_policy!r}; {objective}, which does not teach "
                "it, it must be 'uniform'."
            )

    @property
    def num_replayed(self) -> int:
        """Replayed trajectories among those of a buffer in one update."""
        if self.replay == "none":
            return 0
        return round(self.replay_share * (self.batch_size // self.replay_buffers))

    @property
    def num_new(self) -> int:
        """The others among those of a buffer, or of the whole batch without replay."""
        if self.replay == "none":
            return self.batch_size
        return self.batch_size // self.replay_buffers - self.num_replayed

    def _check_slots(self) -> None:
        """How the batch is shared out."""
        if self.replay != "none":
            if self.batch_size % self.replay_buffers:
                raise ValueError(
                    f"replay_buffers is {self.replay_buffers}; it must divide batch_size, which "
                    f"is {self.batch_size}."
                )
            if self.num_devices and self.replay_buffers % self.num_devices:
                raise ValueError(
                    f"replay_buffers is {self.replay_buffers}; num_devices, which is "
                    f"{self.num_devices}, must divide it."
                )
            if not (self.num_replayed >= 1 and self.num_new >= 1):
                raise ValueError(
                    f"replay_share is {self.replay_share}; it must leave at least one new and one "
                    f"replayed among the {self.batch_size // self.replay_buffers} trajectories of "
                    "a buffer."
                )
        revisions = self.local_search_revisions
        if self.num_new % (revisions + 1):
            raise ValueError(
                f"local_search_revisions is {revisions}; an object and its revisions, "
                f"{revisions + 1} trajectories, must divide the {self.num_new} that are new in "
                f"{'the batch' if self.replay == 'none' else 'the part of a buffer'}."
            )
