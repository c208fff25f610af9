"""The table of kernels: who is asked where, and that nothing made for one platform is lowered for another."""

import itertools
import re
from typing import Any, get_args

import jax
import jax.numpy as jnp
import pytest
from double_precision import double_precision
from jax import lax
from narrowed import present

import jaxquant as jq
from jaxquant import ops, recipes
from jaxquant.core.abstract import abstract
from jaxquant.core.by_platform import Platform, Target
from jaxquant.ops.axes import Axes
from jaxquant.ops.kernel import kernel
from jaxquant.ops.kernels.cpu import machine
from jaxquant.ops.problem import Convolution, Geometry, Product, RaggedProduct
from jaxquant.ops.select import TABLE, select
from jaxquant.ops.trained import TrainedTensor

MATMUL = (((1,), (0,)), ((), ()))
H100 = Target("cuda", "NVIDIA H100 80GB HBM3")
V6E, V7X = Target("tpu", "TPU v6 lite"), Target("tpu", "TPU7x")
SCHEMES = {
    "w8a8": recipes.w8a8(),
    "w8a16": recipes.w8a16(),
    "w8a16 zero": jq.OpSpec(jq.QuantSpec("uint8", symmetric=False)),
    "w4a16": recipes.w4a16(32),
    "w4a16 zero": recipes.w4a16(32, symmetric=False),
    "w4a16 channel": recipes.w4a16(None),
    "two-level": recipes.w4a16(32, two_level=True),
    "w4a8": recipes.w4a8(32),
    "int3": jq.OpSpec(jq.QuantSpec("int3", granularity="per_group", group_size=32)),
    "nf4": recipes.nf4(32),
    "mxfp4": recipes.mxfp4(),
    "nvfp4": recipes.nvfp4(),
    "mxfp8": recipes.mxfp8(),
    "fp8": recipes.fp8(),
}
PLATFORMS = {"tpu": "tpu", "cuda": "gpu"}


def stored(spec, dtype, target, *lead):
    """A weight [256, 128], or experts, without values, as codes lie for a platform."""

    def make():
        return jq.ops.lay_out(jq.quantize(jnp.zeros((*lead, 256, 128), dtype), spec.weight, reduce_axes=(-2,)), target)

    return jax.eval_shape(make)


def lowered(fn, *args, platform):
    return jax.jit(fn).trace(*args).lower(lowering_platforms=(platform,)).as_text()


# What XLA:CPU is asked for in other ways than plain operations: loops over blocks, branches, barriers.
FOR_A_CPU = (
    "stablehlo.while",
    "stablehlo.if",
    "optimization_barrier",
    "dynamic_slice",
    "dynamic_update_slice",
    "_gemv",
)

KERNELS = ("tpu_custom_call", "__gpu$xla.gpu.triton")  # what Pallas kernels are called in a program


@pytest.mark.every
@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_nothing_made_for_a_cpu_is_lowered_elsewhere(scheme, platform):
    """In both layouts, frozen and in training, at one row and at many: one product, and padding for one row alone.

    The product is a dot, or a kernel written for the platform.
    """
    spec = SCHEMES[scheme]
    product = lambda w, x: ops.dot_general(x, w, MATMUL, spec=spec)  # noqa: E731
    packed, elements = (stored(spec, jnp.bfloat16, target) for target in ("cpu", PLATFORMS[platform]))
    for rows, w in ((1, elements), (300, packed), (300, jax.ShapeDtypeStruct((256, 128), jnp.bfloat16))):
        text = lowered(product, w, jax.ShapeDtypeStruct((rows, 256), jnp.bfloat16), platform=platform)
        for absent in FOR_A_CPU:
            assert absent not in text, (absent, rows)
        dots = text.count("stablehlo.dot_general")
        assert dots == 1 or (dots == 0 and any(kernel in text for kernel in KERNELS))
        if dots:
            assert text.count("stablehlo.pad") == (rows == 1 and platform == "tpu")


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("scheme", ["w8a8", "w8a16", "w4a16", "fp8"])
def test_kernels_where_jax_has_64_bits(scheme, platform):
    """Of products, activations and experts, whose rows are counted in int64 then."""
    spec = SCHEMES[scheme]
    product = lambda w, x: ops.dot_general(x, w, MATMUL, spec=spec)  # noqa: E731
    with double_precision():
        w, experts = (stored(spec, jnp.bfloat16, PLATFORMS[platform], *lead) for lead in ((), (3,)))
        x = jax.ShapeDtypeStruct((2048, 256), jnp.bfloat16)
        text = lowered(product, w, x, platform=platform)
        assert scheme in ("w8a16", "fp8") or any(kernel in text for kernel in KERNELS)
        ragged = lambda w, x, sizes: ops.ragged_dot(x, w, sizes, spec=spec)  # noqa: E731
        text = lowered(ragged, experts, x, jax.ShapeDtypeStruct((3,), jnp.int64), platform=platform)
    assert any(kernel in text for kernel in KERNELS)


