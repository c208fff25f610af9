"""Name maps: from the names of a checkpoint to the tree of a model.

A map is a table of rows (pattern, path, transform). Patterns are regular expressions that match a whole name; groups of
the match are put into the path by ``\\1``, ``\\2`` and so on. Paths have "/" between their keys.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax.numpy as jnp

from jaxquant.core import views
from jaxquant.core.errors import QuantError, printable, quant_error
from jaxquant.core.qtensor import QTensor
from jaxquant.core.types import PyTree
from jaxquant.io.arrays import Values
from jaxquant.io.hf.activations import NAMES

__all__ = ["BERT", "GPT2", "LLAMA", "OPT", "VIT", "NameMap", "nested"]

Transform = Callable[[Values], Values]
Target = tuple[str, Transform | None] | None


def _transposed(leaf: Values) -> Values:
    """Transposes [out, in] to [in, out], the axes of Flax's kernels. Stored codes do not move."""
    if isinstance(leaf, QTensor):
        return _numpy_transpose(leaf)
    return leaf.T


def _numpy_transpose(q: QTensor) -> QTensor:
    return views.transpose(q, tuple(range(q.ndim))[::-1])


def _image_kernel(leaf: Values) -> Values:
    """A convolution's [out, in, height, width] to [height, width, in, out]."""
    order = (2, 3, 1, 0)
    return views.transpose(leaf, order) if isinstance(leaf, QTensor) else jnp.transpose(leaf, order)


#: Transforms that a row may apply to a tensor.
TRANSFORMS: dict[str, Transform | None] = {
    "as it is": None,
    "transpose": _transposed,
    "image kernel": _image_kernel,
}


@dataclasses.dataclass(frozen=True)
class NameMap:
    """Maps the names of a checkpoint's tensors to paths in a model.

    Args:
      rows: (pattern, path, transform): a regular expression for the whole name; the path, with ``\\1`` for its groups,
        or None for tensors to leave out; and ``"as it is"``, ``"transpose"`` ([out, in] to a kernel [in, out]) or
        ``"image kernel"``. The first row that matches counts.
      optional: patterns of tensors that may exist and are left out without an error.

    Raises:
      QuantError: if a pattern does not compile, or a transform is not known.

    Example:
      >>> import jaxquant as jq
      >>> names = jq.io.NameMap([(r"layers\\.(\\d+)\\.proj\\.weight", r"layer_\\1/proj/kernel", "transpose")])
      >>> names.path("layers.3.proj.weight")
      'layer_3/proj/kernel'
    """

    rows: Sequence[tuple[str, str | None, str]]
    optional: Sequence[str] = ()

    def __post_init__(self):
        for pattern, _, transform in self.rows:
            try:
                re.compile(pattern)
            except re.error as error:
                todo = "Write a pattern that re.fullmatch accepts"
                raise quant_error("NameMap", f"bad regular expression ({error})", todo=todo, pattern=pattern) from None
            if transform not in TRANSFORMS:
                todo = f"Use one of {', '.join(map(repr, TRANSFORMS))}"
                raise quant_error("NameMap", "unknown transform", todo=todo, transform=transform)

    def path(self, name: str) -> str | None:
        """The path of a tensor in the model; None if it is left out or unknown."""
        found = self._target(name)
        return found[0] if found else None

    def _target(self, name: str) -> Target | str:
        """The path and transform of a name; None to leave it out; "" if no row matches it."""
        for pattern, path, transform in self.rows:
            match = re.fullmatch(pattern, name)
            if match:
                return None if path is None else (match.expand(path), TRANSFORMS[transform])
        return None if any(re.fullmatch(p, name) for p in self.optional) else ""

    def apply(self, params: Mapping[str, Values]) -> dict[str, PyTree]:
        """Turns a flat dict of leaves, by the names of a checkpoint, into the model's tree.

        Use it for the result of `load_gguf` with ``names="hf"``; `load_hf` applies its map itself.

        Raises:
          QuantError: listing all names that do not fit.
        """
        targets = self.resolve(params, functools.partial(quant_error, "NameMap"))
        flat = {t[0]: leaf if t[1] is None else t[1](leaf) for n, leaf in params.items() if (t := targets[n])}
        return nested(flat)

    def resolve(self, names: Iterable[str], error: Callable[..., QuantError]) -> dict[str, Target]:
        """The target of every name; raises ``error``, listing names without a target and paths with two names."""
        targets: dict[str, Target] = {}
        problems: list[str] = []
        taken: dict[str, str] = {}
        for name in names:
            target = self._target(name)
            if isinstance(target, str):
                problems.append(f"{name}: no row matches{self._nearest(name)}")
                continue
            targets[name] = target
            if target is not None:
                if target[0] in taken:
                    problems.append(f"{name}: goes to {target[0]}, as {taken[target[0]]} does")
                taken[target[0]] = name
        for path in taken:
            inside = next((p for p in _parents(path) if p in taken), None)
            if inside is not None:
                problems.append(f"{taken[path]}: goes to {path}, inside {inside}")
        if problems:
            raise self._error(error, problems)
        return targets

    def _nearest(self, name: str) -> str:
        plain = [
            re.sub(r"\\d\+|\(\\d\+\)|\(|\)", "0", p).replace("\\.", ".").replace("\\", "") for p, _, _ in self.rows
        ]
        near = difflib.get_close_matches(re.sub(r"\d+", "0", name), plain, n=1)
        return f" (nearest pattern: {self.rows[plain.index(near[0])][0]})" if near else ""

    def _error(self, error: Callable[..., QuantError], problems: list[str]) -> QuantError:
        lines = "".join(f"\n  {printable(p)}" for p in problems[:50])
        more = f"\n  and {len(problems) - 50} more" if len(problems) > 50 else ""
        todo = "Add rows to the map, with the path None for tensors that the model does not have"
        return error(f"the names do not fit the map{lines}{more}\n", todo=todo, mismatches=len(problems))


