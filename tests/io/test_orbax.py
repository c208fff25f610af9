"""Orbax: trees come back with their static fields, at their true size, sharded as asked."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from io_files import assert_same
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax_settings import makes_nan

import jaxquant as jq
from jaxquant import QuantError

pytest.importorskip("orbax.checkpoint")

W = jnp.sin(jnp.arange(16 * 64.0)).reshape(16, 64)


def quantized(qtype, **fields):
    return jq.quantize(W, jq.QuantSpec(qtype, **fields), reduce_axes=(-1,))


def test_a_tree_comes_back_to_the_last_bit(tmp_path):
    params = {
        "layers": [{"w": quantized("int4", granularity="per_group", group_size=32)}, {"w": quantized("nvfp4")}],
        "mx": quantized("mxfp8"),
        "asym": quantized("uint3", symmetric=False).store((-2,)),
        "fp8": quantized("float8_e5m2"),
        "plain": (W, np.arange(3), np.float64(2), None),
        "int2": jnp.asarray(np.array([1, -2, 0]), ml_dtypes.int4),
        "e4m3": jnp.asarray(W[0], ml_dtypes.float8_e4m3),
    }
    jq.io.save_orbax(tmp_path / "step", params)
    assert_same(jq.io.load_orbax(tmp_path / "step"), params)


def test_sharded_trees(tmp_path):
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(4), ("x",))
    params = {"w": quantized("int4"), "v": quantized("float8_e4m3fn")}
    where = jq.ops.shardings(params, {name: NamedSharding(mesh, P("x", None)) for name in params})
    placed = jax.device_put(params, where)
    jq.io.save_orbax(tmp_path / "step", placed)
    got = jq.io.load_orbax(tmp_path / "step", shardings=where)
    assert_same(got, params)
    assert got["w"].codes.sharding.is_equivalent_to(placed["w"].codes.sharding, 2)
    with pytest.raises(QuantError, match="do not fit the tree"):
        jq.io.load_orbax(tmp_path / "step", shardings={"other": None})


def test_what_has_no_manifest_is_refused(tmp_path):
    with pytest.raises(QuantError, match="no manifest"):
        jq.io.load_orbax(tmp_path)


def test_a_manifest_that_lies_is_refused(tmp_path):
    jq.io.save_orbax(tmp_path / "step", {"w": quantized("int4")})
    (file,) = (p for p in (tmp_path / "step" / "jaxquant").rglob("*") if p.is_file() and b'"arrays"' in p.read_bytes())
    text = file.read_text()
    for old, new in (
        ('"int4"', '"int3"'),
        ("[16, 1]", "[16, 3]"),
        ('"version": 1', '"version": 9'),
        ("float32", "float3"),
    ):
        assert old in text
        file.write_text(text.replace(old, new))
        with pytest.raises(QuantError):
            jq.io.load_orbax(tmp_path / "step")


@pytest.mark.parametrize(
    "qtype, field, message",
    [
        pytest.param("int8", "scale", "scales must be finite; got bad=1", marks=makes_nan),
        ("float8_e4m3fn", "codes", "the codes of a weight must"),
    ],
)
def test_values_are_checked(tmp_path, monkeypatch, qtype, field, message):
    q = quantized(qtype)
    broken = q.replace(**{field: getattr(q, field).at[2, 0].set(jnp.nan)})
    with monkeypatch.context() as unchecked:
        unchecked.setattr("jaxquant.io.manifest.check_values", lambda *args, **given: None)
        jq.io.save_orbax(tmp_path / "step", {"layer": {"w": broken}})
    with pytest.raises(QuantError, match=message) as error:
        jq.io.load_orbax(tmp_path / "step")
    assert "layer/w" in str(error.value)
