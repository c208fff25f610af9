"""`explain` names the kernels of programs whose text holds them, through loops and fusions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from narrowed import present
from ops_reference import MATMUL, quantized, spec_of

import jaxquant as jq
from jaxquant import QuantError, ops, recipes
from jaxquant.ops.kernels.cpu.machine import int8_dots
from jaxquant.programs.compilers import compiled

SIZE = 512


def weight(spec, seed=0):
    return quantized(jnp.asarray(np.random.default_rng(seed).standard_normal((SIZE, SIZE), np.float32)), spec.weight)


@pytest.mark.skipif(jax.default_backend() != "cpu" or int8_dots() == "none", reason="the kernels of another machine")
def test_kernels():
    params = {
        "int8": weight(recipes.w8a8()),
        "two-level": weight(recipes.w4a16(128, two_level=True)),
        "nf4": weight(recipes.nf4()),
        "dequantized": weight(recipes.w8a16()),
        "table": jq.quantize(jnp.ones((SIZE, SIZE), jnp.float32), spec_of("int8"), reduce_axes=(-1,)),
        "layers": jax.tree.map(lambda v: jnp.stack([v, v]), weight(recipes.w8a16())),
        "unused": weight(recipes.w8a8()),
        "bias": jnp.ones(SIZE, jnp.float32),
    }

    def fn(params, x, tokens):
        x = ops.dot_general(x, params["int8"], MATMUL, spec=recipes.w8a8())
        x = jax.nn.relu(ops.dot_general(x, params["two-level"], MATMUL))
        x = jax.nn.relu(ops.dot_general(x, params["nf4"], MATMUL)) @ params["dequantized"].dequantize()
        x = x + ops.take(params["table"], tokens, axis=0) + params["bias"][None]
        return lax.scan(lambda x, q: (ops.dot_general(x, q, MATMUL), None), x, params["layers"])[0]

    shapes = jax.ShapeDtypeStruct((4, SIZE), jnp.float32), jax.ShapeDtypeStruct((4,), jnp.int32)
    found = jq.explain(fn, params, *shapes)
    assert {use.path: use.kernels for use in found.uses} == {
        "int8": ("int8",),
        "two-level": ("int8",),
        "nf4": ("float32",),
        "dequantized": ("dequantized", "float32"),
        "table": ("lookup",),
        "layers": ("int8",),
        "unused": (),
    }
    use = found["two-level"]
    assert use.nbytes == params["two-level"].nbytes
    assert use.limit == 4 * SIZE * SIZE / use.nbytes
    assert found.reading(1e9) == sum(use.nbytes for use in found.uses) / 1e9
    assert present(found.temporaries) > 4 * SIZE * SIZE  # the dequantized weight
    lines = str(found).splitlines()
    assert lines[0].split() == ["path", "kernel", "read", "written", "limit"]
    assert any(line.startswith("unused") and "not found" in line for line in lines)
    with pytest.raises(KeyError):
        found["bias"]


def test_a_tree_without_quantized_weights():
    with pytest.raises(QuantError, match="no parameter is quantized"):
        jq.explain(lambda p, x: x @ p["w"], {"w": jnp.ones((4, 4))}, jnp.ones((2, 4)))


def test_loops_stay_loops_where_nothing_is_compiled():
    """The program is the one that `jax.jit` runs, though ``jax_disable_jit`` unrolls loops."""
    with jax.disable_jit():
        program = compiled(lambda x: lax.scan(lambda x, _: (jnp.tanh(x), None), x, length=20)[0], (jnp.ones(4),))
    assert " while(" in program.as_text()
