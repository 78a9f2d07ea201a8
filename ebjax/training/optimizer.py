"""Optimizers of the recipes: Adam with warm-up, decay and clipping, and groups with own rates."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import optax

from ebjax.training.config import TrainingConfig, check_at_least, check_between, setting

__all__ = ["AdamConfig", "ScheduleConfig", "adam", "by_group", "learning_rate_schedule"]


def learning_rate_schedule(
    peak: float, *, warmup_steps: int = 0, decay_steps: int = 0, final_fraction: float = 0.0
) -> optax.Schedule:
    """Linear warm-up to ``peak``, then cosine decay to ``final_fraction * peak``.

    Args:
      peak: the largest learning rate; may be traced.
      warmup_steps: steps of linear increase from 0; 0 starts at ``peak``.
      decay_steps: the step at which the decay ends, counted from the start; 0 keeps ``peak``.
      final_fraction: what is left of ``peak`` at the end, in [0, 1].

    Raises:
      ValueError: if the decay would end before the warm-up does.
    """
    if decay_steps and decay_steps <= warmup_steps:
        raise ValueError(
            f"learning_rate_decay_steps is {decay_steps}; it must be 0 or more than the "
            f"{warmup_steps} steps of warm-up."
        )
    after = optax.constant_schedule(peak)
    if decay_steps:
        after = optax.cosine_decay_schedule(peak, decay_steps - warmup_steps, final_fraction)
    if not warmup_steps:
        return after
    rise = optax.linear_schedule(0.0, peak, warmup_steps)
    return optax.join_schedules([rise, after], [warmup_steps])


def adam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    gradient_clip: float = 0.0,
) -> optax.GradientTransformation:
    """Adam on gradients whose global norm is clipped to ``gradient_clip`` (0 does not clip)."""
    steps = [optax.clip_by_global_norm(gradient_clip)] if gradient_clip else []
    return optax.chain(*steps, optax.adam(learning_rate, b1=b1, b2=b2))


def by_group(
    optimizers: Mapping[str, optax.GradientTransformation],
) -> optax.GradientTransformation:
    """One optimizer for each top-level entry of a ``params`` dict.

    Args:
      optimizers: by the name of the entry, all entries named.

    >>> import jax.numpy as jnp
    >>> groups = by_group({"policy": optax.sgd(0.001), "log_z": optax.sgd(0.1)})
    >>> params = {"policy": jnp.ones(()), "log_z": jnp.ones(())}
    >>> updates, _ = groups.update(params, groups.init(params))
    >>> float(updates["log_z"] / updates["policy"])
    100.0
    """

    def labels(params):
        return {
            name: jax.tree.map(lambda _, name=name: name, subtree)
            for name, subtree in params.items()
        }

    return optax.multi_transform(dict(optimizers), labels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig(TrainingConfig):
    """Settings of a run with a learning rate: warm-up, then cosine decay."""

    learning_rate: float = setting(5e-4, "largest learning rate")
    learning_rate_warmup_steps: int = setting(0, "steps of linear warm-up")
    learning_rate_decay_steps: int = setting(
        -1, "step at which the cosine decay ends; -1: num_steps, 0: no decay", follows="num_steps"
    )
    learning_rate_final_fraction: float = setting(0.0, "share of the learning rate at the end")

    def __post_init__(self) -> None:
        """Checks types and ranges."""
        super().__post_init__()
        check_at_least(self, 0, "learning_rate", "learning_rate_warmup_steps")
        check_at_least(self, 0, "learning_rate_decay_steps")
        check_between(self, 0, 1, "learning_rate_final_fraction")

    def schedule(self, learning_rate: float | None = None) -> optax.Schedule:
        """The schedule of ``learning_rate``, by default the config's own."""
        return learning_rate_schedule(
            self.learning_rate if learning_rate is None else learning_rate,
            warmup_steps=self.learning_rate_warmup_steps,
            decay_steps=self.learning_rate_decay_steps,
            final_fraction=self.learning_rate_final_fraction,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamConfig(ScheduleConfig):
    """Settings of a run that Adam trains."""

    adam_b1: float = setting(0.9, "Adam's momentum; 0 damps oscillation of energies")
    gradient_clip: float = setting(0.0, "largest global norm of the gradient; 0 does not clip")

    def __post_init__(self) -> None:
        """Checks types and ranges."""
        super().__post_init__()
        check_at_least(self, 0, "gradient_clip")
        check_between(self, 0, 0.999999, "adam_b1")

    def optimizer(self, learning_rate: float | None = None) -> optax.GradientTransformation:
        """Adam by the settings, with another learning rate where one is given."""
        return adam(self.schedule(learning_rate), b1=self.adam_b1, gradient_clip=self.gradient_clip)
