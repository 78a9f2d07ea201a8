"""What a benchmark times: a fixed amount of work that can be done again and again.

Conventions of all workloads. p(x) is proportional to exp(-E(x)); trajectory balance is the mean
over trajectories of (log_z + sum log_pf - sum log_pb - log R(x))^2; the length of one counts its
transitions, the stop included; one Langevin step is
    x <- x - step_size * grad E(x) + noise_scale * sqrt(2 * step_size) * standard normal.
Shapes: B batch or trajectories, C chains, D grid dimensions, M mixture modes, T time.
"""

import importlib
import time
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import jax

__all__ = ["PeerMissing", "Workload", "compile_ahead", "import_peer"]

INSTALL = {
    "gfnx": "pip install 'ebjax[bench]' && pip install --no-deps gfnx",
    "torchgfn": "pip install 'ebjax[bench]' && pip install --no-deps torchgfn",
    "torchebm": "pip install 'ebjax[bench]'",
    "blackjax": "pip install 'ebjax[bench]'",
    "numpyro": "pip install 'ebjax[bench]'",
    "thrml": "pip install 'ebjax[bench]'",
}


class PeerMissing(ImportError):  # noqa: N818 (the name says what happened)
    """A peer library (or one of its own dependencies) cannot be imported.

    Args:
        name: the peer, as `pip` knows it.
        how_to_install: a shell command that installs it.
    """

    def __init__(self, name: str, how_to_install: str) -> None:
        super().__init__(f"The peer {name} cannot be imported. To install: {how_to_install}")
        self.name = name
        self.how_to_install = how_to_install


class Workload(NamedTuple):
    """A fixed amount of work that can be timed again and again.

    Attributes:
        name: the library, and what it does.
        run: does the work, waits for the device, and returns measured facts; keeps its state.
        warm_up_seconds: seconds that tracing, compiling or filling a buffer took beforehand.
        note: what a reader of the timing has to know.
    """

    name: str
    run: Callable[[], Mapping[str, float]]
    warm_up_seconds: float
    note: str


def import_peer(module: str, *, peer: str) -> ModuleType:
    """Imports `module`, or raises `PeerMissing` with the command that installs `peer`."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PeerMissing(peer, INSTALL[peer]) from error


def compile_ahead(
    function: Callable[..., Any], *arguments: Any
) -> tuple[Callable[..., Any], float]:
    """The compiled `function` for these arguments, and the seconds that it took."""
    started = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    return compiled, time.perf_counter() - started
