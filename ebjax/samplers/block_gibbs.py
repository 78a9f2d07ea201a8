"""Block Gibbs sampling: conditionally independent sites drawn at once, for multilinear energies.

    p(x_i = k | rest) ∝ exp(-∂E/∂x_ik / τ),    binary sites  p(x_i = 1 | rest) = σ(-∂E/∂x_i / τ)

What it needs of the energy, read as a function of real numbers: that it is affine in the variables
of a block taken together, each variable (or one-hot vector) to the first power, and no product of
two sites of the same block. Then the sites of the block are independent given the rest, and one
gradient has all their conditional laws. Ising, Potts and Boltzmann machines are such energies; a
network is not. Leaves exp(-E/τ) exactly invariant.

Gonzalez, Low, Gretton and Guestrin, "Parallel Gibbs sampling: from colored fields to thin junction
trees", AISTATS 2011.
"""

from __future__ import annotations

import heapq
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from ebjax.energies.boltzmann import Layers
from ebjax.samplers.discrete import (
    check_num_categories,
    check_positive,
    choose_category,
    uniforms,
)
from ebjax.samplers.evaluate import value_and_gradient
from ebjax.types import EnergyFn, Kernel, Params, Position, bind

__all__ = ["BlockGibbsInfo", "BlockGibbsState", "block_gibbs", "color_graph", "rbm_gibbs"]

# Beyond this a loop over blocks is compiled once and not unrolled.
_MAX_UNROLLED_BLOCKS = 8
# Of the visible and of the hidden layer.
_RBM_BLOCKS: tuple[Any, Any] = (1, 0)


class BlockGibbsState(NamedTuple):
    """``position``: the chain's point, binary or one-hot."""

    position: Position


class BlockGibbsInfo(NamedTuple):
    """Diagnosis of one step.

    Attributes:
      energy: [] energy after the step.
      is_finite: [] bool, whether all energies and gradients were finite. Sites whose gradient is
        not finite stay.
    """

    energy: jax.Array
    is_finite: jax.Array


class _Labels:
    """Block of every site, as a leaf that hashes by its values and is no option to trace."""

    def __init__(self, tree: Any) -> None:
        leaves, treedef = jax.tree.flatten(tree, is_leaf=lambda node: isinstance(node, list))
        self.treedef: Any = treedef
        self.arrays = tuple(np.asarray(leaf) for leaf in leaves)
        self._token = (treedef, tuple((a.shape, a.tobytes()) for a in self.arrays))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Labels) and self._token == other._token

    def __hash__(self) -> int:
        return hash(self._token)


def block_gibbs(
    *,
    blocks: Any,
    num_categories: int | None = None,
    temperature: float | jax.Array = 1.0,
) -> Kernel:
    """Block Gibbs sampling of a multilinear energy: one step updates every block once, in order.

    The energy must be affine in the variables of each block together (see the head of this file);
    this is not checked, and where it does not hold the chain draws another law.

    Args:
      blocks: the block of each site, 0, 1, ..., as an array or a list with the shape of the sites
        (without the axis of one-hot vectors), or one integer for all sites of an array; -1 holds a
        site fixed. For a position that is a pytree, a pytree of these. See ``color_graph``.
      num_categories: ``None`` for binary positions in {0, 1}, or K for one-hot ones [..., K].
      temperature: τ > 0; the chain's law is exp(-E/τ).

    Returns:
      A ``Kernel`` with ``BlockGibbsState`` and ``BlockGibbsInfo``. One gradient a block, of which
      only the components of the block are computed where the position is a pytree with one block
      a leaf.

    Raises:
      ValueError: naming the option that is out of range.

    >>> import jax, jax.numpy as jnp
    >>> kernel = block_gibbs(blocks=[0, 1, 0])
    >>> def energy_fn(params, x):
    ...     return params * (x[0] * x[1] + x[1] * x[2]) - 100.0 * x[1]
    >>> state = kernel.init(energy_fn, 30.0, jnp.zeros(3))
    >>> for i in range(2):
    ...     state, info = kernel.step(jax.random.key(i), energy_fn, 30.0, state)
    >>> state.position.tolist(), float(info.energy)
    ([0.0, 1.0, 0.0], -100.0)
    """
    check_num_categories(num_categories)
    check_positive(temperature=temperature)
    labels = _Labels(blocks)
    present = {int(label) for array in labels.arrays for label in np.unique(array)} - {-1}
    num_blocks = len(present)
    if not present or present != set(range(num_blocks)):
        raise ValueError(
            f"blocks has the labels {sorted(present)}; they must be 0, 1, ... without a gap "
            "(and -1 for sites that are held)."
        )
    step = bind(
        _block_step,
        labels=labels,
        num_blocks=num_blocks,
        num_categories=num_categories,
        temperature=temperature,
    )
    return Kernel(bind(_block_init), step, num_blocks)


def rbm_gibbs(*, temperature: float | jax.Array = 1.0) -> Kernel:
    """Alternating Gibbs sampling of a Boltzmann machine of two layers: hidden, then visible.

    Positions are ``ebjax.energies.boltzmann.Layers``. Two evaluations a step, each with the
    gradient of one layer only.
    """
    return block_gibbs(blocks=Layers(*_RBM_BLOCKS), temperature=temperature)


def _block_init(energy_fn: EnergyFn, params: Params, position: Position) -> BlockGibbsState:
    del energy_fn, params  # the next step needs nothing but the position
    return BlockGibbsState(position)


