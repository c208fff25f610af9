"""Trees of arrays and QTensors to files and back: every bit, at its true size, and the file whole at any time."""

import collections
import copy
import dataclasses
import errno
import json
import os
import stat
import subprocess
import sys
import tracemalloc
import types
from pathlib import Path
from typing import Any

import equinox as eqx
import flax.core
import flax.linen as nn
import flax.struct
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from io_files import assert_same, entry, put_together, take_apart
from jax_settings import needs_jit
from narrowed import instance

import jaxquant as jq
from jaxquant.core.qtensor import LEAVES
from jaxquant.core.qtypes import QTYPES
from jaxquant.io import load, native, read_metadata, save
from jaxquant.io.manifest import MAX_DEPTH
from jaxquant.io.native import NativeLeaves
from jaxquant.io.patterns import NAMELESS
from jaxquant.io.safetensors import DTYPES, SafetensorsFile, TensorSpec, write_safetensors

pytestmark = pytest.mark.every

ALL_DTYPES = [*DTYPES.values(), *NAMELESS]
PLAN = '{"rules": ["é"]}'


class Plan:
    def to_json(self):
        return PLAN


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def weights(shape=(64, 6), dtype=jnp.float32):
    """Unequal magnitudes in every row and column."""
    rows, columns = np.exp(-np.arange(shape[-2]) / 9.0), 1.0 + np.arange(shape[-1])
    return jnp.asarray(np.sin(np.arange(np.prod(shape))).reshape(shape) * rows[:, None] * columns, dtype)


def specs_of(qtype):
    if QTYPES[qtype].group_size:
        return [jq.QuantSpec(qtype)]
    symmetric = (True, False) if QTYPES[qtype].kind == "int" else (True,)
    return [
        jq.QuantSpec(qtype, granularity=granularity, group_size=size, symmetric=s)
        for s in symmetric
        for granularity, size in (("per_tensor", None), ("per_channel", None), ("per_group", 16))
    ]


def example(dtype, shape=(3, 5)):
    """Every bit pattern in turn, as far as the dtype has them."""
    raw = np.arange(np.prod(shape, dtype=int) * dtype.itemsize, dtype=np.uint8)
    if dtype == np.bool_ or NAMELESS.get(dtype, 8) < 8:
        raw = raw % (2 if dtype == np.bool_ else 1 << NAMELESS[dtype])
    return raw.view(dtype).reshape(shape)


# -- round trips -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("qtype", QTYPES)
def test_every_number_type(path, qtype):
    specs = {str(i): spec for i, spec in enumerate(specs_of(qtype))}
    params = jax.jit(lambda w: {name: jq.quantize(w, spec, reduce_axes=-2) for name, spec in specs.items()})(weights())
    save(path, params)
    again = load(path)
    assert_same(params, again)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(again))
    values = jax.jit(jq.dequantize_params)
    np.testing.assert_array_equal(values({"0": params["0"]})["0"], values({"0": again["0"]})["0"])


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=lambda dtype: dtype.name)
def test_every_dtype(path, dtype):
    arrays = [example(dtype), example(dtype, ()), example(dtype, (0, 3)), example(dtype, (1, 7, 1))]
    save(path, {"numpy": arrays, "transposed": arrays[0].T, "swapped": arrays[0].astype(dtype.newbyteorder(">"))})
    again = load(path)
    assert_same({"numpy": arrays, "transposed": arrays[0].T, "swapped": arrays[0]}, again)
    if dtype.itemsize < 8:
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(again))
        save(path, again)
        assert_same(arrays, load(path)["numpy"])


def test_64_bits_are_not_halved(path):
    x = np.array([1.0 + 2.0**-40, np.pi])
    save(path, {"x": x})
    assert_same({"x": x}, load(path))
    jax.config.update("jax_enable_x64", True)
    try:
        again = load(path)["x"]
    finally:
        jax.config.update("jax_enable_x64", False)
    assert isinstance(again, jax.Array)
    assert_same(x, again)


