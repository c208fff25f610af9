"""`explain` for accelerators that are not here: programs of the real compilers, read and not run.

Needs the compilers (extras ``aot-tpu`` and ``aot-gpu``); the tests of one that is not installed are left out.
"""

import importlib.util
import json
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxquant as jq
from jaxquant import QuantError, ops, recipes
from jaxquant.programs import compilers
from jaxquant.programs.chips import CHIPS, slice_of_chips
from jaxquant.programs.compilers import compiled_for
from jaxquant.programs.estimates import estimate

pytestmark = pytest.mark.every

M, K, N = 8, 512, 1024
MATMUL = (((1,), (0,)), ((), ()))

needs_tpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs jaxquant[aot-tpu]")
plugins = importlib.util.find_spec("jax_plugins")  # a folder of them all, which need not be there
needs_gpu = pytest.mark.skipif(
    plugins is None or importlib.util.find_spec("jax_plugins.xla_cuda12") is None, reason="needs aot-gpu"
)


def weight(spec, shape=(K, N)):
    def make():
        return jq.quantize(jnp.zeros(shape, jnp.bfloat16), spec.weight, reduce_axes=(-2,)).store((-2,))

    return jax.eval_shape(make)


def explained(*args, **kwargs) -> Any:
    return jq.explain(*args, **kwargs)


def product(spec):
    return lambda p, x: ops.dot_general(x, p["w"], MATMUL, spec=spec)


def x(rows=M):
    return jax.ShapeDtypeStruct((rows, K), jnp.bfloat16)


@needs_tpu
@pytest.mark.usefixtures("scheduled")
def test_a_product_on_a_tpu():
    spec = recipes.w8a8()
    found = explained(product(spec), {"w": weight(spec)}, x(), target="TPU  v5e")
    use, chip = found["w"], CHIPS["tpu v5e"]
    assert use.kernels == ("int8",)
    assert use.written == 0
    assert use.nbytes == K * N + 4 * N
    assert found.target.devices == 1
    assert "libtpu" in found.target.compiler
    # What has to be read and written, and the arithmetic, from the shapes alone. XLA pads scales to whole tiles.
    least = K * N + 4 * N + 2 * M * K + 2 * M * N
    assert least <= found.arguments + found.results <= 1.05 * least
    assert found.floor == pytest.approx((found.arguments + found.results) / chip.bandwidth)
    assert use.floor == pytest.approx(max(use.nbytes / 819e9, 2 * M * K * N / 394e12))
    assert found.seconds >= found.floor
    assert found.fits
    assert found.collectives == ()
    text = str(found)
    assert "nothing was run" in text
    assert all(len(line) <= 80 or line.startswith(("for one", "whole")) for line in text.splitlines())
    assert json.loads(found.to_json())["uses"][0]["kernels"] == ["int8"]


@needs_tpu
def test_a_longer_path_is_cut_to_the_width_of_a_terminal():
    spec = recipes.w8a16()
    path = "params/decoder/layers_of_the_second_half/feed_forward/up_projection/kernel/of_the_model"
    fn = lambda p, x: ops.dot_general(x, p[path], MATMUL, spec=spec)  # noqa: E731
    found = explained(fn, {path: weight(spec)}, x(), target="tpu v6e")
    assert found[path].path == path
    head, rule, row, *_ = str(found).splitlines()
    assert max(map(len, (head, rule, row))) <= 80
    assert row.startswith("...")


@needs_tpu
def test_stacked_layers_are_read_once_each():
    spec = recipes.w8a16()
    layers = jax.tree.map(lambda v: jax.ShapeDtypeStruct((5, *v.shape), v.dtype), weight(spec, (K, K)))

    def fn(p, x):
        return jax.lax.scan(lambda x, q: (ops.dot_general(x, q, MATMUL, spec=spec), None), x, p["layers"])[0]

    use = explained(fn, {"layers": layers}, x(4096), target="tpu v5e")["layers"]
    assert use.kernels == ("bfloat16",)
    assert use.floor == pytest.approx(5 * 2 * 4096 * K * K / 197e12)
    assert use.seconds > use.floor


