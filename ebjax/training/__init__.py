"""Training: one update, one loop, many devices, checkpoints, metrics."""

from ebjax.training.checkpoint import Checkpointer
from ebjax.training.config import (
    TrainingConfig,
    check_at_least,
    check_between,
    check_widths,
    setting,
)
from ebjax.training.loop import DivergenceError, TrainResult, choose_devices, init_state, train
from ebjax.training.metrics import MetricsWriter, read_metrics
from ebjax.training.optimizer import (
    AdamConfig,
    ScheduleConfig,
    adam,
    by_group,
    learning_rate_schedule,
)
from ebjax.training.population import (
    Population,
    Range,
    hypervolume,
    non_dominated,
    rank_members,
    train_population,
)
from ebjax.training.seeds import train_seeds
from ebjax.training.update import initial_state, make_update, make_update_many

__all__ = [
    "AdamConfig",
    "Checkpointer",
    "DivergenceError",
    "MetricsWriter",
    "Population",
    "Range",
    "ScheduleConfig",
    "TrainResult",
    "TrainingConfig",
    "adam",
    "by_group",
    "check_at_least",
    "check_between",
    "check_widths",
    "choose_devices",
    "hypervolume",
    "init_state",
    "initial_state",
    "learning_rate_schedule",
    "make_update",
    "make_update_many",
    "non_dominated",
    "rank_members",
    "read_metrics",
    "setting",
    "train",
    "train_population",
    "train_seeds",
]
