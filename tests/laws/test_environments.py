"""The contract, checked on every environment. A new one is a row of ``SMALL`` or ``ENVIRONMENTS``.

``gflownet.testing.check_environment`` is what users run on theirs; the planted bugs show that it
catches what it says.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "gflownet"))

from small_environments import DIAMOND_EDGES, DIAMOND_LOG_REWARD, SMALL, diamond, from_edges, sets

from gflownet import environments
from gflownet.environments import hypergrid
from gflownet.testing import EnvironmentCheckError, check_environment

RNG = np.random.default_rng(0)
SPECIES = dict(zip("abcd", ("AACGT-A", "AACCTGR", "GTCCTGA", "GTAGTGC"), strict=True))


def digits(params, tokens):
    """A reward that tells all sequences apart."""
    del params
    return jnp.sum(jnp.sqrt(1.0 + tokens) * (1.0 + jnp.arange(len(tokens))))


ENVIRONMENTS = {
    **SMALL,
    "hypergrid_1x2": lambda: hypergrid(dim=1, side=2),
    "hypergrid_4x3": lambda: hypergrid(dim=4, side=3),
    "hypergrid_6x8": lambda: hypergrid(dim=6, side=8),  # not enumerated
    "sets_4_2": lambda: environments.sets([0.3, -0.2, 0.9, 0.1], 2),
    "sets_small": lambda: environments.benchmark_sets("small"),
    "append": lambda: environments.sequences(digits, vocabulary=3, length=3),
    "append_with_stop": lambda: environments.sequences(
        digits, vocabulary=2, length=3, min_length=1
    ),
    "both_ends_with_stop": lambda: environments.sequences(
        digits, vocabulary=2, length=4, min_length=0, order="prepend_append"
    ),
    "any_order": lambda: environments.sequences(
        digits, vocabulary=2, length=3, order="any_order", observe_tokens=True
    ),
    "table": lambda: environments.table_sequences(
        RNG.uniform(size=27), vocabulary=3, length=3, exponent=2.0, scale=5.0
    ),
    "spins": lambda: environments.discrete_energy(
        lambda params, x: x @ jnp.roll(x, 1) + x[0],
        num_variables=4,
        values=(-1.0, 1.0),
        energy_of_unknown=lambda params, x, known: x @ jnp.roll(x, 1) + x[0],
    ),
    "bits_8": lambda: environments.bit_sequences(num_bits=8, bits_per_word=4, order="any_order"),
    "bits_120": environments.bit_sequences,
    **{
        problem: functools.partial(
            environments.graph_problem,
            problem,
            environments.random_clique_graph(0, num_cliques=3, clique_size=3, tightness=0.4),
        )
        for problem in environments.GRAPH_PROBLEMS
    },
    "cuts_of_several_graphs": lambda: environments.graph_problem(
        "cut",
        np.stack(
            [
                environments.preferential_graph(i, num_vertices=16, num_neighbours=2)
                for i in range(2)
            ]
        ),
    ),
    "dags_3": lambda: environments.dags(RNG.normal(size=(3, 8))),
    "phylogeny_4": lambda: environments.phylogeny(environments.encode_sites(SPECIES)),
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_contract(name):
    check_environment(ENVIRONMENTS[name]())


# Planted bugs: each is caught with the words that it names.

GRID = hypergrid(dim=2, side=4)
SETS = sets()
CYCLE = [*DIAMOND_EDGES, (0, 3, 2)]
UNREACHABLE = from_edges([*DIAMOND_EDGES, (6, 1, 1)], [*DIAMOND_LOG_REWARD, 0.0], 4, 3)
BUGS = {
    "forward mask open at the border": (
        "changes nothing",
        GRID._replace(
            forward_mask=lambda s: jnp.append(s.position < 4, True) & ~s.stopped  # side is 4
        ),
    ),
    "backward mask open at the corner": (
        "changes nothing",
        GRID._replace(
            backward_mask=lambda s: jnp.append((s.position >= 0) & ~s.stopped, s.stopped)
        ),
    ),
    "backward mask of the parent": (
        "does not allow the way back",
        GRID._replace(backward_mask=lambda s: GRID.backward_mask(GRID.undo(s, 0))),
    ),
    "undo of the wrong coordinate": (
        "the way back",
        GRID._replace(undo=lambda s, a: GRID.undo(s, jnp.where(a < 2, 1 - a, a))),
    ),
    "undo of a stop forgets to restart": (
        "the way back does not lead here",
        GRID._replace(undo=lambda s, a: GRID.undo(s, a)._replace(stopped=s.stopped)),
    ),
    "a cycle": ("max_length|cycle", from_edges(CYCLE, DIAMOND_LOG_REWARD, 4, 3)),
    "a state out of reach": ("no parent", UNREACHABLE),
    "max_length without the stop": ("longest path has 7", GRID._replace(max_length=6)),
    "max_length too large": ("longest path has 3", diamond()._replace(max_length=4)),
    "walking on after the stop": (
        "the way back|stop",
        GRID._replace(forward_mask=lambda s: jnp.append(s.position < 3, ~s.stopped)),
    ),
    "several parents of a stop": (
        "the way back|stop",
        GRID._replace(backward_mask=lambda s: jnp.append(s.position > 0, s.stopped)),
    ),
    "a step that changes dtype": (
        "step makes a state",
        GRID._replace(
            step=lambda s, a: GRID.step(s, a)._replace(position=s.position.astype(float))
        ),
    ),
    "a mask of numbers": (
        "forward_mask is int32",
        GRID._replace(forward_mask=lambda s: GRID.forward_mask(s).astype(jnp.int32)),
    ),
    "index of the reversed position": (
        "state_index",
        GRID._replace(
            state_index=lambda s: GRID.state_index(s._replace(position=s.position[::-1]))
        ),
    ),
    "enumeration without the complete sets": (
        "No state is terminal",
        SETS._replace(enumerate=lambda: SETS.enumerate()[SETS.enumerate().sum(1) < 3]),
    ),
    "a reward of zero": (
        "log_reward is -inf",
        SETS._replace(log_reward=lambda p, s: jnp.where(s[0] & s[1] & s[2], -jnp.inf, 0.0)),
    ),
    "states that look alike": (
        "the same observation",
        GRID._replace(observe=lambda s: s.position.sum(keepdims=True)),
    ),
    "log Z of sets with repeats": ("log_z is", SETS._replace(log_z=SETS.log_z + 0.01)),
    "energy of the empty set": (
        "intermediate_energy is",
        SETS._replace(intermediate_energy=lambda p, s: 1.0 - SETS.log_reward(p, s)),
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug):
    message, environment = BUGS[bug]
    with pytest.raises(EnvironmentCheckError, match=message):
        check_environment(environment, num_walks=16)


def test_bugs_are_caught_without_an_enumeration():
    large = hypergrid(dim=6, side=8)
    broken = large._replace(undo=lambda s, a: large.undo(s, jnp.where(a < 2, 1 - a, a)))
    with pytest.raises(EnvironmentCheckError, match="the way back"):
        check_environment(broken)
    endless = large._replace(max_length=20)
    with pytest.raises(EnvironmentCheckError, match="goes on after max_length = 20"):
        check_environment(endless, num_walks=256)