@needs_tpu
def test_a_mesh_of_shapes_alone():
    """Sharded over 4 x 4 devices, weights that are divided over the data axis too: what is gathered is codes."""
    mesh = AbstractMesh((4, 4), ("data", "model"))
    spec = recipes.w8a8()
    q = weight(spec)

    def place(x, *axes):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P(*axes)))

    q = q.replace(codes=place(q.codes, "model", "data"), scale=place(q.scale, None, "model"))
    found = explained(product(spec), {"w": q}, place(x(64), "data"), target="tpu v5e")
    assert found.target.devices == 16
    assert found.target.topology == "v5e:4x4"
    gathered = {c.dtype: c.nbytes for c in found.collectives if c.kind == "all-gather"}
    assert gathered["s8"] == K * N / 4  # a column of devices has its columns of the weight whole
    assert found["w"].nbytes == K * N / 16 + 4 * N / 4
    assert "of s8" in str(found)


@needs_gpu
@pytest.mark.parametrize("target", ["h100", "a100"])
def test_a_product_on_a_gpu(target):
    spec = recipes.w8a8()
    found = explained(product(spec), {"w": weight(spec)}, x(64), target=target)
    assert found["w"].kernels == ("quantized_product",)
    moved = found.arguments + found.results + 2 * found.temporaries
    assert found.seconds == pytest.approx(moved / CHIPS[target].bandwidth)
    assert found["w"].seconds is None  # that compiler gives no estimates


@needs_tpu
def test_a_page_with_the_costs(tmp_path):
    spec = recipes.w8a8()
    w = jax.random.normal(jax.random.key(0), (64, 32))
    plan = jq.make_plan(lambda p, x: x @ p["w"], {"w": w}, jnp.ones((2, 64)), rules=[jq.Rule("w", spec)])
    params = jq.quantize_params({"w": w}, plan)
    fn = jq.quantized(lambda p, x: x @ p["w"], plan)
    explanation = jq.explain(fn, params, jnp.ones((2, 64)), target="tpu v5e")
    found = jq.compare(lambda p, x: x @ p["w"], {"w": w}, params, [jnp.ones((2, 64))], plan=plan)
    found.save(tmp_path / "page.html", explanation=explanation)
    page = (tmp_path / "page.html").read_text()
    assert "What the program costs" in page
    assert "estimates of the TPU compiler" in page
    found.save(tmp_path / "page.html")
    assert "What the program costs" not in (tmp_path / "page.html").read_text()


def test_targets_that_are_none():
    spec = recipes.w8a8()
    for target, rule in (
        ("tpu v9", "no accelerator that is known.*tpu v5e"),
        ("tpu v5e:4*4", "no shape of a slice"),
        ("tpu v5e:0x4", "no shape of a slice"),
    ):
        with pytest.raises(QuantError, match=rule):
            jq.explain(product(spec), {"w": weight(spec)}, x(), target=target)
    with pytest.raises(QuantError, match="fewer devices than the mesh"):
        slice_of_chips("explain", "tpu v5e:2x2", 8)
    with pytest.raises(QuantError, match="no slice is known"):
        slice_of_chips("explain", "tpu v6e", 1000)


def test_slices_that_have_enough_devices():
    for chip in CHIPS.values():
        for devices in (1, 2, 4, 8, 64):
            found = slice_of_chips("explain", chip.name, devices)
            assert found.devices >= devices
            assert found.devices == math.prod(found.shape) * chip.per_chip
    assert slice_of_chips("explain", "tpu v7x", 8).topology == "tpu7x:2x2x1"


