"""What the compiled programs write: no copy of the weight. Asserted on the program, not on a clock."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from narrowed import present

import jaxquant as jq
from jaxquant import QuantSpec

pytestmark = pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="about what a newer XLA makes of a program")

N = 1024


def arrays_written(fn, *args) -> list[str]:
    """Dtypes of the arrays of N * N elements that the compiled function writes for a finite weight, its results aside.

    Instructions inside a fusion write nothing. Of a conditional only the second branch counts: the first is for
    arrays with infinities or NaN. (`memory_analysis` counts both, whichever runs.)
    """
    text = present(jax.jit(fn).lower(*args).compile().as_text())
    bodies = dict(re.findall(r"^(?:ENTRY )?(%[\w.-]+) \(.*?\) -> .*? \{\n(.*?)^\}", text, re.DOTALL | re.MULTILINE))
    entry = present(re.search(r"^ENTRY (%[\w.-]+)", text, re.MULTILINE))[1]
    results = present(re.search(r"ROOT .*", bodies[entry]))[0].split("metadata=")[0]
    written, todo = [], [entry]
    while todo:
        for line in bodies[todo.pop()].splitlines():
            if branches := re.search(r"branch_computations=\{([^}]*)\}", line):
                todo.append(branches[1].split(", ")[1])
            if called := re.search(r" (?:call|while)\(.*?(?:to_apply|body)=(%[\w.-]+)", line):
                todo.append(called[1])
            if array := re.match(r"\s*(%[\w.-]+) = (\w+)\[([\d,]+)\]\S* ([\w-]+)\(", line):
                name, dtype, shape, op = array.groups()
                is_result = re.search(re.escape(name) + r"\b", results.partition("(")[2])
                if math.prod(map(int, shape.split(","))) >= N * N and not is_result:
                    written += [dtype] if op not in ("parameter", "get-tuple-element", "bitcast") else []
    return written


def weight(dtype):
    return jax.ShapeDtypeStruct((N, N), dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "spec, axes, written",
    [
        (QuantSpec("int8"), (-1,), []),
        # The codes before they are transposed: cheaper than to read the weight across its rows.
        (QuantSpec("int8"), (-2,), ["s8"]),
        (QuantSpec("int8", granularity="per_tensor"), (-1,), []),
        (QuantSpec("uint8", symmetric=False), (-1,), []),
        # The codes before neighbours are packed: fused with that, each would be rounded once per byte it goes into.
        (QuantSpec("int4", granularity="per_group", group_size=128), (-1,), ["s8"]),
        (QuantSpec("int4", granularity="per_group", group_size=128), (-2,), []),
        (QuantSpec("float8_e4m3fn"), (-1,), []),
        (QuantSpec("mxfp4"), (-1,), ["u8"]),
    ],
    ids=str,
)
def test_quantizing_writes_codes_and_no_copy_of_the_weight(spec, axes, written, dtype):
    if dtype == jnp.bfloat16 and spec.whole_range and spec.group_size:
        written = ["bf16", *written]  # XLA widens an array that is cut into groups, and rounds it again
    assert arrays_written(functools.partial(jq.quantize, spec=spec, reduce_axes=axes), weight(dtype)) == written


@pytest.mark.parametrize(
    "qtype, axes, most",
    [
        pytest.param("int8", (-2,), 0.05, marks=pytest.mark.slow),
        pytest.param("int8", (-1,), 0.05, marks=pytest.mark.slow),
        # A range has two ends: for an array with NaN a 64th of it for either, and a 64th of the codes in bytes.
        pytest.param("int4", (-1,), 0.055, marks=pytest.mark.slow),
        pytest.param("int4", (-2,), 0.13),  # packed bytes before they are transposed
    ],
)
def test_temporaries_of_a_large_weight(qtype, axes, most):
    """Beside the weight's bytes; with what is reserved for a weight that has NaN."""
    large = jax.ShapeDtypeStruct((4096, 4096), jnp.float32)
    program = jax.jit(functools.partial(jq.quantize, spec=QuantSpec(qtype), reduce_axes=axes)).lower(large).compile()
    assert present(program.memory_analysis()).temp_size_in_bytes <= most * 4 * 4096**2


def test_the_check_itself():
    assert arrays_written(lambda x: jnp.sort(jnp.sin(x), axis=0) @ x, weight(jnp.float32))


def test_fake_quant_writes_its_result_only():
    fn = functools.partial(jq.fake_quant, spec=QuantSpec("int8"), reduce_axes=(-1,))
    assert arrays_written(fn, weight(jnp.float32)) == []


def test_dequantizing_writes_its_result_only():
    quantize = functools.partial(jq.quantize, spec=QuantSpec("int8"), reduce_axes=(-1,))
    assert arrays_written(jq.dequantize, jax.eval_shape(quantize, weight(jnp.float32))) == []
