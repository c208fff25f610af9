"""Training next to quantized parameters: tells trainable leaves from frozen ones.

A model in quantization-aware training has float parameters only, and any Optax transformation trains it. The codes of
`QTensor`s are integers (or fp8 numbers) and cannot be trained, but an optimizer makes moments for them without an
error. The functions here say which leaves train, refuse the others, or keep them fixed. They take any Optax
transformation and do not import Optax.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxquant.core.errors import quant_error
from jaxquant.core.paths import Params, is_qtensor, path_of
from jaxquant.core.qtensor import QTensor
from jaxquant.core.types import PyTree

__all__ = ["check_trainable", "freeze_quantized", "merge", "refuse_quantized", "split", "trainable"]


class Transformation(Protocol):
    """An `optax.GradientTransformation`, or an `optax.MultiSteps`."""

    @property
    def init(self) -> Callable[..., PyTree]:
        """The state for parameters."""
        ...

    @property
    def update(self) -> Callable[..., tuple[PyTree, PyTree]]:
        """The updates for gradients, and the new state."""
        ...


def _frozen(x: QTensor | jax.typing.ArrayLike) -> bool:
    """Whether gradients cannot train a leaf; a QTensor counts as one leaf."""
    return is_qtensor(x) or not jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def _nothing(x: jax.Array) -> jax.Array:
    """An array that changes nothing when added: zeros, or the least number of a type without a zero."""
    if x.dtype == jnp.float8_e8m0fnu:
        return jax.lax.bitcast_convert_type(jnp.zeros(x.shape, jnp.uint8), x.dtype)
    return jnp.zeros_like(x)


def trainable(params: Params) -> PyTree:
    """A mask for `optax.masked` and similar functions: True for float leaves, False for the rest.

    Args:
      params: pytree of arrays and QTensors.

    Returns:
      A pytree of bools in the structure of ``params``; every leaf of a QTensor, its scales included, is False.

    Example:
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant import qat
      >>> kernel = jq.quantize(jnp.ones((4, 2)), jq.QuantSpec("int8"), reduce_axes=(-2,))
      >>> qat.trainable({"bias": jnp.zeros(2), "kernel": kernel})
      {'bias': True, 'kernel': QTensor(int8, codes=False, scale=False, zero_point=None)}
    """
    return jax.tree.map(
        lambda x: jax.tree.map(lambda _: False, x) if is_qtensor(x) else not _frozen(x), params, is_leaf=is_qtensor
    )


def split(params: Params) -> tuple[PyTree, PyTree]:
    """Splits parameters into trained and frozen leaves, each in the structure of ``params`` with None for the others.

    The trained leaves are float arrays: take gradients with respect to them and give them to any optimizer.

    Args:
      params: pytree of arrays and QTensors.

    Returns:
      ``(trained, frozen)``; `merge` is the inverse.

    Example:
      >>> import jax, jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant import qat
      >>> kernel = jq.quantize(jnp.ones((4, 2)), jq.QuantSpec("int8"), reduce_axes=(-2,))
      >>> trained, frozen = qat.split({"bias": jnp.zeros((1, 2)), "kernel": kernel})
      >>> loss = lambda p: jnp.sum(p["kernel"].dequantize() + p["bias"])
      >>> jax.grad(lambda trained: loss(qat.merge(trained, frozen)))(trained)
      {'bias': Array([[4., 4.]], dtype=float32), 'kernel': None}
    """

    def part(frozen: bool) -> PyTree:
        return jax.tree.map(lambda x: x if _frozen(x) == frozen else None, params, is_leaf=is_qtensor)

    return part(False), part(True)


def merge(trained: PyTree, frozen: PyTree) -> PyTree:
    """Merges the two trees of `split` into parameters.

    Args:
      trained: trained leaves, with None for the others.
      frozen: frozen leaves, with None for the others.

    Returns:
      A pytree in the structure of both.

    Raises:
      QuantError: if a leaf is in both.
    """

    def whole(keys: jax.tree_util.KeyPath, t: PyTree, f: PyTree) -> PyTree:
        if t is not None and f is not None:
            todo = "Pass what split returned, or new values in the same structure"
            path = path_of(keys)
            raise quant_error("merge", "a leaf both trains and is frozen", todo=todo, path=path, trained=t, frozen=f)
        return f if t is None else t

    return jax.tree_util.tree_map_with_path(whole, trained, frozen, is_leaf=lambda x: x is None or is_qtensor(x))


def check_trainable(params: Params) -> None:
    """Raises if an optimizer could not train every leaf.

    Args:
      params: pytree of arrays and QTensors.

    Raises:
      QuantError: names the first QTensor or integer leaf. Leaves that a mask took out (`optax.masked`) do not count.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxquant import qat
      >>> qat.check_trainable({"kernel": jnp.ones((4, 2))})
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_qtensor):
        if jax.tree.leaves(leaf) and _frozen(leaf):
            raise quant_error(
                "check_trainable",
                "quantized and integer leaves cannot be trained",
                todo="Train the float parameters and quantize them afterwards, or keep these fixed with "
                "qat.freeze_quantized(tx) or qat.split(params)",
                path=path_of(path),
                got=leaf,
            )


