"""Settings that every run has, checked when they are made."""

from __future__ import annotations

import dataclasses
import math
import types
from typing import Any

from ebjax.parallel import BACKENDS

__all__ = ["TrainingConfig", "check_at_least", "check_between", "check_widths", "setting"]


_LARGEST_FLOAT = 3.4028234663852886e38  # of 32 bits


def setting(default: Any, help: str = "", *, follows: str | None = None) -> Any:
    """A dataclass field with a default and a line of help for the command line.

    A field that ``follows`` another one is open, -1 or "auto", by default, and then takes the value
    that suits the other. A run keeps the value that it was made with, also when the other field is
    changed later. A field of the base class that is
    declared again, with another default and without help, keeps the help that it had.
    """
    return dataclasses.field(default=default, metadata={"help": help, "follows": follows})


def _check_type(name: str, value: Any, default: Any) -> None:
    """Raises ``ValueError`` unless a value has the type of a default, and numbers fit 32 bits."""
    if type(value) is not type(default) and not (isinstance(default, float) and _is_number(value)):
        raise ValueError(f"{name} is {value!r}; it must be of type {type(default).__name__}.")
    entries = value if isinstance(value, tuple) else (value,)
    if isinstance(default, tuple) and default:
        kind = type(default[0])
        if any(type(entry) is not kind for entry in entries):
            raise ValueError(f"{name} is {value!r}; its entries must be of type {kind.__name__}.")
    for entry in filter(_is_number, entries):
        if isinstance(entry, float) or isinstance(default, float):
            if not abs(entry) <= _LARGEST_FLOAT:
                raise ValueError(f"{name} is {value!r}; it must be finite, as a number of 32 bits.")
        elif name != "seed" and not -(2**31) <= entry < 2**31:
            raise ValueError(f"{name} is {value!r}; it must be an integer of 32 bits.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_at_least(config: Any, minimum: float, *names: str) -> None:
    """Raises ``ValueError`` unless each named field is a finite number of at least ``minimum``."""
    for name in names:
        value = getattr(config, name)
        if not (math.isfinite(value) and value >= minimum):
            raise ValueError(f"{name} is {value}; it must be at least {minimum}.")


def check_between(config: Any, low: float, high: float, *names: str) -> None:
    """Raises ``ValueError`` unless each named field lies in [low, high]."""
    for name in names:
        value = getattr(config, name)
        if not low <= value <= high:
            raise ValueError(f"{name} is {value}; it must lie between {low} and {high}.")


def check_widths(config: Any, *names: str) -> None:
    """Raises ``ValueError`` unless each named field is a tuple of at least one positive width."""
    for name in names:
        widths = getattr(config, name)
        if not widths or min(widths) < 1:
            raise ValueError(f"{name} is {widths}; give at least one positive width.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of the training loop. Recipes derive their own config from it.

    Raises:
      ValueError: naming the field, its value and what is accepted.
    """

    seed: int = setting(0, "seed of everything random; the same seed gives the same run")
    num_steps: int = setting(1000, "updates in all; may be raised later to go on with a run")
    batch_size: int = setting(128, "examples (or trajectories) of one update, over all devices")
    log_every: int = setting(100, "steps between lines of metrics.jsonl")
    checkpoint_every: int = setting(500, "steps between checkpoints")
    keep_last: int = setting(2, "how many of the newest checkpoints are kept")
    keep_best: int = setting(1, "how many of the best ones are kept beside them")
    steps_per_call: int = setting(10, "updates in one dispatch; metrics are means over these")
    num_devices: int = setting(0, "devices to use; 0 takes as many as divide batch_size")
    backend: str = setting("pmap", f"how devices are driven: {' or '.join(BACKENDS)}")
    ema_decay: float = setting(0.999, "decay of the averaged parameters, used for sampling")
    loss_limit: float = setting(
        0.0, "a loss of a larger size counts as divergence; 0: only one that is not finite"
    )
    max_rollbacks: int = setting(
        0, "how often a run that diverges goes back to its last checkpoint before it stops"
    )
    rollback_factor: float = setting(0.5, "share of the learning rate that a rollback leaves")

    # Settings that a run may change when it goes on: they do not touch what is computed.
    RESUMABLE = frozenset(
        [
            "num_steps",
            "checkpoint_every",
            "keep_last",
            "keep_best",
            "num_devices",
            "backend",
            "max_rollbacks",
        ]
    )

    def __init_subclass__(cls) -> None:
        """Fields declared again without help keep the help that they had."""
        inherited = getattr(cls.__mro__[1], "__dataclass_fields__", {})
        for name, field in vars(cls).items():
            if isinstance(field, dataclasses.Field) and not field.metadata["help"]:
                kept = inherited[name].metadata["help"]
                field.metadata = types.MappingProxyType({**field.metadata, "help": kept})

    def __new__(cls, **settings: Any) -> TrainingConfig:
        """Checks types, before a subclass looks at the values."""
        for field in dataclasses.fields(cls):
            if field.name in settings:
                _check_type(field.name, settings[field.name], field.default)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Fills in fields that follow others, and checks ranges."""
        for field in dataclasses.fields(self):
            followed = field.metadata.get("follows")
            if followed is not None and getattr(self, field.name) == -1:
                object.__setattr__(self, field.name, getattr(self, followed))
        check_between(self, 0, 2**32 - 1, "seed")  # what a key holds; more would repeat itself
        check_at_least(self, 0, "keep_best", "num_devices", "loss_limit", "max_rollbacks")
        check_at_least(
            self, 1, "batch_size", "log_every", "checkpoint_every", "keep_last", "steps_per_call"
        )
        check_between(self, 1, 2**31 - 1, "num_steps")  # counted in int32
        check_between(self, 0, 0.999999, "ema_decay")
        check_between(self, 0.001, 1, "rollback_factor")
        if self.backend not in BACKENDS:
            raise ValueError(
                f"backend is {self.backend!r}; it must be one of {', '.join(BACKENDS)}."
            )
