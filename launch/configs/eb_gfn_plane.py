"""Settings of EB-GFN in the plane; ``launch.train --config=eb_gfn_plane --help`` explains each."""

from launch.runs import default_config


def get_config():
    """The recipe's defaults, to be overridden by ``--config.field=value``."""
    return default_config("eb_gfn_plane")
