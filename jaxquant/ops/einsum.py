"""`einsum` with quantized operands."""

from __future__ import annotations

import string

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxquant.core.errors import quant_error
from jaxquant.core.qtensor import QTensor
from jaxquant.core.specs import OpSpec
from jaxquant.ops.dot import contract
from jaxquant.ops.operands import Pair, check_spec, refuse_range

__all__ = ["einsum"]


def _parse(subscripts: object, ndims: tuple[int, int]) -> tuple[str, str, str]:
    """Labels of both operands and of the result; an ellipsis becomes letters that are unused."""

    def bad(rule: str):
        todo = "Write for example 'btd,dh->bth', or call jnp.einsum on float arrays"
        return quant_error("einsum", rule, todo=todo, subscripts=subscripts, ndims=ndims)

    if not isinstance(subscripts, str):
        raise bad("quantized einsum takes its subscripts as a string")
    text = subscripts.replace(" ", "")
    inputs, arrow, output = text.partition("->")
    terms = inputs.split(",")
    if len(terms) != 2:
        raise bad("quantized einsum takes two operands")
    unused = [c for c in string.ascii_letters if c not in text]
    labels, longest = [], ""
    for term, ndim in zip(terms, ndims, strict=True):
        left, dots, right = term.partition("...")
        count = ndim - len(left) - len(right)
        if count < 0 or (count and not dots):
            raise bad("subscripts do not fit the ranks")
        fill = "".join(unused[:count][::-1])  # aligned at the right
        longest = max(longest, fill, key=len)
        labels.append(left + fill + right)
    if not arrow:
        once = sorted(c for c in set("".join(terms)) - {"."} if "".join(terms).count(c) == 1)
        output = "..." + "".join(once)
    output = output.replace("...", longest)
    named = "".join(labels)
    if not all(c in string.ascii_letters for c in named + output) or not set(output) <= set(named):
        raise bad("unknown subscript")
    if any(len(set(term)) != len(term) for term in (*labels, output)):
        raise bad("quantized einsum takes no repeated subscripts within a term")
    return labels[0], labels[1], output


def einsum(
    subscripts: str,
    *operands: ArrayLike | QTensor,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    spec: OpSpec | None = None,
    act_scale: ArrayLike | None = None,
    act_zero_point: ArrayLike | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """`jax.numpy.einsum` whose operands may be quantized, or are quantized on the way; see `dot_general`.

    Args:
      subscripts: as for `jax.numpy.einsum`, ellipsis included. With a QTensor or a spec: a string, two operands, no
        repeated subscript within one; every subscript summed over must be in both operands, or in the activation alone,
        which is summed before it is quantized. Axes of size 1 do not broadcast.
      *operands: float arrays or QTensors; the weight is the second, unless only the first is a QTensor.
      precision, preferred_element_type, spec, act_scale, act_zero_point, key: as for `dot_general`.

    Returns:
      Array with the axes of the output subscripts.

    Raises:
      QuantError: on subscripts that do not fit, and as `dot_general`.

    Gradient: as `dot_general`.

    Example:
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant import ops, recipes
      >>> x, w = jnp.ones((2, 5, 8)), jnp.ones((8, 4, 3))
      >>> ops.einsum("btd,dhk->bthk", x, w, spec=recipes.w8a8()).shape
      (2, 5, 4, 3)
    """
    if check_spec("einsum", spec) == OpSpec() and not any(isinstance(x, QTensor) for x in operands):
        refuse_range("einsum", act_scale, act_zero_point)
        return jnp.einsum(subscripts, *operands, precision=precision, preferred_element_type=preferred_element_type)
    if len(operands) != 2:
        todo = "Split it into products of two"
        raise quant_error("einsum", "quantized einsum takes two operands", todo=todo, operands=len(operands))
    pair = Pair.of("einsum", *operands, spec)
    left, right, output = _parse(subscripts, (pair.lhs.ndim, pair.rhs.ndim))
    sides = []
    for i, (x, own, other) in enumerate(((pair.lhs, left, right), (pair.rhs, right, left))):
        alone = tuple(i for i, c in enumerate(own) if c not in other and c not in output)
        if alone:
            if isinstance(x, QTensor) or (i == pair.weight and pair.spec.weight is not None):
                rule = "a quantized operand cannot be summed over an axis of its own"
                todo = "Sum it in float first, and quantize the sum"
                raise quant_error("einsum", rule, todo=todo, subscripts=subscripts)
            x = jnp.sum(x, axis=alone)
        sides.append((x, "".join(c for i, c in enumerate(own) if i not in alone)))
    (lhs, left), (rhs, right) = sides
    sizes = dict(zip(left, lhs.shape, strict=True))
    for c, n in zip(right, rhs.shape, strict=True):
        if sizes.setdefault(c, n) != n:
            todo = "Make them equal; quantized einsum does not broadcast"
            raise quant_error("einsum", f"subscript {c!r} has two sizes", todo=todo, sizes=(sizes[c], n))
    shared = [c for c in left if c in right]
    batch, summed = [c for c in shared if c in output], [c for c in shared if c not in output]
    contract_axes, batch_axes = (
        (tuple(map(left.index, part)), tuple(map(right.index, part))) for part in (summed, batch)
    )
    given = (precision, preferred_element_type, spec, act_scale, act_zero_point)
    out = contract("einsum", lhs, rhs, (contract_axes, batch_axes), *given, key=key)
    got = batch + [c for c in left if c not in shared] + [c for c in right if c not in shared]
    return jnp.transpose(out, [got.index(c) for c in output])
