"""Flax Linen layers whose weight may be quantized: Flax's own, with one more field, ``spec``."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta, unfreeze
from jax.typing import ArrayLike, DTypeLike

from jaxquant import layers, ops
from jaxquant.core.errors import QuantError, quant_error
from jaxquant.core.qtensor import QTensor, Scale
from jaxquant.core.specs import OpSpec

__all__ = ["QuantConv", "QuantDense", "QuantDenseGeneral", "QuantEinsum", "QuantEmbed"]


Layer = TypeVar("Layer", bound=nn.Module)


def _named_as_flax(cls: type[Layer]) -> type[Layer]:
    """Gives a layer the class name of the layer it stands in for; ``__qualname__`` stays its own.

    Linen names a submodule after ``__class__.__name__``. A `QuantDense` takes the place of an `nn.Dense`, so it must
    take its automatic name too: ``Dense_0``, and the next one of either kind ``Dense_1``. Otherwise checkpoints would
    not fit, and initial values, which depend on the path, would differ.
    """
    cls.__name__ = cls.__name__.removeprefix("Quant")
    return cls


class _Quantized(nn.Module):
    """The base of the layers: the weight may be a `QTensor`, and the product is one of `jaxquant.ops`."""

    spec: OpSpec | str | None = None

    _weight = "kernel"

    def __post_init__(self):
        layers.checked_spec(type(self).__qualname__, self.spec)
        super().__post_init__()

    @property
    def _spec(self) -> OpSpec | None:
        return layers.checked_spec(type(self).__qualname__, self.spec)

    @nn.nowrap
    def _path(self, name: str) -> str:
        return "/".join(("params", *self.path, name))

    @nn.nowrap
    def _error(self, rule: str, *, todo: str, name: str | None = None, **got: Any) -> QuantError:
        path = None if name is None else self._path(name)
        return quant_error(type(self).__qualname__, rule, todo=todo, path=path, **got)

    @nn.nowrap
    def _frozen(self, name: str) -> QTensor | None:
        """The QTensor that is stored under a parameter's name, if it is one."""
        value = None if self.scope is None else meta.unbox(self.get_variable("params", name))
        return value if isinstance(value, QTensor) else None

    @nn.nowrap
    def param(self, name: str, init_fn: Callable[..., Any], *init_args: Any, **kwargs: Any) -> Any:
        """`nn.Module.param` for a parameter that may be a QTensor, whose leaves have shapes of their own."""
        q = self._frozen(name)
        if q is None:
            return super().param(name, init_fn, *init_args, **kwargs)
        if name != self._weight:
            todo = f"Quantize only {self._weight!r}, and keep this one with Rule({name!r}, None)"
            raise self._error("this parameter must be float", todo=todo, name=name, value=repr(q))
        todo = "Quantize the params of this very model; stacked params (nn.scan, nn.vmap) along with their extra axis"
        layers.check_shape(type(self).__qualname__, self._path(name), q, tuple(init_args[0]), todo)
        return super().param(name, lambda _: self.get_variable("params", name), **kwargs)

    @nn.nowrap
    def _product_spec(self) -> OpSpec | None:
        """The spec that the product still has to apply."""
        return self._spec

    @nn.nowrap
    def _promote(self, promote: Callable[..., Any], inputs: Any, weight: Any, *rest: Any, **kwargs: Any) -> Any:
        """``promote``, but a weight that is or will be quantized is unchanged."""
        every = lambda args: promote(*args, **kwargs)  # noqa: E731
        return layers.promoted(every, self._product_spec(), inputs, weight, *rest)

    @nn.nowrap
    def _product(
        self,
        op: Callable[..., jax.Array],
        *operands: Any,
        act: jax.Array,
        dtype: DTypeLike | None = None,
        **kwargs: Any,
    ) -> jax.Array:
        """A quantized product in the dtype that Flax's would have."""
        kwargs |= {"spec": self._product_spec(), "preferred_element_type": act.dtype if dtype is None else dtype}
        kwargs |= self._range(act)
        with self._located():
            return op(*operands, **kwargs)

    @nn.nowrap
    @contextlib.contextmanager
    def _located(self):
        """Adds the weight's path to errors of the ops, which do not know it."""
        try:
            yield
        except QuantError as error:
            raise error.at(self._path(self._weight)) from None

    @nn.nowrap
    def _range(self, x: jax.Array) -> dict[str, Scale | jax.Array | None]:
        """The static range of the activation, as arguments of the ops; empty if the range is dynamic."""
        act = layers.static_act(self._spec)
        if act is None:
            return {}
        state = self.get_variable("quant", "act")
        if self.is_mutable_collection("quant"):
            fresh = layers.unobserved(act)
            if state is not None and jax.tree.structure(unfreeze(state)) != jax.tree.structure(fresh):
                todo = "Calibrate again with this spec, starting from the params alone"
                rule = "the collection 'quant' holds no state of this observer"
                raise self._error(rule, todo=todo, name=self._weight, observer=act.observer)
            state = fresh if state is None else state
            now = layers.observed(state["seen"], x, act)
            self.put_variable("quant", "act", state if self.is_initializing() else now)
            state = now
        if state is None or not layers.is_known(state["lo"], state["hi"]):
            todo = (
                "Calibrate with model.apply(variables, x, mutable=['quant']) and pass the collection 'quant' along "
                "with the params (nn.scan and nn.vmap hand it on if variable_axes names it)"
            )
            raise self._error("the static range of the activation is not known", todo=todo, name=self._weight)
        scale, zero_point = layers.act_range(state["lo"], state["hi"], act)
        return {"act_scale": scale, "act_zero_point": zero_point}


