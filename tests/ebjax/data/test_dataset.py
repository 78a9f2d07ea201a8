"""Datasets from arrays and other libraries, splitting and scaling."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ebjax.data import (
    Dataset,
    dequantize,
    from_arrays,
    from_hugging_face,
    from_sklearn,
    from_tensorflow_datasets,
    split,
    split_index,
    standardize,
    to_unit_range,
)


def test_split_is_a_partition_that_keeps_labels_with_examples():
    dataset = from_arrays(np.arange(20) * 10, np.arange(20), name="tens")
    training, held_out = split(dataset, 6, seed=3)
    assert (len(training.examples), len(held_out.examples)) == (14, 6)
    both = np.concatenate([training.labels, held_out.labels])
    assert sorted(both.tolist()) == list(range(20))
    for part in (training, held_out):
        assert (part.examples == 10 * part.labels).all()
        assert part.name.startswith("tens (")
    again = split(dataset, 6, seed=3)[1]
    assert np.array_equal(again.examples, held_out.examples)
    assert not np.array_equal(split(dataset, 6, seed=4)[1].examples, held_out.examples)


@pytest.mark.parametrize("num_held_out", [0, -1, 20, 21])
def test_impossible_splits_are_named(num_held_out):
    with pytest.raises(ValueError, match=f"num_held_out is {num_held_out}; of 20 examples"):
        split_index(20, num_held_out, 0)


def test_from_arrays_checks_and_names():
    with pytest.raises(ValueError, match="mine: the examples differ in shape"):
        from_arrays([[1.0, 2.0], [1.0]], name="mine")
    with pytest.raises(ValueError, match="mine: there are 2 examples but 1 labels"):
        from_arrays([1.0, 2.0], [0], name="mine")
    with pytest.raises(ValueError, match="dtype object"):
        from_arrays([{}, None])
    with pytest.raises(ValueError, match="labels: has the dtype <U1"):
        from_arrays([1.0, 2.0], ["a", "b"])
    assert from_arrays([1.0, 2.0], [[3], [4]]).labels.tolist() == [3, 4]


def test_constant_columns_are_kept_dropped_or_refused():
    table = np.array([[1.0, 5.0, 2.0], [1.0, 5.0, 3.0]])
    assert from_arrays(table).examples.shape == (2, 3)
    assert from_arrays(table, constant="drop").examples.tolist() == [[2.0], [3.0]]
    with pytest.raises(ValueError, match="columns 0, 1 hold one value only"):
        from_arrays(table, constant="error")


# Scaling.


def test_standardize_and_its_map():
    rng = np.random.default_rng(0)
    raw = from_arrays(rng.normal(3.0, [1.0, 10.0, 0.3], (500, 3)))
    scaled, affine = standardize(raw)
    assert np.allclose(scaled.examples.mean(axis=0), 0, atol=1e-5)
    assert np.allclose(scaled.examples.std(axis=0), 1, atol=1e-5)
    assert np.allclose(affine.inverse(scaled.examples), raw.examples, atol=1e-5)
    assert affine.scale.max() > 9
    whole, _ = standardize(raw, per_entry=False)
    assert abs(whole.examples.mean()) < 1e-5
    assert abs(whole.examples.std() - 1) < 1e-5
    assert whole.examples.std(axis=0).max() > 1.5  # not column by column
    # Change of variables: a standard normal density of y is the density N(shift, scale²) of x.
    x = raw.examples[0]
    log_p_y = -0.5 * np.sum(affine.forward(x) ** 2) - 1.5 * math.log(2 * math.pi)
    z = (x - affine.shift) / affine.scale
    log_p_x = np.sum(-0.5 * z**2 - np.log(affine.scale)) - 1.5 * math.log(2 * math.pi)
    assert abs(log_p_y - affine.log_scale((3,)) - log_p_x) < 1e-4
    assert abs(log_p_y + affine.log_scale((3,)) - log_p_x) > 0.1  # the wrong sign is seen


def test_standardize_names_what_is_constant():
    with pytest.raises(ValueError, match="entry 1 is constant"):
        standardize(from_arrays([[1.0, 2.0], [2.0, 2.0]]))
    with pytest.raises(ValueError, match="all values are constant"):
        standardize(from_arrays([[2.0, 2.0], [2.0, 2.0]]), per_entry=False)


def test_to_unit_range_hits_both_ends():
    raw = from_arrays(np.array([[0, 51], [255, 204]], np.uint8))
    scaled, affine = to_unit_range(raw)
    assert scaled.examples.dtype == np.float32
    assert np.allclose(scaled.examples, [[-1, -0.6], [1, 0.6]], atol=1e-6)
    assert np.allclose(affine.inverse(scaled.examples), raw.examples, atol=1e-4)
    unit, _ = to_unit_range(raw, low=0.0, limits=(0, 510))
    assert np.allclose(unit.examples, raw.examples / 510.0, atol=1e-6)
    with pytest.raises(ValueError, match=r"limits are 1\.0 and 1\.0"):
        to_unit_range(from_arrays([1.0, 1.0]))


@pytest.mark.parametrize("num_levels", [2, 16, 256, 65536])
def test_dequantize_stays_in_its_cell_and_fills_it(num_levels):
    levels = jnp.array([0, num_levels // 2, num_levels - 1])
    y = jax.vmap(lambda key: dequantize(key, levels, num_levels=num_levels))(
        jax.random.split(jax.random.key(0), 2000)
    )
    assert (jnp.floor(y * num_levels).astype(int) == levels).all()
    within = np.asarray(y * num_levels - levels)
    standard_error = math.sqrt(1 / 12 / within.size)
    step = 2.0 ** -(24 - (num_levels - 1).bit_length())
    assert abs(within.mean() - 0.5 + step / 2) < 5 * standard_error
    assert abs(within.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / within.size)


# Other libraries: objects with their interface.


class FakeTensorFlowDataset:
    def __init__(self, rows):
        self.rows = rows

    def as_numpy_iterator(self):
        return iter(self.rows)


class FakeBuilder:
    class info:  # noqa: N801
        name = "fakes"

    def __init__(self, splits):
        self.splits = splits

    def as_dataset(self, split):
        return FakeTensorFlowDataset(self.splits[split])


class FakeHuggingFaceDataset:
    """Columns as lists; numpy format stacks those of one shape, as the real one does."""

    def __init__(self, columns, is_numpy=False):
        self.columns, self.is_numpy = columns, is_numpy
        self.column_names = list(columns)

    def with_format(self, kind):
        assert kind == "numpy"
        return FakeHuggingFaceDataset(self.columns, is_numpy=True)

    def __getitem__(self, rows):
        assert self.is_numpy
        out = {}
        for name, column in self.columns.items():
            try:
                out[name] = np.array(column[rows])
            except ValueError:
                out[name] = np.empty(len(column[rows]), object)
                out[name][:] = column[rows]
        return out


IMAGES = np.arange(24, dtype=np.uint8).reshape(4, 2, 3)


def test_tensorflow_datasets():
    rows = [{"image": image, "label": np.int64(i)} for i, image in enumerate(IMAGES)]
    builder = FakeBuilder({"train": rows, "test": rows[:1]})
    dataset = from_tensorflow_datasets(builder, label_key="label")
    assert np.array_equal(dataset.examples, IMAGES)
    assert dataset.labels.tolist() == [0, 1, 2, 3]
    assert "fakes" in dataset.name
    assert len(from_tensorflow_datasets(builder, split="test").examples) == 1
    loaded = FakeTensorFlowDataset(rows)
    assert len(from_tensorflow_datasets(loaded, max_examples=2).examples) == 2
    for source, options, sentence in [
        (loaded, {"key": "picture"}, "key is 'picture', but its columns are image, label"),
        ({"train": loaded}, {}, "has the splits train; give one"),
        ([1, 2], {}, "of type list; it must be a TensorFlow Datasets builder"),
        (FakeTensorFlowDataset([(IMAGES[0], 1)]), {}, "they must be dicts"),
        (FakeTensorFlowDataset([]), {}, "is empty"),
        (FakeTensorFlowDataset([{"image": np.ones(2)}, {"image": np.ones(3)}]), {}, "differ in sh"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            from_tensorflow_datasets(source, **options)


def test_hugging_face():
    columns = {"image": list(IMAGES), "label": [3, 2, 1, 0]}
    dataset = from_hugging_face(FakeHuggingFaceDataset(columns), label_key="label")
    assert np.array_equal(dataset.examples, IMAGES)
    assert dataset.labels.tolist() == [3, 2, 1, 0]
    few = from_hugging_face(FakeHuggingFaceDataset(columns), max_examples=2)
    assert few.examples.shape == (2, 2, 3)
    assert few.labels is None
    ragged = FakeHuggingFaceDataset({"image": [np.ones(2), np.ones(3)]})
    for source, options, sentence in [
        (FakeHuggingFaceDataset(columns), {"key": "x"}, "key is 'x', but its columns are image"),
        ({"train": 1, "test": 2}, {}, "has the splits train, test; give one"),
        (5, {}, "of type int; it must be a datasets.Dataset"),
        (ragged, {}, "differ in shape"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            from_hugging_face(source, **options)


def test_the_real_hugging_face_library():
    datasets = pytest.importorskip("datasets")
    source = datasets.Dataset.from_dict({"x": [[1.0, 2.0], [3.0, 4.0]], "y": [1, 0]})
    dataset = from_hugging_face(source, key="x", label_key="y")
    assert dataset.examples.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert dataset.labels.tolist() == [1, 0]


def test_unknown_bundled_set_is_named():
    with pytest.raises(ValueError, match="name is 'iris'; it must be one of digits"):
        from_sklearn("iris")


def test_dataset_needs_no_labels():
    assert Dataset(np.ones(1)).labels is None
