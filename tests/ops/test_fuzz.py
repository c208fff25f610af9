"""Random programs of one or two ops with random specs, against the float64 reference."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_reference import quantized, real, slow_but, unequal

from jaxquant import OpSpec, QuantSpec, ops

INTS = [f"{u}int{bits}" for bits in (2, 3, 4, 5, 8) for u in ("", "u")]
FLOATS = ["float8_e4m3fn", "float8_e5m2", "nf4", "fp4", "mxfp8", "mxfp4", "nvfp4"]


@st.composite
def quant_specs(draw, *, weight):
    qtype = draw(st.sampled_from(INTS + FLOATS))
    if qtype in ("mxfp8", "mxfp4", "nvfp4"):
        return QuantSpec(qtype)
    symmetric = qtype in FLOATS or (draw(st.booleans()) if not (weight and qtype.startswith("u")) else False)
    granularity = draw(st.sampled_from(["per_tensor", "per_channel", "per_group"]))
    group = draw(st.sampled_from([4, 8, 16, 32])) if granularity == "per_group" else None
    return QuantSpec(qtype, granularity=granularity, group_size=group, symmetric=symmetric)


@st.composite
def programs(draw):
    """One or two layers on [2, 6, 32], each a kind, an OpSpec, and whether its weight is frozen."""
    steps = []
    for kind in draw(st.lists(st.sampled_from(list(LAYERS)), min_size=1, max_size=2)):
        weight, act = draw(st.none() | quant_specs(weight=True)), draw(st.none() | quant_specs(weight=False))
        steps.append((kind, OpSpec(weight, act), weight is not None and draw(st.booleans())))
    return steps


# kind: (shape of the weight, its contracted axes, those of the activation, the equation on the activation's windows)
LAYERS = {
    "dot": ((32, 32), (0,), (2,), "btd,do->bto"),
    "heads": ((32, 4, 8), (0,), (2,), "btd,dhk->bthk"),
    "weight on the left": ((32, 32), (1,), (2,), "btd,od->bto"),
    "convolution": ((3, 32, 32), (0, 1), (1, 2), "btwd,wdo->bto"),
}


def apply(kind, x, w, spec):
    if kind == "dot":
        return ops.dot_general(x, w, (((2,), (0,)), ((), ())), spec=spec)
    if kind == "convolution":
        return ops.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), spec=spec)
    return ops.einsum(LAYERS[kind][3], x, w, spec=spec).reshape(x.shape)


def windows(x):
    """[batch, time, 3, channels]: what each step of a convolution of width 3 sees."""
    padded = np.pad(x, ((0, 0), (1, 1), (0, 0)))
    return np.stack([padded[:, i : i + x.shape[1]] for i in range(3)], axis=2)


@pytest.mark.parametrize("examples", slow_but([10, 300], 10))
def test_programs(examples):
    settings(max_examples=examples)(given(programs(), st.integers(0, 1000))(check))()


def check(steps, seed):
    """Layer by layer: the input of each is the output of the one before it, so that errors do not mix."""
    x = unequal(seed, (2, 6, 32), decades=0.5)
    weights = [unequal(seed + i + 1, LAYERS[kind][0], decades=0.5) for i, (kind, _, _) in enumerate(steps)]
    leaves = [
        quantized(w, spec.weight, LAYERS[kind][1]) if frozen else w
        for w, (kind, spec, frozen) in zip(weights, steps, strict=True)
    ]

    @jax.jit
    def program(x, leaves):
        outputs = []
        for (kind, spec, _), leaf in zip(steps, leaves, strict=True):
            x = apply(kind, x, leaf, spec)
            outputs.append(x)
        return outputs

    for (kind, spec, _), w, got in zip(steps, weights, program(x, leaves), strict=True):
        _, weight_axes, act_axes, equation = LAYERS[kind]
        left, right = real(x, spec.act, act_axes), real(w, spec.weight, weight_axes)
        seen = windows(left) if kind == "convolution" else left
        want = np.einsum(equation, seen, right).reshape(got.shape)
        # In units of |row| |column|, a row being what shares a scale: two digits are good to about 1e-5 of that.
        rows = np.sqrt(np.sum(left**2, axis=act_axes, keepdims=True)) * np.ones_like(left[..., :1])
        columns = np.sqrt(np.sum(right**2, axis=weight_axes)).reshape(-1)
        unit = rows * columns
        off = np.asarray(got, np.float64) - want
        digits = sum(s is not None and s.type.kind == "int" for s in (spec.weight, spec.act)) == 1
        digits = digits and None in (spec.weight, spec.act)
        assert np.linalg.norm(off / np.where(unit == 0, 1, unit)) <= (3e-5 if digits else 3e-7) * want.size**0.5
        x = got
