"""A user's own recipe that has all that a command can ask for, and costs next to nothing."""

import types

import breaking_recipe
import jax
import jax.numpy as jnp

from ebjax.types import Recipe


def build(config):
    """``breaking_recipe`` with a monitor, an energy, a draw and what stands for a flow."""
    return breaking_recipe.build(config)._replace(
        monitor=lambda key, state: {"distance": abs(float(state.ema) - 1.0)},
        monitor_name="distance",
        energy=lambda params, x: 0.5 * jnp.square(x - params),
        flow=types.SimpleNamespace(environment="of this recipe", policy="of this recipe"),
        draw=lambda key, params: params + jax.random.normal(key),
    )


recipe = Recipe(breaking_recipe.BreakingConfig, build, seed_is_key=True)
