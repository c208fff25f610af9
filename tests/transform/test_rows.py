"""Functions of rows before a product: what is found, and that it computes what the program does."""

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from jax import lax
from jax_settings import needs_jit

import jaxquant as jq
from jaxquant.ops.rowwise import RowFunction
from jaxquant.transform.analysis import rows
from jaxquant.transform.analysis.rows import Made, made_by_rows

M, K = 64, 128
W = jnp.zeros((K, 8))


def rms(x: jax.Array, w: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-5)
    return wide.astype(x.dtype) * w.reshape((1,) * (x.ndim - 1) + w.shape)


def layer(x: jax.Array, w: jax.Array, b: jax.Array) -> jax.Array:
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    scale = jnp.sqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + 1e-6)
    return centred / scale * jnp.broadcast_to(w, x.shape) + jnp.broadcast_to(b, x.shape)


def gated(x: jax.Array, gate: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * x


def softmax(x: jax.Array) -> jax.Array:
    e = jnp.exp(x - jnp.max(x, axis=-1, keepdims=True))
    return e / jnp.sum(e, axis=-1, keepdims=True)


def shifted(x: jax.Array, row: jax.Array, one: jax.Array) -> jax.Array:
    return x * row + one


def over_a_sum_of_rows(x: jax.Array, row: jax.Array) -> jax.Array:
    return x / (1.0 + jnp.sum(jnp.abs(jnp.broadcast_to(row, x.shape)), axis=-1, keepdims=True))


def over_a_count(x: jax.Array) -> jax.Array:
    return x / jnp.sum(jnp.ones_like(x), axis=-1, keepdims=True)


FUNCTIONS: dict[str, tuple[Callable[..., jax.Array], list[tuple[int, ...]], set[str]]] = {
    "norm": (rms, [(M, K), (K,)], {"rows", "column"}),
    "norm of three axes": (rms, [(2, M // 2, K), (K,)], {"rows", "column"}),
    "norm of as many rows as columns": (rms, [(K, K), (K,)], {"rows", "column"}),
    "layer norm": (layer, [(M, K), (K,), (K,)], {"rows", "column"}),
    "gated": (gated, [(4, M, K), (4, M, K)], {"rows"}),
    "gelu": (jax.nn.gelu, [(M, K)], {"rows"}),
    "relu": (jax.nn.relu, [(M, K)], {"rows"}),
    "softmax": (softmax, [(M, K)], {"rows"}),
    "a factor for each row": (shifted, [(M, K), (M, 1), ()], {"rows", "row", "scalar"}),
    "a sum of what is the same in all columns": (over_a_sum_of_rows, [(M, K), (M, 1)], {"rows", "row"}),
    "a sum of numbers": (over_a_count, [(M, K)], {"rows"}),
}


def arrays(shapes: list[tuple[int, ...]], dtype: Any = jnp.float32) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=s) * 2, dtype) for s in shapes]


def times_weight(fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    def product(*args: jax.Array) -> jax.Array:
        x = fn(*args)
        return lax.dot_general(x, W.astype(x.dtype), (((x.ndim - 1,), (0,)), ((), ())))

    return product


def found(fn: Callable[..., jax.Array], *args: jax.Array) -> tuple[list[Made], list[int]]:
    """How operands of products are made, and which arguments these are made of, by the first."""
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    made = list(made_by_rows(jaxpr).values())
    return made, [jaxpr.invars.index(v) for v in made[0].inputs if v in jaxpr.invars] if made else []


def computed(function: RowFunction, inputs: list[jax.Array], m: int, k: int, columns: int) -> jax.Array:
    """The function, by pieces of columns."""
    sizes = {"rows": (m, k), "row": (m, 1), "column": (1, k), "scalar": (1, 1)}
    flat = [x.reshape(sizes[form]) for x, form in zip(inputs, function.inputs, strict=True)]
    out: list[jax.Array] = []

    def read(i: int, piece: slice) -> jax.Array:
        return flat[i][:, piece] if flat[i].shape[1] == k else flat[i]

    def write(piece: slice, values: jax.Array) -> None:
        out.append(jnp.broadcast_to(values, (m, piece.stop - piece.start)))

    function.of_pieces(read, write, [slice(j, j + columns) for j in range(0, k, columns)])
    return jnp.concatenate(out, axis=1)


@pytest.mark.every
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_of_rows_is_found_and_computed_by_pieces(name: str):
    fn, shapes, forms = FUNCTIONS[name]
    args = arrays(shapes)
    (made,), at = found(times_weight(fn), *args)
    assert set(made.function.inputs) == forms
    assert sorted(at) == list(range(len(args)))
    want = fn(*args)
    m, k = want.size // K, K
    for columns in (k, k // 4):
        got = computed(made.function, [args[i] for i in at], m, k, columns)
        np.testing.assert_allclose(got, want.reshape(m, k), rtol=2e-6, atol=2e-6)


def _used_twice(x: jax.Array, w: jax.Array) -> jax.Array:
    total = x + 1.0
    return times_weight(rms)(total, w) + jnp.sum(total)


def test_what_something_else_uses_too_is_an_input():
    made, at = found(_used_twice, *arrays([(M, K), (K,)]))
    assert [step.primitive.name for step in made[0].function.steps][-1] == "mul"
    assert len(made[0].inputs) == 2
    assert len(at) == 1  # the weight of the norm; the sum is no argument


def test_products_of_one_activation_share_a_function():
    def both(x: jax.Array, w: jax.Array) -> jax.Array:
        y = rms(x, w)
        return y @ W + y @ (W + 1)

    made, _ = found(both, *arrays([(M, K), (K,)]))
    assert len(made) == 2
    assert made[0].function is made[1].function


def test_a_number_is_no_place():
    """As places, 1 is the hyperbolic tangent here; functions that are equal would be one in a program."""

    def more(x: jax.Array) -> jax.Array:
        return jnp.tanh(x) + 1.0

    def twice(x: jax.Array) -> jax.Array:
        y = jnp.tanh(x)
        return y + y

    (x,) = arrays([(M, K)])
    (one,), _ = found(times_weight(more), x)
    (other,), _ = found(times_weight(twice), x)
    assert one.function != other.function
    signs = [found(times_weight(lambda x, zero=zero: jnp.tanh(x) / zero), x)[0][0].function for zero in (0.0, -0.0)]
    assert signs[0] != signs[1]


def _and_itself(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    y = jnp.tanh(x)
    return y @ W, y


def _many(x: jax.Array) -> jax.Array:
    for _ in range(60):
        x = jnp.tanh(x)
    return x @ W


def test_a_long_chain_is_not_followed_to_its_end(monkeypatch: pytest.MonkeyPatch):
    seen: list[int] = []
    needed = rows._needed
    monkeypatch.setattr(rows, "_needed", lambda *args: seen.append(1) or needed(*args))

    def chain(x: jax.Array) -> jax.Array:
        for _ in range(500):
            x = jnp.tanh(x)
        return x @ W

    assert found(chain, *arrays([(M, K)])) == ([], [])
    assert len(seen) < 100


def _four(*x: jax.Array) -> jax.Array:
    return (x[0] * x[1] + x[2] * x[3]) @ W


NONE: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "an argument": (lambda x: x @ W, [(M, K)]),
    "few rows": (lambda x: jnp.tanh(x) @ W, [(8, K)]),
    "a result too": (_and_itself, [(M, K)]),
    "many operations": (_many, [(M, K)]),
    "four arrays": (_four, [(M, K)] * 4),
    "a sum over rows": (lambda x: (x / jnp.sum(x, axis=0, keepdims=True)).T @ jnp.zeros((M, 8)), [(M, K)]),
    "the first axis is contracted": (lambda x: lax.dot_general(jnp.tanh(x), W, (((0,), (0,)), ((), ()))), [(K, M)]),
    "a cast alone": (lambda x: x.astype(jnp.bfloat16) @ W.astype(jnp.bfloat16), [(M, K)]),
    "other operations": (lambda x: jnp.sort(x, axis=-1) @ W, [(M, K)]),
}


@pytest.mark.every
@pytest.mark.parametrize("name", NONE)
def test_nothing_else_is_found(name: str):
    fn, shapes = NONE[name]
    assert found(fn, *arrays(shapes)) == ([], [])


def test_a_value_of_each_example_is_none_of_a_row():
    def fn(x: jax.Array, scale: jax.Array) -> jax.Array:
        return times_weight(lambda x, s: jnp.tanh(x * s))(x, scale[:, None, None])

    made, _ = found(fn, *arrays([(2, M, K), (2,)]))
    assert made[0].function.inputs in (("rows",), ("rows", "rows"))


UNARY = [jnp.tanh, jnp.abs, jnp.negative, jax.nn.sigmoid, lambda x: x**2, lambda x: x * 0.5 + 1.0]


@given(
    st.lists(
        st.tuples(st.sampled_from(["unary", "row", "column", "sum", "max", "both"]), st.integers(0, 5)), max_size=5
    )
)
def test_any_composition(steps: list[tuple[str, int]]):
    def fn(x: jax.Array, y: jax.Array, row: jax.Array, column: jax.Array) -> jax.Array:
        x = x + y
        for kind, i in steps:
            if kind == "unary":
                x = UNARY[i](x)
            elif kind == "row":
                x = x * row
            elif kind == "column":
                x = x + column[None]
            elif kind == "sum":
                x = x / (1.0 + jnp.abs(jnp.mean(x, axis=-1, keepdims=True)))
            elif kind == "max":
                x = x - jnp.max(x, axis=-1)[:, None]
            else:
                x = x * jnp.tanh(y)
        return x

    args = arrays([(M, K), (M, K), (M, 1), (K,)])
    (made,), at = found(times_weight(fn), *args)
    got = computed(made.function, [args[i] for i in at], M, K, 32)
    np.testing.assert_allclose(got, fn(*args), rtol=2e-5, atol=2e-5)


def test_a_quantized_function_computes_what_it_did():
    def fn(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        y = rms(x, p["norm"])
        return gated(y @ p["up"], y @ p["gate"]) @ p["down"]

    x, *weights = arrays([(2, M, K), (K,), (K, 64), (K, 64), (64, K)])
    p = dict(zip(("norm", "up", "gate", "down"), weights, strict=True))
    rules = [jq.Rule("norm", None), jq.Rule(".*", jq.recipes.w8a8())]
    run = jq.quantized(fn, jq.make_plan(fn, p, x, rules=rules))
    spec = jq.recipes.w8a8()

    def by_hand(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        def dot(x: jax.Array, w: jax.Array) -> jax.Array:
            return jq.ops.dot_general(x, w, (((2,), (0,)), ((), ())), spec=spec)

        y = rms(x, p["norm"])
        return dot(gated(dot(y, p["up"]), dot(y, p["gate"])), p["down"])

    def of(run: Callable[..., jax.Array]) -> Any:
        return jax.jit(jax.value_and_grad(lambda p, x: jnp.sum(jnp.sin(run(p, x))), (0, 1)))(p, x)

    got, want = of(run), of(by_hand)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


@needs_jit
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_constants_are_inputs_too(kind: Callable[..., Any]):
    """A kernel computes a norm whose weight the program holds, as an array of NumPy or of JAX."""
    x, w, p = arrays([(M, K), (K,), (K, 128)])
    constant = kind(w)

    def fn(p: jax.Array, x: jax.Array) -> jax.Array:
        return rms(x, constant) @ p

    run = jax.jit(jq.quantized(fn, jq.make_plan(fn, p, x, rules=[jq.Rule(".*", jq.recipes.w8a8())])))
    assert "produced_rows" in run.trace(p, x).lower(lowering_platforms=("tpu",)).as_text()
