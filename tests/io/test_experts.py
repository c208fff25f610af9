"""Stacked experts, quantized on disk: each matrix as it would be by itself, in its family's layout."""

import json

import ml_dtypes
import numpy as np
import pytest
from hf_files import checkpoint

import jaxquant as jq
from jaxquant import QuantError, Rule, recipes

# Weights are what is read here, also of files that say how activations are quantized.
pytestmark = pytest.mark.filterwarnings("ignore:.*gives its weights alone")

E, HIDDEN, INNER = 3, 64, 32
RNG = np.random.default_rng(0)


def int4(**fields):
    return jq.OpSpec(jq.QuantSpec("int4", **fields))


GROUPS = {"granularity": "per_group", "group_size": 16}


def weights(turned):
    """gate_up and down, with magnitudes that differ along every axis."""
    found = {}
    for name, (out, length) in {"gate_up_proj": (2 * INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}.items():
        w = RNG.normal(size=(E, out, length)) * np.exp2(RNG.integers(-3, 3, (E, out, 1)))
        found[f"model.layers.0.mlp.experts.{name}"] = (w.swapaxes(1, 2) if turned else w).astype(np.float32)
    return found


def reference(w, axis, size):
    """The blocks of ``size`` elements along the axis, and the largest magnitude of each."""
    w = np.moveaxis(w, axis, -1).astype(np.float32)
    blocks = w.reshape(*w.shape[:-1], -1, size or w.shape[-1])
    return blocks, np.abs(blocks).max(-1)


def close(leaf, w, axis, size=None):
    """Within half a step of the largest value of each block along the contracted axis, which a wrong axis is not."""
    found = np.asarray(leaf.dequantize(np.float32))
    assert found.shape == w.shape
    a, largest = reference(w, axis, size)
    b, _ = reference(found, axis, size)
    assert (np.abs(a - b) <= largest[..., None] / 7 * 0.51 + 1e-6).all()


@pytest.mark.parametrize("spec", [GROUPS, {}, {**GROUPS, "symmetric": False}], ids=["groups", "channels", "zeros"])
@pytest.mark.parametrize(
    ("family", "axis"), [("qwen3_moe", -1), ("mixtral", -1), ("llama4", -2), ("gpt_oss", -2), ("qwen3_vl_moe", -2)]
)
def test_experts_are_quantized_along_what_is_contracted(family, axis, spec, tmp_path):
    arrays = weights(axis == -2) | {"model.layers.0.self_attn.q_proj.weight": np.eye(HIDDEN, dtype=np.float32)}
    checkpoint(tmp_path / "in", arrays, {"text_config": {"model_type": f"{family}_text", "hidden_size": HIDDEN}})
    plan = jq.io.quantize_hf(tmp_path / "in", tmp_path / "out", [Rule(".*", int4(**spec))])
    assert set(plan.weights) == set(arrays)
    params, _ = jq.io.load_hf(tmp_path / "out")
    assert params.keys() == arrays.keys()
    memory, _ = jq.io.load_hf(tmp_path / "in", rules=[Rule(".*", int4(**spec))])
    for name, w in arrays.items():
        if "experts" not in name:
            continue
        close(params[name], w, axis, spec.get("group_size"))
        np.testing.assert_array_equal(params[name].dequantize(), memory[name].dequantize())


@pytest.mark.parametrize("qtype", ["int8", "float8_e4m3fn"])
def test_other_grids(qtype, tmp_path):
    arrays = weights(turned=True)
    checkpoint(tmp_path / "in", arrays, {"model_type": "gpt_oss"})
    rules = [Rule(".*", jq.OpSpec(jq.QuantSpec(qtype)))]
    jq.io.quantize_hf(tmp_path / "in", tmp_path / "out", rules)
    params, memory = jq.io.load_hf(tmp_path / "out")[0], jq.io.load_hf(tmp_path / "in", rules=rules)[0]
    for name in arrays:
        np.testing.assert_array_equal(params[name].dequantize(), memory[name].dequantize())


def test_dbrx_has_its_experts_one_after_the_other(tmp_path):
    """w2 is [in, out] of each expert: no scale reaches from one into the next."""
    names = {x: f"transformer.blocks.0.ffn.experts.mlp.{x}" for x in ("w1", "w2")}
    w = {x: RNG.normal(size=(E * INNER, HIDDEN)).astype(np.float32) for x in names}
    w["w2"] *= np.repeat(np.exp2(np.arange(E) * 3), INNER)[:, None].astype(np.float32)
    config = {"model_type": "dbrx", "ffn_config": {"moe_num_experts": E}}
    checkpoint(tmp_path / "in", {names[x]: w[x] for x in names}, config)
    for run in ("disk", "memory"):
        if run == "disk":
            jq.io.quantize_hf(tmp_path / "in", tmp_path / "out", [Rule("experts", int4())])
            params, _ = jq.io.load_hf(tmp_path / "out")
        else:
            params, _ = jq.io.load_hf(tmp_path / "in", rules=[Rule("experts", int4())])
        close(params[names["w1"]], w["w1"], -1)
        found = np.asarray(params[names["w2"]].dequantize()).reshape(E, INNER, HIDDEN)
        wanted = w["w2"].reshape(E, INNER, HIDDEN)
        assert (np.abs(found - wanted) <= np.abs(wanted).max(1, keepdims=True) / 7 * 0.51).all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "new_moe"}, r"which axis is contracted is not known.*model_type: new_moe.*reduce_axes=\(-1,\)"),
        ({}, "model_type: none"),
        ({"model_type": "llama4", "hidden_size": HIDDEN}, "another axis is contracted than in the family's own"),
    ],
)
def test_layouts_that_are_not_known_are_refused(config, message, tmp_path):
    arrays = {name: w[:, :48] for name, w in weights(turned=False).items() if "gate" in name}
    checkpoint(tmp_path / "in", arrays, config)
    for run in (jq.io.plan_quantize_hf, lambda path, rules: jq.io.load_hf(path, rules=rules)):
        with pytest.raises(QuantError, match=rf"(?s)experts.gate_up_proj.*{message}"):
            run(tmp_path / "in", [Rule(".*", int4(**GROUPS))])
    assert jq.io.plan_quantize_hf(tmp_path / "in", [Rule(".*", int4(**GROUPS), reduce_axes=(-1,))]).weights


