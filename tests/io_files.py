"""Trees that are equal to the last bit, and safetensors files taken apart and put together."""

import json
from typing import Any

import numpy as np

import jaxquant as jq
from jaxquant.io.patterns import NAMELESS


def assert_same(a, b):
    """Equal containers, static fields, dtypes, shapes and bits."""
    if isinstance(a, jq.QTensor):
        assert isinstance(b, jq.QTensor)
        assert (a.qtype, a.dtype, a.minor, a.length, a.shape) == (b.qtype, b.dtype, b.minor, b.length, b.shape)
        for name in ("codes", "scale", "zero_point", "offset", "permutation"):
            assert_same(getattr(a, name), getattr(b, name))
    elif isinstance(a, dict):
        assert type(b) is dict
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert type(a) is type(b)
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif a is None:
        assert b is None
    else:
        x, y = np.asarray(a), np.asarray(b)
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert bits(x) == bits(y)


def bits(array):
    """The bytes of an array; of a dtype narrower than a byte, the bits that count."""
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    width = NAMELESS.get(array.dtype, 8)
    return (raw & ((1 << width) - 1) if width < 8 else raw).tobytes()


def take_apart(content):
    """Header (a dict) and data of a file."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def put_together(header, data=b""):
    """The file of a header (a dict, or its bytes) and data."""
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + data


def entry(dtype: Any = "F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}
