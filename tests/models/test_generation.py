"""Generation and evaluation, against the forward pass of whole sequences and against NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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
    return jax.jit(functools.partial(logits, config))


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
def test_greedy_is_the_most_likely_token_of_the_whole_sequence(name):
    times = Times()
    chunks = list(stream(model(name), PROMPTS, tokens=11, times=times))
    assert [len(chunk[0]) for chunk in chunks] == [8, 3]
    assert times.steps == 11
    for row, prompt in enumerate(PROMPTS):
        found = [i for chunk in chunks for i in chunk[row]]
        whole = forward(model(name).config)(model(name).params, jnp.array([prompt + found]))[0]
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
    assert generate(one, [[1, 2, 3]], tokens=3, cache="int8") == generate(one, [[1, 2, 3]], tokens=3)


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
    x = np.asarray(forward(one.config)(one.params, jnp.array([ids])), np.float64)[0, :-1]
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
