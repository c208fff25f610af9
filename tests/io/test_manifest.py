"""Manifests that contradict the file, or themselves."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from io_files import assert_same, entry, put_together, take_apart

import jaxquant as jq
from jaxquant.io import load, read_metadata, save
from jaxquant.io.manifest import MAX_DEPTH

pytestmark = pytest.mark.every


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def saved(path):
    """A file with a QTensor "w", an int4 array "b" and a plain array "x"."""
    w = jnp.sin(jnp.arange(96.0)).reshape(16, 6)
    q = jq.quantize(w, jq.QuantSpec("int4", symmetric=False), reduce_axes=-2)
    save(path, {"w": q, "b": jnp.ones((3, 3), jnp.int4), "x": jnp.ones((1, 6))})
    header, data = take_apart(path.read_bytes())
    return header, json.loads(header["__metadata__"]["jaxquant"]), data


def write(path, header, manifest, data):
    text = manifest if isinstance(manifest, str) else json.dumps(manifest)
    path.write_bytes(put_together(header | {"__metadata__": {"jaxquant": text}}, data))


def node(manifest, name):
    return next(pair for pair in manifest["tree"]["dict"] if pair[0] == name)


def q_field(**fields):
    def change(manifest):
        node(manifest, "w")[1]["qtensor"].update(fields)

    return change


def bits_field(**fields):
    def change(manifest):
        node(manifest, "b")[1]["bits"].update(fields)

    return change


def set_node(name, value):
    def change(manifest):
        node(manifest, name)[1] = value

    return change


def top(**fields):
    return lambda manifest: manifest.update(fields)


def without(*names):
    def change(manifest):
        for name in names:
            del manifest[name]

    return change


def q_without(name):
    return lambda manifest: node(manifest, "w")[1]["qtensor"].pop(name)


def nested(inner, kind="list"):
    for _ in range(MAX_DEPTH + 1):
        inner = {kind: [inner]}
    return inner


def scale_of(shape, dtype):
    """The scale replaced by an array of another shape or dtype that takes the same bytes."""

    def change(header):
        header["w.scale"] |= {"shape": shape, "dtype": dtype}

    return change


MANIFESTS = {
    "not JSON": (lambda m: "{", "'jaxquant': the manifest is not JSON"),
    "NaN": (lambda m: '{"version": NaN}', "NaN is not JSON"),
    "duplicate key": (lambda m: '{"version": 1, "version": 2}', "the key 'version' occurs twice"),
    "bomb": (lambda m: '{"version": 1, "tree": ' + "[" * 100_000, "nested too deeply"),
    "not an object": (lambda m: "[]", "the manifest must be a JSON object"),
    "no version": (without("version"), "reads version 1 of the manifest; got version=None. Update jaxquant"),
    "newer version": (top(version=2), "reads version 1 of the manifest; got version=2. Update jaxquant"),
    "version no number": (top(version="1"), "reads version 1 of the manifest; got version='1'"),
    "no tree": (without("tree"), "the manifest needs tree, metadata and plan; got fields="),
    "metadata no object": (top(metadata=[]), "metadata must be a JSON object and plan text"),
    "plan no text": (top(plan={}), "metadata must be a JSON object and plan text"),
    "empty tree": (top(tree=None), "'b': the manifest does not mention this array; got arrays=5"),
    "tree of a number": (top(tree=3), "'array': not a node of the manifest; got node=3"),
    "unknown node": (set_node("x", {"set": []}), "'x': not a node of the manifest"),
    "two kinds": (set_node("x", {"list": [], "tuple": []}), "'x': not a node of the manifest"),
    "list of a string": (set_node("x", {"list": "x"}), "'x': not a node of the manifest"),
    "dict of a dict": (set_node("x", {"dict": {"a": "x"}}), r"'x': a dict must be a list of \[key, node\]"),
    "dict of triples": (set_node("x", {"dict": [["a", "x", 1]]}), "a dict must be a list"),
    "float key": (set_node("x", {"dict": [[1.0, "x"]]}), "'x': the keys of a dict must be"),
    "mixed keys": (set_node("x", {"dict": [[1, "x"], ["a", None]]}), "'x': the keys of a dict must be"),
    "bool key": (set_node("x", {"dict": [[True, "x"]]}), "'x': the keys of a dict must be"),
    "key twice": (set_node("x", {"dict": [["a", "x"], ["a", None]]}), "'x': a dict has a key twice"),
    "deep": (set_node("x", nested("x")), "'x/0/0': the tree is more than 100 levels deep"),
    "array missing": (set_node("x", "y"), "'x': this array is not in the file; got name='y'"),
    "array twice": (set_node("x", {"list": ["x", "x"]}), "'x/1': this array occurs twice; got name='x'"),
    "array of metadata": (set_node("x", "__metadata__"), "this array is not in the file"),
    "qtensor no object": (set_node("w", {"qtensor": []}), "'w': a QTensor needs the fields qtype, dtype"),
    "codes field missing": (q_without("codes"), "'w': a QTensor needs the fields"),
    "scale field missing": (q_without("scale"), "'w': a QTensor needs the fields"),
    "codes missing": (q_field(codes="w.cods"), "'w/codes': this array is not in the file; got name='w.cods'"),
    "codes null": (q_field(codes=None), "'w/codes': not a node of the manifest"),
    "scale null": (q_field(scale=None), "'w/scale': not a node of the manifest"),
    "scale a list": (q_field(scale={"list": []}), "'w/scale': not a node of the manifest"),
    "codes for zero_point": (q_field(zero_point="w.codes"), "'w/zero_point': this array occurs twice"),
    "unknown qtype": (q_field(qtype="int9"), "'w': unknown number type; got qtype='int9'"),
    "qtype no string": (q_field(qtype=["int4"]), "'w': unknown number type"),
    "another width": (q_field(qtype="int3"), "16 int3 codes take 6 bytes; got length=16"),
    "another kind": (q_field(qtype="int8"), "'w': not the dtype of int8 codes"),
    "unknown dtype": (q_field(dtype="float33"), "'w': unknown dtype; got dtype='float33'"),
    "dtype no string": (q_field(dtype=["float32"]), "'w': unknown dtype"),
    "dtype of objects": (q_field(dtype="object"), "'w': unknown dtype; got dtype='object'"),
    "dtype no float": (q_field(dtype="int8"), "'w': dtype must be a float dtype; got dtype=int8"),
    "minor out of range": (q_field(minor=[-3]), r"'w': minor must be different axes from -2 to -1; got minor=\(-3,\)"),
    "minor positive": (q_field(minor=[0]), "'w': minor must be different axes"),
    "minor twice": (q_field(minor=[-1, -1]), "'w': minor must be different axes"),
    "minor of floats": (q_field(minor=[-1.0]), "'w': minor must be different axes"),
    "minor of lists": (q_field(minor=[[-1]]), "'w': minor must be different axes"),
    "minor no list": (q_field(minor=-1), "'w': minor must be a list of axes"),
    "length too long": (q_field(length=17), "'w': 17 int4 codes take 9 bytes; got length=17, codes=uint8"),
    "length too short": (q_field(length=14), "'w': 14 int4 codes take 7 bytes"),
    "length huge": (q_field(length=1 << 62), "int4 codes take 2305843009213693952 bytes"),
    "length negative": (q_field(length=-1), "'w': packed codes need their length"),
    "length a float": (q_field(length=16.0), "'w': packed codes need their length"),
    "length null": (q_field(length=None), "'w': packed codes need their length"),
    "other axis": (q_field(minor=[]), "'w': there must be one scale per block"),
    "bits no object": (set_node("b", {"bits": "b"}), "'b': not a node of the manifest"),
    "bits incomplete": (set_node("b", {"bits": {"name": "b"}}), "'b': not a node of the manifest"),
    "bits of a named dtype": (bits_field(dtype="float32"), "'b': not a dtype that is stored as bit patterns"),
    "bits of an unknown dtype": (bits_field(dtype="int5"), "'b': not a dtype that is stored as bit patterns"),
    "bits of no dtype": (bits_field(dtype=None), "'b': not a dtype that is stored as bit patterns"),
    "bits of another shape": (bits_field(shape=[3, 4]), r"'b': int4\[3, 4\] takes uint8\[6\]; got array="),
    "bits of a huge shape": (bits_field(shape=[1 << 40, 1 << 40]), "'b': not the shape of an array; got"),
    "bits of a negative shape": (bits_field(shape=[-3, -3]), "'b': not the shape of an array"),
    "bits of another array": (bits_field(name="x"), r"'b': int4\[3, 3\] takes uint8\[5\]; got array="),
    "bits of no array": (bits_field(name=None), "'b': this array is not in the file"),
}
HEADERS = {
    "scale rank": (scale_of([6], "F32"), "'w': there must be one scale per block, .*; got scale=\\(6,\\)"),
    "scale that does not divide": (scale_of([6, 1], "F32"), "'w': there must be one scale per block"),
    "scale of one more": (scale_of([3, 2], "F32"), "'w': there must be one scale per block"),
    "integer scale": (scale_of([1, 6], "I32"), "'w': scales must be floats"),
    "complex scale": (scale_of([1, 3], "C64"), "'w': scales must be floats"),
    "bool zero point": (lambda h: h["w.zero_point"].update(dtype="BOOL"), "'w': zero points must be numbers"),
    "zero point shape": (lambda h: h["w.zero_point"].update(shape=[6, 1]), "'w': zero_point must have the shape"),
    "codes dtype": (lambda h: h["w.codes"].update(dtype="I8"), "'w': not the dtype of int4 codes"),
    "codes rank": (lambda h: h["w.codes"].update(shape=[48]), "'w': 16 int4 codes take 8 bytes"),
    "bits dtype": (lambda h: h["b"].update(dtype="I8"), r"'b': int4\[3, 3\] takes uint8\[5\]"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_manifests_that_contradict_the_file(path, case):
    change, message = MANIFESTS[case]
    header, manifest, data = saved(path)
    text = change(manifest)
    write(path, header, text if isinstance(text, str) and text.startswith(("{", "[")) else manifest, data)
    with pytest.raises(jq.QuantError, match=message) as error:
        load(path)
    assert str(error.value).startswith(f"load at {path}, '")
    assert str(error.value).endswith(".")
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("case", HEADERS)
def test_arrays_that_contradict_the_manifest(path, case):
    change, message = HEADERS[case]
    header, manifest, data = saved(path)
    change(header)
    write(path, header, manifest, data)
    with pytest.raises(jq.QuantError, match=message):
        load(path)


def test_scales_of_scales_of_scales(path):
    names = [f"{i:03}" for i in range(MAX_DEPTH + 3)]
    scale = names[0]
    for name in names[1:]:
        q = {"qtype": "int8", "dtype": "float32", "minor": [], "length": None, "codes": name, "zero_point": None}
        scale = {"qtensor": q | {"scale": scale}}
    header = {name: entry("I8", (), (i, i + 1)) for i, name in enumerate(names)}
    write(path, header, {"version": 1, "tree": scale, "metadata": {}, "plan": None}, b"\0" * len(names))
    with pytest.raises(jq.QuantError, match=r"scale/scale/scale.*more than 100 levels deep"):
        load(path)


def test_fields_of_later_versions_are_ignored(path):
    header, manifest, data = saved(path)
    expected = load(path)
    manifest["more"] = {"a": 1}
    node(manifest, "w")[1]["qtensor"]["more"] = 1
    write(path, header, manifest, data)
    assert_same(expected, load(path))


def test_an_order_of_axes_has_one_name(path):
    """Kernels compare names; earlier versions wrote the order of a transposed weight by all of its axes."""
    header, manifest, data = saved(path)
    expected = load(path)
    content = node(manifest, "w")[1]["qtensor"]
    named = content["minor"]
    content["minor"] = [axis for axis in (-2, -1) if axis not in named] + named
    assert content["minor"] != named
    write(path, header, manifest, data)
    assert load(path)["w"].minor == expected["w"].minor == tuple(named)
    assert_same(expected, load(path))


def test_the_bare_arrays_of_a_file_with_a_bad_manifest(path):
    """What the message advises."""
    header, _, data = saved(path)
    del header["__metadata__"]
    path.write_bytes(put_together(header, data))
    arrays = load(path)
    assert set(arrays) == {"w.codes", "w.scale", "w.zero_point", "b", "x"}
    assert arrays["b"].dtype == np.uint8
    assert read_metadata(path) == ({}, None)


@pytest.mark.parametrize("fields", [{"metadata": 3}, {"version": 9}])
def test_read_metadata_checks_the_manifest(path, fields):
    header, manifest, data = saved(path)
    write(path, header, manifest | fields, data)
    with pytest.raises(jq.QuantError, match=r"^read_metadata at .*, 'jaxquant': "):
        read_metadata(path)
