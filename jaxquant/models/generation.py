"""`generate` and `stream`: tokens that follow, a chunk of them at a time.

A prompt goes through the model in one call. Then a loop inside one program adds a token to every sequence of the batch,
until all have ended or a chunk is full, and yields the chunk. Prompts of different lengths are padded on
the left, so that every sequence writes to the same place of the cache.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from jaxquant.core.errors import quant_error
from jaxquant.core.jitted import executable, lowered
from jaxquant.core.paths import Params
from jaxquant.core.types import PyTree, TreeDef
from jaxquant.models.config import Config
from jaxquant.models.decoder import empty_cache, head, hidden
from jaxquant.models.load import Model
from jaxquant.transform.quantized import quantized
from jaxquant.transform.stated import StatedPlan

__all__ = ["Sampling", "Times", "generate", "stream", "tokens_of"]

_CHUNK = 8


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
      temperature: logits are divided by it; 0 for the most likely token.
      top_k: only so many of the most likely tokens can be chosen; None for all.
      top_p: only the most likely tokens whose probabilities sum to this can be chosen, one at least.
      seed: the same seed gives the same tokens, whatever else is in the batch after it.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def checked(self) -> Sampling:
        """Itself; `QuantError` where a number makes no sense."""
        for name, good, todo in (
            ("temperature", self.temperature >= 0, "0 is greedy, 1 the model's own probabilities"),
            ("top_k", self.top_k is None or self.top_k >= 1, "Leave it out to choose from all tokens"),
            ("top_p", 0 < self.top_p <= 1, "It is a probability: 1 is all tokens"),
            ("seed", 0 <= self.seed < 2**32, "Use an integer of 32 bits"),
        ):
            if not good:
                raise quant_error("generate", f"{name} is out of range", todo=todo, **{name: getattr(self, name)})
        return self


@dataclasses.dataclass
class Times:
    """The duration of a run, in seconds.

    Attributes:
      compiling: of both programs.
      prompt: through the model.
      decoding: all further tokens.
      steps: how many these are in each sequence.
    """

    compiling: float = 0.0
    prompt: float = 0.0
    decoding: float = 0.0
    steps: int = 0


@overload
def generate(
    model: Model,
    prompts: Sequence[str],
    *,
    tokens: int = 64,
    cache: Literal["float", "int8"] | None = None,
    sampling: Sampling = Sampling(),
) -> list[str]: ...


@overload
def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    tokens: int = 64,
    cache: Literal["float", "int8"] | None = None,
    sampling: Sampling = Sampling(),
) -> list[list[int]]: ...


def generate(
    model: Model,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    tokens: int = 64,
    cache: Literal["float", "int8"] | None = None,
    sampling: Sampling = Sampling(),
) -> list[str] | list[list[int]]:
    """Continues each prompt.

    Args:
      model: from `load`.
      prompts: texts, or ids of tokens.
      tokens: at most so many new ones for each.
      cache: of keys and values: in the dtype of the model, or int8 with a scale per token and head. None: as the
        checkpoint says, or else in the dtype of the model.
      sampling: how a token is chosen.

    Returns:
      Texts for texts and ids for ids, without the prompt and without the token that ended it.

    Raises:
      QuantError: in the cases in which `stream` raises.

    Example:
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
      >>> config = jq.models.config_of({"model_type": "llama", "num_hidden_layers": 1, **sizes})
      >>> params = {name: jnp.ones(shape) for name, shape in config.shapes().items()}
      >>> model = jq.models.Model("", config, params, jnp.dtype("float32"), "float", frozenset())
      >>> jq.models.generate(model, [[1, 2], [3]], tokens=3)
      [[0, 0, 0], [0, 0, 0]]
    """
    ids = tokens_of(model, prompts)
    chunks = list(stream(model, ids, tokens=tokens, cache=cache, sampling=sampling))
    found = [[i for chunk in chunks for i in chunk[row]] for row in range(len(ids))]
    texts = any(isinstance(prompt, str) for prompt in prompts)
    return [model.tokenizer.decode(row) for row in found] if texts else found


def tokens_of(model: Model, prompts: Sequence[str] | Sequence[Sequence[int]]) -> list[list[int]]:
    """Ids of texts; ids as they are, checked."""
    if isinstance(prompts, str):
        raise quant_error("generate", "prompts must be a list", todo=f"Pass [{prompts[:20]!r}]", prompts=prompts)
    ids = [model.tokenizer.encode(p) if isinstance(p, str) else [int(i) for i in p] for p in prompts]
    if not ids or not all(ids):
        todo = "Give one token at least, such as the one that begins a text"
        raise quant_error("generate", "a prompt is empty", todo=todo, prompts=len(ids))
    size = model.config.vocab_size
    for row in ids:
        largest = max(row)
        if min(row) < 0 or largest >= size:
            todo = "The tokenizer is not that of the model, or an id is mistaken"
            raise quant_error("generate", "an id is not in the vocabulary", todo=todo, vocab_size=size, largest=largest)
    return ids


def stream(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    tokens: int = 64,
    cache: Literal["float", "int8"] | None = None,
    sampling: Sampling = Sampling(),
    times: Times | None = None,
) -> Iterator[list[list[int]]]:
    """The same as ids, as they come: for each prompt the next few, fewer once it has ended.

    Args:
      model: from `load`.
      prompts: ids of tokens.
      tokens: at most so many new ones for each.
      cache: of keys and values; None: as the checkpoint says, or else in the dtype of the model.
      sampling: how a token is chosen.
      times: where to add up what it took.

    Raises:
      QuantError: for an empty prompt, an id that is not in the vocabulary, sampling that makes no sense, or prompt and
        tokens that are together longer than the model is made for.
    """
    sampling, times = sampling.checked(), Times() if times is None else times
    ids = tokens_of(model, prompts)
    if cache not in (None, "float", "int8"):
        raise quant_error("generate", "unknown kind of cache", todo="Use 'float' or 'int8'", cache=cache)
    if cache is not None and model.config.cache is not None:
        todo = "Leave cache out, or load the model with cache='float'"
        rule = "the checkpoint says how keys and values are stored"
        raise quant_error("generate", rule, todo=todo, cache=cache, saved=model.config.cache)
    if tokens < 1:
        raise quant_error("generate", "tokens must be positive", todo="Ask for one at least", tokens=tokens)
    longest, config = max(map(len, ids)), model.config
    if config.context is not None and longest + tokens > config.context:
        todo = f"Ask for at most {max(config.context - longest, 0)} tokens, or shorten the prompt"
        rule = f"the model is made for {config.context} tokens"
        raise quant_error("generate", rule, todo=todo, prompt=longest, tokens=tokens)
    dtype = np.dtype(np.int8) if cache == "int8" else np.dtype(jnp.dtype(config.cache or model.dtype))
    yield from _chunks(model, ids, longest, tokens, dtype, sampling, times)


def _chunks(
    model: Model, ids: list[list[int]], longest: int, tokens: int, dtype: np.dtype, sampling: Sampling, times: Times
) -> Iterator[list[list[int]]]:
    batch, config = len(ids), model.config
    padded = np.array([[0] * (longest - len(row)) + row for row in ids], np.int32)
    valid = np.array([[False] * (longest - len(row)) + [True] * (len(row) + tokens) for row in ids])
    ends = jnp.asarray(sorted(model.ends) or [-1], jnp.int32)
    key = jax.random.key(sampling.seed)
    limit = jnp.asarray(tokens, jnp.int32)
    begun = time.perf_counter()
    weights = model.params, model.state
    leaves, tree = jax.tree.flatten(weights)
    forms = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)) for x in leaves)
    seedless = dataclasses.replace(sampling, seed=0)
    prefill, decode = _programs(config, model.plan, seedless, dtype, batch, longest, tokens, ends.size, tree, forms)
    times.compiling += time.perf_counter() - begun

    begun = time.perf_counter()
    state = jax.block_until_ready(prefill(weights, padded, valid, key))
    times.prompt += time.perf_counter() - begun
    done, made = np.zeros(batch, bool), 0
    while made < tokens and not done.all():
        begun = time.perf_counter()
        state, found, count = decode(weights, valid, state, key, ends, limit)
        found, count = np.asarray(found), int(count)
        times.decoding += time.perf_counter() - begun
        times.steps += count
        chunk = []
        for row in range(batch):
            new = [] if done[row] else found[row, :count].tolist()
            end = next((at for at, i in enumerate(new) if i in model.ends), None)
            done[row] |= end is not None
            chunk.append(new[:end])
        made += count
        yield chunk


State = dict[str, PyTree]
Weights = tuple[PyTree, PyTree]
"""Parameters, and the state of their plan."""


@functools.lru_cache(maxsize=8)
def _programs(
    config: Config, plan: StatedPlan | None, sampling: Sampling, dtype: np.dtype, batch: int, longest: int, tokens: int,
    ends: int, tree: TreeDef, forms: tuple[jax.ShapeDtypeStruct, ...],
) -> tuple[Callable[..., PyTree], Callable[..., PyTree]]:  # fmt: skip
    """The programs for a prompt and for a chunk, compiled; they are kept, since the same shapes often come again."""
    weights, key = jax.tree.unflatten(tree, forms), jax.random.key(0)
    padded, valid = jnp.zeros((batch, longest), jnp.int32), jnp.zeros((batch, longest + tokens), bool)
    first = jax.jit(functools.partial(_prefill, config, plan, sampling, dtype))
    state = jax.eval_shape(first, weights, padded, valid, key)
    loop = jax.jit(functools.partial(_decode, config, plan, sampling, longest), donate_argnums=2)
    more = valid, state, key, jnp.zeros(ends, jnp.int32), jnp.zeros((), jnp.int32)
    programs = lowered(first, weights, padded, valid, key), lowered(loop, weights, *more)
    with concurrent.futures.ThreadPoolExecutor() as pool:  # XLA compiles the two side by side
        prefill, decode = pool.map(executable, programs)
    return prefill, decode


def _prefill(
    config: Config, plan: StatedPlan | None, sampling: Sampling, dtype: DTypeLike, weights: Weights, tokens: jax.Array,
    valid: jax.Array, key: jax.Array,
) -> State:  # fmt: skip
    """The cache with the prompt in it, and the token that follows."""
    cache = empty_cache(config, valid.shape[0], valid.shape[1], dtype)

    def run(params: Params, tokens: jax.Array, cache: PyTree) -> tuple[jax.Array, PyTree]:
        x, cache = hidden(config, params, tokens, valid, cache, 0)
        return head(config, params, x[:, -1:])[:, 0], cache

    logits, cache = quantized(run, plan, weights[1])(weights[0], tokens, cache)
    made, done = jnp.zeros((), jnp.int32), jnp.zeros(len(tokens), bool)
    return {"token": _chosen(sampling, logits, key, made), "cache": cache, "made": made, "done": done}


def _decode(
    config: Config, plan: StatedPlan | None, sampling: Sampling, start: int, weights: Weights, valid: jax.Array,
    state: State, key: jax.Array, ends: jax.Array, limit: jax.Array,
) -> tuple[State, jax.Array, jax.Array]:  # fmt: skip
    """A chunk of tokens, each handed out and then put through the model; how many there are."""

    def step(params: Params, token: jax.Array, cache: PyTree, at: jax.Array) -> tuple[jax.Array, PyTree]:
        x, cache = hidden(config, params, token[:, None], valid, cache, at)
        return head(config, params, x)[:, 0], cache

    def body(carry: tuple[State, jax.Array, jax.Array]) -> tuple[State, jax.Array, jax.Array]:
        state, found, count = carry
        token, made = state["token"], state["made"]
        found = lax.dynamic_update_slice_in_dim(found, token[:, None], count, 1)
        done = state["done"] | jnp.any(token[:, None] == ends[None, :], axis=1)
        logits, cache = quantized(step, plan, weights[1])(weights[0], token, state["cache"], start + made)
        token = _chosen(sampling, logits, key, made + 1)
        return {"token": token, "cache": cache, "made": made + 1, "done": done}, found, count + 1

    def more(carry: tuple[State, jax.Array, jax.Array]) -> jax.Array:
        state, _, count = carry
        return (count < _CHUNK) & (state["made"] < limit) & ~jnp.all(state["done"])

    found = jnp.zeros((valid.shape[0], _CHUNK), jnp.int32)
    return lax.while_loop(more, body, (state, found, jnp.zeros((), jnp.int32)))


def _chosen(sampling: Sampling, logits: jax.Array, key: jax.Array, made: jax.Array) -> jax.Array:
    """The next token of each row of [batch, vocabulary]."""
    if sampling.temperature == 0:
        return logits.argmax(-1).astype(jnp.int32)
    x = logits.astype(jnp.float32) / sampling.temperature
    if sampling.top_k is not None:
        least = lax.top_k(x, min(sampling.top_k, x.shape[-1]))[0][:, -1:]
        x = jnp.where(x < least, -jnp.inf, x)
    if sampling.top_p < 1:
        ordered = -jnp.sort(-x, axis=-1)
        before = jnp.cumsum(jax.nn.softmax(ordered), axis=-1) - jax.nn.softmax(ordered)  # of the likelier ones
        least = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        x = jnp.where(x < least, -jnp.inf, x)
    rows = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, made), row))(jnp.arange(len(x)))
    return jax.vmap(jax.random.categorical)(rows, x).astype(jnp.int32)
