"""Directed acyclic graphs over d variables, rewarded by how well they explain data.

    log R(G) = Σ_j LS(j | Pa_j),      so that R(G) / Z is the posterior of G under a uniform prior

Action i d + j adds the edge i -> j, action d² stops; every graph is terminal. An edge is allowed
unless it is there or j already reaches i, which the state keeps as the transitive closure. Each
edge of a graph may have been the last. Local scores are looked up in a table over all parent sets:

    linear_gaussian_scores   weights N(0, s²), noise N(0, v), both known
    bge_scores               Bayesian Gaussian equivalent: graphs that mean the same get the same

Deleu et al., "Bayesian structure learning with generative flow networks", UAI 2022. Geiger and
Heckerman, "Learning Gaussian networks", UAI 1994; Kuipers, Moffa and Heckerman, "Addendum on the
scoring of Gaussian directed acyclic graphical models", Annals of Statistics 42 (2014).
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gflownet.types import Environment

__all__ = [
    "DagState",
    "all_dags",
    "bge_scores",
    "dags",
    "edge_marginals",
    "linear_gaussian_data",
    "linear_gaussian_scores",
]


class DagState(NamedTuple):
    """``adjacency`` [d, d] bool (i -> j), ``reaches`` [d, d] bool (i to j, itself included), and
    ``stopped`` []."""

    adjacency: jax.Array
    reaches: jax.Array
    stopped: jax.Array


def linear_gaussian_data(
    seed: int,
    *,
    num_variables: int,
    num_samples: int = 100,
    mean_parents: float = 1.0,
    noise_variance: float = 0.1,
) -> tuple[np.ndarray, np.ndarray]:
    """A random graph and data from it: ``(x [N, d], adjacency [d, d])``.

    Edges are drawn independently along a random order, with ``mean_parents`` expected a variable;
    weights are N(0, 1).
    """
    rng = np.random.default_rng(seed)
    share = min(1.0, 2.0 * mean_parents / max(1, num_variables - 1))
    upper = np.triu(rng.random((num_variables, num_variables)) < share, 1)
    order = rng.permutation(num_variables)
    adjacency = np.zeros_like(upper)
    adjacency[np.ix_(order, order)] = upper
    weights = np.where(adjacency, rng.standard_normal(upper.shape), 0.0)
    x = np.zeros((num_samples, num_variables))
    for variable in order:
        noise = math.sqrt(noise_variance) * rng.standard_normal(num_samples)
        x[:, variable] = x @ weights[:, variable] + noise
    return x, adjacency


def _parent_sets(num_variables: int, variable: int):
    """Masks (bit i: variable i) of all sets of parents, with the parents."""
    others = [i for i in range(num_variables) if i != variable]
    for size in range(num_variables):
        for parents in itertools.combinations(others, size):
            yield sum(1 << i for i in parents), list(parents)


def _checked_data(data: np.ndarray) -> np.ndarray:
    data = np.asarray(data, np.float64)
    if data.ndim != 2 or data.shape[0] < 1 or not np.isfinite(data).all():
        raise ValueError(f"data have shape {data.shape}; they must be finite numbers [N, d].")
    if data.shape[1] > 15:
        raise ValueError(f"data have {data.shape[1]} variables; tables of scores go up to 15.")
    return data


def linear_gaussian_scores(
    data: np.ndarray, *, weight_variance: float = 1.0, noise_variance: float = 0.1
) -> np.ndarray:
    """[d, 2^d] LS(j | Pa) = log N(x_j; 0, v I + s² X_Pa X_Pa'), at the bits of Pa.

    Sets that contain j itself hold -inf. Costs matrices of the size of Pa, not of the data.
    """
    data = _checked_data(data)
    num_samples, num_variables = data.shape
    moments = data.T @ data
    scores = np.full((num_variables, 2**num_variables), -np.inf)
    for variable in range(num_variables):
        for mask, parents in _parent_sets(num_variables, variable):
            inner = noise_variance * np.eye(len(parents))
            inner += weight_variance * moments[np.ix_(parents, parents)]
            cross = moments[parents, variable]
            # Woodbury and the determinant lemma.
            explained = weight_variance * cross @ np.linalg.solve(inner, cross)
            _, log_determinant = np.linalg.slogdet(inner)
            scores[variable, mask] = -0.5 * (
                (moments[variable, variable] - explained) / noise_variance
                + log_determinant
                + (num_samples - len(parents)) * math.log(noise_variance)
                + num_samples * math.log(2.0 * math.pi)
            )
    return scores


def bge_scores(
    data: np.ndarray, *, mean_weight: float = 1.0, precision_weight: float | None = None
) -> np.ndarray:
    """[d, 2^d] local scores of the Gaussian model with a normal-Wishart prior.

    Args:
      data: [N, d].
      mean_weight: α_μ > 0.
      precision_weight: α_w > d + 1; ``None``: d + 2.
    """
    data = _checked_data(data)
    num_samples, size = data.shape
    weight = size + 2.0 if precision_weight is None else float(precision_weight)
    if not weight > size + 1:
        raise ValueError(f"precision_weight is {weight}; it must be more than {size + 1}.")
    ratio = mean_weight * (weight - size - 1.0) / (mean_weight + 1.0)
    centred = data - data.mean(axis=0)
    mean = data.mean(axis=0)
    posterior = ratio * np.eye(size) + centred.T @ centred
    posterior += num_samples * mean_weight / (num_samples + mean_weight) * np.outer(mean, mean)

    def log_determinant(variables: list[int]) -> float:
        if not variables:
            return 0.0
        return float(np.linalg.slogdet(posterior[np.ix_(variables, variables)])[1])

    scores = np.full((size, 2**size), -np.inf)
    for variable in range(size):
        for mask, parents in _parent_sets(size, variable):
            freedom = weight - size + len(parents)
            scores[variable, mask] = (
                0.5 * math.log(mean_weight / (num_samples + mean_weight))
                + math.lgamma(0.5 * (num_samples + freedom + 1.0))
                - math.lgamma(0.5 * (freedom + 1.0))
                - 0.5 * num_samples * math.log(math.pi)
                + 0.5 * (freedom + len(parents) + 1.0) * math.log(ratio)
                + 0.5 * (num_samples + freedom) * log_determinant(parents)
                - 0.5 * (num_samples + freedom + 1.0) * log_determinant([*parents, variable])
            )
    return scores


def all_dags(num_variables: int) -> np.ndarray:
    """[S, d, d] bool, every directed acyclic graph: 1, 3, 25, 543, 29,281 for d = 1 to 5.

    >>> [len(all_dags(d)) for d in (1, 2, 3, 4)]
    [1, 3, 25, 543]
    """
    if not 1 <= num_variables <= 5:
        raise ValueError(f"num_variables is {num_variables}; graphs of 1 to 5 can be listed.")
    pairs = [(i, j) for i in range(num_variables) for j in range(i + 1, num_variables)]
    uppers = np.zeros((2 ** len(pairs), num_variables, num_variables), bool)
    for bit, (i, j) in enumerate(pairs):
        uppers[:, i, j] = np.arange(len(uppers)) >> bit & 1
    orders = itertools.permutations(range(num_variables))
    graphs = np.concatenate([uppers[:, order][:, :, order] for order in map(list, orders)])
    _, first = np.unique(_code(graphs), return_index=True)
    return graphs[first]


def edge_marginals(graphs: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """[d, d] probability of each edge i -> j.

    Args:
      graphs: [S, d, d] bool.
      probabilities: [S].
    """
    return np.tensordot(np.asarray(probabilities, np.float64), graphs.astype(float), axes=1)


def _closure(adjacency: jax.Array) -> jax.Array:
    """Who reaches whom, itself included, by squaring."""
    size = adjacency.shape[0]
    reaches = adjacency | jnp.eye(size, dtype=bool)
    for _ in range(max(1, math.ceil(math.log2(max(2, size))))):
        reaches = (reaches[:, :, None] & reaches[None]).any(axis=1)
    return reaches


def dags(local_scores: np.ndarray, *, offset: float | None = None) -> Environment:
    """Builds the environment.

    Args:
      local_scores: [d, 2^d] LS(j | Pa), at the bits of Pa.
      offset: what is taken off log R, so that log Z is not hundreds of nats from zero; ``None``:
        the score of the graph without edges.

    Returns:
      An ``Environment`` with d² + 1 actions, whose observation is the adjacency [d²]. Up to d = 5
      it enumerates all graphs and knows log Z.

    Raises:
      ValueError: if ``local_scores`` has another shape, or is not finite where it is used.

    >>> round(dags(np.zeros((3, 8))).log_z, 6) == round(math.log(25), 6)
    True
    """
    scores = np.asarray(local_scores, np.float64)
    size = scores.shape[0] if scores.ndim == 2 else 0
    if scores.shape != (size, 2**size) or size == 0:
        raise ValueError(
            f"local_scores has shape {scores.shape}; it must be [d, 2^d], a row a variable and a "
            "column a set of parents."
        )
    masks = np.arange(2**size)
    used = (masks[None] >> np.arange(size)[:, None] & 1) == 0
    if not np.isfinite(scores[used]).all():
        raise ValueError("local_scores must be finite for sets without the variable itself.")
    base = float(scores[:, 0].sum()) if offset is None else float(offset)
    # Per variable, so that float32 keeps differences between large scores.
    table = np.where(used, scores - base / size, 0.0)
    stop, bits = size * size, 2 ** np.arange(size)

    def initial(key):
        del key
        return DagState(
            jnp.zeros((size, size), bool), jnp.eye(size, dtype=bool), jnp.zeros((), bool)
        )

    def edge(action):
        flat = jnp.arange(size * size) == action
        return flat.reshape(size, size)

    def step(state, action):
        source, target = action // size, action % size
        new = state.reaches[:, source % size][:, None] & state.reaches[target][None]
        reaches = jnp.where(action == stop, state.reaches, state.reaches | new)
        return DagState(state.adjacency | edge(action), reaches, state.stopped | (action == stop))

    def undo(state, action):
        adjacency = state.adjacency & ~edge(action)
        return DagState(adjacency, _closure(adjacency), state.stopped & (action != stop))

    def forward_mask(state):
        allowed = ~state.adjacency & ~state.reaches.T
        return jnp.append(allowed.reshape(-1), True) & ~state.stopped

    def backward_mask(state):
        return jnp.append(state.adjacency.reshape(-1) & ~state.stopped, state.stopped)

    def log_reward(params, state):
        del params
        parents = jnp.asarray(bits, jnp.int32) @ state.adjacency
        local = jnp.asarray(table, jnp.result_type(float))[jnp.arange(size), parents]
        return local.sum()

    is_small = size <= 5
    graphs = all_dags(size) if is_small else None
    place, log_z = None, None
    if graphs is not None:
        place = np.full(2 ** (size * (size - 1)), -1, np.int32)
        place[_code(graphs)] = np.arange(len(graphs))
        parents = np.einsum("i,sij->sj", bits, graphs.astype(int))
        total = table[np.arange(size), parents].sum(axis=1)
        log_z = float(np.logaddexp.reduce(total))

    def enumerate_states():
        assert graphs is not None
        reaches = np.asarray(jax.jit(jax.vmap(_closure))(jnp.asarray(graphs)))
        stopped = np.repeat([False, True], len(graphs))
        return DagState(np.tile(graphs, (2, 1, 1)), np.tile(reaches, (2, 1, 1)), stopped)

    def state_index(state):
        assert graphs is not None
        kept = state.adjacency[~np.eye(size, dtype=bool)]
        code = kept @ jnp.asarray(2 ** np.arange(kept.shape[0]), jnp.int32)
        return jnp.asarray(place)[code] + jnp.where(state.stopped, len(graphs), 0).astype(jnp.int32)

    return Environment(
        initial=initial,
        step=step,
        undo=undo,
        forward_mask=forward_mask,
        backward_mask=backward_mask,
        observe=lambda state: state.adjacency.reshape(-1).astype(jnp.result_type(float)),
        num_actions=size * size + 1,
        max_length=size * (size - 1) // 2 + 1,
        log_reward=log_reward,
        stop_action=stop,
        enumerate=enumerate_states if is_small else None,
        state_index=state_index if is_small else None,
        log_z=log_z,
    )


def _code(graphs: np.ndarray) -> np.ndarray:
    """A number for each graph: its entries off the diagonal as bits."""
    kept = graphs[:, ~np.eye(graphs.shape[1], dtype=bool)]
    return kept @ (2 ** np.arange(kept.shape[1], dtype=np.int64))
