"""Datasets from files: what is written is read, and what is damaged is named."""

import gzip
import io
import struct

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from PIL import Image

from ebjax.data import Dataset, load_dataset
from ebjax.data.dataset import check_dataset

IDX_CODES = {"u1": 8, "i1": 9, "i2": 11, "i4": 12, "f4": 13, "f8": 14}

quick = settings(
    deadline=None,
    max_examples=80,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
dtypes = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(endianness="?"),
    hnp.unsigned_integer_dtypes(endianness="?"),
    hnp.floating_dtypes(endianness="?", sizes=(16, 32, 64)),
)


def finite_arrays(dtype, max_dims=4):
    elements = (
        {"allow_nan": False, "allow_infinity": False} if np.dtype(dtype).kind == "f" else None
    )
    shapes = hnp.array_shapes(min_dims=1, max_dims=max_dims, min_side=1, max_side=5)
    return hnp.arrays(dtype, shapes, elements=elements)


arrays = dtypes.flatmap(finite_arrays)


def idx_bytes(array):
    code = IDX_CODES[array.dtype.str[1:]]
    header = bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def npz_bytes(save=np.savez, **members):
    buffer = io.BytesIO()
    save(buffer, **members)
    return buffer.getvalue()


def npy_bytes(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def image_bytes(array, kind):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


def assert_same(dataset, array):
    examples = np.asarray(dataset.examples)
    assert examples.dtype == array.dtype.newbyteorder("=")
    np.testing.assert_array_equal(examples, array)


# What is written is read.


@quick
@given(array=arrays, memory_map=st.booleans())
def test_npy_round_trip(tmp_path, array, memory_map):
    path = tmp_path / "data.npy"
    path.write_bytes(npy_bytes(array))
    dataset = load_dataset(path, memory_map=memory_map)
    assert_same(dataset, array)
    if array.dtype.isnative:
        assert isinstance(dataset.examples, np.memmap) == memory_map


@quick
@given(array=arrays, save=st.sampled_from([np.savez, np.savez_compressed]))
def test_npz_round_trip_with_labels(tmp_path, array, save):
    path = tmp_path / "data.npz"
    labels = np.arange(len(array), dtype=np.uint8)
    path.write_bytes(npz_bytes(save, x=array, y=labels))
    dataset = load_dataset(path, label_key="y")
    assert_same(dataset, array)
    assert dataset.labels.dtype == np.int32
    assert dataset.labels.tolist() == labels.tolist()


@quick
@given(
    array=st.sampled_from(sorted(IDX_CODES)).flatmap(finite_arrays),
    compress=st.booleans(),
    memory_map=st.booleans(),
)
def test_idx_round_trip(tmp_path, array, compress, memory_map):
    path = tmp_path / ("images-idx3-ubyte" + (".gz" if compress else ""))
    content = idx_bytes(array)
    path.write_bytes(gzip.compress(content) if compress else content)
    labels_path = tmp_path / "labels.idx1-ubyte"
    labels_path.write_bytes(idx_bytes(np.arange(len(array), dtype=np.uint8)))
    dataset = load_dataset(path, labels_path=labels_path, memory_map=memory_map)
    assert_same(dataset, array)
    assert dataset.labels.tolist() == list(range(len(array)))


@quick
@given(
    array=hnp.arrays(
        np.float64,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=4),
        elements={"allow_nan": False, "allow_infinity": False},
    ),
    header=st.booleans(),
    delimiter=st.sampled_from(",;\t"),
    label=st.booleans(),
)
def test_table_round_trip(tmp_path, array, header, delimiter, label):
    columns = [array[:, i] for i in range(array.shape[1])]
    if label:
        columns.insert(0, np.arange(len(array)))
    rows = zip(*(column.tolist() for column in columns), strict=True)
    lines = [delimiter.join(map(repr, row)) for row in rows]
    if header:
        lines.insert(0, delimiter.join(f"c{i}" for i in range(len(columns))))
    path = tmp_path / "data.csv"
    path.write_text("\n".join(lines) + "\n")
    column = None if not label else ("c0" if header else 0)
    dataset = load_dataset(path, label_column=column, constant="keep")
    assert_same(dataset, array)
    assert dataset.labels is None if not label else dataset.labels.tolist() == [*range(len(array))]


