"""The name maps, by what comes out: models in NumPy on the trees they give compute what transformers computed."""

import functools
import math

import jax
import numpy as np
import pytest
from hf_files import GOLDEN, tensors_of

import jaxquant as jq
from jaxquant import recipes
from jaxquant.io.hf import BERT, GPT2, OPT, VIT

pytestmark = pytest.mark.every

HEADS = 2
is_qtensor = lambda x: isinstance(x, jq.QTensor)  # noqa: E731


def norm(p, x, eps):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * np.asarray(p["scale"]) + np.asarray(p["bias"])


def dense(p, x):
    kernel = p["kernel"].dequantize() if isinstance(p["kernel"], jq.QTensor) else p["kernel"]
    return x @ np.asarray(kernel) + (np.asarray(p["bias"]) if "bias" in p else 0)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attention(q, k, v, *, causal=False):
    q, k, v = (x.reshape(*x.shape[:2], HEADS, -1).swapaxes(1, 2) for x in (q, k, v))
    scores = q @ k.swapaxes(2, 3) / math.sqrt(q.shape[-1])
    if causal:
        scores = np.where(np.tri(scores.shape[-1], dtype=bool), scores, -np.inf)
    out = (softmax(scores) @ v).swapaxes(1, 2)
    return out.reshape(*out.shape[:2], -1)


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def gelu_tanh(x):
    return x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gpt2(p, input_ids):
    x = p["wte"]["embedding"][input_ids] + p["wpe"]["embedding"][: input_ids.shape[1]]
    for i in range(2):
        h = p[f"h_{i}"]
        q, k, v = np.split(dense(h["attn"]["c_attn"], norm(h["ln_1"], x, 1e-5)), 3, -1)
        x = x + dense(h["attn"]["c_proj"], attention(q, k, v, causal=True))
        x = x + dense(h["mlp"]["c_proj"], gelu_tanh(dense(h["mlp"]["c_fc"], norm(h["ln_2"], x, 1e-5))))
    return norm(p["ln_f"], x, 1e-5) @ p["wte"]["embedding"].T


def opt(p, input_ids):
    x = dense(p["project_in"], p["embed_tokens"]["embedding"][input_ids])
    x = x + p["embed_positions"]["embedding"][2 : 2 + input_ids.shape[1]]  # the first two rows are for padding
    for i in range(2):
        layer = p[f"layers_{i}"]
        y = norm(layer["self_attn_layer_norm"], x, 1e-5)
        q, k, v = (dense(layer["self_attn"][f"{name}_proj"], y) for name in "qkv")
        x = x + dense(layer["self_attn"]["out_proj"], attention(q, k, v, causal=True))
        y = dense(layer["fc1"], norm(layer["final_layer_norm"], x, 1e-5))
        x = x + dense(layer["fc2"], np.maximum(y, 0))
    x = dense(p["project_out"], norm(p["final_layer_norm"], x, 1e-5))
    return x @ p["embed_tokens"]["embedding"].T


def bert(p, input_ids, token_type_ids):
    e = {name: p["embeddings"][f"{name}_embeddings"]["embedding"] for name in ("word", "position", "token_type")}
    x = e["word"][input_ids] + e["position"][: input_ids.shape[1]] + e["token_type"][token_type_ids]
    x = norm(p["embeddings"]["LayerNorm"], x, 1e-12)
    for i in range(2):
        layer = p[f"layer_{i}"]
        q, k, v = (dense(layer["attention"]["self"][name], x) for name in ("query", "key", "value"))
        out = layer["attention"]["output"]
        x = norm(out["LayerNorm"], x + dense(out["dense"], attention(q, k, v)), 1e-12)
        y = dense(layer["output"]["dense"], gelu(dense(layer["intermediate"]["dense"], x)))
        x = norm(layer["output"]["LayerNorm"], x + y, 1e-12)
    return dense(p["classifier"], np.tanh(dense(p["pooler"]["dense"], x[:, 0])))


def vit(p, pixel_values):
    kernel = np.asarray(p["embeddings"]["projection"]["kernel"])  # [height, width, in, out]
    size, (batch, channels, rows, columns) = kernel.shape[0], pixel_values.shape
    patches = pixel_values.reshape(batch, channels, rows // size, size, columns // size, size)
    x = np.einsum("bchxwy,xyco->bhwo", patches, kernel).reshape(batch, -1, kernel.shape[-1])
    x = x + np.asarray(p["embeddings"]["projection"]["bias"])
    first = np.broadcast_to(p["embeddings"]["cls_token"], (batch, 1, x.shape[-1]))
    x = np.concatenate([first, x], 1) + np.asarray(p["embeddings"]["position_embeddings"])
    for i in range(2):
        layer = p[f"layer_{i}"]
        y = norm(layer["layernorm_before"], x, 1e-12)
        q, k, v = (dense(layer["attention"][name], y) for name in ("query", "key", "value"))
        x = x + dense(layer["attention"]["output"], attention(q, k, v))
        x = x + dense(layer["output"], gelu(dense(layer["intermediate"], norm(layer["layernorm_after"], x, 1e-12))))
    return dense(p["classifier"], norm(p["layernorm"], x, 1e-12)[:, 0])


MODELS = {"gpt2": (GPT2, gpt2), "opt": (OPT, opt), "bert": (BERT, bert), "vit": (VIT, vit)}


@functools.cache
def reference(name):
    inputs = tensors_of(GOLDEN / "transformers" / name / "ref.safetensors")
    return inputs, inputs.pop("logits")


def as_numpy(tree):
    return jax.tree.map(lambda x: x if is_qtensor(x) else np.asarray(x), tree, is_leaf=is_qtensor)


@pytest.mark.parametrize("name", MODELS)
def test_the_tree_computes_what_the_model_does(name):
    names, model = MODELS[name]
    inputs, logits = reference(name)
    params, _ = jq.io.load_hf(GOLDEN / "transformers" / name, names=names)
    found = model(as_numpy(params), **inputs)
    np.testing.assert_allclose(found, logits, rtol=1e-5, atol=2e-5 * np.abs(logits).max())


@pytest.mark.parametrize("name", MODELS)
def test_weights_that_are_quantized_on_the_way_fit_the_same_model(name):
    """8 bits per output feature: near what the float model computes; GPT-2's kernels are [in, out] in the file."""
    names, model = MODELS[name]
    inputs, logits = reference(name)
    axes = (-2,) if name == "gpt2" else None
    pattern = r"(c_\w+|proj|fc[12]|query|key|value|dense)\.weight"
    rules = [jq.Rule("patch|project_|pooler", None)] if name != "gpt2" else []
    path = GOLDEN / "transformers" / name
    params, info = jq.io.load_hf(path, names=names, rules=[*rules, jq.Rule(pattern, recipes.w8a16(), axes)])
    assert len(info.modules) == (8 if name == "gpt2" else 12)
    found = model(as_numpy(params), **inputs)
    error = np.linalg.norm(found - logits) / np.linalg.norm(logits)
    assert 0 < error < 0.03