def _transformation(function: str, tx: Transformation) -> Any:
    """The named tuple of functions that a transformation is; `optax.MultiSteps` makes it of itself."""
    made = getattr(tx, "gradient_transformation", None)
    found: Any = made() if callable(made) else tx
    if not all(callable(getattr(found, name, None)) for name in ("init", "update", "_replace")):
        todo = "Give it one of Optax, such as optax.adam(1e-3)"
        raise quant_error(function, "it takes an Optax transformation", todo=todo, tx=found)
    return found


def refuse_quantized(tx: Transformation) -> Any:
    """An optimizer that raises on parameters that it cannot train, and on gradients of integers.

    Args:
      tx: an Optax transformation, or an `optax.MultiSteps`.

    Returns:
      An Optax transformation whose ``init`` calls `check_trainable` first, and whose ``update`` refuses the float0
      zeros that ``jax.grad(..., allow_int=True)`` returns for integers. Its state is that of ``tx``.

    Raises:
      QuantError: from ``init`` and ``update``, and for anything but a transformation.

    Example:
      >>> import jax.numpy as jnp, jaxquant as jq, optax
      >>> from jaxquant import qat
      >>> tx = qat.refuse_quantized(optax.adam(1e-3))
      >>> try:
      ...     tx.init({"kernel": jq.quantize(jnp.ones((4, 2)), jq.QuantSpec("int8"), reduce_axes=(-2,))})
      ... except jq.QuantError as error:
      ...     print(str(error).split(";")[0])
      check_trainable at kernel: quantized and integer leaves cannot be trained
    """

    inner = _transformation("refuse_quantized", tx)

    def init(params: Params) -> PyTree:
        check_trainable(params)
        return inner.init(params)

    def update(updates: PyTree, *args: PyTree, **extra: PyTree) -> PyTree:
        for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
            if getattr(leaf, "dtype", None) == jax.dtypes.float0:
                raise quant_error(
                    "refuse_quantized",
                    "integers have no gradients",
                    todo="Take gradients of the float parameters alone (qat.split), or use qat.freeze_quantized(tx)",
                    path=path_of(path),
                    got=leaf,
                )
        return inner.update(updates, *args, **extra)

    return inner._replace(init=init, update=update)


def freeze_quantized(tx: Transformation) -> Any:
    """Applies an optimizer to the float leaves; QTensors and integer leaves stay unchanged.

    Frozen leaves have no state. Their gradients are ignored and may have any form, such as the float0 zeros of
    ``jax.grad(..., allow_int=True)``. Their updates are zeros, so `optax.apply_updates` leaves them unchanged.

    Args:
      tx: an Optax transformation, or an `optax.MultiSteps`.

    Returns:
      An Optax transformation; it equals ``tx`` if all parameters are float.

    Raises:
      QuantError: from ``update``, if the parameters are not passed, and for anything but a transformation.

    Example:
      >>> import jax, jax.numpy as jnp, jaxquant as jq, optax
      >>> from jaxquant import qat
      >>> kernel = jq.quantize(jnp.ones((4, 2)), jq.QuantSpec("int8"), reduce_axes=(-2,))
      >>> params = {"bias": jnp.zeros(2), "kernel": kernel}
      >>> tx = qat.freeze_quantized(optax.sgd(0.5))
      >>> grads = jax.grad(lambda p: jnp.sum(p["kernel"].dequantize() + p["bias"][None]), allow_int=True)(params)
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> optax.apply_updates(params, updates)
      {'bias': Array([-2., -2.], dtype=float32), 'kernel': QTensor(int8[4, 2] -> float32, per channel on axis -1, ...)}
    """

    inner = _transformation("freeze_quantized", tx)

    def train_only(params: Params, tree: PyTree) -> PyTree:
        return jax.tree.map(lambda p, x: None if _frozen(p) else x, params, tree, is_leaf=is_qtensor)

    def init(params: Params) -> PyTree:
        return inner.init(train_only(params, params))

    def update(updates: PyTree, state: PyTree, params: Params = None, **extra: PyTree) -> tuple[PyTree, PyTree]:
        if params is None:
            todo = "Call tx.update(grads, state, params)"
            raise quant_error("freeze_quantized", "update needs the parameters", todo=todo, params=None)
        updates, state = inner.update(train_only(params, updates), state, train_only(params, params), **extra)

        def fill(p: QTensor | jax.Array, u: PyTree) -> PyTree:
            return jax.tree.map(_nothing, p) if _frozen(p) else u

        return jax.tree.map(fill, params, updates, is_leaf=is_qtensor), state

    return inner._replace(init=init, update=update)
