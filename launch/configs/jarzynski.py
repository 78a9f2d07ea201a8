"""Settings of the run on two modes; ``launch.train --config=jarzynski --help`` explains them."""

from launch.runs import default_config


def get_config():
    """The recipe's defaults, to be overridden by ``--config.field=value``."""
    return default_config("jarzynski")
