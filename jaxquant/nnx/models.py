"""Models in low precision: any, wrapped; one of the layers of this package, quantized; one as a pure function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.core
import jax.numpy as jnp
from flax import nnx

from jaxquant.core.errors import quant_error
from jaxquant.core.paths import Params, nearest, path_of
from jaxquant.core.qtensor import QTensor
from jaxquant.core.refusals import Refusals
from jaxquant.core.specs import OpSpec
from jaxquant.core.types import PyTree
from jaxquant.nnx.modules import Quantized
from jaxquant.nnx.ranges import set_value, value_of
from jaxquant.ptq.rtn import rtn
from jaxquant.rules import OpRule, Rule
from jaxquant.transform.make_plan import check_all_rules, check_rules, make_plan
from jaxquant.transform.misfits import fitted
from jaxquant.transform.params import quantize_params
from jaxquant.transform.plan import Item, Plan
from jaxquant.transform.quantized import quantized

__all__ = ["Wrapped", "functional", "quantize", "trainable", "wrap"]


Model = TypeVar("Model", bound=nnx.Module)


def trainable(path: object, value: object) -> bool:
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
    held = value_of(value)
    return not isinstance(held, QTensor) and all(
        jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) for leaf in jax.tree.leaves(held)
    )


def _weights(model: nnx.Module) -> Iterator[tuple[str, nnx.Module]]:
    """Path of the weight and layer, for every module that has a weight by Flax's names; shared modules once."""
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Module):
            for name in ("kernel", "embedding"):
                variable = getattr(node, name, None)
                if isinstance(variable, nnx.Param) and len(getattr(value_of(variable), "shape", ())) > 1:
                    yield path_of((*path, name)), node


def _first(rules: Sequence[Rule], path: str) -> Rule | None:
    return next((rule for rule in rules if rule.matches(path)), None)


def _checked(function: str, rules: Sequence[Rule], model: nnx.Module) -> tuple[Rule, ...]:
    """The rules, each of which matches something: a weight, or anything at all if it keeps it float."""
    rules = check_rules(function, rules)
    weights = [path for path, _ in _weights(model)]
    every = [path_of(path) for path, _ in nnx.to_flat_state(nnx.state(model))]
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

    def __init__(self, model: nnx.Module, rules: Sequence[Rule | OpRule]):
        self.model: Any = model
        self.rules = check_all_rules("wrap", rules)

    def plan(self, *args: PyTree, **kwargs: Any) -> Plan:
        """The plan of a call with these arguments (arrays or shapes); see `jaxquant.make_plan`."""
        fn, params, rest = _pure(self.model)
        return make_plan(fn, params, rest, *args, rules=self.rules, **kwargs)

    def __call__(self, *args: PyTree, **kwargs: Any) -> PyTree:
        """The model's own call in low precision. Changes of its state (batch statistics, random keys) are kept."""
        fn, params, rest = _pure(self.model)
        plan = make_plan(fn, params, rest, *args, rules=self.rules, **kwargs)
        out, rest = quantized(fn, plan)(params, rest, *args, **kwargs)
        nnx.update(self.model, rest)
        return out

    def quantize(
        self,
        *args: PyTree,
        method: Callable[..., QTensor] = rtn,
        stats: Mapping[str, PyTree] | None = None,
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


def _own(state: PyTree) -> PyTree:
    """The same state in new Variables, which may be changed under the trace in which they were made."""
    return jax.tree.map(lambda x: x, state)


def _pure(model: nnx.Module) -> tuple[Callable[..., tuple[PyTree, PyTree]], Params, PyTree]:
    """``fn(params, rest, *args) -> (result, new rest)``, with the model's params and the rest of its state."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def fn(params: Params, rest: PyTree, *args: PyTree, **kwargs: Any) -> tuple[PyTree, PyTree]:
        merged: Any = nnx.merge(graphdef, params, _own(rest))
        out = merged(*args, **kwargs)
        return out, nnx.state(merged, nnx.Not(nnx.Param))

    return fn, nnx.to_pure_dict(params), rest


def wrap(model: nnx.Module, rules: Sequence[Rule | OpRule]) -> Wrapped:
    """Any NNX model in low precision: its own code, transformed by `jaxquant.quantized` at each call.

    Products are found in the trace, so every way in which a parameter reaches one counts, ``x @ self.w`` included.
    Float weights train, QTensors run; the model keeps its stateful ways: `nnx.jit`, `nnx.Optimizer`, batch statistics
    and dropout streams work through the wrapper. Call it inside `nnx.jit`; otherwise each call traces again.

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


def _with_specs(model: Model, rules: Sequence[Rule]) -> Model:
    """A copy (which shares arrays) whose layers have the specs that rules give them."""
    rules = _checked("quantize", rules, model)
    model, refusals = nnx.clone(model), Refusals("quantize")
    for path, layer in list(_weights(model)):
        rule = _first(rules, path)
        if rule is None:
            continue
        if isinstance(layer, Quantized):
            with refusals.gather():
                layer._set_spec(_fitted(path, layer, rule))
        elif rule.spec is not None:
            todo = "Quantize any model with jq.nnx.wrap(model, rules).quantize(x), or build it of jq.nnx layers"
            name = type(layer).__name__
            with refusals.gather():
                raise quant_error("quantize", f"{name} cannot run on a QTensor by itself", todo=todo, path=path)
    refusals.close()
    return model


def _fitted(path: str, layer: Quantized, rule: Rule) -> OpSpec | None:
    """The rule's spec, for this layer if it is a misfit and the rule says what then."""
    axes = rule.reduce_axes or layer._reduce_axes
    if rule.misfit is None or rule.spec is None or axes is None:
        return rule.spec
    return fitted("quantize", path, rule, rule.spec, layer._weight_shape, tuple(sorted(axes)))[0]


def quantize(
    model: Model,
    rules: Sequence[Rule] | None = None,
    *,
    method: Callable[..., QTensor] = rtn,
    stats: Mapping[str, PyTree] | None = None,
) -> Model:
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
    layers = [(path, layer, layer.spec) for path, layer in _weights(model) if isinstance(layer, Quantized)]
    found = [(path, layer, spec) for path, layer, spec in layers if spec is not None and spec.weight is not None]
    if not found:
        todo = "Pass rules, such as [Rule('.*', recipes.w8a16())], or build the model with spec="
        raise quant_error("quantize", "no layer has a spec for its weight", todo=todo, rules=repr(rules))
    weights = {path: getattr(layer, layer._weight_name) for path, layer, _ in found}
    floats = {path: value for path, held in weights.items() if not isinstance(value := value_of(held), QTensor)}
    items = [_item(path, layer, spec, _first(rules, path)) for path, layer, spec in found if path in floats]
    for path, q in quantize_params(floats, Plan(tuple(items)), method=method, stats=stats).items():
        set_value(weights[path], q)
    return model


def _item(path: str, layer: Quantized, spec: OpSpec, rule: Rule | None) -> Item:
    """How the weight of a layer is to be quantized."""
    weight = value_of(getattr(layer, layer._weight_name))
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
        spec,
        stacked=len(weight.shape) - len(layer._weight_shape),
        contraction_minor=not isinstance(layer, nnx.Conv),  # a convolution reads its kernel's own order fast
    )


def functional(model: nnx.Module) -> tuple[Callable[..., PyTree], Params]:
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

    def fn(params: Params, *args: PyTree, **kwargs: Any) -> PyTree:
        return with_state(params, rest, *args, **kwargs)[0]

    return fn, params
