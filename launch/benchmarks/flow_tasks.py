"""Trajectory balance on tasks of the literature, here and in gfnx: same networks, uniform P_B.

    tfbind8   8 letters by appending, rewards from a table            MLP 2 x 256
    ising     10 x 10 spins in any order, torus, coupling 0.2         MLP 2 x 256
    dag       graphs of 5 variables, local scores from a table        MLP 2 x 256
    bits      120 bits in words of 8, in any order                    transformer, 3 x 64, 8 heads

gfnx's own rewards stand wherever they serve; where they read a file that it does not ship, or fit
another law, a reward module looks up the same numbers as this package does.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ebjax.training import by_group
from gflownet import environments
from gflownet.objectives import trajectory_balance
from gflownet.policies import mlp_policy, transformer_policy
from gflownet.recipes.eb_gfn import true_couplings
from gflownet.types import Environment, Policy
from launch.benchmarks.flow_peers import GfnxTask, gfnx_workload
from launch.benchmarks.own import flow_workload
from launch.benchmarks.workload import Workload, import_peer

__all__ = ["ebjax_task", "gfnx_task", "own_flow"]

HIDDEN = (256, 256)
SIDE, COUPLING = 10, 0.2
NUM_VARIABLES = 5
NUM_BITS, BITS_PER_WORD = 120, 8
WIDTH, NUM_LAYERS, NUM_HEADS = 64, 3, 8
RATES = {"policy": 1e-3, "log_z": 0.1}
EPSILON = 1e-3


def _scores() -> np.ndarray:
    """[65536] stand-ins for the binding scores; what they are does not change the work."""
    return np.random.default_rng(0).random(4**8)


def _local_scores() -> np.ndarray:
    data, _ = environments.linear_gaussian_data(0, num_variables=NUM_VARIABLES)
    return environments.linear_gaussian_scores(data)


def _couplings() -> np.ndarray:
    """[S, S] symmetric, each bond of the torus counted once in x' J x."""
    return true_couplings(SIDE, 0.5 * COUPLING).astype(np.float32)


def own_flow(task: str) -> tuple[Environment, Policy]:
    """This package's environment and network of a task."""
    if task == "bits":
        environment = environments.bit_sequences(
            num_bits=NUM_BITS,
            bits_per_word=BITS_PER_WORD,
            order="any_order",
            inverse_temperature=1.0 / NUM_BITS,
            observe_tokens=True,
        )
        policy = transformer_policy(
            2**BITS_PER_WORD,
            environment.num_actions,
            per_place=True,
            width=WIDTH,
            num_layers=NUM_LAYERS,
            num_heads=NUM_HEADS,
            inner_width=WIDTH,
            backward="uniform",
        )
        return environment, policy
    if task == "tfbind8":
        environment = environments.table_sequences(
            _scores(), vocabulary=4, length=8, exponent=3.0, scale=10.0, order="append"
        )
    elif task == "ising":
        couplings = jnp.asarray(_couplings())
        environment = environments.discrete_energy(
            lambda params, x: -x @ couplings @ x, num_variables=SIDE**2, values=(-1.0, 1.0)
        )
    else:
        environment = environments.dags(_local_scores())
    return environment, mlp_policy(environment.num_actions, HIDDEN, backward="uniform")


def ebjax_task(
    *,
    task: str,
    num_trajectories: int,
    num_updates: int,
    seed: int = 0,
    num_devices: int = 1,
    chunk_size: int = 128,
) -> Workload:
    """This package's training loop.

    Args:
        task: one of the tasks above.
        num_trajectories: of one update.
        num_updates: updates of one `run()`, in one dispatch.
        seed: of the network and of all sampling.
        num_devices: devices that trajectories are split over.
        chunk_size: states evaluated at a time in the gradient pass.
    """
    environment, policy = own_flow(task)
    objective = trajectory_balance(environment, policy, epsilon=EPSILON, chunk_size=chunk_size)

    def init(key: jax.Array) -> Any:
        observation = environment.observe(environment.initial(key))
        return {"policy": policy.init(key, observation), "log_z": jnp.zeros(())}

    return flow_workload(
        f"gflownet {task}",
        init,
        objective,
        by_group({name: optax.adam(rate) for name, rate in RATES.items()}),
        num_trajectories=num_trajectories,
        num_updates=num_updates,
        seed=seed,
        num_devices=num_devices,
    )


