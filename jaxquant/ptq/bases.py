"""Bases in which a weight may be quantized: its input channels scaled, or rotated.

A change of basis leaves a product unchanged, ``x @ w = (x @ B) @ (inv(B) @ w)``, but changes its rounding error.
`jaxquant.invariances.precondition` brings a model's inputs into a basis, `jaxquant.invariances.precondition_params` its
weights. The bases are pytrees, with a leading axis on each leaf for stacked weights. Their cost per row of the input:
`ChannelScale` one multiplication per channel, `Rotation` two products with small matrices, `Orthogonal` one product
with a matrix [channels, channels].
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxquant.core.errors import quant_error

__all__ = ["Basis", "ChannelScale", "Orthogonal", "Rotation", "orthogonal"]


class Basis:
    """A change of basis of the input channels of a weight; a frozen dataclass of arrays."""

    @property
    def channels(self) -> int:
        """The number of input channels."""
        raise NotImplementedError

    def inputs(self, x: jax.Array) -> jax.Array:
        """``x @ B``, on the last axis."""
        raise NotImplementedError

    def weights(self, w: jax.Array) -> jax.Array:
        """``inv(B) @ w``, on the first axis of two."""
        raise NotImplementedError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChannelScale(Basis):
    """``B = diag(1 / scale)``: channel k of the weight is multiplied by ``scale[k]`` before it is rounded.

    Attributes:
      scale: positive, [channels].

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxquant.ptq.bases import ChannelScale
      >>> basis = ChannelScale(jnp.array([1.0, 4.0]))
      >>> basis.inputs(jnp.array([[2.0, 8.0]])) @ basis.weights(jnp.array([[1.0], [0.5]]))
      Array([[6.]], dtype=float32)

    Source: Lin et al. 2023 (AWQ, arXiv:2306.00978), section 3.2; Xiao et al. 2022 (SmoothQuant, arXiv:2211.10438).
    """

    scale: jax.Array

    @property
    def channels(self) -> int:
        return self.scale.shape[-1]

    def inputs(self, x: jax.Array) -> jax.Array:
        return x / jnp.expand_dims(self.scale.astype(x.dtype), tuple(range(x.ndim - 1)))

    def weights(self, w: jax.Array) -> jax.Array:
        return w * self.scale.astype(w.dtype)[:, None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rotation(Basis):
    """``B = diag(signs) (H (x) O)``, orthogonal: an outlier in one channel is spread over all of them.

    H is the Hadamard matrix of a power of two and O a small orthogonal matrix. With sizes a and b, ab = n, a row of n
    channels costs n (a + b) multiplications instead of n^2.

    Attributes:
      signs: +1 or -1, [channels]; random signs give a random rotation.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxquant.ptq.bases import Rotation
      >>> x = jnp.zeros((1, 384)).at[0, 5].set(1.0)
      >>> float(jnp.abs(Rotation.random(jax.random.key(0), 384).inputs(x)).max()).__round__(4)  # 1 / sqrt(384)
      0.051

    Source: Ashkboos et al. 2024 (QuaRot, arXiv:2404.00456), section 3; Tseng et al. 2024 (QuIP#, arXiv:2402.04396) for
      the random signs.
    """

    signs: jax.Array

    @classmethod
    def random(cls, key: jax.Array, channels: int, stacked: tuple[int, ...] = ()) -> Rotation:
        """A random rotation of ``channels`` channels, one for each layer of a stack."""
        return cls(jax.random.rademacher(key, (*stacked, channels), jnp.float32))

    @property
    def channels(self) -> int:
        return self.signs.shape[-1]

    def inputs(self, x: jax.Array) -> jax.Array:
        a, b = (jnp.asarray(m, x.dtype) for m in _factors(self.channels))
        signed = x * jnp.expand_dims(self.signs.astype(x.dtype), tuple(range(x.ndim - 1)))
        parts = signed.reshape(*x.shape[:-1], a.shape[0], b.shape[0])
        return jnp.einsum("...ij,ik,jl->...kl", parts, a, b, precision=lax.Precision.HIGHEST).reshape(x.shape)

    def weights(self, w: jax.Array) -> jax.Array:
        return self.inputs(w.T).T  # the inverse of an orthogonal matrix is its transpose


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Orthogonal(Basis):
    """``B`` is any orthogonal matrix, such as `learn_rotations` finds; costs n^2 multiplications per row.

    Attributes:
      matrix: [channels, channels].

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxquant.ptq.bases import Orthogonal
      >>> Orthogonal(jnp.array([[0.0, 1.0], [1.0, 0.0]])).inputs(jnp.array([2.0, 3.0]))
      Array([3., 2.], dtype=float32)
    """

    matrix: jax.Array

    @property
    def channels(self) -> int:
        return self.matrix.shape[-1]

    def inputs(self, x: jax.Array) -> jax.Array:
        return jnp.matmul(x, self.matrix.astype(x.dtype), precision="highest")

    def weights(self, w: jax.Array) -> jax.Array:
        return jnp.matmul(self.matrix.astype(w.dtype).T, w, precision="highest")


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % i for i in range(2, int(n**0.5) + 1))


def _sylvester(n: int) -> np.ndarray:
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h / n**0.5


def _paley(n: int) -> np.ndarray:
    """The Hadamard matrix of order n = q + 1 for a prime q = 3 mod 4, divided by sqrt(n)."""
    q = n - 1
    residues = {i * i % q for i in range(1, q)}
    character = np.array([0] + [1 if i in residues else -1 for i in range(1, q)])
    s = np.zeros((n, n))
    s[0, 1:], s[1:, 0] = 1, -1
    s[1:, 1:] = character[(np.arange(q)[None, :] - np.arange(q)[:, None]) % q]
    return (s + np.eye(n)) / n**0.5


def _cosine(n: int) -> np.ndarray:
    """The orthonormal cosine transform (DCT-II)."""
    i, k = np.arange(n)[:, None], np.arange(n)[None, :]
    m = np.cos(np.pi * (2 * i + 1) * k / (2 * n)) * (2 / n) ** 0.5
    m[:, 0] = n**-0.5
    return m


@functools.cache
def _factors(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Two orthogonal matrices whose Kronecker product is the rotation of n channels."""
    odd = n // (n & -n)
    if odd == 1:
        a = 1 << (n.bit_length() // 2)
        return _sylvester(n // a), _sylvester(a)
    for base in (4 * odd, 8 * odd, 16 * odd):
        if n % base == 0 and _is_prime(base - 1):
            return _sylvester(n // base), _paley(base)
    return _sylvester(n // odd), _cosine(odd)


def orthogonal(n: int) -> np.ndarray:
    """The matrix of a `Rotation` of n channels without its signs, [n, n]: a Hadamard matrix if one can be constructed.

    All entries are +-1 / sqrt(n) if n is a power of two, or if with m its odd factor one of 4 m, 8 m or 16 m divides n
    and is a prime plus one, as for 12, 20, 24, 384, 1536. Otherwise a cosine transform mixes the odd factor of n.

    Raises:
      QuantError: if n is not positive.

    Example:
      >>> from jaxquant.ptq import bases
      >>> m = bases.orthogonal(12)
      >>> bool(abs(m @ m.T - np.eye(12)).max() < 1e-12), bool(abs(abs(m) - 12**-0.5).max() < 1e-12)
      (True, True)

    Source: Paley 1933; Sylvester 1867.
    """
    if n < 1:
        raise quant_error("orthogonal", "n must be positive", todo="Pass the number of channels", n=n)
    return np.kron(*_factors(n))
