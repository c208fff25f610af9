"""Models of other libraries, untouched: what runs frozen is what trains, and is the float function of the same values.

They need the extra ``models``; a test whose library is not installed is skipped.
"""

import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from third_party_models import BUILDERS

import jaxquant as jq
from jaxquant import recipes

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the warnings are the libraries' own


def build(case):
    library: str = case.partition("_")[0]
    library = {"e3nn": "e3nn_jax"}.get(library, library)
    os.environ.setdefault("KERAS_BACKEND", "jax")  # read by Keras when it is imported
    pytest.importorskip(library, exc_type=ImportError)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return BUILDERS[case]()


def relative(a, b):
    return float(jnp.linalg.norm(jnp.ravel(a - b)) / jnp.linalg.norm(jnp.ravel(b)))


@pytest.mark.parametrize("case", BUILDERS)
def test_models_of_other_libraries(case):
    with jax.numpy_rank_promotion("allow"):
        fn, params, args = build(case)
        plan = jq.make_plan(fn, params, *args, rules=[jq.Rule(".", recipes.w8a16())])
        assert plan.items, str(plan)
        qparams = jq.quantize_params(params, plan)
        values = jq.dequantize_params(qparams)
        quantized = jq.quantized(fn, plan)
        frozen, trained, right = (
            jax.jit(quantized)(qparams, *args),
            jax.jit(quantized)(params, *args),
            fn(values, *args),
        )
        assert bool(jnp.isfinite(right).all())
        # Weight-only products are exact to 1e-4; a network of them adds that up.
        assert relative(frozen, right) < 2e-3
        assert relative(trained, frozen) < 2e-3

        def loss(f):
            return lambda params: jnp.sum(jnp.sin(f(params, *args)))

        grads, expected = jax.jit(jax.grad(loss(quantized)))(params), jax.jit(jax.grad(loss(fn)))(values)
        for path, got in jax.tree_util.tree_flatten_with_path(grads)[0]:
            want = expected
            for key in path:
                want = (
                    want[key.key]
                    if hasattr(key, "key")
                    else want[key.idx]
                    if hasattr(key, "idx")
                    else getattr(want, key.name)
                )
            size = float(np.linalg.norm(want))
            assert float(np.linalg.norm(got - want)) <= 2e-2 * size + 1e-5, jax.tree_util.keystr(path)
