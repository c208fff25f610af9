"""GPTQ: weights that are not rounded yet compensate the rounding error of each rounded weight."""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.core.affine import roundtrip
from jaxquant.core.arithmetic import nan_where
from jaxquant.core.errors import quant_error
from jaxquant.core.qtensor import QTensor
from jaxquant.core.specs import QuantSpec
from jaxquant.ptq.clipped import diagonal_blocks, least_ranges
from jaxquant.ptq.gram import WeightStats, gram_of, lower_factor, normal
from jaxquant.ptq.layer import Layer, Steps

__all__ = ["Order", "gptq"]

Order = Literal["given", "group_aware", "descending"]
Clip = Literal["spec", "gram"]


class _Options(NamedTuple):
    damping: float
    block_size: int
    order: Order
    static_groups: bool
    clip: Clip


def gptq(
    w: jax.Array,
    spec: QuantSpec,
    *,
    reduce_axes: tuple[int, ...],
    stats: WeightStats | None = None,
    damping: float = 0.01,
    block_size: int = 128,
    order: Order = "group_aware",
    static_groups: bool = False,
    clip: Clip = "spec",
) -> QTensor:
    """Rounds the contracted elements one by one; the elements still to come compensate the errors of earlier ones.

    With H the Gram matrix of the inputs and L the lower triangular matrix with ``L^T L = H + damping I``, for each
    contracted element i in turn, of all outputs at once:

        q_i = nearest(w_i + sum_{j < i} L_ij e_j / L_ii)        e_i = w_i - q_i

    which minimises ``tr(E^T H E)``, the squared length of ``L E``, over the elements not yet rounded. A single
    `lax.scan` runs over blocks of ``block_size`` elements, so that compile time does not depend on the size. The errors
    of finished blocks are propagated by square matrix products in a recursive halving, so that each element below the
    diagonal of L is used once.

    A group's scale is computed when its first element is due, from its weights with earlier errors compensated.

    Args:
      w: float weight of any rank.
      spec: number type, granularity, range: any integer, float or table type, symmetric or not. Per tensor, and for
        nvfp4, whose groups share a factor, scales are those of the original weight.
      reduce_axes: the contracted axes.
      stats: of this weight, from `calibrate` with ``{"gram": Gram()}``.
      damping: added to the diagonal of H, in units of its mean. If H cannot be factored, the damping is multiplied by
      10
        and the factorization repeated.
      block_size: elements between two updates of the remaining elements; adjusted to the group size. It affects the
        result only through the weights from which a group's scale is computed.
      order: ``"given"``; ``"group_aware"``: groups, and elements inside each, by decreasing diagonal of H;
        ``"descending"``: all elements by decreasing diagonal. This scatters groups, unless they are static: the result
        then has a ``permutation``, which costs a lookup at run time.
      static_groups: take all scales from the original weight.
      clip: ``"spec"``: the range that the spec's calibration gives; ``"gram"``: the range of least output error, as in
        `clipped`.

    Returns:
      `QTensor` of w's shape, in the layout of `quantize`.

    Raises:
      QuantError: as `quantize`; if the Gram matrix is missing, of another size, NaN or infinite; on an unknown option.

    Example:
      >>> import jax, jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant.ptq.gptq import gptq
      >>> from jaxquant.ptq.rtn import rtn
      >>> x = jax.random.normal(jax.random.key(0), (64, 16)) @ jax.random.normal(jax.random.key(1), (16, 16))
      >>> w, spec = jax.random.normal(jax.random.key(2), (16, 8)), jq.QuantSpec("int3")
      >>> stats = {"gram": {"gram": (x.T @ x)[None], "rows": jnp.float32(64)}}
      >>> error = lambda q: float(jnp.sum((x @ (w - q.dequantize())) ** 2))
      >>> q = gptq(w, spec, reduce_axes=(-2,), stats=stats)
      >>> error(q) < 0.5 * error(rtn(w, spec, reduce_axes=(-2,)))
      True

    Source: Frantar et al. 2023 (arXiv:2210.17323), algorithm 1, and AutoGPTQ, whose codes this reproduces. Differences:
    one Cholesky factorization and no inverse (Chee et al. 2023, QuIP, arXiv:2307.13304, prove both forms equal);
    weights of dead inputs are rounded to nearest, not set to 0; the range is the spec's (AutoGPTQ's ``sym=True`` is
    ``QuantSpec("uint4", symmetric=False, calibration=observers.AbsMax())``). The group-aware order is that of
    GPTQModel.
    """
    _check(damping, block_size, order, clip)
    layer, w = Layer.of("gptq", w, spec, reduce_axes)
    layer, gram = gram_of("gptq", stats, layer)
    scattered = order == "descending" and not static_groups and layer.group < layer.length
    if scattered and (len(layer.axes) > 1 or not layer.is_leading()):
        raise quant_error(
            "gptq",
            "a descending order scatters the groups over several axes or kernels",
            todo="Use static_groups=True, or order='group_aware', which keeps them together",
            order=order,
            reduce_axes=layer.axes,
        )
    return _gptq(w, gram, layer=layer, options=_Options(float(damping), block_size, order, static_groups, clip))


