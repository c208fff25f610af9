"""QTensors in `flax.serialization`: state dicts and msgpack bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
from flax import serialization

from jaxquant.core.errors import quant_error
from jaxquant.core.qtensor import LEAVES, QTensor

__all__: list[str] = []


def _to_state_dict(q: QTensor) -> dict[str, Any]:
    """The leaves of a QTensor by name, for `flax.serialization`; the rest comes from the target that is restored."""
    children, _ = q.checked().tree_flatten()
    leaves = {
        name: serialization.to_state_dict(leaf) for name, leaf in zip(LEAVES, children, strict=True) if leaf is not None
    }
    return leaves | {"kind": _kind(q)}


def _kind(q: QTensor) -> str:
    """The facts that give the leaves their meaning: type, dtype, layout and shape."""
    _, (qtype, dtype, *how) = q.tree_flatten()
    return repr((qtype, np.dtype(dtype).name, *how, tuple(q.shape)))


def _from_state_dict(target: QTensor, state: dict[str, Any]) -> QTensor:
    """A QTensor of the target's kind with the leaves that were saved."""
    children, aux = target.tree_flatten()
    wanted = {name: leaf for name, leaf in zip(LEAVES, children, strict=True) if leaf is not None}
    if not isinstance(state, dict) or set(state) != {*wanted, "kind"} or state["kind"] != _kind(target):
        todo = "Restore into params that are quantized by the plan of the saved params"
        saved = state.get("kind", tuple(sorted(state))) if isinstance(state, dict) else "an array"
        got = {"saved": saved, "target": repr(target)}
        raise quant_error("QTensor", "the target is quantized in another way than the saved params", todo=todo, **got)
    leaves = {name: serialization.from_state_dict(leaf, state[name]) for name, leaf in wanted.items()}
    return QTensor.tree_unflatten(aux, tuple(map(leaves.get, LEAVES))).checked()


serialization.register_serialization_state(QTensor, _to_state_dict, _from_state_dict)