def gfnx_task(*, task: str, num_trajectories: int, num_updates: int, seed: int = 0) -> Workload:
    """gfnx, as in `gfnx_hypergrid`; arguments as in `ebjax_task`.

    Raises:
        PeerMissing: if gfnx or equinox cannot be imported.
    """
    equinox = import_peer("equinox", peer="gfnx")
    key_environment, key_network, key_run = jax.random.split(jax.random.key(seed), 3)
    environment, features, num_backward = _gfnx_environment(task)
    environment_params = environment.init(key_environment)
    num_actions = environment.action_space.n
    state = environment.get_init_state(1)
    observation = environment.get_obs(state, environment_params)[0]
    network = (
        _gfnx_transformer(environment, key_network)
        if task == "bits"
        else equinox.nn.MLP(
            features(observation).size, num_actions, HIDDEN[0], len(HIDDEN), key=key_network
        )
    )
    params, static = equinox.partition(network, equinox.is_array)

    def heads(params: Any, observation: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = equinox.combine(params, static)(features(observation))
        return logits.reshape(-1), jnp.zeros(num_backward)

    return gfnx_workload(
        f"gfnx {task}",
        GfnxTask(environment, environment_params, key_run, params, heads),
        num_trajectories=num_trajectories,
        num_updates=num_updates,
        learning_rate=RATES["policy"],
        log_z_learning_rate=RATES["log_z"],
        epsilon=EPSILON,
        frozen=False,
        note="rollout, loss and update in one fori_loop",
    )


def _gfnx_environment(task: str) -> tuple[Any, Any, int]:
    """`(environment, observation -> input of the network, backward actions)`."""
    gfnx = import_peer("gfnx", peer="gfnx")
    if task == "bits":
        reward = gfnx.BitseqRewardModule(sentence_len=NUM_BITS, k=BITS_PER_WORD)
        environment = gfnx.BitseqEnvironment(reward, NUM_BITS, BITS_PER_WORD)
        return environment, lambda tokens: tokens, NUM_BITS // BITS_PER_WORD
    if task == "tfbind8":
        rewards = 10.0 * _scores() ** 3 / np.max(_scores()) ** 3

        class Table(gfnx.TFBind8RewardModule):  # type: ignore[name-defined, misc]
            """Its own reads a file that it does not ship."""

            def init(self, rng_key: jax.Array, dummy_state: Any) -> dict[str, jax.Array]:
                """The table."""
                del rng_key, dummy_state
                return {"rewards": jnp.clip(jnp.asarray(rewards, jnp.float32), 1e-3)}

        environment = gfnx.TFBind8Environment(Table())
        size = environment.ntoken
        return environment, lambda tokens: jax.nn.one_hot(tokens, size).reshape(-1), 1
    if task == "ising":
        couplings = jnp.asarray(_couplings())

        class Couplings(gfnx.IsingRewardModule):  # type: ignore[name-defined, misc]
            """Its own starts from zeros."""

            def init(self, rng_key: jax.Array, dummy_state: Any) -> Any:
                """The matrix."""
                initial = super().init(rng_key, dummy_state)
                return initial.replace(J=couplings)

        environment = gfnx.IsingEnvironment(Couplings(), dim=SIDE**2)
        return (
            environment,
            lambda spins: jax.nn.one_hot(spins + 1, 3).reshape(-1),
            SIDE**2,
        )
    scores = _local_scores()
    scores = np.where(np.isfinite(scores), scores - scores[:, :1], 0.0)
    table = jnp.asarray(scores, jnp.float32)
    bits = 2 ** jnp.arange(NUM_VARIABLES)

    class LocalScores:
        """The sum of the local scores, as this package looks it up."""

        def init(self, rng_key: jax.Array, dummy_state: Any) -> tuple[()]:
            """Nothing to keep."""
            del rng_key, dummy_state
            return ()

        def log_reward(self, state: Any, env_params: Any) -> jax.Array:
            """[B]."""
            del env_params
            parents = jnp.einsum("i,bij->bj", bits, state.adjacency_matrix.astype(jnp.int32))
            return table[jnp.arange(NUM_VARIABLES), parents].sum(axis=-1)

        def reward(self, state: Any, env_params: Any) -> jax.Array:
            """[B]."""
            return jnp.exp(self.log_reward(state, env_params))

    environment = gfnx.DAGEnvironment(LocalScores(), NUM_VARIABLES)
    return (
        environment,
        lambda adjacency: adjacency.reshape(-1).astype(jnp.float32),
        NUM_VARIABLES**2 + 1,
    )


def _gfnx_transformer(environment: Any, key: jax.Array) -> Any:
    """gfnx's encoder with a layer from each place to the words."""
    equinox = import_peer("equinox", peer="gfnx")
    gfnx = import_peer("gfnx", peer="gfnx")
    encoder_key, head_key = jax.random.split(key)

    class Network(equinox.Module):  # type: ignore[name-defined, misc]
        encoder: Any
        head: Any

        def __call__(self, tokens: jax.Array) -> jax.Array:
            """[L 2^k] logits."""
            encoded = self.encoder(tokens, jnp.arange(len(tokens)))["layers_out"][-1]
            return jax.vmap(self.head)(encoded[1:]).reshape(-1)

    encoder = gfnx.networks.Encoder(
        vocab_size=environment.ntoken,
        max_length=environment.max_length + 1,
        embedding_size=WIDTH,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_layers=NUM_LAYERS,
        num_heads=NUM_HEADS,
        dropout_rate=0.0,
        pad_id=environment.pad_token,
        key=encoder_key,
    )
    return Network(encoder, equinox.nn.Linear(WIDTH, environment.nchar, key=head_key))
