"""One quantized weight of a checkpoint: its tensors by suffix, checked as they are taken.

Readers ask for tensors by what they are called beside ``<module>.weight``. A parameter without a module of its own (the
fused experts of a layer) has other names for the same things: the table of a format, one `Naming` per row, says which.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxquant.core.errors import QuantError
from jaxquant.io.hf.checkpoint import HFCheckpoint
from jaxquant.io.hf.to_qtensor import aligned

__all__ = ["RANKS", "Format", "Module", "Naming"]

#: Dimensions that a weight may have: linear layers, stacked experts, convolutions.
RANKS = (2, 3, 4, 5)


@dataclasses.dataclass(frozen=True)
class Naming:
    """A row of a format's table: what the tensors of one weight are called.

    Attributes:
      weight: what follows the prefix in the name of the weight: ``".weight"``, or nothing for a parameter.
      marks: endings that make what comes before them the prefix of a quantized weight.
      words: endings that do so only beside codes, because other parameters are called so, too.
      tensors: what readers ask for -> ending of its name. What is not listed is called as it is asked for.
      keeps: endings of tensors that stay beside the weight as they are, with what describes activations.
    """

    weight: str = ".weight"
    marks: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    tensors: Mapping[str, str] = dataclasses.field(default_factory=dict)
    keeps: tuple[str, ...] = (".bias",)

    def claims(self, name: str, checkpoint: HFCheckpoint) -> str | None:
        """The prefix of the weight that this tensor makes a quantized one; None if it does not."""
        for mark in self.marks:
            if name.endswith(mark):
                return name[: -len(mark)]
        for word in self.words:
            prefix = name[: -len(word)]
            codes = checkpoint.tensors.get(prefix + self.tensors.get(".weight", self.weight))
            if name.endswith(word) and codes is not None and len(codes.shape) > 1:
                return prefix
        return None


class Module:
    """The tensors of one weight.

    Attributes:
      prefix: what their names begin with (``"model.layers.0.mlp.up_proj"``).
      naming: what follows it.
      config: the quantization configuration, as far as it concerns the module.
      used: the names that have been taken; whatever belongs to the module and is not among them at the end is an error.
      notes: what is worth saying about it.
      problems: what is wrong with it and was put right.
    """

    def __init__(
        self,
        checkpoint: HFCheckpoint,
        prefix: str,
        naming: Naming,
        config: dict[str, Any],
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ):
        self.checkpoint, self.prefix, self.naming, self.config = checkpoint, prefix, naming, config
        self.shape_given = (shapes or {}).get(prefix)
        self.used: set[str] = set()
        self.notes: list[str] = []
        self.problems: list[str] = []

    @property
    def name(self) -> str:
        """The name of the weight."""
        return self.prefix + self.naming.weight

    @property
    def is_parameter(self) -> bool:
        """Whether it is a parameter without a module of its own: its axes may be [.., in, out]."""
        return not self.naming.weight

    def named(self, suffix: str) -> str:
        """The name of a tensor."""
        return self.prefix + self.naming.tensors.get(suffix, suffix)

    @property
    def dtype(self) -> np.dtype:
        """The model's dtype; bfloat16 if the configuration says nothing."""
        return self.checkpoint.dtype or np.dtype(ml_dtypes.bfloat16)

    def has(self, suffix: str) -> bool:
        """Whether there is such a tensor."""
        return self.named(suffix) in self.checkpoint.tensors

    def array(self, suffix: str, *dtypes: Any, ndim: int | tuple[int, ...] | None = None) -> np.ndarray:
        """A tensor of one of these dtypes (any, if none is given) and of one of these ranks; never an empty one."""
        name = self.named(suffix)
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

    def unit(self, suffix: str, *dtypes: Any, stack: tuple[int, ...] = ()) -> np.ndarray:
        """The one scale of a whole weight, or one of each in a stack, of shape [.., 1, 1]: finite and positive."""
        value = self.scales(suffix, *(dtypes or (np.float32,)))
        full = aligned(value, (*stack, 1, 1))
        fits = full is not None and all(n in (1, size) for n, size in zip(full.shape, (*stack, 1, 1), strict=True))
        if full is None or not fits or not (full.astype(np.float32) > 0).all():
            rule = f"there must be one positive scale for the whole weight{', or for each expert' if stack else ''}"
            raise self.error(rule, suffix, todo="The checkpoint is damaged: fetch it again", found=value)
        return full

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
        self.used.update(self.named(s) for s in suffixes if self.has(s))

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
        return self.checkpoint.error(rule, self.name if suffix is None else self.named(suffix), todo=todo, **got)


@dataclasses.dataclass(frozen=True)
class Format:
    """A family of checkpoints, and its reader.

    Attributes:
      name: for messages and tables.
      methods: values of ``quant_method`` that mean it.
      names: what the tensors of a weight may be called; the first row that claims a tensor counts.
      read: the leaf of one module: a QTensor of NumPy arrays, or a NumPy array.
      layouts: what it reads, for the table of supported formats.
      parts: endings of tensors that belong to the weight although a "." is inside of them.
      zero_is_off: whether an activation scale of 0 means that the activation is not quantized.
      find: the prefix of every quantized weight, where names alone do not tell.
      refuse: looks at the configuration and raises for what is not supported; given the checkpoint's ``error``.
      stated: the configuration of one module, by its prefix, where modules may differ; None if it says that the module
        stays in float.
      activation: how what meets a module's weight is quantized, a `schemes.Activation`; None: it stays in float.
    """

    name: str
    methods: tuple[str, ...]
    names: tuple[Naming, ...]
    read: Callable[[Module], Any]
    layouts: str
    parts: tuple[str, ...] = ()
    zero_is_off: bool = False
    find: Callable[[HFCheckpoint], Iterable[str]] | None = None
    refuse: Callable[[dict[str, Any], Callable[..., QuantError]], None] | None = None
    stated: Callable[[HFCheckpoint, dict[str, Any], str], dict[str, Any] | None] | None = None
    activation: Callable[[Module], Any] | None = None

    def module(
        self,
        checkpoint: HFCheckpoint,
        prefix: str,
        naming: Naming,
        config: dict[str, Any],
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> Module:
        """A module with its own configuration. Its tensors decide whether it is quantized, whatever that says."""
        own = config if self.stated is None else self.stated(checkpoint, config, prefix)
        module = Module(checkpoint, prefix, naming, config if own is None else own, shapes)
        if own is None:
            module.problems.append(f"{module.name} has codes, though the configuration leaves it in float")
        return module

    def modules(self, checkpoint: HFCheckpoint) -> dict[str, Naming]:
        """The prefix of every quantized weight, and what its tensors are called."""
        if self.find is not None:
            return dict.fromkeys(self.find(checkpoint), self.names[0])
        found: dict[str, Naming] = {}
        for name in checkpoint.tensors:
            for naming in self.names:
                if (prefix := naming.claims(name, checkpoint)) is not None:
                    found.setdefault(prefix, naming)
                    break
        return found