def test_quantized_scales_and_stacked_layers(path):
    q = jq.quantize(weights(), jq.QuantSpec("int4", granularity="per_group", group_size=8), reduce_axes=-2)
    double = jq.QTensor(
        q.codes,
        jq.quantize(q.scale, jq.QuantSpec("int8"), reduce_axes=-2),
        None,
        qtype=q.qtype,
        dtype=q.dtype,
        minor=q.minor,
        length=q.length,
    )
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), q, q)
    empty = jax.tree.map(lambda leaf: leaf[:0], stacked)
    nvfp4 = jq.quantize(weights(), jq.QuantSpec("nvfp4"), reduce_axes=-2)
    params = {"double": double, "stacked": stacked, "empty": empty, "nvfp4": nvfp4}
    save(path, params)
    assert_same(params, load(path))
    header, _ = take_apart(path.read_bytes())
    assert {"double.codes", "double.scale.codes", "double.scale.scale", "nvfp4.scale.codes"} <= set(header)


@pytest.mark.parametrize("depth", [MAX_DEPTH - 1, MAX_DEPTH])
def test_what_can_be_saved_can_be_loaded_however_deep(path, depth):
    tree = jq.quantize(weights(), jq.QuantSpec("nvfp4"), reduce_axes=-2)
    for _ in range(depth):
        tree = [tree]
    if depth == MAX_DEPTH:  # the scales are one level further down
        with pytest.raises(jq.QuantError, match="more than 100 levels deep"):
            save(path, tree)
    else:
        save(path, tree)
        assert_same(tree, load(path))


def test_static_fields(path):
    q = jq.quantize(weights((4, 8, 6), jnp.bfloat16), jq.QuantSpec("int3"), reduce_axes=(-3, -2))
    assert q.minor
    save(path, q)
    assert_same(q, load(path))


@pytest.mark.parametrize(
    "tree",
    [
        None,
        {},
        [],
        (),
        jnp.ones(3),
        {"": jnp.ones(3), "array": jnp.zeros(2)},
        {"a": None, "b": [None, {}, ()]},
        {0: jnp.ones(1), 10: jnp.ones(2), -2: jnp.ones(3)},
        {"__metadata__": jnp.ones(1), "jaxquant": jnp.ones(2)},
        {"a/b": jnp.ones(1), "a": {"b": jnp.ones(2)}},
        {"a": [jnp.ones(1)], "a/0": jnp.ones(2), "a/0~2": jnp.ones(3)},
        {"w": jq.quantize(jnp.ones((2, 2)), jq.QuantSpec("int8"), reduce_axes=-1), "w.codes": jnp.ones(1)},
        {"\ud800": jnp.ones(1), "\\ud800": jnp.ones(2), "é\0\n": jnp.ones(3)},
        {"nan": np.array([np.nan, -np.inf, -0.0], np.float32)},
    ],
    ids=repr,
)
def test_trees(path, tree):
    save(path, tree)
    assert_same(tree, load(path))


DTYPE = st.sampled_from(ALL_DTYPES)
SHAPE = st.lists(st.integers(0, 4), max_size=3).map(tuple)
LEAF = st.none() | st.builds(example, DTYPE, SHAPE) | st.builds(lambda d, s: jnp.zeros(s, d), st.just("float32"), SHAPE)
KEY = st.text(st.characters(exclude_categories=()), max_size=4) | st.sampled_from(["a", "b", "a/b", "a.codes", "~2"])
TREE = st.recursive(
    LEAF,
    lambda child: (
        st.lists(child, max_size=3)
        | st.lists(child, max_size=3).map(tuple)
        | st.dictionaries(KEY, child, max_size=3)
        | st.dictionaries(st.integers(-(2**62), 2**62), child, max_size=3)
    ),
    max_leaves=8,
)


@hypothesis.given(tree=TREE, metadata=st.dictionaries(st.text(), st.none() | st.booleans() | st.text() | st.integers()))
def test_trees_of_all_kinds(tmp_path_factory, tree, metadata):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    save(path, tree, metadata=metadata)
    assert_same(tree, load(path))
    assert read_metadata(path) == (metadata, None)


def test_equal_trees_give_equal_files(path, tmp_path):
    save(path, {"b": jnp.ones(2), "a": jnp.ones(1)})
    save(tmp_path / "other", {"a": jnp.ones(1), "b": jnp.ones(2)})
    assert path.read_bytes() == (tmp_path / "other").read_bytes()


def test_true_size(path):
    qtypes = ("int2", "int3", "int4", "int8", "nvfp4")
    params = jax.jit(lambda w: {qtype: jq.quantize(w, jq.QuantSpec(qtype), reduce_axes=-2) for qtype in qtypes})(
        weights((256, 64))
    )
    params["int4 array"] = jnp.ones((33, 3), jnp.int4)
    save(path, params)
    nbytes = sum(q.nbytes for name, q in params.items() if name in QTYPES) + (33 * 3 + 1) // 2
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert header % 8 == 0
    assert path.stat().st_size == header + nbytes
    assert header < 3000


