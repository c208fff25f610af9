"""jit, grad, vmap, scan, remat, eval_shape: the layers go where Flax's go, with float and with quantized weights."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import transforms
from linen_cases import CASES, SPECS, assert_close, assert_same, unequal
from narrowed import present

import jaxquant as jq
from jaxquant import recipes

DEPTH, WIDTH = 3, 32
STATIC = recipes.w8a8(static=True)


class Block(nn.Module):
    spec: jq.OpSpec | None

    @nn.compact
    def __call__(self, x, _):
        x = nn.relu(jq.linen.QuantDense(WIDTH, spec=self.spec)(x))
        return x + jq.linen.QuantDense(WIDTH, use_bias=False, spec=self.spec)(x), None


class Stack(nn.Module):
    """Blocks in a scan, one set of parameters per step; with remat if asked."""

    spec: jq.OpSpec | None
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if self.remat else Block
        axes: dict[Any, Any] = {"params": 0, "quant": 0}
        scanned = nn.scan(block, variable_axes=axes, split_rngs={"params": True}, length=DEPTH)
        return scanned(self.spec, name="blocks")(x, None)[0]


class Loop(nn.Module):
    """The same blocks one after the other."""

    spec: jq.OpSpec | None

    @nn.compact
    def __call__(self, x):
        for i in range(DEPTH):
            x, _ = Block(self.spec, name=f"block_{i}")(x, None)
        return x


def stacked_params(seed=0):
    shapes = {"Dense_0": {"kernel": (WIDTH, WIDTH), "bias": (WIDTH,)}, "Dense_1": {"kernel": (WIDTH, WIDTH)}}
    draw = lambda shape: unequal((DEPTH, *shape), seed + len(shape), 0.2)  # noqa: E731
    return {"blocks": jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))}


def freeze_stack(params, spec):
    def freeze(path, leaf):
        if path[-1].key != "kernel":
            return leaf
        return jax.vmap(functools.partial(jq.quantize, spec=spec, reduce_axes=(-2,)))(leaf)

    return jax.tree_util.tree_map_with_path(freeze, params)


def unstack(tree):
    return {f"block_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], tree["blocks"]) for i in range(DEPTH)}


@pytest.mark.parametrize(
    "name, remat",
    [
        ("w8a16-tensor", False),
        ("w8a8-static", True),
        pytest.param("w8a8", False, marks=pytest.mark.slow),
        pytest.param("w8a8", True, marks=pytest.mark.slow),
        pytest.param("w4a16", True, marks=pytest.mark.slow),
    ],
)
def test_scan_over_stacked_params(name, remat):
    spec = SPECS[name]
    params, x = stacked_params(), unequal((4, WIDTH))
    scan: Any = Stack(spec, remat)
    loop: Any = Loop(spec)
    rest = {}
    if name == "w8a8-static":
        # A wider batch, so that no activation lies on the edge of its range, where rounding decides on the gradient.
        _, rest = jax.jit(lambda p: scan.apply({"params": p}, 1.5 * x, mutable=["quant"]))(params)
        assert rest["quant"]["blocks"]["Dense_0"]["act"]["hi"].shape == (DEPTH,)
    frozen = freeze_stack(params, spec.weight)
    kernel = frozen["blocks"]["Dense_0"]["kernel"]
    assert kernel.shape == (DEPTH, WIDTH, WIDTH)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(kernel)} == {DEPTH}
    in_loop = {k: unstack(v) for k, v in rest.items()}

    @jax.jit
    def run(params, frozen):
        loss = lambda p: jnp.sum(jnp.sin(scan.apply({"params": p, **rest}, x)))  # noqa: E731
        return (
            scan.apply({"params": params, **rest}, x),
            scan.apply({"params": frozen, **rest}, x),
            loop.apply({"params": unstack(frozen), **in_loop}, x),
            jax.grad(loss)(params),
            jax.grad(lambda p: jnp.sum(jnp.sin(loop.apply({"params": unstack(p), **in_loop}, x))))(params),
        )

    trained, ran, looped, gradient, want = run(params, frozen)
    assert_close(trained, ran)
    assert_close(ran, looped)
    for got, expected in zip(jax.tree.leaves(gradient), jax.tree.leaves(want), strict=True):
        assert_close(got, expected)


def test_scanned_variables_are_those_of_flax():
    class FlaxBlock(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            x = nn.relu(nn.Dense(WIDTH)(x))
            return x + nn.Dense(WIDTH, use_bias=False)(x), None

    scan = nn.scan(FlaxBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=DEPTH)(name="blocks")
    ours = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=DEPTH)
    init = lambda layer: layer.init(jax.random.key(0), jnp.ones((1, WIDTH)), None)  # noqa: E731
    got, want = jax.jit(lambda: [init(layer) for layer in (ours(recipes.w8a8()), scan)])()
    assert_same(got, want)


@pytest.mark.parametrize(
    "make", [nn.remat, nn.jit, lambda c: transforms.add_metadata_axis(c, {})], ids=["remat", "jit", "axis"]
)
@pytest.mark.parametrize("name", ["dense", "conv", "einsum", "embed"])
def test_lifted_layer_classes(make, name):
    """A transformed class, not a transformed model; Flax names it after the class, as its own."""
    case, spec = CASES[name], recipes.w8a8()
    layer, x = case.quant(spec=spec), case.inputs()
    variables = case.init(layer)
    lifted = make(type(layer))
    fields = {f: getattr(layer, f) for f in layer.__dataclass_fields__ if f not in ("parent", "name")}
    for leaves in (variables, case.freeze(variables, spec.weight)):
        got, want = jax.jit(lambda v: (lifted(**fields).apply(v, x), layer.apply(v, x)))(leaves)
        assert_close(got, want, 1e-6)
    flax = make(getattr(nn, type(layer).__name__))
    assert lifted.__name__ == flax.__name__


@pytest.mark.parametrize("spec", [recipes.w8a8(), jq.OpSpec(jq.QuantSpec("int4", granularity="per_tensor"))], ids=repr)
def test_vmap_over_models(spec):
    """nn.vmap and jax.vmap over an ensemble of weights."""
    in_axes: Any = None  # the type of nn.vmap has only int
    heads = nn.vmap(
        jq.linen.QuantDense, in_axes=in_axes, out_axes=0, variable_axes={"params": 0}, split_rngs={"params": True}
    )
    layer = heads(5, spec=spec)
    one: Any = jq.linen.QuantDense(5, spec=spec)
    x = unequal((4, 16))
    params = {"kernel": unequal((3, 16, 5), 1), "bias": unequal((3, 5), 2)}
    quantize = functools.partial(jq.quantize, spec=spec.weight, reduce_axes=(-2,))
    frozen = {**params, "kernel": jax.vmap(quantize)(params["kernel"])}
    want = jnp.stack([one.apply({"params": jax.tree.map(lambda p, i=i: p[i], frozen)}, x) for i in range(3)])
    for leaves in (params, frozen):
        assert_close(layer.apply({"params": leaves}, x), want)
        assert_close(jax.vmap(lambda p: one.apply({"params": p}, x))(leaves), want)


@pytest.mark.parametrize("name", ["dense", "conv", "embed", "attend", "einsum"])
def test_vmap_over_examples_and_eval_shape(name):
    case, spec = CASES[name], recipes.w8a8()
    layer, x = case.quant(spec=spec), case.inputs()
    variables = case.init(layer)

    @jax.jit
    def run(leaves, x):
        apply = lambda x: layer.apply(leaves, x, method=case.method)  # noqa: E731
        return jax.vmap(lambda row: apply(row[None])[0])(x), apply(x)

    for leaves in (variables, case.freeze(variables, spec.weight)):
        got, want = run(leaves, x)
        assert_close(got, want)
        shape = jax.eval_shape(functools.partial(layer.apply, method=case.method), leaves, x)
        assert (shape.shape, shape.dtype) == (want.shape, want.dtype)


def test_eval_shape_of_init_and_of_abstract_weights():
    layer = jq.linen.QuantDense(5, spec=STATIC)
    x = jax.ShapeDtypeStruct((2, 16), jnp.float32)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)
    assert shapes["quant"]["act"]["hi"].shape == ()
    quantize = functools.partial(jq.quantize, spec=present(STATIC.weight), reduce_axes=(-2,))
    shapes["params"]["kernel"] = jax.eval_shape(quantize, shapes["params"]["kernel"])
    assert jax.eval_shape(layer.apply, shapes, x).shape == (2, 5)


def test_second_derivatives_and_jvp_do_what_the_ops_do():
    """Gradients reach every leaf a frozen layer can train: its bias, its input, and its scales."""
    case, spec = CASES["dense"], recipes.w8a8()
    layer, x = case.quant(spec=spec), case.inputs()
    variables = case.freeze(case.init(layer), spec.weight)
    apply: Any = layer.apply
    gradient = jax.grad(lambda v: jnp.sum(apply(v, x)), allow_int=True)(variables)["params"]
    np.testing.assert_allclose(gradient["bias"], np.full(6, 3.0))
    assert gradient["kernel"].codes.dtype == jax.dtypes.float0
    assert gradient["kernel"].scale.shape == variables["params"]["kernel"].scale.shape
    assert bool(jnp.any(gradient["kernel"].scale != 0))


def test_constants_of_a_jitted_function():
    """Variables that a traced function closes over are looked at as outside of it."""
    layer, x = jq.linen.QuantDense(6, spec=STATIC), unequal((3, 16))
    kernel = unequal((16, 6), 1)

    @jax.jit
    def f(x):
        frozen = jq.quantize(kernel, present(STATIC.weight), reduce_axes=(-2,), scale=0.05)
        act = {"lo": jnp.float32(-4), "hi": jnp.float32(4), "seen": {"absmax": jnp.full(1, 4.0)}}
        return layer.apply({"params": {"kernel": frozen, "bias": jnp.ones(6)}, "quant": {"act": act}}, x)

    assert f(x).shape == (3, 6)
