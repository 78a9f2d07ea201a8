"""Settings of the run; ``launch.train --config=graph_problems --help`` explains each one."""

from launch.runs import default_config


def get_config():
    """The recipe's defaults, to be overridden by ``--config.field=value``."""
    return default_config("graph_problems")
