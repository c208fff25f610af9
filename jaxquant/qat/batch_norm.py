"""Batch norms of convolutional nets, folded into the weights before them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxquant.core.errors import quant_error
from jaxquant.core.paths import leaves_with_paths, nearest
from jaxquant.core.types import PyTree

__all__ = ["fold_batch_norms"]


def fold_batch_norms(variables: PyTree, pairs: Mapping[str, str], *, epsilon: float = 1e-5) -> PyTree:
    """Moves the scales of frozen batch norms into the kernels before them, so that each norm only adds a bias.

        norm(x k + b) = x (k s) + (b - mean) s + bias          s = scale / sqrt(variance + epsilon)

    So training quantizes the kernel of inference, with one step per output channel that includes the norm. The tree
    keeps its structure and the model its code: the norm gets mean 0, variance 1 and the scale with which it only adds
    its bias. From then on run it with ``use_running_average=True``, since its statistics are frozen.

    Args:
      variables: of a Flax model, ``{"params": .., "batch_stats": ..}``; float.
      pairs: path of a layer with a kernel -> path of the norm after it, such as ``{"Conv_0": "BatchNorm_0"}``. Output
        features are the kernel's last axis.
      epsilon: of the norms (the default is Flax's).

    Returns:
      New variables, with which the model's outputs are unchanged up to rounding.

    Raises:
      QuantError: if a path names no such layer, numbers of features differ, or a norm has no parameters.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn
      >>> from jaxquant import qat
      >>> model = nn.Sequential([nn.Conv(4, (3, 3)), nn.BatchNorm(use_running_average=True)])
      >>> x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
      >>> variables = model.init(jax.random.key(1), x)
      >>> folded = qat.fold_batch_norms(variables, {"layers_0": "layers_1"})
      >>> bool(jnp.allclose(model.apply(folded, x), model.apply(variables, x), atol=1e-5))
      True

    Source: Jacob et al. 2018 (arXiv:1712.05877), section 3.2, equation 14, with statistics that are frozen.
    """
    function = "fold_batch_norms"
    leaves, treedef = leaves_with_paths(variables)
    new = dict(leaves)

    def leaf(path: str, layer: str) -> jax.Array:
        if path not in leaves:
            todo = f"Nearest: {nearest(path, leaves)}"
            raise quant_error(function, f"there is no {path}", todo=todo, path=layer)
        return jnp.asarray(leaves[path])

    for layer, norm in pairs.items():
        kernel = leaf(f"params/{layer}/kernel", layer)
        scale, bias = (leaf(f"params/{norm}/{name}", norm) for name in ("scale", "bias"))
        mean, var = (leaf(f"batch_stats/{norm}/{name}", norm) for name in ("mean", "var"))
        if scale.shape != kernel.shape[-1:]:
            todo = "Pair each layer with the norm that follows it"
            got = {"kernel": kernel.shape, "scale": scale.shape}
            raise quant_error(function, "the norm has other features than the kernel", todo=todo, path=layer, **got)
        by = scale / jnp.sqrt(var + epsilon)
        shift, before = -mean, f"params/{layer}/bias"
        if before in leaves:
            shift = shift + leaves[before]
            new[before] = jnp.zeros_like(leaves[before])
        new[f"params/{layer}/kernel"] = kernel * by.reshape((1,) * (kernel.ndim - 1) + (-1,))
        new[f"params/{norm}/scale"] = jnp.full_like(scale, math.sqrt(1 + epsilon))
        new[f"params/{norm}/bias"] = bias + shift * by
        new[f"batch_stats/{norm}/mean"] = jnp.zeros_like(mean)
        new[f"batch_stats/{norm}/var"] = jnp.ones_like(var)
    return jax.tree.unflatten(treedef, new.values())