def test_metadata_and_plan(path):
    metadata = {"step": 3, "loss": 0.25, "tags": ["a", None, True], "nested": {"π": "\ud800"}}
    save(path, {"x": jnp.ones(1)}, plan=Plan(), metadata=metadata)
    assert read_metadata(path).metadata == metadata
    assert read_metadata(path).plan == PLAN
    save(str(path), {"x": jnp.ones(1)})
    assert read_metadata(str(path)) == ({}, None)


def test_mappings_are_saved_as_dicts(path):
    inner = {"kernel": jnp.ones((2, 3))}
    save(path, flax.core.freeze({"a": inner, "b": collections.OrderedDict(inner)}))
    assert_same({"a": inner, "b": inner}, load(path))


def test_flax_pure_dicts(path):
    model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 2, rngs=nnx.Rngs(1)))
    state = nnx.to_pure_dict(nnx.state(model))
    assert list(state["layers"]) == [0, 1]
    save(path, state)
    assert_same(state, load(path))


def test_the_callers_tree_is_not_changed(path):
    swapped = np.arange(3, dtype=">f4")
    transposed = np.arange(6, dtype=np.float32).reshape(2, 3).T
    q = jq.quantize(weights(), jq.QuantSpec("int4"), reduce_axes=-2)
    params = {"b": [swapped, transposed], "a": {"q": q}, "c": (jnp.ones(2, jnp.int4),)}
    metadata = {"tags": ["x"]}
    before = [(id(leaf), np.asarray(leaf).tobytes(), str(leaf.dtype)) for leaf in jax.tree.leaves(params)]
    keys, metadata_before = list(params), copy.deepcopy(metadata)
    save(path, params, metadata=metadata)
    assert [(id(leaf), np.asarray(leaf).tobytes(), str(leaf.dtype)) for leaf in jax.tree.leaves(params)] == before
    assert (list(params), metadata) == (keys, metadata_before)
    assert params["a"]["q"] is q


def test_arrays_over_several_devices(path):
    mesh = jax.make_mesh((8,), ("x",))
    split, whole = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in (("x",), ()))
    x = weights((64, 6))
    q = jq.quantize(x, jq.QuantSpec("int8"), reduce_axes=-1)
    params = {"split": jax.device_put(x, split), "everywhere": jax.device_put(x, whole), "q": q}
    params["q split"] = jax.device_put(q, split)
    save(path, params)
    assert_same({"split": x, "everywhere": x, "q": q, "q split": q}, load(path))


def test_no_second_copy_of_the_model_when_saving(path):
    split = jax.sharding.NamedSharding(jax.make_mesh((8,), ("x",)), jax.sharding.PartitionSpec("x"))
    params = [jax.device_put(jnp.full(1 << 20, i, jnp.float32), split) for i in range(8)]  # 4 MiB each
    tracemalloc.start()
    try:
        save(path, params)
        left, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10 << 20
    assert left < 1 << 20  # JAX has not kept what was fetched


def test_what_was_loaded_does_not_depend_on_the_file(path):
    params = {"x": jnp.arange(1 << 20, dtype=jnp.float32), "y": np.arange(4.0), "z": jnp.ones(3, jnp.int4)}
    save(path, params)
    for _ in range(5):
        content = path.read_bytes()
        again = load(path)
        path.write_bytes(b"\0" * len(content))  # in place, as a careless program would
        assert_same(params, again)
        path.write_bytes(content)


# -- files without a manifest ------------------------------------------------------------------------------------------


def plain(path, names):
    arrays = {name: np.full(2, i, np.float32) for i, name in enumerate(names)}
    specs = {name: TensorSpec(array.dtype, array.shape) for name, array in arrays.items()}
    write_safetensors(path, specs, arrays.__getitem__, {"format": "np"})
    return arrays


def test_names_become_a_tree(path):
    arrays = plain(path, ["a/b", "a/c/0", "d.e"])
    tree = {"a": {"b": arrays["a/b"], "c": {"0": arrays["a/c/0"]}}, "d.e": arrays["d.e"]}
    assert_same(tree, load(path))
    assert read_metadata(path) == ({"format": "np"}, None)


@pytest.mark.parametrize("names", [["a", "a/b"], ["a/b", "a/b/c"], ["a/b/c", "a", "z"]])
def test_names_that_are_no_tree_stay_flat(path, names):
    assert_same(plain(path, names), load(path))