def _check(damping: float, block_size: int, order: str, clip: str) -> None:
    if order not in ("given", "group_aware", "descending"):
        raise quant_error("gptq", "unknown order", todo="Use 'given', 'group_aware' or 'descending'", order=order)
    if clip not in ("spec", "gram"):
        raise quant_error("gptq", "unknown clip", todo="Use 'spec' or 'gram'", clip=clip)
    if not damping > 0:
        raise quant_error("gptq", "damping must be positive", todo="Use for example 0.01", damping=damping)
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
        raise quant_error("gptq", "block_size must be a positive integer", todo="Use 128", block_size=block_size)


@functools.partial(jax.jit, static_argnames=("layer", "options"))
def _gptq(w: jax.Array, gram: jax.Array, *, layer: Layer, options: _Options) -> QTensor:
    spec, x = layer.spec, layer.split(w.astype(jnp.float32))
    static = options.static_groups or layer.shared
    given = layer.nearest(w) if static and (options.clip == "spec" or layer.shared) else None

    def one(x: jax.Array, gram: jax.Array, steps: Steps | None) -> tuple[jax.Array, Steps, jax.Array | None]:
        h, _ = normal(gram, layer)
        if static and steps is None:
            steps = find_steps(x.reshape(-1, layer.group, x.shape[-1]), diagonal_blocks(h, layer.group), spec)
        return solve(x, h, steps, layer, options)

    with jax.default_matmul_precision("highest"):
        known = None if given is None else layer.values(given)[1]
        values, steps, permutation = layer.map(one, x, gram, known)
    return layer.qtensor(values, steps, w.dtype, None if given is None else given.scale, permutation)


def find_steps(x: jax.Array, h: jax.Array | None, spec: QuantSpec) -> Steps:
    """Steps [groups, rows] for weights [groups, group, rows]: the spec's, or those of least error weighted by ``h``."""
    if h is None:
        lo, hi = spec.observer.range(x, (1,), symmetric=spec.symmetric, roundtrip=roundtrip(spec))
    else:
        lo, hi = least_ranges(x, h, spec)
    return Steps.of_range(lo[:, 0], hi[:, 0], spec)


