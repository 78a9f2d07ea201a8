"""Settings of two laws composed; ``launch.train --config=composition --help`` explains each one."""

from launch.runs import default_config


def get_config():
    """The recipe's defaults, to be overridden by ``--config.field=value``."""
    return default_config("composition")
