"""Sequential Monte Carlo: populations of particles, weighted and resampled."""

from ebjax.samplers.smc.feynman_kac import (
    FeynmanKac,
    Population,
    StepInfo,
    feynman_kac,
    feynman_kac_step,
    log_z_variance,
    resample,
    reweight,
    start,
)
from ebjax.samplers.smc.path import (
    GeometricPath,
    PowerPath,
    geometric_path,
    normal_energy,
    power_path,
)
from ebjax.samplers.smc.population import TemperatureInfo
from ebjax.samplers.smc.resampling import (
    RESAMPLERS,
    conditional_effective_sample_size,
    effective_sample_size,
    log_mean_exp,
    multinomial,
    residual,
    stratified,
    systematic,
)
from ebjax.samplers.smc.reverse_diffusion import (
    DiffusionParticle,
    ReverseDiffusion,
    reverse_diffusion,
    reverse_diffusion_sample,
    reverse_diffusion_smc,
)
from ebjax.samplers.smc.tempered import TemperedSamples, ais_log_z, smc_sample

__all__ = [
    "RESAMPLERS",
    "DiffusionParticle",
    "FeynmanKac",
    "GeometricPath",
    "Population",
    "PowerPath",
    "ReverseDiffusion",
    "StepInfo",
    "TemperatureInfo",
    "TemperedSamples",
    "ais_log_z",
    "conditional_effective_sample_size",
    "effective_sample_size",
    "feynman_kac",
    "feynman_kac_step",
    "geometric_path",
    "log_mean_exp",
    "log_z_variance",
    "multinomial",
    "normal_energy",
    "power_path",
    "resample",
    "residual",
    "reverse_diffusion",
    "reverse_diffusion_sample",
    "reverse_diffusion_smc",
    "reweight",
    "smc_sample",
    "start",
    "stratified",
    "systematic",
]