def _visit(diagonal: jax.Array, order: Order, group: int) -> tuple[jax.Array, jax.Array]:
    """``(elements, groups)`` in the order of visits."""
    length = diagonal.shape[0]
    groups = jnp.arange(length // group)
    if order == "given":
        return jnp.arange(length), groups
    if order == "descending":
        return jnp.argsort(-diagonal, stable=True), groups
    by_group = diagonal.reshape(-1, group)
    groups = jnp.argsort(-jnp.max(by_group, axis=1), stable=True)
    inside = jnp.argsort(-by_group, axis=1, stable=True)
    return (groups[:, None] * group + inside[groups]).reshape(-1), groups


def blocking(length: int, group: int, block_size: int) -> tuple[int, int]:
    """``(block, padded length)``: blocks that are whole groups, or parts of one."""
    if group <= block_size:
        block = group * (block_size // group)
    elif group == length:
        block = block_size
    else:
        block = max(d for d in range(1, block_size + 1) if group % d == 0)
        block = block if 2 * block > min(block_size, 32) else group  # whole groups if their size is a large prime
    block = min(block, length)
    return block, -(-length // block) * block


def solve(
    x: jax.Array, h: jax.Array, steps: Steps | None, layer: Layer, options: _Options
) -> tuple[jax.Array, Steps, jax.Array | None]:
    """``(values [contracted, rows], steps [groups, rows], permutation)``; the given steps, or steps computed per group.

    The permutation is None, and values are in the weight's order, unless groups are scattered.
    """
    spec, length, group, rows = layer.spec, layer.length, layer.group, x.shape[-1]
    visit, groups = _visit(jnp.diagonal(h), options.order, group)
    weights, h = x[visit], h[visit][:, visit]
    block, padded = blocking(length, group, options.block_size)
    spare = (0, padded - length)
    local = diagonal_blocks(h, group) if options.clip == "gram" else None
    table = jnp.arange(length) // group
    found = steps
    if steps is not None:
        table = visit // group
    elif group == length:
        found = find_steps(weights[None], local, spec)
    unit = padded if found is not None else max(group, block)  # elements whose steps are computed together
    table = jnp.pad(table if found is not None else table % (unit // group), spare)
    factor = _padded(lower_factor(h, options.damping), padded)
    weights = jnp.pad(weights, (spare, (0, 0)))
    if local is not None:
        local = jnp.pad(local, ((0, -(-padded // group) - local.shape[0]), (0, 0), (0, 0)))

    def steps_of(state: jax.Array, start: jax.Array) -> Steps:
        """The steps of the groups that begin here, from their weights with all earlier errors compensated."""
        own, known = (lax.dynamic_slice_in_dim(a, start, unit) for a in (weights, state))
        square = lax.dynamic_slice(factor, (start, start), (unit, unit))
        own = own + lax.linalg.triangular_solve(square.T, known.T).T  # transposed, to match the layout in memory
        count = unit // group
        weigh = None if local is None else lax.dynamic_slice_in_dim(local, start // group, count)
        return find_steps(own.reshape(count, group, rows), weigh, spec)

    def in_block(
        carry: tuple[jax.Array, Steps], start: jax.Array
    ) -> tuple[tuple[jax.Array, Steps], tuple[jax.Array, Steps | None]]:
        state, now = carry
        if found is None and unit == block:
            now = steps_of(state, start)
        elif found is None:
            now = lax.cond(start % unit == 0, lambda: steps_of(state, start), lambda: now)
        own, known, which = (lax.dynamic_slice_in_dim(a, start, block) for a in (weights, state, table))
        square = lax.dynamic_slice(factor, (start, start), (block, block))
        errors, values = _rounded(own, known, square, which, now, spec)
        state = lax.dynamic_update_slice_in_dim(state, errors, start, 0)
        return (push(state, factor, start // block + 1, block), now), (values, now if found is None else None)

    blank = jnp.ones((unit // group, rows), weights.dtype)
    first = Steps(blank, blank) if found is None else found
    _, (values, own_steps) = lax.scan(in_block, (jnp.zeros_like(weights), first), jnp.arange(0, padded, block))
    values, scattered = values.reshape(padded, rows)[:length], found is None and options.order == "descending"
    if not scattered:
        values = _placed(values, visit)
    if found is None:
        own_steps = jax.tree.map(lambda s: s[:: unit // block].reshape(-1, rows)[: length // group], own_steps)
        found = jax.tree.map(lambda s: _placed(s, groups), own_steps)
    # NaN in H makes every code meaningless, so it is put into the scales, where the caller of a jitted call sees it.
    broken = jnp.isnan(factor[0, 0])
    found = Steps(nan_where(broken, found.scale), found.zero)
    return values, found, visit if scattered else None


def _rounded(
    own: jax.Array, known: jax.Array, square: jax.Array, which: jax.Array, steps: Steps, spec: QuantSpec
) -> tuple[jax.Array, jax.Array]:
    """``(errors, values)`` of a block, element by element, each with the errors before it compensated."""

    def element(errors: jax.Array, each: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        i, row, g = each
        step = steps[g]
        value = step.round(own[i] + (known[i] + row @ errors) / row[i], spec)
        return errors.at[i].set(own[i] - step.real(value)), value

    return lax.scan(element, jnp.zeros_like(own), (jnp.arange(own.shape[0]), square, which))


def _padded(factor: jax.Array, length: int) -> jax.Array:
    """A triangular factor with the identity beyond its end."""
    own = factor.shape[0]
    if own == length:
        return factor
    spare = (0, length - own)
    return jnp.pad(factor, (spare, spare)) + jnp.diag((jnp.arange(length) >= own).astype(factor.dtype))


def _placed(rows: jax.Array, order: jax.Array) -> jax.Array:
    """Rows that were visited in ``order``, each in its own place."""
    return jnp.zeros_like(rows).at[order].set(rows)


def push(state: jax.Array, factor: jax.Array, done: jax.Array, block: int) -> jax.Array:
    """Propagates the errors of the first ``done`` blocks to later blocks, as far as is due: ``L e``.

    Rows of finished blocks hold their errors, later rows the sum of propagated errors. The recursion halves: if 2^k is
    the largest power of two that divides ``done``, the last 2^k blocks are propagated to the next 2^k in one square
    product. Each block has all earlier errors before its turn, and each element below the diagonal is multiplied once.
    """
    rows, power = state.shape[0], lax.population_count((done & -done) - 1)
    for level in range((rows // block - 1).bit_length()):
        size = block << level

        def move(i: jax.Array, state: jax.Array, size: int = size) -> jax.Array:
            end = (done + i) * block  # i is 0, but not to the compiler, which would slice ahead of the loop
            start = jnp.minimum(end, rows - size)  # fewer rows may be left: the others are masked
            part = lax.dynamic_slice(factor, (start, end - size), (size, size))
            part = jnp.where(start + jnp.arange(size)[:, None] >= end, part, 0)
            new = lax.dynamic_slice_in_dim(state, start, size)
            new = new + part @ lax.dynamic_slice_in_dim(state, end - size, size)
            return lax.dynamic_update_slice_in_dim(state, new, start, 0)

        # A loop of at most one round: unlike a branch, it updates the state in place.
        state = lax.fori_loop(0, jnp.int32(power == level), move, state)
    return state
