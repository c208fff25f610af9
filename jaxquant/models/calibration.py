"""`grams`: what quantizers need to know of the inputs of a decoder's weights, from a text."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.core.errors import quant_error
from jaxquant.core.qtensor import QTensor
from jaxquant.models.decoder import logits
from jaxquant.models.load import Model
from jaxquant.rules import Rule
from jaxquant.transform import calibrate, make_plan
from jaxquant.transform.statistics import Gram

__all__ = ["grams"]


def grams(
    model: Model,
    tokens: Sequence[int],
    names: Sequence[str],
    *,
    window: int = 512,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, jax.Array]:
    """The Gram matrices of the inputs of weights, over a text.

    Args:
      model: a decoder in float; all of it is in memory.
      tokens: of the text; they are cut into windows, and what is left of the last one is not used.
      names: the weights.
      window: tokens that see one another; fewer, if the text has no more.
      progress: called before each window with how many are done, and of how many.

    Returns:
      name -> the sum of ``x^T x`` over all tokens, float32 [in, in]; of the experts of a layer that are one leaf,
      [experts, in, in].

    Raises:
      QuantError: if the model is quantized, a name is none of its weights, or the text has fewer than two tokens.
    """
    if len(tokens) < 2:
        todo = "Use a text of a few thousand tokens, like what the model is used for"
        raise quant_error("grams", "the text is too short", todo=todo, tokens=len(tokens))
    unknown = [name for name in names if name not in model.params]
    frozen = [name for name in names if isinstance(model.params.get(name), QTensor)]
    if unknown or frozen:
        todo = "Pass names of float weights of the model"
        raise quant_error("grams", "these are no float weights", todo=todo, names=tuple([*unknown, *frozen][:5]))
    window = min(window, len(tokens))
    count = len(tokens) // window
    windows = np.asarray(tokens[: count * window], np.int32).reshape(count, 1, window)
    fn = functools.partial(logits, model.config)
    pattern = f"^({'|'.join(map(re.escape, names))})$"
    plan = make_plan(fn, model.params, jax.ShapeDtypeStruct((1, window), jnp.int32), rules=[Rule(pattern, "w8a16")])

    def batches() -> Any:
        for done, batch in enumerate(windows):
            if progress is not None:
                progress(done, count)
            yield (jnp.asarray(batch),)

    stats = calibrate(fn, plan, model.params, batches(), collect={"gram": Gram()})
    found = {path: entry["gram"]["gram"] for path, entry in stats.items()}
    return {path: gram[0] if gram.shape[0] == 1 else gram for path, gram in found.items()}
