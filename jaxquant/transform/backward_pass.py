"""Arrays that a function in training hands to its backward pass: inputs of norms and gates, codes of activations.

The backward pass computes again what else derivatives need, as `jax.checkpoint` has it: what lies between the input of
a norm and its result, and the codes of weights. Where both passes are one program, XLA sees the same computation in
both, and may keep the result instead. In a scan over layers they are programs of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
from jax.extend.core import ClosedJaxpr

from jaxquant.ops.tangents import KEPT
from jaxquant.transform.primitives import inlined

__all__ = ["handing_inputs", "handing_kept"]

T = TypeVar("T")


def handing_inputs(closed: ClosedJaxpr) -> Callable[..., list[jax.Array]]:
    """The function that a jaxpr is; the backward pass is handed its inputs alone."""
    return jax.checkpoint(inlined(closed), prevent_cse=False)


def handing_kept(product: Callable[[], T]) -> T:
    """The result of a product; the backward pass is handed what the product keeps, and not the codes of its weight."""
    policy = jax.checkpoint_policies.save_only_these_names(KEPT)
    return jax.checkpoint(product, prevent_cse=False, policy=policy)()