class _Hooked(_Quantized):
    """Layers whose Flax parent has a field for its product: the parent's ``__call__`` runs with ours in that field.

    ``__call__`` is not wrapped by Linen (`nn.nowrap`), since the parent's is: interceptors, captured intermediates and
    tables see one call.
    """

    @nn.nowrap
    @contextlib.contextmanager
    def _with_product(self, field: str, op: Callable[..., jax.Array]):
        """Within, the fields ``promote_dtype`` and ``field`` of this module hold ours, if anything is quantized.

        The very module must run, not a copy: Linen keeps its scope and its names up to date as it is called.
        """
        if self.scope is None or (self._spec is None and self._frozen(self._weight) is None):
            yield
            return
        for name in (field, f"{field}_cls"):
            if getattr(self, name) is not None:
                todo, got = f"Leave {name} out", {name: getattr(self, name)}
                raise self._error("a quantized layer has a product of its own", todo=todo, name=self._weight, **got)

        def product(inputs: jax.Array, kernel: QTensor | jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
            return self._product(op, inputs, kernel, *args, act=inputs, **kwargs)

        own = {name: getattr(self, name) for name in ("promote_dtype", field)}
        ours = {"promote_dtype": functools.partial(self._promote, self.promote_dtype), field: product}
        try:
            for name, value in ours.items():
                object.__setattr__(self, name, value)
            yield
        finally:
            for name, value in own.items():
                object.__setattr__(self, name, value)


@_named_as_flax
class QuantDense(_Hooked, nn.Dense):
    """`nn.Dense` with a quantized kernel: ``y = x @ kernel + bias`` over the last axis of x.

    Args:
      features, use_bias, dtype, param_dtype, precision, kernel_init, bias_init, promote_dtype: as for
        `flax.linen.Dense`.
      spec: how the product is quantized, an `OpSpec` or the name of a recipe; None: weight-only where the kernel is a
        QTensor, else as Flax.

    Returns:
      A module; ``kernel`` is a float array or a QTensor of shape [inputs, features].

    Raises:
      QuantError: on a spec that is not an OpSpec, a QTensor of another shape or type than layer and spec have, a group
        size that does not divide the inputs, or a static activation range that was never observed.

    Gradient: straight through for a float kernel and the input; see `jaxquant.ops.dot_general`.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant import recipes
      >>> layer = jq.linen.QuantDense(3, spec=recipes.w8a8())
      >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 4)))  # as nn.Dense(3) has them
      >>> jax.tree.map(jnp.shape, variables)
      {'params': {'bias': (3,), 'kernel': (4, 3)}}
      >>> kernel = jq.quantize(variables["params"]["kernel"], recipes.w8a8().weight, reduce_axes=(-2,))
      >>> frozen = {"params": {**variables["params"], "kernel": kernel}}
      >>> x = jnp.linspace(-1.0, 1.0, 8).reshape(2, 4)
      >>> bool(jnp.allclose(layer.apply(variables, x), layer.apply(frozen, x), atol=1e-6))
      True
    """

    @nn.nowrap
    def __call__(self, inputs: ArrayLike) -> jax.Array:
        """The layer's output for inputs [..., inputs]."""
        with self._with_product("dot_general", ops.dot_general):
            return super().__call__(inputs)


@_named_as_flax
class QuantDenseGeneral(_Hooked, nn.DenseGeneral):
    """`nn.DenseGeneral` with a quantized kernel: contracts any axes of its input, with batch axes.

    Args:
      features, axis, batch_dims, use_bias, dtype, param_dtype, kernel_init, bias_init, precision, promote_dtype: as for
        `flax.linen.DenseGeneral`.
      spec: as for `QuantDense`. Scales are shared over all contracted axes of the kernel.

    Returns:
      A module; ``kernel`` is a float array or a QTensor of shape [batch..., contracted..., features...].

    Raises:
      QuantError: as `QuantDense`.

    Gradient: as `QuantDense`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant import recipes
      >>> layer = jq.linen.QuantDenseGeneral((2, 3), axis=(-2, -1), spec=recipes.w8a16())
      >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((5, 4, 6)))
      >>> y.shape, variables["params"]["kernel"].shape
      ((5, 2, 3), (4, 6, 2, 3))
    """

    @nn.nowrap
    def __call__(self, inputs: ArrayLike) -> jax.Array:
        """The layer's output; the contracted axes of the inputs are replaced by ``features`` at the end."""
        with self._with_product("dot_general", ops.dot_general):
            return super().__call__(inputs)


@_named_as_flax
class QuantConv(_Hooked, nn.Conv):
    """`nn.Conv` with a quantized kernel, in any number of spatial dimensions.

    With a ``mask`` the kernel is quantized first and masked then, so that the stored kernel stays that of the unmasked
    layer; the product is the float one of the dequantized kernel (activations are quantized as ``spec.act`` says).

    Args:
      features, kernel_size, strides, padding, input_dilation, kernel_dilation, feature_group_count, use_bias, mask,
        dtype, param_dtype, precision, kernel_init, bias_init, promote_dtype: as for `flax.linen.Conv`.
      spec: as for `QuantDense`. Kernels have one scale per output feature, activations one per image.

    Returns:
      A module; ``kernel`` is a float array or a QTensor of shape [window..., inputs / groups, features].

    Raises:
      QuantError: as `QuantDense`.

    Gradient: as `QuantDense`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant import recipes
      >>> layer = jq.linen.QuantConv(4, (3, 3), padding="VALID", spec=recipes.w8a8())
      >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((1, 8, 8, 2)))
      >>> y.shape, variables["params"]["kernel"].shape
      ((1, 6, 6, 4), (3, 3, 2, 4))
    """

    @nn.nowrap
    def __call__(self, inputs: ArrayLike) -> jax.Array:
        """The convolution of inputs [..., window..., inputs]."""
        with self._with_product("conv_general_dilated", ops.conv_general_dilated):
            return super().__call__(inputs)

    @nn.nowrap
    def param(self, name: str, init_fn: Callable[..., Any], *init_args: Any, **kwargs: Any) -> Any:
        value = super().param(name, init_fn, *init_args, **kwargs)
        if name != self._weight or self.mask is None:
            return value
        with self._located():
            return layers.kernel_to_mask(value, self._spec)

    @nn.nowrap
    def _product_spec(self) -> OpSpec | None:
        return self._spec if self.mask is None else layers.act_alone(self._spec)


@_named_as_flax
class QuantEinsum(_Quantized, nn.Einsum):
    """`nn.Einsum` with a quantized kernel.

    Args:
      shape, einsum_str, use_bias, dtype, param_dtype, precision, kernel_init, bias_init, promote_dtype: as for
        `flax.linen.Einsum`.
      spec: as for `QuantDense`. Scales are shared over the kernel's contracted axes.

    Returns:
      A module; ``kernel`` is a float array or a QTensor of the given shape.

    Raises:
      QuantError: as `QuantDense`, and on subscripts that `jaxquant.ops.einsum` does not take.

    Gradient: as `QuantDense`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant import recipes
      >>> layer = jq.linen.QuantEinsum((8, 2, 4), "btd,dhk->bthk", spec=recipes.w4a16(group_size=4))
      >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((1, 3, 8)))
      >>> y.shape, jax.tree.map(jnp.shape, variables["params"])
      ((1, 3, 2, 4), {'bias': (2, 4), 'kernel': (8, 2, 4)})
    """

    @nn.compact
    def __call__(self, inputs: ArrayLike, einsum_str: str | None = None) -> jax.Array:
        """The einsum of the inputs with the kernel, plus the bias."""
        subscripts = nn.merge_param("einsum_str", self.einsum_str, einsum_str).replace(" ", "")
        if "->" not in subscripts or subscripts.count(",") != 1:
            todo = "Write for example 'btd,dhk->bthk'"
            raise self._error("einsum_str needs two operands and an explicit result", todo=todo, einsum_str=subscripts)
        kernel = self.param("kernel", self.kernel_init, self.shape, self.param_dtype)
        bias, broadcast = None, ()
        if self.use_bias:
            shape, broadcast = self._get_bias_shape(subscripts, inputs, kernel)
            bias = self.param("bias", self.bias_init, shape, self.param_dtype)
        x, kernel, bias = self._promote(self.promote_dtype, inputs, kernel, bias, dtype=self.dtype)
        dtype = getattr(self, "preferred_element_type", None)  # a field of Flax's layer since 0.12
        y = self._product(ops.einsum, subscripts, x, kernel, act=x, dtype=dtype, precision=self.precision)
        return y if bias is None else y + jnp.reshape(bias, broadcast)


@_named_as_flax
class QuantEmbed(_Quantized, nn.Embed):
    """`nn.Embed` with a quantized table: one scale per row, or per group of features.

    A lookup gathers codes and dequantizes the gathered rows only. It has no activation to quantize: ``spec.act``
    concerns `attend`.

    Args:
      num_embeddings, features, dtype, param_dtype, embedding_init, promote_dtype: as for `flax.linen.Embed`.
      spec: as for `QuantDense`.

    Returns:
      A module; ``embedding`` is a float array or a QTensor of shape [num_embeddings, features].

    Raises:
      QuantError: as `QuantDense`; ValueError, as Flax, on indices that are not integers.

    Gradient: as `QuantDense`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxquant as jq
      >>> layer = jq.linen.QuantEmbed(16, 4)
      >>> variables = layer.init(jax.random.key(0), jnp.array([0]))
      >>> table = variables["params"]["embedding"]
      >>> frozen = {"params": {"embedding": jq.quantize(table, jq.QuantSpec("int8"), reduce_axes=(-1,))}}
      >>> bool(jnp.allclose(layer.apply(frozen, jnp.array([3, 5])), table[jnp.array([3, 5])], atol=0.02))
      True
    """

    _weight = "embedding"

    def __call__(self, inputs: jax.Array | np.ndarray) -> jax.Array:
        """The rows of the table at integer indices; [..., features]."""
        index, table = layers.rows_at(inputs, self.num_embeddings), self.embedding
        like = jnp.asarray(self.promote_dtype(jnp.zeros((), table.dtype), dtype=self.dtype, inexact=False)[0])
        with self._located():
            return ops.take(table, index, axis=0, spec=self._spec).astype(like.dtype)

    def attend(self, query: ArrayLike) -> jax.Array:
        """The inner products of query [..., features] with every row; [..., num_embeddings]."""
        x, table = self._promote(self.promote_dtype, query, self.embedding, dtype=self.dtype)
        contract = (((x.ndim - 1,), (1,)), ((), ()))
        return self._product(ops.dot_general, x, table, contract, act=x)
