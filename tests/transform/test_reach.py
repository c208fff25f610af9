"""Every way a weight reaches an operation: which axes the plan finds, and that the numbers are right."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import ad_checkpoint, lax
from transform_cases import EVERYTHING, SPECS, check, unequal

import jaxquant as jq

X = unequal((4, 32), 7, 0.3)
W = {"w": unequal((32, 16), 1, 0.3)}


def qkv(p, x):
    q, k, v = jnp.split(p["w"], 3, axis=1)
    return jnp.tanh(x @ q) * (x @ k) + x @ v


def two_layers(p, x):
    return jnp.tanh(x @ p["a"]) @ p["b"]


def by_index(p, x):
    for i in range(p["w"].shape[0]):
        x = jnp.tanh(x @ p["w"][i])
    return x


def by_loop(p, x):
    return lax.fori_loop(0, p["w"].shape[0], lambda i, x: jnp.tanh(x @ p["w"][i]), x)


def by_map(p, x):
    return lax.map(lambda w: jnp.tanh(x @ w), p["w"])


def scanned(p, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]


def scanned_and_viewed(p, x):
    stack = jnp.swapaxes(p["w"], 1, 2).astype(jnp.float32).reshape(3, 32, 4, 8)[:, :, :, ::-1]
    return lax.scan(lambda x, w: (jnp.tanh(jnp.einsum("bhd,khd->bk", x.reshape(4, 4, 8), w)), None), x, stack)[0]


def scan_const(p, x):
    return lax.scan(lambda x, _: (jnp.tanh(x @ p["w"]), None), x, None, length=3)[0]


def scan_carry(p, x):
    step = lambda c, _: ((jnp.tanh(c[0] @ c[1]), c[1]), None)  # noqa: E731
    return lax.scan(step, (x, p["w"]), None, length=3)[0][0]


def nested_scan(p, x):
    def outer(x, w):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0], None

    return lax.scan(outer, x, p["w"])[0]


def while_const(p, x):
    return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["w"])), (0, x))[1]


def while_carry(p, x):
    step = lambda c: (c[0] + 1, jnp.tanh(c[1] @ c[2]), c[2])  # noqa: E731
    return lax.while_loop(lambda c: c[0] < 3, step, (0, x, p["w"]))[1]


def while_condition(p, x):
    return lax.while_loop(lambda x: jnp.max(jnp.abs(x @ p["w"])) > 0.5, lambda x: 0.5 * x, x)


def condition(p, x):
    return lax.cond(jnp.sum(x) > 0, lambda: jnp.tanh(x @ p["a"]), lambda: jnp.sin(x @ p["b"]))


def switch(p, x):
    step = lambda i, x: lax.switch(i, [lambda x: x @ p["a"], lambda x: -x @ p["b"], lambda x: 2 * x], x)  # noqa: E731
    return lax.fori_loop(0, 3, step, x)


def rematerialized(p, x):
    block = jax.checkpoint(lambda x: jnp.tanh(x @ p["w"]), policy=jax.checkpoint_policies.nothing_saveable)
    return block(block(x))


def two_uses(p, x):
    return jnp.tanh(x @ p["w"]) + jnp.sin(2 * x @ p["w"])


def tied(p, tokens):
    x = jnp.take(p["table"], tokens, axis=0)
    return x @ p["table"].T


def closed_over(p, x):
    @jax.jit
    def inner(x):
        return jax.jit(lambda y: y @ p["w"])(x)

    return inner(jnp.sin(x))


@jax.custom_vjp
def with_vjp(w, x):
    return x @ w


with_vjp.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, g: (r[1].T @ g, g @ r[0].T))


@jax.custom_jvp
def with_jvp(w, x):
    return x @ w


with_jvp.defjvp(lambda p, t: (p[1] @ p[0], t[1] @ p[0] + p[1] @ t[0]))


def vmapped_params(p, x):
    return jax.vmap(lambda w: x @ w)(p["w"])


def transposed_convolution(p, x):
    return lax.conv_transpose(x, p["w"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def flipped_convolution(p, x):
    return lax.conv_transpose(
        x, p["w"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), transpose_kernel=True
    )


def energy_gradient(p, x):
    return jax.grad(lambda x: jnp.sum(jnp.tanh(x @ p["w"])))(x)


IMAGES = unequal((2, 6, 6, 8), 3, 0.3)
TOKENS = jnp.asarray([[3, 0, 11, 15], [2, 2, 7, 9]])
SQUARE = {"w": unequal((32, 32), 1, 0.2)}
STACK = {"w": unequal((3, 32, 32), 1, 0.2)}
PAIR = {"a": unequal((32, 32), 1, 0.2), "b": unequal((32, 32), 2, 0.2)}
HEADS = {"w": unequal((32, 4, 8), 1, 0.2)}

CASES = {
    "matmul": (lambda p, x: x @ p["w"], W, X, {"w": (-2,)}),
    "jnp.dot": (lambda p, x: jnp.dot(x, p["w"]), W, X, {"w": (-2,)}),
    "lax.dot": (lambda p, x: lax.dot(x, p["w"]), W, X, {"w": (-2,)}),
    "on the left": (lambda p, x: p["w"].T @ x.T, W, X, {"w": (-2,)}),
    "einsum": (lambda p, x: jnp.einsum("bk,kn->nb", x, p["w"]), W, X, {"w": (-2,)}),
    "einsum, heads out": (lambda p, x: jnp.einsum("bk,khd->bhd", x, p["w"]), HEADS, X, {"w": (-3,)}),
    "einsum, heads in": (
        lambda p, x: jnp.einsum("bhd,hdk->bk", x.reshape(4, 4, 8), p["w"]),
        {"w": unequal((4, 8, 32), 1, 0.3)},
        X,
        {"w": (-3, -2)},
    ),
    "einsum, batched experts": (
        lambda p, x: jnp.einsum("bk,ekn->ebn", x, p["w"]),
        {"w": unequal((3, 32, 16), 1, 0.3)},
        X,
        {"w": (-2,)},
    ),
    "einsum, batch axis": (
        lambda p, x: jnp.einsum("ebk,ekn->ebn", jnp.stack([x, 2 * x, -x]), p["w"]),
        {"w": unequal((3, 32, 16), 1, 0.3)},
        X,
        {"w": (-2,)},
    ),
    "tensordot": (
        lambda p, x: jnp.tensordot(x.reshape(4, 4, 8), p["w"], 2),
        {"w": unequal((4, 8, 8), 1)},
        X,
        {"w": (-3, -2)},
    ),
    "tensordot, axes crossed": (
        lambda p, x: jnp.tensordot(x.reshape(4, 4, 8), p["w"], ((2, 1), (0, 1))),
        {"w": unequal((8, 4, 8), 1, 0.3)},
        X,
        {"w": (-3, -2)},
    ),
    "transposed": (lambda p, x: x @ p["w"].T, {"w": unequal((16, 32), 1)}, X, {"w": (-1,)}),
    "cast": (lambda p, x: x @ p["w"].astype(jnp.float32), W, X, {"w": (-2,)}),
    "reshaped": (lambda p, x: x @ p["w"].reshape(32, 32), HEADS, X, {"w": (-3,)}),
    "reshaped in": (lambda p, x: x @ p["w"].reshape(32, 16), {"w": unequal((4, 8, 16), 1, 0.3)}, X, {"w": (-3, -2)}),
    "column-major": (
        lambda p, x: x @ lax.reshape(p["w"], (32, 16), (1, 0)),
        {"w": unequal((16, 32), 1)},
        X,
        {"w": (-1,)},
    ),
    "split in two, both contracted": (
        lambda p, x: jnp.einsum("bij,ijn->bn", x.reshape(4, 4, 8), p["w"].reshape(4, 8, 16)),
        W,
        X,
        {"w": (-2,)},
    ),
    "new axis": (lambda p, x: jnp.squeeze(x @ p["w"][None]), W, X, {"w": (-2,)}),
    "fused, split": (qkv, {"w": unequal((32, 24), 1, 0.3)}, X, {"w": (-2,)}),
    "fused, sliced": (lambda p, x: (x @ p["w"][:, :5]) @ (x @ p["w"][:, 5:10]).T, W, X, {"w": (-2,)}),
    "sliced in": (lambda p, x: x[:, :16] @ p["w"][:16] + x[:, 16:] @ p["w"][16:], W, X, {"w": (-2,)}),
    "same weight twice": (two_uses, W, X, {"w": (-2,)}),
    "stack, by index": (by_index, STACK, X, {"w": (-2,)}),
    "stack, by loop": (by_loop, STACK, X, {"w": (-2,)}),
    "stack, unstacked": (
        lambda p, x: functools.reduce(lambda x, w: jnp.tanh(x @ w), p["w"], x),
        STACK,
        X,
        {"w": (-2,)},
    ),
    "lax.map": (by_map, STACK, X, {"w": (-2,)}),
    "scan": (scanned, STACK, X, {"w": (-2,)}),
    "scan, viewed before": (scanned_and_viewed, STACK, X, {"w": (-2,)}),
    "scan, constant": (scan_const, SQUARE, X, {"w": (-2,)}),
    "scan, carried": (scan_carry, SQUARE, X, {"w": (-2,)}),
    "scan in scan": (nested_scan, {"w": unequal((2, 3, 32, 32), 1, 0.2)}, X, {"w": (-2,)}),
    "while": (while_const, SQUARE, X, {"w": (-2,)}),
    "while, carried": (while_carry, SQUARE, X, {"w": (-2,)}),
    "while, condition": (while_condition, SQUARE, X, {"w": (-2,)}),
    "cond": (condition, PAIR, X, {"a": (-2,), "b": (-2,)}),
    "switch": (switch, PAIR, X, {"a": (-2,), "b": (-2,)}),
    "remat": (rematerialized, SQUARE, X, {"w": (-2,)}),
    "lookup": (
        lambda p, t: jnp.sin(jnp.take(p["table"], t, axis=0)),
        {"table": unequal((16, 32), 1)},
        TOKENS,
        {"table": (-1,)},
    ),
    "lookup by brackets": (lambda p, t: p["table"][t], {"table": unequal((16, 32), 1)}, TOKENS, {"table": (-1,)}),
    "tied": (tied, {"table": unequal((16, 32), 1, 0.3)}, TOKENS, {"table": (-1,)}),
    "closed over": (closed_over, W, X, {"w": (-2,)}),
    "custom_vjp": (lambda p, x: with_vjp(p["w"], x), W, X, {"w": (-2,)}),
    "custom_jvp": (lambda p, x: with_jvp(p["w"], x), W, X, {"w": (-2,)}),
    "vmap over params": (vmapped_params, STACK, X, {"w": (-2,)}),
    "vmap over inputs": (lambda p, x: jax.vmap(lambda v: v @ p["w"])(x), W, X, {"w": (-2,)}),
    "optimization barrier": (lambda p, x: jnp.matmul(*lax.optimization_barrier((x, p["w"]))), W, X, {"w": (-2,)}),
    "named": (lambda p, x: x @ ad_checkpoint.checkpoint_name(p["w"], "w"), W, X, {"w": (-2,)}),
    "copied": (lambda p, x: x @ jnp.array(p["w"], copy=True), W, X, {"w": (-2,)}),
    "convolution": (
        lambda p, x: lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")),
        {"w": unequal((3, 3, 8, 16), 1, 0.2)},
        IMAGES,
        {"w": (-4, -3, -2)},
    ),
    "convolution, grouped": (
        lambda p, x: lax.conv_general_dilated(
            x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
        ),
        {"w": unequal((2, 2, 4, 16), 1, 0.2)},
        IMAGES,
        {"w": (-4, -3, -2)},
    ),
    "convolution, transposed": (
        transposed_convolution,
        {"w": unequal((4, 4, 8, 16), 1, 0.2)},
        IMAGES,
        {"w": (-4, -3, -2)},
    ),
    "convolution, flipped": (flipped_convolution, {"w": unequal((4, 4, 16, 8), 1, 0.2)}, IMAGES, {"w": (-4, -3, -1)}),
    "a batch as large as the kernel": (
        lambda p, x: x @ p["a"] @ p["b"],
        PAIR,
        unequal((32, 32), 5, 0.3),
        {"a": (-2,), "b": (-2,)},
    ),
    "convolution, contracted and transposed": (
        lambda p, x: jax.grad(
            lambda x: jnp.sum(
                jnp.sin(lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))
            )
        )(x),
        {"w": unequal((3, 3, 8, 4), 1, 0.2)},
        IMAGES,
        {"w": (-4, -3, -2)},
    ),
    "experts": (
        lambda p, x: lax.ragged_dot(x, p["w"], jnp.array([1, 3], jnp.int32)),
        {"w": unequal((2, 32, 8), 1, 0.2)},
        X,
        {"w": (-2,)},
    ),
    "contracted and transposed": (energy_gradient, W, X, {"w": (-2,)}),
}


@pytest.mark.parametrize("name", CASES)
def test_weight_only(name):
    fn, params, x, axes = CASES[name]
    check(fn, params, x, expect=axes, grad=not name.startswith("while"))


TOKENS = jnp.array([[3, 0, 7], [30, 31, 2]])
LOOKUPS = {
    "rows": lambda w, t: jax.vmap(jax.vmap(lambda i: w[i]))(t),
    "runs of rows": lambda w, t: jax.vmap(lambda i: lax.dynamic_slice_in_dim(w, i, 3))(t[0]),
    "runs past the end": lambda w, t: jax.vmap(lambda i: lax.dynamic_slice_in_dim(w, i, 3))(t[1]),
    "columns": lambda w, t: jnp.take(w, t % 16, axis=1),
    "runs of columns": lambda w, t: jax.vmap(lambda i: lax.dynamic_slice_in_dim(w, i, 3, 1))(t[0]),
    "batch behind": lambda w, t: jax.vmap(lambda i: w[i], out_axes=-1)(t[0]),
    "columns in place": lambda w, t: jax.vmap(lambda i: w[:, i], out_axes=1)(t[0]),
    "dropped": lambda w, t: w.at[5 * t].get(mode="fill", fill_value=0.5),
    "runs dropped": lambda w, t: lax.gather(
        w,
        t[..., None],
        lax.GatherDimensionNumbers(offset_dims=(0, 3), collapsed_slice_dims=(), start_index_map=(0,)),
        (2, 16),
        mode="fill",
        fill_value=0.5,
    ),
}


@pytest.mark.parametrize("name", LOOKUPS)
@pytest.mark.parametrize("spec", ["int8", "int4"])
def test_lookups(name, spec):
    axis = 0 if "columns" in name else 1
    check(lambda p, t: jnp.sin(LOOKUPS[name](p["w"], t)), W, TOKENS, spec=spec, expect={"w": (axis - 2,)})


def test_other_gathers_stay_float():
    """Single elements, and a row of its own for every column."""
    rows = jnp.arange(16)
    for fn in (lambda w: w[rows, rows], lambda w: jax.vmap(lambda w, i: w[i], (1, 0))(w, rows)):
        with pytest.raises(jq.QuantError, match=r"w \(indexed in a way that is not a lookup of rows\)"):
            jq.make_plan(lambda p, fn=fn: fn(p["w"]), W, rules=[EVERYTHING(SPECS["int8"])])
