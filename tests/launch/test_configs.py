"""Configs as flags see them."""

import dataclasses

import pytest

from ebjax.loading import RECIPES
from gflownet.recipes.learners import LEARNERS
from launch import tables
from launch.runs import default_config, find_recipe, make_config


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_settings_that_follow_another_stay_open_for_flags(name):
    config = find_recipe(name).config
    made = config()
    fields = {field.name: field for field in dataclasses.fields(config)}
    for field in fields.values():
        if getattr(made, field.name) != field.default:
            # Else the flag of the other setting would not reach this one.
            assert field.metadata.get("follows") in fields, field.name
            assert default_config(name)[field.name] == field.default


@pytest.mark.parametrize(
    ("name", "changed", "expected"),
    [
        ("hypergrid", {"objective": "fm"}, {"backward_policy": "uniform", "learning_rate": 1e-3}),
        ("hypergrid", {"objective": "mdb"}, {"residual_loss": "huber", "learning_rate": 2e-3}),
        ("density", {"dataset": "pinwheel"}, {"kernel": "mala", "langevin_step_size": 0.005}),
        ("sequences", {"task": "rna"}, {"order": "prepend_append"}),
    ],
)
def test_settings_follow_the_flag_of_another(name, changed, expected):
    settings = default_config(name)
    settings.update(changed)
    made = make_config(find_recipe(name), settings.to_dict())
    assert {field: getattr(made, field) for field in expected} == expected


def test_the_table_of_flows_has_every_objective():
    assert set(tables.FLOW_OBJECTIVES) == set(LEARNERS)
