"""What the laws are tried on: specs, shapes and axes, and arrays whose blocks all have different magnitudes."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from jaxquant import QuantSpec
from jaxquant.core.qtypes import QTYPES

__all__ = ["CASES", "DTYPES", "LAYOUTS", "SCHEMES", "Case", "all_cases", "arrays", "unequal"]

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)

# (shape, reduce_axes): ranks 1 to 4, axes adjacent and not, none and all. Groups of 32 fit all but the last.
LAYOUTS = (
    ((64,), (-1,)),
    ((6, 64), (-1,)),
    ((64, 6), (-2,)),
    ((4, 8, 10), (-3, -2)),
    ((3, 32, 5), (-2,)),
    ((2, 32, 3, 4), (-3,)),
    ((4, 3, 8, 5), (-4, -2)),
    ((3, 4, 2, 32), (-4, -1)),
    ((2, 2, 4, 8), (-4, -3, -2, -1)),
    ((5, 7), ()),
)

# (number type, symmetric): everything there is
SCHEMES = tuple(
    (name, symmetric)
    for name, info in QTYPES.items()
    for symmetric in ((True, False) if info.kind == "int" else (True,))
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One spec on one kind of array."""

    spec: QuantSpec
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    dtype: type

    def __str__(self) -> str:
        s = self.spec
        kind = "sym" if s.symmetric else "asym"
        group = s.group_size or ""
        shape, axes = "x".join(map(str, self.shape)), ",".join(map(str, self.axes))
        return f"{s.qtype}-{kind}-{s.granularity}{group}-{shape}-on({axes})-{jnp.dtype(self.dtype).name}"


def _spec(qtype: str, symmetric: bool, granularity: str, group_size: int) -> QuantSpec:
    if QTYPES[qtype].group_size is not None:
        return QuantSpec(qtype)
    return QuantSpec(
        qtype,
        symmetric=symmetric,
        granularity=granularity,
        group_size=group_size if granularity == "per_group" else None,
    )


def all_cases(qtype: str):
    """Every scheme of a number type, with every granularity, on every layout; dtypes and group sizes take turns."""
    turn = itertools.count()
    for scheme in SCHEMES:
        if scheme[0] != qtype:
            continue
        block_format = QTYPES[qtype].group_size is not None
        for granularity in ("per_group",) if block_format else ("per_tensor", "per_channel", "per_group"):
            for shape, axes in LAYOUTS:
                if axes or granularity != "per_group":
                    n = next(turn)
                    yield Case(_spec(*scheme, granularity, (32, 16, 8)[n % 3]), shape, axes, DTYPES[n % len(DTYPES)])


def _some_cases():
    """A selection that holds every scheme, and every layout with every granularity."""
    granularities = ("per_channel", "per_group", "per_tensor")
    for n, scheme in enumerate(SCHEMES):
        shape, axes = LAYOUTS[n * 4 % 9]
        yield Case(_spec(*scheme, granularities[n % 3], (8, 32, 16)[n // 3 % 3]), shape, axes, DTYPES[n // 2 % 3])
    for n, ((shape, axes), granularity) in enumerate(itertools.product(LAYOUTS, granularities)):
        if axes or granularity != "per_group":
            yield Case(_spec(("int8", "int4", "uint4")[n % 3], n % 3 != 2, granularity, 16), shape, axes, DTYPES[n % 3])


CASES = tuple(dict.fromkeys(_some_cases()))


def unequal(rng: np.random.Generator, shape: tuple[int, ...], decades: float = 1.0) -> np.ndarray:
    """Positive factors that differ along every axis, by up to ``decades`` powers of ten each way."""
    out = np.ones(shape)
    for axis, n in enumerate(shape):
        factor = 10.0 ** rng.uniform(-decades, decades, n)
        out = out * factor.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return out


_KINDS = ("normal", "ties", "one-sided", "sparse", "constant", "wide")


@st.composite
def arrays(draw, shape, dtype, *, infinities: bool = True) -> np.ndarray:
    """Finite arrays (and some with infinities) of a shape and dtype, at magnitudes from 1e-30 to 1e30."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(_KINDS))
    half = jnp.dtype(dtype) == jnp.float16
    magnitude = 10.0 ** draw(st.integers(-6, 1) if half else st.integers(-30, 30))
    x = rng.standard_normal(shape)
    if kind == "ties":  # halves of a power of two: many quotients fall between two codes
        x = np.rint(x * 8) / 2 * 2.0 ** np.floor(np.log2(magnitude))
    elif kind == "constant":
        x = np.full(shape, rng.choice([-1.0, 1.0])) * magnitude
    elif kind == "wide":
        x = np.sign(x) * 10.0 ** rng.uniform(-4, 1, shape) * magnitude
    else:
        x = (np.abs(x) if kind == "one-sided" else x) * unequal(rng, shape) * magnitude
    if kind == "sparse":  # single zeros, and whole slices of them
        x = x * (rng.random(shape) < 0.7)
        axis = rng.integers(len(shape))
        x = x * (rng.random(shape[axis]) < 0.6).reshape([-1 if a == axis else 1 for a in range(len(shape))])
    x = np.where(np.abs(x) < 1e-33, 0, x)  # subnormal float32 numbers have their own test
    x = np.clip(x, -3e4, 3e4) if half else x
    if infinities and draw(st.integers(0, 3)) == 0:
        x = np.where(rng.random(shape) < 0.05, rng.choice([-np.inf, np.inf], shape), x)
    return x.astype(dtype)
