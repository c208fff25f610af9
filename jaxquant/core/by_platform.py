"""`by_platform`: a value that each platform computes in its own way, as one equation.

The program of a platform is traced when it is lowered, for that platform alone. JAX's own choice between platforms
traces the programs of all of them at once: a product on a CPU would trace kernels for GPUs first. And equal equations,
such as those of equal layers, are lowered once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, cast, get_args

import jax
import jax.core
import jax.extend
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, JaxprEqn, Primitive, Var
from jax.interpreters import ad, batching, mlir
from jax.interpreters import partial_eval as pe

from jaxquant.core.types import PyTree, TreeDef

__all__ = ["Platform", "Target", "Ways", "by_platform", "run_program", "target_of", "unmapped"]

T = TypeVar("T")
_Shapes = tuple[ShapedArray, ...]

Platform = Literal["cpu", "tpu", "cuda", "other"]
"""Platforms that a program is lowered for."""


class Target(NamedTuple):
    """The platform and the chip that a program is lowered for.

    Attributes:
      platform: the platform.
      chip: the kind of its devices, as JAX names it (`jax.Device.device_kind`); None if it is not known, as in a
        program that is exported.
    """

    platform: Platform
    chip: str | None = None


class Ways(Protocol):
    """How each platform computes one value. Hashable: equal ones compute the same."""

    def on(self, target: Target, *operands: PyTree) -> PyTree:
        """The value, of the same shapes and dtypes for all targets."""
        ...

    def like(self, *operands: PyTree) -> PyTree:
        """A value of those shapes and dtypes, quick to trace; no program contains it."""
        ...

    def stands_for(self, *operands: PyTree) -> tuple[Primitive, dict[str, Any]] | None:
        """The primitive and the parameters by which a policy of `jax.checkpoint` decides whether to keep the value.

        Operands have shapes and dtypes. None: the value is no operation that policies know.
        """
        ...


def by_platform(ways: Ways, *operands: PyTree) -> PyTree:
    """The value as the platform that the program is lowered for computes it.

    Args:
      ways: how each platform computes it.
      operands: pytrees of arrays.

    Gradient: none; a float value that is differentiated raises.
    """
    arrays, tree = cast(tuple[list[jax.Array], TreeDef], jax.tree.flatten(operands))
    flat = _Flat(ways, tree)
    shapes, like = jax.make_jaxpr(flat.like, return_shape=True)(*arrays)
    found = _bound(*arrays, ways=flat, results=tuple(shapes.out_avals), needs_devices=_needs_devices())
    return jax.tree.unflatten(cast(TreeDef, jax.tree.structure(like)), found)


@functools.cache
def _needs_devices() -> ClosedJaxpr:
    """A program that JAX lowers for known devices only; none runs it.

    JAX tells a program's lowering for which devices it is only if an equation needs that, and looks for such equations
    in the parameters of others. Kernels that partition their operands do, and are not traced before.
    """
    from jax.experimental.custom_partitioning import custom_partitioning

    def itself(x: jax.Array) -> jax.Array:
        return x

    def unused(*_: object) -> None:
        return None

    identity: Any = custom_partitioning(itself)
    identity.def_partition(unused, unused, sharding_rule="i -> i")
    return jax.make_jaxpr(identity)(jax.ShapeDtypeStruct((1,), jnp.float32))


@dataclasses.dataclass(frozen=True)
class _Flat:
    """`Ways` with lists of arrays for pytrees.

    Attributes:
      inner: with pytrees.
      tree: of the operands.
    """

    inner: Ways
    tree: TreeDef

    def on(self, target: Target, *arrays: jax.Array) -> list[jax.Array]:
        """The arrays of the value."""
        return jax.tree.leaves(self.inner.on(target, *jax.tree.unflatten(self.tree, arrays)))

    def like(self, *arrays: jax.Array) -> PyTree:
        """As for `Ways`, a pytree."""
        return self.inner.like(*jax.tree.unflatten(self.tree, arrays))

    def stands_for(self, *arrays: jax.ShapeDtypeStruct) -> tuple[Primitive, dict[str, Any]] | None:
        """As for `Ways`."""
        return self.inner.stands_for(*jax.tree.unflatten(self.tree, arrays))


@dataclasses.dataclass(frozen=True)
class _Batched:
    """`Ways` under `jax.vmap`.

    Attributes:
      inner: of one example.
      axes: the axis of the examples in each operand; None: the same for all.
    """

    inner: _Flat | _Batched
    axes: tuple[int | None, ...]

    def on(self, target: Target, *arrays: jax.Array) -> list[jax.Array]:
        """The arrays of all examples, in front."""
        return jax.vmap(functools.partial(self.inner.on, target), self.axes)(*arrays)

    def stands_for(self, *arrays: jax.ShapeDtypeStruct) -> tuple[Primitive, dict[str, Any]] | None:
        """That of one example."""
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]

        def first(*x: jax.Array) -> list[jax.Array]:
            return [v if axis is None else v.take(0, axis) for v, axis in zip(x, self.axes, strict=True)]

        return self.inner.stands_for(*jax.eval_shape(first, *shapes))


_p = Primitive("by_platform")
_p.multiple_results = True


def _bound(*arrays: jax.Array, **params: Any) -> list[jax.Array]:
    return cast(list[jax.Array], _p.bind(*arrays, **params))


@functools.partial(jax.jit, static_argnames=("ways", "results"))
def _compiled(*arrays: jax.Array, ways: _Flat | _Batched, results: _Shapes) -> list[jax.Array]:
    return _bound(*arrays, ways=ways, results=results, needs_devices=_needs_devices())


_UNMAPPED = "unmapped_aval"  # older versions of JAX have it elsewhere

_running: ContextVar[bool] = ContextVar("_running", default=False)


def run_program(program: Callable[[], T], uncompiled: Callable[[], T]) -> T:
    """The result of a compiled program that stands for an operation.

    Where ``jax_debug_nans`` finds a NaN in the results of a program, JAX calls its function again without compiling it,
    to see which operation made the NaN. That call ends here too, and must not run the program once more.
    """
    config = cast(Any, jax.config)
    if _running.get() and (config.jax_debug_nans or config.jax_debug_infs):
        return uncompiled()
    token = _running.set(True)
    try:
        with jax.disable_jit(False):  # an operation is compiled, as each of XLA's own is
            return program()
    finally:
        _running.reset(token)


@_p.def_impl
def _run(*arrays: jax.Array, ways: _Flat | _Batched, results: _Shapes, needs_devices: ClosedJaxpr) -> list[jax.Array]:
    del needs_devices
    return run_program(
        lambda: cast(list[jax.Array], _compiled(*arrays, ways=ways, results=results)),
        lambda: ways.on(target_of(_device_of(arrays)), *arrays),
    )


def _device_of(arrays: Sequence[jax.Array]) -> Any:
    """The device of concrete arrays; the default device if they are NumPy's."""
    held = [device for x in arrays if isinstance(x, jax.Array) for device in x.devices()]
    return cast(Any, held or jax.devices())[0]


