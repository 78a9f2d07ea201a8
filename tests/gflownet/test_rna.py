"""RNA binding: ViennaRNA where it is installed, and a sentence where it is not."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gflownet.environments.rna import LETTERS, RNA_TARGETS, rna_binding, rna_score_fn
from gflownet.environments.sequences import SequenceState


def _tokens(letters):
    return np.array([LETTERS.index(letter) for letter in letters])


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "RNA", None)
    with pytest.raises(ValueError, match=r"pip install 'ebjax\[rna\]'"):
        rna_binding(length=3)


def test_impossible_arguments_are_named():
    with pytest.raises(ValueError, match="length is 0"):
        rna_binding(length=0)
    with pytest.raises(ValueError, match="largest_score 0"):
        rna_binding(length=3, largest_score=0.0)
    pytest.importorskip("RNA")
    with pytest.raises(ValueError, match="target is 'L14_RNA9'"):
        rna_binding("L14_RNA9")


def test_targets_have_a_hundred_letters():
    assert {len(strand) for strand in RNA_TARGETS.values()} == {100}


def test_scores_are_those_of_the_published_landscape():
    pytest.importorskip("RNA")
    score = rna_score_fn("L14_RNA1", 14)
    # 19.8 kcal/mol of the 36.414 that 14 letters have on average in the perfect duplex.
    np.testing.assert_allclose(score(_tokens("AUGGGCCGGACCCC")[None]), [19.8 / 36.414], rtol=1e-5)


def test_table_and_host_callback_agree(monkeypatch):
    pytest.importorskip("RNA")
    table = rna_binding(length=4, exponent=2.0, largest_score=1.5)
    # Longer strands are folded on the host, one batch a call.
    monkeypatch.setattr("gflownet.environments.rna.MAX_TABLE_LENGTH", 3)
    called = rna_binding(length=4, exponent=2.0, largest_score=1.5)
    tokens = jnp.asarray(np.random.default_rng(0).integers(4, size=(10, 4)), jnp.int32)
    states = SequenceState(tokens, jnp.zeros(10, bool))
    values = [
        jax.jit(jax.vmap(environment.log_reward, (None, 0)))((), states)
        for environment in (table, called)
    ]
    np.testing.assert_allclose(values[0], values[1], rtol=1e-5)
    score = rna_score_fn("L14_RNA1", 4)(np.asarray(tokens))
    expected = np.log(10.0) + 2.0 * (np.log(np.maximum(score, 1e-3)) - np.log(1.5))
    np.testing.assert_allclose(values[1], expected, rtol=1e-5)
    assert called.log_z is None
