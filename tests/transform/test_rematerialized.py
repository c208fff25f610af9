"""Activations that the backward pass computes again: what is handed to it, and that derivatives are the same."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Var
from jax_settings import needs_jit

import jaxquant as jq
from jaxquant import recipes
from jaxquant.transform.analysis.rematerialized import rematerialized
from jaxquant.transform.analysis.rows import made_by_rows

M, K, N = 64, 32, 48
SCHEMES = {
    "W8A8": recipes.w8a8(),
    "a static range": jq.OpSpec(jq.QuantSpec("int8"), jq.QuantSpec("int8", granularity="per_tensor", static=True)),
    "weights alone": recipes.w8a16(),
}


def rms(x: jax.Array, w: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-5)).astype(x.dtype) * w[None]


def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


def feed_forward(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    y = rms(x, p["norm"])
    return x + gated(y @ p["gate"], y @ p["up"]) @ p["down"]


def after_norm(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """A sum that nothing but the norm reads."""
    return rms(x + jnp.sin(x) @ p["first"], p["norm"]) @ p["second"]


def arrays(shapes: dict[str, tuple[int, ...]]) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=s) / np.sqrt(s[0]), jnp.float32) for name, s in shapes.items()}


FEED_FORWARD = arrays({"norm": (K,), "gate": (K, N), "up": (K, N), "down": (N, K)})
X = arrays({"x": (M, K)})["x"] * 4


def quantized(
    fn: Callable[..., jax.Array], p: dict[str, jax.Array], x: jax.Array, spec: jq.OpSpec
) -> Callable[..., Any]:
    rules = [jq.Rule("norm", None), jq.Rule(".*", spec)]
    plan = jq.make_plan(fn, p, x, rules=rules)
    if spec.act is None or not spec.act.static:
        return jq.quantized(fn, plan)
    return jq.quantized(fn, plan, jq.act_state(plan, jq.calibrate(fn, plan, p, [x])))


def handed(fn: Callable[..., jax.Array], *args: Any) -> list[tuple[str, tuple[int, ...]]]:
    """Dtypes and shapes of what the compiled backward pass reads, arguments of the function and scalars left out."""

    def forward(*args: Any) -> Any:
        return jax.vjp(fn, *args)

    jaxpr, (out, back) = jax.make_jaxpr(forward, return_shape=True)(*args)
    leaves, tree = jax.tree.flatten(back)
    variables = jaxpr.jaxpr.outvars[len(jax.tree.leaves(out)) :]
    program = jax.jit(lambda leaves, g: jax.tree.unflatten(tree, leaves)(g), keep_unused=True)
    text = program.lower(leaves, out).compile().as_text()
    assert text is not None
    entry = text[text.index("\nENTRY") :]
    found: dict[Var, tuple[str, tuple[int, ...]]] = {}
    for name, place in re.findall(r"(%\S+) = \S+ parameter\((\d+)\)", entry):
        read = len(re.findall(re.escape(name) + r"(?![\w.\-])", entry)) > 1
        if read and int(place) < len(leaves):
            v, leaf = variables[int(place)], leaves[int(place)]
            if isinstance(v, Var) and v not in jaxpr.jaxpr.invars and leaf.shape:
                found[v] = str(leaf.dtype), tuple(leaf.shape)
    return list(found.values())


@needs_jit
@pytest.mark.parametrize("name", SCHEMES)
def test_norms_and_gates_hand_over_their_inputs_alone(name: str):
    """The gate and its factor, as the products return them; of the norm x, which is an argument here."""
    run = quantized(feed_forward, FEED_FORWARD, X, SCHEMES[name])
    every = handed(run, FEED_FORWARD, X)
    activations = [shape for dtype, shape in every if dtype == "float32" and shape[0] == M]
    assert not [shape for dtype, shape in every if dtype == "int8" and shape[0] != M]  # codes of weights
    kept = {"W8A8": 0, "a static range": 1, "weights alone": 1}[name]  # where the product needs its activation in float
    assert activations.count((M, N)) == 2 + kept
    assert activations.count((M, K)) == kept


@needs_jit
def test_a_sum_is_handed_over_in_the_place_of_its_terms():
    p = arrays({"first": (K, K), "norm": (K,), "second": (K, N)})
    run = quantized(after_norm, p, X, recipes.w8a8())
    floats = [shape for dtype, shape in handed(run, p, X) if dtype == "float32" and shape == (M, K)]
    assert len(floats) == 2  # the sum, and the cosine


def _two_results(x: jax.Array) -> jax.Array:
    @jax.jit
    def both(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        e = jnp.exp(x)
        return e * jax.nn.sigmoid(x), jnp.sum(e)

    y, total = both(x)
    return y @ jnp.zeros((K, 8)) + total


FEW: dict[str, Callable[[jax.Array], jax.Array]] = {
    "a mask": lambda x: jax.nn.relu(jnp.sin(x)) @ jnp.zeros((K, 8)),
    "the result": lambda x: jnp.tanh(x) @ jnp.zeros((K, 8)),
    "nothing": lambda x: (x * 2.0 + 1.0) @ jnp.zeros((K, 8)),
    "what something else reads too": _two_results,
}


@pytest.mark.every
@pytest.mark.parametrize("name", FEW)
def test_what_keeps_no_more_is_left_alone(name: str):
    """A derivative that reads a mask or the result alone; and equations whose results are read elsewhere."""
    jaxpr = jax.make_jaxpr(FEW[name])(X).jaxpr
    made = made_by_rows(jaxpr)
    assert made or name == "what something else reads too"
    assert rematerialized(jaxpr, made) == []


def _stacked(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return lax.scan(lambda x, p: (feed_forward(p, x), None), x, p)[0]


def _mapped(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return jax.vmap(lambda x: feed_forward(p, x))(jnp.stack([x, -x]))


def _checkpointed(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return jax.checkpoint(feed_forward, policy=jax.checkpoint_policies.dots_saveable)(p, x)


def _norm_in_codes(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """A weight that the plan quantizes reaches the norm too."""
    return rms(x, p["gate"][:, 0]) @ p["gate"]


PLACES = {"once": feed_forward, "scan": _stacked, "vmap": _mapped, "checkpoint": _checkpointed}


@pytest.mark.parametrize("name", PLACES)
def test_derivatives_are_those_of_the_same_products(name: str, monkeypatch: pytest.MonkeyPatch):
    """First and second derivatives, beside those of a function that computes nothing again."""
    fn, spec, p, x = PLACES[name], recipes.w8a8(), FEED_FORWARD, X
    if name == "scan":
        p = jax.tree.map(lambda w: jnp.stack([w, w * 0.5]), p)

    def derivatives() -> Any:
        run = quantized(fn, p, x, spec)

        def value(p: dict[str, jax.Array]) -> jax.Array:
            return jnp.sum(jnp.sin(run(p, x)))

        def along(p: dict[str, jax.Array]) -> jax.Array:
            return jax.jvp(value, (p,), (jax.tree.map(jnp.cos, p),))[1]

        return jax.jit(jax.value_and_grad(value))(p), jax.jit(along)(p), jax.jit(jax.grad(along))(p)

    got = derivatives()
    monkeypatch.setattr("jaxquant.transform.interpreter.rematerialized", lambda jaxpr, made: [])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), got, derivatives())


def test_a_quantized_weight_in_a_norm():
    p, x = FEED_FORWARD, X
    rules = [jq.Rule("gate", recipes.w8a8(), dequantize=True), jq.Rule(".*", None)]
    plan = jq.make_plan(_norm_in_codes, p, x, rules=rules)
    run = jq.quantized(_norm_in_codes, plan)
    frozen = jq.quantized(_norm_in_codes, plan)(jq.quantize_params(p, plan), x)
    np.testing.assert_allclose(run(p, x), frozen, rtol=1e-6, atol=1e-6)
    grads = jax.grad(lambda p: jnp.sum(run(p, x)))(p)
    assert bool(jnp.any(grads["gate"][:, 0] != 0))


def _summed_early(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """The sum is made, and half of the norm, before values that are not of the norm."""
    total = x + x @ p["first"]
    wide = jnp.square(total)
    other = jnp.cos(x)
    norm = total * lax.rsqrt(jnp.mean(wide, axis=-1, keepdims=True) + 1e-5) * p["norm"][None]
    return norm @ p["second"] + jnp.sum(other)


def _unread(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """A call has an argument that it does not read, which a product makes, and one that is an argument here."""

    @jax.jit
    def norm(x: jax.Array, w: jax.Array, unread: jax.Array, second: jax.Array) -> jax.Array:
        return rms(x, w)

    return norm(x, p["norm"], x @ p["first"], p["second"]) @ p["second"]


@pytest.mark.every
@pytest.mark.parametrize("fn", [_summed_early, _unread])
def test_equations_between(fn: Callable[..., jax.Array], monkeypatch: pytest.MonkeyPatch):
    p = arrays({"first": (K, K), "norm": (K,), "second": (K, N)})

    def derivative() -> Any:
        run = quantized(fn, p, X, recipes.w8a8())
        return jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(run(p, X)))))(p)

    got = derivative()
    monkeypatch.setattr("jaxquant.transform.interpreter.rematerialized", lambda jaxpr, made: [])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, derivative())
