"""One quantized module of a checkpoint: its tensors by suffix, checked as they are taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxquant.core.errors import QuantError
from jaxquant.io.hf.checkpoint import HFCheckpoint

__all__ = ["Format", "Module"]


class Module:
    """The tensors under one prefix.

    Attributes:
      prefix: what their names begin with (``"model.layers.0.mlp.up_proj"``).
      target: what follows it in the name of the weight: ``".weight"``, or nothing.
      config: the quantization configuration, as far as it concerns the module.
      used: the names that have been taken; whatever belongs to the module and is not among them at the end is an error.
      notes: what is worth saying about it.
      problems: what is wrong with it and was put right.
    """

    def __init__(
        self,
        checkpoint: HFCheckpoint,
        prefix: str,
        target: str,
        config: dict[str, Any],
        shapes: Mapping[str, tuple[int, int]] | None = None,
    ):
        self.checkpoint, self.prefix, self.target, self.config = checkpoint, prefix, target, config
        self.shape_given = (shapes or {}).get(prefix)
        self.used: set[str] = set()
        self.notes: list[str] = []
        self.problems: list[str] = []

    @property
    def name(self) -> str:
        """The name of the weight."""
        return self.prefix + self.target

    @property
    def dtype(self) -> np.dtype:
        """The model's dtype; bfloat16 if the configuration says nothing."""
        return self.checkpoint.dtype or np.dtype(ml_dtypes.bfloat16)

    def has(self, suffix: str) -> bool:
        """Whether there is such a tensor."""
        return self.prefix + suffix in self.checkpoint.tensors

    def array(self, suffix: str, *dtypes: Any, ndim: int | tuple[int, ...] | None = None) -> np.ndarray:
        """A tensor of one of these dtypes (any, if none is given) and of one of these ranks; never an empty one."""
        name = self.prefix + suffix
        if name not in self.checkpoint.tensors:
            rule = "a tensor of a quantized module is missing"
            raise self.error(rule, suffix, todo="Fetch all files of the checkpoint again")
        spec = self.checkpoint.tensors[name]
        if dtypes and spec.dtype not in [np.dtype(d) for d in dtypes]:
            wanted = " or ".join(np.dtype(d).name for d in dtypes)
            raise self.error(f"the dtype must be {wanted}", suffix, todo="Check the format", dtype=spec.dtype.name)
        ndims = (ndim,) if isinstance(ndim, int) else ndim
        if ndims is not None and len(spec.shape) not in ndims:
            rule = f"the tensor must have {' or '.join(map(str, ndims))} dimensions"
            raise self.error(rule, suffix, todo="Check the format", shape=spec.shape)
        if 0 in spec.shape:
            rule = "a tensor of a quantized module has elements"
            raise self.error(rule, suffix, todo="The checkpoint is damaged: fetch it again", shape=spec.shape)
        self.used.add(name)
        return self.checkpoint.array(name)

    def maybe(self, suffix: str, *dtypes: Any, ndim: int | tuple[int, ...] | None = None) -> np.ndarray | None:
        """The same, or None if there is no such tensor."""
        return self.array(suffix, *dtypes, ndim=ndim) if self.has(suffix) else None

    def scales(self, suffix: str, *dtypes: Any, ndim: int | tuple[int, ...] | None = None) -> np.ndarray:
        """A tensor of finite floats."""
        value = self.array(suffix, *(dtypes or (np.float16, ml_dtypes.bfloat16, np.float32)), ndim=ndim)
        if not np.isfinite(value.astype(np.float32)).all():
            bad = int((~np.isfinite(value.astype(np.float32))).sum())
            raise self.error("scales must be finite", suffix, todo="The checkpoint is damaged: fetch it again", bad=bad)
        return value

    def magnitudes(self, suffix: str, *dtypes: Any, ndim: int | tuple[int, ...] | None = None) -> np.ndarray:
        """A tensor of scales that come from largest magnitudes: finite and not negative."""
        value = self.scales(suffix, *dtypes, ndim=ndim)
        if (bad := int((value < 0).sum())) > 0:
            todo = "The checkpoint is damaged: fetch it again"
            raise self.error("scales of this format are not negative", suffix, todo=todo, bad=bad)
        return value

    def unit(self, suffix: str, *dtypes: Any) -> np.ndarray:
        """The one scale of a whole weight, of shape [1, 1]: finite and positive."""
        value = self.scales(suffix, *(dtypes or (np.float32,)))
        if value.size != 1 or not value.astype(np.float32).reshape(-1)[0] > 0:
            rule = "there must be one positive scale for the whole weight"
            raise self.error(rule, suffix, todo="The checkpoint is damaged: fetch it again", found=value)
        return value.reshape(1, 1)

    def exponents(self, suffix: str, ndim: int | tuple[int, ...] | None = None) -> np.ndarray:
        """A tensor of powers of two, stored as biased exponents in a byte."""
        value = self.array(suffix, np.uint8, ml_dtypes.float8_e8m0fnu, ndim=ndim).view(ml_dtypes.float8_e8m0fnu)
        if (value.view(np.uint8) == 255).any():
            raise self.error(
                "scales must be finite", suffix, todo="The checkpoint is damaged: fetch it again", code=255
            )
        return value

    def skip(self, *suffixes: str) -> None:
        """Tensors that say nothing that is not known."""
        self.used.update(self.prefix + s for s in suffixes if self.has(s))

    def check(self, suffix: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        """Raises unless a tensor has the shape that the others imply."""
        if tuple(found) != tuple(wanted):
            rule = f"the tensor must have the shape {list(wanted)}, by the other tensors of its module"
            raise self.error(rule, suffix, todo="Check the format and its configuration", shape=tuple(found))

    def by_shapes(self, what: str, stated: Any) -> None:
        """Says that a parameter comes from the shapes: a problem where the configuration states another one."""
        if stated is None:
            self.notes.append(f"{what}, by its shapes")
        else:
            self.problems.append(f"{self.name} has {what} by its shapes, though the configuration says {stated}")

    def error(self, rule: str, suffix: str | None = None, /, *, todo: str, **got: Any) -> QuantError:
        """A `QuantError` that names the file and the tensor (by default the weight)."""
        return self.checkpoint.error(rule, self.prefix + (self.target if suffix is None else suffix), todo=todo, **got)


@dataclasses.dataclass(frozen=True)
class Format:
    """A family of checkpoints, and its reader.

    Attributes:
      name: for messages and tables.
      methods: values of ``quant_method`` that mean it.
      marks: ending of a tensor's name that makes its module a quantized one -> what the weight is called after the
        module's prefix. The first that fits counts.
      read: the leaf of one module: a QTensor of NumPy arrays, or a NumPy array.
      layouts: what it reads, for the table of supported formats.
      parts: endings of tensors that belong to the weight although a "." is inside of them.
      keeps: endings of tensors that stay beside the weight as they are, with biases and what describes activations.
      zero_is_off: whether an activation scale of 0 means that the activation is not quantized.
      find: the (prefix, target) of every quantized module, where names alone do not tell.
      refuse: looks at the configuration and raises for what is not supported; given the checkpoint's ``error``.
      stated: the configuration of one module, by its prefix, where modules may differ; None if it says that the module
        stays in float.
    """

    name: str
    methods: tuple[str, ...]
    marks: Mapping[str, str]
    read: Callable[[Module], Any]
    layouts: str
    parts: tuple[str, ...] = ()
    keeps: tuple[str, ...] = ()
    zero_is_off: bool = False
    find: Callable[[HFCheckpoint], dict[str, str]] | None = None
    refuse: Callable[[dict[str, Any], Callable[..., QuantError]], None] | None = None
    stated: Callable[[HFCheckpoint, dict[str, Any], str], dict[str, Any] | None] | None = None

    def module(
        self,
        checkpoint: HFCheckpoint,
        prefix: str,
        target: str,
        config: dict[str, Any],
        shapes: Mapping[str, tuple[int, int]] | None = None,
    ) -> Module:
        """A module with its own configuration. Its tensors decide whether it is quantized, whatever that says."""
        own = config if self.stated is None else self.stated(checkpoint, config, prefix)
        module = Module(checkpoint, prefix, target, config if own is None else own, shapes)
        if own is None:
            module.problems.append(f"{module.name} has codes, though the configuration leaves it in float")
        return module

    def modules(self, checkpoint: HFCheckpoint) -> dict[str, str]:
        """The prefix of every quantized module, and what its weight is called after that."""
        if self.find is not None:
            return self.find(checkpoint)
        found: dict[str, str] = {}
        for name in checkpoint.tensors:
            for mark, target in self.marks.items():
                if name.endswith(mark):
                    found.setdefault(name[: -len(mark)], target)
                    break
        return found