def test_what_a_rule_matches_and_leaves_is_said(tmp_path):
    arrays = {
        "proj.weight": np.ones((4, 32)), "conv.weight": np.ones((4, 4, 3)), "A_log": np.ones((4, 4)),
        "norm.weight": np.ones(4), "mlp.experts.down_proj_bias": np.ones((3, 4)), "keep.table": np.ones((4, 4)),
    }  # fmt: skip
    checkpoint(tmp_path / "in", {n: a.astype(ml_dtypes.bfloat16) for n, a in arrays.items()}, {})
    rules = [Rule("keep", None), Rule(".*", recipes.w8a16())]
    plan, (_, info) = jq.io.plan_quantize_hf(tmp_path / "in", rules), jq.io.load_hf(tmp_path / "in", rules=rules)
    assert plan.skipped.keys() == info.skipped.keys() == {"conv.weight", "A_log"}
    assert "conv.weight stays in float: it has 3 axes" in str(info)
    assert json.dumps(plan.skipped)


@pytest.mark.parametrize("format", ["gptq", "awq", "bitsandbytes"])
def test_formats_without_experts_refuse_them(format, tmp_path):
    checkpoint(tmp_path / "in", weights(turned=False), {"model_type": "qwen3_moe"})
    with pytest.raises(QuantError, match=r"experts.*named <module>.weight, but for experts"):
        jq.io.plan_quantize_hf(tmp_path / "in", [Rule(".*", int4(**GROUPS, scale_dtype="float16"))], format=format)
