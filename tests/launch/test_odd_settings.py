"""Any value of any setting is accepted, or refused by one sentence that names a setting."""

import contextlib
import dataclasses
import io
import types

import hypothesis
import hypothesis.strategies as st
import jax
import pytest

from ebjax.loading import RECIPES
from ebjax.training import init_state
from launch import command, train
from launch.runs import UserError, find_recipe, make_config

NUMBERS = (
    *(-1, 0, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**32, 10**30, 10**400),
    *(-1.0, 0.0, 0.5, 1.0, 3.5, 1e-30, 1e30, 1e300, float("nan"), float("inf"), -float("inf")),
)
TEXTS = ("", " ", "text", "nan", "-1", "../x", "\n", "\x00")
OTHERS = (None, True, False, b"text", {}, {"a": 1}, [1], [[1]], {1})
ENTRIES = st.sampled_from((*NUMBERS, *TEXTS, None, True))
VALUES = st.one_of(
    st.sampled_from((*NUMBERS, *TEXTS, *OTHERS)),
    st.lists(ENTRIES, max_size=3).map(tuple),
    st.integers(),
    st.floats(),
    st.text(max_size=9),
)
# As flags; without widths that just fit into memory, which cost minutes.
WRITTEN = (
    *("", "text", "nan", "inf", "-inf", "None", "True", "../x", "é", "1e30", "1e-30", "1e300"),
    *("-1", "0", "1", "2", "3", "7", "0.5", "3.5", "-0.0", "2147483648", "1" + 30 * "0"),
    *("()", "(1,)", "(0,)", "(-1,)", "(1, 2, 3)", "('a',)", "(1.0,)", "(", "[1]", "{}", "1,2"),
)

# Data that are made in a moment.
FAST = {"eb_gfn": ("--config.num_examples=20", "--config.num_held_out=20")}


def _fields(name):
    return sorted(field.name for field in dataclasses.fields(find_recipe(name).config))


@pytest.mark.parametrize("name", RECIPES)
def test_values_of_python_are_accepted_or_named(name):
    recipe, fields = find_recipe(name), _fields(name)

    @hypothesis.settings(derandomize=True, database=None, max_examples=150, deadline=None)
    @hypothesis.given(st.sampled_from(fields), VALUES)
    def check(field, value):
        refused = ""
        try:
            assert type(make_config(recipe, {field: value})) is recipe.config
        except UserError as error:
            refused = str(error)
        assert "\n" not in refused
        assert not refused or any(f"{other} is " in refused for other in fields)

    check()


@pytest.fixture(scope="module")
def untrained():
    """``launch.train`` up to the first state, of which only shapes are computed."""

    def checked_state(start, held):
        run, config = start.run, start.plan.config
        if run.source.load is None:
            jax.eval_shape(lambda: init_state(run, config))
        return types.SimpleNamespace(step=0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_checked_state", checked_state)
        patch.setattr(train, "_carry_out", lambda *args: 0)
        yield


@pytest.mark.parametrize("name", command.builtin_configs())
def test_values_of_flags_are_accepted_or_named(untrained, tmp_path, name):
    fields = _fields(name)

    @hypothesis.settings(derandomize=True, database=None, max_examples=12, deadline=None)
    @hypothesis.given(st.sampled_from(fields), st.sampled_from(WRITTEN))
    def check(field, value):
        err = io.StringIO()
        args = [f"--config={name}", *FAST.get(name, ()), f"--config.{field}={value}"]
        args.append(f"--workdir={tmp_path / 'run'}")
        with contextlib.redirect_stderr(err), pytest.raises(SystemExit) as exit_:
            train.main(["launch.train", *args])
        said = err.getvalue()
        if exit_.value.code == 0:
            assert said == ""
        else:
            assert exit_.value.code in (1, 2)
            assert said.startswith("launch.train: ")
            assert said.endswith(".\n")
            assert said.count("\n") == 1
            assert "Traceback" not in said
            assert exit_.value.code == 1 or any(other in said for other in (*fields, repr(value)))
        assert not (tmp_path / "run").exists()

    check()
