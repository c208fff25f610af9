"""The static properties of a weight with a scale per group: a kernel knows these before it runs."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from jaxquant.ops.kernels.tpu.decode import BLOCK, RUN, Decoder

__all__ = ["Groups"]


@dataclasses.dataclass(frozen=True)
class Groups:
    """The static properties of a weight that a kernel depends on.

    Attributes:
      size: elements of a group.
      decoder: decodes codes to numbers.
      scale_form: the dtype of scales; 8-bit floats are given as their patterns.
      integers: whether the chip's matrix unit multiplies integers; else they are multiplied as bfloat16.
    """

    size: int
    decoder: Decoder
    scale_form: str = "float32"
    integers: bool = True

    @property
    def in_block(self) -> int:
        """Groups in a block; 1 if a group is a block or longer."""
        return max(BLOCK // self.size, 1)

    @property
    def multiplies_integers(self) -> bool:
        """Whether codes are multiplied as integers."""
        return self.integers and self.decoder.kind == "integers"

    @property
    def scales_tables(self) -> bool:
        """Whether `Values` scales tables, and not what it reads from them: with fewer operations, and rounded once."""
        return self.decoder.kind == "table" and self.decoder.bytewise and self.size % RUN == 0

    @property
    def scales_exactly(self) -> bool:
        """Whether values are exact in bfloat16, so that chips that multiply it scale two in one operation."""
        fractions = {"float8_e8m0fnu": 1, "float8_e4m3fn": 8}.get(self.scale_form, 0)
        if self.decoder.kind == "floats8":
            return self.decoder.bytewise and fractions == 1
        products = np.outer(self.decoder.table, 1 + np.arange(fractions) / 8).astype(np.float32)
        exact = (products.astype(jnp.bfloat16).astype(np.float32) == products).all()
        return bool(self.decoder.bytewise and fractions and exact)

    def in_bytes(self) -> Groups | None:
        """The same, decoded by operations on bytes; None for integers."""
        if self.decoder.kind == "integers":
            return None
        return dataclasses.replace(self, decoder=self.decoder.in_bytes())
