"""No transformation of JAX changes what an op computes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import ad_checkpoint, lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax_settings import needs_jit
from narrowed import present
from ops_reference import INTEGER, MATMUL, WEIGHT_ONLY, error, quantized, slow_but, spec_of, unequal

from jaxquant import OpSpec, QTensor, ops, recipes

NUMBERS = ("NHWC", "HWIO", "NHWC")
OPS = ["dot_general", "einsum", "conv_general_dilated", "take"]
SPECS = {
    "w8a8": recipes.w8a8(),
    "asymmetric": OpSpec(spec_of("uint8", symmetric=False), spec_of("int8", symmetric=False)),
    "w4a16 grouped": recipes.w4a16(16, symmetric=False),
    "nvfp4": recipes.nvfp4(),
}


def conv(x, k, spec):
    return ops.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=NUMBERS, spec=spec)


def case(op):
    """A function of (activation, weight leaf) for each op, the float arrays it takes, and the weight's reduced axes."""
    if op == "dot_general":
        return (lambda x, q, s: ops.dot_general(x, q, MATMUL, spec=s)), (8, 32), (32, 16), (-2,)
    if op == "einsum":
        return (lambda x, q, s: ops.einsum("td,dhk->htk", x, q, spec=s)), (8, 32), (32, 2, 8), (-3,)
    if op == "conv_general_dilated":
        return conv, (8, 5, 4, 16), (3, 3, 16, 16), (-4, -3, -2)
    return (lambda x, q, s: ops.take(q, jnp.argsort(x[0])[:4], 0, spec=OpSpec(s.weight))), (1, 16), (16, 32), (-1,)


@pytest.mark.parametrize("name", slow_but(SPECS, "asymmetric", "w4a16 grouped"))
@pytest.mark.parametrize("op", slow_but(OPS, "dot_general", "conv_general_dilated", "take"))
def test_vmap_scan_and_remat(op, name):
    """Over a stack of activations, of weights, and of both; in a scan over stacked weights; rematerialised."""
    spec = SPECS[name]
    f, left, right, axes = case(op)
    xs, ws = unequal(0, (3, *left)), unequal(1, (3, *right))
    qs = jax.vmap(lambda w: quantized(w, spec.weight, axes))(ws)
    assert qs.shape == (3, *right)  # a stack of QTensors is one
    one = jax.jit(lambda x, q: f(x, q, spec))
    q0 = jax.tree.map(lambda leaf: leaf[0], qs)
    want = [one(xs[i], jax.tree.map(lambda leaf, i=i: leaf[i], qs)) for i in range(3)]
    fixed = [one(xs[i], q0) for i in range(3)]

    @jax.jit
    def transformed(xs, qs, q0):
        step = jax.checkpoint(lambda x, q: f(x, q, spec))
        return (
            jax.vmap(step)(xs, qs),
            lax.scan(lambda _, xq: (None, step(*xq)), None, (xs, qs))[1],
            jax.vmap(lambda x: f(x, q0, spec))(xs),
        )

    both, scanned, activations = transformed(xs, qs, q0)
    bound = WEIGHT_ONLY if spec.act is None else INTEGER
    assert error(both, want) <= bound
    assert error(scanned, want) <= bound
    assert error(activations, fixed) <= bound
    shape = jax.eval_shape(one, xs[0], q0)
    assert (shape.shape, shape.dtype) == (want[0].shape, want[0].dtype)


@pytest.mark.parametrize("op", ["dot_general", "conv_general_dilated"])
def test_gradients_under_transformations(op):
    """Per example by vmap, and through a rematerialised scan of layers."""
    spec = recipes.w8a8(act_symmetric=False)
    f, left, right, _ = case(op)
    xs, ws = unequal(2, (3, *left)), unequal(3, (3, *right), decades=0.5)

    def loss(x, w):
        return jnp.sum(jnp.sin(f(x, w, spec)))

    @jax.jit
    def gradients(xs, ws):
        def chain(ws):
            step = jax.checkpoint(lambda total, xw: (total + loss(*xw), None))
            return lax.scan(step, 0.0, (xs, ws))[0]

        return jax.vmap(jax.grad(loss, (0, 1)))(xs, ws), jax.grad(chain)(ws)

    (dx, dw), chained = gradients(xs, ws)
    one = jax.jit(jax.grad(loss, (0, 1)))
    for i in range(3):
        want = one(xs[i], ws[i])
        assert error(dx[i], want[0]) <= 1e-5
        assert error(dw[i], want[1]) <= 1e-5
        assert error(chained[i], want[1]) <= 1e-5


