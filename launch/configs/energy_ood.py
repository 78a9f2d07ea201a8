"""Settings of the energy of foreign images; ``launch.train --config=energy_ood --help`` has all."""

from launch.runs import default_config


def get_config():
    """The recipe's defaults, to be overridden by ``--config.field=value``."""
    return default_config("energy_ood")
