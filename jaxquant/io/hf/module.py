"""One quantized weight of a checkpoint: its tensors by suffix, checked as they are taken.

Readers ask for tensors by their suffixes beside ``<module>.weight``. A parameter without its own module (the fused
experts of a layer) has other names for the same tensors: a format's table, one `Naming` per row, lists them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from jaxquant.core.errors import QuantError
from jaxquant.core.qtensor import QTensor
from jaxquant.io.hf.checkpoint import HFCheckpoint
from jaxquant.io.hf.to_qtensor import aligned
from jaxquant.io.strict_json import Json

__all__ = ["RANKS", "Format", "Module", "Naming"]

#: Ranks of weights: linear layers, stacked experts, convolutions.
RANKS = (2, 3, 4, 5)


@dataclasses.dataclass(frozen=True)
class Naming:
    """A row of a format's table: the names of the tensors of one weight.

    Attributes:
      weight: the suffix of the weight's name after its prefix: ``".weight"``, or "" for a parameter.
      marks: endings of names that mark a quantized weight; the rest of the name is its prefix.
      words: endings that mark a weight only beside codes, because other parameters have them too.
      tensors: suffix that readers ask for -> ending of the tensor's name. By default the two are equal.
      keeps: endings of tensors that stay unchanged beside the weight, like tensors that describe activations.
    """

    weight: str = ".weight"
    marks: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    tensors: Mapping[str, str] = dataclasses.field(default_factory=dict)
    keeps: tuple[str, ...] = (".bias",)

    def claims(self, name: str, checkpoint: HFCheckpoint) -> str | None:
        """The prefix of the weight that this tensor marks as quantized; None if it marks none."""
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
      prefix: the beginning of their names (``"model.layers.0.mlp.up_proj"``).
      naming: the endings of their names.
      config: the part of the quantization configuration that concerns the module.
      used: the names of tensors that were read; tensors of the module that are not read are an error.
      notes: remarks for the user.
      problems: faults that were corrected.
    """

    def __init__(
        self,
        checkpoint: HFCheckpoint,
        prefix: str,
        naming: Naming,
        config: dict[str, Json],
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
        """Whether it is a parameter without its own module, whose axes may be [.., in, out]."""
        return not self.naming.weight

    def named(self, suffix: str) -> str:
        """The name of a tensor."""
        return self.prefix + self.naming.tensors.get(suffix, suffix)

    @property
    def dtype(self) -> np.dtype:
        """The model's dtype; bfloat16 if the configuration does not state it."""
        return self.checkpoint.dtype or np.dtype(ml_dtypes.bfloat16)

    def has(self, suffix: str) -> bool:
        """Whether the tensor exists."""
        return self.named(suffix) in self.checkpoint.tensors

    def array(self, suffix: str, *dtypes: DTypeLike, ndim: int | tuple[int, ...] | None = None) -> np.ndarray:
        """A nonempty tensor of one of these dtypes (by default any) and of one of these ranks."""
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

    def maybe(self, suffix: str, *dtypes: DTypeLike, ndim: int | tuple[int, ...] | None = None) -> np.ndarray | None:
        """The tensor as by `array`, or None if it does not exist."""
        return self.array(suffix, *dtypes, ndim=ndim) if self.has(suffix) else None

    def scales(self, suffix: str, *dtypes: DTypeLike, ndim: int | tuple[int, ...] | None = None) -> np.ndarray:
        """A tensor of finite floats."""
        value = self.array(suffix, *(dtypes or (np.float16, ml_dtypes.bfloat16, np.float32)), ndim=ndim)
        if not np.isfinite(value.astype(np.float32)).all():
            bad = int((~np.isfinite(value.astype(np.float32))).sum())
            raise self.error("scales must be finite", suffix, todo="The checkpoint is damaged: fetch it again", bad=bad)
        return value

    def magnitudes(self, suffix: str, *dtypes: DTypeLike, ndim: int | tuple[int, ...] | None = None) -> np.ndarray:
        """A tensor of scales that come from largest magnitudes: finite and not negative."""
        value = self.scales(suffix, *dtypes, ndim=ndim)
        if (bad := int((value < 0).sum())) > 0:
            todo = "The checkpoint is damaged: fetch it again"
            raise self.error("scales of this format are not negative", suffix, todo=todo, bad=bad)
        return value

    def unit(self, suffix: str, *dtypes: DTypeLike, stack: tuple[int, ...] = ()) -> np.ndarray:
        """The scale of a whole weight, or of each weight in a stack, of shape [.., 1, 1]: finite and positive."""
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
        """Marks tensors as used whose content is known already."""
        self.used.update(self.named(s) for s in suffixes if self.has(s))

    def check(self, suffix: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        """Raises unless a tensor has the shape that the other tensors imply."""
        if tuple(found) != tuple(wanted):
            rule = f"the tensor must have the shape {list(wanted)}, by the other tensors of its module"
            raise self.error(rule, suffix, todo="Check the format and its configuration", shape=tuple(found))

    def by_shapes(self, what: str, stated: object) -> None:
        """Notes that a parameter comes from the shapes; a problem if the configuration states another value."""
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
      methods: values of ``quant_method`` for this format.
      names: the names that the tensors of a weight may have; the first row that claims a tensor counts.
      read: the leaf of one module: a QTensor of NumPy arrays, or a NumPy array.
      layouts: the layouts that it reads, for the table of supported formats.
      parts: endings of tensors that belong to the weight although they contain a ".".
      zero_is_off: whether an activation scale of 0 means that the activation is not quantized.
      find: the prefix of every quantized weight, if names alone do not determine it.
      refuse: raises, by the checkpoint's ``error``, if the configuration requires an unsupported layout.
      stated: the configuration of one module, by its prefix, if modules may differ; None if it states that the module
        stays in float.
      activation: how what meets a module's weight is quantized, a `schemes.Activation`; None: it stays in float.
    """

    name: str
    methods: tuple[str, ...]
    names: tuple[Naming, ...]
    read: Callable[[Module], QTensor | np.ndarray]
    layouts: str
    parts: tuple[str, ...] = ()
    zero_is_off: bool = False
    find: Callable[[HFCheckpoint], Iterable[str]] | None = None
    refuse: Callable[[dict[str, Json], Callable[..., QuantError]], None] | None = None
    stated: Callable[[HFCheckpoint, dict[str, Json], str], dict[str, Json] | None] | None = None
    activation: Callable[[Module], Any] | None = None

    def module(
        self,
        checkpoint: HFCheckpoint,
        prefix: str,
        naming: Naming,
        config: dict[str, Json],
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> Module:
        """A module with its own configuration. Its tensors, not the configuration, decide whether it is quantized."""
        own = config if self.stated is None else self.stated(checkpoint, config, prefix)
        module = Module(checkpoint, prefix, naming, config if own is None else own, shapes)
        if own is None:
            module.problems.append(f"{module.name} has codes, though the configuration leaves it in float")
        return module

    def modules(self, checkpoint: HFCheckpoint) -> dict[str, Naming]:
        """The prefix of every quantized weight, and the names of its tensors."""
        if self.find is not None:
            return dict.fromkeys(self.find(checkpoint), self.names[0])
        found: dict[str, Naming] = {}
        for name in checkpoint.tensors:
            for naming in self.names:
                if (prefix := naming.claims(name, checkpoint)) is not None:
                    found.setdefault(prefix, naming)
                    break
        return found
