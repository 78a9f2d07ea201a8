"""Flow-contrastive estimation: noise-contrastive estimation whose noise is a flow that learns.

    G = log p - log q,    log p(x) = -E(x) - log Z,    q the law of a flow
    V(θ, α) = E_data softplus(log ν - G(x)) + ν E_{y ~ q_α} softplus(G(y) - log ν)

The energy (with log Z) minimises V, as against fixed noise. The flow either maximises it, through
its density and through its draws (a game: at ν = 1, V = 2 log 2 less twice a Jensen-Shannon
divergence, and the flow that maximises it draws from exp(-E) or rather from the data), or follows
the data by its own likelihood. Either way the noise becomes hard to tell from the data, where
noise-contrastive estimation is accurate.

Both players move at once, each with its own gradient of one value: the parameters of the flow
enter V as 2 stop(α) - α, which is α with the derivative -1.

Gao, Nijkamp, Kingma, Xu, Dai and Wu, "Flow contrastive estimation of energy-based models", CVPR
2020.
"""

from __future__ import annotations

from typing import Any

import jax

from ebjax.objectives.noise_contrastive import (
    join_examples,
    log_ratio,
    noise_contrastive_loss,
    noise_ratio,
    ratio_metrics,
)
from ebjax.objectives.regularizers import Regularizer, mean_penalty
from ebjax.types import EnergyFn, Objective

__all__ = ["FLOW_PLAYERS", "flow_contrastive"]

FLOW_PLAYERS = ("adversarial", "likelihood")


def flow_contrastive(
    energy_fn: EnergyFn,
    flow: Any,
    *,
    player: str = "adversarial",
    num_noise: int = 1,
    ratio: float | None = None,
    regularizers: tuple[Regularizer, ...] = (),
) -> Objective:
    """Trains an energy and a flow together.

    Give the flow an optimizer of its own (``ebjax.training.by_group``); start it near the data.

    Args:
      energy_fn: the energy that is trained.
      flow: an ``ebjax.energies.flows.Flow``, or what has its ``log_prob(params, x) -> []`` and
        ``sample(params, key) -> x``, differentiable in ``params``.
      player: ``"adversarial"``: the flow maximises V. ``"likelihood"``: it minimises
        -E_data log q, and V does not move it.
      num_noise: M draws of the flow an example.
      ratio: ν > 0, the weight of the noise; ``None`` for M.
      regularizers: penalties ``(energy_fn, params, x) -> []`` on data and draws; for the energy
        only.

    Returns:
      An ``Objective`` over batches of examples, without carry, whose params are
      ``{"energy": those of energy_fn, "flow": those of the flow, "log_z": []}``. Its value is V
      (and penalties); its gradient is each player's own. Metrics as of ``noise_contrastive``, and
      ``log_prob_flow``, the mean log q of the data.

    Raises:
      ValueError: naming the option that is out of range.
    """
    if player not in FLOW_PLAYERS:
        raise ValueError(f"player is {player!r}; it must be one of {', '.join(FLOW_PLAYERS)}.")
    ratio = noise_ratio(num_noise, ratio)
    is_adversarial = player == "adversarial"

    def loss(params, carry, keys, batch):
        flow_params = jax.lax.stop_gradient(params["flow"])
        if is_adversarial:
            flow_params = jax.tree.map(
                lambda fixed, a: 2.0 * fixed - a, flow_params, params["flow"]
            )

        def draw(key):
            return jax.vmap(lambda k: flow.sample(flow_params, k))(jax.random.split(key, num_noise))

        points = jax.vmap(draw)(keys)
        both = join_examples(batch, points)
        log_both = jax.vmap(lambda x: flow.log_prob(flow_params, x))(both)
        ratios = jax.vmap(lambda log_q, x: log_ratio(energy_fn, params, log_q, x))(log_both, both)
        data, contrast = ratios[: len(keys)], ratios[len(keys) :].reshape(-1, num_noise)
        losses = jax.vmap(lambda d, n: noise_contrastive_loss(d, n, ratio=ratio))(data, contrast)
        value = losses.mean()
        log_prob_flow = log_both[: len(keys)].mean()
        if not is_adversarial:
            own = -jax.vmap(lambda x: flow.log_prob(params["flow"], x))(batch).mean()
            value = value + (own - jax.lax.stop_gradient(own))  # its gradient, not its value
        metrics = {
            "log_z": params["log_z"],
            "log_prob_flow": log_prob_flow,
            **ratio_metrics(data, contrast, ratio),
        }
        if regularizers:
            fixed = jax.lax.stop_gradient(both)
            metrics["penalty"] = mean_penalty(regularizers, energy_fn, params["energy"], fixed)
            value = value + metrics["penalty"]
        return value, (carry, metrics)

    return Objective(init=lambda key, params, batch: (), loss=loss)
