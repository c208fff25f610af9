"""AQLM: sums of codebook vectors. They are read as floats, since no QTensor represents them.

codes      [out / og, in / ig, books]   signed, to be taken modulo the size of a book
codebooks  [books, size, og, ig]
scales     [out / og, 1, 1, 1]          W = scale * sum over books of codebook[code]
"""

from __future__ import annotations

import numpy as np

from jaxquant.io.hf.module import Format, Module, Naming

__all__ = ["AQLM"]


_LONGEST = 256  # most numbers that one code stands for; bounds the memory that a small file can take


def read(m: Module) -> np.ndarray:
    """The weight of one module, in the dtype of its codebooks."""
    codes = m.array(".codes", np.int8, np.int16, np.int32, np.uint8, ndim=3)
    books, scales = m.scales(".codebooks", ndim=4), m.scales(".scales", ndim=4)
    if codes.shape[2] != books.shape[0]:
        raise m.error("codes and codebooks do not fit", ".codes", todo="Check the format", books=books.shape)
    if books.shape[2] * books.shape[3] > _LONGEST:
        rule, todo = f"a codebook vector has at most {_LONGEST} numbers", "Check the format"
        raise m.error(rule, ".codebooks", todo=todo, codebooks=books.shape)
    m.check(".scales", scales.shape, (codes.shape[0], 1, 1, 1))
    if int(codes.max()) >= books.shape[1] or int(codes.min()) < -books.shape[1]:
        got = {"least": int(codes.min()), "greatest": int(codes.max()), "size": books.shape[1]}
        raise m.error("a code is beyond its codebook", ".codes", todo="Fetch it again", **got)
    index = codes.astype(np.int64) % books.shape[1]
    total = np.zeros((*codes.shape[:2], *books.shape[2:]), np.float32)
    for i, book in enumerate(books.astype(np.float32)):
        total += book[index[..., i]]
    total *= scales.astype(np.float32)
    rows, columns = codes.shape[0] * books.shape[2], codes.shape[1] * books.shape[3]
    m.notes.append("dequantized: no QTensor represents sums of codebook vectors")
    return total.transpose(0, 2, 1, 3).reshape(rows, columns).astype(books.dtype)


AQLM = Format(
    "AQLM",
    methods=("aqlm",),
    names=(Naming(marks=(".codes", ".codebooks")),),
    read=read,
    layouts="any books and groups; read as floats",
)
