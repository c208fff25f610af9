"""The leaves of a Hugging Face directory, each read on access."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from jaxquant.core.errors import QuantError
from jaxquant.core.paths import nearest
from jaxquant.core.qtensor import QTensor
from jaxquant.io.hf import activations
from jaxquant.io.hf.activations import describes_activations
from jaxquant.io.hf.checkpoint import HFCheckpoint
from jaxquant.io.hf.module import Format, Module
from jaxquant.io.hf.schemes import Activation, CacheScales, cache_scales, refused
from jaxquant.io.hf.unclaimed import check_unclaimed, weights_of
from jaxquant.io.manifest import check_qtensor, check_values
from jaxquant.io.mapped import Leaves
from jaxquant.io.strict_json import Json

__all__ = ["HFLeaves"]

_DAMAGED = "The checkpoint is damaged: fetch it again"


class HFLeaves(Leaves):
    """The leaves of a directory: quantized weights first.

    Args:
      checkpoint: the directory.
      form: the format of its quantized modules, or None.
      config: their configuration.
      dtype: float dtype of arrays, and of the values of QTensors; None: the checkpoint's. Tensors that describe
        activations keep their own.
      shapes: (out, in) of modules whose file does not state it.

    Attributes:
      modules: name of each quantized weight -> its tensors.
      config: the quantization configuration.
      plain: names of the tensors that belong to no quantized weight, in order.
      activations: names of plain tensors that describe activations.
      described: name of each quantized weight that was read -> its description.

    Raises:
      QuantError: if a tensor that describes activations is not finite, or a scale not positive; if codes belong to no
        quantized weight; on reading a leaf, if it is damaged; on reading the last leaf, if no reader has used a tensor
        of a quantized weight.
    """

    def __init__(
        self,
        checkpoint: HFCheckpoint,
        form: Format | None,
        config: dict[str, Json],
        *,
        dtype: np.dtype | None = None,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ):
        self.checkpoint, self.form, self.config, self._dtype = checkpoint, form, config, dtype
        found = {} if form is None else form.modules(checkpoint)
        modules = [] if form is None else [form.module(checkpoint, p, n, config, shapes) for p, n in found.items()]
        unknown = sorted(set(shapes or ()) - set(found))
        if unknown:
            todo = f"Nearest modules: {nearest(unknown[0], found)}"
            raise checkpoint.error("shapes names a module that is not quantized", unknown[0], todo=todo)
        self.modules = {module.name: module for module in modules}
        self.plain = dict.fromkeys(self._plain_names())
        self.activations = dict.fromkeys(n for n in self.plain if form and describes_activations(n))
        activations.check(checkpoint, self.activations, zero=form is not None and form.zero_is_off)
        check_unclaimed(checkpoint, form, [name for name in self.plain if name not in self.activations])
        self.described: dict[str, str] = {}
        super().__init__([*self.modules, *self.plain], [file.path for file in checkpoint.files.values()])

    def acts(self, *, inputs: bool = False) -> dict[str, Activation]:
        """The quantization of the activations of each quantized weight for which the checkpoint states it.

        Args:
          inputs: leave out how outputs are rounded, which cannot be run.

        Raises:
          QuantError: for a scheme that cannot be run, naming its key.
        """
        found = {}
        for name, module in self.modules.items():
            bits = module.config.get("act_bits")  # of AutoRound, in every layout of the weights
            if isinstance(bits, int) and bits < 16:
                raise refused(module, "act_bits", bits)
            one = None if self.form is None or self.form.activation is None else self.form.activation(module)
            if one is not None and one.outputs is not None and not inputs:
                raise one.outputs
            if one is not None:
                found[name] = one
        return found

    def cache(self) -> CacheScales | None:
        """The storage of keys and values, if the checkpoint states it; raises for schemes that cannot be run."""
        return None if self.form is None else cache_scales(self.checkpoint, self.config, self.activations)

    def runs_otherwise(self) -> bool:
        """Whether the checkpoint quantizes more than weights, so that the weights alone give other results."""
        try:
            return any(one.spec is not None for one in self.acts().values()) or self.cache() is not None
        except QuantError:
            return True

    @property
    def problems(self) -> tuple[str, ...]:
        """Faults of the weights read so far that were corrected."""
        return tuple(dict.fromkeys(p for module in self.modules.values() for p in module.problems))

    def __getitem__(self, name: str) -> QTensor | np.ndarray:
        self.checkpoint.forget()  # pages of the leaf before
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

    def _read(self, module: Module) -> QTensor | np.ndarray:
        """The leaf of a module, of NumPy arrays."""
        assert self.form is not None
        with np.errstate(all="ignore"):  # overflow is detected below
            leaf = self.form.read(module)
        if isinstance(leaf, QTensor):
            for q in (leaf, leaf.scale, leaf.offset):
                if isinstance(q, QTensor):
                    check_qtensor(q, module.error)
            check_values(leaf, module.error, todo=_DAMAGED)
            return leaf if self._dtype is None else leaf.replace(dtype=self._dtype)
        if _is_float(leaf) and not np.isfinite(leaf.astype(np.float32)).all():
            raise module.error("a weight must be finite", todo=_DAMAGED, shape=leaf.shape)
        return leaf if self._dtype is None else leaf.astype(self._dtype)

    def _plain_names(self) -> list[str]:
        """Names of tensors that belong to no quantized weight, or stay beside it."""
        owners = {module.prefix: module for module in self.modules.values()}
        beside = {module.prefix + ending for module in owners.values() for ending in module.naming.keeps}

        def owned(name: str) -> bool:
            if name in beside or (name not in self.modules and describes_activations(name)):
                return False
            return name in self.modules or self._owned(name, owners)

        return [name for name in self.checkpoint.tensors if not owned(name)]

    def _owned(self, name: str, owners: Mapping[str, Module]) -> bool:
        """Whether a tensor belongs to one of the quantized weights, by its name."""
        if self.form is not None and self.form.find is not None:  # torchao: P._weight_PART
            owner, _, last = name.rpartition(".")
            return any(f"{owner}._{o.rpartition('.')[2]}_" in f"{owner}.{last}" for o in owners)
        parts = () if self.form is None else self.form.parts
        head = name
        while head:
            head = head.rpartition(".")[0]
            if head in owners:
                rest = name[len(head) :]
                below = owners[head].is_parameter or rest.count(".") == 1
                return below or rest.startswith(".weight.") or rest in parts
        heads = (*weights_of(name), name.rpartition("_")[0])
        return any(head in owners and owners[head].is_parameter for head in heads)

    def _check_rest(self) -> None:
        """Raises for tensors of quantized weights that no reader has used."""
        used = {name for module in self.modules.values() for name in module.used}
        for name in self.checkpoint.tensors:
            if name not in used and name not in self.plain:
                todo = "Check the format; a reader that ignored it could be wrong about the weight"
                raise self.checkpoint.error("an unknown tensor beside a quantized weight", name, todo=todo)


def _is_float(array: np.ndarray) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)