def _block_step(
    key: jax.Array,
    energy_fn: EnergyFn,
    params: Params,
    state: BlockGibbsState,
    *,
    labels,
    num_blocks,
    num_categories,
    temperature,
) -> tuple[BlockGibbsState, BlockGibbsInfo]:
    leaves, treedef = jax.tree.flatten(state.position)
    label_arrays = _match_labels(labels, state.position, num_categories)
    uniform_leaves, first = [], 0
    sizes = [math.prod(label.shape) for label in label_arrays]
    # Every site is drawn once a step, so one number a site is enough for all blocks.
    uniform = uniforms(key, (sum(sizes),), jnp.result_type(*leaves))
    for label, size in zip(label_arrays, sizes, strict=True):
        uniform_leaves.append(uniform[first : first + size].reshape(label.shape))
        first += size

    def update(block, carry):
        leaves, _, was_finite = carry
        position = jax.tree.unflatten(treedef, leaves)
        energy, gradient, _ = value_and_gradient(energy_fn, params, position)
        new_leaves, is_finite = [], was_finite & jnp.isfinite(energy)
        for leaf, slope, label, draw in zip(
            leaves, jax.tree.leaves(gradient), label_arrays, uniform_leaves, strict=True
        ):
            is_block = label == block
            if isinstance(is_block, np.ndarray | np.bool_) and not is_block.any():
                new_leaves.append(leaf)
                continue
            new, is_known = _draw_sites(leaf, slope, draw, num_categories, temperature)
            is_drawn = is_known & is_block
            is_finite &= jnp.all(is_known | ~is_block)
            new = jnp.where(is_drawn if num_categories is None else is_drawn[..., None], new, leaf)
            # The energy is affine in the block, so its change is that of its tangent.
            change = jnp.where(new != leaf, slope * (new - leaf), 0.0)
            energy = energy + jnp.sum(change).astype(energy.dtype)
            new_leaves.append(new)
        return new_leaves, energy, is_finite

    carry = update(0, (leaves, None, jnp.array(True)))
    if num_blocks <= _MAX_UNROLLED_BLOCKS:
        for block in range(1, num_blocks):
            carry = update(block, carry)
    else:
        carry = jax.lax.fori_loop(1, num_blocks, update, carry)
    leaves, energy, is_finite = carry
    info = BlockGibbsInfo(energy, is_finite & jnp.isfinite(energy))
    return BlockGibbsState(jax.tree.unflatten(treedef, leaves)), info


def _draw_sites(leaf, gradient, uniform, num_categories, temperature):
    """New values of all sites of an array, and where the gradient allows to draw them."""
    if num_categories is None:
        logits = -gradient / temperature
        new = (uniform < jax.nn.sigmoid(logits)).astype(leaf.dtype)
        return new, jnp.isfinite(gradient)
    logits = -gradient / temperature
    new = choose_category(uniform, logits).astype(leaf.dtype)
    return new, jnp.isfinite(gradient).all(axis=-1)


def _match_labels(labels: _Labels, position: Position, num_categories) -> list[np.ndarray]:
    """The blocks of each leaf, with the shape of its sites."""
    leaves, treedef = jax.tree.flatten(position)
    if labels.treedef != treedef:
        raise ValueError(
            f"blocks has the structure {labels.treedef} and the position {treedef}; they must be "
            "the same."
        )
    matched = []
    for label, leaf in zip(labels.arrays, leaves, strict=True):
        shape = leaf.shape if num_categories is None else leaf.shape[:-1]
        if label.shape not in ((), shape):
            raise ValueError(
                f"blocks has shape {label.shape}; the sites of the position have shape {shape}."
            )
        matched.append(np.broadcast_to(label, shape))
    return matched


def color_graph(edges: npt.ArrayLike, num_sites: int) -> np.ndarray:
    """Blocks of sites without an edge within: a greedy colouring.

    The site that sees most colours comes next, so graphs that two colours can do (trees, lattices
    with even sides, layers) get two; never more than the largest degree plus one.

    Brélaz, "New methods to color the vertices of a graph", CACM 22 (1979).

    Args:
      edges: [number of edges, 2] integers, the pairs that interact.
      num_sites: N.

    Returns:
      [N] int, the block of each site, for ``block_gibbs``.

    Raises:
      ValueError: if an edge leaves the sites or joins a site with itself.

    >>> color_graph([(0, 1), (1, 2), (2, 3), (3, 0)], 4).tolist()
    [0, 1, 0, 1]
    """
    pairs = np.asarray(edges, int).reshape(-1, 2)
    if pairs.size and (pairs.min() < 0 or pairs.max() >= num_sites):
        raise ValueError(
            f"edges has sites from {pairs.min()} to {pairs.max()}; there are {num_sites}, from 0."
        )
    if np.any(pairs[:, 0] == pairs[:, 1]):
        raise ValueError("edges has an edge from a site to itself, which no block can hold.")
    neighbours: list[set[int]] = [set() for _ in range(num_sites)]
    for first, second in pairs.tolist():
        neighbours[first].add(second)
        neighbours[second].add(first)
    colors = np.full(num_sites, -1)
    seen: list[set[int]] = [set() for _ in range(num_sites)]
    queue = [(0, -len(neighbours[site]), site) for site in range(num_sites)]
    heapq.heapify(queue)
    while queue:
        saturation, _, site = heapq.heappop(queue)
        if colors[site] >= 0 or -saturation != len(seen[site]):
            continue
        colors[site] = next(color for color in range(num_sites) if color not in seen[site])
        for other in neighbours[site]:
            if colors[other] < 0:
                seen[other].add(int(colors[site]))
                heapq.heappush(queue, (-len(seen[other]), -len(neighbours[other]), other))
    return colors
