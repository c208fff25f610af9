"""`save_hf`: writes arrays and QTensors to a directory that Hugging Face, vLLM and the formats' own libraries read."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from jaxquant.core.errors import QuantError, quant_error
from jaxquant.core.paths import Leaf
from jaxquant.core.qtensor import QTensor, scale_values
from jaxquant.core.specs import QuantSpec
from jaxquant.core.types import TreeDef
from jaxquant.io.arrays import PackedLeaves, Values, to_host
from jaxquant.io.directory import SHARD_BYTES, Piece, in_shards, json_bytes, write_directory
from jaxquant.io.export import AWQ, BITSANDBYTES, GPTQ, MLX, Layout, compressed_tensors
from jaxquant.io.export.integers import is_stack
from jaxquant.io.hf.activations import describes_activations
from jaxquant.io.safetensors import DTYPES, TensorSpec
from jaxquant.io.strict_json import Json

__all__ = ["FORMATS", "Format", "export_config", "export_piece", "layout_of", "save_hf", "write_hf"]

Format = Literal["compressed-tensors", "gptq", "awq", "bitsandbytes", "mlx"]
FORMATS = ("compressed-tensors", "gptq", "awq", "bitsandbytes", "mlx")
_EMBEDDINGS = ("embed", "wte", "wpe", "shared")


def save_hf(
    directory: str | os.PathLike[str],
    params: Mapping[str, Values],
    *,
    format: Format = "compressed-tensors",
    config: Mapping[str, Json] | None = None,
    act: QuantSpec | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a quantized checkpoint that other libraries read to the same values, with unchanged codes.

    A weight fits a format if its number type, groups, scales and zero points are on that format's grid:

        compressed-tensors   integers of 2 to 8 bits per channel or group, with or without integer zero points; fp8
                             per tensor, channel or block; mxfp4
        gptq                 2, 3, 4, 8 bits, scales that float16 holds, all weights alike; also with reordered columns
        awq                  4 bits, scales that float16 holds, one group size
        bitsandbytes         nf4 or fp4, blocks of 32 to 4096
        mlx                  2, 3, 4, 5, 6, 8 bits in groups of 32, 64 or 128, whose zero points times scales the dtype
                             of the scales holds (symmetric ones always fit); mxfp4, mxfp8; nvfp4 as MLX has it

    Args:
      directory: where to write; it must not exist, or be empty. It appears only when it is complete.
      params: a flat dict in the form of `load_hf`: ``<module>.weight`` -> QTensor [out, in], all other leaves arrays.
      Of
        another mapping each leaf is read twice, to check it and to write it, so the mapping need not keep leaves.
      format: the layout.
      config: the model's ``config.json``; ``quantization_config`` is added to a copy.
      act: with compressed-tensors, the quantization of activations (int8 or fp8, dynamic, per token); None for weights
        only. ``QuantSpec("int8")``, with a step of absmax / 127, is marked as such, and `load_model` runs it so;
        vLLM does too, and compressed-tensors by itself takes absmax / 127.5.
      shard_bytes: size that a file should not exceed.

    Raises:
      QuantError: before writing, if a weight does not fit the format, naming it and the reason, if tensors describe
        activations (``input_scale``), or the disk is too full. While writing: if another writer has filled it; the
        same call continues where this one has ended.
      OSError: if the place is not writable.

    Example:
      >>> import os, tempfile
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> spec = jq.QuantSpec("int4", granularity=jq.PerGroup(32))
      >>> params = {"lm_head.weight": jq.quantize(jnp.eye(64), spec, reduce_axes=(-1,)), "norm.weight": jnp.ones(64)}
      >>> with tempfile.TemporaryDirectory() as parent:
      ...     directory = os.path.join(parent, "model")
      ...     jq.io.save_hf(directory, params)
      ...     sorted(os.listdir(directory))
      ['config.json', 'model.safetensors']

    Source: the layouts of compressed-tensors 0.19, gptqmodel 7.7, AutoAWQ 0.2.9, bitsandbytes 0.50.2 and MLX. The tests
    reproduce the libraries' own files (except MLX's) byte for byte.
    """
    # Leaves in memory have no identity, so a random one is used and a partial directory is never continued.
    source = {"memory": os.urandom(8).hex()}
    leaves = PackedLeaves(params)
    write_hf(directory, leaves, layout_of(format, act), config or {}, source=source, shard_bytes=shard_bytes)


