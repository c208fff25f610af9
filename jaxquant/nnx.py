"""Flax NNX layers that quantize, and models made of them.

    QuantLinear, QuantLinearGeneral, QuantConv, QuantEmbed, QuantEinsum     Flax's layers with one more argument, spec
    wrap(model, rules)        any model, in low precision: its own code, transformed
    quantize(model)           a model of these layers, with QTensors as weights
    functional(model)         the model as a pure function of its parameters

Each layer is a subclass of Flax's own and runs Flax's own forward pass, with an operation of `jaxquant.ops` in the
place of the one from `jax`. Constructor arguments, parameter names and shapes, values at initialization, padding,
biases and dtypes are therefore Flax's, and a float checkpoint loads unchanged.

**The weight says what happens.** A float weight with a spec trains: the forward pass computes what the quantized model
computes, gradients go straight through. A `QTensor` in the same `nnx.Param` runs frozen; without a spec, weight-only. A
float weight without a spec is Flax's layer. There is no Variable type for quantized weights, since it would say the
same thing twice: graph definition, state structure and checkpoints are those of the float model, ``nnx.update(model,
loaded)`` is all it takes to load quantized weights, and ``nnx.state(model, nnx.Param)`` leaves nothing out.

**Training next to quantized weights.** `nnx.grad` refuses integers with a TypeError, but an optimizer makes moments for
them without a word. Name the weights that train, and let the optimizer check:

    wrt = jq.nnx.trainable                                                    # the Params that are float
    grads = nnx.grad(loss, argnums=nnx.DiffState(0, wrt))(model)
    optimizer = nnx.Optimizer(model, qat.refuse_quantized(tx), wrt=wrt)       # raises for any other wrt

**Static activation ranges** (``spec.act.static``) are `QuantStat` variables of a submodule ``act_range``, which exists
only then. As with batch statistics, an attribute says when they follow the data:

    model.set_attributes(calibrating=True)
    for x in batches:
        model(x)              # also under nnx.jit; each layer sees what the layers before it give when quantized
    model.set_attributes(calibrating=False)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jaxquant import ops
from jaxquant.core.affine import roundtrip, scale_zero_point
from jaxquant.core.errors import Refusals, quant_error
from jaxquant.core.fake_quant import fake_quant
from jaxquant.core.observers import no_range, or_nan
from jaxquant.core.qtensor import QTensor
from jaxquant.core.specs import OpRule, OpSpec, QuantSpec, Rule
from jaxquant.ptq.rtn import rtn
from jaxquant.transform.make_plan import check_all_rules, check_rules, make_plan
from jaxquant.transform.misfits import fitted
from jaxquant.transform.params import quantize_params
from jaxquant.transform.paths import nearest
from jaxquant.transform.plan import Item, Plan
from jaxquant.transform.quantized import quantized

__all__ = [
    "ActRange",
    "QuantConv",
    "QuantEinsum",
    "QuantEmbed",
    "QuantLinear",
    "QuantLinearGeneral",
    "QuantStat",
    "Wrapped",
    "functional",
    "quantize",
    "trainable",
    "wrap",
]


def _get(variable: Any) -> Any:
    """The value of a Variable, of whatever type it is."""
    return (
        variable.get_value() if hasattr(nnx.Variable, "get_value") else variable.value
    )  # Flax 0.11 has only the latter


def _set(variable: Any, value: Any) -> None:
    """Replaces the value of a Variable."""
    if hasattr(nnx.Variable, "set_value"):
        variable.set_value(value)
    else:
        variable.value = value


# -- static activation ranges -----------------------------------------------------------------------------------------


class QuantStat(nnx.Variable):
    """What a layer with a static activation range has seen of its input."""


class ActRange(nnx.Module):
    """The static range of one activation, and what the spec's observer needs to update it.

    Args:
      spec: the activation's `QuantSpec`, per tensor.
      stack: leading axes, for the layers of a stack that is scanned or vmapped.

    Attributes:
      calibrating: True: every call shows its input to the observer first. Set by ``model.set_attributes``.
      lo, hi: the range; empty, with lo above hi, until something has been observed.
    """

    def __init__(self, spec: QuantSpec, stack: tuple[int, ...] = ()):
        self.spec = spec
        self.calibrating = False
        self.lo, self.hi = map(QuantStat, no_range(stack))
        for name, value in spec.observer.init((1,)).items():
            setattr(self, f"seen_{name}", QuantStat(jnp.broadcast_to(value, (*stack, *value.shape))))

    def __call__(self, x: jax.Array, layer: str) -> tuple[jax.Array, jax.Array | None]:
        """Scale and zero point for an activation; NaN where nothing was observed and tracing hides it."""
        if self.calibrating:
            self._observe(lax.stop_gradient(x))
        lo, hi = _get(self.lo), _get(self.hi)
        if not isinstance(hi, jax.core.Tracer) and not np.all((np.asarray(lo) <= hi) & np.isfinite(hi)):
            raise quant_error(
                layer,
                "spec.act is static and its range is not known",
                todo="Calibrate: model.set_attributes(calibrating=True), call the model on data that is finite, then "
                "model.set_attributes(calibrating=False); or load the QuantStat variables",
                path="act_range",
                hi=float(hi),
            )
        return scale_zero_point(*or_nan(lo, hi), self.spec)

    def _observe(self, x: jax.Array) -> None:
        observer, spec = self.spec.observer, self.spec
        names = observer.init((1,))
        seen = observer.update({n: _get(getattr(self, f"seen_{n}")) for n in names}, x.reshape(-1), (0,))
        for name, value in seen.items():
            _set(getattr(self, f"seen_{name}"), value)
        lo, hi = observer.result(seen, symmetric=spec.symmetric, roundtrip=roundtrip(spec))
        _set(self.lo, lo.reshape(()))
        _set(self.hi, hi.reshape(()))


# -- layers -----------------------------------------------------------------------------------------------------------


class _StandIn:
    """A layer as Flax's forward pass is to see it: some attributes replaced, the rest its own."""

    def __init__(self, layer: Any, **replaced: Any):
        self.__dict__.update(replaced, _layer=layer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


class _Held:
    """A value where Flax's forward pass reads a Variable."""

    def __init__(self, value: Any):
        self.value = value

    def __getitem__(self, index: Any) -> Any:
        return self.value


_FLAX_OPERATIONS = (None, lax.dot_general, lax.conv_general_dilated, jnp.einsum)


class _Quantized:
    """What the layers share."""

    _weight_name = "kernel"
    _op = "dot_general"
    spec: OpSpec | None
    promote_dtype: Callable[..., Any]

    @property
    def _weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight, without the axes of a stack of layers."""
        return self.kernel_shape  # type: ignore[attr-defined]

    @property
    def _reduce_axes(self) -> tuple[int, ...] | None:
        """The contracted axes of the weight, from the end; None where only a call says them."""
        raise NotImplementedError

    def _set_spec(self, spec: OpSpec | None) -> None:
        name = type(self).__name__
        if spec is not None and not isinstance(spec, OpSpec):
            todo = "Use OpSpec(weight=...), a recipe such as recipes.w8a8(), or None"
            raise quant_error(name, "spec must be an OpSpec or None", todo=todo, spec=spec)
        act = spec.act if spec is not None and spec.act is not None and spec.act.static else None
        if act is not None and act.granularity != "per_tensor":
            todo = "Use granularity='per_tensor' with static=True, or static=False"
            rule = "a static activation range is one for the whole tensor"
            raise quant_error(name, rule, todo=todo, granularity=act.granularity)
        self.spec = spec
        if hasattr(self, "act_range"):
            del self.act_range
        if act is not None:
            shape = _get(getattr(self, self._weight_name)).shape
            self.act_range = ActRange(act, tuple(shape[: len(shape) - len(self._weight_shape)]))

    def _weight(self) -> tuple[Any, OpSpec | None]:
        """The weight, and what is left for the operation to quantize."""
        weight = _get(getattr(self, self._weight_name))
        if isinstance(weight, QTensor) and weight.shape != tuple(self._weight_shape):
            raise quant_error(
                type(self).__name__,
                f"the layer needs a QTensor of shape {tuple(self._weight_shape)}",
                todo="Load the parameters of this very model; inside nnx.scan or nnx.vmap every leaf has one more axis",
                path=self._weight_name,
                got=repr(weight),
                shape=weight.shape,
            )
        return weight, self.spec

    def _promote(self, spec: OpSpec | None, args: Sequence[Any], **kwargs: Any) -> tuple[Any, ...]:
        """Flax's promotion of ``(inputs, weight, ...)``.

        A weight that is or will be quantized only takes part in the choice of the dtype: it is quantized from the dtype
        in which it is stored, as `quantize` does.
        """
        inputs, weight, *rest = args
        if not isinstance(weight, QTensor) and (spec is None or spec.weight is None):
            return self.promote_dtype((inputs, weight, *rest), **kwargs)
        inputs, _, *rest = self.promote_dtype((inputs, jnp.zeros((), weight.dtype), *rest), **kwargs)
        return inputs, weight, *rest

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

        def quantized(*operands: Any, preferred_element_type: Any = None, out_sharding: Any = None, **kwargs: Any):
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


class QuantLinear(nnx.Linear, _Quantized):
    """`nnx.Linear` with a quantized kernel: ``y = x @ kernel + bias`` over the last axis of x.

    Args:
      *args, **kwargs: as for `flax.nnx.Linear`.
      spec: how the product is quantized; None: weight-only where the kernel is a QTensor, else as Flax.

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

    def __init__(self, *args: Any, spec: OpSpec | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._set_spec(spec)

    def __call__(self, inputs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """The layer's output for inputs [..., in_features]."""
        return nnx.Linear.__call__(self._with(dot_general=ops.dot_general), inputs, *args, **kwargs)

    @property
    def _weight_shape(self) -> tuple[int, ...]:
        return self.in_features, self.out_features

    @property
    def _reduce_axes(self) -> tuple[int, ...]:
        return (-2,)


class QuantLinearGeneral(nnx.LinearGeneral, _Quantized):
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

    def __init__(self, *args: Any, spec: OpSpec | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._set_spec(spec)

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


class QuantConv(nnx.Conv, _Quantized):
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

    def __init__(self, *args: Any, spec: OpSpec | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._set_spec(spec)

    def __call__(self, inputs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """The convolution of inputs [..., window..., in_features]."""
        layer = self._with(conv_general_dilated=ops.conv_general_dilated)
        return nnx.Conv.__call__(layer, inputs, *args, **kwargs)

    @property
    def _reduce_axes(self) -> tuple[int, ...]:
        return tuple(range(-len(self.kernel_shape), -1))

    def _weight(self) -> tuple[Any, OpSpec | None]:
        weight, spec = super()._weight()
        if self.mask is None:
            return weight, spec
        if isinstance(weight, QTensor):
            weight = weight.dequantize()
        elif spec is not None and spec.weight is not None:
            weight = fake_quant(weight, spec.weight, reduce_axes=self._reduce_axes)
        return weight, OpSpec(act=None if spec is None else spec.act)


class QuantEinsum(nnx.Einsum, _Quantized):
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

    def __init__(self, *args: Any, spec: OpSpec | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._set_spec(spec)

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


class QuantEmbed(nnx.Embed, _Quantized):
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

    def __init__(self, *args: Any, spec: OpSpec | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._set_spec(spec)

    def __call__(self, inputs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """The rows of the table at integer indices; [..., features]."""
        table, spec = self._weight()
        if not isinstance(table, QTensor) and (spec is None or spec.weight is None):
            return super().__call__(inputs, *args, **kwargs)
        _no_sharding("QuantEmbed", *args, **kwargs)
        if not jnp.issubdtype(inputs.dtype, jnp.integer):
            raise ValueError("Input type must be an integer or unsigned integer.")
        if self.num_embeddings == 1:  # as in Flax: a table of one row answers every index with it
            inputs = jnp.zeros_like(inputs)
        rows = ops.take(table, inputs, axis=0, spec=spec)
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


def _no_sharding(layer: str, out_sharding: Any = None) -> None:
    if out_sharding is not None:
        todo = "Use jax.lax.with_sharding_constraint on the result"
        raise quant_error(layer, "out_sharding is for float weights", todo=todo, out_sharding=str(out_sharding))


# -- models -----------------------------------------------------------------------------------------------------------


def trainable(path: Any, value: Any) -> bool:
    """A filter for `nnx.grad`, `nnx.Optimizer`, `nnx.state`, ...: the Params that hold float arrays.

    Args:
      path: ignored; filters are called with it.
      value: a Variable.

    Returns:
      False for whatever is no `nnx.Param`, and for a Param that holds a QTensor or integers.

    Example:
      >>> from flax import nnx
      >>> import jaxquant as jq
      >>> from jaxquant import recipes
      >>> layer = jq.nnx.quantize(jq.nnx.QuantLinear(4, 3, spec=recipes.w8a16(), rngs=nnx.Rngs(0)))
      >>> list(nnx.state(layer, jq.nnx.trainable))
      ['bias']
    """
    del path
    if not isinstance(value, nnx.Param):
        return False
    held = _get(value)
    return not isinstance(held, QTensor) and all(
        jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) for leaf in jax.tree.leaves(held)
    )


def _weights(model: nnx.Module) -> Iterator[tuple[str, Any]]:
    """Path of the weight and layer, for every module that has a weight by Flax's names; shared modules once."""
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Module):
            for name in ("kernel", "embedding"):
                variable = getattr(node, name, None)
                if isinstance(variable, nnx.Param) and len(getattr(_get(variable), "shape", ())) > 1:
                    yield "/".join(map(str, (*path, name))), node


def _first(rules: Sequence[Rule], path: str) -> Rule | None:
    return next((rule for rule in rules if rule.matches(path)), None)


def _checked(function: str, rules: Sequence[Rule], model: nnx.Module) -> tuple[Rule, ...]:
    """The rules, each of which matches something: a weight, or anything at all if it keeps it float."""
    rules = check_rules(function, rules)
    weights = [path for path, _ in _weights(model)]
    every = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))]
    for rule in rules:
        if not any(rule.matches(path) for path in (every if rule.spec is None else weights)):
            todo = f"Nearest weights: {nearest(rule.pattern, weights or every)}"
            raise quant_error(function, "a rule matches no weight", todo=todo, pattern=rule.pattern)
    return rules


class Wrapped(nnx.Module):
    """A model in low precision; made by `wrap`.

    Attributes:
      model: the model itself.
      rules: which of its parameters are quantized, and how.
    """

    def __init__(self, model: Any, rules: Sequence[Rule | OpRule]):
        self.model = model
        self.rules = check_all_rules("wrap", rules)

    def plan(self, *args: Any, **kwargs: Any) -> Plan:
        """What a call with these arguments (arrays or shapes) quantizes; see `jaxquant.make_plan`."""
        fn, params, rest = _pure(self.model)
        return make_plan(fn, params, rest, *args, rules=self.rules, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own call in low precision. Changes of its state (batch statistics, random keys) are kept."""
        fn, params, rest = _pure(self.model)
        plan = make_plan(fn, params, rest, *args, rules=self.rules, **kwargs)
        out, rest = quantized(fn, plan)(params, rest, *args, **kwargs)
        nnx.update(self.model, rest)
        return out

    def quantize(
        self,
        *args: Any,
        method: Callable[..., QTensor] = rtn,
        stats: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Wrapped:
        """The same with QTensors as weights; ``args`` and ``kwargs`` as for a call, from which the plan is made.

        This model is not changed; what is not quantized is shared with it. ``method`` and ``stats`` as for
        `jaxquant.quantize_params`.
        """
        graphdef, params, rest = nnx.split(self.model, nnx.Param, ...)
        plan = self.plan(*args, **kwargs)
        qparams = quantize_params(nnx.to_pure_dict(params), plan, method=method, stats=stats)
        return Wrapped(nnx.merge(graphdef, qparams, _own(rest)), self.rules)


def _own(state: Any) -> Any:
    """The same state in new Variables, which may be changed under the trace in which they were made."""
    return jax.tree.map(lambda x: x, state)


def _pure(model: Any) -> tuple[Callable[..., Any], Any, Any]:
    """``fn(params, rest, *args) -> (result, new rest)``, with the model's params and the rest of its state."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def fn(params: Any, rest: Any, *args: Any, **kwargs: Any) -> Any:
        merged = nnx.merge(graphdef, params, _own(rest))
        out = merged(*args, **kwargs)
        return out, nnx.state(merged, nnx.Not(nnx.Param))

    return fn, nnx.to_pure_dict(params), rest


def wrap(model: Any, rules: Sequence[Rule | OpRule]) -> Wrapped:
    """Any NNX model in low precision: its own code, transformed by `jaxquant.quantized` at each call.

    Products are found in the trace, so every way in which a parameter reaches one counts, ``x @ self.w`` included.
    Float weights train, QTensors run; the model keeps its stateful ways: `nnx.jit`, `nnx.Optimizer`, batch statistics
    and dropout streams work through the wrapper. Call it inside `nnx.jit`: without, each call traces anew.

    Args:
      model: an NNX module. The wrapper holds the model itself: training one trains the other.
      rules: searched in the paths of the parameters, such as ``"encoder/dense1/kernel"``; see `jaxquant.make_plan`.

    Returns:
      A `Wrapped`: call it as the model; ``.plan(x)`` shows what is quantized, ``.quantize(x)`` makes QTensors.

    Raises:
      QuantError: if rules are no rules; when called, as `jaxquant.make_plan` and `jaxquant.quantized`. Static
        activation ranges have no place here: use `functional` with `jaxquant.calibrate`, or the layers of this module.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant import recipes
      >>> model = nnx.Sequential(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(4, 2, rngs=nnx.Rngs(1)))
      >>> x = jnp.ones((1, 8))
      >>> trains = jq.nnx.wrap(model, [jq.Rule("layers/0", recipes.w8a8())])
      >>> small = trains.quantize(x)
      >>> bool(jnp.allclose(trains(x), small(x), atol=1e-5))
      True
      >>> list(small.plan(x))
      ['layers/0/kernel']
    """
    return Wrapped(model, rules)


def _with_specs(model: Any, rules: Sequence[Rule]) -> Any:
    """A copy (which shares arrays) whose layers have the specs that rules give them."""
    rules = _checked("quantize", rules, model)
    model, refusals = nnx.clone(model), Refusals("quantize")
    for path, layer in list(_weights(model)):
        rule = _first(rules, path)
        if rule is None:
            continue
        if isinstance(layer, _Quantized):
            with refusals.gather():
                layer._set_spec(_fitted(path, layer, rule))
        elif rule.spec is not None:
            todo = "Quantize any model with jq.nnx.wrap(model, rules).quantize(x), or build it of jq.nnx layers"
            name = type(layer).__name__
            with refusals.gather():
                raise quant_error("quantize", f"{name} cannot run on a QTensor by itself", todo=todo, path=path)
    refusals.close()
    return model


def _fitted(path: str, layer: Any, rule: Rule) -> OpSpec | None:
    """The rule's spec, for this layer if it is a misfit and the rule says what then."""
    axes = rule.reduce_axes or layer._reduce_axes
    if rule.misfit is None or rule.spec is None or axes is None:
        return rule.spec
    return fitted("quantize", path, rule, rule.spec, layer._weight_shape, tuple(sorted(axes)))[0]


def quantize(
    model: Any,
    rules: Sequence[Rule] | None = None,
    *,
    method: Callable[..., QTensor] = rtn,
    stats: Mapping[str, Any] | None = None,
) -> Any:
    """A model of the layers of this module whose weights are `QTensor`s.

    For models of other layers, see `wrap`. Kinds of layers, not names, say which axes share a scale. The weights of a
    stack of layers (made by `nnx.vmap`, run by `nnx.scan`) are quantized one layer at a time, so that every leaf of
    their QTensor has the axis of the stack.

    Args:
      model: an NNX module of the layers here; it is not changed.
      rules: specs that replace the layers' own, by the paths of their weights; None: each layer's own spec, as after
        training.
      method: a quantizer ``(w, spec, *, reduce_axes, stats) -> QTensor``; see `jaxquant.ptq`.
      stats: path -> what the method wants to know about the inputs of that weight.

    Returns:
      The new model; everything that is not quantized shares its arrays with the old one. Weights that are QTensors
      already stay as they are.

    Raises:
      QuantError: as `quantize_params`; if a rule matches no weight, or one of a layer that is not of this module; if no
        layer has a spec for its weight.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant import recipes
      >>> model = jq.nnx.QuantLinear(64, 32, spec=recipes.w4a16(group_size=32), rngs=nnx.Rngs(0))
      >>> nnx.to_pure_dict(nnx.state(jq.nnx.quantize(model)))["kernel"]
      QTensor(int4[64, 32] -> float32, group 32 on axis -2, symmetric, 1.2 KiB)
    """
    rules = () if rules is None else rules
    model = _with_specs(model, rules)
    layers = [(path, layer) for path, layer in _weights(model) if isinstance(layer, _Quantized)]
    layers = [(path, layer) for path, layer in layers if layer.spec is not None and layer.spec.weight is not None]
    if not layers:
        todo = "Pass rules, such as [Rule('.*', recipes.w8a16())], or build the model with spec="
        raise quant_error("quantize", "no layer has a spec for its weight", todo=todo, rules=repr(rules))
    weights = {path: (getattr(layer, layer._weight_name), layer) for path, layer in layers}
    weights = {path: held for path, held in weights.items() if not isinstance(_get(held[0]), QTensor)}
    plan = Plan(tuple(_item(path, layer, _first(rules, path)) for path, (_, layer) in weights.items()))
    floats = {path: _get(variable) for path, (variable, _) in weights.items()}
    for path, q in quantize_params(floats, plan, method=method, stats=stats).items():
        _set(weights[path][0], q)
    return model


def _item(path: str, layer: Any, rule: Rule | None) -> Item:
    """How the weight of a layer is to be quantized."""
    weight = _get(getattr(layer, layer._weight_name))
    axes = (rule.reduce_axes if rule else None) or layer._reduce_axes
    if axes is None:
        todo = "Give einsum_str to the constructor, or Rule(pattern, spec, reduce_axes=(...))"
        raise quant_error("quantize", "only a call says which axes this kernel contracts", todo=todo, path=path)
    return Item(
        path,
        layer._op,
        tuple(weight.shape),
        weight.dtype.name,
        axes,
        layer.spec,
        stacked=len(weight.shape) - len(layer._weight_shape),
        contraction_minor=not isinstance(layer, nnx.Conv),  # a convolution reads its kernel's own order fast
    )


def functional(model: Any) -> tuple[Callable[..., Any], Any]:
    """The model as a pure function, for whatever takes ``fn(params, *args)``.

    Args:
      model: an NNX module. It is not changed, neither here nor by calls.

    Returns:
      ``(fn, params)``: ``fn(params, *args, **kwargs)`` is ``model(*args, **kwargs)`` with ``params``, a nested dict of
      arrays and QTensors, as its `nnx.Param`s. All other state (batch statistics, random keys, activation ranges) is
      that of the model when `functional` was called; what a call changes of it is discarded.

    Example:
      >>> from flax import nnx
      >>> import jax, jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant import recipes
      >>> fn, params = jq.nnx.functional(jq.nnx.QuantLinear(4, 3, spec=recipes.w8a16(), rngs=nnx.Rngs(0)))
      >>> params = jq.quantize_params(params, [jq.Rule("kernel", recipes.w8a16())])
      >>> jax.jit(fn)(params, jnp.ones((2, 4))).shape
      (2, 3)
    """
    with_state, params, rest = _pure(model)
    rest = _own(rest)

    def fn(params: Any, *args: Any, **kwargs: Any) -> Any:
        return with_state(params, rest, *args, **kwargs)[0]

    return fn, params
