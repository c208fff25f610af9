"""`load(path, like=...)`: the template's structure, or every difference at once."""

import collections
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from io_files import assert_same

import jaxquant as jq
from jaxquant.io import load, save

Pair = collections.namedtuple("Pair", "left right")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def q(qtype="int4", shape=(16, 6)):
    w = jnp.sin(jnp.arange(float(np.prod(shape)))).reshape(shape)
    return jq.quantize(w, jq.QuantSpec(qtype), reduce_axes=-2)


def ones(shape, dtype=jnp.float32):
    return jnp.ones(shape, dtype)


def spec(shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_float_templates(path):
    """The model's float parameters, with quantized and float leaves saved for them."""
    params = {"dense": {"kernel": q(), "bias": ones(6)}, "norm": [ones(3), jnp.zeros((), jnp.int32)]}
    save(path, params)
    floats = {"dense": {"kernel": ones((16, 6)), "bias": ones(6)}, "norm": params["norm"]}
    assert_same(params, load(path, like=floats))
    assert_same(params, load(path, like=jax.eval_shape(lambda: floats)))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, floats)
    assert_same(params, load(path, like=half))  # widths are free, and nothing is cast


def test_quantized_templates(path):
    params = {"kernel": q(), "bias": ones(6)}
    save(path, params)
    assert_same(params, load(path, like=params))
    assert_same(params, load(path, like=jax.eval_shape(lambda: params)))


def test_the_templates_containers(path):
    save(path, {"left": [ones(1), q()], "right": {"0": ones(3), "1": None}})
    like = Pair(left=(spec((1,)), spec((16, 6))), right=[spec((3,)), None])
    got = load(path, like=like)
    assert isinstance(got, Pair)
    assert isinstance(got.left, tuple)
    assert_same([ones(3), None], got.right)
    assert_same(q(), got.left[1])


def test_optimizer_state(path):
    params = {"w": ones(3)}
    state: Any = optax.adam(1e-3).init(params)
    adam = state[0]
    save(path, [{"count": adam.count, "mu": adam.mu, "nu": adam.nu}, None])
    got = load(path, like=state)
    assert jax.tree.structure(got) == jax.tree.structure(state)


def test_single_arrays(path):
    save(path, ones(3))
    assert_same(ones(3), load(path, like=spec((3,))))
    with pytest.raises(jq.QuantError, match=r"\(the whole tree\): saved as float32\[3\], wanted float32\[4\]"):
        load(path, like=spec((4,)))


def test_files_without_a_manifest(path):
    import safetensors.numpy

    safetensors.numpy.save_file({"a/b": np.ones(3, np.float32)}, path)
    assert_same({"a": {"b": ones(3)}}, load(path, like={"a": {"b": spec((3,))}}))


def test_all_differences_at_once(path):
    save(
        path,
        {
            "encoder": {"kernel": q(), "bias": ones(6), "steps": jnp.arange(6, dtype=jnp.int32)},
            "dense_0": {"kernel": q("int8"), "extra": ones(2)},
            "list": [ones(1), ones(2)],
            "fine": ones(1),
        },
    )
    like = {
        "encoder": {"kernel": spec((16, 7)), "bias": q(), "steps": spec((6,))},
        "Dense_0": {"kernel": spec((16, 6))},
        "list": [spec((1,)), spec((2,)), spec((3,))],
        "fine": spec((1,)),
    }
    with pytest.raises(jq.QuantError, match="does not fit the template like=") as error:
        load(path, like=like)
    lines = str(error.value).splitlines()
    assert lines[0] == f"load at {path}: the file does not fit the template like="
    assert lines[1:-1] == [
        "  Dense_0/kernel: missing (nearest: dense_0/kernel)",
        "  dense_0/extra: unexpected (nearest: Dense_0/kernel)",
        "  dense_0/kernel: unexpected (nearest: Dense_0/kernel)",
        "  encoder/bias: saved as float32[6], wanted int4[16, 6]",
        "  encoder/kernel: saved as int4[16, 6], wanted float32[16, 7]",
        "  encoder/steps: saved as int32[6], wanted float32[6]",
        "  list/2: missing",
    ]
    assert lines[-1] == (
        "; got missing=2, unexpected=2, misfits=3. "
        "Rename or reshape the leaves of one of the two, or load without like."
    )


@pytest.mark.parametrize(
    "example, message",
    [
        (lambda: (q(), spec((16, 6), jnp.int8)), "saved as int4.16, 6., wanted int8"),
        (lambda: (q(), q("int8")), "saved as int4.16, 6., wanted int8.16, 6."),
        (lambda: (ones((16, 6)), q()), "saved as float32.16, 6., wanted int4"),
        (lambda: (ones(3, bool), spec((3,), jnp.int32)), "saved as bool.3., wanted int32"),
        (lambda: (ones(()), 1.0), "saved as float32.., wanted float"),
        (lambda: (ones(2, jnp.uint32), jax.random.key(0)), "saved as uint32.2., wanted key<fry>.."),
        (lambda: (None, spec((3,))), "x: missing"),
        (lambda: (ones(3), None), "x: unexpected"),
    ],
)
def test_misfits(path, example, message):
    saved, wanted = example()
    save(path, {"x": saved})
    with pytest.raises(jq.QuantError, match=message):
        load(path, like={"x": wanted})


def test_nothing_is_read_before_the_template_fits(path, monkeypatch):
    save(path, {"x": ones(3)})
    monkeypatch.setattr("jaxquant.io.native.to_device", lambda array: pytest.fail("an array was read"))
    with pytest.raises(jq.QuantError, match="x: saved as"):
        load(path, like={"x": spec((4,))})


def test_thousands_of_differences(path):
    save(path, {f"layer {i}": np.ones(1, np.float32) for i in range(400)})
    with pytest.raises(jq.QuantError, match="missing=400, unexpected=400, misfits=0") as error:
        load(path, like={f"Layer {i}": spec((1,)) for i in range(400)})
    assert len(str(error.value).splitlines()) == 802
