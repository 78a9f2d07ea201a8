"""Sources: each pass sees each row once, and streaming gives the same batches bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.data import Dataset, array_source, load_dataset, split_index, stream_source
from ebjax.data.sources import _load
from ebjax.numerics import shuffled_index

KEY = jax.random.key(7)


def batch_of(source, positions, arrays=None):
    arrays = source.arrays if arrays is None else arrays
    positions = jnp.asarray(positions, jnp.uint32)
    return jax.vmap(source.example, (None, None, 0))(arrays, KEY, positions)


def scaled(key, x):
    return x.astype(jnp.float32) / 128.0 - 1.0 + 0.1 * jax.random.bernoulli(key)


@pytest.fixture
def memory_map(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (37, 3, 2)).astype(np.uint8)
    np.save(tmp_path / "images.npy", images)
    dataset = load_dataset(tmp_path / "images.npy")
    assert isinstance(dataset.examples, np.memmap)
    return dataset._replace(labels=np.arange(37, dtype=np.int32))


def test_each_pass_sees_each_row_once_with_its_label():
    dataset = Dataset(np.arange(12.0), np.arange(12, dtype=np.int32) * 2)
    x, labels = batch_of(array_source(dataset), np.arange(24))
    assert sorted(x[:12].tolist()) == sorted(x[12:].tolist()) == list(range(12))
    assert (labels == 2 * x).all()
    assert x[:12].tolist() != x[12:].tolist()
    alone = batch_of(array_source(dataset, with_labels=False), np.arange(24))
    assert np.array_equal(alone, x)


def test_noise_and_bounds_and_transform():
    data = np.zeros((5, 1000), np.float32)
    noisy = batch_of(array_source(data, noise=0.5), np.arange(4))
    assert abs(float(noisy.std()) - 0.5) < 5 * 0.5 / np.sqrt(2 * noisy.size)
    assert not np.array_equal(noisy[0], noisy[1])
    clipped = batch_of(array_source(data, noise=0.5, bounds=(-0.1, 0.2)), np.arange(4))
    assert np.array_equal(clipped, jnp.clip(noisy, -0.1, 0.2))
    counts = np.array([[0], [128], [255]], np.uint8)
    source = array_source(counts, transform=scaled, noise=1e-3)
    assert source.arrays["examples"].dtype == jnp.uint8
    assert batch_of(source, np.arange(3)).dtype == jnp.float32
    bools = batch_of(array_source(np.ones((3, 2), bool), noise=0.1), np.arange(3))
    assert bools.dtype == jnp.float32


@pytest.mark.parametrize("first", [0, 30, 2**32 - 5])
def test_streaming_equals_memory_bit_for_bit(memory_map, first):
    options = {"noise": 0.1, "bounds": (-1.0, 1.0), "transform": scaled}
    positions = (first + np.arange(50)) % 2**32
    expected = batch_of(array_source(memory_map, **options), positions)
    source = stream_source(memory_map, **options)
    arrays = source.load(KEY, first, 50)
    assert arrays["examples"].dtype == np.uint8  # as stored; scaled on the device
    streamed = batch_of(source, positions, arrays)
    for a, b in zip(streamed, expected, strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))
    # Planted bugs, seen by the same comparison: a stream one row late, and another key.
    for wrong in (source.load(KEY, first + 1, 50), source.load(jax.random.key(8), first, 50)):
        late = batch_of(source, positions, wrong | {"first": arrays["first"]})
        assert not np.array_equal(np.asarray(late[1]), np.asarray(expected[1]))


def test_long_reads_are_cut_into_chunks(memory_map, monkeypatch):
    source = stream_source(memory_map)
    num = 5000  # more than one chunk
    labels = source.load(KEY, 3, num)["labels"]
    positions = jnp.asarray(3 + np.arange(num), jnp.uint32)
    rows = jax.vmap(shuffled_index, (None, 0, None))(KEY, positions, 37)
    assert np.array_equal(labels, np.asarray(rows))


def test_rows_of_a_split_only(memory_map):
    training, _ = split_index(37, 10, seed=0)
    source = stream_source(memory_map, index=training)
    _, labels = batch_of(source, np.arange(27), source.load(KEY, 0, 27))
    assert sorted(labels.tolist()) == sorted(training.tolist())
    in_memory = Dataset(memory_map.examples[training], memory_map.labels[training])
    _, expected = batch_of(array_source(in_memory), np.arange(27))
    assert np.array_equal(labels, expected)


def test_memory_maps_are_read_forwards_and_each_row_once(memory_map):
    class Watched:
        """An array that remembers what was read."""

        shape = memory_map.examples.shape
        rows = None

        def __len__(self):
            return 37

        def __getitem__(self, rows):
            Watched.rows = rows
            return memory_map.examples[rows]

    dataset = Dataset(Watched(), None)
    loaded = _load(KEY, 0, 100, dataset=dataset, index=None, with_labels=False)
    assert loaded["examples"].shape == (100, 3, 2)
    assert Watched.rows.tolist() == list(range(37))


@pytest.mark.parametrize("make", [array_source, stream_source])
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"noise": -1.0}, "noise is -1.0"),
        ({"noise": float("nan")}, "noise is nan"),
        ({"bounds": (1.0, 0.0)}, r"bounds is \(1.0, 0.0\)"),
        ({"with_labels": True}, "has no labels, but with_labels is True"),
    ],
)
def test_impossible_options_are_named(make, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(np.ones((3, 2)), **options)


@pytest.mark.parametrize("index", [[], [3], [-1], [[0]], [0.5]])
def test_impossible_rows_are_named(index):
    with pytest.raises(ValueError, match="row number from 0 to 2"):
        stream_source(np.ones((3, 2)), index=np.array(index))


def test_no_examples_are_named():
    with pytest.raises(ValueError, match=r"shape \(0, 2\)"):
        array_source(np.ones((0, 2)))
