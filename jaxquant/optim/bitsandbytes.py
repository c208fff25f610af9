"""Reads and writes states of bitsandbytes' 8-bit optimizers, in the form of ``optimizer.state_dict()["state"]``.

For each parameter, by its number, with arrays in the parameter's shape and blocks of 256 in row-major order:

    step              steps done
    state1, state2    uint8 codes of the moments, or float32 for small parameters; AdEMAMix: state1 is [2, ...shape]
    absmax1, absmax2  float32 [blocks], [2, blocks] for AdEMAMix; only with codes
    qmap1, qmap2      float32 [256], the table of the codes; only with codes

Newer versions nest all entries but the step in a separate dict; both forms are read. PyTorch is not needed: a tensor on
the CPU is read as an array.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxquant.core.errors import QuantError, quant_error
from jaxquant.core.paths import Params, leaves_with_paths
from jaxquant.core.qtensor import QTensor, from_codes
from jaxquant.core.qtypes import QTYPES
from jaxquant.core.types import PyTree
from jaxquant.optim.moments import EIGHT_BITS, Parameter, StoredMoment
from jaxquant.optim.scale import State

__all__ = ["from_bitsandbytes", "to_bitsandbytes"]

_NESTED = "__bnb_optimizer_quant_state__"
_TABLES = {name: np.asarray(QTYPES[name].table, np.float32) for name in ("dynamic8", "udynamic8")}
#: The optimizer's moments -> the moments in each of bitsandbytes' states.
_FIELDS = {
    ("m",): (("m",),),
    ("v",): (("v",),),
    ("m", "v"): (("m",), ("v",)),
    ("m1", "m2", "v"): (("m1", "m2"), ("v",)),
}


def _is_state(x: object) -> TypeGuard[State]:
    return isinstance(x, State)


def _found(function: str, state: PyTree) -> State:
    states = [s for s in jax.tree.leaves(state, is_leaf=_is_state) if _is_state(s)]
    if len(states) != 1:
        todo = "Pass what init or update of one optimizer of jaxquant.optim returned"
        raise quant_error(function, "there must be one quantized optimizer in the state", todo=todo, found=len(states))
    return states[0]


def _numbered(function: str, params: Params, names: Sequence[str] | None) -> list[tuple[str, Parameter]]:
    """Parameters in the order of their numbers, with their paths."""
    leaves, _ = leaves_with_paths(params)
    if names is None:
        return list(leaves.items())
    if sorted(names) != sorted(leaves):
        todo = f"Name each parameter once, among {', '.join(map(repr, sorted(leaves)))}"
        raise quant_error(function, "names must be the paths of the parameters", todo=todo, names=tuple(names))
    return [(name, leaves[name]) for name in names]


def _moments(state: State, name: str) -> dict[str, StoredMoment]:
    return leaves_with_paths(state.moments[name])[0]


def to_bitsandbytes(state: PyTree, params: Params, *, names: Sequence[str] | None = None) -> dict[int, dict[str, Any]]:
    """The state of an 8-bit optimizer as bitsandbytes keeps it.

    Args:
      state: of one of the 8-bit optimizers, or a chain with one.
      params: the parameters, or their shapes. Blocks run over them in row-major order, so their axes must be in
        PyTorch's order.
      names: paths of the parameters in PyTorch's order; None: in the tree's own.

    Returns:
      The contents of ``optimizer.state_dict()["state"]``, with NumPy arrays: ``step``, ``state1``, ``absmax1``,
      ``qmap1`` and so on for each number.

    Raises:
      QuantError: if moments are stored in a way that bitsandbytes does not support, or names are not a permutation of
        the paths.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxquant import optim
      >>> params = {"w": jnp.ones((64, 68))}
      >>> state = optim.adam8bit(1e-3).init(params)
      >>> [entry] = optim.to_bitsandbytes(state, params).values()
      >>> sorted(entry)
      ['absmax1', 'absmax2', 'qmap1', 'qmap2', 'state1', 'state2', 'step']
      >>> entry["state1"].shape, entry["absmax1"].shape
      ((64, 68), (17,))

    Source: bitsandbytes 0.50, ``optim/optimizer.py``.
    """
    function = "to_bitsandbytes"
    own = _found(function, state)
    order = _numbered(function, params, names)
    moments = {name: _moments(own, name) for name in own.moments}
    out = {}
    for number, (path, p) in enumerate(order):
        entry: dict[str, Any] = {"step": int(own.count)}
        for i, group in enumerate(_FIELDS[tuple(own.moments)], 1):
            parts = [_parts(function, moments[name][path], p, path) for name in group]
            fields = {key: np.stack([part[key] for part in parts]) for key in parts[0]} if len(parts) > 1 else parts[0]
            if "qmap" in fields:
                fields["qmap"] = fields["qmap"].reshape(-1, 256)[0]
            entry |= {f"{key}{i}": value for key, value in fields.items()}
        out[number] = entry
    return out


def _parts(function: str, m: StoredMoment, p: Parameter, path: str) -> dict[str, np.ndarray]:
    if not isinstance(m, QTensor):
        return {"state": np.asarray(m, np.float32)}
    if m.qtype not in _TABLES or m.scale.size != -(-p.size // EIGHT_BITS.block):
        todo = "Keep moments in 8 bits and blocks of 256"
        raise quant_error(function, "bitsandbytes has no such moments", todo=todo, path=path, moment=m)
    codes = np.asarray(m.codes).reshape(-1)[: p.size].reshape(p.shape)
    return {"state": codes, "absmax": np.asarray(m.scale, np.float32).reshape(-1), "qmap": _TABLES[m.qtype]}


def from_bitsandbytes(
    states: Mapping[Any, Mapping[str, Any]], state: PyTree, params: Params, *, names: Sequence[str] | None = None
) -> PyTree:
    """A state of an 8-bit optimizer from one of bitsandbytes; codes and scales are copied bit by bit.

    Args:
      states: ``optimizer.state_dict()["state"]``, or the result of `to_bitsandbytes`.
      state: the result of the optimizer's ``init``, which says which moments to read. It is not changed.
      params: the parameters, or their shapes, with axes in PyTorch's order.
      names: paths of the parameters in PyTorch's order; None: in the tree's own.

    Returns:
      The new state, with every ``count`` set to the steps done.

    Raises:
      QuantError: naming the parameter, if something is missing, or has another shape, dtype or table; if the
        parameters have not done the same number of steps.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxquant import optim
      >>> params, tx = {"w": jnp.ones((64, 64))}, optim.lion8bit(1e-4)
      >>> states = optim.to_bitsandbytes(tx.init(params), params)
      >>> optim.from_bitsandbytes(states, tx.init(params), params)[0].moments["m"]["w"]
      QTensor(dynamic8[64, 64] -> float32, group 4 x 64 on axes -2, -1, symmetric, 4.1 KiB)

    Source: bitsandbytes 0.50, ``optim/optimizer.py``.
    """
    function = "from_bitsandbytes"
    own = _found(function, state)
    order = _numbered(function, params, names)
    if sorted(map(str, states)) != sorted(map(str, range(len(order)))):
        todo = "Pass optimizer.state_dict()['state'] of an optimizer of these parameters"
        got = tuple(map(str, states))
        raise quant_error(function, f"there must be states 0 to {len(order) - 1}", todo=todo, states=got)
    by_number = {int(number): entry for number, entry in states.items()}
    new: dict[str, dict[str, StoredMoment]] = {name: {} for name in own.moments}
    steps = set()
    for number, (path, p) in enumerate(order):
        entry = dict(by_number[number])
        entry |= entry.pop(_NESTED, {})
        steps.add(int(_field(function, entry, "step", path)))
        for i, group in enumerate(_FIELDS[tuple(own.moments)], 1):
            lead = (len(group),) if len(group) > 1 else ()
            found = _moment(function, entry, i, lead, p, path)
            new |= {name: new[name] | {path: m} for name, m in zip(group, found, strict=True)}
    if len(steps) > 1:
        todo = "Save them after a whole step"
        raise quant_error(function, "parameters differ in their steps", todo=todo, steps=tuple(sorted(steps)))
    treedef, count = jax.tree.structure(params), jnp.asarray(steps.pop() if steps else 0, jnp.int32)
    paths = list(leaves_with_paths(params)[0])
    moments = {name: treedef.unflatten([each[path] for path in paths]) for name, each in new.items()}
    whole = jax.tree.map(lambda s: State(count, moments) if _is_state(s) else s, state, is_leaf=_is_state)
    return optax.tree_utils.tree_set(whole, lambda path, _: not _inside(path), count=count)


def _inside(path: jax.tree_util.KeyPath) -> bool:
    """Whether a key path leads into the moments, where a parameter named "count" is not a count."""
    return any(getattr(key, "name", None) == "moments" for key in path)


def _field(function: str, entry: Mapping[str, Any], name: str, path: str) -> Any:
    if name not in entry:
        todo = "Pass the state of the same kind of optimizer"
        raise quant_error(function, f"{name} is missing", todo=todo, path=path, has=tuple(entry))
    return entry[name]


def _moment(
    function: str, entry: Mapping[str, Any], i: int, lead: tuple[int, ...], p: Parameter, path: str
) -> list[StoredMoment]:
    """The moments in one of bitsandbytes' states."""

    def array(name: str, kind: type[np.generic], shape: tuple[int, ...]) -> np.ndarray:
        x = np.asarray(_field(function, entry, f"{name}{i}", path))
        if x.shape != shape or x.dtype != kind:
            raise _wrong(function, f"{name}{i} must be {np.dtype(kind).name}{list(shape)}", path, **{f"{name}{i}": x})
        return x

    x = np.asarray(_field(function, entry, f"state{i}", path))
    if x.dtype == np.float32:
        return [jnp.asarray(part) for part in array("state", np.float32, (*lead, *p.shape)).reshape(-1, *p.shape)]
    codes = array("state", np.uint8, (*lead, *p.shape)).reshape(-1, p.size)
    absmax = array("absmax", np.float32, (*lead, -(-p.size // EIGHT_BITS.block))).reshape(len(codes), -1)
    table = array("qmap", np.float32, (256,))
    qtype = next((name for name, known in _TABLES.items() if np.array_equal(known, table)), None)
    if qtype is None:
        raise _wrong(function, f"qmap{i} must be one of the two dynamic maps", path)
    if not np.isfinite(absmax).all() or (absmax < 0).any():
        raise _wrong(function, f"absmax{i} must be finite and not negative", path)
    shape, blocks = EIGHT_BITS.form(p.shape)
    zero = int(np.searchsorted(_TABLES[qtype], 0))
    out = []
    for c, scale in zip(codes, absmax, strict=True):
        each = np.repeat(scale, EIGHT_BITS.block)[: c.size]
        c = np.where(each == 0, zero, c).astype(np.uint8)  # a block with scale 0 has values 0, for all codes
        c = np.pad(c, (0, math.prod(shape) - c.size), constant_values=zero).reshape(shape)
        scale = np.where(scale == 0, 1, scale).astype(np.float32).reshape(blocks)
        out.append(from_codes(jnp.asarray(c), jnp.asarray(scale), None, qtype=qtype, dtype=jnp.float32))
    return out


def _wrong(function: str, rule: str, path: str, **got: Any) -> QuantError:
    return quant_error(function, rule, todo="Check which optimizer and parameter it is of", path=path, **got)
