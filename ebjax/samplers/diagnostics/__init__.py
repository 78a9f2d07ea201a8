"""How good draws are: convergence, Monte Carlo error, distance from a law, speed."""

from ebjax.samplers.diagnostics.convergence import (
    autocorrelation,
    effective_sample_size,
    integrated_autocorrelation_time,
    monte_carlo_error,
    r_hat,
)
from ebjax.samplers.diagnostics.discrepancy import (
    LogZInterval,
    kernel_stein_discrepancy,
    log_z_interval,
    maximum_mean_discrepancy,
)
from ebjax.samplers.diagnostics.report import (
    Efficiency,
    Summary,
    efficiency,
    summary,
    to_arviz,
)

__all__ = [
    "Efficiency",
    "LogZInterval",
    "Summary",
    "autocorrelation",
    "effective_sample_size",
    "efficiency",
    "integrated_autocorrelation_time",
    "kernel_stein_discrepancy",
    "log_z_interval",
    "maximum_mean_discrepancy",
    "monte_carlo_error",
    "r_hat",
    "summary",
    "to_arviz",
]