def test_scan_over_a_frozen_stack():
    """A tower of layers: the carry goes through QTensors with a leading axis."""
    ws = unequal(4, (4, 16, 16), decades=0.3) / 4
    qs = quantized(ws, spec_of("int4", "per_group"))
    x = unequal(5, (3, 16))

    def layer(x, q):
        return jnp.tanh(ops.dot_general(x, q, MATMUL, spec=OpSpec(act=spec_of("int8")))), None

    def unrolled(x, qs):
        for i in range(4):
            x, _ = layer(x, jax.tree.map(lambda leaf, i=i: leaf[i], qs))
        return x

    scanned = jax.jit(lambda x, qs: lax.scan(jax.checkpoint(layer), x, qs)[0])
    assert error(scanned(x, qs), jax.jit(unrolled)(x, qs)) <= INTEGER
    gradients = [jax.jit(jax.grad(lambda x, qs, f=f: f(x, qs).sum()))(x, qs) for f in (scanned, unrolled)]
    assert error(*gradients) <= 1e-5


# -- several devices --------------------------------------------------------------------------------------------------


def mesh():
    return Mesh(np.array(jax.devices()[:8]).reshape(8), ("d",))


def place(tree, spec_of_leaf):
    return jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh(), spec_of_leaf(leaf))), tree)


def by_output(leaf, axis):
    """Shards an axis of a leaf where it has one entry per output channel."""
    return P(*["d" if i == axis % leaf.ndim and leaf.shape[i] > 1 else None for i in range(leaf.ndim)])


@pytest.mark.parametrize("name", slow_but(SPECS, "asymmetric", "nvfp4"))
def test_sharded_jit(name):
    """Activations sharded over the batch, weights over output channels: the result of one device."""
    spec = SPECS[name]
    x, w = unequal(6, (8, 32)), unequal(7, (32, 16))
    image, kernel = unequal(8, (8, 4, 4, 16)), unequal(9, (3, 3, 16, 16))
    q, k = quantized(w, spec.weight), quantized(kernel, spec.weight, (0, 1, 2))

    @jax.jit
    def f(x, q, image, k):
        return ops.dot_general(x, q, MATMUL, spec=spec), conv(image, k, spec)

    want = f(x, q, image, k)
    # Codes are stored with the output channels first, scales have the float array's axes.
    weights = [
        QTensor(
            place(leaf.codes, functools.partial(by_output, axis=0)),
            place(leaf.scale, functools.partial(by_output, axis=-1)),
            place(leaf.zero_point, functools.partial(by_output, axis=-1)),
            qtype=leaf.qtype,
            dtype=leaf.dtype,
            minor=leaf.minor,
            length=leaf.length,
        )
        for leaf in (q, k)
    ]
    batch = [place(v, lambda v: by_output(v, 0)) for v in (x, image)]
    whole = [place(v, lambda v: P()) for v in (x, image)]
    for (a, b), (c, d) in ((batch, (q, k)), (whole, weights)):
        got = f(a, c, b, d)
        assert error(got[0], want[0]) <= INTEGER
        assert error(got[1], want[1]) <= INTEGER
    assert not f(whole[0], weights[0], whole[1], weights[1])[0].sharding.is_fully_replicated


