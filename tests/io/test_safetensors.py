"""The container against the library that defines it, and against files that lie."""

import json
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from io_files import assert_same, entry, put_together, take_apart

import jaxquant as jq
from jaxquant.io import load, read_metadata, save
from jaxquant.io.safetensors import SafetensorsFile, TensorSpec, write_safetensors

pytestmark = pytest.mark.every


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.fixture
def content(path):
    """A small valid file with a bit of everything."""
    w = jnp.sin(jnp.arange(64.0)).reshape(16, 4)
    asymmetric = jq.QuantSpec("int4", granularity="per_group", group_size=8, symmetric=False)
    params = {
        "w": jq.quantize(w, asymmetric, reduce_axes=-2),
        "n": jq.quantize(w, jq.QuantSpec("nvfp4"), reduce_axes=-2),
        "t": (jnp.ones((3, 3), jnp.int4), None),
        "l": [jnp.array([True, False])],
        "empty": jnp.ones((0, 3)),
    }
    save(path, params, metadata={"step": 1})
    return path.read_bytes()


# -- the library -------------------------------------------------------------------------------------------------------


def test_the_library_reads_what_save_wrote(path):
    w = jnp.sin(jnp.arange(64.0)).reshape(16, 4)
    q = jq.quantize(w, jq.QuantSpec("int8"), reduce_axes=-2)
    save(path, {"layer": {"kernel": q, "bias": jnp.arange(4.0)}, "steps": jnp.arange(3), "on": jnp.array([True])})
    arrays = safetensors.numpy.load_file(path)
    assert set(arrays) == {"layer/kernel.codes", "layer/kernel.scale", "layer/bias", "steps", "on"}
    assert_same(arrays["layer/kernel.codes"], q.codes)
    assert_same(arrays["layer/kernel.scale"], q.scale)
    assert_same(arrays["layer/bias"], jnp.arange(4.0))
    with safetensors.safe_open(path, framework="np") as file:
        assert set(file.keys()) == set(arrays)
        assert json.loads(file.metadata()["jaxquant"])["version"] == 1
        assert_same(file.get_tensor("steps"), jnp.arange(3))


def test_the_library_accepts_every_file(path, content):
    with safetensors.safe_open(path, framework="np") as file:
        assert set(file.keys()) == set(SafetensorsFile(path).tensors)


@pytest.mark.parametrize(
    "dtype", ["bool", "uint8", "int8", "int16", "uint16", "float16", "int32", "uint32", "float32", "int64", "float64"]
)
def test_load_reads_what_the_library_wrote(path, dtype):
    arrays = {"a": np.arange(6).reshape(2, 3).astype(dtype), "b.c": np.array(1).astype(dtype), "d": np.ones(0, dtype)}
    safetensors.numpy.save_file(arrays, path, metadata={"format": "np"})
    assert_same(arrays, load(path))
    assert read_metadata(path).metadata == {"format": "np"}


def test_the_layout(path):
    arrays = {"b": np.arange(3, dtype=np.int8), "c": np.ones(2), "a": np.array(7, np.int8), "d": np.ones(1, np.float16)}
    specs = {name: TensorSpec(array.dtype, array.shape) for name, array in arrays.items()}
    write_safetensors(path, specs, arrays.__getitem__, {})
    header, data = take_apart(path.read_bytes())
    assert list(header) == ["c", "d", "a", "b"]  # aligned, then by name
    assert [header[name]["data_offsets"] for name in header] == [[0, 16], [16, 18], [18, 19], [19, 22]]
    assert len(data) == 22
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    assert path.read_bytes() == safetensors.numpy.save(arrays)


def test_data_that_is_not_aligned(path):
    header = {"a": entry("U8", (1,), (0, 1)), "b": entry("F32", (2,), (1, 9)), "c": entry("BF16", (1,), (9, 11))}
    data = b"\7" + np.array([1.5, -2], "<f4").tobytes() + b"\x80\x3f"
    path.write_bytes(put_together(header, data))
    expected = {"a": np.array([7], np.uint8), "b": np.array([1.5, -2], np.float32), "c": np.ones(1, jnp.bfloat16)}
    assert_same(expected, load(path))


def test_views_are_read_only(path, content):
    with pytest.raises(ValueError, match="read-only"):
        SafetensorsFile(path).array("l/0")[0] = False


# -- lies --------------------------------------------------------------------------------------------------------------