def test_the_order_of_such_names_does_not_matter(path):
    header = {"a/b": entry("F32", (2,), (0, 8)), "a": entry("F32", (1,), (8, 12))}
    path.write_bytes(put_together(header, b"\0" * 12))
    assert_same({"a/b": jnp.zeros(2), "a": jnp.zeros(1)}, load(path))


def test_names_too_deep(path):
    plain(path, ["/" * 100_000])
    with pytest.raises(jq.QuantError, match="more than 100 levels deep; got levels=100000"):
        load(path)


# -- interrupted -------------------------------------------------------------------------------------------------------


def fails_on(call, exception, then):
    """A function that raises at its n-th call and calls ``then`` before."""
    calls = iter(range(1, call))

    def function(*args, **kwargs):
        if next(calls, None) is None:
            raise exception
        return then(*args, **kwargs)

    return function


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize(
    "owner, name, call, exception",
    [
        (native, "to_host", 3, KeyboardInterrupt()),
        (native, "to_host", 2, MemoryError()),
        (np, "ascontiguousarray", 2, FULL),
        (os, "fsync", 1, FULL),
        (os, "replace", 1, PermissionError(errno.EACCES, "Permission denied")),
    ],
)
def test_an_interrupted_save_leaves_the_old_file(path, monkeypatch, exists, owner, name, call, exception):
    if exists:
        save(path, {"old": jnp.ones(3)})
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    monkeypatch.setattr(owner, name, fails_on(call, exception, getattr(owner, name)))
    with pytest.raises(jq.QuantError if exception is FULL else type(exception)):
        save(path, [jnp.full(1 << 12, i) for i in range(4)])
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


def test_an_array_that_changes_while_it_is_saved(path, monkeypatch):
    monkeypatch.setattr(native, "to_host", lambda leaf: np.zeros(7))
    with pytest.raises(jq.QuantError, match="save at x: the array has changed"):
        save(path, {"x": jnp.ones(3)})
    assert not list(path.parent.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="permissions and links of POSIX")
def test_permissions_and_links(path, tmp_path):
    mask = os.umask(0o027)
    try:
        save(path, {"x": jnp.ones(1)})
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    link = tmp_path / "latest"
    link.symlink_to(path.name)
    save(link, {"x": jnp.ones(2)})
    assert link.is_symlink()
    assert load(path)["x"].shape == (2,)


def test_saving_over_what_was_loaded(path):
    save(path, {"x": jnp.arange(5)})
    save(path, load(path))
    assert_same({"x": jnp.arange(5)}, load(path))


# -- instances of classes that JAX knows, and how a model runs ---------------------------------------------------------


Pair = collections.namedtuple("Pair", "a b")
Empty = collections.namedtuple("Empty", ())


@flax.struct.dataclass
class Stats:
    mean: Any
    name: str = flax.struct.field(pytree_node=False)


@jax.tree_util.register_pytree_node_class
class Bare(collections.UserList):
    """Registered without names: JAX counts its children."""

    def tree_flatten(self):
        return self.data, None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(children)


def quantized_tree():
    return {"w": jq.quantize(weights((16, 6)), jq.QuantSpec("int4"), reduce_axes=-2), "b": jnp.arange(6.0)}


CONTAINERS = {
    "dataclass": (lambda w, b: Stats({"w": w, "b": b}, "n"), lambda w, b: {"mean": {"b": b, "w": w}}),
    "named tuple": (lambda w, b: Pair(w, [b, None]), lambda w, b: {"a": w, "b": [b, None]}),
    "empty": (lambda w, b: [w, b, Empty()], lambda w, b: [w, b, {}]),
    "counted": (lambda w, b: Bare([w, (b,)]), lambda w, b: {0: w, 1: (b,)}),
    "boxed": (lambda w, b: nn.Partitioned({"w": w, "b": b}, names=("x",)), lambda w, b: {"value": {"w": w, "b": b}}),
    "equinox": (
        lambda w, b: eqx.tree_at(lambda m: (m.weight, m.bias), eqx.nn.Linear(6, 16, key=jax.random.key(0)), (w, b)),
        lambda w, b: {"bias": b, "weight": w},
    ),
    "nnx.State": (
        lambda w, b: nnx.State({"layer": {"bias": nnx.Param(b), "kernel": nnx.Param(w)}}),
        lambda w, b: {"layer": {"bias": {"value": b}, "kernel": {"value": w}}},
    ),
    "optax": (
        lambda w, b: optax.ScaleByAdamState(jnp.zeros((), jnp.int32), {"w": w}, {"w": b}),
        lambda w, b: {"count": jnp.zeros((), jnp.int32), "mu": {"w": w}, "nu": {"w": b}},
    ),
}