def write_hf(
    directory: str | os.PathLike[str],
    params: Mapping[str, Leaf],
    layout: Layout,
    config: Mapping[str, Json],
    *,
    source: Mapping[str, Json],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """`save_hf` for leaves of a known origin: ``source`` identifies it, as for `write_directory`."""
    orphans = tuple(name for name in params if describes_activations(name))
    if orphans:
        rule = "these tensors describe activations, and no scheme of the file would use them"
        todo = "Leave them out: load_hf lists them in info.activations, and params of load_model are without them"
        raise quant_error("save_hf", rule, todo=todo, path=orphans[0], tensors=orphans[:10])
    leaves: dict[str, Leaf] = {}
    pieces = []
    for name in params:  # memory holds one leaf at a time if params reads its leaves on access
        leaf = params[name]
        pieces.append(export_piece(layout, name, leaf, functools.partial(params.__getitem__, name)))
        leaves[name] = jax.tree.map(_without_values, leaf)
        del leaf
    weights = {name.removesuffix(".weight"): leaf for name, leaf in leaves.items() if isinstance(leaf, QTensor)}
    if not weights:
        todo = "Quantize some, or save with jq.io.save"
        raise quant_error("save_hf", "there is no quantized weight", todo=todo, params=len(params))
    files = export_config(layout, weights, float_modules(leaves), config)
    written = in_shards(pieces, files, shard_bytes, function="save_hf")
    write_directory(directory, written, source=source, function="save_hf")


def _without_values(array: jax.Array | np.ndarray) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def layout_of(format: str, act: QuantSpec | None = None, *, function: str = "save_hf") -> Layout:
    """The layout for a format's name."""
    if format not in FORMATS:
        raise quant_error(function, "unknown format", todo=f"Use one of {', '.join(FORMATS)}", format=format)
    if format == "compressed-tensors":
        return compressed_tensors(act)
    if act is not None:
        todo = "Write compressed-tensors, or leave act out"
        raise quant_error(function, "the format does not describe activations", todo=todo, format=format, act=act)
    return {"gptq": GPTQ, "awq": AWQ, "bitsandbytes": BITSANDBYTES, "mlx": MLX}[format]


def float_modules(leaves: Mapping[str, Leaf]) -> list[str]:
    """The modules whose weights stay in float and could be mistaken for quantized linear layers."""
    return [
        name.removesuffix(".weight")
        for name, leaf in leaves.items()
        if name.endswith(".weight")
        and not isinstance(leaf, QTensor)
        and len(leaf.shape) == 2
        and not any(word in name for word in _EMBEDDINGS)
    ]


def export_piece(layout: Layout, name: str, leaf: Leaf, read: Callable[[], Any], *, function: str = "save_hf") -> Piece:
    """The tensors of one leaf.

    Args:
      layout: from `layout_of`.
      name: of the leaf.
      leaf: an array or a QTensor, or its shapes; values are only checked if they are given.
      read: returns the leaf with its values when it is to be written.
      function: the public function that errors name.
    """
    if not isinstance(leaf, QTensor):
        return Piece({name: _checked(name, leaf, function)}, lambda: {name: to_host(read())})

    def error(rule: str, **got: Any) -> QuantError:
        return quant_error(function, f"{rule} (format {layout.name})", path=name, **got)

    stacked = is_stack(leaf) or "experts" in name  # a matrix of all experts, too
    if not name.endswith(".weight") and not (stacked and layout.stacks):
        todo = "Rename it, or keep it in float" if layout.stacks else "Write compressed-tensors, or keep it in float"
        raise error("quantized weights are named <module>.weight, but for experts", todo=todo, weight=repr(leaf))
    layout.check(leaf, error)

    def named(suffix: str) -> str:
        """The name of a tensor; suffixes of a parameter without its own module begin with "_"."""
        return name.removesuffix("weight") + suffix if name.endswith(".weight") else name + suffix[len("weight") :]

    constants = {named(suffix): value for suffix, value in layout.constants(leaf).items()}
    leaves, structure = jax.tree.flatten(leaf)
    shapes = _specs(layout, structure, tuple(TensorSpec(np.dtype(x.dtype), tuple(x.shape)) for x in leaves))
    specs = {named(suffix): spec for suffix, spec in shapes.items()}
    specs |= {name: TensorSpec(value.dtype, value.shape) for name, value in constants.items()}

    def make() -> dict[str, np.ndarray]:
        return {named(suffix): value for suffix, value in _tensors(layout, read()).items()} | constants

    return Piece(specs, make)


def _tensors(layout: Layout, q: QTensor) -> dict[str, np.ndarray]:
    """The tensors of a weight in a layout."""
    if isinstance(q.scale, QTensor) and not layout.nested(q):
        # Outside jit, in which XLA would fuse the product and the sum of nested scales into one rounding.
        q = q.replace(scale=scale_values(q.scale))
    return layout.tensors(jax.tree.map(to_host, q))


@functools.lru_cache(maxsize=256)
def _specs(layout: Layout, structure: TreeDef, leaves: tuple[TensorSpec, ...]) -> dict[str, TensorSpec]:
    """The specs of a weight's tensors in a layout, from a trial on zeros, cached for weights of equal structure."""
    zeros = jax.tree.unflatten(structure, [np.zeros(spec.shape, spec.dtype) for spec in leaves])
    return {suffix: TensorSpec(value.dtype, value.shape) for suffix, value in _tensors(layout, zeros).items()}


def _checked(name: str, leaf: Leaf, function: str) -> TensorSpec:
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or np.dtype(dtype) not in DTYPES.values():
        todo = "Pass NumPy or JAX arrays and QTensors"
        raise quant_error(function, "not an array that safetensors holds", todo=todo, path=name, leaf=leaf)
    return TensorSpec(np.dtype(dtype), tuple(leaf.shape))


def export_config(
    layout: Layout, weights: Mapping[str, QTensor], floats: Sequence[str], config: Mapping[str, Json]
) -> dict[str, bytes]:
    """``config.json`` and the layout's further JSON files, from the model's own config."""
    quantization = layout.config(weights, floats)
    rest = {key: value for key, value in config.items() if key != "quantization"}  # MLX's entry for the source model
    files = {"config.json": {**rest, **dict.fromkeys(layout.keys, quantization)}, **layout.files(quantization)}
    return {name: json_bytes(content) for name, content in files.items()}
