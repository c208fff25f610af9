"""Which layout of codes a platform reads fastest."""

from __future__ import annotations

import functools
from typing import Any, Literal, get_args

import jax
import jax.core
import jax.numpy as jnp

from jaxquant.core.errors import quant_error
from jaxquant.core.layout import Layout
from jaxquant.core.paths import Params
from jaxquant.core.qtensor import LEAVES, QTensor
from jaxquant.core.relayout import is_laid_out, laid_out
from jaxquant.core.types import PyTree

__all__ = ["Platform", "check_target", "lay_out", "layout_for", "platform_of"]

Platform = Literal["cpu", "tpu", "gpu"]
"""Platforms that codes are laid out for."""

_LAYOUTS: dict[str, Layout] = {"cpu": "packed", "tpu": "native", "gpu": "elements"}


def check_target(function: str, target: object) -> None:
    """Raises if a target is not a known platform."""
    if target is not None and target not in get_args(Platform):
        todo = "Use 'cpu', 'tpu' or 'gpu', or leave it out for where the arrays are"
        raise quant_error(function, "target must be a platform that codes are laid out for", todo=todo, target=target)


def platform_of(x: object) -> str:
    """The platform that holds an array, or on which it would be made."""
    if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
        platform = next(iter(x.devices())).platform
    else:
        platform = jax.default_backend()
    return "gpu" if platform in ("cuda", "rocm") else platform


def layout_for(target: Platform | None, x: object) -> Layout:
    """The layout for a target, or for where an array is."""
    return _LAYOUTS.get(target or platform_of(x), "packed")


def lay_out(params: Params, target: Platform | None = None) -> Params:
    """Stores the codes of parameters in the layout that a platform reads fastest; values do not change.

    A CPU reads bytes that are packed along the contracted axis. The compilers of TPUs and GPUs decode only weights with
    one code per element within the product, and write a float weight to memory otherwise. A TPU's compiler converts
    fp8 fast only from its own dtype, not from bytes. `quantize_params` and the checkpoint readers lay codes out for the
    device that they put them on. Call this for parameters that move to another platform, once, before the first step.
    It converts one weight at a time. Under `jax.eval_shape` it plans for a machine that is not there.

    Args:
      params: a tree with QTensors.
      target: ``"cpu"``, ``"tpu"`` or ``"gpu"``; by default the platform of each array.

    Returns:
      The tree.

    Raises:
      QuantError: if the target is unknown.

    Example:
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> w = jq.quantize(jnp.eye(64), jq.QuantSpec("int4", granularity=jq.PerGroup(32)), reduce_axes=(-2,))
      >>> jq.ops.lay_out({"w": w}, "tpu")["w"]
      QTensor(int4[64, 64] -> float32, group 32 on axis -2, symmetric, 2.5 KiB, one code per element)
    """
    check_target("lay_out", target)

    def one(x: PyTree) -> PyTree:
        if not isinstance(x, QTensor) or is_laid_out(x, layout := layout_for(target, x.stored)):
            return x
        like = jax.eval_shape(lambda q: laid_out(q, layout), x)
        rest = _kept(x)
        if isinstance(x.scale, QTensor) and like.scale.layout != x.scale.layout:
            rest["scale"] = like.scale.replace(codes=_codes(x, layout, of_scales=True), **_kept(x.scale))
        seal = None if like.seal is None else jnp.zeros(like.seal.shape, bool)
        return like.replace(codes=_codes(x, layout), seal=seal, **rest)

    return jax.tree.map(one, params, is_leaf=lambda x: isinstance(x, QTensor))


def _kept(q: QTensor) -> dict[str, Any]:
    """The arrays that a layout leaves as they are."""
    return {name: getattr(q, name) for name in LEAVES if name not in ("codes", "seal")}


@functools.partial(jax.jit, static_argnames=("layout", "of_scales"))
def _codes(q: QTensor, layout: Layout, of_scales: bool = False) -> jax.Array:
    """Codes alone, or those of scales: on a CPU, JAX 0.6 corrupts memory if a program returns int4 beside others."""
    q = laid_out(q, layout)
    of = q.scale if of_scales else q
    assert isinstance(of, QTensor)
    return of.stored
