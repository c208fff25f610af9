"""Tensors that describe activations: static scales and zero points of inputs, of outputs, and of the cache.

They stay beside the weight, under their own names and in their own dtype. The names that writers have used:

    input_scale, input_zero_point, input_global_scale,          of a layer's inputs and outputs; also with "output"
      input_activation_scale, input_scale_ub, activation_scale    and "act", and after the name of fused experts
    k_scale, v_scale, q_scale, kv_scale, prob_scale             of the cache, queries and probabilities: beside the
                                                                  attention, in its "attn", or beside the projection
                                                                  (ModelOpt)
    k_proj.output_scale, v_proj.output_scale                    of the cache, as outputs (AutoFP8, compressed-tensors,
                                                                  Quark)
    k_cache_scale, k_cache.scale, kv_cache_scaling_factor       of the cache; prob_output_scale (Quark)
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np

from jaxquant.io.hf.checkpoint import HFCheckpoint

__all__ = ["NAMES", "check", "describes_activations"]

#: Endings of the names of such tensors, after a dot or the name of fused experts.
NAMES = (
    r"(?:(?:^|[._])(?:input|output|act|activation)(?:_activation)?(?:_global)?_"
    r"|(?:^|\.)(?:q|k|v|kv|p|prob|q_output|k_output|v_output|prob_output|k_cache|v_cache|kv_cache)_"
    r"|\.(?:q|k_cache|v_cache|kv_cache)\.)"
    r"(?:scale|scale_inv|scale_ub|zero_point|zp|scaling_factor)"
)
_NAMES = re.compile(rf"{NAMES}$")


def describes_activations(name: str) -> bool:
    """Whether a tensor of a quantized checkpoint describes activations, by its name."""
    return _NAMES.search(name) is not None


def check(checkpoint: HFCheckpoint, names: Iterable[str], *, zero: bool) -> None:
    """Raises unless all values are finite, and scales positive.

    Args:
      checkpoint: the checkpoint of the tensors.
      names: names of the tensors that describe activations.
      zero: whether a scale of 0 is allowed, for an activation that is not quantized.
    """
    bad = [name for name in names if not _sound(name, checkpoint.array(name), zero=zero)]
    if bad:
        rule = f"values that describe activations must be finite, and scales {'not negative' if zero else 'positive'}"
        todo = "Calibrate the model again, or remove these tensors"
        found = checkpoint.array(bad[0]).reshape(-1)[:8].astype(np.float32)
        raise checkpoint.error(rule, bad[0], todo=todo, found=found.tolist(), tensors=tuple(bad[:20]), bad=len(bad))


def _sound(name: str, array: np.ndarray, *, zero: bool) -> bool:
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return True
    values = array.astype(np.float32)
    if not np.isfinite(values).all():
        return False
    return name.endswith(("zero_point", "zp")) or bool((values >= 0).all() if zero else (values > 0).all())