HUGE = (1 << 64) - 1
NEST = 100_000
FILES = {
    "empty file": (b"", "shorter than the 8 bytes"),
    "seven bytes": (b"\0" * 7, "shorter than the 8 bytes .*; got size=7"),
    "no header": (b"\0" * 8, "the header is not JSON"),
    "header longer than the file": (put_together(b"{}")[:-1], "longer than the file; got header_length=2, size=9"),
    "huge header": (HUGE.to_bytes(8, "little") + b"{}", "at most 100000000 bytes; got header_length=1844"),
    "header just too long": ((100_000_001).to_bytes(8, "little") + b"{}", "at most 100000000 bytes"),
    "not JSON": (put_together(b"{]"), "the header is not JSON"),
    "not UTF-8": (put_together(b'{"\xff": 1}'), "the header is not JSON .*utf-8"),
    "not an object": (put_together([1]), "must be a JSON object"),
    "leading space": (put_together(b" {}"), "must be a JSON object"),
    "two values": (put_together(b"{}{}"), "the header is not JSON"),
    "NaN": (put_together(b'{"a": NaN}'), "NaN is not JSON"),
    "bomb": (put_together(b'{"a":' * NEST), "nested too deeply"),
    "bomb of lists": (put_together(b'{"a":' + b"[" * NEST + b"]" * NEST + b"}"), "nested too deeply"),
    "very long number": (put_together(b'{"a":' + b"9" * 10_000 + b"}"), "the header is not JSON"),
    "duplicate name": (
        put_together(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), b"\0" * 8),
        "the key 'a' occurs twice",
    ),
    "duplicate field": (
        put_together(b'{"a":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}', b"\0" * 8),
        "the key 'dtype' occurs twice",
    ),
    "metadata no object": (put_together({"__metadata__": []}), "'__metadata__': the metadata must be strings"),
    "metadata no strings": (put_together({"__metadata__": {"a": 1}}), "the metadata must be strings"),
    "entry no object": (put_together({"a": 3}), "'a': an array needs dtype, shape and data_offsets; got entry=3"),
    "entry incomplete": (put_together({"a": {"dtype": "F32"}}), "needs dtype, shape and data_offsets"),
    "unknown dtype": (put_together({"a": entry("F33")}, b"\0" * 8), "unknown dtype; got dtype='F33'. Convert it to"),
    "dtype no string": (put_together({"a": entry(["F32"])}, b"\0" * 8), "unknown dtype"),
    "negative shape": (put_together({"a": entry(shape=(-2,))}, b"\0" * 8), "not the shape of an array; got"),
    "two negatives": (put_together({"a": entry(shape=(-2, -1))}, b"\0" * 8), "not the shape of an array"),
    "shape of floats": (put_together({"a": entry(shape=(2.0,))}, b"\0" * 8), "not the shape of an array"),
    "shape of bools": (put_together({"a": entry(shape=(True, 2))}, b"\0" * 8), "not the shape of an array"),
    "shape no list": (put_together({"a": entry() | {"shape": 2}}, b"\0" * 8), "not the shape of an array"),
    "shape overflows": (
        put_together({"a": entry(shape=(1 << 32, 1 << 32), offsets=(0, 0))}),
        "not the shape of an array",
    ),
    "empty but huge": (put_together({"a": entry(shape=(0, 1 << 62), offsets=(0, 0))}), "not the shape of an array"),
    "too many axes": (put_together({"a": entry(shape=(1,) * 33, offsets=(0, 4))}, b"\0" * 4), "not the shape"),
    "shape larger than data": (put_together({"a": entry(shape=(1 << 40,))}, b"\0" * 8), "must span the 4398046511104"),
    "offsets too short": (put_together({"a": entry(offsets=(0, 4))}, b"\0" * 4), "must span the 8 bytes of F32"),
    "offsets backwards": (put_together({"a": entry(offsets=(8, 0))}, b"\0" * 8), "must span the 8 bytes"),
    "offsets negative": (put_together({"a": entry(offsets=(-8, 0))}, b"\0" * 8), "must be two integers from 0"),
    "offsets of floats": (put_together({"a": entry(offsets=(0.0, 8.0))}, b"\0" * 8), "must be two integers"),
    "offsets of three": (put_together({"a": entry(offsets=(0, 4, 8))}, b"\0" * 8), "must be two integers"),
    "offsets no list": (put_together({"a": entry() | {"data_offsets": "08"}}, b"\0" * 8), "must be two integers"),
    "offsets beyond the file": (
        put_together({"a": entry(shape=(1 << 40,), offsets=(0, 1 << 42))}, b"\0" * 8),
        "must take up all of the file's data; got data=8, arrays=4398046511104",
    ),
    "offset of 2**64": (put_together({"a": entry(offsets=(1 << 64, (1 << 64) + 8))}, b"\0" * 8), "without holes"),
    "truncated data": (put_together({"a": entry()}, b"\0" * 7), "all of the file's data; got data=7, arrays=8"),
    "data left over": (put_together({"a": entry()}, b"\0" * 9), "all of the file's data; got data=9, arrays=8"),
    "data without arrays": (put_together({}, b"\0"), "all of the file's data; got data=1, arrays=0"),
    "hole in front": (put_together({"a": entry(offsets=(4, 12))}, b"\0" * 12), "'a': .* holes or overlaps"),
    "hole": (put_together({"a": entry(), "b": entry(offsets=(9, 17))}, b"\0" * 17), "'b': .* holes or overlaps"),
    "overlap": (
        put_together({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12),
        r"'b': .* holes or overlaps; got data_offsets=\(4, 12\), expected=8",
    ),
    "same bytes twice": (put_together({"a": entry(), "b": entry()}, b"\0" * 8), "holes or overlaps"),
    "empty inside": (
        put_together({"a": entry(), "b": entry(shape=(0,), offsets=(4, 4))}, b"\0" * 8),
        "'b': .* holes or overlaps",
    ),
    "bool of 2": (put_together({"a": entry("BOOL", (2,), (0, 2))}, b"\1\2"), "BOOL array must be 0 or 1; got byte=2"),
    "file of zeros": (b"\0" * 1000, "the header is not JSON"),
    "zip": (b"PK\3\4" + b"\0" * 100, "the header is (longer than the file|not JSON)"),
    "pickle": (b"\x80\4\x95\xff\0\0\0\0\0\0\0\x8c\2os" + b"\0" * 99, "at most 100000000 bytes"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_lie(path, case):
    content, message = FILES[case]
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(jq.QuantError, match=message) as error:
            load(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(error.value).startswith(f"load at {path}")
    assert str(error.value).endswith(".")
    assert len(str(error.value)) < 1000
    assert peak < 20 << 20


def test_names_are_shortened(path):
    path.write_bytes(put_together({"x" * 10_000: 3}))
    with pytest.raises(jq.QuantError, match="an array needs") as error:
        load(path)
    assert len(str(error.value)) < 1000


def test_read_metadata_checks_the_same(path):
    path.write_bytes(put_together({"a": entry()}, b"\0"))
    with pytest.raises(jq.QuantError, match=r"read_metadata at .*: the arrays must take up all"):
        read_metadata(path)


# -- damage ------------------------------------------------------------------------------------------------------------


def loads_or_refuses(path, content):
    path.write_bytes(content)
    try:
        load(path)
        read_metadata(path)
    except jq.QuantError:
        return False
    return True


def test_every_truncation_is_refused(path, content):
    for length in range(0, len(content), 5):
        assert not loads_or_refuses(path, content[:length])


def test_flipped_bits(path, content):
    rng = np.random.default_rng(0)
    loaded = 0
    for _ in range(600):
        damaged = bytearray(content)
        for position in rng.integers(0, len(content), rng.integers(1, 4)):
            damaged[position] ^= 1 << rng.integers(0, 8)
        loaded += loads_or_refuses(path, bytes(damaged))
    assert 10 < loaded < 500


def test_bytes_replaced_by_json(path, content):
    """Damage that survives the parser more often than flipped bits do."""
    rng = np.random.default_rng(1)
    header = int.from_bytes(content[:8], "little")
    digits = [i for i in range(8, 8 + header) if content[i : i + 1] in b'0123456789[]{},:"-']
    for _ in range(600):
        damaged = bytearray(content)
        damaged[rng.choice(digits)] = rng.choice(list(b'0123456789[]{},:"- n'))
        loads_or_refuses(path, bytes(damaged))


def test_pieces_moved(path, content):
    rng = np.random.default_rng(2)
    for _ in range(200):
        a, b, c = sorted(rng.integers(0, len(content), 3))
        loads_or_refuses(path, content[:a] + content[b:c] + content[a:b] + content[c:])
