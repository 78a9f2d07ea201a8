"""Objectives of the flow recipes: each with its parameters, optimizers and estimate of log Z.

All policies are one network, by default a perceptron, with a head for log F where the objective
learns one. Exceptions: ``tlm`` learns P_B by a network of its own, and ``led`` a potential beside
the policy.

The forward-looking objectives use the intermediate energy of the environment, or -log R of every
state where there is none, as if it stopped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ebjax.energies import mlp_energy
from ebjax.parallel import AXIS_NAME
from ebjax.training import adam, by_group, learning_rate_schedule
from ebjax.types import Objective, Params
from gflownet import objectives
from gflownet.evaluation import evidence_bounds
from gflownet.local_search import local_search_sampler
from gflownet.objectives.target_network import with_target
from gflownet.policies import mlp_policy, separate_backward
from gflownet.replay import replay_sampler
from gflownet.rollout import forward_rollout
from gflownet.sampling import TrajectorySampler, forward_sampler
from gflownet.types import Environment, Policy

__all__ = ["LEARNERS", "RESIDUAL_LOSSES", "Learner", "mlp_of_config"]

RESIDUAL_LOSSES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "squared": objectives.squared,
    "huber": objectives.huber(),
    "log_cosh": objectives.log_cosh,
    "shifted_cosh": objectives.shifted_cosh,
    "linex": objectives.linex(),
}
_NUM_DRAWS = 1000
_NUM_FIRST_DRAWS = 64


class Learner(NamedTuple):
    """A way to learn the flow.

    Attributes:
      init: ``key -> params``.
      policy: for ``policy_params(params)``.
      policy_params: ``params -> parameters of the policy``.
      objective: what is minimised.
      optimizer: how.
      log_z: ``(key, params) -> []``, what was learned of log Z, or an estimate from samples.
      progress: the metric of log Z that a person watches.
    """

    init: Callable[[jax.Array], Params]
    policy: Policy
    policy_params: Callable[[Params], Params]
    objective: Objective
    optimizer: optax.GradientTransformation
    log_z: Callable[[jax.Array, Params], jax.Array]
    progress: str = "log_z"


def _rate(config: Any, peak: float) -> optax.Schedule:
    return learning_rate_schedule(peak, decay_steps=config.learning_rate_decay_steps)


def _epsilon(config: Any) -> optax.Schedule:
    if config.epsilon_decay_steps:
        return optax.linear_schedule(config.epsilon, 0.0, config.epsilon_decay_steps)
    return optax.constant_schedule(config.epsilon)


def mlp_of_config(config: Any, environment: Environment, *, with_flow: bool) -> Policy:
    """The network of a recipe that does not bring its own."""
    return mlp_policy(
        environment.num_actions,
        config.hidden_features,
        backward=config.backward_policy,
        with_flow=with_flow,
    )


def _sampler(config: Any, environment: Environment, policy: Policy) -> TrajectorySampler:
    """New trajectories, their revisions, and what is replayed, as far as they are asked for."""
    sampler = forward_sampler(
        environment,
        policy,
        epsilon=_epsilon(config),
        temperature=config.temperature,
        stop_bias=config.stop_bias,
    )
    if config.local_search_revisions:
        sampler = local_search_sampler(
            environment,
            policy,
            sampler,
            num_steps=config.local_search_steps,
            num_revisions=config.local_search_revisions,
            accept=config.local_search_accept,
        )
    if config.replay != "none":
        sampler = replay_sampler(
            environment,
            policy,
            sampler,
            num_new=config.num_new,
            num_replayed=config.num_replayed,
            capacity=config.replay_capacity,
            rule=config.replay,
            min_distance=config.replay_distance,
        )
    return sampler


def _at_source(environment: Environment, policy: Policy, params: Params):
    """What the policy says of the source."""
    source = environment.initial(jax.random.key(0))
    return policy.apply(
        params,
        environment.observe(source),
        environment.forward_mask(source),
        environment.backward_mask(source),
    )


def _from_flow(environment: Environment, policy: Policy):
    """log Z is log F of the source."""
    return lambda key, params: _at_source(environment, policy, params["policy"]).log_flow


def _from_stop(environment: Environment, policy: Policy):
    """Z P_F(stop | s0) = R(s0)."""
    stop = environment.stop_action

    def log_z(key, params):
        source = environment.initial(key)
        log_reward = environment.log_reward((), environment.step(source, stop))
        output = _at_source(environment, policy, params["policy"])
        return log_reward - output.forward.log_prob(stop)

    return log_z


def _from_samples(environment: Environment, policy: Policy):
    """Importance weights of trajectories: the log of their mean R P_B / P_F."""

    def log_z(key, params):
        bounds = evidence_bounds(
            key, environment, policy, params["policy"], num_trajectories=_NUM_DRAWS
        )
        return jnp.asarray(bounds.log_z)

    return log_z


def _own_log_z(environment: Environment, policy: Policy):
    del environment, policy
    return lambda key, params: params["log_z"]


def _first_log_z(config: Any, environment: Environment, policy: Policy, params: Params, key):
    """[] 0, or the log Z of least squared residual: the mean of log R + log P_B - log P_F."""
    if not config.estimates_log_z:
        return jnp.zeros(())
    keys = jax.random.split(jax.random.fold_in(key, 2), _NUM_FIRST_DRAWS)
    drawn = forward_rollout(keys, environment, policy, params)
    return (drawn.log_reward + (drawn.log_pb - drawn.log_pf).sum(axis=0)).mean()


def _learner(
    build: Callable[[Any, Environment, Policy, dict[str, Any]], Objective],
    *,
    with_flow: bool = False,
    log_z: Callable[[Environment, Policy], Any] = _from_flow,
    has_log_z: bool = False,
    extra: Callable[[Any, Environment, jax.Array], dict[str, Params]] | None = None,
    progress: str = "log_z",
):
    """A learner of one network, with further entries of ``params`` from ``extra``."""

    def learner(
        config: Any,
        environment: Environment,
        make_policy=mlp_of_config,
        wrap_sampler=lambda sampler: sampler,
    ) -> Learner:
        policy = make_policy(config, environment, with_flow=with_flow)
        options = {
            "sampler": wrap_sampler(_sampler(config, environment, policy)),
            "chunk_size": config.chunk_size,
        }
        groups = {
            "policy": adam(_rate(config, config.learning_rate)),
            "log_z": adam(_rate(config, config.log_z_learning_rate)),
            "potential": adam(_rate(config, config.potential_learning_rate)),
        }

        def init(key):
            observation = environment.observe(environment.initial(key))
            params = {"policy": policy.init(key, observation)}
            if extra is not None:
                params |= extra(config, environment, jax.random.fold_in(key, 1))
            if has_log_z:
                params["log_z"] = _first_log_z(config, environment, policy, params["policy"], key)
            if config.target_rate:
                params["target"] = params["policy"]
            return params

        names = [name for name in jax.eval_shape(init, jax.random.key(0)) if name != "target"]
        optimizer = by_group({name: groups[name] for name in names})
        if config.target_rate:
            optimizer = with_target(optimizer, rate=config.target_rate)
        return Learner(
            init,
            policy,
            lambda params: params["policy"],
            build(config, environment, policy, options),
            optimizer,
            log_z(environment, policy),
            progress,
        )

    return learner


def _loss(config: Any) -> Callable[[jax.Array], jax.Array]:
    return RESIDUAL_LOSSES[config.residual_loss]


def _trajectory_balance(config, environment, policy, options):
    return objectives.trajectory_balance(
        environment, policy, residual_loss=_loss(config), **options
    )


def _log_partition_variance(config, environment, policy, options):
    return objectives.log_partition_variance(
        environment, policy, residual_loss=_loss(config), axis_name=AXIS_NAME, **options
    )


def _detailed_balance(config, environment, policy, options):
    return objectives.detailed_balance(
        environment, policy, residual_loss=_loss(config), axis_name=AXIS_NAME, **options
    )


def _subtrajectory_balance(config, environment, policy, options):
    return objectives.subtrajectory_balance(
        environment,
        policy,
        decay=config.subtrajectory_decay,
        normalize=config.subtrajectory_normalize,
        residual_loss=_loss(config),
        axis_name=AXIS_NAME,
        **options,
    )


def _energy_fn(environment: Environment):
    """An energy of all states: the environment's own, or -log R."""
    if environment.intermediate_energy is not None:
        return environment.intermediate_energy
    return lambda params, state: -environment.log_reward(params, state)


