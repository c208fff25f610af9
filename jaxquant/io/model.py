"""`load_model`: reads parameters with their plan and state, from a file or a directory."""

from __future__ import annotations

import os
from collections.abc import Mapping

from jax.typing import DTypeLike

from jaxquant.core.errors import quant_error
from jaxquant.core.types import PyTree
from jaxquant.io.hf.model import Activations, Floating, HFModel, load_hf_model
from jaxquant.io.hf.names import NameMap
from jaxquant.io.native import SavedModel, load_native_model
from jaxquant.io.sharded import located
from jaxquant.ops.targets import Platform

__all__ = ["load_model"]

_F = "load_model"


def load_model(
    path: str | os.PathLike[str],
    *,
    like: PyTree = None,
    target: Platform | None = None,
    names: NameMap | None = None,
    dtype: DTypeLike | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    activations: Activations = "saved",
    cache: Floating = "saved",
) -> SavedModel | HFModel:
    """Reads a model with its plan and state: run it by ``jq.quantized(fn, model)(model.params, ...)``.

    A file of `save` holds the plan and the state. In a Hugging Face directory the configuration says how the
    activations of each weight are quantized, and tensors such as ``input_scale`` hold static ranges. This becomes a
    plan when ``fn`` is traced; `HFModel.plan` lists the weights.

    Args:
      path: a file of `save`, or a Hugging Face directory, quantized by any library or in float.
      like: for a file, a template for the params, as for `load`.
      target: as for `load` and `load_hf`.
      names, dtype, shapes: for a directory, as for `load_hf`.
      activations: for a directory, ``"float"`` leaves the plan out, so that only weights are quantized; ``"inputs"``
        leaves out that outputs of weights are rounded, which cannot be run.
      cache: for a directory, ``"float"`` leaves out the quantization of keys and values, which a plan cannot express.
        `jaxquant.models.load` runs such a checkpoint with its quantized cache.

    Returns:
      A `SavedModel` for a file, an `HFModel` for a directory; both have ``params``, ``plan`` and ``state``, of which
      the last two may be None.

    Raises:
      QuantError: as `load` and `load_hf`; if the plan of a file is not one of jaxquant's; if a directory requires a
        scheme that cannot be run, naming the key: such as static global scales of NVFP4 activations, rounded outputs,
        or scales of a cache (see ``cache``).

      OSError: if the file cannot be opened.

    Example:
      >>> import os, tempfile
      >>> import jax, jax.numpy as jnp, jaxquant as jq
      >>> fn, x = (lambda p, x: x @ p["w"]), jnp.linspace(-1.0, 1.0, 64).reshape(2, 32)
      >>> params = {"w": jnp.sin(jnp.arange(512.0)).reshape(32, 16)}
      >>> plan = jq.make_plan(fn, params, x, rules=[jq.Rule("w", jq.recipes.w8a8(static=True))])
      >>> state = jq.act_state(plan, jq.calibrate(fn, plan, params, [x]))
      >>> qparams = jq.quantize_params(params, plan)
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = os.path.join(directory, "model.safetensors")
      ...     jq.io.save(path, qparams, plan=plan, state=state)
      ...     model = jq.io.load_model(path)
      >>> y = jq.quantized(fn, model.plan, model.state)(model.params, x)
      >>> bool((y == jq.quantized(fn, plan, state)(qparams, x)).all())
      True
    """
    place = os.fspath(path)
    if isinstance(place, bytes) or os.path.isfile(place):
        given = {"names": names, "dtype": dtype, "shapes": shapes}
        given = {name: value for name, value in given.items() if value is not None}
        if given or activations != "saved" or cache != "saved":
            todo = "Leave it out: a file is read as it was saved"
            got = given or {"activations": activations, "cache": cache}
            raise quant_error(_F, "this is for directories of other libraries", todo=todo, path=place, **got)
        return load_native_model(_F, place, like, target)
    place = located(place, _F)
    if not os.path.isdir(place):
        return load_native_model(_F, place, like, target)  # raises its error
    if like is not None:
        todo = "Use names=, which says what each tensor is called in the model"
        raise quant_error(_F, "like is for files that save wrote", todo=todo, path=place)
    model = load_hf_model(
        _F, place, names=names, dtype=dtype, target=target, shapes=shapes, activations=activations, cache=cache
    )
    if model.cache is not None:
        rule = "the checkpoint has scales for a cache of keys and values, which no plan of a function can hold"
        todo = "Run it with jaxquant.models.load, or leave keys and values in float: cache='float'"
        raise quant_error(_F, rule, todo=todo, path=place, tensors=model.cache.used[:4])
    return model