@pytest.mark.parametrize("name", slow_but(SPECS, "asymmetric", "w4a16 grouped"))
def test_shard_map(name):
    """Batch-sharded, output-sharded, and both halves of a gradient."""
    spec = SPECS[name]
    x, w = unequal(10, (8, 32)), unequal(11, (32, 16))
    q = quantized(w, spec.weight)

    def f(x, q):
        return ops.dot_general(x, q, MATMUL, spec=spec)

    def g(x, w):
        return jax.grad(lambda x, w: jnp.sum(jnp.sin(f(x, w))), (0, 1))(x, w)

    everything = jax.tree.map(lambda leaf: P(), q)

    def sharded_gradient(x, w):
        dx, dw = g(x, w)
        return dx, lax.psum(dw, "d")

    both = (P("d"), everything)
    got = jax.jit(jax.shard_map(f, mesh=mesh(), in_specs=both, out_specs=P("d")))(x, q)
    want = jax.jit(f)(x, q)
    assert error(got, want) <= INTEGER
    if name != "nvfp4":  # one scale for the whole array
        dx, dw = jax.jit(
            jax.shard_map(
                sharded_gradient, mesh=mesh(), in_specs=(P("d"), P()), out_specs=(P("d"), P()), check_vma=False
            )
        )(x, w)
        want = jax.jit(g)(x, w)
        assert error(dx, want[0]) <= 1e-5
        assert error(dw, want[1]) <= 1e-5
    if present(spec.weight).granularity == "per_channel":
        leaves = [P("d"), P(None, "d"), P(None, "d")][: len(jax.tree.leaves(q))]
        specs = jax.tree.unflatten(jax.tree.structure(q), leaves)
        got = jax.jit(jax.shard_map(f, mesh=mesh(), in_specs=(P(), specs), out_specs=P(None, "d")))(x, q)
        assert error(got, jax.jit(f)(x, q)) <= INTEGER


@needs_jit
def test_compiled_once():
    """Equal specs are one program: nothing is traced again from one call to the next."""
    traces = []

    @functools.partial(jax.jit, static_argnames="spec")
    def f(x, w, spec):
        traces.append(spec)
        return ops.dot_general(x, w, MATMUL, spec=spec)

    x, w = unequal(12, (4, 16)), unequal(13, (16, 3))
    for _ in range(3):
        f(x, w, recipes.w8a8())
    assert len(traces) == 1
    f(x, w, recipes.w8a8(act_symmetric=False))
    assert len(traces) == 2


def test_donation_and_static_ranges_under_jit():
    """A traced activation range is as good as a given one."""
    x, w = unequal(14, (4, 16)), unequal(15, (16, 3))
    spec = recipes.w8a8(static=True, act_symmetric=False)
    f = jax.jit(lambda s, z: ops.dot_general(x, w, MATMUL, spec=spec, act_scale=s, act_zero_point=z))
    want = ops.dot_general(x, w, MATMUL, spec=spec, act_scale=0.03, act_zero_point=jnp.int8(4))
    assert error(f(0.03, jnp.int8(4)), want) <= INTEGER
    many = jax.vmap(f)(jnp.asarray([0.03, 0.3]), jnp.asarray([4, 4], jnp.int8))
    assert error(many[0], want) <= INTEGER
    assert error(many[1], want) > 1e-3


POLICIES = ["dots_saveable", "dots_with_no_batch_dims_saveable", "nothing_saveable"]


@pytest.mark.parametrize("mapped", [False, True], ids=["one", "vmap"])
@pytest.mark.parametrize("policy", slow_but(POLICIES, "dots_with_no_batch_dims_saveable"))
def test_policies_of_checkpoint_keep_products_as_dots(policy, mapped, capsys):
    """As many results of products are kept for the backward pass as those of the float dots."""
    x, w = unequal(0, (3, 8, 32)), unequal(1, (32, 16))

    def kept(spec):
        def layer(x):
            return jnp.sum(jnp.tanh(jnp.sin(ops.einsum("mk,kn->mn", x, w, spec=spec))))

        one = jax.checkpoint(layer, policy=getattr(jax.checkpoint_policies, policy))
        f = (lambda x: jnp.sum(jax.vmap(one)(x))) if mapped else lambda x: one(x[0])
        ad_checkpoint.print_saved_residuals(f, x)
        shape = "f32[3,8,16] output of" if mapped else "f32[8,16] output of"
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith(shape)]

    products = kept(recipes.w8a8())
    assert len(products) == len(kept(OpSpec()))
    assert (policy == "nothing_saveable") == (not products)