def _with_energy(build):
    """The same objective on states with an energy, as if they stopped."""

    def build_with_energy(config, environment, policy, options):
        environment = environment._replace(intermediate_energy=_energy_fn(environment))
        flow_fn = objectives.forward_looking(environment, chunk_size=config.chunk_size)
        return build(config, environment, policy, {**options, "flow_fn": flow_fn})

    return build_with_energy


def _from_forward_looking_flow(environment: Environment, policy: Policy):
    """log F = log F̃ - E at the source."""
    log_flow = _from_flow(environment, policy)

    def log_z(key, params):
        return log_flow(key, params) - _energy_fn(environment)((), environment.initial(key))

    return log_z


def _flow_matching(config, environment, policy, options):
    return objectives.flow_matching(
        environment,
        policy,
        floor=config.flow_floor,
        terminal_weight=config.terminal_weight,
        residual_loss=_loss(config),
        axis_name=AXIS_NAME,
        **options,
    )


def _modified_detailed_balance(config, environment, policy, options):
    return objectives.modified_detailed_balance(
        environment,
        policy,
        has_target=config.target_rate > 0,
        residual_loss=_loss(config),
        axis_name=AXIS_NAME,
        **options,
    )


def _soft_q_learning(config, environment, policy, options):
    return objectives.soft_q_learning(
        environment,
        policy,
        munchausen=config.munchausen,
        terminal_weight=config.terminal_weight,
        has_target=config.target_rate > 0,
        residual_loss=_loss(config),
        axis_name=AXIS_NAME,
        **options,
    )


