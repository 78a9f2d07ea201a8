"""Compiling with little optimisation: tests compile thousands of programs and run each once."""

import jax

OPTIONS = {"xla_backend_optimization_level": 0}
# Later versions have lost the option, and end a process that is given one they do not know.
if jax.__version_info__ < (0, 11):
    OPTIONS["xla_cpu_use_fusion_emitters"] = False

FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in OPTIONS.items())