@pytest.mark.parametrize("case", CONTAINERS)
def test_registered_classes_are_saved_under_the_names_of_their_key_paths(path, case):
    make, named = CONTAINERS[case]
    leaves = quantized_tree()
    tree = make(leaves["w"], leaves["b"])
    save(path, tree)
    assert_same(load(path), named(leaves["w"], leaves["b"]))
    like = load(path, like=tree)
    assert jax.tree.structure(like) == jax.tree.structure(tree)  # the class, and its static fields
    assert_same(jax.tree.leaves(like), jax.tree.leaves(tree))
    shapes = make(jax.ShapeDtypeStruct((16, 6), jnp.float32), jax.ShapeDtypeStruct((6,), jnp.float32))
    assert jax.tree.structure(load(path, like=shapes)) == jax.tree.structure(tree)


def test_names_on_disk_are_the_paths_of_the_plan(path):
    graph, state = nnx.split(nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
    fn, x = (lambda s, x: nnx.merge(graph, s)(x)), jnp.linspace(-1.0, 1.0, 8)[None]
    plan = jq.make_plan(fn, state, x, rules=[jq.Rule("kernel", jq.recipes.w8a16())])
    qstate = jq.quantize_params(state, plan)
    save(path, qstate, plan=plan)
    assert {name.removesuffix(".codes") for name in SafetensorsFile(path).tensors} > set(plan)
    model = jq.io.load_model(path, like=state)
    np.testing.assert_array_equal(jq.quantized(fn, model.plan)(model.params, x), jq.quantized(fn, plan)(qstate, x))


def static_model():
    fn, x = (lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"]), weights((4, 32))
    params = {"v": weights((16, 8)), "w": weights((32, 16))}
    plan = jq.make_plan(fn, params, x, rules=[jq.Rule(".", jq.recipes.w8a8(static=True))])
    return fn, x, jq.quantize_params(params, plan), plan, jq.act_state(plan, jq.calibrate(fn, plan, params, [x]))


def test_a_model_runs_as_it_was_saved(path):
    fn, x, qparams, plan, state = static_model()
    jq.io.save(path, qparams, plan=plan, state=state, metadata={"step": 3})
    model = jq.io.load_model(path)
    assert model.plan == plan
    assert_same(model.params, qparams)
    assert_same(model.state, state)
    assert read_metadata(path).metadata == {"step": 3}
    np.testing.assert_array_equal(
        jq.quantized(fn, model.plan, model.state)(model.params, x), jq.quantized(fn, plan, state)(qparams, x)
    )


def test_weights_without_their_plan_are_loaded_with_a_warning(path):
    _, _, qparams, plan, state = static_model()
    jq.io.save(path, qparams, plan=plan, state=state)
    with pytest.warns(UserWarning, match=r"says how its activations are quantized.* Use load_model"):
        assert_same(load(path), qparams)
    fn, x = (lambda p, x: x @ p["w"]), weights((4, 32))
    plan = jq.make_plan(fn, qparams, x, rules=[jq.Rule("w", jq.recipes.w8a16())])
    jq.io.save(path, qparams, plan=plan)
    assert_same(load(path), qparams)  # weights say all there is to say: no warning
    jq.io.save(path, qparams)
    model = jq.io.load_model(path)
    assert (model.plan, model.state) == (None, None)


def test_state_needs_its_plan_and_a_name_of_its_own(path):
    _, _, qparams, plan, state = static_model()
    with pytest.raises(jq.QuantError, match="save: state is of no use without its plan"):
        jq.io.save(path, qparams, state=state)
    params = {"state": state}  # the same names
    jq.io.save(path, params, plan=plan, state=state)
    model = jq.io.load_model(path)
    assert_same(model.params, params)
    assert_same(model.state, state)


def test_a_plan_of_somebody_else_is_refused_by_load_model_alone(path):
    theirs: Any = types.SimpleNamespace(to_json=lambda: '{"theirs": 1}')
    save(path, {"w": jnp.ones(2)}, plan=theirs)
    assert_same(load(path), {"w": jnp.ones(2)})
    with pytest.raises(jq.QuantError, match="not a plan"):
        jq.io.load_model(path)


# -- refused -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Layer:
    kernel: jax.Array


@jax.tree_util.register_pytree_with_keys_class
class Twice(collections.namedtuple("Twice", "a b")):
    def tree_flatten_with_keys(self):
        return [(jax.tree_util.GetAttrKey("a"), child) for child in self], None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


ITSELF: list = []
ITSELF += [ITSELF, ITSELF]


def deep():
    tree = jnp.ones(1)
    for _ in range(MAX_DEPTH + 1):
        tree = [tree]
    return tree


def qtensor(**fields):
    q = jq.quantize(weights((16, 6)), jq.QuantSpec("int4", symmetric=False), reduce_axes=-2)
    static = {name: fields.get(name, getattr(q, name)) for name in ("qtype", "dtype", "minor", "length")}
    arrays = (fields.get(name, getattr(q, name)) for name in LEAVES)
    return jq.QTensor(*arrays, **static)


def scale_of_itself():
    q = qtensor(zero_point=None)
    q.scale = q
    return q


def deleted():
    x = jnp.ones(2)
    x.delete()
    return x


REFUSED = {
    "float": (lambda: 1.5, "only arrays can be saved; got leaf=1.5, type='float'. Make it an array with jnp.asarray."),
    "bool": (lambda: True, "only arrays can be saved; .* jnp.asarray"),
    "string": (lambda: "x", "only arrays can be saved"),
    "set": (lambda: {1, 2}, "only arrays can be saved"),
    "abstract": (lambda: jax.ShapeDtypeStruct((2,), jnp.float32), "only arrays can be saved"),
    "dataclass": (lambda: Layer(jnp.ones(1)), "type='Layer'. Register its class with JAX"),
    "function in a module": (
        lambda: eqx.nn.MLP(2, 2, 2, 1, key=jax.random.key(0)).activation,
        "arrays of the module alone",
    ),
    "key twice": (lambda: Twice(jnp.ones(1), jnp.ones(1)), "a container has a key twice; got type='Twice'"),
    "key": (lambda: jax.random.key(0), "jax.random.key_data"),
    "object array": (lambda: np.array([None]), "this dtype cannot be saved; got dtype='object'"),
    "string array": (lambda: np.array(["x"]), "this dtype cannot be saved"),
    "float6": (lambda: np.zeros(2, ml_dtypes.float6_e2m3fn), "this dtype cannot be saved; got dtype='float6_e2m3fn'"),
    "deleted": (deleted, "deleted or donated"),
    "rank": (lambda: np.zeros((1,) * 33), "too many or too large dimensions"),
    "size": (lambda: np.zeros((0, 2**60), np.uint8), "too many or too large dimensions"),
    "mixed keys": (lambda: {1: None, "a": None}, "must be all strings or all 64-bit integers; got types="),
    "bool keys": (lambda: {True: None}, "all strings or all 64-bit integers"),
    "tuple keys": (lambda: {("a",): None}, "all strings or all 64-bit integers"),
    "huge keys": (lambda: {10**5000: None}, "all strings or all 64-bit integers"),
    "deep": (deep, "more than 100 levels deep"),
    "itself": (lambda: ITSELF, "more than 100 levels deep"),
    "scale itself": (scale_of_itself, "more than 100 levels deep"),
    "qtype": (lambda: qtensor(qtype="int9"), "unknown number type; got qtype='int9'"),
    "dtype": (lambda: qtensor(dtype=np.int32), "dtype must be a float dtype"),
    "codes dtype": (lambda: qtensor(codes=jnp.ones((6, 8), jnp.int8)), "not the dtype of int4 codes"),
    "codes missing": (lambda: qtensor(codes=None), "w.codes: only arrays"),
    "scale missing": (lambda: qtensor(scale=None), "w.scale: only arrays"),
    "scale integer": (lambda: qtensor(scale=jnp.ones((1, 6), jnp.int32)), "scales must be floats"),
    "scale rank": (lambda: qtensor(scale=jnp.ones(6)), "one scale per block"),
    "scale blocks": (lambda: qtensor(scale=jnp.ones((3, 6))), "one scale per block"),
    "scale NaN": (lambda: qtensor(scale=np.full((1, 6), np.nan, np.float32)), "scales must be finite"),
    "scale inf": (lambda: qtensor(scale=np.full((1, 6), np.inf)), "scales must be finite"),
    "zero_point NaN": (lambda: qtensor(zero_point=np.full((1, 6), np.nan, np.float32)), "zero points must be finite"),
    "offset inf": (lambda: qtensor(offset=jnp.full((1, 6), jnp.inf)), "offsets must be finite"),
    "codes NaN": (
        lambda: qtensor(qtype="float8_e4m3fn", length=None, codes=np.full((6, 16), np.nan, ml_dtypes.float8_e4m3fn)),
        "the codes of a weight must be finite; got bad=96",
    ),
    "permutation": (lambda: qtensor(permutation=jnp.zeros((16, 1), jnp.int32)), "each position once"),
    "zero_point": (lambda: qtensor(zero_point=jnp.ones((1, 1), jnp.int8)), "zero_point must have the shape of scale"),
    "zero_point bool": (lambda: qtensor(zero_point=jnp.ones((1, 6), bool)), "zero points must be numbers"),
    "length": (lambda: qtensor(length=17), "17 int4 codes take 9 bytes; got length=17"),
    "no length": (lambda: qtensor(length=None), "packed codes need their length"),
    "length of int8": (
        lambda: qtensor(qtype="int8", codes=jnp.ones((16, 6), jnp.int8)),
        "int8 codes are not packed and have no length",
    ),
    "minor": (lambda: qtensor(minor=(-3,)), "minor must be different axes from -2 to -1"),
    "minor twice": (lambda: qtensor(minor=(-1, -1)), "minor must be different axes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written(path, case):
    make, message = REFUSED[case]
    with pytest.raises(jq.QuantError, match=message) as error:
        save(path, {"first": jnp.ones(3), "w": make()})
    assert str(error.value).startswith("save at w")
    assert not list(path.parent.iterdir())


NAN = np.float32(np.nan).tobytes()
DAMAGE = {  # field, and bytes that no sound file has there
    "scale": (lambda: qtensor(), "scale", NAN, "scales"),
    "codes of e4m3": (lambda: quantized("float8_e4m3fn"), "codes", b"\xff", "the codes of a weight"),
    "codes of e5m2": (lambda: quantized("float8_e5m2"), "codes", b"\x7c", "the codes of a weight"),
    "scale of mxfp4": (lambda: quantized("mxfp4"), "scale", b"\xff", "scales"),
    "scale of nvfp4": (lambda: quantized("nvfp4"), "scale.codes", b"\x7f", "scales"),
    "factor of nvfp4": (lambda: quantized("nvfp4"), "scale.scale", NAN, "scales"),
    "zero_point": (lambda: qtensor(zero_point=jnp.ones((1, 6))), "zero_point", NAN, "zero points"),
    "offset": (lambda: qtensor(offset=jnp.ones((1, 6))), "offset", NAN, "offsets"),
    "permutation": (lambda: qtensor(permutation=jnp.arange(16)[:, None]), "permutation", b"\x02", "a permutation"),
}


def quantized(qtype):
    return jq.quantize(weights((16, 32)) * 1e3, jq.QuantSpec(qtype), reduce_axes=-1)


def damage(path, name, pattern):
    """Replaces the first bytes of an array in a file."""
    raw = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    at = start + json.loads(raw[8:start])[name]["data_offsets"][0]
    raw[at : at + len(pattern)] = pattern
    path.write_bytes(raw)


@pytest.mark.every
@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_numbers_of_a_weight_are_refused(path, case):
    make, field, pattern, what = DAMAGE[case]
    save(path, {"first": jnp.ones(3), "w": make()})
    load(path)
    damage(path, f"w.{field}", pattern)
    for read in (load, lambda path: NativeLeaves(path, function="load")["w"]):
        with pytest.raises(jq.QuantError, match=rf"load at .*, 'w': {what} must .*The file is damaged"):
            read(path)


def test_state_must_be_finite(path):
    _, _, qparams, plan, state = static_model()
    weight = min(state)
    infinite = state | {weight: state[weight] | {"scale": state[weight]["scale"] * jnp.inf}}
    with pytest.raises(jq.QuantError, match=f"save at state/{weight}/scale: state must be finite; got bad=1. Look for"):
        save(path, qparams, plan=plan, state=infinite)
    assert not list(path.parent.iterdir())
    save(path, qparams, plan=plan, state=state)
    damage(path, f"state/{weight}/scale", NAN)
    with pytest.raises(jq.QuantError, match=f"load_model at .*'state/{weight}/scale': state must be finite; got bad=1"):
        jq.io.load_model(path)


@pytest.mark.parametrize("qtype", ["nvfp4", "int4"])
def test_scales_of_scales_must_be_finite(path, qtype):
    q = jq.quantize(weights(), jq.QuantSpec("nvfp4"), reduce_axes=-2)
    scale = instance(jq.QTensor, q.scale)
    scale.scale = instance(jax.Array, scale.scale) * jnp.inf
    with pytest.raises(jq.QuantError, match=r"save at w.scale: scales must be finite"):
        save(path, {"w": q})


@needs_jit
def test_traced_arrays(path):
    with pytest.raises(jq.QuantError, match=r"save at x: a traced array has no values yet; .* outside jit"):
        jax.jit(lambda x: save(path, {"x": x}))(jnp.ones(2))


def test_remote_arrays(path, monkeypatch):
    x = jnp.ones(2)
    monkeypatch.setattr(type(x), "is_fully_addressable", False)
    monkeypatch.setattr(type(x), "is_fully_replicated", False)
    with pytest.raises(jq.QuantError, match="save at x: parts of the array are on other machines"):
        save(path, {"x": x})


@pytest.mark.parametrize(
    "metadata",
    [{1: "a"}, {"a": (1, 2)}, {"a": {2}}, {"a": float("nan")}, {"a": np.float32(1)}, {"a": ITSELF}, [1], "text"],
    ids=lambda m: type(m).__name__,
)
def test_metadata_that_json_would_change(path, metadata):
    with pytest.raises(jq.QuantError, match="save: metadata must be what JSON can hold; got metadata="):
        save(path, {}, metadata=metadata)


@pytest.mark.parametrize("plan", ["{}", 3, type("P", (), {"to_json": lambda self: {}})()])
def test_plans_without_json(path, plan):
    with pytest.raises(jq.QuantError, match=r"save: plan must have a method to_json\(\)"):
        save(path, {}, plan=plan)


def test_places_that_cannot_be_files(path, tmp_path):
    with pytest.raises(jq.QuantError, match=r"save at .*missing: the directory does not exist. Create it first"):
        save(tmp_path / "missing" / "x.safetensors", {})
    with pytest.raises(jq.QuantError, match=r"save at .*: the path is a directory. Name a file in it"):
        save(tmp_path, {})
    with pytest.raises(jq.QuantError, match=r"load at .*: the path is a directory.*load_model"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError):
        load(path)


def test_a_header_too_long(path, monkeypatch):
    monkeypatch.setattr("jaxquant.io.safetensors._MAX_HEADER", 1000)
    with pytest.raises(jq.QuantError, match="the header may have at most 1000 bytes"):
        save(path, {}, metadata={"text": "x" * 2000})
    assert not list(path.parent.iterdir())


def test_import_loads_nothing_optional():
    program = "import sys, jaxquant.io; print(*{name.partition('.')[0] for name in sys.modules})"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not set(done.stdout.split()) & {"safetensors", "flax", "optax", "torch"}


def test_the_manifest_is_what_the_documentation_says(path):
    params: dict[str, Any] = {
        "layers": [{"kernel": jq.quantize(jnp.ones((4, 6)), jq.QuantSpec("int4"), reduce_axes=-2)}, None]
    }
    params["table"] = jnp.ones((3, 3), jnp.int4)
    save(path, params, plan=Plan(), metadata={"step": 1})
    header, _ = take_apart(path.read_bytes())
    assert json.loads(header.pop("__metadata__")["jaxquant"]) == {
        "version": 1,
        "metadata": {"step": 1},
        "plan": PLAN,
        "tree": {
            "dict": [
                [
                    "layers",
                    {
                        "list": [
                            {
                                "dict": [
                                    [
                                        "kernel",
                                        {
                                            "qtensor": {
                                                "qtype": "int4",
                                                "dtype": "float32",
                                                "minor": [-2],
                                                "length": 4,
                                                "codes": "layers/0/kernel.codes",
                                                "scale": "layers/0/kernel.scale",
                                                "zero_point": None,
                                            }
                                        },
                                    ]
                                ]
                            },
                            None,
                        ]
                    },
                ],
                ["table", {"bits": {"name": "table", "dtype": "int4", "shape": [3, 3]}}],
            ]
        },
    }
    assert header == {
        "layers/0/kernel.scale": {"dtype": "F32", "shape": [1, 6], "data_offsets": [0, 24]},
        "layers/0/kernel.codes": {"dtype": "U8", "shape": [6, 2], "data_offsets": [24, 36]},
        "table": {"dtype": "U8", "shape": [5], "data_offsets": [36, 41]},
    }
