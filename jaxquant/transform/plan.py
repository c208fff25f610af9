"""`Plan`: which parameters are quantized, by which operation, over which axes, and what stays in float and why."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.core.abstract import abstract
from jaxquant.core.blocks import block_shape, scale_shape
from jaxquant.core.errors import printable, quant_error
from jaxquant.core.paths import folded
from jaxquant.core.specs import OpSpec
from jaxquant.core.types import PyTree
from jaxquant.ops.kernel import kernel

Fn = TypeVar("Fn", bound=Callable[..., PyTree])

__all__ = ["UNUSED", "Float", "Item", "Plan", "Product"]

UNUSED = "not used"
"""The reason of a parameter that the function does not use."""


@dataclasses.dataclass(frozen=True)
class Item:
    """One quantized parameter.

    Attributes:
      path: the parameter's path.
      op: the operations it goes into, such as ``"dot_general"`` or ``"take, dot_general"``.
      shape: the parameter's shape.
      dtype: its float dtype, by name.
      reduce_axes: its axes that share a scale, counted from the end.
      spec: how it is quantized. Without a weight spec, the weight is what its leaf is.
      stacked: leading axes that a scan consumes; each layer of the stack is quantized on its own.
      contraction_minor: whether codes are stored with the reduced axes last (not for convolutions).
      dequantize: whether uses that have no quantized form may run on the dequantized weight.
      in_float: its uses that run on float values, and why; empty if all run on codes.
      notes: what else to know.
      rows: rows of the activation that it is multiplied with in a dot_general, the most there are; or 0. None where
        the function was planned for a size that is a symbol: they count as many.
      window: of a convolution, as `jaxquant.ops.conv.Window` has it: feature groups, batch groups, places; or empty.
    """

    path: str
    op: str
    shape: tuple[int, ...]
    dtype: str
    reduce_axes: tuple[int, ...]
    spec: OpSpec
    stacked: int = 0
    contraction_minor: bool = True
    dequantize: bool = False
    in_float: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    rows: int | None = 0
    window: tuple[int, ...] = ()

    @property
    def note(self) -> str:
        """Remarks, as one line."""
        return "; ".join((*self.in_float, *self.notes))

    @property
    def channels(self) -> int:
        """How many numbers of the weight one output sums over."""
        return math.prod(self.shape[axis] for axis in self.reduce_axes)

    @property
    def lookup(self) -> bool:
        """Whether it is only looked up, and therefore has no inputs."""
        return self.op == "take"

    @property
    def kernel(self) -> str:
        """The kernel on the default device; `jaxquant.explain` reads the compiled program."""
        layer = self.shape[self.stacked :]
        length = math.prod(layer[axis] for axis in self.reduce_axes)
        rows, columns = self.rows if self.rows is None else max(self.rows, 1), math.prod(layer) // length

        def named(op: str) -> str:
            experts = layer[0] if op == "ragged_dot" else 1
            how = {"in_stack": self.stacked > 0, "experts": experts}
            return kernel(rows, columns // experts, length, self.spec, self.dtype, op, self.window, **how)

        names = [named(op) for op in self.op.split(", ") if op != "take"]
        unknown = " (rows unknown)" if names and self.rows is None else ""
        return ", ".join(dict.fromkeys(names)) + unknown or "lookup"

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Of the scales, one for each block: those of each layer, if the weight is stacked."""
        spec, stack, layer = self.spec.weight, self.shape[: self.stacked], self.shape[self.stacked :]
        assert spec is not None
        return (*stack, *scale_shape(layer, block_shape(layer, spec.granularity, self.reduce_axes)))

    @property
    def nbytes(self) -> tuple[int, int]:
        """True bytes before and after."""
        before = math.prod(self.shape) * np.dtype(self.dtype).itemsize
        spec = self.spec.weight
        if spec is None:
            return before, before
        minor = None if self.contraction_minor else ()
        layer = abstract(self.shape[self.stacked :], np.dtype(self.dtype), spec, self.reduce_axes, minor=minor)
        return before, math.prod(self.shape[: self.stacked]) * layer.nbytes

    def stack(self, fn: Fn) -> Fn:
        """A function of one layer's weight as a function of the whole stack."""
        for _ in range(self.stacked):
            fn = jax.vmap(fn)
        return fn


