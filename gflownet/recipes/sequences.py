"""Sequences with rewards of the literature, by any flow objective.

    bit_sequences   n bits in words of k, near one of 60 hidden modes
    tfbind8         8 nucleotides, measured binding of a transcription factor   (data_path)
    qm9_strings     5 molecular blocks, computed HOMO-LUMO gap                  (data_path)
    rna             a strand that binds L14_RNA1, folded by ViennaRNA           (extra rna)

Where all sequences can be listed, the law that the flow draws from is exact, and with it
``reward_ratio``, the mean reward over that of R / Z: a greedy sampler exceeds 1. A distance of
samples would say nothing: 20,000 perfect ones of TFBind8 are 0.58 from their own law. Elsewhere the
figures are a bound of log Z from below, its estimate by importance weights, and the rank
correlation of log p with log R.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ebjax.training import check_at_least, setting
from ebjax.types import Recipe, Run, TrainState
from gflownet.environments.bit_sequences import bit_sequences, hidden_modes, words_to_bits
from gflownet.environments.rna import RNA_TARGETS, rna_binding
from gflownet.environments.sequence_tables import qm9_strings, tfbind8
from gflownet.environments.sequences import ORDERS, SequenceState
from gflownet.evaluation import (
    correlations,
    log_probabilities,
    modes_found,
    top_rewards,
)
from gflownet.policies import transformer_policy
from gflownet.recipes.flow_config import FlowConfig
from gflownet.recipes.judging import bounds_fn, draw_fn, draw_one_fn, exact_laws_fn, flow_run
from gflownet.recipes.learners import LEARNERS
from gflownet.types import Environment

__all__ = ["SequencesConfig", "recipe"]

TASKS = ("bit_sequences", "tfbind8", "qm9_strings", "rna")
_NETWORKS = ("mlp", "transformer")
_OWN_NETWORK = ("led", "tlm")
# "mdb" needs states that may stop, "forward_kl" a source of exact draws.
_EXCLUDED = ("mdb", "forward_kl")
# The best half per cent of all sequences count as modes of the tables.
_MODE_SHARE = 0.005
# Bits in which a sequence may differ from a mode that it has found, of 120.
_MODE_DISTANCE = 28 / 120


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequencesConfig(FlowConfig):
    """Settings of a run on sequences; -1 and 'auto' follow the objective or the task."""

    task: str = setting("bit_sequences", f"which sequences: {', '.join(TASKS)}")
    data_path: str = setting("", "tfbind8, qm9_strings: .npz with 'score', or .npy")
    order: str = setting(
        "auto",
        f"where tokens go: {', '.join(ORDERS)}, or 'auto': bits append, others at both ends",
        follows="task",
    )
    network: str = setting("mlp", f"the policy: {' or '.join(_NETWORKS)}")
    width: int = setting(64, "transformer: features of a place")
    num_layers: int = setting(3, "transformer: attention blocks")
    num_heads: int = setting(8, "transformer: of each block")
    num_bits: int = setting(32, "bit_sequences: n")
    bits_per_word: int = setting(4, "bit_sequences: k")
    inverse_temperature: float = setting(1.0, "bit_sequences: log R per bit of distance")
    rna_target: str = setting("L14_RNA1", f"rna: {', '.join(RNA_TARGETS)}")
    rna_length: int = setting(8, "rna: letters; up to 9 are folded once for all")
    learning_rate: float = setting(3e-3)
    num_steps: int = setting(5000)
    batch_size: int = setting(64)
    epsilon_decay_steps: int = setting(2500)
    checkpoint_every: int = setting(1000)
    num_evaluated: int = setting(2000, "trajectories when the flow is judged")

    def __post_init__(self) -> None:
        """Fills in what follows the task, then checks types and ranges."""
        for name, known in (
            ("task", TASKS),
            ("network", _NETWORKS),
            ("order", ("auto", *ORDERS)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}."
                )
        if self.order == "auto":
            order = "append" if self.task == "bit_sequences" else "prepend_append"
            object.__setattr__(self, "order", order)
        if self.objective in _EXCLUDED:
            raise ValueError(
                f"objective is {self.objective!r}; sequences, which stop at full length only and "
                f"have no exact draws to learn from, take any but {' and '.join(_EXCLUDED)}."
            )
        if self.network == "transformer" and self.objective in _OWN_NETWORK:
            raise ValueError(
                f"network is 'transformer'; objective {self.objective!r} takes 'mlp' only."
            )
        super().__post_init__()
        check_at_least(self, 1, "width", "num_layers", "num_heads", "rna_length")
        check_at_least(self, 2, "num_evaluated")
        if self.width % self.num_heads:
            raise ValueError(
                f"num_heads is {self.num_heads}; it must divide the width {self.width}."
            )
        if self.task in ("tfbind8", "qm9_strings") and not self.data_path:
            raise ValueError(
                f"data_path is ''; task {self.task!r} reads the scores of all from a file."
            )


@functools.lru_cache(maxsize=4)
def _environment(config: SequencesConfig) -> Environment:
    options: dict[str, Any] = {
        "order": config.order,
        "observe_tokens": config.network == "transformer",
    }
    if config.task == "bit_sequences":
        return bit_sequences(
            num_bits=config.num_bits,
            bits_per_word=config.bits_per_word,
            inverse_temperature=config.inverse_temperature,
            **options,
        )
    if config.task == "rna":
        return rna_binding(config.rna_target, length=config.rna_length, **options)
    table = tfbind8 if config.task == "tfbind8" else qm9_strings
    return table(config.data_path, **options)


def _transformer(config: SequencesConfig, environment: Environment, *, with_flow: bool):
    length = environment.initial(jax.random.key(0)).tokens.shape[0]
    per_place = config.order == "any_order"
    copies = {"append": 1, "prepend_append": 2, "any_order": length}[config.order]
    return transformer_policy(
        environment.num_actions // copies,
        environment.num_actions,
        per_place=per_place,
        width=config.width,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        inner_width=config.width,
        backward=config.backward_policy,
        with_flow=with_flow,
    )


def bits_near_modes(num_bits: int, seed: int = 0) -> np.ndarray:
    """[60 n, n] bits: each mode, and the mode with 1, 2, ..., n - 1 random bits flipped."""
    rng = np.random.default_rng(seed)
    rows = []
    for mode in hidden_modes(num_bits):
        for count in range(num_bits):
            flipped = mode.copy()
            flipped[rng.choice(num_bits, size=count, replace=False)] ^= 1
            rows.append(flipped)
    return np.array(rows, np.int8)


def _words(bits: np.ndarray, bits_per_word: int) -> np.ndarray:
    """[N, n / k] int32 words of bits [N, n]."""
    powers = 2 ** np.arange(bits_per_word)[::-1]
    return (bits.reshape(len(bits), -1, bits_per_word) @ powers).astype(np.int32)


def build(config: SequencesConfig) -> Run:
    """Makes the run of a config."""
    environment = _environment(config)
    network = (_transformer,) if config.network == "transformer" else ()
    learner = LEARNERS[config.objective](config, environment, *network)
    draw, bounds = draw_fn(environment, learner), bounds_fn(environment, learner)
    laws = exact_laws_fn(environment, learner)
    is_bits = config.task == "bit_sequences"

    def to_bits(tokens: np.ndarray) -> np.ndarray:
        convert = jax.vmap(lambda row: words_to_bits(row, config.bits_per_word))
        return np.asarray(convert(jnp.asarray(tokens)))

    def sample(key, state: TrainState, num_samples: int):
        drawn = draw(key, state, num_samples)
        return {
            "tokens": np.asarray(drawn.terminal.tokens),
            "log_rewards": np.asarray(drawn.log_reward),
        }

    def monitor(key, state: TrainState):
        if laws is not None:
            return {"total_variation": laws(state).figures()["total_variation"]}
        # Better flows have a larger bound; lower is better for the loop.
        return {"negative_elbo": -bounds(key, state, 500).elbo}

    def on_test_set(key, state: TrainState):
        """log p and log R of sequences near the modes."""
        bits = bits_near_modes(config.num_bits)
        tokens = jnp.asarray(_words(bits, config.bits_per_word))
        states = SequenceState(tokens, jnp.zeros(len(tokens), bool))
        log_p = log_probabilities(
            key, environment, learner.policy, learner.policy_params(state.ema), states
        )
        log_r = jax.jit(jax.vmap(environment.log_reward, (None, 0)))((), states)
        return log_p, np.asarray(log_r, np.float64)

    def pairs(key, state: TrainState):
        """``(log p, log R)`` to correlate: of all sequences, of the test set, or of samples."""
        if laws is not None:
            found = laws(state)
            with np.errstate(divide="ignore"):
                log_p = np.log(found.learned)
            return np.maximum(log_p, -60.0), np.log(found.target) + found.log_z
        if is_bits:
            return on_test_set(key, state)
        draw_key, key = jax.random.split(key)
        drawn = draw(draw_key, state, config.num_evaluated)
        params = learner.policy_params(state.ema)
        log_p = log_probabilities(key, environment, learner.policy, params, drawn.terminal)
        return log_p, np.asarray(drawn.log_reward, np.float64)

    def evaluate(key, state: TrainState):
        bound_key, draw_key, pair_key, learned_key = jax.random.split(key, 4)
        estimate = bounds(bound_key, state, config.num_evaluated)
        drawn = sample(draw_key, state, config.num_evaluated)
        best = top_rewards(drawn["tokens"], drawn["log_rewards"], 100)
        figures_ = {
            "log_z": float(learner.log_z(learned_key, state.ema)),
            "elbo": estimate.elbo,
            "importance_log_z": estimate.log_z,
            "importance_log_z_standard_error": estimate.log_z_standard_error,
            "mean_reward": float(np.exp(np.float64(drawn["log_rewards"])).mean()),
            "top_100_reward": float(best["reward"]),
            "top_100_diversity": float(best["diversity"]),
            **correlations(*pairs(pair_key, state)),
        }
        if environment.log_z is not None:
            figures_["log_z_error"] = abs(figures_["log_z"] - environment.log_z)
            figures_["elbo_gap"] = environment.log_z - estimate.elbo
        found = None if laws is None else laws(state)
        if found is not None:
            figures_ |= found.figures()
        if is_bits:
            figures_["modes_found"] = modes_found(
                to_bits(drawn["tokens"]),
                hidden_modes(config.num_bits),
                round(_MODE_DISTANCE * config.num_bits),
            )
        elif found is not None:
            count = round(_MODE_SHARE * len(found.target))
            smallest = np.partition(found.target, -count)[-count]
            is_mode = drawn["log_rewards"] >= np.log(smallest) + found.log_z - 1e-5
            figures_["modes_found"] = len(np.unique(drawn["tokens"][is_mode], axis=0))
        return figures_

    def figures(key, state: TrainState, samples):
        from gflownet.figures import probabilities_and_rewards

        log_p, log_r = pairs(key, state)
        learned = target = None
        if laws is not None:
            found = laws(state)
            learned, target = found.learned, found.target
        return {
            "rewards": probabilities_and_rewards(
                log_p,
                log_r,
                samples["log_rewards"],
                log_z=environment.log_z,
                learned=learned,
                target=target,
            )
        }

    return flow_run(
        environment,
        learner,
        sample=sample,
        evaluate=evaluate,
        figures=figures,
        monitor=monitor,
        monitor_name="negative_elbo" if laws is None else "total_variation",
        draw=draw_one_fn(environment, learner, lambda state: state.tokens),
    )


recipe = Recipe(SequencesConfig, build, seed_is_key=True)
