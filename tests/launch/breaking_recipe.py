"""A user's own recipe: fits one number, until its loss becomes NaN at a known step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ebjax.training import TrainingConfig, setting
from ebjax.types import Objective, Recipe, Run, Source


@dataclasses.dataclass(frozen=True, kw_only=True)
class BreakingConfig(TrainingConfig):
    num_steps: int = setting(40, "updates")
    batch_size: int = setting(4, "examples")
    log_every: int = setting(5, "steps")
    checkpoint_every: int = setting(10, "steps")
    steps_per_call: int = setting(5, "updates")
    break_at: int = setting(27, "the step whose loss is NaN; -1 for none")


def build(config):
    def loss(params, carry, keys, batch):
        value = jnp.mean(jnp.square(params - batch))
        value = jnp.where(carry[0] == config.break_at, jnp.nan, value)
        return value, (carry + 1, {})

    def example(arrays, key, position):
        return jax.random.normal(jax.random.fold_in(key, position))

    return Run(
        init=lambda key: jnp.zeros(()),
        objective=Objective(lambda key, params, batch: jnp.zeros(len(batch), jnp.int32), loss),
        optimizer=optax.sgd(0.1),
        source=Source((), example),
        sample=lambda key, state, num: {"x": np.full(num, state.ema)},
        evaluate=lambda key, state: {"x": float(state.ema)},
        figures=lambda key, state, samples: {},
    )


recipe = Recipe(BreakingConfig, build, seed_is_key=True)
