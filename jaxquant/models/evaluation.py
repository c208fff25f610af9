"""`evaluate`: perplexity of a text, and how far a model's probabilities are from another's."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxquant.core.errors import quant_error
from jaxquant.core.jitted import executable, lowered
from jaxquant.core.types import PyTree
from jaxquant.models.decoder import head, hidden
from jaxquant.models.load import Model

__all__ = ["Evaluation", "evaluate"]

#: Tokens whose logits are in memory at once.
_CHUNK = 256


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The results of `evaluate`.

    Attributes:
      tokens: how many were predicted: all but the first of each window.
      windows: how many the text was cut into.
      window: tokens of one.
      nll: mean negative log-likelihood of a token, in nats.
      reference_nll: the same of the reference, or None.
      kl: mean divergence from the reference's probabilities to the model's, in nats for a token, or None.
      agreement: share of tokens at which both find the same one the most likely, or None.
      compiling: seconds.
      running: seconds, of both models.
    """

    tokens: int
    windows: int
    window: int
    nll: float
    reference_nll: float | None
    kl: float | None
    agreement: float | None
    compiling: float
    running: float

    @property
    def perplexity(self) -> float:
        """``exp(nll)``."""
        return _exp(self.nll)

    @property
    def reference_perplexity(self) -> float | None:
        """The same of the reference, or None."""
        return None if self.reference_nll is None else _exp(self.reference_nll)


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def evaluate(
    model: Model,
    text: str | Iterable[int],
    *,
    reference: Model | None = None,
    window: int = 2048,
    progress: Callable[[int, int], object] | None = None,
) -> Evaluation:
    """How likely a text is to a model, and how near to another model it is.

        nll = -mean(log p(token | those before it in its window))
        kl  =  mean(sum over tokens v of r(v) * (log r(v) - log p(v))), r of the reference

    The text is cut into windows that do not overlap; the first token of each is not predicted.

    Args:
      model: from `load`.
      text: a text, or ids of tokens.
      reference: another model with the same vocabulary, most often the same one in float.
      window: tokens in one sequence; at most the model's maximal length.
      progress: called with the windows that are done, and with all of them.

    Returns:
      An `Evaluation`.

    Raises:
      QuantError: if there are fewer than two tokens, an id is not in the vocabulary, the window is longer than the
        model is made for, or the vocabularies differ.

    Example:
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
      >>> config = jq.models.config_of({"model_type": "llama", "num_hidden_layers": 1, **sizes})
      >>> params = {name: jnp.ones(shape) for name, shape in config.shapes().items()}
      >>> model = jq.models.Model("", config, params, jnp.dtype("float32"), "float", frozenset())
      >>> found = jq.models.evaluate(model, [1, 2, 3, 4, 5], window=4)
      >>> found.tokens, round(found.perplexity, 3)
      (3, 16.0)
    """
    ids = model.tokenizer.encode(text) if isinstance(text, str) else [int(i) for i in text]
    _check(model, reference, ids, window)
    window = min(window, len(ids))
    starts = [at for at in range(0, len(ids), window) if len(ids) - at > 1]
    rows = np.zeros((len(starts), window), np.int32)
    valid = np.zeros((len(starts), window), bool)
    for row, at in enumerate(starts):
        part = ids[at : at + window]
        rows[row, : len(part)], valid[row, : len(part)] = part, True
    models = [model] if reference is None else [model, reference]
    params, begun = [(one.params, one.state) for one in models], time.perf_counter()
    sums = jax.jit(functools.partial(_sums, models))
    run = executable(lowered(sums, params, rows[:1], valid[:1]))
    compiling, begun = time.perf_counter() - begun, time.perf_counter()
    totals = np.zeros(4)
    for row in range(len(starts)):
        totals += np.asarray(run(params, rows[row : row + 1], valid[row : row + 1]), np.float64)
        if progress is not None:
            progress(row + 1, len(starts))
    running = time.perf_counter() - begun
    tokens = int(valid[:, 1:].sum())
    nll, other, kl, same = (float(total) / tokens for total in totals)
    both = (other, max(kl, 0.0), same) if reference is not None else (None, None, None)
    return Evaluation(tokens, len(starts), window, nll, *both, compiling, running)


def _check(model: Model, reference: Model | None, ids: Sequence[int], window: int) -> None:
    size = model.config.vocab_size
    if len(ids) < 2:
        raise quant_error("evaluate", "the text has fewer than two tokens", todo="Give a longer one", tokens=len(ids))
    if min(ids) < 0 or max(ids) >= size:
        todo = "The tokenizer is not that of the model"
        raise quant_error("evaluate", "an id is not in the vocabulary", todo=todo, vocab_size=size, largest=max(ids))
    if window < 2:
        raise quant_error("evaluate", "a window needs two tokens", todo="Give a longer one", window=window)
    for one in (model, reference):
        if one is not None and one.config.context is not None and min(window, len(ids)) > one.config.context:
            rule = f"the model is made for {one.config.context} tokens"
            raise quant_error("evaluate", rule, todo=f"Use window={one.config.context}", path=one.path, window=window)
    if reference is not None and reference.config.vocab_size != size:
        todo = "The divergence is between models of one vocabulary"
        sizes = (size, reference.config.vocab_size)
        raise quant_error("evaluate", "the vocabularies differ", todo=todo, path=reference.path, vocab_sizes=sizes)


def _sums(models: list[Model], weights: list[tuple[PyTree, PyTree]], tokens: jax.Array, valid: jax.Array) -> jax.Array:
    """Over the predicted tokens of a window: both likelihoods, divergence and agreement; 0 where there is no other."""
    wanted, counted = tokens[0, 1:], valid[0, 1:]
    size = min(_CHUNK, len(wanted))
    room = -len(wanted) % size

    def states(model: Model, weights: tuple[PyTree, PyTree]) -> jax.Array:
        run = model.run(lambda params: hidden(model.config, params, tokens, valid)[0][0, :-1])
        return run(*weights)

    def logs(model: Model, weights: tuple[PyTree, PyTree], x: jax.Array) -> jax.Array:
        run = model.run(lambda params, x: head(model.config, params, x[None])[0])
        return jax.nn.log_softmax(run(*weights, x).astype(jnp.float32))

    both = list(zip(models, weights, strict=True))
    chunks = [
        jnp.pad(x, [(0, room)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, size, *x.shape[1:])
        for x in (wanted, counted, *(states(*one) for one in both))
    ]

    def add(total: jax.Array, chunk: list[jax.Array]) -> tuple[jax.Array, None]:
        wanted, counted, *states = chunk
        found = [logs(*one, x) for one, x in zip(both, states, strict=True)]
        losses = [-jnp.take_along_axis(log, wanted[:, None], axis=1)[:, 0] for log in found]
        if len(found) == 1:
            sums = [losses[0], *[jnp.zeros_like(losses[0])] * 3]
        else:
            p, r = found
            divergence = jnp.sum(jnp.exp(r) * (r - p), axis=-1)
            sums = [*losses, divergence, (p.argmax(-1) == r.argmax(-1)).astype(jnp.float32)]
        return total + jnp.stack([jnp.where(counted, x, 0).sum() for x in sums]), None

    return lax.scan(add, jnp.zeros(4), chunks)[0]
