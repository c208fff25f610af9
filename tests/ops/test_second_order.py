"""Derivatives of every order, in both modes: those of the product of straight-through values, written out here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from ops_reference import MATMUL, error, quantized, spec_of, unequal

import jaxquant as jq
from jaxquant import OpSpec, QuantSpec, fake_quant, observers, ops, recipes
from jaxquant.core.learned import learned_values
from jaxquant.core.qtensor import scale_values

BOUND = 2e-5
SPECS = {
    "w8a8": recipes.w8a8(),
    "w8a16": recipes.w8a16(),
    "w4a4 grouped": recipes.w4a4(8),
    "asymmetric": OpSpec(spec_of("uint8", symmetric=False), spec_of("int8", symmetric=False)),
    "fp8": recipes.fp8(),
    "nf4": OpSpec(QuantSpec("nf4")),
    "nvfp4": OpSpec(QuantSpec("nvfp4"), QuantSpec("nvfp4")),
    "clipping": OpSpec(
        spec_of("int4", calibration=observers.Percentile(80.0)), spec_of("int8", calibration=observers.Percentile(80.0))
    ),
    "int8 activation alone": OpSpec(None, QuantSpec("int8")),
}


def straight(x, spec, axes):
    """``x`` plus what quantizing adds to it, as a constant; a constant where the range is exceeded."""
    if spec is None:
        return x
    q = jq.quantize(lax.stop_gradient(x), spec, reduce_axes=axes)
    inside = True
    if isinstance(spec.calibration, observers.Percentile) or spec.qtype == "nvfp4":
        scale = scale_values(q.scale)
        for axis, (n, blocks) in enumerate(zip(x.shape, scale.shape, strict=True)):
            scale = jnp.repeat(scale, n // blocks, axis=axis)
        inside = (lax.stop_gradient(x) >= q.type.qmin * scale) & (lax.stop_gradient(x) <= q.type.qmax * scale)
    return jnp.where(inside, x - lax.stop_gradient(x), 0) + q.dequantize()


def orders(f, args, directions, names=None):
    """First and second derivatives by every way there is, or by those named."""
    grad = jax.grad(f, tuple(range(len(args))))
    along = lambda *a: jax.jvp(f, a, directions)[1]  # noqa: E731
    ways = {
        "value": lambda: f(*args),
        "jvp": lambda: along(*args),
        "linearize": lambda: jax.linearize(f, *args)[1](*directions),
        "grad": lambda: grad(*args),
        "forward over reverse": lambda: jax.jvp(grad, args, directions)[1],
        "forward over forward": lambda: jax.jvp(along, args, directions)[1],
        "reverse over reverse": lambda: jax.grad(lambda *a: sum(map(jnp.vdot, grad(*a), directions)), (0, 1))(*args),
        "reverse over forward": lambda: jax.grad(along, (0, 1))(*args),
    }
    return {name: ways[name]() for name in names or ways}


def check(got, want, bound=BOUND):
    for name in want:
        for a, b in zip(jax.tree.leaves(got[name]), jax.tree.leaves(want[name]), strict=True):
            assert np.asarray(b).any(), name
            assert error(a, b) <= bound, name


def pair(seed, *shapes):
    args = tuple(unequal(seed + i, s) for i, s in enumerate(shapes))
    return args, tuple(unequal(seed + 10 + i, s) for i, s in enumerate(shapes))


@pytest.mark.parametrize("name", SPECS)
def test_dot_general(name):
    spec = SPECS[name]
    args, directions = pair(0, (5, 32), (32, 3))

    def loss(x, w):
        return jnp.sum(jnp.tanh(ops.dot_general(x, w, MATMUL, "highest", spec=spec) / 20) ** 2)

    def reference(x, w):
        y = jnp.dot(straight(x, spec.act, (-1,)), straight(w, spec.weight, (0,)), precision="highest")
        return jnp.sum(jnp.tanh(y / 20) ** 2)

    check(*jax.jit(lambda a, d: [orders(f, a, d) for f in (loss, reference)])(args, directions))


OTHERS = {
    "einsum": ((2, 5, 8), (8, 3, 4), lambda x, w, **how: ops.einsum("btd,dhk->bhtk", x, w, **how), (-1,), (0,)),
    "conv": (
        (2, 6, 3),
        (3, 3, 4),
        lambda x, w, **how: ops.conv_general_dilated(
            x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), **how
        ),
        (1, 2),
        (0, 1),
    ),
    "ragged_dot": (
        (6, 8),
        (3, 8, 4),
        lambda x, w, **how: ops.ragged_dot(x, w, jnp.array([2, 1, 2]), **how),
        (1,),
        (1,),
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_operations(kind):
    *shapes, run, x_axes, w_axes = OTHERS[kind]
    spec = recipes.w8a8()
    args, directions = pair(1, *shapes)
    plain = _by_rows if kind == "ragged_dot" else functools.partial(run, precision="highest")
    loss = lambda x, w: jnp.sum(jnp.tanh(run(x, w, spec=spec) / 9) ** 2)  # noqa: E731
    reference = lambda x, w: jnp.sum(  # noqa: E731
        jnp.tanh(plain(straight(x, spec.act, x_axes), straight(w, spec.weight, w_axes)) / 9) ** 2
    )
    check(*jax.jit(lambda a, d: [orders(f, a, d) for f in (loss, reference)])(args, directions))


def _by_rows(x, w, sizes=(2, 1, 2)):
    """`jax.lax.ragged_dot`, of which JAX has not all derivatives: rows in groups, and those of none are 0."""
    ends = np.cumsum(sizes)
    parts = [x[end - n : end] @ w[i] for i, (n, end) in enumerate(zip(sizes, ends, strict=True))]
    return jnp.concatenate([*parts, jnp.zeros((x.shape[0] - ends[-1], w.shape[2]))])


def layers(product, x, stack):
    """Layers one after the other."""
    for w in stack:
        x = jnp.tanh(product(x, w) / 4)
    return x


def scanned(product, x, stack):
    """The same as a scan whose body is computed again for the backward pass."""
    body = jax.checkpoint(lambda x, w: (jnp.tanh(product(x, w) / 4), None))
    return lax.scan(body, x, stack)[0]


IN_A_SCAN = ("grad", "forward over reverse", "reverse over reverse")


@pytest.mark.parametrize("name", SPECS)
def test_layers_in_a_scan(name):
    """JAX takes the second derivatives of `jax.custom_jvp` in a scan from the body of the function."""
    spec = SPECS[name]
    args, directions = pair(20, (3, 16), (2, 16, 16))
    quantized = lambda x, w: ops.dot_general(x, w, MATMUL, "highest", spec=spec)  # noqa: E731

    def written(x, w):
        return jnp.dot(straight(x, spec.act, (-1,)), straight(w, spec.weight, (0,)), precision="highest")

    fs = (lambda x, s: jnp.sum(scanned(quantized, x, s) ** 2), lambda x, s: jnp.sum(layers(written, x, s) ** 2))
    # A layer's rounding to the last bit may move a code of the next one.
    bound = BOUND if spec.act is None else 2e-3
    got, want = jax.jit(lambda a, d: [orders(f, a, d, IN_A_SCAN) for f in fs])(args, directions)
    check(got, want, bound)


@pytest.mark.parametrize("learned", ["lsq", "lsq+", "pact", "computed", "clipping"])
def test_fake_quant_in_a_scan(learned):
    """Against the same layers without a scan."""
    spec = spec_of("uint4" if learned == "lsq+" else "int4", "per_tensor", symmetric=learned != "lsq+")
    if learned == "clipping":
        spec = spec_of("int4", "per_tensor", calibration=observers.Percentile(80.0))
    entry = {
        "lsq": {"scale": jnp.float32([0.2, 0.1, 0.3])},
        "lsq+": {"scale": jnp.float32([0.2, 0.1, 0.3]), "offset": jnp.float32([-0.3, 0.2, -1.0])},
        "pact": {"clip": jnp.float32([0.9, 0.7, 1.1])},
    }.get(learned, {})
    x, w, g = unequal(21, (5, 8)), unequal(22, (3, 8, 8)), unequal(23, (3, 8, 8))

    def product(x, layer):
        w, entry = layer
        if not entry:
            return x @ fake_quant(w, spec, reduce_axes=(0, 1))
        return x @ learned_values(w, spec, (0, 1), entry, w.size, (1, 1))

    def second(run):
        def loss(w, entry):
            return jnp.sum(jnp.sin(run(product, x, (w, entry))))

        stack, along = (w, entry), (g, jax.tree.map(lambda v: v / 3, entry))
        return jax.jit(lambda: jax.jvp(jax.grad(loss, (0, 1)), stack, along))()

    got, want = second(scanned), second(lambda product, x, stack: layers(product, x, _unstacked(stack)))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.asarray(b).any()
        assert error(a, b) <= BOUND


def _unstacked(stack):
    return [jax.tree.map(lambda v, i=i: v[i], stack) for i in range(3)]


def test_lookup():
    table, direction, spec = unequal(2, (7, 8)), unequal(3, (7, 8)), OpSpec(QuantSpec("int4"))
    rows = jnp.array([1, 5, 1])

    def second(take):
        f = lambda t, s: jnp.sum(jnp.sin(take(t)) * s)  # noqa: E731
        args, directions = (table, jnp.float32(2)), (direction, jnp.float32(1))
        return jax.jit(lambda a, d: orders(f, a, d))(args, directions)

    got = second(lambda t: ops.take(t, rows, 0, spec=spec))
    check(got, second(lambda t: straight(t, spec.weight, (-1,))[rows]))


@pytest.mark.parametrize("qtype", ["int8", "nf4", "uint4", "float8_e4m3fn"])
def test_frozen_weights(qtype):
    """With respect to activations and biases; the weight is a constant."""
    q = quantized(unequal(4, (32, 3)), spec_of(qtype, symmetric=not qtype.startswith("u")))
    args, directions = pair(5, (5, 32), (5, 3))
    for act in (None, QuantSpec("int8")):

        def loss(x, b, act=act):
            return jnp.sum(jnp.sin(ops.dot_general(x, q, MATMUL, "highest", spec=OpSpec(act=act)) / 9 + b))

        def reference(x, b, act=act):
            return jnp.sum(jnp.sin(jnp.dot(straight(x, act, (-1,)), q.dequantize(), precision="highest") / 9 + b))

        check(*jax.jit(lambda a, d, fs=(loss, reference): [orders(f, a, d) for f in fs])(args, directions))


def test_scales_that_learn():
    """``fq = s (r(clip(x / s)) - z)`` with a rounding of derivative 1, differentiated by JAX: learned steps (LSQ+)."""
    x, w, g = unequal(6, (5, 16)), unequal(7, (16, 3)), unequal(8, (5, 3))
    spec = spec_of("int4", "per_tensor", static=True, symmetric=False)
    how = OpSpec(spec_of("int8"), spec)

    def written(x, s, z):
        v = x / s
        inside = (v >= -8 - z) & (v <= 7 - z)
        rounded = v + lax.stop_gradient(jnp.round(v) - v)
        return jnp.where(inside, rounded, jnp.where(v > 0, 7 - z, -8 - z)) * s

    def loss(v, act):
        x, s, z = v
        y = jnp.dot(act(x, s, z), straight(w, how.weight, (0,)), precision="highest")
        return jnp.sum(jnp.sin(y / 9) * g) + 0 * s * z

    def real(v):
        x, s, z = v
        y = ops.dot_general(x, w, MATMUL, spec=how, act_scale=s, act_zero_point=z)
        return jnp.sum(jnp.sin(y / 9) * g)

    faked = lambda x, s, z: fake_quant(x, spec, reduce_axes=(), scale=s, zero_point=z)  # noqa: E731
    v = (x, jnp.float32(0.2), jnp.float32(3.0))
    d = (unequal(9, (5, 16)), jnp.float32(0.3), jnp.float32(-0.7))
    fs = (lambda v: loss(v, written), lambda v: loss(v, faked), real)
    want, *found = jax.jit(lambda v, d: [jax.jvp(jax.value_and_grad(f), (v,), (d,)) for f in fs])(v, d)
    for got in found:
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert np.asarray(b).any()
            assert error(a, b) <= BOUND


def test_hessians_and_higher_orders():
    """`jax.hessian` and a third derivative, under `jax.vmap` and `jax.checkpoint`."""
    spec = recipes.w8a8()
    x, w = unequal(10, (4, 3, 8)), unequal(11, (8, 2))

    def of(product):
        f = jax.checkpoint(lambda x, w: jnp.sum(jnp.tanh(product(x, w) / 4)))
        third = jax.jacfwd(jax.hessian(f))
        return (
            jax.vmap(jax.hessian(f), (0, None))(x, w),
            jax.vmap(jax.hessian(f, 1), (0, None))(x, w),
            jax.vmap(third, (0, None))(x, w),
        )

    got = jax.jit(lambda: of(lambda x, w: ops.dot_general(x, w, MATMUL, spec=spec)))()
    dot = lambda x, w: jnp.dot(straight(x, spec.act, (-1,)), straight(w, spec.weight, (0,)), precision="highest")  # noqa: E731
    for a, b in zip(got, jax.jit(lambda: of(dot))(), strict=True):
        assert np.asarray(b).any()
        assert error(a, b) <= BOUND


def test_int8_gradients():
    """Rounding of gradients is straight-through too: a second derivative is that of the float product, to 8 bits."""
    args, directions = pair(12, (6, 32), (32, 5))
    spec = recipes.w8a8g8()

    def loss(x, w, grad):
        how = spec if grad else recipes.w8a8()
        return jnp.sum(jnp.tanh(ops.dot_general(x, w, MATMUL, spec=how) / 20) ** 2)

    fs, names = [functools.partial(loss, grad=grad) for grad in (True, False)], ("grad", "forward over reverse")
    got, want = jax.jit(lambda a, d: [orders(f, a, d, names) for f in fs])(args, directions)
    check(got, want, 0.03)
    assert error(got["grad"][0], want["grad"][0]) > 1e-4


def test_a_transformed_function():
    """Steps of gradient descent inside of a loss (MAML), and a penalty on gradients."""
    params = {"a": unequal(13, (8, 16)) / 4, "b": unequal(14, (16, 4)) / 4}
    x = unequal(15, (6, 8))
    fn = lambda p, x: jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"])  # noqa: E731
    plan = jq.make_plan(fn, params, x, rules=[jq.Rule(".*", recipes.w8a8())])
    act, weight = recipes.w8a8().act, recipes.w8a8().weight

    def written(p, x):
        dot = lambda x, w: jnp.dot(straight(x, act, (-1,)), straight(w, weight, (0,)), precision="highest")  # noqa: E731
        return jnp.tanh(dot(jnp.tanh(dot(x, p["a"])), p["b"]))

    def losses(f):
        inner = lambda p: jnp.sum(f(p, x) ** 2)  # noqa: E731

        def adapted(p):
            return inner(jax.tree.map(lambda w, g: w - 1e-3 * g, p, jax.grad(inner)(p)))

        penalty = lambda p: sum(jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(inner)(p)))  # noqa: E731
        return jax.jit(lambda p: (jax.grad(adapted)(p), jax.grad(penalty)(p)))

    got, want = losses(jq.quantized(fn, plan))(params), losses(written)(params)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert error(a, b) <= 1e-4
