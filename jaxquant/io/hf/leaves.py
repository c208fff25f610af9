"""The leaves of a Hugging Face directory, each read when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxquant.core.qtensor import QTensor
from jaxquant.io.hf import activations
from jaxquant.io.hf.checkpoint import HFCheckpoint
from jaxquant.io.hf.module import Format, Module
from jaxquant.io.manifest import check_qtensor
from jaxquant.io.mapped import Leaves
from jaxquant.transform.paths import nearest

__all__ = ["HFLeaves"]

_CODES = tuple(
    np.dtype(d) for d in (np.int8, np.uint8, np.uint32, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.int32)
)


class HFLeaves(Leaves):
    """The leaves of a directory: quantized weights first.

    Args:
      checkpoint: the directory.
      form: the format of its quantized modules, or None.
      config: their configuration.
      dtype: float dtype for arrays and for what QTensors dequantize to; None for that of the checkpoint. What describes
        activations keeps its own.
      shapes: (out, in) of modules whose file does not say it.

    Attributes:
      modules: name of each quantized weight -> its tensors.
      plain: names of the tensors that are part of no quantized weight, in order.
      activations: those of them that describe activations.
      described: what each quantized weight that was read is.

    Raises:
      QuantError: if what describes activations is not finite, or a scale not positive.
      QuantError: on reading a leaf: if it is damaged; tensors that no reader takes are found when the last quantized
        weight was read.
    """

    def __init__(
        self,
        checkpoint: HFCheckpoint,
        form: Format | None,
        config: dict[str, Any],
        *,
        dtype: np.dtype | None = None,
        shapes: Mapping[str, tuple[int, int]] | None = None,
    ):
        self.checkpoint, self.form, self._dtype = checkpoint, form, dtype
        found = {} if form is None else form.modules(checkpoint)
        modules = [] if form is None else [form.module(checkpoint, p, t, config, shapes) for p, t in found.items()]
        unknown = sorted(set(shapes or ()) - set(found))
        if unknown:
            todo = f"Nearest modules: {nearest(unknown[0], found)}"
            raise checkpoint.error("shapes names a module that is not quantized", unknown[0], todo=todo)
        self.modules = {module.name: module for module in modules}
        self.plain = dict.fromkeys(self._plain_names())
        self.activations = dict.fromkeys(n for n in self.plain if form and activations.describes_activations(n))
        activations.check(checkpoint, self.activations, zero=form is not None and form.zero_is_off)
        self.described: dict[str, str] = {}
        super().__init__([*self.modules, *self.plain], [file.path for file in checkpoint.files.values()])
        if not modules:
            self._check_rest()

    @property
    def problems(self) -> tuple[str, ...]:
        """What was wrong with the weights that were read, and was put right."""
        return tuple(dict.fromkeys(p for module in self.modules.values() for p in module.problems))

    def __getitem__(self, name: str) -> Any:
        self.checkpoint.forget()  # what came before
        if name not in self.modules:
            array = self.checkpoint.array(name)
            as_it_is = self._dtype is None or not _is_float(array) or name in self.activations
            return array if as_it_is else array.astype(self._dtype)
        module = self.modules[name]
        leaf = self._read(module)
        if name not in self.described:
            what = repr(leaf) if isinstance(leaf, QTensor) else f"{leaf.dtype.name}{list(leaf.shape)}"
            self.described[name] = "; ".join([what, *module.notes])
            if len(self.described) == len(self.modules):
                self._check_rest()
        return leaf

    def _read(self, module: Module) -> Any:
        """The leaf of a module, of NumPy arrays."""
        assert self.form is not None
        with np.errstate(all="ignore"):  # what overflows is found below
            leaf = self.form.read(module)
        if isinstance(leaf, QTensor):
            for q in (leaf, leaf.scale, leaf.offset):
                if isinstance(q, QTensor):
                    check_qtensor(q, module.error)
            codes = leaf.codes
            if _is_float(codes) and (bad := int((~np.isfinite(codes.astype(np.float16))).sum())):
                todo = "The checkpoint is damaged: fetch it again"
                raise module.error("the codes of a weight must be finite", todo=todo, bad=bad)
        floats = [leaf.scale, leaf.zero_point, leaf.offset] if isinstance(leaf, QTensor) else [leaf]
        for value in jax.tree.leaves(floats):
            if _is_float(value) and not np.isfinite(value.astype(np.float32)).all():
                todo = "The checkpoint is damaged: fetch it again"
                raise module.error("scales and what comes of them must be finite", todo=todo, shape=value.shape)
        if isinstance(leaf, QTensor):
            return leaf if self._dtype is None else leaf.replace(dtype=self._dtype)
        return leaf if self._dtype is None else leaf.astype(self._dtype)

    def _plain_names(self) -> list[str]:
        """Tensors that are part of no quantized module, or stay beside its weight."""
        keeps = () if self.form is None else (".bias", *self.form.keeps)
        owners = {module.prefix for module in self.modules.values()}

        def owned(name: str) -> bool:
            if any(name.endswith(k) and name.removesuffix(k) in owners for k in keeps):
                return False
            if name not in self.modules and activations.describes_activations(name):
                return False
            return name in self.modules or self._owner(name, owners) is not None

        return [name for name in self.checkpoint.tensors if not owned(name)]

    def _owner(self, name: str, owners: set[str]) -> str | None:
        """The quantized module that a tensor belongs to, by its name."""
        if self.form is not None and self.form.find is not None:  # torchao: P._weight_PART
            owner, _, last = name.rpartition(".")
            return next((o for o in owners if f"{owner}._{o.rpartition('.')[2]}_" in f"{owner}.{last}"), None)
        head = name
        while head:
            head = head.rpartition(".")[0]
            if head in owners:
                rest = name[len(head) :]
                parts = () if self.form is None else self.form.parts
                return head if rest.count(".") == 1 or rest.startswith(".weight.") or rest in parts else None
        return next((o for o in (name.rpartition("_")[0], name.rpartition("_scale_inv")[0]) if o in owners), None)

    def _check_rest(self) -> None:
        """Raises for tensors that no reader has asked for."""
        used = {name for module in self.modules.values() for name in module.used}
        for name in self.checkpoint.tensors:
            if name not in used and name not in self.plain:
                todo = "Check the format; a reader that ignored it could be wrong about the weight"
                raise self.checkpoint.error("an unknown tensor beside a quantized weight", name, todo=todo)
        for name in self.plain:
            spec = self.checkpoint.tensors[name]
            if name.endswith("weight") and spec.dtype in _CODES and name not in used:
                rule = "codes without scales" if self.form else "codes, and no configuration that says of which format"
                todo = "Fetch all files of the checkpoint again"
                raise self.checkpoint.error(rule, name, todo=todo, dtype=spec.dtype.name)


def _is_float(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)