@dataclasses.dataclass(frozen=True)
class Float:
    """A parameter that stays in float, and why."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    reason: str

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of two activations that is quantized.

    Attributes:
      name: its name, from the name stack; products of one name are quantized alike.
      shapes: of its left and right operand, where it was planned first; a size that is a symbol by its name.
      spec: ``act`` of the left operand, ``weight`` of the right one.
      note: what else to know.
    """

    name: str
    shapes: tuple[tuple[int | str, ...], tuple[int | str, ...]]
    spec: OpSpec
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Plan:
    """An ordered mapping from path to `Item`, with the parameters that stay in float; prints as a table.

    Lines have at most 80 characters, long paths aside. Repeated layers that are alike are one entry of the table:
    ``layers_{0..31}/kernel``, with the bytes of all.

    Attributes:
      items: what is quantized, in the order of the parameters.
      floats: what is not, with the reason.
      products: products of two activations that are quantized, where an `OpRule` asks for it.

    Example:
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant import recipes
      >>> params = {"w": jnp.ones((64, 32)), "b": jnp.zeros(32)}
      >>> plan = jq.make_plan(lambda p, x: x @ p["w"] + p["b"], params, jnp.ones(64),
      ...                     rules=[jq.Rule("w", recipes.w8a16())])
      >>> plan["w"].reduce_axes
      (-2,)
      >>> jq.Plan.from_json(plan.to_json()) == plan
      True
    """

    items: tuple[Item, ...]
    floats: tuple[Float, ...] = ()
    products: tuple[Product, ...] = ()

    def __getitem__(self, path: str) -> Item:
        found = self.get(path)
        if found is None:
            raise KeyError(path)
        return found

    @functools.cached_property
    def by_path(self) -> Mapping[str, Item]:
        """Path -> item."""
        return {item.path: item for item in self.items}

    def get(self, path: str) -> Item | None:
        """The item of a path, or None."""
        return self.by_path.get(path)

    def __contains__(self, path: object) -> bool:
        return path in self.by_path

    def __iter__(self) -> Iterator[str]:
        return (item.path for item in self.items)

    def __len__(self) -> int:
        return len(self.items)

    def __str__(self) -> str:
        details: dict[str, str] = {}
        sizes: dict[str, tuple[int, int]] = {}
        for item in self.items:
            axes = ", ".join(map(str, item.reduce_axes))
            details[item.path] = f"{item.op} {list(item.shape)} over {axes}: {item.spec.brief}; {item.kernel}"
            sizes[item.path] = item.nbytes
        for left in self.floats:
            details[left.path] = f"{list(left.shape)} {left.dtype}: {left.reason}"
            sizes[left.path] = (left.nbytes, left.nbytes)
        rule = "-" * _WIDTH
        lines = [_row("path", "bytes before", "after"), rule]
        for label, paths in folded(details).items():
            lines.append(_row(label, *(f"{sum(sizes[path][i] for path in paths):,}" for i in (0, 1))))
            lines += _indented(details[paths[0]])
        for product in self.products:
            left, right = (f"[{', '.join(map(str, shape))}]" for shape in product.shapes)
            lines += [printable(product.name), *_indented(f"product {left} x {right}: {_product(product.spec)}")]
        before, after = (sum(size[i] for size in sizes.values()) for i in (0, 1))
        ratio = f" ({before / after:.2f}x smaller)" if after else ""
        lines += [rule, _row(f"total: {len(self.items)} quantized{ratio}", f"{before:,}", f"{after:,}")]
        told = {item.path: item.note for item in self.items if item.note}
        notes = [f"{label}: {told[paths[0]]}" for label, paths in folded(told).items()]
        notes += [f"{product.name}: {product.note}" for product in self.products if product.note]
        lines += [line for note in notes for line in _wrapped(note, "", "  ")]
        return "\n".join(lines)

    def to_json(self) -> str:
        """This plan as JSON."""
        items = [{**dataclasses.asdict(i), "spec": i.spec.to_dict()} for i in self.items]
        products = [{**dataclasses.asdict(p), "spec": p.spec.to_dict()} for p in self.products]
        floats = [dataclasses.asdict(f) for f in self.floats]
        return json.dumps({"items": items, "floats": floats, "products": products})

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Inverse of `to_json`."""
        try:
            data = json.loads(text)
            items = [_item(i) for i in data["items"]]
            floats = [Float(**{**f, "shape": tuple(f["shape"])}) for f in data["floats"]]
            products = [
                Product(**{**p, "shapes": tuple(map(tuple, p["shapes"])), "spec": OpSpec.from_dict(p["spec"])})
                for p in data.get("products", ())
            ]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise quant_error("Plan", f"not a plan ({error!r})", todo="Pass what to_json returned") from None
        return cls(tuple(items), tuple(floats), tuple(products))


def _item(data: dict[str, Any]) -> Item:
    tuples = {name: tuple(value) for name, value in data.items() if isinstance(value, list)}
    return Item(**{**data, **tuples, "spec": OpSpec.from_dict(data["spec"])})


_WIDTH = 80


def _row(label: str, before: str, after: str) -> str:
    """A line with two numbers on the right; a label that is too long for that has a line of its own."""
    numbers = f"{before:>16}{after:>16}"
    room, label = _WIDTH - len(numbers), printable(label)
    return f"{label.ljust(room)}{numbers}" if len(label) <= room else f"{label}\n{numbers.rjust(_WIDTH)}"


def _wrapped(text: str, first: str, rest: str) -> list[str]:
    """Lines that fit; words are not cut."""
    return textwrap.wrap(printable(text), _WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False,
                         break_on_hyphens=False)  # fmt: skip


def _indented(text: str) -> list[str]:
    return _wrapped(text, "  ", "    ")


def _product(spec: OpSpec) -> str:
    assert spec.weight is not None
    return f"{spec.act_brief} x {spec.weight.brief}"


def is_float(x: PyTree) -> bool:
    """Whether a leaf is a float array (or the shape of one)."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)