def nested(flat: Mapping[str, Values]) -> dict[str, PyTree]:
    """Leaves by path, "/" between the keys, as a tree of dicts."""
    tree: dict[str, PyTree] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def _parents(path: str) -> list[str]:
    keys = path.split("/")
    return ["/".join(keys[:i]) for i in range(1, len(keys))]


def _linear(pattern: str, path: str) -> list[tuple[str, str | None, str]]:
    """Weight and bias of a linear layer."""
    return [(rf"{pattern}\.weight", f"{path}/kernel", "transpose"), (rf"{pattern}\.bias", f"{path}/bias", "as it is")]


def _norm(pattern: str, path: str) -> list[tuple[str, str | None, str]]:
    """Scale and bias of a normalisation."""
    return [(rf"{pattern}\.weight", f"{path}/scale", "as it is"), (rf"{pattern}\.bias", f"{path}/bias", "as it is")]


_ACTIVATION = (rf".*{NAMES}", r".*rotary_emb\.inv_freq")

#: Llama, Mistral, Qwen and models of the same structure.
LLAMA = NameMap(
    [
        (r"model\.embed_tokens\.weight", "embed_tokens/embedding", "as it is"),
        *_norm(r"model\.norm", "norm"),
        *_linear(r"lm_head", "lm_head"),
        *_linear(r"model\.layers\.(\d+)\.self_attn\.([qkvo]_proj)", r"layers_\1/self_attn/\2"),
        *_linear(r"model\.layers\.(\d+)\.mlp\.((?:gate|up|down)_proj)", r"layers_\1/mlp/\2"),
        *_norm(r"model\.layers\.(\d+)\.((?:input|post_attention)_layernorm)", r"layers_\1/\2"),
        *_norm(r"model\.layers\.(\d+)\.self_attn\.([qk]_norm)", r"layers_\1/self_attn/\2"),
    ],
    optional=_ACTIVATION,
)