def target_of(device: Any) -> Target:
    """The target of programs that are lowered for a `jax.Device`."""
    name = {"gpu": "cuda"}.get(device.platform, device.platform)
    return Target(cast(Platform, name) if name in get_args(Platform) else "other", device.device_kind)


@_p.def_abstract_eval
def _shapes(*arrays: ShapedArray, ways: _Flat | _Batched, results: _Shapes, needs_devices: ClosedJaxpr) -> _Shapes:
    del arrays, ways, needs_devices
    return results


def _jvp(
    primals: Sequence[jax.Array], tangents: object, *, results: _Shapes, **params: Any
) -> tuple[list[jax.Array], list[ad.Zero]]:
    del tangents
    if any(jnp.issubdtype(result.dtype, jnp.inexact) for result in results):
        raise NotImplementedError("by_platform: floats have no derivative here; use jax.lax.stop_gradient on operands")
    out = _bound(*primals, results=results, **params)
    return out, [cast(Any, ad.Zero).from_primal_value(x) for x in out]


def _batch(
    arrays: Sequence[jax.Array],
    axes: Sequence[int | None],
    *,
    ways: _Flat | _Batched,
    results: _Shapes,
    needs_devices: ClosedJaxpr,
) -> tuple[list[jax.Array], list[int]]:
    size = next(x.shape[axis] for x, axis in zip(arrays, axes, strict=True) if axis is not None)
    batched = tuple(unmapped(size, 0, result) for result in results)
    out = _bound(*arrays, ways=_Batched(ways, tuple(axes)), results=batched, needs_devices=needs_devices)
    return out, [0] * len(results)


def _checkpoint(
    saveable: Callable[..., object], unknown: Sequence[bool], ready: Sequence[bool], equation: JaxprEqn
) -> tuple[JaxprEqn | None, JaxprEqn | None, list[bool], list[bool], list[Var]]:
    """How `jax.checkpoint` treats an equation: whether it keeps the value or computes it again.

    JAX's own treatment, except that the policy is asked about the operation that the equation stands for.
    Where a policy moves values to another memory, the value is computed again.
    """
    none, every = ([value] * len(equation.outvars) for value in (False, True))
    missing = [x for x, here in zip(equation.invars, ready, strict=True) if isinstance(x, Var) and not here]
    if any(unknown):
        return None, equation, every, every, missing
    shapes = [x.aval for x in equation.invars]
    primitive, params = equation.params["ways"].stands_for(*shapes) or (_p, equation.params)
    kept = saveable(primitive, *shapes, **params)
    if kept is True or type(kept).__name__ == "SaveableType":
        return equation, None, none, none, []
    return equation, equation, none, every, missing


def _lowering(platform: Platform) -> Any:
    def rule(
        ctx: mlir.LoweringRuleContext,
        *arrays: Any,
        ways: _Flat | _Batched,
        results: _Shapes,
        needs_devices: ClosedJaxpr,
    ) -> Any:
        del results, needs_devices
        on = functools.partial(ways.on, Target(platform, _chip(ctx.module_context, platform)))
        return cast(Any, mlir.lower_fun(on, multiple_results=True))(ctx, *arrays)

    return rule


def _chip(module: mlir.ModuleContext, platform: Platform) -> str | None:
    """The kind of the first device of a program that is lowered; in a `jax.shard_map`, of all that it may run on.

    An exported program may run on other chips than the one that exports it.
    """
    if module.lowering_parameters.for_export:
        return None
    devices = getattr(module.axis_context, "device_assignment", None)
    backend = getattr(module, "backend", None)
    devices = devices or (backend.devices() if backend is not None else ())
    found = target_of(devices[0]) if devices else None
    return found.chip if found is not None and found.platform == platform else None


unmapped: Callable[..., ShapedArray] = getattr(jax.extend.core, _UNMAPPED, None) or getattr(jax.core, _UNMAPPED)
"""The shape of an array with one more axis of a given size, at a given place."""

ad.primitive_jvps[_p] = _jvp
batching.primitive_batchers[_p] = _batch
pe.partial_eval_jaxpr_custom_rules[_p] = _checkpoint
mlir.register_lowering(_p, _lowering("other"))
for _platform in get_args(Platform):
    if _platform != "other":
        mlir.register_lowering(_p, _lowering(_platform), platform=_platform)
