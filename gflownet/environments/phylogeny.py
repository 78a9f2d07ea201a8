"""Phylogenetic trees: join rooted trees of species two at a time until one is left.

    log R(tree) = (C - M(tree)) / α,      M: Fitch's number of mutations (parsimony)

A forest has one slot a species. A tree sits in the slot of its first species; the action of the
pair i < j joins the trees of slots i and j into one in slot i. The root of every tree of two
species or more may have been the last to be made, so that a forest has as many parents as such
trees. A tree is written in one way, whatever the order of its joins: the node that joins slots i
and j is node j, since slot j never joins again.

Each site of a node holds a set of letters as bits (A C G T gap): the intersection of its children's
where there is one, else their union and one mutation. The number of mutations does not depend on
where the root is. The energy of a forest counts the mutations made so far against an equal share
of C for each join, and is -log R at the end.

Zhou et al., "PhyloGFN: phylogenetic inference with generative flow networks", ICLR 2024. Fitch,
"Toward defining the course of evolution", Systematic Zoology 20 (1971).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gflownet.types import Environment

__all__ = ["ForestState", "encode_sites", "load_alignment", "phylogeny"]

# A letter, or what it may stand for, as bits. The gap is a fifth state.
_LETTERS = {"A": 1, "C": 2, "G": 4, "T": 8, "U": 8, "-": 16}
_AMBIGUOUS = {
    "R": "AG",
    "Y": "CT",
    "S": "CG",
    "W": "AT",
    "K": "GT",
    "M": "AC",
    "B": "CGT",
    "D": "AGT",
    "H": "ACT",
    "V": "ACG",
    "N": "ACGT",
    "X": "ACGT",
    "?": "ACGT-",
    ".": "-",
}


class ForestState(NamedTuple):
    """A forest over n species. Nodes 0 to n-1 are the species, node n + j was made by slot j.

    Attributes:
      root: [n] int32, the node in each slot, -1 where there is none.
      left: [n] int32, the child of node n + j in the slot it went to, -1 before it is made.
      right: [n] int32, its other child.
      sites: [2 n, S] uint8, sets of letters of each node.
      mutations: [n] int32, those of node n + j itself.
    """

    root: jax.Array
    left: jax.Array
    right: jax.Array
    sites: jax.Array
    mutations: jax.Array


def encode_sites(alignment: Mapping[str, str]) -> np.ndarray:
    """[n, S] uint8 sets of letters, rows in the order of the alignment.

    Raises:
      ValueError: naming the species whose sequence has another length or an unknown letter.

    >>> encode_sites({"a": "AC-", "b": "RTA"}).tolist()
    [[1, 2, 16], [5, 8, 1]]
    """
    if len(alignment) < 2:
        raise ValueError(f"An alignment of {len(alignment)} species makes no tree; give 2 or more.")
    codes = {**_LETTERS}
    for letter, meant in _AMBIGUOUS.items():
        codes[letter] = sum(_LETTERS[one] for one in meant)
    length = len(next(iter(alignment.values())))
    rows = []
    for name, sequence in alignment.items():
        unknown = sorted(set(sequence.upper()) - set(codes))
        if unknown:
            raise ValueError(f"{name}: has the letters {unknown}, which are no nucleotides.")
        if len(sequence) != length or not sequence:
            raise ValueError(
                f"{name}: has {len(sequence)} sites; the first species has {length}, and all must "
                "be aligned."
            )
        rows.append([codes[letter] for letter in sequence.upper()])
    return np.array(rows, np.uint8)


def load_alignment(path: str | os.PathLike) -> dict[str, str]:
    """Aligned sequences by species, from a JSON object or a FASTA file.

    Raises:
      ValueError: naming the file, if it is neither.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); give JSON or FASTA.") from None
    if text.lstrip().startswith(">"):
        found: dict[str, str] = {}
        for block in text.split(">")[1:]:
            name, *lines = block.splitlines()
            found[name.strip()] = "".join(line.strip() for line in lines)
        return found
    try:
        loaded = json.loads(text)
    except json.JSONDecodeError:
        raise ValueError(f"{path}: is neither JSON nor FASTA.") from None
    if not isinstance(loaded, dict) or not all(isinstance(one, str) for one in loaded.values()):
        raise ValueError(f"{path}: must be an object of species and their sequences.")
    return loaded


