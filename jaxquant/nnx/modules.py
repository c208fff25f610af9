"""Flax's layers with one more argument, ``spec``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from jaxquant import layers, ops
from jaxquant.core.errors import quant_error
from jaxquant.core.qtensor import QTensor
from jaxquant.core.specs import OpSpec
from jaxquant.nnx.ranges import ActRange, value_of

__all__ = ["QuantConv", "QuantEinsum", "QuantEmbed", "QuantLinear", "QuantLinearGeneral", "Quantized"]


class _StandIn:
    """A layer as Flax's forward pass is to see it: some attributes replaced, the rest its own."""

    def __init__(self, layer: Quantized, **replaced: object):
        self.__dict__.update(replaced, _layer=layer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


class _Held:
    """A value where Flax's forward pass reads a Variable."""

    def __init__(self, value: QTensor | jax.Array):
        self.value = value

    def __getitem__(self, index: object) -> QTensor | jax.Array:
        return self.value


_FLAX_OPERATIONS = (None, lax.dot_general, lax.conv_general_dilated, jnp.einsum)


class Quantized:
    """Shared by the layers: the first base of each, before Flax's layer."""

    _weight_name = "kernel"
    _op = "dot_general"
    promote_dtype: Callable[..., tuple[Any, ...]]

    def __init__(self, *args: Any, spec: OpSpec | str | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._set_spec(spec)

    @property
    def _weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight, without the axes of a stack of layers."""
        return self.kernel_shape  # type: ignore[attr-defined]

    @property
    def _reduce_axes(self) -> tuple[int, ...] | None:
        """The contracted axes of the weight, from the end; None where only a call says them."""
        raise NotImplementedError

    def _set_spec(self, spec: OpSpec | str | None) -> None:
        self.spec = layers.checked_spec(type(self).__name__, spec)
        if hasattr(self, "act_range"):
            del self.act_range
        act = layers.static_act(self.spec)
        if act is not None:
            shape = value_of(getattr(self, self._weight_name)).shape
            self.act_range = ActRange(act, tuple(shape[: len(shape) - len(self._weight_shape)]))

    def _weight(self) -> tuple[QTensor | jax.Array, OpSpec | None]:
        """The weight, and what is left for the operation to quantize."""
        weight = value_of(getattr(self, self._weight_name))
        todo = "Load the parameters of this very model; inside nnx.scan or nnx.vmap every leaf has one more axis"
        layers.check_shape(type(self).__name__, self._weight_name, weight, tuple(self._weight_shape), todo)
        return weight, self.spec

    def _promote(
        self, spec: OpSpec | None, args: Sequence[QTensor | jax.Array | None], **kwargs: Any
    ) -> tuple[Any, ...]:
        """Flax's promotion of ``(inputs, weight, ...)``, with a weight that stays as it is where it is quantized."""
        return layers.promoted(lambda args: self.promote_dtype(args, **kwargs), spec, *args)

    def _range(self, x: jax.Array) -> dict[str, Any]:
        """The static range of the activation, as the ops take it; nothing where it is dynamic."""
        if not hasattr(self, "act_range"):
            return {}
        scale, zero_point = self.act_range(x, type(self).__name__)
        return {"act_scale": scale, "act_zero_point": zero_point}

    def _with(self, **operation: Callable[..., jax.Array]) -> Any:
        """This layer, for Flax's forward pass; a stand-in with an operation of ours where anything is quantized."""
        weight, spec = self._weight()
        if spec is None and not isinstance(weight, QTensor):
            return self
        ((name, op),) = operation.items()
        for given in (name, f"{name}_cls"):
            if not any(getattr(self, given, None) is known for known in _FLAX_OPERATIONS):
                todo = f"Leave {given} out, or neither give a spec nor quantize the weight"
                raise quant_error(
                    type(self).__name__, f"a quantized layer has an operation of its own; {given} is given", todo=todo
                )

        def quantized(
            *operands: Any, preferred_element_type: DTypeLike | None = None, out_sharding: object = None, **kwargs: Any
        ):
            if out_sharding is not None:
                todo = "Use jax.lax.with_sharding_constraint on the result"
                raise quant_error(
                    type(self).__name__, "out_sharding is for float weights", todo=todo, out_sharding=str(out_sharding)
                )
            x = operands[1] if isinstance(operands[0], str) else operands[0]
            dtype = x.dtype if preferred_element_type is None else preferred_element_type
            return op(*operands, preferred_element_type=dtype, spec=spec, **self._range(x), **kwargs)

        return _StandIn(
            self,
            promote_dtype=functools.partial(self._promote, spec),
            **{self._weight_name: _Held(weight), name: quantized, f"{name}_cls": None},
        )


class QuantLinear(Quantized, nnx.Linear):
    """`nnx.Linear` with a quantized kernel: ``y = x @ kernel + bias`` over the last axis of x.

    Args:
      *args, **kwargs: as for `flax.nnx.Linear`.
      spec: how the product is quantized, an `OpSpec` or the name of a recipe; None: weight-only where the kernel is a
        QTensor, else as Flax.

    Returns:
      A module; ``kernel`` holds a float array or a QTensor of shape [in_features, out_features].

    Raises:
      QuantError: on a spec that is not an OpSpec; and when called, on a QTensor of another shape or type than layer and
        spec have, a group size that does not divide in_features, or a static activation range that is not known.

    Gradient: straight through for a float kernel and the input; see `jaxquant.ops.dot_general`.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant import recipes
      >>> layer = jq.nnx.QuantLinear(4, 3, spec=recipes.w8a8(), rngs=nnx.Rngs(0))
      >>> frozen = jq.nnx.quantize(layer)
      >>> nnx.to_pure_dict(nnx.state(frozen))["kernel"]
      QTensor(int8[4, 3] -> float32, per channel on axis -1, symmetric, 24 B)
      >>> x = jnp.linspace(-1.0, 1.0, 8).reshape(2, 4)
      >>> bool(jnp.allclose(layer(x), frozen(x), atol=1e-6))
      True
    """

    def __call__(self, inputs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """The layer's output for inputs [..., in_features]."""
        return nnx.Linear.__call__(self._with(dot_general=ops.dot_general), inputs, *args, **kwargs)

    @property
    def _weight_shape(self) -> tuple[int, ...]:
        return self.in_features, self.out_features

    @property
    def _reduce_axes(self) -> tuple[int, ...]:
        return (-2,)


class QuantLinearGeneral(Quantized, nnx.LinearGeneral):
    """`nnx.LinearGeneral` with a quantized kernel: contracts any axes of its input, with batch axes.

    Args:
      *args, **kwargs: as for `flax.nnx.LinearGeneral`.
      spec: as for `QuantLinear`. Scales are shared over all contracted axes of the kernel.

    Returns:
      A module; ``kernel`` holds a float array or a QTensor of shape [batch..., in_features..., out_features...].

    Raises:
      QuantError: as `QuantLinear`.

    Gradient: as `QuantLinear`.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant import recipes
      >>> layer = jq.nnx.QuantLinearGeneral((4, 6), (2, 3), axis=(-2, -1), spec=recipes.w8a16(), rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((5, 4, 6))).shape
      (5, 2, 3)
    """

    def __call__(self, inputs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """The layer's output; the contracted axes of the inputs are replaced by out_features at the end."""
        return nnx.LinearGeneral.__call__(self._with(dot_general=ops.dot_general), inputs, *args, **kwargs)

    @property
    def _weight_shape(self) -> tuple[int, ...]:
        return (*self.batch_axis.values(), *self.in_features, *self.out_features)

    @property
    def _reduce_axes(self) -> tuple[int, ...]:
        last = -len(self.out_features)
        return tuple(range(last - len(self.in_features), last))


class QuantConv(Quantized, nnx.Conv):
    """`nnx.Conv` with a quantized kernel, in any number of spatial dimensions.

    With a ``mask`` the kernel is quantized first and masked then; the product is the float one of the dequantized
    kernel (activations are quantized as ``spec.act`` says).

    Args:
      *args, **kwargs: as for `flax.nnx.Conv`.
      spec: as for `QuantLinear`. Kernels have one scale per output feature, activations one per image.

    Returns:
      A module; ``kernel`` holds a float array or a QTensor of shape [window..., in_features / groups, out_features].

    Raises:
      QuantError: as `QuantLinear`.

    Gradient: as `QuantLinear`.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant import recipes
      >>> layer = jq.nnx.QuantConv(2, 4, (3, 3), padding="VALID", spec=recipes.w8a8(), rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((1, 8, 8, 2))).shape
      (1, 6, 6, 4)
    """

    _op = "conv_general_dilated"

    def __call__(self, inputs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """The convolution of inputs [..., window..., in_features]."""
        layer = self._with(conv_general_dilated=ops.conv_general_dilated)
        return nnx.Conv.__call__(layer, inputs, *args, **kwargs)

    @property
    def _reduce_axes(self) -> tuple[int, ...]:
        return tuple(range(-len(self.kernel_shape), -1))

    def _weight(self) -> tuple[QTensor | jax.Array, OpSpec | None]:
        weight, spec = super()._weight()
        if self.mask is None:
            return weight, spec
        return layers.kernel_to_mask(weight, spec), layers.act_alone(spec)


class QuantEinsum(Quantized, nnx.Einsum):
    """`nnx.Einsum` with a quantized kernel.

    Args:
      *args, **kwargs: as for `flax.nnx.Einsum`.
      spec: as for `QuantLinear`. Scales are shared over the kernel's contracted axes.

    Returns:
      A module; ``kernel`` holds a float array or a QTensor of shape kernel_shape.

    Raises:
      QuantError: as `QuantLinear`, and on subscripts that `jaxquant.ops.einsum` does not take.

    Gradient: as `QuantLinear`.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant import recipes
      >>> spec = recipes.w4a16(group_size=4)
      >>> layer = jq.nnx.QuantEinsum("btd,dhk->bthk", (8, 2, 4), (2, 4), spec=spec, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((1, 3, 8))).shape
      (1, 3, 2, 4)
    """

    def __call__(self, inputs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """The einsum of the inputs with the kernel, plus the bias."""
        return nnx.Einsum.__call__(self._with(einsum_op=ops.einsum), inputs, *args, **kwargs)

    @property
    def _reduce_axes(self) -> tuple[int, ...] | None:
        if self.einsum_str is None:
            return None
        terms, _, output = self.einsum_str.partition("->")
        before, _, after = terms.split(",")[1].partition("...")
        first = [i - len(self.kernel_shape) for i, label in enumerate(before) if label not in output]
        return (*first, *(i - len(after) for i, label in enumerate(after) if label not in output))


class QuantEmbed(Quantized, nnx.Embed):
    """`nnx.Embed` with a quantized table: one scale per row, or per group of features.

    A lookup gathers codes and dequantizes the gathered rows only. It has no activation to quantize: ``spec.act``
    concerns `attend`.

    Args:
      *args, **kwargs: as for `flax.nnx.Embed`.
      spec: as for `QuantLinear`.

    Returns:
      A module; ``embedding`` holds a float array or a QTensor of shape [num_embeddings, features].

    Raises:
      QuantError: as `QuantLinear`; ValueError, as Flax, on indices that are not integers.

    Gradient: as `QuantLinear`.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant import recipes
      >>> table = jq.nnx.quantize(jq.nnx.QuantEmbed(16, 4, spec=recipes.w8a16(), rngs=nnx.Rngs(0)))
      >>> table(jnp.array([3, 5])).shape, table.attend(jnp.ones((2, 4))).shape
      ((2, 4), (2, 16))
    """

    _weight_name = "embedding"
    _op = "take, dot_general"

    def __call__(self, inputs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """The rows of the table at integer indices; [..., features]."""
        table, spec = self._weight()
        if not isinstance(table, QTensor) and (spec is None or spec.weight is None):
            return super().__call__(inputs, *args, **kwargs)
        _no_sharding("QuantEmbed", *args, **kwargs)
        rows = ops.take(table, layers.rows_at(inputs, self.num_embeddings), axis=0, spec=spec)
        return self.promote_dtype((rows,), dtype=self.dtype, inexact=False)[0]

    def attend(self, query: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """The inner products of query [..., features] with every row; [..., num_embeddings]."""
        table, spec = self._weight()
        if not isinstance(table, QTensor) and spec is None:
            return super().attend(query, *args, **kwargs)
        _no_sharding("QuantEmbed", *args, **kwargs)
        query, table = self._promote(spec, (query, table), dtype=self.dtype)
        numbers = (((query.ndim - 1,), (1,)), ((), ()))
        return ops.dot_general(
            query, table, numbers, preferred_element_type=query.dtype, spec=spec, **self._range(query)
        )

    @property
    def _weight_shape(self) -> tuple[int, ...]:
        return self.num_embeddings, self.features

    @property
    def _reduce_axes(self) -> tuple[int, ...]:
        return (-1,)


def _no_sharding(layer: str, out_sharding: object = None) -> None:
    if out_sharding is not None:
        todo = "Use jax.lax.with_sharding_constraint on the result"
        raise quant_error(layer, "out_sharding is for float weights", todo=todo, out_sharding=str(out_sharding))
