"""VPTQ: vectors of a codebook along the output features. They are read as floats, since no QTensor represents them.

indices            int32 [groups, ceil(out / v), words]   a bit stream along the input features: index_bits of the
                                                          main index, then those of the residual
centroids.weight, res_centroids.weight  [groups, size * v]
perm               [in], optional                          W = W[:, argsort(perm)]
weight_scale, weight_bias [in], optional                   W * scale + bias
"""

from __future__ import annotations

import numpy as np

from jaxquant.io.bits import bytes_of
from jaxquant.io.hf.module import Format, Module, Naming
from jaxquant.io.strict_json import Json

__all__ = ["VPTQ"]


_LONGEST = 256  # most numbers that one index stands for; bounds the memory that a small file can take


def _parameters(m: Module) -> dict[str, Json]:
    table = m.config.get("config_for_layers")
    own = table.get(m.prefix) if isinstance(table, dict) else None
    return own if isinstance(own, dict) else m.config


def _number(m: Module, parameters: dict[str, Json], key: str) -> int:
    value = parameters.get(key)
    if isinstance(value, list):  # [outlier, main]
        value = value[-1] if value else None
    if type(value) is not int:
        raise m.error(f"the configuration does not give {key}", ".indices", todo="Check config_for_layers", found=value)
    return value


def read(m: Module) -> np.ndarray:
    """The weight of one module, in float32 or the dtype of its codebook."""
    p = _parameters(m)
    out, length, vector = (
        _number(m, p, "out_features"),
        _number(m, p, "in_features"),
        _number(m, p, "vector_lens" if "vector_lens" in p else "vector_len"),
    )
    if m.has(".outlier_indices"):
        raise m.error("outlier columns are not read", ".outlier_indices", todo="Use a checkpoint without them")
    indices = m.array(".indices", np.int32, ndim=3)
    main = m.scales(".centroids.weight", ndim=2)
    residual = m.scales(".res_centroids.weight", ndim=2) if m.has(".res_centroids.weight") else None
    groups = indices.shape[0]
    books = [b for b in (main, residual) if b is not None]
    if (
        min(out, length, vector, groups) < 1
        or vector > _LONGEST
        or length % groups
        or any(b.size % (groups * vector) for b in books)
    ):
        got = {"in_features": length, "out_features": out, "vector_len": vector, "groups": groups}
        raise m.error("the codebooks do not fit the configuration", ".indices", todo="Check config_for_layers", **got)
    books = [b.reshape(groups, -1, vector).astype(np.float32) for b in books]
    bits = [max(int(np.ceil(np.log2(b.shape[1]))), 0) for b in books]
    each = length // groups
    rows = -(-out // vector)
    m.check(".indices", indices.shape, (groups, rows, -(-each * sum(bits) // 32)))
    stream = np.unpackbits(bytes_of(indices), axis=-1, bitorder="little")[..., : each * sum(bits)]
    fields = stream.reshape(groups, rows, each, sum(bits))
    weight, at = np.zeros((groups, rows, each, vector), np.float32), 0
    for book, width in zip(books, bits, strict=True):
        index = (fields[..., at : at + width] << np.arange(width, dtype=np.int64)).sum(-1)
        if index.max() >= book.shape[1]:
            raise m.error("an index is beyond the codebook", ".indices", todo="Fetch it again", size=book.shape[1])
        weight += np.stack([book[g][index[g]] for g in range(groups)])
        at += width
    full = weight.transpose(1, 3, 0, 2).reshape(rows * vector, length)[:out]
    perm = m.maybe(".perm", np.int16, np.uint16, np.int32, np.int64, ndim=1)
    if perm is not None:
        perm = perm.view(np.uint16) if perm.dtype == np.int16 else perm
        m.check(".perm", perm.shape, (length,))
        if not np.array_equal(np.sort(perm), np.arange(length)):
            raise m.error("perm must name every column once", ".perm", todo="The checkpoint is damaged: fetch it again")
        full = full[:, np.argsort(perm)]
    for suffix, change in ((".weight_scale", np.multiply), (".weight_bias", np.add)):
        if m.has(suffix):
            value = m.scales(suffix, ndim=1).astype(np.float32)
            m.check(suffix, value.shape, (length,))
            full = change(full, value)
    m.notes.append("dequantized: no QTensor represents vectors of a codebook")
    return full.astype(main.dtype)


VPTQ = Format(
    "VPTQ",
    methods=("vptq",),
    names=(Naming(marks=(".indices", ".centroids.weight")),),
    read=read,
    parts=(".centroids.weight", ".res_centroids.weight"),
    layouts="one codebook with residual, permutation and normalisation; read as floats",
)