def test_a_compiler_that_is_not_installed(monkeypatch):
    from jax.experimental import topologies

    def missing(*_, **__):
        raise RuntimeError("no such plugin")

    compilers._devices.cache_clear()
    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    spec = recipes.w8a8()
    with pytest.raises(QuantError, match=r"no such plugin.*jaxquant\[aot-tpu\]"):
        jq.explain(product(spec), {"w": weight(spec)}, x(), target="tpu v5e")
    with pytest.raises(QuantError, match=r"jaxquant\[aot-gpu\]"):
        jq.explain(product(spec), {"w": weight(spec)}, x(), target="h100")


def test_arguments_of_two_meshes():
    one, other = AbstractMesh((2,), ("a",)), AbstractMesh((4,), ("a",))
    shapes = [jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=NamedSharding(m, P("a"))) for m in (one, other)]
    with pytest.raises(QuantError, match="several meshes"):
        compilers.compiled_for("explain", "tpu v5e", lambda a, b: a + b, tuple(shapes))


_LINE = re.compile(r"%([\w.-]+) = (\w+\[.*)")
_DOT = re.compile(r" (?:dot|convolution)\(%([\w.-]+), %([\w.-]+)\)")
_TRITON = re.compile(r" custom-call\(%([\w.-]+), %([\w.-]+),[^\n]*gpu\.triton")  # it multiplies codes


def factors(text: str) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    """Of each product in a program: the types that are read, and the types that are multiplied."""
    found = []
    for block in text.split("\n\n"):
        lines = dict(_LINE.findall(block))
        for left, right in _DOT.findall(block):
            read = [re.sub(r".* convert\(%([\w.-]+)\).*", r"\1", lines[name]) for name in (left, right)]
            read = [name if name in lines else own for name, own in zip(read, (left, right), strict=True)]
            types = [tuple(lines[name].partition("[")[0] for name in names) for names in (read, (left, right))]
            found.append(tuple(types))
        for left, right in _TRITON.findall(block):
            codes = (re.sub(r".* bitcast\(%([\w.-]+)\).*", r"\1", lines[name]) for name in (left, right))
            types = tuple(lines[name].partition("[")[0] for name in codes)
            found.append((types, types))
    return found


@pytest.mark.parametrize(
    "target, multiplied",
    [
        pytest.param("h100", {"f8e4m3fn", "bf16"}, marks=needs_gpu),
        pytest.param("tpu v7x", {"f8e4m3fn", "f8e5m2"}, marks=needs_tpu),
    ],
)
def test_all_products_of_fp8_training_read_fp8(target, multiplied):
    """e4m3 by e4m3, and e5m2 by e4m3 twice: a v7x multiplies them, an H100 the first, and the others in bfloat16."""

    def loss(x, w):
        return jnp.sum(ops.dot_general(x, w, MATMUL, spec=recipes.fp8_train()).astype(jnp.float32) ** 2)

    shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((256, K), (K, N))]
    text = compilers.compiled_for("test", target, jax.grad(loss, (0, 1)), tuple(shapes)).executable.as_text()
    products = factors(text)
    assert sorted(tuple(sorted(read)) for read, _ in products) == [
        ("f8e4m3fn", "f8e4m3fn"),
        ("f8e4m3fn", "f8e5m2"),
        ("f8e4m3fn", "f8e5m2"),
    ]
    assert {kind for _, kinds in products for kind in kinds} == multiplied


@needs_tpu
def test_a_donated_cache_is_not_a_result_again():
    cache, token = jax.ShapeDtypeStruct((8, 1024, 128), jnp.bfloat16), jax.ShapeDtypeStruct((8, 1, 128), jnp.bfloat16)

    def step(cache: jax.Array, token: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(cache, token, (0, 3, 0))

    size = 8 * 1024 * 128 * 2
    copied, kept = (
        estimate(compiled_for("test", "tpu v5e", step, (cache, token), donated=donated)) for donated in ((), (0,))
    )
    assert copied.results == size
    assert kept.results == 0
    assert kept.arguments == copied.arguments >= size
    assert kept.seconds is not None
    assert copied.seconds is not None
    assert kept.seconds < copied.seconds