def test_has_header_overrules_what_is_found(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("1,2\n3,4\n5,7\n")
    assert load_dataset(path).examples.shape == (3, 2)
    assert load_dataset(path, has_header=True).examples.tolist() == [[3, 4], [5, 7]]
    path.write_text("a,b\n3,4\n")
    with pytest.raises(ValueError, match=r"'a' in line 1, column 0.*numbers"):
        load_dataset(path, has_header=False)


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3)])
@pytest.mark.parametrize("classes", [(), ("cats", "dogs")])
def test_folder_of_images(tmp_path, shape, classes):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, *shape), np.uint8)
    folders = [tmp_path / name for name in classes] or [tmp_path]
    (tmp_path / ".hidden").touch()
    for i, image in enumerate(images):
        folder = folders[i * len(folders) // 4]
        folder.mkdir(exist_ok=True)
        (folder / f"{i}.PNG").write_bytes(image_bytes(image, "png"))
    dataset = load_dataset(tmp_path)
    assert_same(dataset, images)
    assert (dataset.labels is None) == (not classes)
    if classes:
        assert dataset.labels.tolist() == [0, 0, 1, 1]


def test_jpeg_and_deep_png(tmp_path):
    gradient = np.add.outer(np.arange(16), np.arange(16)).astype(np.uint8) * 8
    (tmp_path / "a.jpg").write_bytes(image_bytes(gradient, "jpeg"))
    loaded = load_dataset(tmp_path).examples[0].astype(int)
    assert np.abs(loaded - gradient).max() <= 4
    (tmp_path / "a.jpg").unlink()
    deep = gradient.astype(np.uint16) * 257
    (tmp_path / "a.png").write_bytes(image_bytes(deep, "png"))
    assert_same(load_dataset(tmp_path), deep[None])


@pytest.mark.parametrize(
    ("name", "shape", "num_classes"),
    [
        ("digits", (1797, 8, 8), 10),
        ("wine", (178, 13), 3),
        ("breast_cancer", (569, 30), 2),
        ("diabetes", (442, 10), None),
    ],
)
def test_bundled_sets(name, shape, num_classes):
    dataset = load_dataset(name)
    assert dataset.examples.shape == shape
    found = None if dataset.labels is None else len(set(dataset.labels.tolist()))
    assert found == num_classes


# What does not fit is named.


def written(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


class Trap:
    """Unpickled, it would leave a mark."""

    def __reduce__(self):
        return (open, ("/tmp/ebjax-was-unpickled", "w"))


@pytest.mark.parametrize(
    ("name", "content", "options", "sentence"),
    [
        ("x.npz", npz_bytes(), {}, "no arrays"),
        ("x.npz", npz_bytes(a=np.ones(2), b=np.ones(2)), {}, "'a', 'b'; key must"),
        ("x.npz", npz_bytes(a=np.ones(2)), {"key": "c"}, "key is 'c', but the file holds 'a'"),
        ("x.npz", npz_bytes(a=np.ones(2)), {"label_key": "y"}, "label_key is 'y'"),
        ("x.npz", npz_bytes(a=np.ones(2), y=np.ones(3)), {"label_key": "y"}, "2 exam.*3 labels"),
        ("x.npz", npz_bytes(a=np.ones(2), y=[0, 0.5]), {"label_key": "y"}, "row 1 is 0.5"),
        ("x.npz", npz_bytes(a=np.ones(2), y=[0, 2**40]), {"label_key": "y"}, "row 1 is 1099"),
        ("x.npz", npz_bytes(a=np.ones(2), y=np.eye(2)), {"label_key": "y"}, r"shape \(2, 2\)"),
        ("x.npz", npz_bytes(a=np.ones((0, 3))), {}, r"empty \(shape \(0, 3\)\)"),
        ("x.npz", b"", {}, "cannot be read as .npz"),
        ("x.npz", npz_bytes(a=np.ones(99))[:-50], {}, "cannot be read as .npz"),
        ("x.npy", npy_bytes(np.ones(99))[:-8], {}, "cannot be read as .npy"),
        ("x.npy", npy_bytes(np.array([Trap()], object)), {}, "cannot be read as .npy.*pickled"),
        ("x.npy", npy_bytes(np.array(3.0)), {}, "single number"),
        ("x.npy", npy_bytes(np.array(["a"])), {}, "dtype <U1; accepted are"),
        ("x.npy", npy_bytes(np.ones(2, complex)), {}, "dtype complex128; accepted are"),
        ("x.npy", npy_bytes(np.array([[1.0, 2], [3, np.nan]])), {}, "nan in row 1, column 1"),
        ("x.npy", npy_bytes(np.full((2, 3, 3), np.inf)), {}, r"inf in row 0, entry \(0, 0\)"),
        ("x.npy", npy_bytes(np.ones(2)), {"key": "a"}, "key is 'a', which this format"),
        ("x.npy", npy_bytes(np.ones(2)), {"label_column": 0}, "label_column is 0, which this"),
        ("x.npy", npy_bytes(np.ones((2, 2))), {"constant": "error"}, "columns 0, 1 hold one value"),
        ("x.npy", npy_bytes(np.ones((2, 2))), {"constant": "drop"}, "nothing would be left"),
        ("x.npy", npy_bytes(np.ones((2, 2, 2))), {"constant": "drop"}, "is for tables"),
        ("x.npy", npy_bytes(np.ones(2)), {"constant": "no"}, "'no'; it must be one of error"),
        ("x.npy", npy_bytes(np.ones(2)), {"labels_path": "y.npy"}, "y.npy: there is no such file"),
        ("x-ubyte", idx_bytes(np.ones((3, 4), "u1"))[:-1], {}, "holds 23 bytes.*says 24"),
        ("x-ubyte.gz", gzip.compress(b"hello")[:-3], {}, "cannot be read as gzip"),
        ("x-ubyte.gz", gzip.compress(b"hello"), {}, "does not start as IDX"),
        ("x.tiff", b"II*", {}, "format is not known; accepted are .npz"),
        ("x.csv", "", {}, "is empty"),
        ("x.csv", "a,b\n", {}, "a header but no rows"),
        ("x.csv", "a,b\n1,2\n3\n", {}, "line 3 has 1 entries and not 2"),
        ("x.csv", "a,b\n1,2\n3,\n", {}, "'' in line 3, column 1 .'b'"),
        ("x.csv", "a,b\n1,2\n3,nan\n", {}, "nan in row 1, column 1 .'b'"),
        ("x.csv", "a,b\n1,2\n3,2\n", {}, "columns 'b' hold one value"),
        ("x.csv", "a,b\n1,2\n3,4\n", {"label_column": "c"}, "'c'; the table has 'a', 'b'"),
        ("x.csv", "1,2\n3,4\n", {"label_column": "c"}, "no header"),
        ("x.csv", "1,2\n3,4\n", {"label_column": 2}, "columns 0 to 1"),
        ("x.csv", "1\n3\n", {"label_column": 0}, "one column, the labels"),
        ("x.csv", b"1,2\n\xff,3\n", {}, "cannot be read as a table"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, name, content, options, sentence):
    path = written(tmp_path, name, content)
    with pytest.raises(ValueError, match=sentence) as raised:
        load_dataset(path, **options)
    text = str(raised.value)
    assert name in text or "y.npy" in text
    assert "\n" not in text
    assert text.endswith(".")


def test_missing_paths_are_named(tmp_path):
    for path in (tmp_path / "none.npz", "", "a\0b", "x" * 5000):
        with pytest.raises(ValueError, match=r"no such file; accepted are \.npz"):
            load_dataset(path)


def test_folders_that_do_not_fit_are_named(tmp_path):
    def refused(sentence):
        with pytest.raises(ValueError, match=sentence):
            load_dataset(tmp_path)

    refused("empty folder")
    written(tmp_path, "a.png", image_bytes(np.zeros((3, 3), np.uint8), "png"))
    written(tmp_path, "b.png", image_bytes(np.zeros((3, 4), np.uint8), "png"))
    refused(r"b.png: has shape \(3, 4\).*a.png has \(3, 3\)")
    written(tmp_path, "b.png", image_bytes(np.zeros((3, 3), np.uint8), "png")[:-20])
    refused("b.png: cannot be read as a PNG")
    written(tmp_path, "b.png", "text")
    refused("b.png: cannot be read as a PNG")
    (tmp_path / "b.png").rename(tmp_path / "b.txt")
    refused("b.txt: is not an image")
    (tmp_path / "class").mkdir()
    refused("holds subfolders and also 'a.png'")
    (tmp_path / "a.png").unlink()
    (tmp_path / "b.txt").unlink()
    refused("class: is an empty folder")


# Damage of any kind: a dataset or a ValueError, and never anything else.

RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (4, 5, 5)).astype(np.uint8)
WHOLE = {
    "x.npz": npz_bytes(x=BYTES, y=np.arange(4)),
    "compressed.npz": npz_bytes(np.savez_compressed, x=BYTES, y=np.arange(4)),
    "x.npy": npy_bytes(RNG.normal(size=(4, 5))),
    "x-ubyte": idx_bytes(BYTES),
    "x-ubyte.gz": gzip.compress(idx_bytes(BYTES)),
    "x.csv": b"a,b,c\n" + b"\n".join(b"%.3f,%.3f,%d" % (*RNG.normal(size=2), i) for i in range(6)),
    "folder/x.png": image_bytes(BYTES[0], "png"),
    "folder/x.jpg": image_bytes(BYTES[0], "jpeg"),
}
OPTIONS = {
    "x.npz": {"key": "x", "label_key": "y"},
    "compressed.npz": {"key": "x", "label_key": "y"},
    "x.csv": {"label_column": -1},
}


@pytest.mark.parametrize("name", WHOLE)
def test_damaged_bytes_are_a_value_error_and_nothing_else(tmp_path, name):
    whole = WHOLE[name]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    target = path.parent if name.startswith("folder") else path
    options = OPTIONS.get(name, {})
    path.write_bytes(whole)
    assert isinstance(load_dataset(target, **options), Dataset)  # undamaged, it is read

    refused = 0

    byte_changes = st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255))

    @settings(quick, max_examples=150)
    @given(
        changes=st.lists(byte_changes, max_size=6),
        cut=st.integers(0, len(whole)),
        is_cut=st.booleans(),
        tail=st.binary(max_size=4),
    )
    def damage(changes, cut, is_cut, tail):
        nonlocal refused
        content = bytearray(whole)
        for place, value in changes:
            content[place] = value
        path.write_bytes((content[:cut] if is_cut else content) + tail)
        sentence = None
        try:
            dataset = load_dataset(target, **options)
        except ValueError as error:
            sentence = str(error)
        if sentence is None:
            assert np.isfinite(np.asarray(dataset.examples, np.float64)).all()
        else:
            refused += 1
            assert path.name in sentence
            assert "\n" not in sentence

    damage()
    assert refused > 20


def test_the_finite_check_sees_the_last_chunk(monkeypatch):
    monkeypatch.setattr("ebjax.data.dataset._CHUNK_ENTRIES", 10)
    examples = np.zeros((7, 4))
    examples[6, 2] = np.nan
    with pytest.raises(ValueError, match="nan in row 6, column 2"):
        check_dataset(Dataset(examples, None, "x"))
