"""Generation and evaluation, against the forward pass of whole sequences and against NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hf_files import checkpoint
from models.decoders import GOLDEN

import jaxquant as jq
from jaxquant.models import Sampling, Times, evaluate, generate, load, logits, stream
from jaxquant.models.generation import _chosen, _programs

PROMPTS = [[1, 5, 9, 7, 11], [4, 3]]


@functools.cache
def model(name="llama"):
    return dataclasses.replace(load(GOLDEN / name), ends=frozenset())


@functools.cache
def forward(config):
    return jax.jit(jq.quantized(functools.partial(logits, config)))


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
def test_greedy_is_the_most_likely_token_of_the_whole_sequence(name):
    times = Times()
    chunks = list(stream(model(name), PROMPTS, tokens=11, times=times))
    assert [len(chunk[0]) for chunk in chunks] == [8, 3]
    assert times.steps == 11
    for row, prompt in enumerate(PROMPTS):
        found = [i for chunk in chunks for i in chunk[row]]
        whole = forward(model(name).config)(model(name).params, np.array([prompt + found]))[0]
        assert found == whole.argmax(-1)[len(prompt) - 1 : -1].tolist()


def test_it_stops_where_a_text_ends():
    """Each sequence for itself; the token that ended it is left out, and so is all that would follow."""
    first, second = generate(model(), PROMPTS, tokens=6)
    end = second[2]
    assert end not in first
    one = dataclasses.replace(model(), ends=frozenset({end}))
    assert generate(one, PROMPTS, tokens=6) == [first, second[: second.index(end)]]
    both = dataclasses.replace(model(), ends=frozenset({end, first[0]}))
    assert generate(both, PROMPTS, tokens=6) == [[], second[: min(second.index(i) for i in both.ends if i in second)]]


def test_quantized_weights_and_an_int8_cache():
    """A cache in int8 is near enough for the first tokens, and the weights stay codes."""
    one = load(GOLDEN.parent / "models" / "gptq_w4g64_sym")
    assert "int4, groups of 64, symmetric" in one.kinds
    found = generate(one, [[1, 2, 3]], tokens=3, cache="int8")
    with jax.disable_jit():  # what is compiled ahead runs compiled
        assert generate(one, [[1, 2, 3]], tokens=3) == found


# -- sampling ----------------------------------------------------------------------------------------------------------

LOGITS = np.log(np.array([0.05, 0.4, 0.3, 0.05, 0.2], np.float32))


def drawn(**settings):
    rows = np.broadcast_to(LOGITS, (4000, 5))
    found = _chosen(Sampling(**settings), jnp.asarray(rows), jax.random.key(0), jnp.asarray(3))
    return np.bincount(np.asarray(found), minlength=5) / len(rows)


@pytest.mark.parametrize(
    "settings, wanted",
    [
        ({"temperature": 1.0}, [0.05, 0.4, 0.3, 0.05, 0.2]),
        ({"temperature": 0.5}, np.array([0.05, 0.4, 0.3, 0.05, 0.2]) ** 2 / 0.295),
        ({"temperature": 1.0, "top_k": 3}, np.array([0, 0.4, 0.3, 0, 0.2]) / 0.9),
        ({"temperature": 1.0, "top_k": 9}, [0.05, 0.4, 0.3, 0.05, 0.2]),
        ({"temperature": 1.0, "top_p": 0.6}, np.array([0, 0.4, 0.3, 0, 0]) / 0.7),
        ({"temperature": 1.0, "top_p": 0.01}, [0, 1, 0, 0, 0]),
        ({"temperature": 0.0}, [0, 1, 0, 0, 0]),
    ],
)
def test_shares_of_tokens(settings, wanted):
    wanted = np.array(wanted)
    found = drawn(**settings)
    assert (np.abs(found - wanted) <= 4 * np.sqrt(wanted * (1 - wanted) / 4000)).all()  # four standard deviations


def test_a_seed_gives_the_same_tokens_whatever_follows_in_the_batch():
    sampling = Sampling(temperature=1.0, seed=3)
    first = generate(model(), PROMPTS[:1], tokens=6, sampling=sampling)
    assert generate(model(), PROMPTS[:1] * 2, tokens=6, sampling=sampling)[0] == first[0]
    programs = _programs.cache_info().misses
    assert generate(model(), PROMPTS[:1], tokens=6, sampling=dataclasses.replace(sampling, seed=4)) != first
    assert _programs.cache_info().misses == programs  # nothing is compiled for another seed


@pytest.mark.every
@pytest.mark.parametrize(
    "prompts, settings, message",
    [
        ([], {}, "a prompt is empty"),
        ([[1], []], {}, "a prompt is empty"),
        ("text", {}, "prompts must be a list"),
        ([[1, 40]], {}, "not in the vocabulary; got vocab_size=40, largest=40"),
        ([[-1]], {}, "not in the vocabulary"),
        ([[1]], {"tokens": 0}, "tokens must be positive"),
        ([[1]], {"cache": "fp8"}, "unknown kind of cache; got cache='fp8'"),
        ([[1] * 60], {"tokens": 5}, "made for 64 tokens; got prompt=60, tokens=5. Ask for at most 4"),
        ([[1]], {"sampling": Sampling(temperature=-1.0)}, "temperature is out of range"),
        ([[1]], {"sampling": Sampling(top_k=0)}, "top_k is out of range"),
        ([[1]], {"sampling": Sampling(top_p=0.0)}, "top_p is out of range"),
        ([[1]], {"sampling": Sampling(seed=-1)}, "seed is out of range"),
    ],
)
def test_refusals(prompts, settings, message):
    with pytest.raises(jq.QuantError, match=message):
        generate(model(), prompts, **settings)


# -- evaluation --------------------------------------------------------------------------------------------------------


def log_probabilities(one, ids):
    """In float64, from the logits of a window."""
    x = np.asarray(forward(one.config)(one.params, np.array([ids])), np.float64)[0, :-1]
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_evaluation_is_what_numpy_computes():
    """Over windows of 7 tokens, of which the last is shorter."""
    one = model()
    params = {name: leaf * (1.1 if "down_proj" in name else 1) for name, leaf in one.params.items()}
    other = dataclasses.replace(one, params=params)
    ids = np.random.default_rng(0).integers(0, 40, 19).tolist()
    done = []
    found = evaluate(one, ids, reference=other, window=7, progress=lambda *at: done.append(at))
    assert done == [(1, 3), (2, 3), (3, 3)]
    nll, reference, kl, same = [], [], [], []
    for at in (0, 7, 14):
        part = ids[at : at + 7]
        p, r = (log_probabilities(x, part) for x in (one, other))
        rows = np.arange(len(part) - 1)
        nll += (-p[rows, part[1:]]).tolist()
        reference += (-r[rows, part[1:]]).tolist()
        kl += (np.exp(r) * (r - p)).sum(-1).tolist()
        same += (p.argmax(-1) == r.argmax(-1)).tolist()
    assert (found.tokens, found.windows, found.window) == (16, 3, 7)
    assert found.nll == pytest.approx(np.mean(nll), rel=1e-5)
    assert found.perplexity == pytest.approx(np.exp(np.mean(nll)), rel=1e-4)
    assert found.reference_perplexity == pytest.approx(np.exp(np.mean(reference)), rel=1e-4)
    assert found.kl == pytest.approx(np.mean(kl), rel=1e-3)
    assert found.agreement == np.mean(same)


def test_a_model_is_where_it_is():
    with jax.disable_jit():  # what is compiled ahead runs compiled
        found = evaluate(model(), list(range(9)), reference=model(), window=4)
    assert (found.windows, found.tokens) == (2, 6)  # the ninth token has nothing before it
    assert (found.kl, found.agreement) == (0, 1)


@pytest.mark.every
@pytest.mark.parametrize(
    "ids, settings, message",
    [
        ([1], {}, "fewer than two tokens"),
        ([1, 40], {}, "not in the vocabulary"),
        ([1, 2], {"window": 1}, "a window needs two tokens"),
        ([1] * 100, {"window": 65}, "made for 64 tokens; got window=65. Use window=64"),
    ],
)
def test_evaluation_refuses(ids, settings, message):
    with pytest.raises(jq.QuantError, match=message):
        evaluate(model(), ids, **settings)


def test_evaluation_refuses_another_vocabulary():
    with pytest.raises(jq.QuantError, match=r"the vocabularies differ; got vocab_sizes=\(40, 64\)"):
        evaluate(model(), [1, 2], reference=load(GOLDEN.parent / "base"))


# -- keys and values by the scales of the checkpoint -------------------------------------------------------------------


SIZES = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "head_dim": 4}
STATED = {"model_type": "llama", "num_hidden_layers": 1, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, **SIZES}
SCALES = {"k": np.float32(0.03), "v": np.float32(0.011)}


def with_cache_scales(folder, scheme):
    """A decoder in float but for one weight, as files have it that have scales of keys and values."""
    rng = np.random.default_rng(3)
    config = jq.models.config_of(STATED)
    tensors = {n: rng.normal(size=s).astype(np.float32) / np.sqrt(s[-1]) for n, s in config.shapes().items()}
    name = "model.layers.0.mlp.down_proj"
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"].astype(ml_dtypes.float8_e4m3fn)
    tensors[f"{name}.weight_scale"] = np.float32(1)
    place = "model.layers.0.self_attn"
    saved = tensors | {f"{place}.{x}_scale": value for x, value in SCALES.items()}
    quantization = {"quant_method": "fp8", "kv_cache_scheme": scheme}
    return checkpoint(folder, saved, STATED | {"quantization_config": quantization}), tensors


def in_numpy(w, ids, rounded):
    """Logits of the decoder; ``rounded``: what becomes of keys and values, [token, head, feature]."""
    layer = {n.removeprefix("model.layers.0."): x.astype(np.float64) for n, x in w.items()}
    norm = lambda x, g: x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * g  # noqa: E731
    x = layer["model.embed_tokens.weight"][ids]
    y = norm(x, layer["input_layernorm.weight"])
    q, k, v = ((y @ layer[f"self_attn.{n}_proj.weight"].T).reshape(len(ids), -1, 4) for n in "qkv")
    angles = np.arange(len(ids))[:, None, None] * 10000.0 ** -np.array([0, 0.5])

    def turn(a):
        first, last = a[..., :2], a[..., 2:]
        turned = first * np.cos(angles) - last * np.sin(angles), last * np.cos(angles) + first * np.sin(angles)
        return np.concatenate(turned, -1)

    k, v = rounded("k", turn(k)), rounded("v", v)
    scores = np.einsum("thd,shd->hts", turn(q), np.repeat(k, 2, 1)) / 2
    weights = np.exp(np.where(np.tril(np.ones(scores.shape[1:], bool)), scores, -np.inf))
    weights /= weights.sum(-1, keepdims=True)
    y = np.einsum("hts,shd->thd", weights, np.repeat(v, 2, 1)).reshape(len(ids), -1)
    x = x + y @ layer["self_attn.o_proj.weight"].T
    y = norm(x, layer["post_attention_layernorm.weight"])
    gate, up = (y @ layer[f"mlp.{n}_proj.weight"].T for n in ("gate", "up"))
    x = x + (gate / (1 + np.exp(-gate)) * up) @ layer["mlp.down_proj.weight"].T
    return norm(x, layer["model.norm.weight"]) @ layer["lm_head.weight"].T


CACHES = {
    "float8_e4m3fn": ("static", lambda x: np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)),
    "int8": ({"type": "int", "num_bits": 8, "dynamic": False}, lambda x: np.clip(np.rint(x), -128, 127)),
}


@pytest.mark.every
@pytest.mark.parametrize("qtype", CACHES)
def test_keys_and_values_by_the_scales_of_the_checkpoint(qtype, tmp_path):
    scheme, codes = CACHES[qtype]
    place, w = with_cache_scales(tmp_path / "model", scheme)
    ids = np.array([3, 17, 5, 9, 22, 1, 8])
    found = load(place)
    assert found.config.cache == qtype
    assert f"  activations: {qtype} keys and values" in str(found)
    plain = in_numpy(w, ids, lambda _, x: x)
    wanted = in_numpy(w, ids, lambda name, x: codes(x.astype(np.float32) / SCALES[name]) * SCALES[name])
    run = jax.jit(jq.quantized(functools.partial(logits, found.config), found))
    # A key within a rounding of a tie may go to the other side: the bound is a few such steps.
    np.testing.assert_allclose(run(found.params, ids[None])[0], wanted, atol=0.05 * np.abs(plain - wanted).max())
    floats = load(place, cache="float")
    alone = forward(floats.config)(floats.params, ids[None])[0]
    np.testing.assert_allclose(alone, plain, atol=1e-4)
    made = generate(dataclasses.replace(found, ends=frozenset()), [ids.tolist()], tokens=4)[0]
    whole = run(found.params, np.array([[*ids, *made]]))[0]
    assert made == whole.argmax(-1)[len(ids) - 1 : -1].tolist()  # from the cache as without one
    with pytest.raises(jq.QuantError, match="says how keys and values are stored"):
        generate(found, [[1]], tokens=1, cache="int8")
    with pytest.raises(jq.QuantError, match="which no plan of a function can hold"):
        jq.io.load_model(place)


@pytest.mark.every
def test_a_cache_that_cannot_be_run_is_refused(tmp_path):
    place, _ = with_cache_scales(tmp_path / "model", {"type": "float", "num_bits": 4})
    with pytest.raises(jq.QuantError, match=r"kv_cache_scheme.*cannot be run.*cache='float'"):
        load(place)