OPT = NameMap(
    [
        (r"(?:model\.)?decoder\.embed_(tokens|positions)\.weight", r"embed_\1/embedding", "as it is"),
        *_norm(r"(?:model\.)?decoder\.final_layer_norm", "final_layer_norm"),
        *_linear(r"(?:model\.)?decoder\.(project_in|project_out)", r"\1"),
        *_linear(r"(?:model\.)?decoder\.layers\.(\d+)\.self_attn\.((?:q|k|v|out)_proj)", r"layers_\1/self_attn/\2"),
        *_linear(r"(?:model\.)?decoder\.layers\.(\d+)\.(fc[12])", r"layers_\1/\2"),
        *_norm(r"(?:model\.)?decoder\.layers\.(\d+)\.((?:self_attn|final)_layer_norm)", r"layers_\1/\2"),
        *_linear(r"lm_head", "lm_head"),
    ],
    optional=_ACTIVATION,
)

#: GPT-2 stores its kernels as [in, out] already.
GPT2 = NameMap(
    [
        (r"(?:transformer\.)?(wte|wpe)\.weight", r"\1/embedding", "as it is"),
        *_norm(r"(?:transformer\.)?ln_f", "ln_f"),
        *_norm(r"(?:transformer\.)?h\.(\d+)\.(ln_[12])", r"h_\1/\2"),
        (r"(?:transformer\.)?h\.(\d+)\.(attn|mlp)\.(c_\w+)\.weight", r"h_\1/\2/\3/kernel", "as it is"),
        (r"(?:transformer\.)?h\.(\d+)\.(attn|mlp)\.(c_\w+)\.bias", r"h_\1/\2/\3/bias", "as it is"),
        *_linear(r"lm_head", "lm_head"),
    ],
    optional=(*_ACTIVATION, r"(?:transformer\.)?h\.\d+\.attn\.(bias|masked_bias)"),
)

BERT = NameMap(
    [
        (r"(?:bert\.)?embeddings\.(\w+_embeddings)\.weight", r"embeddings/\1/embedding", "as it is"),
        *_norm(r"(?:bert\.)?embeddings\.LayerNorm", "embeddings/LayerNorm"),
        *_linear(
            r"(?:bert\.)?encoder\.layer\.(\d+)\.attention\.self\.(query|key|value)", r"layer_\1/attention/self/\2"
        ),
        *_linear(r"(?:bert\.)?encoder\.layer\.(\d+)\.attention\.output\.dense", r"layer_\1/attention/output/dense"),
        *_norm(
            r"(?:bert\.)?encoder\.layer\.(\d+)\.attention\.output\.LayerNorm", r"layer_\1/attention/output/LayerNorm"
        ),
        *_linear(r"(?:bert\.)?encoder\.layer\.(\d+)\.(intermediate|output)\.dense", r"layer_\1/\2/dense"),
        *_norm(r"(?:bert\.)?encoder\.layer\.(\d+)\.output\.LayerNorm", r"layer_\1/output/LayerNorm"),
        *_linear(r"(?:bert\.)?pooler\.dense", "pooler/dense"),
        *_linear(r"(classifier|qa_outputs)", r"\1"),
    ],
    optional=(*_ACTIVATION, r"(?:bert\.)?embeddings\.position_ids", r"cls\..*"),
)

VIT = NameMap(
    [
        (r"(?:vit\.)?embeddings\.(cls_token|mask_token|position_embeddings)", r"embeddings/\1", "as it is"),
        (
            r"(?:vit\.)?embeddings\.patch_embeddings\.projection\.weight",
            "embeddings/projection/kernel",
            "image kernel",
        ),
        (r"(?:vit\.)?embeddings\.patch_embeddings\.projection\.bias", "embeddings/projection/bias", "as it is"),
        *_linear(r"(?:vit\.)?encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)", r"layer_\1/attention/\2"),
        *_linear(r"(?:vit\.)?encoder\.layer\.(\d+)\.attention\.output\.dense", r"layer_\1/attention/output"),
        *_linear(r"(?:vit\.)?encoder\.layer\.(\d+)\.(intermediate|output)\.dense", r"layer_\1/\2"),
        *_norm(r"(?:vit\.)?encoder\.layer\.(\d+)\.layernorm_(before|after)", r"layer_\1/layernorm_\2"),
        *_norm(r"(?:vit\.)?layernorm", "layernorm"),
        *_linear(r"(?:vit\.)?pooler\.dense", "pooler"),
        *_linear(r"classifier", "classifier"),
    ],
    optional=_ACTIVATION,
)
