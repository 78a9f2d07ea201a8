"""Settings are checked when they are made, and errors name the field and its value."""

import dataclasses

import pytest

from ebjax.training import TrainingConfig, choose_devices, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(TrainingConfig):
    widths: tuple[int, ...] = setting((8,), "widths")
    decay_steps: int = setting(-1, "steps", follows="num_steps")
    kind: str = setting("this", "kind")

    def __post_init__(self):
        if self.kind not in {"this"}:  # asks for a hash before the base class looks
            raise ValueError(f"kind is {self.kind!r}; it must be this.")
        super().__post_init__()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"num_steps": -5}, "num_steps is -5; it must lie between 1 and 2147483647"),
        ({"num_steps": 2**31}, "num_steps is 2147483648"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"log_every": 0}, "log_every is 0"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0"),
        ({"keep_last": 0}, "keep_last is 0"),
        ({"steps_per_call": 0}, "steps_per_call is 0"),
        ({"num_devices": -1}, "num_devices is -1"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"ema_decay": float("nan")}, "ema_decay is nan"),
        ({"backend": "tpu"}, "backend is 'tpu'; it must be one of pmap, shard_map"),
        ({"batch_size": 1.5}, "batch_size is 1.5; it must be of type int"),
        ({"batch_size": True}, "batch_size is True; it must be of type int"),
        ({"ema_decay": "high"}, "ema_decay is 'high'; it must be of type float"),
        ({"ema_decay": True}, "ema_decay is True; it must be of type float"),
        ({"widths": 8}, "widths is 8; it must be of type tuple"),
        ({"widths": (8, "a")}, "widths is .*; its entries must be of type int"),
        ({"widths": (8, 1.5)}, "widths is .*; its entries must be of type int"),
        ({"batch_size": 2**31}, "batch_size is 2147483648; it must be an integer of 32 bits"),
        ({"widths": (8, -(10**400))}, "widths is .*; it must be an integer of 32 bits"),
        ({"loss_limit": float("inf")}, "loss_limit is inf; it must be finite"),
        ({"loss_limit": 10**400}, "loss_limit is 10000.*; it must be finite, as a number of 32"),
        ({"loss_limit": 1e39}, "loss_limit is 1e[+]39; it must be finite"),
        ({"kind": {}}, "kind is {}; it must be of type str"),
        ({"kind": "other"}, "kind is 'other'; it must be this"),
    ],
)
def test_impossible_values_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Config(**settings)


def test_a_number_without_a_fraction_is_a_float():
    assert Config(ema_decay=0).ema_decay == 0


def test_a_field_follows_another_one():
    assert Config(num_steps=50).decay_steps == 50
    assert Config(num_steps=50, decay_steps=0).decay_steps == 0


def test_devices_are_chosen_by_the_batch():
    assert [len(choose_devices(size)) for size in (8, 12, 7, 5, 1, 64)] == [8, 6, 7, 5, 1, 8]
    assert len(choose_devices(12, 2)) == 2
    with pytest.raises(ValueError, match="num_devices is 9; this machine has 8 cpu devices"):
        choose_devices(18, 9)
    with pytest.raises(ValueError, match="batch_size is 10; it must be a multiple of the 4"):
        choose_devices(10, 4)