def phylogeny(
    sites: np.ndarray,
    *,
    offset: float | None = None,
    temperature: float = 4.0,
    max_enumerated_species: int = 6,
) -> Environment:
    """Builds the environment.

    Args:
      sites: [n, S] sets of letters as bits, from ``encode_sites``.
      offset: C; ``None``: the mutations of the tree that joins species in their order.
      temperature: α > 0.
      max_enumerated_species: ``enumerate`` is offered up to this number of species.

    Returns:
      An ``Environment`` with n (n - 1) / 2 actions and trajectories of n - 1. The observation
      [n, 1 + 5 S] says of each slot whether a tree is there, and its sets of letters as bits.

    Raises:
      ValueError: naming the argument that is out of range.

    >>> environment = phylogeny(encode_sites({"a": "AACC", "b": "AACG", "c": "GTCG", "d": "GTCC"}))
    >>> environment.num_actions, environment.max_length
    (6, 3)
    """
    sites = np.asarray(sites)
    if sites.ndim != 2 or len(sites) < 2 or sites.min(initial=1) < 1 or sites.max(initial=0) > 31:
        raise ValueError(
            f"sites have shape {sites.shape}; they must be [n, S] sets of letters, 1 to 31, of two "
            "species or more."
        )
    if not temperature > 0.0:
        raise ValueError(f"temperature is {temperature}; it must be positive.")
    sites = sites.astype(np.uint8)
    num_species = len(sites)
    pairs = np.array([(i, j) for i in range(num_species) for j in range(i + 1, num_species)])
    first, second = pairs.T

    def initial(key):
        del key
        none = jnp.full(num_species, -1, jnp.int32)
        all_sites = np.concatenate([sites, np.zeros_like(sites)])
        return ForestState(
            jnp.arange(num_species, dtype=jnp.int32), none, none, jnp.asarray(all_sites), none + 1
        )

    def step(state, action):
        i, j = jnp.asarray(first)[action], jnp.asarray(second)[action]
        left, right = state.root[i], state.root[j]
        ours, theirs = state.sites[left], state.sites[right]
        both = ours & theirs
        joined = jnp.where(both > 0, both, ours | theirs)
        return ForestState(
            root=state.root.at[i].set(num_species + j).at[j].set(-1),
            left=state.left.at[j].set(left),
            right=state.right.at[j].set(right),
            sites=state.sites.at[num_species + j].set(joined),
            mutations=state.mutations.at[j].set(jnp.sum(both == 0, dtype=jnp.int32)),
        )

    def undo(state, action):
        i, j = jnp.asarray(first)[action], jnp.asarray(second)[action]
        return ForestState(
            root=state.root.at[i].set(state.left[j]).at[j].set(state.right[j]),
            left=state.left.at[j].set(-1),
            right=state.right.at[j].set(-1),
            sites=state.sites.at[num_species + j].set(0),
            mutations=state.mutations.at[j].set(0),
        )

    def forward_mask(state):
        is_there = state.root >= 0
        return is_there[first] & is_there[second]

    def backward_mask(state):
        return state.root[first] == num_species + second

    def observe(state):
        letters = (state.sites[state.root][..., None] >> np.arange(5, dtype=np.uint8)) & 1
        is_there = (state.root >= 0)[:, None]
        rows = jnp.concatenate([is_there, letters.reshape(num_species, -1) * is_there], axis=1)
        return rows.astype(jnp.result_type(float))

    # The tree that joins species in their order: the pairs (0, j) come first.
    order = jnp.arange(num_species - 1)
    chain, _ = jax.jit(lambda state: jax.lax.scan(lambda s, a: (step(s, a), None), state, order))(
        initial(None)
    )
    constant = float(np.sum(chain.mutations)) if offset is None else float(offset)

    def log_reward(params, state):
        del params
        total = jnp.sum(state.mutations).astype(jnp.result_type(float))
        return (constant - total) / temperature

    def intermediate_energy(params, state):
        del params
        made = jnp.sum(state.left >= 0).astype(jnp.result_type(float))
        total = jnp.sum(state.mutations).astype(jnp.result_type(float))
        return (total - constant / (num_species - 1) * made) / temperature

    states, index_fn = None, None
    if num_species <= max_enumerated_species:
        states, index_fn = _enumerate(initial(None), step, len(pairs), forward_mask)
    log_z = None
    if states is not None:
        ends = (states.root >= 0).sum(axis=1) == 1
        log_z = float(
            np.logaddexp.reduce((constant - states.mutations[ends].sum(axis=1)) / temperature)
        )
    return Environment(
        initial=initial,
        step=step,
        undo=undo,
        forward_mask=forward_mask,
        backward_mask=backward_mask,
        observe=observe,
        num_actions=len(pairs),
        max_length=num_species - 1,
        log_reward=log_reward,
        enumerate=None if states is None else lambda: states,
        state_index=index_fn,
        log_z=log_z,
        intermediate_energy=intermediate_energy,
    )


def _enumerate(initial: ForestState, step, num_actions: int, forward_mask):
    """All forests, fewest joins first, and the function that finds one among them."""
    actions = jnp.arange(num_actions)

    @jax.jit
    def successors(states):
        children = jax.vmap(jax.vmap(step, (None, 0)), (0, None))(states, actions)
        return children, jax.vmap(forward_mask)(states)

    level = jax.tree.map(lambda leaf: np.asarray(leaf)[None], initial)
    levels = [level]
    for _ in range(len(initial.root) - 1):
        children, allowed = jax.tree.map(np.asarray, successors(level))
        flat = jax.tree.map(lambda leaf, kept=allowed: leaf[kept], children)
        _, first = np.unique(np.concatenate([flat.left, flat.right], 1), axis=0, return_index=True)
        level = jax.tree.map(lambda leaf, kept=first: leaf[kept], flat)
        levels.append(level)
    states = jax.tree.map(lambda *leaves: np.concatenate(leaves), *levels)

    # A forest is known by a sum of random numbers, one for each child of each node.
    num_species = len(initial.root)
    for seed in range(10):
        weights = np.random.default_rng(seed).integers(
            2**32, size=(2, num_species, 2 * num_species + 1), dtype=np.uint32
        )
        slots = np.arange(num_species)
        sums = weights[0][slots, states.left + 1].sum(axis=1, dtype=np.uint32)
        sums += weights[1][slots, states.right + 1].sum(axis=1, dtype=np.uint32)
        order = np.argsort(sums)
        if len(np.unique(sums)) == len(sums):
            break

    def index_fn(state: ForestState) -> jax.Array:
        total = jnp.sum(jnp.asarray(weights[0])[slots, state.left + 1], dtype=jnp.uint32)
        total += jnp.sum(jnp.asarray(weights[1])[slots, state.right + 1], dtype=jnp.uint32)
        return jnp.asarray(order, jnp.int32)[jnp.searchsorted(jnp.asarray(sums[order]), total)]

    return states, index_fn