@pytest.mark.every
@pytest.mark.every
@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("spec", [recipes.w4a16(64), recipes.w4a8(64), recipes.nf4()], ids=["w4a16", "w4a8", "nf4"])
def test_a_weight_in_training_is_packed_for_the_cpu_alone(spec, platform):
    """There it is stored as the frozen one, so that both compute the same; elsewhere its codes are used as they are."""
    product = lambda w, x: ops.dot_general(x, w, MATMUL, spec=spec)  # noqa: E731
    w, x = (jax.ShapeDtypeStruct((n, 256), jnp.bfloat16) for n in (256, 300))
    packs = lambda platform: "stablehlo.shift_left" in lowered(product, w, x, platform=platform)  # noqa: E731
    assert packs("cpu")
    assert not packs(platform)


def test_a_kernel_is_traced_for_its_own_platform_alone(monkeypatch):
    """And once for equal products, such as those of the layers of a model."""
    ran = []

    def recording(kernel):
        run = kernel.run

        def recorded(self, problem):
            ran.append(kernel.platforms)
            return run(self, problem)

        return recorded

    for kind in TABLE:
        monkeypatch.setattr(kind, "run", recording(kind))
    spec = recipes.w8a8()
    x, w = (jax.ShapeDtypeStruct((n, 384), jnp.bfloat16) for n in (296, 384))
    product = lambda w, x: ops.dot_general(ops.dot_general(x, w, MATMUL, spec=spec), w, MATMUL, spec=spec)  # noqa: E731
    for platform in ("cpu", "tpu", "cuda"):
        ran.clear()
        lowered(product, w, x, platform=platform)
        assert all(platform in platforms or "other" in platforms for platforms in ran)
        assert len(ran) <= 4  # each for its shape, and for its program


@pytest.mark.parametrize("platform", PLATFORMS)
def test_convolutions_and_ragged_products_elsewhere(platform):
    image, window = jnp.ones((2, 6, 8), jnp.bfloat16), jnp.ones((3, 8, 4), jnp.bfloat16)
    numbers = ("NWC", "WIO", "NWC")

    def conv(x, w, spec):
        return ops.conv_general_dilated(x, w, (1,), ((1, 1),), (2,), dimension_numbers=numbers, spec=spec)

    def ragged(x, w, spec):
        return ops.ragged_dot(x, w, jnp.array([1, 2, 3]), spec=spec)

    for spec in (recipes.w8a8(), recipes.w8a16()):
        text = lowered(lambda x, w, s=spec: conv(x, w, s), image, window, platform=platform)
        (found,) = re.findall(r"stablehlo.convolution.*: \(tensor<([\dx]+\w+)>", text)
        integers = platform == "tpu" and spec.act is not None
        assert found == ("2x6x8xi8" if integers else "2x6x8xbf16")  # as it is given: no other axes, no padding
        assert not any(absent in text for absent in ("optimization_barrier", "stablehlo.pad"))
        rows, experts = jnp.ones((6, 16), jnp.bfloat16), jnp.ones((3, 16, 4), jnp.bfloat16)
        text = lowered(lambda x, w, s=spec: ragged(x, w, s), rows, experts, platform=platform)
        assert "optimization_barrier" not in text


def test_every_kernel_is_chosen_somewhere(monkeypatch):
    """The table holds nothing that another entry always hides."""
    found = set()
    for int8, bfloat16, cores in (("vectors", True, 1), ("tiles", True, 2), ("none", False, 2)):
        monkeypatch.setattr(machine, "int8_dots", lambda found=int8: found)
        monkeypatch.setattr(machine, "bfloat16_dots", lambda found=bfloat16: found)
        monkeypatch.setattr(machine, "cores", lambda found=cores: found)
        for problem, target in itertools.product(problems(), (*map(Target, get_args(Platform)), H100, V6E, V7X)):
            asked = (kind for kind in TABLE if kind.runs_on(target) and isinstance(problem, kind.operation))
            kind, kernel = next((kind, k) for kind in asked if (k := kind.takes(problem)) is not None)
            assert kernel == select(problem, target)
            found.add(kind)
    assert found == set(TABLE)


def shaped(shape: tuple[int, ...], dtype) -> Any:
    """The shape of an array, in the place of one: kernels are chosen by it."""
    return jax.ShapeDtypeStruct(shape, dtype)


