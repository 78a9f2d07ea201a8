"""The examples in docstrings run, and print what they say."""

import doctest
import importlib
import pkgutil

import pytest

import ebjax
import gflownet


def _modules():
    names = ["launch.runs"]
    for package in (ebjax, gflownet):
        names.append(package.__name__)
        prefix = f"{package.__name__}."
        names += [module.name for module in pkgutil.walk_packages(package.__path__, prefix)]
    return sorted(names)


@pytest.mark.parametrize("name", _modules())
def test_examples(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples of {name} failed"


def test_the_runner_sees_a_wrong_example():
    example = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    assert doctest.DocTestRunner(verbose=False).run(example, out=lambda _: None).failed == 1
