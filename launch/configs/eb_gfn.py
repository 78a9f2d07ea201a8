"""Settings of the EB-GFN run; ``launch.train --config=eb_gfn --help`` explains each one."""

from launch.runs import default_config


def get_config():
    """The recipe's defaults, to be overridden by ``--config.field=value``."""
    return default_config("eb_gfn")