def problems():
    """Products of every scheme, frozen and in training; a cache with a scale per token; and the other operations."""
    axes, float32 = (Axes((), (0,), (1,)), Axes((), (1,), (0,))), jnp.float32
    rows = shaped((6, 128), jnp.bfloat16)
    schemes = [*SCHEMES.values(), recipes.w4a16(128), recipes.nf4(64)]
    for spec, count, dtype in itertools.product(schemes, (1, 100), (float32, jnp.bfloat16)):
        x = shaped((count, 256), dtype)
        codes = x if spec.act is None else TrainedTensor(abstract(x.shape, dtype, spec.act, (-1,), stored=False), None)
        w = abstract((256, 128), jnp.dtype(dtype), present(spec.weight), (-2,), stored=False)
        for weight in (stored(spec, dtype, "cpu"), stored(spec, dtype, "tpu"), TrainedTensor(w, None)):
            yield Product.of(codes, weight, *axes, None, dtype)
    for spec in (recipes.w8a8(), recipes.w4a8(128), recipes.fp8()):
        x, w = (
            abstract((2000, 256), rows.dtype, present(spec.act), (-1,), stored=False),
            stored(spec, jnp.bfloat16, "tpu"),
        )
        yield Product.of(x, w, *axes, None, jnp.bfloat16)
        few = abstract((8, 256), rows.dtype, present(spec.act), (-1,), stored=False)
        stack = jax.tree.map(lambda v: jax.ShapeDtypeStruct((2, *v.shape), v.dtype), w)
        for x in (few, shaped((8, 256), jnp.bfloat16)):
            yield Product.of(x, w.layer_of(stack, shaped((), jnp.int32)), *axes, None, jnp.bfloat16)
    x = shaped((1, 256), float32)
    yield Product.of(x, stored(recipes.w4a16(128), float32, "tpu"), *axes, lax.Precision.HIGHEST, float32)
    tokens = abstract((256, 128), jnp.dtype(float32), jq.QuantSpec("int8"), (-1,), minor=())
    yield Product.of(shaped((1, 256), float32), tokens, *axes, None, float32)
    geometry = Geometry((0, 1, 2), (0, 1, 2), (0, 1, 2), (1,), ((0, 0),), (1,), (1,), 1, 1)
    for spec in (recipes.w8a8(), recipes.w8a16(), recipes.w4a16(16)):
        x = shaped((6, 64, 4), float32)
        codes = x if spec.act is None else abstract(x.shape, jnp.dtype(float32), spec.act, (-2, -1), stored=False)
        w = abstract((8, 64, 4), jnp.dtype(float32), present(spec.weight), (-2, -1), stored=False)
        yield Convolution.of(codes, w, None, float32, geometry)
        x, sizes = shaped((6, 64), float32), shaped((3,), jnp.int32)
        codes = x if spec.act is None else abstract(x.shape, jnp.dtype(float32), spec.act, (-1,), stored=False)
        experts = abstract((3, 64, 8), jnp.dtype(float32), present(spec.weight), (-2,))
        yield RaggedProduct(codes, experts, None, float32, sizes)
    experts = abstract((3, 128, 128), jnp.dtype(jnp.bfloat16), present(recipes.w8a16().weight), (-2,))
    tables = jax.eval_shape(
        lambda w: ops.lay_out(w, "tpu"), abstract((3, 128, 128), rows.dtype, jq.QuantSpec("mxfp4"), (-2,))
    )
    fp8 = present(recipes.fp8().act)
    codes = abstract(rows.shape, rows.dtype, fp8, (-1,), stored=False)
    patterns = abstract((3, 128, 128), rows.dtype, fp8, (-2,))
    for x, stored_experts in ((rows, experts), (rows, tables), (codes, patterns)):
        yield RaggedProduct(x, stored_experts, None, jnp.bfloat16, shaped((3,), jnp.int32))


@pytest.mark.every
def test_the_plan_reads_the_table():
    """For another platform too, with codes as they would lie there."""
    names = {name: kernel(8, 256, 256, spec, "bfloat16", target=Target("tpu")) for name, spec in SCHEMES.items()}
    assert names["w8a8"] == "int8"
    assert names["w4a16"] == names["nf4"] == names["mxfp8"] == "grouped_sums"
    assert names["w4a16 channel"] == names["fp8"] == "bfloat16, decoded"
    assert kernel(8, 256, 256, recipes.w4a16(128), "bfloat16", target=Target("cuda")) == "bfloat16, decoded by Triton"
    assert kernel(8, 256, 256, recipes.w4a16(128), "bfloat16", target=Target("other")) == "bfloat16, batched"
    assert kernel(8, 256, 256, recipes.w8a8(), "bfloat16", "conv_general_dilated", target=Target("cuda")) == "bfloat16"
