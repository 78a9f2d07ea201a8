"""README: its code runs, its commands exist, its test command is the one that CI runs."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands(module):
    """Every call of a command in README, without the interpreter."""
    lines = re.findall(rf"-m {re.escape(module)}([^\n`]*)", README)
    return [shlex.split(line.split("#")[0]) for line in lines]


@pytest.mark.parametrize("source", blocks("python"), ids=lambda s: s.strip().splitlines()[0][:40])
def test_python_blocks_run(source, capsys):
    exec(compile(source, "README.md", "exec"), {"__name__": "readme"})
    expected = re.findall(r"# prints (.*)", source)
    assert capsys.readouterr().out.splitlines()[: len(expected)] == expected


def test_ci_runs_the_test_command_of_readme():
    test_commands = [
        line for block in blocks("bash") for line in block.splitlines() if "pytest" in line
    ]
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert test_commands
    assert test_commands[0] in ci


@pytest.mark.parametrize(
    "module", ["launch.train", "launch.sample", "launch.evaluate", "launch.benchmark"]
)
def test_flags_in_readme_exist(module):
    import importlib

    command = importlib.import_module(module).COMMAND
    calls = commands(module)
    assert calls
    for arguments in calls:
        for argument in arguments:
            if argument.startswith("--"):
                name = argument[2:].split("=")[0].split(".")[0]
                assert name in command.flags or name == "help", argument


def test_linked_files_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
