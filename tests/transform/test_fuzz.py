"""Random small functions of the supported primitives: quantized leaves against the float function on their values."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
from hypothesis import given, settings
from jax import ad_checkpoint, lax
from transform_cases import SPECS, check, unequal

import jaxquant as jq

WIDTH = 8

# A step maps [batch, 8] to [batch, 8] through a weight of the given shape.
DIRECT = {
    "matmul": ((8, 8), lambda w, x: x @ w),
    "transposed": ((8, 8), lambda w, x: x @ w.T),
    "left": ((8, 8), lambda w, x: (w @ x.T).T),
    "heads out": ((8, 2, 4), lambda w, x: jnp.einsum("bk,khd->bhd", x, w).reshape(x.shape)),
    "heads in": ((2, 4, 8), lambda w, x: jnp.einsum("bhd,hdk->bk", x.reshape(-1, 2, 4), w)),
    "heads crossed": ((4, 2, 8), lambda w, x: jnp.einsum("bhd,dhk->bk", x.reshape(-1, 2, 4), w)),
    "fused": ((8, 16), lambda w, x: sum(x @ v for v in jnp.split(w, 2, axis=1))),
    "halves": ((8, 8), lambda w, x: x[:, :4] @ w[:4] + x[:, 4:] @ w[4:]),
    "looked up": ((8, 8), lambda w, x: jnp.take(w, jnp.argmax(x, 1), axis=0)),
    "convolved": (
        (3, 8, 8),
        lambda w, x: lax.conv_general_dilated(x[None], w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))[0],
    ),
    "experts": ((2, 8, 8), lambda w, x: lax.ragged_dot(x, w, jnp.array([2, 3], jnp.int32))),
    "cut in parts": ((8, 8), lambda w, x: jnp.einsum("bij,ijn->bn", x.reshape(-1, 2, 4), w.reshape(2, 4, 8))),
}
# A view leaves the weight's shape as it is.
VIEWS = {
    "as it is": lambda w: w,
    "cast": lambda w: w.astype(jnp.float32),
    "there and back": lambda w: jnp.moveaxis(jnp.moveaxis(w, 0, -1), -1, 0),
    "flat and back": lambda w: w.reshape(-1).reshape(w.shape),
    "flipped": lambda w: lax.rev(w, (w.ndim - 1,)),
    "new axis": lambda w: jnp.squeeze(w[:, None], 1),
    "named": lambda w: ad_checkpoint.checkpoint_name(w, "w"),
}
# A call runs a step in something that holds a jaxpr.
CALLS = {
    "called": lambda step, w, x: step(w, x),
    "jit": lambda step, w, x: jax.jit(step)(w, x),
    "remat": lambda step, w, x: jax.checkpoint(step)(w, x),
    "scan": lambda step, w, x: lax.scan(lambda x, _: (step(w, x), None), x, None, length=2)[0],
    "scan, carried": lambda step, w, x: lax.scan(lambda c, _: ((step(c[1], c[0]), c[1]), None), (x, w), None, length=2)[
        0
    ][0],
    "while": lambda step, w, x: lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, step(w, c[1])), (0, x))[1],
    "cond": lambda step, w, x: lax.cond(jnp.sum(x) > 0, lambda: step(w, x), lambda: -step(w, x)),
    "closed over": lambda step, w, x: jax.jit(lambda x: step(w, x))(x),
    "twice": lambda step, w, x: step(w, x) + jnp.sin(step(w, 2 * x)),
}

steps = st.tuples(st.sampled_from(sorted(DIRECT)), st.sampled_from(sorted(VIEWS)), st.sampled_from(sorted(CALLS)))


def compose(chosen):
    """A function of params and x, and params."""

    def fn(p, x):
        for i, (direct, view, call) in enumerate(chosen):
            step = lambda w, x, direct=direct, view=view: jnp.tanh(DIRECT[direct][1](VIEWS[view](w), x))  # noqa: E731
            x = CALLS[call](step, p[f"{i}"], x)
        return x

    return fn, {f"{i}": unequal(DIRECT[direct][0], i, 0.4) for i, (direct, _, _) in enumerate(chosen)}


@settings(max_examples=8)
@given(st.lists(steps, min_size=1, max_size=3), st.sampled_from(["int8", "int8", "w8a8"]), st.data())
def test_random_functions(chosen, spec, data):
    fn, params = compose(chosen)
    some = data.draw(st.sets(st.sampled_from(sorted(params)), min_size=1))
    rules = [jq.Rule("|".join(f"^{name}$" for name in sorted(some)), SPECS[spec])]
    plan = check(fn, params, unequal((5, WIDTH), 9, 0.5), rules=rules, grad=all(c[2] != "while" for c in chosen))
    assert set(plan) == some
