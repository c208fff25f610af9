"""`Flow`: which axes of its operands an operation keeps, and where, and which it contracts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

from jax import lax
from jax.extend.core import JaxprEqn, Primitive
from jax.extend.core import primitives as p

from jaxquant.transform.primitives import shape_of, used_by

__all__ = ["Flow", "Place", "flows", "kept"]

Place = tuple[int, int]
"""An operand and one of its axes."""


class Flow(NamedTuple):
    """How an operation moves axes. It works along those of its operands that are not named.

    Attributes:
      out: of each axis of a result, the axes of operands that lie on it.
      contracted: pairs of axes that are multiplied and summed.
    """

    out: list[list[Place]]
    contracted: list[tuple[Place, Place]] = []  # noqa: RUF012  (never changed)


def kept(eqn: JaxprEqn, worked: Iterable[int] = (), operands: int = 1) -> Flow:
    """Every axis keeps its place, except the axes along which the operation computes."""
    worked = set(worked)
    return Flow([[] if i in worked else [(k, i) for k in range(operands)] for i in range(_ndim(eqn))])


def _ndim(eqn: JaxprEqn) -> int:
    return len(shape_of(eqn.invars[0]))


def _transpose(eqn: JaxprEqn) -> Flow:
    return Flow([[(0, i)] for i in eqn.params["permutation"]])


def _reduce(eqn: JaxprEqn) -> Flow:
    return Flow([[(0, i)] for i in range(_ndim(eqn)) if i not in eqn.params["axes"]])


def _slice(eqn: JaxprEqn) -> Flow:
    before, after = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    return kept(eqn, [i for i, (n, m) in enumerate(zip(before, after, strict=True)) if n != m])


def _gather(eqn: JaxprEqn) -> Flow:
    """Whole rows of a table are kept."""
    table, sizes, d = shape_of(eqn.invars[0]), eqn.params["slice_sizes"], eqn.params["dimension_numbers"]
    dropped = {*d.collapsed_slice_dims, *getattr(d, "operand_batching_dims", ())}
    out: list[list[Place]] = [[] for _ in shape_of(eqn.outvars[0])]
    for place, i in zip(d.offset_dims, (i for i in range(len(sizes)) if i not in dropped), strict=True):
        out[place] = [(0, i)] if sizes[i] == table[i] else []
    return Flow(out)


def _dot(eqn: JaxprEqn) -> Flow:
    """A product: it keeps the free axes; entries along batch axes are multiplied, so these are not kept."""
    contract, batch = eqn.params["dimension_numbers"]
    out: list[list[Place]] = [[] for _ in batch[0]]
    for k, v in enumerate(eqn.invars):
        out += [[(k, i)] for i in range(len(shape_of(v))) if i not in contract[k] and i not in batch[k]]
    return Flow(out, [((0, i), (1, j)) for i, j in zip(*contract, strict=True)])


def _window(eqn: JaxprEqn) -> Flow:
    return kept(eqn, [i for i, n in enumerate(eqn.params["window_dimensions"]) if n != 1])


def _conv(eqn: JaxprEqn) -> Flow:
    n = eqn.params["dimension_numbers"]
    out: list[list[Place]] = [[] for _ in n.out_spec]
    if eqn.params["feature_group_count"] != 1 or eqn.params["batch_group_count"] != 1:
        return Flow(out)
    out[n.out_spec[0]], out[n.out_spec[1]] = [(0, n.lhs_spec[0])], [(1, n.rhs_spec[0])]
    return Flow(out, [((0, n.lhs_spec[1]), (1, n.rhs_spec[1]))])


@functools.cache
def flows() -> dict[Primitive | None, Callable[[JaxprEqn], Flow]]:
    """Of the primitives that move axes."""
    split = used_by(lax.split)
    return {
        **dict.fromkeys((p.cumsum_p, p.cummax_p, p.cummin_p, split), lambda eqn: kept(eqn, [eqn.params["axis"]])),
        p.rev_p: lambda eqn: kept(eqn, eqn.params["dimensions"]),
        p.concatenate_p: lambda eqn: kept(eqn, [eqn.params["dimension"]], len(eqn.invars)),
        p.transpose_p: _transpose,
        **dict.fromkeys((p.reduce_sum_p, p.reduce_max_p, p.reduce_min_p), _reduce),
        **dict.fromkeys((p.slice_p, p.dynamic_slice_p, p.pad_p), _slice),
        p.gather_p: _gather,
        p.dot_general_p: _dot,
        **dict.fromkeys((p.reduce_window_max_p, p.reduce_window_sum_p), _window),
        p.conv_general_dilated_p: _conv,
    }