def _path_consistency(config, environment, policy, options):
    return objectives.path_consistency(
        environment,
        policy,
        depth=config.path_depth,
        residual_loss=_loss(config),
        axis_name=AXIS_NAME,
        **options,
    )


def _reverse_kullback_leibler(config, environment, policy, options):
    return objectives.reverse_kullback_leibler(
        environment, policy, axis_name=AXIS_NAME, chunk_size=options["chunk_size"]
    )


def _forward_kullback_leibler(config, environment, policy, options):
    return objectives.forward_kullback_leibler(
        environment, policy, chunk_size=options["chunk_size"]
    )


def _potential(config: Any):
    return mlp_energy(config.hidden_features)


def _potential_params(config: Any, environment: Environment, key: jax.Array) -> dict[str, Params]:
    observation = environment.observe(environment.initial(key))
    pair = jnp.concatenate([observation, observation])
    return {"potential": _potential(config).init(key, pair)}


def _learned_energy_decomposition(config, environment, policy, options):
    network = _potential(config)
    return objectives.learned_energy_decomposition(
        environment,
        policy,
        lambda params, pair: network.apply(params, jnp.concatenate(pair)),
        dropout=config.potential_dropout,
        residual_loss=_loss(config),
        axis_name=AXIS_NAME,
        **options,
    )


def _trajectory_likelihood(config: Any, environment: Environment) -> Learner:
    """Trajectory balance with P_B by likelihood, uniform at first and ever slower."""
    forward = mlp_policy(environment.num_actions, config.hidden_features, backward="uniform")
    backward = mlp_policy(environment.num_actions, config.hidden_features)
    policy = separate_backward(forward, backward)
    last_layer = f"Dense_{len(config.hidden_features)}"

    def init(key):
        own = policy.init(key, environment.observe(environment.initial(key)))
        zeros = jax.tree.map(jnp.zeros_like, own["backward"][last_layer])
        own["backward"] = {**own["backward"], last_layer: zeros}
        log_z = _first_log_z(config, environment, policy, own, key)
        return {"policy": own, "log_z": log_z, "target": own}

    def labels(params):
        own = {
            name: jax.tree.map(lambda _, name=name: name, tree)
            for name, tree in params["policy"].items()
        }
        return {"policy": own, "log_z": "log_z"}

    backward_rate = optax.exponential_decay(config.learning_rate, 1, 0.999)
    optimizer = optax.multi_transform(
        {
            "forward": adam(_rate(config, config.learning_rate)),
            "backward": adam(backward_rate),
            "log_z": adam(_rate(config, config.log_z_learning_rate)),
        },
        labels,
    )
    objective = objectives.trajectory_likelihood(
        environment,
        policy,
        functools.partial(objectives.trajectory_balance, residual_loss=_loss(config)),
        epsilon=_epsilon(config),
        chunk_size=config.chunk_size,
    )
    return Learner(
        init,
        policy,
        lambda params: params["policy"],
        objective,
        with_target(optimizer, rate=config.target_rate),
        _own_log_z(environment, policy),
    )


# (config, environment, make_policy=mlp_of_config, wrap_sampler=identity) -> Learner. "led" needs
# flat observations; "tlm" takes the first two alone and keeps the perceptron.
LEARNERS: dict[str, Callable[..., Learner]] = {
    "tb": _learner(_trajectory_balance, log_z=_own_log_z, has_log_z=True),
    "vargrad": _learner(_log_partition_variance, log_z=_from_samples),
    "db": _learner(_detailed_balance, with_flow=True),
    "subtb": _learner(_subtrajectory_balance, with_flow=True),
    "fm": _learner(_flow_matching, with_flow=True),
    "mdb": _learner(_modified_detailed_balance, log_z=_from_stop),
    "fldb": _learner(
        _with_energy(_detailed_balance), with_flow=True, log_z=_from_forward_looking_flow
    ),
    "flsubtb": _learner(
        _with_energy(_subtrajectory_balance), with_flow=True, log_z=_from_forward_looking_flow
    ),
    "led": _learner(_learned_energy_decomposition, with_flow=True, extra=_potential_params),
    "soft_dqn": _learner(_soft_q_learning, with_flow=True),
    "munchausen": _learner(_soft_q_learning, with_flow=True),
    "pcl": _learner(_path_consistency, with_flow=True),
    "tlm": _trajectory_likelihood,
    "reverse_kl": _learner(_reverse_kullback_leibler, log_z=_from_samples, progress="elbo"),
    "forward_kl": _learner(_forward_kullback_leibler, log_z=_from_samples, progress="eubo"),
}
